"""`python -m preftune`; `torchrun -m preftune` and `accelerate launch -m preftune` start the same."""

import sys

from preftune.cli import main

if __name__ == "__main__":
    sys.exit(main())
