"""DiffusionGemma in MLX: one weight set, run as a causal encoder and as a bidirectional canvas decoder.

Shapes   B rows, T tokens, C canvas slots, H hidden, V vocabulary
Source   transformers 5.23.0, modeling_diffusion_gemma.py; parameter names are those of the checkpoint
Differs  text only. Encoder and decoder are one stack of layers; only `layer_scalar` differs between the passes.

Use `mlx_dgemma.load`; then `encode` the prompt into a cache and `denoise` canvases against it.
"""

import mlx.core as mx
import mlx.nn as nn

from .attention import Attention
from .cache import PrefixCache
from .config import GenerationConfig, LayerConfig, ModelConfig
from .elementary import softcap
from .layers import MLP, RMSNorm, unit_rms
from .masks import canvas_mask, encoder_mask
from .moe import Experts, Router
from .vocabulary import Table


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: LayerConfig):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = RMSNorm(hidden, eps)
        self.mlp = MLP(hidden, config.intermediate_size)
        self.post_feedforward_layernorm_1 = RMSNorm(hidden, eps)
        self.router = Router(config)
        self.pre_feedforward_layernorm_2 = RMSNorm(hidden, eps)
        self.experts = Experts(config)
        self.post_feedforward_layernorm_2 = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = RMSNorm(hidden, eps)
        self.layer_scalar = mx.ones((1,))  # the decoder's; the encoder keeps its own

    def __call__(self, x, scalar, cache, first, mask, append):
        """x (B, T, H) → (B, T, H)"""
        attended = self.self_attn(self.input_layernorm(x), cache, first, mask, append)
        x = x + self.post_attention_layernorm(attended)
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(x)))
        flat = x.reshape(-1, x.shape[-1])  # (B·T, H)
        chosen = self.experts(self.pre_feedforward_layernorm_2(flat), *self.router(flat))
        mixed = self.post_feedforward_layernorm_2(chosen).reshape(x.shape)
        return (x + self.post_feedforward_layernorm(dense + mixed)) * scalar

    def store(self, x, cache, first):
        """Only what the cache keeps of x: in a prefill nobody reads what the last layer makes."""
        cache.append(*self.self_attn.keys_and_values(self.input_layernorm(x), first))


class SelfConditioning(MLP):
    """Adds what the previous step believed, as a soft embedding, to the canvas embedding."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, config.intermediate_size)
        self.pre_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._eps = config.rms_norm_eps

    def __call__(self, x, soft):
        """x and soft (B, C, H) → (B, C, H)"""
        return unit_rms(x + super().__call__(self.pre_norm(soft)), self._eps)


class Decoder(nn.Module):
    """Everything stored under model.decoder: the weights of both passes."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.self_conditioning = SelfConditioning(config)
        self.layers = [Layer(config, layer) for layer in config.layers]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class EncoderScalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer_scalar = mx.ones((1,))


class Encoder(nn.Module):
    """What the checkpoint stores for the encoder alone: one scalar per layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.language_model = nn.Module()
        self.language_model.layers = [EncoderScalar() for _ in config.layers]


class DiffusionGemma(nn.Module):
    """The text model. `dtype` is the type activations have; logits are float32 always.

    `generation_config` holds the checkpoint's sampler defaults.
    """

    def __init__(self, config: ModelConfig, dtype=mx.float32, generation_config: GenerationConfig | None = None):
        super().__init__()
        self.model = nn.Module()
        self.model.decoder = Decoder(config)
        self.model.encoder = Encoder(config)
        self._config, self._dtype = config, dtype
        self._generation_config = generation_config or GenerationConfig()
        self.allow_overcommit = False  # go on where a prefix or a step does not fit the device's memory

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def generation_config(self) -> GenerationConfig:
        return self._generation_config

    @property
    def dtype(self):
        return self._dtype

    @property
    def packed(self) -> bool:
        """Whether matrices are quantized."""
        layer = self.model.decoder.layers[0]
        return any("scales" in matrix for matrix in (layer.self_attn.q_proj, layer.experts.gate_up_proj))

    @property
    def table(self) -> Table:
        """The tied embedding, as lm_head and self-conditioning read it."""
        return Table(self.model.decoder.embed_tokens)

    def make_cache(self) -> PrefixCache:
        """An empty prefix."""
        return PrefixCache(self._config)

    def encode(self, tokens, cache: PrefixCache, padding=None):
        """Append tokens to the prefix: causal, sliding layers within their window.

        tokens (B, T) int32. padding (B,) int32 counts the pad tokens at the left of each row; give it with the first
        tokens of a batch only. Returns the final hidden states (B, T, H). Long prompts may come in several calls.
        """
        return self._encode(tokens, cache, padding, self._run)

    def prefill(self, tokens, cache: PrefixCache, padding=None) -> None:
        """`encode` without its result: the last layer stops at its keys and values."""
        self._encode(tokens, cache, padding, self._store)

    def _encode(self, tokens, cache, padding, run):
        T = tokens.shape[1]
        if padding is not None:
            if cache.length:
                raise ValueError(f"padding comes with the first tokens, but {cache.length} are encoded already")
            cache.padding = padding
        scalars = [layer.layer_scalar for layer in self.model.encoder.language_model.layers]
        queries = mx.arange(cache.length, cache.length + T)

        def mask(stored, window):
            keys = mx.arange(cache.length - stored, cache.length + T)
            return encoder_mask(queries, keys, window, cache.padding)

        hidden = run(self._embed(tokens), cache, scalars, mask, append=True)
        cache.length += T
        return hidden

    def denoise(self, canvas, cache: PrefixCache, self_conditioning_logits=None):
        """One step: every canvas slot sees the prefix and the whole canvas. The cache is left as it is.

        canvas (B, C) int32. self_conditioning_logits (B, C, V): the previous step's *processed* logits (softcapped
        and divided by its temperature); None at a block's first step. Returns softcapped logits (B, C, V) float32.
        """
        soft = None if self_conditioning_logits is None else self.soft_embedding(self_conditioning_logits)
        return self.logits(self.denoise_hidden(canvas, cache, soft))

    def denoise_hidden(self, canvas, cache: PrefixCache, soft=None):
        """`denoise` without its work on the vocabulary: soft embedding (B, C, H) → final hidden states (B, C, H)."""
        x = self._embed(canvas)
        # Without a previous step the soft embedding is zero; the MLP and the norm behind it still run.
        x = self.model.decoder.self_conditioning(x, mx.zeros_like(x) if soft is None else soft)
        scalars = [layer.layer_scalar for layer in self.model.decoder.layers]
        C = canvas.shape[1]

        def mask(stored, window):
            return canvas_mask(mx.arange(cache.length - stored, cache.length + C), cache.padding)

        return self._run(x, cache, scalars, mask, append=False)

    def logits(self, hidden):
        """hidden (B, C, H) → softcapped logits (B, C, V), float32"""
        return softcap(self.table.logits(hidden), self._config.final_logit_softcapping)

    def soft_embedding(self, logits):
        """softmax(logits) @ E × √H: (B, C, V) → (B, C, H)"""
        p = mx.softmax(logits.astype(mx.float32), axis=-1).astype(self._dtype)
        return self.scaled(self.table.mix(p))

    def scaled(self, embedding):
        """An embedding as the layers read it."""
        return embedding * self._embedding_scale

    @property
    def _embedding_scale(self):
        # Rounded to the activations' type, as transformers rounds it to the weights'.
        return mx.array(self._config.hidden_size**0.5, self._dtype)

    def _embed(self, tokens):
        return self.model.decoder.embed_tokens(tokens).astype(self._dtype) * self._embedding_scale

    def _run(self, x, cache, scalars, mask, append):
        """The layer stack. `mask(stored keys, window)` makes a mask; layers of a kind share one."""
        return self.model.decoder.norm(self._layers(x, cache, scalars, mask, append, len(scalars)))

    def _store(self, x, cache, scalars, mask, append):
        x = self._layers(x, cache, scalars, mask, append, len(scalars) - 1)
        self.model.decoder.layers[-1].store(x, cache.layers[-1], self._first(cache))

    def _layers(self, x, cache, scalars, mask, append, n):
        masks = {}
        for layer, scalar, kept in zip(self.model.decoder.layers[:n], scalars[:n], cache.layers[:n], strict=True):
            if kept.window not in masks:
                masks[kept.window] = mask(len(kept), kept.window)
            x = layer(x, scalar, kept, self._first(cache), masks[kept.window], append)
        return x

    @staticmethod
    def _first(cache):
        """Position of the first token behind the prefix; one per row where rows are padded."""
        return cache.length if cache.padding is None else cache.length - cache.padding
