#!/usr/bin/env bash
# nanoGPT's default run, GPT-2 124M with 491,520 tokens an iteration, on the GPUs of one node: the same batch, shared among them.
#
# Hardware: eight GPUs; NPROC=4 takes four. Data: as for gpt2_124m_1gpu.sh.
# Expected: nanoGPT's README reports four days on eight A100 40GB. Not measured on a GPU with fastgpt yet.
set -euo pipefail
torchrun --standalone --nproc_per_node="${NPROC:-8}" -m fastgpt.cli train \
    --preset=gpt2 --dataset=openwebtext --out_dir=out-gpt2-124m "$@"
