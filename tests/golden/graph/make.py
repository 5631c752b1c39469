"""Makes the golden vectors of the graph description: a tiny model, what goes into each phase, and what comes out.

    python -m tests.golden.graph.make

Written beside this file: tiny.gguf (gguf-py's writer), tiny.dgraph.json (the description), vectors.safetensors (every
array, named <case>.<phase>.<in|out>.<name>) and recipe.json (the order of the phases, sizes, tolerances). Any
implementation of the format can run the phases in that order and compare; safetensors is a JSON header and raw
little-endian arrays. The outputs are the numpy oracle's, in float32; tests/test_graph_golden.py holds ggml to them, and
tests/test_graph_runner.py the oracle to transformers.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from gguf_export import Runner, describe
from gguf_export.description import write_description
from gguf_export.host_inputs import layer_inputs
from gguf_export.numpy_executor import NumpyExecutor
from mlx_dgemma.gguf.model import open_gguf
from mlx_dgemma.noise import NoiseStream
from tests.tiny_gguf import make_tiny_gguf

HERE = Path(__file__).parent
MODEL = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "num_experts": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "sliding_window": 8,
    "canvas_length": 16,
}
TOP_K = 32
ROWS, PROMPT, PADDING = 2, 20, [0, 3]
CASES = {
    "top-k": {"attention": "flash", "self_conditioning": "top-k", "form": "cpu", "cache_type": "f32"},
    "exact": {"attention": "exact", "self_conditioning": "exact", "form": "cpu", "cache_type": "f32"},
}
STEPS = [(0.8, 2.0), (0.6, 2.0)]  # temperature, which the second row has halved; entropy bound
KNOWN = [[], [0, 3]]  # slots that are not free, in every row
RECIPE = {
    "made_by": "python -m tests.golden.graph.make",
    "model": "tests/tiny_gguf.py, make_tiny_gguf",
    "order": "prefill, then for each step denoise and sample, commit of the last draft, denoise of the next canvas",
    "shapes": "slowest axis first; row after row of the batch. in.canvas is written before denoise.0 and denoise.next",
    "beliefs": "zero before denoise.0 and denoise.next; what sample wrote before denoise.1",
    "temperature": "of the first row; half as much in the second",
    "atol": {"hidden, logits": 1e-3, "entropy": 1e-4, "draft, accepted, next_canvas": 0},
    "atol_why": 'ggml\'s CPU stays within 1e-5 of these; with form "gpu" its float16 table costs about 2e-3',
    "cases": CASES,
    "padding": PADDING,
    "steps": STEPS,
    "known": KNOWN,
}


def inputs(vocabulary: int, canvas_length: int) -> dict[str, np.ndarray]:
    """Prompt and canvases, from numpy's frozen generator."""
    rng = np.random.RandomState(0)
    return {
        name: rng.randint(0, vocabulary, (ROWS, n)).astype(np.int32)
        for name, n in (("prompt", PROMPT), ("canvas", canvas_length), ("next", canvas_length))
    }


def run(runner: Runner) -> dict[str, np.ndarray]:
    """Every phase in the recipe's order: what went in and what came out, by name."""
    config, stream, rows = runner.config, NoiseStream(0), list(range(ROWS))
    given, padding = inputs(config.vocab_size, config.canvas_length), np.array(PADDING, np.int32)
    cache, found = runner.make_cache(ROWS, room=PROMPT + 2 * config.canvas_length), {}

    def keep(phase, side, arrays):
        found.update({f"{phase}.{side}.{name}": np.asarray(array) for name, array in arrays.items()})

    def encode(phase, tokens, padding):
        before = cache.shape(tokens.shape[1])
        hidden = runner.encode(tokens, cache, padding)
        keep(phase, "in", {"tokens": tokens, **layer_inputs(runner.graph("prefill", before), cache.padding)})
        keep(phase, "out", {"hidden": hidden})

    encode("prefill", given["prompt"], padding)
    runner.start(given["canvas"], cache)
    graph = runner.graph("denoise", cache.shape(config.canvas_length))
    host = layer_inputs(graph, cache.padding)
    for step, (temperature, bound) in enumerate(STEPS):
        canvas = cache.state.read("canvas").reshape(ROWS, -1)
        logits = runner.executor.compute(cache.state, graph, host, graph.outputs)["logits"]
        keep(f"denoise.{step}", "in", {"canvas": canvas, **host})
        keep(f"denoise.{step}", "out", {"logits": logits.reshape(ROWS, config.canvas_length, -1)})
        noise = {
            "uniforms": stream.uniforms(rows, 0, step, config.canvas_length),
            "renoise": stream.renoise(rows, 0, step, config.canvas_length, config.vocab_size),
        }
        free = np.ones((ROWS, config.canvas_length), bool)
        free[:, KNOWN[step]] = False
        temperatures = np.float32([temperature, temperature / 2])
        out = runner.step(cache, temperatures, bound, **noise, free=free)
        told = {"temperature": temperatures, "entropy_bound": np.float32([bound]), **noise, "free": np.float32(free)}
        keep(f"sample.{step}", "in", told)
        keep(f"sample.{step}", "out", out)
    encode("commit", out["draft"].astype(np.int32), None)
    keep("denoise.next", "in", {"canvas": given["next"]})
    keep("denoise.next", "out", {"logits": runner.denoise(given["next"], cache)})
    return found


def main():
    path = make_tiny_gguf(HERE / "tiny.gguf", **MODEL)
    description = describe(path, top_k=TOP_K)
    write_description(description, HERE / "tiny.dgraph.json")
    vectors = {}
    for case, options in CASES.items():
        runner = Runner(path, description=description, executor=NumpyExecutor(open_gguf(path)), **options)
        vectors |= {f"{case}.{name}": np.ascontiguousarray(array) for name, array in run(runner).items()}
    save_file(vectors, HERE / "vectors.safetensors")
    (HERE / "recipe.json").write_text(json.dumps(RECIPE, indent=2) + "\n")


if __name__ == "__main__":
    main()
