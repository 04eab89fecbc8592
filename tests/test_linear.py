"""linear against fp64 by the three-way rule: its weight gradient leaves the GEMM in the weight's own dtype."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")
from kernel_case import DTYPES, HALVES, VIEWS, hold, randn, run_as, same_bits

from fastgpt.kernels.linear import linear

pytestmark = pytest.mark.usefixtures("poison")


def check(rows, K, N, dtype, bias=True, view=lambda t: t):
    inputs = dict(
        x=view(randn(*rows, K, dtype=dtype)), weight=view(randn(N, K, scale=K**-0.5)), bias=randn(N) if bias else None
    )
    grads = [view(randn(*rows, N, dtype=dtype))]
    hold(run_as(linear, dtype), run_as(F.linear, dtype), inputs, ("y",), grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("K", "N"), [(130, 33), (768, 2304), (1600, 1600)])
def test_widths(K, N, bias, dtype):
    check((2, 19), K, N, dtype, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(), (1,), (3, 5), (2, 2, 3), (0, 4)], ids=str)
def test_any_number_of_dimensions(rows, dtype):
    check(rows, 16, 24, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_strides(name, dtype):
    check((3, 5), 16, 24, dtype, view=VIEWS[name])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_gradient_is_nearer_than_one_that_is_rounded_to_16_bits(dtype):
    """A sum over many rows: fp32 out of the GEMM keeps what PyTorch's under autocast loses."""
    x, dy, w = randn(4096, 16, dtype=dtype), randn(4096, 8, dtype=dtype), randn(8, 16)
    exact = dy.double().t() @ x.double()
    errors = []
    for f in (linear, F.linear):
        leaf = w.clone().requires_grad_()
        run_as(f, dtype)(x, leaf)[0].backward(dy)
        assert leaf.grad.dtype == torch.float32
        errors.append((leaf.grad.double() - exact).abs().max())
    assert errors[0] < errors[1] / 50


def test_the_same_bits_each_time():
    assert same_bits(lambda x, w, b: linear(x, w, b).square().sum(), [randn(40, 24), randn(16, 24), randn(16)])


@pytest.mark.parametrize("wrong", [dict(weight=(8, 15)), dict(weight=(16,)), dict(bias=(7,))], ids=str)
def test_shapes_that_do_not_match_are_refused(wrong):
    shapes = dict(weight=(8, 16), bias=(8,)) | wrong
    with pytest.raises(ValueError, match="linear: "):
        linear(randn(3, 16), **{name: randn(*shape) for name, shape in shapes.items()})
