"""GPTQ's file: what is collected, what a conversion does with it, and what is refused."""

import json

import mlx.core as mx
import numpy as np
import pytest

import mlx_dgemma
from convert import convert, correlations
from convert import factors as factors_module
from convert.api import _without_gptq
from convert.calibrate import ROLES, collect, model_identity
from convert.checkpoint import find_source, open_checkpoint
from convert.cli import main
from convert.correlations import check_room, collect_factors, listened_to, memory, products
from convert.examples import Example
from convert.factors import Factors, packed, unpacked, write_factors
from convert.gptq import factor, with_others
from convert.identity import identity_of
from convert.imatrix import write_imatrix
from convert.work import do
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.reader import read_gguf
from mlx_dgemma.gguf.types import FLOATS
from mlx_dgemma.shards import read_header, stored_tensors
from mlx_dgemma.tensors import QUANTIZED_ROLES, text_tensors
from tests.test_gptq import weights
from tests.test_resume import contents, interrupted, resumed
from tests.tiny import make_tiny_checkpoint

EXAMPLES = [
    Example(({"role": "user", "content": "rain"},), "and then the sea"),
    Example(({"role": "user", "content": "the road"},), "the rain and the road on the sea"),
]
DEMO = "demo/checkpoint"


# The file


def test_triangles_are_packed(tmp_path):
    found = np.triu(weights(5, 5))
    assert packed(found).shape == (15,) and np.array_equal(unpacked(packed(found), 5), found)


def test_threads_may_share_a_file(tmp_path, tiny_model, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(factors_module, "KEPT", 2)
    down = next(t for t in text_tensors(tiny_model[0].config) if t.gguf_part == "ffn_down_exps")
    experts, row = down.shape[0], down.shape[-1]
    made = [np.triu(abs(weights(row, row, seed))) for seed in range(experts)]
    write_factors(tmp_path / "f", {down.gguf: (experts, row)}, made, {"model": "m"})
    found, read = Factors(tmp_path / "f").of(down)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(read, list(range(experts)) * 3))
    assert found == experts
    assert all(np.array_equal(r, made[i % experts]) for i, r in enumerate(results))


# What is collected


def test_products_are_summed_per_expert():
    x = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    assert np.allclose(products(mx.array(x)[None], None, 1), (x.T @ x)[None], atol=1e-5)
    found = np.array(products(mx.array(x)[:, None], mx.array([0, 0, 2, 2, 2, 3]), 5))
    for expert, rows in enumerate([x[:2], x[:0], x[2:5], x[5:], x[:0]]):
        assert np.allclose(found[expert], rows.T @ rows, atol=1e-5)
    assert np.allclose(products(mx.array(x)[:, None], mx.array([0, 0, 2, 2, 2, 3]), 1), (x.T @ x)[None], atol=1e-5)
    assert products(mx.ones((1000, 2), mx.bfloat16), None, 1).tolist() == [[[1000, 1000]] * 2]


@pytest.fixture(scope="module")
def collected(tiny_model, tmp_path_factory):
    """The file, and the products it was made from."""
    path, seen = tmp_path_factory.mktemp("gptq") / "gptq.safetensors", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(correlations, "with_others", lambda found: seen.append(found) or with_others(found))
        collect_factors(*tiny_model, EXAMPLES, path, seed=5)
    return path, dict(zip(listened_to(tiny_model[0]), seen, strict=True))


def test_squares_are_the_importance_matrix(tiny_model, collected):
    """Which has its own slow twin."""
    imatrix = collect(*tiny_model, EXAMPLES, seed=5)
    listened = {t.gguf: found for t, found in collected[1].items()}
    for t in (t for t in text_tensors(tiny_model[0].config) if t.role in ROLES):
        sums = imatrix.entries[t.gguf].sums
        diagonal = np.diagonal(listened[factors_module.entry_of(t)], axis1=1, axis2=2)
        # What enters the experts is kept for all of them; only keys and values of the encoder's last layer are used.
        wanted = sums.sum(axis=0, keepdims=True) if t.gguf_part == "ffn_gate_up_exps" else sums
        if not (t.layer == 5 and t.gguf_part == "attn_q"):
            assert diagonal == pytest.approx(wanted, rel=1e-4, abs=1e-5 * float(wanted.max())), t.gguf


def test_a_file_has_a_factor_for_every_input(tiny_model, collected):
    opened = Factors(collected[0])
    config = tiny_model[0].config
    for t in text_tensors(config):
        found = opened.of(t)
        assert (found is not None) == (t.role in QUANTIZED_ROLES), t.gguf
        if found:
            experts, read = found
            assert experts == (config.num_experts if t.gguf_part == "ffn_down_exps" else 1)
            wanted = factor(
                with_others(collected[1][next(k for k in collected[1] if k.gguf == factors_module.entry_of(t))])[-1]
            )
            assert np.array_equal(read(experts - 1), wanted)
    assert opened.model == model_identity(tiny_model[0])


def test_inputs_that_overflow_are_refused(tiny, tmp_path):
    model, tokenizer = mlx_dgemma.load(tiny)
    norm = model.model.decoder.layers[4].pre_feedforward_layernorm
    norm.weight = norm.weight * 1e30
    with pytest.raises(DgemmaError, match=r"^blk.4.ffn_gate.weight: its inputs are not finite"):
        collect_factors(model, tokenizer, EXAMPLES[:1], tmp_path / "f")


def test_what_does_not_fit_is_refused_before_it_begins(tiny_model, tmp_path, monkeypatch):
    experts = listened_to(tiny_model[0])
    with pytest.raises(DgemmaError, match=r"are left beside the model, expected .* `--roles expert` takes"):
        check_room(experts, tmp_path / "f", mx.get_active_memory() + 100_000)
    monkeypatch.setattr("convert.output._free_bytes", lambda out: 100_000)
    with pytest.raises(DgemmaError, match="the disk is full"):
        collect_factors(*tiny_model, EXAMPLES, tmp_path / "f")


def test_the_26bs_figures():
    """As --help and the documentation give them."""
    from convert.fit import RELEASED
    from mlx_dgemma.config import parse_config, read_json

    class Released:
        config = parse_config(read_json(RELEASED))

    sizes = [memory(listened_to(Released, roles)) for roles in (QUANTIZED_ROLES, ("expert",))]
    assert [round(n / 1e9, 1) for n in sizes] == [17.2, 8.8]


def test_memory_holds_the_sums_once(tiny_model, tmp_path, monkeypatch):
    """And besides them the products of one pass of one tensor."""
    sums, seen = sum(n * t.shape[-1] ** 2 * 4 for t, n in listened_to(tiny_model[0]).items()), []
    finite, before = mx.isfinite, mx.get_active_memory()

    def watched(squares):
        seen.append(mx.get_active_memory())
        return finite(squares)

    monkeypatch.setattr(correlations.mx, "isfinite", watched)
    collect_factors(*tiny_model, EXAMPLES, tmp_path / "f")
    assert max(seen) - before < 1.6 * sums + 1_000_000


def test_a_file_that_holds_no_numbers_is_refused(tiny, tmp_path, collected):
    path, data = tmp_path / "f", bytearray(collected[0].read_bytes())
    entry = read_header(collected[0])["blk.2.attn_k.weight"]
    data[entry.start + 8 : entry.start + 12] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    for name, options in (("out", {"recipe": "q4"}), ("out.gguf", {"to": "gguf", "recipe": "Q4_0"})):
        with pytest.raises(DgemmaError, match=r"blk.2.attn_k.weight holds what is no factor"):
            convert(tiny, tmp_path / name, gptq=path, **options)


def test_a_file_that_changes_meanwhile_is_noticed(tiny, tmp_path, collected, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(collected[0].read_bytes())

    def work_and_change(*args):
        do(*args)
        path.write_bytes(path.read_bytes().replace(Factors(path).digest.encode(), b"1" * 64))

    monkeypatch.setattr("convert.api.do", work_and_change)
    with pytest.raises(DgemmaError, match="f: changed while it was used"):
        convert(tiny, tmp_path / "out", recipe="q4", gptq=path)


def test_the_digest_is_the_contents(collected, tiny_model, tmp_path):
    collect_factors(*tiny_model, EXAMPLES, tmp_path / "same", seed=5)
    collect_factors(*tiny_model, EXAMPLES, tmp_path / "other", seed=6)
    digests = [Factors(path).digest for path in (collected[0], tmp_path / "same", tmp_path / "other")]
    assert digests[0] == digests[1] != digests[2] and len(digests[0]) == 64


def test_with_low_disk_nobody_knows_the_model_and_a_note_says_so(tiny, collected):
    plan = convert(tiny, recipe="q4", dry_run=True).plan
    assert "nobody checks" not in " ".join(_without_gptq(plan, Factors(collected[0]), False))
    assert "nobody checks that" in " ".join(_without_gptq(plan, Factors(collected[0]), True))


# Which model


def test_a_model_is_the_same_whatever_it_is_quantized_to(tiny, tmp_path):
    convert(tiny, tmp_path / "q4", recipe="q4")
    convert(tiny, tmp_path / "x.gguf", to="gguf", recipe="Q8_0")
    known = identity_of(open_checkpoint(find_source(tiny)))
    assert identity_of(open_checkpoint(tmp_path / "x.gguf")) == known
    for path in (tiny, tmp_path / "q4", tmp_path / "x.gguf"):
        assert model_identity(mlx_dgemma.load(path)[0]) == known
    other = make_tiny_checkpoint(tmp_path / "other", seed=1)
    assert identity_of(open_checkpoint(find_source(other))) != known


# A conversion


def arrays(folder):
    """Name → its stored bytes."""
    return {
        name: (t.dtype, t.shape, t.file.read_bytes()[t.start : t.start + t.nbytes])
        for name, t in stored_tensors(folder).items()
    }


def test_a_folder_is_as_large_and_what_nobody_listened_to_is_fitted(tiny, tmp_path, collected):
    fitted = convert(tiny, tmp_path / "fitted", recipe="q4", refit=True)
    report = convert(tiny, tmp_path / "gptq", recipe="q4", gptq=collected[0], verify=True)
    assert report.plan == fitted.plan
    before, after = arrays(tmp_path / "fitted"), arrays(tmp_path / "gptq")
    assert {n: a[:2] for n, a in before.items()} == {n: a[:2] for n, a in after.items()}
    changed = {n.rsplit(".", 1)[0] for n in before if before[n] != after[n]}
    listened = {t.module for t in report.plan.tensors if t.tensor.role in QUANTIZED_ROLES}
    assert changed == listened
    assert (tmp_path / "fitted/config.json").read_bytes() == (tmp_path / "gptq/config.json").read_bytes()
    mlx_dgemma.load(tmp_path / "gptq")


@pytest.mark.parametrize("roles", [("expert",), ("attention", "self_conditioning")])
def test_only_some_roles(tiny, tiny_model, tmp_path, roles):
    collect_factors(*tiny_model, EXAMPLES[:1], tmp_path / "f", roles=roles)
    report = convert(tiny, tmp_path / "gptq", recipe="q4", gptq=tmp_path / "f")
    convert(tiny, tmp_path / "fitted", recipe="q4", refit=True)
    before, after = arrays(tmp_path / "fitted"), arrays(tmp_path / "gptq")
    changed = {n.rsplit(".", 1)[0] for n in before if before[n] != after[n]}
    assert changed == {t.module for t in report.plan.tensors if t.tensor.role in roles}


def test_an_interrupted_run_goes_on(tiny, tmp_path, monkeypatch, collected):
    from tests.test_resume import convert as module

    monkeypatch.setattr(module.work, "SYNC_BYTES", 0)
    options = {"recipe": "q4", "gptq": collected[0]}
    interrupted(monkeypatch, 60, tiny, tmp_path / "out", **options)
    with pytest.raises(DgemmaError, match="of an interrupted conversion with another recipe"):
        convert(tiny, tmp_path / "out", recipe="q4", refit=True)
    assert resumed(tiny, tmp_path / "out", **options)[0].tensors > 0
    convert(tiny, tmp_path / "want", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


def test_other_precisions_stay_and_say_so(tiny, tmp_path, collected):
    mixed = tmp_path / "mixed.json"
    mixed.write_text(json.dumps({"name": "mixed", "roles": {"expert": "mxfp4", "attention": "q4"}}))
    report = convert(tiny, tmp_path / "gptq", recipe=mixed, gptq=collected[0])
    assert "leaves 12 quantized ones alone (blk.0.ffn_gate_up_exps.weight in mxfp4, …)" in " ".join(report.notes)
    convert(tiny, tmp_path / "plain", recipe=mixed)
    before, after = arrays(tmp_path / "plain"), arrays(tmp_path / "gptq")
    assert (
        before["model.decoder.layers.0.experts.gate_up_proj.weight"]
        == after["model.decoder.layers.0.experts.gate_up_proj.weight"]
    )


@pytest.mark.parametrize("with_importance", [False, True])
def test_a_gguf_is_as_large_and_what_nobody_listened_to_stays(tiny, tiny_model, tmp_path, collected, with_importance):
    options = {"to": "gguf", "recipe": "Q4_0"}
    if with_importance:
        write_imatrix(collect(*tiny_model, EXAMPLES, seed=5)._replace(datasets=("x",)), tmp_path / "i.gguf")
        options["imatrix"] = tmp_path / "i.gguf"
    plain = convert(tiny, tmp_path / "plain.gguf", **options)
    report = convert(tiny, tmp_path / "gptq.gguf", **options, gptq=collected[0], verify=True)
    assert report.plan == plain.plan
    before, after = (read_gguf(tmp_path / f"{name}.gguf") for name in ("plain", "gptq"))
    assert before.metadata == after.metadata
    changed = {n for n in before.tensors if not np.array_equal(before.rows(n), after.rows(n))}
    listened = {
        t.tensor.gguf for t in report.plan.tensors if t.type.name not in FLOATS and t.tensor.shape[-1] > t.type.block
    }
    assert changed == listened and len(changed) > 30
    mlx_dgemma.load(tmp_path / "gptq.gguf")


def test_an_interrupted_gguf_goes_on(tiny, tmp_path, monkeypatch, collected):
    from tests.test_resume import convert as module

    monkeypatch.setattr(module.work, "SYNC_BYTES", 0)
    options = {"to": "gguf", "recipe": "Q4_0", "gptq": collected[0]}
    interrupted(monkeypatch, 60, tiny, tmp_path / "out.gguf", **options)
    assert resumed(tiny, tmp_path / "out.gguf", **options)[0].tensors > 0
    convert(tiny, tmp_path / "want.gguf", **options)
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "want.gguf").read_bytes()


# Bad input


def test_what_is_refused(tiny, tmp_path, collected, capsys):
    def refused(message, *args, **options):
        with pytest.raises(DgemmaError, match=message):
            convert(*args, **{"gptq": collected[0]} | options)
        assert not (tmp_path / "out").exists()

    refused("--gptq rounds q2 to q8, and recipe bf16 has none of it", tiny, tmp_path / "out", recipe="bf16")
    refused("--gptq rounds q2 to q8, and recipe none has none of it", tiny, tmp_path / "out", recipe=_recipe(tmp_path))
    refused("--gptq rounds what ggml quantizes", tiny, tmp_path / "out", to="gguf", recipe="BF16")
    refused("nowhere: is no file", tiny, tmp_path / "out", gptq=tmp_path / "nowhere")
    (tmp_path / "text").write_text("no weights at all, and long enough")
    refused(
        "text: is no whole safetensors file, expected what",
        tiny,
        tmp_path / "out",
        gptq=tmp_path / "text",
    )
    refused("format is 'pt', expected 'dgemma-gptq 1'", tiny, tmp_path / "out", gptq=tiny / "model.safetensors")
    other = make_tiny_checkpoint(tmp_path / "other", seed=1)
    refused("was measured on another model .* `python -m convert gptq`", other, tmp_path / "out")
    refused("belongs to another model", DEMO, tmp_path / "out")


def _recipe(tmp_path):
    path = tmp_path / "none.json"
    roles = dict.fromkeys(("embedding", "attention", "dense", "router", "expert", "self_conditioning"), "nvfp4")
    path.write_text(json.dumps({"name": "none", "roles": roles}))
    return path


def test_an_entry_of_another_size_is_named(tmp_path, tiny_model, tiny):
    tensor = next(t for t in text_tensors(tiny_model[0].config) if t.gguf_part == "attn_k")
    write_factors(tmp_path / "f", {tensor.gguf: (1, 3)}, [np.eye(3)], {"model": model_identity(tiny_model[0])})
    with pytest.raises(DgemmaError, match=r"blk.0.attn_k.weight is F32 \(1, 6\), expected F32 \(1, \d+\)"):
        convert(tiny, tmp_path / "out", recipe="q4", gptq=tmp_path / "f")


# The command


def test_the_command_writes_what_convert_reads(tiny, tmp_path, capsys):
    data = tmp_path / "x.jsonl"
    data.write_text('{"prompt": "rain", "answer": "sea"}\n{"prompt": "road", "answer": "and sand"}\n')
    command = ["gptq", str(tiny), "--data", str(data), "--out", str(tmp_path / "g"), "--examples", "1"]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["out"], report["canvases"]) == (str(tmp_path / "g"), 10)
    assert report["bytes"] == (tmp_path / "g").stat().st_size
    assert main([str(tiny), str(tmp_path / "out"), "--gptq", str(tmp_path / "g")]) == 0
    capsys.readouterr()
    assert main(command) == 1
    assert "already exists" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*command[:-1], "0"])
    data.write_text("{")
    assert main(["gptq", str(tiny), "--data", str(data), "--out", str(tmp_path / "h"), "--roles", "expert"]) == 1
    assert "not JSON" in capsys.readouterr().err and not (tmp_path / "h").exists()
