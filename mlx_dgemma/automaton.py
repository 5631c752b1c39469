"""A regular expression as a deterministic automaton: over bytes first, then over a tokenizer's tokens.

Shapes   S states, T tokens, K classes of tokens; state S of a table of transitions is the dead one
Source   outlines-core, whose regex engine is Rust's regex-automata
Differs  outlines-core lifts to tokens itself, into a dictionary of every state's tokens: gigabytes for 262,144 tokens.
         Here the library sees the 256 single bytes, and tokens with the same effect on all states are one class

The whole text must match. It never holds a NUL byte: that one marks the text's end inside the library, where a plain
`a|ab` would mean the first alternative alone. The library bounds neither time nor memory and cannot be interrupted, so
it runs in a process of its own that can.
"""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from typing import NamedTuple

import numpy as np

from .errors import DgemmaError
from .tokenizer import SPECIAL_SHAPE, Tokenizer

MAX_STATES = 8_000  # of bytes; `[^"]{0,900}` has that many
MAX_CELLS = 2**28  # states × effects while lifting: half a gigabyte
SECONDS, BYTES = 20, 4 << 30  # what building may take

_BUILDER = """
import array, sys
BYTES, MAX_STATES = int(sys.argv[1]), int(sys.argv[2])
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
except (ImportError, ValueError, OSError):
    pass
from outlines_core import Index, Vocabulary
regex = sys.stdin.buffer.read().decode()
try:
    index = Index(regex, Vocabulary(256, {bytes([b]): [b] for b in range(256)}))
except ValueError as error:
    sys.exit("! " + str(error))
rows, finals = index.get_transitions(), index.get_final_states()
if len(rows) > MAX_STATES:
    sys.exit("# %d states" % len(rows))
number = {state: i for i, state in enumerate(rows)}
table = array.array("i", [number[index.get_initial_state()], len(rows)])
table.extend(state in finals for state in rows)
for row in rows.values():
    table.extend(number.get(row.get(b), -1) for b in range(256))
sys.stdout.buffer.write(table.tobytes())
"""


class Automaton(NamedTuple):
    """A language over bytes. next: state × byte → state, S where there is none."""

    next: np.ndarray  # (S + 1, 256) int32
    start: int
    final: np.ndarray  # (S + 1,) bool


class TokenAutomaton(NamedTuple):
    """A language over tokens. Tokens of a class lead from every state to the same one."""

    next: np.ndarray  # (S + 1, K) int32
    start: int
    final: np.ndarray  # (S + 1,) bool
    class_of: np.ndarray  # (T,) int32, -1: no state takes it


@functools.lru_cache(maxsize=16)
def compile_regex(regex: str) -> Automaton:
    """The automaton of all texts that match `regex` as a whole. Raises DgemmaError where it cannot be built."""
    table = _build(f"(?:{without_outer_anchors(regex)})\\x00", regex)
    start, S = int(table[0]), int(table[1])
    accepts = np.append(table[2 : 2 + S], 0).astype(bool)
    following = table[2 + S :].reshape(S, 256)
    following = np.vstack([np.where(following < 0, S, following), np.full((1, 256), S)]).astype(np.int32)
    final = accepts[following[:, 0]]  # a text is complete where the NUL may follow
    following[:, 0] = S
    source, byte = np.nonzero(following != S)
    if not (final & closure(np.arange(S + 1) == start, source, following[source, byte])).any():
        raise _empty(regex)
    return Automaton(following, start, final)


def without_outer_anchors(regex: str) -> str:
    """`^` in front and `$` behind say nothing more. Raises DgemmaError for assertions elsewhere, and a loose ( or )."""
    regex = regex.removeprefix("^")
    if re.search(r"(?<!\\)(?:\\\\)*\$$", regex):
        regex = regex[:-1]
    classes, groups = [], []  # where open ones begin; classes nest in this syntax
    for match in re.finditer(r"\\.|\[\^?\]?|\]|[\^$()]", regex, re.DOTALL):
        found = match[0]
        if found[0] == "[":
            classes.append(match.start() + 1)
        elif found == "]":
            del classes[-1:]
        elif not classes and found in ("(", ")"):
            if found == "(":
                groups.append(match.start() + 1)
            elif not groups:  # the group that this text is put into must not end early
                raise DgemmaError(
                    f"the regex has a ) without ( at character {match.start() + 1}, expected pairs of them; "
                    r"write \) for the character"
                )
            else:
                groups.pop()
        elif not classes and found in ("^", "$", r"\b", r"\B", r"\A", r"\z", r"\Z", r"\<", r"\>"):
            raise DgemmaError(
                f"the regex holds the assertion {found} at character {match.start() + 1}, expected none inside:"
                " the whole text has to match anyway; leave it out"
            )
    for begin, end, opened in (("[", "]", classes), ("(", ")", groups)):
        if opened:
            raise DgemmaError(
                f"the regex has a {begin} without {end} at character {opened[-1]}, expected pairs of them; "
                rf"write \{begin} for the character"
            )
    return regex


def _build(regex, shown):
    if importlib.util.find_spec("outlines_core") is None:
        raise DgemmaError("structured output needs the package outlines-core; pip install outlines-core")
    command = [sys.executable, "-c", _BUILDER, str(BYTES), str(MAX_STATES)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        text = regex.encode()
    except UnicodeEncodeError:
        raise DgemmaError("the regex is not valid UTF-8; give it as UTF-8 text") from None
    try:
        done = subprocess.run(command, input=text, capture_output=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        raise _too_large(shown, f"more work than {SECONDS} s") from None
    message = done.stderr.decode(errors="replace").strip()
    if done.returncode == 0:
        return np.frombuffer(done.stdout, np.int32)
    if message.startswith("#"):
        raise _too_large(shown, message[2:])
    if "no transitions" in message:
        raise _empty(shown)
    if message.startswith("!"):
        raise DgemmaError(
            f"the regex {shortened(shown)} is not valid ({message[2:]}); expected the syntax of Rust's regex"
        )
    if done.returncode < 0 or "memory" in message.lower():
        raise _too_large(shown, f"more memory than {BYTES >> 30} GB")
    raise DgemmaError(f"outlines-core failed ({message.splitlines()[-1:]}); install it again")


def shortened(text: str) -> str:
    """For an error message."""
    return repr(text if len(text) <= 60 else text[:57] + "…")


def _empty(regex):
    return DgemmaError(
        f"the language of {shortened(regex)} is empty: no text matches; expected at least one, so relax it"
    )


def _too_large(regex, found):
    return DgemmaError(
        f"the automaton of {shortened(regex)} is too large: {found}, expected {MAX_STATES:,} states at most; "
        "lower the counts in braces, such as a maxLength, or leave them open"
    )


@functools.lru_cache(maxsize=2)
def token_bytes(tokenizer: Tokenizer) -> tuple[bytes | None, ...]:
    """What each token stands for in a text; None for special and unused ones, which no language holds."""
    vocabulary = tokenizer.vocabulary
    return tuple(_bytes_of(i, vocabulary.token(i)) for i in range(vocabulary.size))


def _bytes_of(token_id, piece):
    if token_id < 5 or not piece or SPECIAL_SHAPE.fullmatch(piece) or re.fullmatch(r"<unused\d+>", piece):
        return None
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


def lift(automaton: Automaton, texts: tuple[bytes | None, ...]) -> TokenAutomaton:
    """The same language over tokens; only states on the way from the start to a final one are kept.

    A token's effect, the state it leads to from each, is the composition of its bytes' effects. Tokens are walked byte
    by byte side by side, and each effect is computed once, however many tokens share it.
    """
    effects, class_of = _effects(automaton, texts)
    used, class_of[class_of >= 0] = np.unique(class_of[class_of >= 0], return_inverse=True)
    following = effects[used].T.astype(np.int32)  # (S + 1, K)
    return _trimmed(TokenAutomaton(following, automaton.start, automaton.final, class_of))


def _effects(automaton, texts):
    """Effects (n, S + 1) and each token's effect (T,), -1 where no state takes it."""
    dead = len(automaton.next) - 1
    by_class, class_of_byte = np.unique(automaton.next, axis=1, return_inverse=True)
    by_class, class_of_byte = by_class.T.astype(np.int16), class_of_byte.reshape(-1)  # (byte classes, S + 1)
    lengths = np.array([len(text or b"") for text in texts])
    ends = np.cumsum(lengths)
    flat = class_of_byte[np.frombuffer(b"".join(text or b"" for text in texts), np.uint8)]
    identity = np.arange(dead + 1, dtype=np.int16)
    known = {np.full(dead + 1, dead, np.int16).tobytes(): -1, identity.tobytes(): 0}
    table, count = np.empty((64, dead + 1), np.int16), 1
    table[0] = identity
    current = np.where(lengths > 0, 0, -1)
    for position in range(lengths.max(initial=0)):
        active = np.flatnonzero((lengths > position) & (current >= 0))
        pairs = current[active] * len(by_class) + flat[ends[active] - lengths[active] + position]
        pairs, which = np.unique(pairs, return_inverse=True)
        numbers = np.empty(len(pairs), np.int64)
        for first in range(0, len(pairs), 1024):  # bounds the memory
            before, byte = np.divmod(pairs[first : first + 1024], len(by_class))
            for i, effect in enumerate(by_class[byte[:, None], table[before]], first):
                number = numbers[i] = known.setdefault(effect.tobytes(), count)
                if number == count:
                    if (count + 1) * len(effect) > MAX_CELLS:
                        raise _too_large("this language", f"{dead:,} states and as many classes of tokens")
                    if count == len(table):
                        table = np.concatenate([table, np.empty_like(table)])
                    table[count], count = effect, count + 1
        current[active] = numbers[which]
    return table[:count], current.astype(np.int32)


def _trimmed(automaton: TokenAutomaton) -> TokenAutomaton:
    """Only states between the start and a final one; classes that agree on those are one. Raises where none is left."""
    following, start, final, class_of = automaton
    dead = len(following) - 1
    source, cls = np.nonzero(following != dead)
    target = following[source, cls]
    useful = closure(start == np.arange(dead + 1), source, target) & closure(final, target, source)
    if not useful[start]:
        raise DgemmaError("the language is empty: the tokenizer can write none of its texts; relax it")
    number = np.full(dead + 1, useful.sum())
    number[useful] = np.arange(useful.sum())
    following = np.vstack([number[following[useful]], np.full((1, following.shape[1]), useful.sum())])
    columns, new_class = np.unique(following, axis=1, return_inverse=True)
    new_class = new_class.reshape(-1)
    alive = (columns != useful.sum()).any(axis=0)
    renumbered = np.where(alive, np.cumsum(alive) - 1, -1)[new_class]
    class_of = np.append(renumbered, -1)[class_of]  # −1 stays
    return TokenAutomaton(
        columns[:, alive].astype(np.int32),
        int(number[start]),
        np.append(final[useful], False),
        class_of.astype(np.int32),
    )


def closure(seeds: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """All states reached from `seeds` (S,) bool along edges source → target, seeds included."""
    reached, size = seeds.copy(), 0
    while size < (size := int(reached.sum())):
        reached[target[reached[source]]] = True
    return reached
