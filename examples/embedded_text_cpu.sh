#!/usr/bin/env bash
# A small model on text that every machine has: the source of Python's standard library, as bytes.
#
# Hardware: two CPU cores. Data: none to fetch.
# Expected: about 40 s and a validation loss of about 1.77 nats a byte (two cores of an AMD EPYC, torch 2.13.0).
set -euo pipefail
fastgpt train --dataset=python-stdlib --out_dir=out-embedded-text \
    --device=cpu --compile=False --n_layer=4 --n_head=4 --n_embd=128 \
    --batch_size=16 --block_size=64 --gradient_accumulation_steps=1 \
    --max_iters=1000 --learning_rate=3e-3 --min_lr=3e-4 --warmup_iters=50 --lr_decay_iters=1000 \
    --eval_interval=250 --eval_iters=20 --log_interval=20 --sample_tokens=400 "$@"
