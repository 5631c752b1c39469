"""python -m gguf_export info|describe|check|draw|run|devices

Results go to stdout, progress to stderr. Exit codes: 0 done, 1 a bad input (one `error:` line), 2 wrong usage,
130 Ctrl-C. A command is a function that adds its options and sets `run`, which takes them and returns the exit code.
"""

import argparse
import json
from pathlib import Path

from mlx_dgemma.cli import (
    Loaded,
    add_memory_option,
    add_options,
    check_options,
    generate,
    guarded,
    print_note,
    settings_of,
)
from mlx_dgemma.cli_edit import add_edit_options
from mlx_dgemma.cli_edit import run as edit
from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.quality import error_table
from mlx_dgemma.units import human_bytes


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code. Ctrl-C passes through, to __main__.py."""
    options = _parser().parse_args(argv)
    return guarded(lambda: options.run(options))


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m gguf_export", description="Look into a GGUF file, describe its graph, run it on ggml."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_info, _add_describe, _add_check, _add_draw, _add_run, _add_edit, _add_devices):
        add(commands)
    return parser


def _add_info(commands):
    parser = commands.add_parser("info", help="what a file holds", description="Say what a GGUF file holds.")
    parser.add_argument("file", metavar="FILE", help="a GGUF file, of any architecture")
    parser.add_argument(
        "--verify",
        metavar="SRC",
        nargs="?",
        const="",
        help="reopen the file with llama.cpp's reader and dequantize every tensor; with SRC, the checkpoint folder or "
        "GGUF file it was made from, report the error per role",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    parser.set_defaults(run=_info)


def _info(options):
    from mlx_dgemma.gguf.reader import read_gguf

    from .info import as_text, summarize

    summary = summarize(read_gguf(options.file))
    table = ""
    if options.verify is not None:
        from .verify import open_source, verify_gguf

        # Without a source the file is compared with itself, as our reader and llama.cpp's have it.
        errors = verify_gguf(Path(options.file), open_source(Path(options.verify or options.file)))
        summary["verify"] = [error._asdict() for error in errors] if options.verify else []
        table = (
            error_table(errors) if options.verify else "verified       every tensor is there, finite, and read alike"
        )
    print(json.dumps(summary) if options.json else as_text(summary))
    if table and not options.json:
        print(f"\n{table}")
    return 0


def _add_devices(commands):
    parser = commands.add_parser("devices", help="what ggml can compute on", description="List ggml's devices.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    parser.set_defaults(run=_devices)


def _devices(options):
    from .devices import choose, devices, open_ggml

    library = open_ggml()
    found, first = devices(library), choose(library)
    if options.json:
        rows = [{k: v for k, v in d._asdict().items() if k not in ("handle", "maps")} for d in found]
        print(
            json.dumps({"library": str(library.file), "ggml": library.version(), "auto": first.name, "devices": rows})
        )
        return 0
    print(f"ggml {library.version()} from {library.file}")
    for d in found:
        chosen = "  (auto)" if d.name == first.name else ""
        print(f"{d.name:10} {d.kind:15} {human_bytes(d.free)} of {human_bytes(d.total)} free  {d.description}{chosen}")
    return 0


def _add_describe(commands):
    parser = commands.add_parser(
        "describe",
        help="write a model's graph description",
        description="Write the graph description of a GGUF's model: JSON that any host of ggml can execute.",
    )
    parser.add_argument("file", metavar="FILE", help="a DiffusionGemma GGUF")
    parser.add_argument("-o", "--out", metavar="OUT", help="where to write it (default: standard output)")
    parser.add_argument(
        "--top-k", type=int, metavar="X", help="tokens per slot that top-k self-conditioning keeps (default: 64)"
    )
    parser.set_defaults(run=_describe)


def _describe(options):
    from .description import write_description
    from .graph import TOP_K_TOKENS, describe
    from .text import as_text

    description = describe(options.file, TOP_K_TOKENS if options.top_k is None else options.top_k)
    if options.out:
        write_description(description, options.out)
    else:
        print(as_text(description), end="")
    return 0


def _add_run(commands):
    parser = commands.add_parser(
        "run",
        help="answer a prompt on ggml",
        description="Answer a prompt with DiffusionGemma on stock ggml: the text that mlx_dgemma.generate writes.",
    )
    parser.add_argument(
        "-m", "--model", required=True, help="a DiffusionGemma GGUF, or owner/name/FILE.gguf of the hub"
    )
    add_options(parser)
    add_runner_options(parser)
    parser.set_defaults(run=_run, check=lambda options: check_options(parser, options))


def _add_edit(commands):
    parser = commands.add_parser(
        "edit",
        help="rewrite lines of a file on ggml",
        description="Rewrite lines of a file in place: what mlx_dgemma.edit does, on stock ggml.",
    )
    parser.add_argument(
        "-m", "--model", required=True, help="a DiffusionGemma GGUF, or owner/name/FILE.gguf of the hub"
    )
    add_edit_options(parser)
    add_runner_options(parser)
    parser.set_defaults(run=lambda options: edit(options, lambda context: _load(options, context)), chat=False)


def add_runner_options(parser):
    """What gguf_export.Runner takes; benchmarks use it too."""
    add = parser.add_argument
    add("--device", default="auto", help="a name that `devices` prints (default: the first GPU, else the CPU)")
    add("-ngl", "--n-gpu-layers", type=int, metavar="N", help="layers on the device, the last ones (default: all)")
    add("-t", "--threads", type=int, metavar="N", help="CPU threads (default: one per core; fewer on a busy machine)")
    add("--description", metavar="FILE", help="a graph description (default: made from the model)")
    add_graph_options(parser)
    add_memory_option(parser)


GRAPH_OPTIONS = ("attention", "self_conditioning", "form", "cache_type")


def add_graph_options(parser):
    """The options of a graph description that a user may choose."""
    add = parser.add_argument
    add(
        "--self-conditioning",
        choices=("top-k", "exact"),
        help="read the likeliest tokens of the step before, or all, which takes a table of V × H (default: top-k, but "
        "exact for a small vocabulary)",
    )
    add("--attention", choices=("flash", "exact"), help="fused (default), or mul_mat and soft_max")
    add("--form", choices=("gpu", "cpu"), help="operations that suit one or the other (default: what the device is)")
    add("--cache-type", choices=("f16", "f32"), help="keys and values (default: f32 for a file of f32, else f16)")


def _graph_options(options):
    return {name: getattr(options, name) for name in GRAPH_OPTIONS}


def open_runner(options, context=None):
    """The Runner that these options ask for. context: tokens that it will hold. Raises DgemmaError."""
    from .description import read_description
    from .runner import Runner

    return Runner(
        options.model,
        options.device,
        **_graph_options(options),
        n_gpu_layers=options.n_gpu_layers,
        threads=options.threads,
        description=read_description(options.description) if options.description else None,
        context=context,
        allow_overcommit=options.allow_overcommit,
        on_note=print_note,
    )


def _run(options):
    from .engine import check_settings

    options.check(options)
    check_settings(settings_of(GenerationConfig(), options))  # before a model is read
    return generate(options, lambda context: _load(options, context))


def _load(options, context) -> Loaded:
    from .engine import make_session

    runner = open_runner(options, context)
    tokenizer = runner.tokenizer()
    session = make_session(runner, tokenizer, keep_prefix=options.chat)
    what = f"{human_bytes(runner.memory().weights)} on {runner.executor.device.name}"
    return Loaded(tokenizer, runner.generation_config, session, what)


def _add_check(commands):
    parser = commands.add_parser(
        "check",
        help="check a graph description against a model, and a device",
        description="Check a graph description: form, fingerprint, shapes of every phase, use of every weight; on a "
        "device also which operations fall back to the CPU.",
    )
    parser.add_argument("file", metavar="FILE", help="a DiffusionGemma GGUF")
    parser.add_argument("description", metavar="DESCRIPTION", nargs="?", help="default: the one made from FILE")
    parser.add_argument("--device", metavar="D", help="also check what this device supports")
    parser.add_argument(
        "--prefix", type=int, metavar="N", help="tokens in the prefix (default: 4096, or what the context allows)"
    )
    parser.add_argument("--export-ops", metavar="OUT", help="write the operations for llama.cpp's test-backend-ops")
    add_graph_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    parser.set_defaults(run=_check)


def _check(options):
    from .check_report import as_text, report

    given = _graph_options(options)
    result = report(options.file, options.description, options.device, options.prefix, options.export_ops, **given)
    print(json.dumps(result) if options.json else as_text(result))
    return 0


def _add_draw(commands):
    parser = commands.add_parser(
        "draw", help="an SVG of a graph description", description="Draw a template, a phase or the whole as SVG."
    )
    parser.add_argument("file", metavar="FILE", help="a DiffusionGemma GGUF, or a graph description")
    parser.add_argument(
        "what", metavar="WHAT", nargs="?", default="all", help="sliding, full, a phase, or all (default)"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="form=cpu, attention=exact and the like"
    )
    parser.add_argument("-o", "--out", metavar="OUT", help="where to write it (default: standard output)")
    parser.set_defaults(run=_draw)


def _draw(options):
    from .description import read_description
    from .draw import draw
    from .graph import describe
    from .text import write_text

    chosen = {name: value for name, _, value in (option.partition("=") for option in options.option)}
    is_description = options.file.endswith(".json")
    svg = draw(read_description(options.file) if is_description else describe(options.file), options.what, chosen)
    if options.out:
        write_text(options.out, svg)
    else:
        print(svg, end="")
    return 0
