"""Train nanoGPT's model: `python train.py [config.py ...] [--key=value ...]`; `--help` lists the flags.

On eight GPUs: `torchrun --standalone --nproc_per_node=8 train.py ...`.
"""

from fastgpt.cli import entry

if __name__ == "__main__":
    entry("train")
