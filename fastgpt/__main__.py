"""`python -m fastgpt`: the command `fastgpt`."""

from fastgpt.cli import entry

if __name__ == "__main__":
    entry()
