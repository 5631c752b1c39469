"""The journal and the fingerprints that an interrupted conversion is continued by, down to torn lines."""

import errno
import json
import os
import random
from pathlib import Path

import pytest

from convert.checkpoint import fingerprint
from convert.journal import open_journal
from mlx_dgemma.errors import DgemmaError


def entries_of(path):
    source = Path("a.safetensors")
    with open_journal(path, Path("out")) as journal:
        journal.resume("work", {source: "1"})
        return journal.done


def test_a_torn_last_line_is_cut_off_wherever_it_ends(tmp_path):
    path, source = tmp_path / "journal", Path("a.safetensors")
    with open_journal(path, Path("out")) as journal:
        journal.resume("work", {source: "1"})
        journal.add(source, ["x", "y"])
        before = path.stat().st_size
        journal.add(source, ["z"])
    whole = path.read_bytes()
    for end in range(before, len(whole)):
        path.write_bytes(whole[:end])
        assert entries_of(path) == {"x", "y"}
        assert path.read_bytes() == whole[:before]
    path.write_bytes(whole)
    assert entries_of(path) == {"x", "y", "z"}
    for end in range(1, whole.index(b"\n")):  # not even the first line
        path.write_bytes(whole[:end])
        assert entries_of(path) == set()


class Slow:
    """A raw file that takes seven bytes at a time, and `left` in all; then the disk is full."""

    def __init__(self, file, left=1 << 30):
        self.file, self.left = file, left

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if not self.left:
            raise OSError(errno.ENOSPC, "No space left on device")
        n = self.file.write(bytes(data)[: min(7, self.left)])
        self.left -= n
        return n


def test_a_line_of_the_journal_is_written_whole(tmp_path):
    path, source = tmp_path / "journal", Path("a.safetensors")
    with open_journal(path, Path("out")) as journal:
        journal._file = Slow(journal._file)
        journal.resume("work", {source: "1"})
        journal.add(source, ["x", "y"])
    assert entries_of(path) == {"x", "y"}


def test_half_a_line_on_a_full_disk_is_taken_back(tmp_path):
    path, source = tmp_path / "journal", Path("a.safetensors")
    with open_journal(path, Path("out")) as journal:
        journal.resume("work", {source: "1"})
        journal.add(source, ["x"])
        whole, file = path.read_bytes(), journal._file
        journal._file = Slow(file, 20)
        with pytest.raises(OSError, match="No space left"):
            journal.add(source, ["y"])
        assert path.read_bytes() == whole and journal.done == {"x"}
        journal._file = file  # someone makes room
        journal.add(source, ["z"])
    assert entries_of(path) == {"x", "z"}


def test_a_source_that_changed_takes_back_what_was_said_of_it(tmp_path):
    a, b = Path("a"), Path("b")

    def resume(**fingerprints):
        with open_journal(tmp_path / "journal", Path("out")) as journal:
            notes = journal.resume("work", {Path(name): value for name, value in fingerprints.items()})
            return journal.done, notes

    with open_journal(tmp_path / "journal", Path("out")) as journal:
        journal.resume("work", {a: "1", b: "1"})
        journal.add(a, ["x", "y"])
        journal.add(b, ["z"])
    assert resume(a="1", b="1") == ({"x", "y", "z"}, [])
    assert resume(a="2", b="1") == ({"z"}, ["a changed since the interrupted run; 2 tensors are done again"])
    assert resume(a="2", b="1") == ({"z"}, [])
    assert resume(a="1", b="1")[0] == {"z"}


def test_a_later_version_of_the_journal_is_not_read(tmp_path):
    path = tmp_path / "journal"
    header = {"format": "dgemma-journal", "version": 2, "work": "work"}
    path.write_text(json.dumps(header) + '\n{"source": "a.safetensors", "fingerprint": "1", "tensors": ["x"]}\n')
    assert entries_of(path) == set()


def test_a_fingerprint_sees_size_time_start_and_samples(tmp_path):
    file = tmp_path / "file"
    data = bytearray(random.Random(0).randbytes(3 << 20))
    file.write_bytes(data)
    os.utime(file, ns=(0, 0))
    seen = {fingerprint(file)}
    for position in (8, len(data) - 1, len(data) - 3000):
        data[position] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=(0, 0))
        seen.add(fingerprint(file))
    os.utime(file, ns=(0, 1))
    seen.add(fingerprint(file))
    file.write_bytes(data + b"\0")
    os.utime(file, ns=(0, 0))
    seen.add(fingerprint(file))
    assert len(seen) == 6
    with pytest.raises(DgemmaError, match="nothing: cannot be read"):
        fingerprint(tmp_path / "nothing")
