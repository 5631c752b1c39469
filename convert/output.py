"""An output, a folder or a file, that appears complete or not at all.

Source   write beside the target, then rename: a rename inside one folder is atomic
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.units import human_bytes

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def appears_when_done(out: Path, needed: int, folder: bool = True) -> Iterator[Path]:
    """Yield a scratch folder that takes the name `out` once the block succeeds; `needed` is in bytes.

    folder: False for a file, which the block creates. Whatever ends the block early (an error, Ctrl-C) removes the
    scratch. Raises DgemmaError where `out` exists, cannot be written, or the disk is or becomes full.
    """
    out = Path(out)
    check_free_name(out)
    scratch = scratch_of(out)
    try:
        remove(scratch)  # what a killed run left
        (scratch if folder else scratch.parent).mkdir(parents=True, exist_ok=True)
        check_space(out, needed)
        yield scratch
        scratch.rename(out)
    except OSError as error:
        explained = explain(error, out, needed)
        remove(scratch)
        raise explained from None
    except BaseException:
        remove(scratch)
        raise


def scratch_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def check_free_name(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise DgemmaError(f"{out}: already exists, expected a new name; choose another one or remove it first")


def check_space(out: Path, needed: int) -> None:
    """Raises DgemmaError where less than `needed` bytes are free."""
    free = _free_bytes(out)
    if free < needed:
        raise _disk_full(out, needed, free)


def explain(error: OSError, out: Path, needed: int) -> DgemmaError:
    """What an error at writing `out` means; `needed` is what it needs from here on, in bytes."""
    if error.errno in NO_SPACE:
        return _disk_full(out, needed, _free_bytes(out))
    return DgemmaError(
        f"{out}: cannot be written ({error.strerror or error}), expected a writable folder; choose another name"
    )


def remove(path: Path) -> None:
    """A file, a link or a whole folder, whether it is there or not."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _free_bytes(out):
    folder = Path(os.path.abspath(out)).parent
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _disk_full(out, needed, free):
    return DgemmaError(
        f"{out}: the disk is full, the output needs {human_bytes(needed)} ({needed} bytes) and "
        f"{human_bytes(free)} ({free} bytes) are free; free some space or choose another disk"
    )
