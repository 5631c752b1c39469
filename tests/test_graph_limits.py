"""What a runner takes: memory as planned, graphs used again, layers on two devices; and what it refuses."""

import numpy as np
import pytest

from gguf_export import Runner
from gguf_export.engine import make_session
from mlx_dgemma.errors import ContextError, DgemmaError
from tests.graph_runners import C, V, difference, runner_of, tokens_of
from tests.tiny_gguf import make_tiny_gguf


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_the_next_generation_takes_the_memory_of_the_last(path):
    runner = runner_of(path)
    config = runner.generation_config.replace(max_new_tokens=32, max_denoising_steps=2)
    tokenizer, states, texts = runner.tokenizer(), [], []
    for prompt in ("a longer prompt than the others", "b", "a longer prompt than the others"):
        session = make_session(runner, tokenizer)
        *_, done = session.stream([[{"role": "user", "content": prompt}]], config)
        texts.append(done.text)
        states.append(runner._spares[1].state)
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
    from gguf_export.devices import Device, open_ggml
    from gguf_export.forecast import plan_of

    runner = runner_of(path, form="gpu")
    three = plan_of(runner.graph, runner.config, C, open_ggml()).need(3).total
    small = Device("GPU0", "gpu", "a small one", three, three, False, 0)
    monkeypatch.setattr(module, "choose", lambda library, device: small)
    with pytest.raises(DgemmaError, match=r"GPU0 has .* free, expected .* \(weights .*--n-gpu-layers 3 would fit"):
        Runner(path, "GPU0")
    monkeypatch.setattr(module, "choose", lambda library, device: small._replace(free=1_000))
    with pytest.raises(DgemmaError, match="GPU0 has 1.00 kB free.*; --device CPU; or --allow-overcommit tries"):
        Runner(path, "GPU0")
    monkeypatch.setattr(module, "choose", lambda library, device: Device("CPU", "cpu", "", 1_000, 1_000, True, 0))
    with pytest.raises(DgemmaError, match=r"CPU has 1.00 kB free.*\); no recipe would; see .*convert fit"):
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
