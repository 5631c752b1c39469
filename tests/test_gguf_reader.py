"""The header of a GGUF: read as gguf-py reads it, and refused in words where it is not what it says."""

import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf import reader
from mlx_dgemma.gguf.reader import StoredTensor, Value, read_gguf
from mlx_dgemma.gguf.types import BY_NUMBER, TYPES
from mlx_dgemma.gguf.values import to_float32
from tests.tiny_gguf import make_tiny_gguf

U32, STR, ARR = 4, 8, 9


def text(s):
    raw = s.encode() if isinstance(s, str) else s
    return struct.pack("<Q", len(raw)) + raw


def key(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def u32(name, value):
    return key(name, U32, struct.pack("<I", value))


def info(name, dims=(4,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(keys=(), tensors=(), data=b"", version=3, n_keys=None, n_tensors=None, magic=b"GGUF"):
    """A file's bytes; counts that differ from what is there where they are given."""
    n_keys = len(keys) if n_keys is None else n_keys
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    header = magic + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join([*keys, *tensors])
    return header + bytes(-len(header) % 32) + data


def read(tmp_path, content):
    path = tmp_path / "file.gguf"
    path.write_bytes(content)
    return read_gguf(path)


def test_a_file_by_eye(tmp_path):
    # fmt: off
    content = (
        b"GGUF" b"\3\0\0\0" b"\1\0\0\0\0\0\0\0" b"\1\0\0\0\0\0\0\0"  # version, tensors, keys
        b"\3\0\0\0\0\0\0\0" b"one" b"\4\0\0\0" b"\7\0\0\0"  # a u32
        b"\1\0\0\0\0\0\0\0" b"w" b"\2\0\0\0"  # a tensor of two axes
        b"\2\0\0\0\0\0\0\0" b"\1\0\0\0\0\0\0\0" b"\0\0\0\0" b"\0\0\0\0\0\0\0\0"  # 2 in a row, 1 row, F32, offset 0
    )
    # fmt: on
    start = 96
    content += bytes(start - len(content)) + struct.pack("<2f", 1.5, -2.0)
    file = read(tmp_path, content)
    assert file.metadata == {"one": Value("u32", 7)}
    assert file.tensors == {"w": StoredTensor("w", TYPES["F32"], (1, 2), start, 8)}
    assert to_float32(file.rows("w"), TYPES["F32"]).tolist() == [[1.5, -2.0]]


def test_reading_agrees_with_ggufs_own_reader(tmp_path):
    path = make_tiny_gguf(tmp_path / "tiny.gguf", type="Q8_0")
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    keys = [field for name, field in theirs.fields.items() if not name.startswith("GGUF.")]
    assert {f.name: f.contents() for f in keys} == {name: value.value for name, value in ours.metadata.items()}
    assert len(ours.tensors) == len(theirs.tensors) > 100
    for want in theirs.tensors:
        found = ours.tensors[want.name]
        shape = tuple(int(n) for n in reversed(want.shape))
        assert (found.type.name, found.shape, found.start) == (want.tensor_type.name, shape, want.data_offset)
        assert ours.rows(want.name).tobytes() == want.data.tobytes(), want.name
        values = gguf.dequantize(want.data, want.tensor_type).reshape(-1, shape[-1])
        assert np.array_equal(to_float32(ours.rows(want.name), found.type), values), want.name


@pytest.mark.parametrize("name", sorted(gguf.GGUFValueType.__members__))
def test_every_value_type_reads_back(tmp_path, name):
    kind = gguf.GGUFValueType[name]
    value = {"STRING": "zwölf", "BOOL": True, "FLOAT32": 0.5, "FLOAT64": 0.1, "INT8": -3}.get(name, 200)
    path = tmp_path / "file.gguf"
    writer = gguf.GGUFWriter(path, "any")
    if name == "ARRAY":
        writer.add_key_value("key", [[1, -2], [True, False], ["a", ""]][0], kind, gguf.GGUFValueType.INT16)
        writer.add_key_value("words", ["a", "", "ö"], kind, gguf.GGUFValueType.STRING)
        value = [1, -2]
    else:
        writer.add_key_value("key", value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    file = read_gguf(path)
    assert file.get("key") == value
    if name == "ARRAY":
        assert file.metadata["key"].type == "arr[i16]"
        assert file.metadata["words"] == Value("arr[str]", ["a", "", "ö"])
    assert file.get("other", 5) == 5


def test_types_have_gguf_pys_numbers_and_sizes():
    theirs = {q.value: (q.name, *gguf.GGML_QUANT_SIZES[q]) for q in gguf.GGMLQuantizationType}
    assert {t.number: (t.name, t.block, t.block_bytes) for t in BY_NUMBER.values()} == theirs


@pytest.mark.parametrize("type", TYPES.values(), ids=TYPES)
def test_every_type_of_a_model_can_be_dequantized(type):
    rows = np.zeros((3, type.row_bytes(256)), np.uint8)
    assert to_float32(rows, type).shape == (3, 256)
    assert to_float32(rows[1:1], type).shape == (0, 256)


def test_what_is_harmless_is_read(tmp_path):
    data = struct.pack("<4f", 1, 2, 3, 4)
    assert read(tmp_path, build()).tensors == {}
    assert read(tmp_path, build(version=2, tensors=[info("w")], data=data)).tensors["w"].shape == (4,)
    assert read(tmp_path, build(tensors=[info("w", ())], data=data)).tensors["w"].shape == (1,)
    gap = build(tensors=[info("b", offset=64), info("a")], data=data + bytes(48) + data)  # not in the data's order
    assert bytes(read(tmp_path, gap).rows("b")) == data
    wide = build([u32("general.alignment", 256)], [info("w")], bytes(256) + data)
    assert read(tmp_path, wide).tensors["w"].start == 256
    assert read(tmp_path, build([key("split.count", 2, b"\1\0")])).get("split.count") == 1


W = [info("w")]
D = bytes(16)
HUGE = 2**63 + 5
# fmt: off
REFUSED = {
    "empty": (b"", "found 0 bytes, expected a GGUF file"),
    "short": (b"GGU", "found 3 bytes, expected a GGUF file"),
    "magic only": (b"GGUF", "at byte 4 of a 4-byte file, the version needs 4 bytes.*download it again"),
    "text": (b"hello world", "starts with b'hell', expected b'GGUF'; not a GGUF file"),
    "safetensors": (b'\x40\0\0\0\0\0\0\0{"a":1}', "this looks like safetensors: give its folder"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer.*git lfs pull"),
    "version 1": (build(version=1), "GGUF version 1, expected 2 or 3"),
    "version 0": (build(version=0), "GGUF version 0, expected 2 or 3"),
    "version 4": (build(version=4), "GGUF version 4, expected 2 or 3"),
    "big-endian": (build(version=3 << 24), "big-endian GGUF, expected little-endian.*gguf-convert-endian"),
    "keys": (build(n_keys=HUGE), "9223372036854775813 metadata keys need .* bytes, expected no more than are left"),
    "tensors": (build(n_tensors=2**40), "1099511627776 tensors need .* bytes"),
    "key's length": (build([struct.pack("<Q", HUGE) + bytes(64)]), "a metadata key needs 92233720368547758.. bytes"),
    "string's length": (build([key("a", STR, struct.pack("<Q", 2**50))]), "at byte .*, a needs 1125899906842632 bytes"),
    "array's length": (build([key("a", ARR, struct.pack("<IQ", 6, 2**60))]), "a needs 4611686018427387904 bytes"),
    "strings": (build([key("a", ARR, struct.pack("<IQ", STR, 2**60))]), "1152921504606846976 strings of a need"),
    "nested": (build([key("a", ARR, struct.pack("<IQ", ARR, 1) + bytes(32))]), "a is an array of arrays"),
    "endless name": (build([u32("a" * 1001, 1)]), "a metadata key is 'aaa.* of 1001 characters, expected at"),
    "terminal codes": (build([], [info("\x1b[2J")], D), r"name is '\\x1b\[2J' of 4 characters, .* printable"),
    "value type": (build([key("a", 13, bytes(8))]), "a has value type 13, expected 0 to 12"),
    "item type": (build([key("a", ARR, struct.pack("<IQ", 99, 1) + bytes(8))]), "a has value type 99"),
    "key not UTF-8": (build([key(b"\xff\xfe", U32, bytes(4))]), r"a metadata key is b'\\xff\\xfe', expected UTF-8"),
    "value not UTF-8": (build([key("a", STR, text(b"\xc3("))]), r"a is b'\\xc3\(', expected UTF-8"),
    "key twice": (build([u32("a", 1), u32("a", 2)]), "metadata key a comes twice, expected once"),
    "tensor twice": (build([], [info("w"), info("w", offset=32)], bytes(64)), "tensor w comes twice, expected once"),
    "five axes": (build([], [info("w", (1,) * 5)], D), "w has 5 dimensions, expected at most 4"),
    "an empty axis": (build([], [info("w", (4, 0))], D), r"w has shape \(0, 4\), expected sizes from 1"),
    "absurd shape": (build([], [info("w", (2**40, 2**40))], D), r"w has shape \(1099511627776, 1099511627776\)"),
    "tensor type": (build([], [info("w", kind=77)], D), "w has tensor type 77, expected one that ggml has today"),
    "removed type": (build([], [info("w", kind=4)], D), "w has tensor type 4, expected one"),
    "row and block": (build([], [info("w", (48,), 12)], D), "w has rows of 48, expected a multiple of 256 for Q4_K"),
    "offset": (build([], [info("w", offset=16)], bytes(64)), "w starts at 16, expected a multiple of 32"),
    "truncated": (build([], W, D[:-1]), r"w ends at byte 80, expected the end within 79 bytes;.*download incomplete"),
    "far away": (build([], [info("w", offset=2**63)], D), "w ends at byte 9223372036854775888, expected .* 80 bytes"),
    "overlap": (build([], [info("v", (9,)), info("w", offset=32)], bytes(96)), "w starts at .*, expected .* or later"),
    "alignment 0": (build([u32("general.alignment", 0)]), "general.alignment is 0, expected a power of two"),
    "alignment 48": (build([u32("general.alignment", 48)]), "general.alignment is 48, expected a power of two"),
    "alignment 2^31": (build([u32("general.alignment", 2**31)]), "general.alignment is 2147483648, .*at most 1048576"),
    "alignment text": (build([key("general.alignment", STR, text("32"))]), "general.alignment is '32', expected"),
    "split": (build([key("split.count", 2, b"\3\0")]), "one of 3 parts .*llama-gguf-split --merge"),
}
# fmt: on


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_named(tmp_path, content, message):
    with pytest.raises(DgemmaError, match=rf"file\.gguf: .*{message}"):
        read(tmp_path, content)


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(DgemmaError, match=r"none\.gguf: not found; expected a GGUF file, check the path"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(DgemmaError, match="found a folder, expected a GGUF file; name the .gguf file itself"):
        read_gguf(tmp_path)
    with pytest.raises(DgemmaError, match="/dev/null: found no regular file"):
        read_gguf("/dev/null")


def test_a_header_has_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_HEADER", 64)
    with pytest.raises(DgemmaError, match="of a 64-byte largest header, a needs 108 bytes"):
        read(tmp_path, build([key("a", STR, text("x" * 100))]))


def test_a_vocabulary_of_the_released_size_takes_about_a_second(tmp_path):
    words = b"".join(text(f"word{i}") for i in range(262_144))
    merges = b"".join(text(f"left{i} right{i}") for i in range(514_906))
    keys = [
        key("tokenizer.ggml.tokens", ARR, struct.pack("<IQ", STR, 262_144) + words),
        key("tokenizer.ggml.merges", ARR, struct.pack("<IQ", STR, 514_906) + merges),
        key("tokenizer.ggml.scores", ARR, struct.pack("<IQ", 6, 262_144) + bytes(4 * 262_144)),
    ]
    content = build(keys)
    began = time.process_time()
    file = read(tmp_path, content)
    seconds = time.process_time() - began
    assert file.get("tokenizer.ggml.tokens")[262_143] == "word262143"
    assert file.get("tokenizer.ggml.merges")[514_905] == "left514905 right514905"
    assert seconds < 3  # 0.15 s measured


SMALL = build(
    [
        u32("general.alignment", 32),
        key("name", STR, text("tiny")),
        key("words", ARR, struct.pack("<IQ", STR, 3) + text("a") + text("bc") + text("déf")),
        key("numbers", ARR, struct.pack("<IQ4i", 5, 4, 1, 2, 3, 4)),
        key("flag", 7, b"\1"),
    ],
    [info("w", (4, 2)), info("q", (32, 2), 8, 32)],
    bytes(32) + bytes(68),
)
# Where a length, a count, a type or a shape stands: all the little-endian words of the header.
WORDS = st.sampled_from([0, 1, 2, 3, 8, 9, 31, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1])


def read_or_refuse(path, content):
    """Success or DgemmaError, without taking more memory than a file of this size can mean."""
    path.write_bytes(content)
    tracemalloc.start()
    try:
        file = read_gguf(path)
        for t in file.tensors.values():
            assert t.start + t.nbytes <= len(content)
            assert to_float32(file.rows(t.name), t.type).size * t.type.block_bytes == t.nbytes * t.type.block
    except DgemmaError as error:
        message = str(error)
        assert message.startswith(f"{path}: ") and "expected" in message, message
        assert len(message) < 700
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 400_000 + 20 * len(content), peak


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    gguf.dequantize(np.zeros((1, 34), np.uint8), gguf.GGMLQuantizationType.Q8_0)  # what it keeps is not the reader's
    return tmp_path_factory.mktemp("mutated") / "file.gguf"


MANY = settings(max_examples=300, deadline=10_000)


@MANY
@given(at=st.integers(0, len(SMALL) - 8), value=WORDS, size=st.sampled_from([1, 4, 8]))
def test_numbers_changed_anywhere(path, at, value, size):
    word = (value % 2 ** (8 * size)).to_bytes(size, "little")
    read_or_refuse(path, SMALL[:at] + word + SMALL[at + size :])


@MANY
@given(flips=st.lists(st.integers(0, 8 * len(SMALL) - 1), min_size=1, max_size=8))
def test_bits_flipped_anywhere(path, flips):
    content = bytearray(SMALL)
    for bit in flips:
        content[bit // 8] ^= 1 << bit % 8
    read_or_refuse(path, bytes(content))


@settings(max_examples=100, deadline=10_000)
@given(end=st.integers(0, len(SMALL)))
def test_files_cut_anywhere(path, end):
    read_or_refuse(path, SMALL[:end])


@MANY
@given(junk=st.binary(max_size=200), counts=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_junk_behind_the_magic(path, junk, counts):
    read_or_refuse(path, b"GGUF" + struct.pack("<IQQ", 3, *counts) + junk)
    read_or_refuse(path, b"GGUF" + junk)
