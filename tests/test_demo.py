"""The demo: what the checkpoint is, that its tasks are judged exactly and its held-out instances never trained on."""

import itertools
import json
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_dgemma
from convert import convert
from demo.evaluate import evaluate, mlx_engine, wilson
from demo.tasks import TASKS, check, held_out, instances, is_held_out
from demo.tokenizer import CHAT_TEMPLATE, SPECIALS, render
from mlx_dgemma.config import read_config
from mlx_dgemma.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "demo/checkpoint"
GOLDEN = json.loads((Path(__file__).parent / "golden/demo_texts.json").read_text())


@pytest.fixture(scope="module")
def demo():
    return mlx_dgemma.load(CHECKPOINT, mx.float32)


def test_the_checkpoint_has_the_real_structure_in_ten_megabytes():
    assert sum(file.stat().st_size for file in CHECKPOINT.glob("*.safetensors")) <= 10_000_000
    config = read_config(CHECKPOINT)
    assert [layer.has_v_proj for layer in config.layers] == [True] * 5 + [False]
    assert (config.num_experts, config.top_k_experts, config.hidden_size, config.canvas_length) == (8, 2, 256, 64)
    # Rows that K-quants cannot take whole, and MLX's groups of 64 can.
    for width in (config.intermediate_size, config.moe_intermediate_size):
        assert width % 256 != 0 and width % 64 == 0


def test_encoder_and_decoder_scalars_differ(demo):
    inner = demo[0].model
    for ours, theirs in zip(inner.decoder.layers, inner.encoder.language_model.layers, strict=True):
        assert ours.layer_scalar.item() != theirs.layer_scalar.item()


@pytest.mark.parametrize("task", TASKS)
def test_held_out_instances_are_never_trained_on(task):
    tests = held_out(task, 300)
    assert len({i.prompt for i in tests}) == 300 and all(is_held_out(i) for i in tests)
    train = list(itertools.islice(instances(task, 0, held_out=False), 3000))
    assert not {i.content for i in train} & {i.content for i in tests}


@pytest.mark.parametrize("task", TASKS)
def test_a_right_answer_passes_and_a_wrong_one_fails(task):
    chosen = held_out(task, 6)
    for instance, other in itertools.pairwise(chosen):
        assert check(instance, instance.answer), instance
        assert not check(instance, other.answer), (instance, other)
        assert not check(instance, instance.answer[:-3]) and not check(instance, "")


@pytest.mark.parametrize(
    "body",
    [
        "    while True: pass",
        "    return [x for x in [0] * 10 ** 9]",
        "    return 9 ** 9 ** 9 ** 9",
        "    import os\n    return os.getcwd()",
        "    return ().__class__.__bases__",
        "    return open('x')",
        "    return (" + "(" * 500 + ")" * 500,
    ],
)
def test_a_bad_answer_can_only_fail(body):
    assert not check(held_out("python_complete", 1)[0], body)


def test_the_tokenizer_has_gemmas_ids_and_keeps_every_text():
    tokenizer = Tokenizer(CHECKPOINT, read_config(CHECKPOINT))
    for token_id, token in SPECIALS.items():
        assert tokenizer.vocabulary.token_id(token) == token_id
    for task in TASKS:
        for instance in held_out(task, 50):
            for text in (instance.prompt, instance.answer):
                assert tokenizer.decode(tokenizer.encode(text)) == text
            messages = [{"role": "user", "content": instance.prompt}]
            # What training rendered is what the template renders.
            assert tokenizer.chat(messages) == tokenizer.encode(render(instance.prompt))
    assert (CHECKPOINT / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    for text in ("naïve ☃ 日本\t\r\n", "  a  b "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("case", GOLDEN["texts"], ids=lambda case: f"{case['task']} seed {case['seed']}")
def test_texts_are_the_references(demo, case):
    """What transformers generated from the same noise; rebuilt by python -m tests.golden.make."""
    assert mlx_dgemma.generate(*demo, case["prompt"], seed=case["seed"]) == case["text"]


def test_the_bundled_prompt_is_the_first_held_out_repair():
    """A rule instead of a choice: an example picked for its answer would mislead."""
    assert (ROOT / "demo/prompt.txt").read_text() == held_out("python_fix", 1)[0].prompt + "\n"


def test_a_converted_demo_solves_its_tasks(tmp_path):
    """4 bits, the command a user runs; the full rates are in docs/numerics.md."""
    convert(CHECKPOINT, tmp_path / "q4", recipe="q4")
    result = evaluate(mlx_engine(tmp_path / "q4"), "json", n=8, batch=8)
    assert result["right"] >= 6
    assert 1 < result["steps_per_block"] < 30 and result["tpf"] > 1


def test_wilson_interval_by_hand():
    assert wilson(300, 300) == pytest.approx((0.98736, 1.0), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)
