"""Makes the golden files: what transformers computes on the seeded tiny checkpoint, and writes on the demo's.

    python -m tests.golden.make        needs the extra `reference`

Each file holds its inputs and the reference's outputs; recipe.json beside them says how they were made and what
tolerance they carry. tests/test_model.py and tests/test_demo.py read them, so that `make test` needs no torch.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

from tests.tiny import make_tiny_checkpoint

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CASES = {"short": 5, "window": 16, "long": 40}  # prompt tokens; the sliding window is 16
VOCAB, CANVAS = 384, 16
TEMPERATURE = 0.7


def inputs(name: str) -> dict[str, np.ndarray]:
    """A prompt and two canvases."""
    rng = np.random.RandomState(list(CASES).index(name))
    prompt = rng.randint(0, VOCAB, (1, CASES[name]))
    return {"prompt": prompt, "canvas": rng.randint(0, VOCAB, (1, CANVAS)), "next": rng.randint(0, VOCAB, (1, CANVAS))}


def reference_logits(model, case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """First step, self-conditioned step, and the first step of the block after `canvas` was committed."""
    import torch

    prompt, canvas, following = (torch.tensor(case[key]) for key in ("prompt", "canvas", "next"))
    with torch.no_grad():
        first = model(input_ids=prompt, decoder_input_ids=canvas)
        cache = first.past_key_values
        conditioned = model(
            past_key_values=cache, decoder_input_ids=canvas, self_conditioning_logits=first.logits / TEMPERATURE
        )
        second = model(input_ids=canvas, past_key_values=cache, decoder_input_ids=following)
    return {
        "hidden": first.encoder_last_hidden_state.numpy(),
        "first": first.logits.numpy(),
        "conditioned": conditioned.logits.numpy(),
        "second": second.logits.numpy(),
    }


def demo_texts(cases=16) -> list[dict]:
    """What transformers' generate answers to held-out prompts of the demo, on our noise stream."""
    from demo.evaluate import transformers_engine
    from demo.tasks import TASKS, held_out

    engine = transformers_engine(ROOT / "demo/checkpoint")
    texts = []
    for seed in range(cases):
        task = TASKS[seed % len(TASKS)]
        prompt = held_out(task, cases)[seed].prompt
        (answer,) = engine([prompt], [0], seed)
        texts.append({"task": task, "seed": seed, "prompt": prompt, "text": answer.text})
    return texts


def main():
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        make_tiny_checkpoint(folder)
        model = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype=torch.float32).eval()
        for name in CASES:
            case = inputs(name)
            np.savez_compressed(HERE / f"logits_{name}.npz", **case, **reference_logits(model, case))
    made_with = {
        "made_by": "python -m tests.golden.make",
        "reference": f"transformers {transformers.__version__}, torch {torch.__version__}, cpu, float32",
    }
    texts = {**made_with, "checkpoint": "demo/checkpoint", "noise": "row 0 of each seed", "texts": demo_texts()}
    (HERE / "demo_texts.json").write_text(json.dumps(texts, indent=1, ensure_ascii=False) + "\n")
    recipe = {
        **made_with,
        "checkpoint": "tests/tiny.py, make_tiny_checkpoint(seed=0)",
        "temperature": TEMPERATURE,
        "atol": 2e-5,
        "why": "largest difference measured on MLX's CPU backend: 3e-6; the project promises 1e-4",
    }
    (HERE / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")


if __name__ == "__main__":
    main()
