"""Train the demo checkpoint from scratch: python -m demo.train --minutes 60

Shapes   B rows, P prefix, C canvas, V vocabulary
Source   the technical report (arXiv 2608.00146): uniform corruption at t ~ U, two passes, canvas loss + encoder loss
Differs  exactly half of each batch is self-conditioned, on softmax(logits / T) with T of the sampler's range
"""

import argparse
import signal
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from demo import model as M
from demo.optim import make_optimizers
from demo.pool import INFILL_MIX, MIX, batches, make_pool
from demo.quick import quick_rates
from demo.tokenizer import write


def losses(twin, params, batch, generator, device):
    tokens, valid, clean, span, old = (x.to(device) for x in batch)
    rows, vocab = len(clean), M.CONFIG["vocab_size"]
    weights = twin.cast(params)
    encoder_masks, decoder_masks = twin.masks(valid)

    t = torch.rand(rows, 1, generator=generator) * (1 - 2e-4) + 1e-4
    noisy = (torch.rand(clean.shape, generator=generator) < t).to(device) & span
    noise = torch.randint(vocab, clean.shape, generator=generator)
    # Half of the edits start from the text as it was, as a warm start does.
    warm = (torch.rand(rows, 1, generator=generator) < 0.5).to(device)
    canvas = torch.where(noisy, noise.to(device), torch.where(warm, old, clean))

    hidden, past = twin.encode(weights, tokens, encoder_masks)
    half = rows // 2
    probabilities = torch.zeros(*canvas.shape, vocab, dtype=twin.dtype, device=device)
    with torch.no_grad():
        first = [(k[:half], v[:half]) for k, v in past]
        guess = twin.denoise(weights, canvas[:half], first, {full: m[:half] for full, m in decoder_masks.items()})
        temperature = torch.rand(half, 1, 1, generator=generator) * 0.4 + 0.4
        probabilities[:half] = (guess / temperature.to(device)).softmax(-1).to(twin.dtype)
    logits = twin.denoise(weights, canvas, past, decoder_masks, probabilities)
    canvas_loss = F.cross_entropy(logits.flatten(0, 1), clean.flatten())

    known = valid[:, :-1]  # a left-padded row: whatever follows a real token is real
    encoder_loss = F.cross_entropy(twin.logits(weights, hidden[:, :-1][known]), tokens[:, 1:][known])
    return canvas_loss, encoder_loss


def learning_rate(peak, done, step, warmup=100):
    """Linear warm-up, flat, then linear to zero over the last 60 %."""
    return peak * min(1, (step + 1) / warmup) * min(1, (1 - done) / 0.6)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--encoder-weight", type=float, default=1.0)
    parser.add_argument("--pool", type=int, default=200_000)
    parser.add_argument("--mix", help="task=share,... ", default="")
    parser.add_argument("--infill", action="store_true", help="the mixture with holes and edits, for a second training")
    parser.add_argument("--start", type=Path, help="begin with this checkpoint's weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo/checkpoint"))
    parser.add_argument("--snapshot", type=Path, default=Path("demo-snapshot.pt"))
    parser.add_argument("--resume", action="store_true", help="go on from the snapshot")
    parser.add_argument("--eval-minutes", type=float, default=4)
    parser.add_argument("--eval-n", type=int, default=24)
    parser.add_argument("--compile", action="store_true", help="fuse elementwise work; needs a C++ compiler")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    mix = (INFILL_MIX if args.infill else MIX) | {
        k: float(v) for k, v in (pair.split("=") for pair in args.mix.split(",") if pair)
    }
    began = time.time()
    pool = make_pool(args.pool, args.seed, mix)
    print(f"pool {len(pool)} in {time.time() - began:.0f} s, {device}, {vars(args)}", flush=True)

    params = M.load(args.start) if args.start else M.init_params(args.seed)
    params = {name: p.to(device).requires_grad_() for name, p in params.items()}
    optimizers = make_optimizers(params, args.lr, args.optimizer == "muon")
    step, spent = 0, 0.0
    if args.resume:
        saved = torch.load(args.snapshot, map_location=device)
        for name, p in params.items():
            p.data.copy_(saved["params"][name])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        generator.set_state(saved["generator"].cpu())
        step, spent = saved["step"], saved["spent"]
    twin = M.Twin(torch.bfloat16, device)
    if args.compile:
        M.compile_pieces()

    def snapshot():
        state = {"params": params, "optimizers": [o.state_dict() for o in optimizers]}
        state |= {"generator": generator.get_state(), "step": step, "spent": spent}
        scratch = args.snapshot.with_suffix(".partial")
        torch.save(state, scratch)
        scratch.replace(args.snapshot)
        M.save(params, args.out)
        write(args.out)

    def report():
        with torch.compiler.set_stance("force_eager"):  # its batches shrink: too many shapes to compile for
            rates = quick_rates(twin, params, args.eval_n)
        shown = "  ".join(f"{task} {rate:.2f} ({steps:.1f})" for task, (rate, steps) in rates.items())
        print(f"eval at {spent / 60:.1f} min, {step} updates: {shown}", flush=True)

    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))  # snapshot first, then leave

    total = args.minutes * 60
    next_eval = spent + args.eval_minutes * 60
    mean = None
    last = time.time()
    for batch in batches(pool, args.batch, f"{args.seed}.{step}"):
        done = spent / total
        if done >= 1 or stopping:
            break
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args.lr, done, step)
        canvas_loss, encoder_loss = losses(twin, params, batch, generator, device)
        (canvas_loss + args.encoder_weight * encoder_loss).backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for p in params.values():
            p.grad = None
        step += 1
        now = torch.tensor([canvas_loss.item(), encoder_loss.item()])
        mean = now if mean is None else 0.97 * mean + 0.03 * now
        spent += time.time() - last
        last = time.time()
        if step % 50 == 0:
            print(f"{spent:6.0f} s {step:6d} canvas {mean[0]:.4f} encoder {mean[1]:.4f}", flush=True)
        if spent >= next_eval:
            snapshot()
            report()
            next_eval += args.eval_minutes * 60
            last = time.time()  # evaluation is not training time
    snapshot()
    if not stopping:
        report()


if __name__ == "__main__":
    main()
