"""Which keys a query sees, as boolean arrays over token indices.

Shapes   B rows, T query tokens, K keys
Source   transformers 5.23.0: create_causal_mask, create_sliding_window_causal_mask and
         DiffusionGemmaDecoderModel.create_diffusion_decoder_attention_mask
Differs  google-deepmind/gemma lets a canvas see `window` prefix keys, transformers and we `window` - 1. The cache of
         a sliding layer keeps just those, so the canvas needs no window here.

An index counts the tokens of a row from its first stored one, padding included. Padding is on the left.
"""


def encoder_mask(queries, keys, window=None, padding=None):
    """Causal, and in sliding layers no further back than `window` tokens, the query included.

    queries (T,) and keys (K,) are indices; padding (B,) counts each row's pad tokens.
    Returns (T, K), or (B, 1, T, K) with padding. A pad query sees itself, so that no row of scores is empty.
    """
    q, k = queries[:, None], keys[None, :]
    seen = k <= q
    if window is not None:
        seen = seen & (k > q - window)
    if padding is None:
        return seen
    return (seen & (k >= padding[:, None, None, None])) | (k == q)


def canvas_mask(keys, padding=None):
    """A canvas slot sees every stored key and the whole canvas, padding excepted.

    Returns (B, 1, 1, K), or None where everything is seen.
    """
    return None if padding is None else keys >= padding[:, None, None, None]
