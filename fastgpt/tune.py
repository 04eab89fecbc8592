"""`fastgpt tune`: find the fastest launch configuration of each op on this GPU, at a run's shapes.

The search starts at the op's shipped row, and tries the grids of `configs.GRIDS` one after another, each around the best row so far.
A candidate must pass `verify`'s rule at a small size. All candidates that pass are timed in turn, round by round. At the end the best
row is timed once more beside the shipped one, since the least of many times is partly luck. It is kept if it is faster in every round,
and by 1% in the median. Rows are kept in a file, which later runs use (`tuned`). Last, the matrix products of libraries are timed with
cuBLAS and with cuBLASLt. PyTorch sets that library for the whole process, so tune only prints which is faster.
"""

import contextlib
import functools
import statistics
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from fastgpt import files, ops, runner, tuned
from fastgpt.choose import check, is_cuda, prepared
from fastgpt.config import TuneConfig, UserError
from fastgpt.distributed import check_device
from fastgpt.ops import Kernels
from fastgpt.records import RECORDS, Shape, problem
from fastgpt.timing import gpu_rounds

# The sequences and tokens at which a candidate is checked: they give whole and partial tiles. 528 is a multiple of 16, as in most runs:
# Triton compiles other sizes separately.
SMALL = 2, 528
GAIN = 0.99  # a row is kept if its time is at most this share of the shipped row's
PRODUCTS = "products"  # not an op: the matrix products of cuBLAS
RUNNER = "runner"  # nor is this: how runs of this shape run (fastgpt/runner.py)


def tune(cfg: TuneConfig, measure: Callable = gpu_rounds) -> None:
    """Search as a TuneConfig says, print a line for each op, and write the file. Raises UserError if it cannot."""
    c, dtype, device = cfg.gpt_config(), getattr(torch, cfg.dtype), cfg.device
    times = {op: record.times(c.n_layer) for op, record in RECORDS.items() if record.row}
    chosen = (
        list(dict.fromkeys(map(str.strip, cfg.only.split(","))))
        if cfg.only
        else [*times, PRODUCTS, *([] if cfg.out else [RUNNER])]
    )
    for op in chosen:
        if op not in (*times, PRODUCTS, RUNNER):
            raise UserError(f"--only={cfg.only}: {op!r} is none of {', '.join(times)}, {PRODUCTS}, {RUNNER}")
    needs_gpu(device)
    c.dropout = cfg.dropout
    shape = Shape.of(
        cfg.batch_size, c, dropout=cfg.dropout, doc_mask=cfg.doc_mask, narrow_residual=cfg.residual == "bf16"
    )
    file = Path(cfg.out) if cfg.out else tuned.path(shape, dtype, device)

    def write(op=None, found=None):
        """Add an op's result to the file, and keep what other processes wrote meanwhile. Raises UserError if it cannot be written."""
        report = {"where": tuned.conditions(shape, dtype, device), "ops": {}}
        with contextlib.suppress(OSError, ValueError):  # no valid file: start a new one
            report, *_ = tuned.read(file, shape, dtype, device)
        if op is not None:
            (report if op == PRODUCTS else report["ops"])[op] = found
        try:
            files.write_json(file, report)
        except (OSError, ValueError) as e:
            raise UserError(f"--out={file}: {getattr(e, 'strerror', None) or e}") from None

    write()  # raises now if the file cannot be written
    print(
        f"tuning for {shape.B} x {shape.T} tokens in {cfg.dtype} on {tuned.conditions(shape, dtype, device)['gpu']}, {cfg.budget} s"
    )
    deadline = monotonic() + cfg.budget
    shares = {op: times[op] * shipped_ms(op, shape, dtype, device, measure) for op in chosen if op in times}
    print(f"  {'op':22}{'shipped ms':>11}{'best ms':>9}{'ratio':>7}  configuration")
    not_reached = []
    for op in sorted((op for op in chosen if op != RUNNER), key=lambda op: shares.get(op, 0), reverse=True):
        if monotonic() >= deadline:
            not_reached.append(op)
            continue
        if op == PRODUCTS:
            found = libraries(shape, c.n_layer, dtype, device, measure)
            choice = "cuBLASLt; TORCH_BLAS_PREFER_CUBLASLT=1 selects it" if found["kept"] else "cuBLAS, as shipped"
            print(
                f"  {op:22}{found['cublas']:11.3f}{found['cublaslt']:9.3f}{found['ratio']:7.2f}  {choice}; ms in a step"
            )
            write(op, found)
            continue
        found = search(op, shape, dtype, device, deadline, measure)
        for row, why in found["rejected"].items():
            print(f"    {row}: {why}")
        left = f"; {found['left']} candidates not reached" if found["left"] else ""
        print(f"  {op:22}{found['shipped_ms']:11.3f}{found['ms']:9.3f}{found['ratio']:7.2f}  {found['repr']}{left}")
        write(op, found)
    if not_reached:
        print(f"the budget of {cfg.budget} s is spent; not reached: {', '.join(not_reached)}")
    if RUNNER in chosen:
        print(f"timing whole micro-steps, for {runner.SECONDS:.0f} s at most")
        work = runner.Work(c, cfg.batch_size, True, "auto", cfg.dtype, doc_mask=cfg.doc_mask, residual=cfg.residual)
        runner.time_all(work, device, runner.SECONDS, {})
    print(f"{file}: {'runs do not read this folder' if cfg.out else 'runs of this shape use it'}")


def needs_gpu(device: str) -> None:
    """Make device the current one. Raises UserError if the compiled kernels cannot run there."""
    if not (is_cuda(device) and torch.cuda.is_available() and ops.triton and not torch.version.hip):
        raise UserError("tune: needs an NVIDIA GPU and Triton")
    check_device(device)
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise UserError(f"tune: needs an NVIDIA GPU from sm_80 on, and this is {torch.cuda.get_device_name(device)}")
    if device != "cuda":
        torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = True  # as the trainer does


def shipped_ms(op: str, shape: Shape, dtype: torch.dtype, device: str, measure: Callable) -> float:
    """Milliseconds of an op with its shipped row, which tell how much of a step it takes. Raises UserError if memory is too small."""
    try:
        f = prepared(problem(op, shape, dtype, device), Kernels(**{op: "triton"}, rows=()), compiled=False)
        return statistics.median(measure({"shipped": f})["shipped"])
    except torch.OutOfMemoryError:
        raise UserError(
            f"tune: {op} of {shape.B} x {shape.T} tokens does not fit; give a smaller --batch_size"
        ) from None


def search(
    op: str, shape: Shape, dtype: torch.dtype, device: str, deadline: float, measure: Callable
) -> dict[str, Any]:
    """Search an op's rows, and return the result as the file stores it. `measure` has `gpu_rounds`' interface."""
    shipped = RECORDS[op].row(shape, dtype, device)  # type: ignore[misc]
    if shape.dropout and op == "attention":  # it then uses gated_inner: let the search set the field that runs
        shipped = replace(shipped, inner=shipped.gated_inner or shipped.inner, gated_inner=None)
    it = problem(op, shape, dtype, device)
    small = problem(op, replace(shape, B=min(shape.B, SMALL[0]), T=min(shape.T, SMALL[1])), dtype, device)

    def runner(row):
        return prepared(it, Kernels(**{op: "triton"}, rows=((op, row.text),)), compiled=False)

    best, seen, rejected, left = shipped, {shipped}, {}, set()
    for grid in ops.triton.configs.GRIDS[type(shipped)]:
        valid = [best]
        for row in ops.triton.configs.neighbours(best, grid):
            if row in seen:
                continue
            if monotonic() >= deadline:
                left.add(row)
                continue
            seen.add(row)
            try:
                check(small, functools.partial(small.kernel, row=row.text))
                runner(row)[0]()
                valid.append(row)
            except Exception as e:  # any failure rejects the candidate, and is printed
                rejected[difference(row, shipped)] = (str(e).splitlines() or [type(e).__name__])[0]
        if len(valid) > 1:
            ms = measure({row: runner(row) for row in valid})
            best = min(valid, key=lambda row: statistics.median(ms[row]))
    final = measure({row: runner(row) for row in {shipped: None, best: None}})
    ms, shipped_ms = (statistics.median(final[row]) for row in (best, shipped))
    kept = significantly_faster(final[best], final[shipped])
    row, ms = (best, ms) if kept else (shipped, shipped_ms)
    return {
        "kept": kept, "row": asdict(row), "repr": repr(row), "ms": ms, "shipped": repr(shipped), "shipped_ms": shipped_ms,
        "ratio": ms / shipped_ms, "at": asdict(shape), "tried": len(seen), "rejected": rejected, "left": len(left),
    }  # fmt: skip


def significantly_faster(times: list[float], others: list[float]) -> bool:
    """Whether `times` are below `others` in every round, and by 1% in the median. Both: [time of a round]."""
    by_median = statistics.median(times) <= GAIN * statistics.median(others)
    return by_median and all(a < b for a, b in zip(times, others, strict=True))


def products(shape: Shape, n_layer: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """{name: (calls in a step, function)} of each Linear's matrix products at a Shape: forward, dx, and dw in fp32."""
    M, C, mm = shape.B * shape.T, shape.n_embd, ops.triton.common.mm
    found: dict[str, Any] = {}
    sizes = {"c_attn": (3 * C, C), "attn.c_proj": (C, C), "c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    for name, (N, K) in {**sizes, "lm_head": (shape.vocab_size, C)}.items():
        times = n_layer if name in sizes else 1
        x, w, dy = (torch.randn(size, dtype=dtype, device=device) for size in ((M, K), (N, K), (M, N)))
        found[f"{name} forward"] = times, lambda x=x, w=w: torch.mm(x, w.t())
        found[f"{name} dx"] = times, lambda dy=dy, w=w: torch.mm(dy, w)
        dw = torch.empty(N, K, device=device)
        found[f"{name} dw"] = times, lambda dy=dy, x=x, dw=dw: mm(dy.t(), x, dw)
    return found


def libraries(shape: Shape, n_layer: int, dtype: torch.dtype, device: str, measure: Callable) -> dict[str, Any]:
    """Time a step's matrix products with cuBLAS and cuBLASLt. Returns their ms, and whether cuBLASLt is faster, as the file stores it."""
    prefer, names = torch.backends.cuda.preferred_blas_library, ("cublas", "cublaslt")
    before, found = prefer(), products(shape, n_layer, dtype, device)

    def with_library(library, f):
        def call():
            prefer(library)
            f()

        return [call]

    rounds = measure({(library, what): with_library(library, f) for what, (_, f) in found.items() for library in names})
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


def difference(row: Any, shipped: Any) -> str:
    """The fields in which a row differs from the shipped one, as text. A field of a field is named with a dot."""
    parts = []
    for f in fields(row):
        value, other = getattr(row, f.name), getattr(shipped, f.name)
        if is_dataclass(value):
            parts += [f"{f.name}.{part}" for part in difference(value, other).split()]
        elif value != other:
            parts.append(f"{f.name}={value}")
    return " ".join(parts)
