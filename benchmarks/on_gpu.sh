#!/usr/bin/env bash
# All that a GPU has to say of the kernels, in one command and within fifteen minutes: benchmarks/on_gpu.sh RESULTS_DIR
# Exactness first: verify, the kernels' tests natively, the sanitizer where there is one; then the choice on GPT-2's shapes,
# and which launch configurations are faster there: they are written to RESULTS_DIR alone, so that what follows measures what is shipped.
# Speed is the next command's: python -m benchmarks
set -uo pipefail
out=${1:?usage: benchmarks/on_gpu.sh RESULTS_DIR}
cd "$(dirname "$0")/.."
mkdir -p "$out"
status=0
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv | tee "$out/gpu.csv"

timeout 120 python -m fastgpt.cli verify --json "$out/verify.json" | tee "$out/verify.txt" || status=1

files=(tests/test_{layer_norm,embedding,flash_attention,linear,gelu_mlp,cross_entropy,kernels,kernels_in_training,planted_faults}.py)
timeout 240 python -m pytest -q "${files[@]}" 2>&1 | tee "$out/tests.txt" || status=1

if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        timeout 60 compute-sanitizer --tool "$tool" python -m fastgpt.cli verify > "$out/$tool.txt" 2>&1
        tail -3 "$out/$tool.txt"
    done
fi

timeout 150 python - << 'EOF' | tee "$out/choice.txt" || status=1
import torch

from fastgpt.choose import choose
from fastgpt.verify import Shape

torch.backends.cuda.matmul.allow_tf32 = True
for compiled in (False, True):
    for B, n_embd, n_head in ((16, 768, 12), (4, 1600, 25)):
        print(f"\nn_embd={n_embd}, n_head={n_head}, {'compiled' if compiled else 'eager'}")
        choose("auto", Shape(B, 1024, n_embd, n_head, 50304, bias=False), torch.bfloat16, "cuda", compiled)
EOF

timeout 270 python -m fastgpt.cli tune --batch_size 16 --budget 180 --out "$out/tuned.json" | tee "$out/tuned.txt" || status=1
exit $status
