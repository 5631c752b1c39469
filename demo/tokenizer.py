"""Builds the demo's tokenizer: Gemma 4's scheme and special ids, 1,024 entries.

Shapes   ids 0..106 special or <unusedN>, 107..362 the bytes, then characters and merges
Source   the released checkpoint: special ids, prompt form, tokenizer.json (space -> "▁", byte fallback)
Differs  merges never span a digit, a newline or a "▁" before a capital, so numbers and names are copied piece by piece
"""

import itertools
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from demo.tasks import TASKS, instances

VOCAB_SIZE = 1024
SPECIALS = {
    0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 48: "<|tool_call>", 49: "<tool_call|>",
    50: "<|tool_response>", 51: "<tool_response|>", 52: '<|"|>', 98: "<|think|>", 100: "<|channel>",
    101: "<channel|>", 105: "<|turn>", 106: "<turn|>",
}  # fmt: skip
FIRST_BYTE = 107
FIRST_PIECE = FIRST_BYTE + 256
EOS, PAD, BOS, TURN_END = 1, 0, 2, 106

# Only the trainer sees these cuts; encoding needs none because no merge crosses one.
CUTS = Regex(r"\d|\n|[A-Z]{2,}|▁(?=[A-Z])|[A-Z]?[a-z]+|▁[a-z]+|▁{2,}(?=▁)|▁?[^\sA-Za-z0-9▁.]+|.")

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set thinking = enable_thinking is defined and enable_thinking -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] in ['system', 'developer'] -%}
    {%- set system = messages[0]['content'] | trim -%}
    {%- set turns = messages[1:] -%}
{%- endif -%}
{%- if thinking or system is defined -%}
    {{- '<|turn>system\\n' -}}
    {%- if thinking -%}{{- '<|think|>\\n' -}}{%- endif -%}
    {%- if system is defined -%}{{- system -}}{%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endif -%}
{%- for message in turns -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{- '<|turn>' + role + '\\n' -}}
    {%- if role == 'model' -%}
        {#- Thoughts of earlier turns are dropped: keep what follows each closing channel mark. -#}
        {%- for part in message['content'].split('<channel|>') -%}
            {{- part.split('<|channel>')[0] -}}
        {%- endfor -%}
    {%- else -%}
        {{- message['content'] | trim -}}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
    {%- if not thinking -%}{{- '<|channel>thought\\n<channel|>' -}}{%- endif -%}
{%- endif -%}
"""


def render(prompt):
    """What CHAT_TEMPLATE makes of one user turn with thinking off; a test compares the two."""
    return f"<bos><|turn>user\n{prompt.strip()}<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"


def _corpus(per_task=8000, seed=0):
    for task in TASKS:
        for instance in itertools.islice(instances(task, seed, held_out=False), per_task):
            yield f"user\n{instance.prompt}\nmodel\nthought\n{instance.answer}".replace(" ", "▁")


def _learn_merges(n_pieces):
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Split(CUTS, "isolated")
    printable = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
    trainer = trainers.BpeTrainer(vocab_size=n_pieces, initial_alphabet=printable, show_progress=False)
    learner.train_from_iterator(_corpus(), trainer)
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    return pieces, [tuple(merge) for merge in learned["merges"]]


def build():
    """The tokenizers.Tokenizer; the same on every machine."""
    pieces, merges = _learn_merges(VOCAB_SIZE - FIRST_PIECE)
    names = [SPECIALS.get(i, f"<unused{i}>") for i in range(FIRST_BYTE)]
    names += [f"<0x{byte:02X}>" for byte in range(256)] + pieces
    vocab = {name: i for i, name in enumerate(names)}
    model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS.values()])
    return tokenizer


def write(folder):
    """tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    build().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>", "mask_token": "<mask>",
        "clean_up_tokenization_spaces": False, "model_max_length": 2048, "padding_side": "left",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
