"""Every op once, forward and backward, at small sizes: what a sanitizer can watch to its end, though kernels then run 100 times slower.

    python -m benchmarks.sanitize                                         a line for each case, and one that says how many ran
    TRITON_INSTRUMENTATION_MODE=consan python -m benchmarks.sanitize      the same under a sanitizer of Triton's; or fpsan

Nothing is compared with PyTorch, as `fastgpt verify` does that: an error is what a sanitizer reports. On a GPU in bf16; else through
the interpreter in fp16, to try the list. `benchmarks/on_gpu.sh sanitize` runs it under each sanitizer.

ConSan puts assertions before each access to shared memory that a copy or a matrix product may still be using. It needs sm_90.
Triton 3.6 and 3.9 compile it into all kernels; 3.7 and 3.8 fail where wgmma's operands come from shared memory: on sm_90 that is
the MLP and attention. FpSan, from Triton 3.8 on, replaces floats by integers modulo a power of two, matrix products too: a sum does
not depend on its order, and no number means anything. So each case runs a second time, with twice the warps and nothing pipelined,
and must give the same bits; a value that was read too early or from a wrong place changes them.

The exit status is 1 if a case failed, and 3 if the sanitizer cannot check anything here. The last line says why.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path

import torch

from fastgpt import ops
from fastgpt.cli import reported
from fastgpt.tuned import lookup
from fastgpt.verify import Shape, problem, run, where

# Vocabularies are multiples of 64: of others loss_rows reads padding that nobody has written, which initcheck would report.
WHOLE = Shape(1, 256, 256, 4, 512)  # every tile is full
PARTIAL = Shape(1, 203, 200, 5, 576, bias=False)  # those at an edge are not
FAILED, NOT_RUN = 1, 3  # exit statuses
CANNOT_COMPILE = "PassManager::run failed"
ASSERTION = "Buffer being accessed has outstanding"  # how one of ConSan's begins, in every kernel that it checks


def cases(mode=""):
    """(op, what it has, Shape) of each case; of FpSan's the two that every op has: it compiles attention's backward for a minute."""
    for op in ops.KERNELS:
        yield op, "whole tiles", WHOLE
        yield op, "partial tiles", PARTIAL
        if mode == "fpsan":
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
            yield op, "tile after tile", replace(WHOLE, B=16)  # 256 of 128 x 128: more than a GPU has SMs
        if op == "linear_cross_entropy":
            yield op, "blocks of a row", replace(PARTIAL, vocab_size=8256)


def run_cases(cases, dtype, device):
    """For each case in turn its outputs and gradients, or the exception that it ended in.

    On a GPU they run from as many threads as there are cores: nearly all of the time is compiling.
    """

    def run_case(case):
        op, _, shape = case
        try:
            with torch.autograd.set_multithreading_enabled(
                False
            ):  # the backward in this thread, which has an allocator
                it = problem(op, shape, dtype, device)
                tensors = run(it.kernel, it.inputs.values(), it.grads)
            if device == "cuda":
                torch.cuda.synchronize()  # here a kernel's error is raised
            return tensors
        except Exception as e:  # whatever it is, it belongs into this case's line
            return e

    gpu = device == "cuda"
    with ThreadPoolExecutor(os.cpu_count() if gpu else 1, initializer=set_allocator if gpu else None) as pool:
        yield from pool.map(run_case, cases)


def set_allocator():
    """Give kernels that this thread launches the memory that they ask for: ConSan's do, in Triton 3.6 and 3.7."""
    import triton

    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))


def find_checked(names):
    """Add to `names` each kernel that has ConSan's assertions, when it is compiled or comes from the cache."""
    import triton

    def listen(metadata, metadata_group, **_):
        code = next(path for file, path in metadata_group.items() if file.endswith(".llir"))
        if ASSERTION in Path(code).read_text():
            names.add(metadata["name"].strip("_"))

    triton.knobs.compilation.listener = listen


def use_other_rows(cases, dtype, device):
    """Launch each case's kernels with twice the warps from now on, and with nothing pipelined."""
    configs, rows = ops.configs(), {}
    for op, _, shape in cases:
        if key := lookup(op, shape, dtype, device):
            row = getattr(configs, key[0])(*key[1:])
            names = [f.name for f in fields(row)]
            changed = {n: 2 * getattr(row, n) for n in names if "warps" in n} | {n: 1 for n in names if "stages" in n}
            rows[key] = replace(row, **changed)
    configs.use(rows)


def same_bits(tensors, others):
    """Whether two runs gave the same bytes; FpSan's nan is a number like others."""
    pairs = zip(tensors, others, strict=True)
    return all(torch.equal(*(t.reshape(-1).view(torch.uint8) for t in pair)) for pair in pairs)


def why_not(mode, device):
    """Why Triton's sanitizer of this name cannot check anything on the device; "" if it can."""
    if device != "cuda":
        return f"{mode} is compiled into kernels, and without a CUDA GPU none is compiled"
    if mode == "consan":
        major, minor = torch.cuda.get_device_capability()  # below sm_90 the compiler would end this process
        return "" if major >= 9 else f"ConSan's assertions need sm_90, and this is sm_{major}{minor}"
    from triton._C.libtriton import passes

    known = mode == "fpsan" and hasattr(passes.ttgpuir, "add_fp_sanitizer")  # Triton ignores what it does not know
    return "" if known else f"Triton {version('triton')} has no {mode}"


def sanitize():
    """Run the cases, under the sanitizer that TRITON_INSTRUMENTATION_MODE names: the exit status. Raises UserError where no
    kernel can run."""
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float16)
    mode, checked, left = os.environ.get("TRITON_INSTRUMENTATION_MODE", ""), set(), set()
    print(where(gpu))
    if mode and (reason := why_not(mode, device)):
        print(f"not run: {reason}")
        return NOT_RUN
    if mode == "consan":
        find_checked(checked)
    chosen = list(cases(mode))
    before = [None] * len(chosen)
    if mode == "fpsan":
        before = list(run_cases(chosen, dtype, device))
        use_other_rows(chosen, dtype, device)
    failed = skipped = 0
    for (op, what, _), *results in zip(chosen, run_cases(chosen, dtype, device), before, strict=True):
        error = next((str(r) or type(r).__name__ for r in results if isinstance(r, Exception)), "")
        said = "ran"
        if mode == "consan" and CANNOT_COMPILE in error:
            skipped += 1
            left.add(op)
            said = "not run: ConSan does not compile"
        elif error:
            said = f"FAILED: {error.splitlines()[0]}"
        elif mode == "fpsan" and not same_bits(*results):
            said = "FAILED: other bits with twice the warps and nothing pipelined"
        failed += said.startswith("FAILED")
        print(f"{op:22}{what:16}{said}", flush=True)
    if failed:
        print(f"failed: {failed} of {len(chosen)} cases")
        return FAILED
    limit = f"; ConSan of Triton {version('triton')} does not compile {', '.join(sorted(left))}" if left else ""
    if mode == "consan" and not checked:
        print(f"not run: no kernel has anything that ConSan checks{limit}")
        return NOT_RUN
    by = {
        "consan": f"; assertions in {', '.join(sorted(checked))}",
        "fpsan": ", each twice with the same bits; matrix products were FpSan's own, of integers",
    }
    print(f"ran {len(chosen) - skipped} of {len(chosen)} cases{by.get(mode, '')}{limit}")
    return 0


if __name__ == "__main__":
    sys.exit(reported(sanitize))
