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
from gguf_export.numpy_executor import NumpyExecutor
from mlx_dgemma.engine import MlxEngine
from mlx_dgemma.errors import ContextError, DgemmaError
from mlx_dgemma.gguf.model import open_gguf
from mlx_dgemma.gguf.types import TYPES
from mlx_dgemma.noise import NoiseStream
from tests.mlx_trace import traced
from tests.tiny_gguf import make_tiny_gguf

GOLDEN = Path(__file__).parent / "golden"
C, V = 16, 384
# The promises: 1e-4 for the oracle, 1e-3 for ggml. Measured: 2e-6 and 3e-6.
TOLERANCE = {"numpy": 1e-4, "ggml": 1e-3}
FORMS = [{"attention": a, "self_conditioning": s} for a in ("flash", "exact") for s in ("top-k", "exact")]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def mlx(path):
    return mlx_dgemma.load(path, mx.float32)[0]


def runner_of(path, engine="ggml", **options):
    executor = NumpyExecutor(open_gguf(path)) if engine == "numpy" else None
    return Runner(path, "CPU", executor=executor, **options)


def tokens_of(n, seed=0, rows=1):
    return np.random.default_rng(seed).integers(5, V, (rows, n)).astype(np.int32)


def difference(a, b):
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max())


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
    for step, temperature in enumerate((0.8, 0.6, 0.4)[:n_steps]):
        noise = stream.uniforms(rows, 0, step, C), stream.renoise(rows, 0, step, C, V)
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


def test_the_next_generation_takes_the_memory_of_the_last(path):
    runner = runner_of(path)
    config = runner.generation_config.replace(max_new_tokens=32, max_denoising_steps=2)
    tokenizer, states, texts = runner.tokenizer(), [], []
    for prompt in ("a longer prompt than the others", "b", "a longer prompt than the others"):
        session = make_session(runner, tokenizer)
        *_, done = session.stream([[{"role": "user", "content": prompt}]], config)
        texts.append(done.text)
        states.append(runner._spare.state)
    assert states[0] is states[1] is states[2] and texts[0] == texts[2]
    assert runner.make_cache(2).state is not states[0]
    fresh = make_session(runner_of(path), tokenizer)
    assert list(fresh.stream([[{"role": "user", "content": "b"}]], config))[-1].text == texts[1]


def test_graphs_are_built_once_per_shape(path):
    runner = runner_of(path)
    cache = runner.make_cache()
    runner.prefill(tokens_of(20), cache)
    runner.start(tokens_of(C, 1), cache)
    noise = np.full((1, C), 0.5, np.float32), tokens_of(C, 2)
    runner.step(cache, 0.7, 0.1, *noise)
    compiled = cache.state._graphs["denoise+sample"][1]
    for _ in range(3):
        runner.step(cache, 0.6, 0.1, *noise)
    assert cache.state._graphs["denoise+sample"][1] is compiled
    runner.prefill(tokens_of(300), cache)  # past the slots that were read
    runner.start(tokens_of(C, 1), cache)
    runner.step(cache, 0.6, 0.1, *noise)
    assert cache.state._graphs["denoise+sample"][1] is not compiled


def test_memory_is_what_was_planned(path):
    from gguf_export.memory import Split, plan

    runner = runner_of(path, self_conditioning="exact")
    cache = runner.make_cache()
    runner.prefill(tokens_of(20), cache)
    runner.start(tokens_of(C, 1), cache)
    runner.step(cache, 0.7, 0.1, np.full((1, C), 0.5), tokens_of(C, 2))
    told = runner.memory(cache)
    # sliding: 768 slots × (2 heads × 16) × (keys, values) × 4 bytes in each of 5 layers; full: 256 × 32 × 2 × 4
    assert told.prefix == 5 * 768 * 2 * 16 * 2 * 4 + 256 * 32 * 2 * 4 == cache.nbytes
    weights = [leaf for leaf in runner._weights()]
    planned = plan(weights, runner.graph("denoise+sample", cache.shape(C)), Split(0))
    assert planned.weights == told.weights and planned.prefix == told.prefix
    compiled = cache.state._graphs["denoise+sample"][1].nbytes
    beliefs = cache.state.nbytes - cache.nbytes
    assert 0.5 * compiled < planned.compute - beliefs < 1.5 * compiled


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, c: r.encode([[V]], c), f"found token {V}, expected whole numbers from 0 to {V - 1}"),
        (lambda r, c: r.encode([[-1]], c), "found token -1"),
        (lambda r, c: r.encode([[1], [2]], c), r"tokens have shape \(2, 1\), expected \(1, number of tokens\)"),
        (lambda r, c: r.denoise([[1] * (C + 1)], c), f"the canvas has {C + 1} slots, expected {C}"),
        (lambda r, c: r.encode([[0.5]], c), "found token 0.5"),
    ],
)
def test_what_cannot_be_encoded_is_said(path, call, message):
    runner = runner_of(path)
    with pytest.raises(DgemmaError, match=message):
        call(runner, runner.make_cache())


def test_a_prefix_beyond_the_context_is_refused(path):
    runner = runner_of(path)
    with pytest.raises(ContextError, match="context is 4096"):
        runner.encode(np.full((1, 5_000), 7), runner.make_cache())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "CUDA9"}, "device 'CUDA9' is not here, expected auto or one of CPU"),
        ({"attention": "sparse"}, "attention is 'sparse', expected one of flash, exact"),
        ({"self_conditioning": "none"}, "self_conditioning is 'none', expected one of top-k, exact"),
        ({"cache_type": "q8_0"}, "cache_type is 'q8_0', expected one of f16, f32"),
        ({"n_gpu_layers": -1}, "--n-gpu-layers is -1, expected 0 or more"),
    ],
)
def test_a_wrong_option_is_said(path, options, message):
    with pytest.raises(DgemmaError, match=message):
        Runner(path, **{"device": "CPU", **options})


def test_too_little_memory_says_what_would_fit(path, monkeypatch):
    import gguf_export.runner as module
    from gguf_export.devices import Device
    from gguf_export.memory import Split, plan

    runner = runner_of(path, form="gpu")
    graphs = [runner.graph(phase, runner._one_chunk()) for phase in module.RUN]
    three = max(plan(runner._weights(), graph, Split.of(6, 3)).wanted for graph in graphs)
    small = Device("GPU0", "gpu", "a small one", three, three, False, 0)
    monkeypatch.setattr(module, "choose", lambda library, device: small)
    with pytest.raises(DgemmaError, match=r"GPU0 has .* free, expected .* \(weights .*--n-gpu-layers 3 would fit"):
        Runner(path, "GPU0")
    monkeypatch.setattr(module, "choose", lambda library, device: small._replace(free=1_000))
    with pytest.raises(DgemmaError, match="GPU0 has 1.00 kB free.*; choose a smaller recipe, or --device CPU"):
        Runner(path, "GPU0")
    monkeypatch.setattr(module, "choose", lambda library, device: Device("CPU", "cpu", "", 1_000, 1_000, True, 0))
    with pytest.raises(DgemmaError, match=r"CPU has 1.00 kB free.*\); free some"):
        Runner(path, "CPU")


def test_a_prefix_that_does_not_fit_is_refused_before_it_is_allocated(path, monkeypatch):
    import gguf_export.executor as module

    runner = runner_of(path)
    monkeypatch.setattr(module, "memory_of", lambda g, handle: (3 << 20, 1 << 30))
    monkeypatch.setattr(runner.executor, "new_state", lambda leaves: pytest.fail("allocated"))
    with pytest.raises(DgemmaError, match=r"CPU has 3.15 MB free, expected .* for 8 rows of up to 512 tokens; shorten"):
        runner.make_cache(8, 300)


@pytest.mark.parametrize("n", [None, 0, 1, 3, 6, 99])
def test_layers_are_split_over_devices(path, monkeypatch, n):
    """A second backend of the CPU stands for a GPU that maps nothing: placement and upload, if not the bus."""
    import gguf_export.runner as module

    whole = runner_of(path, form="gpu")
    card = whole.executor.device._replace(name="GPU0", kind="gpu", maps=False)
    monkeypatch.setattr(module, "choose", lambda library, device: card)
    split = Runner(path, "GPU0", n_gpu_layers=n, form="gpu")
    results = []
    for runner in (whole, split):
        cache = runner.make_cache()
        runner.prefill(tokens_of(20), cache)
        results.append(runner.denoise(tokens_of(C, 1), cache))
    assert difference(*results) == 0
    held, layers = split.executor.weight_bytes, [x for x in split._weights() if x.name.startswith("blk.")]
    own = sum(x.spec.nbytes for x in layers if int(x.name.split(".")[1]) >= 6 - min(6 if n is None else n, 6))
    rest = sum(x.spec.nbytes for x in split._weights()) - sum(x.spec.nbytes for x in layers)
    if n != 0:
        assert held["GPU0"] == own + rest and sum(held.values()) == sum(whole.executor.weight_bytes.values())
    else:
        assert held == {"CPU": whole.executor.weight_bytes["CPU"]}


def test_a_folder_without_a_gguf_is_no_model(tiny):
    with pytest.raises(
        DgemmaError, match="found a folder without a GGUF file, expected one; make it from the original"
    ):
        Runner(tiny, "CPU")


def test_a_description_of_another_model_is_refused(path, tmp_path):
    from gguf_export import describe

    other = make_tiny_gguf(tmp_path / "other.gguf", num_experts=4)
    with pytest.raises(DgemmaError, match=r"its fingerprint is sha256:.*are of different models"):
        Runner(other, "CPU", description=describe(path))


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
