"""Entry point of `python -m ltxlite`."""

import sys

from ltxlite.cli import main

if __name__ == "__main__":
    sys.exit(main())
