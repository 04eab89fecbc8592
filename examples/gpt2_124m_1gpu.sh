#!/usr/bin/env bash
# nanoGPT's default run, GPT-2 124M with 491,520 tokens an iteration, on one GPU.
#
# Hardware: one GPU. Data: OpenWebText as nanoGPT's data/openwebtext/prepare.py writes it; --dataset=NAME takes another data/NAME.
# Expected: nanoGPT's README reports a loss of about 2.85 after 600,000 iterations. Not measured on a GPU with fastgpt yet.
set -euo pipefail
fastgpt train --preset=gpt2 --dataset=openwebtext --out_dir=out-gpt2-124m "$@"
