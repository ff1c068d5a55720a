"""`python -m bayou` is the same program as the console script `bayou`."""

import sys

from bayou.cli import main

if __name__ == "__main__":
    sys.exit(main())
