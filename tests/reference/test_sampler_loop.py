"""transformers' own loop and ours, fed the same numbers: the same canvas at every step, to the last block.

transformers' `generate` runs unchanged but for its dice (demo/reference.py). What its decoder reads and what it drafts
is recorded step by step and compared with our events.
"""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

import mlx_dgemma
from demo.reference import load_transformers, transformers_with_stream
from demo.tasks import TASKS, held_out
from mlx_dgemma.session import left_padded

CHECKPOINT = Path(__file__).parent.parent.parent / "demo/checkpoint"
SEEDS = range(24)


@pytest.fixture(scope="module")
def models():
    return load_transformers(CHECKPOINT), *mlx_dgemma.load(CHECKPOINT, mx.float32)


class Drafts:
    """A transformers streamer that keeps every draft."""

    def __init__(self):
        self.drafts = []

    def put(self, value):
        pass

    def put_draft(self, value):
        self.drafts.append(value.numpy())

    def end(self):
        pass


def their_run(model, tokens, padding, seed, rows, **settings):
    """Canvases the decoder read, drafts it gave, and the finished sequences behind the prompt."""
    canvases, drafts = [], Drafts()
    hook = model.model.decoder.register_forward_pre_hook(
        lambda _, __, kwargs: canvases.append(kwargs["decoder_input_ids"].numpy().copy()), with_kwargs=True
    )
    mask = torch.tensor(np.arange(tokens.shape[1])[None] >= padding[:, None])
    try:
        with transformers_with_stream(seed, rows):
            out = model.generate(torch.tensor(tokens).long(), attention_mask=mask, streamer=drafts, **settings)
    finally:
        hook.remove()
    return canvases, drafts.drafts, out.sequences[:, tokens.shape[1] :].numpy(), out.tokens_per_forward.numpy()


def our_run(model, tokenizer, prompts, seed, rows, **settings):
    config = model.generation_config.replace(**settings)
    events = list(mlx_dgemma.stream(model, tokenizer, prompts, config, seed=seed, rows=rows))
    steps = [e for e in events if isinstance(e, mlx_dgemma.StepDone)]
    blocks = [e for e in events if isinstance(e, mlx_dgemma.BlockDone)]
    return steps, np.concatenate([b.tokens for b in blocks], axis=1), events[-1]


def encoded(tokenizer, prompts):
    return left_padded([tokenizer.chat([{"role": "user", "content": p}]) for p in prompts], 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_canvas_of_a_seed_is_the_references(models, seed):
    theirs, ours, tokenizer = models
    task = TASKS[seed % len(TASKS)]
    prompt = held_out(task, 24)[seed].prompt
    canvases, drafts, sequence, tpf = their_run(theirs, *encoded(tokenizer, [prompt]), seed, [seed])
    steps, tokens, done = our_run(ours, tokenizer, [prompt], seed, [seed])
    assert len(steps) == len(drafts)
    for i, step in enumerate(steps):
        assert (step.draft == drafts[i]).all(), f"draft of block {step.block}, step {step.step}"
        if i + 1 < len(steps) and steps[i + 1].block == step.block:
            assert (step.canvas == canvases[i + 1]).all(), f"canvas after block {step.block}, step {step.step}"
    assert (tokens == sequence).all()
    assert done.stats.tokens_per_forward == pytest.approx(tpf[0])


def test_a_batch_of_unequal_prompts_ends_alike(models):
    """Rows stop in different blocks; every row's text, padding included, is the reference's."""
    theirs, ours, tokenizer = models
    # Answers of one and of two blocks.
    instances = [i for task in TASKS for i in held_out(task, 40)]
    longest = sorted(instances, key=lambda i: len(i.answer))
    prompts = [i.prompt for i in (longest[0], longest[-1], longest[len(longest) // 2], longest[-2])]
    rows = [11, 7, 3, 5]
    _, _, sequences, tpf = their_run(theirs, *encoded(tokenizer, prompts), 1, rows)
    _, tokens, done = our_run(ours, tokenizer, prompts, 1, rows)
    assert (tokens == sequences).all()
    assert sequences.shape[1] > ours.config.canvas_length  # some row needed a second block
    assert len({len(row) for row in done.tokens}) > 1
    passes = [(len(row) + stop) / n for row, stop, n in zip(done.tokens, done.stopped, tpf, strict=True)]
    assert done.stats.steps == pytest.approx(sum(passes))


def test_settings_reach_both_loops_alike(models):
    theirs, ours, tokenizer = models
    prompt = held_out("json", 1)[0].prompt
    settings = {"max_denoising_steps": 7, "t_min": 0.2, "t_max": 1.2, "stability_threshold": 2, "max_new_tokens": 128}
    _, drafts, sequence, _ = their_run(theirs, *encoded(tokenizer, [prompt]), 5, [0], **settings)
    steps, tokens, _ = our_run(ours, tokenizer, [prompt], 5, [0], **settings)
    assert [s.draft.tolist() for s in steps] == [d.tolist() for d in drafts]
    assert (tokens == sequence).all()
