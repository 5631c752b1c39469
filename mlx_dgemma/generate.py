"""`python -m mlx_dgemma.generate`. The command lives in cli.py: `mlx_dgemma.generate` is the API's function."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
