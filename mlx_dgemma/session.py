"""From conversations to text: template, prefill, block loop, and the prefix kept for the next turn.

Shapes   B conversations, T tokens of the longest prompt
Differs  transformers re-encodes a whole conversation each turn; here the part that the template renders the same
         again stays encoded

Knows no engine, like denoise.py.
"""

import time
from collections.abc import Callable, Iterator

import numpy as np

from .clamp import Clamp
from .config import GenerationConfig, ModelConfig
from .constrained import ConstrainedEngine
from .decisions import Decision, decide_template
from .denoise import Engine, canvas_lengths, denoise_blocks
from .errors import ContextError, DgemmaError
from .events import BlockDone, Done, Stats, StepDone
from .language import Language
from .noise import NoiseStream
from .tokenizer import Tokenizer


class Session:
    """One loaded model, many generations.

    make_engine: returns an engine with an empty prefix. The engine also has `prefill`, `copy()` (the same prefix
    again), `spread(rows)` (its one prefix in as many rows), `cache_bytes` and `peak_memory()`. keep_prefix: hold on to
    a conversation's prefix for its next turn.
    """

    def __init__(self, make_engine: Callable[[], Engine], config: ModelConfig, tokenizer: Tokenizer, keep_prefix=False):
        self.make_engine, self._config, self.tokenizer = make_engine, config, tokenizer
        self._keep_prefix = keep_prefix
        self._kept: tuple[list[int], Engine] | None = None  # tokens of a prefix and an engine that holds it

    @property
    def canvas_length(self) -> int:
        return self._config.canvas_length

    def stream(
        self,
        conversations: list[list[dict]],
        settings: GenerationConfig,
        seed: int = 0,
        thinking: bool = False,
        rows: list[int] | None = None,
        clamp: Clamp | None = None,
        language: Language | None = None,
    ) -> Iterator[StepDone | BlockDone | Done]:
        """Answer each conversation (a list of messages, or a prompt's tokens). rows: noise row ids, 0, 1, … by default.

        clamp: what is known of the answers. language: what every answer is a text of. Raises DgemmaError for an empty
        prompt or one that does not fit the context.
        """
        began = time.perf_counter()
        if not conversations:
            raise DgemmaError("found no prompt in the batch, expected at least one")
        prompts = [x if _is_tokens(x) else self.tokenizer.chat(x, thinking) for x in conversations]
        for prompt in prompts:
            self._check_context(len(prompt), settings)
        if self._keep_prefix and len(prompts) == 1 and not _is_tokens(conversations[0]):
            again = self.tokenizer.chat(conversations[0], thinking, reply_next=False)
            engine, reused = self._prefill_turn(prompts[0], _common_length(prompts[0], again))
        else:
            engine, reused = self.make_engine(), 0
            same = len(prompts) > 1 and all(prompt == prompts[0] for prompt in prompts)
            engine.prefill(*left_padded(prompts[:1] if same else prompts, settings.pad_token_id))
            engine = engine.spread(len(prompts)) if same else engine
        if language is not None:
            engine = ConstrainedEngine(engine, language)
        prefill_seconds = time.perf_counter() - began

        rows = list(range(len(prompts))) if rows is None else rows
        blocks, first_block = [], 0.0
        for event in denoise_blocks(engine, settings, NoiseStream(seed), rows, clamp=clamp):
            if isinstance(event, BlockDone):
                blocks.append(event)
                first_block = first_block or prefill_seconds + event.seconds
            yield event

        known_until = 0 if clamp is None else clamp.text_end((*settings.stop_token_ids, settings.pad_token_id))
        tokens, stopped = collect(np.concatenate([b.tokens for b in blocks], axis=1), settings, known_until)
        stats = Stats(
            prompt_tokens=sum(map(len, prompts)),
            reused_tokens=reused,
            tokens=sum(map(len, tokens)) - _n_known(clamp, tokens),
            blocks=len(blocks),
            steps=int(sum(b.steps.sum() for b in blocks)),
            seconds=time.perf_counter() - began,
            seconds_to_first_block=first_block,
            peak_memory=engine.peak_memory(),
            cache_bytes=engine.cache_bytes,
        )
        answers = [row[:-1] if stop else row for row, stop in zip(tokens, stopped, strict=True)]
        yield Done([self.tokenizer.reply(row).text for row in answers], answers, stopped, stats)

    def decide(
        self, conversation: list[dict], template: str, settings: GenerationConfig, seed: int = 0
    ) -> tuple[str, list[Decision]]:
        """A template whose slots are choices: the text, and how likely every choice is; see decisions.py."""
        prompt = self.tokenizer.chat(conversation)
        self._check_context(len(prompt), settings.replace(max_new_tokens=1))
        return decide_template(self.make_engine, self.tokenizer, prompt, template, settings, seed=seed)

    def _prefill_turn(self, prompt, stable):
        """An engine whose prefix is `prompt`, and how many tokens of it were encoded before.

        The first `stable` tokens are kept: they come again in the conversation's next turn.
        """
        engine, reused = None, 0
        if self._kept is not None:
            tokens, kept = self._kept
            if tokens == prompt[: len(tokens)] and len(tokens) < len(prompt):
                engine, reused = kept.copy(), len(tokens)
        engine = engine or self.make_engine()
        if stable > reused:
            engine.prefill(np.array([prompt[reused:stable]], np.int32))
            self._kept = prompt[:stable], engine.copy()
        start = max(stable, reused)
        if start < len(prompt):
            engine.prefill(np.array([prompt[start:]], np.int32))
        return engine, reused

    def _check_context(self, n_prompt, settings):
        limit, n_new = self._config.max_position_embeddings, settings.max_new_tokens
        C = self._config.canvas_length
        needed = n_prompt + sum(canvas_lengths(settings, C))
        if needed > limit:
            raise ContextError(
                f"the prompt has {n_prompt} tokens and {n_new} new ones were asked for, in whole canvases of {C}: "
                f"{needed} in all. The model's context is {limit}; shorten the prompt or ask for fewer"
            )


def left_padded(prompts: list[list[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of unequal length as one array: tokens (B, T) int32 and pad counts (B,) int32."""
    T = max(map(len, prompts))
    padding = np.array([T - len(prompt) for prompt in prompts], np.int32)
    tokens = [[pad_id] * int(n) + prompt for n, prompt in zip(padding, prompts, strict=True)]
    return np.array(tokens, np.int32), padding


def collect(tokens: np.ndarray, settings: GenerationConfig, known_until=0) -> tuple[list[list[int]], list[bool]]:
    """Each row up to its first stop id, that id included, and at most max_new_tokens; and whether it stopped.

    tokens (B, n) are the blocks of close_canvas, one after the other; known_until as there.
    """
    kept, stopped = [], []
    at_least = np.broadcast_to(known_until, len(tokens))
    for row, known in zip(tokens[:, : settings.max_new_tokens], at_least, strict=True):
        at = np.flatnonzero(np.isin(row, settings.stop_token_ids) & (np.arange(len(row)) >= known))
        kept.append(row[: at[0] + 1].tolist() if at.size else row.tolist())
        stopped.append(bool(at.size))
    return kept, stopped


def _n_known(clamp, tokens):
    """How many of the kept tokens were given."""
    return 0 if clamp is None else sum(int(clamp.known[i, : len(row)].sum()) for i, row in enumerate(tokens))


def _is_tokens(conversation):
    return bool(conversation) and all(isinstance(token, int) for token in conversation)


def _common_length(a, b):
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
