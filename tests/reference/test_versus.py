"""The harness against mlx-vlm runs, and both decide alike on the same weights."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_both_engines_draft_alike():
    command = [sys.executable, "-m", "benchmarks.versus", "--preset", "small", "--repeat", "1", "--answers", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for weights in ("fp32", "q4"):
        found = result["steps"][weights]
        assert found["agree"]["drafts_differ"] == [0, 0]
        assert max(found["agree"]["accepted_differ"]) <= 2  # entropies within rounding of each other change places
        assert found["ratio"]["step"] > 0
        assert found["dgemma"]["step"]["peak_bytes"] < 100 << 20
    assert [row["engine"] for row in result["answers"]].count("mlx-vlm") == 2
    assert all(row["n"] == 4 and row["tokens_per_second"] > 0 for row in result["answers"])
