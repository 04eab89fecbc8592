"""A linear layer whose gradients leave its GEMMs as they are wanted.

    y = x w^T + b;  dx = dy w;  dw = dy^T x;  db = the sum over rows of dy

Shapes: x [..., K]; w [N, K]; b [N] or None. Saved: x, and w in the compute dtype. Recomputed: nothing.

All three products are cuBLAS's. What is won is around them: the weight comes in the compute dtype, from its shadow where one is
kept; and dw leaves the GEMM in the weight's own dtype, fp32 in training, where PyTorch under autocast rounds it to 16 bits and casts
it back in a kernel of its own; or it is added to the gradient that the weight has already in that GEMM (`common.grad_of`). So no
element of a weight or of its gradient is moved but by a GEMM, and the gradient is more exact.

Bytes beside the GEMMs': none; nanoGPT's casts move 6 for each element of w in each direction. FLOPs: 2 K N a row forward, 4 K N
backward.
"""

import torch
from torch import Tensor

from fastgpt.kernels.common import Op, can_run, cast, compute_dtype, grad_of, like, mm, project, row_sums


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor) -> Tensor:
    """y [..., N] in x's dtype; low is the weight in that dtype."""
    y = x.new_empty((*x.shape[:-1], low.size(0)))
    project(x.reshape(-1, x.size(-1)), low, bias, y.view(-1, low.size(0)))
    return y


def linear_bwd(
    dy: Tensor, x: Tensor, low: Tensor, w_dtype: torch.dtype, b_dtype: torch.dtype | None, into: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [..., K] in x's dtype, dw [N, K] and db [N] in the dtypes given); db is empty without a bias.

    With `into` [N, K], fp32, dw is added to that, and the answer's empty. Never so as a custom op, which would have to say it.
    """
    dy2, x2 = dy.reshape(-1, dy.size(-1)).to(x.dtype), x.reshape(-1, x.size(-1))
    dw = mm(dy2.t(), x2, w_dtype, into)
    return torch.mm(dy2, low).view(x.shape), x.new_empty(0) if dw is None else dw, row_sums(dy2, b_dtype)


# ---- what torch needs to know ----


def _setup(ctx, inputs, output):
    x, weight, bias, low = inputs
    ctx.save_for_backward(x, low)
    ctx.weight = weight  # not saved: its values are not read, and may change
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype


def _gradients(launch, ctx, dy):
    into = grad_of(ctx.weight)
    dx, dw, db = launch(dy, *ctx.saved_tensors, *ctx.dtypes, into)
    return dx, dw if into is None else None, None if ctx.dtypes[1] is None else db, None


_linear = Op(
    "linear",
    linear_fwd,
    lambda x, weight, bias, low: x.new_empty((*x.shape[:-1], low.size(0))),
    linear_bwd,
    lambda dy, x, low, w_dtype, b_dtype, into=None: (
        like(x, x.dtype),
        like(low, w_dtype),
        x.new_empty(0 if b_dtype is None else low.size(0), dtype=b_dtype or torch.float32),
    ),
    _setup,
    _gradients,
)


takes = can_run  # any x, wherever the other kernels run


def linear(x, weight, bias=None, shadow=None):
    """x weight^T + bias, [..., N], in autocast's dtype where that is on, else in x's.

    x [..., K]; weight [N, K]; bias [N] or None. shadow is the weight in the compute dtype, where the caller keeps one. Raises
    ValueError for shapes that do not match.
    """
    if (
        weight.dim() != 2
        or x.size(-1) != weight.size(1)
        or any(t is not None and t.shape != s for t, s in ((bias, weight.shape[:1]), (shadow, weight.shape)))
    ):
        raise ValueError(f"linear: x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias and shadow of other shapes")
    dtype = compute_dtype(x)
    return _linear(x.to(dtype), weight, bias, cast(weight, dtype, shadow))
