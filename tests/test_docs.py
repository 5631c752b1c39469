"""The documents are true: links lead somewhere, options exist, the README's Python runs."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from convert import convert
from convert.cli import COMMANDS
from convert.cli import _parser as convert_parser
from convert.plan_gguf import make_gguf_plan
from convert.recipes_gguf import RECIPES as GGUF_RECIPES
from gguf_export.cli import _parser as gguf_parser
from gguf_export.graph import DIMS, OPTIONS, RUNTIME
from gguf_export.ops import OPS
from mlx_dgemma.cli import parse
from mlx_dgemma.cli_edit import _parser as edit_parser
from mlx_dgemma.config import GenerationConfig, parse_config
from mlx_dgemma.gguf.metadata import metadata

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("demo/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_options_shown(page):
    for line in re.findall(r"^\$ (python -m .*)$", page.read_text(), flags=re.M):
        _, _, module, *arguments = shlex.split(re.split(" < | > ", line)[0], comments=True)
        if module == "mlx_dgemma.generate":
            parse(arguments)
        elif module == "mlx_dgemma.edit":
            edit_parser().parse_args(arguments)
        elif module == "convert" and arguments[0] in COMMANDS:
            importlib.import_module(f"convert.{arguments[0]}_cli")._parser().parse_args(arguments[1:])
        elif module == "gguf_export":
            gguf_parser().parse_args(arguments)
        elif module == "convert":
            convert_parser().parse_args(arguments)


def test_sizes_of_gguf_recipes_are_the_plans():
    config = parse_config(json.loads((ROOT / "tests/data/diffusiongemma-26b-config.json").read_text()))
    page = (ROOT / "docs/formats.md").read_text()
    for recipe in GGUF_RECIPES.values():
        plan = make_gguf_plan(config, recipe)
        types = ", ".join(f"{name} {n}" for name, n in plan.histogram().items())
        bits = 8 * plan.total_bytes / plan.parameters
        assert (
            f"| `{recipe.name}` | {recipe.file_type} | {plan.total_bytes / 2**20:,.0f} | {bits:.2f} | {types} |" in page
        )


def test_keys_of_the_formats_page_are_those_written():
    page = (ROOT / "docs/formats.md").read_text()
    config = parse_config(json.loads((ROOT / "tests/data/diffusiongemma-26b-config.json").read_text()))
    for key in metadata(config, GenerationConfig(), "x", 15):
        last = key.removeprefix("diffusion-gemma.").removeprefix("diffusion.").split(".")[-1].removesuffix("_swa")
        assert last in page, key


def test_every_setting_of_the_table_is_an_option():
    settings = (ROOT / "docs/denoising.md").read_text().split("## Settings")[1]
    options = set(re.findall(r"`(--[a-z-]+)", settings))
    assert {"--steps", "--t-min", "--seed"} <= options
    values = {"--dtype": ["float32"], "--drop-tail": []}
    for option in options:
        parse(["--model", "m", "--prompt", "p", option, *values.get(option, ["1"])])


def test_the_readmes_python_runs(tmp_path, capsys):
    convert(ROOT / "demo/checkpoint", tmp_path / "q4", recipe="q4")
    load_and_generate, below = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    space = {}
    exec(load_and_generate.replace("build/demo-q4", str(tmp_path / "q4")), space)
    assert '"buyer"' in capsys.readouterr().out
    import mlx.core as mx

    space |= {"tokens": mx.array([[2, 105]]), "canvas": mx.zeros((1, 64), mx.int32)}
    exec(below, space)
    assert space["logits"].shape == (1, 64, 1024)


def test_operations_of_the_formats_page_are_the_tables():
    page = (ROOT / "docs/formats.md").read_text()
    for name, op in OPS.items():
        params = ", ".join(f"`{p}`" for p in op.params) or "–"
        assert f"| `{name}` | {', '.join(op.inputs) or '–'} | {params} | {op.says} |" in page, name
    for name in {**DIMS, **RUNTIME, **OPTIONS}:
        assert f"`{name}`" in page, name
