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
    scratch = out.with_name(out.name + ".partial")
    try:
        _remove(scratch)  # what a killed run left
        (scratch if folder else scratch.parent).mkdir(parents=True, exist_ok=True)
        free = _free_bytes(out)
        if free < needed:
            raise _disk_full(out, needed, free)
        yield scratch
        scratch.rename(out)
    except OSError as error:
        free = _free_bytes(out)
        _remove(scratch)
        if error.errno in NO_SPACE:
            raise _disk_full(out, needed, free) from None
        raise DgemmaError(
            f"{out}: cannot be written ({error.strerror or error}), expected a writable folder; choose another name"
        ) from None
    except BaseException:
        _remove(scratch)
        raise


def check_free_name(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise DgemmaError(f"{out}: already exists, expected a new name; choose another one or remove it first")


def _remove(scratch):
    if scratch.is_dir() and not scratch.is_symlink():
        shutil.rmtree(scratch, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            scratch.unlink()


def _free_bytes(out):
    folder = Path(os.path.abspath(out)).parent
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _disk_full(out, needed, free):
    return DgemmaError(
        f"{out}: the disk is full, the conversion needs {human_bytes(needed)} ({needed} bytes) and "
        f"{human_bytes(free)} ({free} bytes) are free; free some space or choose another disk"
    )
