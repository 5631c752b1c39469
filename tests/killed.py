"""A conversion that kills itself: python -m tests.killed SRC OUT RECIPE MOMENT, for test_resume.py.

MOMENT counts what a run does to its files: writes, syncs, lines of the journal. At that one only half is done, then the
process kills itself as `kill -9` would. "rename" and "renamed" are before and after OUT gets its name; "slow" sleeps at
each moment, for a signal from outside.
"""

import os
import signal
import sys
import time
from pathlib import Path

import convert.partial
import convert.work
from convert.__main__ import main


class Moments:
    def __init__(self, last):
        self.last, self.passed = last, 0

    def at(self, half):
        """One moment; `half` does half of what comes now."""
        if self.last == "slow":
            time.sleep(0.01)
            return
        self.passed += 1
        if str(self.passed) == self.last:
            half()
            die()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def wrap(owner, name, moments, half):
    whole = getattr(owner, name)

    def wrapped(*args):
        moments.at(lambda: half(whole, *args))
        return whole(*args)

    setattr(owner, name, wrapped)


def half_a_line(append, journal, entry):
    append(journal, entry)
    journal._file.truncate(journal._file.tell() - 20)


if __name__ == "__main__":
    src, out, recipe, last = sys.argv[1:]
    moments = Moments(last)
    convert.work.SYNC_BYTES, convert.work.PIECE = 50_000, 20_000
    File, Journal = convert.work._File, convert.work.Journal
    wrap(File, "write", moments, lambda write, file, offset, data: write(file, offset, bytes(data)[: len(data) // 2]))
    wrap(File, "sync", moments, lambda sync, file: None)
    wrap(Journal, "_append", moments, half_a_line)
    rename = Path.rename
    if last == "rename":
        Path.rename = lambda path, to: die()
    elif last == "renamed":
        Path.rename = lambda path, to: rename(path, to) and die()
    sys.argv = ["convert", src, out, "--recipe", recipe]
    sys.exit(main())
