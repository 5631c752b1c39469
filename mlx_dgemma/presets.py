"""Named settings: how much work a text may cost. `exact` is the reference sampler; what the others change was measured.

Source   docs/numerics.md, "Presets", has the evidence for each
"""

import dataclasses

from .config import GenerationConfig
from .errors import DgemmaError

# Fields of GenerationConfig; what is not here stays the checkpoint's.
EXACT = {
    "stop": "stable", "drop_tail": False, "schedule_steps": None, "first_canvas": None, "conditioning_k": None,
}  # fmt: skip
PRESETS = {
    "exact": EXACT,
    "balanced": EXACT | {"stop": "confident"},
    "fast": EXACT | {"stop": "confident", "confidence_threshold": 0.02},
}


def with_preset(config: GenerationConfig, name: str | None) -> GenerationConfig:
    """`config` as the preset has it; None leaves it. Raises DgemmaError for an unknown name."""
    if name is not None and name not in PRESETS:
        raise DgemmaError(f"preset is {name!r}, expected one of {', '.join(PRESETS)}")
    return dataclasses.replace(config, **PRESETS.get(name, {}))
