"""OUT.partial: what a conversion has written so far. The next run of the same command goes on from there.

Shapes   OUT.partial/OUT is the output under way, a folder or a file; OUT.partial/OUT.journal says what is complete
Source   journal.py; the rename of output.py makes OUT appear complete or not at all

Whatever ends a run early (Ctrl-C, a full disk, a source that cannot be read, `kill -9`) keeps the tensors that were
complete. Where there are none, nothing is left behind.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.units import count

from .journal import Journal, open_journal
from .output import check_free_name, check_space, explain, remove, scratch_of
from .work import Work

BLOCK = 512  # bytes, what st_blocks counts


class Partial(NamedTuple):
    """An output under way."""

    path: Path  # takes OUT's name in the end
    journal: Journal
    notes: tuple[str, ...]  # on what an earlier run left of files that changed since

    def discard(self) -> None:
        """Nothing of it is right."""
        self.journal.done.clear()


@contextlib.contextmanager
def partial_output(out: Path, work: Work, fingerprints: dict[Path, str], needed: int) -> Iterator[Partial]:
    """Yield the output under way, which takes the name `out` once the block succeeds.

    fingerprints: of the source files. needed: bytes of the whole output. Raises DgemmaError where `out` exists, is
    being written by another run, cannot be written, where another conversion's work is kept, or the disk is or becomes
    full; the text of any DgemmaError or KeyboardInterrupt from then on ends with what is kept.
    """
    check_free_name(out)
    scratch = scratch_of(out)
    path = scratch / out.name
    try:
        if not scratch.is_dir() or scratch.is_symlink():
            remove(scratch)  # a file of this name is no work of ours
        scratch.mkdir(parents=True, exist_ok=True)
        with open_journal(scratch / f"{out.name}.journal", out) as journal:
            if complete := journal.of_another(work.digest()):
                raise _another(scratch, out, complete)
            try:
                check_free_name(out)  # the run that had the journal until now may have finished
                notes = _resume(path, journal, work, fingerprints)
                check_space(out, _missing(path, needed))
                yield Partial(path, journal, tuple(notes))
                check_free_name(out)
                path.rename(out)
            except OSError as error:
                explained = explain(error, out, _missing(path, needed))
                raise _say_what_is_kept(explained, path, out, journal, work) from None
            except (DgemmaError, KeyboardInterrupt) as error:
                raise _say_what_is_kept(error, path, out, journal, work) from None
            finally:
                if not journal.done or _has_appeared(path, out):
                    journal.close()
                    remove(scratch)
    except OSError as error:
        raise explain(error, out, needed) from None


def _another(scratch, out, complete):
    """Minutes of somebody's work are not thrown away for a mistyped recipe."""
    return DgemmaError(
        f"{scratch} keeps {count(complete, 'tensor')} of an interrupted conversion with another recipe, option, "
        f"importance matrix, GPTQ file, source, or release of this program or its quantizers, expected this one; give "
        f"that command again, choose another name than {out.name}, or delete that folder"
    )


def _resume(path, journal, work, fingerprints):
    """Agree on what is there: the journal and the files, and nothing else. → notes"""
    notes = journal.resume(work.digest(), fingerprints)
    if not all(_size(path / name) == size for name, size in work.sizes.items()):
        journal.restart(work.digest())
    if not journal.done:
        remove(path)
    known = {path / name for name in work.sizes}
    for file in (file for file in _files(path) if file not in known):
        remove(file)  # written at the end, and so again
    if "" not in work.sizes:
        path.mkdir(exist_ok=True)
    return notes


def _has_appeared(path, out):
    """Asked of the disk: Ctrl-C may come between the rename and the next line."""
    return os.path.lexists(out) and not os.path.lexists(path)


def _say_what_is_kept(error, path, out, journal, work):
    if not journal.done or _has_appeared(path, out):
        return error
    kept = f"{len(journal.done)} of {len(work.jobs)} tensors are kept in {path.parent}"
    text = f"{kept}; the same command goes on from there, or delete that folder"
    return type(error)(f"{error}; {text}" if str(error) else text)


def _missing(path, needed):
    """Bytes of the output that take no space yet. A file with holes takes less than its size."""
    stats = [file.stat() for file in _files(path)]
    return max(0, needed - sum(min(s.st_size, getattr(s, "st_blocks", 0) * BLOCK) for s in stats))


def _files(path):
    return [path] if path.is_file() else sorted(path.glob("*"))


def _size(file):
    return file.stat().st_size if file.is_file() else None
