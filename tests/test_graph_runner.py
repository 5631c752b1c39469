"""The graph, run: against the MLX model and transformers' golden logits, in numpy and on ggml's CPU, phase by phase."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_dgemma
from demo import evaluate
from demo.tasks import TASKS, held_out
from gguf_export import Runner
from gguf_export.description import Shape
from gguf_export.engine import make_session
from gguf_export.expansion import expand
from gguf_export.graph_check import stored_specs
from gguf_export.graph_numpy import first_difference
from gguf_export.host_inputs import layer_inputs
from mlx_dgemma.engine import MlxEngine
from mlx_dgemma.gguf.types import TYPES
from mlx_dgemma.noise import NoiseStream
from tests.graph_runners import C, V, difference, runner_of, tokens_of
from tests.mlx_trace import traced
from tests.tiny_gguf import make_tiny_gguf

GOLDEN = Path(__file__).parent / "golden"
# The promises: 1e-4 for the oracle, 1e-3 for ggml. Measured: 2e-6 and 3e-6.
TOLERANCE = {"numpy": 1e-4, "ggml": 1e-3}
FORMS = [{"attention": a, "self_conditioning": s} for a in ("flash", "exact") for s in ("top-k", "exact")]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def mlx(path):
    return mlx_dgemma.load(path, mx.float32)[0]


def test_the_tiny_file_holds_the_tiny_checkpoint(mlx, tiny_model):
    """So that the golden logits are this file's too."""
    tokens, canvas = mx.array(tokens_of(9)), mx.array(tokens_of(C, 1))
    a, b = (m.make_cache() for m in (mlx, tiny_model[0]))
    mlx.encode(tokens, a), tiny_model[0].encode(tokens, b)
    assert difference(mlx.denoise(canvas, a), tiny_model[0].denoise(canvas, b)) == 0


@pytest.mark.parametrize("engine", TOLERANCE)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form.values()))
@pytest.mark.parametrize("case", ["short", "window", "long"])
def test_every_phase_computes_what_transformers_does(path, engine, form, case):
    golden, temperature = np.load(GOLDEN / f"logits_{case}.npz"), 0.7
    # top-k keeps 64 of 384 tokens: on a random model, whose beliefs are flat, that is another belief.
    skip = {"conditioned"} if form["self_conditioning"] == "top-k" else set()
    runner = runner_of(path, engine, **form)
    cache = runner.make_cache()
    got = {"hidden": runner.encode(golden["prompt"], cache), "first": runner.denoise(golden["canvas"], cache)}
    got["conditioned"] = runner.denoise(golden["canvas"], cache, golden["first"] / temperature)
    runner.encode(golden["canvas"], cache)
    got["second"] = runner.denoise(golden["next"], cache)
    for name in got.keys() - skip:
        assert difference(got[name], golden[name]) < TOLERANCE[engine], name
        assert (got[name].argmax(-1) == golden[name].argmax(-1)).all(), name


@pytest.mark.parametrize("engine", TOLERANCE)
def test_top_k_of_the_whole_vocabulary_is_exact(path, engine):
    from gguf_export import describe

    canvas, processed = tokens_of(C, 1), np.random.default_rng(2).standard_normal((1, C, V)).astype(np.float32)
    logits = []
    for description, kind in ((describe(path, top_k=V), "top-k"), (describe(path), "exact")):
        runner = runner_of(path, engine, description=description, self_conditioning=kind)
        cache = runner.make_cache()
        runner.encode(tokens_of(9), cache)
        logits.append(runner.denoise(canvas, cache, processed))
    assert difference(*logits) < 1e-4


def test_the_gpus_form_uses_ggmls_gelu_table_on_a_cpu(path):
    golden = np.load(GOLDEN / "logits_short.npz")
    runner = runner_of(path, form="gpu")
    cache = runner.make_cache()
    runner.encode(golden["prompt"], cache)
    assert 1e-5 < difference(runner.denoise(golden["canvas"], cache), golden["first"]) < 5e-3


@pytest.mark.parametrize("engine", TOLERANCE)
def test_a_padded_batch_in_chunks_over_a_ring_that_went_round(path, mlx, engine):
    """1,100 tokens: more than the 768 slots a sliding layer stores, in chunks of 512."""
    tokens, padding = tokens_of(1_100, 3, rows=2), np.array([0, 7], np.int32)
    runner, cache = runner_of(path, engine, self_conditioning="exact"), mlx.make_cache()
    ours = runner.make_cache(2)
    assert runner.slots_sliding == 768
    hidden = runner.encode(tokens, ours, padding)
    theirs = np.array(mlx.encode(mx.array(tokens), cache, mx.array(padding)))
    assert difference(hidden[0], theirs[0]) < TOLERANCE[engine]
    assert difference(hidden[1, 7:], theirs[1, 7:]) < TOLERANCE[engine]
    for seed in (1, 2):  # the second canvas meets the slots of the first
        canvas = tokens_of(C, seed, rows=2)
        assert difference(runner.denoise(canvas, ours), mlx.denoise(mx.array(canvas), cache)) < TOLERANCE[engine]
    runner.encode(canvas, ours), mlx.encode(mx.array(canvas), cache)
    canvas = tokens_of(C, 4, rows=2)
    assert difference(runner.denoise(canvas, ours), mlx.denoise(mx.array(canvas), cache)) < TOLERANCE[engine]


@pytest.mark.parametrize("engine", TOLERANCE)
def test_a_prefix_grows_and_is_copied(path, mlx, engine):
    runner, cache = runner_of(path, engine), mlx.make_cache()
    ours = runner.make_cache(1, room=8)
    first_room = ours.room
    for seed, n in enumerate((200, 40, 600, 9)):
        tokens = tokens_of(n, seed)
        runner.prefill(tokens, ours), mlx.encode(mx.array(tokens), cache)
    assert ours.room > first_room
    twin, canvas = ours.copy(), tokens_of(C, 9)
    runner.encode(tokens_of(30, 5), twin)
    assert difference(runner.denoise(canvas, ours), mlx.denoise(mx.array(canvas), cache)) < TOLERANCE[engine]
    mlx.encode(mx.array(tokens_of(30, 5)), cache)
    assert difference(runner.denoise(canvas, twin), mlx.denoise(mx.array(canvas), cache)) < TOLERANCE[engine]


@pytest.mark.parametrize("engine", TOLERANCE)
@pytest.mark.parametrize("kind", ["exact", "top-k"])
def test_a_step_on_the_device_is_the_samplers(path, mlx, engine, kind):
    """Three steps of a batch of two: draft, sample, acceptance, renoise, and what the next step believes."""
    runner = runner_of(path, engine, self_conditioning=kind)
    prompt, stream, rows = tokens_of(20, rows=2), NoiseStream(5), [0, 1]
    theirs, ours = MlxEngine(mlx), runner.make_cache(2)
    theirs.prefill(prompt), runner.prefill(prompt, ours)
    canvas = stream.canvas(rows, 0, C, V)
    theirs.start(canvas), runner.start(canvas, ours)
    n_steps = 3 if kind == "exact" else 1  # then 64 of 384 tokens are another belief
    free = np.random.RandomState(1).rand(2, C) < 0.7  # known slots, and a temperature for each row
    for step, temperature in enumerate((0.8, np.array([0.6, 0.3]), 0.4)[:n_steps]):
        noise = stream.uniforms(rows, 0, step, C), stream.renoise(rows, 0, step, C, V), None if step == 0 else free
        want, got = theirs.step(temperature, 3.0, *noise), runner.step(ours, temperature, 3.0, *noise)
        assert difference(got["entropy"], want.entropy) < 1e-4
        assert (got["draft"] == want.draft).all()
        assert 0 < want.accepted.mean() < 1 and (got["accepted"] == want.accepted).all()
        assert (got["next_canvas"] == want.canvas).all()


def test_a_disagreement_is_named_by_its_first_node(path, mlx, tmp_path):
    """MLX, the oracle and ggml share names; one weight changed shows where."""
    from tests.tiny import tiny_config
    from tests.tiny_gguf import tiny_tensors

    prompt, canvas = tokens_of(20), tokens_of(C, 1)
    name = "blk.2.ffn_up.weight"
    values = tiny_tensors(tiny_config(), "F32", "float32", False)[name][0] * 1.01
    changed = make_tiny_gguf(tmp_path / "changed.gguf", tensors={name: (values, "F32")})

    def trace(path, engine):
        runner = runner_of(path, engine)
        cache = runner.make_cache()
        runner.prefill(prompt, cache)
        runner.start(canvas, cache)
        graph = runner.graph("denoise", cache.shape(C))
        inputs = layer_inputs(graph, cache.padding)
        return graph, runner.executor.compute(cache.state, graph, inputs, graph.outputs, every=True)

    graph, oracle = trace(path, "numpy")
    _, ggml = trace(path, "ggml")
    assert len(ggml) > 300 and first_difference(graph, oracle, ggml, 1e-3) is None
    cache = mlx.make_cache()
    mlx.encode(mx.array(prompt), cache)
    with traced(mlx) as seen:
        mlx.denoise(mx.array(canvas), cache)
    assert len(seen) > 90 and len(seen.keys() & oracle.keys()) == len(seen)
    assert first_difference(graph, oracle, seen, 1e-4) is None
    for engine in TOLERANCE:
        # The prompt's third layer differs too, but not before this node of the canvas.
        assert first_difference(graph, oracle, trace(changed, engine)[1], 1e-3) == "blk.2.ffn_up"


@pytest.mark.parametrize("type", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "MXFP4"])
def test_ggml_agrees_with_the_oracle_on_packed_weights(tmp_path, type):
    """ggml quantizes activations for these products, so they agree to about one per cent."""
    assert type in TYPES
    path = make_tiny_gguf(tmp_path / "t.gguf", type, split_experts=type == "Q8_0")
    logits = []
    for engine in TOLERANCE:
        runner = runner_of(path, engine, cache_type="f32")
        cache = runner.make_cache()
        runner.encode(tokens_of(20), cache)
        logits.append(runner.denoise(tokens_of(C, 1), cache))
    error = np.sqrt(np.mean((logits[0] - logits[1]) ** 2) / np.mean(logits[0] ** 2))
    assert error < 0.05, error


def test_experts_stored_split_are_the_fused_ones(path, tmp_path):
    split = make_tiny_gguf(tmp_path / "split.gguf", split_experts=True)
    logits = []
    for file in (path, split):
        runner = runner_of(file)
        cache = runner.make_cache()
        runner.encode(tokens_of(20), cache)
        logits.append(runner.denoise(tokens_of(C, 1), cache))
    assert difference(*logits) < 1e-5


@pytest.mark.parametrize("top_k", [1, 3])
def test_other_shapes_of_model(tmp_path, top_k):
    """One expert per token, a vocabulary that is no multiple of a block, layers in another order."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    path = make_tiny_gguf(
        tmp_path / "t.gguf",
        top_k_experts=top_k,
        num_hidden_layers=3,
        layer_types=kinds,
        vocab_size=1_000,
        canvas_length=8,
    )
    model = mlx_dgemma.load(path, mx.float32)[0]
    stream, rows = NoiseStream(1), [0]
    for engine in TOLERANCE:
        runner = runner_of(path, engine, self_conditioning="exact")
        theirs, ours = MlxEngine(model), runner.make_cache()
        theirs.prefill(tokens_of(20)), runner.prefill(tokens_of(20), ours)
        canvas = stream.canvas(rows, 0, 8, 1_000)
        theirs.start(canvas), runner.start(canvas, ours)
        for step in range(2):
            noise = stream.uniforms(rows, 0, step, 8), stream.renoise(rows, 0, step, 8, 1_000)
            want, got = theirs.step(0.7, 3.0, *noise), runner.step(ours, 0.7, 3.0, *noise)
            assert (got["next_canvas"] == want.canvas).all() and (got["draft"] == want.draft).all()


@pytest.fixture(scope="module")
def demo_file(tmp_path_factory):
    from convert import convert

    file = tmp_path_factory.mktemp("demo") / "demo.gguf"
    convert("demo/checkpoint", file, to="gguf", recipe="F32")
    return file


@pytest.mark.parametrize("engine", TOLERANCE)
def test_every_phase_of_the_demo_is_mlxs(demo_file, engine):
    model, _ = mlx_dgemma.load("demo/checkpoint", mx.float32)
    runner, random = runner_of(demo_file, engine, self_conditioning="exact"), np.random.default_rng(0)
    prompt, canvas = random.integers(5, 1024, (1, 150)), random.integers(5, 1024, (1, 64))
    ours, theirs = runner.make_cache(), model.make_cache()
    compared = [(runner.encode(prompt, ours), model.encode(mx.array(prompt), theirs))]
    logits = model.denoise(mx.array(canvas), theirs)
    compared += [(runner.denoise(canvas, ours), logits)]
    compared += [(runner.denoise(canvas, ours, np.array(logits)), model.denoise(mx.array(canvas), theirs, logits))]
    compared += [(runner.encode(canvas, ours), model.encode(mx.array(canvas), theirs))]
    compared += [(runner.denoise(canvas, ours), model.denoise(mx.array(canvas), theirs))]
    assert max(difference(*pair) for pair in compared) < TOLERANCE[engine]


def test_mlxs_python_takes_a_runner(demo_file):
    runner = Runner(demo_file, "CPU")
    prompt = held_out("python_fix", 1)[0].prompt
    text = mlx_dgemma.generate(runner, runner.tokenizer(), prompt, seed=0)
    assert text == mlx_dgemma.generate(*mlx_dgemma.load("demo/checkpoint", mx.float32), prompt, seed=0)


def test_one_seed_one_text_behind_both_doors(demo_file):
    model, tokenizer = mlx_dgemma.load("demo/checkpoint", mx.float32)
    config = model.generation_config
    prompts = [held_out(task, 3)[i].prompt for task in TASKS for i in range(3)]
    talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
    *_, want = mlx_dgemma.make_session(model, tokenizer).stream(talks, config, 0)
    for kind in ("top-k", "exact"):
        runner = Runner(demo_file, "CPU", self_conditioning=kind)
        *_, got = make_session(runner, runner.tokenizer()).stream(talks, config, 0)
        assert got.texts == want.texts
        assert got.stats.steps == want.stats.steps


def test_the_judge_takes_ggml(demo_file, capsys):
    evaluate.main(
        [
            "--engine",
            "ggml",
            "--model",
            str(demo_file),
            "--device",
            "CPU",
            "--against",
            "demo/checkpoint",
            *["--task", "sudoku", "--n", "3", "--json"],
        ]
    )
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"][0]
    assert row["right"] == row["n"] == row["same"] == 3
    with pytest.raises(SystemExit):
        evaluate.main(["--engine", "mlx", "--device", "CPU"])
    assert "--device is for --engine ggml" in capsys.readouterr().err


def test_a_chat_keeps_its_prefix(path):
    runner = runner_of(path)
    tokenizer, settings = runner.tokenizer(), runner.generation_config
    kept, fresh = (make_session(runner, tokenizer, keep_prefix=keep) for keep in (True, False))
    talk = [{"role": "user", "content": "the sand " * 30}]
    for _ in range(3):
        a, b = ([e for e in s.stream([talk], settings, 1)][-1] for s in (kept, fresh))
        assert a.tokens == b.tokens
        talk = [*talk, {"role": "assistant", "content": a.text}, {"role": "user", "content": "and on"}]
    assert a.stats.reused_tokens > 0 == b.stats.reused_tokens


def test_golden_texts_come_from_ggml_too(demo_file):
    """What transformers wrote, on our noise."""
    runner = Runner(demo_file, "CPU")
    session = make_session(runner, runner.tokenizer())
    cases = json.loads((GOLDEN / "demo_texts.json").read_text())
    cases = cases["texts"] if isinstance(cases, dict) else cases
    right = 0
    for case in cases:
        talk = [{"role": "user", "content": case["prompt"]}]
        *_, done = session.stream([talk], runner.generation_config, case["seed"])
        right += done.text == case["text"]
    assert right == len(cases)


def test_masks_show_what_mlx_shows(path):
    """The rules in the description against mlx_dgemma.masks, slot by slot."""
    from mlx_dgemma.masks import canvas_mask, encoder_mask

    runner = runner_of(path)
    padding = np.array([0, 3], np.int32)
    types = stored_specs(runner.model.file)
    for P, T in ((0, 5), (30, 40), (900, 12)):
        shape = Shape(2, T, P, 768, 1_024)
        for phase in ("prefill", "denoise"):
            graph = expand(runner.description, phase, shape, runner.options, types)
            n = graph.names["T"]
            inputs = layer_inputs(graph, padding)
            for kind, window in (("sliding", 16), ("full", None)):
                seen = inputs[f"mask_{kind}"][:, 0] == 0  # (B, T, S)
                slots = inputs[f"slots_{kind}"].reshape(2, n)
                assert (slots[0] == (P + np.arange(n)) % graph.names[f"R_{kind}"]).all()
                first = max(0, P - 15) if window else 0
                keys = np.arange(first, P + n)
                if phase == "prefill":
                    want = encoder_mask(mx.arange(P, P + n), mx.array(keys), window, mx.array(padding))
                else:
                    want = canvas_mask(mx.array(keys), mx.array(padding))
                want = np.broadcast_to(np.array(want)[:, 0], (2, n, len(keys)))
                got = seen[:, :, keys % graph.names[f"R_{kind}"]]
                assert (got == want).all()
                assert seen.sum() == want.sum()  # and nothing else
