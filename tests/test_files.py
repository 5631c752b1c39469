"""Files as a user has them: links, folders, devices, read-only, no text; replaced whole or left alone."""

import io
import os
import stat
import sys
from types import SimpleNamespace

import pytest

from mlx_dgemma import files
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.files import check_writable, read_text, replace_text, same_file


def test_text_comes_as_it_is(tmp_path, monkeypatch):
    for text in ("", "a\r\nb\n\rc", "\ufeffé語🙂"):
        (tmp_path / "x").write_bytes(text.encode())
        assert read_text(tmp_path / "x") == text
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
        assert read_text("-") == text
    assert read_text(os.devnull) == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\0b", "x: is a binary file, expected text"),
        (b"abc\xff", r"x: is not UTF-8 text \(byte 3 is 0xFF\); save it as UTF-8"),
        ("é".encode("latin-1"), r"x: is not UTF-8 text \(byte 0 is 0xE9\)"),
        ("é".encode("utf-16"), "x: is not UTF-8 text|x: is a binary file"),
        (b"\xed\xa0\x80", "x: is not UTF-8 text"),  # half a character
    ],
)
def test_what_is_no_text(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DgemmaError, match=message):
        read_text(tmp_path / "x")


def test_what_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(DgemmaError, match=r"none: cannot be read \(No such file or directory\); check the path"):
        read_text(tmp_path / "none")
    with pytest.raises(DgemmaError, match=r"cannot be read \(Is a directory\)"):
        read_text(tmp_path)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DgemmaError, match="standard input is closed, expected a text"):
        read_text("-")


def test_what_never_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_BYTES", 2**20)
    if os.path.exists("/dev/zero"):
        with pytest.raises(DgemmaError, match="/dev/zero: is a binary file"):
            read_text("/dev/zero")
    (tmp_path / "x").write_bytes(b"a" * (2**20 + 1))
    with pytest.raises(DgemmaError, match="x: is larger than 1 MiB, expected a text; give the part that matters"):
        read_text(tmp_path / "x")


def test_a_file_is_replaced_and_nothing_else_is_touched(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("old")
    path.chmod(0o750)
    (tmp_path / "x.py.partial").write_text("the user's own")
    check_writable(path)
    assert path.read_text() == "old"
    replace_text(path, "né\r\n")
    assert path.read_bytes() == "né\r\n".encode() and stat.S_IMODE(path.stat().st_mode) == 0o750
    assert (tmp_path / "x.py.partial").read_text() == "the user's own"
    assert sorted(os.listdir(tmp_path)) == ["x.py", "x.py.partial"]


def test_a_new_file_has_the_permissions_of_one(tmp_path):
    check_writable(tmp_path / "new")
    assert not os.listdir(tmp_path)
    replace_text(tmp_path / "new", "a")
    (tmp_path / "other").write_text("a")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_link_stays_one(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/x").write_text("old")
    link, missing = tmp_path / "link", tmp_path / "missing"
    link.symlink_to("folder/x")
    missing.symlink_to("folder/y")
    for path in (link, missing):
        check_writable(path)
        replace_text(path, "new")
        assert path.is_symlink() and path.read_text() == "new"
    assert sorted(os.listdir(tmp_path / "folder")) == ["x", "y"]
    assert same_file(link, tmp_path / "folder/x") and not same_file(link, missing)
    assert same_file(tmp_path / "none", f"{tmp_path}/folder/../none")


def test_what_cannot_be_replaced(tmp_path):
    read_only = tmp_path / "x"
    read_only.write_text("old")
    read_only.chmod(0o444)
    for path, message in [
        (read_only, "x: is read-only, expected a file that may be written; change its permissions"),
        (tmp_path, "is not a file, expected a file's name; choose another name"),
        ("/dev/null", "/dev/null: is not a file"),
        (tmp_path / "none/x.html", r"cannot be written \(No such file or directory\), expected a name in a writable"),
        (read_only / "x.html", r"cannot be written \(Not a directory\)"),
        (tmp_path / ("x" * 300), r"cannot be written \(File name too long\)"),
    ]:
        with pytest.raises(DgemmaError, match=message):
            check_writable(path)
    assert read_only.read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(DgemmaError, match=r"x: cannot be written \(No space left on device\)"):
        replace_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x"]
