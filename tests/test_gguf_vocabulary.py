"""The vocabulary in a GGUF: folder → metadata → tokenizer gives the same ids, also by llama.cpp's reading of it."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.config import parse_config, read_config
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.reader import GgufFile, Value, read_gguf
from mlx_dgemma.gguf.vocabulary import tokenizer_files, vocabulary_metadata
from mlx_dgemma.tokenizer import Tokenizer
from tests.tiny import (
    CHAT_TEMPLATE,
    TOKENIZER_CONFIG,
    VOCAB,
    tiny_config,
    tiny_sentencepiece,
    tiny_tokenizer,
    write_json,
)

DEMO = Path(__file__).parent.parent / "demo" / "checkpoint"
CONFIG = parse_config(tiny_config())
G = "tokenizer.ggml."


def write_folder(folder, raw=None, model=None, config=TOKENIZER_CONFIG):
    """The tokenizer files of a checkpoint: `raw` as tokenizer.json or `model` as tokenizer.model."""
    folder.mkdir(exist_ok=True)
    if model is None:
        write_json(folder / "tokenizer.json", raw or tiny_tokenizer())
    else:
        (folder / "tokenizer.model").write_bytes(model)
    write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def gguf_of(folder, vocab_size=VOCAB, **changes):
    """A GGUF's header as a reader sees it. changes: keys behind "tokenizer.ggml." → Value, or None to leave one out."""
    metadata = vocabulary_metadata(folder, vocab_size)
    metadata |= {G + key: value for key, value in changes.items()}
    return GgufFile(Path("model.gguf"), {key: value for key, value in metadata.items() if value}, {})


@pytest.fixture(scope="session", params=["demo", "tiny", "sentencepiece"])
def both(request, tmp_path_factory):
    """(folder, tokenizer of the folder, tokenizer of its GGUF)"""
    if request.param == "demo":
        folder, config = DEMO, read_config(DEMO)
    else:
        model = tiny_sentencepiece() if request.param == "sentencepiece" else None
        folder, config = write_folder(tmp_path_factory.mktemp("vocabulary") / request.param, model=model), CONFIG
    file = gguf_of(folder, config.vocab_size)
    return folder, Tokenizer(folder, config), Tokenizer.from_gguf(file, config)


PIECES = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        ["the", "sand", " and", "▁", "\r\n", "\t", "é", "日本", "😀", "👩‍👩‍👧", "\x00", "<0x41>", "[PAD5]", "<unused7>"]
    ),
    st.sampled_from(["<bos>", "<eos>", "<unk>", "<|turn>", "<turn|>", "<|channel>", "<|tool_call>", '<|"|>', "<|thi"]),
    st.integers(1, 9).map(lambda n: " " * n),
    st.integers(1, 5).map(lambda n: "\n" * n),
)
TEXTS = st.lists(PIECES, max_size=8).map("".join)


def random_texts(n, seed=0):
    """What TEXTS gives, without hypothesis's shrinking: for an oracle that is slow to call one by one."""
    draw = random.Random(seed)
    words = [
        "the",
        "sand",
        " and",
        "▁",
        "\t",
        "é",
        "日本",
        "😀",
        "\x00",
        "<0x41>",
        "[PAD5]",
        "<unused7>",
        "<unk>",
        "<bos>",
    ]
    words += [
        "<|turn>",
        "<turn|>",
        "<|channel>",
        "<|tool_call>",
        "<|tool_response>",
        '<|"|>',
        "<|thi",
        " ",
        "  ",
        "    ",
    ]
    words += ["\n", "\n\n", "\n\n\n\n", "\r\n"]
    letters = [chr(draw.randrange(0x20, 0xD800)) for _ in range(200)] + list("theanirosd")
    return ["".join(draw.choice(draw.choice([words, letters])) for _ in range(draw.randrange(20))) for _ in range(n)]


def test_metadata_of_the_tiny_tokenizer(tmp_path):
    metadata = vocabulary_metadata(write_folder(tmp_path), VOCAB + 1)
    lists = {key: metadata.pop(G + key) for key in ("tokens", "scores", "token_type", "merges")}
    assert metadata == {
        "tokenizer.ggml.model": Value("str", "gemma4"),
        "tokenizer.ggml.bos_token_id": Value("u32", 2),
        "tokenizer.ggml.eos_token_id": Value("u32", 1),
        "tokenizer.ggml.unknown_token_id": Value("u32", 3),
        "tokenizer.ggml.padding_token_id": Value("u32", 0),
        "tokenizer.ggml.mask_token_id": Value("u32", 4),
        "tokenizer.ggml.add_space_prefix": Value("bool", False),
        "tokenizer.ggml.add_bos_token": Value("bool", True),
        "tokenizer.chat_template": Value("str", CHAT_TEMPLATE),
    }
    assert {key: value.type for key, value in lists.items()} == {
        "tokens": "arr[str]",
        "scores": "arr[f32]",
        "token_type": "arr[i32]",
        "merges": "arr[str]",
    }
    assert lists["merges"].value[:3] == ["t h", "th e", "a n"]
    assert set(lists["scores"].value) == {-1000.0}
    rows = list(zip(lists["tokens"].value, lists["token_type"].value, strict=True))
    # 3 control, 4 user-defined (a chat parser must see it), 6 byte, 1 normal, 5 unused
    assert [rows[i] for i in (2, 3, 105)] == [("<bos>", 3), ("<unk>", 3), ("<|turn>", 3)]
    assert [rows[i] for i in (48, 52, 100)] == [("<|tool_call>", 4), ('<|"|>', 4), ("<|channel>", 4)]
    assert [rows[i] for i in (107, 362, 363, 374)] == [("<0x00>", 6), ("<0xFF>", 6), ("▁", 1), ("th", 1)]
    assert rows[384:] == [("[PAD384]", 5)]


def test_metadata_of_a_sentencepiece_model(tmp_path):
    model = tiny_sentencepiece()
    metadata = vocabulary_metadata(write_folder(tmp_path, model=model, config={}), VOCAB + 1)
    assert metadata[G + "model"].value == "llama" and G + "merges" not in metadata
    ids = [metadata[f"{G}{name}_token_id"].value for name in ("bos", "eos", "unknown", "padding", "mask")]
    assert ids == [2, 1, 3, 0, 4]
    lists = [metadata[G + key].value for key in ("tokens", "token_type", "scores")]
    rows = list(zip(*lists, strict=True))
    # 3 control, 2 unknown, 4 user-defined, 6 byte, 1 normal, 5 unused
    assert [rows[i] for i in (2, 3, 105, 107)] == [
        ("<bos>", 3, 0),
        ("<unk>", 2, 0),
        ("<|turn>", 4, 0),
        ("<0x00>", 6, 0),
    ]
    learned = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert rows[363:384] == [(learned.id_to_piece(i), 1, learned.get_score(i)) for i in range(363, 384)]
    assert len({score for _, _, score in rows[363:384]}) == 21
    assert rows[384:] == [("[PAD384]", 5, -1000)]


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_a_gguf_gives_the_ids_of_its_folder(both, text):
    _, folder, gguf = both
    tokens = folder.encode(text)
    assert gguf.encode(text) == tokens
    assert gguf.decode(tokens) == folder.decode(tokens)


def test_a_gguf_decodes_and_renders_as_its_folder(both):
    _, folder, gguf = both
    every = range(folder.vocabulary.size)
    assert gguf.vocabulary.size == folder.vocabulary.size
    assert [gguf.vocabulary.token(i) for i in every] == [folder.vocabulary.token(i) for i in every]
    assert gguf.pieces(list(every)) == folder.pieces(list(every))
    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "the  sand\n\n😀"}]
    for thinking in (False, True):
        assert gguf.chat(talk, thinking=thinking) == folder.chat(talk, thinking=thinking)
    tokens = folder.encode("<|channel>thought\nhm<channel|>and")
    assert gguf.reply(tokens) == folder.reply(tokens) == ("and", "hm")


def test_the_files_of_a_gguf_give_the_same_ids(both, tmp_path):
    source, folder, _ = both
    config = read_config(source) if source == DEMO else CONFIG
    for name, content in tokenizer_files(gguf_of(source, config.vocab_size)).items():
        (tmp_path / name).write_bytes(content)
    again = Tokenizer(tmp_path, config)
    for text in random_texts(100):
        assert again.encode(text) == folder.encode(text), repr(text)
    assert (tmp_path / "chat_template.jinja").read_text() == (source / "chat_template.jinja").read_text()
    # Once more around gives the same metadata.
    assert vocabulary_metadata(tmp_path, config.vocab_size) == vocabulary_metadata(source, config.vocab_size)


def test_tokenizer_json_comes_back_as_it_was(tmp_path):
    files = tokenizer_files(gguf_of(write_folder(tmp_path), VOCAB + 3))
    assert json.loads(files["tokenizer.json"]) == tiny_tokenizer()
    config = json.loads(files["tokenizer_config.json"])
    assert config == TOKENIZER_CONFIG | {"padding_side": "left"}


def test_ids_the_tokenizer_lacks_become_placeholders_and_go_again(tmp_path):
    raw = tiny_tokenizer()
    del raw["added_tokens"][60], raw["model"]["vocab"]["<unused60>"]
    folder = write_folder(tmp_path, raw)
    file = gguf_of(folder)
    assert file.get(G + "tokens")[60] == "[PAD60]" and file.get(G + "token_type")[60] == 5
    gguf = Tokenizer.from_gguf(file, CONFIG)
    assert gguf.vocabulary.token(60) == Tokenizer(folder, CONFIG).vocabulary.token(60) == ""
    assert gguf.encode("[PAD60] the") == Tokenizer(folder, CONFIG).encode("[PAD60] the")


def test_spellings_of_other_transformers_versions(tmp_path):
    raw = tiny_tokenizer()
    raw["model"]["merges"] = [" ".join(merge) for merge in raw["model"]["merges"]]
    raw["pre_tokenizer"] = None
    named = {role: {"content": token, "lstrip": False} for role, token in TOKENIZER_CONFIG.items() if "token" in role}
    older = vocabulary_metadata(write_folder(tmp_path / "older", raw, config=named), VOCAB)
    assert older == vocabulary_metadata(write_folder(tmp_path / "newer"), VOCAB)
    (tmp_path / "older" / "tokenizer_config.json").unlink()
    assert vocabulary_metadata(tmp_path / "older", VOCAB) == older


def test_added_tokens_that_are_not_special_are_user_defined(tmp_path):
    raw = tiny_tokenizer()
    raw["added_tokens"][60]["special"] = False
    file = gguf_of(write_folder(tmp_path, raw))
    assert file.get(G + "token_type")[60] == 4
    assert json.loads(tokenizer_files(file)["tokenizer.json"]) == raw


def test_what_published_files_leave_out_or_add(tmp_path):
    file = gguf_of(
        write_folder(tmp_path), scores=None, unknown_token_id=None, mask_token_id=None, eot_token_id=Value("u32", 106)
    )
    del file.metadata["tokenizer.chat_template"]
    tokenizer = Tokenizer.from_gguf(file, CONFIG)
    assert tokenizer.encode("the<turn|>") == [375, 106]
    assert set(tokenizer_files(file)) == {"tokenizer.json", "tokenizer_config.json"}
    with pytest.raises(DgemmaError, match="model.gguf: found no chat template"):
        tokenizer.chat([{"role": "user", "content": "the"}])


# fmt: off
OTHER_TOKENIZERS = {
    "another normalizer": lambda raw: raw.update(normalizer={"type": "Lowercase"}),
    "another pre-tokenizer": lambda raw: raw.update(pre_tokenizer={"type": "Whitespace"}),
    "another decoder": lambda raw: raw.update(decoder={"type": "Fuse"}),
    "another model options": lambda raw: raw["model"].update(ignore_merges=True),
    "another byte fallback": lambda raw: raw["model"].update(byte_fallback=False),
    "has an empty token": lambda raw: raw["model"]["vocab"].update({"": VOCAB}),
    "gives one id to two tokens": lambda raw: raw["model"]["vocab"].update(extra=380),
    "the added token '<unused9>' the id 10, which another": lambda raw: raw["added_tokens"][9].update(id=10),
    "finds the added token '<unused9>' by rules of its own": lambda raw: raw["added_tokens"][9].update(lstrip=True),
    "merge with a space in it": lambda raw: add_merge(raw, "a b", "a"),
    "merges a newline with other text ('a\\n')": lambda raw: add_merge(raw, "a", "\n"),
    "'\\n\\n\\n' that its merges do not reach": lambda raw: raw["model"]["vocab"].update({"\n\n\n": VOCAB}),
    "has two ids for one token": lambda raw: raw["model"]["vocab"].update({"[PAD386]": VOCAB}),
}
# fmt: on


def add_merge(raw, left, right):
    for token in (left, right, left + right):
        raw["model"]["vocab"].setdefault(token, len(raw["model"]["vocab"]))
    raw["model"]["merges"].append([left, right])


@pytest.mark.parametrize("message", OTHER_TOKENIZERS)
def test_a_tokenizer_json_a_gguf_cannot_express_is_refused(tmp_path, message):
    raw = tiny_tokenizer()
    OTHER_TOKENIZERS[message](raw)
    with pytest.raises(DgemmaError) as error:
        vocabulary_metadata(write_folder(tmp_path, raw), VOCAB + 4)
    assert message in str(error.value) and "which a GGUF vocabulary cannot express" in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "is not BPE"),
        ({"byte_fallback": False}, "has no byte fallback"),
        ({"add_dummy_prefix": True}, "puts a space before every text"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes characters"),
        ({"remove_extra_whitespaces": True}, "drops repeated spaces"),
        ({"treat_whitespace_as_suffix": True}, "puts spaces behind words"),
    ],
)
def test_a_sentencepiece_model_a_gguf_cannot_express_is_refused(tmp_path, options, message):
    size = {"vocab_size": 130} if "byte_fallback" in options else {}
    with pytest.raises(DgemmaError, match=f"this tokenizer {message}, which a GGUF vocabulary cannot express"):
        vocabulary_metadata(write_folder(tmp_path, model=tiny_sentencepiece(**options | size)), VOCAB)


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(DgemmaError, match="found no tokenizer.json and no tokenizer.model"):
        vocabulary_metadata(tmp_path, VOCAB)
    for folder in (write_folder(tmp_path / "json"), write_folder(tmp_path / "model", model=tiny_sentencepiece())):
        with pytest.raises(DgemmaError, match="the files belong to different models"):
            vocabulary_metadata(folder, 300)
        write_json(folder / "tokenizer_config.json", {"eos_token": "</s>"})
        with pytest.raises(DgemmaError, match="the eos token '</s>' is not in the vocabulary"):
            vocabulary_metadata(folder, VOCAB)
    write_json(tmp_path / "json" / "tokenizer.json", {"model": {}})
    with pytest.raises(DgemmaError, match="not a tokenizer"):
        vocabulary_metadata(tmp_path / "json", VOCAB)


TEXT = "arr[str]"
CORRUPT = [
    ({"model": None}, "tokenizer.ggml.model is missing"),
    ({"model": Value("str", "gpt2")}, """the kind 'gpt2', expected "gemma4" or "llama\""""),
    ({"tokens": None}, "tokens is missing"),
    ({"tokens": Value("arr[i32]", [1, 2])}, "tokens is stored as arr[i32], expected arr[str]"),
    ({"tokens": Value(TEXT, [])}, "the vocabulary is empty or has a token twice"),
    ({"tokens": Value(TEXT, ["a"] * VOCAB)}, "the vocabulary is empty or has a token twice"),
    ({"tokens": Value(TEXT, [f"t{i}" for i in range(VOCAB)])}, "lacks the byte token <0x00>"),
    ({"token_type": None}, "token_type is missing"),
    ({"token_type": Value("arr[i32]", [1])}, "token_type has 1 entries for 384 tokens"),
    ({"token_type": Value("arr[i32]", [9] * VOCAB)}, "the token type 9 is not known"),
    ({"scores": Value("arr[f32]", [0.0])}, "scores has 1 entries for 384 tokens"),
    ({"merges": None}, "merges is missing"),
    ({"merges": Value(TEXT, ["th"])}, "the merge 'th' names no token"),
    ({"merges": Value(TEXT, ["t X"])}, "the merge 't X' names no token"),
    ({"merges": Value(TEXT, ["d o"])}, "the merge 'd o' names no token"),  # there is no "do"
    ({"bos_token_id": None}, "bos_token_id is missing"),
    ({"bos_token_id": Value("str", "<bos>")}, "bos_token_id is stored as str, expected u32"),
    ({"eos_token_id": Value("u32", 384)}, "eos_token_id is 384, and there are 384 tokens"),
    ({"eot_token_id": Value("u32", 2**32 - 1)}, "eot_token_id is 4294967295, and there are 384 tokens"),
]


@pytest.mark.parametrize(("changes", "message"), CORRUPT, ids=[message for _, message in CORRUPT])
def test_a_corrupt_vocabulary_is_named(tmp_path, changes, message):
    file = gguf_of(write_folder(tmp_path), **changes)
    for read in (lambda: Tokenizer.from_gguf(file, CONFIG), lambda: tokenizer_files(file)):
        with pytest.raises(DgemmaError) as error:
            read()
        assert message in str(error.value) and str(error.value).startswith("model.gguf: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "scores is missing"),
        ({"scores": Value("arr[f32]", [0.0] * 3)}, "scores has 3 entries for 384 tokens"),
        ({"token_type": Value("arr[i32]", [1] * VOCAB)}, "has 0 unknown tokens, expected 1"),
        ({"add_space_prefix": None}, "add_space_prefix is not false"),
        ({"tokens": Value(TEXT, ["", *map(str, range(VOCAB - 1))])}, "not a SentencePiece model"),
    ],
)
def test_a_corrupt_sentencepiece_vocabulary_is_named(tmp_path, changes, message):
    file = gguf_of(write_folder(tmp_path, model=tiny_sentencepiece()), **changes)
    with pytest.raises(DgemmaError, match=f"model.gguf: .*{message}"):
        Tokenizer.from_gguf(file, CONFIG)


def test_a_vocabulary_larger_than_the_model_or_with_a_broken_template(tmp_path):
    file = gguf_of(write_folder(tmp_path))
    with pytest.raises(DgemmaError, match="has 384 tokens and the model 300"):
        Tokenizer.from_gguf(file, parse_config(tiny_config(vocab_size=300)))
    file.metadata["tokenizer.chat_template"] = Value("str", "{% if %}")
    with pytest.raises(DgemmaError, match="model.gguf: the chat template is not valid"):
        Tokenizer.from_gguf(file, CONFIG)
    file.metadata["tokenizer.chat_template"] = Value("arr[str]", ["a"])
    with pytest.raises(DgemmaError, match=r"chat_template is stored as arr\[str\], expected str"):
        Tokenizer.from_gguf(file, CONFIG)


def with_newline_tokens():
    """As Gemma 4 has them: runs of newlines are tokens that merges reach."""
    raw = tiny_tokenizer()
    add_merge(raw, "\n", "\n")
    add_merge(raw, "\n\n", "\n")
    add_merge(raw, "\n\n", "\n\n")
    return raw


@pytest.mark.parametrize("source", ["demo", "tiny", "sentencepiece", "newlines"])
def test_llama_cpp_reads_the_same_ids(source, tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp's tokenizer comes with xllamacpp")
    from tests.llama_cpp import LlamaCppVocabulary, write_vocabulary

    folder = tmp_path / "folder"
    if source == "demo":
        folder, config = DEMO, read_config(DEMO)
    elif source == "newlines":
        write_folder(folder, with_newline_tokens())
        config = parse_config(tiny_config(vocab_size=VOCAB + 4))
    else:
        write_folder(folder, model=tiny_sentencepiece() if source == "sentencepiece" else None)
        config = CONFIG
    path = write_vocabulary(tmp_path / "vocabulary.gguf", vocabulary_metadata(folder, config.vocab_size + 2))
    theirs = LlamaCppVocabulary(path)
    ours = Tokenizer.from_gguf(read_gguf(path), config)
    for text in random_texts(500):
        want = theirs.encode(text)
        assert ours.encode(text) == want, repr(text)
    assert theirs.size == config.vocab_size + 2
    assert theirs.stop_ids() == [1, 50, 106]
    theirs.close()
