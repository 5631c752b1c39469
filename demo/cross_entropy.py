"""Denoising cross-entropy on held-out instances: python -m demo.cross_entropy --model PATH

Shapes   per instance and t: mean over the C slots of the first canvas, nats
Source   the training objective (arXiv 2608.00146): noise at rate t, a pass, and a second pass conditioned on the first
Differs  the same noise for every model, so differences between two models are paired (--against)
"""

import argparse
import json
import math
import sys

import numpy as np

from convert.examples import corrupt, make_example
from demo.tasks import TASKS, held_out
from mlx_dgemma.errors import DgemmaError

TS = (0.1, 0.3, 0.5, 0.7, 0.9)


def measure(path, n, seed, batch=50):
    """(instances, len(TS)) cross-entropies, and log-probabilities' argmax (instances, len(TS), C)."""
    import mlx.core as mx

    import mlx_dgemma
    from mlx_dgemma.schedule import default_schedule
    from mlx_dgemma.session import left_padded

    model, tokenizer = mlx_dgemma.load(path, mx.float32, dequantize=True)
    config, settings = model.config, model.generation_config
    schedule = default_schedule(settings)
    instances = [instance for task in TASKS for instance in held_out(task, n, seed)]
    messages = [[{"role": "user", "content": i.prompt}] for i in instances]
    examples = [
        make_example(m, i.answer, tokenizer, config, settings) for m, i in zip(messages, instances, strict=True)
    ]
    entropies, drafts = [], []
    for start in range(0, len(examples), batch):
        some = examples[start : start + batch]
        cache = model.make_cache()
        tokens, padding = left_padded([e.prompt for e in some], settings.pad_token_id)
        model.encode(mx.array(tokens, mx.int32), cache, mx.array(padding, mx.int32))
        clean = np.array([e.answer[: config.canvas_length] for e in some])
        rows = []
        for t in TS:
            noisy = [corrupt(c, t, config.vocab_size, seed, start + i) for i, c in enumerate(clean)]
            canvas = mx.array(np.stack(noisy))
            first = model.denoise(canvas, cache) / schedule(round(settings.max_denoising_steps * t))
            logits = model.denoise(canvas, cache, first)
            logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            loss = -mx.take_along_axis(logp, mx.array(clean)[..., None], axis=-1)[..., 0]
            rows.append((np.array(loss.mean(axis=-1)), np.array(mx.argmax(logits, axis=-1))))
        entropies.append(np.stack([e for e, _ in rows], axis=1))
        drafts.append(np.stack([d for _, d in rows], axis=1))
        if sys.stderr.isatty():
            print(f"{start + len(some)}/{len(examples)}", end="\r", file=sys.stderr)
    return np.concatenate(entropies), np.concatenate(drafts)


def compare(this, other):
    """Mean difference per instance and its standard error: negative where `this` is better."""
    difference = (this - other).mean(axis=1)
    return difference.mean(), difference.std(ddof=1) / math.sqrt(len(difference))


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m demo.cross_entropy", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, action="append", help="folder or GGUF file; may be repeated")
    parser.add_argument("--against", help="compare each with this model, instance by instance")
    parser.add_argument("--n", type=int, default=300, help="instances per task (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="chooses the instances and the noise")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    args = parser.parse_args(arguments)
    if args.n < 2:
        parser.error("--n must be at least 2")
    try:
        base = measure(args.against, args.n, args.seed) if args.against else None
        measured = {path: measure(path, args.n, args.seed) for path in args.model}
    except DgemmaError as error:
        sys.exit(f"error: {error}")
    print(
        f"{'model':28}" + "".join(f"{f't={t}':>9}" for t in TS) + f"{'mean':>9}  difference ± standard error, agreement"
    )
    table = []
    for path, (entropy, draft) in measured.items():
        per_t = entropy.mean(axis=0)
        row = {"model": path, "n": len(entropy), "t": dict(zip(map(str, TS), per_t.tolist(), strict=True))}
        row["mean"] = float(entropy.mean())
        tail = ""
        if base is not None:
            row["difference"], row["standard_error"] = map(float, compare(entropy, base[0]))
            row["argmax_agreement"] = float((draft == base[1]).mean())
            tail = f"  {row['difference']:+.5f} ± {row['standard_error']:.5f}, {row['argmax_agreement']:.2%}"
        table.append(row)
        print(f"{path[-28:]:28}" + "".join(f"{e:9.4f}" for e in per_t) + f"{row['mean']:9.4f}{tail}", flush=True)
    if args.json:
        print(json.dumps({"seed": args.seed, "against": args.against, "models": table}))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
