"""A checkpoint on the hub of which one shard at a time is on the disk: fetched, converted, deleted.

Source   mlx_dgemma/hub_files.py fetches and verifies; the headers of all shards come first, so the plan and every
         check of names, dtypes and shapes happen before the first body
Differs  the commit is pinned when a conversion begins and kept for the runs that continue it, whatever the repo does

OUT.partial/OUT.source holds the small files, which commit it is, and the shard in hand; it goes when OUT.partial does.
OUT.partial/OUT.lock is held from before the hub is asked until the end: a run has the journal only once it has a plan.
"""

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from mlx_dgemma.config import read_json
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.hub import EXPECTED
from mlx_dgemma.hub_files import HubFile, HubRepo, fetch, fetch_start, hub_repo
from mlx_dgemma.shards import AGAIN, INDEX, MAX_HEADER, SIDECARS, StoredTensor, parse_header
from mlx_dgemma.units import count

from .checkpoint import CARRIED, Checkpoint, Weights, check_index, checkpoint_of
from .journal import open_journal, sole_user
from .output import explain, remove, scratch_of

FIRST_BYTES = 1 << 17  # of a shard, asked for first: most headers are shorter
PINNED = "pinned.json"
# hf_xet may keep what it fetches, up to 10 GB, in a cache of its own; it reads this when it is loaded.
XET_CACHE = "HF_XET_CHUNK_CACHE_SIZE_BYTES"


class Fetching(NamedTuple):
    """A shard is about to be fetched."""

    file: str
    bytes: int


def check_hub_id(src: str | Path) -> str:
    """`src` as owner/name. Raises DgemmaError for what is here already, or no repo of safetensors files."""
    name = str(src)
    if Path(src).expanduser().exists():
        raise DgemmaError(
            f"{name}: found a local {'folder' if Path(src).expanduser().is_dir() else 'file'}, expected a hub repo id "
            "such as owner/name with --low-disk; leave --low-disk out, what is here is read in place"
        )
    if name.endswith(".gguf"):
        raise DgemmaError(
            f"{name}: found a GGUF file, expected a repo of safetensors shards with --low-disk; leave it out"
        )
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise DgemmaError(f"{name}: no such folder or file; {EXPECTED}")
    return name


@contextlib.contextmanager
def low_disk_source(
    src: str | Path, out: Path | None, on_event: Callable[[Fetching], None] = lambda event: None
) -> Iterator[Checkpoint]:
    """The checkpoint of a hub id, its shards fetched when `holding` is entered and deleted when it is left.

    out: what will be written; None for a plan only. Raises DgemmaError; where that leaves no OUT.partial to continue
    from, nothing else is left either.
    """
    from huggingface_hub.utils import disable_progress_bars

    name = check_hub_id(src)
    os.environ.setdefault(XET_CACHE, "0")
    disable_progress_bars()  # huggingface_hub's own, which it would draw across ours
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            yield _open(_pinned(Path(folder), name), Path(folder), on_event)
        return
    with _alone(out) as folder:
        try:
            folder.mkdir(exist_ok=True)
            checkpoint = _open(_pinned(folder, name), folder, on_event)
        except OSError as error:
            raise explain(error, out, 0) from None
        yield checkpoint


@contextlib.contextmanager
def _alone(out):
    """OUT.partial/OUT.source, which may not be there yet; inside, no other run touches it. Raises DgemmaError."""
    scratch = scratch_of(out)
    folder, lock, journal = (scratch / f"{out.name}.{what}" for what in ("source", "lock", "journal"))
    with contextlib.ExitStack() as stack:
        try:
            if not scratch.is_dir():
                remove(scratch)
            scratch.mkdir(parents=True, exist_ok=True)
            still_ours = stack.enter_context(sole_user(lock, out))
            if journal.exists():
                with open_journal(journal, out):  # not a run without --low-disk either
                    pass
        except OSError as error:
            with contextlib.suppress(OSError):
                scratch.rmdir()  # where it is empty
            raise explain(error, out, 0) from None
        try:
            yield folder
        finally:
            # Nothing that another run could continue; and where the lock is gone, the rest may be another run's.
            if still_ours() and not any(path not in (folder, lock) for path in scratch.glob("*")):
                remove(scratch)


def _pinned(folder, name):
    """The repo at the commit of the run that is continued, or at its newest one."""
    path, earlier = folder / PINNED, {}
    with contextlib.suppress(OSError, ValueError):
        earlier = json.loads(path.read_text())
    same = earlier.get("repo") == name
    repo = hub_repo(name, earlier.get("revision") if same else None)
    if earlier and not same:  # whose files must not be taken for this one's
        remove(folder)
        folder.mkdir()
    path.write_text(json.dumps({"repo": name, "revision": repo.revision}) + "\n")
    return repo


def _open(repo, folder, on_event):
    if "config.json" not in repo.files:
        raise DgemmaError(f"{repo.name}: the repo has no config.json, expected a checkpoint's; check the name")
    for small in ("config.json", INDEX, *CARRIED):
        if small in repo.files:
            fetch(repo, repo.files[small], folder)
    shards = _shards(repo, folder)
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, t in _header(repo, shard, folder).items():
            if name in tensors:
                raise DgemmaError(f"{repo.name}/{shard.name}: {name} is stored in {tensors[name].file.name} too")
            tensors[name] = t
    weights = Weights(tensors)
    check_index(folder, weights)
    by_path = {folder / shard.name: shard for shard in shards}

    @contextlib.contextmanager
    def holding(file):
        shard = by_path[file]
        for other in by_path.keys() - {file}:  # of a run that was killed before it could delete it
            other.unlink(missing_ok=True)
        for half in folder.rglob("*.incomplete"):  # of a killed run
            if not half.name.endswith(f".{shard.hash}.incomplete"):  # which huggingface_hub resumes; newer ones do not
                half.unlink()
        on_event(Fetching(shard.name, shard.size))
        fetch(repo, shard, folder)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)

    def fingerprint(file):
        return f"{repo.name}@{repo.revision} {by_path[file].hash}"

    there = sum(file.stat().st_size for file in by_path if file.exists())  # fetched by a run that was killed
    note = f"{repo.name} at commit {repo.revision}: one of {count(len(shards), 'shard')} on the disk at a time"
    return checkpoint_of(folder, weights)._replace(
        name=repo.name.rsplit("/", 1)[-1],
        holding=holding,
        fingerprint=fingerprint,
        seen={file: fingerprint(file) for file in by_path},
        held_bytes=max(0, max(shard.size for shard in shards) - there),
        notes=(note,),
    )


def _shards(repo: HubRepo, folder: Path) -> list[HubFile]:
    """Those of the index, or every safetensors file where there is none."""
    if (folder / INDEX).exists():
        names = sorted(set(_weight_map(folder / INDEX).values()))
    else:
        names = sorted(name for name in repo.files if name.endswith(".safetensors") and name not in SIDECARS)
    if not names:
        raise DgemmaError(
            f"{repo.name}: the repo has no .safetensors file, expected a checkpoint's weights; {EXPECTED}"
        )
    if missing := [name for name in names if name not in repo.files]:
        raise DgemmaError(
            f"{repo.name}: shard {missing[0]} is missing ({len(missing)} of {len(names)} listed in {INDEX}); "
            "the repo is not complete, check it on the hub"
        )
    return [repo.files[name] for name in names]


def _weight_map(index):
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise DgemmaError(f"{index}: found no weight_map, expected tensor names and their files; check the repo")
    return weight_map


def _header(repo, shard, folder):
    """A shard's tensors, from its first bytes; it must be filled by them to its last byte, as a local one must."""
    start = fetch_start(repo, shard, FIRST_BYTES)
    needed = 8 + int.from_bytes(start[:8], "little")
    if len(start) < needed <= min(shard.size, MAX_HEADER):
        start = fetch_start(repo, shard, needed)
    tensors = parse_header(io.BytesIO(start), shard.size, folder / shard.name)
    expected = needed + sum(t.nbytes for t in tensors.values())
    if shard.size != expected:
        raise DgemmaError(
            f"{repo.name}/{shard.name}: found {shard.size} bytes, expected {expected} for the {len(tensors)} tensors "
            f"its header names; {AGAIN}"
        )
    return tensors
