"""Text, special tokens, the chat template, thoughts; both tokenizer libraries."""

import shutil

import pytest

from mlx_dgemma.config import read_config
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.tokenizer import Tokenizer
from tests.tiny import tiny_sentencepiece, write_json

USER = [{"role": "user", "content": "the sand"}]


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return Tokenizer(tiny, read_config(tiny))


@pytest.mark.parametrize("text", ["the sand and the", "naïve ☃ 日本\n\ttab", " leading and  double ", "x" * 50, ""])
def test_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_one_id_and_leave_no_text(tokenizer):
    assert tokenizer.encode("<|turn>the<turn|>") == [105, tokenizer.encode("the")[0], 106]
    assert tokenizer.decode([2, *tokenizer.encode("the"), 106, 1, 0]) == "the"
    assert tokenizer.pieces([105, *tokenizer.encode("the")]) == ["", "the"]


def test_half_a_character_shows_as_one_replacement(tokenizer):
    snowman = tokenizer.encode("☃")
    assert len(snowman) == 3 and tokenizer.decode(snowman[:2]).strip("\ufffd") == ""


def test_the_prompt_form(tokenizer):
    def rendered(*messages, **options):
        return tokenizer.vocabulary.decode(tokenizer.chat(list(messages), **options))

    system = {"role": "system", "content": "S"}
    user, reply = USER[0], {"role": "assistant", "content": "<|channel>thought\nhm<channel|>and"}
    empty_thought = "<|channel>thought\n<channel|>"
    start = "<bos><|turn>user\nthe sand<turn|>\n"
    assert rendered(user) == start + "<|turn>model\n" + empty_thought
    assert rendered(user, reply_next=False) == start
    assert rendered(user, thinking=True).endswith("<|turn>model\n")
    assert rendered(system, user).startswith("<bos><|turn>system\nS<turn|>\n<|turn>user\n")
    assert rendered(user, thinking=True).startswith("<bos><|turn>system\n<|think|>\n<turn|>\n")
    # Old thoughts are stripped from history.
    assert rendered(user, reply, user).startswith(start + "<|turn>model\nand<turn|>\n<|turn>user\n")


def test_a_thought_is_split_from_the_answer(tokenizer):
    tokens = tokenizer.encode("<|channel>thought\nhm hm<channel|>the sand")
    assert tokenizer.reply(tokens) == ("the sand", "hm hm")
    assert tokenizer.reply(tokens[:4]).text == ""  # the thought has not ended
    assert tokenizer.reply(tokenizer.encode("the sand")) == ("the sand", "")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": " \n"}], "the prompt is empty"),
        ([{"role": "user", "content": "see <|image|>"}], "image input is not supported yet"),
        ([{"role": "user", "content": [{"type": "image"}]}], "image input is not supported yet"),
        ([{"role": "user", "content": "<|nonsense|>"}], "holds '<|nonsense|>', which is not a special token"),
    ],
)
def test_prompts_that_are_refused(tokenizer, messages, message):
    with pytest.raises(DgemmaError, match=message.replace("|", r"\|")):
        tokenizer.chat(messages)


def test_templates_that_do_not_work(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    config, template = read_config(folder), folder / "chat_template.jinja"
    template.write_text("{% if %}")
    with pytest.raises(DgemmaError, match="chat template is not valid"):
        Tokenizer(folder, config)
    template.write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DgemmaError, match=r"refused the conversation \(roles must alternate\)"):
        Tokenizer(folder, config).chat(USER)
    template.write_text("{{ messages + 1 }}")
    with pytest.raises(DgemmaError, match="refused the conversation .can only concatenate"):
        Tokenizer(folder, config).chat(USER)
    template.write_bytes(b"\xff")
    with pytest.raises(DgemmaError, match="not UTF-8 text"):
        Tokenizer(folder, config)
    template.unlink()
    with pytest.raises(DgemmaError, match="found no chat_template.jinja"):
        Tokenizer(folder, config).chat(USER)


def test_sentencepiece_speaks_the_same_language(tiny, tmp_path):
    folder = tmp_path / "sp"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(tiny_sentencepiece())
    (folder / "chat_template.jinja").write_text((tiny / "chat_template.jinja").read_text())
    tokenizer = Tokenizer(folder, read_config(tiny))
    for text in ("the sand and the", "naïve ☃ 日本\n\ttab", " leading and  double "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    prompt = tokenizer.chat(USER)
    assert prompt[:2] == [2, 105] and prompt[-1] == 101
    assert tokenizer.encode("<unk>") == [3]
    (folder / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(DgemmaError, match="not a SentencePiece model"):
        Tokenizer(folder, read_config(tiny))


def test_a_template_may_stand_in_tokenizer_config(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    config = read_config(folder)
    want = Tokenizer(folder, config).chat(USER)
    source = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    write_json(folder / "tokenizer_config.json", {"chat_template": source})
    assert Tokenizer(folder, config).chat(USER) == want
    write_json(folder / "tokenizer_config.json", {"chat_template": [{"name": "default", "template": source}]})
    with pytest.raises(DgemmaError, match="chat_template is a list, expected one template"):
        Tokenizer(folder, config)
