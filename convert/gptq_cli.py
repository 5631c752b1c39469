"""python -m convert gptq MODEL --data FILE --out FILE: what `--gptq` of `python -m convert` reads.

The result goes to stdout, progress to stderr. Exit codes: 0 done, 1 an `error:` line, 2 wrong usage, 130 interrupted;
after anything but 0 nothing is left behind.
"""

import json
import time
from pathlib import Path

from mlx_dgemma.cli import guarded
from mlx_dgemma.tensors import QUANTIZED_ROLES
from mlx_dgemma.units import count, human_bytes

from .collecting import add_examples, over_examples, parser_of
from .output import appears_when_done

OUT = "gptq.safetensors"


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    return guarded(lambda: _run(args))


def _run(args):
    began = time.monotonic()
    with appears_when_done(Path(args.out), 0, folder=False) as scratch:  # a wrong place is known before the work

        def work(model, tokenizer, examples, draw):
            from .correlations import collect_factors

            roles = tuple(args.roles or QUANTIZED_ROLES)
            return collect_factors(
                model, tokenizer, examples, scratch, args.seed, args.examples, roles=roles, on_event=draw
            )

        inputs, examples, canvases = over_examples("gptq", args.model, args.data, work)
    report = {
        "out": args.out,
        "inputs": inputs,
        "examples": examples,
        "canvases": canvases,
        "bytes": Path(args.out).stat().st_size,
        "seconds": round(time.monotonic() - began, 3),
    }
    print(json.dumps(report) if args.json else _as_text(report))
    return 0


def _as_text(report):
    heard = f"{count(report['inputs'], 'input')}, {count(report['examples'], 'example')}"
    size = human_bytes(report["bytes"])
    return f"{report['out']}: {heard}, {report['canvases']:,} canvases denoised, {size}, {report['seconds']:.1f} s"


def _parser():
    parser = parser_of(
        "gptq", "Collect how the inputs of every matrix go together, so that rounding can make up for its errors.", OUT
    )
    add_examples(parser)
    parser.add_argument(
        "--roles",
        nargs="+",
        choices=QUANTIZED_ROLES,
        help="which tensors (default: all; of the 26B 17 GB of memory and 7.5 of disk, `expert` alone 8.8 and 4.3)",
    )
    return parser
