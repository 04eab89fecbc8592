"""A linear layer whose GEMMs write the gradients in the dtype, and to the place, in which they are needed.

    y = x w^T + b;  dx = dy w;  dw = dy^T x;  db = the sum over rows of dy

Shapes: x [..., K]; w [N, K]; b [N] or None. Saved: x, and w in the compute dtype. Recomputed: nothing.

cuBLAS computes all three products. This op saves the work around them. The weight is read in the compute dtype, from its shadow if it has
one. The GEMM writes dw in the weight's dtype, fp32 in training, or adds it to the weight's `.grad` (accumulate.py). PyTorch under autocast
rounds dw to 16 bits, and casts it back in a separate kernel. Here no other kernel moves a weight or its gradient, and the gradient is
more exact.

Bytes in addition to the GEMMs': none. nanoGPT's casts move 6 bytes for each element of w, forward and again backward. FLOPs for each row:
2 K N forward, 4 K N backward.
"""

import torch
from torch import Tensor

from fastgpt.kernels.accumulate import weight_gradient
from fastgpt.kernels.common import (
    can_run,
    cast,
    compute_dtype,
    forbid_double_backward,
    kernel_op,
    like,
    mm,
    project,
    sum_rows,
)


@kernel_op("y")
def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Compute y [..., N] from x [..., K] and weight [N, K] in x's dtype."""
    project(x.reshape(-1, x.size(-1)), weight, bias, y.view(-1, y.size(-1)))


@kernel_op("dx", "dw", "db")
def linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, accumulate: bool, dx: Tensor, dw: Tensor, db: Tensor | None
) -> None:
    """Compute dx [..., K], dw [N, K] and, unless it is None, db [N] from dy [..., N]. accumulate: add to dw, which must be fp32."""
    dy2, x2 = dy.reshape(-1, dy.size(-1)).to(x.dtype), x.reshape(-1, x.size(-1))
    mm(dy2.t(), x2, dw, accumulate)
    torch.mm(dy2, weight, out=dx.view(x2.shape))
    sum_rows(dy2, db)


# ---- the public op ----


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, cast_weight):
        """cast_weight is the weight in x's dtype."""
        y = x.new_empty((*x.shape[:-1], cast_weight.size(0)))
        linear_forward(x, cast_weight, bias, y)
        ctx.save_for_backward(x, cast_weight)
        ctx.weight = weight  # not saved: the backward does not read its values
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @forbid_double_backward("linear")
    def backward(ctx, dy):
        x, cast_weight = ctx.saved_tensors
        dw, accumulate = weight_gradient(ctx.weight, ctx.weight.dtype)
        db = None if ctx.bias_dtype is None else dy.new_empty(dy.size(-1), dtype=ctx.bias_dtype)
        dx = like(x, x.dtype)
        linear_backward(dy, x, cast_weight, accumulate, dx, dw, db)
        return dx, None if accumulate else dw, db, None


takes = can_run  # any x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, [..., N], in autocast's dtype if that is on, else in x's.

    x [..., K]; weight [N, K]; bias [N] or None. A weight with a shadow is read from it (fastgpt.shadows). Raises ValueError for
    shapes that do not match.
    """
    if weight.dim() != 2 or x.size(-1) != weight.size(1) or (bias is not None and bias.shape != weight.shape[:1]):
        shape = None if bias is None else tuple(bias.shape)
        raise ValueError(f"linear: x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {shape}")
    dtype = compute_dtype(x)
    return _Linear.apply(x.to(dtype), weight, bias, cast(weight, dtype))
