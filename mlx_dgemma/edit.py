"""`python -m mlx_dgemma.edit`. In the API `mlx_dgemma.edit` is a function, so the command lives in cli_edit.py."""

import sys


def main() -> int:
    try:
        from .cli_edit import main as run

        return run()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
