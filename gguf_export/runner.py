"""A GGUF and its description, run: prompts into the prefix, canvases to logits, whole steps on the device.

Shapes   B rows, T tokens, C canvas slots, H hidden, V vocabulary; numpy arrays, slowest axis first
Source   mlx_dgemma/model.py, whose methods these are; docs/formats.md for what the host must do
Differs  a prefix has room for a number of tokens and grows when that is used up; a copy takes memory

Knows no ggml: an executor computes graphs. executor.py's does it on ggml's devices, numpy_executor.py's in numpy.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlx_dgemma.config import GenerationConfig, ModelConfig
from mlx_dgemma.errors import ContextError, DgemmaError
from mlx_dgemma.fits import PREFILL_CHUNK, Context, enforce, tokens_of
from mlx_dgemma.gguf.model import open_gguf
from mlx_dgemma.hub import model_path
from mlx_dgemma.tensors import text_tensors
from mlx_dgemma.tokenizer import Tokenizer
from mlx_dgemma.units import count

from .choices import chosen_options
from .description import Graph, Leaf, Shape, chain, rounded
from .description_form import check_form
from .devices import check_version, choose, cpu, devices, open_ggml
from .executor import Executor
from .expansion import expand
from .forecast import RUN, plan_of, slots_of_sliding, stored_leaves
from .graph import describe_model
from .graph_check import check_belongs, stored_specs
from .host_inputs import layer_inputs
from .memory import Memory, Split, refusal_of
from .quantize import cores

KEPT_PREFIXES = 3  # of different numbers of rows: a search for a hole's length goes back and forth between two
KEPT_GRAPHS = 32  # expanded, not compiled: one takes milliseconds to make and a megabyte to keep
MAX_THREADS = 512  # GGML_MAX_N_THREADS; more end the process


class Prefix:
    """The committed tokens of one batch, as `Runner.make_cache` returns it."""

    def __init__(self, runner: "Runner", rows: int, room: int):
        self.runner, self.rows, self.length = runner, rows, 0
        self.padding = np.zeros(rows, np.int32)
        self._set_room(room)

    def _set_room(self, room):
        self.room = rounded(room)
        self.runner.check_room(self.rows, self.room)
        self.state = self.runner.executor.new_state(
            self.runner.persistent(self.shape(self.runner.config.canvas_length))
        )

    def clear(self) -> None:
        """Empty again. What its slots hold is overwritten before any mask shows it."""
        self.length, self.step_inputs = 0, None
        self.padding = np.zeros(self.rows, np.int32)

    def shape(self, tokens: int) -> Shape:
        return Shape(self.rows, tokens, self.length, self.runner.slots_sliding, self.room)

    def need(self, tokens: int) -> None:
        """Make room for `tokens` behind the prefix, twice as much as before if it grows."""
        if self.length + tokens > self.room:
            old, old_room = self.state, self.room
            self._set_room(max(self.length + tokens, 2 * self.room))
            for name, leaf in old.leaves.items():
                # A row of the batch keeps its slots; only the room behind them grew.
                values, ne = old.read(name), self.state.leaves[name].spec.ne
                if ne != leaf.spec.ne and (leaf.spec.ne[1] != old_room or ne != (ne[0], self.room, *leaf.spec.ne[2:])):
                    raise DgemmaError(f"description: {name} grows from {leaf.spec}, expected slots as its second axis")
                new = np.zeros(ne[::-1], values.dtype)
                new[:, :, : values.shape[2]] = values
                self.state.write(name, new)
            old.close()

    def copy(self) -> "Prefix":
        """The same prefix again; encoding into one leaves the other as it is."""
        twin = object.__new__(Prefix)
        twin.__dict__.update(self.__dict__, state=self.state.copy())
        return twin

    def spread(self, rows: int) -> "Prefix":
        """The only row of this prefix in as many rows."""
        twin = self.runner.make_cache(rows, self.room)
        for name in self.state.leaves:
            if name.startswith("blk."):
                # A spare prefix may have more room than this one.
                values = self.state.read(name)
                new = np.zeros(twin.state.leaves[name].spec.ne[::-1], values.dtype)
                new[:, :, : values.shape[2]] = values
                twin.state.write(name, new)
        twin.length, twin.padding = self.length, np.repeat(self.padding, rows)
        return twin

    @property
    def nbytes(self) -> int:
        """Keys and values, room included."""
        return sum(leaf.spec.nbytes for name, leaf in self.state.leaves.items() if name.startswith("blk."))


class Runner:
    """A model ready to run. `encode` and `denoise` are those of mlx_dgemma.load's model, on numpy arrays.

    gguf_path: a file, a folder that holds one, or owner/name/FILE.gguf of the hub. device: "auto", or a name that
    `python -m gguf_export devices` prints. attention: "flash" (default), or "exact" for mul_mat and soft_max.
    self_conditioning: "top-k", or "exact", which takes a table of V × H on the device (default where the vocabulary is
    so small that top-k would gather as many rows). form: "gpu" or "cpu",
    operations that suit the device (default). cache_type: "f16" or "f32", by default f32 for a file of f32.
    n_gpu_layers: layers on the device, the last ones; the CPU has the others.
    description: one that was read with `read_description`; made from the file by default.
    context: tokens of prompt and answer that memory must have room for, or what says how many; by default one canvas.
    allow_overcommit: go on where that does not fit, and say so to on_note.
    Raises DgemmaError for a file that is not the whole model, a description of another, an unknown device, too little
    memory.
    """

    def __init__(
        self,
        gguf_path: str | Path,
        device: str = "auto",
        *,
        attention: str | None = None,
        self_conditioning: str | None = None,
        form: str | None = None,
        cache_type: str | None = None,
        n_gpu_layers: int | None = None,
        threads: int | None = None,
        description: dict | None = None,
        context: Context = None,
        allow_overcommit: bool = False,
        on_note: Callable[[str], None] = lambda note: None,
        executor=None,
    ):
        path = model_path(gguf_path, files=["config.json"])
        if path.is_dir():
            raise DgemmaError(
                f"{gguf_path}: found a folder without a GGUF file, expected one; make it from the original checkpoint "
                "with `python -m convert CHECKPOINT OUT.gguf --recipe Q4_K_M`"
            )
        self.model = open_gguf(path)
        self.config: ModelConfig = self.model.config
        self.generation_config: GenerationConfig = self.model.generation
        self.description = check_form(description) if description else describe_model(self.model)
        check_belongs(self.description, self.model)
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise DgemmaError(f"--threads is {threads}, expected 1 to {MAX_THREADS}")
        library = chosen = None
        if executor is None:
            library = open_ggml()
            chosen = choose(library, device)
        self.options = chosen_options(
            self.description,
            self.model,
            on_cpu=chosen is None or chosen.kind == "cpu" or n_gpu_layers == 0,
            attention=attention,
            self_conditioning=self_conditioning,
            form=form,
            cache_type=cache_type,
        )
        self.stored = stored_specs(self.model.file)
        self.slots_sliding = slots_of_sliding(self.config)
        self._tokenizer: Tokenizer | None = None
        self.allow_overcommit = allow_overcommit
        # What a run is known to need is set aside at once: a prefix that grows holds both lengths for a moment.
        self._room = 0 if context is None else tokens_of(context, self.tokenizer(), self.config, self.generation_config)
        self._graphs: dict[tuple, Graph] = {}
        self._spares: dict[int, Prefix] = {}  # rows → a prefix that nobody reads, the newest last
        self._needs: dict[tuple[int, int], list[int]] = {}  # (rows, room) → bytes on each device
        weights = self._weights()  # before anything is allocated: a wrong description ends here
        if executor is None:
            check_version(self.description, library)
            enforce(self._refusal(library, chosen, n_gpu_layers), allow_overcommit, on_note)
            executor = Executor(library, self.model, chosen, n_gpu_layers, threads or cores())
        self.executor = executor
        self.executor.load(weights)

    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_gguf(self.model.file, self.config)
        return self._tokenizer

    def make_engine(self):
        """What a session drives: `mlx_dgemma.generate` takes a runner where it takes a model."""
        from .engine import GgmlEngine

        return GgmlEngine(self)

    def make_cache(self, rows: int = 1, room: int | None = None) -> Prefix:
        """An empty prefix for `rows` rows. room: tokens it can hold before it must grow."""
        room = max(room or self.config.canvas_length, self._room if rows == 1 else 0)
        room, spare = rounded(room), self._spares.get(rows)
        if spare is not None and room <= spare.room <= 2 * room:
            del self._spares[rows]
            spare.clear()
            return spare
        return Prefix(self, rows, room)

    def give_back(self, cache: Prefix) -> None:
        """Keep a prefix that nobody reads any more, with its compiled graphs, for the next `make_cache` of its size."""
        self._spares.pop(cache.rows, None)
        self._spares[cache.rows] = cache
        if len(self._spares) > KEPT_PREFIXES:
            del self._spares[next(iter(self._spares))]

    def encode(self, tokens, cache: Prefix, padding=None) -> np.ndarray:
        """Append tokens to the prefix: causal, sliding layers within their window.

        tokens (B, T) whole numbers. padding (B,) counts the pad tokens at the left of each row; give it with the first
        tokens of a batch only. Returns the final hidden states (B, T, H). Raises DgemmaError for an unknown token.
        """
        return self._encode(tokens, cache, padding, hidden=True)

    def prefill(self, tokens, cache: Prefix, padding=None) -> None:
        """`encode` without its result: the last layer stops at its keys and values."""
        self._encode(tokens, cache, padding, hidden=False)

    def _encode(self, tokens, cache, padding, hidden):
        tokens = self._tokens(tokens, cache)
        if padding is not None:
            if cache.length:
                raise ValueError(f"padding comes with the first tokens, but {cache.length} are encoded already")
            cache.padding = np.asarray(padding, np.int32)
        # One canvas more, so that the first block finds its room made.
        if cache.length + tokens.shape[1] > cache.room:
            cache.need(tokens.shape[1] + self.config.canvas_length)
        parts = []
        for start in range(0, tokens.shape[1], PREFILL_CHUNK):
            chunk = tokens[:, start : start + PREFILL_CHUNK]
            graph = self.graph("prefill", cache.shape(chunk.shape[1]))
            inputs = {"tokens": chunk, **layer_inputs(graph, cache.padding)}
            targets = graph.outputs if hidden else graph.writes
            parts.append(self.executor.compute(cache.state, graph, inputs, targets).get("output_norm"))
            cache.length += chunk.shape[1]
        if hidden:
            B = cache.rows
            return np.concatenate([p.reshape(B, -1, self.config.hidden_size) for p in parts], axis=1)
        return None

    def denoise(self, canvas, cache: Prefix, self_conditioning_logits=None) -> np.ndarray:
        """One pass: every canvas slot sees the prefix and the whole canvas. The prefix is left as it is.

        canvas (B, C). self_conditioning_logits (B, C, V): the previous step's *processed* logits (softcapped and
        divided by its temperature); None at a block's first step. Returns softcapped logits (B, C, V) float32.
        """
        self.start(canvas, cache)
        if self_conditioning_logits is not None:
            logits = np.asarray(self_conditioning_logits, np.float32)
            shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
            self._believe(shares / shares.sum(axis=-1, keepdims=True), cache)
        return self.logits(cache)

    def start(self, canvas, cache: Prefix) -> None:
        """Begin a block: canvas (B, C), and no belief from a step before."""
        canvas = self._tokens(canvas, cache)
        if canvas.shape[1] != self.config.canvas_length:
            raise DgemmaError(f"the canvas has {canvas.shape[1]} slots, expected {self.config.canvas_length}")
        cache.need(canvas.shape[1])
        cache.state.write("canvas", canvas)
        for name in ("sc_shares", "sc_tokens", "sc_weights"):
            if name in cache.state.leaves:
                spec = cache.state.leaves[name].spec
                cache.state.write(name, np.zeros(spec.ne[::-1], np.int32 if spec.type == "i32" else np.float32))
        cache.step_inputs = None

    def step(
        self, cache: Prefix, temperature, entropy_bound: float, uniforms, renoise, free=None
    ) -> dict[str, np.ndarray]:
        """Denoise, sample, accept and renoise the canvas of `start`; it stays on the device.

        temperature: a number, or one per row. uniforms (B, C) in (0, 1), renoise (B, C) tokens. free (B, C) bool, by
        default all: the other slots spend no entropy and take their renoise token, which is the known one. Returns
        draft, accepted, entropy, next_canvas, each (B, C).
        """
        graph = self.graph("denoise+sample", cache.shape(self.config.canvas_length))
        if cache.step_inputs is None:
            cache.step_inputs = layer_inputs(graph, cache.padding)
        inputs = {
            **cache.step_inputs,
            "temperature": np.broadcast_to(np.asarray(temperature, np.float32).reshape(-1), cache.rows),
            "entropy_bound": np.float32([entropy_bound]),
            "uniforms": np.asarray(uniforms, np.float32),
            "renoise": self._tokens(renoise, cache).astype(np.float32),
            "free": np.ones_like(renoise, np.float32) if free is None else np.asarray(free, np.float32),
        }
        targets = graph.targets
        out = self.executor.compute(cache.state, graph, inputs, targets)
        return {name: out[name].reshape(cache.rows, -1) for name in graph.outputs}

    def logits(self, cache: Prefix) -> np.ndarray:
        """Softcapped logits (B, C, V) of the canvas on the device, with the beliefs of the step before."""
        graph = self.graph("denoise", cache.shape(self.config.canvas_length))
        out = self.executor.compute(cache.state, graph, layer_inputs(graph, cache.padding), graph.outputs)
        return out["logits"].reshape(cache.rows, self.config.canvas_length, -1)

    def put(self, cache: Prefix, canvas, shares) -> None:
        """What the next step reads instead of its own: canvas (B, C), belief as shares (B, C, V) that add up to 1."""
        cache.state.write("canvas", self._tokens(canvas, cache))
        self._believe(np.asarray(shares, np.float32), cache)

    def memory(self, cache: Prefix | None = None) -> Memory:
        """What the weights and one prefix take now."""
        prefix = 0 if cache is None else cache.nbytes
        compute = 0 if cache is None else cache.state.nbytes - prefix + cache.state.compute_bytes
        return Memory(sum(self.executor.weight_bytes.values()), prefix, compute)

    def graph(self, phase: str, shape: Shape) -> Graph:
        """A phase (or "denoise+sample") for one shape."""
        read = rounded(shape.prefix + (shape.tokens if phase == "prefill" else self.config.canvas_length))
        # The prefix's length is in no size of a graph but the slots read, which come in whole multiples.
        key = (phase, shape._replace(prefix=0), min(read, max(shape.slots_sliding, shape.slots_full)))
        graph = self._graphs.pop(key, None)
        if graph is None:
            parts = [expand(self.description, name, shape, self.options, self.stored) for name in phase.split("+")]
            graph = parts[0] if len(parts) == 1 else chain(*parts)
            if len(self._graphs) == KEPT_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
        self._graphs[key] = graph  # the newest stands last
        return graph._replace(names=graph.names | {"P": shape.prefix})

    def check_room(self, rows: int, room: int) -> None:
        """Raises DgemmaError where a prefix with this much room, and the graphs over it, would not fit."""
        if self.allow_overcommit:
            return
        if (rows, room) not in self._needs:
            C, T = self.config.canvas_length, min(PREFILL_CHUNK, room)
            shapes = [Shape(rows, n, room - n, self.slots_sliding, room) for n in (T, C)]
            graphs = [self.graph(phase, shape) for phase, shape in zip(RUN, shapes, strict=True)]
            self._needs[rows, room] = self.executor.needs(graphs)
        self.executor.check_fits(self._needs[rows, room], f"{count(rows, 'row')} of up to {room} tokens")

    def _refusal(self, library, device, on_device):
        """Why weights, prefix and a step do not fit, in words; None where they do."""
        tokens, parameters = max(self._room, self.config.canvas_length), sum(t.size for t in text_tensors(self.config))

        def plan_for(n):
            return plan_of(self.graph, self.config, n, library)

        Split.of(self.config.num_hidden_layers, on_device)
        host = cpu(devices(library))
        return refusal_of(plan_for, tokens, device, host, on_device, parameters, self.config.canvas_length)

    def persistent(self, shape: Shape) -> list[Leaf]:
        """What a batch of this shape keeps between graphs."""
        return [leaf for leaf in self._stored(shape) if leaf.kind == "persistent"]

    def _weights(self):
        return [leaf for leaf in self._stored(self._one_chunk()) if leaf.kind in ("weight", "derived")]

    def _one_chunk(self):
        return Shape(1, PREFILL_CHUNK, 0, self.slots_sliding, rounded(PREFILL_CHUNK))

    def _stored(self, shape):
        """What the graphs read and no host fills in: one leaf for each name."""
        return stored_leaves(self.graph(phase, shape) for phase in RUN)

    def _believe(self, shares, cache):
        """Store what a step that found these shares would have stored. (B, C, V)"""
        shares = shares.reshape(-1, shares.shape[-1])
        if self.options["self_conditioning"] == "exact":
            cache.state.write("sc_shares", shares)
            return
        X = self.description["dims"]["X"]
        top = np.argpartition(-shares, X - 1, axis=-1)[:, :X]  # sorting all of a large vocabulary takes seconds
        cache.state.write("sc_tokens", top)
        cache.state.write("sc_weights", np.take_along_axis(shares, top, axis=-1))

    def _tokens(self, tokens, cache):
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or len(tokens) != cache.rows:
            raise DgemmaError(f"tokens have shape {tokens.shape}, expected ({cache.rows}, number of tokens)")
        # ggml ends the process on a row number outside the table.
        V = self.config.vocab_size
        if wrong := tokens[(tokens < 0) | (tokens >= V) | (tokens % 1 != 0)].tolist():
            raise DgemmaError(f"found token {wrong[0]}, expected whole numbers from 0 to {V - 1}")
        if cache.length + tokens.shape[1] > self.config.max_position_embeddings + self.config.canvas_length:
            raise ContextError(
                f"{cache.length + tokens.shape[1]} tokens, the model's context is {self.config.max_position_embeddings}"
            )
        return tokens.astype(np.int32)
