"""The MLP: up-projection, exact GELU, down-projection; the GELU and its derivative in the epilogues of two GEMMs.

    pre = h w_fc^T + b_fc           [M, F], rounded to the compute dtype
    post = GELU(pre)                of the rounded pre: computed again from pre it is the same, bit for bit
    y = post w_proj^T + b_proj      [M, C]

Shapes: h [..., C]; w_fc [F, C]; w_proj [C, F]; biases [F], [C] or None; M rows, F = 4 C in GPT-2. Saved: h, pre and post, or
with `recompute` not post. Backward, of dy:

    dpre = (dy w_proj) * GELU'(pre);  dh = dpre w_fc
    dw_fc = dpre^T h;  db_fc = the sum over rows of dpre;  dw_proj = dy^T post;  db_proj = the sum of dy

The two GEMMs that end or begin with the activation, h w_fc^T and dy w_proj, are one Triton kernel with two epilogues:
the first writes pre and post, the second reads pre, writes dpre (and post, where that was not kept) and sums the columns
of its tile for db_fc, which a second kernel adds up in a fixed order. The other four GEMMs have nothing to fuse: cuBLAS does them.

GELU(x) = max(x, 0) - |x| PHI(|x|), where PHI(t) = P[X < -t] = 2^poly(t): log2 PHI is smooth, and a polynomial of degree 7 has
it to 5e-6, relatively, tail included. docs/fit_gelu.py fits it and shows that over all fp16 and bf16 inputs it rounds more of
them to nearest than torch's erf does. It costs about 13 instructions, one of them on the special-function unit, where tl.erf
takes 35: the epilogue is not overlapped with a main loop that at K = 768 is short. fp32 takes tl.erf.

Bytes of the hidden layer a row, bf16, what the other GEMMs read apart: forward writes pre and post, 4 F; backward reads pre and
writes dpre, 4 F. Unfused it is 6 F and 8 F, and 2 F more for db_fc. FLOPs: 4 C F a row forward, 8 C F backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt.kernels import configs
from fastgpt.kernels.common import (
    Op,
    can_run,
    cast,
    compute_dtype,
    grad_of,
    like,
    mm,
    needs_grad,
    precision,
    project,
    row_sums,
)

SQRT_HALF = tl.constexpr(0.7071067811865476)
HALF_LOG2E = tl.constexpr(0.7213475204444817)
LOG2_SQRT_2PI = tl.constexpr(1.3257480647361593)


@triton.jit
def upper_tail(x):
    """(min(|x|, 6.5), PHI of that), of fp32 x; the coefficients are printed by docs/fit_gelu.py."""
    t = tl.minimum(tl.abs(x), 6.5, propagate_nan=tl.PropagateNan.ALL)
    p = -1.757775955e-06
    p = tl.fma(t, p, 5.993656734e-05)
    p = tl.fma(t, p, -9.163628216e-04)
    p = tl.fma(t, p, 8.447384981e-03)
    p = tl.fma(t, p, -5.382450069e-02)
    p = tl.fma(t, p, -4.586157081e-01)
    p = tl.fma(t, p, -1.151180166e00)
    p = tl.fma(t, p, -1.000003873e00)
    return t, tl.exp2(p)


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """GELU of fp32 x: by tl.erf where EXACT, else to the rounding of fp16 and bf16."""
    if EXACT:
        return 0.5 * x * (1 + tl.erf(x * SQRT_HALF))
    t, tail = upper_tail(x)
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - t * tail


@triton.jit
def gelu_derivative(x, EXACT: tl.constexpr):
    """GELU'(x) = P[X < x] + x density(x), of fp32 x."""
    density = tl.exp2(x * x * -HALF_LOG2E - LOG2_SQRT_2PI)
    if EXACT:
        return 0.5 * (1 + tl.erf(x * SQRT_HALF)) + x * density
    _, tail = upper_tail(x)
    return tl.where(x < 0, tail, 1 - tail) + x * density


@triton.jit
def _mlp_gemm(
    a,  # [M, K] in: h, or dy; a pointer, or where TMA a descriptor, as all that follow up to `dpre`
    b,  # [N, K] in, w_fc; where BACKWARD [K, N], w_proj
    pre,  # [M, N] out, where KEEP_PRE; where BACKWARD in
    post,  # [M, N] out; where BACKWARD only where KEEP_POST
    dpre,  # [M, N] out, where BACKWARD
    bias_ptr,  # [N], where HAS_BIAS
    partial_ptr,  # [tiles of M, N] fp32 out, where BACKWARD and HAS_BIAS: the column sums of dpre
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bn,
    stride_bk,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BACKWARD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_PRE: tl.constexpr,
    KEEP_POST: tl.constexpr,
    DTYPE: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    # Persistent: a program takes every so-many-th tile, in groups of GROUP rows of tiles that share b in L2.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        group = tile // (GROUP * tiles_n)
        height = tl.minimum(tiles_m - group * GROUP, GROUP)
        tile_m = group * GROUP + tile % (GROUP * tiles_n) % height
        m0, n0 = tile_m * BM, tile % (GROUP * tiles_n) // height * BN
        rm, rn = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN)
        acc = tl.zeros([BM, BN], tl.float32)
        for k0 in range(0, K, BK):
            if TMA:  # beyond the edges it reads zeros, and writes nothing
                x = a.load([m0, k0])
                w = b.load([k0, n0]) if BACKWARD else b.load([n0, k0]).T
            else:
                rk = k0 + tl.arange(0, BK)
                a_ptrs = a + rm.to(tl.int64)[:, None] * stride_am + rk[None, :] * stride_ak
                x = tl.load(a_ptrs, (rm < M)[:, None] & (rk < K)[None, :], other=0.0)
                b_ptrs = b + rk[:, None] * stride_bk + rn.to(tl.int64)[None, :] * stride_bn
                w = tl.load(b_ptrs, (rk < K)[:, None] & (rn < N)[None, :], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
        out = rm.to(tl.int64)[:, None] * N + rn[None, :]
        mask = (rm < M)[:, None] & (rn < N)[None, :]
        if BACKWARD:
            z = pre.load([m0, n0]) if TMA else tl.load(pre + out, mask, other=0.0)
            z = z.to(tl.float32)
            if KEEP_POST:
                value = gelu(z, tl.float32 == DTYPE).to(DTYPE)
                if TMA:
                    post.store([m0, n0], value)
                else:
                    tl.store(post + out, value, mask)
            acc *= gelu_derivative(z, tl.float32 == DTYPE)
            if TMA:
                dpre.store([m0, n0], acc.to(DTYPE))
            else:
                tl.store(dpre + out, acc.to(DTYPE), mask)
            if HAS_BIAS:  # rows beyond M are zero
                tl.store(partial_ptr + tile_m.to(tl.int64) * N + rn, tl.sum(acc, 0), rn < N)
        else:
            if HAS_BIAS:
                acc += tl.load(bias_ptr + rn, rn < N, other=0.0).to(tl.float32)[None, :]
            z = acc.to(DTYPE)
            value = gelu(z.to(tl.float32), tl.float32 == DTYPE).to(DTYPE)
            if TMA:
                post.store([m0, n0], value)
            else:
                tl.store(post + out, value, mask)
            if KEEP_PRE:
                if TMA:
                    pre.store([m0, n0], z)
                else:
                    tl.store(pre + out, z, mask)


@triton.jit
def _mlp_column_sums(
    partial_ptr,  # [P, N] fp32
    out_ptr,  # [N] out
    P,
    N,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, P, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        total += tl.load(
            partial_ptr + rows[:, None] * N + cols[None, :], (rows < P)[:, None] & (cols < N)[None, :], other=0.0
        )
    tl.store(out_ptr + cols, tl.sum(total, 0).to(out_ptr.dtype.element_ty), cols < N)


# ---- launchers ----


def _config(*matrices):
    """The MLPConfig for these matrices, inputs and outputs."""
    aligned = all(
        t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in matrices
    )
    return configs.gelu_mlp(matrices[0].device, matrices[0].dtype, aligned)


def _launch_gemm(a, b, N, pre, post, dpre, bias, partial, config, backward):
    """The kernel on matrices; `pre`, `post` and `dpre` [M, N] are dense, or None where they are not wanted."""
    M, K = a.shape
    if not M:
        return
    stride_bn, stride_bk = b.stride()[:: -1 if backward else 1]
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    programs = min(tiles, config.programs_per_sm * configs.multiprocessors(a.device))
    out_block = [config.block_m, config.block_n]
    b_block = [config.block_k, config.block_n] if backward else [config.block_n, config.block_k]
    blocks = [[config.block_m, config.block_k], b_block, out_block, out_block, out_block]
    operands = [
        TensorDescriptor.from_tensor(t, block) if config.tma and t is not None else t
        for t, block in zip((a, b, pre, post, dpre), blocks, strict=True)
    ]
    _mlp_gemm[(programs,)](
        *operands, bias, partial, M, N, K, *a.stride(), stride_bn, stride_bk,
        BM=config.block_m, BN=config.block_n, BK=config.block_k, GROUP=config.group, TMA=config.tma, FLATTEN=config.flatten,
        PRECISION=precision(a.dtype), BACKWARD=backward, HAS_BIAS=(partial if backward else bias) is not None,
        KEEP_PRE=pre is not None, KEEP_POST=post is not None, DTYPE=getattr(tl, str(a.dtype).removeprefix("torch.")),
        num_warps=config.warps, num_stages=config.stages if config.tma else configs.pipeline(a.device, config.stages),
    )  # fmt: skip


def gelu_mlp_fwd(
    h: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, b_proj: Tensor | None, fc: Tensor, proj: Tensor,
    keep_pre: bool, keep_post: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y [..., C], pre [M, F], post [M, F]) of h [..., C], in h's dtype; pre and post are empty where they are not kept.

    fc and proj are w_fc and w_proj in h's dtype.
    """
    h2, F = h.reshape(-1, h.size(-1)), w_fc.size(0)
    post = torch.empty((h2.size(0), F), dtype=h.dtype, device=h.device)
    pre = like(post, h.dtype) if keep_pre else None
    _launch_gemm(h2, fc, F, pre, post, None, b_fc, None, _config(h2, fc, post), backward=False)
    y = like(h, h.dtype)
    project(post, proj, b_proj, y.view(h2.shape))
    return y, h.new_empty(0) if pre is None else pre, post if keep_post else h.new_empty(0)


def gelu_mlp_bwd(
    dy: Tensor, h: Tensor, pre: Tensor, post: Tensor, fc: Tensor, proj: Tensor, w_fc_dtype: torch.dtype,
    b_fc_dtype: torch.dtype | None, w_proj_dtype: torch.dtype, b_proj_dtype: torch.dtype | None,
    into_fc: Tensor | None = None, into_proj: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dh, dw_fc, db_fc, dw_proj, db_proj) in the dtypes given, the biases' empty where they have none; post may be empty.

    With into_fc or into_proj, fp32, dw_fc or dw_proj is added to that, and empty. Never so as a custom op, which would have to say it.
    """
    dy2, h2 = dy.reshape(-1, dy.size(-1)).to(h.dtype), h.reshape(-1, h.size(-1))
    M, F = pre.shape
    config = _config(dy2, proj, pre)
    dpre = like(pre, pre.dtype)
    recomputed = None if post.numel() == pre.numel() else like(pre, pre.dtype)
    tiles = triton.cdiv(M, config.block_m)
    partial = None if b_fc_dtype is None else torch.empty((tiles, F), dtype=torch.float32, device=h.device)
    _launch_gemm(dy2, proj, F, pre, recomputed, dpre, None, partial, config, backward=True)
    db_fc = torch.empty(0 if b_fc_dtype is None else F, dtype=b_fc_dtype, device=h.device)
    if partial is not None:
        _mlp_column_sums[(triton.cdiv(F, config.sum_columns),)](
            partial, db_fc, tiles, F, ROWS=config.sum_rows, COLUMNS=config.sum_columns
        )
    dw_proj = mm(dy2.t(), post if recomputed is None else recomputed, w_proj_dtype, into_proj)
    dh = mm(dpre, fc, h.dtype).view(h.shape)
    dw_fc = mm(dpre.t(), h2, w_fc_dtype, into_fc)
    dw_fc, dw_proj = (h.new_empty(0) if dw is None else dw for dw in (dw_fc, dw_proj))
    return dh, dw_fc, db_fc, dw_proj, row_sums(dy2, b_proj_dtype)


# ---- what torch needs to know ----


def _fake_forward(h, w_fc, b_fc, w_proj, b_proj, fc, proj, keep_pre, keep_post):
    shape = h.numel() // h.size(-1), w_fc.size(0)
    return like(h, h.dtype), h.new_empty(shape if keep_pre else 0), h.new_empty(shape if keep_post else 0)


def _fake_backward(
    dy, h, pre, post, fc, proj, w_fc_dtype, b_fc_dtype, w_proj_dtype, b_proj_dtype, into_fc=None, into_proj=None
):
    db_fc = h.new_empty(0 if b_fc_dtype is None else fc.size(0), dtype=b_fc_dtype or torch.float32)
    db_proj = h.new_empty(0 if b_proj_dtype is None else proj.size(0), dtype=b_proj_dtype or torch.float32)
    return like(h, h.dtype), like(fc, w_fc_dtype), db_fc, like(proj, w_proj_dtype), db_proj


def _setup(ctx, inputs, output):
    h, *weights, fc, proj, _, _ = inputs  # w_fc, b_fc, w_proj, b_proj
    _, pre, post = output
    ctx.save_for_backward(h, pre, post, fc, proj)
    ctx.weights = weights[0], weights[2]  # not saved: their values are not read, and may change
    ctx.dtypes = [None if w is None else w.dtype for w in weights]
    ctx.mark_non_differentiable(pre, post)
    ctx.set_materialize_grads(False)  # else zeros are filled for these, as large as they are


def _gradients(launch, ctx, dy, *_):
    if dy is None:
        return (None,) * 9
    into = [grad_of(w) for w in ctx.weights]
    dh, dw_fc, db_fc, dw_proj, db_proj = launch(dy, *ctx.saved_tensors, *ctx.dtypes, *into)
    _, b_fc, _, b_proj = ctx.dtypes
    dw_fc, dw_proj = (dw if grad is None else None for dw, grad in zip((dw_fc, dw_proj), into, strict=True))
    return dh, dw_fc, None if b_fc is None else db_fc, dw_proj, None if b_proj is None else db_proj, *(None,) * 4


_gelu_mlp = Op("gelu_mlp", gelu_mlp_fwd, _fake_forward, gelu_mlp_bwd, _fake_backward, _setup, _gradients)


takes = can_run  # any h, wherever Triton runs


def gelu_mlp(h, w_fc, b_fc, w_proj, b_proj, recompute=False, shadows=(None, None)):
    """GELU(h w_fc^T + b_fc) w_proj^T + b_proj, [..., C], in autocast's dtype where that is on, else in h's.

    h [..., C]; w_fc [F, C], w_proj [C, F]; b_fc [F] and b_proj [C], or None. `recompute` saves half of the memory between forward
    and backward, and gives the same bits. shadows: w_fc and w_proj in the compute dtype, where the caller keeps them. Raises
    ValueError for shapes that do not match.
    """
    C, F = h.size(-1), w_fc.size(0)
    biases = [(b, n) for b, n in ((b_fc, F), (b_proj, C)) if b is not None]
    if w_fc.shape != (F, C) or w_proj.shape != (C, F) or any(b.shape != (n,) for b, n in biases):
        raise ValueError(f"gelu_mlp: h {tuple(h.shape)}, w_fc {tuple(w_fc.shape)}, w_proj {tuple(w_proj.shape)}")
    dtype = compute_dtype(h)
    grad = needs_grad(h, w_fc, b_fc, w_proj, b_proj)
    fc, proj = (cast(w, dtype, shadow) for w, shadow in zip((w_fc, w_proj), shadows, strict=True))
    b_fc = None if b_fc is None else b_fc.contiguous()  # the kernel reads it without a stride
    return _gelu_mlp(h.to(dtype), w_fc, b_fc, w_proj, b_proj, fc, proj, grad, grad and not recompute)[0]
