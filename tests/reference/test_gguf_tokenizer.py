"""transformers reads the tokenizer files made from a GGUF as it reads the checkpoint's own."""

from pathlib import Path

import pytest

from mlx_dgemma.gguf.reader import GgufFile
from mlx_dgemma.gguf.vocabulary import tokenizer_files, vocabulary_metadata

transformers = pytest.importorskip("transformers")
DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
TEXT = "the  sand 日本\n\n\n<|channel>thought\n<channel|> \t😀 <0x41>é<turn|>"


@pytest.fixture
def tokenizers(tmp_path):
    """(of the demo, of the files its GGUF gives)"""
    # More rows than tokens, so that placeholders are written and left out again.
    file = GgufFile(Path("demo.gguf"), vocabulary_metadata(DEMO, 1030), {})
    for name, content in tokenizer_files(file).items():
        (tmp_path / name).write_bytes(content)
    return [transformers.AutoTokenizer.from_pretrained(folder) for folder in (DEMO, tmp_path)]


def test_ids_and_text(tokenizers):
    demo, gguf = tokenizers
    ids = demo(TEXT)["input_ids"]
    assert gguf(TEXT)["input_ids"] == ids and len(ids) > 20
    for skip in (False, True):
        assert gguf.decode(ids, skip_special_tokens=skip) == demo.decode(ids, skip_special_tokens=skip)
    assert len(gguf) == len(demo)
    assert gguf.special_tokens_map == demo.special_tokens_map


def test_the_chat_template_and_padding(tokenizers):
    talk = [{"role": "user", "content": "the sand"}]
    demo, gguf = (t.apply_chat_template(talk, add_generation_prompt=True)["input_ids"] for t in tokenizers)
    assert gguf == demo and gguf[:2] == [2, 105]
    demo, gguf = (t(["the", "the sand and"], padding=True)["input_ids"] for t in tokenizers)
    assert gguf == demo and gguf[0][0] == 0
