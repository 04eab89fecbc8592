#!/usr/bin/env bash
# nanoGPT's train_shakespeare_char: a model of 10.65M parameters, letter by letter.
#
# Hardware: one GPU. Data: 1 MB of Shakespeare as input.txt in this folder:
#   curl -O https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
# Expected: nanoGPT's README reports a best validation loss of 1.4697. Not measured on a GPU with fastgpt yet.
set -euo pipefail
if [ ! -f data/shakespeare_char/train.bin ]; then
    fastgpt prepare --input=input.txt --tokenizer=chars --out=data/shakespeare_char
fi
fastgpt train --preset=shakespeare-char "$@"
