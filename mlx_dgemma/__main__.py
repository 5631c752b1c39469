"""The command's first lines: standard library only, so that Ctrl-C works from the start.

`python -m mlx_dgemma`, `python -m mlx_dgemma.generate` and `dgemma-generate` are the same command; it lives in cli.py.
"""

import importlib
import sys


def main(command: str = "cli") -> int:
    """Run the module of this name. Importing it takes a while too."""
    try:
        return importlib.import_module(f".{command}", __package__).main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
