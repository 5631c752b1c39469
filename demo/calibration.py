"""Training-side instances as a calibration file: python -m demo.calibration > calibration.jsonl

Source   demo/tasks.py; none of these instances is held out, so an evaluation stays untouched by them
"""

import argparse
import itertools
import json

from demo.tasks import TASKS, instances


def lines(n: int, seed: int):
    """n per task, interleaved, so that the first lines hold every task."""
    streams = [itertools.islice(instances(task, f"calibration.{seed}", held_out=False), n) for task in TASKS]
    for some in zip(*streams, strict=True):
        for instance in some:
            yield json.dumps({"prompt": instance.prompt, "answer": instance.answer}, ensure_ascii=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m demo.calibration", description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=50, help="instances per task (default: 50)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for line in lines(args.n, args.seed):
        print(line)
