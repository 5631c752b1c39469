"""Our step against mlx-vlm's, on the same random weights; and both on the demo, end to end.

    python -m benchmarks.versus [--preset small|mid] [--weights fp32|q4 …] [--repeat 5] [--answers 10] [--python PATH]

Shapes   one row, canvas C, prompt P. small: hidden 256, vocabulary 4,096, C 64; mid: hidden 512, 32,768, C 256
Source   mlx-vlm 0.7.10: for the step its entropy-bound sampler, temperature 1, full canvas; for texts its defaults too
Differs  each engine has a process of its own; they take turns, run by run, so both meet the same moods of a machine

On Linux OpenBLAS is preloaded into both where it is found: MLX's own BLAS there is slow. --python names an interpreter
with mlx-vlm where this one has none. Prints tables and, last, one JSON line.
"""

import argparse
import ctypes.util
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.versus_worker import PARTS
from convert import convert
from demo.evaluate import CHECKPOINT, as_gguf, wilson
from demo.tasks import TASKS, check, held_out
from mlx_dgemma.config import parse_config, read_json
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.tokenizer import Tokenizer
from mlx_dgemma.units import human_bytes
from tests.tiny import make_tiny_checkpoint

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build"
SIZES = {  # config.json's names
    "small": {
        "vocab_size": 4_096, "hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128,
        "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "num_global_key_value_heads": 2,
        "head_dim": 32, "global_head_dim": 64, "num_experts": 16, "top_k_experts": 4, "sliding_window": 1024,
        "canvas_length": 64,
    },
    "mid": {
        "vocab_size": 32_768, "hidden_size": 512, "intermediate_size": 1_024, "moe_intermediate_size": 256,
        "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "num_global_key_value_heads": 2,
        "head_dim": 64, "global_head_dim": 128, "num_experts": 32, "top_k_experts": 4, "sliding_window": 1024,
        "canvas_length": 256,
    },
}  # fmt: skip
PROMPT, TEMPERATURE, BOUND = 300, 0.6, 0.1
ENGINES = ("dgemma", "mlx-vlm")


class Worker:
    """An engine in its process, asked one thing at a time."""

    def __init__(self, engine, folder, python, env):
        command = [python, "-m", "benchmarks.versus_worker", engine, str(folder)]
        self.engine = engine
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ask(self, do, **more):
        try:
            self.process.stdin.write(json.dumps({"do": do, **more}) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            words = self.process.communicate()[1].strip().splitlines() or ["it ended without a word"]
            advice = "; pip install 'mlx-vlm==0.7.10', or name an interpreter that has it with --python"
            raise DgemmaError(f"{self.engine}: {words[-1]}{advice if 'mlx_vlm' in words[-1] else ''}") from None

    def close(self):
        self.process.kill()
        self.process.communicate()


def main():
    options = parse()
    env, blas = environment()
    try:
        folders = {weights: folder_of(options.preset, weights) for weights in options.weights}
        result = {
            "preset": options.preset, "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores",
            "blas": blas, "prompt": PROMPT, "temperature": TEMPERATURE,
            "steps": {w: steps(folder, options, env) for w, folder in folders.items()},
        }  # fmt: skip
        if options.answers:
            result["answers"] = answers(options, env)
    except DgemmaError as error:
        sys.exit(f"error: {error}")
    print_tables(result)
    print(json.dumps(result))


def parse():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versus", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=SIZES, default="small", help="size of the random model")
    parser.add_argument("--weights", choices=("fp32", "q4"), nargs="+", default=["fp32", "q4"])
    parser.add_argument("--repeat", type=int, default=5, help="runs of each part")
    parser.add_argument("--answers", type=int, default=10, metavar="N", help="instances per task of the demo; 0: none")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has mlx-vlm")
    options = parser.parse_args()
    if options.repeat < 1 or options.answers < 0:
        parser.error("--repeat is 1 or more, --answers 0 or more")
    return options


def environment():
    """For both processes, and which BLAS they use."""
    name = ctypes.util.find_library("openblas") if sys.platform == "linux" else None
    if not name or "openblas" in os.environ.get("LD_PRELOAD", ""):
        return dict(os.environ), os.environ.get("LD_PRELOAD") or "MLX's own"
    return {**os.environ, "LD_PRELOAD": name}, name


def folder_of(preset, weights):
    """A random checkpoint of these sizes, made once."""
    made, out = BUILD / f"versus-{preset}", BUILD / f"versus-{preset}-{weights}"
    if not made.exists():
        print(f"making {made}", file=sys.stderr)
        make_tiny_checkpoint(made, **SIZES[preset])
    if not out.exists():
        convert(made, out, to="mlx", recipe=weights)
    return out


def start(folder, options, env):
    config = parse_config(read_json(folder / "config.json"))
    about = {"C": config.canvas_length, "V": config.vocab_size, "H": config.hidden_size, "P": PROMPT,
             "temperature": TEMPERATURE, "bound": BOUND}  # fmt: skip
    pythons = {"dgemma": sys.executable, "mlx-vlm": options.python}
    workers = [Worker(engine, folder, pythons[engine], env) for engine in ENGINES]
    loaded = {w.engine: w.ask("load", **about) for w in workers}
    return workers, loaded


def steps(folder, options, env):
    """Milliseconds and peak memory of each part, per engine, and whether both decide alike."""
    workers, loaded = start(folder, options, env)
    try:
        for worker in workers:
            worker.ask("begin")
        agreed = [worker.ask("agree")["steps"] for worker in workers]
        found = {w.engine: {part: [] for part in PARTS} for w in workers}
        for part in PARTS:
            for _ in range(options.repeat):
                for worker in workers:
                    found[worker.engine][part].append(worker.ask("part", part=part))
    finally:
        for worker in workers:
            worker.close()
    result = {"weights_bytes": {name: about["memory"] for name, about in loaded.items()}, "floor": floor(folder, env)}
    for name, parts in found.items():
        result[name] = {
            part: {"ms": statistics.median(r["ms"] for r in runs), "fastest_ms": min(r["ms"] for r in runs),
                   "peak_bytes": max(r["peak"] for r in runs)} for part, runs in parts.items()
        }  # fmt: skip
    ours, theirs = (result[name] for name in ENGINES)
    result["ratio"] = {part: ours[part]["ms"] / theirs[part]["ms"] for part in PARTS}
    result["agree"] = {
        "slots": int(np.size(agreed[0][0][0])),
        "drafts_differ": [int(np.sum(np.not_equal(a[0], b[0]))) for a, b in zip(*agreed, strict=True)],
        "accepted_differ": [int(np.sum(np.not_equal(a[1], b[1]))) for a, b in zip(*agreed, strict=True)],
    }
    return result


def floor(folder, env):
    """What the products of a step take at the rate of one large product; nothing else is counted."""
    c = parse_config(read_json(folder / "config.json"))
    C, H = c.canvas_length, c.hidden_size
    per_slot = 2 * 3 * H * c.intermediate_size * (c.num_hidden_layers + 1)  # dense, and self-conditioning
    per_slot += 2 * c.num_hidden_layers * (H * c.num_experts + 3 * H * c.moe_intermediate_size * c.top_k_experts)
    for layer in c.layers:
        heads, width = c.num_attention_heads, layer.head_dim
        matrices = 2 * heads * width + (1 + layer.has_v_proj) * layer.num_key_value_heads * width
        per_slot += 2 * H * matrices + 4 * heads * width * (PROMPT + C)
    vocabulary = 2 * 2 * H * c.vocab_size  # lm_head and self-conditioning
    code = "import mlx.core as mx, time\na = mx.random.normal((1024, 1024)); mx.eval(a); best = 9\n" + (
        "for _ in range(9):\n b = time.perf_counter(); mx.eval(a @ a); best = min(best, time.perf_counter() - b)\n"
        "print(2 * 1024**3 / best)"
    )
    rate = float(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout)
    return {
        "gflop_per_s": rate / 1e9, "gflop": {"model": C * per_slot / 1e9, "vocabulary": C * vocabulary / 1e9},
        "ms": {"model": C * per_slot / rate * 1e3, "vocabulary": C * vocabulary / rate * 1e3,
               "step": C * (per_slot + vocabulary) / rate * 1e3},
    }  # fmt: skip


# Engine, preset (mlx-vlm: sampler), prompts denoised at once.
RUNS = [
    ("dgemma", "exact", 1), ("dgemma", "balanced", 1), ("dgemma", "fast", 1), ("dgemma", "balanced", 8),
    ("ggml", "exact", 1), ("ggml", "balanced", 1), ("ggml", "balanced", 8),
    ("mlx-vlm", "default", 1), ("mlx-vlm", "entropy-bound", 1),
]  # fmt: skip


def answers(options, env):
    """All on held-out instances of the demo: right answers, steps, tokens per second."""
    folder, config = BUILD / "versus-demo-fp32", parse_config(read_json(Path(CHECKPOINT) / "config.json"))
    if not folder.exists():  # mlx-vlm cannot run the bfloat16 checkpoint on a CPU
        convert(CHECKPOINT, folder, to="mlx", recipe="fp32")
    tokenizer = Tokenizer(Path(CHECKPOINT), config)
    paths, pythons = {"ggml": as_gguf(CHECKPOINT)}, {"mlx-vlm": options.python}
    engines = dict.fromkeys(engine for engine, _, _ in RUNS)
    workers = {name: Worker(name, paths.get(name, folder), pythons.get(name, sys.executable), env) for name in engines}
    try:
        for worker in workers.values():
            worker.ask("load")
        for task in [next(iter(TASKS)), *TASKS]:  # the first one twice, to warm up
            chosen = held_out(task, options.answers, 0)
            prompts = [tokenizer.chat([{"role": "user", "content": x.prompt}]) for x in chosen]
            if task == next(iter(TASKS)):
                found = {run: [] for run in RUNS}
            for start in range(0, len(prompts), 8):
                for engine, preset, batch in RUNS:
                    for first in range(start, min(start + 8, len(prompts)), batch):
                        rows = list(range(first, min(first + batch, start + 8, len(prompts))))
                        asked = {"prompts": [prompts[row] for row in rows], "preset": preset, "rows": rows}
                        answer = workers[engine].ask("answer", **asked)
                        right = [check(chosen[row], tokenizer.reply(tokens).text)
                                 for row, tokens in zip(rows, answer["tokens"], strict=True)]  # fmt: skip
                        found[engine, preset, batch].append({**answer, "right": right})
    finally:
        for worker in workers.values():
            worker.close()
    return [_summary(run, given) for run, given in found.items()]


def _summary(run, given):
    right = [r for answer in given for r in answer["right"]]
    tokens = sum(len(row) for answer in given for row in answer["tokens"])
    seconds, n = sum(a["seconds"] for a in given), len(right)
    return {
        "engine": run[0], "preset": run[1], "batch": run[2], "n": n, "right": sum(right),
        "interval": wilson(sum(right), n), "steps": sum(a["steps"] for a in given) / n,
        "tokens_per_second": tokens / seconds, "seconds": seconds,
    }  # fmt: skip


def print_tables(result):
    console = Console()
    for weights, found in result["steps"].items():
        ours, theirs = (found[name] for name in ENGINES)
        table = Table("part", "dgemma ms", "mlx-vlm ms", "ratio", "floor ms", "peak", "peak",
                      title=f"{result['preset']}, {weights}: one denoising step")  # fmt: skip
        for part in PARTS:
            table.add_row(
                part, f"{ours[part]['ms']:.1f}", f"{theirs[part]['ms']:.1f}", f"{found['ratio'][part]:.2f}",
                f"{found['floor']['ms'][part]:.1f}", human_bytes(ours[part]["peak_bytes"]),
                human_bytes(theirs[part]["peak_bytes"]),
            )  # fmt: skip
        console.print(table)
        agree = found["agree"]
        console.print(
            f"of {agree['slots']} slots differ, first step and the next: drafts {agree['drafts_differ']}, acceptance "
            f"{agree['accepted_differ']}; products {found['floor']['gflop_per_s']:.0f} GFLOP/s", highlight=False,
        )  # fmt: skip
    if "answers" in result:
        table = Table("engine", "preset", "at once", "right", "95 % interval", "steps", "tok/s", title="the demo")
        for row in result["answers"]:
            low, high = row["interval"]
            table.add_row(
                row["engine"], row["preset"], str(row["batch"]), f"{row['right']} of {row['n']}",
                f"{low:.1%} … {high:.1%}", f"{row['steps']:.1f}", f"{row['tokens_per_second']:.0f}",
            )  # fmt: skip
        console.print(table)
    console.print(f"{result['machine']}, BLAS {result['blas']}", highlight=False)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
