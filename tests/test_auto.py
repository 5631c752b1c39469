"""Recipe `auto`: the knapsack against every combination, the KL against a slow twin, and the recipe it ends as."""

import itertools
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_dgemma
from convert import auto, auto_recipe, convert, sensitivity
from convert.auto import Choice, Group, Sensitivity, grouped, knapsack
from convert.auto_recipe import Budget, as_json, parse_budget, read_sensitivity
from convert.calibrate import model_identity
from convert.checkpoint import open_checkpoint
from convert.cli import main
from convert.examples import Example, corrupt, temperature_at
from convert.plan_gguf import make_gguf_plan
from convert.recipes import find_recipe
from convert.recipes_mlx import PRECISIONS
from demo.calibration import lines as calibration
from demo.tasks import TASKS, held_out
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.noise import NoiseStream
from mlx_dgemma.shards import stored_tensors

DEMO = "demo/checkpoint"
groups_of_choices = st.lists(
    st.lists(st.builds(Choice, st.just("p"), st.integers(1, 60), st.floats(0, 9)), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


@settings(deadline=None)
@given(groups_of_choices, st.integers(1, 200))
def test_the_knapsack_finds_the_best_of_all_combinations(options, budget):
    fitting = [c for c in itertools.product(*options) if sum(x.nbytes for x in c) <= budget]
    found = knapsack(options, budget)
    if not fitting:
        assert found is None
        return
    assert [choice in group for choice, group in zip(found, options, strict=True)]
    assert sum(x.nbytes for x in found) <= budget
    assert sum(x.kl for x in found) == pytest.approx(min(sum(x.kl for x in c) for c in fitting))


def test_the_knapsack_keeps_a_large_budget(monkeypatch):
    """Bytes are rounded up to the grid, so a coarse one spends less than it might and never more."""
    monkeypatch.setattr(auto, "GRID", 1000)
    rng = np.random.default_rng(0)
    options = [
        [Choice(str(bits), bits * 10**6 + int(n), 4.0**-bits) for bits in range(2, 9)]
        for n in rng.integers(1e6, size=40)
    ]
    budget = 170 * 10**6
    spent = sum(choice.nbytes for choice in knapsack(options, budget))
    assert 0.97 * budget < spent <= budget


@pytest.fixture(scope="module")
def loaded():
    return mlx_dgemma.load(DEMO, mx.float32)


@pytest.fixture(scope="module")
def examples():
    found = [instance for task in TASKS for instance in held_out(task, 3, 0)]
    return [Example(({"role": "user", "content": i.prompt},), i.answer) for i in found]


def test_groups_cover_every_quantized_tensor_once(loaded):
    groups = grouped(loaded[0].config)
    names = [t.hf for tensors in groups.values() for t in tensors]
    assert len(names) == len(set(names)) == 2 + 2 + 6 * 10 - 1
    assert [t.gguf_part for t in groups["blk.3.ffn_down_exps"]] == ["ffn_down_exps"]
    assert len(groups["blk.5.attention"]) == 3  # the full layer has no v_proj


def test_a_rounded_group_costs_what_a_slow_twin_says(loaded, examples):
    """One canvas at a time, logits of all slots, float64."""
    model, tokenizer = loaded
    found = sensitivity.canvases(examples, tokenizer, model.config.canvas_length, 8)
    ts = (0.3, 0.7)
    batches = sensitivity._batches(found, model, ts, seed=1)
    reference = [sensitivity._log_shares(model, batch) for batch in batches]
    before = [passes(model, c, ts[i % 2], 1) for i, c in enumerate(found)]
    with sensitivity.rounded(model, grouped(model.config)["blk.2.ffn_gate_up_exps"], PRECISIONS["q3"]):
        pairs = [sensitivity._kl(model, b, r) for b, r in zip(batches, reference, strict=True)]
        after = [passes(model, c, ts[i % 2], 1) for i, c in enumerate(found)]
    kl, slots = (np.concatenate(part) for part in zip(*pairs, strict=True))
    where = {
        (int(i), canvas.tobytes()): (s, n)
        for b in batches
        for i, canvas, s, n in zip(b.instance, b.canvas, b.slots, b.counted, strict=True)
    }
    expected = n = 0
    for canvas, (noisy, was), (_, now) in zip(found, before, after, strict=True):
        looked_at, counted = where[canvas.instance, noisy.tobytes()]
        for p, q in zip(was, now, strict=True):
            expected += ((np.exp(p) * (p - q)).sum(axis=-1)[looked_at] * counted).sum()
            n += counted.sum()
    assert slots.sum() == n > 100
    assert kl.sum() == pytest.approx(expected, rel=1e-3)
    assert kl.sum() > 0


def passes(model, canvas, t, seed):
    """The corrupted canvas (C,) and the log probabilities (C, V) of both passes."""
    noisy, _ = corrupt(
        canvas.clean[None], t, NoiseStream(seed), [canvas.instance], canvas.block, model.config.vocab_size
    )
    cache = model.make_cache()
    model.encode(mx.array([canvas.prefix]), cache)
    first = model.denoise(mx.array(noisy), cache)
    second = model.denoise(mx.array(noisy), cache, first / temperature_at(t, model.generation_config))
    found = [np.array(logits, np.float64)[0] for logits in (first, second)]
    return noisy[0], [x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in found]


def test_the_model_is_as_before_after_measuring(loaded, examples):
    model, _ = loaded
    before = {t.hf: sensitivity.place(model, t) for group in grouped(model.config).values() for t in group}
    modules = {hf: parent[name] for hf, (parent, name) in before.items()}
    with pytest.raises(KeyError), sensitivity.rounded(model, grouped(model.config)["embedding"], PRECISIONS["q2"]):
        raise KeyError
    assert all(parent[name] is modules[hf] for hf, (parent, name) in before.items())


def test_packed_modules_are_rounded_as_floats_are(loaded, tmp_path):
    convert(DEMO, tmp_path / "q8", recipe="q8")
    packed, _ = mlx_dgemma.load(tmp_path / "q8", mx.float32)
    for key in ("embedding", "blk.1.attention", "blk.4.ffn_down_exps"):
        tensors = grouped(packed.config)[key]
        with sensitivity.rounded(packed, tensors, PRECISIONS["q3"]) as errors:
            parent, name = sensitivity.place(packed, tensors[0])
            assert parent[name].packing.bits == 3 if key != "embedding" else parent[name].bits == 3
            values = np.array(sensitivity._floats(parent[name]))
        with sensitivity.rounded(loaded[0], tensors, PRECISIONS["q3"]) as wanted:
            parent, name = sensitivity.place(loaded[0], tensors[0])
            close = np.isclose(values, np.array(parent[name].weight), atol=0.02 * np.abs(values).max())
        assert close.mean() > 0.9  # a weight between two steps of 3 bits may go to the other one
        assert errors == pytest.approx(wanted, rel=0.05)


def test_a_group_that_the_probe_leaves_as_it_is_cannot_be_measured(tmp_path, examples):
    convert(DEMO, tmp_path / "q4", recipe="q4")
    model, tokenizer = mlx_dgemma.load(tmp_path / "q4", mx.float32)
    with pytest.raises(DgemmaError, match=r"self_cond_gate.weight is stored in 4 bits, expected more than the 4"):
        sensitivity.measure(model, tokenizer, examples, "q4", ts=(0.5,), limit=8)


def test_little_text_is_an_error(loaded, examples):
    model, tokenizer = loaded
    with pytest.raises(DgemmaError, match="3 canvases, expected at least 8"):
        sensitivity.measure(model, tokenizer, examples, limit=3)
    with pytest.raises(DgemmaError, match="expected at least one canvas of 64"):
        sensitivity.measure(model, tokenizer, [Example((), "too short")])


def test_the_typical_kl_is_not_what_one_instance_says():
    rng = np.random.default_rng(0)
    matters = {"a": 1e-6, "b": 1e-5, "c": 1e-4}
    difficulty = 10.0 ** rng.uniform(-3, 3, 200)  # the same for all groups
    kls = {key: kl * difficulty * np.exp(0.5 * rng.standard_normal(200)) for key, kl in matters.items()}
    common = np.exp(np.log(difficulty).mean())
    found = auto.typical(kls)
    for key, kl in matters.items():
        typical, error = found[key]
        assert typical == pytest.approx(kl * common, rel=0.15)
        assert error == pytest.approx(typical * 0.5 / 200**0.5, rel=0.3)  # nothing of the difficulty
    kls["a"][0] = 1.0
    assert auto.typical(kls)["a"][0] < 1.1 * found["a"][0]


def test_no_kl_is_zero():
    assert auto.typical({"a": np.zeros(2)}) == {"a": (pytest.approx(auto.TINY), 0.0)}


def test_one_example_says_nothing_of_the_others(loaded):
    model, tokenizer = loaded
    long = Example(({"role": "user", "content": "Complete:"},), "def add(a, b):\n    return a + b\n" * 60)
    with pytest.raises(DgemmaError, match="the examples are a single one"):
        sensitivity.measure(model, tokenizer, [long], limit=8)


def test_an_instance_counts_once(loaded, examples):
    kl, slots = np.array([1.0, 3, 5, 7]), np.array([2.0, 2, 0, 4])
    assert sensitivity._by_instance(kl, slots, np.array([3, 1, 2, 3])).tolist() == [3 / 2, 8 / 6]


# The recipe


@pytest.fixture(scope="module")
def made_up(loaded):
    """The earlier the layer, the more it matters."""
    rng = np.random.default_rng(0)
    groups = {
        key: Group(float(rng.uniform(0.1, 1)) / (i + 1), 0.0, {t.gguf_part: 0.01 for t in tensors})
        for i, (key, tensors) in enumerate(grouped(loaded[0].config).items())
    }
    return Sensitivity("q4", groups, 8, (0.5,), 0, model_identity(loaded[0]))


@pytest.fixture
def saved(made_up, tmp_path, monkeypatch):
    monkeypatch.setattr(auto_recipe, "SAMPLE", 1 << 12)  # of errors; the tests ask nothing of their exactness
    path = tmp_path / "sensitivity.json"
    auto_recipe.write_json(as_json(made_up), path)
    return path


def test_a_sensitivity_comes_back(made_up, saved):
    assert read_sensitivity(saved) == made_up


@pytest.mark.parametrize("budget", ["4.2bpw", "5bpw", "3MB"])
@pytest.mark.parametrize("to", ["mlx", "gguf"])
def test_a_recipe_fills_its_budget_and_serves_both_targets(saved, tmp_path, capsys, budget, to):
    out, recipe = tmp_path / "out", tmp_path / "recipe.json"
    arguments = [DEMO, str(out), "--to", to, "--recipe", "auto", "--budget", budget, "--sensitivity", str(saved)]
    assert main([*arguments, "--save-recipe", str(recipe), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    raw = json.loads(recipe.read_text())
    allowed = parse_budget(budget).nbytes(report["parameters"])
    assert 0.97 * allowed < report["bytes"] <= allowed
    assert raw["evidence"][to]["bytes"] == report["bytes"]
    assert not any("do not fit" in note for note in report["notes"])
    other = {"mlx": "gguf", "gguf": "mlx"}[to]
    assert main([DEMO, "--to", other, "--recipe", str(recipe), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == raw["evidence"][other]["bytes"]


def test_a_layer_that_matters_more_gets_more(saved, made_up, tmp_path, capsys):
    recipe = tmp_path / "recipe.json"
    assert (
        main(
            [
                DEMO,
                "--to",
                "mlx",
                "--dry-run",
                "--recipe",
                "auto",
                "--budget",
                "4.5bpw",
                "--sensitivity",
                str(saved),
                "--save-recipe",
                str(recipe),
            ]
        )
        == 0
    )
    plan = find_recipe(recipe, "mlx")
    members = grouped(open_checkpoint(auto_recipe.Path(DEMO)).config)
    bits = {key: plan.precision(tensors[0]).bits for key, tensors in members.items() if "gate_up" in key}
    kl = {key: made_up.groups[key].kl for key in bits}
    assert bits[max(kl, key=kl.get)] > bits[min(kl, key=kl.get)]


def test_a_budget_that_is_too_small_says_the_smallest(saved, capsys):
    for to, budget in (("mlx", "1MB"), ("gguf", "1bpw")):
        arguments = [DEMO, "--to", to, "--dry-run", "--recipe", "auto", "--budget", budget]
        assert main([*arguments, "--sensitivity", str(saved)]) == 1
        error = capsys.readouterr().err
        assert f"the smallest possible size for --to {to} is" in error


@pytest.mark.parametrize("missing", ["mlx", "gguf"])
def test_without_the_other_targets_library_there_is_one_choice(saved, tmp_path, monkeypatch, missing, capsys):
    if missing == "gguf":
        monkeypatch.setattr(auto_recipe, "find_ggml", lambda: None)
    else:
        monkeypatch.setattr(auto_recipe.importlib.util, "find_spec", lambda name: None)
    to = {"mlx": "gguf", "gguf": "mlx"}[missing]
    recipe = tmp_path / "recipe.json"
    arguments = [DEMO, "--to", to, "--dry-run", "--recipe", "auto", "--budget", "3MB", "--sensitivity", str(saved)]
    assert main([*arguments, "--save-recipe", str(recipe)]) == 0
    raw = json.loads(recipe.read_text())
    assert all(isinstance(value, str) for value in raw["roles"].values()) and missing not in raw["evidence"]
    for target in ("mlx", "gguf"):
        assert main([DEMO, "--to", target, "--dry-run", "--recipe", str(recipe)]) == 0


def test_weights_that_are_no_numbers_are_named(saved, tmp_path, capsys):
    source = bad_source(tmp_path, np.uint16(0x7FC0))
    arguments = [str(source), "--to", "mlx", "--dry-run", "--recipe", "auto", "--budget", "3MB"]
    assert main([*arguments, "--sensitivity", str(saved)]) == 1
    assert "layers.2.experts.down_proj holds infinity or NaN" in capsys.readouterr().err


def test_a_sensitivity_of_weights_that_are_no_numbers_names_the_tensor(tmp_path, capsys):
    source = bad_source(tmp_path, np.uint16(0x7FC0))
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(itertools.islice(calibration(3, 0), 12)))
    arguments = ["sensitivity", str(source), "--data", str(data), "--out", str(tmp_path / "s.json"), "--canvases", "8"]
    assert main(arguments) == 1
    assert "layers.2.experts.down_proj holds infinity or NaN" in capsys.readouterr().err
    assert not (tmp_path / "s.json").exists()


def test_weights_beyond_ggmls_scales_are_left_to_the_conversion(saved, tmp_path, capsys):
    source = bad_source(tmp_path, np.uint16(0x7F00))  # 1.7e38
    recipe = tmp_path / "recipe.json"
    arguments = [str(source), "--to", "gguf", "--dry-run", "--recipe", "auto", "--budget", "4MB"]
    assert main([*arguments, "--sensitivity", str(saved), "--save-recipe", str(recipe)]) == 0
    chosen = json.loads(recipe.read_text())["roles"]
    assert isinstance(chosen.get("blk.2.ffn_down_exps", ""), str)  # for MLX alone
    assert sum(isinstance(value, dict) for value in chosen.values()) == 32 - 6 - 1


def bad_source(tmp_path, number):
    """The demo with one number of an expert replaced."""
    source = tmp_path / "source"
    shutil.copytree(DEMO, source)
    stored = stored_tensors(source)["model.decoder.layers.2.experts.down_proj"]
    with stored.file.open("r+b") as f:
        f.seek(stored.start)
        f.write(number.tobytes())
    return source


def test_a_taken_name_is_refused_before_the_choice_and_its_recipe_stays(saved, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    arguments = [DEMO, str(out), "--recipe", "auto", "--sensitivity", str(saved)]
    assert main([*arguments, "--budget", "3MB"]) == 0
    recipe = tmp_path / "out.gguf.recipe.json"
    before = recipe.read_bytes()
    assert main([*arguments, "--budget", "4MB"]) == 1
    assert "already exists" in capsys.readouterr().err
    assert recipe.read_bytes() == before


def test_expected_kl_falls_with_the_budget(saved, tmp_path):
    expected = []
    for i, budget in enumerate(("3.2bpw", "4bpw", "6bpw")):
        path = tmp_path / f"{i}.json"
        assert (
            main(
                [
                    DEMO,
                    "--dry-run",
                    "--recipe",
                    "auto",
                    "--budget",
                    budget,
                    "--sensitivity",
                    str(saved),
                    "--save-recipe",
                    str(path),
                ]
            )
            == 0
        )
        expected.append(json.loads(path.read_text())["evidence"]["gguf"]["expected_kl"])
    assert expected == sorted(expected, reverse=True)


@pytest.mark.parametrize("text, expected", [
    ("14GB", Budget(14e9, False)), ("13 GiB", Budget(13 * 2**30, False)), ("4.5bpw", Budget(4.5, True)),
    ("4.5 BPW", Budget(4.5, True)), ("500000 B", Budget(5e5, False)),
])  # fmt: skip
def test_budgets(text, expected):
    assert parse_budget(text) == expected


@pytest.mark.parametrize("text", ["", "many", "14", "3000000", "0GB", "0bpw", "33bpw", "-1GB", "14 potatoes"])
def test_wrong_budgets(text):
    with pytest.raises(DgemmaError, match="--budget is"):
        parse_budget(text)


@pytest.mark.parametrize("arguments, message", [
    (["--recipe", "auto"], "--budget"), (["--budget", "3MB"], "--recipe auto"),
    (["--recipe", "q4", "--save-recipe", "x"], "--recipe auto"),
    (["--recipe", "auto", "--budget", "3MB", "--tensor-type", "expert=q8"], "--tensor-type"),
])  # fmt: skip
def test_options_that_belong_together(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main([DEMO, "--dry-run", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_sensitivity_the_command_that_measures_it_is_named(tmp_path, monkeypatch, capsys):
    source = str(auto_recipe.Path(DEMO).resolve())
    monkeypatch.chdir(tmp_path)
    assert main([source, "--dry-run", "--recipe", "auto", "--budget", "3MB"]) == 1
    assert "python -m convert sensitivity MODEL --data FILE --out sensitivity.json" in capsys.readouterr().err


def test_a_sensitivity_of_another_model(saved, tmp_path, capsys):
    raw = json.loads(saved.read_text())
    del raw["groups"]["blk.0.expert" if "blk.0.expert" in raw["groups"] else "blk.0.ffn_down_exps"]
    saved.write_text(json.dumps(raw))
    assert main([DEMO, "--dry-run", "--recipe", "auto", "--budget", "3MB", "--sensitivity", str(saved)]) == 1
    assert "the sensitivity lacks blk.0.ffn_down_exps" in capsys.readouterr().err


def test_a_sensitivity_of_another_model_with_the_same_layers(saved, capsys):
    saved.write_text(saved.read_text().replace(json.loads(saved.read_text())["model"], "0123456789abcdef"))
    assert main([DEMO, "--dry-run", "--recipe", "auto", "--budget", "3MB", "--sensitivity", str(saved)]) == 1
    error = capsys.readouterr().err
    assert "was measured on another model (0123456789abcdef), expected demo/checkpoint" in error
    assert "`python -m convert sensitivity`" in error


@pytest.mark.parametrize("more", [["--refit"], ["--gptq", "none"]])
def test_a_choice_goes_by_the_errors_of_fitted_scales(saved, tmp_path, more, monkeypatch):
    """At 8 bits they are half of MLX's own."""
    errors = {}

    def squared_error(values, rounded):
        found = np.square(rounded - values).sum() / np.square(values).sum()
        errors.setdefault(len(runs), []).append(found)
        return float(found)

    runs = []
    monkeypatch.setattr(auto_recipe, "squared_error", squared_error)
    monkeypatch.setattr(auto_recipe, "find_ggml", lambda: None)
    monkeypatch.setattr("convert.api.Factors", lambda path: None)
    monkeypatch.setattr("convert.cli.Factors", lambda path: None)
    for options in ([], more):
        arguments = [DEMO, "--dry-run", "--recipe", "auto", "--budget", "3MB", "--sensitivity", str(saved), *options]
        assert main(arguments) == 0
        runs.append(options)
    plain, fitted = (np.array(errors[run]) for run in (0, 1))
    assert len(plain) == len(fitted) and (fitted <= plain * 1.001).all()
    assert (fitted < 0.7 * plain).sum() > 30 and (fitted == plain).sum() > 30  # 8 bits; the microscaling formats


@pytest.mark.parametrize("change", [
    {"format": "another"}, {"groups": {}}, {"groups": {"embedding": {"kl": 1}}}, {"groups": 3},
    {"groups": {"embedding": {"kl": -1, "standard_error": 0, "errors": {}}}},
])  # fmt: skip
def test_files_that_are_no_sensitivity(saved, change, capsys):
    saved.write_text(json.dumps(json.loads(saved.read_text()) | change))
    assert main([DEMO, "--dry-run", "--recipe", "auto", "--budget", "3MB", "--sensitivity", str(saved)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_layers_in_a_recipe(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"roles": {"expert": "q4", "blk.1.expert": "q6", "blk.1.ffn_down_exps": "q8"}}))
    config = open_checkpoint(auto_recipe.Path(DEMO)).config
    plan = make_gguf_plan(config, find_recipe(path, "gguf"))
    wanted = {t.tensor.gguf.removesuffix(".weight"): t.wanted.name for t in plan.tensors if t.tensor.role == "expert"}
    assert wanted["blk.0.ffn_gate_up_exps"] == wanted["blk.0.ffn_down_exps"] == "Q4_K"
    assert (wanted["blk.1.ffn_gate_up_exps"], wanted["blk.1.ffn_down_exps"]) == ("Q6_K", "Q8_0")
    with pytest.raises(DgemmaError, match=r"blk\.6\.expert names no tensor"):
        make_gguf_plan(config, find_recipe("Q4_K_M", "gguf", ("blk.6.expert=Q8_0",)))
    with pytest.raises(DgemmaError, match="belongs to none"):
        find_recipe("q4", "mlx", ("blk.1.embedding=q6",))
