"""The command line of `python -m mlx_dgemma.generate`: options, one answer, exit codes. chat.py has the chat loop.
`python -m gguf_export run` is the same command with another engine behind it.

Answer on stdout, progress and the final line on stderr. Exit codes: 0 done, 1 a bad input (one `error:` line),
2 wrong usage, 130 Ctrl-C.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from .automaton import compile_regex
from .chat import chat
from .cli_infill import (
    add_infill_options,
    check_infill_options,
    context_of_text,
    infill,
    is_quiet,
    read_parts,
    recorded,
)
from .config import GenerationConfig
from .denoise import canvas_lengths
from .errors import DgemmaError
from .events import Done
from .files import check_writable
from .fits import Context
from .presets import with_preset
from .session import Session
from .structure import compile, json_schema, only_choices, template
from .tokenizer import Tokenizer, check_prompt
from .units import human_bytes
from .view import View

# Option → what makes a regex of it.
STRUCTURES = {"template": template, "regex": str, "json_schema": json_schema}

# Field of GenerationConfig → option.
OPTIONS = {
    "max_new_tokens": "max_tokens",
    "max_denoising_steps": "steps",
    "t_min": "t_min",
    "t_max": "t_max",
    "entropy_bound": "entropy_bound",
    "schedule_steps": "schedule_steps",
    "stop": "stop",
    "first_canvas": "first_canvas",
    "drop_tail": "drop_tail",
    "conditioning_k": "conditioning_k",
    "conditioning_epsilon": "conditioning_epsilon",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code. Ctrl-C passes through, to __main__.py."""
    options = parse(argv)
    return guarded(lambda: run(options))


def guarded(command: Callable[[], int]) -> int:
    """Run a command; what goes wrong with its input or with stdout becomes one line and an exit code."""
    if sys.stdout is None:  # closed by the caller, as in `… >&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        code = command()
        sys.stdout.flush()  # so that a reader who left is noticed here
        return code
    except DgemmaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is not None:  # a file's, not stdout's
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        if isinstance(error, BrokenPipeError):  # the reader went away, as in `… | head`: nobody is left to answer
            return 0
        print(f"error: standard output cannot be written ({error.strerror})", file=sys.stderr)
        return 1


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mlx_dgemma.generate", description="Answer a prompt with DiffusionGemma on MLX."
    )
    add_model_options(parser)
    add_options(parser)
    parser.add_argument("--image", metavar="FILE", help="not supported yet")
    options = parser.parse_args(argv)
    check_options(parser, options)
    return options


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What loading on MLX takes."""
    parser.add_argument(
        "--model", required=True, help="model folder (Hugging Face or MLX layout), GGUF file, or hub repo id"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="activations (default: bfloat16 on a GPU, else float32)",
    )
    add_memory_option(parser)


def add_memory_option(parser: argparse.ArgumentParser) -> None:
    """What loading on every engine takes."""
    parser.add_argument(
        "--allow-overcommit",
        action="store_true",
        help="go on where weights, keys and values and a step do not fit the device's memory",
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every engine's command takes."""
    add = parser.add_argument
    add("-p", "--prompt", help="the prompt; - reads standard input")
    add("--system", help="system prompt")
    add("--thinking", action="store_true", help="let the model think first; the thought goes to stderr")
    add("--chat", action="store_true", help="a conversation, one prompt per line (a final \\ continues it); empty: end")
    add("--seed", type=int, default=0, help="same seed, same text (default 0)")
    add("--max-tokens", type=int, metavar="N", help="most tokens to generate (default: the checkpoint's, or 256)")
    add("--steps", type=int, metavar="N", help="most denoising steps per block")
    add("--t-min", type=float, metavar="T", help="temperature towards the last step")
    add("--t-max", type=float, metavar="T", help="temperature of the first step")
    add("--entropy-bound", type=float, metavar="NATS", help="entropy that one step's accepted tokens may add up to")
    add("--preset", metavar="P", help="exact (default), balanced or fast: how much work a text may cost")
    add("--stop", metavar="RULE", help="when a block is done: stable, confident, plateau or patience")
    add("--schedule-steps", type=int, metavar="N", help="steps in which the temperature falls (default: --steps)")
    add("--first-canvas", type=int, metavar="C", help="slots of the first canvas; the next ones double (MLX only)")
    add(
        "--drop-tail",
        action="store_true",
        default=None,
        help="do not compute what stands behind a settled end (MLX only)",
    )
    add("--conditioning-k", type=int, metavar="K", help="blocks of tokens that self-conditioning reads (MLX only)")
    add("--conditioning-epsilon", type=float, metavar="E", help="share of mass those may lack (MLX only)")
    add("--json", action="store_true", help="print one JSON object instead of the text")
    add("--record", metavar="FILE.html", help="write a page that replays the denoising")
    structure = parser.add_argument_group("structured output: every answer has this form")
    structure.add_argument("--template", metavar="TEXT", help='fixed text with slots: {"age": <|integer|>}')
    structure.add_argument("--regex", metavar="R", help="a regular expression that the whole answer matches")
    structure.add_argument("--json-schema", metavar="S", help="a JSON schema, or its file")
    add_infill_options(parser.add_argument_group("infilling: write what is missing in a text"))


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends with a usage error where options exclude each other."""
    if options.chat and options.json:
        parser.error("--chat and --json exclude each other")
    structures = [option for option in STRUCTURES if getattr(options, option) is not None]
    apart = [
        [name for name, given in (("chat", options.chat), ("record", options.record)) if given],
        [*(option.replace("_", "-") for option in structures), *(["thinking"] if options.thinking else [])],
        [*(option.replace("_", "-") for option in structures), *(["chat"] if options.chat else [])],
    ]
    for names in apart:
        if len(names) > 1:
            parser.error(f"--{names[0]} and --{names[1]} exclude each other")
    if check_infill_options(parser, options):
        return
    if options.prompt is None and not options.chat:
        parser.error("give --prompt TEXT, --prompt - for standard input, --chat, or a text to --infill")


class Loaded(NamedTuple):
    """A model ready to answer, on whatever engine."""

    tokenizer: Tokenizer
    generation: GenerationConfig  # the checkpoint's defaults
    session: Session
    what: str  # what was loaded, for people


def run(options) -> int:
    if options.image:
        raise DgemmaError(f"--image {options.image}: image input is not supported yet; give text only")
    return generate(options, lambda context: load_mlx(options, context))


def load_mlx(options, context: Context) -> Loaded:
    """context: tokens that the run will hold."""
    import mlx.core as mx

    from .api import make_session
    from .loading import load

    dtype = getattr(mx, options.dtype) if options.dtype else None
    model, tokenizer = load(
        options.model, dtype, on_note=print_note, context=context, allow_overcommit=options.allow_overcommit
    )
    session = make_session(model, tokenizer, keep_prefix=options.chat)
    return Loaded(tokenizer, model.generation_config, session, human_bytes(mx.get_active_memory()))


def print_note(note: str) -> None:
    print(f"note: {note}", file=sys.stderr)


def generate(options, load: Callable[[Context], Loaded]) -> int:
    """Answer what the options ask for; returns the exit code. `load` is called once they are known to be right, with
    what says how many tokens the run will hold."""
    began = time.perf_counter()
    # Settings are checked before the weights are read, so that a wrong one costs nothing.
    settings_of(GenerationConfig(), options)
    if options.record:
        check_writable(options.record)
    parts, regex = read_parts(options), structure_of(options)
    decides = options.template is not None and only_choices(options.template)
    if decides and options.record:
        raise DgemmaError("--record has nothing to show where a template holds choices alone: nothing is denoised")
    prompt = read_prompt() if options.prompt == "-" else options.prompt
    if prompt is not None:
        check_prompt("user", prompt)
    messages = [{"role": "system", "content": options.system}] if options.system else []
    turns = [*messages, {"role": "user", "content": prompt}] if prompt and prompt.strip() else []

    def context(tokenizer, config, generation):
        if parts:
            return context_of_text(parts, prompt, tokenizer)
        asked = len(tokenizer.chat(turns, options.thinking)) if turns else 0
        settings = settings_of(generation, options)
        return asked + sum(canvas_lengths(settings, config.canvas_length)) * (not decides)

    tokenizer, generation, session, what = load(context)
    settings = settings_of(generation, options)
    if not is_quiet(options):
        print(f"loaded {what} in {time.perf_counter() - began:.1f} s", file=sys.stderr)
    if parts:
        return infill(session, parts, prompt, settings, options)
    if options.chat:
        return chat(lambda turns: answer(session, tokenizer, settings, options, turns), messages, prompt)
    messages.append({"role": "user", "content": prompt})
    if decides:
        return choose(session, tokenizer, settings, options, messages)
    language = None if regex is None else compile(regex, tokenizer, settings)
    done = answer(session, tokenizer, settings, options, messages, language)
    if options.json:
        print(json.dumps(report(done, settings, options, tokenizer), ensure_ascii=False))
    return 0


def read_prompt() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise DgemmaError("the prompt is not valid UTF-8; save it as UTF-8 and try again") from None


def settings_of(base: GenerationConfig, options) -> GenerationConfig:
    """The checkpoint's defaults, changed by the command line."""
    base = with_preset(base, options.preset)
    try:
        return base.replace(**{field: getattr(options, option) for field, option in OPTIONS.items()})
    except DgemmaError as error:
        message = str(error)
        for field, option in OPTIONS.items():  # an error names what the user typed
            message = re.sub(rf"(?<!')\b{field}\b(?!')", "--" + option.replace("_", "-"), message)
        raise DgemmaError(message) from None


def structure_of(options) -> str | None:
    """The regex of what every answer has to look like, where the options ask for something."""
    for option, read in STRUCTURES.items():
        if (given := getattr(options, option)) is not None:
            regex = read(given)
            compile_regex(regex)  # what is wrong with it shows before a model is read; kept for then
            return regex
    return None


def choose(session, tokenizer, settings, options, messages) -> int:
    """A template whose slots are choices: each is decided by one forward pass."""
    text, decisions = session.decide(messages, options.template, settings, options.seed)
    if not options.json:
        print(text)
        return 0
    slots = [dict(zip(d.choices, d.probabilities.round(6).tolist(), strict=True)) for d in decisions]
    print(
        json.dumps({"text": text, "choices": slots, "seed": options.seed, "model": options.model}, ensure_ascii=False)
    )
    return 0


def answer(session, tokenizer, settings, options, messages, language=None) -> Done:
    """One answer, shown as it comes."""
    events = session.stream([messages], settings, options.seed, options.thinking, language=language)
    with View(tokenizer, settings, quiet=options.json) as view:
        for event in recorded(events, options, tokenizer, settings, messages[-1]["content"]):
            view.draw(event)
        thought = tokenizer.reply(event.tokens[0]).thought
        if not options.json:
            if thought:
                view.note(f"thought: {thought}")
            if not event.text.strip():
                view.note("the model answered nothing" + (" but a thought" if thought else ""))
            if not event.stopped[0]:
                view.note(f"stopped at --max-tokens {settings.max_new_tokens}, before the answer's end")
            view.final_line(event.stats, options.seed)
    return event


def report(done: Done, settings: GenerationConfig, options, tokenizer) -> dict:
    """What --json prints."""
    stats = dataclasses.asdict(done.stats)
    stats |= {
        "tokens_per_forward": round(done.stats.tokens_per_forward, 3),
        "tokens_per_second": round(done.stats.tokens_per_second, 3),
    }
    reply = tokenizer.reply(done.tokens[0])
    return {
        "text": reply.text,
        "thought": reply.thought,
        "tokens": done.tokens[0],
        "stopped": done.stopped[0],
        "seed": options.seed,
        "model": options.model,
        "settings": dataclasses.asdict(settings),
        "stats": stats,
    }
