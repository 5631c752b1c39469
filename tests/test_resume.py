"""Interrupted and continued: whatever ends a run and wherever, the next one gives the bytes of an undisturbed one."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import convert.api
import convert.journal
import convert.output
import convert.partial
import convert.work
from convert import Planned, Resumed, Worked
from convert import convert as run
from convert.checkpoint import open_checkpoint
from convert.journal import open_journal
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.tensors import text_tensors
from tests.tiny import make_tiny_checkpoint, tiny_config, tiny_weights, write_json, write_weights

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo/checkpoint"
TARGETS = [("out", "q4"), ("out.gguf", "Q4_K_M")]


def contents(path):
    """Every file of an output, by name."""
    files = [path] if path.is_file() else path.rglob("*")
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file()}


@pytest.fixture(scope="module", params=TARGETS, ids=["mlx", "gguf"])
def demo(request, tmp_path_factory):
    """Name, recipe, and what an undisturbed run writes."""
    name, recipe = request.param
    out = tmp_path_factory.mktemp("demo") / name
    run(DEMO, out, to=to_of(name), recipe=recipe)
    return name, recipe, contents(out)


def to_of(name):
    return "gguf" if name.endswith(".gguf") else "mlx"


@pytest.fixture
def sharded(tmp_path):
    return make_tiny_checkpoint(tmp_path / "source", shards=3, dtype="bfloat16")


@pytest.fixture
def every_tensor(monkeypatch):
    """The journal hears of every tensor at once."""
    monkeypatch.setattr(convert.work, "SYNC_BYTES", 0)
    monkeypatch.setattr(convert.work, "cores", lambda: 1)
    monkeypatch.setattr(convert.work, "WAITING", 0)


class Stop(Exception):
    pass


def stop_after(monkeypatch, pieces, error):
    """`error` (raised, or called) instead of the piece after so many."""
    do_piece, calls = convert.work._do_piece, []

    def stopping(*args):
        calls.append(1)
        if len(calls) > pieces:
            if isinstance(error, BaseException):
                raise error
            error()
        return do_piece(*args)

    monkeypatch.setattr(convert.work, "_do_piece", stopping)


def interrupted(monkeypatch, pieces, *args, error=None, **options):
    """A run that stops after so many pieces. → the text of what it raised"""
    with monkeypatch.context() as patch:
        stop_after(patch, pieces, error or KeyboardInterrupt())
        with pytest.raises((KeyboardInterrupt, DgemmaError)) as stopped:
            run(*args, **options)
    return str(stopped.value)


def resumed(*args, **options):
    """Run again. → (what was taken over or None, bytes reported as done from then on)"""
    events = []
    run(*args, on_event=events.append, **options)
    assert isinstance(events[0], Planned)
    found = [event for event in events if isinstance(event, Resumed)]
    assert len(found) <= 1
    return (found[0] if found else None), sum(e.bytes for e in events if isinstance(e, Worked) and e.phase == "convert")


# Kill -9


def killed(out, recipe, moment, **options):
    command = [sys.executable, "-m", "tests.killed", str(DEMO), str(out), recipe, str(moment)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)


def test_killed_twenty_times_at_any_moment(demo, tmp_path):
    name, recipe, want = demo
    out, draw, survived = tmp_path / name, random.Random(0), 0
    for _ in range(20):
        process = killed(out, recipe, draw.randint(1, 60))
        error = process.communicate()[1].decode()
        if process.returncode == 0:  # it was done before the moment came
            survived += 1
            assert contents(out) == want
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        else:
            assert process.returncode == -signal.SIGKILL, error
            assert not out.exists()
    assert survived < 10
    run(DEMO, out, to=to_of(name), recipe=recipe)
    assert contents(out) == want
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("moment", ["rename", "renamed"])
def test_killed_at_the_end(demo, tmp_path, moment):
    """Before the rename nothing but that is left to do; after it there is an empty OUT.partial, which does no harm."""
    name, recipe, want = demo
    out = tmp_path / name
    process = killed(out, recipe, moment)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert out.exists() == (moment == "renamed")
    if moment == "rename":
        taken, again = resumed(DEMO, out, to=to_of(name), recipe=recipe)
        assert taken.tensors == 143 and again < 1000  # what is computed and not read
    assert contents(out) == want
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    run(DEMO, out, to=to_of(name), recipe=recipe)
    assert contents(out) == want
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("wait", [0.05, 0.3, 0.7])
def test_killed_from_outside(demo, tmp_path, wait):
    name, recipe, want = demo
    out = tmp_path / name
    process = killed(out, recipe, "slow")
    while not out.with_name(name + ".partial").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    time.sleep(wait)
    process.kill()
    process.communicate()
    assert not out.exists()
    run(DEMO, out, to=to_of(name), recipe=recipe)
    assert contents(out) == want


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on(tmp_path, number):
    out = tmp_path / "out"
    process = killed(out, "q4", "slow")
    journal = tmp_path / "out.partial/out.journal"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(number)
    error = process.communicate()[1].decode()
    assert process.returncode == 130
    last = error.splitlines()[-1]
    kept = f" of 143 tensors are kept in {tmp_path / 'out.partial'}; the same command goes on from there, or delete "
    assert last.startswith("interrupted; ") and last.endswith(kept + "that folder")
    taken, _ = resumed(DEMO, out, recipe="q4")
    assert taken.tensors == int(last.split()[1])


# What is taken over


@pytest.mark.parametrize(("name", "recipe"), TARGETS)
def test_what_was_complete_is_not_done_again(sharded, tmp_path, monkeypatch, every_tensor, name, recipe):
    options = {"to": to_of(name), "recipe": recipe}
    report = run(sharded, tmp_path / "want", **options)
    out = tmp_path / name
    assert interrupted(monkeypatch, 100, sharded, out, **options).startswith(
        f"100 of 143 tensors are kept in {out}.partial; the same command"
    )
    again = []
    with monkeypatch.context() as patch:
        do_piece = convert.work._do_piece
        patch.setattr(convert.work, "_do_piece", lambda job, *args: again.append(job.tensor) or do_piece(job, *args))
        taken, worked = resumed(sharded, out, **options)
    assert (taken.tensors, taken.notes, len(again)) == (100, (), 43)
    assert taken.bytes + worked == report.plan.total_bytes
    assert contents(out) == contents(tmp_path / "want")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "source", "want"])


def test_pieces_in_any_order_give_the_same_bytes(sharded, tmp_path, monkeypatch):
    run(sharded, tmp_path / "want", recipe="q4")
    monkeypatch.setattr(convert.work, "PIECE", 1000)
    pieces, draw = convert.work.Job.pieces, random.Random(0)
    monkeypatch.setattr(convert.work.Job, "pieces", lambda job: draw.sample(pieces(job), len(pieces(job))))
    run(sharded, tmp_path / "out", recipe="q4")
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


def test_pieces_cover_every_row_once_and_end_with_their_expert(monkeypatch):
    monkeypatch.setattr(convert.work, "PIECE", 40)
    job = convert.work.Job("t", "t", Path(), (12, 10), (), None, "", 6)
    assert job.pieces() == [(0, 4), (4, 6), (6, 10), (10, 12)]
    assert job._replace(together=0).pieces() == [(0, 4), (4, 8), (8, 12)]
    assert job._replace(shape=(3, 1000), together=0).pieces() == [(0, 1), (1, 2), (2, 3)]


# What cannot be taken over


CHANGES = {
    "recipe": {"recipe": "Q5_0"},
    "a tensor's type": {"tensor_types": ("ffn_down_exps=Q5_0",)},
    "imatrix": {"imatrix": "i.gguf"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_conversion_leaves_the_work_alone(sharded, tmp_path, monkeypatch, every_tensor, change):
    from mlx_dgemma.config import read_config
    from tests.test_convert_gguf import imatrix_for

    imatrix_for(read_config(sharded), tmp_path / "i.gguf")
    changed = CHANGES[change] | ({"imatrix": tmp_path / "i.gguf"} if change == "imatrix" else {})
    first = {"to": "gguf", "recipe": "Q4_0"}
    interrupted(monkeypatch, 50, sharded, tmp_path / "x.gguf", **first)
    refused(sharded, tmp_path / "x.gguf", **first | changed)
    assert resumed(sharded, tmp_path / "x.gguf", **first)[0].tensors == 50
    run(sharded, tmp_path / "want.gguf", **first)
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "want.gguf").read_bytes()


def refused(source, out, **options):
    """A run that finds another conversion's tensors and touches nothing."""
    partial = out.with_name(f"{out.name}.partial")
    before = contents(partial)
    with pytest.raises(DgemmaError, match=r"keeps \d\d tensors of an interrupted conversion with another rec"):
        run(source, out, **options)
    assert contents(partial) == before and not out.exists()


def test_without_complete_tensors_another_conversion_may_have_the_name(sharded, tmp_path, monkeypatch):
    """As `kill -9` leaves it in the first seconds."""
    with monkeypatch.context() as patch:
        patch.setattr(convert.partial, "remove", lambda path: None)
        interrupted(patch, 0, sharded, tmp_path / "out", recipe="q4")
    assert (tmp_path / "out.partial").is_dir()
    run(sharded, tmp_path / "out", recipe="q8")
    run(sharded, tmp_path / "want", recipe="q8")
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


def test_another_imatrix_of_the_same_name_is_another_conversion(sharded, tmp_path, monkeypatch, every_tensor):
    from convert.imatrix import write_imatrix
    from mlx_dgemma.config import read_config
    from tests.test_convert_gguf import imatrix_for

    imatrix = imatrix_for(read_config(sharded), tmp_path / "i.gguf")
    options = {"to": "gguf", "recipe": "Q4_0", "imatrix": tmp_path / "i.gguf"}
    interrupted(monkeypatch, 50, sharded, tmp_path / "x.gguf", **options)
    entries = {name: entry._replace(sums=entry.sums[:, ::-1].copy()) for name, entry in imatrix.entries.items()}
    write_imatrix(imatrix._replace(entries=entries), tmp_path / "i.gguf")
    refused(sharded, tmp_path / "x.gguf", **options)


def test_of_a_changed_source_file_nothing_is_kept(sharded, tmp_path, monkeypatch, every_tensor):
    """And when it becomes what it was, neither: its tensors were written over."""
    first = sharded / "model-00001-of-00003.safetensors"
    other = make_tiny_checkpoint(tmp_path / "other", seed=1, shards=3, dtype="bfloat16") / first.name
    shutil.copy2(first, tmp_path / "kept")
    interrupted(monkeypatch, 60, sharded, tmp_path / "out", recipe="q4")
    shutil.copy2(other, first)
    with monkeypatch.context() as patch:  # killed before the journal hears of anything
        patch.setattr(convert.work, "SYNC_BYTES", 1 << 30)
        patch.setattr(convert.journal.Journal, "add", lambda *_: None)
        interrupted(monkeypatch, 5, sharded, tmp_path / "out", recipe="q4")
    shutil.copy2(tmp_path / "kept", first)
    taken, _ = resumed(sharded, tmp_path / "out", recipe="q4")
    assert 0 < taken.tensors < 60
    assert taken.notes == (f"{first.name} changed since the interrupted run; 0 tensors are done again",)
    run(sharded, tmp_path / "want", recipe="q4")
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


def test_a_source_that_changed_between_runs(sharded, tmp_path, monkeypatch, every_tensor):
    interrupted(monkeypatch, 60, sharded, tmp_path / "out", recipe="q4")
    write_weights(sharded, tiny_weights(tiny_config(), seed=1), "bfloat16", shards=3)
    taken, _ = resumed(sharded, tmp_path / "out", recipe="q4")
    assert taken.tensors == 0
    assert [note.split(" changed since")[0] for note in taken.notes] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
    ]
    run(sharded, tmp_path / "want", recipe="q4")
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


@pytest.mark.parametrize("change", ["a byte", "shorter"])
def test_a_source_that_changes_during_the_conversion_is_named(sharded, tmp_path, monkeypatch, every_tensor, change):
    file = sharded / "model-00002-of-00003.safetensors"

    def spoil():
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data[: len(data) // 2 if change == "shorter" else None])

    with monkeypatch.context() as patch:
        stop_after(patch, 70, spoil)
        with pytest.raises(DgemmaError) as error:
            run(sharded, tmp_path / "out", recipe="q4")
    text = {"a byte": "changed while it was converted, expected the same file until the end", "shorter": "ends before"}
    assert str(error.value).startswith(f"{file}: {text[change]}")
    assert " of 143 tensors are kept in " in str(error.value)
    write_weights(sharded, tiny_weights(tiny_config(), seed=1), "bfloat16", shards=3)
    resumed(sharded, tmp_path / "out", recipe="q4")
    run(sharded, tmp_path / "want", recipe="q4")
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_source_that_is_replaced_after_its_headers_were_read(tmp_path, kind):
    """Its tensors may lie elsewhere now: what the plan says of it is of the file before."""
    folders = [make_tiny_checkpoint(tmp_path / f"{seed}", seed=seed, shards=3, dtype="bfloat16") for seed in (0, 1)]
    file, other = (folder / "model-00002-of-00003.safetensors" for folder in folders)
    source = folders[0]
    if kind == "gguf":
        source = file = tmp_path / "0.gguf"
        other = tmp_path / "1.gguf"
        for folder, to in zip(folders, (file, other), strict=True):
            run(folder, to, to="gguf", recipe="BF16")

    def replace(event):
        if isinstance(event, Planned):
            other.rename(file)

    with pytest.raises(DgemmaError) as error:
        run(source, tmp_path / "out", recipe="q4", on_event=replace)
    assert str(error.value).startswith(f"{file}: changed while it was converted, expected the same file until the end")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_another_numpy_is_no_continuation_where_scales_are_refitted(sharded, monkeypatch):
    from convert import to_mlx

    checkpoint, plan = open_checkpoint(sharded), run(sharded, recipe="q4", dry_run=True).plan

    def digests():
        return [to_mlx.folder_work(checkpoint, plan, refitted).digest() for refitted in (False, True)]

    before = digests()
    monkeypatch.setattr(np, "__version__", "0.0.1")
    after = digests()
    assert before[0] == after[0] and before[1] != after[1]


@pytest.mark.parametrize("damage", ["journal", "data", "size"])
def test_leftovers_that_are_not_whole_are_not_used(sharded, tmp_path, monkeypatch, every_tensor, damage):
    interrupted(monkeypatch, 60, sharded, tmp_path / "out", recipe="q4")
    (shard,) = (tmp_path / "out.partial/out").glob("*.safetensors")
    if damage == "journal":
        (tmp_path / "out.partial/out.journal").write_bytes(b"\0" * 100)
    elif damage == "data":
        shard.unlink()
    else:
        os.truncate(shard, 1000)
    taken, _ = resumed(sharded, tmp_path / "out", recipe="q4")
    assert taken is None
    run(sharded, tmp_path / "want", recipe="q4")
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


def test_what_the_source_no_longer_has_is_not_carried_along(sharded, tmp_path, monkeypatch, every_tensor):
    """Killed after the small files were written, before the rename; then the source's README is removed."""
    (sharded / "README.md").write_text("about")
    with monkeypatch.context() as patch:
        patch.setattr(convert.partial, "check_free_name", ends_the_run_at(3))
        with pytest.raises(KeyboardInterrupt, match="143 of 143 tensors are kept"):
            run(sharded, tmp_path / "out", recipe="q4")
    assert (tmp_path / "out.partial/out/README.md").exists()
    (sharded / "README.md").unlink()
    assert resumed(sharded, tmp_path / "out", recipe="q4")[0].tensors == 143
    assert not (tmp_path / "out/README.md").exists()


def ends_the_run_at(last):
    """Its first call comes before the work, the second with the journal, the third before the rename."""
    calls = []

    def called(*_):
        calls.append(1)
        if len(calls) == last:
            raise KeyboardInterrupt

    return called


@pytest.mark.parametrize(("name", "recipe"), TARGETS)
def test_ctrl_c_right_after_the_rename_keeps_nothing(sharded, tmp_path, monkeypatch, name, recipe):
    """The output is complete, so there is nothing to go on with."""
    rename = Path.rename

    def renamed(path, to):
        rename(path, to)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", renamed)
        with pytest.raises(KeyboardInterrupt) as stopped:
            run(sharded, tmp_path / name, to=to_of(name), recipe=recipe)
    assert str(stopped.value) == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "source"])
    run(sharded, tmp_path / "want", to=to_of(name), recipe=recipe)
    assert contents(tmp_path / name) == contents(tmp_path / "want")


@pytest.mark.parametrize("locks", [True, False])
def test_the_journal_is_open_while_it_is_removed_only_where_that_keeps_a_lock(sharded, tmp_path, monkeypatch, locks):
    """Windows removes no open file, and has no lock to keep."""
    journals, closed = [], []

    @contextlib.contextmanager
    def opened(*args):
        with open_journal(*args) as journal:
            journals.append(journal)
            yield journal

    def remove(path):
        if path.name == "out.partial" and journals:
            closed.append(journals[0]._file.closed)
        convert.output.remove(path)

    if not locks:
        monkeypatch.setattr(convert.journal, "fcntl", None)
    monkeypatch.setattr(convert.partial, "open_journal", opened)
    monkeypatch.setattr(convert.partial, "remove", remove)
    run(sharded, tmp_path / "out", recipe="q4")
    assert closed == [not locks]


def test_verification_of_a_continued_conversion(sharded, tmp_path, monkeypatch, every_tensor):
    """What a broken disk did to the complete part is found, and the next run starts anew."""
    interrupted(monkeypatch, 60, sharded, tmp_path / "out", recipe="q4")
    (shard,) = (tmp_path / "out.partial/out").glob("*.safetensors")
    with shard.open("r+b") as f:
        header = f.read(8 + int.from_bytes(f.read(8), "little"))
        f.write(b"\x77" * 20_000)  # most of the embedding
    assert header
    with pytest.raises(DgemmaError, match="verification failed: "):
        run(sharded, tmp_path / "out", recipe="q4", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# The disk, and other runs


def test_one_run_at_a_time(sharded, tmp_path, monkeypatch, every_tensor):
    interrupted(monkeypatch, 60, sharded, tmp_path / "out", recipe="q4")
    before = contents(tmp_path / "out.partial")
    with (
        open_journal(tmp_path / "out.partial/out.journal", tmp_path / "out"),
        pytest.raises(DgemmaError, match="out: another conversion writes it now, expected one at a time"),
    ):
        run(sharded, tmp_path / "out", recipe="q4")
    assert contents(tmp_path / "out.partial") == before
    assert resumed(sharded, tmp_path / "out", recipe="q4")[0].tensors == 60


@pytest.mark.parametrize(("name", "recipe"), TARGETS)
def test_a_full_disk_keeps_what_was_complete(sharded, tmp_path, monkeypatch, every_tensor, name, recipe):
    options = {"to": to_of(name), "recipe": recipe}
    write, left = convert.work._File.write, [300_000]

    def until_full(file, offset, data):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, offset, data)

    with monkeypatch.context() as patch:
        patch.setattr(convert.work._File, "write", until_full)
        with pytest.raises(DgemmaError) as error:
            run(sharded, tmp_path / name, **options)
    text = str(error.value)
    assert text.startswith(f"{tmp_path / name}: the disk is full, the output needs ")
    assert " of 143 tensors are kept in " in text
    taken, _ = resumed(sharded, tmp_path / name, **options)
    assert taken.tensors == int(text.split(" of 143 ")[0].split()[-1]) > 10
    run(sharded, tmp_path / "want", **options)
    assert contents(tmp_path / name) == contents(tmp_path / "want")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can make a small disk")
def test_a_disk_that_is_really_full(sharded, tmp_path, monkeypatch, every_tensor):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mount is not allowed here")
    try:
        with pytest.raises(DgemmaError, match="the disk is full, the output needs 820.* and 40.* are free"):
            run(sharded, disk / "out", recipe="q4")
        assert list(disk.iterdir()) == []  # known before the start
        with monkeypatch.context() as patch:
            patch.setattr(convert.partial, "check_space", lambda *_: None)
            with pytest.raises(DgemmaError, match="the disk is full, the output needs .* tensors are kept in"):
                run(sharded, disk / "out", recipe="q4")
        assert not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
        taken, _ = resumed(sharded, disk / "out", recipe="q4")
        assert taken.tensors > 10
        run(sharded, tmp_path / "want", recipe="q4")
        assert contents(disk / "out") == contents(tmp_path / "want")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_space_that_is_taken_already_is_not_needed_again(sharded, tmp_path, monkeypatch, every_tensor):
    size = run(sharded, tmp_path / "want", recipe="q4").plan.total_bytes
    interrupted(monkeypatch, 130, sharded, tmp_path / "out", recipe="q4")
    usage = shutil.disk_usage(ROOT)._replace(free=size // 2)
    monkeypatch.setattr(convert.output.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DgemmaError, match="the disk is full"):
        run(sharded, tmp_path / "new", recipe="q4")
    assert resumed(sharded, tmp_path / "out", recipe="q4")[0].tensors == 130


def test_a_source_that_cannot_be_read(sharded, tmp_path, monkeypatch, every_tensor):
    def broken():
        raise DgemmaError("model.safetensors: cannot be read (Input/output error); check its disk and try again")

    text = interrupted(monkeypatch, 20, sharded, tmp_path / "out", recipe="q4", error=broken)
    assert "check its disk and try again; 20 of 143 tensors are kept in" in text
    assert resumed(sharded, tmp_path / "out", recipe="q4")[0].tensors == 20


def test_an_error_before_anything_is_complete_leaves_nothing(sharded, tmp_path, monkeypatch, every_tensor):
    assert interrupted(monkeypatch, 0, sharded, tmp_path / "out", recipe="q4") == ""
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# Weights that are no numbers


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize(("name", "recipe"), [("out", "q4"), ("out", "bf16"), ("out", "mxfp4"), ("x.gguf", "BF16")])
def test_a_tensor_that_holds_no_numbers_is_named(tmp_path, dtype, value, name, recipe):
    source = make_tiny_checkpoint(tmp_path / "source")
    weights = tiny_weights(tiny_config())
    weights["model.decoder.layers.2.mlp.up_proj.weight"][3, 5] = value
    write_weights(source, weights, dtype)
    with pytest.raises(DgemmaError, match="model.decoder.layers.2.mlp.up_proj.weight holds infinity or NaN"):
        run(source, tmp_path / name, to=to_of(name), recipe=recipe)


def test_the_vision_tower_is_carried_whatever_it_holds(tmp_path):
    source = make_tiny_checkpoint(tmp_path / "source", vision=True)
    weights = tiny_weights(tiny_config(vision=True))
    weights["model.encoder.vision_tower.std_bias"][0] = np.inf
    write_weights(source, weights)
    run(source, tmp_path / "out", recipe="q4")


# Source files that come and go


def come_and_go(monkeypatch, folder):
    """The folder's weight files are hidden but inside `holding`. → the names of those that were held"""
    files, held = sorted(folder.glob("*.safetensors")), []
    checkpoint = open_checkpoint(folder)
    hidden = {file: file.rename(file.with_suffix(".hidden")) for file in files}

    @contextlib.contextmanager
    def holding(file):
        held.append(file.name)
        hidden[file].rename(file)
        try:
            yield
        finally:
            file.rename(hidden[file])

    there = checkpoint._replace(
        holding=holding,
        fingerprint=lambda file: "etag of " + file.name,
        seen={file: "etag of " + file.name for file in files},
    )
    monkeypatch.setattr(convert.api, "open_checkpoint", lambda path: there)
    return held


@pytest.mark.parametrize(("name", "recipe"), TARGETS)
def test_no_source_file_is_needed_before_its_turn_or_after(tmp_path, monkeypatch, every_tensor, name, recipe):
    source = make_tiny_checkpoint(tmp_path / "source", shards=3, dtype="bfloat16")
    options = {"to": to_of(name), "recipe": recipe}
    run(source, tmp_path / "want", **options)
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    held = come_and_go(monkeypatch, source)
    run(source, tmp_path / "whole", **options)
    assert held == files
    held.clear()
    interrupted(monkeypatch, 60, source, tmp_path / name, **options)
    assert held == files[:2]
    held.clear()
    run(source, tmp_path / name, **options)
    assert held == files[1:]  # the first one is done
    assert contents(tmp_path / name) == contents(tmp_path / "whole") == contents(tmp_path / "want")


def test_an_error_waits_for_the_pieces_under_way(tmp_path, monkeypatch):
    """They still read the file that is then let go."""
    source = make_tiny_checkpoint(tmp_path / "source", shards=3, dtype="bfloat16")
    come_and_go(monkeypatch, source)
    do_piece, calls, read = convert.work._do_piece, [], []

    def slow(*args):
        calls.append(1)
        if len(calls) == 4:
            raise DgemmaError("broken")
        time.sleep(0.1)
        read.append(do_piece(*args))

    monkeypatch.setattr(convert.work, "cores", lambda: 4)
    monkeypatch.setattr(convert.work, "_do_piece", lambda *args: slow(*args) or read[-1])
    with pytest.raises(DgemmaError, match="broken"):
        run(source, tmp_path / "out", recipe="q4")
    assert len(read) == len(calls) - 1


# Memory


@pytest.mark.parametrize(("name", "recipe"), [("out", "q4"), ("x.gguf", "Q4_0"), ("y.gguf", "BF16")])
def test_memory_does_not_grow_with_a_tensor(tmp_path, name, recipe):
    """A checkpoint of zeros, a file with holes, whose largest tensors have 268 MB; Linux counts in kilobytes."""
    from mlx_dgemma.config import parse_config

    layers = ["sliding_attention", "full_attention"]
    sizes = {"num_hidden_layers": 2, "layer_types": layers, "num_experts": 2048, "moe_intermediate_size": 512}
    raw = tiny_config(**sizes)
    source = make_tiny_checkpoint(tmp_path / "source")
    write_json(source / "config.json", raw)
    header, end = {}, 0
    for t in text_tensors(parse_config(raw)):
        header[t.hf] = {"dtype": "BF16", "shape": t.shape, "data_offsets": [end, end + 2 * t.size]}
        end += 2 * t.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (source / "model.safetensors").open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)
    assert end > 800_000_000
    code = (
        "import resource, sys, convert.to_mlx, convert.to_gguf, convert.work\n"
        "from convert import convert as run\n"
        "convert.work.cores = lambda: 2\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "run(sys.argv[1], sys.argv[2], to=sys.argv[3], recipe=sys.argv[4])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / name), to_of(name), recipe]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 200_000_000
