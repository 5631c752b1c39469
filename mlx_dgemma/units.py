"""Numbers for people."""


def human_bytes(n: float) -> str:
    """Decimal units, as disks and download pages count: 1234567 → "1.23 MB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n:.0f} bytes"


def count(n: int, noun: str) -> str:
    """1 step, 2 steps."""
    return f"{n} {noun}{'s' * (n != 1)}"
