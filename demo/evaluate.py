"""Solve held-out instances with an engine: python -m demo.evaluate --engine mlx|ggml|transformers --model PATH

Shapes   an engine is (prompts, row ids, seed) -> Answers; a row id is the instance's index, so batching changes nothing
Source   transformers 5.23.0 `generate`, mlx_dgemma or gguf_export.Runner; all read mlx_dgemma.noise
Differs  batches are left-padded; every rate carries its Wilson 95 % interval
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from demo.canvas_tasks import MAKERS as CANVAS_TASKS
from demo.tasks import TASKS, check, held_out
from mlx_dgemma.editing import NOISE
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.events import BlockDone, Done
from mlx_dgemma.presets import PRESETS

CHECKPOINT, INFILL_CHECKPOINT = "demo/checkpoint", "demo/infill"
CANVAS_TASKS_JSON = (*CANVAS_TASKS, "json")
MODES = ("clamp", "warm", "prompt")


class Answer(NamedTuple):
    text: str
    steps: int  # decoder passes over all blocks
    blocks: int
    tokens: int  # the stop token included
    at_limit: int | None = None  # blocks that took all steps they may; None where an engine does not tell
    loops: bool = False


def transformers_engine(path, **settings):
    from transformers import AutoTokenizer

    from demo.reference import load_transformers

    return transformers_answers(load_transformers(path), AutoTokenizer.from_pretrained(path), **settings)


def transformers_answers(model, tokenizer, **settings):
    import torch

    from demo.reference import transformers_with_stream

    stops, canvas = set(model.generation_config.eos_token_id), model.config.canvas_length

    @torch.no_grad()
    def engine(prompts, rows, seed):
        chats = [
            tokenizer.apply_chat_template(conversation(prompt), tokenize=False, add_generation_prompt=True)
            for prompt in prompts
        ]
        batch = tokenizer(chats, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        with transformers_with_stream(seed, rows):
            out = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **settings)
        answers = []
        new = out.sequences[:, batch["input_ids"].shape[1] :].tolist()
        for tokens, tpf in zip(new, out.tokens_per_forward.tolist(), strict=True):
            stop = next((i for i, token in enumerate(tokens) if token in stops), None)
            text = tokenizer.decode(tokens[:stop], skip_special_tokens=True)
            used = len(tokens) if stop is None else stop + 1
            counted = sum(token != tokenizer.pad_token_id for token in tokens)  # what TPF was divided by
            answers.append(
                Answer(text, round(counted / tpf), math.ceil(used / canvas), used, loops=loops(tokens[:stop]))
            )
        return answers

    return engine


def mlx_engine(path, dequantize=False, **settings):
    return session_engine(*open_mlx(path, dequantize, **settings))


def open_mlx(path, dequantize=False, **settings):
    """A session on MLX, and its settings."""
    import mlx.core as mx

    import mlx_dgemma

    # float32 as in the reference, whatever the device's default is.
    model, tokenizer = mlx_dgemma.load(path, mx.float32, dequantize)
    return mlx_dgemma.make_session(model, tokenizer), model.generation_config.replace(**settings)


def ggml_engine(path, device="auto", self_conditioning=None, **settings):
    return session_engine(*open_ggml(path, device, self_conditioning, **settings))


def open_ggml(path, device="auto", self_conditioning=None, **settings):
    """A session on ggml, and its settings. A checkpoint folder becomes F32 first."""
    from gguf_export import Runner
    from gguf_export.engine import make_session

    path = as_gguf(path) if (Path(path) / "config.json").exists() else path
    runner = Runner(path, device, self_conditioning=self_conditioning)
    return make_session(runner, runner.tokenizer()), runner.generation_config.replace(**settings)


def as_gguf(folder):
    """A checkpoint as F32, made once."""
    from convert import convert

    out = Path("build") / f"{Path(folder).resolve().parent.name}-{Path(folder).resolve().name}-F32.gguf"
    if not out.exists():
        out.parent.mkdir(exist_ok=True)
        convert(folder, out, to="gguf", recipe="F32")
    return out


def session_engine(session, config):
    """An engine of any session, whatever computes behind it."""

    def engine(prompts, rows, seed):
        steps = []  # per block, per row
        for event in session.stream([conversation(prompt) for prompt in prompts], config, seed, rows=rows):
            match event:
                case BlockDone():
                    steps.append(event.steps.tolist())
                case Done():
                    done = event
        return [
            Answer(
                text, sum(row), sum(n > 0 for n in row), len(tokens) + stopped,
                sum(n >= config.max_denoising_steps for n in row), loops(tokens),
            )
            for text, tokens, stopped, row in zip(
                done.texts, done.tokens, done.stopped, zip(*steps, strict=True), strict=True
            )
        ]  # fmt: skip

    return engine


def conversation(prompt):
    """A text is the user's turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


LOOP_TIMES, LOOP_TOKENS = 4, 32


def loops(tokens) -> bool:
    """Does some passage stand LOOP_TIMES in a row at least, over LOOP_TOKENS or more?

    An 8-gram said four times, a word said 32 times, a paragraph said four times.
    """
    tokens = np.asarray(tokens)
    for period in range(1, len(tokens) // LOOP_TIMES + 1):
        again = np.concatenate([[0], tokens[period:] == tokens[:-period], [0]])
        ends = np.flatnonzero(np.diff(again))  # where runs of equal tokens begin and end, in turn
        longest = int((ends[1::2] - ends[::2]).max(initial=0))
        if longest + period >= max(LOOP_TOKENS, LOOP_TIMES * period):
            return True
    return False


ENGINES = {"transformers": transformers_engine, "mlx": mlx_engine, "ggml": ggml_engine}


def wilson(right, n, z=1.96):
    """95 % interval of a rate."""
    rate, spread = right / n, z * z / n
    middle = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(rate * (1 - rate) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(engine, task, n=300, seed=0, batch=50, show_failures=0, against=None):
    """One row of the table, as a dict. Instances are those of held_out(task, n, seed).

    against: another engine; `same` counts the answers in which it gives the same text after as many steps.
    """
    chosen = held_out(task, n, seed)
    answers, others, began = [], [], time.perf_counter()
    for start in range(0, n, batch):
        rows = range(start, min(start + batch, n))
        prompts = [chosen[row].prompt for row in rows]
        answers += engine(prompts, list(rows), seed)
        others += against(prompts, list(rows), seed) if against else []
        if sys.stderr.isatty():
            print(f"{task} {len(answers)}/{n}", end="\r", file=sys.stderr)
    seconds = time.perf_counter() - began
    verdicts = [check(instance, answer.text) for instance, answer in zip(chosen, answers, strict=True)]
    failures = [(i, a) for i, a, right in zip(chosen, answers, verdicts, strict=True) if not right]
    for instance, answer in failures[:show_failures]:
        print(f"--- {instance.prompt}\n--- wanted\n{instance.answer}\n--- got\n{answer.text}", file=sys.stderr)
    right, (low, high) = sum(verdicts), wilson(sum(verdicts), n)
    steps, blocks, tokens = (sum(getattr(a, field) for a in answers) for field in ("steps", "blocks", "tokens"))
    several = [right for right, answer in zip(verdicts, answers, strict=True) if answer.blocks > 1]
    same = {"same": sum(a[:4] == b[:4] for a, b in zip(answers, others, strict=True))} if against else {}
    return same | {
        "task": task, "n": n, "right": right, "rate": right / n, "low": low, "high": high,
        "steps_per_block": steps / blocks, "tpf": tokens / steps,
        "several_blocks": len(several), "several_blocks_right": sum(several), "seconds": round(seconds, 1),
    }  # fmt: skip


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--engine", choices=ENGINES, default="mlx")
    parser.add_argument("--model", default=CHECKPOINT, help="checkpoint folder (default: the bundled one) or GGUF")
    parser.add_argument(
        "--dequantize", action="store_true", help="mlx: float32 arithmetic on the same weights, faster on a CPU"
    )
    parser.add_argument("--device", help="ggml: a name that `python -m gguf_export devices` prints")
    parser.add_argument("--self-conditioning", choices=("top-k", "exact"), help="ggml: see `python -m gguf_export run`")
    parser.add_argument("--against", metavar="MODEL", help="also answer with this one on MLX; count the same answers")
    parser.add_argument(
        "--task",
        choices=tuple(dict.fromkeys((*TASKS, *CANVAS_TASKS))),
        action="append",
        help="may be repeated; default: all",
    )
    parser.add_argument("--mode", choices=MODES, help="tasks with known parts: how the model is given them")
    parser.add_argument("--search", action="store_true", help="infill: find the hole's length too")
    parser.add_argument("--noise", type=float, default=NOISE, help=f"edit: share of noise to start with ({NOISE})")
    parser.add_argument("--n", type=int, default=300, help="instances per task (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="chooses the instances and the noise")
    parser.add_argument("--batch", type=int, default=50, help="instances denoised at once (default: 50)")
    parser.add_argument("--show-failures", type=int, default=0, metavar="K")
    parser.add_argument("--preset", choices=PRESETS, help="how much work a text may cost (default: exact)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a field of GenerationConfig: stop=plateau"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    args = parser.parse_args(arguments)
    if args.n < 1 or args.batch < 1:
        parser.error("--n and --batch must be at least 1")

    unknown = set(args.task or ()) - set(TASKS if args.mode is None else CANVAS_TASKS_JSON)
    if unknown:
        parser.error(f"--task {min(unknown)} is for " + ("--mode" if args.mode is None else "no --mode"))
    if args.mode:
        return _known_parts(parser, args)
    try:
        engine = ENGINES[args.engine](args.model, **_engine_options(parser, args))
        against = mlx_engine(args.against, args.dequantize) if args.against else None
    except (DgemmaError, OSError) as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed; pip install -e '.[reference]' brings it")
    table = []
    print(
        f"{'task':16}{'n':>5}{'right':>8}  {'95 % interval':15}{'steps/block':>12}{'TPF':>7}  right, of several blocks"
        + ("   same as --against" if against else "")
    )
    for task in args.task or TASKS:
        try:
            row = evaluate(engine, task, args.n, args.seed, args.batch, args.show_failures, against)
        except DgemmaError as error:
            sys.exit(f"error: {error}")
        table.append(row)
        interval = f"{row['low']:.1%}..{row['high']:.1%}"
        several = f"{row['several_blocks_right']}/{row['several_blocks']}"
        print(
            f"{task:16}{row['n']:>5}{row['rate']:>8.1%}  {interval:15}"
            f"{row['steps_per_block']:>12.1f}{row['tpf']:>7.1f}  {several}" + (f"{row['same']:>15}" if against else ""),
            flush=True,
        )
    if args.json:
        print(json.dumps({"engine": args.engine, "model": args.model, "seed": args.seed, "tasks": table}))


def _known_parts(parser, args):
    """The tasks of evaluate_canvas.py."""
    from demo.evaluate_canvas import IMPOSSIBLE, SEARCHABLE, as_text, evaluate_mode, heading

    if args.engine == "transformers" or args.against:
        parser.error("--mode is for --engine mlx and ggml, without --against")
    tasks = args.task or [task for task in CANVAS_TASKS_JSON if (task, args.mode) not in IMPOSSIBLE]
    for task in tasks:
        if why := IMPOSSIBLE.get((task, args.mode)):
            parser.error(f"--task {task} --mode {args.mode}: {why}")
    if args.search and (args.mode != "clamp" or not SEARCHABLE.issuperset(tasks)):
        parser.error(f"--search is for --mode clamp and --task {', '.join(sorted(SEARCHABLE))}")
    table, sessions = [], {}
    print(heading())
    for task in tasks:
        # JSON needs no canvas, so it is the first checkpoint's; the other tasks were learned by its sibling.
        model = INFILL_CHECKPOINT if args.model == CHECKPOINT and task != "json" else args.model
        try:
            if model not in sessions:
                open_engine = {"mlx": open_mlx, "ggml": open_ggml}[args.engine]
                sessions[model] = open_engine(model, **_engine_options(parser, args))
            row = evaluate_mode(
                *sessions[model], task, args.mode, args.n, args.seed, args.batch, args.search, args.noise,
                args.show_failures,
            )  # fmt: skip
        except (DgemmaError, OSError) as error:
            sys.exit(f"error: {error}")
        table.append(row | {"model": model})
        print(as_text(row), flush=True)
    if args.json:
        print(json.dumps({"engine": args.engine, "seed": args.seed, "tasks": table}))


def _engine_options(parser, args):
    """What only one engine takes; a usage error where another was asked for."""
    given = dict(PRESETS.get(args.preset, {}))
    if args.engine == "transformers" and (args.preset or args.set):
        parser.error("--preset and --set are for --engine mlx and ggml")
    for text in args.set:
        name, _, value = text.partition("=")
        try:
            given[name] = json.loads(value)
        except json.JSONDecodeError:
            given[name] = value
    for engine, name in (("mlx", "dequantize"), ("ggml", "device"), ("ggml", "self_conditioning")):
        if value := getattr(args, name):
            if args.engine != engine:
                parser.error(f"--{name.replace('_', '-')} is for --engine {engine}")
            given[name] = value
    return given


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
