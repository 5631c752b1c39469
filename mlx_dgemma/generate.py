"""`python -m mlx_dgemma.generate`. In the API `mlx_dgemma.generate` is a function, so the command lives in cli.py."""

import sys

from .__main__ import main

if __name__ == "__main__":
    sys.exit(main())
