"""Gradients that a backward adds in place, instead of returning them for autograd to add. In eager mode only.

Autograd adds a weight's gradient to `.grad` in a separate kernel, which reads two tensors and writes one. The GEMM that computes the
gradient can add it with one more read. Likewise the loss's gradient of the tied head is a tensor that nothing else holds: the
embedding's backward can add its rows to it in place. torch.compile does neither: there an op must declare what it writes into.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# The references to a gradient that nothing but the running backward holds. Autograd of torch 2.11 keeps one more of its own.
ALONE = 2 if torch.__version__.startswith("2.11.") else 1

allowed = False  # a global, not a context variable: backwards run in autograd's threads, which would not see that


@contextmanager
def in_place() -> Iterator[None]:
    """A context in which a backward may add a weight's gradient to its `.grad` itself.

    Use it only for a `loss.backward()` whose gradients all go to `.grad`. Hooks on these gradients, such as DDP's, would not be called.
    """
    global allowed
    before, allowed = allowed, True
    try:
        yield
    finally:
        allowed = before


def weight_gradient(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """(the tensor that a GEMM writes a weight's gradient into, whether it must add to what is there).

    The tensor is the weight's fp32 `.grad` if a backward may add to it, else a new tensor of `dtype`.
    """
    if allowed and not torch.compiler.is_compiling() and weight.is_leaf and weight.requires_grad:
        grad, hooked = weight.grad, weight._backward_hooks or weight._post_accumulate_grad_hooks
        if grad is not None and not hooked and grad.dtype == torch.float32 and grad.is_contiguous():
            return grad, True
    return torch.empty(weight.shape, dtype=dtype, device=weight.device), False


def mark_owned(grad: Tensor) -> Tensor:
    """Mark a new gradient: the op that receives it in the backward may write into it. Returns it."""
    grad.is_owned = True  # type: ignore[attr-defined]
    return grad


def is_owned(grad: Tensor) -> bool:
    """Whether a gradient is marked as owned, and nothing else holds it. (The backward of a sum gives one tensor to both terms.)

    References that Python code keeps, for example in a hook, are not counted.
    """
    return getattr(grad, "is_owned", False) and grad.is_contiguous() and grad._use_count() == ALONE  # type: ignore[attr-defined]
