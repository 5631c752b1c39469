"""Fixtures: the seeded tiny checkpoint, written once per test process."""

import pytest

from tests.tiny import make_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A float32 checkpoint folder in the Hugging Face layout."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="session")
def tiny_model(tiny):
    """(model, tokenizer) of that folder."""
    import mlx_dgemma

    return mlx_dgemma.load(tiny)
