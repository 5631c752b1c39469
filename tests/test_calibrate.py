"""The collected importance matrix against a slow twin, and the command that collects it."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_dgemma
from convert import convert
from convert.calibrate import collect, squared_inputs, tapped
from convert.examples import Example, corrupt, passages, read_examples, temperature_at
from convert.imatrix import read_imatrix
from convert.imatrix_cli import main
from mlx_dgemma.errors import ContextError, DgemmaError
from mlx_dgemma.masks import canvas_mask, encoder_mask
from mlx_dgemma.noise import NoiseStream
from mlx_dgemma.tensors import text_tensors

ROOT = Path(__file__).parent.parent
EOS, TURN_END = 1, 106
SHORT = Example(({"role": "user", "content": "rain"},), "and then the sea")
LONG = Example(({"role": "user", "content": "the road"},), "the rain and the road on the sea")


# By eye


def test_squares_are_summed_per_channel_and_expert():
    x = mx.array([[1.0, 2.0], [3.0, 4.0], [0.0, -1.0]])
    sums = squared_inputs(x[None], None, 1)
    assert sums.squares.tolist() == [[10, 21]] and sums.rows.tolist() == [3]
    sums = squared_inputs(x[:, None], mx.array([0, 2, 2]), 3)
    assert sums.squares.tolist() == [[1, 4], [0, 0], [9, 17]] and sums.rows.tolist() == [1, 0, 2]


def test_bfloat16_inputs_are_summed_in_float32():
    sums = squared_inputs(mx.ones((1000, 2), mx.bfloat16), None, 1)
    assert sums.squares.dtype == mx.float32 and sums.squares.tolist() == [[1000, 1000]]


def test_an_answer_becomes_whole_canvases(tiny_model):
    tokenizer = tiny_model[1]
    passage, longer = passages([SHORT, LONG], tokenizer, 16)
    assert passage.prompt.tolist() == tokenizer.chat(list(SHORT.messages))
    tokens = [*tokenizer.encode(SHORT.answer), TURN_END]
    assert passage.canvases.tolist() == [tokens + [EOS] * (16 - len(tokens))]
    assert longer.canvases.shape == (2, 16) and longer.canvases.ravel().tolist().count(TURN_END) == 1


def test_plain_text_is_cut_into_passages(tiny_model):
    tokenizer = tiny_model[1]
    tokens = tokenizer.encode("the sea and " * 12)
    found = list(passages([Example((), "the sea and " * 12)], tokenizer, 8))
    assert len(tokens) > 4 * 8
    assert found[0].canvases.ravel().tolist() == tokens[:32]
    assert found[0].prompt.tolist() == [2]
    assert np.concatenate([p.canvases.ravel() for p in found]).tolist() == tokens + [EOS] * (-len(tokens) % 8)


def test_noise_comes_with_its_share():
    clean, stream = np.zeros((1, 400), np.int32), NoiseStream(0)
    for t in (0, 0.1, 0.5, 0.9, 1):
        canvas, noisy = corrupt(clean, t, stream, [3], 0, 1000)
        assert abs(noisy.mean() - t) < 0.06 and not canvas[~noisy].any()
        assert (canvas[noisy] != 0).sum() >= 0.98 * noisy.sum()  # a random token may be the right one
    different = [(0, 3, 0), (1, 3, 0), (0, 4, 0), (0, 3, 1)]
    drawn = {corrupt(clean, 0.5, NoiseStream(seed), [row], block, 1000)[0].tobytes() for seed, row, block in different}
    assert len(drawn) == len(different)


def test_temperature_falls_with_the_noise(tiny_model):
    settings = tiny_model[0].generation_config
    assert [temperature_at(t, settings) for t in (0, 0.5, 1)] == pytest.approx([0.4, 0.6, 0.8])


# Against a slow twin


class Twin:
    """Layer 0 and self-conditioning once more: numpy and loops where the collector has taps."""

    def __init__(self, model):
        self.model, self.sums, self.counts = model, {}, {}
        self.decoder = model.model.decoder
        self.table = np.array(self.decoder.embed_tokens.weight, np.float64) * model.config.hidden_size**0.5

    def add(self, name, x, expert=0, experts=1):
        x = np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1])
        sums = self.sums.setdefault(name, np.zeros((experts, x.shape[-1])))
        sums[expert] += (x * x).sum(axis=0)
        self.counts.setdefault(name, np.zeros(experts))[expert] += len(x)

    def layer(self, x, cache, mask):
        """What the matrices of layer 0 see for x (T, H), whose attention reads the prefix in `cache`."""
        layer = self.decoder.layers[0]
        normed = rms(x) * np.array(layer.input_layernorm.weight)
        self.add("attn_q", normed)
        length = cache.length
        attended = layer.self_attn(mx.array(normed[None], mx.float32), cache.layers[0], length, mask, False)
        x = x + rms(np.array(attended[0])) * np.array(layer.post_attention_layernorm.weight)
        self.add("ffn_gate", rms(x) * np.array(layer.pre_feedforward_layernorm.weight))
        entered = rms(x) * np.array(layer.pre_feedforward_layernorm_2.weight)
        chosen = np.array(layer.router(mx.array(x, mx.float32))[0])
        gate_up = np.array(layer.experts.gate_up_proj.weight, np.float64)
        for token, experts in enumerate(chosen):
            for expert in experts:
                self.add("ffn_gate_up_exps", entered[token], expert, len(gate_up))
                gate, up = np.split(gate_up[expert] @ entered[token], 2)
                self.add("ffn_down_exps", gelu(gate) * up, expert, len(gate_up))

    def encode(self, tokens, cache):
        """Causal; the prefix then grows by `tokens`."""
        indices = mx.arange(cache.length, cache.length + len(tokens))
        stored = len(cache.layers[0])
        keys = mx.arange(cache.length - stored, cache.length + len(tokens))
        self.layer(self.table[tokens], cache, encoder_mask(indices, keys, self.model.config.sliding_window))
        self.model.encode(mx.array(tokens[None]), cache)

    def denoise(self, canvas, cache, temperature):
        mask = canvas_mask(mx.arange(len(canvas)))
        condition = self.decoder.self_conditioning
        embedded = self.table[canvas]
        self.add("self_cond_gate", np.zeros_like(embedded))
        self.add("self_cond_down", np.zeros((len(canvas), self.model.config.intermediate_size)))
        self.layer(rms(embedded), cache, mask)
        logits = np.array(self.model.denoise(mx.array(canvas[None]), cache)[0], np.float64) / temperature
        p = np.exp(logits - logits.max(axis=-1, keepdims=True))
        soft = p / p.sum(axis=-1, keepdims=True) @ self.table
        entered = rms(soft) * np.array(condition.pre_norm.weight)
        gate, up, down = (np.array(getattr(condition, f"{n}_proj").weight, np.float64) for n in ("gate", "up", "down"))
        inner = gelu(entered @ gate.T) * (entered @ up.T)
        self.add("self_cond_gate", entered)
        self.add("self_cond_down", inner)
        self.layer(rms(embedded + inner @ down.T), cache, mask)


def rms(x):
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.fixture(scope="module")
def collected(tiny_model):
    events = []
    return collect(*tiny_model, [SHORT, LONG], ts=(0.3, 0.8), seed=5, on_event=events.append), events


def test_sums_are_the_twins(tiny_model, collected):
    model, tokenizer = tiny_model
    twin, stream = Twin(model), NoiseStream(5)
    for row, passage in enumerate(passages([SHORT, LONG], tokenizer, 16)):
        cache = model.make_cache()
        twin.encode(passage.prompt, cache)
        for block, clean in enumerate(passage.canvases):
            for t in (0.3, 0.8):
                canvas, _ = corrupt(clean[None], t, stream, [row], block, 384)
                twin.denoise(canvas[0], cache, temperature_at(t, model.generation_config))
            twin.encode(clean, cache)
    entries = collected[0].entries
    for part in twin.sums:
        name = part + ".weight" if part.startswith("self_cond") else f"blk.0.{part}.weight"
        assert entries[name].counts.tolist() == twin.counts[part].tolist(), name
        distance = np.abs(entries[name].sums - twin.sums[part]).max() / twin.sums[part].max()
        assert distance < 1e-5, f"{name}: {distance:.1e}"
    assert len(twin.sums) == 6


def test_every_quantized_matrix_is_there(tiny_model, collected):
    imatrix, events = collected
    prefix = sum(len(p.prompt) + p.canvases.size for p in passages([SHORT, LONG], tiny_model[1], 16))
    canvas = 16 * imatrix.chunks
    assert (imatrix.chunks, imatrix.chunk_size) == (3 * 2 * 2, 16)
    assert [event.done for event in events] == [1, 2] and events[0].total == 2
    for name, entry in imatrix.entries.items():
        # Of the encoder's last layer only keys and values are used.
        decoder_only = name.startswith("self_cond") or (name.startswith("blk.5.") and "attn_k" not in name)
        per_token = 2 if "exps" in name else 1  # experts chosen
        assert entry.counts.sum() == per_token * (canvas if decoder_only else prefix + canvas), name
        assert np.isfinite(entry.sums).all() and (entry.sums >= 0).all()
    for names in (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up")):  # one input, several matrices
        first, *others = (imatrix.entries[f"blk.2.{name}.weight"].sums for name in names)
        assert all((first == other).all() for other in others)


def test_the_seed_chooses_the_noise(tiny_model, collected):
    def sums(seed):
        entries = collect(*tiny_model, [SHORT, LONG], ts=(0.3, 0.8), seed=seed).entries
        return entries["blk.3.ffn_down.weight"].sums

    want = collected[0].entries["blk.3.ffn_down.weight"].sums
    assert (sums(5) == want).all() and (sums(6) != want).any()


def test_a_tapped_model_computes_the_same(tiny_model):
    model, _ = tiny_model
    canvas = mx.array([[5, 6, 7, 8]])
    want = model.denoise(canvas, model.make_cache())
    matrix = model.model.decoder.layers[1].mlp.up_proj
    (tensor,) = (t for t in text_tensors(model.config) if t.layer == 1 and t.gguf_part == "ffn_up")
    with pytest.raises(KeyboardInterrupt), tapped(model, {tensor: lambda x, experts: None}):
        assert model.model.decoder.layers[1].mlp.up_proj is not matrix
        assert (model.denoise(canvas, model.make_cache()) == want).all()
        raise KeyboardInterrupt
    assert model.model.decoder.layers[1].mlp.up_proj is matrix
    assert (model.denoise(canvas, model.make_cache()) == want).all()


def test_a_quantized_copy_gives_nearly_the_same(tiny, tmp_path, collected):
    convert(tiny, tmp_path / "q8", recipe="q8")
    entries = collect(*mlx_dgemma.load(tmp_path / "q8"), [SHORT, LONG], ts=(0.3, 0.8), seed=5).entries
    assert list(entries) == list(collected[0].entries)
    for name, want in collected[0].entries.items():
        if "exps" not in name:  # a token near a boundary may go to another expert
            assert entries[name].sums == pytest.approx(want.sums, rel=0.2, abs=0.02 * float(want.sums.max())), name
            assert entries[name].counts.tolist() == want.counts.tolist()


def test_inputs_that_overflow_are_refused(tiny):
    model, tokenizer = mlx_dgemma.load(tiny)
    norm = model.model.decoder.layers[4].pre_feedforward_layernorm
    norm.weight = norm.weight * 1e30
    with pytest.raises(DgemmaError, match=r"^blk.4.ffn_gate.weight: its inputs are not finite, .* load .* float32"):
        collect(model, tokenizer, [SHORT], ts=(0.5,))


def test_what_does_not_fit_the_context_is_named(tiny_model):
    huge = Example(({"role": "user", "content": "the " * 5000},), "sea")
    with pytest.raises(
        ContextError, match=r"^example 3 has \d+ tokens, the model's context is 4096; shorten or remove"
    ):
        collect(*tiny_model, [SHORT, LONG, huge], ts=())


# Data files


def lines(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_data_files_are_read(tmp_path):
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    file = lines(tmp_path / "x.jsonl", {"prompt": "p", "answer": "ü\u2028"}, "", {"messages": turns}, "")
    assert read_examples(file) == [
        Example(({"role": "user", "content": "p"},), "ü\u2028"),
        Example(tuple(turns[:2]), "a"),
    ]
    assert read_examples(lines(tmp_path / "x.txt", "one", "two")) == [Example((), "one\ntwo")]


# fmt: off
WRONG_LINES = [
    ("{", "line 2: not JSON"),
    ("[" * 100_000, "line 2: not JSON"),
    ("3", "line 2: found '3', expected"),
    ({"prompt": "p"}, "line 2: found .* correct the line"),
    ({"prompt": "p", "answer": None}, "line 2: found"),
    ({"messages": []}, "line 2: found"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "line 2: found"),
    ({"messages": [{"role": "user", "content": "u"}]}, "that ends with the assistant's"),
    ({"messages": ["u", {"role": "assistant", "content": "a"}]}, "line 2: found"),
]
# fmt: on


@pytest.mark.parametrize(("line", "message"), WRONG_LINES)
def test_a_wrong_line_is_named(tmp_path, line, message):
    with pytest.raises(DgemmaError, match=message) as error:
        read_examples(lines(tmp_path / "x.jsonl", {"prompt": "p", "answer": "a"}, line))
    assert str(error.value).startswith(f"{tmp_path / 'x.jsonl'}, line 2: ") and len(str(error.value)) < 400


def test_a_wrong_file_is_named(tmp_path):
    with pytest.raises(DgemmaError, match="x.txt: cannot be read"):
        read_examples(tmp_path / "x.txt")
    with pytest.raises(DgemmaError, match="x.txt: is empty, expected text, or lines"):
        read_examples(lines(tmp_path / "x.txt", " \n"))
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DgemmaError, match="x.txt: not UTF-8 text"):
        read_examples(tmp_path / "x.txt")


# The command


def test_the_command_writes_what_convert_reads(tiny, tmp_path, capsys):
    data = lines(tmp_path / "x.jsonl", {"prompt": "rain", "answer": "sea"}, {"prompt": "road", "answer": "and sand"})
    out = tmp_path / "i.gguf"
    assert main([str(tiny), "--data", str(data), "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["out"], report["examples"], report["canvases"]) == (str(out), 2, 20)
    imatrix = read_imatrix(out)
    assert (imatrix.datasets, imatrix.chunks, report["matrices"]) == (("x.jsonl",), 20, len(imatrix.entries))
    plan = convert(tiny, to="gguf", recipe="Q4_K_M", imatrix=out, dry_run=True)
    assert not [note for note in plan.notes if "importance" in note]
    assert sorted(tmp_path.iterdir()) == [out, data]


def test_the_command_says_which_experts_saw_nothing(tiny, tmp_path, capsys):
    data = lines(tmp_path / "x.txt", "the sea " * 40)
    assert main([str(tiny), "--data", str(data), "--out", str(tmp_path / "i.gguf"), "--examples", "1"]) == 0
    unseen = sum((e.counts == 0).sum() for n, e in read_imatrix(tmp_path / "i.gguf").entries.items() if "gate_up" in n)
    out = capsys.readouterr().out
    assert "1 example, 40 canvases" in out
    assert (f"note: {unseen} of 48 experts saw no token" in out) == (unseen > 0)


def test_what_the_command_refuses_leaves_nothing(tiny, tmp_path, capsys):
    data, out = lines(tmp_path / "x.jsonl", "{"), tmp_path / "i.gguf"
    assert main([str(tiny), "--data", str(data), "--out", str(out)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {data}, line 1: not JSON")
    assert main(["no/such/folder", "--data", str(lines(data, {"prompt": "p", "answer": "a"})), "--out", str(out)]) == 1
    assert capsys.readouterr().err.startswith("error: no/such/folder")
    assert not out.exists()
    out.write_text("mine")
    assert main([str(tiny), "--data", str(data), "--out", str(out)]) == 1
    assert "already exists" in capsys.readouterr().err and out.read_text() == "mine"
    with pytest.raises(SystemExit, match="2"):
        main([str(tiny), "--data", str(data), "--out", str(out), "--examples", "0"])


def test_convert_dispatches_to_it():
    command = [sys.executable, "-m", "convert", "imatrix", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "python -m convert imatrix" in done.stdout and "JSON object per line" in done.stdout
