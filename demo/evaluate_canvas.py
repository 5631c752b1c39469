"""Tasks with known parts, solved in one of three ways: python -m demo.evaluate --task infill --mode clamp

Shapes   an instance is a row of a batch, its index the row id, so batching changes nothing
Source   demo.canvas_tasks; mlx_dgemma.layout and infilling, as the commands use them
Differs  clamp: what is given stands. warm: the canvas only starts from it, with the whole schedule ahead, as in
         transformers and mlx-vlm. prompt: nothing is in the canvas, so of a hole the model sees what stands before
         it and nothing of what follows. JSON has no known text: its clamp is a schema

What the model wrote into a hole is judged between the text as it was given, so that a warm start is not blamed for
what it changes elsewhere; that is counted apart, as `intact`.
"""

import difflib
import json
import random
import re
import sys
import time

import numpy as np

from demo.canvas_tasks import EDIT_INSTRUCTION, canvas_held_out, judge
from demo.tasks import KINDS, check, held_out
from mlx_dgemma import structure
from mlx_dgemma.clamp import Clamp, joined
from mlx_dgemma.editing import NOISE, edit
from mlx_dgemma.events import BlockDone, Done, StepDone
from mlx_dgemma.infilling import LENGTHS, fill
from mlx_dgemma.layout import Hole, lay_out
from mlx_dgemma.noise import NoiseStream

SEARCHABLE = {"infill", "infill_own", "edit"}
IMPOSSIBLE = {
    ("json", "warm"): "there is no text to start from; give clamp (by schema) or prompt",
    ("sudoku", "prompt"): "the board would be nowhere; --task sudoku without --mode has it in the prompt",
}


class WarmStart(Clamp):
    """Nothing stands, and the schedule starts where it always does."""

    @property
    def noise_share(self):
        return np.ones(len(self.tokens))


def evaluate_mode(session, config, task, mode, n=300, seed=0, batch=50, search=False, noise=NOISE, show_failures=0):
    """One row of the table, as a dict."""
    if task == "json":
        return _evaluate_json(session, config, mode, n, seed, batch, show_failures)
    instances, began = canvas_held_out(task, n, seed), time.perf_counter()
    if search:
        found = [_searched(session, config, row, x, seed, noise) for row, x in enumerate(instances)]
    else:
        found = [
            x
            for start in range(0, n, batch)
            for x in _batch(session, config, mode, instances[start : start + batch], start, seed, noise)
        ]
    seconds = time.perf_counter() - began
    verdicts = [judge(instance, x["texts"]) for instance, x in zip(instances, found, strict=True)]
    _show(
        [(i, x["texts"]) for i, x, right in zip(instances, found, verdicts, strict=True) if not right][:show_failures]
    )
    row = _row(task, mode, verdicts, [x["steps"] for x in found], [x["tokens"] for x in found], seconds)
    row["intact"] = sum(x["intact"] for x in found)
    row["whole"] = sum(x["intact"] and right for x, right in zip(found, verdicts, strict=True))
    if task == "edit":
        row["elsewhere"] = sum(_elsewhere(i, x["texts"]) for i, x in zip(instances, found, strict=True))
    return row


def _row(task, mode, verdicts, steps, tokens, seconds):
    from demo.evaluate import wilson

    n, right = len(verdicts), sum(verdicts)
    low, high = wilson(right, n)
    return {
        "task": task, "mode": mode, "n": n, "right": right, "rate": right / n, "low": low, "high": high,
        "steps": sum(steps) / n, "tpf": sum(tokens) / sum(steps), "seconds": round(seconds, 1),
    }  # fmt: skip


def _batch(session, config, mode, instances, first, seed, noise):
    """What stands in each instance's parts, the steps it took, and whether what was given is as it was."""
    tokenizer, C = session.tokenizer, session.canvas_length
    config = config.replace(max_new_tokens=C)
    prompts, layouts, rows = [], [], list(range(first, first + len(instances)))
    for x in instances:
        parts = [x.prefix, *(Hole(old=p.old or None) if p.free else p.text for p in x.parts)]
        # An edit has the old text's length, a hole the right answer's.
        lengths = [len(tokenizer.encode(p.old or p.text)) for p in x.parts if p.free]
        layouts.append(lay_out(parts, lengths, tokenizer, config, C))
        prompts.append(tokenizer.chat([{"role": "user", "content": x.prompt}]) + layouts[-1].prefix)
    clamp = joined([x.clamp for x in layouts])
    chosen = NoiseStream(seed).warm(rows, C) < noise
    clamp = clamp._replace(noisy=clamp.noisy | (chosen & clamp.free))
    started = {"clamp": clamp, "warm": WarmStart(clamp.tokens, np.zeros_like(clamp.known), clamp.noisy)}.get(mode)
    drafts, steps = None, 0
    for event in session.stream(prompts, config, seed, rows=rows, clamp=started):
        if isinstance(event, StepDone):
            drafts, steps = event.draft, steps + event.running
    found = []
    for row, (x, layout) in enumerate(zip(instances, layouts, strict=True)):
        draft = drafts[row]
        if mode == "prompt":
            texts, intact = _asked(x, tokenizer.decode(_until_stop(draft, config)))
        else:
            holes = iter(layout.texts(draft, tokenizer))
            texts = [next(holes) if p.free else p.text for p in x.parts]
            intact = bool((draft == clamp.tokens[row])[clamp.known[row]].all())
        tokens = sum(s.stop - s.start for s in layout.holes)
        found.append({"texts": texts, "steps": int(steps[row]), "tokens": tokens, "intact": intact})
    return found


def _until_stop(draft, config):
    stops = np.flatnonzero(np.isin(draft, config.stop_token_ids))
    return draft[: stops[0] if stops.size else None].tolist()


def _asked(instance, text):
    """Parts of an answer that was written without a canvas: what stands before the given end is the hole."""
    suffix = instance.parts[1].text if len(instance.parts) > 1 else ""
    intact = text.endswith(suffix)
    middle = text.removesuffix(suffix) if intact else text
    return [middle, *([suffix] if suffix else [])], intact


def _searched(session, config, row, instance, seed, noise):
    """One instance by `fill`, which has to find the hole's length too."""
    if instance.task == "edit":
        return _edited(session, config, row, instance, seed, noise)
    parts = [instance.prefix, *(Hole() if p.free else p.text for p in instance.parts)]
    *_, event = fill(session, parts, config, prompt=instance.prompt, seed=seed + row, lengths=LENGTHS)
    holes = iter(event.holes)
    texts = [next(holes) if p.free else p.text for p in instance.parts]
    steps = event.done.stats.steps + event.search_steps
    intact = event.text == instance.prefix + "".join(texts)
    return {"texts": texts, "steps": steps, "tokens": sum(event.lengths), "intact": intact}


def _edited(session, config, row, instance, seed, noise):
    """The same by `edit`: lines behind the prefix may change."""
    before = instance.prefix + instance.parts[0].old
    lines = [(instance.prefix.count("\n") + 1, before.count("\n"))]
    *_, event = edit(session, before, EDIT_INSTRUCTION, config, lines=lines, seed=seed + row, noise=noise)
    steps = sum(x.done.stats.steps + x.search_steps for x in event.canvases)
    tokens, intact = sum(sum(x.lengths) for x in event.canvases), event.text.startswith(instance.prefix)
    return {"texts": [event.text.removeprefix(instance.prefix)], "steps": steps, "tokens": tokens, "intact": intact}


def _elsewhere(instance, texts):
    """Words of an edit that changed although the bug is not in them."""
    part = instance.parts[0]
    return len(_changed(part.old, texts[0]) - _changed(part.old, part.text))


def _changed(old, new):
    """Which words of `old` are others in `new`."""
    old, new = (re.findall(r"\w+|[^\w\s]", text) for text in (old, new))
    steps = difflib.SequenceMatcher(None, old, new, False).get_opcodes()
    return {i for tag, first, last, _, _ in steps if tag != "equal" for i in range(first, max(last, first + 1))}


def record_regex():
    """One to three records of the kinds that JSON prompts are about, a line each."""

    def field(draw):
        is_number = isinstance(draw(random.Random(0)), int)
        return {"type": "integer"} if is_number else {"type": "string", "maxLength": 20}

    kinds = []
    for kind in KINDS:
        properties = {key: field(draw) for key, draw in kind.fields}
        kinds.append(
            {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
        )
    record = "(?:" + "|".join(f"(?:{structure.json_schema(json.dumps(kind))})" for kind in kinds) + ")"
    return f"{record}(?:\\n{record}){{0,2}}"


def _evaluate_json(session, config, mode, n, seed, batch, show_failures):
    language = structure.compile(record_regex(), session.tokenizer, config) if mode == "clamp" else None
    instances, began = held_out("json", n, seed), time.perf_counter()
    texts, steps, tokens = [], [], []
    for start in range(0, n, batch):
        rows = list(range(start, min(start + batch, n)))
        prompts = [[{"role": "user", "content": instances[row].prompt}] for row in rows]
        blocks = []
        for event in session.stream(prompts, config, seed, rows=rows, language=language):
            if isinstance(event, BlockDone):
                blocks.append(event.steps)
        assert isinstance(event, Done)
        texts += event.texts
        steps += np.sum(blocks, axis=0).tolist()
        tokens += [len(row) + stop for row, stop in zip(event.tokens, event.stopped, strict=True)]
    verdicts = [check(instance, text) for instance, text in zip(instances, texts, strict=True)]
    row = _row("json", mode, verdicts, steps, tokens, time.perf_counter() - began)
    valid = re.compile(record_regex())
    row["valid"] = sum(valid.fullmatch(text) is not None for text in texts)
    _show([(i, [t]) for i, t, right in zip(instances, texts, verdicts, strict=True) if not right][:show_failures])
    return row


def _show(failures):
    for instance, texts in failures:
        print(f"--- {instance}\n--- got\n{texts}", file=sys.stderr)


def heading():
    return f"{'task':14}{'mode':9}{'n':>5}{'right':>8}  {'95 % interval':15}{'steps':>7}{'TPF':>7}  "


COUNTS = {
    "intact": "given text intact", "whole": "right and intact", "elsewhere": "words changed elsewhere",
    "valid": "valid",
}  # fmt: skip


def as_text(row):
    interval = f"{row['low']:.1%}..{row['high']:.1%}"
    more = ", ".join(f"{what} {row[name]}" for name, what in COUNTS.items() if name in row)
    measured = f"{row['rate']:>8.1%}  {interval:15}{row['steps']:>7.2f}{row['tpf']:>7.1f}"
    return f"{row['task']:14}{row['mode']:9}{row['n']:>5}{measured}  {more}"
