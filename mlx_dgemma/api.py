"""The Python API: stream, generate, infill, edit and decide. `load` is in loading.py."""

from collections.abc import Iterator

from . import editing, infilling, structure
from .clamp import Clamp
from .config import GenerationConfig
from .decisions import Decision
from .engine import MlxEngine
from .errors import DgemmaError
from .events import BlockDone, Done, StepDone
from .language import Language
from .layout import Hole
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
    clamp: Clamp | None = None,
    language: Language | None = None,
) -> Iterator[StepDone | BlockDone | Done]:
    """Denoise an answer and yield events: StepDone after every step, BlockDone after every block, Done at the end.

    prompt: a text, a conversation (list of {"role", "content"}), or a list of either, denoised as one batch.
    config: the checkpoint's generation_config.json by default; `model.generation_config.replace(…)` changes a value.
    rows: noise row ids, one per prompt. A row's text depends on its id and the seed, not on its neighbours.
    clamp: what is known of the answers. language: what every answer is a text of
    (`structure.compile`).
    """
    config = config or model.generation_config
    session = make_session(model, tokenizer)
    yield from session.stream(conversations(prompt), config, seed, thinking, rows, clamp, language)


def generate(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: str | list,
    *,
    seed: int = 0,
    max_tokens: int | None = None,
    thinking: bool = False,
    regex: str | None = None,
    json_schema: str | dict | None = None,
    template: str | None = None,
    **settings,
) -> str | list[str]:
    """The answer's text, or a list of texts for a batch of prompts. `settings` are fields of GenerationConfig.

    regex, json_schema (a dict, its text or a path) or template (fixed text with slots): what every answer looks like.
    """
    config = model.generation_config.replace(max_new_tokens=max_tokens, **settings)
    forms = {structure.json_schema: json_schema, structure.template: template, str: regex}
    given = [read(form) for read, form in forms.items() if form is not None]
    if len(given) > 1:
        raise DgemmaError("found several of regex, json_schema and template, expected one")
    language = structure.compile(given[0], tokenizer, config) if given else None
    *_, done = stream(model, tokenizer, prompt, config, seed=seed, thinking=thinking, language=language)
    return done.texts if is_batch(prompt) else done.text


def infill(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    *,
    length: int | None = None,
    lengths: tuple[int, ...] = infilling.LENGTHS,
    prompt: str | None = None,
    seed: int = 0,
    **settings,
) -> str:
    """What belongs between `prefix` and `suffix`. For several holes see `infilling.fill`.

    length: tokens of the hole; several `lengths` are tried where it is None. prompt: the user's turn before the text.
    Raises DgemmaError where the hole is longer than the canvas.
    """
    config, parts = model.generation_config.replace(**settings), [prefix, Hole(length), suffix]
    session = make_session(model, tokenizer)
    *_, filled = infilling.fill(session, parts, config, prompt=prompt, seed=seed, lengths=lengths)
    return filled.holes[0]


def edit(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    text: str,
    instruction: str,
    *,
    lines: list[tuple[int, int]] | None = None,
    noise: float = editing.NOISE,
    seed: int = 0,
    **settings,
) -> str:
    """`text` with some lines rewritten as `instruction` says; see `editing.edit`."""
    config, session = model.generation_config.replace(**settings), make_session(model, tokenizer)
    *_, edited = editing.edit(session, text, instruction, config, lines=lines, seed=seed, noise=noise)
    return edited.text


def decide(
    model: DiffusionGemma, tokenizer: Tokenizer, prompt: str | list[dict], template: str, *, seed: int = 0
) -> tuple[str, list[Decision]]:
    """A template whose slots are choices, one forward pass for each: the text, and how likely every choice is."""
    session = make_session(model, tokenizer)
    return session.decide(*conversations(prompt), template, model.generation_config, seed)


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
