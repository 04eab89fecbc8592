"""attention, through Triton's interpreter or on a GPU, against fp64 by the three-way rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

pytest.importorskip("triton")
from kernel_case import DEVICE, DTYPES, HALVES, SEED, VIEWS, far, hold, philox_uniform, randn, same_bits, seed

from fastgpt import ops
from fastgpt.kernels.attention import attention, attention_qkv, dropout_mask
from fastgpt.records import widened

pytestmark = pytest.mark.usefixtures("poison")


def reference(n_head, keep=None, p=0.0, doc_ids=None):
    """Attention in eight lines, softmax in fp32 (fp64 where its input is); keep is the dropout mask."""

    def f(qkv):
        B, T, C3 = qkv.shape
        q, k, v = (t.reshape(B, T, n_head, -1).transpose(1, 2) for t in qkv.split(C3 // 3, 2))
        allowed = torch.ones(T, T, dtype=torch.bool, device=qkv.device).tril()
        if doc_ids is not None:
            allowed = allowed & (doc_ids[:, None, :, None] == doc_ids[:, None, None, :])
        q, k = widened(q, torch.float32), widened(k, torch.float32)  # products of fp16 may be larger than it holds
        scores = q @ k.transpose(-1, -2) / q.size(-1) ** 0.5
        probabilities = scores.masked_fill(~allowed, -float("inf")).softmax(-1)
        if keep is not None:
            probabilities = probabilities * keep / (1 - p)
        return ((probabilities.to(v.dtype) @ v).transpose(1, 2).reshape(B, T, C3 // 3),)

    return f


def check(B, T, n_head, head_size, dtype, p=0.0, doc_ids=None, view=lambda t: t, scale=1.0):
    C = n_head * head_size
    key = seed() if p else None
    keep = dropout_mask(B, n_head, T, p, key) if p else None
    hold(
        lambda qkv: (attention(qkv, n_head, p, key, doc_ids),),
        reference(n_head, keep, p, doc_ids),
        dict(qkv=view(randn(B, T, 3 * C, dtype=dtype, scale=scale))),
        ("out",),
        [view(randn(B, T, C, dtype=dtype))],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 17, 63, 64, 65, 100, 128] + [1023] * (DEVICE == "cuda"))
def test_lengths(T, dtype):
    check(1, T, 2 if DEVICE == "cpu" else 12, 16 if DEVICE == "cpu" else 64, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [8, 16, 40, 64, 128])
def test_head_sizes(head_size, dtype):
    check(2, 40, 1, head_size, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_head", [1, 3, 12] + [25] * (DEVICE == "cuda"))
def test_heads(n_head, dtype):
    check(1, 9, n_head, 16, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_text(dtype):
    """Several blocks of queries and of keys, whole ones and the diagonal's."""
    check(1, 300, 1, 16, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(dtype):
    check(1, 70, 2, 16, dtype, p=0.2)


DOCUMENTS = {
    "in turn": lambda T: torch.arange(T) // 37,
    "one token each": lambda T: torch.arange(T),
    "one": lambda T: torch.zeros(T, dtype=torch.int32),
    "mixed": lambda T: torch.arange(T) * 7 % 3 - 1,  # not even in a row: every token finds its own
    "descending": lambda T: 10 - torch.arange(T) // 50,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_documents(documents, dtype):
    doc_ids = torch.stack([documents(130), documents(130).flip(0)]).to(DEVICE)
    check(2, 130, 1, 16, dtype, doc_ids=doc_ids)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("T", [70, 128])  # 128: whole blocks, without bounds
def test_documents_with_dropout_from_a_view(T, dtype):
    check(1, T, 1, 16, dtype, p=0.2, doc_ids=(torch.arange(2 * T, device=DEVICE) // 23)[::2].expand(1, T))


def test_a_document_is_as_if_it_stood_alone():
    qkv = randn(1, 90, 96)
    doc_ids = (torch.arange(90, device=DEVICE) >= 50).long()[None]
    together = attention(qkv, 2, doc_ids=doc_ids)
    apart = torch.cat([attention(qkv[:, :50], 2), attention(qkv[:, 50:], 2)], 1)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides(view, dtype):
    # One product 16 times over is a large score. Where softmax is one-hot, dout . out, of the rounded out, is all of an error.
    check(3, 20, 2, 16, dtype, view=view, scale=1 / 16**0.5 if view is VIEWS["expanded columns"] else 1.0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_large_magnitudes(dtype):
    # Scores of 1e4, so that softmax is nearly one-hot. Values of 1: dout . out, of the rounded out, is then as exact.
    scale = torch.tensor([1e2, 1e2, 1.0]).repeat_interleave(16).to(DEVICE, dtype)
    check(1, 40, 1, 16, dtype, view=lambda t: t * scale if t.size(-1) == 48 else t)
    same = torch.full((1, 40, 48), 1e4, dtype=dtype, device=DEVICE)  # q k^T is 1.6e9
    assert torch.equal(attention(same, 1), same[..., :16])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("magnitude", [1e2, 1e3, 3e3, 6e3, 8e3, 3e4, 6e4])
def test_equal_scores_of_any_size(magnitude, dtype):
    """From 1.6e5 to 5.8e10: what rounds the product of the maximum and the scale must not reach the exponent."""
    same = torch.full((1, 40, 48), magnitude, dtype=dtype, device=DEVICE)
    torch.testing.assert_close(attention(same, 1), same[..., :16], rtol=torch.finfo(dtype).eps, atol=0)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.integers(1, 2), st.integers(1, 40), st.integers(1, 2), st.integers(1, 33), st.sampled_from([0.0, 0.5]),
    st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_shape(B, T, n_head, head_size, p, dtype):
    check(B, T, n_head, head_size, dtype, p)


def test_backward_is_the_same_bits_every_time():
    assert same_bits(lambda qkv: attention(qkv, 2, 0.1, seed()).sin().sum(), [randn(1, 70, 96)])


def test_gradients_of_stride_zero():
    qkv = randn(1, 20, 48).requires_grad_()
    (ours,) = torch.autograd.grad(attention(qkv, 1).sum(), qkv)
    (theirs,) = torch.autograd.grad(reference(1)(qkv)[0].sum(), qkv)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_mask_is_a_host_philoxs():
    mask = dropout_mask(2, 3, 5, 0.2, seed())
    expected = [
        [[[philox_uniform(SEED, (j, i, h, b)) >= 0.2 for j in range(5)] for i in range(5)] for h in range(3)]
        for b in range(2)
    ]
    assert mask.tolist() == expected


def test_the_mask_depends_on_the_place_alone():
    mask = dropout_mask(2, 3, 20, 0.3, seed())
    assert torch.equal(mask[:1, :2, :13, :13], dropout_mask(1, 2, 13, 0.3, seed()))
    assert not torch.equal(mask, dropout_mask(2, 3, 20, 0.3, seed() + 1))
    assert mask.float().mean().item() == pytest.approx(0.7, abs=0.02)
    assert len({tuple(m.flatten().tolist()) for m in mask.flatten(0, 1)}) == 6, "each head and batch has its own"


def test_a_batch_beyond_two_to_the_31_elements():
    qkv = far(3, 20 * 48).unflatten(1, (20, 48))
    qkv.copy_(randn(3, 20, 48, dtype=torch.float16))
    torch.testing.assert_close(attention(qkv, 1), reference(1)(qkv)[0], rtol=1e-2, atol=1e-2)


def test_an_empty_batch():
    qkv = randn(0, 5, 48).requires_grad_()
    attention(qkv, 1).sum().backward()
    assert qkv.grad.shape == (0, 5, 48)


def test_what_is_refused():
    with pytest.raises(ValueError, match="heads of at most 128"):
        attention(randn(1, 2, 3 * 129), 1)
    with pytest.raises(ValueError, match="for 5 heads"):
        attention(randn(1, 2, 48), 5)
    with pytest.raises(ValueError, match="doc_ids"):
        attention(randn(1, 2, 48), 1, doc_ids=torch.zeros(2, 1))
    with pytest.raises(ValueError, match="needs a seed"):
        attention(randn(1, 2, 48), 1, 0.1)


# ---- queries, keys and values apart ----


def sdpa(q, k, v):
    """PyTorch's own, by its own rule of which head meets which."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return (F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2),)


def check_apart(B, T, n_head, n_head_kv, head_size, dtype, p=0.0, doc_ids=None, view=lambda t: t):
    """Without dropout and documents against PyTorch's own, else against the packed op's reference with each head of keys repeated."""
    key = seed() if p else None
    keep = dropout_mask(B, n_head, T, p, key) if p else None

    def repeated(q, k, v):
        k, v = (t.repeat_interleave(n_head // n_head_kv, 2) for t in (k, v))
        (out,) = reference(n_head, keep, p, doc_ids)(torch.cat((q, k, v), 2).flatten(2))
        return (out.unflatten(2, (n_head, head_size)),)

    heads = dict(q=n_head, k=n_head_kv, v=n_head_kv)
    hold(
        lambda *qkv: (attention_qkv(*qkv, p, key, doc_ids),),
        sdpa if keep is doc_ids is None else repeated,
        {name: view(randn(B, T, n, head_size, dtype=dtype)) for name, n in heads.items()},
        ("out",),
        [view(randn(B, T, n_head, head_size, dtype=dtype))],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_head", "n_head_kv"), [(1, 1), (3, 3), (4, 2), (3, 1)] + [(32, 8)] * (DEVICE == "cuda"))
def test_fewer_heads_of_keys(n_head, n_head_kv, dtype):
    check_apart(2, 20, n_head, n_head_kv, 16, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "head_size"), [(2, 16), (64, 16), (70, 8), (33, 40), (17, 128)])
def test_lengths_and_head_sizes_of_a_group(T, head_size, dtype):
    check_apart(1, T, 2, 1, head_size, dtype)


def test_one_token_of_a_group():
    """It sees itself alone: dq and dk are 0, of which the rule allows nothing."""
    q, k, v = (randn(2, 1, n, 16).requires_grad_() for n in (4, 2, 2))
    out, grad = attention_qkv(q, k, v), randn(2, 1, 4, 16)
    assert torch.equal(out, v.repeat_interleave(2, 2))
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    torch.testing.assert_close(dv, grad.unflatten(2, (2, 2)).sum(3))
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5


@pytest.mark.parametrize("documents", [False, True])
def test_a_group_with_dropout(documents):
    doc_ids = (torch.arange(40, device=DEVICE) // 23)[None] if documents else None
    check_apart(1, 40, 3, 1, 16, torch.bfloat16, p=0.2, doc_ids=doc_ids)


SWAPPED = {"heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)}


@pytest.mark.parametrize("view", [v for n, v in (VIEWS | SWAPPED).items() if n != "expanded columns"])
def test_strides_of_a_group(view):
    check_apart(2, 20, 4, 2, 16, torch.float16, view=view)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.integers(1, 2), st.integers(2, 40), st.integers(1, 2), st.integers(1, 3), st.integers(1, 33), st.sampled_from([0.0, 0.5]),
    st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_group(B, T, n_head_kv, group, head_size, p, dtype):
    check_apart(B, T, n_head_kv * group, n_head_kv, head_size, dtype, p)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_views_of_packed_rows_give_the_packed_bits(p):
    """So nothing is copied on the way in; gradients of the three parts are those of the whole."""
    qkv = randn(1, 40, 96).requires_grad_()
    packed = attention(qkv, 2, p, seed())
    apart = attention_qkv(*qkv.unflatten(2, (6, 16)).split(2, 2), p, seed()).flatten(2)
    assert torch.equal(packed, apart)
    grad = randn(1, 40, 32)
    assert torch.equal(*(torch.autograd.grad(y, qkv, grad)[0] for y in (packed, apart)))


def test_a_groups_gradients_are_the_same_bits_every_time():
    leaves = [randn(1, 40, 2, 16), randn(1, 40, 1, 16), randn(1, 40, 1, 16)]
    assert same_bits(lambda *qkv: attention_qkv(*qkv, 0.1, seed()).sin().sum(), leaves)


def test_heads_beyond_two_to_the_31_elements():
    """A head is far from the next in memory, and so is a sequence; of queries and of keys."""
    q = far(4, 20 * 16).view(4, 20, 16).transpose(0, 1)[None]
    k = far(3, 20 * 16).view(3, 20, 16)[::2].transpose(0, 1)[None]
    q.copy_(randn(1, 20, 4, 16))
    k.copy_(randn(1, 20, 2, 16))
    torch.testing.assert_close(attention_qkv(q, k, k), sdpa(q, k, k)[0], rtol=1e-2, atol=1e-2)


def test_a_group_without_sequences():
    q, k = randn(0, 5, 4, 16).requires_grad_(), randn(0, 5, 2, 16).requires_grad_()
    attention_qkv(q, k, k).sum().backward()
    assert (q.grad.shape, k.grad.shape) == ((0, 5, 4, 16), (0, 5, 2, 16))


@pytest.mark.parametrize("documents", [False, True])
def test_the_op_and_its_twin(documents):
    """By either implementation, contiguous."""
    q, k, v = randn(2, 30, 4, 16), randn(2, 30, 2, 16), randn(2, 30, 2, 16)
    doc_ids = torch.arange(30, device=DEVICE).expand(2, 30) // 11 if documents else None
    ours, theirs = (
        ops.attention_qkv(q, k, v, doc_ids=doc_ids, kernels=kernels)
        for kernels in (ops.Kernels(attention="triton"), ops.TORCH)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert ours.is_contiguous()
    assert theirs.is_contiguous()


@pytest.mark.parametrize(
    ("q", "k", "v", "says"),
    [
        ((1, 2, 32), (1, 2, 2, 16), (1, 2, 2, 16), "are not"),
        ((1, 2, 4, 16), (1, 2, 2, 16), (1, 2, 1, 16), "are not"),
        ((1, 2, 4, 16), (1, 3, 2, 16), (1, 3, 2, 16), "are not"),
        ((1, 2, 4, 16), (1, 2, 2, 8), (1, 2, 2, 8), "are not"),
        ((1, 2, 4, 16), (1, 2, 3, 16), (1, 2, 3, 16), "4 heads are no multiple of 3"),
        ((1, 2, 2, 16), (1, 2, 4, 16), (1, 2, 4, 16), "2 heads are no multiple of 4"),
        ((1, 2, 2, 16), (1, 2, 0, 16), (1, 2, 0, 16), "no multiple of 0"),
        ((1, 2, 2, 129), (1, 2, 2, 129), (1, 2, 2, 129), "1 to 128"),
    ],
)
def test_what_is_refused_apart(q, k, v, says):
    with pytest.raises(ValueError, match=says):
        attention_qkv(randn(*q), randn(*k), randn(*v))


def test_what_else_is_refused_apart():
    q, k = randn(1, 2, 4, 16), randn(1, 2, 2, 16)
    with pytest.raises(ValueError, match=r"k torch.float16, v torch.float32 differ"):
        attention_qkv(q, k.half(), k)
    with pytest.raises(ValueError, match="doc_ids"):
        attention_qkv(q, k, k, doc_ids=torch.zeros(2, 1))
    with pytest.raises(ValueError, match="needs a seed"):
        attention_qkv(q, k, k, 0.1)
