"""`python -m gguf_export info FILE --verify SRC`: a true file passes, every kind of wrong one does not."""

import json

import numpy as np
import pytest

from convert import convert
from gguf_export.cli import main
from gguf_export.verify import open_source, verify_gguf
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.reader import read_gguf
from tests.tiny import make_tiny_checkpoint
from tests.tiny_gguf import make_tiny_gguf


@pytest.fixture
def written(tiny, tmp_path):
    convert(tiny, tmp_path / "x.gguf", to="gguf", recipe="Q8_0")
    return tmp_path / "x.gguf"


def test_info_verify(tiny, written, capsys):
    assert main(["info", str(written), "--verify", str(tiny), "--json"]) == 0
    errors = {e["role"]: e["relative_rms"] for e in json.loads(capsys.readouterr().out)["verify"]}
    assert errors["norm"] == errors["router"] == 0 < errors["expert"] < 0.01
    assert main(["info", str(written), "--verify", str(tiny)]) == 0
    assert "relative error" in capsys.readouterr().out


def test_info_verify_without_a_source(written, capsys):
    assert main(["info", str(written), "--verify"]) == 0
    assert "every tensor is there, finite, and read alike" in capsys.readouterr().out
    place = read_gguf(written).tensors["blk.3.ffn_up.weight"]
    data = bytearray(written.read_bytes())
    data[place.start : place.start + 2] = np.float16(np.inf).tobytes()  # the first block's scale
    written.write_bytes(data)
    assert main(["info", str(written), "--verify"]) == 1
    assert "blk.3.ffn_up.weight) holds infinity or NaN" in capsys.readouterr().err


def test_a_gguf_by_other_hands_is_its_own_source(tmp_path):
    path = make_tiny_gguf(tmp_path / "x.gguf", "Q4_0")
    assert {e.relative_rms for e in verify_gguf(path, open_source(path))} == {0.0}


def test_one_wrong_tensor_is_found(tiny, written, capsys):
    place = read_gguf(written).tensors["blk.3.ffn_up.weight"]
    data = bytearray(written.read_bytes())
    values = np.frombuffer(data, np.uint8)[place.start : place.start + place.nbytes]
    values[:] = np.roll(values.reshape(192, -1), 1, axis=0).ravel()  # every row in its neighbour's place
    written.write_bytes(data)
    assert main(["info", str(written), "--verify", str(tiny)]) == 1
    assert "blk.3.ffn_up.weight has a relative error of 1.4" in capsys.readouterr().err


def test_another_models_checkpoint_is_refused(tiny, written, tmp_path, capsys):
    other = make_tiny_checkpoint(tmp_path / "other", seed=1)
    assert main(["info", str(written), "--verify", str(other)]) == 1
    assert "verification failed" in capsys.readouterr().err
    other = make_tiny_checkpoint(tmp_path / "wider", hidden_size=128)
    assert main(["info", str(written), "--verify", str(other)]) == 1
    assert "has shape" in capsys.readouterr().err


def test_a_quantized_folder_is_no_source(tiny, written, tmp_path):
    convert(tiny, tmp_path / "q4", recipe="q4")
    with pytest.raises(DgemmaError, match="is missing or quantized, expected the checkpoint that was converted"):
        open_source(tmp_path / "q4")
    with pytest.raises(DgemmaError, match="not found"):
        open_source(tmp_path / "nowhere")
