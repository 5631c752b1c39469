"""How far the probabilities of decisions can be believed: python -m demo.calibration_of_choices --engine ggml

Shapes   one decision per held-out prompt: a word of a JSON answer, or a cell of a Sudoku
Source   demo.tasks; mlx_dgemma.decisions
Differs  SETTINGS say what the model is shown. The temperature is fitted on one seed's prompts by likelihood and judged
         on another's. Answers longer than a canvas are left out

Ends with one JSON line.
"""

import argparse
import json
import random
import string
import sys
import time
from typing import NamedTuple

import numpy as np

from demo.evaluate import open_ggml, open_mlx
from demo.tasks import CITIES, DAYS, ITEMS, JOBS, NAMES, SKIES, instances
from mlx_dgemma.decisions import decide, probabilities, reliability
from mlx_dgemma.errors import DgemmaError

WORDS = {
    "name": NAMES, "buyer": NAMES, "city": CITIES, "from": CITIES, "to": CITIES, "item": ITEMS, "job": JOBS,
    "day": DAYS, "sky": SKIES,
}  # fmt: skip
SETTINGS = {
    "whole": "JSON, the rest of the right answer before and behind",
    "open": "JSON, behind the word only its quote; then noise",
    "misspelt": "JSON as `whole`, but one letter of the word is another one in the prompt",
    "blurred": "JSON as `whole`, but the prompt has _ for the word: nobody can know it",
    "sudoku": "a cell among 1 2 3 4, the right cells before, noise behind",
}
TEMPERATURES = np.geomspace(0.25, 16, 73)  # 1 is among them


class Case(NamedTuple):
    prompt: str
    before: str
    choices: tuple[str, ...]
    right: int
    after: str
    ends: bool  # the answer ends behind `after`


class Judged(NamedTuple):
    scores: np.ndarray  # (n,) nats
    right: int
    single: bool  # every choice has one token
    seconds: float


def cases(setting, tokenizer, canvas_length, n, seed, n_choices):
    """n decisions, each with `n_choices` words (None: the whole list)."""
    rng, seen, found = random.Random(f"choices/{setting}/{seed}/{n_choices}"), set(), []
    task = "sudoku" if setting == "sudoku" else "json"
    for instance in instances(task, seed, held_out=True):
        if instance.prompt in seen or len(tokenizer.encode(instance.answer)) > canvas_length - 8:
            continue
        seen.add(instance.prompt)
        make = _sudoku if task == "sudoku" else _word
        found.append(make(setting, instance, rng, n_choices))
        if len(found) == n:
            return found


def _sudoku(setting, instance, rng, n_choices):
    at = rng.choice([i for i, cell in enumerate(instance.truth) if cell == "."])
    start = at + at // 4  # a line break behind every fourth cell
    answer, digits = instance.answer, ("1", "2", "3", "4")
    return Case(instance.prompt, answer[:start], digits, digits.index(answer[start]), "", False)


def _word(setting, instance, rng, n_choices):
    lines, line = instance.answer.split("\n"), rng.randrange(len(instance.truth))
    record = instance.truth[line]
    key = rng.choice([key for key in record if key in WORDS])
    word, opened = record[key], f'"{key}": "'
    others = [other for other in WORDS[key] if other != word]
    choices = [word, *(others if n_choices is None else rng.sample(others, n_choices - 1))]
    rng.shuffle(choices)
    start = sum(len(x) + 1 for x in lines[:line]) + lines[line].index(opened) + len(opened)
    before, after = instance.answer[:start], instance.answer[start + len(word) :]
    at = rng.randrange(len(word))
    shown = {"blurred": "_", "misspelt": word[:at] + rng.choice(string.ascii_lowercase) + word[at + 1 :]}
    prompt = instance.prompt.replace(word, shown.get(setting, word))
    ends = setting != "open"
    return Case(prompt, before, tuple(choices), choices.index(word), after if ends else '"', ends)


def judge(session, settings, found):
    """Each case decided."""
    for case in found:
        prompt = session.tokenizer.chat([{"role": "user", "content": case.prompt}])
        began = time.perf_counter()
        engine = session.make_engine()
        engine.prefill(np.array([prompt], np.int32))
        decision = decide(engine, session.tokenizer, case.before, case.choices, case.after, settings, ends=case.ends)
        yield Judged(decision.scores, case.right, decision.single, time.perf_counter() - began)


def loss(judged, temperature):
    """Mean −log p of the right answer, nats."""
    p = [probabilities(j.scores, temperature)[j.right] for j in judged]
    return float(-np.log(np.maximum(p, 1e-300)).mean())


def summary(judged, temperature):
    """Accuracy and calibration at one temperature."""
    p = [probabilities(j.scores, temperature) for j in judged]
    right = np.array([int(x.argmax()) == j.right for x, j in zip(p, judged, strict=True)])
    found = reliability(np.array([x.max() for x in p]), right)
    return {
        "temperature": round(float(temperature), 3), "right": int(right.sum()), "ece": found.ece,
        "nats": loss(judged, temperature), "bins": found.bins,
    }  # fmt: skip


def row_of(setting, choices, fit, report):
    best = TEMPERATURES[int(np.argmin([loss(fit, t) for t in TEMPERATURES]))]
    ms = float(np.median([j.seconds for j in report])) * 1e3
    return {
        "setting": setting, "choices": choices, "n": len(report), "at_1": summary(report, 1.0),
        "at_best": summary(report, best), "ms": round(ms, 1),
    }  # fmt: skip


def as_text(row):
    one, best, n = row["at_1"], row["at_best"], row["n"]
    return (
        f"{row['setting']:9}{row['choices']:16}{n:>5}{one['right'] / n:>8.1%}{one['ece']:>8.4f}{one['nats']:>8.4f}"
        f"{best['temperature']:>8.2f}{best['ece']:>8.4f}{best['nats']:>8.4f}{row['ms']:>7.0f}"
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m demo.calibration_of_choices",
        description=__doc__.split("\n")[0],
        epilog="settings: " + "; ".join(f"{name}: {what}" for name, what in SETTINGS.items()),
    )
    parser.add_argument("--engine", choices=("mlx", "ggml"), default="ggml")
    parser.add_argument("--model", default="demo/checkpoint")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    parser.add_argument("--choices", nargs="+", default=["2", "4", "all"], help="JSON: words to choose from")
    parser.add_argument("--n", type=int, default=300, help="decisions per row and seed (default: 300)")
    parser.add_argument("--fit", type=int, default=0, metavar="SEED", help="prompts the temperature is fitted on")
    parser.add_argument("--seed", type=int, default=1, help="prompts that are reported (default: 1)")
    options = parser.parse_args(arguments)
    try:
        session, settings = {"mlx": open_mlx, "ggml": open_ggml}[options.engine](options.model)
    except (DgemmaError, OSError) as error:
        sys.exit(f"error: {error}")
    tokenizer, C, table = session.tokenizer, session.canvas_length, []
    heading = f"{'setting':9}{'choices':16}{'n':>5}{'right':>8}{'ECE':>8}{'nats':>8}"
    print(heading + f"{'best T':>8}{'ECE':>8}{'nats':>8}{'ms':>7}")
    for setting in options.settings:
        fit, report = [], []
        for words in ["4"] if setting == "sudoku" else options.choices:
            number = None if words == "all" else int(words)
            parts = [
                list(judge(session, settings, cases(setting, tokenizer, C, options.n, seed, number)))
                for seed in (options.fit, options.seed)
            ]
            fit, report = fit + parts[0], report + parts[1]
            table.append(row_of(setting, words, *parts))
            print(as_text(table[-1]), flush=True)
        for name, single in (("one token each", True), ("longer ones", False)):
            parts = [[j for j in judged if j.single == single] for judged in (fit, report)]
            if setting != "sudoku" and all(parts):
                table.append(row_of(setting, name, *parts))
                print(as_text(table[-1]), flush=True)
        for b in summary(report, 1.0)["bins"]:
            print(
                f"{'':9}stated {b.low:.1f} .. {b.high:.1f}{b.n:>6}   mean {b.confidence:.3f}   right {b.accuracy:.3f}"
            )
    print(json.dumps({"engine": options.engine, "model": options.model, "fit": options.fit, "seed": options.seed,
                      "table": table}))  # fmt: skip


if __name__ == "__main__":
    main()
