"""`fastgpt tune`: the fastest launch configuration of each op on this GPU, at a run's shapes.

Around the shipped row of an op `configs.GRIDS` are walked one by one, from what the last has found. A candidate is held to `verify`'s
rule at a small size, then all that hold are timed in turn, round by round. At the end of an op the best is timed beside the
shipped row once more, since the least of many times is low by luck: it is kept where it is faster in every round, and by 1% in
the median. What is kept is in a file, which later runs take (`tuned`). Last, the matrix products that are a library's are timed by
cuBLAS and by cuBLASLt; which of them runs is PyTorch's setting for a whole process, so it is said, and not taken.
"""

import contextlib
import functools
import statistics
from dataclasses import asdict, fields, replace
from pathlib import Path
from time import monotonic

import torch

from fastgpt import ops, tuned
from fastgpt.choose import check, is_cuda, prepared, time_rounds
from fastgpt.config import UserError
from fastgpt.distributed import check_device
from fastgpt.ops import Kernels
from fastgpt.records import RECORDS, Shape, problem

# Sequences and tokens that a candidate is checked at: whole and partial tiles; and a multiple of 16 as in most runs, since
# Triton compiles other sizes on their own.
SMALL = 2, 528
GAIN = 0.99  # the most of the shipped row's time that is worth another
PRODUCTS = "products"  # not an op: the matrix products that a library computes


def tune(cfg, measure=time_rounds):
    """Search as a TuneConfig says, print a line for each op, and write the file. Raises UserError where it cannot."""
    c, dtype, device = cfg.gpt_config(), getattr(torch, cfg.dtype), cfg.device
    times = {op: record.times(c.n_layer) for op, record in RECORDS.items() if record.row}
    chosen = list(dict.fromkeys(map(str.strip, cfg.only.split(",")))) if cfg.only else [*times, PRODUCTS]
    for op in chosen:
        if op not in times and op != PRODUCTS:
            raise UserError(f"--only={cfg.only}: {op!r} is none of {', '.join(times)}, {PRODUCTS}")
    needs_gpu(device)
    shape = Shape.of(
        cfg.batch_size, c, dropout=cfg.dropout, doc_mask=cfg.doc_mask, narrow_residual=cfg.residual == "bf16"
    )
    file = Path(cfg.out) if cfg.out else tuned.path(shape, dtype, device)

    def write(op=None, found=None):
        """Add what was found for an op to the file, beside what others found meanwhile. Raises UserError where it cannot be written."""
        report = {"where": tuned.conditions(shape, dtype, device), "ops": {}}
        with contextlib.suppress(OSError, ValueError):  # else there is nothing to add to
            report, _ = tuned.read(file, shape, dtype, device)
        if op is not None:
            (report if op == PRODUCTS else report["ops"])[op] = found
        try:
            tuned.save(file, report)
        except (OSError, ValueError) as e:
            raise UserError(f"--out={file}: {getattr(e, 'strerror', None) or e}") from None

    write()  # before the work
    print(
        f"tuning for {shape.B} x {shape.T} tokens in {cfg.dtype} on {tuned.conditions(shape, dtype, device)['gpu']}, {cfg.budget} s"
    )
    deadline = monotonic() + cfg.budget
    shares = {op: times[op] * shipped_ms(op, shape, dtype, device, measure) for op in chosen if op != PRODUCTS}
    print(f"  {'op':22}{'shipped ms':>11}{'best ms':>9}{'ratio':>7}  configuration")
    late = []
    for op in sorted(chosen, key=lambda op: shares.get(op, 0), reverse=True):
        if monotonic() >= deadline:
            late.append(op)
            continue
        if op == PRODUCTS:
            found = libraries(shape, c.n_layer, dtype, device, measure)
            said = "cuBLASLt; TORCH_BLAS_PREFER_CUBLASLT=1 gives it to a run" if found["kept"] else "cuBLAS, as shipped"
            print(
                f"  {op:22}{found['cublas']:11.3f}{found['cublaslt']:9.3f}{found['ratio']:7.2f}  {said}; ms of a step"
            )
            write(op, found)
            continue
        found = search(op, shape, dtype, device, deadline, measure)
        for row, why in found["rejected"].items():
            print(f"    {row}: {why}")
        left = f"; {found['left']} candidates not reached" if found["left"] else ""
        print(f"  {op:22}{found['shipped_ms']:11.3f}{found['ms']:9.3f}{found['ratio']:7.2f}  {found['repr']}{left}")
        write(op, found)
    if late:
        print(f"the budget of {cfg.budget} s is spent; not reached: {', '.join(late)}")
    print(f"{file}: {'this folder is not looked into by runs' if cfg.out else 'runs of this shape take it'}")


def needs_gpu(device):
    """Make device the current one. Raises UserError where the kernels do not run natively."""
    if not (is_cuda(device) and torch.cuda.is_available() and ops.triton and not torch.version.hip):
        raise UserError("tune: needs an NVIDIA GPU and Triton")
    check_device(device)
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise UserError(f"tune: needs an NVIDIA GPU from sm_80 on, and this is {torch.cuda.get_device_name(device)}")
    if device != "cuda":
        torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = True  # as the trainer does


def shipped_ms(op, shape, dtype, device, measure):
    """The time of an op by its shipped row, to say which op takes most of a step. Raises UserError where it does not fit."""
    try:
        f = prepared(problem(op, shape, dtype, device), Kernels(**{op: "triton"}), compiled=False)
        return statistics.median(measure({"shipped": f})["shipped"])
    except torch.OutOfMemoryError:
        raise UserError(
            f"tune: {op} of {shape.B} x {shape.T} tokens does not fit; give a smaller --batch_size"
        ) from None


def search(op, shape, dtype, device, deadline, measure):
    """What is found for an op, as the file has it. `measure` is `time_rounds`, or like it."""
    shipped = RECORDS[op].row(shape, dtype, device)
    if shape.dropout and op == "attention":  # its step is then gated_inner: what is tried is to be what runs
        shipped = replace(shipped, inner=shipped.gated_inner or shipped.inner, gated_inner=None)
    it = problem(op, shape, dtype, device)
    small = problem(op, replace(shape, B=min(shape.B, SMALL[0]), T=min(shape.T, SMALL[1])), dtype, device)

    def by(row):
        return prepared(it, Kernels(**{op: "triton"}, rows=((op, row.text),)), compiled=False)

    best, seen, rejected, left = shipped, {shipped}, {}, set()
    for grid in ops.triton.configs.GRIDS[type(shipped)]:
        sound = [best]
        for row in ops.triton.configs.neighbours(best, grid):
            if row in seen:
                continue
            if monotonic() >= deadline:
                left.add(row)
                continue
            seen.add(row)
            try:
                check(small, functools.partial(small.kernel, row=row.text))
                by(row)()
                sound.append(row)
            except Exception as e:  # whatever stops a candidate is said, and the search goes on without it
                rejected[difference(row, shipped)] = (str(e).splitlines() or [type(e).__name__])[0]
        if len(sound) > 1:
            ms = measure({row: by(row) for row in sound})
            best = min(sound, key=lambda row: statistics.median(ms[row]))
    again = measure({row: by(row) for row in {shipped: None, best: None}})
    ms, shipped_ms = (statistics.median(again[row]) for row in (best, shipped))
    kept = significantly_faster(again[best], again[shipped])
    row, ms = (best, ms) if kept else (shipped, shipped_ms)
    return {
        "kept": kept, "row": asdict(row), "repr": repr(row), "ms": ms, "shipped": repr(shipped), "shipped_ms": shipped_ms,
        "ratio": ms / shipped_ms, "at": asdict(shape), "tried": len(seen), "rejected": rejected, "left": len(left),
    }  # fmt: skip


def significantly_faster(times, others):
    """Whether times, a round each, are less than others by more than their noise."""
    by_median = statistics.median(times) <= GAIN * statistics.median(others)
    return by_median and all(a < b for a, b in zip(times, others, strict=True))


def products(shape, n_layer, dtype, device):
    """{name: (times in a step, function)} of the matrix products of each linear at a Shape: forward, dx, and dw in fp32."""
    M, C, mm, found = shape.B * shape.T, shape.n_embd, ops.triton.common.mm, {}
    sizes = {"c_attn": (3 * C, C), "attn.c_proj": (C, C), "c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    for name, (N, K) in {**sizes, "lm_head": (shape.vocab_size, C)}.items():
        times = n_layer if name in sizes else 1
        x, w, dy = (torch.randn(size, dtype=dtype, device=device) for size in ((M, K), (N, K), (M, N)))
        found[f"{name} forward"] = times, lambda x=x, w=w: torch.mm(x, w.t())
        found[f"{name} dx"] = times, lambda dy=dy, w=w: torch.mm(dy, w)
        dw = torch.empty(N, K, device=device)
        found[f"{name} dw"] = times, lambda dy=dy, x=x, dw=dw: mm(dy.t(), x, dw)
    return found


def libraries(shape, n_layer, dtype, device, measure):
    """The milliseconds of a step's products by cuBLAS and cuBLASLt, and whether the latter is surely faster, as the file has it."""
    prefer, names = torch.backends.cuda.preferred_blas_library, ("cublas", "cublaslt")
    before, found = prefer(), products(shape, n_layer, dtype, device)

    def by(library, f):
        def g():
            prefer(library)
            f()

        return g

    rounds = measure({(library, what): by(library, f) for what, (_, f) in found.items() for library in names})
    prefer(before)
    totals = {}
    for library in names:
        weighted = ([times * ms for ms in rounds[library, what]] for what, (times, _) in found.items())
        totals[library] = [sum(of_round) for of_round in zip(*weighted, strict=True)]
    cublas, cublaslt = (statistics.median(totals[library]) for library in names)
    medians = {key: statistics.median(ms) for key, ms in rounds.items()}
    return {
        "kept": significantly_faster(totals["cublaslt"], totals["cublas"]), "cublas": cublas, "cublaslt": cublaslt,
        "ratio": cublaslt / cublas, "ratios": {what: medians["cublaslt", what] / medians["cublas", what] for what in found},
    }  # fmt: skip


def difference(row, shipped):
    """The fields in which a row is not the shipped one, as text."""
    values = ((f.name, getattr(row, f.name), getattr(shipped, f.name)) for f in fields(row))
    return " ".join(f"{name}={value}" for name, value, other in values if value != other)
