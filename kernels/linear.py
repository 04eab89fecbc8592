"""A linear layer whose gradients leave its GEMMs as they are wanted.

    y = x w^T + b;  dx = dy w;  dw = dy^T x;  db = the sum over rows of dy

Shapes: x [..., K]; w [N, K]; b [N] or None. Saved: x, and w in the compute dtype. Recomputed: nothing.

All three products are cuBLAS's. What is won is around them: the weight comes in the compute dtype, from its shadow where one is
kept; and dw leaves the GEMM in the weight's own dtype, fp32 in training, where PyTorch under autocast rounds it to 16 bits and casts
it back in a kernel of its own. Or that GEMM adds it to the gradient that the weight has already (accumulate.py). No other kernel moves
an element of a weight or of its gradient, and the gradient is more exact.

Bytes beside the GEMMs': none; nanoGPT's casts move 6 for each element of w in each direction. FLOPs: 2 K N a row forward, 4 K N
backward.
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
    """Write y [..., N] of x [..., K] and weight [N, K] in x's dtype."""
    project(x.reshape(-1, x.size(-1)), weight, bias, y.view(-1, y.size(-1)))


@kernel_op("dx", "dw", "db")
def linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, accumulate: bool, dx: Tensor, dw: Tensor, db: Tensor | None
) -> None:
    """Write dx [..., K], dw [N, K] and where wanted db [N] of dy [..., N]; dw is added to where `accumulate`, then fp32."""
    dy2, x2 = dy.reshape(-1, dy.size(-1)).to(x.dtype), x.reshape(-1, x.size(-1))
    mm(dy2.t(), x2, dw, accumulate)
    torch.mm(dy2, weight, out=dx.view(x2.shape))
    sum_rows(dy2, db)


# ---- what torch needs to know ----


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, low):
        """low is the weight in x's dtype."""
        y = x.new_empty((*x.shape[:-1], low.size(0)))
        linear_forward(x, low, bias, y)
        ctx.save_for_backward(x, low)
        ctx.weight = weight  # not saved: its values are not read, and may change
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @forbid_double_backward("linear")
    def backward(ctx, dy):
        x, low = ctx.saved_tensors
        dw, accumulate = weight_gradient(ctx.weight, ctx.weight.dtype)
        db = None if ctx.bias_dtype is None else dy.new_empty(dy.size(-1), dtype=ctx.bias_dtype)
        dx = like(x, x.dtype)
        linear_backward(dy, x, low, accumulate, dx, dw, db)
        return dx, None if accumulate else dw, db, None


takes = can_run  # any x, wherever the other kernels run


def linear(x, weight, bias=None):
    """x weight^T + bias, [..., N], in autocast's dtype where that is on, else in x's.

    x [..., K]; weight [N, K]; bias [N] or None. A weight's shadow is read where it has one (fastgpt.shadows). Raises ValueError for
    shapes that do not match.
    """
    if weight.dim() != 2 or x.size(-1) != weight.size(1) or (bias is not None and bias.shape != weight.shape[:1]):
        shape = None if bias is None else tuple(bias.shape)
        raise ValueError(f"linear: x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {shape}")
    dtype = compute_dtype(x)
    return _Linear.apply(x.to(dtype), weight, bias, cast(weight, dtype))
