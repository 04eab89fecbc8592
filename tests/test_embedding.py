"""The embedding, through Triton's interpreter or on a GPU, against fp64 by the three-way rule; and the tied gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

pytest.importorskip("triton")
from kernel_case import DEVICE, DTYPES, HALVES, SEED, VIEWS, far, hold, philox_uniform, randn, same_bits, seed

from fastgpt.kernels import configs
from fastgpt.kernels.embedding import embedding
from fastgpt.kernels.linear_cross_entropy import linear_cross_entropy
from fastgpt.records import widened

pytestmark = pytest.mark.usefixtures("poison")


def mask_of(shape, p):
    B, T, C = shape
    idx = torch.zeros(B, T, dtype=torch.int64, device=DEVICE)
    return embedding(idx, torch.ones(1, C, device=DEVICE), torch.zeros(T, C, device=DEVICE), p, seed())[0] != 0


def check(B, T, C, V, dtype=torch.float32, p=0.0, idx=None, view=lambda t: t, stream=None, row=""):
    idx = torch.randint(V, (B, T), device=DEVICE) if idx is None else idx
    keep = mask_of((B, T, C), p) if p else None

    def reference(wte, wpe):
        x = F.embedding(idx, wte) + wpe[:T]
        x = widened(x, stream or dtype)
        return x if keep is None else x * keep / (1 - p), wte

    hold(
        lambda wte, wpe: embedding(idx, wte, wpe, p, seed() if p else None, stream, row),
        reference,
        dict(wte=view(randn(V, C, dtype=dtype)), wpe=view(randn(T + 2, C, dtype=dtype))),
        ("x", "head"),
        [view(randn(B, T, C, dtype=stream or dtype)), randn(V, C, dtype=dtype)],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [768, 1600, 130, 48, 1])
def test_widths(C, dtype):
    check(2, 3, C, 7, dtype)


@pytest.mark.parametrize("T", [1, 17, 65] + [1023] * (DEVICE == "cuda"))
def test_lengths(T):
    check(1, T, 16, 50)


def test_many_sequences():
    check(40, 2, 1000, 9)  # more than the sum over b reads at once


@pytest.mark.parametrize("n", [1, 15, 16, 17, 33])
def test_a_token_that_comes_again(n):
    """Runs of equal ids of all lengths around that of a step, which is 16."""
    check(1, 40, 8, 64, idx=repeated(n, 5), row=configs.EmbeddingConfig(backward_tile=16 * 8).text)


def repeated(n, token):
    """40 ids in any order, of which n are one token and the others differ."""
    idx = torch.arange(40, device=DEVICE)[None].clone()
    idx[:, :n] = token
    return idx[:, torch.randperm(40)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("token", [0, 39, 20])  # its run begins with a span, ends with one, or neither
@pytest.mark.parametrize("n", [4, 9, 40, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 5, 8, 26))])
def test_a_run_over_many_spans(n, token, dtype):
    """A span is 4 places, and a step 2 rows, or 2 sums of spans."""
    row = configs.EmbeddingConfig(backward_tile=2 * 8, backward_span=4).text
    check(1, 40, 8, 40, dtype, idx=repeated(n, token), row=row)


def test_runs_over_many_spans_are_the_same_bits_every_time():
    row, idx = configs.EmbeddingConfig(backward_span=4).text, repeated(30, 20)
    assert same_bits(lambda *w: embedding(idx, *w, row=row)[0].sin().sum(), [randn(40, 8), randn(40, 8)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(dtype):
    check(2, 9, 48, 11, dtype, p=0.2)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("C", [768, 130, 1])
def test_a_stream_of_16_bits(C, p, dtype):
    check(2, 5, C, 7, p=p, stream=dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_stream_of_16_bits_leaves_the_weights_gradients_in_full(dtype):
    wte, wpe, gradient = randn(7, 8).requires_grad_(), randn(3, 8).requires_grad_(), 1 + torch.finfo(dtype).eps
    x, _ = embedding(torch.tensor([[2, 2, 2]], device=DEVICE), wte, wpe, dtype=dtype)
    (x.float() * gradient).sum().backward()
    assert (x.dtype, wte.grad.dtype, wpe.grad.dtype) == (dtype, torch.float32, torch.float32)
    assert (wte.grad[2] == 3 * gradient).all(), "added in fp32: in 16 bits the last bit would be lost"


def test_the_mask_is_a_host_philoxs():
    mask = mask_of((1, 4, 24), 0.2).flatten().tolist()
    assert mask == [philox_uniform(SEED, (i, 0, 0, 0)) >= 0.2 for i in range(96)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", [v for n, v in VIEWS.items() if n not in ("sliced columns", "expanded columns")])
def test_strides(view, dtype):
    idx = torch.randint(10, (4, 3), device=DEVICE).t()
    check(3, 4, 8, 10, dtype, idx=idx, view=lambda t: view(t) if t.dim() == 3 else t)
    wte, wpe = randn(8, 10, dtype=dtype).t(), randn(4, 16, dtype=dtype)[:, ::2]
    idx = torch.randint(10, (1, 4), device=DEVICE).expand(3, 4)
    torch.testing.assert_close(embedding(idx, wte, wpe)[0], F.embedding(idx, wte) + wpe)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(1, 4), st.integers(1, 12), st.integers(1, 40), st.integers(1, 8), st.sampled_from([0.0, 0.5]),
    st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_shape(B, T, C, V, p, dtype):
    check(B, T, C, V, dtype, p)


def test_weights_beyond_two_to_the_31_elements():
    wte = far(3, 16)
    wte.copy_(randn(3, 16, dtype=torch.float16))
    idx = torch.tensor([[2, 0, 1]], device=DEVICE)
    assert torch.equal(embedding(idx, wte, torch.zeros(3, 16, device=DEVICE, dtype=torch.float16))[0], wte[idx])


@pytest.mark.parametrize("token", [7, -1])
def test_an_id_outside_the_vocabulary_shows(token):
    wte = randn(7, 8).requires_grad_()
    x, _ = embedding(torch.tensor([[1, token]], device=DEVICE), wte, randn(2, 8))
    assert x[0, 1].isnan().all()
    x.sum().backward()
    assert torch.equal(wte.grad.sum(1) != 0, torch.arange(7, device=DEVICE) == 1)


def tied(idx, targets, wte, wpe):
    x, head = embedding(idx, wte, wpe)
    return linear_cross_entropy(x.sin(), head, targets)


def test_backward_is_the_same_bits_every_time():
    idx, targets = torch.randint(5, (2, 30), device=DEVICE), torch.randint(5, (2, 30), device=DEVICE)
    assert same_bits(lambda *w: tied(idx, targets, *w), [randn(5, 16), randn(30, 16)])


def test_the_heads_gradient_is_added_to_in_place():
    """No second tensor of the vocabulary's size: what the loss's backward made is what the weight gets."""
    idx, targets = torch.randint(300, (2, 9), device=DEVICE), torch.randint(300, (2, 9), device=DEVICE)
    wte, wpe = randn(300, 16).requires_grad_(), randn(9, 16).requires_grad_()
    x, head = embedding(idx, wte, wpe)
    seen = []
    head.register_hook(lambda g: seen.append((g.data_ptr(), g.clone())))
    linear_cross_entropy(x.sin(), head, targets).backward()
    ((place, before),) = seen
    assert wte.grad.data_ptr() == place
    used = torch.zeros(300, dtype=torch.bool, device=DEVICE).index_fill_(0, idx.flatten(), True)
    assert torch.equal(wte.grad[~used], before[~used])
    assert not torch.equal(wte.grad[used], before[used])


def test_anothers_gradient_is_not_written_into():
    """A sum hands one and the same tensor to both of its terms."""
    wte, wpe, other = randn(7, 8).requires_grad_(), randn(3, 8), randn(7, 8).requires_grad_()
    idx = torch.tensor([[1, 2, 2]], device=DEVICE)
    x, head = embedding(idx, wte, wpe)
    ((head + other) * 3).sum().backward(retain_graph=True)
    assert (other.grad == 3).all()
    wte.grad = other.grad = None
    (x.sum() + (head + other).square().sum()).backward()
    torch.testing.assert_close(other.grad, 2 * (wte + other).detach())
    torch.testing.assert_close(
        wte.grad - other.grad, torch.bincount(idx.flatten(), minlength=7)[:, None].expand(7, 8).float()
    )


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("how", ["leaf", "before", "two heads"])
def test_a_gradient_that_others_hold_is_not_written_into(how, backend):
    """What the loss's backward made goes on to others too: by a sum, whose backward hands out one and the same tensor."""
    wte, wpe, a = randn(7, 8).requires_grad_(), randn(3, 8).requires_grad_(), randn(7, 8).requires_grad_()
    idx = torch.tensor([[1, 2, 2]], device=DEVICE)

    def loss(embed, cross_entropy):
        other = a * 2 if how == "before" else a
        x, head = embed(idx, wte, wpe)
        if how == "two heads":
            other = embed(idx, a, wpe)[1]
        return cross_entropy(x.tanh(), head + other, idx)

    def ours():
        return loss(embedding, linear_cross_entropy)

    torch._dynamo.reset()
    f = ours if backend is None else torch.compile(ours, backend=backend)
    right = loss(lambda i, w, p: (F.embedding(i, w) + p, w), lambda h, w, t: F.cross_entropy((h @ w.t())[0], t[0]))
    for got, expected in zip(*(torch.autograd.grad(r, [wte, wpe, a]) for r in (f(), right)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_heads_own_gradient_when_it_is_asked_for():
    wte, wpe = randn(7, 8).requires_grad_(), randn(3, 8)
    idx = torch.tensor([[1, 2, 2]], device=DEVICE)
    x, head = embedding(idx, wte, wpe)
    dhead, dwte = torch.autograd.grad(linear_cross_entropy(x.tanh(), head, idx), [head, wte])
    assert torch.equal(dhead[3:], dwte[3:])
    assert not torch.equal(dhead[1:3], dwte[1:3])


@pytest.mark.parametrize("used", ["x", "head"])
def test_one_output_alone(used):
    wte, wpe = randn(7, 8).requires_grad_(), randn(3, 8).requires_grad_()
    x, head = embedding(torch.tensor([[1, 2, 2]], device=DEVICE), wte, wpe)
    (x if used == "x" else head).sum().backward()
    assert wte.grad.sum(1).tolist() == ([0, 8, 16, 0, 0, 0, 0] if used == "x" else [8] * 7)


def test_an_empty_batch():
    wte, wpe = randn(7, 8).requires_grad_(), randn(3, 8).requires_grad_()
    embedding(torch.zeros(0, 3, dtype=torch.int64, device=DEVICE), wte, wpe)[0].sum().backward()
    assert (wte.grad == 0).all()
    assert (wpe.grad == 0).all()


def test_what_is_refused():
    idx = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="wpe"):
        embedding(idx, randn(7, 8), randn(3, 8))
    with pytest.raises(ValueError, match="wpe"):
        embedding(idx, randn(7, 8), randn(4, 9))
    with pytest.raises(ValueError, match="needs a seed"):
        embedding(idx, randn(7, 8), randn(4, 8), 0.1)


def test_columns_beyond_a_block():
    assert configs.EMBEDDING.block < 1100
    check(1, 2, 1100, 3)
