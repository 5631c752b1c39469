"""The command's first lines: standard library only, so that Ctrl-C works from the start.

`python -m mlx_dgemma`, `python -m mlx_dgemma.generate` and `dgemma-generate` are the same command; it lives in cli.py.
"""

import sys


def main() -> int:
    try:
        from .cli import main as run

        return run()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
