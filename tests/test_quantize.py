"""Rows → ggml types: numpy against ggml, every type against its dequantization, and what a missing library says."""

import os

import numpy as np
import pytest

from gguf_export import ggml, quantize
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.types import TYPES
from mlx_dgemma.gguf.values import to_float32

# Largest relative error of each type on Gaussian weights; a scrambled tensor has about 1.4.
WORST = {
    "F32": 0, "F16": 3e-4, "BF16": 2e-3, "Q8_0": 0.006, "Q6_K": 0.02, "Q5_K": 0.04, "Q5_1": 0.045, "Q5_0": 0.05,
    "Q4_K": 0.08, "Q4_1": 0.09, "Q4_0": 0.1, "IQ4_NL": 0.09, "IQ4_XS": 0.09, "MXFP4": 0.13, "Q3_K": 0.17, "Q2_K": 0.33,
}  # fmt: skip


@pytest.fixture
def no_ggml(monkeypatch):
    for module in (quantize, ggml):
        monkeypatch.setattr(module, "find_ggml", lambda: None)


@pytest.fixture
def weights():
    rows = np.random.default_rng(0).standard_normal((65, 512)).astype(np.float32) * 0.05
    rows[0] = 0
    rows[1, :4] = [1e-30, -1e-30, 60_000, -0.0]
    rows[2] *= 1e-7  # scales below float16's normal range
    rows[3] = 0.25  # ties
    return rows


def test_a_block_by_hand(no_ggml):
    """Q8_0: scale 127/127 = 1, so the codes are the values."""
    row = np.arange(32, dtype=np.float32) * 4 + 3  # 3 … 127
    packed = quantize.quantize(row[None], TYPES["Q8_0"])
    assert packed[0, :2].view(np.float16) == 1.0
    assert packed[0, 2:].view(np.int8).tolist() == row.tolist()


@pytest.mark.parametrize("name", WORST)
def test_every_type_gives_its_weights_back(name, weights):
    packed = quantize.quantize(weights[4:], TYPES[name])
    assert packed.shape == (61, TYPES[name].row_bytes(512))
    error = to_float32(packed, TYPES[name]) - weights[4:]
    assert np.sqrt(np.square(error).mean() / np.square(weights[4:]).mean()) <= WORST[name]


@pytest.mark.parametrize("name", quantize.SIMPLE)
def test_simple_types_are_ggmls_without_ggml(name, weights, no_ggml, monkeypatch):
    packed = quantize.quantize(weights, TYPES[name])
    monkeypatch.undo()
    library = ggml.need_ggml(name)
    for row, ours in zip(weights, packed, strict=True):
        theirs = np.empty(TYPES[name].row_bytes(512), np.uint8)
        library.ggml_quantize_chunk(TYPES[name].number, row.ctypes.data, theirs.ctypes.data, 0, 1, 512, None)
        assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("name", ["Q4_K", "Q3_K", "IQ4_NL", "Q4_0"])
def test_pieces_and_threads_do_not_change_a_byte(name, weights, monkeypatch):
    whole = quantize.quantize(weights, TYPES[name])
    monkeypatch.setattr(quantize, "cores", lambda: 1)
    rows = [quantize.quantize(row[None], TYPES[name]) for row in weights]
    assert np.concatenate(rows).tobytes() == whole.tobytes()


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q5_1", "IQ4_XS"])
def test_importance_moves_the_error_to_where_it_matters_less(name, weights):
    importance = np.where(np.arange(512) % 4 == 0, 100, 0.01).astype(np.float32)

    def weighted_error(packed):
        return (np.square(to_float32(packed, TYPES[name]) - weights[4:]) * importance).sum()

    plain, weighted = (quantize.quantize(weights[4:], TYPES[name], i) for i in (None, importance))
    assert weighted_error(weighted) < weighted_error(plain)


@pytest.mark.parametrize("name", ["Q8_0", "MXFP4", "BF16"])
def test_types_that_take_no_importance_ignore_it(name, weights):
    plain, weighted = (quantize.quantize(weights, TYPES[name], i) for i in (None, np.ones(512, np.float32)))
    assert plain.tobytes() == weighted.tobytes()


def test_a_missing_library_names_the_extra(no_ggml, weights):
    message = r"Q4_K: only ggml can quantize to this, and it is not installed; pip install xllamacpp"
    with pytest.raises(DgemmaError, match=message):
        quantize.check_can_quantize({"F32", "Q8_0", "Q4_K"}, importance=False)
    with pytest.raises(DgemmaError, match=message):
        quantize.quantize(weights, TYPES["Q4_K"])
    with pytest.raises(DgemmaError, match="Q4_0 with an importance matrix: only ggml"):
        quantize.check_can_quantize({"Q8_0", "Q4_0"}, importance=True)
    quantize.check_can_quantize({"F32", "Q8_0", "Q4_0", "MXFP4"}, importance=False)


@pytest.fixture
def search(monkeypatch):
    """find_ggml without what an earlier call found."""
    ggml.find_ggml.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    ggml.find_ggml.cache_clear()


def test_libraries_beside_each_other_are_found_by_their_folder(search, tmp_path):
    """llama.cpp's releases and llama-cpp-python; here the base library's name is given to another one."""
    file = ggml.need_ggml("test").file
    os.symlink(file, tmp_path / (ggml._file_name("ggml-base") + ".0.26.0"))
    search.setenv("GGML_LIBRARY", str(tmp_path))
    ggml.find_ggml.cache_clear()
    assert ggml.find_ggml().file.parent == tmp_path
    search.setenv("GGML_LIBRARY", str(file))
    ggml.find_ggml.cache_clear()
    assert ggml.find_ggml().file == file


def test_a_wrong_library_is_named(search, tmp_path):
    search.setenv("GGML_LIBRARY", str(tmp_path))
    with pytest.raises(DgemmaError, match="GGML_LIBRARY is .*, expected a ggml library or a folder that holds"):
        ggml.find_ggml()
    (tmp_path / "x.so").write_bytes(b"no library")
    search.setenv("GGML_LIBRARY", str(tmp_path / "x.so"))
    with pytest.raises(DgemmaError, match="x.so: cannot be loaded as ggml .*; pip install"):
        ggml.find_ggml()
    import _ctypes

    search.setenv("GGML_LIBRARY", _ctypes.__file__)
    with pytest.raises(DgemmaError, match="exports no ggml_quantize_chunk, expected a ggml library of version"):
        ggml.find_ggml()


def test_nothing_installed_is_no_error_yet(search):
    search.delenv("GGML_LIBRARY", raising=False)
    search.setattr(ggml, "_package_folders", lambda package: [])
    assert ggml.find_ggml() is None
