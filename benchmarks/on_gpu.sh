#!/usr/bin/env bash
# Every check of the kernels that needs a GPU, in three commands of less than ten minutes each:
#   benchmarks/on_gpu.sh checks DIR     verify, the kernels' tests on the GPU, and short runs of the trainer in each of its modes
#   benchmarks/on_gpu.sh sanitize DIR   each op once, small, under compute-sanitizer's tools and under ConSan: a line for each
#   benchmarks/on_gpu.sh choices DIR    what --kernels=auto chooses at GPT-2's shapes, and faster launch configurations for them
# All that they find is written to DIR. What `choices` finds stays there: later runs measure what is shipped.
# `python -m benchmarks` measures speed.
set -uo pipefail
stage=${1:?usage: benchmarks/on_gpu.sh checks|sanitize|choices DIR}
out=${2:?usage: benchmarks/on_gpu.sh checks|sanitize|choices DIR}
cd "$(dirname "$0")/.."
mkdir -p "$out" || exit 2
status=0
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv | tee "$out/gpu.csv"

checks() {
    timeout 120 python -m fastgpt.cli verify --json "$out/verify.json" | tee "$out/verify.txt" || status=1

    files=(tests/test_{layer_norm,embedding,linear,gelu_mlp,adamw,graphs,kernels,kernels_in_training,planted_faults}.py
        tests/test_*attention.py tests/test_*cross_entropy.py)
    timeout 240 python -m pytest -q "${files[@]}" 2>&1 | tee "$out/tests.txt" || status=1

    # The last iteration's loss must be the same in all exact modes, up to rounding.
    run=(train.py --preset=tiny --dtype=bfloat16 --kernels=triton --gradient_accumulation_steps=4 --max_iters=20 --eval_interval=20 --eval_iters=2)
    for mode in --compile=False "--compile=False --cuda_graphs=True" --compile=True "--compile=True --cuda_graphs=True" \
        "--compile=False --recompute=block" "--compile=False --residual=bf16"; do
        echo "== $mode"
        # shellcheck disable=SC2086  # a mode may be two flags
        timeout 60 python "${run[@]}" $mode --out_dir="$(mktemp -d)" 2>&1 | grep -E "CUDA graphs|first iteration|iter 10:|iteration 20|[Ee]rror" || status=1
    done > "$out/modes.txt"
    cat "$out/modes.txt"
}

errors=86 # the exit status by which compute-sanitizer says that it found errors
say() {
    printf '%-12s%s\n' "$1" "$2" | tee -a "$out/sanitize.txt"
}

# watched NAME SECONDS COMMAND...: run benchmarks.sanitize by COMMAND, its output in NAME.txt, and say in a line what came of it. It passed
# if COMMAND ended with status 0, printed that the cases ran and, where it is a tool around them, what the tool found. A tool that could
# not start the cases may end with status 0 too.
watched() {
    local name=$1 seconds=$2 log=$out/$1.txt code ran found why
    shift 2
    timeout -k 5 "$seconds" "$@" > "$log" 2>&1
    code=$?
    ran=$(grep -m 1 '^ran ' "$log")
    found=$(sed -n 's/.* SUMMARY: //p' "$log" | tail -n 1)
    if [[ $code == 0 && $ran && ($found || $1 != compute-sanitizer) ]]; then
        say "$name" "passed: $ran${found:+; $found}"
    elif [[ $code == 3 ]] && why=$(grep -m 1 '^not run: ' "$log"); then
        say "$name" "$why"
    elif [[ $name == initcheck && $code == "$errors" && $ran ]]; then
        say "$name" "for information: $found, maybe false: it does not see what a kernel writes by TMA; $log"
    else
        status=1
        case $code in
            0) why="it did not run the cases" ;;
            124 | 137) why="timed out after $seconds s, or killed" ;;
            "$errors") why=$found ;;
            *) why=$(grep -m 1 -E '^(failed|fastgpt: error): ' "$log") || why="exit status $code" ;;
        esac
        say "$name" "FAILED ($why): $log"
    fi
}

sanitize() {
    local cases=(python -m benchmarks.sanitize) tool flags why=
    # With the caching allocator, what lies past a tensor's end is mostly another part of the same block.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONUNBUFFERED=1 PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
    : > "$out/sanitize.txt"

    watched cases 90 "${cases[@]}" # it compiles the kernels: the tools need not wait for that
    ((status)) && why="the cases fail without it"
    [[ $why ]] || command -v compute-sanitizer > /dev/null || why="there is no compute-sanitizer; CUDA's toolkit has it"
    for tool in memcheck racecheck synccheck initcheck; do
        [[ $why ]] && say "$tool" "not run: $why" && continue
        flags=(--tool "$tool" --error-exitcode "$errors" --launch-timeout 0) # 0: Python's imports may take long before CUDA is used
        # PyTorch and Triton ask the driver for what it may not have: such an answer is no error. Padding keeps tensors apart.
        [[ $tool == memcheck ]] && flags+=(--report-api-errors no --padding 512)
        watched "$tool" 60 compute-sanitizer "${flags[@]}" "${cases[@]}"
    done
    if [[ $why == "the cases"* ]]; then
        say consan "not run: $why"
    else
        watched consan 150 env TRITON_INSTRUMENTATION_MODE=consan CUDA_LAUNCH_BLOCKING=1 "${cases[@]}" # it compiles all kernels anew
    fi
}

choices() {
    timeout 150 python - << 'END' | tee "$out/choice.txt" || status=1
import torch

from fastgpt.choose import choose
from fastgpt.records import Shape

if not torch.cuda.is_available():
    raise SystemExit("choices: there is no CUDA GPU here")
torch.backends.cuda.matmul.allow_tf32 = True
for compiled in (False, True):
    for B, n_embd, n_head in ((16, 768, 12), (4, 1600, 25)):
        print(f"\nn_embd={n_embd}, n_head={n_head}, {'compiled' if compiled else 'eager'}")
        choose("auto", Shape(B, 1024, n_embd, n_head, 50304, bias=False), torch.bfloat16, "cuda", compiled)
END

    timeout 270 python -m fastgpt.cli tune --batch_size 16 --budget 180 --out "$out/tuned.json" | tee "$out/tuned.txt" || status=1
}

case $stage in
    checks | sanitize | choices) "$stage" ;;
    *) echo "there is no stage $stage; they are checks, sanitize and choices" >&2 && exit 2 ;;
esac
exit $status
