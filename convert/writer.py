"""A safetensors file: its header, and where the data of each array goes.

Source   the safetensors format; MLX reads the metadata {"format": "mlx"}
"""

import json

from gguf_export.writer import Layout

from .plan import Array

MLX = {"format": "mlx"}


def safetensors_layout(arrays: list[Array], about: dict[str, str] = MLX) -> Layout:
    """about: the header's metadata."""
    header, end = {"__metadata__": about}, 0
    for array in arrays:
        begin, end = end, end + array.nbytes
        header[array.name] = {"dtype": array.dtype, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    data = 8 + len(text)
    offsets = {a.name: data + header[a.name]["data_offsets"][0] for a in arrays}
    return Layout(len(text).to_bytes(8, "little") + text, offsets, data + end)
