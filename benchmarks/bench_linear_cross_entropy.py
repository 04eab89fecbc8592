"""The head with its loss, against eager, Inductor, PyTorch's linear_cross_entropy, Liger and quack.

Each library computes the logits in chunks of rows, to save memory. A chunk reads and writes the weight's gradient once more, so the
chunks that are fastest are large: `-tuned` and `-whole` have all rows of these shapes in one.
"""

import torch
from torch.nn import functional as F

from fastgpt.benchmarks.harness import NotHere, Op, importable, needs_gpu
from fastgpt.benchmarks.peers.liger import tuned_loss
from fastgpt.records import Shape

SHAPES = [Shape(16, 1024, 768, 1, 50304), Shape(8, 1024, 1600, 1, 50304)]
ROWS = 16384  # of a chunk

linear_cross_entropy = Op("linear_cross_entropy", SHAPES, Shape(4, 64, 64, 1, 256))


def on_rows(it, loss):
    """A function of h [B, T, C] and weight from loss(rows [B T, C], weight in their dtype, targets [B T])."""
    return lambda h, weight: (loss(h.flatten(0, 1), weight.to(h.dtype), it.targets.flatten()),)


def torch_loss(it, **options):
    """F.linear_cross_entropy: without options the reference path, with options the chunked one.

    Of 16-bit rows torch 2.13's chunked path rounds the loss to 16 bits: it is then not equal.
    """
    if not hasattr(F, "linear_cross_entropy"):
        raise NotHere(f"torch {torch.__version__} has no F.linear_cross_entropy; 2.13 has")
    how = {"options": torch.nn.LinearCrossEntropyOptions(**options)} if options else {}  # the function is older

    def loss(h, *args):
        with torch.autocast(h.device.type, h.dtype, enabled=h.dtype != torch.float32):
            return F.linear_cross_entropy(h, *args, ignore_index=-1, **how).float()

    return on_rows(it, loss)


linear_cross_entropy.provider("torch")(torch_loss)
linear_cross_entropy.provider("torch-chunked")(lambda it: torch_loss(it, chunking_method="auto"))
linear_cross_entropy.provider("torch-tuned")(lambda it: torch_loss(it, chunking_method=None, batch_chunk_size=ROWS))


@linear_cross_entropy.provider("liger")
def liger(it):
    needs_gpu("Liger-Kernel")
    loss = importable("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return on_rows(it, lambda *args: loss(*args, ignore_index=-1))


@linear_cross_entropy.provider("liger-tuned")
def liger_tuned(it):
    needs_gpu("Liger-Kernel")
    return on_rows(it, tuned_loss(ROWS))


def quack(**how):
    """A provider: quack's chunked loss, which on sm_90 keeps exponentials in place of the logits."""

    def make(it):
        needs_gpu("quack")
        loss = importable("quack.linear_cross_entropy").chunked_linear_cross_entropy
        return on_rows(it, lambda *args: loss(*args, ignore_index=-1, **how))

    return make


linear_cross_entropy.provider("quack")(quack())
linear_cross_entropy.provider("quack-tuned")(quack(chunk_size=ROWS))


@linear_cross_entropy.provider("quack-whole")
def quack_whole(it):
    """quack's cross entropy of cuBLAS's logits, whose gradients take their place."""
    needs_gpu("quack")
    loss = importable("quack.linear_cross_entropy").linear_cross_entropy_func
    return on_rows(
        it, lambda h, weight, targets: loss(h, weight, None, targets, ignore_index=-1, inplace_backward=True)
    )


test_linear_cross_entropy = linear_cross_entropy.benchmark()
