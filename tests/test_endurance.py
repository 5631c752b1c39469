"""Many generations hold their memory: benchmarks.endurance, short."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("engine", ["mlx", "ggml"])
def test_memory_holds_over_generations(engine):
    command = [sys.executable, "-m", "benchmarks.endurance", "--n", "30", "--engine", engine]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tenths = json.loads(done.stdout.splitlines()[-1])["tenths"]
    assert [row["generations"] for row in tenths] == list(range(3, 31, 3))
    assert all(row["tokens_per_second"] > 0 for row in tenths)
    # MLX's own cache and Python's heap settle in the first generations.
    assert tenths[-1]["resident_bytes"] < tenths[4]["resident_bytes"] + (24 << 20)
    assert tenths[-1]["active_bytes"] < tenths[4]["active_bytes"] + (1 << 20)
