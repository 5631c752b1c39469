"""The command's first lines: standard library only, so that Ctrl-C works from the start. The command is in cli.py."""

import sys


def main() -> int:
    try:
        from .cli import main as run

        return run()
    except KeyboardInterrupt as stopped:
        print(f"interrupted; {str(stopped) or 'nothing was kept'}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
