"""Where the time of one denoising step goes: model, vocabulary work, sampler; and the memory it takes.

    python -m benchmarks.step [MODEL] [--prompt-tokens 300] [--repetitions 20] [--dtype float32]

Shapes   one row, C canvas slots, V vocabulary
Differs  the parts are timed one by one, each evaluated to its end, and the whole step as the loop runs it; so the
         parts may add up to a little more than the whole

Prints a table and, last, one JSON line.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from rich.console import Console
from rich.table import Table

import mlx_dgemma
from mlx_dgemma.engine import MlxEngine
from mlx_dgemma.noise import NoiseStream
from mlx_dgemma.sampler import accept_mask, entropies, sample
from mlx_dgemma.units import human_bytes

DEMO = Path(__file__).parent.parent / "demo/checkpoint"
PARTS = {
    "model": "layers, with a ready soft embedding",
    "vocabulary": "lm_head with softcap, and softmax @ E",
    "sampler": "entropy, draw, argmax, accept, renoise",
    "step": "the whole, as the loop runs it",
}


def main():
    options = parse()
    try:
        model, _ = mlx_dgemma.load(options.model, getattr(mx, options.dtype) if options.dtype else None)
    except mlx_dgemma.DgemmaError as error:
        sys.exit(f"error: {error}")
    result = {
        "model": Path(options.model).name,
        "dtype": str(model.dtype).removeprefix("mlx.core."),
        "device": "GPU" if mx.default_device().type == mx.gpu else "CPU",
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores",
        "mlx": mx.__version__,
        "openblas": "openblas" in os.environ.get("LD_PRELOAD", ""),
        **measure(model, options.prompt_tokens, options.repetitions),
    }
    print_table(result)
    print(json.dumps(result))


def parse():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default=DEMO, help="model folder (default: the demo checkpoint)")
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--repetitions", type=int, default=20, help="of each part; the median counts")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    return parser.parse_args()


def measure(model, prompt_tokens: int, repetitions: int) -> dict:
    """Median milliseconds of each part; bytes of weights, cache, and what a step needs on top."""
    C, V = model.config.canvas_length, model.config.vocab_size
    stream, engine = NoiseStream(0), MlxEngine(model)
    began = time.perf_counter()
    engine.prefill(stream.renoise([0], 0, 0, prompt_tokens, V))
    prefill_ms = (time.perf_counter() - began) * 1e3
    uniforms, renoise = stream.uniforms([0], 0, 0, C), stream.renoise([0], 0, 0, C, V)
    canvas = stream.canvas([0], 0, C, V)
    ms = measure_parts(model, engine.cache, mx.array(canvas), mx.array(uniforms), mx.array(renoise), repetitions)

    engine.start(canvas)
    engine.step(0.6, 0.1, uniforms, renoise)  # from here on every step is self-conditioned
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    ms["step"] = median_ms(lambda: engine.step(0.6, 0.1, uniforms, renoise), repetitions)
    return {
        "prompt_tokens": prompt_tokens,
        "canvas": C,
        "vocabulary": V,
        "ms": {name: round(value, 3) for name, value in ms.items()},
        "prefill_ms": round(prefill_ms, 3),
        "repetitions": repetitions,
        "weights_bytes": sum(array.nbytes for _, array in tree_flatten(model.parameters())),
        "cache_bytes": engine.cache_bytes,
        "step_peak_bytes": mx.get_peak_memory() - held,
    }


def measure_parts(model, cache, canvas, uniforms, renoise, repetitions) -> dict[str, float]:
    """Each part on ready inputs: canvas, uniforms and renoise (1, C)."""
    soft = mx.zeros((*canvas.shape, model.config.hidden_size), model.dtype)
    hidden = model.denoise_hidden(canvas, cache, soft)
    processed = model.logits(hidden) / 0.6  # (1, C, V)
    mx.eval(soft, hidden, processed)

    def forward():
        mx.eval(model.denoise_hidden(canvas, cache, soft))

    def vocabulary():
        mx.eval(model.logits(hidden), model.soft_embedding(processed))

    def sampler():
        accepted = accept_mask(entropies(processed), 0.1)
        mx.eval(mx.where(accepted, sample(processed, uniforms), renoise), mx.argmax(processed, axis=-1))

    parts = {"model": forward, "vocabulary": vocabulary, "sampler": sampler}
    return {name: median_ms(part, repetitions) for name, part in parts.items()}


def median_ms(part, repetitions):
    times = []
    for _ in range(repetitions + 2):  # two to warm up
        began = time.perf_counter()
        part()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[2:])


def print_table(result):
    table = Table("part", "ms", "what it is", title=f"one step of {result['model']}, canvas {result['canvas']}")
    for name, what in PARTS.items():
        table.add_row(name, f"{result['ms'][name]:.2f}", what)
    console = Console()
    console.print(table)
    console.print(
        f"weights {human_bytes(result['weights_bytes'])}, cache {human_bytes(result['cache_bytes'])}, "
        f"a step needs {human_bytes(result['step_peak_bytes'])} more; "
        f"{result['dtype']} on {result['device']}, {result['machine']}",
        highlight=False,
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
