"""`python -m benchmarks`: the command `fastgpt bench`."""

import sys

from fastgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
