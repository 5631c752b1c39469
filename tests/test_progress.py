"""Bars on a terminal, a line now and then elsewhere."""

import io

from rich.console import Console
from rich.progress import BarColumn, TextColumn

from mlx_dgemma import progress
from mlx_dgemma.progress import Bars


def shown(terminal, monkeypatch, step):
    """What 120 steps of so many seconds each show."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, force_interactive=terminal, width=60, get_time=lambda: now[0])
    with Bars(TextColumn("{task.description}"), BarColumn(), console=console, get_time=lambda: now[0]) as bars:
        task = bars.add_task("sensitivity", total=120)
        for _ in range(120):
            now[0] += step
            bars.advance(task)
    return out.getvalue()


def test_without_a_terminal_a_line_a_minute(monkeypatch):
    lines = shown(False, monkeypatch, 10.0).splitlines()
    assert len(lines) == 20 and lines[0].startswith("sensitivity: 5 %")
    assert lines[9] == "sensitivity: 50 %, 10 min left"
    assert "sensitivity: 50 %, 5 h 00 min left" in shown(False, monkeypatch, 300.0)


def test_what_is_quick_says_nothing(monkeypatch):
    assert shown(False, monkeypatch, 0.4) == ""


def test_a_terminal_gets_bars(monkeypatch):
    assert "━" in shown(True, monkeypatch, 10.0) and " left" not in shown(True, monkeypatch, 10.0)


def test_work_of_unknown_length(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    out = io.StringIO()
    with Bars(console=Console(file=out)) as bars:
        bars.update(bars.add_task("errors", total=None), completed=3)
    assert out.getvalue() == "errors: 3\n"
