"""Text files as a user gives them: read whole, and replaced whole or not at all."""

import contextlib
import os
import secrets
import shutil
import sys
from pathlib import Path

from .errors import DgemmaError

MOST_BYTES = 2**26  # beyond any model's context; and a device such as /dev/zero never ends


def read_text(path: str | Path) -> str:
    """A file's text, line ends as they are; "-" is standard input. Raises DgemmaError where it is not UTF-8 text."""
    name = "standard input" if str(path) == "-" else path
    try:
        content = _read_input() if str(path) == "-" else _read_file(path)
    except OSError as error:
        raise DgemmaError(f"{name}: cannot be read ({error.strerror}); check the path and its permissions") from None
    if b"\0" in content:
        raise DgemmaError(f"{name}: is a binary file, expected text")
    if len(content) > MOST_BYTES:
        raise DgemmaError(f"{name}: is larger than {MOST_BYTES >> 20} MiB, expected a text; give the part that matters")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DgemmaError(
            f"{name}: is not UTF-8 text (byte {error.start} is 0x{content[error.start]:02X}); save it as UTF-8"
        ) from None


def same_file(a: str | Path, b: str | Path) -> bool:
    """Whether two names lead to one file."""
    with contextlib.suppress(OSError):
        return os.path.samefile(a, b)
    return os.path.realpath(a) == os.path.realpath(b)


def check_writable(path: str | Path) -> None:
    """Find out before long work whether `path` can be replaced. Raises DgemmaError."""
    path = _target(path)
    try:
        # Renaming over a file asks for no permission on it, but who made it read-only meant it.
        mode = _mode(path)
        if mode is not None and not (mode & 0o222 and os.access(path, os.W_OK)):
            raise DgemmaError(f"{path}: is read-only, expected a file that may be written; change its permissions")
        with _scratch(path):
            pass
    except OSError as error:
        raise _unwritable(path, error) from None


def replace_text(path: str | Path, text: str) -> None:
    """Write `text`; an older file of that name stays until the new one is complete. Raises DgemmaError."""
    path = _target(path)
    try:
        with _scratch(path) as scratch:
            scratch.write_bytes(text.encode())
            if path.exists():
                with contextlib.suppress(OSError):  # only an administrator may, and only for one does it matter
                    os.chown(scratch, path.stat().st_uid, path.stat().st_gid)
                shutil.copymode(path, scratch)
            os.replace(scratch, path)
    except OSError as error:
        raise _unwritable(path, error) from None


def _read_file(path):
    with open(path, "rb") as file:
        return file.read(MOST_BYTES + 1)


def _read_input():
    if sys.stdin is None:
        raise DgemmaError("standard input is closed, expected a text; give a file, or pipe the text in")
    return sys.stdin.buffer.read(MOST_BYTES + 1)


def _target(path):
    """The file itself where `path` is a link, so that the link stays one."""
    path = Path(os.path.realpath(path))
    if os.path.exists(path) and not os.path.isfile(path):  # a folder; or a device, which a rename would replace
        raise DgemmaError(f"{path}: is not a file, expected a file's name; choose another name")
    return path


def _mode(path):
    with contextlib.suppress(FileNotFoundError):
        return os.stat(path).st_mode


@contextlib.contextmanager
def _scratch(path):
    """A new file beside `path`, gone when the block ends, unless it was renamed. No other file is touched."""
    scratch = path.with_name(f".{secrets.token_hex(4)}.partial")
    with open(scratch, "x"):
        pass
    try:
        yield scratch
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def _unwritable(path, error):
    return DgemmaError(
        f"{path}: cannot be written ({error.strerror or error}), expected a name in a writable folder; "
        "choose another name or make the folder first"
    )
