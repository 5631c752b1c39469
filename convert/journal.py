"""The journal of a conversion: which tensors are complete, so that an interrupted run can be continued.

Shapes   lines of JSON. The first is {"format", "version", "work"}; then {"source", "fingerprint", "tensors"}: these
         tensors of the output were made from that source file as it was, and are on the disk. A line with another
         fingerprint than the lines before takes back what they say of that source file
Differs  a line counts from its line break on; what a killed run left without one, or damaged, is cut off
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from mlx_dgemma.errors import DgemmaError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT, VERSION = "dgemma-journal", 1


class Journal:
    """Made by `open_journal`; `of_another` and `resume` come first."""

    def __init__(self, file):
        self._file = file  # open for appending, unbuffered
        self.done: set[str] = set()  # tensors of the output
        self.fingerprints: dict[Path, str] = {}  # of the source files now

    def of_another(self, work: str) -> int:
        """How many tensors are complete that belong to another conversion than `work`.

        work: a digest of everything but the sources' content; with another one nothing can be used.
        """
        header, entries = self._read()
        return 0 if header.get("work") == work else sum(len(entry["tensors"]) for entry in entries)

    def resume(self, work: str, fingerprints: dict[Path, str]) -> list[str]:
        """Take up what there is, or start anew. → notes on what cannot be used, and why."""
        self.fingerprints = fingerprints
        header, entries = self._read()
        if header.get("work") != work:
            self.restart(work)
            return []
        made = {}
        for entry in entries:
            fingerprint, tensors = made.get(entry["source"], ("", set()))
            kept = tensors if fingerprint == entry["fingerprint"] else set()
            made[entry["source"]] = entry["fingerprint"], kept | set(entry["tensors"])
        notes = []
        for source, fingerprint in fingerprints.items():
            before, tensors = made.get(source.name, (fingerprint, set()))
            if before == fingerprint:
                self.done |= tensors
            else:
                self.forget(source, fingerprint)
                notes.append(f"{source.name} changed since the interrupted run; {len(tensors)} tensors are done again")
        return notes

    def restart(self, work: str) -> None:
        """Nothing is complete."""
        self.done.clear()
        self._file.truncate(0)
        self._append({"format": FORMAT, "version": VERSION, "work": work})

    def add(self, source: Path, tensors: list[str]) -> None:
        """These are complete, and their bytes on the disk."""
        if tensors:
            self._append({"source": source.name, "fingerprint": self.fingerprints[source], "tensors": tensors})
            self.done.update(tensors)

    def forget(self, source: Path, fingerprint: str) -> None:
        """Nothing made from a file counts: it changed, and is now this."""
        self._append({"source": source.name, "fingerprint": fingerprint, "tensors": []})

    def close(self) -> None:
        """Before it is removed, where an open file cannot be: on Windows. Elsewhere it is kept: so is its lock."""
        if fcntl is None:
            self._file.close()

    def _append(self, entry):
        data, end = memoryview(json.dumps(entry).encode() + b"\n"), os.fstat(self._file.fileno()).st_size
        try:
            while data:  # a raw write may take less than it is given
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except BaseException:  # a full disk, Ctrl-C: behind half a line no other one would count
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise

    def _read(self):
        """The header ({} where there is none of ours) and the entries; the file then ends behind the last good line."""
        self._file.seek(0)
        lines, end = [], 0
        for line in self._file.read().splitlines(keepends=True):
            parsed = _parse(line)
            if parsed is None or (not lines and (parsed.get("format"), parsed.get("version")) != (FORMAT, VERSION)):
                break
            lines.append(parsed)
            end += len(line)
        self._file.truncate(end)
        return (lines[0], lines[1:]) if lines else ({}, [])


@contextlib.contextmanager
def open_journal(path: Path, out: Path) -> Iterator[Journal]:
    """The journal of the conversion to `out`, for this process alone. Raises DgemmaError where another one has it."""
    with path.open("a+b", buffering=0) as file:
        if not _locked(file):
            raise _in_use(out)
        yield Journal(file)


@contextlib.contextmanager
def sole_user(path: Path, out: Path) -> Iterator[Callable[[], bool]]:
    """Inside, this process alone has the file `path`, made for that, until someone removes it.

    Yields a function that says whether it is still there. Raises DgemmaError where another process has it, OSError
    where it cannot be made. On Windows, which has no such locks, there is no file.
    """
    if fcntl is None:
        yield lambda: True
        return
    while True:
        with path.open("ab") as file:
            if not _locked(file):
                raise _in_use(out)
            if _is_at(file, path):  # whoever had it until now may have removed it
                yield lambda: _is_at(file, path)
                return


def _is_at(file, path):
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _in_use(out):
    return DgemmaError(
        f"{out}: another conversion writes it now, expected one at a time; wait for it, or choose another name"
    )


def _locked(file):
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _parse(line):
    """A whole line of ours, or None."""
    with contextlib.suppress(ValueError):
        parsed = json.loads(line) if line.endswith(b"\n") else None
        if isinstance(parsed, dict) and ("work" in parsed or _is_entry(parsed)):
            return parsed
    return None


def _is_entry(parsed):
    return set(parsed) == {"source", "fingerprint", "tensors"} and isinstance(parsed["tensors"], list)
