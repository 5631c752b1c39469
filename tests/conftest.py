"""Fixtures: the seeded tiny checkpoint, written once per test process."""

import mlx.core as mx
import pytest

from tests.tiny import make_tiny_checkpoint

# Golden numbers and exact comparisons are float32 on the CPU, also where a GPU is the default.
mx.set_default_device(mx.cpu)


@pytest.fixture(autouse=True)
def one_ggml_thread(monkeypatch):
    """ggml's threads wait for each other by spinning: two test processes with two each would only spin."""
    monkeypatch.setattr("gguf_export.runner.cores", lambda: 1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A float32 checkpoint folder in the Hugging Face layout."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="session")
def tiny_model(tiny):
    """(model, tokenizer) of that folder."""
    import mlx_dgemma

    return mlx_dgemma.load(tiny)
