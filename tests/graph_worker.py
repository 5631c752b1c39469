"""Checks and runs one description after another, in a process of its own: a failed assertion of ggml ends the process.

    python -m tests.graph_worker FILE.gguf

Reads a JSON object per line, {"description": …, "options": of Runner}, and answers with one per line:
{"check": OUTCOME, "run": OUTCOME}. An outcome is "ok", "error: …" for a DgemmaError, or a traceback.
"""

import json
import os
import resource
import sys
import traceback

import numpy as np

from gguf_export import graph_check
from gguf_export.description_form import check_form
from gguf_export.runner import Runner
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.model import open_gguf

MEMORY = 16 << 30  # bytes of addresses: too large a buffer fails at once, and takes nothing from the machine
ROWS, PADDING = 2, [0, 2]


def main(path):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    graph_check.SHAPES = ((3, 7, 300),)  # one of three, for time
    model = open_gguf(path)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what ggml prints is no answer
    for line in sys.stdin:
        request = json.loads(line)
        outcomes = {
            "check": outcome(check, request["description"], model),
            "run": outcome(run, path, request["description"], request["options"]),
        }
        print(json.dumps(outcomes), file=answers, flush=True)


def outcome(function, *arguments) -> str:
    try:
        function(*arguments)
    except DgemmaError as error:
        return f"error: {error}"
    except BaseException:
        return traceback.format_exc()
    return "ok"


def check(description, model):
    check_form(description)
    graph_check.check(description, model)


def run(path, description, options):
    """A prompt in two parts, a canvas without and with beliefs, and two steps."""
    runner = Runner(path, "CPU", description=description, threads=1, **options)
    try:
        C, V = runner.config.canvas_length, runner.config.vocab_size
        cache = runner.make_cache(ROWS)
        tokens = np.random.RandomState(0).randint(0, V, (ROWS, 5 + 3 + C))
        runner.encode(tokens[:, :5], cache, PADDING)
        runner.prefill(tokens[:, 5:8], cache)
        canvas = tokens[:, 8:]
        logits = runner.denoise(canvas, cache)
        runner.denoise(canvas, cache, np.nan_to_num(logits))
        runner.start(canvas, cache)
        for uniform in (1e-6, 0.999999):
            runner.step(cache, 0.5, 0.1, np.full((ROWS, C), uniform), canvas)
    finally:
        runner.executor.close()


if __name__ == "__main__":
    main(sys.argv[1])
