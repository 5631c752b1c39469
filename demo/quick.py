"""A fast look at the tasks during training: the entropy-bound sampler on the twin.

Shapes   B rows, C canvas, V vocabulary
Source   transformers 5.23.0, generation_diffusion_gemma.py
Differs  every random draw comes from torch; results that count come from demo.evaluate
"""

import numpy as np
import torch

from demo import model as M
from demo.pool import Example, collate
from demo.tasks import TASKS, check, held_out
from demo.tokenizer import PAD, build, render

STOPS = (1, 106, 50)


@torch.no_grad()
def generate(twin, weights, prefixes, max_blocks=3, n_steps=48):
    """Token lists in; answers (stop token dropped) and mean steps per block out."""
    device = weights[0][M.EMBED].device
    vocab, steps_used, blocks = M.CONFIG["vocab_size"], 0, 0
    answers = [[] for _ in prefixes]
    open_rows = list(range(len(prefixes)))
    prefixes = [list(prefix) for prefix in prefixes]
    for _ in range(max_blocks):
        tokens, valid, *_ = collate([Example(np.array(prefixes[row]), np.zeros(1)) for row in open_rows])
        encoder_masks, decoder_masks = twin.masks(valid.to(device))
        _, past = twin.encode(weights, tokens.to(device), encoder_masks)
        n = len(open_rows)
        canvas = torch.randint(vocab, (n, M.CANVAS), device=device)
        best, probabilities = canvas, None
        running = torch.ones(n, dtype=torch.bool, device=device)
        for step in range(n_steps, 0, -1):
            processed = twin.denoise(weights, canvas, past, decoder_masks, probabilities) / (0.4 + 0.4 * step / n_steps)
            probabilities = processed.softmax(-1)
            entropy = -(probabilities * probabilities.clamp_min(1e-30).log()).sum(-1)
            argmax = torch.where(running[:, None], processed.argmax(-1), best)
            steps_used += running.sum().item()
            drawn = torch.multinomial(probabilities.view(-1, vocab), 1).view(n, -1)
            cost, order = entropy.sort(-1)
            accepted = torch.zeros_like(entropy, dtype=torch.bool).scatter(-1, order, cost.cumsum(-1) - cost <= 0.1)
            canvas = torch.where(accepted, drawn, torch.randint(vocab, drawn.shape, device=device))
            running &= ~((argmax == best).all(-1) & (entropy.mean(-1) < 0.005))
            best = argmax
            if not running.any():
                break
        blocks += n
        still = []
        for row, new in zip(open_rows, best.tolist(), strict=True):
            stop = next((i for i, token in enumerate(new) if token in STOPS), None)
            answers[row] += new[:stop]
            prefixes[row] += new
            if stop is None:
                still.append(row)
        open_rows = still
        if not open_rows:
            break
    return answers, steps_used / blocks


def quick_rates(twin, params, n, seed=1):
    """{task: (share right, mean steps)} on n held-out instances each."""
    tokenizer, rates = build(), {}
    weights = twin.cast({name: p.detach() for name, p in params.items()})
    for task in TASKS:
        chosen = held_out(task, n, seed)
        answers, steps = generate(twin, weights, [tokenizer.encode(render(x.prompt)).ids for x in chosen])
        texts = [tokenizer.decode([token for token in answer if token != PAD]) for answer in answers]
        rates[task] = sum(map(check, chosen, texts)) / n, steps
    return rates
