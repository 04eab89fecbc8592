"""layer_norm and add_layer_norm, through Triton's interpreter or on a GPU, against fp64 by the three-way rule."""

import pytest
import three_way
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

layer_norm_kernels = pytest.importorskip("fastgpt.kernels.layer_norm", reason="Triton is not installed")
from fastgpt.kernels.layer_norm import _add_layer_norm, _layer_norm, add_layer_norm, layer_norm  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies and rounds bf16 wrongly: bf16 is a GPU's to test.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What a kernel does not write is nan: `torch.empty` gives nan for as long as a test runs."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    fill = lambda t: t.fill_(float("nan")) if t.is_floating_point() else t  # noqa: E731
    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))


def randn(*shape, dtype=torch.float32, scale=1.0, shift=0.0):
    return (torch.randn(shape, device=DEVICE) * scale + shift).to(dtype)


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
        return stream, h if x.dtype == torch.float64 else h.to(dtype)

    return f


NAMES = ["stream", "h", "dx", "dbranch", "dweight", "dbias"]


def check(shape, dtype, bias=True, p=0.0, scale=1.0, shift=0.0, view=lambda t: t):
    """An fp32 stream, a branch and an answer in dtype, as in training; `view` gives inputs and gradients other strides."""
    N = shape[-1]
    x, branch = view(randn(*shape, scale=scale, shift=shift)), view(randn(*shape, dtype=dtype, scale=scale))
    if x.stride(-1) == 0:  # a row of one value has no spread: its LayerNorm is rounding, magnified
        x = randn(*shape)
    weight, b = randn(N, shift=1.0), randn(N) if bias else None
    dstream, dh = view(randn(*shape)), view(randn(*shape, dtype=dtype))
    seed = torch.tensor([1234567], device=DEVICE) if p else None
    keep = mask_of(seed, x.shape, p) if p else None

    def op(x, branch, weight, b):
        return _add_layer_norm(x, branch, weight, b, 1e-5, p, seed, dtype)[:2]

    names = NAMES if bias else NAMES[:-1]
    three_way.hold(op, reference(dtype, keep, p), [x, branch, weight, b], [dstream, dh], names)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [768, 1600, 130, 48, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_widths(N, dtype, bias):
    check((2, 3, N), dtype, bias)


@pytest.mark.parametrize("T", [1, 17, 63, 64, 65, 100, 128] + [1023] * (DEVICE == "cuda"))
def test_lengths(T):
    check((1, T, 48) if DEVICE == "cpu" else (3, T, 768), torch.float16)


@pytest.mark.parametrize("N", [2048, 4096, 8192])
def test_wide_rows(N):
    check((1, 2, N), torch.float16)


def test_more_rows_than_programs():
    """Each program then takes several rows, and the last ones fewer than the first."""
    check((2, 260, 24), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(dtype):
    check((2, 9, 48), dtype, p=0.2)


def test_large_magnitudes():
    check((2, 3, 96), torch.float16, scale=1e4 / 4)
    check((2, 3, 96), torch.float32, shift=1e4)  # a mean far above the spread: one-pass variance would lose it


VIEWS = {
    "sliced rows": lambda t: torch.cat((t, t), 1)[:, ::2],
    "sliced columns": lambda t: torch.cat((t, t), 2)[..., ::2],
    "part of a wider row": lambda t: torch.cat((t, t), 2)[..., : t.size(2)],
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded rows": lambda t: t[:, :1].expand(t.shape),
    "expanded columns": lambda t: t[..., :1].expand(t.shape),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides(view):
    check((3, 4, 40), torch.float32, view=view)


def test_four_dimensions_are_taken_where_they_are_three():
    x = randn(2, 3, 4, 16)
    weight = randn(16)
    torch.testing.assert_close(layer_norm(x, weight), F.layer_norm(x, (16,), weight))
    assert layer_norm(x[0, 0, 0], weight).shape == (16,)
    with pytest.raises(ValueError, match="contiguous"):
        layer_norm(x.transpose(0, 1), weight)


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


def test_layer_norm_alone():
    for dtype in DTYPES:
        x, weight, bias = randn(2, 5, 130), randn(130, shift=1.0), randn(130)
        three_way.hold(
            lambda *a: (_layer_norm(*a, 1e-5, dtype)[0],),
            lambda x, w, b: (
                F.layer_norm(x, w.shape, w, b, 1e-5).to(torch.float64 if x.dtype == torch.float64 else dtype),
            ),
            [x, weight, bias],
            [randn(2, 5, 130, dtype=dtype)],
            ["h", "dx", "dweight", "dbias"],
        )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(8, 70), st.booleans(), st.sampled_from([0.0, 0.5]))
def test_any_shape(B, T, N, bias, p):
    check((B, T, N), torch.float32, bias, p)


def test_backward_is_the_same_bits_every_time():
    x, branch, weight, bias = randn(2, 260, 33), randn(2, 260, 33), randn(33), randn(33)
    runs = []
    for _ in range(20 if DEVICE == "cuda" else 2):  # the interpreter has one order only
        leaves = [t.detach().requires_grad_() for t in (x, branch, weight, bias)]
        stream, h = add_layer_norm(*leaves)
        (stream.sin() + h.cos()).sum().backward()
        runs.append([t.grad for t in leaves])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_dropout_is_a_function_of_seed_and_index():
    seed = torch.tensor([3], device=DEVICE)
    mask = mask_of(seed, (4, 50, 60), 0.3)
    assert torch.equal(mask, mask_of(seed, (4, 50, 60), 0.3))
    assert torch.equal(mask.view(10, 20, 60), mask_of(seed, (10, 20, 60), 0.3))  # the flat index counts, not the shape
    assert not torch.equal(mask, mask_of(seed + 1, (4, 50, 60), 0.3))
    assert mask.float().mean().item() == pytest.approx(0.7, abs=0.02)


def philox_uniform(seed, index):
    """Philox 4x32-10 on the host: the first of four words for counter (index, 0, 0, 0) and key `seed`, as a uniform."""
    lo, hi = index & 0xFFFFFFFF, index >> 32
    c = [lo, hi, 0, 0]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    word = c[0] - 2**32 if c[0] >= 2**31 else c[0]
    return (-word - 1 if word < 0 else word) * 4.6566127342e-10


def test_the_mask_is_a_host_philoxs():
    seed = 0x1234567_89ABCDE
    mask = mask_of(torch.tensor([seed], device=DEVICE), (1, 4, 24), 0.2).flatten().tolist()
    assert mask == [philox_uniform(seed, i) >= 0.2 for i in range(96)]
    assert 0 < sum(mask) < 96


def test_rows_beyond_two_to_the_31_elements():
    """A stride that fits an int32, and a row whose offset by it does not: wrapped, it would be read from elsewhere."""
    N, stride = 16, 2**30
    far = torch.zeros(2 * stride + N, dtype=torch.float16, device=DEVICE)  # 4 GiB, of which a CPU touches three pages
    x = far.as_strided((3, N), (stride, 1))
    x.copy_(randn(3, N, dtype=torch.float16))
    weight = randn(N)
    torch.testing.assert_close(
        layer_norm(x, weight).float(), F.layer_norm(x.float(), (N,), weight), rtol=1e-2, atol=1e-2
    )


ARGS = {
    "layer_norm": lambda p: (randn(2, 3, 20).requires_grad_(), randn(20).requires_grad_(), randn(20).requires_grad_(), 1e-5, torch.float32),
    "add_layer_norm": lambda p: (
        randn(2, 3, 20).requires_grad_(), randn(2, 3, 20, dtype=torch.float16).requires_grad_(), randn(20).requires_grad_(), None, 1e-5, p,
        torch.tensor([5], device=DEVICE) if p else None, torch.float16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARGS)
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_opcheck(name, p, monkeypatch):
    monkeypatch.undo()  # the poison would look like a mutation of fresh memory to the tracer
    op = {"layer_norm": _layer_norm, "add_layer_norm": _add_layer_norm}[name]
    torch.library.opcheck(op.custom, ARGS[name](p))


@pytest.mark.parametrize("backend", ["aot_eager"] + ["inductor"] * (DEVICE == "cuda"))
def test_compiled_whole(backend, monkeypatch):
    monkeypatch.undo()
    x, branch, weight, bias = (t.requires_grad_() for t in (randn(2, 3, 20), randn(2, 3, 20), randn(20), randn(20)))

    def f(x, branch, weight, bias):
        stream, h = add_layer_norm(x * 2, branch, weight, bias, dropout_p=0.2, seed=seed)
        return (stream.sin() + layer_norm(h, weight).cos()).sum()

    seed = torch.tensor([5], device=DEVICE)
    results = []
    for call in (f, torch.compile(f, fullgraph=True, backend=backend)):
        loss = call(x, branch, weight, bias)
        results.append([loss, *torch.autograd.grad(loss, [x, branch, weight, bias])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_autocast_decides_the_answers_dtype():
    x, branch, weight = randn(2, 3, 20), randn(2, 3, 20), randn(20)
    with torch.autocast(DEVICE, dtype=torch.float16):
        stream, h = add_layer_norm(x, branch, weight)
        alone = layer_norm(x, weight)
    assert (stream.dtype, h.dtype, alone.dtype) == (torch.float32, torch.float16, torch.float16)


def test_what_is_refused():
    x, weight = randn(2, 3, 20), randn(20)
    with pytest.raises(ValueError, match="wider than 8192"):
        layer_norm(randn(1, 1, 8193), randn(8193))
    with pytest.raises(ValueError, match="a branch of"):
        add_layer_norm(x, randn(2, 3, 10), weight)
    with pytest.raises(ValueError, match="needs a seed"):
        add_layer_norm(x, x, weight, dropout_p=0.1)
    with pytest.raises(ValueError, match="not in"):
        add_layer_norm(x, x, weight, dropout_p=1.0, seed=torch.tensor([1]))
    y = x.requires_grad_()
    (g,) = torch.autograd.grad(layer_norm(y, weight).square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
