"""Text that people read: JSON with a line per entry, and files of text."""

import json
from pathlib import Path

from mlx_dgemma.errors import DgemmaError


def write_text(path: str | Path, text: str) -> None:
    """Raises DgemmaError where that cannot be."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DgemmaError(f"{path}: cannot be written ({error.strerror}); check the path") from None


def as_text(value, indent: int = 0, flat_from: int = 4) -> str:
    """JSON with a line per entry; deeper than `flat_from` levels, or short enough, stays on its line."""
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or not value or len(flat) <= 100 - 2 * indent or indent >= flat_from:
        return flat + ("\n" if indent == 0 else "")
    pad, end = "  " * (indent + 1), "  " * indent
    if isinstance(value, dict):
        items = [f"{json.dumps(k)}: {as_text(v, indent + 1, flat_from)}" for k, v in value.items()]
        opening, closing = "{", "}"
    else:
        items, (opening, closing) = [as_text(v, indent + 1, flat_from) for v in value], "[]"
    text = opening + "\n" + ",\n".join(pad + item for item in items) + "\n" + end + closing
    return text + ("\n" if indent == 0 else "")
