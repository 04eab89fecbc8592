"""Token plus position embeddings, and a backward that adds to the gradient of the tied head.

    x[b, t] = dropout(wte[idx[b, t]] + wpe[t])

Shapes: idx [B, T] int64; wte [V, C]; wpe [>= T, C]; x [B, T, C] in the weights' dtype, or in the residual stream's if that differs.
Saved: idx, and the dropout's seed. Recomputed: the dropout mask.

Backward: dwpe[t] is the sum over b of dx[b, t]. dwte[v] is the sum over all (b, t) with idx[b, t] = v. The ids are sorted; the sort is
stable, so equal ids keep the order of their positions. The sorted positions are divided into spans of 64. The program of the first id in
a run of equal ids sums the run up to the end of its span, and adds it to that id's row. A run that goes on has another program in each
further span, which writes its sum to a row of `partial`. A last kernel adds those sums to the id's row, in their order. So a token that is
4% of the text, 1,300 of 32,768, is at most 8 steps of 8 rows for a program and then 3 steps of 8 sums; in one program it would be 163 steps
one after another. partial has at most C / 64 elements for each token. There are no atomics, and repeated runs give the same bits.

wte is also the head's weight, whose gradient is dense. nanoGPT's backward fills a second dense [V, C] for the embedding, and adds the
two. Here the op returns wte too, `x, head = embedding(...)`, and the head uses that. So the head's gradient passes through this op's
backward, which adds the rows to it in place.

Bytes for each element of x, all fp32: forward reads 8 (wpe from cache) and writes 4; backward reads 4 for dwpe and 4 for dwte, and reads
and writes the row of each distinct token. If x is bf16, forward writes 2, and backward reads 2 and 2. nanoGPT's zeros and sum move 16
bytes for each of V C elements. About one FLOP for each element.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import configs
from fastgpt.kernels.accumulate import is_owned
from fastgpt.kernels.common import (
    can_run,
    cdiv,
    check_dtype,
    check_seed,
    dropout_keep_mask,
    forbid_double_backward,
    kept_scale,
    kernel_op,
    launch,
    next_power_of_2,
)


@triton.jit
def _embed_forward(
    idx_ptr,  # [B, T] int64
    wte_ptr,  # [V, C]
    wpe_ptr,  # [>= T, C]
    seed_ptr,  # [1] int64, if DROPOUT
    x_ptr,  # [B, T, C] out, contiguous
    T,
    V,
    C,
    stride_ib,
    stride_it,
    stride_ev,
    stride_ec,
    stride_pt,
    stride_pc,
    p,
    scale,  # 1 / (1 - p)
    BLOCK: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b, t = row // T, row % T
    token = tl.load(idx_ptr + b * stride_ib + t * stride_it)
    known = (token >= 0) & (token < V)
    for start in range(0, C, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < C
        # An id outside the vocabulary gives nan, which shows in the loss. An assertion, as in PyTorch, would make the host wait.
        x = tl.load(wte_ptr + token * stride_ev + cols * stride_ec, mask & known, other=float("nan")).to(tl.float32)
        x += tl.load(wpe_ptr + t * stride_pt + cols * stride_pc, mask, other=0.0).to(tl.float32)
        x = x.to(x_ptr.dtype.element_ty)  # rounded before dropout, as PyTorch's sum is
        if DROPOUT:
            x = tl.where(dropout_keep_mask(seed_ptr, row * C + cols, p), x.to(tl.float32) * scale, 0.0).to(
                x_ptr.dtype.element_ty
            )
        tl.store(x_ptr + row * C + cols, x, mask)


@triton.jit
def _gradient(
    dx_ptr, seed_ptr, b, t, cols, mask, T, C, stride_db, stride_dt, stride_dc, p, scale, DROPOUT: tl.constexpr
):
    """The rows (b, t) [R] of dx after dropout's backward, [R, BLOCK] in fp32."""
    dx_ptrs = dx_ptr + (b * stride_db + t * stride_dt)[:, None] + (cols * stride_dc)[None, :]
    dx = tl.load(dx_ptrs, mask, other=0.0).to(tl.float32)
    if DROPOUT:
        dx = tl.where(dropout_keep_mask(seed_ptr, ((b * T + t) * C)[:, None] + cols[None, :], p), dx * scale, 0.0)
    return dx


@triton.jit
def _add_rows(ptrs, x, mask):
    """Add the sum of the rows of x [R, BLOCK] to what is at the pointers [BLOCK]."""
    # Load first: if several threads hold one element, the sum's barriers come before the store of one of them.
    before = tl.load(ptrs, mask, other=0.0).to(tl.float32)
    tl.store(ptrs, (before + tl.sum(x, 0)).to(ptrs.dtype.element_ty), mask)


@triton.jit
def _embed_backward_wpe(
    dx_ptr,  # [B, T, C]
    seed_ptr,  # [1] int64, if DROPOUT
    dwpe_ptr,  # [T, C] out, contiguous
    B,
    T,
    C,
    stride_db,
    stride_dt,
    stride_dc,
    p,
    scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, B, ROWS):
        b = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (b < B)[:, None] & (cols < C)[None, :]
        total += _gradient(dx_ptr, seed_ptr, b, t, cols, mask, T, C, stride_db, stride_dt, stride_dc, p, scale, DROPOUT)
    tl.store(dwpe_ptr + t * C + cols, tl.sum(total, 0).to(dwpe_ptr.dtype.element_ty), cols < C)


@triton.jit
def _embed_keys(
    idx_ptr,  # [B, T] int64
    keys_ptr,  # [B T] int32 out
    M,  # B * T
    T,
    V,
    stride_b,
    stride_t,
    BLOCK: tl.constexpr,
):
    """Convert ids to int32 sort keys: the time of a sort depends on the bits. Ids above the vocabulary become V, below it -1."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(idx_ptr + (i // T).to(tl.int64) * stride_b + (i % T) * stride_t, i < M, other=0)
    tl.store(keys_ptr + i, tl.minimum(tl.maximum(ids, -1), V).to(tl.int32), i < M)


@triton.jit
def _embed_backward_wte(
    dx_ptr,  # [B, T, C]
    ids_ptr,  # [B T] int32, sorted
    places_ptr,  # [B T] int64, the position of each sorted id before the sort
    seed_ptr,  # [1] int64, if DROPOUT
    dwte_ptr,  # [V, C] in and out, contiguous
    runs_ptr,  # [spans] int32 out: the token of the run within which a span begins; -1 if one begins with it
    partial_ptr,  # [spans, C] fp32 out: the sum of that run's rows in the span
    M,  # B * T
    T,
    V,
    C,
    stride_db,
    stride_dt,
    stride_dc,
    p,
    scale,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    first = tl.program_id(0)
    span = first // SPAN
    token = tl.load(ids_ptr + first)
    known = (token >= 0) & (token < V)
    begins = token != tl.load(ids_ptr + first - 1, first > 0, other=-1)
    opens = first % SPAN == 0
    tl.store(runs_ptr + span, tl.where(begins | (token >= V), -1, token), opens & (tl.program_id(1) == 0))
    if known & (begins | opens):
        end = tl.minimum((span + 1) * SPAN, M)
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        start = first
        going = True
        while going:
            i = start + tl.arange(0, ROWS)
            mine = tl.load(ids_ptr + i, i < end, other=-1) == token
            place = tl.load(places_ptr + i, i < end, other=0).to(tl.int32)  # it fits, as the grid has M programs
            mask = mine[:, None] & (cols < C)[None, :]
            b, t = (place // T).to(tl.int64), (place % T).to(tl.int64)
            total += _gradient(
                dx_ptr, seed_ptr, b, t, cols, mask, T, C, stride_db, stride_dt, stride_dc, p, scale, DROPOUT
            )
            start += ROWS
            going = tl.load(ids_ptr + start, start < end, other=-1) == token
        if begins:
            _add_rows(dwte_ptr + token.to(tl.int64) * C + cols, total, cols < C)
        else:
            tl.store(partial_ptr + span.to(tl.int64) * C + cols, tl.sum(total, 0), cols < C)


@triton.jit
def _embed_backward_spans(
    runs_ptr,  # [spans] int32
    partial_ptr,  # [spans, C] fp32
    dwte_ptr,  # [V, C] in and out, contiguous
    spans,
    C,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add to tokens' rows what runs have in the spans that begin within them. The program of a run's first such span adds all."""
    first = tl.program_id(0)
    token = tl.load(runs_ptr + first)
    if (token >= 0) & (token != tl.load(runs_ptr + first - 1, first > 0, other=-1)):
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        start = first
        going = True
        while going:
            i = start + tl.arange(0, ROWS)
            mine = tl.load(runs_ptr + i, i < spans, other=-1) == token
            partial_ptrs = partial_ptr + i.to(tl.int64)[:, None] * C + cols[None, :]
            total += tl.load(partial_ptrs, mine[:, None] & (cols < C)[None, :], other=0.0)
            start += ROWS
            going = tl.load(runs_ptr + start, start < spans, other=-1) == token
        _add_rows(dwte_ptr + token.to(tl.int64) * C + cols, total, cols < C)


# ---- launchers ----


@kernel_op("x")
def embedding_forward(
    wte: Tensor, wpe: Tensor, idx: Tensor, p: float, seed: Tensor | None, row: str, x: Tensor
) -> None:
    """Compute x [B, T, C] from idx [B, T]."""
    (B, T), (V, C) = idx.shape, wte.shape
    config = configs.embedding(row)
    if B * T:
        launch(
            _embed_forward, (B * T,),
            idx, wte, wpe, seed, x, T, V, C, *idx.stride(), *wte.stride(), *wpe.stride(), p, kept_scale(p),
            BLOCK=min(config.block, next_power_of_2(C)), DROPOUT=p > 0, num_warps=config.forward_warps,
        )  # fmt: skip


@kernel_op("dwte", "dwpe")
def embedding_backward(
    dx: Tensor, idx: Tensor, p: float, seed: Tensor | None, row: str, dwte: Tensor, dwpe: Tensor
) -> None:
    """Add the rows of dx [B, T, C] to dwte [V, C], and write dwpe [positions, C]."""
    (B, T), (V, C) = idx.shape, dwte.shape
    config = configs.embedding(row)
    if dwpe.size(0) > T:
        dwpe[T:].zero_()
    block = min(config.block, next_power_of_2(C))
    rows = max(1, config.backward_tile // block)
    blocks = cdiv(C, block)
    if T:
        launch(
            _embed_backward_wpe, (T, blocks),
            dx, seed, dwpe, B, T, C, *dx.stride(), p, kept_scale(p),
            ROWS=min(rows, next_power_of_2(max(B, 1))), BLOCK=block, DROPOUT=p > 0, num_warps=config.backward_warps,
        )  # fmt: skip
    if B * T:
        keys = torch.empty(B * T, dtype=torch.int32, device=dx.device)
        launch(_embed_keys, (cdiv(B * T, config.block),), idx, keys, B * T, T, V, *idx.stride(), BLOCK=config.block)
        ids, places = torch.sort(keys, stable=True)
        spans = cdiv(B * T, config.backward_span)
        runs = torch.empty(spans, dtype=torch.int32, device=dx.device)
        partial = torch.empty((spans, C), dtype=torch.float32, device=dx.device)
        shared = dict(ROWS=min(rows, 64), BLOCK=block, num_warps=config.backward_warps)
        launch(
            _embed_backward_wte, (B * T, blocks),
            dx, ids, places, seed, dwte, runs, partial, B * T, T, V, C, *dx.stride(), p, kept_scale(p),
            SPAN=config.backward_span, DROPOUT=p > 0, **shared,
        )  # fmt: skip
        launch(_embed_backward_spans, (spans, blocks), runs, partial, dwte, spans, C, **shared)


# ---- the public op ----


class _Embedding(torch.autograd.Function):
    """(the embedding, wte for the head). So the backward receives the head's gradient, and adds its rows to it."""

    @staticmethod
    def forward(ctx, idx, wte, wpe, p, seed, dtype, row):
        x = torch.empty((*idx.shape, wte.size(1)), dtype=dtype, device=wte.device)
        embedding_forward(wte, wpe, idx, p, seed, row, x)
        ctx.save_for_backward(idx, seed)
        # Do not save the weights: the backward does not read them, so they may change in between.
        ctx.shapes, ctx.dtype, ctx.p, ctx.row = (wte.shape, wpe.shape), wte.dtype, p, row
        ctx.set_materialize_grads(False)
        return x, wte.view_as(wte)

    @staticmethod
    @forbid_double_backward("embedding")
    def backward(ctx, dx, dhead):
        idx, seed = ctx.saved_tensors
        if dx is None:
            return None, dhead, *(None,) * 5
        if dhead is None:
            dwte = dx.new_zeros(ctx.shapes[0], dtype=ctx.dtype)
        elif not torch.compiler.is_compiling() and is_owned(dhead):
            dwte = dhead
        else:  # something else may hold it; if nothing does, the compiler removes this copy
            dwte = dhead.clone(memory_format=torch.contiguous_format)
        dwpe = dx.new_empty(ctx.shapes[1], dtype=ctx.dtype)
        embedding_backward(dx, idx, ctx.p, seed, ctx.row, dwte, dwpe)
        return None, dwte, dwpe, *(None,) * 4


def takes(wte: Tensor, wpe: Tensor) -> bool:
    """Whether these kernels can take the weights: on a GPU from sm_80 on or in the interpreter, both of one dtype."""
    return can_run(wte) and wte.dtype == wpe.dtype


def embedding(
    idx: Tensor, wte: Tensor, wpe: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None, dtype: torch.dtype | None = None,
    row: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x = dropout(wte[idx] + wpe[:T]) [B, T, C], wte for the tied head). idx [B, T] int64; wte [V, C]; wpe [>=T, C].

    dtype: that of x; None: the weights'. Dropout needs a seed, an int64 tensor of one element. row: a launch configuration
    (configs.EmbeddingConfig.text); "" means the table's. An id outside the vocabulary gives nan. Raises ValueError for shapes or
    dtypes that do not match.
    """
    if (
        idx.dim() != 2
        or idx.is_floating_point()
        or wte.dim() != 2
        or wte.shape[1:] != wpe.shape[1:]
        or wpe.size(0) < idx.size(1)
        or wte.dtype != wpe.dtype
    ):
        raise ValueError(
            f"embedding: ids {tuple(idx.shape)} {idx.dtype}, wte {tuple(wte.shape)} {wte.dtype}, wpe {tuple(wpe.shape)} {wpe.dtype}"
        )
    check_dtype(wte)
    check_seed(dropout_p, seed)
    return _Embedding.apply(idx, wte, wpe, dropout_p, seed, dtype or wte.dtype, row)
