"""The importance matrix as a file: what llama-quantize makes of it, and what cannot be one."""

import gguf
import numpy as np
import pytest

from convert.imatrix import Entry, Imatrix, read_imatrix, write_imatrix
from gguf_export.writer import GgufWriter
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.reader import Value
from mlx_dgemma.gguf.types import TYPES

DENSE, FUSED = "blk.0.attn_q.weight", "blk.0.ffn_gate_up_exps.weight"


def entry(sums, counts):
    return Entry(np.array(sums, np.float32), np.array(counts, np.float32))


def imatrix(**entries):
    return Imatrix(None, {f"blk.0.{name}.weight": e for name, e in entries.items()}, ("some.txt",), 3, 16)


def write(path, tensors, **metadata):
    """A file with `tensors`, name → array, whatever they are; metadata: `_` stands for a dot."""
    values = {"general.architecture": Value("str", "other"), "general.type": Value("str", "imatrix")}
    values |= {key.replace("_", ".", 1): value for key, value in metadata.items()}
    types = {np.dtype(np.float32): TYPES["F32"], np.dtype(np.float16): TYPES["F16"]}
    with GgufWriter(path, values, [(name, types[a.dtype], a.shape) for name, a in tensors.items()]) as writer:
        for name, array in tensors.items():
            writer.append(name, array)
    return path


def test_weights_are_mean_squares():
    sums = entry([[2, 4, 6], [0, 0, 0]], [2, 0])
    got = imatrix(ffn_down_exps=sums).weights("blk.0.ffn_down_exps.weight", 2, 3)
    assert got.dtype == np.float32
    assert got.tolist() == [[1, 2, 3], [1, 1, 1]]  # an expert that saw nothing
    assert imatrix(ffn_down_exps=sums).weights(DENSE, 1, 3) is None


def quantize_slowly(sums, counts):
    """llama-quantize's load_imatrix, value by value."""
    values = np.empty_like(sums)
    for j, count in enumerate(counts):
        for i in range(sums.shape[1]):
            values[j, i] = sums[j, i] / count if count > 0 else np.float32(1)
    return values


def test_weights_are_llama_quantizes():
    draw = np.random.default_rng(0)
    for seed in range(5):
        counts = draw.integers(0, 3, 6).astype(np.float32)
        sums = (draw.random((6, 32)).astype(np.float32) ** 4 + np.float32(1e-3)) * counts[:, None]
        got = imatrix(attn_q=Entry(sums, counts)).weights(DENSE, 6, 32)
        assert got.tobytes() == quantize_slowly(sums, counts).tobytes(), f"{seed=}"


def test_a_silent_channel_keeps_a_trace():
    """ggml writes zeros where a block has no importance at all; another prompt may need those weights."""
    got = imatrix(attn_q=entry([[0, 3, 5, 4]], [2])).weights(DENSE, 1, 4)[0]
    assert got[1:].tolist() == [1.5, 2.5, 2] and 0 < got[0] < 1e-5
    assert imatrix(attn_q=entry([[0, 0]], [2])).weights(DENSE, 1, 2).tolist() == [[1, 1]]


@pytest.mark.parametrize("part", ["ffn_gate_exps", "ffn_up_exps"])
def test_experts_stored_apart_serve_the_fused_tensor(part):
    got = imatrix(**{part: entry([[2, 4], [3, 9]], [2, 3])}).weights(FUSED, 2, 2)
    assert got.tolist() == [[1, 2], [1, 3]]


def test_the_older_form_has_one_count_for_all_experts():
    got = imatrix(ffn_gate_up_exps=entry([[2, 4, 6, 8]], [2])).weights(FUSED, 2, 2)
    assert got.tolist() == [[1, 2], [3, 4]]


def test_gguf_py_reads_what_was_written(tmp_path):
    written = imatrix(attn_q=entry([[1, 2, 3]], [7]), ffn_down_exps=entry([[1, 2], [3, 4], [5, 6]], [1, 0, 20_000_001]))
    write_imatrix(written, tmp_path / "x.gguf")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    # fmt: off
    assert {t.name: (t.tensor_type.name, t.shape.tolist()) for t in reader.tensors} == {
        "blk.0.attn_q.weight.in_sum2": ("F32", [3, 1]),
        "blk.0.attn_q.weight.counts": ("F32", [1, 1]),
        "blk.0.ffn_down_exps.weight.in_sum2": ("F32", [2, 3]),
        "blk.0.ffn_down_exps.weight.counts": ("F32", [1, 3]),
    }
    # fmt: on
    assert [t.data.ravel().tolist() for t in reader.tensors][2:] == [[1, 2, 3, 4, 5, 6], [1, 0, 20_000_000]]
    values = {
        key: reader.fields[key].contents() for key in reader.fields if key.startswith(("general.type", "imatrix"))
    }
    assert values == {
        "general.type": "imatrix",
        "imatrix.datasets": ["some.txt"],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 16,
    }


def test_what_was_written_is_read_again(tmp_path):
    written = imatrix(attn_q=entry([[1, 2, 3]], [7]), ffn_down_exps=entry([[1, 2], [3, 4]], [1, 0]))
    write_imatrix(written, tmp_path / "x.gguf")
    read = read_imatrix(tmp_path / "x.gguf")
    assert (read.path, read.datasets, read.chunks, read.chunk_size) == (tmp_path / "x.gguf", ("some.txt",), 3, 16)
    assert list(read.entries) == list(written.entries)
    for got, want in zip(read.entries.values(), written.entries.values(), strict=True):
        assert got.sums.tolist() == want.sums.tolist() and got.counts.tolist() == want.counts.tolist()


def test_llama_cpps_own_shapes_are_read(tmp_path):
    """ggml drops axes of 1 at the end, and newer versions add plain sums (`in_sum`)."""
    sums = np.array([2, 4, 6], np.float32)
    tensors = {DENSE + ".in_sum2": sums, DENSE + ".counts": np.array([2], np.float32), DENSE + ".in_sum": -sums}
    read = read_imatrix(write(tmp_path / "x.gguf", tensors))
    assert list(read.entries) == [DENSE] and read.chunks == 0
    assert read.weights(DENSE, 1, 3).tolist() == [[1, 2, 3]]


GOOD = {DENSE + ".in_sum2": np.ones((2, 3), np.float32), DENSE + ".counts": np.ones((2, 1), np.float32)}


# fmt: off
BAD = [
    ({DENSE + ".in_sum2": np.full((2, 3), np.nan, np.float32)}, "values that are no sums of squares"),
    ({DENSE + ".in_sum2": np.full((2, 3), np.inf, np.float32)}, "values that are no sums of squares"),
    ({DENSE + ".in_sum2": np.full((2, 3), -1, np.float32)}, "values that are no sums of squares"),
    ({DENSE + ".counts": np.full((2, 1), np.nan, np.float32)}, "values that are no sums of squares"),
    ({DENSE + ".counts": np.ones((3, 1), np.float32)}, "3 counts for 2 rows of sums"),
    ({DENSE + ".in_sum2": np.ones((2, 3), np.float16)}, "in_sum2 is F16, expected F32"),
    ({DENSE + ".counts": None}, "sums and no counts, expected both"),
    ({DENSE + ".in_sum2": None}, "holds no .in_sum2 tensor"),
]
# fmt: on


@pytest.mark.parametrize(("change", "message"), BAD)
def test_what_cannot_be_one_is_refused(tmp_path, change, message):
    tensors = {name: array for name, array in (GOOD | change).items() if array is not None}
    with pytest.raises(DgemmaError, match=message) as error:
        read_imatrix(write(tmp_path / "x.gguf", tensors))
    assert str(error.value).startswith(f"{tmp_path / 'x.gguf'}: ")
    assert str(error.value).endswith("collect it again with `python -m convert imatrix`")


def test_a_model_is_no_importance_matrix(tmp_path):
    with pytest.raises(DgemmaError, match=r"holds 'other', expected an importance matrix \(general.type imatrix\)"):
        read_imatrix(write(tmp_path / "x.gguf", GOOD, general_type=Value("str", "model")))


def test_half_a_file_is_refused(tmp_path):
    path = write(tmp_path / "x.gguf", GOOD)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DgemmaError, match="download it again"):
        read_imatrix(path)


def test_another_models_sizes_are_refused(tmp_path):
    read = read_imatrix(write(tmp_path / "x.gguf", GOOD))
    with pytest.raises(DgemmaError, match=r"importance for \(2, 3\) .*, expected \(2, 4\); .* another model"):
        read.weights(DENSE, 2, 4)
    with pytest.raises(DgemmaError, match=r"expected \(3, 2\)"):
        read.weights(DENSE, 3, 2)


def test_metadata_of_another_type_is_left_out(tmp_path):
    wrong = {"imatrix_datasets": Value("u32", 5), "imatrix_chunk_count": Value("str", "many")}
    read = read_imatrix(write(tmp_path / "x.gguf", GOOD, **wrong))
    assert (read.datasets, read.chunks) == ((), 0)
