"""Imports point one way: a test draws the arrow, and the shared modules work without MLX."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "mlx_dgemma": set(),
    "gguf_export": {"mlx_dgemma"},
    "convert": {"mlx_dgemma", "gguf_export"},
}
# fmt: off
WITHOUT_MLX = [
    "config", "tensors", "noise", "errors", "shards", "hub", "hub_files", "fits", "tokenizer", "units",
    "events", "schedule", "denoise", "in_play", "presets", "session", "view", "slots", "record", "files",
    "clamp", "layout", "infilling", "editing", "automaton", "language", "constrained", "structure", "json_schema",
    "decisions",
    "cli", "cli_infill", "cli_edit", "floats", "quality",
    "gguf.model", "gguf.metadata", "gguf.vocabulary", "gguf.rope", "gguf.gemma4", "gguf.sentencepiece_model",
]
# fmt: on
WITH_MLX = {
    "loading",
    "model",
    "engine",
    "api",
    "gguf_weights",
    "attention",
    "moe",
    "layers",
    "cache",
    "sampler",
    "vocabulary",
    "products",
    "elementary",
}


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


@pytest.mark.parametrize("package", [name for name in MAY_IMPORT if (ROOT / name).is_dir()])
def test_a_package_imports_only_what_it_may(package):
    ours = {*MAY_IMPORT, "demo", "tests", "benchmarks"}
    for file in (ROOT / package).rglob("*.py"):
        found = {module.split(".")[0] for module in imported(file)} & ours
        assert found <= MAY_IMPORT[package] | {package}, f"{file.relative_to(ROOT)} imports {found}"


def uses_mlx(file):
    """mlx itself, or a module of ours that needs it."""
    needs = {"mlx_dgemma." + name for name in WITH_MLX}
    return any(module.split(".")[0] == "mlx" or module in needs for module in imported(file))


def test_only_the_mlx_writer_and_what_runs_the_model_use_mlx_in_convert():
    using = {f.name for f in (ROOT / "convert").glob("*.py") if uses_mlx(f)}
    assert using == {"to_mlx.py", "calibrate.py", "correlations.py", "sensitivity.py"}


def test_gguf_export_works_where_mlx_does_not_install():
    assert not [f.name for f in (ROOT / "gguf_export").glob("*.py") if uses_mlx(f)]
    modules = ", ".join(f"gguf_export.{f.stem}" for f in (ROOT / "gguf_export").glob("*.py") if f.stem != "__main__")
    code = f"import sys; sys.modules['mlx'] = None; import {modules}, convert.cli, convert.to_gguf, convert.gguf_source"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("module", WITHOUT_MLX)
def test_shared_modules_work_where_mlx_does_not_install(module):
    code = f"import sys; sys.modules['mlx'] = None; import mlx_dgemma.{module}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
