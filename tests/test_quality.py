"""The command that judges quantizations: engines against each other, what it refuses, and what it keeps."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_dgemma
from benchmarks import quality, quality_base, quality_plot
from benchmarks.quality_data import read_data
from benchmarks.quality_engines import load
from benchmarks.quality_models import _of_folder, about, check_alike
from benchmarks.quality_passes import Plan, fill, reference_scores, scores
from benchmarks.quality_report import TYPICAL, kl_of, new_report, read_report, write_report
from benchmarks.quality_scores import compare
from benchmarks.quality_tasks import normal, paired, run_tasks, summary_of
from convert import convert
from demo.evaluate import Answer, loops
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.reader import read_gguf
from mlx_dgemma.quality import first_bad_tensor
from mlx_dgemma.shards import stored_tensors
from tests.tiny import make_tiny_checkpoint, write_weights
from tests.tiny_gguf import make_tiny_gguf

ROOT = Path(__file__).parent.parent
CHECKPOINT = str(ROOT / "demo/checkpoint")
REGIONS = ("all", "corrupted")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The demo in forms that differ in nothing, a little, and more."""
    folder = tmp_path_factory.mktemp("quality")
    for recipe in ("q8", "q3"):
        convert(CHECKPOINT, folder / recipe, to="mlx", recipe=recipe)
    for recipe in ("F32", "Q2_K"):
        convert(CHECKPOINT, folder / f"{recipe}.gguf", to="gguf", recipe=recipe)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What the demo on MLX says of six canvases: (plan, base, its own figures and sums)."""
    reference = about(CHECKPOINT)
    plan = Plan(
        read_data(None, reference.tokenizer, reference.config, 6, 0), reference.config, reference.settings, 32, 0
    )
    path = tmp_path_factory.mktemp("base") / "base"
    sizes = quality_base.shapes(6, len(plan.data.texts), 5, 32, plan.config)
    made = quality_base.create(path, {"of": "the demo"}, sizes)
    model = load(reference)
    fill(model, plan, made)
    model.close()
    assert path.with_name("base.partial").exists() and not path.exists()
    made = quality_base.finish(made, path)
    return plan, made, *reference_scores(plan, made)


def against(name, base):
    plan, made, _, sums = base
    candidate = about(str(name))
    check_alike(about(CHECKPOINT), candidate)
    model = load(candidate, device="CPU", threads=1)
    try:
        return scores(model, plan, made, sums)
    finally:
        model.close()


# Engines


def test_a_model_equals_itself_exactly(base):
    found = against(CHECKPOINT, base)
    for rows in found["denoising"].values():
        for row in (rows["mean"], *rows["t"].values()):
            for region in REGIONS:
                got = {name: row[region][name]["mean"] for name in ("kl", "difference", "same_argmax", "same_experts")}
                assert got == {"kl": 0, "difference": 0, "same_argmax": 1, "same_experts": 1}
                assert row[region]["cross_entropy"]["mean"] > 0
    assert found["encoder"]["difference"] == {"mean": 0, "se": 0}


def test_more_bits_are_nearer_to_the_reference(models, base):
    q8, q3, q2 = (against(models / name, base) for name in ("q8", "q3", "Q2_K.gguf"))
    assert 0 < 10 * kl_of(q8)["mean"] < kl_of(q3)["mean"] < kl_of(q2)["mean"] < 0.1
    experts = [x["denoising"]["self_conditioned"]["mean"]["all"]["same_experts"]["mean"] for x in (q8, q3, q2)]
    assert 1 > experts[0] > experts[1] > experts[2] > 0.8


@pytest.mark.parametrize("engine", ["ggml", "mlx"])
def test_a_gguf_of_f32_is_the_same_model_on_either_engine(models, base, engine):
    # Measured on ggml: KL 3e-13, perplexity 5e-7 apart. On MLX nothing differs but the file.
    found = against(f"{engine}:{models / 'F32.gguf'}", base)
    for rows in found["denoising"].values():
        for region in REGIONS:
            assert rows["mean"][region]["kl"]["mean"] < 1e-10
            assert rows["mean"][region]["same_argmax"]["mean"] == 1
            assert rows["mean"][region]["same_experts"]["mean"] > 0.999
    assert found["encoder"]["perplexity"] == pytest.approx(base[2]["encoder"]["perplexity"], rel=1e-5)


def test_perplexity_is_that_of_tokens_one_by_one(base):
    """Each token after its own prefix, encoded alone."""
    plan, made, own, _ = base
    model, _ = mlx_dgemma.load(CHECKPOINT, mx.float32)
    text = min(plan.data.texts, key=lambda text: len(text.tokens))
    total = 0.0
    for i in range(text.first, len(text.tokens)):
        hidden = model.encode(mx.array([text.tokens[:i]]), model.make_cache())
        logits = np.array(model.logits(hidden))[0, -1].astype(np.float64)
        total += np.log(np.exp(logits).sum()) - logits[text.tokens[i]]
    loss, n = made.next_token[plan.data.texts.index(text)]
    assert (loss, n) == (pytest.approx(total, rel=1e-4), len(text.tokens) - text.first)
    assert own["encoder"]["tokens"] == sum(len(t.tokens) - t.first for t in plan.data.texts)


def test_a_sample_of_slots_agrees_with_all_of_them(models, base):
    plan, _, _, _ = base
    found = {}
    for slots in (12, 64):
        every = plan._replace(slots=slots)
        path = models / f"base{slots}"
        made = quality_base.create(path, {}, quality_base.shapes(6, len(plan.data.texts), 5, slots, plan.config))
        model = load(about(CHECKPOINT))
        fill(model, every, made)
        made = quality_base.finish(made, path)
        model = load(about(str(models / "q3")))
        found[slots] = scores(model, every, made, reference_scores(every, made)[1])["denoising"]["first"]["mean"]
    for region in REGIONS:
        few, all_of_them = (found[slots][region]["kl"] for slots in (12, 64))
        assert few["mean"] != all_of_them["mean"]
        assert few["mean"] == pytest.approx(all_of_them["mean"], rel=0.5)
        # What is known of all slots anyway does not depend on the sample.
        assert found[12][region]["cross_entropy"] == found[64][region]["cross_entropy"]


# Which models can be compared


def test_another_canvas_or_vocabulary_is_refused(tmp_path, tiny):
    other = make_tiny_checkpoint(tmp_path / "canvas", canvas_length=24)
    with pytest.raises(DgemmaError, match="canvas: found a canvas of 24 slots, expected a canvas of 16 slots"):
        check_alike(about(str(tiny)), about(str(other)))
    with pytest.raises(DgemmaError, match="found a vocabulary of 384 tokens, expected a vocabulary of 1024|canvas of"):
        check_alike(about(CHECKPOINT), about(str(tiny)))
    # As many tokens, two of which changed places.
    swapped = shutil.copytree(tiny, tmp_path / "swapped")
    text = json.loads((swapped / "tokenizer.json").read_text())
    vocab = text["model"]["vocab"]
    vocab["<0x41>"], vocab["<0x42>"] = vocab["<0x42>"], vocab["<0x41>"]
    (swapped / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(DgemmaError, match="found another vocabulary, token 172 is '<0x42>', expected '<0x41>'"):
        check_alike(about(str(tiny)), about(str(swapped)))


def refused(capsys, *arguments, code=1):
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as raised:
        quality.main([str(a) for a in arguments])
    if code == 2:
        assert raised.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]
    assert isinstance(raised.value.code, str) and "\n" not in raised.value.code
    return raised.value.code


def test_another_chat_template_is_refused(tmp_path, tiny, capsys):
    other = shutil.copytree(tiny, tmp_path / "other")
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text(template.replace("<|turn>model", "<|turn>assistant"))
    assert "makes other tokens of the text" in refused(capsys, tiny, other, "--no-tasks")


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (
            ["torch:X", "X"],
            "engine 'torch' is not known, expected PATH or one of mlx:PATH, ggml:PATH, transformers:PATH",
        ),
        (["nowhere/at/all", "X"], "no such folder or file"),
        ([CHECKPOINT, f"ggml:{CHECKPOINT}"], "found a folder, ggml expects a GGUF file"),
        ([CHECKPOINT, CHECKPOINT, "--tasks", "chess"], "--tasks chess: not known here, expected some of sudoku"),
        ([CHECKPOINT, CHECKPOINT, "--tasks", "exact_match"], "not known here"),
        ([CHECKPOINT, CHECKPOINT, "--json", "/nowhere/x.json"], "/nowhere/x.json: cannot be written"),
        ([CHECKPOINT, CHECKPOINT, "--base", "/nowhere/base"], "/nowhere/base: cannot be written"),
        ([CHECKPOINT, CHECKPOINT, "--json", "/"], "/: is not a file, expected a file's name"),
        ([CHECKPOINT, CHECKPOINT, "--plot", "x.gif"], "found .gif, expected .png or .svg"),
        ([CHECKPOINT, CHECKPOINT, "--data", "/nowhere.txt"], "/nowhere.txt: cannot be read"),
        ([CHECKPOINT, CHECKPOINT, "--canvases", "9", "--data", "{text}"], "holds text for --canvases 2 of 64 tokens"),
        ([CHECKPOINT, CHECKPOINT, "--data", "{short}"], "found 3 tokens of text, expected at least one whole canvas"),
        (["plot", "{text}", "--plot", "x.svg"], "not valid JSON"),
        (["plot", "{empty}", "--plot", "x.svg"], "found format None None, expected 'dgemma-quality' 1"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_what_cannot_be_measured_is_refused_before_anything_is(arguments, found, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "load", None)
    monkeypatch.chdir(tmp_path)
    contents = {"text": "def result(name):\n    return name\n" * 14, "short": "a b c", "empty": "{}"}
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    assert found in refused(capsys, *(a.format(**{n: tmp_path / n for n in contents}) for a in arguments))


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["A"], "CANDIDATE"),
        (["A", "B", "--n", "0"], "--n is 0, expected 1 or more"),
        (["A", "B", "--canvases", "0"], "--canvases is 0"),
        (["A", "B", "--slots", "1"], "--slots is 1, expected 2 or more"),
        (["A", "B", "B"], "B is given twice"),
        (["A", "B", "--no-tasks", "--tasks", "json"], "exclude each other"),
        (["plot", "A"], "--plot"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, found, capsys):
    assert found in refused(capsys, *arguments, code=2)


def test_a_plot_without_matplotlib_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(quality_plot.importlib.util, "find_spec", lambda name: None)
    assert "pip install '.[plot]'" in refused(capsys, CHECKPOINT, CHECKPOINT, "--plot", "x.png")


def test_an_engine_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("benchmarks.quality_models.importlib.util.find_spec", lambda name: None)
    with pytest.raises(DgemmaError, match=r"torch is not installed; pip install '.\[reference\]'"):
        about(f"transformers:{CHECKPOINT}")


# The command


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """One run over two candidates: its folder."""
    folder = tmp_path_factory.mktemp("run")
    quality.main(arguments(folder, models / "q8", models / "Q2_K.gguf"))
    return folder


def arguments(folder, *candidates):
    return [CHECKPOINT, *map(str, candidates), "--canvases", "4", "--n", "1", "--tasks", "sudoku,python_fix",
            "--threads", "1", "--json", str(folder / "out.json"), "--base", str(folder / "base"),
            "--plot", str(folder / "out.svg")]  # fmt: skip


def test_a_report_has_everything(run, models):
    report = read_report(run / "out.json")
    assert (report["setting"]["canvases"], report["setting"]["vocabulary"]) == (4, 1024)
    assert [row["model"] for row in report["candidates"]] == [str(models / "q8"), str(models / "Q2_K.gguf")]
    assert [row["form"] for row in report["candidates"]] == ["MLX", "GGUF"]
    for row in (report["reference"], *report["candidates"]):
        assert list(row["tasks"]) == ["sudoku", "python_fix", "all"] and row["tasks"]["all"]["n"] == 2
        task = row["tasks"]["all"]
        assert task["rate"] == task["right"] / 2 and task["low"] < task["rate"] <= task["high"]
        assert task["blocks_at_limit"]["count"] == 0 and task["loops"]["count"] == 0
        assert row["weights_bytes"] > 1e6 and row["encoder"]["perplexity"] > 1
    assert report["candidates"][0]["tasks"]["all"]["lost"] == 0
    svg = (run / "out.svg").read_text()
    assert "<svg" in svg and "Q2_K" in svg and "checkpoint, 9.92 MB" in svg


def test_two_candidates_of_a_report_are_compared(run, models, capsys):
    a, b = str(models / "q8"), str(models / "Q2_K.gguf")
    quality.main(["compare", str(run / "out.json"), "--models", a, b])
    out = capsys.readouterr().out
    assert out.startswith(f"{a} against {b}\n  KL is lower in 4 of 4 instances: 100.0% ")
    assert "geometric mean of the KLs' ratio: 0.0" in out and "difference of mean KLs: -" in out
    message = refused(capsys, "compare", str(run / "out.json"), "--models", a, "nothing")
    assert "nothing: is not among the measured candidates" in message


def test_a_second_run_goes_on_behind_the_first(run, models, monkeypatch, capsys, tmp_path):
    shutil.copytree(run, tmp_path / "again")
    opened = []
    monkeypatch.setattr(quality, "load", lambda model, *a: opened.append(model.name) or load(model, *a))
    before = read_report(run / "out.json")
    quality.main(arguments(tmp_path / "again", models / "q8", models / "q3", models / "Q2_K.gguf"))
    # The reference's distributions are in the base, its answers in the report.
    assert opened == [str(models / "q3")]
    report = read_report(tmp_path / "again/out.json")
    assert [row["model"].rpartition("/")[2] for row in report["candidates"]] == ["q8", "Q2_K.gguf", "q3"]
    assert report["candidates"][:2] == before["candidates"]
    table = capsys.readouterr().out
    assert "q3" in table and "q8" in table and "argmax" in table


def test_again_measures_what_is_there(run, models, monkeypatch, tmp_path):
    folder = shutil.copytree(run, tmp_path / "again")
    opened = []
    monkeypatch.setattr(quality, "load", lambda model, *a: opened.append(model.name) or load(model, *a))
    quality.main([*arguments(folder, models / "q8"), "--again"])
    assert opened == [str(models / "q8")]  # not the reference
    before, after = (read_report(x / "out.json")["candidates"] for x in (run, folder))
    assert (
        after[0]["denoising"] == before[0]["denoising"] and after[1] == before[1]
    )  # the same figures, to the last bit


def test_what_was_measured_before_must_be_of_the_same(run, models, capsys, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    given = arguments(folder, models / "q8")
    message = refused(capsys, *given, "--seed", "1")
    assert "out.json: text is" in message and message.endswith("give another --json, or remove it")
    assert "out.json: slots is 32, expected 8" in refused(capsys, *given, "--slots", "8")
    assert "was asked for {'tasks': ['sudoku', 'python_fix'], 'n': 1}, expected" in refused(capsys, *given, "--n", "2")
    (folder / "out.json").unlink()
    assert "base: made with slots 32, expected 8" in refused(capsys, *given, "--slots", "8")
    with open(folder / "base", "r+b") as file:
        file.truncate(1_000)
    assert "base: not a whole base of this program" in refused(capsys, *given)


def test_a_candidate_that_fails_leaves_the_others(models, monkeypatch, capsys, tmp_path):
    def failing(model, *options):
        if model.name.endswith("q3"):
            raise RuntimeError("out of memory")
        return load(model, *options)

    monkeypatch.setattr(quality, "load", failing)
    given = [CHECKPOINT, models / "q3", models / "q8", "--canvases", 1, "--no-tasks", "--json", tmp_path / "x.json"]
    with pytest.raises(SystemExit) as raised:
        quality.main([str(a) for a in given])
    assert raised.value.code == 1 and "q3: out of memory" in capsys.readouterr().err
    failed, whole = read_report(tmp_path / "x.json")["candidates"]
    assert failed["error"] == "out of memory" and kl_of(whole)["mean"] > 0
    assert kl_of(whole)["se"] is None  # one instance has no spread
    monkeypatch.setattr(quality, "load", load)
    quality.main([str(a) for a in given])
    assert [row.get("error") for row in read_report(tmp_path / "x.json")["candidates"]] == [None, None]


def test_logits_that_are_not_finite_are_traced_to_a_tensor(capsys, tmp_path):
    name = "model.decoder.layers.1.mlp.up_proj.weight"
    candidate, report = make_nan_copy(tmp_path / "nan", name), tmp_path / "x.json"
    with pytest.raises(SystemExit):
        quality.main([CHECKPOINT, str(candidate), "--canvases", "1", "--no-tasks", "--json", str(report)])
    (row,) = read_report(report)["candidates"]
    assert row["error"].startswith(f"{candidate}: {name} holds infinity or NaN, expected numbers")


def test_logits_that_are_not_finite_for_another_reason(models, capsys, monkeypatch):
    class Broken(type(load(about(CHECKPOINT)))):
        def denoise(self, *arguments):
            logits, experts = super().denoise(*arguments)
            return logits * np.float32("nan"), experts

    monkeypatch.setattr(quality, "load", lambda model, *options: Broken(model))
    message = refused(capsys, CHECKPOINT, models / "q8", "--canvases", "1", "--no-tasks")
    assert message.startswith(f"error: {CHECKPOINT}: logits are not finite, expected numbers; its stored floats are")


def make_nan_copy(folder, name):
    """The demo with one NaN at the end of one tensor."""
    shutil.copytree(CHECKPOINT, folder)
    t = stored_tensors(folder)[name]
    assert t.dtype == "BF16"
    with open(t.file, "r+b") as file:
        file.seek(t.start + t.nbytes - 2)
        file.write(b"\xc0\x7f")
    return folder


@pytest.mark.parametrize("form", ["BF16", "F32", "gguf"])
def test_the_first_tensor_that_is_not_finite(form, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_dgemma.quality.SCANNED", 100)  # many pieces
    at = 17 if form == "gguf" else -1
    if form == "gguf":
        path = make_tiny_gguf(tmp_path / "x.gguf")
        t = read_gguf(path).tensors["blk.1.ffn_down.weight"]
        file, name = path, t.name
    else:
        path = make_tiny_checkpoint(tmp_path / "x", dtype={"BF16": "bfloat16", "F32": "float32"}[form], vision=True)
        name = "model.decoder.layers.1.mlp.down_proj.weight"
        t = stored_tensors(path)[name]
        file = t.file
    assert first_bad_tensor(path) is None
    value, size = (b"\x80\xff", 2) if form == "BF16" else (np.float32("-inf").tobytes(), 4)
    with open(file, "r+b") as f:
        f.seek(t.start + (at * size) % t.nbytes)
        f.write(value)
    assert first_bad_tensor(str(path)) == name


def test_the_vision_tower_is_not_counted_by_a_word_in_a_name(monkeypatch, tmp_path):
    weights = {
        "model.encoder.vision_tower.x": np.ones(3, np.float32), "model.encoder.embed_vision.x": np.ones(5, np.float32),
        "model.decoder.supervision.weight": np.ones(7, np.float32),
    }  # fmt: skip
    write_weights(tmp_path, weights)
    assert _of_folder(tmp_path)[1] == 4 * 7


def test_an_interrupted_report_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_report(new_report({"seed": 1}), path)
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    path.chmod(0o640)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_report(new_report({"seed": 2}), path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other", "x.json"]
    assert read_report(path)["setting"] == {"seed": 1}
    write_report(new_report({"seed": 3}), path)
    assert path.stat().st_mode & 0o777 == 0o640 and read_report(path)["setting"] == {"seed": 3}


def test_an_interrupted_reference_leaves_no_base(monkeypatch, tmp_path, models):
    monkeypatch.setattr(quality, "fill", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quality.main([CHECKPOINT, str(models / "q8"), "--canvases", "1", "--base", str(tmp_path / "base")])
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_for_the_base_is_refused(monkeypatch, tmp_path, capsys, models):
    monkeypatch.setattr("benchmarks.quality_base.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
    message = refused(capsys, CHECKPOINT, models / "q8", "--canvases", "1", "--base", tmp_path / "base")
    assert "9 bytes free, expected" in message and "fewer --canvases or --slots" in message


# Reports and pictures


def test_reports_are_drawn_together(run, models, tmp_path, capsys):
    other = tmp_path / "other.json"
    report = read_report(run / "out.json")
    same = {**report["candidates"][0], "model": CHECKPOINT, "denoising": report["reference"]["denoising"]}
    other.write_text(json.dumps({**report, "candidates": [same]}))
    for name in ("a.svg", "b.svg", "c.png"):
        quality.main(["plot", str(run / "out.json"), str(other), "--plot", str(tmp_path / name)])
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert "not shown" in (tmp_path / "a.svg").read_text()
    shown = capsys.readouterr()
    assert "KL 0 or not measured" in shown.err and shown.out.count("Q2_K.gguf") == 6
    report["setting"]["seed"] = 5
    other.write_text(json.dumps(report))
    message = refused(capsys, "plot", run / "out.json", other, "--plot", tmp_path / "a.svg")
    assert "seed is 5, expected 0" in message


def test_the_typical_kl_is_the_instances_geometric_mean(run, capsys, tmp_path):
    report = read_report(run / "out.json")
    a, b = (row["kl_by_instance"] for row in report["candidates"])
    typical = [kl_of(row, TYPICAL)["mean"] for row in report["candidates"]]
    assert compare(a, b)["ratio"]["mean"] == pytest.approx(typical[0] / typical[1])
    kl = [k / n for k, n in a if n]
    assert typical[0] == pytest.approx(np.prod(kl) ** (1 / len(kl)))
    assert kl_of(report["reference"], TYPICAL) is None
    quality.main(["plot", str(run / "out.json"), "--pass", "typical", "--plot", str(tmp_path / "a.svg")])
    assert f"{typical[0]:.2e}" in capsys.readouterr().out
    assert "of the typical instance" in (tmp_path / "a.svg").read_text()


# Data


def test_of_plain_text_whole_canvases_are_taken(tiny_model, tmp_path):
    tokenizer, config = tiny_model[1], tiny_model[0].config
    file = tmp_path / "text.txt"
    file.write_text("the sand and the tin " * 40)
    tokens = tokenizer.encode(file.read_text())
    data = read_data(file, tokenizer, config, None, 0)
    assert len(data.canvases) == min(64, len(tokens) // 16)
    assert np.concatenate([c.clean for c in data.canvases]).tolist() == tokens[: 16 * len(data.canvases)]
    # Passages of four canvases, each an instance with <bos> alone before it.
    assert [(c.instance, c.block) for c in data.canvases[:6]] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    assert data.canvases[5].prefix == [2, *tokens[64:80]] and data.texts[1].first == 1
    assert data.questions == []


def test_plain_text_asks_nothing_and_says_so(models, tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text("def add(a, b):\n    return a + b\n" * 12)
    quality.main([CHECKPOINT, str(models / "q8"), "--data", str(file), "--canvases", "1"])
    assert f"nothing end to end: {file} has no answers; a .jsonl of prompts" in capsys.readouterr().err


def test_a_file_of_answers_is_asked_too(tiny_model, tmp_path):
    tokenizer, config = tiny_model[1], tiny_model[0].config
    file = tmp_path / "x.jsonl"
    lines = [{"prompt": "and", "answer": "the sand"}, {"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
        {"role": "assistant", "content": "tin"}]}]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, lines)))
    data = read_data(file, tokenizer, config, None, 0)
    assert [q.answer for q in data.questions] == ["the sand", "tin"] and len(data.questions[1].messages) == 3
    assert data.canvases[0].prefix == tokenizer.chat([{"role": "user", "content": "and"}])
    # The encoder is not judged on what fills the canvas up.
    assert data.texts[0].tokens == [*data.canvases[0].prefix, *tokenizer.encode("the sand"), 106]


# End to end


class Parrot:
    """Answers what it was told to."""

    def __init__(self, *answers):
        self.told = list(answers)

    def answers(self, **settings):
        self.settings = settings
        return lambda prompts, rows, seed: [self.told[row] for row in rows]


def test_exact_match_takes_white_space_lightly(tiny_model, tmp_path):
    assert normal(" a\n\tb ") == "a b" and normal("e\u0301") == "\u00e9" and normal("A") != normal("a")
    file = tmp_path / "x.jsonl"
    answers = ["the sand", "a\nb", "x" * 300]
    file.write_text("\n".join(json.dumps({"prompt": "p", "answer": answer}) for answer in answers))
    data = read_data(file, tiny_model[1], tiny_model[0].config, None, 0)
    told = [("the  sand\n", 3, 1, 8, 0), ("a b", 48, 1, 4, 1), ("y", 5, 2, 20, 0, True)]
    parrot = Parrot(*(Answer(*x) for x in told))
    row = run_tasks(parrot, ["exact_match"], data, 16, 100, 0, 2)["exact_match"]
    assert (row["n"], row["right"], row["verdicts"]) == (3, 2, "110")
    assert parrot.settings == {"max_new_tokens": 304}  # 301 tokens, in whole canvases
    assert row["steps_per_block"]["mean"] == 56 / 4 and row["tokens_per_forward"]["mean"] == 32 / 56
    assert (row["blocks_at_limit"]["rate"], row["loops"]["rate"]) == (1 / 4, 1 / 3)


def test_answers_are_paired_with_the_references():
    rows = {"x": summary_of([Answer("", 1, 1, 1, None)] * 4, [v == "1" for v in "0110"], 1.0)}
    assert rows["x"]["blocks_at_limit"] is None  # transformers does not tell
    made = paired(rows, {"x": {"verdicts": "1100"}})
    assert (made["x"]["lost"], made["x"]["gained"]) == (1, 1)
    assert "lost" not in paired(rows, {})["x"]


def test_known_parts_are_a_task_too(tmp_path):
    infill = about(str(ROOT / "demo/infill"))
    data = read_data(None, infill.tokenizer, infill.config, 1, 0)
    model = load(infill)
    rows = run_tasks(model, ["infill"], data, 64, 4, 0, 25)
    assert rows["infill"]["n"] == 4 and rows["infill"]["right"] >= 3 and "all" not in rows


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([7] * 32, True),  # one word
        ([7] * 31, False),
        (list(range(8)) * 4, True),  # an 8-gram four times
        (list(range(8)) * 3 + list(range(7)), False),
        ([9, 9, *list(range(3)) * 11, 9], True),  # whatever stands around it
        (list(range(50)) * 4, True),  # a paragraph four times
        (list(range(50)) * 3, False),
        (list(range(200)), False),
        ([], False),
        ([1, 2] * 10, False),  # a short list of equal things
        ([0, 1, 2, 3, 4, 5, 6, 7, 8] * 3 + [0, 1, 2, 3, 4, 5, 6, 7, 9], False),
    ],
)
def test_what_a_loop_is(tokens, found):
    assert loops(tokens) == found == slow_loops(tokens)


def slow_loops(tokens):
    for start in range(len(tokens)):
        for period in range(1, len(tokens) // 4 + 1):
            length = max(32, 4 * period)
            some = tokens[start : start + length]
            if len(some) == length and all(some[i] == some[i - period] for i in range(period, length)):
                return True
    return False


def test_loops_are_found_wherever_they_are():
    rng = np.random.default_rng(0)
    for _ in range(60):
        passage = rng.integers(0, 4, rng.integers(1, 14)).tolist()
        before, after = (rng.integers(0, 4, rng.integers(0, 9)).tolist() for _ in range(2))
        tokens = before + passage * int(rng.integers(1, 8)) + after
        assert loops(tokens) == slow_loops(tokens), tokens
