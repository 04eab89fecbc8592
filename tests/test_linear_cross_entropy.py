"""linear_cross_entropy, through Triton's interpreter or on a GPU, against fp64 by the three-way rule."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

pytest.importorskip("triton")
from kernel_case import DEVICE, DTYPES, HALVES, VIEWS, far, hold, randn, run_as, same_bits

from fastgpt.kernels import configs
from fastgpt.kernels import linear_cross_entropy as module
from fastgpt.kernels.linear_cross_entropy import chunk_rows, linear_cross_entropy
from fastgpt.records import widened

pytestmark = pytest.mark.usefixtures("poison")


def reference(h, weight, targets, ignore_index=-100):
    logits = widened(F.linear(h, weight), torch.float32)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index)


def row(**fields):
    """The shipped row with other fields, as text: small blocks and chunks, whose loops then run more than once."""
    return replace(configs.LINEAR_CROSS_ENTROPY, **fields).text


def check(rows, C, V, dtype, ignored=0.2, scale=2.0, upstream=1.0, ignore_index=-100, view=lambda t: t, row=""):
    targets = torch.randint(V, rows, device=DEVICE)
    targets[torch.rand(rows, device=DEVICE) < ignored] = ignore_index
    targets.view(-1)[0] = V - 1
    hold(
        run_as(lambda h, weight: linear_cross_entropy(h, weight, view(targets), ignore_index, row=row), dtype),
        run_as(lambda h, weight: reference(h, weight, view(targets), ignore_index), dtype),
        dict(h=view(randn(*rows, C, dtype=dtype)), weight=randn(V, C, scale=scale * C**-0.5)),
        ("loss",),
        [torch.tensor(upstream, device=DEVICE)],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [2, 65, 1003] + [50257, 50304] * (DEVICE == "cuda"))
def test_vocabularies(V, dtype):
    check((2, 17), 24, V, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpt2s_vocabulary(dtype):
    check((1, 5), 16, 50257, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [768, 1600, 130, 48])
def test_widths(C, dtype):
    check((1, 9), C, 97, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 17, 31, 32, 33] + [100, 128, 1023] * (DEVICE == "cuda"))
def test_lengths(T, dtype):
    check((1, T), 16, 150, dtype, row=row(block=64, mean_block=16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_chunks_are_as_exact_as_one(dtype):
    check((3, 13), 24, 101, dtype, row=row(min_chunk=4, memory_share=0))


def test_the_number_of_chunks():
    gpt2 = dict(V=50304, itemsize=2, config=configs.LINEAR_CROSS_ENTROPY)
    assert chunk_rows(12 * 1024, memory=141e9, **gpt2) == 12 * 1024  # all at once on an H200
    assert chunk_rows(64 * 1024, memory=24e9, **gpt2) == -(-64 * 1024 // 5)  # equal chunks, of at most 14,909 rows
    assert chunk_rows(64 * 1024, memory=2e9, **gpt2) == 8192  # never less


def test_a_vocabulary_of_one():
    h, weight = randn(1, 5, 8).requires_grad_(), randn(1, 8).requires_grad_()
    loss = linear_cross_entropy(h, weight, torch.zeros(1, 5, dtype=torch.int64, device=DEVICE))
    loss.backward()
    assert max(loss.abs(), h.grad.abs().max(), weight.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_targets_and_another_index(dtype):
    check((2, 20), 16, 50, dtype, ignored=0.8)
    check((2, 20), 16, 50, dtype, ignore_index=-1)
    check((2, 20), 16, 50, dtype, ignore_index=7)  # one of the vocabulary


def test_all_ignored_is_nan_and_moves_nothing():
    h, weight = randn(1, 5, 8).requires_grad_(), randn(11, 8).requires_grad_()
    loss = linear_cross_entropy(h, weight, torch.full((1, 5), -100, device=DEVICE))
    assert loss.isnan()
    loss.backward()
    assert (h.grad == 0).all()
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("target", [11, -1, 2**40])
def test_a_target_outside_the_vocabulary_shows(target):
    targets = torch.tensor([[1, target, 2]], device=DEVICE)
    assert linear_cross_entropy(randn(1, 3, 8), randn(11, 8), targets).isnan()


def test_large_magnitudes():
    check((2, 9), 16, 40, torch.float16, scale=200.0)
    check((2, 9), 16, 40, torch.bfloat16, scale=200.0)
    check((2, 9), 16, 40, torch.float32, scale=1e4)


@pytest.mark.parametrize("s", [10, 20, 1000])
def test_a_small_loss_of_large_logits(s):
    """To a unit in the last place of 1, which is what a row's sum of exponentials is near; and never below 0."""
    weight, targets = randn(64, 32), torch.randint(64, (2, 16), device=DEVICE)
    h = weight[targets] * s / 32
    loss = linear_cross_entropy(h, weight, targets)
    assert loss >= 0
    assert (loss - reference(h.double(), weight.double(), targets)).abs() < 1.2e-7


def test_a_block_of_logits_that_is_all_minus_infinity():
    weight = torch.zeros(50, 1, device=DEVICE)
    weight[:32] = -float("inf")
    h, target = torch.ones(1, 1, device=DEVICE), torch.tensor([40], device=DEVICE)
    loss = linear_cross_entropy(h, weight, target, row=row(block=32))
    torch.testing.assert_close(loss, torch.tensor(18.0, device=DEVICE).log())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("upstream", [1 / 40, 65536.0])
def test_the_losss_own_gradient(upstream, dtype):
    """A micro-step's share, and fp16's loss scale: softmax - onehot must not have been rounded to nothing before."""
    check((2, 40), 16, 1003, dtype, upstream=upstream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides(view, dtype):
    check((3, 5), 20, 33, dtype, ignored=0, view=lambda t: view(t) if t.dim() == 3 else t)


def test_targets_of_any_stride():
    h, weight = randn(2, 6, 8), randn(11, 8)
    whole = torch.randint(11, (2, 13), device=DEVICE)
    for targets in (whole[:, 1:7], whole[:, ::2][:, :6], whole[:, :1].expand(2, 6)):
        torch.testing.assert_close(linear_cross_entropy(h, weight, targets), reference(h, weight, targets))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_targets_of_any_integers(dtype):
    h, weight, targets = (
        torch.randn(5, 16, device=DEVICE),
        torch.randn(9, 16, device=DEVICE),
        torch.arange(5, device=DEVICE),
    )
    assert torch.equal(linear_cross_entropy(h, weight, targets.to(dtype)), linear_cross_entropy(h, weight, targets))


def test_without_a_gradient_none_is_made(monkeypatch):
    h, weight, targets = randn(1, 5, 8).requires_grad_(), randn(11, 8), torch.randint(11, (1, 5), device=DEVICE)
    with torch.no_grad():
        loss = linear_cross_entropy(h, weight, targets)
    torch.testing.assert_close(loss, reference(h, weight, targets).detach())
    made = []
    monkeypatch.setattr(module, "mm", lambda *a, **how: made.append(a))
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(h, weight, targets), loss)
    assert not made


def test_nothing_of_the_callers_is_written_into():
    h, weight, targets = (
        randn(1, 5, 8).requires_grad_(),
        randn(11, 8).requires_grad_(),
        torch.randint(11, (1, 5), device=DEVICE),
    )
    before = [t.detach().clone() for t in (h, weight, targets)]
    loss = linear_cross_entropy(h, weight, targets)
    first = torch.autograd.grad(loss, [h, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [h, weight])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (h, weight, targets), strict=True))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(4, 20), st.integers(1, 20), st.integers(8, 90), st.sampled_from(DTYPES)
)  # on fewer, the errors of single roundings are compared
def test_any_shape(M, C, V, dtype):
    check((M,), C, V, dtype)


def test_backward_is_the_same_bits_every_time():
    targets = torch.randint(101, (2, 13), device=DEVICE)
    assert same_bits(lambda h, w: linear_cross_entropy(h, w, targets), [randn(2, 13, 16), randn(101, 16)])


def test_logits_beyond_two_to_the_31_elements():
    """The kernel alone, on rows of logits that lie 2^30 elements apart."""
    logits = far(3, 20)
    logits.copy_(randn(3, 20, dtype=torch.float16))
    targets, losses = torch.tensor([3, 19, 0], device=DEVICE), torch.empty(3, device=DEVICE)
    expected = F.cross_entropy(logits.float(), targets, reduction="none")
    gradient = logits.float().softmax(-1) - F.one_hot(targets, 20)
    module._loss_rows[(3,)](logits, targets, losses, 20, 20, logits.stride(0), 1, -1, BLOCK=16, REST=16, GRAD=True)
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits.float(), gradient, rtol=1e-2, atol=1e-3)


def test_an_empty_batch():
    h, weight = randn(0, 3, 8).requires_grad_(), randn(11, 8).requires_grad_()
    loss = linear_cross_entropy(h, weight, torch.zeros(0, 3, dtype=torch.int64, device=DEVICE))
    loss.backward()
    assert loss.isnan()
    assert (weight.grad == 0).all()


def test_what_is_refused():
    with pytest.raises(ValueError, match="targets"):
        linear_cross_entropy(randn(1, 5, 8), randn(11, 8), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="weight"):
        linear_cross_entropy(randn(1, 5, 8), randn(11, 9), torch.zeros(1, 5, dtype=torch.int64))


def test_the_weights_gradient_is_not_rounded_to_16_bits():
    """autocast rounds the fp32 product of `torch.mm` to 16 bits, within an op as well."""
    h, weight = randn(1, 9, 16).requires_grad_(), randn(11, 16).requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        linear_cross_entropy(h, weight, torch.arange(9, device=DEVICE)[None]).backward()
    assert (weight.grad != weight.grad.bfloat16().float()).float().mean() > 0.5
