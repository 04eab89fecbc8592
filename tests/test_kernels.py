"""What all ops owe to PyTorch: registration that opcheck finds sound, torch.compile without a graph break, autocast's dtypes."""

import pytest
import torch

pytest.importorskip("triton")
from kernel_case import DEVICE, randn, seed

from fastgpt.kernels import configs
from fastgpt.kernels.common import precision
from fastgpt.kernels.cross_entropy import _linear_cross_entropy, linear_cross_entropy
from fastgpt.kernels.embedding import _embedding, embedding
from fastgpt.kernels.flash_attention import _flash_attention, flash_attention
from fastgpt.kernels.gelu_mlp import _gelu_mlp, gelu_mlp
from fastgpt.kernels.layer_norm import _add_layer_norm, _layer_norm, add_layer_norm, layer_norm
from fastgpt.kernels.linear import _linear


def leaf(*shape, dtype=torch.float32):
    return randn(*shape, dtype=dtype).requires_grad_()


def ids(V, *shape):
    return torch.randint(V, shape, device=DEVICE)


HALF = torch.float16
W_FC, W_PROJ, HEAD = (lambda: leaf(80, 20)), (lambda: leaf(20, 80)), (lambda: leaf(11, 20))
ARGS = {
    "layer_norm": (_layer_norm, lambda: (leaf(2, 3, 20), leaf(20), leaf(20), 1e-5, torch.float32)),
    "add_layer_norm": (_add_layer_norm, lambda: (leaf(2, 3, 20), leaf(2, 3, 20, dtype=HALF), leaf(20), None, 1e-5, 0.0, None, HALF)),
    "add_layer_norm, dropout": (_add_layer_norm, lambda: (leaf(2, 3, 20), leaf(2, 3, 20), leaf(20), leaf(20), 1e-5, 0.2, seed(), HALF)),
    "add_layer_norm, all half": (
        _add_layer_norm, lambda: (leaf(2, 3, 20, dtype=HALF), leaf(2, 3, 20, dtype=HALF), leaf(20), leaf(20), 1e-5, 0.0, None, HALF),
    ),
    "embedding": (_embedding, lambda: (ids(11, 2, 3), leaf(11, 20), leaf(5, 20), 0.0, None, torch.float32)),
    "embedding, dropout": (_embedding, lambda: (ids(11, 2, 3), leaf(11, 20), leaf(5, 20), 0.2, seed(), HALF)),
    "flash_attention": (_flash_attention, lambda: (leaf(2, 5, 48), 2, 0.0, None, None)),
    "flash_attention, all": (_flash_attention, lambda: (leaf(2, 5, 48, dtype=HALF), 2, 0.2, seed(), ids(2, 2, 5))),
    "flash_attention, transposed": (_flash_attention, lambda: (randn(5, 2, 48).transpose(0, 1).requires_grad_(), 2, 0.0, None, None)),
    "gelu_mlp": (
        _gelu_mlp,
        lambda: (leaf(2, 3, 20), (w := W_FC()), leaf(80), (v := W_PROJ()), leaf(20), w.detach(), v.detach(), True, True),
    ),
    "gelu_mlp, half, recomputing, no bias": (
        _gelu_mlp,
        lambda: (leaf(2, 3, 20, dtype=HALF), (w := W_FC()), None, (v := W_PROJ()), None, w.detach().half(), v.detach().half(), True, False),
    ),
    "linear": (_linear, lambda: (leaf(2, 3, 20), (w := leaf(12, 20)), leaf(12), w.detach())),
    "linear, half, no bias": (_linear, lambda: (leaf(2, 3, 20, dtype=HALF), (w := leaf(12, 20)), None, w.detach().half())),
    "linear_cross_entropy": (
        _linear_cross_entropy, lambda: (leaf(2, 3, 20), (w := HEAD()), w.detach(), ids(11, 2, 3), -1, True),
    ),
    "linear_cross_entropy, half": (
        _linear_cross_entropy,
        lambda: (leaf(2, 3, 20, dtype=HALF), (w := HEAD()), w.detach().half(), ids(11, 2, 3), -1, True),
    ),
}  # fmt: skip


class _Unused(torch.autograd.Function):
    """What follows an op and has no gradient for it."""

    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, g):
        return None


OUTPUTS = {
    "layer_norm": lambda x, w: layer_norm(x, w),
    "add_layer_norm": lambda x, w: add_layer_norm(x, x, w)[1],
    "flash_attention": lambda x, w: flash_attention(x, 1),
    "gelu_mlp": lambda x, w: gelu_mlp(x, w.expand(5, -1), None, w.expand(5, -1).t(), None),
    "linear_cross_entropy": lambda x, w: linear_cross_entropy(x, w.expand(5, -1), ids(5, 1, 3)),
    "embedding": lambda x, w: embedding(ids(3, 1, 3), x[0], x[0])[0],
}


@pytest.mark.parametrize("name", ARGS)
def test_opcheck(name):
    op, args = ARGS[name]
    args = args()
    # The loss's gradients are made in its forward: opcheck differentiates an op without gradients wanted, too.
    torch.library.opcheck(op.custom, args)


def chain(wte, wpe, w, b, w_fc, b_fc, w_proj, w_qkv, targets, idx, key, docs):
    """Every op, one behind another, with dropout and documents."""
    x, head = embedding(idx, wte, wpe, 0.1, key)
    h = layer_norm(x, w, b)
    branch = flash_attention(h @ w_qkv, 2, 0.1, key + 1, docs)
    x, h = add_layer_norm(x, branch, w, b, dropout_p=0.1, seed=key + 2)
    x, h = add_layer_norm(x, gelu_mlp(h, w_fc, b_fc, w_proj, None), w, b)
    return linear_cross_entropy(h, head, targets)


@pytest.mark.parametrize("backend", ["aot_eager"] + ["inductor"] * (DEVICE == "cuda"))
@pytest.mark.parametrize("autocast", [False, True])
def test_all_ops_compile_without_a_graph_break(backend, autocast):
    torch.manual_seed(0)
    weights = [leaf(11, 32), leaf(9, 32), leaf(32), leaf(32), leaf(128, 32), leaf(128), leaf(32, 128), leaf(32, 96)]
    targets, idx = ids(11, 2, 7), ids(11, 2, 7)
    targets[0, 0] = -1  # ignored targets gave another library another loss when compiled
    docs = torch.arange(7, device=DEVICE).expand(2, 7) // 4
    results = []
    torch._dynamo.reset()
    for call in (chain, torch.compile(chain, fullgraph=True, backend=backend)):
        with torch.autocast(DEVICE, HALF, enabled=autocast):
            loss = call(*weights, targets, idx, seed(), docs)
        results.append([loss, *torch.autograd.grad(loss, weights)])
    # Without autocast the same calls in the same order; with it, fp16 casts that the compiler may leave out.
    tolerance = dict(rtol=0, atol=0) if backend == "aot_eager" and not autocast else dict(rtol=1e-2, atol=2e-3)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_autocast_decides_the_answers_dtype():
    x, w = leaf(1, 3, 32), leaf(32)
    with torch.autocast(DEVICE, HALF):
        stream, h = add_layer_norm(x, x, w)
        y = flash_attention(leaf(1, 3, 48), 1)
        z = gelu_mlp(x, leaf(8, 32), leaf(8), leaf(32, 8), leaf(32))
        loss = linear_cross_entropy(h, leaf(5, 32), ids(5, 1, 3))
        embedded, _ = embedding(ids(5, 1, 3), leaf(5, 32), leaf(3, 32))
    assert (stream.dtype, h.dtype, y.dtype, z.dtype) == (torch.float32, HALF, HALF, HALF)
    assert (loss.dtype, embedded.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize(
    "name", ["layer_norm", "add_layer_norm", "flash_attention", "embedding", "linear_cross_entropy"]
)
def test_fp64_is_refused(name):
    with pytest.raises(ValueError, match="float64: the kernels take"):
        OUTPUTS[name](leaf(1, 3, 48).double(), leaf(48).double())


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_gradient_of_a_gradient_is_refused(name):
    x, w = leaf(1, 3, 48), leaf(48)
    with pytest.raises(RuntimeError, match="gradient has no gradient"):
        torch.autograd.grad(OUTPUTS[name](x, w).sum(), x if name != "gelu_mlp" else w, create_graph=True)


@pytest.mark.parametrize("name", OUTPUTS)
def test_no_gradient_coming_is_no_gradient_going(name):
    x, w = leaf(1, 3, 48), leaf(48)
    _Unused.apply(OUTPUTS[name](x, w)).backward()
    for t in (x, w):
        assert t.grad is None or (t.grad == 0).all()


def test_fp32_products_are_ieee_unless_tf32_is_allowed(monkeypatch):
    assert precision(torch.float32) == "ieee"
    for name, value in (("allow_tf32", True), ("fp32_precision", "tf32")):
        before = getattr(torch.backends.cuda.matmul, name)
        setattr(torch.backends.cuda.matmul, name, value)
        try:
            assert (precision(torch.float32), precision(torch.bfloat16)) == ("tf32", "ieee")
        finally:
            setattr(torch.backends.cuda.matmul, name, before)


@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100, 103, 120, 121])
def test_every_architecture_has_a_configuration(sm, monkeypatch):
    monkeypatch.setattr(configs, "architecture", lambda device: sm)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert configs.gelu_mlp("cuda", dtype, aligned=True).tma == (sm >= 90 and dtype != torch.float32)
        assert not configs.gelu_mlp("cuda", dtype, aligned=False).tma
        for head_size in range(1, 129):
            assert (
                configs.attention("cuda", dtype, head_size).outer % configs.attention("cuda", dtype, head_size).inner
                == 0
            )
