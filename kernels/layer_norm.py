"""LayerNorm, alone or after the residual add.

    stream' = stream + dropout(branch)                    the residual stream, fp32 in training unless --residual=bf16
    mean, rstd = the statistics of a row of stream'       fp32, two passes over registers
    h = (stream' - mean) * rstd * weight + bias           in the compute dtype

Shapes: stream, branch and h [..., C]; weight and bias [C]. Saved: stream', which exists anyway, and 8 bytes for each row, its mean and
rstd. Recomputed: the normalised row, and the dropout mask from its seed.

Backward, from the gradients dstream' and dh, in one pass over the rows:

    g = dh * weight;  xhat = (stream' - mean) * rstd
    dx = dstream' + rstd * (g - mean(g) - xhat * mean(g * xhat))
    dstream = dx, in the stream's dtype;  dbranch = dropout'(dx), in the branch's dtype
    dweight = the sum over rows of dh * xhat;  dbias = the sum over rows of dh

A program processes every so-many-th row, and keeps its sums of dweight and dbias in registers. torch.sum then adds the programs' sums.
There are no atomics: repeated runs give the same bits. There are as many programs as fit on the GPU at once. So a GPU with another number
of SMs adds dweight and dbias in another order, which may change their last bits; dstream and dbranch are the same everywhere.

Without dropout and with equal dtypes, dbranch equals dx, and is not written a second time.

Bytes for each element, fp32 stream and the rest bf16: forward reads 4 + 2 and writes 4 + 2; backward reads 4 + 4 + 2 and writes 4 + 2. All
bf16: forward reads 2 + 2 and writes 2 + 2; backward reads 2 + 2 + 2 and writes 2. About ten FLOPs for each element: memory limits the
speed, so a row is read once and stays in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import configs
from fastgpt.kernels.common import (
    can_run,
    check_seed,
    compute_dtype,
    dropout_keep_mask,
    forbid_double_backward,
    kept_scale,
    kernel_op,
    launch,
    like,
    next_power_of_2,
    rows,
)


@triton.jit
def _product(a, b):
    """a b [BLOCK], to be summed over the lanes of several warps. Where a thread has one element, a plain product would become one FMA with
    the first sum of two lanes, and each of the two would round another one. From Triton 3.8 on all lanes store a warp's sum in the same
    place: they must have the same bits."""
    if a.shape[0] <= 512:  # 16 warps have as many threads
        return tl.fma(a, b, tl.zeros_like(a))
    return a * b


@triton.jit
def _norm_forward(
    x_ptr,  # [B, T, N] the stream
    branch_ptr,  # [B, T, N] added to the stream, if HAS_BRANCH
    weight_ptr,  # [N]
    bias_ptr,  # [N], if HAS_BIAS
    seed_ptr,  # [1] int64, if DROPOUT
    stream_ptr,  # [B, T, N] out, contiguous, if HAS_BRANCH
    h_ptr,  # [B, T, N] out, contiguous
    stats_ptr,  # [2, M] fp32 out: each row's mean, then its rstd
    M,  # B * T
    T,
    stride_xb,
    stride_xt,
    stride_xn,
    stride_bb,
    stride_bt,
    stride_bn,
    eps,
    p,
    scale,  # 1 / (1 - p)
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # offsets may exceed 2^31 elements
    b, t = row // T, row % T
    cols = tl.arange(0, BLOCK)
    mask = cols < N
    x = tl.load(x_ptr + b * stride_xb + t * stride_xt + cols * stride_xn, mask, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        branch_ptrs = branch_ptr + b * stride_bb + t * stride_bt + cols * stride_bn
        branch = tl.load(branch_ptrs, mask, other=0.0).to(tl.float32)
        if DROPOUT:
            branch = tl.where(dropout_keep_mask(seed_ptr, row * N + cols, p), branch * scale, 0.0)
        # Normalise the rounded values that are stored: the backward reads those.
        x = (x + branch).to(stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + row * N + cols, x, mask)
        x = x.to(tl.float32)
    mean = tl.sum(x, 0) / N
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(_product(centred, centred), 0) / N + eps)
    h = centred * rstd * tl.load(weight_ptr + cols, mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        h += tl.load(bias_ptr + cols, mask, other=0.0).to(tl.float32)
    tl.store(h_ptr + row * N + cols, h.to(h_ptr.dtype.element_ty), mask)
    tl.store(stats_ptr + row, mean)
    tl.store(stats_ptr + M + row, rstd)


@triton.jit
def _norm_backward(
    dh_ptr,  # [B, T, N]
    dstream_ptr,  # [B, T, N] the gradient of the new stream, if HAS_DSTREAM
    stream_ptr,  # [B, T, N] the input of the normalisation
    stats_ptr,  # [2, M] fp32
    weight_ptr,  # [N]
    seed_ptr,  # [1] int64, if DROPOUT
    dx_ptr,  # [B, T, N] out, contiguous
    dbranch_ptr,  # [B, T, N] out, contiguous, if HAS_BRANCH
    partial_ptr,  # [2, programs, N] fp32 out: each program's dweight, then dbias
    M,  # B * T
    T,
    stride_hb,
    stride_ht,
    stride_hn,
    stride_db,
    stride_dt,
    stride_dn,
    stride_sb,
    stride_st,
    stride_sn,
    p,
    scale,  # 1 / (1 - p)
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_DSTREAM: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < N
    if BLOCK <= 4096:
        weight = tl.load(weight_ptr + cols, mask, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.cdiv(M - program, programs)):
        row = program + i * programs
        b, t = (row // T).to(tl.int64), (row % T).to(tl.int64)  # divided in 32 bits: in 64 bits it is a call
        row = row.to(tl.int64)  # offsets may exceed 2^31 elements
        dh = tl.load(dh_ptr + b * stride_hb + t * stride_ht + cols * stride_hn, mask, other=0.0).to(tl.float32)
        x = tl.load(stream_ptr + b * stride_sb + t * stride_st + cols * stride_sn, mask, other=0.0).to(tl.float32)
        if HAS_DSTREAM:
            dstream_ptrs = dstream_ptr + b * stride_db + t * stride_dt + cols * stride_dn
            dstream = tl.load(dstream_ptrs, mask, other=0.0).to(tl.float32)
        rstd = tl.load(stats_ptr + M + row)
        xhat = tl.where(mask, (x - tl.load(stats_ptr + row)) * rstd, 0.0)
        if BLOCK > 4096:  # read for every row, from L1: in registers it would spill
            weight = tl.load(weight_ptr + cols, mask, other=0.0).to(tl.float32)
        dweight += dh * xhat
        dbias += dh
        g = _product(dh, weight)
        if N == 1:  # xhat is 0, whatever x is: below, g would leave its rounding
            g *= 0.0
        # Use dstream before the sums. ptxas would otherwise load it after the wait for x, and each row would wait for memory twice.
        dx = rstd * g
        if HAS_DSTREAM:
            dx += dstream
        # One reduction of pairs has half as many barriers as two reductions.
        mean_g, mean_gx = tl.split(tl.sum(tl.join(g, _product(g, xhat)), 0) / N)
        dx -= rstd * (mean_g + xhat * mean_gx)
        tl.store(dx_ptr + row * N + cols, dx.to(dx_ptr.dtype.element_ty), mask)
        if HAS_BRANCH:
            if DROPOUT:
                dx = tl.where(dropout_keep_mask(seed_ptr, row * N + cols, p), dx * scale, 0.0)
            tl.store(dbranch_ptr + row * N + cols, dx.to(dbranch_ptr.dtype.element_ty), mask)
    tl.store(partial_ptr + program * N + cols, dweight, mask)
    tl.store(partial_ptr + (programs + program) * N + cols, dbias, mask)


# ---- launchers ----


@kernel_op("stream", "h", "stats")
def layer_norm_forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, p: float, seed: Tensor | None, row: str,
    stream: Tensor | None, h: Tensor, stats: Tensor,
) -> None:  # fmt: skip
    """Compute h [..., C], and stats [2, rows] fp32: each row's mean and rstd. With a branch, also stream, the sum of x and branch."""
    N = x.size(-1)
    M = x.numel() // N
    x3, b3 = rows(x), None if branch is None else rows(branch)
    strides = *x3.stride(), *(x3 if b3 is None else b3).stride()
    if M:
        launch(
            _norm_forward, (M,),
            x3, b3, weight, bias, seed, stream, h, stats, M, x3.size(1), *strides, eps, p, kept_scale(p),
            N=N, BLOCK=next_power_of_2(N), HAS_BRANCH=branch is not None, HAS_BIAS=bias is not None,
            DROPOUT=p > 0, num_warps=configs.layer_norm(N, row).forward_warps,
        )  # fmt: skip


@kernel_op("dx", "dbranch", "sums")
def layer_norm_backward(
    dh: Tensor, dstream: Tensor | None, stream: Tensor, stats: Tensor, weight: Tensor, p: float, seed: Tensor | None, row: str,
    dx: Tensor, dbranch: Tensor | None, sums: Tensor,
) -> None:  # fmt: skip
    """Compute dx [..., C], dbranch [..., C] unless it is None, and sums [1 or 2, C] fp32: dweight and, with a bias, dbias."""
    N = stream.size(-1)
    M = stream.numel() // N
    config = configs.layer_norm(N, row)
    programs = min(M, config.programs_per_sm * configs.multiprocessors(stream.device))
    partial = torch.empty((2, programs, N), dtype=torch.float32, device=stream.device)
    h3, s3, d3 = rows(dh), rows(stream), None if dstream is None else rows(dstream)
    strides = *h3.stride(), *(h3 if d3 is None else d3).stride(), *s3.stride()
    if M:
        launch(
            _norm_backward, (programs,),
            h3, d3, s3, stats, weight, seed, dx, dbranch, partial,
            M, h3.size(1), *strides, p, kept_scale(p),
            N=N, BLOCK=next_power_of_2(N), HAS_DSTREAM=dstream is not None, HAS_BRANCH=dbranch is not None,
            DROPOUT=p > 0, num_warps=config.backward_warps,
        )  # fmt: skip
    torch.sum(partial[: len(sums)], 1, out=sums)


# ---- the public op ----


class _AddLayerNorm(torch.autograd.Function):
    """(the stream, its LayerNorm). Without a branch the stream is x. The backward adds the stream's gradient when it computes dx.

    With `last` the output is the LayerNorm alone: for a stream that nobody reads, torch.compile would fill a gradient with zeros.
    """

    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps, p, seed, dtype, row, last):
        stream, h = None if branch is None else like(x, x.dtype), like(x, dtype)
        stats = torch.empty((2, x.numel() // x.size(-1)), dtype=torch.float32, device=x.device)
        layer_norm_forward(x, branch, weight, bias, eps, p, seed, row, stream, h, stats)
        ctx.save_for_backward(x if branch is None else stream, stats, weight, seed)
        ctx.has_bias, ctx.p, ctx.row = bias is not None, p, row
        ctx.branch_dtype = None if branch is None else branch.dtype
        ctx.set_materialize_grads(False)
        if last:
            return h
        return x.view_as(x) if branch is None else stream, h

    @staticmethod
    @forbid_double_backward("layer_norm")
    def backward(ctx, *grads):
        dstream, dh = grads if len(grads) == 2 else (None, *grads)
        stream, stats, weight, seed = ctx.saved_tensors
        if dh is None and ctx.branch_dtype is None:
            return dstream, *(None,) * 9
        if dh is None:  # h was not used: zeros with stride 0 cost nothing
            dh = stream.new_zeros(1).expand(stream.shape)
        same = ctx.p == 0 and ctx.branch_dtype == stream.dtype  # then dbranch is dx
        dx = like(stream, stream.dtype)
        dbranch = None if same or ctx.branch_dtype is None else like(stream, ctx.branch_dtype)
        sums = torch.empty((1 + ctx.has_bias, stream.size(-1)), dtype=torch.float32, device=stream.device)
        layer_norm_backward(dh, dstream, stream, stats, weight, ctx.p, seed, ctx.row, dx, dbranch, sums)
        sums = sums.to(weight.dtype)
        return dx, dx if same else dbranch, sums[0], sums[1] if ctx.has_bias else None, *(None,) * 6


def takes(x: Tensor, branch: Tensor | None = None) -> bool:
    """Whether these kernels can take x: on a GPU from sm_80 on or in the interpreter, rows not too wide, branch of x's shape."""
    fits = branch is None or branch.shape == x.shape
    return can_run(x) and x.dim() > 0 and 0 < x.size(-1) <= configs.LAYER_NORM[-1].max_width and fits


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, row: str = "") -> Tensor:
    """LayerNorm over the last dimension of x [..., C], C at most 8192; weight [C], bias [C] or None.

    The output is in autocast's dtype if that is on, else in x's. row: a launch configuration (configs.NormConfig.text); "" means the
    table's. Raises ValueError for an unsupported shape.
    """
    return add_layer_norm(x, None, weight, bias, eps, row=row, last=True)[1]


def add_layer_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, dropout_p: float = 0.0,
    seed: Tensor | None = None, row: str = "", last: bool = False,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """(stream = x + dropout(branch), its LayerNorm), each [..., C].

    The stream has the wider of x's and branch's dtypes; the LayerNorm has the dtype of `layer_norm`. If branch is None, the stream is x.
    With `last` nobody reads the stream, and None is returned for it. Dropout needs a seed, an int64 tensor of one element. row: as for
    `layer_norm`. Raises ValueError for shapes that do not match.
    """
    width = x.shape[-1:]
    if not width or weight.shape != width or (bias is not None and bias.shape != width):
        shapes = [None if t is None else tuple(t.shape) for t in (weight, bias)]
        raise ValueError(f"layer_norm: weight and bias of {shapes[0]} and {shapes[1]} for x of {tuple(x.shape)}")
    if branch is None:
        dropout_p, seed = 0.0, None
    elif x.shape != branch.shape:
        raise ValueError(f"add_layer_norm: a branch of {tuple(branch.shape)} for a stream of {tuple(x.shape)}")
    elif x.dtype not in (torch.float32, branch.dtype):  # else x's dtype holds the sum already
        x = x.to(torch.promote_types(x.dtype, branch.dtype))
    check_seed(dropout_p, seed)
    # The kernel reads weight and bias without strides.
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    outputs = _AddLayerNorm.apply(x, branch, weight, bias, eps, dropout_p, seed, compute_dtype(x), row, last)
    return (None, outputs) if last else outputs
