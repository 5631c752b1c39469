"""Check a description: against itself, against a GGUF, and against a device.

Source   docs/formats.md, "Graph description"
"""

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.model import GgufModel

from .graph import fingerprint


def check_belongs(description: dict, model: GgufModel) -> None:
    """Raises DgemmaError where description and file are of different models."""
    told, found = description["model"]["fingerprint"], fingerprint(model.file)
    if told != found:
        raise DgemmaError(
            f"{model.file.path}: its fingerprint is {found[:23]}…, the description's {told[:23]}…: they are of "
            "different models; describe this file with `python -m gguf_export describe`"
        )
