"""The head and its loss: linear + cross entropy. Only one chunk of the logits exists at a time.

    logits = h weight^T                                  in the compute dtype, a chunk of rows at a time
    loss[i] = lse(logits[i]) - logits[i, target[i]]      fp32; 0 if the target is ignored
    loss = sum(loss) / n                                 n: number of targets not ignored, counted on the device

Shapes: h [..., C]; weight [V, C]; targets [...] int64. The forward also computes the gradients, since it has the logits: softmax - onehot
overwrites the logits, and two GEMMs compute dh and dweight from it. dweight is summed in fp32 over the chunks. The backward multiplies
both in fp32 by the loss's gradient, which the forward does not know, and by 1/n. So fp16 stores softmax - onehot without the factor 1/n,
which would make it underflow. Saved: dh and dweight. Recomputed: nothing.

Bytes: the logits are written once, read once and overwritten once, 6 V for each token in bf16. (A row is read twice, the second time from
L2.) PyTorch's eager fp32 loss and its backward move 38 V. FLOPs for each token: 6 C V in three GEMMs, which cuBLAS computes; without
gradients 2 C V, and the logits are not overwritten.

A chunk has at least 8,192 rows: every chunk reads and writes all of dweight, which would dominate the time of short chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import configs
from fastgpt.kernels.accumulate import mark_owned
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
    next_power_of_2,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _online(x, m, total):
    """The maximum of the logits so far, and the sum of their exponentials relative to it, with those of x [BLOCK]."""
    m_new = tl.maximum(m, tl.max(x, 0))
    return m_new, total * tl.exp2((m - m_new) * LOG2E) + tl.sum(tl.exp2((x - m_new) * LOG2E), 0)


@triton.jit
def _overwrite(ptrs, mask, m, log2_total):
    """Overwrite logits with their softmax. Nothing reads either before they have left L2."""
    x = tl.load(ptrs, mask, eviction_policy="evict_first").to(tl.float32)
    softmax = tl.exp2((x - m) * LOG2E - log2_total)
    tl.store(ptrs, softmax.to(ptrs.dtype.element_ty), mask, eviction_policy="evict_first")


@triton.jit
def _loss_rows(
    logits_ptr,  # [rows, V] in; softmax - onehot out, if GRAD
    targets_ptr,  # [rows] int64
    loss_ptr,  # [rows] fp32 out
    V,
    room,  # columns of a row in memory: V and padding, which is read and written too; a mask by V would split the loads
    stride,  # between rows of the logits
    stride_y,
    ignore_index,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,  # columns of the last block: at least V % BLOCK; 0 if that is 0
    GRAD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * V exceeds 2^31 from 43,000 rows of GPT-2's vocabulary on
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row * stride_y)
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if GRAD:
            for start in range(0, V, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                tl.store(logits_ptr + cols, tl.zeros([BLOCK], logits_ptr.dtype.element_ty), cols < room)
    else:
        # Read the target's logit before the loop, whose reductions are barriers: later another warp may have overwritten it.
        # A target outside the vocabulary reads nothing, and gives nan, which shows in the loss.
        known = (target >= 0) & (target < V)
        at_target = tl.load(logits_ptr + target, known, other=float("nan")).to(tl.float32)
        # The first read leaves the row in L2 for the second. Nothing is read after that.
        FIRST: tl.constexpr = "evict_last" if GRAD else "evict_first"
        m = -3e38  # finite, since all logits of a block may be -inf
        total = 0.0
        whole = V // BLOCK * BLOCK  # columns of whole blocks, which need no masks
        for start in range(0, whole, BLOCK):
            x = tl.load(logits_ptr + start + tl.arange(0, BLOCK), eviction_policy=FIRST).to(tl.float32)
            m, total = _online(x, m, total)
        if REST:
            rest = whole + tl.arange(0, REST)
            last = tl.load(logits_ptr + rest, rest < room, eviction_policy=FIRST).to(tl.float32)
            m, total = _online(tl.where(rest < V, last, -float("inf")), m, total)
        # Subtract the maximum first, as PyTorch does: a small loss of large logits keeps its digits.
        log2_total = tl.log2(total)
        tl.store(loss_ptr + row, (m - at_target) + log2_total / LOG2E)
        if GRAD:
            for start in range(0, whole, BLOCK):
                _overwrite(logits_ptr + start + tl.arange(0, BLOCK), None, m, log2_total)
            if REST:
                _overwrite(logits_ptr + rest, rest < room, m, log2_total)
            tl.debug_barrier()  # another thread has written the target's softmax
            gradient = tl.exp2((at_target - m) * LOG2E - log2_total) - 1
            tl.store(logits_ptr + target, gradient.to(logits_ptr.dtype.element_ty), known)


@triton.jit
def _loss_mean(
    losses_ptr,  # [M] fp32
    targets_ptr,  # [M] int64
    loss_ptr,  # [1] fp32 out: the mean; nan if all are ignored
    share_ptr,  # [1] fp32 out: 1 / n; 0 if all are ignored
    M,
    stride_y,
    ignore_index,
    BLOCK: tl.constexpr,
):
    total = tl.zeros([BLOCK], tl.float32)
    n = tl.zeros([BLOCK], tl.int32)
    for start in range(0, M, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(losses_ptr + i, i < M, other=0.0)
        n += (tl.load(targets_ptr + i * stride_y, i < M, other=ignore_index) != ignore_index).to(tl.int32)
    count = tl.sum(n, 0).to(tl.float32)
    tl.store(loss_ptr, tl.where(count > 0, tl.sum(total, 0) / tl.maximum(count, 1.0), float("nan")))
    tl.store(share_ptr, tl.where(count > 0, 1 / tl.maximum(count, 1.0), 0.0))


@triton.jit
def _loss_scale(
    x_ptr,  # [n]
    dloss_ptr,  # [1] the loss's gradient
    share_ptr,  # [1] fp32, 1 / n
    out_ptr,  # [n] out
    n,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(dloss_ptr).to(tl.float32) * tl.load(share_ptr)
    x = tl.load(x_ptr + i, i < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, (x * factor).to(out_ptr.dtype.element_ty), i < n)


# ---- launchers ----


def chunk_rows(M: int, V: int, itemsize: int, memory: int, config: configs.LossConfig) -> int:
    """Rows of a chunk: its logits take at most a share of the device's memory; min_chunk rows at least; all chunks about equal."""
    most = max(config.min_chunk, int(memory * config.memory_share) // (V * itemsize))
    return cdiv(M, cdiv(M, most)) if M else 1


@kernel_op("loss", "share", "dh", "dweight")
def linear_cross_entropy_forward(
    h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, row: str,
    loss: Tensor, share: Tensor, dh: Tensor | None, dweight: Tensor | None,
) -> None:  # fmt: skip
    """Compute loss, the mean, and share, 1/n, both [1] fp32; and, unless None, dh like h and dweight [V, C] fp32, both without 1/n.

    h [..., C] and weight [V, C] are in the compute dtype.
    """
    config, device = configs.linear_cross_entropy(row), h.device
    V, C = weight.shape
    h2, targets = h.reshape(-1, C), targets.reshape(-1)
    M = h2.size(0)
    memory = torch.cuda.get_device_properties(device).total_memory if h.is_cuda else 2**34
    chunk = chunk_rows(M, V, h.element_size(), memory, config)
    losses = torch.empty(M, dtype=torch.float32, device=device)
    # Rows of the logits begin at multiples of 128 bytes for any V: loads and GEMMs are then aligned.
    room = cdiv(V, 64) * 64
    buffer = torch.empty((chunk, room), dtype=h.dtype, device=device)
    # At most one thread for each logit of a block: a second thread would read a logit while the first overwrites it.
    block = min(config.block, next_power_of_2(V))
    warps = min(config.warps, max(1, block // 32))
    rest = V % block and max(next_power_of_2(V % block), min(block, 32 * warps))
    if dweight is not None and not M:
        dweight.zero_()
    for start in range(0, M, chunk):
        x, y = h2[start : start + chunk], targets[start : start + chunk]
        logits = buffer[: x.size(0), :V]
        torch.mm(x, weight.t(), out=logits)
        launch(
            _loss_rows, (x.size(0),),
            logits, y, losses[start:], V, room, room, y.stride(0), ignore_index,
            BLOCK=block, REST=rest, GRAD=dh is not None, num_warps=warps,
        )  # fmt: skip
        if dh is not None:
            torch.mm(logits, weight, out=dh.view(-1, C)[start : start + chunk])
            mm(logits.t(), x, dweight, accumulate=start > 0)
    launch(
        _loss_mean, (1,),
        losses, targets, loss, share, M, targets.stride(0), ignore_index, BLOCK=config.mean_block, num_warps=config.warps
    )  # fmt: skip


@kernel_op("dh_out", "dweight_out")
def linear_cross_entropy_backward(
    dloss: Tensor, share: Tensor, dh: Tensor, dweight: Tensor, row: str, dh_out: Tensor, dweight_out: Tensor
) -> None:
    """Write dh and dweight, both times dloss / n, to dh_out and dweight_out."""
    block = configs.linear_cross_entropy(row).scale_block
    for x, out in ((dh, dh_out), (dweight, dweight_out)):
        if x.numel():
            launch(_loss_scale, (cdiv(x.numel(), block),), x, dloss, share, out, x.numel(), BLOCK=block)


# ---- the public op ----


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, cast_weight, targets, ignore_index, grad, row):
        """cast_weight is the weight in h's dtype. The loss is [1]: torch.compile fills an empty tensor without dimensions."""
        loss, share = (torch.empty(1, dtype=torch.float32, device=h.device) for _ in range(2))
        dh = like(h, h.dtype) if grad else None
        dweight = like(weight, torch.float32) if grad else None
        linear_cross_entropy_forward(h, cast_weight, targets, ignore_index, row, loss, share, dh, dweight)
        ctx.save_for_backward(share, dh, dweight)
        ctx.dtype, ctx.row = weight.dtype, row
        return loss

    @staticmethod
    @forbid_double_backward("linear_cross_entropy")
    def backward(ctx, dloss):
        share, dh, dweight = ctx.saved_tensors
        dh_out, dweight_out = like(dh, dh.dtype), like(dweight, ctx.dtype)
        linear_cross_entropy_backward(dloss, share, dh, dweight, ctx.row, dh_out, dweight_out)
        owned = dweight_out if torch.compiler.is_compiling() else mark_owned(dweight_out)
        return dh_out, owned, *(None,) * 5


takes = can_run  # any h


def linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, shadow: Tensor | None = None, row: str = ""
) -> Tensor:
    """Mean cross entropy of logits h weight^T against targets: a scalar, fp32. h [..., C]; weight [V, C]; targets [...] int64.

    Targets equal to ignore_index do not count. If none counts, the loss is nan, as in PyTorch. Any other target outside the vocabulary
    also gives nan; PyTorch asserts. Gradients are computed only if h or weight needs them. shadow: the shadow of the parameter, if weight
    is only an alias of it (fastgpt.shadows). row: a launch configuration (configs.LossConfig.text); "" means the table's. Raises
    ValueError for shapes that do not match.
    """
    if (
        h.shape[:-1] != targets.shape
        or targets.is_floating_point()
        or h.size(-1) != weight.size(-1)
        or weight.dim() != 2
    ):
        raise ValueError(
            f"linear_cross_entropy: h {tuple(h.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)} "
            f"{targets.dtype}"
        )
    dtype, grad = compute_dtype(h), needs_grad(h, weight)
    low = cast(weight, dtype, shadow)
    targets = targets.long()  # a uint8, which PyTorch takes too, is never -100
    return _LinearCrossEntropy.apply(h.to(dtype), weight, low, targets, ignore_index, grad, row).view(())
