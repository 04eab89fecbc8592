"""Gradients that a backward adds to where they are: in the GEMM that makes them, where nobody else waits for them."""

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton")
from kernel_case import DEVICE, DTYPES, run_as

from fastgpt.kernels import accumulate, gelu_mlp, linear

C, F = 4, 6


def whole(*shape, low=-2):
    """Integers from low to 2: their sums are exact in any order, so that bits can be compared."""
    return torch.randint(low, 3, shape, device=DEVICE).float()


def up_and_down(x, w_fc, w_proj):
    """gelu_mlp of pre-activations that are multiples of 16 and not negative, where GELU is exact in any dtype."""
    return gelu_mlp.gelu_mlp(16 * x.abs(), w_fc, None, w_proj, None)


OPS = {
    "linear": (linear.linear, lambda: [whole(F, C)]),
    "gelu_mlp": (up_and_down, lambda: [whole(F, C, low=0), whole(C, F)]),
}


@pytest.fixture
def added(monkeypatch):
    """Of each weight's gradient that was made, whether its GEMM added it to what was there."""
    found = []

    def spied(mm):
        return lambda a, b, out, accumulate: found.append(accumulate) or mm(a, b, out, accumulate)

    for module in (linear, gelu_mlp):
        monkeypatch.setattr(module, "mm", spied(module.mm))
    return found


def two_steps(op, dtype=torch.float32, prepare=lambda w: w, in_place=True, weight_dtype=torch.float32, compiled=False):
    """The gradients of an op's weights after two backward passes. `prepare` gives what the op is to take for a weight."""
    f, make = OPS[op]
    f = torch.compile(f, backend="aot_eager") if compiled else f
    torch.manual_seed(0)
    weights = [w.to(weight_dtype).requires_grad_() for w in make()]
    for _ in range(2):
        x, dy = whole(5, C).to(dtype).requires_grad_(), whole(5, weights[-1].size(0)).to(dtype)
        with accumulate.in_place() if in_place else nullcontext():
            (y,) = run_as(f, dtype)(x, *map(prepare, weights))
            y.backward(dy)
    return [w.grad for w in weights]


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_gemm_adds_with_the_bits_of_autograds_add(op, dtype, added):
    apart = two_steps(op, dtype, in_place=False)
    assert not any(added)
    added.clear()
    assert same_bits(two_steps(op, dtype), apart)
    n = len(apart)
    assert added == [False] * n + [True] * n, "the first gradient has nothing to be added to"


def hooked(w):
    w.register_hook(lambda g: None)
    return w


def hooked_afterwards(w):
    w.register_post_accumulate_grad_hook(lambda w: None)
    return w


def with_a_gradient_by_columns(w):
    w.grad = None if w.grad is None else w.grad.t().contiguous().t()
    return w


OTHERS = {
    "a hook": dict(prepare=hooked),
    "a hook on the sum": dict(prepare=hooked_afterwards),
    "a gradient that is not contiguous": dict(prepare=with_a_gradient_by_columns),
    "a gradient in 16 bits": dict(weight_dtype=torch.float16),
    "compiled": dict(compiled=True),
}


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
@pytest.mark.parametrize("how", OTHERS)
@pytest.mark.parametrize("op", OPS)
def test_others_are_left_to_autograd(op, how, added):
    expected = two_steps(op, in_place=False)
    torch._dynamo.reset()
    assert same_bits([g.float() for g in two_steps(op, **OTHERS[how])], expected)
    assert added
    assert not any(added)


@pytest.mark.parametrize("listen", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_hears_of_every_gradient(listen):
    heard = []
    two_steps("linear", prepare=lambda w: getattr(w, listen)(lambda _: heard.append(1)) and w)
    assert len(heard) == 1 + 2  # one hook the first time, two the second


def test_a_weight_that_is_computed_hands_its_gradient_on():
    w, x = whole(F, C).requires_grad_(), whole(5, C)
    computed = w * 1
    computed.retain_grad()
    for _ in range(2):
        with accumulate.in_place():
            linear.linear(x, computed).sum().backward(retain_graph=True)
    assert torch.equal(w.grad, 2 * x.sum(0).expand(F, C))


def test_a_frozen_weight_keeps_the_gradient_it_has():
    w = whole(F, C).requires_grad_()
    x = whole(5, C).requires_grad_()
    linear.linear(x, w).sum().backward()
    before = w.grad.clone()
    with accumulate.in_place():
        linear.linear(x, w.requires_grad_(False)).sum().backward()
    assert torch.equal(w.grad, before)


def test_an_error_ends_it_and_an_inner_context_does_not():
    with pytest.raises(ZeroDivisionError), accumulate.in_place():
        1 / 0
    assert not accumulate.allowed
    with accumulate.in_place():
        with accumulate.in_place():
            pass
        assert accumulate.allowed


def test_a_gradient_is_owned_until_somebody_else_holds_it():
    grad = torch.zeros(3, 4, device=DEVICE)
    assert not accumulate.is_owned(grad), "a backward of ours must have made it"
    assert accumulate.is_owned(accumulate.mark_owned(grad))
    assert not accumulate.is_owned(accumulate.mark_owned(torch.zeros(3, 4, device=DEVICE).t()))
    holder = torch.zeros(3, 4, device=DEVICE, requires_grad=True)
    holder.grad = grad
    assert not accumulate.is_owned(grad)
    holder.grad = None
    assert accumulate.is_owned(grad)
