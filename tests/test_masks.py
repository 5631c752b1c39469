"""Masks as pictures."""

import mlx.core as mx

from mlx_dgemma.masks import canvas_mask, encoder_mask


def picture(mask):
    return mask.astype(mx.int32).tolist()


def test_the_encoder_is_causal():
    # fmt: off
    assert picture(encoder_mask(mx.arange(2, 4), mx.arange(4))) == [
        # stored  chunk
        [1, 1,    1, 0],
        [1, 1,    1, 1],
    ]
    # fmt: on


def test_a_sliding_layer_sees_its_window_the_query_included():
    # fmt: off
    assert picture(encoder_mask(mx.arange(3, 6), mx.arange(1, 6), window=3)) == [
        # stored  chunk
        [1, 1,    1, 0, 0],
        [0, 1,    1, 1, 0],
        [0, 0,    1, 1, 1],
    ]
    # fmt: on


def test_padding_is_seen_by_itself_alone():
    mask = encoder_mask(mx.arange(3), mx.arange(3), padding=mx.array([0, 2]))
    # fmt: off
    assert picture(mask[:, 0]) == [
        [[1, 0, 0],
         [1, 1, 0],
         [1, 1, 1]],
        [[1, 0, 0],   # pad
         [0, 1, 0],   # pad
         [0, 0, 1]],
    ]
    # fmt: on


def test_a_canvas_sees_everything_but_padding():
    assert canvas_mask(mx.arange(4)) is None
    # fmt: off
    assert picture(canvas_mask(mx.arange(1, 5), padding=mx.array([0, 2]))[:, 0, 0]) == [
        # stored  canvas
        [1, 1,    1, 1],
        [0, 1,    1, 1],
    ]
    # fmt: on
