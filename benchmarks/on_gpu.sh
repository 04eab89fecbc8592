#!/usr/bin/env bash
# All that a GPU has to say of the kernels, in two commands of less than ten minutes each:
#   benchmarks/on_gpu.sh checks RESULTS_DIR     verify, the kernels' tests natively, short runs of the trainer in each of its modes
#   benchmarks/on_gpu.sh choices RESULTS_DIR    the sanitizer where there is one, the choice on GPT-2's shapes, and which launch
#                                               configurations are faster there: written to RESULTS_DIR alone, so that what
#                                               follows measures what is shipped
# Speed is the next command's: python -m benchmarks
set -uo pipefail
stage=${1:?usage: benchmarks/on_gpu.sh checks|choices RESULTS_DIR}
out=${2:?usage: benchmarks/on_gpu.sh checks|choices RESULTS_DIR}
cd "$(dirname "$0")/.."
mkdir -p "$out" || exit 2
status=0
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv | tee "$out/gpu.csv"

checks() {
    timeout 120 python -m fastgpt.cli verify --json "$out/verify.json" | tee "$out/verify.txt" || status=1

    files=(tests/test_{layer_norm,embedding,flash_attention,linear,gelu_mlp,cross_entropy,adamw,graphs,kernels,kernels_in_training,planted_faults}.py)
    timeout 240 python -m pytest -q "${files[@]}" 2>&1 | tee "$out/tests.txt" || status=1

    # The loss of the last iteration must be the same in all exact modes, but for rounding.
    run=(train.py --preset=tiny --dtype=bfloat16 --kernels=triton --gradient_accumulation_steps=4 --max_iters=20 --eval_interval=20 --eval_iters=2)
    for mode in --compile=False "--compile=False --cuda_graphs=True" --compile=True "--compile=True --cuda_graphs=True" \
        "--compile=False --recompute=block" "--compile=False --residual=bf16"; do
        echo "== $mode"
        # shellcheck disable=SC2086  # a mode may be two flags
        timeout 60 python "${run[@]}" $mode --out_dir="$(mktemp -d)" 2>&1 | grep -E "CUDA graphs|first iteration|iter 10:|iteration 20|[Ee]rror" || status=1
    done > "$out/modes.txt"
    cat "$out/modes.txt"
}

choices() {
    if command -v compute-sanitizer > /dev/null; then
        for tool in memcheck racecheck; do
            timeout 60 compute-sanitizer --tool "$tool" python -m fastgpt.cli verify > "$out/$tool.txt" 2>&1
            tail -3 "$out/$tool.txt"
        done
    fi

    timeout 150 python - << 'END' | tee "$out/choice.txt" || status=1
import torch

from fastgpt.choose import choose
from fastgpt.verify import Shape

torch.backends.cuda.matmul.allow_tf32 = True
for compiled in (False, True):
    for B, n_embd, n_head in ((16, 768, 12), (4, 1600, 25)):
        print(f"\nn_embd={n_embd}, n_head={n_head}, {'compiled' if compiled else 'eager'}")
        choose("auto", Shape(B, 1024, n_embd, n_head, 50304, bias=False), torch.bfloat16, "cuda", compiled)
END

    timeout 270 python -m fastgpt.cli tune --batch_size 16 --budget 180 --out "$out/tuned.json" | tee "$out/tuned.txt" || status=1
}

case $stage in
    checks | choices) "$stage" ;;
    *) echo "there is no stage $stage" >&2 && exit 2 ;;
esac
exit $status
