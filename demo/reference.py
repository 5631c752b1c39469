"""transformers as the reference: load a text-only checkpoint, generate from the project's noise stream.

Shapes   B rows, C canvas slots, V vocabulary
Source   transformers 5.23.0, generation_diffusion_gemma.py; `torch.randint` and `torch.multinomial` are its only dice
Differs  a draw is the number of vocabulary entries whose float32 CDF lies below u x total
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DynamicCache, Gemma4VisionConfig
from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation
from transformers.utils import logging

from demo import model as twin_model
from mlx_dgemma.noise import NoiseStream


def load_transformers(path, dtype=torch.float32):
    """The reference model. transformers always builds a vision tower; a text-only checkpoint gets a tiny one."""
    config = DiffusionGemmaConfig.from_pretrained(path)
    if json.loads((Path(path) / "config.json").read_text()).get("vision_config") is None:
        config.vision_config = Gemma4VisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
            head_dim=16, global_head_dim=16, position_embedding_size=16,
        )  # fmt: skip
    logging.set_verbosity_error()  # its report of the vision tower's fresh weights
    model, info = DiffusionGemmaForBlockDiffusion.from_pretrained(
        path, config=config, dtype=dtype, output_loading_info=True
    )
    missing = [key for key in info["missing_keys"] if "vision" not in key]
    if missing or info["unexpected_keys"]:
        raise ValueError(f"{path}: missing {missing[:3]}, unexpected {sorted(info['unexpected_keys'])[:3]}")
    return model.eval()


class _StreamedTorch:
    """Stands in for the name `torch` in transformers' generation module; only its dice differ."""

    def __init__(self, stream, rows):
        self._stream, self._rows = stream, list(rows)
        self._block, self._step, self._sampled = -1, 0, False

    def __getattr__(self, name):
        return getattr(torch, name)

    def randint(self, low, high, size, device=None):
        """The canvas a block starts from, or, after a draw, the renoise tokens of that step."""
        if self._sampled:
            tokens = self._stream.renoise(self._rows, self._block, self._step, size[1], high)
            self._step, self._sampled = self._step + 1, False
        else:
            self._block, self._step = self._block + 1, 0
            tokens = self._stream.canvas(self._rows, self._block, size[1], high)
        return torch.from_numpy(tokens).to(device, torch.long)

    def multinomial(self, probabilities, num_samples):
        """(B*C, V) -> (B*C, 1) by inverse CDF."""
        canvas_len = len(probabilities) // len(self._rows)
        u = self._stream.uniforms(self._rows, self._block, self._step, canvas_len)
        cdf = probabilities.float().cumsum(-1)
        bound = torch.from_numpy(u).to(cdf.device).view(-1, 1) * cdf[:, -1:]
        self._sampled = True
        # A bound that rounds up to the total would count every entry.
        return (cdf < bound).sum(-1, keepdim=True).clamp_max(cdf.shape[-1] - 1)


@contextlib.contextmanager
def transformers_with_stream(seed, rows):
    """Inside, transformers' own `generate` takes its random numbers from NoiseStream(seed) for these row ids.

    One `generate` call per use: blocks and steps are counted from where the context began.
    """
    original = generation.torch
    generation.torch = _StreamedTorch(NoiseStream(seed), rows)
    try:
        yield
    finally:
        generation.torch = original


@torch.no_grad()
def twin_difference(path, prefix_len=150, padding=20, seed=0):
    """Largest logit difference between demo.model's twin and transformers, both float32, for both passes.

    The prefix is longer than the window, and one row of it is left-padded.
    """
    generator = torch.Generator().manual_seed(seed)
    reference, twin = load_transformers(path), twin_model.Twin()
    vocab, canvas_len = twin_model.CONFIG["vocab_size"], twin_model.CANVAS
    tokens = torch.randint(5, vocab, (2, prefix_len), generator=generator)
    canvas = torch.randint(vocab, (2, canvas_len), generator=generator)
    valid = torch.ones(2, prefix_len, dtype=torch.bool)
    valid[0, :padding] = False

    weights = twin.cast(twin_model.load(path))
    encoder_masks, decoder_masks = twin.masks(valid)
    hidden, past = twin.encode(weights, tokens, encoder_masks)
    first = twin.denoise(weights, canvas, past, decoder_masks)
    second = twin.denoise(weights, canvas, past, decoder_masks, (first / 0.6).softmax(-1))

    cache = DynamicCache(config=reference.config.get_text_config(decoder=True))
    causal = reference.model.encoder.create_masks_for_generate(
        config=reference.config,
        inputs_embeds=torch.empty(2, prefix_len, 0),
        attention_mask=valid,
        past_key_values=cache,
        position_ids=torch.arange(prefix_len)[None],
    )
    seen = torch.nn.functional.pad(valid, (0, canvas_len), value=True)
    shared = {"decoder_input_ids": canvas, "decoder_attention_mask": seen}
    want = reference(input_ids=tokens, attention_mask=causal, past_key_values=cache, **shared)
    again = reference(past_key_values=want.past_key_values, self_conditioning_logits=first / 0.6, **shared)
    encoded = (twin.logits(weights, hidden) - twin_model.softcap(reference.lm_head(want.encoder_last_hidden_state)))[
        valid
    ]
    return {
        "encoder": encoded.abs().max().item(),
        "first step": (first - want.logits).abs().max().item(),
        "self-conditioned step": (second - again.logits).abs().max().item(),
    }


if __name__ == "__main__":
    print(json.dumps(twin_difference(sys.argv[1])))
