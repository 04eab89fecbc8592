"""`fastgpt verify`: check every kernel against PyTorch on this machine, and print its errors.

The rule is three-way. Errors are measured against fp64. A kernel's error must be at most twice the error of the same maths in PyTorch at
the same dtypes, plus a floor. The floor is one unit in the last place of the largest element; in fp32, where the order of a sum matters,
four units. It is needed because on few elements PyTorch's own error can be near 0. The rule applies to every output and every gradient.
Repeated runs must give the same bits.
"""

import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgpt import files, ops
from fastgpt.config import UserError
from fastgpt.records import RECORDS, problem


@dataclass
class Comparison:
    """The errors of one tensor: the kernel's and PyTorch's largest error against fp64, the largest element, the rule's floor."""

    direction: str
    what: str
    dtype: str
    error: float
    torch_error: float
    largest: float
    floor: float

    @property
    def ratio(self) -> float:
        """error / (torch_error + floor / 2). The rule allows at most 2."""
        allowed = self.torch_error + self.floor / 2
        return self.error / allowed if allowed else float(self.error > 0) * float("inf")

    @property
    def holds(self) -> bool:
        """Whether the rule holds. It never holds for nan."""
        return self.error <= 2 * self.torch_error + self.floor


def compared(direction: str, what: str, kernel: Tensor | None, same: Tensor, exact: Tensor) -> Comparison:
    """The Comparison of one tensor: the kernel's, PyTorch's at the same dtypes (`same`), and fp64's (`exact`).

    Raises ArithmeticError if the kernel's is None, or has another dtype or shape.
    """
    if kernel is None:
        raise ArithmeticError(f"not equal: there is no {what}")
    if kernel.dtype != same.dtype or kernel.shape != exact.shape:
        kinds = (f"{t.dtype} {tuple(t.shape)}" for t in (kernel, same))
        raise ArithmeticError("not equal: {} is {}, not {}".format(what, *kinds))
    error, allowed = ((t.double() - exact).abs().max().item() if t.numel() else 0.0 for t in (kernel, same))
    largest = exact.abs().max().item() if exact.numel() else 0.0
    units = 4 if kernel.dtype == torch.float32 else 1
    floor = units * torch.finfo(kernel.dtype).eps * largest
    return Comparison(direction, what, str(kernel.dtype).removeprefix("torch."), error, allowed, largest, floor)


def run(f: Callable, inputs: Iterable[Any], grads: Sequence[Tensor | None], exact: bool = False) -> list[Tensor]:
    """[f's outputs, then the gradients of its floating-point inputs], detached; computed in fp64 if `exact`.

    grads: the outputs' gradients; None for an output that is not differentiated. If all are None, only the outputs are returned.
    Inputs keep their strides.
    """
    args = [(x.detach().double() if exact else x.detach()).requires_grad_() if is_floating(x) else x for x in inputs]
    outputs = f(*args)
    pairs = [(o, g.double() if exact else g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    if not pairs:
        return list(outputs)
    answers, given = zip(*pairs, strict=True)
    torch.autograd.backward(answers, given)
    return [o.detach() for o in outputs] + [a.grad for a in args if is_floating(a)]


def is_floating(x: Any) -> bool:
    """Whether x is a floating-point tensor, which can have a gradient."""
    return torch.is_tensor(x) and x.is_floating_point()


def compare(
    kernel: Callable, same: Callable, inputs: dict[str, Any], outputs: Sequence[str], grads: Sequence[Tensor | None],
    found: list[Tensor] | None = None,
) -> list[Comparison]:  # fmt: skip
    """A Comparison of each output and of each input's gradient.

    kernel, same: the functions to compare. inputs: {name: tensor}. outputs: the names of their outputs. grads: as for `run`.
    found: what `run` returned for the kernel, if it has run already. Raises ArithmeticError, as `compared`.
    """
    any_grad = any(g is not None for g in grads)
    names = [("forward" if any_grad else "update", n) for n in outputs]
    names += [("backward", "d" + n) for n, x in inputs.items() if any_grad and is_floating(x)]
    found = found or run(kernel, inputs.values(), grads)
    expected = [run(same, inputs.values(), grads, exact) for exact in (False, True)]
    return [compared(*name, *tensors) for name, *tensors in zip(names, found, *expected, strict=True)]


def compile_all(dtypes: list[torch.dtype]) -> None:
    """Run every case once on the GPU, in one thread for each CPU core: nearly all of the time is compiling."""

    def run_case(case):
        with torch.autograd.set_multithreading_enabled(False):  # else one thread of autograd's compiles all backwards
            it = problem(*case, "cuda")
            run(it.kernel, it.inputs.values(), it.grads)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        all_cases = [
            (op, shape, dtype) for dtype in dtypes for op, r in RECORDS.items() for shape in r.cases(dtype, True)
        ]
        list(pool.map(run_case, all_cases))


def verify(json_file: str = "", only: str = "all") -> int:
    """Check every kernel on this machine, and print the table. Returns 1 if a row fails, else 0. Raises UserError if it cannot run.

    only: the name of the one dtype to check, or "all".
    """
    gpu = torch.cuda.is_available()
    dtypes, place = where(gpu, only)
    report: dict[str, Any] = {"where": place, "versions": versions(), "rows": []}
    if json_file:
        check_target(json_file)
    print(f"{report['where']}\n{', '.join(f'{k} {v}' for k, v in report['versions'].items())}\n")
    print(f"{'op':22}{'direction':11}{'dtype':10}{'kernel error':>13}{'PyTorch error':>15}{'ratio':>7}")
    device = "cuda" if gpu else "cpu"
    np.seterr(all="ignore")  # the interpreter uses numpy, which would warn about masked lanes
    repeats = 20 if gpu else 2
    if gpu:
        compile_all(dtypes)
    for op, record in RECORDS.items():
        for dtype in dtypes:
            worst, same_bits = {}, True
            for shape in record.cases(dtype, gpu):
                it = problem(op, shape, dtype, device)
                found = run(it.kernel, it.inputs.values(), it.grads)
                for _ in range(repeats - 1):
                    again = run(it.kernel, it.inputs.values(), it.grads)
                    same_bits &= all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
                for c in compare(it.kernel, it.reference, it.inputs, it.outputs, it.grads, found):
                    row: dict[str, Any] = dict(
                        op=op, direction=c.direction, dtype=str(dtype)[6:], tensor=c.what, shape=asdict(shape), error=c.error,
                        torch_error=c.torch_error, largest=c.largest, ratio=c.ratio, holds=c.holds,
                    )  # fmt: skip
                    report["rows"].append(row)
                    rank = (not c.holds, c.ratio)
                    if c.direction not in worst or rank > worst[c.direction][0]:
                        worst[c.direction] = rank, row
            for _, row in worst.values():
                size = row["largest"] or 1.0
                print(
                    f"{op:22}{row['direction']:11}{row['dtype']:10}{row['error'] / size:13.1e}{row['torch_error'] / size:15.1e}"
                    f"{row['ratio']:7.2f}" + ("" if row["holds"] else f"  FAILS: {row['tensor']} at {row['shape']}")
                )
            row = dict(op=op, direction="repeat", dtype=str(dtype)[6:], runs=repeats, holds=same_bits)
            report["rows"].append(row)
            if not same_bits:
                print(f"{op:22}{'repeat':11}{row['dtype']:10}  FAILS: {repeats} runs gave different bits")
    failed = sum(not row["holds"] for row in report["rows"])
    print(
        "\nErrors are against fp64, relative to the largest element. Each row shows the worst of its tensors and shapes. The ratio, at most"
        f"\n2, is error / (PyTorch's error + half a unit in the last place; fp32: two units). {repeats} runs must give the same bits."
    )
    print(
        f"{failed} of {len(report['rows'])} comparisons FAIL"
        if failed
        else f"all {len(report['rows'])} comparisons hold"
    )
    report["holds"] = not failed
    if json_file:
        try:
            with files.replacing(Path(json_file)) as file:
                file.write(json.dumps(report, indent=1).encode() + b"\n")
        except OSError as e:
            raise UserError(f"--json={json_file}: {e.strerror}") from None
    return int(failed > 0)


def check_target(path: str) -> None:
    """Raise UserError, before the work, for a file that cannot be written after it."""
    try:
        if os.path.exists(path):
            files.check_kind(os.stat(path))
        with tempfile.TemporaryFile(dir=Path(path).parent):
            pass
    except OSError as e:
        raise UserError(f"--json={path}: {e.strerror}") from None


def where(gpu: bool, only: str = "all") -> tuple[list[torch.dtype], str]:
    """(the dtypes to check, the machine in words). only: as for `verify`. Raises UserError if the kernels cannot run here."""
    if ops.triton is None:
        raise UserError("verify: Triton is not installed; pip install triton")
    if gpu and (torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 0)):
        raise UserError(
            f"verify: the kernels need an NVIDIA GPU from sm_80 on, and this is {torch.cuda.get_device_name()}"
        )
    if not gpu and not ops.triton.common.INTERPRETED:  # `fastgpt verify` sets it
        raise UserError("verify: without a GPU set TRITON_INTERPRET=1 before Python begins")
    dtypes = [torch.float32, torch.float16, torch.bfloat16] if only == "all" else [getattr(torch, only)]
    if gpu:
        return dtypes, f"{torch.cuda.get_device_name()}, sm_{''.join(map(str, torch.cuda.get_device_capability()))}"
    triton, numpy = version("triton"), version("numpy")
    if triton.startswith("3.6.") and tuple(map(int, numpy.split(".")[:2])) >= (2, 4):
        raise UserError(f"verify: Triton {triton}'s interpreter breaks on numpy {numpy}; pip install 'numpy<2.4'")
    place = f"no CUDA GPU here: Triton's interpreter runs the kernels on the CPU ({platform.machine()}), in small sizes"
    if torch.bfloat16 not in dtypes:
        return dtypes, place
    if ops.triton.interpreter.computes_bf16():
        return dtypes, place + ";\nbfloat16 too: kernels/interpreter.py corrects the interpreter's arithmetic"
    if only != "all":
        raise UserError("--dtype=bfloat16: this Triton's interpreter computes it wrongly; verify it on a GPU")
    return dtypes[:2], place + ";\nbfloat16 is not checked: this Triton's interpreter computes it wrongly"


def versions() -> dict[str, str]:
    """{name: version} of what a report depends on."""
    found = {"python": platform.python_version()}
    for name in ("fastgpt", "torch", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
