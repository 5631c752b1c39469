"""Which value of each option a model and a device ask for, where nobody chose.

Source   docs/formats.md, "options" of a graph description
"""

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.model import GgufModel


def chosen_options(description: dict, model: GgufModel, on_cpu: bool, **given: str | None) -> dict[str, str]:
    """A value for every option: what was given, for the rest what suits. Raises DgemmaError for an unknown value."""
    dims, stored = description["dims"], model.file.tensors["token_embd.weight"].type.name
    floats = "f32" if stored == "F32" else "f16"
    # The table of exact self-conditioning has V rows; the rows that top-k gathers in a step are X for each slot.
    small = dims["V"] <= dims["X"] * dims["C"]
    options = {
        "attention": "flash",
        "self_conditioning": "exact" if small else "top-k",
        "form": "cpu" if on_cpu else "gpu",
        "cache_type": floats,
        "table_type": floats,
    } | {name: value for name, value in given.items() if value is not None}
    for name, value in options.items():
        if value not in (allowed := description["options"][name]):
            raise DgemmaError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")
    return options
