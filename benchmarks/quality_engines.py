"""Models on three engines behind one face: prefixes, canvases to logits and experts, next tokens, answers.

Shapes   B rows, C canvas slots, V vocabulary, L layers, K experts per token; what goes in and out is numpy
Source   transformers 5.23.0 (float32 or bfloat16), mlx_dgemma, gguf_export.Runner
Differs  on a CPU, MLX computes dequantized weights in float32 where they fit: the values are those of the packed ones,
         and the products faster. ggml computes as it does in use, so its CPU rounds activations to 8 bits
"""

import contextlib
import gc
from typing import Protocol

import numpy as np

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.session import left_padded

from .quality_models import About, arithmetic
from .quality_scores import CHUNK, losses


class Model(Protocol):
    """A loaded model. `close` gives its memory back."""

    def prefix(self, prompts: list[list[int]]) -> object:
        """Prompts encoded, a row each."""

    def denoise(self, canvas: np.ndarray, prefix, processed: np.ndarray | None = None):
        """(B, C) → logits (B, C, V) float32, and experts (B, C, L, K), or None where the engine does not tell.

        processed (B, C, V): the pass before's logits over its temperature.
        """

    def next_token_losses(self, tokens: list[int], first: int) -> np.ndarray:
        """The encoder's: −log p of tokens[first:], each after what stands before it. (n,) nats"""

    def answers(self, **settings):
        """An engine as demo.evaluate has them: (prompts, rows, seed) → answers."""

    def session(self):
        """(Session, settings) for tasks with known parts; None where the engine has none."""

    def close(self) -> None: ...


def load(model: About, device: str = "auto", threads: int | None = None, dtype: str | None = None) -> Model:
    """device, threads: ggml's. dtype: of activations, for MLX and transformers. Raises DgemmaError."""
    match model.engine:
        case "mlx":
            return MlxModel(model, dtype)
        case "ggml":
            return GgmlModel(model, device, threads)
        case _:
            return TransformersModel(model, dtype)


class MlxModel:
    def __init__(self, about: About, dtype: str | None = None):
        import mlx.core as mx

        import mlx_dgemma

        dtype, _, dequantized = arithmetic(about, dtype).partition(", ")
        self.model, self.tokenizer = mlx_dgemma.load(about.path, getattr(mx, dtype), bool(dequantized))

    def prefix(self, prompts):
        from mlx_dgemma.engine import MlxEngine

        engine = MlxEngine(self.model)
        engine.prefill(*left_padded(prompts, self.model.generation_config.pad_token_id))
        return engine.cache

    def denoise(self, canvas, prefix, processed=None):
        import mlx.core as mx

        B, C = canvas.shape
        with routers_tapped(self.model) as chosen:
            before = None if processed is None else mx.array(processed)
            logits = self.model.denoise(mx.array(canvas), prefix, before)
            mx.eval(logits, chosen)
        experts = np.stack([np.array(layer) for layer in chosen], axis=1)  # (B·C, L, K)
        return np.array(logits), experts.reshape(B, C, *experts.shape[1:])

    def next_token_losses(self, tokens, first):
        import mlx.core as mx

        from mlx_dgemma.engine import PREFILL_CHUNK

        cache, parts = self.model.make_cache(), []
        for start in range(0, len(tokens) - 1, PREFILL_CHUNK):
            some = tokens[:-1][start : start + PREFILL_CHUNK]
            parts.append(self.model.encode(mx.array([some], mx.int32), cache))
            mx.eval(parts[-1], cache.arrays)
        hidden = mx.concatenate(parts, axis=1)[0, first - 1 :]
        return _in_chunks(hidden, tokens[first:], lambda h: np.array(self.model.logits(h)), self.model.config)

    def answers(self, **settings):
        from demo.evaluate import session_engine

        session, config = self.session()
        return session_engine(session, config.replace(**settings))

    def session(self):
        import mlx_dgemma

        return mlx_dgemma.make_session(self.model, self.tokenizer), self.model.generation_config

    def close(self):
        import mlx.core as mx

        self.model = None
        gc.collect()
        mx.clear_cache()


def _in_chunks(hidden, targets, logits, config):
    """Losses of next tokens, a few rows of the vocabulary at a time."""
    targets, step = np.array(targets), max(1, 8 * CHUNK // config.vocab_size)
    starts = range(0, len(targets), step)
    return np.concatenate([losses(logits(hidden[i : i + step]), targets[i : i + step]) for i in starts])


class _RouterTap:
    """Stands where a router stood: chooses the same, and keeps what it chose."""

    def __init__(self, router, kept):
        self.router, self.kept = router, kept

    def __call__(self, x):
        experts, weights = self.router(x)
        self.kept.append(experts)
        return experts, weights


@contextlib.contextmanager
def routers_tapped(model):
    """A list that gets every layer's experts (T, K), in order of the layers, until the block ends."""
    kept, layers = [], model.model.decoder.layers
    routers = [layer.router for layer in layers]
    try:
        for layer, router in zip(layers, routers, strict=True):
            layer["router"] = _RouterTap(router, kept)
        yield kept
    finally:
        for layer, router in zip(layers, routers, strict=True):
            layer["router"] = router


class GgmlModel:
    def __init__(self, about: About, device: str = "auto", threads: int | None = None):
        from gguf_export import Runner

        self.runner, self.tokenizer = Runner(about.path, device, threads=threads), about.tokenizer
        config = self.runner.config
        self.experts = [f"blk.{i}.router_shares" for i in range(config.num_hidden_layers)]

    def prefix(self, prompts):
        tokens, padding = left_padded(prompts, self.runner.generation_config.pad_token_id)
        cache = self.runner.make_cache(len(prompts), tokens.shape[1] + self.runner.config.canvas_length)
        self.runner.prefill(tokens, cache, padding)
        return cache

    def denoise(self, canvas, prefix, processed=None):
        from gguf_export.host_inputs import layer_inputs

        runner, (B, C) = self.runner, canvas.shape
        runner.start(canvas, prefix)
        if processed is not None:
            shares = processed - processed.max(axis=-1, keepdims=True)
            np.exp(shares, out=shares)  # in place: these arrays are the largest there are
            shares /= shares.sum(axis=-1, keepdims=True)
            runner.put(prefix, canvas, shares)
        graph = runner.graph("denoise", prefix.shape(C))
        # The router's choice is a view, which nobody returns; the shares it was made from are not.
        told = [name for name in self.experts if name in graph.specs]
        graph = graph._replace(outputs=(*graph.outputs, *told))
        out = runner.executor.compute(prefix.state, graph, layer_inputs(graph, prefix.padding), graph.outputs)
        experts = None
        if len(told) == len(self.experts):
            K = runner.config.top_k_experts
            shares = np.stack([out[name].reshape(B, C, -1) for name in told], axis=2)  # (B, C, L, E)
            experts = np.argpartition(-shares, K - 1, axis=-1)[..., :K]
        return out["logits"].reshape(B, C, -1), experts

    def next_token_losses(self, tokens, first):
        """By blocks of the vocabulary, whose rows are dequantized as they are needed."""
        from mlx_dgemma.gguf.values import to_float32

        runner = self.runner
        cache = runner.make_cache(1, len(tokens))
        hidden = runner.encode(np.array([tokens[:-1]]), cache)[0, first - 1 :].astype(np.float32)
        runner.give_back(cache)
        file, cap = runner.model.file, runner.config.final_logit_softcapping
        rows, type = file.rows("token_embd.weight"), file.tensors["token_embd.weight"].type
        targets, step = np.array(tokens[first:]), max(1, CHUNK // len(hidden))
        top, total, right = np.full(len(hidden), -np.inf), np.zeros(len(hidden)), np.zeros(len(hidden))
        for start in range(0, len(rows), step):
            logits = cap * np.tanh(hidden @ to_float32(rows[start : start + step], type).T / cap)
            here = (start <= targets) & (targets < start + step)
            right[here] = logits[here, targets[here] - start]
            higher = np.maximum(top, logits.max(axis=-1))
            total = total * np.exp(top - higher) + np.exp(logits - higher[:, None]).sum(axis=-1)
            top = higher
        return top + np.log(total) - right

    def answers(self, **settings):
        from demo.evaluate import session_engine

        session, config = self.session()
        return session_engine(session, config.replace(**settings))

    def session(self):
        from gguf_export.engine import make_session

        return make_session(self.runner, self.tokenizer), self.runner.generation_config

    def close(self):
        self.runner = None
        gc.collect()


class TransformersModel:
    def __init__(self, about: About, dtype: str | None = None):
        import torch

        from demo.reference import load_transformers

        self.path = about.path
        try:
            self.model = load_transformers(about.path, getattr(torch, dtype or "float32"))
        except (ValueError, OSError) as error:
            raise DgemmaError(f"{about.path}: transformers cannot load it ({error})") from None
        self.config = about.config
        self.pad = about.settings.pad_token_id

    def prefix(self, prompts):
        import torch

        tokens, padding = left_padded(prompts, self.pad)
        mask = torch.tensor(np.arange(tokens.shape[1])[None] >= padding[:, None])
        with torch.no_grad():
            out = self.model.model.encoder(input_ids=torch.tensor(tokens).long(), attention_mask=mask)
        return mask, out.past_key_values

    def denoise(self, canvas, prefix, processed=None):
        import torch

        (B, C), (mask, past), chosen = canvas.shape, prefix, []
        routers = [layer.router for layer in self.model.model.decoder.layers]
        hooks = [r.register_forward_hook(lambda _, __, out: chosen.append(out[2].numpy())) for r in routers]
        try:
            with torch.no_grad():
                out = self.model(
                    past_key_values=past,
                    decoder_input_ids=torch.tensor(canvas).long(),
                    decoder_attention_mask=torch.nn.functional.pad(mask, (0, C), value=True),
                    self_conditioning_logits=None if processed is None else torch.tensor(processed),
                )
        finally:
            for hook in hooks:
                hook.remove()
        experts = np.stack([layer.reshape(B, C, -1) for layer in chosen], axis=2)
        return out.logits.float().numpy(), experts

    def next_token_losses(self, tokens, first):
        import torch

        cap = self.config.final_logit_softcapping
        with torch.no_grad():
            out = self.model.model.encoder(input_ids=torch.tensor([tokens[:-1]]))
            hidden = out.last_hidden_state[0, first - 1 :]

            def logits(some):
                return (cap * torch.tanh(self.model.lm_head(some).float() / cap)).numpy()

            return _in_chunks(hidden, tokens[first:], logits, self.config)

    def answers(self, **settings):
        from transformers import AutoTokenizer

        from demo.evaluate import transformers_answers

        return transformers_answers(self.model, AutoTokenizer.from_pretrained(self.path), **settings)

    def session(self):
        return None

    def close(self):
        self.model = None
        gc.collect()
