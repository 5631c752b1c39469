"""One engine in a process of its own, asked over pipes: python -m benchmarks.versus_worker dgemma|ggml|mlx-vlm PATH

Shapes   one row; C canvas slots, P prompt tokens
Source   mlx_dgemma; mlx-vlm 0.7.10, generate/diffusion.py: the body of its loop with the entropy-bound sampler
Differs  reads JSON objects from stdin, answers each with one on stdout. The mlx-vlm side imports nothing of ours, so it
         runs in an environment of its own

{"do": "load"} → memory; "part": a name of PARTS → milliseconds and peak memory; "agree" → draft and acceptance of two
steps; "answer": token ids of prompts, a preset, noise rows → tokens, steps, seconds. "load" brings sizes and settings.
"""

import json
import os
import sys
import time
from pathlib import Path

import mlx.core as mx

PARTS = ("model", "vocabulary", "step")


class Dgemma:
    def __init__(self, folder, about):
        import mlx_dgemma
        from mlx_dgemma.noise import NoiseStream

        self.model, self.tokenizer = mlx_dgemma.load(folder, mx.float32)
        self.stream, self.about = NoiseStream(0), about

    def begin(self, prompt, canvas, soft):
        from mlx_dgemma.engine import MlxEngine

        self.engine = MlxEngine(self.model)
        self.engine.prefill(prompt.astype("int32"))
        self.canvas, self.soft = canvas.astype("int32"), mx.array(soft)
        C, V = self.canvas.shape[1], self.model.config.vocab_size
        self.noise = self.stream.uniforms([0], 0, 0, C), self.stream.renoise([0], 0, 0, C, V)
        self.hidden = self.model.denoise_hidden(mx.array(self.canvas), self.engine.cache, self.soft)
        mx.eval(self.hidden)
        self.step()

    def model_part(self):
        mx.eval(self.model.denoise_hidden(mx.array(self.canvas), self.engine.cache, self.soft))

    def vocabulary(self):
        """All that a step does behind the last norm."""
        self.engine.read(self.hidden, self.about["temperature"], self.about["bound"], *self.noise)

    def step(self):
        self.engine.canvas, self.engine.soft = mx.array(self.canvas), self.soft
        return self.engine.step(self.about["temperature"], self.about["bound"], *self.noise)

    def agree(self):
        """Drafts and acceptance of a first step, and of one that reads its beliefs."""
        self.engine.start(self.canvas)
        steps = []
        for _ in range(2):
            steps.append(self.engine.step(self.about["temperature"], self.about["bound"], *self.noise))
            self.engine.canvas = mx.array(self.canvas)  # the same canvas again: the other side throws other dice
        return [[s.draft[0].tolist(), s.accepted[0].tolist()] for s in steps]

    def answer(self, prompts, preset, rows):
        return answer(self.model, self.tokenizer, prompts, preset, rows)


class Ggml:
    """The same through gguf_export; texts only."""

    def __init__(self, file, about):
        from gguf_export import Runner

        self.runner = Runner(file)
        self.tokenizer = self.runner.tokenizer()

    def answer(self, prompts, preset, rows):
        return answer(self.runner, self.tokenizer, prompts, preset, rows)


def answer(model, tokenizer, prompts, preset, rows):
    """Prompts as token ids, denoised as one batch."""
    from mlx_dgemma.api import make_session
    from mlx_dgemma.presets import with_preset

    settings, began = with_preset(model.generation_config, preset), time.perf_counter()
    *_, done = make_session(model, tokenizer).stream(prompts, settings, rows=rows)
    return {"tokens": done.tokens, "steps": done.stats.steps, "seconds": time.perf_counter() - began}


class MlxVlm:
    def __init__(self, folder, about):
        from mlx_vlm.generate import diffusion
        from mlx_vlm.utils import load_model

        self.model, self.d, self.about = load_model(Path(folder)), diffusion, about
        generation = json.loads((Path(folder) / "generation_config.json").read_text())
        self.model.config.generation_config = generation
        self.stops = set(generation["eos_token_id"])

    def begin(self, prompt, canvas, soft):
        self.cache = self.model.diffusion_prefill_cache(mx.array(prompt), cache=self.model.make_cache())
        mx.eval([c.state for c in self.cache])
        self.canvas, self.soft = mx.array(canvas), mx.array(soft)
        self.masks = self.model.diffusion_decoder_masks(self.canvas, self.cache)
        self.context = self.model.diffusion_prepare_self_conditioning()
        self.logits = self._softcap(self._hidden(None))
        mx.eval(self.logits)
        self.believed = self.model.diffusion_self_conditioning(self.logits / self.about["temperature"], self.context)
        self.hidden = self._hidden(self.believed)
        mx.eval(self.believed, self.hidden)
        self.step()

    def _hidden(self, believed):
        decoder = self.model.model.decoder
        name = "logits" if self.model.prefers_logits_self_conditioning else "embeddings"
        return decoder(self.canvas, cache=self.cache, decoder_attention_mask=self.masks,
                       **{f"self_conditioning_{name}": believed})  # fmt: skip

    def _softcap(self, hidden):
        return self.model._softcap(self.model.model.decoder.embed_tokens.as_linear(hidden))

    def model_part(self):
        decoder = self.model.model.decoder
        ready = mx.zeros((1, self.canvas.shape[1], decoder.config.hidden_size)) + self.soft
        mx.eval(decoder(self.canvas, cache=self.cache, decoder_attention_mask=self.masks,
                        self_conditioning_embeddings=ready))  # fmt: skip

    def vocabulary(self):
        # A packed table turns beliefs into an embedding at the start of the next step: its part is counted here.
        out = self._sample(self._softcap(self.hidden))
        if self.model.prefers_logits_self_conditioning:
            table = self.model.model.decoder.embed_tokens
            shares = mx.softmax(out[-1], axis=-1, precise=True)
            out = (*out, mx.quantized_matmul(
                shares, table.weight, table.scales, table.biases, transpose=False, group_size=table.group_size,
                bits=table.bits, mode=getattr(table, "mode", "affine")))  # fmt: skip
        mx.eval(out)

    def _sample(self, logits):
        """The loop's body from logits on, temperature 1 beside the schedule's, as its entropy-bound sampler has it."""
        d, about = self.d, self.about
        processed = logits / about["temperature"]
        draft = mx.argmax(processed, axis=-1).astype(self.canvas.dtype)
        sampled = d._diffusion_sample_canvas(processed, self.canvas.dtype, 1.0)
        entropy = d._diffusion_token_entropy(processed)
        believed = self.model.diffusion_self_conditioning(processed, self.context)
        accepted = d._diffusion_entropy_transfer_mask(entropy, about["bound"])
        fresh = d._diffusion_initialize_canvas(*self.canvas.shape, logits.shape[-1], self.canvas.dtype)
        return draft, accepted, entropy.mean(), mx.where(accepted, sampled, fresh), believed

    def step(self):
        hidden = self._hidden(self.believed)
        out = self._sample(self._softcap(hidden))
        mx.eval(out)
        return out

    def agree(self):
        steps, believed = [], None
        for _ in range(2):
            draft, accepted, _, _, believed = self._sample(self._softcap(self._hidden(believed)))
            steps.append([draft[0].tolist(), accepted[0].tolist()])
        return steps

    def answer(self, prompts, preset, rows):
        """One prompt at a time, which is all it takes. preset: "default", as its command line; or "entropy-bound"."""
        sampler = {}
        if preset == "entropy-bound":
            sampler = {"diffusion_sampler": "entropy-bound", "temperature": 1.0, "diffusion_full_canvas": True}
        mx.random.seed(rows[0])
        (tokens,), words, steps, began = prompts, _Words(self.stops), 0, time.perf_counter()
        limit, out = self.model.config.generation_config["max_new_tokens"], []
        for result in self.d.stream_diffusion_generate(
            self.model, words, words, mx.array([tokens]), None, None, max_tokens=limit, skip_special_token_ids=[],
            **sampler,
        ):  # fmt: skip
            if result.token is not None and not result.diffusion_block_complete and result.finish_reason is None:
                out.append(int(result.token))
            steps = result.diffusion_denoising_steps
        return {"tokens": [out], "steps": steps, "seconds": time.perf_counter() - began}


class _Words:
    """What mlx-vlm asks of a tokenizer; texts are decoded on the other side of the pipe."""

    last_segment = ""

    def __init__(self, stops):
        self.stops = set(stops)
        self.detokenizer = self.stopping_criteria = self

    def __call__(self, token):
        return token in self.stops

    def add_eos_token_ids(self, tokens):
        self.stops |= {*tokens}

    def reset(self):
        pass

    def add_token(self, token, skip_special_token_ids=()):
        pass

    def finalize(self):
        pass


def main(engine, folder):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    side = None
    for line in sys.stdin:
        request = json.loads(line)
        match request.pop("do"):
            case "load":
                side = {"dgemma": Dgemma, "ggml": Ggml, "mlx-vlm": MlxVlm}[engine](folder, request)
                answer = {"mlx": mx.__version__, "memory": mx.get_active_memory()}
            case "begin":
                import numpy as np

                rng, sizes = np.random.default_rng(0), side.about
                prompt = rng.integers(110, sizes["V"], (1, sizes["P"])).astype(np.int32)
                canvas = rng.integers(110, sizes["V"], (1, sizes["C"])).astype(np.int32)
                side.begin(prompt, canvas, rng.standard_normal((1, sizes["C"], sizes["H"])).astype(np.float32))
                answer = {"memory": mx.get_active_memory()}
            case "part":
                mx.clear_cache()
                before = mx.get_active_memory()
                mx.reset_peak_memory()
                began = time.perf_counter()
                {"model": side.model_part, "vocabulary": side.vocabulary, "step": side.step}[request["part"]]()
                ms = (time.perf_counter() - began) * 1e3
                answer = {"ms": ms, "peak": mx.get_peak_memory() - before}
            case "agree":
                answer = {"steps": side.agree()}
            case "answer":
                answer = side.answer(**request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
