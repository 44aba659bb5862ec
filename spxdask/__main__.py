"""``python -m spxdask``."""

import sys

from spxdask.cli import main

if __name__ == "__main__":
    sys.exit(main())
