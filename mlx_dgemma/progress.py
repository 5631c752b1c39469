"""Progress of long work on stderr: rich's bars on a terminal, elsewhere a line now and then.

Source   rich.progress, which without a terminal shows nothing before the end
"""

import time

from rich.console import Console
from rich.progress import Progress, ProgressColumn

EVERY = 60.0  # seconds between two lines
RECENT = 3600.0  # seconds that the time left is estimated from; a step of a large model's measurement may take minutes


class Bars(Progress):
    """`rich.progress.Progress` with its methods; where nobody watches, one line a minute instead of bars."""

    def __init__(self, *columns: ProgressColumn, console: Console | None = None, **options):
        console = console or Console(stderr=True)
        super().__init__(
            *columns, console=console, disable=not console.is_interactive, speed_estimate_period=RECENT, **options
        )
        self._told = time.monotonic()

    def update(self, task_id, **fields):
        super().update(task_id, **fields)
        self._tell(task_id)

    def advance(self, task_id, advance=1):
        super().advance(task_id, advance)
        self._tell(task_id)

    def _tell(self, task_id):
        if self.console.is_interactive or time.monotonic() - self._told < EVERY:
            return
        self._told = time.monotonic()
        task = next(task for task in self.tasks if task.id == task_id)
        left = f", {_minutes(task.time_remaining)} left" if task.time_remaining else ""
        done = f"{task.completed:.0f}" if task.total is None else f"{task.percentage:.0f} %"
        self.console.print(f"{task.description}: {done}{left}", highlight=False, markup=False, soft_wrap=True)


def _minutes(seconds: float) -> str:
    """90 min, 2 h 05 min"""
    hours, minutes = divmod(max(1, round(seconds / 60)), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
