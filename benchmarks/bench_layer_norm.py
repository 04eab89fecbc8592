"""LayerNorm, alone and with the residual add before it, against eager, Inductor, Liger and quack."""

from dataclasses import replace

import torch

from fastgpt import ops, reference, verify
from fastgpt.benchmarks.harness import Op, importable, needs_gpu
from fastgpt.verify import Shape

SHAPES = [Shape(32, 1024, 768, 1, 1, bias=False), Shape(16, 1024, 1600, 1, 1, bias=False)]
TOY = Shape(4, 64, 64, 1, 1, bias=False)


def add_problem(shape, dtype, device):
    """verify's: add+LayerNorm."""
    return verify.problem("layer_norm", shape, dtype, device)


def plain_problem(shape, dtype, device):
    """LayerNorm of the stream alone."""
    it = add_problem(shape, dtype, device)
    inputs = {k: v for k, v in it.inputs.items() if k != "branch"}

    def answer(f):
        def call(x, weight, bias):
            with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
                return (f(x, weight, bias),)

        return call

    def plain(x, weight, bias):
        return verify.widened(reference.layer_norm(x, weight, bias), dtype)

    kernel = answer(lambda *inputs: ops.kernels("layer_norm").layer_norm(*inputs))
    return replace(
        it, inputs=inputs, outputs=("h",), grads=it.grads[1:], kernel=kernel, reference=answer(plain),
        chosen=answer(ops.layer_norm),
    )  # fmt: skip


layer_norm = Op("layer_norm", SHAPES, TOY, plain_problem)
add_layer_norm = Op("add_layer_norm", SHAPES, TOY, add_problem)


def for_both(name):
    """Register a provider of both ops: the decorated function takes a Problem, and whether there is a branch to add."""

    def register(make):
        layer_norm.provider(name)(lambda it: make(it, False))
        add_layer_norm.provider(name)(lambda it: make(it, True))

    return register


@for_both("liger")
def liger(it, add):
    needs_gpu("Liger-Kernel")
    norm = importable("liger_kernel.transformers.functional").liger_layer_norm
    return with_add(lambda x, w, b: norm(x, w, torch.zeros_like(w) if b is None else b, reference.EPS), it, add)


@for_both("quack")
def quack(it, add):
    module = importable("quack.rmsnorm")

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            rows = x.reshape(-1, x.size(-1))
            y, rstd, mean = module.layernorm_fwd(rows, weight, bias, reference.EPS, return_rstd=True, return_mean=True)
            ctx.save_for_backward(rows, weight, rstd, mean)
            ctx.has_bias = bias is not None
            return y.view(x.shape)

        @staticmethod
        def backward(ctx, dy):
            dy2, (x, weight, rstd, mean) = dy.reshape(-1, dy.size(-1)), ctx.saved_tensors
            dx, dw, db = module.layernorm_bwd(x, weight, dy2, rstd, mean, ctx.has_bias)
            return dx.view(dy.shape), dw, db

    return with_add(Norm.apply, it, add)


def with_add(norm, it, add):
    """norm, with PyTorch's add before it where `add`, its answer in the dtype of the Problem's."""
    dtype = it.grads[-1].dtype

    def f(x, *rest):
        if not add:
            return (norm(x, *rest).to(dtype),)
        x = x + rest[0]
        return x, norm(x, *rest[1:]).to(dtype)

    return f


test_layer_norm = layer_norm.benchmark()
test_add_layer_norm = add_layer_norm.benchmark()
