"""The update: the gradients' global norm, clipping, AdamW and the shadow weights, in two passes over memory.

    norm = sqrt(the sum over all gradients of g^2);  scale = min(1, max_norm / (norm + 1e-6))
    g = scale g;  m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2;  p -= lr weight_decay p
    p -= lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

If the norm is measured, and it or the loss is not finite, nothing changes: the device decides that, and the host need not wait.

Shapes: any number of dense fp32 tensors p; g, m and v have p's shape; t is an fp32 scalar on the device. A tensor may have a shadow: p
in 16 bits, which the next forward reads. Source: Loshchilov and Hutter, arXiv 1711.05101, in the form of torch.optim.AdamW.

All tensors of a parameter group share one launch. A program updates CHUNK elements of one tensor, and reads the tensor's addresses from
a table on the device. Bytes for each element: the norm reads 4; the update reads 16, and writes 12, or 14 with a shadow. In PyTorch
clip_grad_norm_, fused AdamW and a copy of the shadows move 4 + 8, 28 and 6.
"""

import functools
import itertools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import configs
from fastgpt.kernels.common import can_run, cdiv, launch

# The columns of the table, int64; a row for each tensor: its number of elements, the index of its first chunk, and addresses.
COLUMNS = ("numel", "first", "grad", "p", "exp_avg", "exp_avg_sq", "step", "shadow")
NUMEL, FIRST, GRAD, P, M, V, STEP, SHADOW = (tl.constexpr(i) for i in range(len(COLUMNS)))
WIDTH = tl.constexpr(len(COLUMNS))


@triton.jit
def _address(table_ptr, row, column: tl.constexpr, ALIGNED: tl.constexpr, dtype: tl.constexpr = tl.float32):
    """The pointer in a row of the table. ALIGNED: the compiler may assume that it is a multiple of 16 bytes."""
    address = tl.load(table_ptr + row * WIDTH + column).to(tl.pointer_type(dtype))
    return tl.multiple_of(address, 16) if ALIGNED else address


@triton.jit
def _elements(table_ptr, row, chunk, CHUNK: tl.constexpr, ALIGNED: tl.constexpr):
    """(first element, number of elements to the tensor's end) of a chunk of a tensor."""
    start = (chunk - tl.load(table_ptr + row * WIDTH + FIRST)) * CHUNK
    n = tl.load(table_ptr + row * WIDTH + NUMEL) - start
    return start, tl.multiple_of(n, 16) if ALIGNED else n


@triton.jit
def _one_less(t, log_beta):
    """1 - beta^t in fp32, accurate even if beta^t is near 1: then by the series of -expm1, which is short."""
    y = t * log_beta
    series = 1.0
    for i in tl.static_range(9, 1, -1):
        series = 1 + y / i * series
    return tl.where(y > -0.5, -y * series, 1 - tl.exp(y))


@triton.jit
def _adamw_norm(
    table_ptr,  # [tensors, WIDTH] int64
    rows_ptr,  # [chunks] int32: the table's row of each chunk
    partial_ptr,  # [chunks] fp32 out: each chunk's sum of squares
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    chunk = tl.program_id(0)
    row = tl.load(rows_ptr + chunk)
    start, n = _elements(table_ptr, row, chunk, CHUNK, ALIGNED)
    grad_ptr = _address(table_ptr, row, GRAD, ALIGNED) + start
    total = tl.zeros([BLOCK], tl.float32)
    for first in tl.static_range(0, CHUNK, BLOCK):
        i = first + tl.arange(0, BLOCK)
        g = tl.load(grad_ptr + i, i < n, other=0.0)
        total += g * g
    tl.store(partial_ptr + chunk, tl.sum(total, 0))


@triton.jit
def _adamw_clip(
    partial_ptr,  # [chunks] fp32
    norm_ptr,  # [] fp32 out
    scale_ptr,  # [] fp32 out: the factor of clipping
    taken_ptr,  # [] fp32 out: 1, or 0 if the update is to change nothing
    loss_ptr,  # [] fp32, or None: a loss that must be finite too
    found_inf_ptr,  # [] fp32, or None: if it is not 0, nothing changes
    chunks,
    max_norm,
    BLOCK: tl.constexpr,
):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, chunks, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + i, i < chunks, other=0.0)
    norm = tl.sqrt_rn(tl.sum(total, 0))
    tl.store(norm_ptr, norm)
    tl.store(scale_ptr, tl.minimum(max_norm / (norm + 1e-6), 1.0))
    taken = norm < float("inf")  # false for nan
    if loss_ptr is not None:
        taken &= tl.abs(tl.load(loss_ptr)) < float("inf")
    if found_inf_ptr is not None:
        taken &= tl.load(found_inf_ptr) == 0
    tl.store(taken_ptr, taken.to(tl.float32))


@triton.jit
def _adamw_update(
    table_ptr,  # [tensors, WIDTH] int64
    rows_ptr,  # int32, from the group's first chunk on
    scale_ptr,  # [] fp32, or None: no clipping
    taken_ptr,  # [] fp32, or None: if it is 0, nothing is updated
    first_chunk,
    lr,
    weight_decay,
    beta2,
    rest1,  # 1 - beta1, computed on the host in fp64: fp32 would lose digits
    rest2,
    log_beta1,
    log_beta2,
    eps,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHADOW_DTYPE: tl.constexpr,  # None: no tensor has a shadow
):
    row = tl.load(rows_ptr + tl.program_id(0))
    start, n = _elements(table_ptr, row, first_chunk + tl.program_id(0), CHUNK, ALIGNED)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    if taken_ptr is not None:
        n = tl.where(tl.load(taken_ptr) != 0, n, 0)
    g_ptr = _address(table_ptr, row, GRAD, ALIGNED) + start
    p_ptr = _address(table_ptr, row, P, ALIGNED) + start
    m_ptr = _address(table_ptr, row, M, ALIGNED) + start
    v_ptr = _address(table_ptr, row, V, ALIGNED) + start
    t = tl.load(_address(table_ptr, row, STEP, False))
    step_size = lr / _one_less(t, log_beta1)
    rsqrt_v = 1 / tl.sqrt_rn(_one_less(t, log_beta2))
    if SHADOW_DTYPE is not None:
        shadow_ptr = _address(table_ptr, row, SHADOW, ALIGNED, SHADOW_DTYPE) + start
        shadowed = tl.load(table_ptr + row * WIDTH + SHADOW) != 0
    for first in tl.static_range(0, CHUNK, BLOCK):
        i = first + tl.arange(0, BLOCK)
        mask = i < n
        g = tl.load(g_ptr + i, mask, other=0.0) * scale
        p = tl.load(p_ptr + i, mask, other=0.0)
        m = tl.load(m_ptr + i, mask, other=0.0)
        v = tl.load(v_ptr + i, mask, other=0.0)
        m += rest1 * (g - m)
        v = beta2 * v + rest2 * g * g
        p -= lr * weight_decay * p
        p -= step_size * m / (tl.sqrt_rn(v) * rsqrt_v + eps)
        tl.store(p_ptr + i, p, mask)
        tl.store(m_ptr + i, m, mask)
        tl.store(v_ptr + i, v, mask)
        if SHADOW_DTYPE is not None:
            tl.store(shadow_ptr + i, p.to(SHADOW_DTYPE), mask & shadowed)


# ---- launchers ----


def lists(group: dict[str, Any]) -> dict[str, list[Any]]:
    """{column of the table: list of a group's tensors}. A shadow may be None."""
    names = ("grads", "params", "exp_avgs", "exp_avg_sqs", "steps", "shadows")
    return {column: group[name] for column, name in zip(COLUMNS[2:], names, strict=True)}


@functools.lru_cache(maxsize=4)
def chunks_of(sizes: tuple[int, ...], chunk: int, device: torch.device) -> tuple[list[int], Tensor]:
    """(number of chunks of each tensor, index of each chunk's tensor on the device) for tensors of `sizes` elements."""
    counts = [cdiv(n, chunk) for n in sizes]
    rows = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), torch.tensor(counts))
    return counts, rows.to(device)


def table_of(
    groups: list[dict[str, Any]], sizes: tuple[int, ...], counts: list[int], device: torch.device
) -> tuple[Tensor, bool]:
    """(the table on the device; whether all addresses are multiples of 16 bytes and all sizes of 16)."""
    columns = zip(*(lists(group).values() for group in groups), strict=True)  # of each, a list from every group
    *vectors, steps, shadows = (
        [0 if t is None else t.data_ptr() for t in itertools.chain(*column)] for column in columns
    )
    first = [0, *itertools.accumulate(counts[:-1])]
    aligned = not any(n % 16 for n in itertools.chain(sizes, *vectors, shadows))
    return copied((*zip(sizes, first, *vectors, steps, shadows, strict=True),), device), aligned


@functools.lru_cache(maxsize=2)
def copied(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """The table with these rows on the device, copied without a wait. Tensors that stay where they are have one table for all updates."""
    table = torch.tensor(rows, dtype=torch.int64)
    return (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)


def update(
    grad: Tensor, groups: list[dict[str, Any]], max_norm: float | None, loss: Tensor | None, found_inf: Tensor | None, row: str,
    squares: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """See `adamw`. grad is one of the gradients."""
    config, device = configs.adamw(row), grad.device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "adamw: a CUDA graph cannot hold it; it reads addresses on the host, and keeps a few tables only"
        )
    sizes = tuple(p.numel() for group in groups for p in group["params"])
    counts, rows = chunks_of(sizes, config.chunk, device)
    table, aligned = table_of(groups, sizes, counts, device)
    norm = scale = None
    taken = None if found_inf is None else 1 - found_inf
    constants = dict(CHUNK=config.chunk, BLOCK=config.block, ALIGNED=aligned, num_warps=config.warps)
    if max_norm is not None:
        norm, scale, taken = (torch.empty((), dtype=torch.float32, device=device) for _ in range(3))
        if squares is None:
            partial = torch.empty(len(rows), dtype=torch.float32, device=device)
            launch(_adamw_norm, (len(rows),), table, rows, partial, **constants)
        else:
            partial = squares.view(1)
        launch(
            _adamw_clip, (1,), partial, norm, scale, taken, loss, found_inf, len(partial), float(max_norm),
            BLOCK=config.clip_block, num_warps=8,
        )  # fmt: skip
    steps = [t for group in groups for t in group["steps"]]
    torch._foreach_add_(steps, 1 if taken is None else taken)
    first, done = 0, 0
    for group in groups:
        n = sum(counts[done : done + len(group["params"])])
        done += len(group["params"])
        beta1, beta2 = group["betas"]
        dtypes = {str(t.dtype).removeprefix("torch.") for t in group["shadows"] if t is not None}
        if n:
            launch(
                _adamw_update, (n,),
                table, rows[first:], scale, taken, first, float(group["lr"]), float(group["weight_decay"]), float(beta2),
                1 - beta1, 1 - beta2, log(beta1), log(beta2), group["eps"],
                SHADOW_DTYPE=getattr(tl, dtypes.pop()) if dtypes else None, **constants,
            )  # fmt: skip
        first += n
    return norm


def log(beta: float) -> float:
    """log(beta). For 0 a value at which beta^t is 0: t is at least 1."""
    return math.log(beta) if beta > 0 else -1e4


# ---- the public op ----


def takes(p: Tensor, groups: list[dict[str, Any]]) -> bool:
    """Whether the kernels can take these tensors.

    They must be dense, fp32, on one device, and of their parameter's shape; a group's shadows must have one dtype.
    """
    device = p.device

    def fit(tensors, shapes, dtype=torch.float32):
        return all(
            t.dtype == dtype and t.shape == shape and t.is_contiguous() and t.device == device
            for t, shape in zip(tensors, shapes, strict=True)
        )

    if not can_run(p):
        return False
    for group in groups:
        shapes = [t.shape for t in group["params"]]
        *vectors, steps, shadows = lists(group).values()
        if not (all(fit(tensors, shapes) for tensors in vectors) and fit(steps, [()] * len(steps))):
            return False
        shadowed = [i for i, t in enumerate(shadows) if t is not None]
        dtype = shadows[shadowed[0]].dtype if shadowed else None
        if not fit([shadows[i] for i in shadowed], [shapes[i] for i in shadowed], dtype):
            return False
    return True


@torch.no_grad()
def adamw(
    groups: list[dict[str, Any]], grads: list[Tensor], max_norm: float | None = None, loss: Tensor | None = None,
    found_inf: Tensor | None = None, row: str = "", squares: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Clip to a global norm of max_norm, and update in place. Returns the norm before clipping, [] fp32.

    max_norm: infinity only measures the norm; None does not, and returns None. If the norm is measured and not finite, nothing changes.
    loss: [] fp32, or None; with a max_norm, if it is not finite, nothing changes.
    groups: dicts with lists of tensors: params, grads, exp_avgs, exp_avg_sqs, steps ([] fp32, updates so far) and shadows (16-bit
    copies of weights, which the update also writes, or None); and with lr, betas, eps, weight_decay.
    grads: the gradients of all groups, in the order in which PyTorch adds up their norms. They are not changed.
    found_inf: [] fp32, or None; if it is not 0, nothing changes.
    row: a launch configuration (configs.AdamWConfig.text); "" means the table's.
    squares: the sum of squares from which the norm is, [] fp32, where these tensors are parts of larger ones; None: that of grads.
    """
    return update(grads[0], groups, max_norm, loss, found_inf, row, squares)
