"""The Python API: stream and generate. `load` is in loading.py."""

from collections.abc import Iterator

from .config import GenerationConfig
from .engine import MlxEngine
from .errors import DgemmaError
from .events import BlockDone, Done, StepDone
from .model import DiffusionGemma
from .session import Session
from .tokenizer import Tokenizer


def make_session(model: DiffusionGemma, tokenizer: Tokenizer, keep_prefix: bool = False) -> Session:
    """A session on MLX, or on what a model of another engine makes (gguf_export.Runner).

    keep_prefix is for a chat: what stays the same from turn to turn is encoded once.
    """
    make_engine = getattr(model, "make_engine", lambda: MlxEngine(model))
    return Session(make_engine, model.config, tokenizer, keep_prefix)


def stream(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: str | list,
    config: GenerationConfig | None = None,
    *,
    seed: int = 0,
    thinking: bool = False,
    rows: list[int] | None = None,
) -> Iterator[StepDone | BlockDone | Done]:
    """Denoise an answer and yield events: StepDone after every step, BlockDone after every block, Done at the end.

    prompt: a text, a conversation (list of {"role", "content"}), or a list of either, denoised as one batch.
    config: the checkpoint's generation_config.json by default; `model.generation_config.replace(…)` changes a value.
    rows: noise row ids, one per prompt. A row's text depends on its id and the seed, not on its neighbours.
    """
    config = config or model.generation_config
    yield from make_session(model, tokenizer).stream(conversations(prompt), config, seed, thinking, rows)


def generate(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: str | list,
    *,
    seed: int = 0,
    max_tokens: int | None = None,
    thinking: bool = False,
    **settings,
) -> str | list[str]:
    """The answer's text, or a list of texts for a batch of prompts. `settings` are fields of GenerationConfig."""
    config = model.generation_config.replace(max_new_tokens=max_tokens, **settings)
    *_, done = stream(model, tokenizer, prompt, config, seed=seed, thinking=thinking)
    return done.texts if is_batch(prompt) else done.text


def is_batch(prompt) -> bool:
    """A list of texts or of conversations, rather than one of either."""
    return isinstance(prompt, list) and not (prompt and isinstance(prompt[0], dict))


def conversations(prompt) -> list[list[dict]]:
    """Any accepted form of prompt → a list of conversations. Raises DgemmaError for anything else."""

    def conversation(p):
        if isinstance(p, str):
            return [{"role": "user", "content": p}]
        if isinstance(p, list) and p and all(isinstance(turn, dict) and "role" in turn for turn in p):
            return p
        raise DgemmaError(f"found {type(p).__name__} as a prompt, expected a text or a list of messages")

    return [conversation(p) for p in (prompt if is_batch(prompt) else [prompt])]
