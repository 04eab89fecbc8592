"""Causal self-attention of packed queries, keys and values, tile by tile: no [T, T] matrix is written to memory.

    s = q k^T / sqrt(D)                  causal; within each document if doc_ids are given
    out = dropout(softmax(s)) v

Shapes: qkv [B, T, 3 C], each row holds q, then k, then v, each with H heads of size D; out [B, T, C]; doc_ids [B, T] integers. Inputs are
read by their strides, and out has the layout that the next layer reads: no transpose, no copy. Saved: qkv, out, and lse [B, H, T] fp32,
the log2 of each row's sum of 2^(s log2 e). Recomputed: the probabilities, and the dropout mask.

The same kernels take q [B, T, H, D] apart from k and v [B, T, Hk, D], of which GROUP = H / Hk heads of queries share one. The backward
then adds up dk and dv over the heads of a group, in their order, before it rounds them.

Forward: a program keeps a block of queries in registers, loops over the keys, and updates each row's maximum and sum (online softmax).
Only the blocks of keys on the diagonal need a mask. The last blocks of queries start first, since they have the most keys.

Backward, from dout, with delta[i] = sum_d dout[i, d] out[i, d]:

    p = 2^(s log2 e - lse);  ds = p * (dropout'(dout v^T) - delta)
    dv = dropout(p)^T dout;  dk = ds^T q / sqrt(D);  dq = ds k / sqrt(D)

One program computes dk and dv of a block of keys (from this block's queries and all later ones), then dq of the same block of queries
(from all keys up to it). So every program does the same amount of work. No sum crosses programs: there are no atomics, and repeated runs
give the same bits. The price: s and dout v^T are computed twice, seven matrix products for each tile instead of five. All three
gradients go into one [B, T, 3 C], as the backward of the projection reads it.

Dropout: Philox4x32-7 of the seed at the counter (column, row, head, batch) decides each element, so the mask does not depend on tiles.

Bytes for each token, 16-bit elements, if tiles are reread from L2: forward 2 (3 C + C) + 4 H; backward 2 (3 C + 3 C + 3 C) + 12 H, where
dout is also read for delta. FLOPs for each token, causal: forward 2 T C, backward 7/2 of that. At D = 64 the exponentials take as long
as the products. So the kernels use exp2, with the scale folded into one FMA: a row's maximum is that of its scores before the scale.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import configs
from fastgpt.kernels.common import (
    can_run,
    cdiv,
    check_seed,
    compute_dtype,
    forbid_double_backward,
    kept_scale,
    kernel_op,
    launch,
    like,
    next_power_of_2,
    precision,
)

LOG2E = math.log2(math.e)
MAX_HEAD_SIZE = 128


@triton.jit
def _dropout_keep_mask(seed, b, h, rows, cols, p):
    """Whether dropout keeps the elements (rows, cols). Their shapes broadcast."""
    word, _, _, _ = tl.philox(seed, cols, rows, h, b, n_rounds=7)
    return tl.uint_to_uniform_float(word) >= p


@triton.jit
def _inside(rows, bound, KNOWN: tl.constexpr):
    """Whether each row is before bound. KNOWN: all are, and loads need no mask."""
    return tl.full(rows.shape, 1, tl.int1) if KNOWN else rows < bound


@triton.jit
def _reaches(ahead, lanes):
    """ahead >= lanes, an arange; their shapes broadcast. In the layouts of products only bits 1, 2 and 5 of a lane depend on the thread.
    With these on the left a thread compares with constants, which need no registers. Positions are compared relative to the loop's: of
    the loop's own the compiler makes 64 bits, as addresses need them."""
    return ahead - (lanes & 38) >= (lanes & ~38)


@triton.jit
def _tile(ptr, rows, stride_row, stride_col, inside, D: tl.constexpr, BD: tl.constexpr):
    """Load rows [R] of a matrix [., D], padded to [R, BD]. The padding and the rows that are not `inside` are zeros."""
    d = tl.arange(0, BD)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride_row + (d * stride_col)[None, :]
    mask = inside[:, None] & (d < D)[None, :] if D < BD else inside[:, None]
    return tl.load(ptrs, mask, other=0.0)


@triton.jit
def _store(ptr, rows, stride_row, inside, value, D: tl.constexpr, BD: tl.constexpr):
    """Store what _tile loads; columns have stride 1."""
    d = tl.arange(0, BD)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride_row + d[None, :]
    tl.store(ptrs, value.to(ptr.dtype.element_ty), inside[:, None] & (d < D)[None, :])


@triton.jit
def _head(ptr, b, h, stride_b, stride_h, stride_c, D: tl.constexpr):
    """ptr at head h of sequence b. stride_h is None: the heads are D columns each."""
    ptr += b.to(tl.int64) * stride_b
    ptr += h * D * stride_c if stride_h is None else h.to(tl.int64) * stride_h
    return ptr


@triton.jit
def _meeting(doc_ids_ptr, stride, low, high, start, end):
    """(first, after): the positions in [start, end) whose document is between low and high lie in [first, after)."""
    first = end
    after = start
    for t0 in range(start, end, 1024):
        t = t0 + tl.arange(0, 1024)
        doc = tl.load(doc_ids_ptr + t.to(tl.int64) * stride, t < end, other=0)
        meets = (t < end) & (doc >= low) & (doc <= high)
        first = tl.minimum(first, tl.min(tl.where(meets, t, end), 0))
        after = tl.maximum(after, tl.max(tl.where(meets, t + 1, start), 0))
    return first, after


@triton.jit
def _forward_step(
    acc, total, m, q, k_ptr, v_ptr, b, h, rows, row_docs, n0, lanes, col_docs, T, stride_kt, stride_kc, stride_vt, stride_vc,
    seed, scale, p, keep_scale,
    D: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr, DOC_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Process one block of keys: (new accumulator, new sum, new maximum) of each row."""
    cols = n0 + lanes
    inside = _inside(lanes, T - n0, EVEN or not MASKED)
    k = _tile(k_ptr, cols, stride_kt, stride_kc, inside, D, BD)
    s = tl.dot(q, k.T, input_precision=PRECISION)
    # Minus infinity, but finite: a row without keys so far accumulates garbage, which its first key multiplies by 2^-1e30 = 0.
    if MASKED:
        s = tl.where(_reaches((rows - n0)[:, None], lanes[None, :]), s, -1e30)
    if DOC_MASK:
        s = tl.where(row_docs[:, None] == col_docs[None, :], s, -1e30)
    m_new = tl.maximum(m, tl.max(s, 1))
    # One FMA a score. In it s scale is exact, and m scale is rounded: that moves all exponents of a row alike, by half of the last bit of
    # m scale. From 2^28 on this is more than fp16 bears. From 2^26 on two exponents are equal or at least 4 apart: only equal scores
    # share. Any scale tells these, and a scale of 1 is exact. It also makes 0 of -1e30 minus -1e30.
    unit = tl.where(tl.abs(m_new * scale) < 2.0**26, scale, 1.0)
    prob = tl.exp2(s * unit[:, None] - (m_new * unit)[:, None])
    alpha = tl.exp2((m - m_new) * unit)
    total = total * alpha + tl.sum(prob, 1)  # before dropout, as softmax is
    if DROPOUT:
        prob = tl.where(_dropout_keep_mask(seed, b, h, rows[:, None], cols[None, :], p), prob * keep_scale, 0.0)
    v = _tile(v_ptr, cols, stride_vt, stride_vc, inside, D, BD)
    acc = tl.dot(prob.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, total, m_new


@triton.jit
def _attention_forward(
    q_ptr,  # [B, T, H, D]; or [B, T, 3 H D], which holds k and v too: then what is of k and v is None, and stride_qh
    k_ptr,  # [B, T, H / GROUP, D]
    v_ptr,  # [B, T, H / GROUP, D]
    doc_ids_ptr,  # [B, T], if DOC_MASK
    seed_ptr,  # [1] int64, if DROPOUT
    out_ptr,  # [B, T, H, D] out, contiguous
    lse_ptr,  # [B, H, T] fp32 out
    T,
    H,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_qc,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_kc,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_vc,
    stride_db,
    stride_dt,
    scale,  # log2(e) / sqrt(D)
    p,
    keep_scale,  # 1 / (1 - p)
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUP: tl.constexpr,  # heads of queries that share a head of keys
    EVEN: tl.constexpr,  # T is a multiple of BM and BN
    DOC_MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(T, BM)
    bh = tl.program_id(0) // blocks
    m0 = (blocks - 1 - tl.program_id(0) % blocks) * BM
    b, h = bh // H, bh % H
    q_ptr = _head(q_ptr, b, h, stride_qb, stride_qh, stride_qc, D)
    if k_ptr is None:
        k_ptr = q_ptr + H * D * stride_qc
        v_ptr = k_ptr + H * D * stride_qc
        stride_kt, stride_kc, stride_vt, stride_vc = stride_qt, stride_qc, stride_qt, stride_qc
    else:
        k_ptr = _head(k_ptr, b, h // GROUP, stride_kb, stride_kh, stride_kc, D)
        v_ptr = _head(v_ptr, b, h // GROUP, stride_vb, stride_vh, stride_vc, D)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    rows = m0 + tl.arange(0, BM)
    lanes = tl.arange(0, BN)
    inside = _inside(rows, T, EVEN)
    q = _tile(q_ptr, rows, stride_qt, stride_qc, inside, D, BD)
    if DOC_MASK:
        doc_ids_ptr += b.to(tl.int64) * stride_db
        some = tl.load(doc_ids_ptr + m0.to(tl.int64) * stride_dt)
        row_docs = tl.load(doc_ids_ptr + rows.to(tl.int64) * stride_dt, inside, other=some)
        low, high = tl.min(row_docs, 0), tl.max(row_docs, 0)
    acc = tl.zeros([BM, BD], tl.float32)
    total = tl.zeros([BM], tl.float32)
    m = tl.full([BM], -1e30, tl.float32)
    diagonal = m0 // BN * BN  # keys before it are before all of these queries: no mask
    end = tl.minimum(m0 + BM, T)
    if DOC_MASK:
        first, after = _meeting(doc_ids_ptr, stride_dt, low, high, 0, end)
        for n0 in range(first // BN * BN, after, BN):
            cols = n0 + lanes
            col_docs = tl.load(doc_ids_ptr + cols.to(tl.int64) * stride_dt, _inside(lanes, T - n0, EVEN), other=low)
            acc, total, m = _forward_step(
                acc, total, m, q, k_ptr, v_ptr, b, h, rows, row_docs, n0, lanes, col_docs, T, stride_kt, stride_kc, stride_vt, stride_vc,
                seed, scale, p, keep_scale, D, BD, EVEN, True, True, DROPOUT, PRECISION,
            )  # fmt: skip
    else:
        for n0 in range(0, diagonal, BN):
            acc, total, m = _forward_step(
                acc, total, m, q, k_ptr, v_ptr, b, h, rows, 0, n0, lanes, 0, T, stride_kt, stride_kc, stride_vt, stride_vc,
                seed, scale, p, keep_scale, D, BD, EVEN, False, False, DROPOUT, PRECISION,
            )  # fmt: skip
        for n0 in range(diagonal, end, BN):
            acc, total, m = _forward_step(
                acc, total, m, q, k_ptr, v_ptr, b, h, rows, 0, n0, lanes, 0, T, stride_kt, stride_kc, stride_vt, stride_vc,
                seed, scale, p, keep_scale, D, BD, EVEN, True, False, DROPOUT, PRECISION,
            )  # fmt: skip
    tl.store(lse_ptr + bh.to(tl.int64) * T + rows, m * scale + tl.log2(total), inside)
    out_ptr += b.to(tl.int64) * T * H * D + h * D
    _store(out_ptr, rows, H * D, inside, acc / total[:, None], D, BD)


@triton.jit
def _attention_delta(
    out_ptr,  # [B, T, H, D] contiguous
    dout_ptr,  # [B, T, H, D]; stride_h is None: [B, T, H D]
    delta_ptr,  # [B, H, T] fp32 out
    T,
    H,
    stride_b,
    stride_t,
    stride_h,
    stride_c,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
):
    blocks = tl.cdiv(T, BM)
    bh = tl.program_id(0) // blocks
    b, h = bh // H, bh % H
    rows = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    inside = rows < T
    out = _tile(out_ptr + b.to(tl.int64) * T * H * D + h * D, rows, H * D, 1, inside, D, BD).to(tl.float32)
    dout_ptr = _head(dout_ptr, b, h, stride_b, stride_h, stride_c, D)
    dout = _tile(dout_ptr, rows, stride_t, stride_c, inside, D, BD).to(tl.float32)
    tl.store(delta_ptr + bh.to(tl.int64) * T + rows, tl.sum(out * dout, 1), inside)


@triton.jit
def _probabilities(
    s, seen, row_docs, col_docs, lse, scale, MASKED: tl.constexpr, DOC_MASK: tl.constexpr
):  # fmt: skip
    """The softmax of scores s by each row's lse. seen, if MASKED: where the row is not before the column."""
    prob = tl.exp2(s * scale - lse)
    if MASKED:
        prob = tl.where(seen, prob, 0.0)
    if DOC_MASK:
        prob = tl.where(row_docs == col_docs, prob, 0.0)
    return prob


@triton.jit
def _dkv_step(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, b, h, m0, lanes, row_docs, cols, col_docs, T, stride_t, stride_c,
    stride_ot, stride_oc, seed, scale, p, keep_scale,
    D: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr, DOC_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Process one block of queries: (new dk, new dv) of a block of keys. Scores are transposed, [keys, queries]: p and ds are then
    left operands, which tl.dot reads from registers."""
    rows = m0 + lanes
    inside = _inside(lanes, T - m0, EVEN)
    q = _tile(q_ptr, rows, stride_t, stride_c, inside, D, BD)
    lse = tl.load(lse_ptr + rows, inside, other=0.0)  # rows beyond T add 0: their q and dout are 0, p is 1, ds 0
    st = tl.dot(k, q.T, input_precision=PRECISION)
    prob = _probabilities(
        st, ~_reaches((cols - m0 - 1)[:, None], lanes[None, :]), row_docs[None, :] if DOC_MASK else 0,
        col_docs[:, None] if DOC_MASK else 0, lse[None, :], scale, MASKED, DOC_MASK,
    )  # fmt: skip
    dout = _tile(dout_ptr, rows, stride_ot, stride_oc, inside, D, BD)
    dp = tl.dot(v, dout.T, input_precision=PRECISION)
    dropped = prob
    if DROPOUT:
        keep = _dropout_keep_mask(seed, b, h, rows[None, :], cols[:, None], p)
        dropped = tl.where(keep, prob * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision=PRECISION)
    delta = tl.load(delta_ptr + rows, inside, other=0.0)
    ds = prob * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _dq_step(
    dq, q, dout, lse, delta, k_ptr, v_ptr, b, h, rows, row_docs, n0, lanes, col_docs, T, stride_kt, stride_kc, stride_vt, stride_vc,
    seed, scale, p, keep_scale,
    D: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr, DOC_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Process one block of keys: the new dq of a block of queries."""
    cols = n0 + lanes
    inside = _inside(lanes, T - n0, EVEN or not MASKED)
    k = _tile(k_ptr, cols, stride_kt, stride_kc, inside, D, BD)
    s = tl.dot(q, k.T, input_precision=PRECISION)
    prob = _probabilities(
        s, _reaches((rows - n0)[:, None], lanes[None, :]), row_docs[:, None] if DOC_MASK else 0,
        col_docs[None, :] if DOC_MASK else 0, lse[:, None], scale, MASKED, DOC_MASK,
    )  # fmt: skip
    v = _tile(v_ptr, cols, stride_vt, stride_vc, inside, D, BD)
    dp = tl.dot(dout, v.T, input_precision=PRECISION)
    if DROPOUT:
        dp = tl.where(_dropout_keep_mask(seed, b, h, rows[:, None], cols[None, :], p), dp * keep_scale, 0.0)
    ds = prob * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _attention_backward(
    q_ptr,  # [B, T, H, D]; or [B, T, 3 H D], which holds k and v too: then what is of k and v is None, and stride_qh, stride_oh
    k_ptr,  # [B, T, H / GROUP, D]
    v_ptr,  # [B, T, H / GROUP, D]
    dout_ptr,  # [B, T, H, D]
    doc_ids_ptr,  # [B, T], if DOC_MASK
    seed_ptr,  # [1] int64, if DROPOUT
    lse_ptr,  # [B, H, T] fp32
    delta_ptr,  # [B, H, T] fp32
    dq_ptr,  # as q, out, contiguous
    dk_ptr,  # as k, out, contiguous
    dv_ptr,  # as v, out, contiguous
    T,
    H,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_qc,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_kc,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_vc,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_oc,
    stride_db,
    stride_dt,
    scale,  # log2(e) / sqrt(D)
    grad_scale,  # 1 / sqrt(D)
    p,
    keep_scale,  # 1 / (1 - p)
    D: tl.constexpr,
    BD: tl.constexpr,
    OUTER: tl.constexpr,  # keys (then queries) whose gradients a program computes
    INNER: tl.constexpr,  # queries (then keys) of one loop step
    GROUP: tl.constexpr,  # heads of queries that share a head of keys
    EVEN: tl.constexpr,  # T is a multiple of OUTER
    DOC_MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(T, OUTER)
    bh = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * OUTER
    H_KEYS = H // GROUP
    b, h_keys = bh // H_KEYS, bh % H_KEYS
    h = h_keys * GROUP  # the first of the queries' heads
    q_ptr = _head(q_ptr, b, h, stride_qb, stride_qh, stride_qc, D)
    if k_ptr is None:
        k_ptr = q_ptr + H * D * stride_qc
        v_ptr = k_ptr + H * D * stride_qc
        stride_kt, stride_kc, stride_vt, stride_vc = stride_qt, stride_qc, stride_qt, stride_qc
    else:
        k_ptr = _head(k_ptr, b, h_keys, stride_kb, stride_kh, stride_kc, D)
        v_ptr = _head(v_ptr, b, h_keys, stride_vb, stride_vh, stride_vc, D)
    dout_ptr = _head(dout_ptr, b, h, stride_ob, stride_oh, stride_oc, D)
    lse_ptr += bh.to(tl.int64) * GROUP * T
    delta_ptr += bh.to(tl.int64) * GROUP * T
    if dk_ptr is None:
        dq_ptr += b.to(tl.int64) * T * 3 * H * D + h * D
    else:
        dq_ptr += b.to(tl.int64) * T * H * D + h * D
    seed = tl.load(seed_ptr) if DROPOUT else 0
    block = start + tl.arange(0, OUTER)
    inside = _inside(block, T, EVEN)
    lanes = tl.arange(0, INNER)
    if DOC_MASK:
        doc_ids_ptr += b.to(tl.int64) * stride_db
        some = tl.load(doc_ids_ptr + start.to(tl.int64) * stride_dt)
        block_docs = tl.load(doc_ids_ptr + block.to(tl.int64) * stride_dt, inside, other=some)
        low, high = tl.min(block_docs, 0), tl.max(block_docs, 0)

    # dk and dv of the keys in `block`, summed over the heads of queries, which come one after another
    k = _tile(k_ptr, block, stride_kt, stride_kc, inside, D, BD)
    v = _tile(v_ptr, block, stride_vt, stride_vc, inside, D, BD)
    dk = tl.zeros([OUTER, BD], tl.float32)
    dv = tl.zeros([OUTER, BD], tl.float32)
    head, q_head, dout_head, lse_head, delta_head = h, q_ptr, dout_ptr, lse_ptr, delta_ptr
    for _ in range(GROUP):
        if DOC_MASK:
            first, after = _meeting(doc_ids_ptr, stride_dt, low, high, start, T)
            for m0 in range(first // INNER * INNER, after, INNER):
                rows = m0 + lanes
                row_docs = tl.load(doc_ids_ptr + rows.to(tl.int64) * stride_dt, _inside(lanes, T - m0, EVEN), other=low)
                dk, dv = _dkv_step(
                    dk, dv, k, v, q_head, dout_head, lse_head, delta_head, b, head, m0, lanes, row_docs, block, block_docs, T, stride_qt,
                    stride_qc, stride_ot, stride_oc, seed, scale, p, keep_scale, D, BD, EVEN, True, True, DROPOUT, PRECISION,
                )  # fmt: skip
        else:
            # Queries from start to start + OUTER are on the diagonal. Later queries see all of these keys.
            diagonal_end = tl.minimum(start + OUTER, T)
            for m0 in range(start, diagonal_end, INNER):
                dk, dv = _dkv_step(
                    dk, dv, k, v, q_head, dout_head, lse_head, delta_head, b, head, m0, lanes, 0, block, 0, T, stride_qt,
                    stride_qc, stride_ot, stride_oc, seed, scale, p, keep_scale, D, BD, EVEN, True, False, DROPOUT, PRECISION,
                )  # fmt: skip
            for m0 in range(start + OUTER, T, INNER):
                dk, dv = _dkv_step(
                    dk, dv, k, v, q_head, dout_head, lse_head, delta_head, b, head, m0, lanes, 0, block, 0, T, stride_qt,
                    stride_qc, stride_ot, stride_oc, seed, scale, p, keep_scale, D, BD, EVEN, False, False, DROPOUT, PRECISION,
                )  # fmt: skip
        if GROUP > 1:
            head += 1
            q_head += stride_qh
            dout_head += stride_oh
            lse_head += T
            delta_head += T
    if dk_ptr is None:
        _store(dq_ptr + H * D, block, 3 * H * D, inside, dk * grad_scale, D, BD)
        _store(dq_ptr + 2 * H * D, block, 3 * H * D, inside, dv, D, BD)
    else:
        keys = b.to(tl.int64) * T * H_KEYS * D + h_keys * D
        _store(dk_ptr + keys, block, H_KEYS * D, inside, dk * grad_scale, D, BD)
        _store(dv_ptr + keys, block, H_KEYS * D, inside, dv, D, BD)

    # dq of the queries in `block`, of one head after another
    for _ in range(GROUP):
        q = _tile(q_ptr, block, stride_qt, stride_qc, inside, D, BD)
        dout = _tile(dout_ptr, block, stride_ot, stride_oc, inside, D, BD)
        lse = tl.load(lse_ptr + block, inside, other=0.0)
        delta = tl.load(delta_ptr + block, inside, other=0.0)
        dq = tl.zeros([OUTER, BD], tl.float32)
        end = tl.minimum(start + OUTER, T)
        if DOC_MASK:
            first, after = _meeting(doc_ids_ptr, stride_dt, low, high, 0, end)
            for n0 in range(first // INNER * INNER, after, INNER):
                cols = n0 + lanes
                col_docs = tl.load(doc_ids_ptr + cols.to(tl.int64) * stride_dt, _inside(lanes, T - n0, EVEN), other=low)
                dq = _dq_step(
                    dq, q, dout, lse, delta, k_ptr, v_ptr, b, h, block, block_docs, n0, lanes, col_docs, T, stride_kt, stride_kc,
                    stride_vt, stride_vc, seed, scale, p, keep_scale, D, BD, EVEN, True, True, DROPOUT, PRECISION,
                )  # fmt: skip
        else:
            for n0 in range(0, start, INNER):  # OUTER is a multiple of INNER
                dq = _dq_step(
                    dq, q, dout, lse, delta, k_ptr, v_ptr, b, h, block, 0, n0, lanes, 0, T, stride_kt, stride_kc,
                    stride_vt, stride_vc, seed, scale, p, keep_scale, D, BD, EVEN, False, False, DROPOUT, PRECISION,
                )  # fmt: skip
            for n0 in range(start, end, INNER):
                dq = _dq_step(
                    dq, q, dout, lse, delta, k_ptr, v_ptr, b, h, block, 0, n0, lanes, 0, T, stride_kt, stride_kc,
                    stride_vt, stride_vc, seed, scale, p, keep_scale, D, BD, EVEN, True, False, DROPOUT, PRECISION,
                )  # fmt: skip
        _store(dq_ptr, block, 3 * H * D if dk_ptr is None else H * D, inside, dq * grad_scale, D, BD)
        if GROUP > 1:
            h += 1
            q_ptr += stride_qh
            dout_ptr += stride_oh
            lse_ptr += T
            delta_ptr += T
            dq_ptr += D


@triton.jit
def _attention_mask(seed_ptr, out_ptr, T, H, p, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    bh = tl.program_id(1)
    for start in range(0, T, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        kept = _dropout_keep_mask(tl.load(seed_ptr), bh // H, bh % H, row, cols, p)
        tl.store(out_ptr + (bh.to(tl.int64) * T + row) * T + cols, kept, cols < T)


# ---- launchers ----


@kernel_op("out", "lse")
def attention_forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, n_head: int, p: float, seed: Tensor | None, doc_ids: Tensor | None, row: str,
    out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Compute out in q's dtype, and lse [B, H, T] fp32, base 2. q, k, v and out [B, T, heads, D]; or q [B, T, 3 C], k and v None, out
    [B, T, C]."""
    B, T, D = _sizes(out, n_head)
    config = configs.attention(q.device, q.dtype, D, row)
    if out.numel():
        launch(
            _attention_forward, (cdiv(T, config.block_m) * B * n_head,),
            q, k, v, doc_ids, seed, out, lse, T, n_head, *_strides(q), *_strides(k), *_strides(v), *_doc_strides(doc_ids),
            LOG2E / math.sqrt(D), p, kept_scale(p),
            D=D, BD=_padded(D), BM=config.block_m, BN=config.block_n, GROUP=_group(n_head, k),
            EVEN=T % max(config.block_m, config.block_n) == 0, DOC_MASK=doc_ids is not None, DROPOUT=p > 0,
            PRECISION=precision(q.dtype), num_warps=config.warps, num_stages=configs.pipeline(q.device, config.stages),
        )  # fmt: skip


@kernel_op("dq", "dk", "dv")
def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, out: Tensor, lse: Tensor, n_head: int, p: float, seed: Tensor | None,
    doc_ids: Tensor | None, row: str, dq: Tensor, dk: Tensor | None, dv: Tensor | None,
) -> None:  # fmt: skip
    """Compute dq, dk and dv from dout; if q holds k and v, dq holds all three."""
    B, T, D = _sizes(out, n_head)
    config = configs.attention(q.device, q.dtype, D, row)
    if out.numel():
        delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
        dout = dout.to(q.dtype)
        gated = p > 0 or doc_ids is not None or _group(n_head, k) > 1
        inner = (gated and config.gated_inner) or config.inner
        rows, group = config.delta_rows, _group(n_head, k)
        launch(
            _attention_delta, (cdiv(T, rows) * B * n_head,),
            out, dout, delta, T, n_head, *_strides(dout), D=D, BD=_padded(D), BM=rows,
        )  # fmt: skip
        launch(
            _attention_backward, (cdiv(T, config.outer) * B * (n_head // group),),
            q, k, v, dout, doc_ids, seed, lse, delta, dq, dk, dv, T, n_head, *_strides(q), *_strides(k), *_strides(v),
            *_strides(dout), *_doc_strides(doc_ids), LOG2E / math.sqrt(D), 1 / math.sqrt(D), p, kept_scale(p),
            D=D, BD=_padded(D), OUTER=config.outer, INNER=inner, GROUP=group, EVEN=T % config.outer == 0,
            DOC_MASK=doc_ids is not None, DROPOUT=p > 0, PRECISION=precision(q.dtype), num_warps=config.backward_warps,
            num_stages=configs.pipeline(q.device, config.backward_stages),
        )  # fmt: skip


def dropout_mask(B: int, n_head: int, T: int, dropout_p: float, seed: Tensor) -> Tensor:
    """The mask of `attention`'s dropout, bool [B, n_head, T, T]; True: the element is kept. seed: as for `attention`."""
    mask = torch.empty((B, n_head, T, T), dtype=torch.bool, device=seed.device)
    if mask.numel():
        block = min(1024, next_power_of_2(T))
        launch(_attention_mask, (T, B * n_head), seed, mask, T, n_head, dropout_p, BLOCK=block)
    return mask


def _padded(head_size):
    return max(16, next_power_of_2(head_size))  # tl.dot needs a power of two, at least 16


def _sizes(out, n_head):
    """(B, T, D) of out [B, T, H, D] or [B, T, C]."""
    return *out.shape[:2], math.prod(out.shape[2:]) // n_head


def _doc_strides(doc_ids):
    return (0, 0) if doc_ids is None else doc_ids.stride()


def _strides(x):
    """Of sequence, token, head and column; that of a head is None where x [B, T, C] has heads in its columns."""
    if x is None:
        return (None,) * 4
    return x.stride() if x.dim() == 4 else (*x.stride()[:2], None, x.stride(2))


def _group(n_head, k):
    """Heads of queries that share a head of keys."""
    return 1 if k is None else n_head // k.size(2)


# ---- the public op ----


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, n_head, p, seed, doc_ids, row):
        """q, k and v as attention_forward takes them."""
        B, T, *rest = q.shape
        out = q.new_empty((B, T, rest[0] // 3) if k is None else q.shape)
        lse = torch.empty((B, n_head, T), dtype=torch.float32, device=q.device)
        attention_forward(q, k, v, n_head, p, seed, doc_ids, row, out, lse)
        ctx.save_for_backward(q, k, v, out, lse, seed, doc_ids)
        ctx.n_head, ctx.p, ctx.row = n_head, p, row
        return out

    @staticmethod
    @forbid_double_backward("attention")
    def backward(ctx, dout):
        q, k, v, out, lse, seed, doc_ids = ctx.saved_tensors
        dq, dk, dv = (None if t is None else like(t, t.dtype) for t in (q, k, v))
        attention_backward(dout, q, k, v, out, lse, ctx.n_head, ctx.p, seed, doc_ids, ctx.row, dq, dk, dv)
        return dq, dk, dv, *(None,) * 5


def takes(x: Tensor, head_size: int) -> bool:
    """Whether these kernels can take x: on a GPU from sm_80 on or in the interpreter, with heads of at most 128."""
    return can_run(x) and head_size <= MAX_HEAD_SIZE


def attention(
    qkv: Tensor, n_head: int, dropout_p: float = 0.0, seed: Tensor | None = None, doc_ids: Tensor | None = None, row: str = "",
) -> Tensor:  # fmt: skip
    """Causal self-attention of qkv [B, T, 3 C] (q, then k, then v): [B, T, C], in autocast's dtype if that is on, else in qkv's.

    The scale is 1/sqrt(C / n_head); heads have at most 128 elements. Dropout applies to the probabilities, and needs a seed, an int64
    tensor of one element. doc_ids [B, T], integers: a token attends only to tokens of the same id. row: a launch configuration
    (configs.AttentionConfig.text); "" means the table's. Raises ValueError for an unsupported shape.
    """
    if n_head < 1 or qkv.dim() != 3 or qkv.size(2) % (3 * n_head) or qkv.size(2) > 3 * n_head * MAX_HEAD_SIZE:
        raise ValueError(f"attention: qkv {tuple(qkv.shape)} for {n_head} heads of at most {MAX_HEAD_SIZE}")
    _check_doc_ids(doc_ids, qkv)
    check_seed(dropout_p, seed)
    return _Attention.apply(qkv.to(compute_dtype(qkv)), None, None, n_head, dropout_p, seed, doc_ids, row)


def attention_qkv(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None, doc_ids: Tensor | None = None, row: str = "",
) -> Tensor:  # fmt: skip
    """Causal self-attention of q [B, T, H, D] and of k and v [B, T, Hk, D], which have as many heads or fewer: [B, T, H, D], contiguous.

    H is a multiple of Hk: head h of q meets head h // (H / Hk) of k and v. All else is as for `attention`, whose mask of dropout this has
    too. Raises ValueError for shapes or dtypes that do not go together.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.size(3) != q.size(3):
        raise ValueError(f"attention_qkv: {shapes} are not [B, T, H, D] and twice [B, T, Hk, D]")
    if not k.size(2) or q.size(2) % k.size(2):
        raise ValueError(f"attention_qkv: {shapes}: {q.size(2)} heads are no multiple of {k.size(2)}")
    if not 1 <= q.size(3) <= MAX_HEAD_SIZE:
        raise ValueError(f"attention_qkv: {shapes}: heads have 1 to {MAX_HEAD_SIZE} elements")
    if not q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type):
        raise ValueError(f"attention_qkv: q {q.dtype}, k {k.dtype}, v {v.dtype} differ")
    _check_doc_ids(doc_ids, q)
    check_seed(dropout_p, seed)
    dtype = compute_dtype(q)
    return _Attention.apply(q.to(dtype), k.to(dtype), v.to(dtype), q.size(2), dropout_p, seed, doc_ids, row)


def _check_doc_ids(doc_ids, x):
    if doc_ids is not None and doc_ids.shape != x.shape[:2]:
        raise ValueError(f"attention: doc_ids {tuple(doc_ids.shape)} for {tuple(x.shape[:2])} tokens")
