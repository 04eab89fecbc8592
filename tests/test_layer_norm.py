"""layer_norm and add_layer_norm, through Triton's interpreter or on a GPU, against fp64 by the three-way rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

pytest.importorskip("triton")
from kernel_case import DEVICE, DTYPES, HALVES, SEED, VIEWS, far, hold, philox_uniform, randn, run_as, same_bits, seed

from fastgpt.kernels import configs
from fastgpt.kernels import layer_norm as module
from fastgpt.kernels.layer_norm import add_layer_norm, layer_norm
from fastgpt.records import widened

pytestmark = pytest.mark.usefixtures("poison")


def mask_of(seed, shape, p):
    """The dropout mask, from a stream of zeros: what is kept of a branch of ones."""
    zeros, ones = torch.zeros(shape, device=DEVICE), torch.ones(shape, device=DEVICE)
    return add_layer_norm(zeros, ones, ones[0, 0], dropout_p=p, seed=seed)[0] != 0


def reference(dtype, keep=None, p=0.0):
    """add_layer_norm in three lines, answering in `dtype` (fp64 where its inputs are); `keep` is the dropout mask."""

    def f(x, branch, weight, bias):
        dropped = branch if keep is None else branch * keep / (1 - p)
        stream = x + dropped.to(x.dtype)
        h = F.layer_norm(stream, weight.shape, weight, bias, 1e-5)
        return stream, widened(h, dtype)

    return f


def check(shape, dtype, bias=True, p=0.0, scale=1.0, shift=0.0, view=lambda t: t, stream=torch.float32):
    """A stream in its dtype, a branch and an answer in dtype, as in training; `view` gives inputs and gradients other strides."""
    N = shape[-1]
    x, branch = (
        view(randn(*shape, dtype=stream, scale=scale, shift=shift)),
        view(randn(*shape, dtype=dtype, scale=scale)),
    )
    if x.stride(-1) == 0:  # a row of one value has no spread: its LayerNorm is rounding, magnified
        x = randn(*shape, dtype=stream)
    weight, b = randn(N, shift=1.0), randn(N) if bias else None
    dstream, dh = view(randn(*shape, dtype=stream)), view(randn(*shape, dtype=dtype))
    key = seed() if p else None
    keep = mask_of(key, x.shape, p) if p else None
    op = run_as(lambda *inputs: add_layer_norm(*inputs, dropout_p=p, seed=key), dtype)
    inputs = dict(x=x, branch=branch, weight=weight, bias=b)
    hold(op, reference(dtype, keep, p), inputs, ("stream", "h"), [dstream, dh])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [768, 1600, 130, 48, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_widths(N, dtype, bias):
    check((2, 3, N), dtype, bias)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("N", [768, 130, 1])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_a_stream_of_16_bits(N, p, dtype):
    check((2, 3, N), dtype, p=p, stream=dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_stream_of_16_bits_and_any_stride(view, dtype):
    check((3, 4, 40), dtype, view=view, stream=dtype)


@pytest.mark.parametrize(
    ("dtype", "p", "written"), [(torch.float16, 0.0, False), (torch.float16, 0.2, True), (torch.float32, 0.0, True)]
)
def test_equal_gradients_of_stream_and_branch_are_written_once(dtype, p, written, monkeypatch):
    launch, given = module.layer_norm_backward, []
    monkeypatch.setattr(module, "layer_norm_backward", lambda *args: given.append(args[-2]) or launch(*args))
    x, branch = randn(1, 2, 16, dtype=dtype).requires_grad_(), randn(1, 2, 16, dtype=torch.float16).requires_grad_()
    stream, h = add_layer_norm(x, branch, randn(16), dropout_p=p, seed=seed())
    (stream.float().sum() + h.float().square().sum()).backward()
    (dbranch,) = given
    assert (dbranch is not None) == written
    assert torch.equal(x.grad.half(), branch.grad) or p


@pytest.mark.parametrize("T", [1, 17, 65] + [1023] * (DEVICE == "cuda"))
def test_lengths(T):
    check((1, T, 48) if DEVICE == "cpu" else (3, T, 768), torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [2048, 4096, 8192])
def test_wide_rows(N, dtype):
    check((1, 2, N), dtype)


def test_more_rows_than_programs(monkeypatch):
    """Each program then takes several rows, and the last ones fewer than the first."""
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 1)
    check((2, 9, 24), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(dtype):
    check((2, 9, 48), dtype, p=0.2)


def test_large_magnitudes():
    check((2, 3, 96), torch.float16, scale=1e4 / 4)
    check((2, 3, 96), torch.bfloat16, scale=1e15)
    check((2, 3, 96), torch.float32, shift=1e4)  # a mean far above the spread: one-pass variance would lose it


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides(view, dtype):
    check((3, 4, 40), dtype, view=view)


def test_four_dimensions_are_taken_where_they_are_three():
    x = randn(2, 3, 4, 16)
    weight = randn(16)
    torch.testing.assert_close(layer_norm(x, weight), F.layer_norm(x, (16,), weight))
    assert layer_norm(x[0, 0, 0], weight).shape == (16,)
    x = x.transpose(0, 1).requires_grad_()
    y = layer_norm(x, weight)
    torch.testing.assert_close(y, F.layer_norm(x, (16,), weight))
    (g,) = torch.autograd.grad((y.transpose(1, 2).contiguous() ** 2).sum(), x)
    (right,) = torch.autograd.grad((F.layer_norm(x, (16,), weight) ** 2).sum(), x)
    torch.testing.assert_close(g, right, rtol=1e-4, atol=1e-5)


def test_an_empty_batch():
    x, weight = randn(0, 3, 16).requires_grad_(), randn(16).requires_grad_()
    stream, h = add_layer_norm(x, randn(0, 3, 16), weight)
    assert h.shape == (0, 3, 16)
    (stream.sum() + h.sum()).backward()
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("used", ["stream", "h", "both expanded"])
def test_gradients_that_are_missing_or_of_stride_zero(used):
    """Only one output used; and sum().backward(), whose gradient is one element expanded."""
    x, branch, weight = (t.requires_grad_() for t in (randn(2, 3, 20), randn(2, 3, 20), randn(20)))
    results = []
    for f in (lambda: add_layer_norm(x, branch, weight), lambda: reference(torch.float32)(x, branch, weight, None)):
        stream, h = f()
        loss = {
            "stream": lambda: stream.square().sum(),
            "h": lambda: h.square().sum(),
            "both expanded": lambda: stream.sum() + h.sum(),
        }[used]()
        results.append(torch.autograd.grad(loss, [x, branch, weight], allow_unused=True, materialize_grads=True))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("used", ["both", "stream", "h"])
def test_without_a_branch_both_gradients_are_one(dtype, used):
    """The first block's: the stream goes on as it is, and its gradient is added where LayerNorm's is made."""

    def same(x, weight, bias):
        return x, widened(F.layer_norm(x, weight.shape, weight, bias, 1e-5), dtype)

    def op(x, weight, bias):
        stream, h = add_layer_norm(x, None, weight, bias)
        assert stream.data_ptr() == x.data_ptr(), "nothing is copied"
        return stream, h

    inputs = dict(x=randn(2, 9, 48), weight=randn(48, shift=1.0), bias=randn(48))
    grads = [randn(2, 9, 48) if used != "h" else None, randn(2, 9, 48, dtype=dtype) if used != "stream" else None]
    if used != "stream":
        hold(run_as(op, dtype), same, inputs, ("stream", "h"), grads)
        return
    x = inputs["x"].requires_grad_()
    add_layer_norm(x, None, inputs["weight"], inputs["bias"])[0].backward(grads[0])
    assert torch.equal(x.grad, grads[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_alone(dtype):
    hold(
        run_as(layer_norm, dtype),
        lambda x, w, b: (widened(F.layer_norm(x, w.shape, w, b, 1e-5), dtype),),
        dict(x=randn(2, 5, 130), weight=randn(130, shift=1.0), bias=randn(130)),
        ("h",),
        [randn(2, 5, 130, dtype=dtype)],
    )


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(1, 3), st.integers(1, 5), st.integers(8, 70), st.booleans(), st.sampled_from([0.0, 0.5]),
    st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_shape(B, T, N, bias, p, dtype):
    check((B, T, N), dtype, bias, p)


def test_backward_is_the_same_bits_every_time(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(configs, "multiprocessors", lambda device: 1)

    def loss(*leaves):
        stream, h = add_layer_norm(*leaves)
        return (stream.sin() + h.cos()).sum()

    shape = (2, 9 if DEVICE == "cpu" else 1024, 33)
    assert same_bits(loss, [randn(*shape), randn(*shape), randn(33), randn(33)])


def test_dropout_is_a_function_of_seed_and_index():
    seed = torch.tensor([3], device=DEVICE)
    mask = mask_of(seed, (2, 4, 800), 0.3)
    assert torch.equal(mask, mask_of(seed, (2, 4, 800), 0.3))
    assert torch.equal(mask.view(4, 4, 400), mask_of(seed, (4, 4, 400), 0.3))  # the flat index counts, not the shape
    assert not torch.equal(mask, mask_of(seed + 1, (2, 4, 800), 0.3))
    assert mask.float().mean().item() == pytest.approx(0.7, abs=0.02)


def test_the_mask_is_a_host_philoxs():
    mask = mask_of(seed(), (1, 4, 24), 0.2).flatten().tolist()
    assert mask == [philox_uniform(SEED, (i, 0, 0, 0)) >= 0.2 for i in range(96)]
    assert 0 < sum(mask) < 96


def test_rows_beyond_two_to_the_31_elements():
    """A stride that fits an int32, and a row whose offset by it does not: wrapped, it would be read from elsewhere."""
    x = far(3, 16)
    x.copy_(randn(3, 16, dtype=torch.float16))
    weight = randn(16)
    torch.testing.assert_close(
        layer_norm(x, weight).float(), F.layer_norm(x.float(), (16,), weight), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_decides_the_answers_dtype(dtype):
    x, branch, weight = randn(2, 3, 20), randn(2, 3, 20), randn(20)
    with torch.autocast(DEVICE, dtype=dtype):
        stream, h = add_layer_norm(x, branch, weight)
        alone = layer_norm(x, weight)
    assert (stream.dtype, h.dtype, alone.dtype) == (torch.float32, dtype, dtype)


def test_what_is_refused():
    x, weight = randn(2, 3, 20), randn(20)
    with pytest.raises(ValueError, match="wider than 8192"):
        layer_norm(randn(1, 1, 8193), randn(8193))
    with pytest.raises(ValueError, match="a branch of"):
        add_layer_norm(x, randn(2, 3, 10), weight)
    with pytest.raises(ValueError, match="needs a seed"):
        add_layer_norm(x, x, weight, dropout_p=0.1)
    with pytest.raises(ValueError, match="not in"):
        add_layer_norm(x, x, weight, dropout_p=1.5, seed=torch.tensor([1]))
    with pytest.raises(ValueError, match="weight and bias of"):
        layer_norm(x, randn(10), randn(9))


def test_weights_of_any_stride():
    x, bank = randn(2, 3, 20), randn(20, 2)
    for weight, bias in ((bank[:, 0], bank[:, 1]), (bank[:1, 0].expand(20), None)):
        torch.testing.assert_close(layer_norm(x, weight, bias), F.layer_norm(x, (20,), weight, bias))


def test_all_dropped_and_a_wider_branch():
    x, weight = randn(2, 3, 20), randn(20)
    stream, _ = add_layer_norm(x, x, weight, dropout_p=1.0, seed=seed())
    assert torch.equal(stream, x)
    stream, h = add_layer_norm(x.half(), x, weight)
    assert stream.dtype == h.dtype == torch.float32
    torch.testing.assert_close(stream, x.half() + x)
