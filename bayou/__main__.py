"""`python -m bayou` is the same program as the console script `bayou`."""

from bayou.cli import main

if __name__ == "__main__":
    main()
