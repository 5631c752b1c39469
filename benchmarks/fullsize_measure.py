"""What a conversion is measured with: the disk's rates, the quantizer's rate, and a child process watched.

Shapes   bytes, seconds, weights per second
Differs  disk rates go around the page cache where the system allows it; a virtual disk may still be cached by its host
"""

import contextlib
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convert.plan_gguf import GgufPlan
from gguf_export.quantize import cores
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.floats import to_float32
from mlx_dgemma.gguf.types import FLOATS

from .fullsize_make import pool

BLOCK = 8 << 20  # bytes of one read or write, a multiple of every disk's sector
SAMPLE = 2 << 30  # bytes read or written for one rate
THREADS = (1, 4)  # a disk may need several requests at once to be as fast as it can
PIECE, REPEAT = 1 << 22, 3  # weights quantized for one rate, and how often
POLL = 0.1  # seconds between two looks at a process
CALLS = ("wait4", "preadv", "pwritev")  # of os; Windows has none of them


def check_system() -> None:
    """Raises DgemmaError where a process or a disk cannot be measured."""
    if missing := [name for name in CALLS if not hasattr(os, name)]:
        raise DgemmaError(f"this system has no os.{missing[0]}, expected Linux or macOS; rehearse there, or in WSL")


class DiskRates(NamedTuple):
    read: float  # bytes per second
    write: float
    how: str  # what kept the page cache out


def disk_rates(files: list[Path], scratch: Path, sample: int = SAMPLE) -> DiskRates:
    """The rates of `files` read and of a new file `scratch` written (and removed), of several tries the best."""
    how = _how(files[0])
    read = max(_read_rate(files, threads, sample, how) for threads in THREADS)
    return DiskRates(read, _write_rate(scratch, sample, how), how)


def drop_from_cache(files: list[Path]) -> bool:
    """Ask the system to forget the pages of `files`; False where it cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in files:
        with file.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _how(file):
    if hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError), _direct(file, os.O_RDONLY, "O_DIRECT"):
            return "O_DIRECT"
    if sys.platform == "darwin":
        return "F_NOCACHE"
    return "posix_fadvise" if hasattr(os, "posix_fadvise") else "nothing"


@contextlib.contextmanager
def _direct(path, flags, how):
    """A file descriptor whose transfers go past the page cache, as far as `how` does that."""
    fd = os.open(path, flags | (os.O_DIRECT if how == "O_DIRECT" else 0), 0o644)
    try:
        if how == "F_NOCACHE":
            import fcntl

            fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
        if how == "posix_fadvise":
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        yield fd
    finally:
        os.close(fd)


def _read_rate(files, threads, sample, how):
    """Blocks from the front of every file, an equal share of each."""
    share = max(BLOCK, sample // len(files))
    blocks = [(f, at) for f in files for at in range(0, min(share, f.stat().st_size), BLOCK)]
    block = mmap.mmap(-1, BLOCK)  # aligned to a page, as direct transfers want it

    def read(part):
        done = 0
        for file, positions in part.items():
            with _direct(file, os.O_RDONLY, how) as fd:
                done += sum(os.preadv(fd, [block], at) for at in positions)
        return done

    parts = [{} for _ in range(threads)]
    for i, (file, at) in enumerate(blocks):
        parts[i % threads].setdefault(file, []).append(at)
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as threads_pool:
        done = sum(threads_pool.map(read, parts))
    return done / (time.perf_counter() - started)


def _write_rate(scratch, sample, how):
    block = mmap.mmap(-1, BLOCK)
    block.write(np.random.default_rng(0).bytes(BLOCK))
    try:
        with _direct(scratch, os.O_WRONLY | os.O_CREAT, how) as fd:
            started = time.perf_counter()
            for at in range(0, sample, BLOCK):
                os.pwritev(fd, [block], at)
            os.fsync(fd)
            return sample / (time.perf_counter() - started)
    finally:
        scratch.unlink(missing_ok=True)


class QuantizerRate(NamedTuple):
    type: str
    weights: int  # of the plan
    per_second: float  # on every core, with nothing else on them

    @property
    def seconds(self) -> float:
        return self.weights / self.per_second


def quantizer_rates(plan, piece: int = PIECE) -> list[QuantizerRate]:
    """Of each precision in the plan that is quantized: its weights, and its rate on a piece that lies in memory."""
    is_gguf = isinstance(plan, GgufPlan)
    weights, rows = {}, {}
    for t in plan.tensors:
        precision = t.type if is_gguf else t.precision
        if precision.name not in FLOATS if is_gguf else precision.is_quantized:
            weights[precision] = weights.get(precision, 0) + t.tensor.size
            rows[precision] = t.tensor.shape[-1]
    measure = _ggml_rate if is_gguf else _mlx_rate
    return [QuantizerRate(p.name, n, measure(p, rows[p], piece)) for p, n in weights.items()]


def _ggml_rate(type, row, piece):
    from gguf_export.quantize import quantize

    values = to_float32(_rows(row, piece), "BF16")
    return cores() * values.size / _least_cpu(lambda: quantize(values, type))


def _mlx_rate(precision, row, piece):
    from convert.to_mlx import quantize

    values = _rows(row, piece)
    return cores() * values.size / _least_cpu(lambda: quantize(values, "BF16", precision))


def _rows(row, piece):
    values = pool("expert")
    n = max(1, piece // row)
    return np.resize(values, n * row).reshape(n, row)


def _least_cpu(work: Callable[[], object]) -> float:
    """Seconds of one core that `work` takes, on however many: what other programs take does not count."""
    times = []
    for _ in range(REPEAT):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


class Watched(NamedTuple):
    """A command that has ended."""

    code: int
    output: str
    seconds: float
    cpu_seconds: float
    system_seconds: float  # of these, in the system: reading, writing
    peak_bytes: int  # resident, with the pages of mapped files, up to the last look; the page cache is not in it
    peak_own_bytes: int | None  # resident without mapped files; None where the system does not say
    read_bytes: int | None  # from the disk
    written_bytes: int | None
    other_cores: float | None  # that other programs kept busy meanwhile; None where the system does not say


def watch(command: list[str], cwd: Path) -> Watched:
    """Run a command to its end; its stderr goes to ours, its stdout is kept."""
    started, busy = time.perf_counter(), _busy_seconds()
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, text=True) as child:
        own, peak, io = None, None, {}
        try:
            with ThreadPoolExecutor(1) as reader:
                output = reader.submit(child.stdout.read)
                while True:
                    pid, ended, usage = os.wait4(child.pid, os.WNOHANG)
                    if pid:
                        break
                    status = _status(child.pid)
                    own = _most(own, status.get("RssAnon"))
                    peak = _most(peak, status.get("VmHWM"))
                    io = _proc_io(child.pid) or io
                    time.sleep(POLL)
                seconds, busy_then = time.perf_counter() - started, _busy_seconds()
                child.returncode = os.waitstatus_to_exitcode(ended)
        except BaseException:
            if child.returncode is None:
                child.terminate()
            raise
    cpu = usage.ru_utime + usage.ru_stime
    return Watched(
        child.returncode,
        output.result(),
        seconds,
        cpu,
        usage.ru_stime,
        # Linux counts what this program held when it started the other one, too; hence the look at the process itself.
        peak or usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        own,
        io.get("read_bytes"),
        io.get("write_bytes"),
        None if busy is None else max(0.0, (busy_then - busy - cpu) / seconds),
    )


def _busy_seconds():
    """Of all cores, since the system started."""
    with contextlib.suppress(OSError, ValueError):
        user, nice, system, _idle, _wait, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
        return (user + nice + system + sum(rest[:3])) / os.sysconf("SC_CLK_TCK")
    return None


def _most(a, b):
    return b if a is None else a if b is None else max(a, b)


def _status(pid):
    """Sizes in bytes, as /proc names them; empty on other systems."""
    with contextlib.suppress(OSError, ValueError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        sizes = (line.split() for line in lines if line.endswith(" kB"))
        return {name.rstrip(":"): 1024 * int(size) for name, size, _ in sizes}
    return {}


def _proc_io(pid):
    with contextlib.suppress(OSError, ValueError):
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
        return {key: int(value) for key, _, value in (s.partition(":") for s in lines)}
    return {}
