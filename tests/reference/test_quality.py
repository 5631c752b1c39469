"""The judge's transformers engine: the same distributions, experts and perplexity as MLX, on the tiny checkpoint."""

import numpy as np
import pytest
import torch
from transformers import DiffusionGemmaForBlockDiffusion

from benchmarks import quality
from benchmarks.quality_engines import load
from benchmarks.quality_models import about
from benchmarks.quality_report import read_report


@pytest.mark.parametrize("order", [("transformers", "mlx"), ("mlx", "transformers")])
def test_both_engines_say_the_same(tiny, tmp_path, order, capsys):
    models = [f"{engine}:{tiny}" for engine in order]
    quality.main([*models, "--canvases", "4", "--slots", "16", "--no-tasks", "--json", str(tmp_path / "x.json")])
    report = read_report(tmp_path / "x.json")
    (row,) = report["candidates"]
    for rows in row["denoising"].values():
        found = rows["mean"]["all"]
        assert found["kl"]["mean"] < 1e-10 and found["same_argmax"]["mean"] == 1
        assert found["same_experts"]["mean"] == 1 and abs(found["difference"]["mean"]) < 1e-5
    assert row["encoder"]["perplexity"] == pytest.approx(report["reference"]["encoder"]["perplexity"], rel=1e-5)


def test_next_token_losses_are_torchs_cross_entropy(tiny):
    tokens = np.random.default_rng(0).integers(0, 384, 50).tolist()
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(tiny, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = model.model.encoder(input_ids=torch.tensor([tokens])).last_hidden_state[0]
        logits = 30 * torch.tanh(model.lm_head(hidden) / 30)
    want = torch.nn.functional.cross_entropy(logits[7:-1], torch.tensor(tokens[8:]), reduction="none").numpy()
    for engine in ("transformers", "mlx"):
        assert load(about(f"{engine}:{tiny}")).next_token_losses(tokens, 8) == pytest.approx(want, abs=1e-4), engine


def test_answers_are_those_of_mlx(capsys):
    opened = [load(about(f"{engine}:demo/checkpoint")).answers() for engine in ("transformers", "mlx")]
    prompts = ["As JSON:\nTom, 7, lives in Oslo and works as a pilot.", [{"role": "user", "content": "As JSON:\nA"}]]
    theirs, ours = (engine(prompts, [0, 1], 3) for engine in opened)
    assert [a[:4] for a in theirs] == [a[:4] for a in ours]
    assert theirs[0].at_limit is None and ours[0].at_limit == 0 and not ours[0].loops
