"""The work of a conversion, the same for both targets: tensors in pieces of rows, done by a few threads in any order.

Shapes   a tensor is rows of weights, (rows, row); rows [start, stop) become as many rows of each array it has in the
         output (words, scales, biases; or the one tensor of a GGUF), at places that are known before
Differs  a piece is read, converted and written by one thread, which holds nothing else: reading, quantizing and
         writing overlap, and memory is threads × pieces, whatever a tensor's size

Source files come one after the other (`Checkpoint.holding`), and the journal learns of a tensor when its bytes are on
the disk.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from concurrent.futures import wait as wait_for
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from gguf_export.quantize import cores

from .checkpoint import Checkpoint, changed
from .journal import Journal

PIECE = 1 << 21  # weights: 8 MB in float32
WAITING = 2  # threads more than cores: while they wait for the disk, the others compute
SYNC_BYTES, SYNC_SECONDS = 1 << 26, 10.0  # written, or gone by, between two entries of the journal


class Place(NamedTuple):
    """Where the rows of one array go: row r to `offset` + r × `row_bytes`."""

    file: str  # in the output folder; "" where the output is a file
    offset: int
    row_bytes: int


class Job(NamedTuple):
    """One tensor to convert."""

    tensor: str  # its name in the output
    stored: str  # its name in the source
    source: Path  # the file it is read from
    shape: tuple[int, int]  # rows, weights per row
    places: tuple[Place, ...]
    convert: Callable[[int, int], Sequence[np.ndarray]]  # rows [start, stop) → as many rows for each place
    form: str  # what else decides its bytes, as "BF16 as Q4_K"
    together: int = 0  # rows of one expert, where pieces must not cross from one to the next
    piece: int = 0  # weights; 0: PIECE

    @property
    def nbytes(self) -> int:
        """Of the output."""
        return self.shape[0] * sum(place.row_bytes for place in self.places)

    def pieces(self) -> list[tuple[int, int]]:
        """Ranges of rows."""
        rows, row = self.shape
        step, together = max(1, (self.piece or PIECE) // max(row, 1)), self.together or rows
        return [
            (start, min(start + step, first + together))
            for first in range(0, rows, together)
            for start in range(first, first + together, step)
        ]


class Fixed(NamedTuple):
    """Bytes that are known before any weight is read: a header, a computed tensor."""

    file: str
    offset: int
    data: bytes
    tensor: str | None = None


class Work(NamedTuple):
    """A conversion that is ready to be done."""

    sizes: dict[str, int]  # file in the output folder ("" where the output is a file) → its bytes
    fixed: tuple[Fixed, ...]
    jobs: tuple[Job, ...]
    quantizer: str  # who computes: name and version
    finish: Callable[[Path], None] = lambda root: None  # writes what is small and comes last

    def digest(self) -> str:
        """Changes with everything that decides the bytes, but for the content of the source's files."""
        from importlib.metadata import PackageNotFoundError, version

        try:
            release = version("dgemma")
        except PackageNotFoundError:  # run from its folder, not installed
            release = ""
        digest = hashlib.sha256()
        plan = [
            [job.tensor, job.stored, job.source.name, job.shape, job.places, job.form, job.together]
            for job in sorted(self.jobs, key=lambda job: job.tensor)
        ]
        digest.update(json.dumps([release, self.quantizer, self.sizes, plan]).encode())
        for fixed in self.fixed:
            digest.update(f"{fixed.file} {fixed.offset} {len(fixed.data)}".encode() + fixed.data)
        return digest.hexdigest()

    def sources(self) -> list[Path]:
        """The files it reads, in the order it reads them."""
        return sorted({job.source for job in self.jobs})


def do(work: Work, root: Path, checkpoint: Checkpoint, journal: Journal, wrote: Callable[[str, int], None]) -> None:
    """Write what the journal lacks into `root`, a folder or a file. `wrote(tensor, nbytes)` follows every piece.

    Raises DgemmaError for a source that cannot be read, that changed or that holds no numbers, OSError where writing
    fails. The tensors that were complete are then in the journal.
    """
    # One thread of numpy's BLAS for each of ours: more would wait for each other by spinning.
    with (
        threadpool_limits(1, "blas"),
        _open_files(work, root) as files,
        ThreadPoolExecutor(cores() + WAITING) as pool,
    ):
        for fixed in work.fixed:
            files[fixed.file].write(fixed.offset, fixed.data)
            if fixed.tensor:
                wrote(fixed.tensor, len(fixed.data))
        for source in work.sources():
            jobs = [job for job in work.jobs if job.source == source and job.tensor not in journal.done]
            if not jobs:
                continue
            with checkpoint.holding(source):
                _do_file(pool, jobs, files, lambda tensors, source=source: journal.add(source, tensors), wrote)
                if (now := checkpoint.fingerprint(source)) != journal.fingerprints[source]:
                    journal.forget(source, now)
                    raise changed(source)
        for file in files.values():
            file.sync()
    work.finish(root)


def _do_file(pool, jobs, files, completed, wrote):
    """All pieces of one source file. `completed(tensors)` is called once their bytes are on the disk."""
    futures: dict[Future[int], Job] = {}
    left = {job.tensor: len(job.pieces()) for job in jobs}
    written: list[Job] = []  # not known to be on the disk yet
    synced = time.monotonic()

    def sync():
        nonlocal synced
        for name in {place.file for job in written for place in job.places}:
            files[name].sync()
        completed([job.tensor for job in written])
        written.clear()
        synced = time.monotonic()

    try:
        for job in jobs:
            for start, stop in job.pieces():
                futures[pool.submit(_do_piece, job, start, stop, files)] = job
        for future in as_completed(futures):
            job = futures[future]
            wrote(job.tensor, future.result())
            left[job.tensor] -= 1
            if not left[job.tensor]:
                written.append(job)
                enough = sum(job.nbytes for job in written) >= SYNC_BYTES
                if enough or time.monotonic() - synced >= SYNC_SECONDS:
                    sync()
        sync()
    except BaseException:
        for future in futures:
            future.cancel()
        wait_for(futures)  # nothing is read outside `holding`
        with suppress(OSError):  # what cannot be synced is not complete
            sync()
        raise


def _do_piece(job, start, stop, files):
    """Read, convert, write. → bytes written"""
    arrays = job.convert(start, stop)
    for place, array in zip(job.places, arrays, strict=True):
        data = memoryview(np.ascontiguousarray(array)).cast("B")
        if len(data) != (stop - start) * place.row_bytes:
            raise AssertionError(f"{job.tensor}: {len(data)} bytes for {stop - start} rows of {place.row_bytes}")
        files[place.file].write(place.offset + start * place.row_bytes, data)
    return sum(array.nbytes for array in arrays)


class _File:
    """A file of known size, written at any place from any thread."""

    def __init__(self, path: Path, size: int):
        # Unbuffered, so that a full disk is noticed at the write it happens in.
        path.touch()
        self._file = path.open("r+b", buffering=0)
        self._file.truncate(size)
        self._lock = threading.Lock()  # costs nothing: a file system lets one writer at a time into a file, too

    def write(self, offset: int, data) -> None:
        data = memoryview(data)
        with self._lock:
            self._file.seek(offset)
            while data:  # a raw write may take less than it is given
                data = data[self._file.write(data) :]

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


@contextmanager
def _open_files(work, root) -> Iterator[dict[str, _File]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(_File(root / name, size)) for name, size in work.sizes.items()}
