"""convert --low-disk against a hub on loopback: one shard on the disk at a time, whatever the network does."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.fullsize_make import RELEASED, released_config, shards_of
from convert import convert
from convert.api import _needed_bytes
from convert.journal import open_journal
from convert.low_disk import low_disk_source
from convert.plan import plan_from_config
from convert.recipes import find_recipe
from mlx_dgemma import hub_files
from mlx_dgemma.config import parse_config
from mlx_dgemma.errors import DgemmaError
from tests.hub_server import Fault, Hub, hashes
from tests.tiny import make_tiny_checkpoint, write_json

ROOT = Path(__file__).parent.parent
REPO = "someone/tiny"
COMMIT = "c0ffee" + 34 * "0"
SHARDS = [f"model-{i + 1:05}-of-00003.safetensors" for i in range(3)]
TARGETS = {"mlx": ("out", "q4"), "gguf": ("out.gguf", "Q8_0")}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The repo's files, as a local folder of the repo's name."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("hub") / "tiny", dtype="bfloat16", shards=3)


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    with Hub(REPO, {COMMIT: folder}) as hub:
        import huggingface_hub.constants as constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # another test may have imported it so
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub_files, "PAUSE", 0.01)
        monkeypatch.setenv("HF_XET_CHUNK_CACHE_SIZE_BYTES", "0")
        yield hub


def content(path):
    """File name → bytes of a folder or a file."""
    files = [path] if path.is_file() else path.rglob("*")
    return {str(file.relative_to(path.parent)): file.read_bytes() for file in files if file.is_file()}


def left_behind(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir() if path.name != "cache")


@pytest.mark.parametrize("to", TARGETS)
def test_as_from_the_local_folder_with_one_shard_at_a_time(to, hub, folder, tmp_path):
    name, recipe = TARGETS[to]
    shards_there = []

    def look(_):
        source = tmp_path / "low" / f"{name}.partial" / f"{name}.source"
        assert (source / "config.json").is_file()
        shards_there.append([path.name for path in source.glob("*.safetensors")])

    hub.on_body = look
    (tmp_path / "low").mkdir()
    convert(REPO, tmp_path / "low" / name, to, recipe, low_disk=True)
    convert(folder, tmp_path / name, to, recipe)
    assert content(tmp_path / "low" / name) == content(tmp_path / name)
    assert hub.bodies() == SHARDS  # each once
    assert shards_there == [[], [], []]  # the one before is gone
    assert left_behind(tmp_path / "low") == [name]


def test_the_disk_never_holds_more_than_the_output_and_a_shard(hub, folder, tmp_path):
    most, running = 0, True
    out = tmp_path / "out"

    def watch():
        nonlocal most
        while running:
            held = 0
            for parent, _, files in os.walk(tmp_path):
                for name in files:
                    with contextlib.suppress(OSError):
                        held += os.stat(os.path.join(parent, name)).st_blocks * 512
            most = max(most, held)

    watcher = threading.Thread(target=watch)
    watcher.start()
    convert(REPO, out, "mlx", "q4", low_disk=True)
    running = False
    watcher.join()
    shards = [(folder / name).stat().st_size for name in SHARDS]
    small = sum(f.stat().st_size for f in folder.iterdir() if f.suffix != ".safetensors")
    written = sum(map(len, content(out).values()))
    assert max(shards) < most < written + max(shards) + 2 * small + 200_000 < written + sum(shards)


def test_the_plan_comes_from_headers_alone(hub, tmp_path):
    report = convert(REPO, None, "mlx", "q4", dry_run=True, low_disk=True)
    assert report.plan.total_bytes > 0
    assert COMMIT in report.notes[0]
    assert not hub.bodies()
    assert not left_behind(tmp_path)


def test_defects_are_found_before_the_first_body(hub, folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.decoder.norm.weight"] = SHARDS[2]
    write_json(broken / "model.safetensors.index.json", index)
    hub.commits = {COMMIT: broken}
    with pytest.raises(DgemmaError, match=r"model.decoder.norm.weight should be in model-00003.*found in model-00001"):
        convert(REPO, tmp_path / "out", low_disk=True)
    assert not hub.bodies()
    assert left_behind(tmp_path) == ["broken"]


def test_a_shard_is_there_while_it_is_held(hub, folder, tmp_path):
    with low_disk_source(REPO, tmp_path / "out") as checkpoint:
        file = checkpoint.weights["model.decoder.norm.weight"].file
        assert not file.exists()
        with contextlib.suppress(KeyboardInterrupt), checkpoint.holding(file):
            assert file.read_bytes() == (folder / file.name).read_bytes()
            raise KeyboardInterrupt
        assert not file.exists()
    assert not left_behind(tmp_path)


def test_a_long_header_is_asked_for_once_more(hub, tmp_path, monkeypatch):
    import convert.low_disk as low_disk

    monkeypatch.setattr(low_disk, "FIRST_BYTES", 100)
    with low_disk_source(REPO, tmp_path / "out") as checkpoint:
        assert len(checkpoint.weights.tensors) == 143


# Faults of the network.


@pytest.mark.parametrize(
    "fault",
    [
        Fault("drop", SHARDS[1]),
        Fault("corrupt", SHARDS[1]),
        Fault("short", SHARDS[1]),
        Fault("503", SHARDS[1]),
        Fault("429", SHARDS[1]),
        Fault("500", SHARDS[1], method="HEAD"),
        Fault("503", "info"),
        Fault("drop", "tokenizer.json"),
    ],
    ids=lambda fault: f"{fault.kind} {fault.file} {fault.method}",
)
def test_a_fault_that_passes_changes_nothing(fault, hub, folder, tmp_path):
    hub.faults.append(Fault(fault.kind, fault.file, fault.times, fault.method))
    convert(REPO, tmp_path / "out", "mlx", "q4", low_disk=True)
    assert not hub.faults[0].times  # it happened
    convert(folder, tmp_path / "want", "mlx", "q4")
    assert [*content(tmp_path / "out").values()] == [*content(tmp_path / "want").values()]


def test_a_body_that_stays_corrupt_names_file_and_hashes(hub, folder, tmp_path):
    hub.faults.append(Fault("corrupt", SHARDS[1], times=99))
    data = (folder / SHARDS[1]).read_bytes()
    found = hashes(data[:-1] + bytes([data[-1] ^ 1]))[1]
    with pytest.raises(DgemmaError) as error:
        convert(REPO, tmp_path / "out", "mlx", "q4", low_disk=True)
    assert str(error.value).startswith(
        f"{REPO}/{SHARDS[1]}: the hub's answer was wrong twice: found sha256 {found}, expected {hashes(data)[1]}; "
    )
    assert str(error.value).endswith("out.partial; the same command goes on from there, or delete that folder")
    assert hub.bodies().count(SHARDS[1]) == 2

    # What was complete stays; the run that continues fetches the rest only.
    hub.faults.clear()
    hub.requests.clear()
    convert(REPO, tmp_path / "out", "mlx", "q4", low_disk=True)
    assert hub.bodies() == SHARDS[1:]
    convert(folder, tmp_path / "want", "mlx", "q4")
    assert [*content(tmp_path / "out").values()] == [*content(tmp_path / "want").values()]
    assert left_behind(tmp_path) == ["out", "want"]


def test_a_body_of_the_wrong_length(hub, folder, tmp_path):
    hub.faults.append(Fault("short", SHARDS[0], times=99))
    size = (folder / SHARDS[0]).stat().st_size
    with pytest.raises(DgemmaError, match=rf"{SHARDS[0]}: .*wrong twice: found {size // 2} bytes, expected {size};"):
        convert(REPO, tmp_path / "out", low_disk=True)


def test_a_listing_of_the_wrong_length(hub, folder, tmp_path):
    size = (folder / SHARDS[0]).stat().st_size
    hub.sizes[SHARDS[0]] = size + 4
    with pytest.raises(DgemmaError, match=rf"{SHARDS[0]}: found {size + 4} bytes, expected {size} for the"):
        convert(REPO, tmp_path / "out", low_disk=True)
    assert not hub.bodies()


def test_a_hub_that_stays_away_says_how_to_continue(hub, tmp_path):
    hub.faults.append(Fault("404", SHARDS[1], times=99))
    with pytest.raises(DgemmaError, match=f"{REPO}/{SHARDS[1]}: the hub .*try again; 48 of 143 tensors are kept"):
        convert(REPO, tmp_path / "out", low_disk=True)


def test_a_repo_that_moves_on_is_kept_at_its_commit(hub, folder, tmp_path):
    newer = make_tiny_checkpoint(tmp_path / "newer", seed=1, dtype="bfloat16", shards=3)
    later = "beef" + 36 * "0"
    hub.on_body = lambda file: hub.commits.setdefault(later, newer)  # while the first shard is fetched
    hub.faults.append(Fault("corrupt", SHARDS[2], times=2))
    with pytest.raises(DgemmaError, match="wrong twice"):
        convert(REPO, tmp_path / "out", low_disk=True)
    assert hub.head == later
    convert(REPO, tmp_path / "out", low_disk=True)
    assert {r.revision for r in hub.requests if r.file != "info"} == {COMMIT}
    convert(folder, tmp_path / "want")
    assert [*content(tmp_path / "out").values()] == [*content(tmp_path / "want").values()]


def test_a_commit_that_is_gone(hub, folder, tmp_path):
    hub.faults.append(Fault("corrupt", SHARDS[2], times=2))
    with pytest.raises(DgemmaError, match="wrong twice"):
        convert(REPO, tmp_path / "out", low_disk=True)
    hub.commits = {"beef" + 36 * "0": folder}
    with pytest.raises(DgemmaError, match="no longer has the commit this began with; remove what it left"):
        convert(REPO, tmp_path / "out", low_disk=True)
    shutil.rmtree(tmp_path / "out.partial")
    convert(REPO, tmp_path / "out", low_disk=True)


def test_the_token_goes_to_the_hub_alone(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    convert(REPO, tmp_path / "out", low_disk=True)
    assert {r.token for r in hub.requests if r.host == "hub"} == {"Bearer hf_secret"}
    assert {r.token for r in hub.requests if r.host == "cdn"} == {None}


# The whole command, as a process.


def command(hub, out, cache, *options):
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache)}
    arguments = [sys.executable, "-m", "convert", REPO, str(out), "--low-disk", *options]
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def test_killed_while_it_fetches_it_continues(folder, tmp_path):
    with Hub(REPO, {COMMIT: folder}) as hub:
        process = None

        def kill(file):
            if file == SHARDS[1] and process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()

        time_to_start = threading.Event()
        hub.on_body = lambda file: (time_to_start.wait(), kill(file))
        process = command(hub, tmp_path / "out", tmp_path / "cache")
        time_to_start.set()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert left_behind(tmp_path) == ["out.partial"]
        half = tmp_path / "out.partial/out.source/.cache/huggingface/download/x.1.incomplete"
        half.write_bytes(bytes(1000))  # as of a body that had begun
        first = hub.bodies()
        hub.on_body = lambda file: None
        again = command(hub, tmp_path / "out", tmp_path / "cache")
        _, errors = again.communicate()
        assert again.returncode == 0, errors
        assert hub.bodies()[len(first) :] == SHARDS[1:]
    convert(folder, tmp_path / "want")
    assert [*content(tmp_path / "out").values()] == [*content(tmp_path / "want").values()]
    assert left_behind(tmp_path) == ["out", "want"]


def test_a_shard_that_a_killed_run_was_done_with_is_deleted(hub, tmp_path):
    """Killed between the journal's last line about a shard and its deletion."""
    hub.faults.append(Fault("corrupt", SHARDS[1], times=2))
    with pytest.raises(DgemmaError, match="wrong twice"):
        convert(REPO, tmp_path / "out", low_disk=True)
    source = tmp_path / "out.partial/out.source"
    (source / SHARDS[0]).write_bytes(bytes(1000))
    there = []
    hub.on_body = lambda file: there.append([path.name for path in source.glob("*.safetensors")])
    convert(REPO, tmp_path / "out", low_disk=True)
    assert there == [[], []]


def test_another_repo_takes_over_nothing(hub, folder, tmp_path):
    hub.faults.append(Fault("corrupt", SHARDS[1], times=2))
    with pytest.raises(DgemmaError, match="wrong twice"):
        convert(REPO, tmp_path / "out", low_disk=True)
    (tmp_path / "out.partial/out.source/NOTICE").write_text("of the first repo")
    hub.repo = "someone/other"
    hub.commits = {"beef" + 36 * "0": folder}
    convert("someone/other", tmp_path / "out", low_disk=True)
    assert not (tmp_path / "out/NOTICE").exists()


def test_a_second_run_touches_nothing_of_the_first(hub, folder, tmp_path):
    """With another repo's id, before the first one has a journal and while it converts."""
    found = []

    def second(_):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(DgemmaError, match="out: another conversion writes it now, expected one at a time"):
            convert("someone/other", tmp_path / "out", low_disk=True)
        found.append(sorted(tmp_path.rglob("*")) == before)

    with low_disk_source(REPO, tmp_path / "out"):
        second(None)
    hub.on_body = second
    convert(REPO, tmp_path / "out", low_disk=True)
    assert found == [True] * 4
    hub.on_body = lambda file: None
    convert(folder, tmp_path / "want")
    assert [*content(tmp_path / "out").values()] == [*content(tmp_path / "want").values()]
    assert left_behind(tmp_path) == ["out", "want"]


def test_a_run_from_a_local_folder_is_not_touched_either(hub, tmp_path):
    (tmp_path / "out.partial").mkdir()
    with (
        open_journal(tmp_path / "out.partial/out.journal", tmp_path / "out"),
        pytest.raises(DgemmaError, match="out: another conversion writes it now"),
    ):
        convert(REPO, tmp_path / "out", low_disk=True)
    assert not hub.requests


def test_a_repo_that_is_not_there_costs_nothing_of_another_one(hub, tmp_path):
    hub.faults.append(Fault("corrupt", SHARDS[1], times=2))
    with pytest.raises(DgemmaError, match="wrong twice"):
        convert(REPO, tmp_path / "out", low_disk=True)
    before = content(tmp_path / "out.partial")
    with pytest.raises(DgemmaError, match="someone/else: neither a local folder nor a repo on the hub"):
        convert("someone/else", tmp_path / "out", low_disk=True)
    assert content(tmp_path / "out.partial") == before


# Usage.


def test_what_is_here_is_refused(folder, tmp_path):
    with pytest.raises(DgemmaError, match=r"found a local folder, expected a hub repo id .*with --low-disk"):
        convert(folder, tmp_path / "out", low_disk=True)
    with pytest.raises(DgemmaError, match=r"found a GGUF file, expected a repo of safetensors shards"):
        convert("someone/repo/model.gguf", tmp_path / "out", low_disk=True)


def test_verify_is_refused(tmp_path):
    with pytest.raises(DgemmaError, match=r"--verify reads the source again, .*--low-disk"):
        convert(REPO, tmp_path / "out", low_disk=True, verify=True)


def test_a_repo_without_safetensors(hub, folder, tmp_path):
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf/model.gguf").write_bytes(b"GGUF")
    hub.commits = {COMMIT: tmp_path / "gguf"}
    with pytest.raises(DgemmaError, match=f"{REPO}: the repo has no config.json, expected a checkpoint's"):
        convert(REPO, tmp_path / "out", low_disk=True)
    shutil.copy(folder / "config.json", tmp_path / "gguf")
    with pytest.raises(DgemmaError, match=f"{REPO}: the repo has no .safetensors file, expected a checkpoint's"):
        convert(REPO, tmp_path / "out", low_disk=True)
    assert left_behind(tmp_path) == ["gguf"]


def test_no_such_repo(hub, tmp_path):
    with pytest.raises(DgemmaError, match="someone/else: neither a local folder nor a repo on the hub"):
        convert("someone/else", tmp_path / "out", low_disk=True)
    assert not left_behind(tmp_path)


def test_too_little_disk(hub, folder, tmp_path, monkeypatch):
    free = 1_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10 * free, 9 * free, free))
    with pytest.raises(DgemmaError, match=r"the output needs .* and 1.00 MB \(1000000 bytes\) are free") as error:
        convert(REPO, tmp_path / "out", low_disk=True)
    needed = int(re.search(r"needs .* \((\d+) bytes\) and", str(error.value))[1])
    output = convert(REPO, None, dry_run=True, low_disk=True).plan.total_bytes
    assert 0 < needed - output - max((folder / name).stat().st_size for name in SHARDS) < 200_000
    assert not hub.bodies()
    assert not left_behind(tmp_path)


def test_the_released_model_as_q4_needs_less_than_25_gb():
    raw = released_config()
    config = parse_config(raw)
    plan = plan_from_config(raw, config, find_recipe("q4", "mlx"), RELEASED)
    largest = max(sum(2 * t.size for t in shard) for shard in shards_of(config))
    source = SimpleNamespace(carried_bytes=40_000_000, held_bytes=largest)
    assert 4_000_000_000 < largest < 5_000_000_000
    assert _needed_bytes(source, plan) == plan.total_bytes + 300 * plan.array_count + largest + 40_000_000 < 25e9
