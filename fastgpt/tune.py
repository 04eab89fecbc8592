"""`fastgpt tune`: the fastest launch configuration of each op on this GPU, at a run's shapes.

Around the shipped row of an op `configs.GRIDS` are walked one by one, from what the last has found. A candidate is held to `verify`'s
rule at a small size, then all that hold are timed in turn, round by round. At the end of an op the best is timed beside the
shipped row once more, since the least of many times is low by luck: it is kept where it is faster in every round, and by 1% in
the median. What is kept is in a file, which later runs take (`tuned`).
"""

import contextlib
import statistics
from dataclasses import asdict, fields, replace
from pathlib import Path
from time import monotonic

import torch

from fastgpt import ops, tuned
from fastgpt.choose import check, has_triton, is_cuda, prepared, time_rounds
from fastgpt.config import UserError
from fastgpt.verify import Shape, problem

# Sequences and tokens that a candidate is checked at: whole and partial tiles; and a multiple of 16 as in most runs, since
# Triton compiles other sizes on their own.
SMALL = 2, 528
GAIN = 0.99  # the most of the shipped row's time that is worth another


def tune(cfg, measure=time_rounds):
    """Search as a TuneConfig says, print a line for each op, and write the file. Raises UserError where it cannot."""
    c, dtype, device = cfg.gpt_config(), getattr(torch, cfg.dtype), cfg.device
    times = {"gelu_mlp": c.n_layer, "attention": c.n_layer, "layer_norm": 2 * c.n_layer}
    times |= {"linear_cross_entropy": 1, "embedding": 1}  # of an op in a step
    chosen = cfg.only.split(",") if cfg.only else list(times)
    for op in chosen:
        if op not in times:
            raise UserError(f"--only={cfg.only}: {op!r} is none of {', '.join(times)}")
    needs_gpu(device)
    shape = Shape(cfg.batch_size, c.block_size, c.n_embd, c.n_head, c.vocab_size, c.bias, cfg.dropout)
    file = Path(cfg.out) if cfg.out else tuned.path(shape, dtype, device)
    report = {"where": tuned.conditions(shape, dtype, device), "ops": {}}
    with contextlib.suppress(OSError, ValueError):  # else there is nothing to add to
        report["ops"] = tuned.read(file, shape, dtype, device)[0]["ops"]  # of another --only
    write(file, report)  # before the work
    print(f"tuning for {shape.B} x {shape.T} tokens in {cfg.dtype} on {report['where']['gpu']}, {cfg.budget} s")
    deadline, before = monotonic() + cfg.budget, dict(ops.chosen)
    ops.use("triton")
    shares = {op: times[op] * shipped_ms(op, shape, dtype, device, measure) for op in chosen}
    print(f"  {'op':22}{'shipped ms':>11}{'best ms':>9}{'ratio':>7}  configuration")
    late = []
    for op in sorted(chosen, key=shares.get, reverse=True):
        if monotonic() >= deadline:
            late.append(op)
            continue
        found = search(op, shape, dtype, device, deadline, measure)
        for row, why in found["rejected"].items():
            print(f"    {row}: {why}")
        left = f"; {found['left']} candidates not reached" if found["left"] else ""
        print(f"  {op:22}{found['shipped_ms']:11.3f}{found['ms']:9.3f}{found['ratio']:7.2f}  {found['repr']}{left}")
        report["ops"][op] = found
        write(file, report)
    ops.use(before)
    ops.configs().use({})
    if late:
        print(f"the budget of {cfg.budget} s is spent; not reached: {', '.join(late)}")
    print(f"{file}: {'this folder is not looked into by runs' if cfg.out else 'runs of this shape take it'}")


def needs_gpu(device):
    """Make device the current one. Raises UserError where the kernels do not run natively."""
    if not (is_cuda(device) and torch.cuda.is_available() and has_triton() and not torch.version.hip):
        raise UserError("tune: needs an NVIDIA GPU and Triton")
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise UserError(f"tune: needs an NVIDIA GPU from sm_80 on, and this is {torch.cuda.get_device_name(device)}")
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = True  # as the trainer does


def write(file, report):
    """Save the report. Raises UserError where the file cannot be written."""
    try:
        tuned.save(file, report)
    except OSError as e:
        raise UserError(f"--out={file}: {e.strerror}") from None


def shipped_ms(op, shape, dtype, device, measure):
    """The time of an op by its shipped row, to say which op takes most of a step. Raises UserError where it does not fit."""
    try:
        f = prepared(op, "triton", problem(op, shape, dtype, device), compiled=False)
        return statistics.median(measure({"shipped": f})["shipped"])
    except torch.OutOfMemoryError:
        raise UserError(
            f"tune: {op} of {shape.B} x {shape.T} tokens does not fit; give a smaller --batch_size"
        ) from None


def search(op, shape, dtype, device, deadline, measure):
    """What is found for an op, as the file has it. `measure` is `time_rounds`, or like it."""
    configs, key = ops.configs(), tuned.lookup(op, shape, dtype, device)
    shipped = getattr(configs, key[0])(*key[1:])
    if shape.dropout and op == "attention":  # its step is then gated_inner: what is tried is to be what runs
        shipped = replace(shipped, inner=shipped.gated_inner or shipped.inner, gated_inner=None)
    run = prepared(op, "triton", problem(op, shape, dtype, device), compiled=False)
    small = replace(shape, B=min(shape.B, SMALL[0]), T=min(shape.T, SMALL[1]))

    def by(row):
        def f():
            configs.use({key: row})
            run()

        return f

    best, seen, rejected, left = shipped, {shipped}, {}, 0
    for grid in configs.GRIDS[type(shipped)]:
        sound = [best]
        for row in configs.around(best, grid):
            if row in seen:
                continue
            if monotonic() >= deadline:
                left += 1
                continue
            seen.add(row)
            try:
                configs.use({key: row})
                check(op, small, dtype, device, "kernel")
                by(row)()
                sound.append(row)
            except Exception as e:  # whatever stops a candidate is said, and the search goes on without it
                rejected[difference(row, shipped)] = (str(e).splitlines() or [type(e).__name__])[0]
        if len(sound) > 1:
            ms = measure({row: by(row) for row in sound})
            best = min(sound, key=lambda row: statistics.median(ms[row]))
    again = measure({row: by(row) for row in {shipped: None, best: None}})
    ms, shipped_ms = (statistics.median(again[row]) for row in (best, shipped))
    kept = ms <= GAIN * shipped_ms and all(a < b for a, b in zip(again[best], again[shipped], strict=True))
    row, ms = (best, ms) if kept else (shipped, shipped_ms)
    return {
        "kept": kept, "row": asdict(row), "repr": repr(row), "ms": ms, "shipped": repr(shipped), "shipped_ms": shipped_ms,
        "ratio": ms / shipped_ms, "at": asdict(shape), "tried": len(seen), "rejected": rejected, "left": left,
    }  # fmt: skip


def difference(row, shipped):
    """The fields in which a row is not the shipped one, as text."""
    values = ((f.name, getattr(row, f.name), getattr(shipped, f.name)) for f in fields(row))
    return " ".join(f"{name}={value}" for name, value, other in values if value != other)
