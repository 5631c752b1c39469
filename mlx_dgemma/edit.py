"""`python -m mlx_dgemma.edit`. In the API `mlx_dgemma.edit` is a function, so the command lives in cli_edit.py."""

import sys

from .__main__ import main

if __name__ == "__main__":
    sys.exit(main("cli_edit"))
