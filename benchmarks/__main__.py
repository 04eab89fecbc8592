"""`python -m benchmarks`: the command `fastgpt bench`."""

from fastgpt.cli import entry

if __name__ == "__main__":
    entry("bench")
