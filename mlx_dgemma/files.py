"""Text files as a user gives them: read whole, and replaced whole or not at all."""

import contextlib
import os
import shutil
import sys
from pathlib import Path

from .errors import DgemmaError


def read_text(path: str | Path) -> str:
    """A file's text, line ends as they are; "-" is standard input. Raises DgemmaError where it is not UTF-8 text."""
    name = "standard input" if str(path) == "-" else path
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
    except OSError as error:
        raise DgemmaError(f"{name}: cannot be read ({error.strerror}); check the path and its permissions") from None
    if b"\0" in content:
        raise DgemmaError(f"{name}: is a binary file, expected text")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DgemmaError(
            f"{name}: is not UTF-8 text (byte {error.start} is 0x{content[error.start]:02X}); save it as UTF-8"
        ) from None


def check_writable(path: str | Path) -> None:
    """Find out before long work whether `path` can be replaced. Raises DgemmaError."""
    path = _target(path)
    try:
        # Renaming over a file asks for no permission on it, but who made it read-only meant it.
        if path.exists() and not (path.stat().st_mode & 0o222 and os.access(path, os.W_OK)):
            raise DgemmaError(f"{path}: is read-only, expected a file that may be written; change its permissions")
        with open(_scratch(path), "w"):
            pass
        os.unlink(_scratch(path))
    except OSError as error:
        raise _unwritable(path, error) from None


def replace_text(path: str | Path, text: str) -> None:
    """Write `text`; an older file of that name stays until the new one is complete. Raises DgemmaError."""
    path = _target(path)
    scratch = _scratch(path)
    try:
        scratch.write_bytes(text.encode())
        if path.exists():
            shutil.copymode(path, scratch)
        os.replace(scratch, path)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def _target(path):
    """The file itself where `path` is a link, so that the link stays one."""
    path = Path(os.path.realpath(path))
    if os.path.exists(path) and not os.path.isfile(path):  # a folder; or a device, which a rename would replace
        raise DgemmaError(f"{path}: is not a file, expected a file's name; choose another name")
    return path


def _scratch(path):
    return path.with_name(path.name + ".partial")


def _unwritable(path, error):
    return DgemmaError(
        f"{path}: cannot be written ({error.strerror or error}), expected a name in a writable folder; "
        "choose another name or make the folder first"
    )
