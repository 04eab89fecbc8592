"""Gradients that a backward adds to where they are, instead of handing them to autograd to add. Eager mode alone.

Autograd adds a weight's gradient to `.grad` in a kernel of its own, which reads both and writes one. A GEMM that makes the gradient can
add it for one more read. And the loss's gradient of the tied head is a tensor that nobody else holds: the embedding's rows can be added
to it in place. torch.compile sees neither: an op must declare there what it writes into.
"""

from contextlib import contextmanager

import torch

allowed = False  # a backward runs in autograd's threads: a context variable would not be seen there


@contextmanager
def in_place():
    """Within it a backward may add a weight's gradient to its `.grad` itself.

    For a `loss.backward()` that is for all weights, where nobody but they waits for gradients: DDP's hooks would not be called.
    """
    global allowed
    before, allowed = allowed, True
    try:
        yield
    finally:
        allowed = before


def weight_gradient(weight, dtype):
    """(the tensor that a GEMM is to write a weight's gradient into, whether it is to add to it).

    The weight's own fp32 `.grad` where that may be added to, else a new tensor of `dtype`.
    """
    if allowed and not torch.compiler.is_compiling() and weight.is_leaf and weight.requires_grad:
        grad, heard = weight.grad, weight._backward_hooks or weight._post_accumulate_grad_hooks
        if grad is not None and not heard and grad.dtype == torch.float32 and grad.is_contiguous():
            return grad, True
    return torch.empty(weight.shape, dtype=dtype, device=weight.device), False


def mark_owned(grad):
    """Mark a gradient that a backward has just made: the next backward may write into it."""
    grad.is_owned = True
    return grad


def is_owned(grad):
    """Whether a backward of ours made this gradient and nobody else holds it: a sum hands one tensor to both of its terms.

    A reference that Python code keeps, in a hook, is not counted.
    """
    return getattr(grad, "is_owned", False) and grad.is_contiguous() and grad._use_count() == 1
