"""`python -m dite`, and `torchrun -m dite`: the same command line without its script on the path."""

import sys

from dite.cli import main

if __name__ == "__main__":
    sys.exit(main())
