"""What fits: the arithmetic against what MLX's allocator and ggml's say, the table, and what is refused early."""

import json
import math
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_dgemma
from convert import convert, fit
from convert.cli import main as convert_main
from convert.plan_gguf import make_gguf_plan
from convert.recipes import TARGETS, find_recipe
from gguf_export import Runner, memory
from gguf_export.cli import main as gguf_main
from gguf_export.devices import choose, cpu, devices, open_ggml
from gguf_export.forecast import RUN, forecast, planned_model, shapes_of
from gguf_export.memory import peak
from gguf_export.reserve import reserved
from mlx_dgemma import cli, cli_edit, engine, fits, loading, long_attention, products, vocabulary
from mlx_dgemma.config import parse_config, read_json
from mlx_dgemma.engine import MlxEngine
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.fits import Activations, Need, mlx_need, mlx_step, most_tokens
from mlx_dgemma.gguf.model import open_gguf
from mlx_dgemma.units import human_bytes
from tests.graph_runners import runner_of
from tests.tiny import write_json
from tests.tiny_gguf import make_tiny_gguf

ROOT = Path(__file__).parent.parent
REAL = ROOT / "tests/data/diffusiongemma-26b-config.json"
GPU = Activations(2, False, True)


@pytest.fixture(scope="module")
def real():
    return parse_config(read_json(REAL))


# MLX: counted against the allocator


def wide(**changes):
    """Sizes at which one stage or another of a step takes the most, as full and sliding layers take turns."""
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    sizes = {
        "vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3,
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2, "head_dim": 64,
        "global_head_dim": 128, "num_experts": 16, "top_k_experts": 4, "moe_intermediate_size": 128,
        "sliding_window": 1024, "max_position_embeddings": 8192, "layer_types": kinds,
    } | changes  # fmt: skip
    raw = read_json(REAL)
    raw["canvas_length"] = sizes.pop("canvas_length", 128)
    raw["text_config"] |= sizes
    return parse_config(raw)


def random_model(config, bits):
    import mlx.nn as nn
    from mlx.utils import tree_map

    from mlx_dgemma.model import DiffusionGemma

    model = DiffusionGemma(config, mx.float32)
    if bits:
        nn.quantize(model, 64, bits)
    mx.random.seed(0)
    model.update(tree_map(lambda a: mx.random.normal(a.shape) / 8 if a.dtype == mx.float32 else a, model.parameters()))
    mx.eval(model.parameters())
    return model.eval()


def measured(model, tokens):
    """Keys and values of a prompt, and the most bytes besides: while it is encoded, and in two steps behind it."""
    C, V = model.config.canvas_length, model.config.vocab_size
    engine, rng = MlxEngine(model), np.random.default_rng(0)
    mx.clear_cache()
    before = mx.get_active_memory()
    found = []
    mx.reset_peak_memory()
    engine.prefill(rng.integers(0, V, (1, tokens), np.int32))
    found.append(mx.get_peak_memory() - before - engine.cache.nbytes)
    engine.start(rng.integers(0, V, (1, C), np.int32))
    mx.reset_peak_memory()
    for _ in range(2):
        engine.step(0.7, 0.1, rng.random((1, C), np.float32), rng.integers(0, V, (1, C), np.int32))
    found.append(mx.get_peak_memory() - before - engine.cache.nbytes)
    return engine.cache.nbytes, *found


def planned(config, tokens, packed):
    how = Activations(4, True, packed)
    return (
        fits.prefix_bytes(config, 1, tokens, 4),
        fits.prefill_step(config, tokens, 1, how),
        mlx_step(config, 1, config.canvas_length, tokens, True, how),
    )


@pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="the numbers are those of MLX's CPU backend")
@pytest.mark.parametrize(
    ("changes", "bits", "tokens", "most"),
    [
        ({}, 0, 700, 1.4),
        ({}, 4, 1200, 1.4),
        ({"canvas_length": 256, "vocab_size": 65536}, 8, 100, 1.4),
        ({"hidden_size": 1024, "intermediate_size": 2048, "moe_intermediate_size": 256}, 4, 300, 1.4),
    ],
)
def test_a_step_takes_what_was_counted_and_never_more(changes, bits, tokens, most):
    config = wide(**changes)
    prefix, *found = measured(random_model(config, bits), tokens)
    counted_prefix, *counted = planned(config, tokens, bits > 0)
    assert counted_prefix == prefix
    assert 1 <= max(counted) / max(found) <= most, (counted, found)


@pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="the numbers are those of MLX's CPU backend")
@pytest.mark.parametrize("tokens", [300, 900])
@pytest.mark.parametrize("which", ["tiny", "demo"])
def test_small_models_stay_within_the_count_too(request, tokens, which):
    folder = request.getfixturevalue("tiny") if which == "tiny" else ROOT / "demo/checkpoint"
    model, _ = mlx_dgemma.load(folder, mx.float32)
    prefix, *found = measured(model, tokens)
    counted_prefix, *counted = planned(model.config, tokens, False)
    assert counted_prefix == prefix
    assert 1 <= max(counted) / max(found) <= 1.8, (counted, found)


def test_weights_take_what_was_counted(tiny, tmp_path):
    """As stored, packed, unpacked again, and from a GGUF."""
    convert(tiny, tmp_path / "q4", to="mlx", recipe="q4")
    convert(tiny, tmp_path / "x.gguf", to="gguf", recipe="Q4_0")
    for path, dtype, dequantize in (
        (tiny, mx.float32, False),
        (tiny, mx.bfloat16, False),
        (tmp_path / "q4", mx.float32, False),
        (tmp_path / "q4", mx.float32, True),
        (tmp_path / "x.gguf", mx.float32, False),
    ):
        model, _ = mlx_dgemma.load(path, dtype, dequantize)
        from mlx.utils import tree_flatten

        held = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
        source = (loading.FolderSource if path.is_dir() else loading.GgufSource)(path)
        assert source.memory(dtype, dequantize) == (held, model.packed), path


def test_a_plan_counts_what_the_folder_will_take(tiny, tmp_path):
    """A recipe's plan, and the folder that it becomes, are the same line."""
    convert(tiny, tmp_path / "q4", to="mlx", recipe="q4")
    found = dict.fromkeys(TARGETS, fit.Room(10**9, True, ""))
    lines = {x.recipe: x for x in fit.fit(fit.open_source(tmp_path / "q4"), found) if x.target == "mlx"}
    config = loading.FolderSource(tmp_path / "q4").memory(mx.float32, False)[0]
    assert lines["q4, as it is"].need == lines["q4"].need and lines["q4"].need.weights == config


def test_sizes_of_chunks_are_those_of_the_modules_that_cut():
    assert (fits.CHUNK_KEYS, fits.FEW_KEYS) == (long_attention.CHUNK_KEYS, long_attention.FEW_KEYS)
    ours = fits.BLOCK, fits.BLOCKS, fits.CPU_CHUNK, fits.GPU_CHUNK
    assert ours == (vocabulary.BLOCK, vocabulary.BLOCKS, vocabulary.CPU_CHUNK, vocabulary.GPU_CHUNK)


def test_keys_and_values_by_hand(real):
    # 25 sliding layers keep 1,023 tokens of 8 heads × 256, 5 full ones all of 2 × 512; keys and values, bfloat16
    assert fits.prefix_bytes(real, 1, 4096, 2) == 2 * 2 * (25 * 1023 * 8 * 256 + 5 * 4096 * 2 * 512)
    assert fits.prefix_bytes(real, 3, 100, 4) == 3 * 4 * 2 * (25 * 100 * 8 * 256 + 5 * 100 * 2 * 512)


@pytest.mark.parametrize("how", [GPU, Activations(4, True, True)])
def test_needs_grow_with_tokens_and_rows(real, how):
    totals = [mlx_need(real, 10, n, 1, how).total for n in range(256, 20_000, 256)]
    assert all(a <= b for a, b in pairwise(totals))
    assert mlx_need(real, 10, 4096, 2, how).total > mlx_need(real, 10, 4096, 1, how).total


def test_most_tokens_against_a_loop():
    def need(n):
        return Need(1_000, 7 * n, 100)

    for room in (0, 1_100, 1_800, 5_000, 10**6):
        want = max([n for n in range(0, 513, 8) if n and need(n).total <= room], default=0)
        assert most_tokens(need, room, 512, 8) == want


def test_advised_recipes_have_the_sizes_of_their_plans(real):
    """The tables that errors advise by, against the plans."""
    for name, bits in fits.MIXTURES.items():
        planner = fit._of_mlx(fit.open_source(REAL), find_recipe(name, "mlx"), fit.Room(1, False, ""))
        assert fits.mixture_bytes(real, bits, 2) == planner(256)[0].weights, name
    for name, bits in memory.BITS.items():
        plan = make_gguf_plan(real, find_recipe(name, "gguf"))
        assert math.isclose(bits, 8 * plan.total_bytes / plan.parameters, abs_tol=0.006), name


# ggml: counted against its allocator


def test_the_released_config_is_the_published_one():
    assert read_json(fit.RELEASED) == read_json(REAL)


@pytest.mark.parametrize("options", [{}, {"self_conditioning": "exact"}, {"attention": "exact"}])
def test_ggml_sets_aside_what_was_measured_beforehand(tmp_path, options):
    """The plan of a shape, and the buffers of its compiled graphs."""
    runner = runner_of(make_tiny_gguf(tmp_path / "tiny.gguf"), **options)
    g, C = open_ggml(), runner.config.canvas_length
    cache = runner.make_cache()
    runner.encode(np.arange(20)[None] + 107, cache)
    runner.start(np.full((1, C), 107), cache)
    runner.step(cache, 0.7, 0.1, np.full((1, C), 0.5), np.full((1, C), 107))
    shapes = {"prefill": cache.shape(20)._replace(prefix=0), "denoise+sample": cache.shape(C)}
    for phase in RUN:
        compiled = cache.state._graphs[phase][1]
        graph = runner.graph(phase, shapes[phase])
        asked = graph.outputs if phase == "prefill" else graph.targets
        assert reserved(g, graph, asked) == compiled.nbytes, phase


def test_the_26b_is_measured_without_weights(real):
    """ggml's own allocator, for graphs of the real sizes: the sum over what is alive agrees for a step."""
    g = open_ggml()
    tensors = make_gguf_plan(real, find_recipe("Q4_K_M", "gguf")).tensors
    model = planned_model(real, [(t.tensor.gguf, t.type, t.tensor.shape) for t in tensors], "26B")
    plan = forecast(model, False, g)(4096)
    prefill, step = plan.graphs
    assert plan.computes == (reserved(g, prefill), reserved(g, step))
    assert 0.99 < peak(step) / reserved(g, step) <= 1
    assert 0.6 < peak(prefill) / reserved(g, prefill) <= 1  # fragments: this is why it is measured
    assert 540e6 < reserved(g, step) < 545e6
    # 16,013 MiB, as llama-quantize counts; 25 sliding layers of 1,536 slots, 5 full ones of 4,096, f16
    assert plan.need().weights >> 20 == 16_013
    assert plan.need().prefix == 2 * 2 * (25 * 1536 * 8 * 256 + 5 * 4096 * 2 * 512)
    assert shapes_of(real, 4096)[1].slots_sliding == 1536


def test_layers_that_fit_are_the_most(real):
    tensors = make_gguf_plan(real, find_recipe("Q8_0", "gguf")).tensors
    model = planned_model(real, [(t.tensor.gguf, t.type, t.tensor.shape) for t in tensors], "26B")
    plan = forecast(model, False, None)(1024)
    for room in (1 << 30, 12 << 30, 24 << 30):
        n = plan.most_layers(room)
        assert n == 0 or plan.need(n).total <= room
        assert plan.need(n + 1).total > room
    assert plan.most_layers(1 << 40) == real.num_hidden_layers


# The command


def run(capsys, *arguments):
    code = convert_main(["fit", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_table_of_the_released_model(capsys):
    code, out, err = run(capsys, "--memory", "18GB")
    assert code == 0 and err == ""
    title, head, *rows = out.splitlines()
    assert title == "DiffusionGemma-26B-A4B-it, 4,096 tokens, 18.00 GB"
    assert head.split() == ["recipe", "weights", "keys,", "values", "computing", "total", "verdict"]
    assert len(rows) == sum(map(len, TARGETS.values()))
    by_name = {tuple(row.split()[:2]): row for row in rows}
    assert "too large by" in by_name["MLX", "q8"] and "fits, up to 16,384 tokens" in by_name["MLX", "q4"]
    assert "18 layers on the GPU, the others on the CPU" in by_name["GGUF", "Q8_0"]
    assert "fits, up to 65,536 tokens" in by_name["GGUF", "Q4_K_S"]


def test_json_holds_the_same_numbers(capsys, real):
    code, out, _ = run(capsys, "--memory", "16GiB", "--context", "8192", "--json")
    found = json.loads(out)
    assert code == 0 and found["context"] == 8192 and found["memory"]["mlx"]["bytes"] == 16 << 30
    for row in found["recipes"]:
        assert row["total"] == row["weights"] + row["prefix"] + row["step"]
        assert (row["verdict"] == "fits") == (row["total"] <= 16 << 30) == (row["missing"] == 0)
        assert row["verdict"] != "fits" or row["tokens"] >= 8192 or row["tokens"] == 0
    q4 = next(row for row in found["recipes"] if row["recipe"] == "q4")
    assert q4["prefix"] == fits.prefix_bytes(real, 1, 8192, 2)


def test_what_fits_is_never_less_than_what_was_asked_for(capsys):
    """20,000 tokens lie between two of the lengths that are tried."""
    code, out, _ = run(capsys, "--memory", "18GB", "--context", "20000", "--json")
    rows = json.loads(out)["recipes"]
    assert code == 0 and {"fits", "fewer tokens"} <= {row["verdict"] for row in rows}
    for row in rows:
        assert (row["tokens"] >= 20_000) == (row["verdict"] == "fits"), row
    q4 = next(row for row in rows if row["recipe"] == "q4")
    assert (q4["verdict"], q4["tokens"]) == ("fits", 20_000)


def test_a_json_recipe_and_this_machine(capsys, tiny, tmp_path):
    write_json(tmp_path / "mine.json", {"name": "mine", "roles": {"expert": "q3"}})
    code, out, err = run(capsys, tiny, "--recipe", tmp_path / "mine.json")
    assert code == 0 and out.count(" mine ") == 2
    assert err.startswith("note: MLX: ") and "note: ggml: " in err and " for GGUF" in err


def test_a_gguf_is_planned_from_its_header(capsys, tmp_path):
    path = make_tiny_gguf(tmp_path / "tiny.gguf")
    code, out, _ = run(capsys, path, "--memory", "1GB")
    (row,) = [line for line in out.splitlines() if "as it is" in line]
    assert code == 0 and row.startswith("GGUF  tiny.gguf, as it is") and "fits, up to" in row


def test_ram_without_an_engine(capsys, monkeypatch, tiny):
    monkeypatch.setattr(fit, "mlx_machine", lambda: None)
    monkeypatch.setattr(fit, "find_ggml", lambda: None)
    code, _, err = run(capsys, tiny)
    assert code == 0 and "MLX: not installed here" in err and "ggml: not installed here" in err
    monkeypatch.setattr(fit, "ram", lambda: None)
    code, _, err = run(capsys, tiny)
    assert code == 1 and err.startswith("error: nobody says how much memory this machine has")


def test_a_containers_limit_counts(monkeypatch, tmp_path):
    whole = fits.ram()
    (tmp_path / "limit").write_text("4096\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(fits, "CGROUPS", (str(tmp_path / "none"), str(tmp_path / "missing")))
    assert fits.ram() >= whole
    monkeypatch.setattr(fits, "CGROUPS", (str(tmp_path / "limit"),))
    assert fits.ram() == 4096
    assert products.device_memory() == 4096 or not products.on_cpu()
    ggml_cpu = cpu(devices(open_ggml()))
    assert ggml_cpu.free == 4096 < ggml_cpu.total


@pytest.mark.parametrize(("whole", "kept"), [(16 << 30, 1 << 30), (4 << 30, 1 << 29)])
def test_a_cpu_leaves_something_to_the_system(monkeypatch, whole, kept):
    monkeypatch.setattr(fits, "CGROUPS", ())
    monkeypatch.setattr(fits.os, "sysconf", {"SC_PHYS_PAGES": whole >> 12, "SC_PAGE_SIZE": 1 << 12}.get)
    assert fits.ram() == whole - kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "12x"], "--memory: '12x' is no size"),
        (["--memory", "0GB"], "is no size"),
        (["--memory", "1GB", "--context", "0"], "--context is 0, expected 1 to 262144 tokens"),
        (["--memory", "1GB", "--context", "300000"], "--context is 300000, expected"),
        (["--memory", "1GB", "--recipe", "q99"], "recipe 'q99' is not known"),
        (["./nowhere", "--memory", "1GB"], "no such folder or file"),
        (["owner/name/file.gguf", "--memory", "1GB"], "no such file; expected a GGUF that is here"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("arguments", [["--memory", "1GB", "--this-machine"], ["a", "b"], ["--context", "x"]])
def test_wrong_usage(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        convert_main(["fit", *arguments])
    assert stopped.value.code == 2


# Refused before weights are read


@pytest.fixture
def too_small(monkeypatch):
    """MLX's device has a few bytes less than the tiny model takes; nobody may read weights."""

    def set_room(source, room, reads=False):
        monkeypatch.setattr(loading, "device_memory", lambda: room)
        monkeypatch.setattr(engine, "device_memory", lambda: room)
        if not reads:
            monkeypatch.setattr(type(source), "weights", lambda *_: pytest.fail("weights were read"))

    return set_room


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_mlx_refuses_early_and_says_the_numbers(tiny, tmp_path, capsys, too_small, kind):
    path = tiny if kind == "folder" else make_tiny_gguf(tmp_path / "t.gguf")
    source = loading.FolderSource(path) if kind == "folder" else loading.GgufSource(path)
    weights, packed = source.memory(mx.float32, False)
    C = source.config.canvas_length
    need = mlx_need(source.config, weights, 4 * C, 1, Activations(4, True, packed))
    too_small(source, need.total - 1)
    arguments = ["--model", str(path), "--dtype", "float32", "--prompt", "say", "--max-tokens", str(4 * C)]
    assert cli.main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: this device has ") and printed.err.count("\n") == 1
    for part in ("expected", "weights", "keys and values", "computing", "would fit", "--allow-overcommit"):
        assert part in printed.err
    assert "choose a smaller recipe (q8 would fit" in printed.err


def test_mlx_goes_on_where_it_is_told_to(tiny, capsys, too_small):
    too_small(loading.FolderSource(tiny), 1_000, reads=True)
    arguments = ["--model", str(tiny), "--dtype", "float32", "--prompt", "say", "--max-tokens", "16"]
    assert cli.main(arguments) == 1
    capsys.readouterr()
    assert cli.main([*arguments, "--allow-overcommit"]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("note: this device has 1.00 kB, expected ") and "overcommit" not in printed.err
    assert printed.out


def test_from_python_a_context_is_refused_or_taken(tiny, too_small):
    too_small(loading.FolderSource(tiny), 10_000_000, reads=True)
    model, _ = mlx_dgemma.load(tiny, mx.float32)  # one canvas fits
    with pytest.raises(DgemmaError, match=r"for 4000 tokens .*ask for fewer tokens \(\d+ would fit"):
        mlx_dgemma.load(tiny, mx.float32, context=4000)
    notes = []
    model, _ = mlx_dgemma.load(tiny, mx.float32, context=4000, allow_overcommit=True, on_note=notes.append)
    assert model.allow_overcommit and len(notes) == 1 and notes[0].startswith("this device has 10.00 MB")
    MlxEngine(model).prefill(np.full((1, 1000), 107, np.int32))  # not refused later either


def test_an_edit_is_refused_too(tiny, tmp_path, capsys, too_small):
    too_small(loading.FolderSource(tiny), 1_000)
    (tmp_path / "x.txt").write_text("the sand\n")
    code = cli_edit.main([str(tmp_path / "x.txt"), "-i", "say", "--model", str(tiny), "--dtype", "float32"])
    assert code == 1 and "error: this device has 1.00 kB" in capsys.readouterr().err


def test_infilling_counts_its_text(tiny, tmp_path, capsys, too_small):
    too_small(loading.FolderSource(tiny), 1_000)
    (tmp_path / "x.txt").write_text("the <|hole:2|>" + "sand " * 200)
    code = cli.main(["--infill", str(tmp_path / "x.txt"), "--model", str(tiny), "--dtype", "float32"])
    printed = capsys.readouterr().err
    assert code == 1 and "error: this device has 1.00 kB" in printed
    assert int(printed.split(" for ")[1].split()[0]) > 200


@pytest.mark.parametrize("command", ["run", "edit"])
def test_ggml_refuses_early_with_the_same_words(tmp_path, capsys, monkeypatch, command):
    import gguf_export.runner as module

    path = make_tiny_gguf(tmp_path / "tiny.gguf")
    card = choose(open_ggml(), "CPU")._replace(name="GPU0", kind="gpu", free=100_000, total=100_000)
    monkeypatch.setattr(module, "choose", lambda library, device: card)
    monkeypatch.setattr(module.Executor, "load", lambda *_: pytest.fail("weights were read"))
    (tmp_path / "x.txt").write_text("the sand\n")
    what = ["--prompt", "say"] if command == "run" else [str(tmp_path / "x.txt"), "-i", "say"]
    assert gguf_main([command, "--model", str(path), *what]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: GPU0 has 100.00 kB free, expected ") and err.count("\n") == 1
    for part in ("weights", "keys and values", "computing", "--device CPU", "--allow-overcommit"):
        assert part in err


def test_ggml_goes_on_where_it_is_told_to(tmp_path, capsys, monkeypatch):
    import gguf_export.runner as module

    path = make_tiny_gguf(tmp_path / "tiny.gguf")
    cpu = choose(open_ggml(), "CPU")
    monkeypatch.setattr(module, "choose", lambda library, device: cpu._replace(free=100_000))
    arguments = ["run", "--model", str(path), "--prompt", "say", "--max-tokens", "16", "--device", "CPU"]
    assert gguf_main(arguments) == 1
    capsys.readouterr()
    assert gguf_main([*arguments, "--allow-overcommit"]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("note: CPU has 100.00 kB free, expected ") and printed.out


def small_devices(monkeypatch, card_free, host_free):
    """A card and a CPU with so many bytes; nobody may read weights. Both compute on the CPU that is here."""
    import gguf_export.runner as module

    host = choose(open_ggml(), "CPU")
    card = host._replace(name="GPU0", kind="gpu", free=card_free, total=card_free)
    monkeypatch.setattr(module, "choose", lambda library, device: card if device == "auto" else host)
    monkeypatch.setattr(module, "devices", lambda library: [card, host._replace(free=host_free, total=host_free)])
    monkeypatch.setattr(module.Executor, "load", lambda *_: pytest.fail("weights were read"))


def test_no_layers_on_the_device_is_all_on_the_cpu(tmp_path, capsys, monkeypatch):
    path = make_tiny_gguf(tmp_path / "tiny.gguf")
    small_devices(monkeypatch, 1 << 40, 100_000)
    assert gguf_main(["run", "--model", str(path), "--prompt", "say", "--n-gpu-layers", "0"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: CPU has 100.00 kB free, expected ") and err.count("\n") == 1
    whole = forecast(open_gguf(path), True, None)(256).need().weights
    assert f"weights {human_bytes(whole)}" in err and "--n-gpu-layers" not in err


def test_the_cpus_side_of_a_split_counts(tmp_path, capsys, monkeypatch):
    path = make_tiny_gguf(tmp_path / "tiny.gguf")
    plan = forecast(open_gguf(path), False, None)(256)
    layers = plan.n_layers
    whole, one = plan.need(), plan.host_need(layers - 1)
    assert plan.host_need(layers) == Need(0, 0, 0)
    for n in range(layers):  # what is not on one side is on the other
        assert plan.need(n).weights + plan.host_need(n).weights == whole.weights
        assert plan.need(n).prefix + plan.host_need(n).prefix == whole.prefix
    small_devices(monkeypatch, 1 << 40, one.total)
    arguments = ["run", "--model", str(path), "--prompt", "say", "--max-tokens", "16", "--n-gpu-layers"]
    assert gguf_main([*arguments, "1"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: CPU has {human_bytes(one.total)} free, expected ") and err.count("\n") == 1
    assert f"the {layers - 1} layers that GPU0 does not take" in err
    assert f"--n-gpu-layers {layers - 1} would fit" in err
    with pytest.raises(pytest.fail.Exception, match="weights were read"):
        gguf_main([*arguments, str(layers - 1)])


def test_a_runner_sets_aside_what_it_will_need(tmp_path):
    path = make_tiny_gguf(tmp_path / "tiny.gguf")
    assert Runner(path, "CPU").make_cache().room == 256
    runner = Runner(path, "CPU", context=1000)
    assert runner.make_cache().room == 1024
    tokens = np.full((1, 900), 107)
    cache = runner.make_cache()
    state = cache.state
    runner.prefill(tokens, cache)
    assert cache.state is state  # nothing was copied to grow
