"""Scores of a model's distributions over canvases, and their means with standard errors.

Shapes   N canvases, B of them at once, T shares of noise, P passes (first, self-conditioned), C canvas slots, S of them
         sampled, L layers, K experts per token, V vocabulary
Source   the training objective (arXiv 2608.00146): noisy canvas, second pass with self-conditioning from the first
Differs  every model sees the same noise, so two models differ slot by slot. Canvases of one instance are dependent;
         instances are not, so standard errors are those of sums over instances

All of it is numpy and pure; quality_engines.py computes the logits.
"""

from typing import NamedTuple

import numpy as np

from convert.examples import NOISE_SHARES, Canvas, corrupt
from demo.evaluate import wilson
from mlx_dgemma import quality
from mlx_dgemma.noise import NoiseStream

PASSES = ("first", "self_conditioned")
REGIONS = ("all", "corrupted")
SAMPLE = 2_000  # steps of the noise stream from here on choose slots; shares of noise use those up to 1,000
TINY = 1e-12  # nats, for logarithms
CHUNK = 1 << 22  # logits read at a time: what numpy makes of them on the way is a few times this


class Noisy(NamedTuple):
    """A canvas at one share of noise."""

    tokens: np.ndarray  # (C,) int32
    corrupted: np.ndarray  # (C,) bool, slots that got a random token
    sampled: np.ndarray  # (S,) slots whose whole distribution is compared
    weights: np.ndarray  # (S,) how many slots of its kind each stands for


class Reading(NamedTuple):
    """What one pass said about one canvas."""

    loss: np.ndarray  # (C,) float32, nats for the clean token
    best: np.ndarray  # (C,) int32, the likeliest token
    shares: np.ndarray  # (S, V) log-probabilities of the sampled slots, in the type of the base
    experts: np.ndarray | None  # (C, L, K), None where the engine does not tell


def noisy(canvas: Canvas, t: float, stream: NoiseStream, vocab_size: int, slots: int) -> Noisy:
    """The canvas with a share t of random tokens, and a sample of `slots` slots: half of them corrupted ones.

    Depends on seed, instance, block and t alone.
    """
    tokens, corrupted = corrupt(canvas.clean[None], t, stream, [canvas.instance], canvas.block, vocab_size)
    C = tokens.shape[-1]
    order = np.argsort(stream.uniforms([canvas.instance], canvas.block, SAMPLE + round(1000 * t), C)[0], kind="stable")
    kinds = [order[corrupted[0][order]], order[~corrupted[0][order]]]
    half, total = slots // 2, min(slots, C)
    first = min(len(kinds[0]), max(half, total - len(kinds[1])))
    taken = [kind[:n] for kind, n in zip(kinds, (first, total - first), strict=True)]
    weights = [np.full(len(some), len(kind) / max(1, len(some))) for some, kind in zip(taken, kinds, strict=True)]
    return Noisy(tokens[0], corrupted[0], np.concatenate(taken), np.concatenate(weights))


def read(logits: np.ndarray, clean: np.ndarray, sampled: np.ndarray, dtype, experts=None) -> Reading:
    """One canvas's logits (C, V) → what is kept of them."""
    shares = log_softmax(logits[sampled].astype(np.float64)).astype(dtype)
    return Reading(losses(logits, clean), logits.argmax(axis=-1).astype(np.int32), shares, experts)


def losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """−log softmax at the targets: (n, V), (n,) → (n,) float32 nats"""
    out = np.empty(len(logits), np.float32)
    step = max(1, CHUNK // logits.shape[-1])
    for start in range(0, len(logits), step):
        some = logits[start : start + step]
        top = some.max(axis=-1, keepdims=True)
        total = np.exp(some - top).sum(axis=-1)
        right = np.take_along_axis(some, targets[start : start + step, None], axis=-1)
        out[start : start + step] = np.log(total) - (right - top)[:, 0]
    return out


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def divergence(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """KL(reference || candidate) of rounded log-probabilities, both (S, V) of one type → (S,) float64 nats

    Rounding took the sums of shares away from 1; both are scaled back, so KL is never below 0, and 0 for equals.
    """
    log_q, log_p = (log_softmax(x.astype(np.float64)) for x in (reference, candidate))
    return (np.exp(log_q) * (log_q - log_p)).sum(axis=-1).clip(0)


def shared_experts(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Share of a token's K experts that are the reference's too, mean over layers: both (C, L, K) → (C,)"""
    return (candidate[..., :, None] == reference[..., None, :]).any(axis=-1).mean(axis=(-1, -2))


class Sums(NamedTuple):
    """Sums over the slots of canvases: all slots, and the corrupted ones. Each (2, N, T, P) float64"""

    slots: np.ndarray
    loss: np.ndarray  # nats
    kl: np.ndarray  # nats, estimated from the sampled slots
    same: np.ndarray  # slots whose likeliest token is the reference's
    experts: np.ndarray  # shares of experts that are the reference's; NaN where an engine does not tell

    @classmethod
    def empty(cls, n: int, shares: int) -> "Sums":
        return cls(*(np.zeros((len(REGIONS), n, shares, len(PASSES))) for _ in cls._fields))


def score(reading: Reading, reference: Reading, at: Noisy) -> np.ndarray:
    """The sums of one canvas and pass, (fields of Sums, 2)"""
    kl, told = divergence(reference.shares, reading.shares) * at.weights, reading.experts is not None
    experts = np.full(len(at.tokens), np.nan)
    if told and reference.experts is not None:
        experts = shared_experts(reference.experts, reading.experts)
    per_slot = [np.ones(len(at.tokens)), reading.loss, None, reading.best == reference.best, experts]
    every, some = np.ones_like(at.corrupted), at.corrupted
    rows = [[kl.sum(), kl[some[at.sampled]].sum()] if x is None else [x[every].sum(), x[some].sum()] for x in per_slot]
    return np.array(rows, np.float64)


# Means


def ratio(total: np.ndarray, count: np.ndarray, instance: np.ndarray) -> dict | None:
    """mlx_dgemma.quality.ratio as {"mean", "se"}."""
    found = quality.ratio(total, count, instance)
    return None if found is None else {"mean": found[0], "se": found[1]}


def summary(sums: Sums, instance: np.ndarray, reference: Sums | None = None, ts=NOISE_SHARES) -> dict:
    """Per pass: means over each share of noise, and over all of them. See docs/quality.md for the names.

    reference: its sums, for differences canvas by canvas; without it nothing is compared.
    """

    def row(p, pick):
        made = {}
        for region, name in enumerate(REGIONS):

            def mean(field, region=region):
                return ratio(pick(field[region, :, :, p]), pick(sums.slots[region, :, :, p]), instance)

            made[name] = {"cross_entropy": mean(sums.loss)}
            if reference is not None:
                made[name] |= {
                    "difference": mean(sums.loss - reference.loss), "kl": mean(sums.kl), "same_argmax": mean(sums.same),
                    "same_experts": mean(sums.experts),
                }  # fmt: skip
        return made

    def column(i):
        return lambda x: x[:, i]

    return {
        name: {
            "t": {str(t): row(p, column(i)) for i, t in enumerate(ts)},
            "mean": row(p, lambda x: x.sum(axis=1)),
        }
        for p, name in enumerate(PASSES)
    }


def by_instance(sums: Sums, instance: np.ndarray) -> list[list[float]]:
    """Of the self-conditioned pass and all shares of noise: KL over the corrupted slots of each instance, and how
    many they are. With two models' lists their difference has a standard error of its own (`kl_difference`)."""
    kl, slots = (np.bincount(instance, field[1, :, :, 1].sum(axis=1)) for field in (sums.kl, sums.slots))
    return [[float(k), int(n)] for k, n in zip(kl, slots, strict=True)]


def typical(found: list[list[float]]) -> dict | None:
    """The geometric mean over instances of a `by_instance`, and its standard error; None where no instance counts.

    What most instances say, where a plain mean is what a few of them say. Its ratio between two models is `compare`'s.
    """
    kl, n = np.array(found).T
    logs = np.log(np.maximum(kl, TINY)[n > 0] / n[n > 0])
    if not len(logs):
        return None
    mean = float(np.exp(logs.mean()))
    return {"mean": mean, "se": mean * float(logs.std(ddof=1)) / len(logs) ** 0.5 if len(logs) > 1 else None}


def compare(ours: list[list[float]], theirs: list[list[float]]) -> dict:
    """How KL of one model stands to that of another, instance by instance, from their `by_instance`.

    A few instances make up most of a mean KL, so beside the difference of means there are two figures in which every
    instance counts alike: `wins` of `n`, instances in which ours is lower, with Wilson's 95 % interval of that share,
    and `ratio`, the geometric mean of ours / theirs, with a 95 % interval. A KL of 0 counts as TINY.
    """
    (a, n), (b, _) = np.array(ours).T, np.array(theirs).T
    there = n > 0
    logs = np.log(np.maximum(a, TINY)[there]) - np.log(np.maximum(b, TINY)[there])
    wins, tries = int((logs < 0).sum()), int(there.sum())
    half = 1.96 * logs.std(ddof=1) / np.sqrt(tries) if tries > 1 else np.inf
    low, high = wilson(wins, tries)
    return {
        "difference": kl_difference(ours, theirs),
        "wins": {"n": tries, "right": wins, "low": low, "high": high},
        "ratio": {key: float(np.exp(logs.mean() + x)) for key, x in (("mean", 0), ("low", -half), ("high", half))},
    }


def kl_difference(ours: list[list[float]], theirs: list[list[float]]) -> dict | None:
    """KL of one model minus that of another, per corrupted slot, from their `by_instance`."""
    (a, n), (b, m) = np.array(ours).T, np.array(theirs).T
    assert (n == m).all(), "two sets of canvases"
    return ratio(a - b, n, np.arange(len(n)))
