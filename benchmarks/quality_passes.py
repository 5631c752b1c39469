"""A model run over noisy canvases: what it says is kept as a base, or scored against one.

Shapes   N canvases, B of them at once, C canvas slots, V vocabulary
Source   mlx_dgemma's loop for the two passes: logits over the temperature of that share of noise condition the second
Differs  the answer is known: canvases are the right answer with random tokens in it, so all models see the same ones
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convert.examples import NOISE_SHARES, temperature_at
from mlx_dgemma.config import GenerationConfig, ModelConfig
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.noise import NoiseStream
from mlx_dgemma.quality import first_bad_tensor, not_finite

from .quality_base import Base
from .quality_data import Data
from .quality_engines import Model
from .quality_scores import PASSES, Sums, by_instance, noisy, ratio, read, score, summary

MOST_ROWS, MOST_LOGITS = 25, 1 << 26  # canvases at once


class NotFinite(DgemmaError):
    """A model says infinity or NaN; `why_not_finite` says more."""


def why_not_finite(path: Path) -> DgemmaError:
    """What to tell of a folder or GGUF whose logits are not finite: reads its weights."""
    if name := first_bad_tensor(path):
        return not_finite(name, path)
    return DgemmaError(
        f"{path}: logits are not finite, expected numbers; its stored floats are, so try --dtype float32 or another "
        "engine, or convert the checkpoint again"
    )


class Plan(NamedTuple):
    """What every model is asked, the reference first."""

    data: Data
    config: ModelConfig
    settings: GenerationConfig  # the reference's, for temperatures
    slots: int
    seed: int
    ts: tuple[float, ...] = NOISE_SHARES

    @property
    def rows(self) -> int:
        """Canvases at once."""
        return max(1, min(MOST_ROWS, MOST_LOGITS // (self.config.canvas_length * self.config.vocab_size)))

    @property
    def passes(self) -> int:
        """Canvases denoised, and one for every text that the encoder reads."""
        return len(self.data.canvases) * len(self.ts) * len(PASSES) + len(self.data.texts)


def readings(model: Model, plan: Plan, share_type, advance: Callable = lambda n: None) -> Iterator[tuple]:
    """(canvas, share of noise, pass) as numbers, the noisy canvas, and what the model said of it."""
    canvases, stream, V = plan.data.canvases, NoiseStream(plan.seed), plan.config.vocab_size
    order = sorted(range(len(canvases)), key=lambda n: len(canvases[n].prefix))  # little padding
    for start in range(0, len(order), plan.rows):
        rows = order[start : start + plan.rows]
        prefix = model.prefix([canvases[n].prefix for n in rows])
        for i, t in enumerate(plan.ts):
            asked = [noisy(canvases[n], t, stream, V, plan.slots) for n in rows]
            before = None
            for p in range(len(PASSES)):
                logits, experts = model.denoise(np.stack([at.tokens for at in asked]), prefix, before)
                for b, (n, at) in enumerate(zip(rows, asked, strict=True)):
                    told = None if experts is None else experts[b]
                    reading = read(logits[b], canvases[n].clean, at.sampled, share_type, told)
                    if not np.isfinite(reading.loss).all():
                        raise NotFinite("logits are not finite, expected numbers")
                    yield n, i, p, at, reading
                advance(len(rows))
                before = logits / np.float32(temperature_at(t, plan.settings))


def next_tokens(model: Model, plan: Plan, advance: Callable = lambda n: None) -> np.ndarray:
    """(instances, 2): the encoder's loss in nats, and over how many tokens"""
    found = []
    for text in plan.data.texts:
        losses = model.next_token_losses(text.tokens, text.first)
        found.append((losses.sum(dtype=np.float64), len(losses)))
        advance(1)
    return np.array(found)


def fill(model: Model, plan: Plan, base: Base, advance: Callable = lambda n: None) -> None:
    """Run the reference, and keep what it says."""
    base.next_token[:] = next_tokens(model, plan, advance)
    for n, t, p, _, reading in readings(model, plan, base.share_type, advance):
        base.put(n, t, p, reading)


def reference_scores(plan: Plan, base: Base) -> tuple[dict, Sums]:
    """The reference's own figures, and its sums."""
    sums, stream = Sums.empty(len(plan.data.canvases), len(plan.ts)), NoiseStream(plan.seed)
    for n, canvas in enumerate(plan.data.canvases):
        for i, t in enumerate(plan.ts):
            at = noisy(canvas, t, stream, plan.config.vocab_size, plan.slots)
            for p in range(len(PASSES)):
                loss = base.get(n, i, p).loss
                sums.slots[:, n, i, p] = len(loss), at.corrupted.sum()
                sums.loss[:, n, i, p] = loss.sum(), loss[at.corrupted].sum()
    made = {"denoising": summary(sums, plan.data.instance, ts=plan.ts), "encoder": encoder_summary(base.next_token)}
    return made, sums


def scores(model: Model, plan: Plan, base: Base, reference: Sums, advance: Callable = lambda n: None) -> dict:
    """A candidate's figures, all of them against the reference's."""
    theirs = next_tokens(model, plan, advance)
    sums = Sums.empty(len(plan.data.canvases), len(plan.ts))
    for n, i, p, at, reading in readings(model, plan, base.share_type, advance):
        for field, values in zip(sums, score(reading, base.get(n, i, p), at), strict=True):
            field[:, n, i, p] = values
    return {
        "denoising": summary(sums, plan.data.instance, reference, plan.ts),
        "kl_by_instance": by_instance(sums, plan.data.instance),
        "encoder": encoder_summary(theirs, base.next_token),
    }


def encoder_summary(found: np.ndarray, reference: np.ndarray | None = None) -> dict:
    """Of (instances, 2) sums. A perplexity's interval is e^(loss ± 1.96 se)."""
    each = np.arange(len(found))
    loss = ratio(found[:, 0], found[:, 1], each)
    made = {"loss": loss, "perplexity": float(np.exp(loss["mean"])), "tokens": int(found[:, 1].sum())}
    if reference is not None:
        made["difference"] = ratio(found[:, 0] - reference[:, 0], found[:, 1], each)
    return made
