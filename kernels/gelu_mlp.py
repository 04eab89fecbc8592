"""The MLP: up-projection, exact GELU, down-projection. Two GEMMs compute the GELU and its derivative in their epilogues.

    pre = h w_fc^T + b_fc           [M, F], rounded to the compute dtype
    post = GELU(pre)                from the rounded pre: a recomputation from pre gives the same bits
    y = post w_proj^T + b_proj      [M, C]

Shapes: h [..., C], which has M rows; w_fc [F, C]; w_proj [C, F]; biases [F], [C] or None; F = 4 C in GPT-2. Saved: h, pre and post; with
`recompute` post is not saved. Backward, from dy:

    dpre = (dy w_proj) * GELU'(pre);  dh = dpre w_fc
    dw_fc = dpre^T h;  db_fc = the sum over rows of dpre;  dw_proj = dy^T post;  db_proj = the sum of dy

The two GEMMs next to the activation, h w_fc^T and dy w_proj, are one Triton kernel with two epilogues. The first epilogue writes pre and
post. The second reads pre, writes dpre (and post, if that was not saved), and sums the columns of its tile of dpre, as rounded, in fp32 for
db_fc; torch.sum adds up these sums. The other four GEMMs have nothing to fuse: cuBLAS computes them.

GELU(x) = max(x, 0) - |x| PHI(|x|), where PHI(t) = P[X < -t] = 2^poly(t) for a normal X. log2 PHI is smooth: a polynomial of degree 7 gives
PHI with a relative error of 5e-6, including the tail. docs/fit_gelu.py fits it. It shows that over all fp16 and bf16 inputs this GELU is
rounded to nearest more often than torch's with erf. It costs about 13 instructions, one of them on the special-function unit; tl.erf
costs 35. This matters because the epilogue does not overlap with the main loop, which is short at K = 768. fp32 uses tl.erf.

The tanh GELU, x (1 + tanh u) / 2 with u = sqrt(2/pi) (x + 0.044715 x^3), is x s with s = 1 / (1 + e^-2u), and its derivative
s + x s (1 - s) 2u'. In the tail 1 + tanh u has no digits left, and e^-2u has all. It costs ten instructions, two of them on the
special-function unit.

Bytes for each row of the hidden layer, bf16, without what the other GEMMs read: forward writes pre and post, 4 F; backward reads pre and
writes dpre, 4 F. Without fusion: 6 F and 8 F, and 2 F for db_fc. FLOPs for each row: 4 C F forward, 8 C F backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt.kernels import configs
from fastgpt.kernels.accumulate import weight_gradient
from fastgpt.kernels.common import (
    can_run,
    cast,
    cdiv,
    compute_dtype,
    forbid_double_backward,
    kernel_op,
    launch,
    like,
    mm,
    needs_grad,
    precision,
    project,
    sum_rows,
)

SQRT_HALF = tl.constexpr(0.7071067811865476)
HALF_LOG2E = tl.constexpr(0.7213475204444817)
LOG2_SQRT_2PI = tl.constexpr(1.3257480647361593)
# Of the tanh GELU: 2u = TANH_1 x + TANH_3 x^3.
TANH_1 = tl.constexpr(1.5957691216057308)
TANH_3 = tl.constexpr(0.07135481627159625)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def upper_tail(x):
    """(t = min(|x|, 6.5), PHI(t)) of fp32 x. docs/fit_gelu.py prints the coefficients."""
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
def sigmoid_2u(x, EXACT: tl.constexpr):
    """(x^2, s, s (1 - s)) with s = 1 / (1 + e^-2u) of the tanh GELU. x^2 ends at 106, where s is 0 or 1: nothing that is made of it
    overflows. EXACT: as in `gelu`."""
    square = tl.minimum(x * x, 106.0)
    e = tl.exp2(x * (square * (-TANH_3 * LOG2E) - TANH_1 * LOG2E))
    if EXACT:
        s = 1 / (1 + e)
        return square, s, tl.where(x < 0, s - s * s, e * s * s)  # near 1, s has not the digits of 1 - s
    r = tl.rsqrt(1 + e)  # with the product two instructions, where a division has five
    s = r * r
    return square, s, s - s * s


@triton.jit
def gelu(x, EXACT: tl.constexpr, TANH: tl.constexpr = False):
    """GELU of fp32 x: with tl.erf if EXACT, else precise enough for fp16 and bf16. TANH: the tanh GELU."""
    if TANH:
        _, s, _ = sigmoid_2u(x, EXACT)
        return x * s
    if EXACT:
        return 0.5 * x * (1 + tl.erf(x * SQRT_HALF))
    t, tail = upper_tail(x)
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - t * tail


@triton.jit
def gelu_derivative(x, EXACT: tl.constexpr, TANH: tl.constexpr = False):
    """GELU'(x) = P[X < x] + x density(x) of fp32 x. EXACT, TANH: as in `gelu`."""
    if TANH:
        square, s, slope = sigmoid_2u(x, EXACT)
        return s + slope * x * (square * (3 * TANH_3) + TANH_1)
    density = tl.exp2(x * x * -HALF_LOG2E - LOG2_SQRT_2PI)
    if EXACT:
        return 0.5 * (1 + tl.erf(x * SQRT_HALF)) + x * density
    _, tail = upper_tail(x)
    return tl.where(x < 0, tail, 1 - tail) + x * density


@triton.jit
def widened(z):
    """z in fp32. If bf16 is widened by its bits, what rounded z is compiled to packed conversions; otherwise, from sm_90 on, to scalar
    ones, which share a unit with exponentials."""
    if z.dtype == tl.bfloat16:
        return (z.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return z.to(tl.float32)


@triton.jit
def _mlp_gemm(
    a,  # [M, K] in: h; dy if BACKWARD. a, b, pre, post, dpre: pointers, or descriptors if TMA
    b,  # in: w_fc [N, K]; w_proj [K, N] if BACKWARD
    pre,  # [M, N] out, if KEEP_PRE; in, if BACKWARD
    post,  # [M, N] out; if BACKWARD, only if KEEP_POST
    dpre,  # [M, N] out, if BACKWARD
    bias_ptr,  # [N], if HAS_BIAS
    partial_ptr,  # [tiles of M, N] fp32 out, if BACKWARD and HAS_BIAS: column sums of dpre
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
    WARP_SPECIALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BACKWARD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_PRE: tl.constexpr,
    KEEP_POST: tl.constexpr,
    DTYPE: tl.constexpr,
    TANH: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    # Persistent: a program computes every num_programs-th tile. Tiles are in groups of GROUP tile rows, which share b in L2.
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN, warp_specialize=WARP_SPECIALIZE
    ):
        group = tile // (GROUP * tiles_n)
        height = tl.minimum(tiles_m - group * GROUP, GROUP)
        tile_m = group * GROUP + tile % (GROUP * tiles_n) % height
        m0, n0 = tile_m * BM, tile % (GROUP * tiles_n) // height * BN
        rm, rn = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN)
        acc = tl.zeros([BM, BN], tl.float32)
        for k0 in range(0, K, BK):
            if TMA:  # out of bounds TMA reads zeros, and writes nothing
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
            if KEEP_POST:  # as a pair with acc it has acc's layout: what it shares with the derivative is computed once
                value, acc = tl.split(tl.join(gelu(z, tl.float32 == DTYPE, TANH), acc))
                value = value.to(DTYPE)
            dz = (acc * gelu_derivative(z, tl.float32 == DTYPE, TANH)).to(DTYPE)
            if KEEP_POST:
                if TMA:
                    post.store([m0, n0], value)
                else:
                    tl.store(post + out, value, mask)
            if TMA:
                dpre.store([m0, n0], dz)
            else:
                tl.store(dpre + out, dz, mask)
            if HAS_BIAS:  # rows beyond M are zero in dz
                sums_ptrs = partial_ptr + tile_m.to(tl.int64) * N + rn
                if WARP_SPECIALIZE:  # the compiler allows no second product
                    tl.store(sums_ptrs, tl.sum(dz.to(tl.float32), 0), rn < N)
                else:  # a product with a row of ones: a third of the instructions of tl.sum, which shuffles every element three times
                    first = (tl.arange(0, 16) == 0)[:, None]
                    sums = tl.dot(tl.broadcast_to(first, (16, BM)).to(DTYPE), dz, input_precision="ieee")
                    tl.store(tl.broadcast_to(sums_ptrs[None, :], (16, BN)), sums, first & (rn < N)[None, :])
        else:
            if HAS_BIAS:
                acc += tl.load(bias_ptr + rn, rn < N, other=0.0).to(tl.float32)[None, :]
            z = acc.to(DTYPE)
            if KEEP_PRE:  # before GELU, which computes while TMA reads the tile that this writes to shared memory
                if TMA:
                    pre.store([m0, n0], z)
                else:
                    tl.store(pre + out, z, mask)
            value = gelu(widened(z), tl.float32 == DTYPE, TANH).to(DTYPE)
            if TMA:
                post.store([m0, n0], value)
            else:
                tl.store(post + out, value, mask)


# ---- launchers ----


def _config(row, *matrices):
    """The MLPConfig for these matrices: the first gives device and dtype, all give the alignment."""
    aligned = all(
        t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in matrices
    )
    return configs.gelu_mlp(matrices[0].device, matrices[0].dtype, aligned, row)


def _descriptor(t, block):
    """TensorDescriptor.from_tensor(t, block) without its checks, which take 3 us: `_config` has seen to the alignment."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.base, descriptor.shape, descriptor.strides, descriptor.block_shape = t, t.shape, t.stride(), block
    return descriptor


def _launch_gemm(a, b, N, pre, post, dpre, bias, partial, config, backward, tanh):
    """Launch the kernel as a GemmConfig says. `pre`, `post` and `dpre` are dense [M, N], or None if they are not needed."""
    M, K = a.shape
    if not M:
        return
    stride_bn, stride_bk = b.stride()[:: -1 if backward else 1]
    tiles = cdiv(M, config.block_m) * cdiv(N, config.block_n)
    programs = min(tiles, config.programs_per_sm * configs.multiprocessors(a.device))
    out_block = [config.block_m, config.block_n]
    b_block = [config.block_k, config.block_n] if backward else [config.block_n, config.block_k]
    blocks = [[config.block_m, config.block_k], b_block, out_block, out_block, out_block]
    operands = [
        _descriptor(t, block) if config.tma and t is not None else t
        for t, block in zip((a, b, pre, post, dpre), blocks, strict=True)
    ]
    launch(
        _mlp_gemm, (programs,),
        *operands, bias, partial, M, N, K, *a.stride(), stride_bn, stride_bk,
        BM=config.block_m, BN=config.block_n, BK=config.block_k, GROUP=config.group, TMA=config.tma,
        FLATTEN=config.flatten, WARP_SPECIALIZE=configs.warp_specialize(a.device, config), PRECISION=precision(a.dtype),
        BACKWARD=backward, HAS_BIAS=(partial if backward else bias) is not None,
        KEEP_PRE=pre is not None, KEEP_POST=post is not None, DTYPE=getattr(tl, str(a.dtype).removeprefix("torch.")), TANH=tanh,
        num_warps=config.warps, maxnreg=config.registers,
        num_stages=config.stages if config.tma else configs.pipeline(a.device, config.stages),
    )  # fmt: skip


@kernel_op("y", "pre", "post")
def gelu_mlp_forward(
    h: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, b_proj: Tensor | None, row: str,
    tanh: bool, y: Tensor, pre: Tensor | None, post: Tensor | None,
) -> None:  # fmt: skip
    """Compute y [..., C] from h [..., C]; write pre and post [M, F] unless they are None. The weights have h's dtype.

    tanh: the tanh GELU.
    """
    h2, F = h.reshape(-1, h.size(-1)), w_fc.size(0)
    activation = torch.empty((h2.size(0), F), dtype=h.dtype, device=h.device) if post is None else post
    config = _config(row, h2, w_fc, activation).forward
    _launch_gemm(h2, w_fc, F, pre, activation, None, b_fc, None, config, False, tanh)
    project(activation, w_proj, b_proj, y.view(h2.shape))


@kernel_op("dh", "dw_fc", "db_fc", "dw_proj", "db_proj")
def gelu_mlp_backward(
    dy: Tensor, h: Tensor, pre: Tensor, post: Tensor | None, w_fc: Tensor, w_proj: Tensor, row: str, tanh: bool, add_fc: bool,
    add_proj: bool, dh: Tensor, dw_fc: Tensor, db_fc: Tensor | None, dw_proj: Tensor, db_proj: Tensor | None,
) -> None:  # fmt: skip
    """Compute all gradients from dy [..., C]; those of the biases unless they are None.

    add_fc, add_proj: add to dw_fc, dw_proj, which must then be fp32. If post is None, it is computed again from pre.
    """
    dy2, h2 = dy.reshape(-1, dy.size(-1)).to(h.dtype), h.reshape(-1, h.size(-1))
    M, F = pre.shape
    config = _config(row, dy2, w_proj, pre).backward
    dpre = like(pre, pre.dtype)
    recomputed = like(pre, pre.dtype) if post is None else None
    tiles = cdiv(M, config.block_m)
    partial = None if db_fc is None else torch.empty((tiles, F), dtype=torch.float32, device=h.device)
    _launch_gemm(dy2, w_proj, F, pre, recomputed, dpre, None, partial, config, True, tanh)
    if db_fc is not None:
        sum_rows(partial, db_fc)
    mm(dy2.t(), recomputed if post is None else post, dw_proj, add_proj)
    torch.mm(dpre, w_fc, out=dh.view(h2.shape))
    mm(dpre.t(), h2, dw_fc, add_fc)
    sum_rows(dy2, db_proj)


# ---- the public op ----


class _GeluMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, w_fc, b_fc, w_proj, b_proj, cast_fc, cast_proj, keep_pre, keep_post, row, tanh):
        """cast_fc and cast_proj are the weights in h's dtype."""
        hidden = h.numel() // h.size(-1), w_fc.size(0)
        y = like(h, h.dtype)
        pre, post = (h.new_empty(hidden) if kept else None for kept in (keep_pre, keep_post))
        gelu_mlp_forward(h, cast_fc, b_fc, cast_proj, b_proj, row, tanh, y, pre, post)
        ctx.save_for_backward(h, pre, post, cast_fc, cast_proj)
        ctx.weights, ctx.row, ctx.tanh = (w_fc, w_proj), row, tanh  # not saved: the backward does not read their values
        ctx.bias_dtypes = [None if b is None else b.dtype for b in (b_fc, b_proj)]
        return y

    @staticmethod
    @forbid_double_backward("gelu_mlp")
    def backward(ctx, dy):
        h, pre, post, cast_fc, cast_proj = ctx.saved_tensors
        (dw_fc, add_fc), (dw_proj, add_proj) = (weight_gradient(w, w.dtype) for w in ctx.weights)
        db_fc, db_proj = (
            None if dtype is None else h.new_empty(w.size(0), dtype=dtype)
            for w, dtype in zip(ctx.weights, ctx.bias_dtypes, strict=True)
        )
        dh = like(h, h.dtype)
        gelu_mlp_backward(
            dy,
            h,
            pre,
            post,
            cast_fc,
            cast_proj,
            ctx.row,
            ctx.tanh,
            add_fc,
            add_proj,
            dh,
            dw_fc,
            db_fc,
            dw_proj,
            db_proj,
        )
        return dh, None if add_fc else dw_fc, db_fc, None if add_proj else dw_proj, db_proj, *(None,) * 6


takes = can_run  # any h


def gelu_mlp(
    h: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, b_proj: Tensor | None, recompute: bool = False, row: str = "",
    approximate: str = "none",
) -> Tensor:  # fmt: skip
    """GELU(h w_fc^T + b_fc) w_proj^T + b_proj, [..., C], in autocast's dtype if that is on, else in h's.

    h [..., C]; w_fc [F, C], w_proj [C, F]; b_fc [F] and b_proj [C], or None. `recompute` saves half of the memory between forward
    and backward; the bits are the same. A weight with a shadow is read from it (fastgpt.shadows). row: a launch configuration
    (configs.MLPConfig.text); "" means the table's. approximate: "tanh" for the tanh GELU, else "none". Raises ValueError for shapes that do
    not match.
    """
    C, F = h.size(-1), w_fc.size(0)
    biases = [(b, n) for b, n in ((b_fc, F), (b_proj, C)) if b is not None]
    if w_fc.shape != (F, C) or w_proj.shape != (C, F) or any(b.shape != (n,) for b, n in biases):
        raise ValueError(f"gelu_mlp: h {tuple(h.shape)}, w_fc {tuple(w_fc.shape)}, w_proj {tuple(w_proj.shape)}")
    if approximate not in ("none", "tanh"):
        raise ValueError(f'gelu_mlp: approximate={approximate!r} is neither "none" nor "tanh"')
    dtype = compute_dtype(h)
    grad = needs_grad(h, w_fc, b_fc, w_proj, b_proj)
    b_fc = None if b_fc is None else b_fc.contiguous()  # the kernel reads it without a stride
    cast_fc, cast_proj = cast(w_fc, dtype), cast(w_proj, dtype)
    return _GeluMLP.apply(
        h.to(dtype),
        w_fc,
        b_fc,
        w_proj,
        b_proj,
        cast_fc,
        cast_proj,
        grad,
        grad and not recompute,
        row,
        approximate == "tanh",
    )
