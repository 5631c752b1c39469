"""Structured output on the command line, with the demo checkpoint: what is asked for is what comes, on both engines."""

import json
import re
from pathlib import Path

import pytest

from convert import convert
from gguf_export.cli import main as gguf_main
from mlx_dgemma.cli import main as mlx_main

DEMO = Path(__file__).parent.parent / "demo" / "checkpoint"
TOM = "As JSON:\nTom, 7, lives in Oslo and works as a pilot."
PROPERTIES = {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"enum": ["Oslo", "Rome", "Paris"]}}
SCHEMA = json.dumps({"type": "object", "properties": PROPERTIES, "required": list(PROPERTIES)})


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The command on each engine, model included."""
    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    convert(DEMO, path, to="gguf", recipe="F32")
    return {
        "mlx": (mlx_main, ["--dtype", "float32", "--model", DEMO]),
        "ggml": (gguf_main, ["run", "--threads", "1", "--model", path]),
    }


@pytest.fixture
def ask(commands, capsys):
    def ask(*arguments, engine="mlx", prompt=TOM):
        main, model = commands[engine]
        code = main([str(a) for a in (*model, "--prompt", prompt, *arguments)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return ask


def test_a_template_with_typed_slots_gives_text_that_parses(ask):
    template = (
        '{"name": "<|string:10|>", "age": <|integer|>, "sky": "<|choice:sunny,rainy|>", "id": "<|regex:[A-F]{3}|>"}'
    )
    record = json.loads(ask("--template", template))
    assert list(record) == ["name", "age", "sky", "id"] and record["sky"] in ("sunny", "rainy")
    assert record["name"] == "Tom" and record["age"] == 7 and re.fullmatch("[A-F]{3}", record["id"])


@pytest.mark.parametrize("engine", ["mlx", "ggml"])
def test_a_template_of_choices_is_decided(ask, engine):
    template = '{"name": "Tom", "age": 7, "city": "<|choice:Paris,Oslo,Rome|>", "job": "<|choice:pilot,nurse|>"}'
    text = '{"name": "Tom", "age": 7, "city": "Oslo", "job": "pilot"}'
    assert ask("--template", template, engine=engine) == text + "\n"
    report = json.loads(ask("--template", template, "--json", engine=engine))
    assert report["text"] == text and [list(slot) for slot in report["choices"]] == [
        ["Paris", "Oslo", "Rome"],
        ["pilot", "nurse"],
    ]
    assert all(abs(sum(slot.values()) - 1) < 1e-5 for slot in report["choices"])
    assert report["choices"][0]["Oslo"] > 0.9 and report["choices"][1]["pilot"] > 0.9


def test_a_schema_comes_as_text_or_as_a_file(ask, tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(SCHEMA)
    text = ask("--json-schema", SCHEMA)
    assert text == ask("--json-schema", path)
    assert json.loads(text) == {"name": "Tom", "age": 7, "city": "Oslo"}
    report = json.loads(ask("--json-schema", path, "--json"))
    assert report["text"] + "\n" == text and report["stopped"]


@pytest.mark.parametrize(
    "options, prompt",
    [
        (["--json-schema", SCHEMA], TOM),
        (["--regex", r"[a-z ]{70,90}\.", "--steps", "6"], TOM),  # 64 slots do not hold it: two blocks
        (["--template", "<|integer|>,<|integer|>", "--seed", "3", "--steps", "6"], TOM),
    ],
)
def test_ggml_writes_the_same_text(ask, options, prompt):
    texts = [ask(*options, engine=engine, prompt=prompt) for engine in ("mlx", "ggml")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("tokens", [3, 5, 64, 70])
def test_text_is_whole_within_max_tokens(ask, tokens):
    report = json.loads(ask("--regex", r"(ab)+|[0-9]{3}", "--max-tokens", tokens, "--steps", 4, "--json"))
    assert re.fullmatch(r"(ab)+|[0-9]{3}", report["text"]) and len(report["tokens"]) <= tokens


NOWHERE = ["--model", "nowhere/model.gguf"]  # an error about it would say that a model was looked for first
SCHEMA_MINIMUM = '{"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}}'
# fmt: off
BAD = [
    (["--json-schema", SCHEMA_MINIMUM], "#/properties/a/minimum: this keyword is not supported for integer"),
    (["--json-schema", '{"type": '], "the schema is not JSON"),
    (["--json-schema", "nowhere.json"], "'nowhere.json': cannot be read (No such file or directory)"),
    (["--regex", r"[^\s\S]"], r"the language of '[^\\s\\S]' is empty"),
    (["--regex", "(a"], "the regex has a ( without ) at character 1"),
    (["--regex", r"a\bb"], r"the regex holds the assertion \b at character 2"),
    (["--regex", "(a{100}){100}"], "is too large: 10002 states, expected 8,000 states at most"),
    (["--template", "age <|float|>"], "the slot <|float|> is not known, expected one of: <|choice:red,green|>"),
    (["--template", "age"], "the template has no slot"),
    (["--template", "age <|integer"], "the template has a slot that no |> closes"),
    (["--template", "<|choice:a|>"], "the slot <|choice:a|> has one choice"),
    (["--template", "<|regex:(a|>"], "has a ( without )"),
    (["--template", "<|choice:a,b|>", "--record", "never.html"], "--record has nothing to show"),
]
# fmt: on


@pytest.mark.parametrize("options, message", BAD, ids=[options[1] for options, _ in BAD])
def test_a_wrong_structure_is_one_line_before_any_model_is_read(options, message, capsys):
    for main, command in (mlx_main, []), (gguf_main, ["run"]):
        assert main([*command, *NOWHERE, "--prompt", "a", *options]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1, err


@pytest.mark.parametrize("engine", ["mlx", "ggml"])
def test_text_that_does_not_fit_is_one_line(commands, capsys, engine):
    main, model = commands[engine]
    for options, message in (
        (["--regex", "[0-9]{9}", "--max-tokens", "3"], "tokens, expected at most max_new_tokens = 3; raise it"),
        (["--template", f"{'1 2 3 ' * 20}<|choice:a,b|>"], "expected at most 64, one canvas; shorten it"),
        (["--json-schema", SCHEMA, "--prompt", "the sand " * 3000], "context is"),
        (["--template", "<|choice:a,b|>", "--prompt", "the sand " * 3000], "context is"),
    ):
        assert main([*map(str, model), "--prompt", "a", *options]) == 1
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("loaded")]
        assert out == "" and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], err


@pytest.mark.parametrize(
    "options",
    [
        ["--regex", "a", "--template", "<|integer|>"],
        ["--regex", "a", "--json-schema", "{}"],
        ["--regex", "a", "--chat"],
        ["--regex", "a", "--thinking"],
        ["--regex", "a", "--infill", "x"],
        ["--regex"],
    ],
)
def test_wrong_usage_exits_with_2(options, capsys):
    for main, command in (mlx_main, []), (gguf_main, ["run"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, *NOWHERE, "--prompt", "a", *options])
        assert ended.value.code == 2 and "usage:" in capsys.readouterr().err
