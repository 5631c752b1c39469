"""The importance matrix: its file, and that what is collected is what the matrices are multiplied with."""

import json

import gguf
import mlx.core as mx
import numpy as np
import pytest

import mlx_dgemma
from convert.calibrate import collect
from convert.cli import main
from convert.examples import Example, corrupt, read_examples
from convert.imatrix import Entry, Imatrix, read_imatrix, write_imatrix
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.moe import ExpertLinear
from mlx_dgemma.schedule import default_schedule
from mlx_dgemma.tensors import text_tensors
from tests.tiny_gguf import make_tiny_gguf


def entry(experts=1, row=4):
    return Entry(np.arange(experts * row, dtype=np.float32).reshape(experts, row), np.full(experts, 2, np.float32))


def test_mean_squares_by_hand(tmp_path):
    """Two inputs (1, 2) and (3, 0) of expert 0, none of expert 1."""
    entries = {"blk.0.ffn_down_exps.weight": Entry(np.float32([[10, 4], [0, 0]]), np.float32([2, 0]))}
    write_imatrix(Imatrix(tmp_path / "i.gguf", entries, ("a.txt",), 1, 16), tmp_path / "i.gguf")
    weights = read_imatrix(tmp_path / "i.gguf").weights("blk.0.ffn_down_exps.weight", 2, 2)
    assert weights.tolist() == [[5, 2], [1, 1]]  # an expert that saw nothing weighs all columns alike


def test_the_file_is_llama_cpps_form(tmp_path):
    imatrix = Imatrix(tmp_path / "i", {"blk.0.attn_q.weight": entry(), "x.weight": entry(3)}, ("a", "b"), 7, 64)
    write_imatrix(imatrix, tmp_path / "i")
    reader = gguf.GGUFReader(tmp_path / "i")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == ["a", "b"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (7, 64)
    shapes = {t.name: t.shape.tolist() for t in reader.tensors}
    assert shapes["blk.0.attn_q.weight.in_sum2"] == [4, 1]  # ggml's order
    assert shapes["x.weight.in_sum2"] == [4, 3]
    assert shapes["x.weight.counts"] == [1, 3]
    again = read_imatrix(tmp_path / "i")
    assert again.datasets == ("a", "b")
    assert all(np.array_equal(again.entries[n].sums, imatrix.entries[n].sums) for n in imatrix.entries)


def test_split_experts_serve_the_fused_tensor():
    imatrix = Imatrix("i", {"blk.1.ffn_up_exps.weight": entry(2)})
    assert imatrix.weights("blk.1.ffn_gate_up_exps.weight", 2, 4).shape == (2, 4)
    assert imatrix.weights("blk.2.ffn_gate_up_exps.weight", 2, 4) is None


def bad_file(tmp_path, entries):
    write_imatrix(Imatrix(tmp_path / "i", entries), tmp_path / "i")
    return tmp_path / "i"


@pytest.mark.parametrize("value", [np.nan, np.inf, -1])
def test_values_that_are_no_sums_are_refused(tmp_path, value):
    sums = np.float32([[1, value]])
    with pytest.raises(DgemmaError, match="x holds values that are no sums of squares; collect it again"):
        read_imatrix(bad_file(tmp_path, {"x": Entry(sums, np.float32([1]))}))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(DgemmaError, match="holds 'diffusion-gemma', expected an importance matrix"):
        read_imatrix(make_tiny_gguf(tmp_path / "m.gguf"))
    with pytest.raises(DgemmaError, match=r"holds no \.in_sum2 tensor"):
        read_imatrix(bad_file(tmp_path, {}))
    with pytest.raises(DgemmaError):
        read_imatrix(tmp_path / "absent")


# Collecting


def record_slowly(model, example, seed):
    """Every input of every matrix, kept as it comes by patched classes, and summed at the end."""
    seen = {}
    names = {}
    for t in text_tensors(model.config):
        module = model
        if not t.mlx.endswith(".weight"):
            continue
        for part in t.mlx.removesuffix(".weight").split("."):
            module = module[int(part)] if part.isdigit() else module[part]
        names[id(module)] = t.gguf
    linear, expert = mx_linear().__call__, ExpertLinear.__call__

    def patched(self, x, experts=None):
        if seen.get("on"):
            seen.setdefault(names[id(self)], []).append((np.array(x), None if experts is None else np.array(experts)))
        return linear(self, x) if experts is None else expert(self, x, experts)

    mx_linear().__call__ = patched
    ExpertLinear.__call__ = patched
    try:
        passes(model, example, seed, seen)
    finally:
        mx_linear().__call__ = linear
        ExpertLinear.__call__ = expert
    seen.pop("on")
    return seen


def mx_linear():
    import mlx.nn as nn

    return nn.Linear


def passes(model, example, seed, seen):
    """Prompt; per block noise at .5 (unrecorded, then conditioned on it), pure noise, and the clean block."""
    C, cache = model.config.canvas_length, model.make_cache()
    temperature = default_schedule(model.generation_config)(round(0.5 * model.generation_config.max_denoising_steps))
    seen["on"] = True
    model.encode(mx.array([example.prompt]), cache)
    for block in range(len(example.answer) // C):
        clean = np.array(example.answer[block * C : (block + 1) * C])
        half, pure = (mx.array(corrupt(clean, t, model.config.vocab_size, seed, 0, block))[None] for t in (0.5, 1.0))
        seen["on"] = False
        first = model.denoise(half, cache)
        seen["on"] = True
        model.denoise(half, cache, first / temperature)
        model.denoise(pure, cache)
        model.encode(mx.array(clean)[None], cache)


def test_sums_and_counts_are_those_of_a_slow_twin(tiny_model):
    model, _ = tiny_model
    draw = np.random.default_rng(0)
    example = Example(draw.integers(0, 384, 9).tolist(), draw.integers(0, 384, 32).tolist())
    found = collect(model, [example], seed=5, ts=(0.5,))
    want = record_slowly(model, example, seed=5)
    left_out = {t.gguf for t in text_tensors(model.config) if t.role in ("router", "embedding")}
    assert set(found) == {name for name in want if name not in left_out}
    for name, entry in found.items():
        sums, counts = np.zeros_like(entry.sums), np.zeros_like(entry.counts)
        for x, experts in want[name]:
            rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
            owners = np.zeros(len(rows), int) if experts is None else experts
            for row, owner in zip(rows, owners, strict=True):
                sums[owner] += row**2
                counts[owner] += 1
        assert np.array_equal(counts, entry.counts), name
        np.testing.assert_allclose(entry.sums, sums, rtol=1e-4, atol=1e-6, err_msg=name)
    rows = 9 + 2 * (16 + 16 + 16)  # prompt, and per block two canvases and the commit
    assert found["blk.0.attn_q.weight"].counts.tolist() == [rows]
    assert found["blk.0.ffn_down_exps.weight"].counts.sum() == 2 * rows  # two experts per token
    assert found["self_cond_gate.weight"].counts.tolist() == [2 * (16 + 16)]


def test_collecting_leaves_the_model_as_it_was(tiny_model):
    model, _ = tiny_model
    before = type(model.model.decoder.layers[0].self_attn.q_proj)
    logits = np.array(model.denoise(mx.zeros((1, 16), mx.int32), model.make_cache()))
    collect(model, [Example([2, 5], list(range(16)))], ts=(0.3,))
    assert type(model.model.decoder.layers[0].self_attn.q_proj) is before
    assert np.array_equal(np.array(model.denoise(mx.zeros((1, 16), mx.int32), model.make_cache())), logits)


# Examples


def test_noise_has_its_rate_and_its_seed():
    clean = np.zeros(20_000, int)
    assert abs((corrupt(clean, 0.3, 1000, 0) != 0).mean() - 0.3) < 0.01
    assert np.array_equal(corrupt(clean, 0.3, 1000, 0, 1), corrupt(clean, 0.3, 1000, 0, 1))
    assert not np.array_equal(corrupt(clean, 0.3, 1000, 0, 1), corrupt(clean, 0.3, 1000, 0, 2))
    assert (corrupt(clean, 1.0, 1000, 0) != 0).mean() > 0.99


def test_examples_from_both_forms(tiny_model, tmp_path):
    model, tokenizer = tiny_model
    lines = [
        {"prompt": "ab", "answer": "cd"},
        {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    a, b = read_examples(tmp_path / "x.jsonl", tokenizer, model.config, model.generation_config)
    assert a == b
    assert a.prompt == tokenizer.chat([{"role": "user", "content": "ab"}])
    turn_end = tokenizer.vocabulary.token_id("<turn|>")
    answer = [*tokenizer.encode("cd"), turn_end]
    assert a.answer == answer + [1] * (16 - len(answer))
    (tmp_path / "x.txt").write_text("ab cd " * 50)
    texts = read_examples(tmp_path / "x.txt", tokenizer, model.config, model.generation_config)
    assert all(e.prompt == [2] and len(e.answer) % 16 == 0 for e in texts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", "{", "x.jsonl:1: not valid JSON"),
        ("x.jsonl", '{"prompt": "a"}', 'x.jsonl:1: found .*, expected {"prompt"'),
        ("x.jsonl", "3", "x.jsonl:1: found '3', expected"),
        ("x.jsonl", "", "x.jsonl: holds no text, expected examples"),
        ("x.txt", "a", "x.txt: holds no text, expected examples"),
    ],
)
def test_wrong_data_is_named(tiny_model, tmp_path, name, content, message):
    model, tokenizer = tiny_model
    (tmp_path / name).write_text(content)
    with pytest.raises(DgemmaError, match=message):
        read_examples(tmp_path / name, tokenizer, model.config, model.generation_config)


def test_the_command(tiny, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "ab", "answer": "cd"}) + "\n")
    out, data = str(tmp_path / "i.gguf"), str(tmp_path / "x.jsonl")
    assert main(["imatrix", str(tiny), "--data", data, "--out", out, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["examples"], report["blocks"], report["tensors"]) == (1, 1, 56)
    assert main([str(tiny), str(tmp_path / "x.gguf"), "--recipe", "Q4_0", "--imatrix", out]) == 0
    assert main(["imatrix", str(tiny), "--data", data, "--out", out]) == 1
    assert "already exists" in capsys.readouterr().err
    assert main(["imatrix", str(tiny), "--data", str(tmp_path / "no"), "--out", out + "2"]) == 1
    assert "no such file" in capsys.readouterr().err
    assert main(["imatrix", "nowhere", "--data", data, "--out", out + "2"]) == 1
    assert not (tmp_path / "i.gguf2").exists()


def test_importance_of_the_model_that_loads_it(tiny):
    model, _ = mlx_dgemma.load(tiny)
    found = collect(model, [Example([2, 5], list(range(16)))], ts=(0.3,))
    imatrix = Imatrix("i", found)
    for t in text_tensors(model.config):
        if t.gguf in found:
            experts = t.shape[0] if len(t.shape) == 3 else 1
            assert imatrix.weights(t.gguf, experts, t.shape[-1]).shape == (experts, t.shape[-1])
