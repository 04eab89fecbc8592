"""Triton's interpreter, mended in bf16, which it keeps as 16 bits in an unsigned integer.

It takes these bits for the number in tl.dot, in arithmetic, comparisons and sums, and in casts to and from integers and fp64. Its cast
from fp32 cuts bits off, where a GPU rounds to nearest even, and both casts lose subnormals. Here operands are widened to fp32, and
answers are rounded once. A sum of bf16 is rounded at every step, as on a GPU, but one element after another, not in a tree.

Left as it is: atomics, fp8, and fp_downcast_rounding="rtz". A constant in bf16 is an AttributeError, but for 0.
"""

import warnings

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter


def is_bf16(x):
    """Whether x is a tensor of bf16, as the interpreter holds it."""
    return isinstance(x, interpreter.TensorHandle) and x.dtype.scalar == tl.bfloat16


def widened(x):
    """x in fp32 where it is a tensor of bf16; else x."""
    return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if is_bf16(x) else x


def rounded(x):
    """A tensor of fp32 in bf16: to nearest, ties to even; nan stays nan."""
    bits = np.where(np.isnan(x.data), np.float32("nan"), x.data).view(np.uint32)
    return interpreter.TensorHandle((bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16), tl.bfloat16)


def in_fp32(method):
    """The builder's method on widened operands. Its answer has the last one's dtype, but for a comparison's."""

    def call(self, *args):
        out = method(self, *map(widened, args))
        last = [x for x in args if isinstance(x, interpreter.TensorHandle)][-1]
        return rounded(out) if is_bf16(last) and out.data.dtype == np.float32 else out

    return call


def through_fp32(cast):
    """The builder's cast, by way of fp32 where it is to or from bf16."""

    def call(self, x, dtype):
        x = widened(x)
        return rounded(cast(self, x, tl.float32)) if dtype.scalar == tl.bfloat16 else cast(self, x, dtype)

    return call


def step_by_step(total):
    """A reduction's sum, of bf16 by the mended addition."""

    def call(self, x):
        return self.generic_reduce((x,))[0] if x.dtype == tl.bfloat16 else total(self, x)

    return call


MENDS = (
    ("InterpreterBuilder", "cast_impl", through_fp32),
    ("InterpreterBuilder", "create_dot", in_fp32),
    ("InterpreterBuilder", "binary_op", in_fp32),
    ("InterpreterBuilder", "unary_op", in_fp32),  # minus, from Triton 3.8 on
    ("InterpreterBuilder", "create_fma", in_fp32),
    ("ReduceOps", "sum", step_by_step),
)


@triton.jit
def _probe(x_ptr, y_ptr):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, x) + tl.where(x < 0, x * x, x + x))


def computes_bf16():
    """Whether a small kernel in bf16, run by the interpreter, gives PyTorch's bits."""
    x = ((torch.arange(256, device="cpu") * 37 % 256 - 128) / 16).view(16, 16)  # its products are exact in fp32
    y = torch.empty((16, 16), dtype=torch.bfloat16, device="cpu")
    try:
        with np.errstate(all="ignore"):  # bits that are taken for numbers may be nan
            _probe[(1,)](x.bfloat16(), y)
    except Exception:  # of what kind is up to what has changed in Triton
        return False
    part = torch.where(x < 0, x * x, x + x).bfloat16()
    return torch.equal(y, (x.double() @ x.double() + part).bfloat16())


def mend():
    """Mend the interpreter where it computes bf16 wrongly. One that cannot be mended so is left as it is, with a warning."""
    if computes_bf16():
        return
    try:
        mends = [(getattr(interpreter, owner), name, how) for owner, name, how in MENDS]
        before = [getattr(owner, name) for owner, name, _ in mends]
    except AttributeError:  # it is built in another way
        mends, before = [], []
    for (owner, name, how), method in zip(mends, before, strict=True):
        setattr(owner, name, how(method))
    if not computes_bf16():
        for (owner, name, _), method in zip(mends, before, strict=True):
            setattr(owner, name, method)
        warnings.warn(
            f"Triton {triton.__version__}: its interpreter computes bfloat16 wrongly, and is not built as fastgpt expects, which would "
            "mend it; without a GPU nothing is held in bfloat16",
            stacklevel=2,
        )
