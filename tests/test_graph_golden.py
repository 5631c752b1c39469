"""The golden vectors, read as another implementation would: ggml and the oracle must give them."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from gguf_export import Runner, describe
from gguf_export.description import as_text, read_description
from gguf_export.numpy_executor import NumpyExecutor
from mlx_dgemma.gguf.model import open_gguf
from tests.golden.graph.make import TOP_K, run

FOLDER = Path(__file__).parent / "golden" / "graph"
RECIPE = json.loads((FOLDER / "recipe.json").read_text())
VECTORS = load_file(FOLDER / "vectors.safetensors")
ATOL = {name: atol for names, atol in RECIPE["atol"].items() for name in names.split(", ")}


@pytest.mark.parametrize("engine", ["numpy", "ggml"])
@pytest.mark.parametrize("case", RECIPE["cases"])
def test_every_phase_gives_the_golden_numbers(case, engine):
    path = FOLDER / "tiny.gguf"
    executor = NumpyExecutor(open_gguf(path)) if engine == "numpy" else None
    description = read_description(FOLDER / "tiny.dgraph.json")
    found = run(Runner(path, "CPU", description=description, executor=executor, **RECIPE["cases"][case]))
    golden = {name.removeprefix(case + "."): v for name, v in VECTORS.items() if name.startswith(case + ".")}
    assert found.keys() == golden.keys() and len(golden) > 40
    for name, value in found.items():
        side, what = name.split(".")[-2:]
        atol = ATOL[what] if side == "out" else 0
        if what == "hidden" and name.startswith("prefill"):  # pad tokens have no meaning
            value, golden[name] = (
                np.concatenate([row[n:] for row, n in zip(a, RECIPE["padding"], strict=True)])
                for a in (value, golden[name])
            )
        assert value.shape == golden[name].shape, name
        assert np.allclose(value.astype(np.float64), golden[name].astype(np.float64), rtol=0, atol=atol), name


def test_some_slots_were_accepted_and_some_not():
    for case in RECIPE["cases"]:
        for step in range(len(RECIPE["steps"])):
            assert 0 < VECTORS[f"{case}.sample.{step}.out.accepted"].mean() < 1


def test_the_description_is_what_describe_writes_today():
    """A change of the description changes this file: run the recipe, and say so in docs/formats.md's history."""
    fresh = describe(FOLDER / "tiny.gguf", top_k=TOP_K)
    stored = read_description(FOLDER / "tiny.dgraph.json")
    for description in (fresh, stored):
        del description["producer"]
    assert as_text(fresh) == as_text(stored)
