"""What each kernel executes at GPT-2's shapes, counted: instructions by pipe, bytes, sectors, bank conflicts. The same on any machine.

    python tests/figures.py            a JSON object for each kernel and architecture, a line each
    python tests/figures.py --record   tests/executed.json, which a test holds the code to
    python tests/figures.py --markdown that record as the tables of docs/codegen.md

Counted are instructions of PTX, by threads: ptxas makes one or a few of its own of each, drops most moves, and fuses some.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is first imported

import faults
import torch
import triton
from ptx.launch import Gpu
from ptx.parse import UnknownPTX

from fastgpt import kernels
from fastgpt.kernels import configs
from fastgpt.records import Shape, problem
from fastgpt.verify import run

RECORD = Path(__file__).with_name("executed.json")
ARCHITECTURES = (80, 90, 100)

T, C, V, D = 1024, 768, 50304, 64
ROWS = 2 * T
MULTIPROCESSORS = 132


def pairs(T):
    """Of queries and keys that see each other, in a head."""
    return T * (T + 1) // 2


def of_one_head(blocks):
    """The first of so many blocks of 12 heads."""
    return blocks // 12


def mlp_elements(half):
    """Of the tiles that a launch's first two programs compute, on the architecture that is emulated."""
    config = getattr(configs.gelu_mlp(torch.device("cpu"), torch.bfloat16, True), half)
    tiles = ROWS // config.block_m * (4 * C // config.block_n)
    programs = min(tiles, config.programs_per_sm * MULTIPROCESSORS)
    return sum(len(range(first, tiles, programs)) for first in range(2)) * config.block_m * config.block_n


CASES = {  # name: (op, shape, blocks of each launch that run, {kernel: (unit, how many units those blocks are, or what gives it)})
    "layer_norm": ("layer_norm", Shape(2, T, C, 12, 65), None, dict(
        norm_forward=("element", ROWS * C), norm_backward=("element", ROWS * C))),
    "layer_norm, bf16 stream": ("layer_norm", Shape(2, T, C, 12, 65, narrow_residual=True), None, dict(
        norm_forward=("element", ROWS * C), norm_backward=("element", ROWS * C))),
    "layer_norm, dropout": ("layer_norm", Shape(1, T, C, 12, 65, dropout=0.1), None, dict(
        norm_forward=("element", T * C), norm_backward=("element", T * C))),
    "embedding": ("embedding", Shape(2, T, C, 12, 600), None, dict(
        embed_forward=("element", ROWS * C), embed_keys=("token", ROWS), embed_backward_wpe=("element", ROWS * C),
        embed_backward_wte=("element", ROWS * C))),
    "attention": ("attention", Shape(1, T, C, 12, 65), of_one_head, dict(
        attention_forward=("pair", pairs(T)), attention_backward=("pair", pairs(T)))),
    "attention, dropout": ("attention", Shape(1, T // 2, C, 12, 65, dropout=0.1), of_one_head, dict(
        attention_forward=("pair", pairs(T // 2)), attention_backward=("pair", pairs(T // 2)))),
    "gelu_mlp": ("gelu_mlp", Shape(2, T, C, 12, 65), 2, {
        "mlp_gemm forward": ("element", lambda: mlp_elements("forward")),
        "mlp_gemm backward": ("element", lambda: mlp_elements("backward"))}),
    "linear_cross_entropy": ("linear_cross_entropy", Shape(1, 4, C, 12, V), 4, dict(
        loss_rows=("logit", 4 * V), loss_scale=("element", 3072))),
    # The bias has one element more than the width: 16 divides the elements of both tensors, as of all of a GPT-2.
    # All blocks run: the norm must be finite, else the update changes nothing.
    "adamw": ("adamw", Shape(1, 1, C - 1, 12, 256), None, dict(
        adamw_norm=("parameter", 256 * (C - 1) + C), adamw_update=("parameter", 256 * (C - 1) + C))),
}  # fmt: skip

FLOAT = {"f32", "f16", "bf16", "f32x2", "f16x2", "bf16x2", "f64"}
XU = {"ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh", "popc"}
ARITHMETIC = {"add", "sub", "mul", "fma", "min", "max", "abs", "neg"}
INTEGER = {"mad", "div", "rem", "and", "or", "xor", "not", "shl", "shr", "bfe", "setp", "selp", "prmt"}
MATRIX = ("mma", "wgmma.mma_async", "tcgen05.mma")
BARRIERS = ("bar", "mbarrier", "fence", "cp.async.commit", "cp.async.wait", "cp.async.bulk.commit", "cp.async.bulk.wait",
            "wgmma", "tcgen05", "griddepcontrol")  # fmt: skip
PIPES = ("tensor", "fp32", "integer", "xu", "global", "shared", "warp", "barrier", "other")


def pipe(inst):
    """Where an instruction runs, as far as PTX tells: a table of its names. Raises UnknownPTX."""
    op, last = inst.parts[0], inst.parts[-1]
    if inst.name.startswith(MATRIX):
        return "tensor"
    if op in ("ld", "st"):
        return {"param": "other"}.get(inst.parts[1], inst.parts[1].removesuffix("::cta"))
    if inst.name.startswith(("tcgen05.ld", "tcgen05.st", "ldmatrix", "stmatrix")):
        return "shared"
    if inst.name.startswith(BARRIERS):
        return "barrier"
    if inst.name.startswith("cp.async"):
        return "global"
    if op in XU or (op == "div" and last in FLOAT):
        return "xu"
    if op == "cvt":  # between integers and floats it is the XU's
        integer = [p[0] in "us" for p in inst.parts[-2:]]
        return "xu" if any(integer) != all(integer) else "fp32" if not any(integer) else "integer"
    if op in ARITHMETIC:
        return "fp32" if last in FLOAT else "integer"
    if op in INTEGER:
        return "integer"
    if op in ("shfl", "redux", "vote", "elect"):
        return "warp"
    if op in ("mov", "cvta", "bra", "ret", "createpolicy"):
        return "other"
    raise UnknownPTX(f"{inst.name}: no pipe is known for it")


def figures(machine, units):
    """What a run executed, for each of `units`: instructions by pipe; FLOPs of matrix instructions; of each space bytes, and pieces beside
    the fewest that would do."""
    found = dict.fromkeys(PIPES, 0)
    for inst, warps in zip(machine.kernel.instructions, machine.executed, strict=True):
        found[pipe(inst)] += int(warps) * 32
    found = {k: v / units for k, v in (found | {"flops": machine.flops}).items()}
    for space in ("global", "shared"):
        note = machine.traffic.get(space)
        if note:
            found |= {f"{space}_bytes": note["bytes"] / units, f"{space}_pieces": note["pieces"] / note["fewest"]}
    return {k: float(f"{v:.5g}") for k, v in found.items()}


def rows(architecture, only=()):
    """Of every case and kernel: a dict of what it is, its unit, and its figures. `only`: of these cases."""
    torch.set_num_threads(1)
    for case, (op, shape, blocks, units) in CASES.items():
        if only and case not in only:
            continue
        with Gpu(architecture, blocks=1):  # of dropout's mask, which only the reference would read
            it = problem(op, shape, torch.bfloat16, "cpu")
        if it.targets is not None:
            it.targets.clamp_(min=0)  # none is ignored: a row of zeros is another kind of work
        with Gpu(architecture, multiprocessors=MULTIPROCESSORS, blocks=blocks, counting=True, keep=True) as gpu:
            run(it.kernel, it.inputs.values(), it.grads)
            units = {kernel: (unit, n() if callable(n) else n) for kernel, (unit, n) in units.items()}
        first = {}
        for machine in gpu.machines:
            first.setdefault(machine.label, machine)
        for kernel, (unit, number) in units.items():
            yield dict(case=case, kernel=kernel, sm=architecture, unit=unit, **figures(first[kernel], number))


def table(architecture, only=(), planted=None):
    """The rows in a list; `planted`: (op, text, what stands there instead) of a kernel to count in place of the shipped one."""
    if not planted:
        return list(rows(architecture, only))
    with tempfile.TemporaryDirectory() as folder, patch.object(kernels, planted[0], faults.plant(*planted, folder)):
        return list(rows(architecture, only))


def worse(found, recorded):
    """What of a kernel's figures is above what was recorded, in words."""
    return [
        f"{k}: {found[k]:g}, recorded {recorded[k]:g}"
        for k in recorded
        if isinstance(recorded[k], float) and found[k] > recorded[k]
    ]


def key(row):
    return f"{row['case']}: {row['kernel']}, sm_{row['sm']}"


def markdown():
    record = json.loads(RECORD.read_text())
    print(f"""
## Executed

Recorded by `python tests/figures.py --record` with Triton {record["triton"]}; a test holds the code to it. The compiled kernels run in
the emulator of `tests/ptx`, in bf16 at GPT-2 124M's shapes (T = 1024, n_embd = 768, heads of 64, a vocabulary of 50,304), and what they
execute is counted: no time, and the same on every machine. Instructions are PTX's, by threads, for one unit of the kernel's work: an
element of its matrix, a query-key pair that attention needs, a parameter. `warp` are shuffles and reductions in a warp; `barrier` waits
and fences too; `other` moves and branches, most of which ptxas drops. `bytes` are those that threads ask of global memory, whichever
cache answers. `sectors` is how many sectors of 32 bytes the requests touch, by the fewest that would do; `ways` how many wavefronts
shared memory needs, by the fewest: at 1 no two threads meet in a bank.""")
    columns = [*PIPES[1:], "bytes", "sectors", "shared bytes", "ways"]
    keys = ["flops", *PIPES[1:], "global_bytes", "global_pieces", "shared_bytes", "shared_pieces"]
    for sm in ARCHITECTURES:
        print(f"\n### Executed on sm_{sm}\n\n| case | kernel | a unit | FLOPs, tensor | {' | '.join(columns)} |")
        print("|---|---|---|" + "---:|" * len(keys))
        for r in record["kernels"].values():
            if r["sm"] == sm:
                numbers = " | ".join(shown(r[k]) if k in r else "" for k in keys)
                print(f"| {r['case']} | {r['kernel']} | {r['unit']} | {numbers} |")


def shown(x):
    """A figure in three digits."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--markdown"]:
        markdown()
    elif sys.argv[1:] == ["--record"]:
        kernels = {key(r): r for sm in ARCHITECTURES for r in rows(sm)}
        RECORD.write_text(json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=1) + "\n")
    else:
        for sm in ARCHITECTURES:
            for r in rows(sm, sys.argv[1:]):
                print(json.dumps(r), flush=True)
