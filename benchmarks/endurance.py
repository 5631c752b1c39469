"""Many generations in one process: does speed hold, and memory? python -m benchmarks.endurance [--n 200] [--engine mlx]

Shapes   one prompt at a time, of the demo's tasks in turn, so that lengths differ
Differs  resident memory is the process's own, as the system counts it; MLX's figures are its allocator's

Prints a line and a bar for every tenth of the run and, last, one JSON line.
"""

import argparse
import json
import resource
import sys
import time

import mlx.core as mx
from rich.console import Console
from rich.table import Table

import mlx_dgemma
from demo.evaluate import CHECKPOINT, as_gguf
from demo.tasks import TASKS, held_out
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.presets import PRESETS, with_preset
from mlx_dgemma.units import human_bytes


def main():
    options = parse()
    try:
        if options.engine == "mlx":
            model, tokenizer = mlx_dgemma.load(options.model or CHECKPOINT, mx.float32)
        else:
            import gguf_export

            model = gguf_export.Runner(options.model or as_gguf(CHECKPOINT))
            tokenizer = model.tokenizer()
    except DgemmaError as error:
        sys.exit(f"error: {error}")
    rows = run(model, tokenizer, options.n, options.preset)
    print_curve(rows)
    print(json.dumps({"engine": options.engine, "n": options.n, "preset": options.preset, "tenths": rows}))


def parse():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endurance", description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=200, help="generations (default: 200)")
    parser.add_argument("--engine", choices=("mlx", "ggml"), default="mlx")
    parser.add_argument("--model", help="folder or GGUF (default: the demo)")
    parser.add_argument("--preset", choices=PRESETS, default="exact")
    options = parser.parse_args()
    if options.n < 10:
        parser.error("--n is 10 or more")
    return options


def run(model, tokenizer, n: int, preset: str) -> list[dict]:
    """One entry for each tenth: tokens per second, and bytes held at its end."""
    settings = with_preset(model.generation_config, preset)
    per_task = -(-n // len(TASKS))
    prompts = [x.prompt for group in zip(*(held_out(t, per_task, 0) for t in TASKS), strict=True) for x in group][:n]
    rows = []
    for tenth in range(10):
        began, tokens = time.perf_counter(), 0
        for i in range(tenth * n // 10, (tenth + 1) * n // 10):
            *_, done = mlx_dgemma.stream(model, tokenizer, prompts[i], settings, seed=i)
            tokens += done.stats.tokens
        rows.append(
            {
                "generations": (tenth + 1) * n // 10,
                "tokens_per_second": round(tokens / (time.perf_counter() - began), 1),
                "active_bytes": mx.get_active_memory(),
                "cache_bytes": mx.get_cache_memory(),
                "resident_bytes": resident(),
            }
        )
    return rows


def resident() -> int:
    """Bytes of memory that this process holds now; on systems without /proc the most it ever held."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def print_curve(rows):
    table = Table("generations", "tok/s", "", "MLX active", "MLX cache", "resident")
    fastest = max(row["tokens_per_second"] for row in rows)
    for row in rows:
        table.add_row(
            str(row["generations"]), f"{row['tokens_per_second']:.0f}",
            "█" * round(20 * row["tokens_per_second"] / fastest),
            *(human_bytes(row[name]) for name in ("active_bytes", "cache_bytes", "resident_bytes")),
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
