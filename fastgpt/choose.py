"""`--kernels=auto`: for each op the fastest implementation that is shown equal, on the shapes of the run.

Every candidate is held to the three-way rule of `verify`, then timed forward and backward, once; what was found is kept in a
file, by GPU, versions, source, op and shape. Never slower: PyTorch's own implementation is a candidate everywhere.
"""

import hashlib
import json
import statistics
import warnings
from dataclasses import asdict, replace

import torch

from fastgpt import ops, tuned
from fastgpt.config import cache_folder
from fastgpt.verify import compare, problem, run

PARITY_TOKENS = 4096  # the fp64 side of the comparison takes the memory of many times as much
ROUNDS, CALLS = 7, 5


def choose(spec, shape, dtype, device, compiled):
    """{op: implementation} for a --kernels spec and a run's Shape, dtype and device; prints what was measured.

    Kernels run by the launch configurations that `fastgpt tune` found for such a run, where it did, from here on.
    Without a CUDA GPU, "auto" is "torch": nothing there is to be won. compiled: whether the run is under torch.compile.
    Raises UserError for a wrong spec.
    """
    picks = ops.parse(spec)
    auto = [op for op, pick in picks.items() if pick == "auto"]
    if not is_cuda(device) or not has_triton():
        return picks | dict.fromkeys(auto, "torch")
    if auto or "triton" in picks.values():
        tuned.take(shape, dtype, device)
    if auto:
        print(f"choosing kernels for {shape.B} x {shape.T} tokens in {str(dtype)[6:]} (once; --kernels=torch skips it)")
        print(f"  {'op':22}" + "".join(f"{i + ' ms':>11}" for i in ("torch", "cudnn", "triton")) + "  chosen")
    for op in auto:
        with torch.random.fork_rng(devices=[device]):  # the run draws what it would have drawn
            found = remembered(op, shape, dtype, device, compiled)
        picks[op] = found["chosen"]
        times = (found["ms"].get(i) for i in ("torch", "cudnn", "triton"))
        why = "".join(f"; {i} {reason}" for i, reason in found["rejected"].items())
        print(
            f"  {op:22}" + "".join(f"{'-':>11}" if t is None else f"{t:11.3f}" for t in times) + f"  {picks[op]}{why}"
        )
    return picks


def is_cuda(device):
    """Whether there is something to be won by kernels."""
    return str(device).startswith("cuda")


def has_triton():
    """Whether the kernels can be imported."""
    try:
        return all(ops.kernels(op) for op in ops.KERNELS)
    except ImportError:
        return False


def remembered(op, shape, dtype, device, compiled, measure=None):
    """What `decide` finds, from the file of an earlier run where everything that matters is the same."""
    key = {
        "op": op, "shape": asdict(shape), "dtype": str(dtype), "compiled": compiled, **tuned.here(device),
        "blas": str(torch.backends.cuda.preferred_blas_library()),
        "tuned": repr(ops.configs().tuned.get(tuned.lookup(op, shape, dtype, device))),
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    file = cache_folder() / "kernels" / f"{digest}.json"
    try:
        saved = json.loads(file.read_text())
        if saved["key"] == key and saved["chosen"] in ops.IMPLEMENTATIONS[op]:
            return saved
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or a damaged one: it is measured anew and overwritten
    found = {"key": key, **decide(op, shape, dtype, device, compiled, measure or time_together)}
    try:
        tuned.save(file, found)
    except OSError as e:
        print(f"  (not kept for the next run: {file.parent}: {e.strerror})")
    return found


def decide(op, shape, dtype, device, compiled, measure):
    """{"chosen": implementation, "ms": {implementation: time}, "rejected": {implementation: why}} of an op."""
    rejected, functions = {}, {}
    tokens = replace(shape, B=max(1, min(shape.B, PARITY_TOKENS // shape.T)), T=min(shape.T, PARITY_TOKENS))
    it = problem(op, shape, dtype, device)
    before = dict(ops.chosen)
    torch._dynamo.reset()  # all ops compile the same few functions: past eight versions of one, torch would run it eagerly
    for implementation in ops.IMPLEMENTATIONS[op]:
        ops.use({op: implementation})
        f = prepared(op, implementation, it, compiled)
        if implementation == "torch":
            f()
        else:
            ops.warn_once.cache_clear()
            try:
                with warnings.catch_warnings():
                    # What falls back to PyTorch warns of it: it is no candidate, and not to be timed under another's name.
                    warnings.filterwarnings("error", message=ops.FALLS_BACK)
                    check(op, replace(tokens, dropout=0.0), dtype, device, "chosen")
                    if implementation == "triton" and shape.dropout:  # with the mask, which only the kernel can tell
                        check(op, tokens, dtype, device, "kernel")
                    f()
            except Exception as e:  # whatever stops a candidate is said, and the run goes on without it
                rejected[implementation] = (str(e).splitlines() or [type(e).__name__])[0]
                continue
        functions[implementation] = f
    ms = measure(functions)
    ops.use(before)
    torch._dynamo.reset()
    return {"chosen": min(ms, key=ms.get), "ms": ms, "rejected": rejected}


def check(op, shape, dtype, device, which):
    """Hold an implementation to the three-way rule. Raises ArithmeticError that says by how much it fails."""
    it = problem(op, shape, dtype, device)
    for c in compare(getattr(it, which), it.reference, it.inputs, it.outputs, it.grads):
        if not c.holds:
            raise ArithmeticError(f"is not equal: {c.what} has {c.ratio:.1f} times PyTorch's error")


def prepared(op, implementation, it, compiled):
    """A function of no arguments that runs an op forward and backward as the run would."""
    call = it.timed  # the update, which is never compiled
    if call is None:
        call = torch.compile(it.chosen, dynamic=False) if compiled else it.chosen
    if op == "embedding":  # the head's gradient comes marked as the loss's backward marks it
        it.grads[1].is_fastgpts = True

    def f():
        if ops.chosen[op] != implementation:
            ops.use({op: implementation})
        run(call, it.inputs.values(), it.grads)

    return f


def time_together(functions):
    """Median milliseconds of each function on the GPU."""
    return {name: statistics.median(times) for name, times in time_rounds(functions).items()}


def time_rounds(functions):
    """Milliseconds of each function on the GPU, one for each round: all in turn in a round, so that clocks and heat are shared."""
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
