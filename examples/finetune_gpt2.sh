#!/usr/bin/env bash
# GPT-2's weights, trained on with a text of your own, by the settings of nanoGPT's finetune_shakespeare (which takes gpt2-xl:
# --init_from=gpt2-xl does, too).
#
# Hardware: one GPU. Data: a text as input.txt in this folder. GPT-2's weights and tokenizer are fetched from Hugging Face and OpenAI once.
# Expected: not measured on a GPU yet. It keeps the checkpoint with the best validation loss only, since a short text is soon learnt by heart.
set -euo pipefail
if [ ! -f data/finetune/train.bin ]; then
    fastgpt prepare --input=input.txt --tokenizer=gpt2 --out=data/finetune
fi
fastgpt train --init_from=gpt2 --dataset=finetune --out_dir=out-finetune \
    --batch_size=1 --gradient_accumulation_steps=32 --max_iters=20 --learning_rate=3e-5 --decay_lr=False \
    --eval_interval=5 --eval_iters=40 --always_save_checkpoint=False --sample_tokens=200 "$@"
