"""What all ops owe to PyTorch: registration that opcheck finds sound, torch.compile without a graph break, autocast's dtypes. And their
launch configurations: one for every architecture, and each call its own."""

import functools
from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton")
from kernel_case import DEVICE, HALVES, VIEWS, poisoned, randn, seed

from fastgpt import kernels
from fastgpt.kernels import configs
from fastgpt.kernels.accumulate import in_place
from fastgpt.kernels.attention import attention, attention_qkv
from fastgpt.kernels.common import precision
from fastgpt.kernels.embedding import embedding
from fastgpt.kernels.gelu_mlp import gelu_mlp
from fastgpt.kernels.layer_norm import add_layer_norm, layer_norm
from fastgpt.kernels.linear import linear
from fastgpt.kernels.linear_cross_entropy import linear_cross_entropy
from fastgpt.ops import Kernels
from fastgpt.records import RECORDS, Shape, problem

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of lanes that are masked
HALF = torch.float16


def leaf(*shape, dtype=torch.float32, grad=False):
    """A random tensor that wants a gradient; where `grad`, it has one already."""
    t = randn(*shape, dtype=dtype).requires_grad_()
    t.grad = randn(*shape, dtype=dtype) if grad else None
    return t


def ids(V, *shape):
    return torch.randint(V, shape, device=DEVICE)


def turned(t):
    """t with its first two dimensions swapped in memory; a leaf again."""
    return VIEWS["transposed"](t.detach()).requires_grad_(t.requires_grad)


# ---- registration ----

CALLS = {  # with every option; those whose name ends in "half" under autocast to fp16
    "layer_norm": lambda: layer_norm(leaf(2, 3, 20), leaf(20)),
    "add_layer_norm": lambda: add_layer_norm(leaf(2, 3, 20), leaf(2, 3, 20), leaf(20), leaf(20)),
    "add_layer_norm, dropout, strides, a row, half": lambda: add_layer_norm(
        turned(leaf(2, 3, 20)), turned(leaf(2, 3, 20, dtype=HALF)), leaf(20), leaf(20), 1e-5, 0.2, seed(), configs.LAYER_NORM[0].text
    ),
    "embedding": lambda: embedding(ids(11, 2, 3), leaf(11, 20), leaf(5, 20)),
    "embedding, dropout, strides, a row, a narrow stream": lambda: embedding(
        turned(ids(11, 2, 3)), turned(leaf(11, 20)), turned(leaf(5, 20)), 0.2, seed(), HALF, configs.EMBEDDING.text
    ),
    "attention": lambda: attention(leaf(2, 5, 48), 2),
    "attention, dropout, documents, strides, a row, half": lambda: attention(
        turned(leaf(2, 5, 48, dtype=HALF)), 2, 0.2, seed(), turned(ids(2, 2, 5)), configs.ATTENTION[0, 2, 128].text
    ),
    "attention_qkv": lambda: attention_qkv(leaf(2, 5, 4, 16), leaf(2, 5, 2, 16), leaf(2, 5, 2, 16)),
    "attention_qkv, dropout, documents, strides, a row, half": lambda: attention_qkv(
        turned(leaf(2, 5, 4, 16, dtype=HALF)), leaf(2, 5, 1, 16), turned(leaf(2, 5, 1, 16)), 0.2, seed(), turned(ids(2, 2, 5)),
        configs.ATTENTION[0, 2, 128].text,
    ),
    "gelu_mlp": lambda: gelu_mlp(leaf(2, 3, 20), leaf(80, 20), leaf(80), leaf(20, 80), leaf(20)),
    "gelu_mlp, recomputing, no bias, strides, a row, half": lambda: gelu_mlp(
        turned(leaf(2, 3, 20)), turned(leaf(80, 20)), None, turned(leaf(20, 80)), None, True, configs.GELU_MLP[0, 2].text
    ),
    "gelu_mlp, tanh": lambda: gelu_mlp(leaf(2, 3, 20), leaf(80, 20), leaf(80), leaf(20, 80), leaf(20), approximate="tanh"),
    "gelu_mlp, added": lambda: gelu_mlp(leaf(2, 3, 20), leaf(80, 20, grad=True), None, leaf(20, 80, grad=True), None),
    "linear": lambda: linear(leaf(2, 3, 20), leaf(12, 20), leaf(12)),
    "linear, no bias, strides, half": lambda: linear(turned(leaf(2, 3, 20)), turned(leaf(12, 20))),
    "linear, added": lambda: linear(leaf(2, 3, 20), leaf(12, 20, grad=True)),
    "linear_cross_entropy": lambda: linear_cross_entropy(leaf(2, 3, 20), leaf(11, 20), ids(11, 2, 3)),
    "linear_cross_entropy, strides, a row, half": lambda: linear_cross_entropy(
        turned(leaf(2, 3, 20)), turned(leaf(11, 20)), turned(ids(11, 2, 3)), 7, None, configs.LINEAR_CROSS_ENTROPY.text
    ),
    "linear_cross_entropy, no gradient": lambda: linear_cross_entropy(randn(2, 3, 20), randn(11, 20), ids(11, 2, 3)),
}  # fmt: skip


@functools.cache
def launches(name):
    """(op, its arguments, outputs full of nan) of every launch that a call and its backward make, of gradients that are not contiguous."""
    found = []

    def spy(launcher):
        def launch(*args):
            found.append((launcher.opaque, [a.detach().clone() if torch.is_tensor(a) else a for a in args]))
            return launcher(*args)

        return launch

    with poisoned(), ExitStack() as stack:
        for module in (getattr(kernels, name) for name in kernels.__all__):
            for launcher in [f for f in vars(module).values() if hasattr(f, "opaque")]:
                stack.enter_context(patch.object(module, launcher.__name__, spy(launcher)))
        with torch.autocast(DEVICE, HALF, enabled=name.endswith("half")):
            outputs = CALLS[name]()
        outputs = [t for t in (outputs if isinstance(outputs, tuple) else [outputs]) if t.requires_grad]
        grads = [randn(*t.shape, dtype=t.dtype) for t in outputs]
        with in_place():
            torch.autograd.backward(outputs, [turned(g) if g.dim() > 1 else g for g in grads])
    return found


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    for op, args in launches(name):
        torch.library.opcheck(op, args)


def test_no_op_goes_unchecked():
    assert {op.name() for name in CALLS for op, _ in launches(name)} == {f"fastgpt::{op}" for op in torch.ops.fastgpt}


def chain(wte, wpe, w, b, w_qkv, b_qkv, w_fc, b_fc, w_proj, targets, idx, key, docs):
    """Every op, one behind another, with dropout and documents."""
    x, head = embedding(idx, wte, wpe, 0.1, key)
    h = layer_norm(x, w, b)
    branch = attention(linear(h, w_qkv, b_qkv), 2, 0.1, key + 1, docs)
    x, h = add_layer_norm(x, branch, w, b, dropout_p=0.1, seed=key + 2)
    q, k, v = linear(h, w_qkv, b_qkv).unflatten(2, (6, 16)).split(2, 2)
    branch = attention_qkv(q, k[:, :, :1], v[:, :, 1:], 0.1, key + 3, docs).flatten(2)
    x, h = add_layer_norm(x, branch, w, b)
    x, h = add_layer_norm(x, gelu_mlp(h, w_fc, b_fc, w_proj, None), w, b)
    return linear_cross_entropy(h, head, targets)


SLOW_BACKENDS = ("aot_eager", False), ("inductor", False), ("inductor", True)


@pytest.mark.parametrize(
    ("backend", "autocast"),
    [("aot_eager", True), *(pytest.param(b, a, marks=pytest.mark.slow) for b, a in SLOW_BACKENDS)],
)  # fmt: skip
def test_all_ops_compile_without_a_graph_break(backend, autocast):
    torch.manual_seed(0)
    shapes = (11, 32), (9, 32), (32,), (32,), (96, 32), (96,), (128, 32), (128,), (32, 128)
    weights = [leaf(*shape) for shape in shapes]
    targets, idx = ids(11, 2, 7), ids(11, 2, 7)
    targets[0, 0] = -100  # ignored targets gave another library another loss when compiled
    docs = torch.arange(7, device=DEVICE).expand(2, 7) // 4
    results = []
    torch._dynamo.reset()
    for call in (chain, torch.compile(chain, fullgraph=True, backend=backend)):
        with torch.autocast(DEVICE, HALF, enabled=autocast):
            loss = call(*weights, targets, idx, seed(), docs)
        results.append([loss, *torch.autograd.grad(loss, weights)])
    # Without autocast the same calls in the same order; with it, fp16 casts that the compiler may leave out.
    tolerance = dict(rtol=1e-2, atol=2e-3) if autocast else dict(rtol=0, atol=0) if backend == "aot_eager" else {}
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


# ---- dtypes and gradients ----


def test_autocast_decides_the_answers_dtype():
    x, w = leaf(1, 3, 32), leaf(32)
    with torch.autocast(DEVICE, HALF):
        stream, h = add_layer_norm(x, x, w)
        answers = layer_norm(x, w), h, linear(x, leaf(48, 32)), attention(leaf(1, 3, 48), 1)
        answers += (attention_qkv(leaf(1, 3, 2, 16), leaf(1, 3, 1, 16).half(), leaf(1, 3, 1, 16)),)
        answers += (gelu_mlp(x, leaf(8, 32), leaf(8), leaf(32, 8), leaf(32)),)
        loss = linear_cross_entropy(h, leaf(5, 32), ids(5, 1, 3))
        embedded, _ = embedding(ids(5, 1, 3), leaf(5, 32), leaf(3, 32))
    assert {t.dtype for t in answers} == {HALF}
    assert {t.dtype for t in (stream, loss, embedded)} == {torch.float32}


OUTPUTS = {
    "layer_norm": lambda x, w: layer_norm(x, w),
    "add_layer_norm": lambda x, w: add_layer_norm(x, x, w)[1],
    "attention": lambda x, w: attention(x, 1),
    "attention_qkv": lambda x, w: attention_qkv(*x.unflatten(2, (3, 16)).split(1, 2)),
    "gelu_mlp": lambda x, w: gelu_mlp(x, w.expand(5, -1), None, w.expand(5, -1).t(), None),
    "linear": lambda x, w: linear(x, w.expand(5, -1)),
    "linear_cross_entropy": lambda x, w: linear_cross_entropy(x, w.expand(5, -1), ids(5, 1, 3)),
    "embedding": lambda x, w: embedding(ids(3, 1, 3), x[0], x[0])[0],
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_fp64_is_refused(name):
    with pytest.raises(ValueError, match="float64: the kernels take"):
        OUTPUTS[name](leaf(1, 3, 48).double(), leaf(48).double())


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_gradient_of_a_gradient_is_refused(name):
    x, w = leaf(1, 3, 48), leaf(48)
    with pytest.raises(RuntimeError, match="gradient has no gradient"):
        torch.autograd.grad(OUTPUTS[name](x, w).sum(), x, create_graph=True)


class _Unused(torch.autograd.Function):
    """What follows an op and has no gradient for it."""

    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, g):
        return None


@pytest.mark.parametrize("name", OUTPUTS)
def test_no_gradient_coming_is_no_gradient_going(name):
    x, w = leaf(1, 3, 48), leaf(48)
    _Unused.apply(OUTPUTS[name](x, w)).backward()
    for t in (x, w):
        assert t.grad is None or (t.grad == 0).all()


OF_A_WEIGHT = {  # an answer, and the weight's shape
    "linear": (lambda x, w: linear(x, w), (12, 16)),
    "gelu_mlp, up": (lambda x, w: gelu_mlp(x, w, None, torch.ones_like(w.t()), None), (12, 16)),
    "gelu_mlp, down": (lambda x, w: gelu_mlp(x, torch.ones_like(w.t()), None, w, None), (16, 12)),
    "linear_cross_entropy": (lambda x, w: linear_cross_entropy(x, w, torch.arange(3, device=DEVICE)), (12, 16)),
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", OF_A_WEIGHT)
def test_a_shadow_is_read_and_the_weight_gets_the_gradient(name, dtype):
    f, shape = OF_A_WEIGHT[name]
    x, w = randn(3, 16, dtype=dtype), randn(*shape).requires_grad_()
    alone = f(x, w)
    w.shadow = (2 * w.detach()).to(dtype)
    y = f(x, w)
    assert torch.equal(y, f(x, 2 * w.detach()))
    y.sum().backward()
    assert w.grad.dtype == torch.float32
    w.shadow = w.shadow.float()  # of another dtype it is not taken
    assert torch.equal(f(x, w), alone)


def test_the_shadow_of_the_weight_that_an_alias_is_of():
    h, w, targets = randn(3, 16, dtype=HALF), randn(12, 16), ids(12, 3)
    loss = linear_cross_entropy(h, w.view_as(w), targets, shadow=2 * w.to(HALF))
    assert torch.equal(loss, linear_cross_entropy(h, 2 * w, targets))


# ---- how they are launched ----


def test_fp32_products_are_ieee_unless_tf32_is_allowed():
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
        for half in ("forward", "backward"):
            config = getattr(configs.gelu_mlp("cuda", dtype, aligned=True), half)
            assert config.tma == (sm >= 90 and dtype != torch.float32)
            assert not config.warp_specialize or 100 <= sm < 120
            assert not getattr(configs.gelu_mlp("cuda", dtype, aligned=False), half).tma
        for head_size in range(1, 129):
            assert configs.attention("cuda", dtype, head_size) in configs.ATTENTION.values()


SHIPPED = [*configs.LAYER_NORM, configs.EMBEDDING, configs.LINEAR_CROSS_ENTROPY, configs.ADAMW, configs.UNALIGNED]
SHIPPED += [*configs.GELU_MLP.values(), *configs.ATTENTION.values()]


def test_a_rows_text_is_that_row():
    for row in SHIPPED:
        assert type(row).of(row.text) == row


@pytest.mark.parametrize(
    "wrong",
    ['{"max_width": 64}', '{"max_width": 64, "forward_warps": 3, "backward_warps": 4}', configs.ADAMW.text, "[1]", "max_width"],
)  # fmt: skip
def test_a_text_that_is_no_row_is_refused(wrong):
    with pytest.raises(ValueError, match=r"NormConfig|Expecting value"):
        layer_norm(randn(2, 48), randn(48), row=wrong)


@pytest.mark.parametrize("op", [op for op, record in RECORDS.items() if record.row])
def test_two_choices_of_rows_run_side_by_side(op, monkeypatch):
    """The row is that of the Kernels which a call was handed, in its backward too; a call with other ones in between changes nothing."""
    shape = Shape(1, 9, 48, 3, 40)
    it = problem(op, shape, torch.float32, DEVICE)
    shipped = RECORDS[op].row(shape, torch.float32, DEVICE)
    other = next(r for grid in configs.GRIDS[type(shipped)] for r in configs.neighbours(shipped, grid) if r != shipped)
    lookup, ran = getattr(configs, op), []
    monkeypatch.setattr(configs, op, lambda *args: ran.append(lookup(*args)) or ran[-1])
    inputs = [None if t is None else t.requires_grad_(it.grads[0] is not None) for t in it.inputs.values()]
    outputs = {}
    for row in (shipped, other):
        ran.clear()
        outputs[row] = it.by_ops(*inputs, kernels=Kernels(**{op: "triton"}, rows=((op, row.text),)))
        assert set(ran) == {row}
    for row, answers in outputs.items():
        if it.grads[0] is not None:
            ran.clear()
            torch.autograd.backward(answers, it.grads)
            assert set(ran) == {row}
    torch.testing.assert_close(*outputs.values())
