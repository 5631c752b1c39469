"""The MLX side of the block loop: a model, its prefix, and the arrays that live from step to step.

Shapes   B rows, T prompt tokens, C canvas slots, V vocabulary
Source   transformers 5.23.0, _denoising_step
"""

import mlx.core as mx
import numpy as np

from .cache import PrefixCache
from .config import GenerationConfig
from .denoise import Step
from .elementary import softcap
from .errors import DgemmaError
from .fits import PREFILL_CHUNK, mlx_refusal
from .model import DiffusionGemma
from .products import activations, device_memory
from .sampler import accept_mask
from .units import human_bytes
from .vocabulary import Reader, best_blocks


class MlxEngine:
    """Implements denoise.Engine."""

    def __init__(self, model: DiffusionGemma, cache: PrefixCache | None = None):
        self.model = model
        self.cache = cache or model.make_cache()
        self.canvas_length = model.config.canvas_length
        self.vocab_size = model.config.vocab_size
        self.flexible = True
        self.canvas = self.soft = None  # what the next step reads: (B, C) tokens, and (B, C, H) or None
        self._seen = self.cache  # the prefixes of the rows in play
        self._table = model.table
        self._settings = model.generation_config
        self._flat = 1.0  # share of slots whose self-conditioning read all tokens in the step before

    @property
    def cache_bytes(self) -> int:
        return self.cache.nbytes

    def peak_memory(self) -> int:
        """Most bytes MLX held at once since the process began, weights included."""
        return mx.get_peak_memory()

    def copy(self) -> "MlxEngine":
        """An engine with the same prefix; encoding into one leaves the other as it is."""
        return MlxEngine(self.model, self.cache.copy())

    def spread(self, rows: int) -> "MlxEngine":
        """An engine with this one's only row as often as asked for."""
        self._check_room(rows, 0)
        return MlxEngine(self.model, self.cache.select(mx.zeros(rows, mx.int32)))

    def use(self, config: GenerationConfig) -> None:
        self._settings = config

    def prefill(self, tokens: np.ndarray, padding: np.ndarray | None = None) -> None:
        """Append (B, T) tokens to the prefix; padding (B,) counts pad tokens at the left of each row."""
        self._check_room(*tokens.shape)
        if padding is not None:
            padding = mx.array(padding, mx.int32) if padding.any() else None
        for start in range(0, tokens.shape[1], PREFILL_CHUNK):
            chunk = mx.array(tokens[:, start : start + PREFILL_CHUNK], mx.int32)
            self.model.prefill(chunk, self.cache, padding)
            padding = None
            mx.eval(self.cache.arrays)

    commit = prefill

    def _check_room(self, rows, tokens):
        """MLX would end the process, or the system would, where memory runs out."""
        model, room = self.model, device_memory()
        if room and not model.allow_overcommit:
            in_use = mx.get_active_memory() - self.cache.nbytes  # weights, and what else this process holds
            how = activations(model.dtype, model.packed)
            where, length = f"this device has {human_bytes(room)}", self.cache.length + tokens
            if problem := mlx_refusal(model.config, in_use, length, rows, how, room, where):
                raise DgemmaError(problem)

    def start(self, canvas: np.ndarray) -> None:
        self.canvas, self.soft, self._seen, self._flat = mx.array(canvas), None, self.cache, 1.0

    def select(self, rows: np.ndarray, length: int) -> None:
        if len(rows) < len(self.canvas):
            self._seen = self._seen.select(mx.array(rows))
        rows = mx.array(rows)
        self.canvas = self.canvas[rows][:, :length]
        self.soft = None if self.soft is None else self.soft[rows][:, :length]

    def step(self, temperature, entropy_bound: float, uniforms: np.ndarray, renoise: np.ndarray, free=None) -> Step:
        """temperature: a number, or one per row. free: all slots by default."""
        return self.read(self._hidden(), temperature, entropy_bound, uniforms, renoise, free)

    def _hidden(self):
        """(B, C, H)"""
        return self.model.denoise_hidden(self.canvas, self._seen, self.soft)

    def read(self, hidden, temperature, entropy_bound: float, uniforms, renoise, free=None) -> Step:
        """A step behind the layers: hidden (B, C, H) → what comes of it, and what the next step reads."""
        B, C, H = hidden.shape
        cap = self.model.config.final_logit_softcapping
        reader = Reader(hidden.reshape(B * C, H), self._table, cap, _per_slot(temperature, B, C))
        k = self._settings.conditioning_k
        # Where most slots were unsure, one pass that reads everything is the cheaper one.
        few = k is not None and self._flat < 0.5
        found = reader.read(mx.array(uniforms).reshape(-1), mix=not few)
        soft, covered = found.soft, None
        if few:
            soft, covered = reader.mix_blocks(found, k)
        elif k is not None:
            covered = best_blocks(found.masses, k)[1]
        draft, entropy, sampled = (x.reshape(B, C) for x in (found.draft, found.entropy, found.sampled))
        accepted = accept_mask(entropy, entropy_bound, None if free is None else mx.array(free))
        self.canvas = mx.where(accepted, sampled, mx.array(renoise))
        mx.eval(draft, self.canvas, accepted, entropy, soft, [] if covered is None else covered)  # a step's one wait
        if covered is not None:
            flat = np.flatnonzero(np.array(covered) < 1 - self._settings.conditioning_epsilon)
            self._flat = len(flat) / (B * C)
            if few and len(flat):
                soft = reader.mix_slots(found, soft, flat)
        self.soft = self.model.scaled(soft).reshape(B, C, H)
        return Step(np.array(draft), np.array(self.canvas), np.array(accepted), np.array(entropy))

    def logits(self, temperature: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Processed logits of the canvas in play, lm_head limited to `tokens` (A,): (B, C, A) float32."""
        hidden = self._hidden()
        raw = self._table.logits(hidden, self._table.pick(mx.array(tokens, mx.int32)))
        scale = 1 / mx.array(np.reshape(temperature, (-1, 1, 1)).astype(np.float32))
        return np.array(softcap(raw, self.model.config.final_logit_softcapping, scale))

    def put(self, canvas: np.ndarray, shares: np.ndarray, tokens: np.ndarray) -> None:
        """What the next step reads: canvas (B, C), and self-conditioning from shares (B, C, A) of `tokens` (A,)."""
        rows = self._table.pick(mx.array(tokens, mx.int32))
        self.canvas = mx.array(canvas, mx.int32)
        soft = self._table.mix(mx.array(shares).astype(self.model.dtype), rows)
        self.soft = self.model.scaled(soft).astype(self.model.dtype)


def _per_slot(temperature, B, C):
    """One number where all rows share it; otherwise one per slot, rows flattened. (B · C, 1)"""
    temperature = np.reshape(temperature, -1)
    if np.ptp(temperature) == 0:
        return float(temperature[0])
    return mx.array(np.repeat(temperature.astype(np.float32), C)[:, None])
