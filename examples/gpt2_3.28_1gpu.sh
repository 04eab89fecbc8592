#!/usr/bin/env bash
# GPT-2 124M to a validation loss of 3.28 on FineWeb, the target of the speedruns, on one GPU; then a log in the form that they use.
#
# Hardware: one GPU. Data: the 10B sample of FineWeb in modded-nanogpt's shards, 20 GB in data/fineweb10B:
#   pip install huggingface_hub
#   hf download kjj0/fineweb10B-gpt2 --repo-type=dataset --local-dir data/fineweb10B
# The validation loss is that of the first 10,485,760 tokens of the validation shard, in order: 320 batches of 32 windows.
#
# Expected: not measured yet, and the settings are a proposal that nobody has run. Batch, peak learning rate, warm-up and weight decay are
# those of modded-nanogpt's first AdamW run (its run.sh of June 2024), which reached 3.2798 in 24,576 iterations with a linear decay,
# normalized gradients and a model without affine norms. Here the decay is nanoGPT's cosine and the model GPT-2's, so there are 32,768
# iterations. llm.c's scripts/run_gpt2_124M.sh is the other known run with GPT-2's own model: it takes 10B tokens at a rate of 6e-4.
set -euo pipefail
out=${OUT:-out-gpt2-3.28}
fastgpt train --preset=gpt2 --dataset=fineweb10B --out_dir="$out" \
    --batch_size=32 --gradient_accumulation_steps=8 \
    --learning_rate=0.0015 --min_lr=0.00015 --warmup_iters=256 --max_iters=32768 --lr_decay_iters=32768 --weight_decay=0.1 \
    --eval_windows=first --eval_iters=320 --eval_interval=128 --target_loss=3.28 --log_interval=10 "$@"
python "$(dirname "$0")/speedrun_log.py" "$out" > "$out/speedrun.txt"
tail -n 1 "$out/speedrun.txt"
