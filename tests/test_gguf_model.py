"""The text model in a GGUF: every tensor of the table once, with its values, or words for what is wrong."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.config import parse_config
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.model import open_gguf
from mlx_dgemma.tensors import text_tensors
from tests.tiny import from_bfloat16, tiny_config, tiny_weights, to_bfloat16
from tests.tiny_gguf import KINDS, A, make_tiny_gguf

CONFIG = parse_config(tiny_config())
TENSORS = {t.gguf: t for t in text_tensors(CONFIG)}
EXPERTS = TENSORS["blk.3.ffn_gate_up_exps.weight"]


@pytest.fixture(scope="module")
def weights():
    return tiny_weights(tiny_config())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return open_gguf(make_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf"))


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return open_gguf(make_tiny_gguf(tmp_path_factory.mktemp("split") / "tiny.gguf", type="Q8_0", split_experts=True))


def test_every_weight_comes_back(model, weights):
    assert model.config == CONFIG
    assert set(model.parts) == set(TENSORS)
    for t in TENSORS.values():
        assert np.array_equal(model.rows(t), weights[t.hf].reshape(-1, t.shape[-1])), t.gguf
        assert [kind.name for kind in model.types(t)] == ["F32"]


def test_a_slice_of_rows_is_that_slice(model, weights):
    rows = weights[EXPERTS.hf].reshape(-1, 64)
    assert np.array_equal(model.rows(EXPERTS, 100, 300), rows[100:300])
    assert np.array_equal(model.rows(EXPERTS, 1000), rows[1000:])
    assert model.rows(EXPERTS, 5, 5).shape == (0, 64)


@pytest.mark.parametrize("type", ["BF16", "F16", "Q8_0", "Q4_0"])
def test_quantized_weights_are_ggmls(tmp_path, weights, type):
    model = open_gguf(make_tiny_gguf(tmp_path / "tiny.gguf", type=type))
    kind = gguf.GGMLQuantizationType[type]
    for name in ("token_embd.weight", "blk.0.attn_v.weight", "blk.5.ffn_down_exps.weight", "self_cond_down.weight"):
        t = TENSORS[name]
        want = gguf.dequantize(gguf.quantize(weights[t.hf], kind), kind).reshape(-1, t.shape[-1])
        assert np.array_equal(model.rows(t), want), name
        assert [found.name for found in model.types(t)] == [type]
    assert model.quantized == (type in ("Q8_0", "Q4_0"))


@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 1), (60, 70), (120, 200), (1000, 1024), (7, 7)])
def test_experts_stored_apart_read_as_the_fused_tensor(split, weights, start, stop):
    want = gguf.quantize(weights[EXPERTS.hf], gguf.GGMLQuantizationType.Q8_0)
    want = gguf.dequantize(want, gguf.GGMLQuantizationType.Q8_0).reshape(-1, 64)
    assert split.parts[EXPERTS.gguf] == ("blk.3.ffn_gate_exps.weight", "blk.3.ffn_up_exps.weight")
    assert [t.name for t in split.types(EXPERTS)] == ["Q8_0", "Q8_0"]
    assert np.array_equal(split.rows(EXPERTS, start, stop), want[start:stop])


@pytest.mark.parametrize(("dtype", "want"), [("float32", "F32"), ("bfloat16", "BF16")])
def test_the_norms_tell_what_the_file_was_made_from(tmp_path, dtype, want):
    assert open_gguf(make_tiny_gguf(tmp_path / "tiny.gguf", type="Q8_0", dtype=dtype)).native_dtype == want


def test_one_number_that_is_no_bfloat16_tells(tmp_path, weights):
    norm = from_bfloat16(to_bfloat16(weights["model.decoder.norm.weight"]))
    norm[7] = np.nextafter(norm[7], 2, dtype=np.float32)
    path = make_tiny_gguf(tmp_path / "tiny.gguf", dtype="bfloat16", tensors={"output_norm.weight": (norm, "F32")})
    assert open_gguf(path).native_dtype == "F32"


def test_shapes_may_carry_leading_ones(tmp_path, weights):
    scalar = weights["model.decoder.layers.2.layer_scalar"].reshape(1, 1)
    norm = weights["model.decoder.norm.weight"].reshape(1, 64)
    changes = {"blk.2.layer_output_scale.weight": (scalar, "F32"), "output_norm.weight": (norm, "F32")}
    model = open_gguf(make_tiny_gguf(tmp_path / "tiny.gguf", tensors=changes))
    assert np.array_equal(model.rows(TENSORS["blk.2.layer_output_scale.weight"]), scalar)
    assert np.array_equal(model.rows(TENSORS["output_norm.weight"]), norm)


def test_a_model_may_have_more_rows_than_tokens_and_no_frequency_factors(tmp_path):
    keys = {"tokenizer.ggml.tokens": (KINDS.ARRAY, ["<pad>", "<eos>"], KINDS.STRING)}
    path = make_tiny_gguf(tmp_path / "tiny.gguf", keys=keys, tensors={"rope_freqs.weight": None})
    assert open_gguf(path).config.vocab_size == 384


ONE = (np.zeros(64, np.float32), "F32")
# fmt: off
REFUSED = {
    "missing": ({"tensors": {"blk.1.attn_q.weight": None}}, "1 tensor is missing, as blk.1.attn_q.weight, expected 1"),
    "no scalars": ({"tensors": {f"blk.{i}.enc_layer_output_scale.weight": None for i in range(6)}},
                   "6 tensors are missing, as blk.0.enc_layer_output_scale.weight"),
    "v of a full layer": ({"tensors": {"blk.5.attn_v.weight": ONE}}, "1 tensor is unknown, as blk.5.attn_v.weight"),
    "untied": ({"tensors": {"output.weight": ONE}}, "1 tensor is unknown, as output.weight"),
    "half of split": ({"split_experts": True, "tensors": {"blk.0.ffn_up_exps.weight": None}},
                      "1 tensor is missing, as blk.0.ffn_up_exps.weight"),
    "fused and split": ({"tensors": {"blk.0.ffn_up_exps.weight": ONE}}, "unknown, as blk.0.ffn_up_exps.weight"),
    "shape": ({"tensors": {"blk.0.ffn_norm.weight": (np.zeros(32, np.float32), "F32")}},
              r"blk.0.ffn_norm.weight has shape \(32,\), expected \(64,\) as the metadata implies"),
    "transposed": ({"tensors": {"blk.0.ffn_up.weight": (np.zeros((64, 192), np.float32), "F32")}},
                   r"blk.0.ffn_up.weight has shape \(64, 192\), expected \(192, 64\)"),
    "another width": ({"keys": {A + "feed_forward_length": (KINDS.UINT32, 96)}},
                      r"self_cond_gate.weight has shape \(192, 64\), expected \(96, 64\)"),
    "more layers": ({"keys": {
        A + "block_count": (KINDS.UINT32, 7),
        A + "attention.head_count_kv": (KINDS.ARRAY, [2, 2, 2, 2, 2, 1, 1], KINDS.INT32),
        A + "attention.sliding_window_pattern": (KINDS.ARRAY, [True] * 5 + [False] * 2, KINDS.BOOL),
    }}, "22 tensors are missing, as blk.6"),
    "vocabulary": ({"keys": {"tokenizer.ggml.tokens": (KINDS.ARRAY, ["a"] * 385, KINDS.STRING)}},
                   "the vocabulary has 385 tokens and token_embd.weight 384 rows, expected a row for each token"),
    "tokens": ({"keys": {"tokenizer.ggml.tokens": (KINDS.UINT32, 5)}}, "tokenizer.ggml.tokens is 5, expected a list"),
    "Gemma 4": ({"keys": {"general.architecture": (KINDS.STRING, "gemma4")}}, "general.architecture is 'gemma4'"),
}
# fmt: on


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_named(tmp_path, options, message):
    path = make_tiny_gguf(tmp_path / "tiny.gguf", **options)
    with pytest.raises(DgemmaError, match=rf"tiny\.gguf: .*{message}"):
        open_gguf(path)


def test_integers_are_no_weights(tmp_path):
    path = make_tiny_gguf(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    name = b"output_norm.weight"
    at = content.index(name) + len(name) + 4 + 8  # behind the number of axes and one axis
    path.write_bytes(content[:at] + (26).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(DgemmaError, match="output_norm.weight is I32, expected one of F32, F16"):
        open_gguf(path)


def test_a_truncated_file_is_named_before_a_weight_is_read(tmp_path):
    path = make_tiny_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(DgemmaError, match="ends at byte .*, expected the end within .*download it again"):
        open_gguf(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(path, content, bytes of its header) of the smallest file, to be damaged."""
    path = make_tiny_gguf(tmp_path_factory.mktemp("damaged") / "tiny.gguf", type="Q4_0")
    return path, path.read_bytes(), min(t.start for t in open_gguf(path).file.tensors.values())


@settings(max_examples=150, deadline=10_000)
@given(data=st.data())
def test_a_damaged_header_is_refused_or_harmless(small, data):
    path, content, header = small
    damaged = bytearray(content)
    for at in data.draw(st.lists(st.integers(4, header - 1), min_size=1, max_size=20)):
        damaged[at] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        model = open_gguf(path)
    except DgemmaError as error:
        assert str(error).startswith(f"{path}: ")
    else:
        assert set(model.parts) == {t.gguf for t in text_tensors(model.config)}
