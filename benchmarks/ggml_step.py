"""Where the time of a DiffusionGemma on ggml goes: phases, operations, and the floor that memory and arithmetic set.

    python -m benchmarks.ggml_step [--model M.gguf | --mid | --random H,layers,experts,K,V,C] [--device D] [--threads N]
                                   [--prompt-tokens 300] [--repeat 10] [--json]

Shapes   one row; letters as in gguf_export/graph.py's DIMS. P tokens are in the prefix when a canvas is denoised
Source   ggml's scheduler calls back before and after every node; bandwidth and rate are measured with ggml too
Differs  a phase is timed as one graph, median and fastest of the runs. The table of operations needs node after node,
         each with a start of its own: it has the fastest run of every node, less what starting one takes

The floor counts what a pass cannot do without: every weight it uses and the prefix read once, the products of matrices
at the rate of one large product. Results between operations are not in it. Prints tables and, last, one JSON line;
--json prints that line alone.
"""

import argparse
import json
import os
import platform
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from gguf_export.cli import add_runner_options, open_runner
from gguf_export.description import Graph
from gguf_export.host_inputs import layer_inputs
from gguf_export.ops import VIEWS
from gguf_export.quantize import cores
from gguf_export.runner import Prefix, Runner
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.noise import NoiseStream
from mlx_dgemma.units import human_bytes

from .ggml_floor import floor
from .ggml_time import PHASES, NodeTimes, Spent, node_start, timed
from .random_gguf import MID, demo_model, random_model

PRODUCTS = ("mul_mat", "mul_mat_id", "out_prod", "flash_attn")
TEMPERATURE, BOUND = 0.6, 0.1


def main():
    options = parse()
    try:
        if options.model is None:
            options.model = demo_model() if options.random is None else random_model(options.random)
        runner = open_runner(options)
        result = {
            "model": Path(options.model).name,
            "device": runner.executor.device.name,
            "machine": f"{runner.executor.device.description}; {platform.machine()} {platform.system()}, "
            f"{os.cpu_count()} cores",
            "threads": options.threads or cores(),
            "ggml": runner.executor.g.version(),
            "options": runner.options,
            **measure(runner, options.prompt_tokens, options.repeat),
        }
    except DgemmaError as error:
        sys.exit(f"error: {error}")
    if not options.json:
        print_tables(result)
    print(json.dumps(result))


def parse():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ggml_step", description=__doc__.split("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="a GGUF file (default: the demo as Q4_K_M, made in build/)")
    which.add_argument("--random", metavar="H,layers,experts,K,V,C", help="a random model of these sizes, in build/")
    which.add_argument("--mid", dest="random", action="store_const", const=MID, help=f"--random {MID}")
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--repeat", type=int, default=10, help="runs of each phase")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    add_runner_options(parser)
    options = parser.parse_args()
    if options.prompt_tokens < 1 or options.repeat < 1:
        parser.error("--prompt-tokens and --repeat are 1 or more")
    return options


def measure(runner: Runner, prompt_tokens: int, repeat: int) -> dict:
    """Every phase, every operation of a step, memory, and the floor of each phase."""
    C, V = runner.config.canvas_length, runner.config.vocab_size
    stream, cache = NoiseStream(0), runner.make_cache(1, prompt_tokens + C)
    prompt, canvas = stream.renoise([0], 0, 1, prompt_tokens, V), stream.canvas([0], 0, C, V)
    step = (TEMPERATURE, BOUND, stream.uniforms([0], 0, 0, C), stream.renoise([0], 0, 0, C, V))

    def encode(tokens, prefix):
        cache.length = prefix
        runner.prefill(tokens, cache)

    spent = {"prefill": timed(lambda: encode(prompt, 0), repeat)}
    runner.start(canvas, cache)
    spent["step"] = timed(lambda: runner.step(cache, *step), repeat)
    memory = runner.memory(cache)
    denoise = runner.graph("denoise", cache.shape(C))
    operations = step_operations(runner, cache, lambda: runner.step(cache, *step), denoise, repeat)
    spent["denoise"], spent["sample"] = apart(runner, cache, step, repeat)
    floors = floor(runner, cache)
    spent["commit"] = timed(lambda: encode(canvas, prompt_tokens), repeat)
    return {
        "prompt_tokens": prompt_tokens, "canvas": C, "vocabulary": V, "repeat": repeat,
        "ms": {name: round(spent[name].median, 3) for name in PHASES},
        "fastest_ms": {name: round(spent[name].fastest, 3) for name in PHASES},
        "operations": operations,
        "floor": floors,
        "weights_bytes": memory.weights, "prefix_bytes": memory.prefix, "compute_bytes": memory.compute,
    }  # fmt: skip


def apart(runner: Runner, cache: Prefix, step, repeat: int) -> tuple[Spent, Spent]:
    """Denoise and sample as two graphs; the logits pass through the host once, outside what is timed."""
    shape = cache.shape(runner.config.canvas_length)
    denoise, sample = (runner.graph(phase, shape) for phase in ("denoise", "sample"))
    inputs = layer_inputs(denoise, cache.padding)
    first = cache.state.compiled(denoise, denoise.outputs, False)
    logits = first.run(inputs)["logits"]
    first.returned = []
    spent = timed(lambda: first.run(inputs), repeat)
    temperature, bound, uniforms, renoise = step
    given = {
        "logits": logits, "temperature": np.float32([temperature]), "entropy_bound": np.float32([bound]),
        "uniforms": uniforms, "renoise": renoise.astype(np.float32), "free": np.ones_like(renoise, np.float32),
    }  # fmt: skip
    second = cache.state.compiled(sample, sample.targets, False)
    return spent, timed(lambda: second.run(given), repeat)


def step_operations(runner: Runner, cache: Prefix, work, denoise: Graph, repeat: int) -> dict:
    """Milliseconds per operation of a step, in the nodes of denoise and in those of sample, and the share of products.

    Attention with mul_mat and soft_max has a soft_max of its own among the products.
    """
    graph = runner.graph("denoise+sample", cache.shape(runner.config.canvas_length))
    compiled = cache.state.compiled(graph, graph.targets, False)
    launch = node_start(runner, repeat)
    times = NodeTimes(runner.executor.g).run(compiled, work, repeat)
    op_of, denoises = {node.name: node.op for node in graph.nodes}, {node.name for node in denoise.nodes}
    # On a busy machine starting a node may have taken longer than some whole ones.
    launch = min(launch, *(seconds for (name, _), seconds in times if op_of.get(name) in PRODUCTS))
    ms = {"denoise": Counter(), "sample": Counter()}
    products, counts, phase = Counter(), defaultdict(Counter), "denoise"
    for (name, described), seconds in times:
        # ggml adds nodes without a name of ours: the sort of argsort_top_k. They belong where they stand.
        if name in op_of:
            phase = "denoise" if name in denoises else "sample"
        op = op_of.get(name, described.lower())
        if op in (*VIEWS, "argsort_top_k"):  # which is a view of that sort
            continue
        net = max(0.0, seconds - launch) * 1e3
        ms[phase][op] += net
        counts[phase][op] += 1
        if op in PRODUCTS or name.endswith(".shares"):
            products[phase] += net
    totals = {name: sum(found.values()) for name, found in ms.items()}
    step = ms["denoise"] + ms["sample"]
    return {
        "node_start_us": round(launch * 1e6, 2),
        "denoise_ms": round(totals["denoise"], 3),
        "step_ms": round(sum(totals.values()), 3),
        "products_share": {
            "denoise": round(_share(products["denoise"], totals["denoise"]), 4),
            "step": round(_share(sum(products.values()), sum(totals.values())), 4),
        },
        "table": [
            {
                "op": op,
                "nodes": counts["denoise"][op] + counts["sample"][op],
                "denoise_ms": round(ms["denoise"][op], 4),
                "step_ms": round(total, 4),
                "denoise_share": round(_share(ms["denoise"][op], totals["denoise"]), 4),
                "step_share": round(_share(total, sum(totals.values())), 4),
            }
            for op, total in step.most_common()
        ],
    }


def _share(part, whole):
    return part / whole if whole else 0.0


def print_tables(result):
    console, floors, found = Console(), result["floor"], result["operations"]
    title = f"{result['model']}, {result['prompt_tokens']} tokens in the prefix, canvas {result['canvas']}"
    table = Table("phase", "ms", "fastest", "reads", "GFLOP", "floor", "bound", title=title)
    for name in PHASES:
        phase = floors["phases"][name]
        least, fastest = max(phase["read_ms"], phase["compute_ms"]), result["fastest_ms"][name]
        table.add_row(
            name, f"{result['ms'][name]:.2f}", f"{fastest:.2f}", human_bytes(phase["bytes"]),
            f"{phase['flop'] / 1e9:.3g}", f"{least:.2f} ({least / fastest:.0%})", phase["bound"],
        )  # fmt: skip
    console.print(table)
    table = Table("operation", "nodes", "denoise", "share", "step", "share", title="node by node, ms, the fastest runs")
    for row in found["table"]:
        table.add_row(
            row["op"], str(row["nodes"]), f"{row['denoise_ms']:.3f}", f"{row['denoise_share']:.1%}",
            f"{row['step_ms']:.3f}", f"{row['step_share']:.1%}",
        )  # fmt: skip
    shares = found["products_share"]
    table.add_section()
    table.add_row("all", "", f"{found['denoise_ms']:.3f}", "", f"{found['step_ms']:.3f}", "")
    table.add_row("products, attention", "", "", f"{shares['denoise']:.1%}", "", f"{shares['step']:.1%}")
    console.print(table)
    console.print(
        f"weights {human_bytes(result['weights_bytes'])}, prefix {human_bytes(result['prefix_bytes'])}, computing "
        f"{human_bytes(result['compute_bytes'])}; bandwidth {floors['bandwidth_gb_per_s']} GB/s, {floors['rate_of']} "
        f"products {floors['gflop_per_s']} GFLOP/s; starting a node, not counted above, {found['node_start_us']} µs\n"
        f"{result['device']}, {result['threads']} threads, ggml {result['ggml']}, {result['machine']}; "
        f"{', '.join(f'{name} {value}' for name, value in result['options'].items())}",
        highlight=False,
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
