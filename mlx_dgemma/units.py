"""Numbers for people, and from them."""

import re


def human_bytes(n: float) -> str:
    """Decimal units, as disks and download pages count: 1234567 → "1.23 MB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n:.0f} bytes"


def count(n: int, noun: str) -> str:
    """1 step, 2 steps."""
    return f"{n} {noun}{'s' * (n != 1)}"


def parse_bytes(text: str, default: str = "") -> int:
    """ "18GB", "16GiB", "500 MB", "4096B" → bytes. Raises ValueError for anything else.

    default: the unit of a plain number; without one that is an error too.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]i?)?(B?)\s*", text, re.IGNORECASE)
    if found and not (found[2] or found[3]):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]i?)?(B?)\s*", text.strip() + default, re.IGNORECASE)
    if not found or float(found[1]) <= 0 or not (found[2] or found[3]):
        raise ValueError(f"{text!r} is no size, expected one as 18GB or 16GiB")
    number, prefix, _ = found.groups()
    if prefix is None:
        return round(float(number))
    base = 1024 if prefix.lower().endswith("i") else 1000
    return round(float(number) * base ** ("kmgt".index(prefix[0].lower()) + 1))
