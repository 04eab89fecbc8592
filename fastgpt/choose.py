"""`--kernels=auto`: measure each op's implementations on the run's shapes, and choose the fastest that is correct.

A candidate must pass the three-way rule of `verify`. Then its forward and backward are timed. The result is saved in a file,
which holds for one GPU, versions, source, op and shape. PyTorch's implementation is always a candidate.
"""

import functools
import hashlib
import json
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from fastgpt import ops, tuned
from fastgpt.config import cache_folder
from fastgpt.ops import Kernels
from fastgpt.records import Problem, Shape, problem
from fastgpt.verify import compare, run

PARITY_TOKENS = 4096  # the comparison's fp64 side needs many times the memory of the op
ROUNDS, CALLS = 7, 5


def choose(spec: str, shape: Shape, dtype: torch.dtype, device: str | torch.device, compiled: bool) -> Kernels:
    """The Kernels of a --kernels spec for a run's Shape, dtype and device; prints what was measured.

    They use the launch configurations that `fastgpt tune` found for such a run, if any. Without a CUDA GPU "auto" means "torch".
    compiled: whether the run uses torch.compile. Raises UserError for a wrong spec.
    """
    picks = ops.parse(spec)
    auto = [op for op, pick in picks.items() if pick == "auto"]
    if not is_cuda(device) or ops.triton is None:
        return Kernels(**picks | dict.fromkeys(auto, "torch"), rows=())
    rows = tuned.load_rows(shape, dtype, device) if auto or "triton" in picks.values() else ()
    if auto:
        print(f"choosing kernels for {shape.B} x {shape.T} tokens in {str(dtype)[6:]} (once; --kernels=torch skips it)")
        print(f"  {'op':22}" + "".join(f"{i + ' ms':>11}" for i in ("torch", "cudnn", "triton")) + "  chosen")
    for op in auto:
        with torch.random.fork_rng(devices=[device]):  # the run's random numbers stay the same
            found = remembered(op, shape, dtype, device, compiled, rows)
        picks[op] = found["chosen"]
        times = (found["ms"].get(i) for i in ("torch", "cudnn", "triton"))
        why = "".join(f"; {i} {reason}" for i, reason in found["rejected"].items())
        print(
            f"  {op:22}" + "".join(f"{'-':>11}" if t is None else f"{t:11.3f}" for t in times) + f"  {picks[op]}{why}"
        )
    return Kernels(**picks, rows=rows)


def is_cuda(device: str | torch.device) -> bool:
    """Whether a device is a CUDA GPU."""
    return torch.device(device).type == "cuda"


def remembered(
    op: str, shape: Shape, dtype: torch.dtype, device: str | torch.device, compiled: bool, rows: tuple[tuple[str, str], ...] = (),
    measure: Callable | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What `decide` finds, read from the file of an earlier run if there is one with the same key."""
    key = {
        "op": op, "shape": asdict(shape), "dtype": str(dtype), "compiled": compiled, **tuned.environment(device),
        "blas": str(torch.backends.cuda.preferred_blas_library()), "row": dict(rows).get(op, ""),
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    file = cache_folder() / "kernels" / f"{digest}.json"
    try:
        saved = json.loads(file.read_text())
        if saved["key"] == key and saved["chosen"] in ops.IMPLEMENTATIONS[op]:
            return saved
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no file yet, or a damaged one: measure, and overwrite it
    found = {"key": key, **decide(op, shape, dtype, device, compiled, rows, measure or time_together)}
    try:
        tuned.save(file, found)
    except OSError as e:
        print(f"  (not saved for the next run: {file.parent}: {e.strerror})")
    return found


def decide(
    op: str, shape: Shape, dtype: torch.dtype, device: str | torch.device, compiled: bool, rows: tuple[tuple[str, str], ...],
    measure: Callable,
) -> dict[str, Any]:  # fmt: skip
    """Check and time an op's implementations: {"chosen": name, "ms": {name: milliseconds}, "rejected": {name: reason}}."""
    rejected, functions = {}, {}
    tokens = replace(shape, B=max(1, min(shape.B, PARITY_TOKENS // shape.T)), T=min(shape.T, PARITY_TOKENS))
    it = problem(op, shape, dtype, device)
    torch._dynamo.reset()  # all ops compile the same few functions, and torch compiles at most eight versions of one
    for implementation in ops.IMPLEMENTATIONS[op]:
        kernels = Kernels(**{op: implementation}, rows=rows)
        f = prepared(it, kernels, compiled)
        if implementation == "torch":
            f()
        else:
            ops.warn_once.cache_clear()
            try:
                with warnings.catch_warnings():
                    # An op that falls back to PyTorch warns. Such a candidate is rejected, not timed under the wrong name.
                    warnings.filterwarnings("error", message=ops.FALLS_BACK)
                    plain = problem(op, replace(tokens, dropout=0.0), dtype, device)
                    check(plain, functools.partial(plain.by_ops, kernels=kernels))
                    if implementation == "triton" and shape.dropout:  # only the kernel's own mask can be compared
                        dropping = problem(op, tokens, dtype, device)
                        check(dropping, functools.partial(dropping.kernel, row=kernels.row(op)))
                    f()
            except Exception as e:  # any failure rejects the candidate, and is printed
                rejected[implementation] = (str(e).splitlines() or [type(e).__name__])[0]
                continue
        functions[implementation] = f
    ms = measure(functions)
    torch._dynamo.reset()
    return {"chosen": min(ms, key=ms.get), "ms": ms, "rejected": rejected}


def check(it: Problem, f: Callable) -> None:
    """Check a function of a Problem against the three-way rule. Raises ArithmeticError that says by how much it fails."""
    for c in compare(f, it.reference, it.inputs, it.outputs, it.grads):
        if not c.holds:
            raise ArithmeticError(f"is not equal: {c.what} has {c.ratio:.1f} times PyTorch's error")


def prepared(it: Problem, kernels: Kernels, compiled: bool) -> Callable[[], Any]:
    """A function without arguments that runs a Problem's op, forward and backward, as training with these Kernels does."""
    call = it.timed or it.by_ops  # only the update has `timed`, and it is never compiled
    call = functools.partial(call, kernels=kernels)
    call = torch.compile(call, dynamic=False) if compiled and not it.timed else call
    if ops.triton and "head" in it.outputs:  # the loss's backward marks the head's gradient so
        ops.triton.accumulate.mark_owned(it.grads[it.outputs.index("head")])  # type: ignore[arg-type]
    return lambda: run(call, it.inputs.values(), it.grads)


def time_together(functions: dict[Any, Callable]) -> dict[Any, float]:
    """Median milliseconds of each function on the GPU."""
    return {name: statistics.median(times) for name, times in time_rounds(functions).items()}


def time_rounds(functions: dict[Any, Callable]) -> dict[Any, list[float]]:
    """{name: [milliseconds on the GPU, one for each round]}. Every round runs all functions, so they share clock rates and heat."""
    times = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, f in functions.items():
            f()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(CALLS):
                f()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) / CALLS)
    return times
