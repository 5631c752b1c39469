"""The one tensor of a GGUF that no checkpoint holds: what ggml divides the RoPE frequencies of full layers by.

Shapes   (global_head_dim / 2,) float32: 1 for a pair that rotates, 1e30 for one that does not (frequency 0)
Source   llama.cpp's conversion of Gemma 4; "proportional" RoPE of transformers 5.23.0
"""

import numpy as np

from ..config import ModelConfig

NAME = "rope_freqs.weight"
STILL = 1e30


def frequency_factors(config: ModelConfig) -> np.ndarray:
    pairs = config.global_head_dim // 2
    rotated = next(layer.rotated_pairs for layer in config.layers if not layer.is_sliding)
    return np.where(np.arange(pairs) < rotated, 1.0, STILL).astype(np.float32)
