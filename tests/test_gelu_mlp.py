"""gelu_mlp, through Triton's interpreter or on a GPU, against fp64 by the three-way rule; its GELU over all inputs."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

pytest.importorskip("triton")
import triton
import triton.language as tl
from kernel_case import DEVICE, DTYPES, HALVES, VIEWS, far, hold, randn, run_as, same_bits

from fastgpt.kernels import configs
from fastgpt.kernels.gelu_mlp import gelu, gelu_derivative, gelu_mlp, widened

pytestmark = pytest.mark.usefixtures("poison")


def reference(h, w_fc, b_fc, w_proj, b_proj, approximate="none"):
    return F.linear(F.gelu(F.linear(h, w_fc, b_fc), approximate=approximate), w_proj, b_proj)


def check(rows, C, dtype, bias=True, F_=None, recompute=False, scale=1.0, view=lambda t: t, row="", approximate="none"):
    F_ = F_ or 4 * C
    inputs = dict(
        h=view(randn(*rows, C, dtype=dtype, scale=scale)),
        w_fc=view(randn(F_, C, scale=C**-0.5)), b_fc=randn(F_) if bias else None,
        w_proj=view(randn(C, F_, scale=F_**-0.5)), b_proj=randn(C) if bias else None,
    )  # fmt: skip
    hold(
        run_as(lambda *i: gelu_mlp(*i, recompute, row, approximate), dtype),
        run_as(lambda *i: reference(*i, approximate), dtype),
        inputs,
        ("y",),
        [view(randn(*rows, C, dtype=dtype))],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [130, 48] + [768, 1600] * (DEVICE == "cuda"))
@pytest.mark.parametrize("bias", [True, False])
def test_widths(C, dtype, bias):
    check((2, 19), C, dtype, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [768, 1600])
def test_wide(C, dtype):
    check((1, 3), C, dtype, F_=64)  # every step along K; on a CPU few columns


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 17, 63, 64, 65] + [100, 128, 1023] * (DEVICE == "cuda"))
def test_lengths(T, dtype):
    check((1, T), 16, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tma", [False, True])
def test_descriptors_and_pointers(tma, dtype):
    """On the pointers' path too where TMA would be taken; and through descriptors in the interpreter."""
    shipped = configs.gelu_mlp(torch.device(DEVICE), dtype, True)
    row = replace(shipped, forward=replace(shipped.forward, tma=tma), backward=replace(shipped.backward, tma=tma)).text
    check((2, 35), 48, dtype, row=row)
    check((2, 35), 48, dtype, recompute=True, row=row)
    check((1, 5), 12, dtype, row=row)  # rows that do not begin on 16 bytes: a descriptor cannot describe them


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward_by_rows_of_their_own(dtype):
    shipped = configs.gelu_mlp(torch.device(DEVICE), dtype, True)
    small, wide = (replace(shipped.forward, block_m=m, block_n=n, group=1) for m, n in ((16, 64), (32, 32)))
    for row in (configs.MLPConfig(small, wide), configs.MLPConfig(wide, small)):
        check((1, 70), 40, dtype, row=row.text)
        check((1, 70), 40, dtype, recompute=True, row=row.text)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", [v for n, v in VIEWS.items() if n != "expanded rows"])
def test_strides(view, dtype):
    check((3, 5), 40, dtype, view=view)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_large_magnitudes(dtype):
    check((2, 9), 48, dtype, scale=1e3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_tanh_gelu(recompute, dtype):
    check((2, 19), 48, dtype, recompute=recompute, approximate="tanh")
    check((2, 9), 48, dtype, recompute=recompute, approximate="tanh", scale=1e3)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(1, 50), st.integers(1, 70), st.booleans(), st.sampled_from(DTYPES))
def test_any_shape(M, C, F_, bias, dtype):
    check((M,), C, dtype, bias, F_)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_recomputing_gives_the_same_bits(approximate, dtype):
    inputs = [randn(2, 19, 48), randn(192, 48), randn(192), randn(48, 192), randn(48)]
    results = []
    for recompute in (False, True):
        leaves = [t.clone().requires_grad_() for t in inputs]
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            y = gelu_mlp(*leaves, recompute=recompute, approximate=approximate)
        y.sum().backward()
        results.append([y, *(t.grad for t in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_backward_is_the_same_bits_every_time():
    leaves = [randn(2, 70, 16), randn(64, 16), randn(64), randn(16, 64), randn(16)]
    assert same_bits(lambda *i: gelu_mlp(*i).sin().sum(), leaves)


def test_rows_beyond_two_to_the_31_elements():
    h, w_fc, w_proj = far(3, 16), randn(64, 16, dtype=torch.float16), randn(16, 64, dtype=torch.float16)
    h.copy_(randn(3, 16, dtype=torch.float16))
    torch.testing.assert_close(
        gelu_mlp(h, w_fc, None, w_proj, None), reference(h, w_fc, None, w_proj, None), rtol=1e-2, atol=0.1
    )


def test_each_gradient_has_its_weights_dtype_and_the_answer_is_no_view():
    h, w_fc, w_proj = randn(2, 16), randn(64, 16).half().requires_grad_(), randn(16, 64).requires_grad_()
    y = gelu_mlp(h, w_fc, torch.tensor(1.5, device=DEVICE).expand(64), w_proj, None)
    torch.testing.assert_close(
        y, reference(h, w_fc.float(), torch.tensor(1.5, device=DEVICE).expand(64), w_proj, None), rtol=1e-4, atol=1e-3
    )
    y += 1
    y.sum().backward()
    assert (w_fc.grad.dtype, w_proj.grad.dtype) == (torch.float16, torch.float32)
    assert not torch.equal(w_proj.grad, w_proj.grad.half().float())


def test_an_empty_batch():
    h, w_fc, w_proj = randn(0, 3, 16).requires_grad_(), randn(64, 16).requires_grad_(), randn(16, 64).requires_grad_()
    b_fc, b_proj = randn(64).requires_grad_(), randn(16).requires_grad_()
    gelu_mlp(h, w_fc, b_fc, w_proj, b_proj).sum().backward()
    assert all((t.grad == 0).all() for t in (w_fc, w_proj, b_fc, b_proj))


def test_what_is_refused():
    with pytest.raises(ValueError, match="w_proj"):
        gelu_mlp(randn(2, 16), randn(64, 16), None, randn(64, 16), None)
    with pytest.raises(ValueError, match="w_proj"):
        gelu_mlp(randn(2, 16), randn(64, 16), randn(16), randn(16, 64), None)
    with pytest.raises(ValueError, match="approximate='sigmoid' is neither"):
        gelu_mlp(randn(2, 16), randn(64, 16), None, randn(16, 64), None, approximate="sigmoid")


@triton.jit
def _widened_of(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, widened(tl.load(x_ptr + i)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widened_are_the_bits_of_a_conversion(dtype):
    """Every number of 16 bits: nan with its payload, both zeros, subnormal ones."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).to(DEVICE)
    x = x.view(dtype) if dtype in HALVES else x.view(torch.float16).to(dtype)
    y = torch.full(x.shape, float("nan"), device=DEVICE)
    _widened_of[(64,)](x, y, BLOCK=1024)
    sound = (
        ~x.isnan() if dtype == torch.float16 else torch.ones_like(x, dtype=torch.bool)
    )  # of fp16's nan a GPU keeps no payload
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.view(torch.int32)[sound], x.float().view(torch.int32)[sound])


@triton.jit
def _gelu_of(x_ptr, y_ptr, dy_ptr, n, BLOCK: tl.constexpr, EXACT: tl.constexpr = False, TANH: tl.constexpr = False):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < n, other=0.0)
    tl.store(y_ptr + i, gelu(x, EXACT, TANH), i < n)
    tl.store(dy_ptr + i, gelu_derivative(x, EXACT, TANH), i < n)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gelu_is_nearer_than_torchs_over_all_inputs(dtype):
    """Every number of the dtype: value and derivative, rounded to it, against fp64 and against torch."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float().to(DEVICE)
    y, dy = torch.empty_like(x), torch.empty_like(x)
    _gelu_of[(64,)](x, y, dy, x.numel(), BLOCK=1024)
    assert torch.equal(y.isnan(), x.isnan())
    usual = x.abs() <= 100  # beyond, GELU(x) is x or 0
    torch.testing.assert_close(y[~usual & ~x.isnan()], x[~usual & ~x.isnan()].clamp(min=0), rtol=0, atol=1e-9)
    x, y, dy = x[usual], y[usual], dy[usual]
    leaf = x.double().requires_grad_()
    exact = F.gelu(leaf)
    (dexact,) = torch.autograd.grad(exact.sum(), leaf)
    low = x.to(dtype).requires_grad_()
    (dtheirs,) = torch.autograd.grad(F.gelu(low).sum(), low)
    for ours, theirs, right in ((y, F.gelu(low).detach(), exact.detach()), (dy, dtheirs, dexact)):
        nearest = right.to(dtype)
        ulp = torch.nextafter(nearest.abs(), torch.tensor(float("inf"), dtype=dtype, device=DEVICE)).double()
        ulp -= nearest.abs().double()
        counts = right.abs() >= 2**-24  # the smallest that fp16 has
        error, their_error = ((t.to(dtype).double() - right).abs() for t in (ours, theirs))
        wrong, their_wrong = (((t.to(dtype) != nearest) & counts).sum().item() for t in (ours, theirs))
        assert error[~counts].max() <= 6e-8
        if right is not dexact:
            assert (error / ulp)[counts].max() < 0.51
            assert wrong < their_wrong
        else:  # where the derivative crosses zero, only the absolute error counts
            assert error.max() <= 1.01 * their_error.max()
            assert ((error <= 0.52 * ulp) | (error < 2e-5))[counts].all()


def tanh_gelu(x):
    """In fp64, by the exponential: 1 + tanh u has no digits left in the tail."""
    return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tanh_gelu_over_all_inputs(dtype):
    """Every number of 16 bits; of fp32 those of bf16. Nothing overflows, and value and derivative are as near as torch's."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = x.view(torch.bfloat16 if dtype == torch.float32 else dtype).float().to(DEVICE)
    x = x[x.isfinite()]
    y, dy = torch.empty_like(x), torch.empty_like(x)
    _gelu_of[(64,)](x, y, dy, x.numel(), BLOCK=1024, EXACT=dtype == torch.float32, TANH=True)
    usual = x.abs() <= 100  # beyond, it is x or 0
    torch.testing.assert_close(y[~usual], x[~usual].clamp(min=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(dy[~usual], (x[~usual] > 0).float(), rtol=1e-6, atol=0)
    leaf = x[usual].double().requires_grad_()
    exact = tanh_gelu(leaf)
    (dexact,) = torch.autograd.grad(exact.sum(), leaf)
    low = x[usual].to(dtype).requires_grad_()
    theirs = F.gelu(low, approximate="tanh")
    (dtheirs,) = torch.autograd.grad(theirs.sum(), low)
    for ours, torchs, right in ((y, theirs.detach(), exact.detach()), (dy, dtheirs, dexact)):
        error, their_error = ((t.to(dtype).double() - right).abs() for t in (ours[usual], torchs))
        unit = torch.finfo(dtype).eps * right.abs()
        assert (error <= (0.51 if dtype in HALVES else 4) * unit + 1e-6).all()
        assert error.max() <= 2 * their_error.max()
