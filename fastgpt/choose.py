"""`--kernels=auto`: measure each op's implementations on the run's shapes, and choose the fastest that is correct.

A candidate must pass the three-way rule of `verify`. Then its forward and backward are timed as a micro-step runs them. What was measured
is saved in a file, which holds for one GPU, versions, source, op and shape. A launch configuration that was tuned must pass the rule too.
"""

import functools
import hashlib
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fastgpt import files, ops, timing, tuned
from fastgpt.config import cache_folder
from fastgpt.ops import Kernels
from fastgpt.records import RECORDS, Problem, Shape, problem
from fastgpt.timing import Times
from fastgpt.verify import compare, is_floating

PARITY_TOKENS = 4096  # the comparison's fp64 side needs many times the memory of the op
N_LAYER = 12  # of the step whose GPU and host time are weighed against each other: deep enough for any model
COPIES = 16  # of an op's inputs, at most, to be more than L2 holds


def choose(
    spec: str, shape: Shape, dtype: torch.dtype, device: str | torch.device, compiled: bool, replayed: bool = False
) -> Kernels:  # fmt: skip
    """The Kernels of a --kernels spec for a run's Shape, dtype and device; prints what was measured.

    They use the launch configurations that `fastgpt tune` found for such a run, if any. Without a CUDA GPU "auto" means "torch".
    compiled: whether the run uses torch.compile. replayed: whether it replays CUDA graphs, which take no host time. Raises UserError for a
    wrong spec, and torch.OutOfMemoryError if no implementation of an op fits.
    """
    picks = ops.parse(spec)
    auto = [op for op, pick in picks.items() if pick == "auto"]
    if not is_cuda(device) or ops.triton is None:
        if auto and is_cuda(device):
            print("--kernels=auto: PyTorch's operators, since Triton is not installed; pip install triton")
        return Kernels(**picks | dict.fromkeys(auto, "torch"), rows=())
    wanted = [op for op, pick in picks.items() if pick in ("auto", "triton")]
    rows = tuned.load_rows(shape, dtype, device) if wanted else ()
    with torch.random.fork_rng(devices=[device] * bool(rows)):  # the run's random numbers stay the same
        rows = tuple((op, row) for op, row in rows if op in wanted and passes(op, row, shape, dtype, device))
    if not auto:
        return Kernels(**picks, rows=rows)
    print(f"choosing kernels for {shape.B} x {shape.T} tokens in {str(dtype)[6:]} (once; --kernels=torch skips it)")
    with torch.random.fork_rng(devices=[device]):
        found = {op: remembered(op, shape, dtype, device, compiled, rows) for op in auto}
    chosen, judged_by = fastest({op: f["ms"] for op, f in found.items()}, replayed)
    implementations = ("torch", "cudnn", "triton")
    print(f"  {'op':22}" + "".join(f"{i + ' ms':>11}{'host ms':>9}" for i in implementations) + "  chosen")
    for op in auto:
        cells = "".join(
            f"{found[op]['ms'][i].gpu:11.3f}{found[op]['ms'][i].host:9.3f}" if i in found[op]["ms"] else f"{'-':>11}{'-':>9}"
            for i in implementations
        )  # fmt: skip
        why = "".join(f"; {i} {reason}" for i, reason in found[op]["rejected"].items())
        print(f"  {op:22}{cells}  {chosen[op]}{why}")
    print(f"  chosen by the {judged_by}'s time, which decides in such a step")
    return Kernels(**picks | chosen, rows=rows)


def fastest(ms: dict[str, dict[str, Times]], replayed: bool) -> tuple[dict[str, str], str]:
    """({op: implementation}, "GPU" or "host") of {op: {implementation: Times}}.

    The host launches while the GPU computes, so a step takes the longer of the two. In replays of CUDA graphs that is always the GPU.
    """

    def chosen(which):
        return {op: min(times, key=lambda i: getattr(times[i], which)) for op, times in ms.items()}

    picks = chosen("gpu")
    calls = {op: RECORDS[op].times(N_LAYER) for op in ms}
    gpu, host = (sum(calls[op] * getattr(ms[op][picks[op]], which) for op in ms) for which in ("gpu", "host"))
    return (picks, "GPU") if replayed or gpu >= host else (chosen("host"), "host")


def is_cuda(device: str | torch.device) -> bool:
    """Whether a device is a CUDA GPU."""
    return torch.device(device).type == "cuda"


def remembered(
    op: str, shape: Shape, dtype: torch.dtype, device: str | torch.device, compiled: bool, rows: tuple[tuple[str, str], ...] = (),
    measure: Callable | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What `measured` gives, read from the file of an earlier run if there is one with the same key."""
    key = {
        "op": op, "shape": asdict(shape), "dtype": str(dtype), "compiled": compiled, **tuned.environment(device),
        "blas": str(torch.backends.cuda.preferred_blas_library()), "row": dict(rows).get(op, ""),
    }  # fmt: skip
    found = recall("kernels", key, functools.partial(as_measured, op))
    if found is None:  # no file yet, or one that is not right: it is overwritten
        found = measured(op, shape, dtype, device, compiled, rows, measure or timing.together)
        remember("kernels", key, found)
    return found


def as_measured(op: str, saved: dict[str, Any]) -> dict[str, Any]:
    """What `measured` gave, of what was kept of it. Raises ValueError that says what cannot be."""
    ms, rejected = saved.get("ms"), saved.get("rejected")
    if type(ms) is not dict or type(rejected) is not dict or not ms:
        raise ValueError(f"of {op} it has no times")
    if sorted([*ms, *rejected]) != sorted(ops.IMPLEMENTATIONS[op]):
        raise ValueError(f"of {op} it does not have each implementation once, with its times or why it was rejected")
    for name, times in ms.items():
        if type(times) is not list or len(times) != len(Times._fields) or not all(is_time(t) for t in times):
            raise ValueError(f"of {op} the times of {name} are none")
    if not all(type(why) is str for why in rejected.values()):
        raise ValueError(f"of {op} it does not say why one was rejected")
    return {"ms": {name: Times(*times) for name, times in ms.items()}, "rejected": rejected}


def is_time(t: Any) -> bool:
    """Whether a value that was read is a time in milliseconds."""
    return type(t) in (int, float) and 0 <= t < 1e9


def passes(op: str, row: str, shape: Shape, dtype: torch.dtype, device: str | torch.device) -> bool:
    """Whether an op with a tuned row is equal to PyTorch's on this device. It is tried once, and then remembered. Prints why, if not."""
    key = {"op": op, "row": row, "shape": asdict(shape), "dtype": str(dtype), **tuned.environment(device)}
    if recall("parity", key, lambda saved: saved.get("holds")) is True:
        return True
    ops.warn_once.cache_clear()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=ops.FALLS_BACK)
            check_small(op, shape, dtype, device, "triton", Kernels(**{op: "triton"}, rows=((op, row),)))
    except Exception as e:  # whatever is wrong with a row, there is the shipped one
        why = (str(e).splitlines() or [type(e).__name__])[0]
        print(
            f"launch configurations: of {tuned.path(shape, dtype, device)} {op} is not taken; it was tried, and {why}"
        )
        return False
    remember("parity", key, {"holds": True})
    return True


def recall(kind: str, key: dict[str, Any], valid: Callable[[dict[str, Any]], Any]) -> Any:
    """What `remember` kept under a key, as valid(what the file holds) gives it; None if there is nothing.

    If `valid` raises ValueError, or the file cannot be read or is another's, a line says so.
    """
    file = kept(kind, key)
    try:
        saved = files.read_json(file)
        if type(saved) is not dict or saved.get("key") != key:
            raise ValueError("it is damaged")
        return valid(saved)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        if isinstance(e, files.NotOurs):  # all that is kept, then
            files.say_once(f"what earlier runs measured is not taken: {e.strerror}")
        else:
            print(f"{file} is not taken: {getattr(e, 'strerror', None) or e}")
        return None


def remember(kind: str, key: dict[str, Any], found: dict[str, Any]) -> None:
    """Keep a result for later runs, under everything that it depends on. Prints why, if it cannot be saved."""
    file = kept(kind, key)
    try:
        files.write_json(file, {"key": key, **found})
    except OSError as e:
        files.say_once(f"  (not saved for the next run: {file.parent}: {e.strerror})")


def kept(kind: str, key: dict[str, Any]) -> Path:
    """The file of a result."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / kind / f"{digest}.json"


def measured(
    op: str, shape: Shape, dtype: torch.dtype, device: str | torch.device, compiled: bool, rows: tuple[tuple[str, str], ...],
    measure: Callable,
) -> dict[str, Any]:  # fmt: skip
    """Check and time an op's implementations: {"ms": {implementation: Times}, "rejected": {implementation: reason}}.

    Raises what the last one raised if none can run.
    """
    rejected, calls, failure = {}, {}, None
    it = problem(op, shape, dtype, device)
    torch._dynamo.reset()  # all ops compile the same few functions, and torch compiles at most eight versions of one
    for implementation in ops.IMPLEMENTATIONS[op]:
        kernels = Kernels(**{op: implementation}, rows=rows)
        ops.warn_once.cache_clear()
        try:
            with warnings.catch_warnings():
                # An op that falls back to PyTorch warns. Such a candidate is rejected, not timed under the wrong name.
                warnings.filterwarnings("error", message=ops.FALLS_BACK)
                check_small(op, shape, dtype, device, implementation, kernels)
                prepared_calls = prepared(it, kernels, compiled)
                prepared_calls[0]()
            calls[implementation] = prepared_calls
        except Exception as e:  # any failure rejects the candidate, and is printed
            failure, rejected[implementation] = e, (str(e).splitlines() or [type(e).__name__])[0]
    ms = {}
    try:
        ms = measure(calls)
    except torch.OutOfMemoryError:  # side by side they do not fit: one after the other
        for implementation in calls:
            try:
                ms |= measure({implementation: calls[implementation]})
            except torch.OutOfMemoryError as e:
                failure, rejected[implementation] = e, str(e).splitlines()[0]
    torch._dynamo.reset()
    if failure and not ms:
        raise failure
    return {"ms": ms, "rejected": rejected}


def check_small(
    op: str, shape: Shape, dtype: torch.dtype, device: str | torch.device, implementation: str, kernels: Kernels
) -> None:  # fmt: skip
    """Check an implementation of an op on a part of a Shape's tokens, against the three-way rule. Raises ArithmeticError."""
    tokens = replace(shape, B=max(1, min(shape.B, PARITY_TOKENS // shape.T)), T=min(shape.T, PARITY_TOKENS))
    if implementation != "torch":
        plain = problem(op, replace(tokens, dropout=0.0), dtype, device)
        check(plain, functools.partial(plain.by_ops, kernels=kernels))
    if implementation == "triton" and shape.dropout:  # only the kernel's own mask can be compared
        dropping = problem(op, tokens, dtype, device)
        check(dropping, functools.partial(dropping.kernel, row=kernels.row(op)))


def check(it: Problem, f: Callable) -> None:
    """Check a function of a Problem against the three-way rule. Raises ArithmeticError that says by how much it fails."""
    for c in compare(f, it.reference, it.inputs, it.outputs, it.grads):
        if not c.holds:
            raise ArithmeticError(f"is not equal: {c.what} has {c.ratio:.1f} times PyTorch's error")


def prepared(it: Problem, kernels: Kernels, compiled: bool) -> list[Callable[[], None]]:
    """Functions without arguments that run a Problem's op, forward and backward, as a micro-step with these Kernels does.

    Each has inputs of its own. Together they are more than L2 holds, so that none finds its inputs there.
    """
    if it.timed:  # the update, which is never compiled, and whose tensors exceed every L2
        return [functools.partial(it.timed, *it.inputs.values(), kernels=kernels)]
    call: Callable = functools.partial(it.by_ops, kernels=kernels)
    call = torch.compile(call, dynamic=False) if compiled else call
    tensors: list[Any] = [t for t in (*it.inputs.values(), *it.grads) if torch.is_tensor(t)]
    L2 = torch.cuda.get_device_properties(tensors[0].device).L2_cache_size if tensors[0].is_cuda else 0
    copies = min(COPIES, max(1, math.ceil(2 * L2 / sum(t.nbytes for t in tensors))))
    shadowed = "triton" in (getattr(kernels, op) for op in ops.OPS)
    return [micro_step(it, call, shadowed) for _ in range(copies)]


def micro_step(it: Problem, call: Callable, shadowed: bool) -> Callable[[], None]:
    """call(*inputs) and its backward as in a micro-step, on copies of a Problem's tensors.

    Matrices have shadows, if `shadowed`. The gradients of parameters are added to `.grad`, and other gradients go on to another op.
    Nothing else holds the gradient of the tied head.
    """
    inputs: dict[str, Any] = {
        n: x.detach().clone().requires_grad_(is_floating(x)) if torch.is_tensor(x) else x for n, x in it.inputs.items()
    }
    grads = [None if g is None else g.clone() for g in it.grads]
    dtypes = {g.dtype for g in grads if g is not None} | {x.dtype for x in inputs.values() if x is not None}
    half = next((dtype for dtype in dtypes if dtype.itemsize == 2), None)
    flowing = [inputs[name] for name in it.flowing]
    for name, x in inputs.items():
        if is_floating(x) and name not in it.flowing:
            x.grad = torch.zeros_like(x)
        if shadowed and half and is_floating(x) and x.dim() == 2:
            x.shadow = x.detach().to(half)
    one = torch.ones((), device=next(iter(inputs.values())).device)

    def run():
        for x in flowing:
            x.grad = None
        outputs = call(*inputs.values())
        answers = [
            _Give.apply(o, g, name == "head") for name, o, g in zip(it.outputs, outputs, grads, strict=True) if g is not None
        ]  # fmt: skip
        with ops.accumulate_in_place():
            torch.autograd.backward(answers, [one] * len(answers))

    return run


class _Give(torch.autograd.Function):
    """A scalar whose backward gives a tensor the gradient `grad`, in a tensor that nothing else holds if `owned`."""

    @staticmethod
    def forward(ctx, x, grad, owned):
        ctx.grad, ctx.owned = grad, owned
        return torch.empty((), device=x.device)

    @staticmethod
    def backward(ctx, _):
        grad = ctx.grad.detach()  # another tensor on the same memory
        return ops.triton.accumulate.mark_owned(grad) if ctx.owned else grad, None, None
