"""Corrects the bf16 arithmetic of Triton's interpreter, which stores bf16 as 16 bits in an unsigned integer; and its masks.

In tl.dot, arithmetic, comparisons, sums, and casts to and from integers and fp64 the interpreter uses these bits as if they were the
number. Its cast from fp32 truncates; a GPU rounds to nearest even. Both casts with fp32 lose subnormals. The corrected methods widen
operands to fp32, and round results once. A sum of bf16 is rounded at every step, as on a GPU, but element by element, not in a tree.

From Triton 3.9 on a load refuses a mask that is not bool, and `block & scalar` gives one: a comparison's answer has the dtype of what is
compared, and repeating it over a block makes integers of it. The corrected method keeps it bool.

Not corrected: atomics, fp8, and fp_downcast_rounding="rtz". A bf16 constant other than 0 raises AttributeError.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter


def is_bf16(x: Any) -> bool:
    """Whether x is one of the interpreter's bf16 tensors."""
    return isinstance(x, interpreter.TensorHandle) and x.dtype.scalar == tl.bfloat16


def widened(x: Any) -> Any:
    """x in fp32 if it is a bf16 tensor; else x."""
    return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if is_bf16(x) else x


def rounded(x: Any) -> Any:
    """An fp32 tensor rounded to bf16: to nearest, ties to even; nan stays nan."""
    bits = np.where(np.isnan(x.data), np.float32("nan"), x.data).view(np.uint32)
    return interpreter.TensorHandle((bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16), tl.bfloat16)


def in_fp32(method: Callable) -> Callable:
    """A builder's method, run on widened operands. Its result has the last operand's dtype; a comparison's stays as it is."""

    def call(self, *args):
        out = method(self, *map(widened, args))
        last = [x for x in args if isinstance(x, interpreter.TensorHandle)][-1]
        return rounded(out) if is_bf16(last) and out.data.dtype == np.float32 else out

    return call


def through_fp32(cast: Callable) -> Callable:
    """A builder's cast, which goes through fp32 if it is to or from bf16."""

    def call(self, x, dtype):
        x = widened(x)
        return rounded(cast(self, x, tl.float32)) if dtype.scalar == tl.bfloat16 else cast(self, x, dtype)

    return call


def step_by_step(total: Callable) -> Callable:
    """A reduction's sum, which for bf16 uses the corrected addition."""

    def call(self, x):
        return self.generic_reduce((x,))[0] if x.dtype == tl.bfloat16 else total(self, x)

    return call


def of_bools(splat: Callable) -> Callable:
    """A builder's repetition of a scalar over a block: of a comparison's answer it stays bool."""

    def call(self, block, x):
        return splat(self, block, interpreter.TensorHandle(x.data, tl.int1) if x.data.dtype == np.bool_ else x)

    return call


MENDS = (
    ("InterpreterBuilder", "cast_impl", through_fp32),
    ("InterpreterBuilder", "create_dot", in_fp32),
    ("InterpreterBuilder", "binary_op", in_fp32),
    ("InterpreterBuilder", "unary_op", in_fp32),  # minus, from Triton 3.8 on
    ("InterpreterBuilder", "create_fma", in_fp32),
    ("InterpreterBuilder", "create_splat", of_bools),
    ("ReduceOps", "sum", step_by_step),
)


@triton.jit
def _probe(x_ptr, y_ptr):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, x) + tl.where(x < 0, x * x, x + x))


def computes_bf16() -> bool:
    """Whether a small bf16 kernel gives PyTorch's bits in the interpreter."""
    x = ((torch.arange(256, device="cpu") * 37 % 256 - 128) / 16).view(16, 16)  # its products are exact in fp32
    y = torch.empty((16, 16), dtype=torch.bfloat16, device="cpu")
    try:
        with np.errstate(all="ignore"):  # an uncorrected interpreter may compute nan
            _probe[(1,)](x.bfloat16(), y)
    except Exception:  # depends on Triton's version
        return False
    part = torch.where(x < 0, x * x, x + x).bfloat16()
    return torch.equal(y, (x.double() @ x.double() + part).bfloat16())


def mend() -> None:
    """Correct the interpreter if it computes bf16 wrongly. If that fails, leave it unchanged, and warn."""
    if computes_bf16():
        return
    try:
        mends = [(getattr(interpreter, owner), name, how) for owner, name, how in MENDS]
        before = [getattr(owner, name) for owner, name, _ in mends]
    except AttributeError:  # this Triton has no such class or method
        mends, before = [], []
    for (owner, name, how), method in zip(mends, before, strict=True):
        setattr(owner, name, how(method))
    if not computes_bf16():
        for (owner, name, _), method in zip(mends, before, strict=True):
            setattr(owner, name, method)
        warnings.warn(
            f"Triton {triton.__version__}: its interpreter computes bfloat16 wrongly, and fastgpt cannot correct this version; "
            "without a GPU nothing is checked in bfloat16",
            stacklevel=2,
        )
