"""How well a model denoises held-out answers: python -m demo.cross_entropy --model PATH

Shapes   B canvases at once, C canvas slots, V vocabulary; scores are (N, T), per canvas and noise share
Source   the training objective (arXiv 2608.00146): noisy canvas, second pass with self-conditioning from the first
Differs  every model gets the same noise, so two models differ canvas by canvas; the standard error is that of the
         difference between instances

`--against demo/checkpoint` compares with the float model: difference, KL(float || model) and equal argmax. The demo
solves its tasks, so losses are small and KL is what tells two quantizations apart.
"""

import argparse
import json
import sys
import time
from typing import NamedTuple

import numpy as np

from demo.tasks import TASKS, held_out
from mlx_dgemma.errors import DgemmaError

NOISE_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
BATCH = 25


class Canvas(NamedTuple):
    """A block of a right answer, and what comes before it."""

    instance: int  # also the noise row
    block: int
    prefix: list[int]
    clean: np.ndarray  # (C,) int32


class Scores(NamedTuple):
    """Sums over the slots of a canvas, each (N, T)."""

    slots: np.ndarray
    noisy: np.ndarray  # slots with a random token
    loss: np.ndarray  # nats
    noisy_loss: np.ndarray  # nats, of the noisy slots alone
    kl: np.ndarray  # nats, reference || model
    same: np.ndarray  # slots whose most likely token is the reference's


def canvases(tokenizer, n: int, seed: int, canvas_length: int) -> list[Canvas]:
    """Every block of the answers of n held-out instances per task, formatted as in training."""
    from convert.calibrate import Example, passages

    chosen = [instance for task in TASKS for instance in held_out(task, n, seed)]
    examples = (Example(({"role": "user", "content": i.prompt},), i.answer) for i in chosen)
    found = []
    for instance, passage in enumerate(passages(examples, tokenizer, canvas_length)):
        for block, clean in enumerate(passage.canvases):
            prefix = [*passage.prompt.tolist(), *passage.canvases[:block].ravel().tolist()]
            found.append(Canvas(instance, block, prefix, clean))
    return found


def measure(models: list, found: list[Canvas], ts=NOISE_SHARES, seed=0, on_batch=lambda done: None) -> list[Scores]:
    """Scores of every model, in the order of `found`. The last model is the reference of kl and same."""
    sums = np.zeros((len(models), len(Scores._fields), len(found), len(ts)))
    order = sorted(range(len(found)), key=lambda i: len(found[i].prefix))  # little padding
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        sums[:, :, rows] = _batch(models, [found[i] for i in rows], ts, seed)
        on_batch(start + len(rows))
    return [Scores(*model) for model in sums]


def _batch(models, rows, ts, seed):
    """(models, fields, B, T)"""
    from convert.calibrate import corrupt, temperature_at
    from mlx_dgemma.engine import MlxEngine
    from mlx_dgemma.noise import NoiseStream
    from mlx_dgemma.session import left_padded

    stream, config, settings = NoiseStream(seed), models[0].config, models[0].generation_config
    engines = [MlxEngine(model) for model in models]
    for engine in engines:
        engine.prefill(*left_padded([row.prefix for row in rows], settings.pad_token_id))
    clean = np.stack([row.clean for row in rows])
    columns = []
    for t in ts:
        pairs = [corrupt(row.clean[None], t, stream, [row.instance], row.block, config.vocab_size) for row in rows]
        canvas, noisy = (np.concatenate(part) for part in zip(*pairs, strict=True))
        logits = [_second_pass(engine, canvas, temperature_at(t, settings)) for engine in engines]
        scores = [slot_scores(clean, noisy, each, logits[-1]) for each in logits]
        columns.append([[slots.sum(axis=-1) for slots in model] for model in scores])
    return np.stack(columns, axis=-1)


def _second_pass(engine, canvas, temperature) -> np.ndarray:
    """Logits (B, C, V), self-conditioned on those of a first pass."""
    import mlx.core as mx

    canvas = mx.array(canvas)
    first = engine.model.denoise(canvas, engine.cache) / temperature
    return np.array(engine.model.denoise(canvas, engine.cache, first))


def slot_scores(clean, noisy, logits, reference) -> Scores:
    """One value per slot: clean, noisy (B, C), logits of the model and the reference (B, C, V) → each (B, C)"""
    log_p, log_q = log_softmax(logits), log_softmax(reference)
    loss = -np.take_along_axis(log_p, clean[..., None], axis=-1)[..., 0]
    kl = (np.exp(log_q) * (log_q - log_p)).sum(axis=-1)
    same = logits.argmax(axis=-1) == reference.argmax(axis=-1)
    return Scores(np.ones_like(loss), noisy, loss, loss * noisy, kl, same)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def ratio(total: np.ndarray, count: np.ndarray, instance: np.ndarray) -> tuple[float, float]:
    """sum(total) / sum(count) and its standard error. Canvases of one instance are not independent; instances are."""
    totals, counts = np.bincount(instance, total), np.bincount(instance, count)
    mean = totals.sum() / counts.sum()
    m = len(totals)
    spread = np.square(totals - mean * counts).sum() * m / max(1, m - 1)
    return float(mean), float(np.sqrt(spread) / counts.sum())


def summary(scores: Scores, instance: np.ndarray, reference: Scores | None = None, ts=NOISE_SHARES) -> dict:
    """Means per slot, each with its standard error; loss also per noise share."""
    whole = Scores(*(field.sum(axis=1) for field in scores))
    row = {
        "t": {str(t): ratio(scores.loss[:, i], scores.slots[:, i], instance)[0] for i, t in enumerate(ts)},
        "loss": ratio(whole.loss, whole.slots, instance),
        "noisy_loss": ratio(whole.noisy_loss, whole.noisy, instance),
    }
    if reference is not None:
        other = Scores(*(field.sum(axis=1) for field in reference))
        row["difference"] = ratio(whole.loss - other.loss, whole.slots, instance)
        row["noisy_difference"] = ratio(whole.noisy_loss - other.noisy_loss, whole.noisy, instance)
        row["kl"] = ratio(whole.kl, whole.slots, instance)
        row["same_argmax"] = ratio(whole.same, whole.slots, instance)
    return row


def heading(against: bool) -> str:
    columns = "".join(f"{f't={t}':>9}" for t in NOISE_SHARES)
    compared = f"{'difference':>21}{'KL':>21}{'same argmax':>13}" if against else ""
    return f"{'model':24}{columns}{'mean':>9}{'noisy':>9}{compared}"


def as_text(name: str, row: dict) -> str:
    """One line; after ± stands the standard error."""
    means = [*row["t"].values(), row["loss"][0], row["noisy_loss"][0]]
    text = f"{name[-24:]:24}" + "".join(f"{mean:9.5f}" for mean in means)
    if "kl" in row:
        text += "{:>+11.5f} ± {:.5f}".format(*row["difference"]) + "{:>11.5f} ± {:.5f}".format(*row["kl"])
        text += f"{row['same_argmax'][0]:>13.3%}"
    return text


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m demo.cross_entropy", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, action="append", help="folder or GGUF file; may be repeated")
    parser.add_argument("--against", metavar="PATH", help="the float model: adds the difference from it, KL, agreement")
    parser.add_argument("--n", type=int, default=100, help="instances per task (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="chooses the instances and the noise")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    args = parser.parse_args(arguments)
    if args.n < 1:
        parser.error("--n must be at least 1")
    began = time.perf_counter()
    paths = args.model + ([args.against] if args.against else [])
    try:
        loaded = [_load(path) for path in paths]
    except DgemmaError as error:
        sys.exit(f"error: {error}")
    models, tokenizer = [model for model, _ in loaded], loaded[0][1]
    found = canvases(tokenizer, args.n, args.seed, models[0].config.canvas_length)

    def progress(done):
        if sys.stderr.isatty():
            print(f"{done}/{len(found)}", end="\r", file=sys.stderr)

    scores = measure(models, found, seed=args.seed, on_batch=progress)
    instance = np.array([canvas.instance for canvas in found])
    reference = scores[-1] if args.against else None
    rows = [summary(each, instance, reference) for each in scores[: len(args.model)]]
    print(heading(bool(args.against)))
    for path, row in zip(args.model, rows, strict=True):
        print(as_text(path, row))
    if args.json:
        seconds = round(time.perf_counter() - began, 1)
        named = [{"model": path} | row for path, row in zip(args.model, rows, strict=True)]
        settings = {"against": args.against, "n": args.n, "seed": args.seed, "canvases": len(found)}
        print(json.dumps(settings | {"seconds": seconds, "models": named}))


def _load(path):
    import mlx.core as mx

    import mlx_dgemma

    # Floats on both sides: only the stored values differ, not the arithmetic.
    return mlx_dgemma.load(path, mx.float32, dequantize=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
