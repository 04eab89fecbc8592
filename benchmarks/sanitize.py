"""Every op once, forward and backward, at small sizes: a sanitizer slows kernels down a hundredfold, and can still watch this to its end.

    python -m benchmarks.sanitize                                         a line for each case, and one with the number that ran
    python -m benchmarks.sanitize --short                                 two cases of each op
    TRITON_INSTRUMENTATION_MODE=consan python -m benchmarks.sanitize      the same under ConSan, Triton's sanitizer

Nothing is compared with PyTorch; `fastgpt verify` does that. An error is what a sanitizer reports. On a GPU cases run in bf16. Without one
they run through the interpreter in fp16, which tries the list of cases. `benchmarks/on_gpu.sh sanitize` runs the short list under
each sanitizer.

ConSan asserts, before each access to shared memory, that no copy or matrix product still uses it. It needs sm_90. Triton 3.6 compiles it
into all kernels. Triton 3.7 fails where wgmma's operands come from shared memory: on sm_90 in the MLP and in attention.

The exit status is 1 if a case failed, and 3 if the sanitizer cannot check anything here. The last line says why.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from fastgpt import ops
from fastgpt.cli import reported
from fastgpt.records import Shape, problem
from fastgpt.verify import run, where

# Vocabularies are multiples of 64. Of others loss_rows reads padding that nobody has written, which initcheck would report.
WHOLE = Shape(1, 256, 256, 4, 512)  # every tile is full
PARTIAL = Shape(1, 203, 200, 5, 576, bias=False)  # tiles at an edge are not
FAILED, NOT_RUN = 1, 3  # exit statuses
CANNOT_COMPILE = "PassManager::run failed"
ASSERTION = "Buffer being accessed has outstanding"  # the beginning of an assertion of ConSan's in a kernel's code


def cases(short=False):
    """(op, what is special, Shape) of each case; `short`: of two for each op."""
    for op in ops.OPS:
        yield op, "whole tiles", WHOLE
        yield op, "partial tiles", PARTIAL
        if short:
            continue
        if op in ("embedding", "layer_norm", "attention"):
            yield op, "dropout", replace(PARTIAL, dropout=0.2)
        if op in ("embedding", "layer_norm"):
            yield op, "16-bit stream", replace(WHOLE, narrow_residual=True)
        if op == "attention":
            yield op, "doc_mask", replace(PARTIAL, doc_mask=True)
            yield op, "heads of 128", replace(WHOLE, n_head=2)
        if op == "gelu_mlp":
            yield op, "unaligned rows", replace(PARTIAL, n_embd=205)
            yield op, "many tiles", replace(WHOLE, B=16)  # 256 of 128 x 128: a program computes one after another
        if op == "linear_cross_entropy":
            yield op, "blocks of a row", replace(PARTIAL, vocab_size=8256)


def run_cases(dtype, device, short):
    """((op, what is special), the error in which the case ended, or "") of each case.

    On a GPU they run from as many threads as there are cores: nearly all of the time is compiling.
    """
    gpu = device == "cuda"

    def run_case(case):
        op, what, shape = case
        try:
            with torch.autograd.set_multithreading_enabled(
                False
            ):  # the backward in this thread, which has an allocator
                it = problem(op, shape, dtype, device)
                run(it.kernel, it.inputs.values(), it.grads)
            if gpu:
                torch.cuda.synchronize()  # here a kernel's error is raised
            return (op, what), ""
        except Exception as e:  # of any kind: it belongs into this case's line
            return (op, what), str(e) or type(e).__name__

    with ThreadPoolExecutor(os.cpu_count() if gpu else 1, initializer=set_allocator if gpu else None) as pool:
        yield from pool.map(run_case, cases(short))


def set_allocator():
    """Give kernels that this thread launches the memory that they ask for: ConSan's do."""
    import triton

    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))


def find_checked(names):
    """From now on, add to `names` each kernel that is compiled, or comes from the cache, with ConSan's assertions."""
    import triton

    def listen(metadata, metadata_group, **_):
        code = next(path for file, path in metadata_group.items() if file.endswith(".llir"))
        if ASSERTION in Path(code).read_text():
            names.add(metadata["name"].strip("_"))

    triton.knobs.compilation.listener = listen


def why_not(mode, gpu):
    """Why Triton's sanitizer of this name cannot check anything here; "" if it can."""
    if mode != "consan":
        return f"there is no sanitizer {mode}"
    if not gpu:
        return "ConSan is compiled into kernels, and without a CUDA GPU none is compiled"
    major, minor = torch.cuda.get_device_capability()  # below sm_90 the compiler would end this process
    return "" if major >= 9 else f"ConSan's assertions need sm_90, and this is sm_{major}{minor}"


def sanitize(short=False):
    """Run the cases, or the short list, under the sanitizer that TRITON_INSTRUMENTATION_MODE names: the exit status. Raises UserError
    where no kernel can run."""
    gpu = torch.cuda.is_available()
    mode, checked, left_out = os.environ.get("TRITON_INSTRUMENTATION_MODE", ""), set(), set()
    print(where(gpu)[1])
    if mode and (reason := why_not(mode, gpu)):
        print(f"not run: {reason}")
        return NOT_RUN
    if mode:
        find_checked(checked)
    said = []
    for (op, what), error in run_cases(*((torch.bfloat16, "cuda") if gpu else (torch.float16, "cpu")), short):
        if mode and CANNOT_COMPILE in error:
            left_out.add(op)
            said.append("not run: ConSan does not compile")
        else:
            said.append(f"FAILED: {error.splitlines()[0]}" if error else "ran")
        print(f"{op:22}{what:16}{said[-1]}", flush=True)
    if failed := sum(s.startswith("FAILED") for s in said):
        print(f"failed: {failed} of {len(said)} cases")
        return FAILED
    limit = f"; ConSan of Triton {version('triton')} does not compile {', '.join(sorted(left_out))}" if left_out else ""
    if mode and not checked:
        print(f"not run: no kernel has anything that ConSan checks{limit}")
        return NOT_RUN
    found = f"; assertions in {', '.join(sorted(checked))}" if mode else ""
    print(f"ran {said.count('ran')} of {len(said)} cases{found}{limit}")
    return 0


if __name__ == "__main__":
    sys.exit(reported(lambda: sanitize("--short" in sys.argv[1:])))
