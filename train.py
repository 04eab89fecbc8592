"""Train nanoGPT's model: `python train.py [config.py ...] [--key=value ...]`; `--help` lists the flags.

On eight GPUs: `torchrun --standalone --nproc_per_node=8 train.py ...`.
"""

import sys

from fastgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
