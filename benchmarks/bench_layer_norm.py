"""LayerNorm, alone and with the residual add before it, against eager, Inductor, Liger and quack.

From torch 2.10 on Inductor sums rows and columns in one kernel, which has left gradients of weights unwritten (pytorch issue 193061).
Memory that nobody writes holds what lay there before. So each provider first runs with other gradients.
"""

import functools
from dataclasses import replace

import torch

from fastgpt import ops, records, reference
from fastgpt.benchmarks.harness import Op, importable, needs_gpu
from fastgpt.records import Shape

SHAPES = [Shape(32, 1024, 768, 1, 1, bias=False), Shape(16, 1024, 1600, 1, 1, bias=False)]
TOY = Shape(4, 64, 64, 1, 1, bias=False)

add_problem = functools.partial(records.problem, "layer_norm")


def plain_problem(shape, dtype, device):
    """The Problem of LayerNorm alone: that of add+LayerNorm without the branch and the stream."""
    it = add_problem(shape, dtype, device)

    def alone(f):
        f = records.Draw(shape, dtype, device).autocast(f)
        return lambda *inputs, **how: (f(*inputs, **how),)

    return replace(
        it, inputs={k: v for k, v in it.inputs.items() if k != "branch"}, outputs=("h",), grads=it.grads[1:],
        reference=alone(lambda *inputs: records.widened(reference.layer_norm(*inputs), dtype)),
        kernel=alone(lambda *inputs: ops.triton.layer_norm.layer_norm(*inputs)), by_ops=alone(ops.layer_norm),
    )  # fmt: skip


layer_norm = Op("layer_norm", SHAPES, TOY, problem=plain_problem, parts=records.layer_norm_parts)
add_layer_norm = Op("add_layer_norm", SHAPES, TOY, problem=add_problem, parts=records.add_layer_norm_parts)


def norm_provider(name):
    """Register the decorated function for both ops; it gives norm(x, weight, bias). PyTorch adds the branch before it."""

    def register(make):
        def alone(it):
            norm, dtype = make(), it.grads[-1].dtype
            return lambda x, *rest: (norm(x, *rest).to(dtype),)

        def with_add(it):
            norm, dtype = make(), it.grads[-1].dtype

            def f(x, branch, *rest):
                x = x + branch
                return x, norm(x, *rest).to(dtype)

            return f

        layer_norm.provider(name)(alone)
        add_layer_norm.provider(name)(with_add)

    return register


@norm_provider("liger")
def liger():
    needs_gpu("Liger-Kernel")
    norm = importable("liger_kernel.transformers.functional").liger_layer_norm
    return lambda x, w, b: norm(x, w, torch.zeros_like(w) if b is None else b, reference.EPS)


@norm_provider("quack")
def quack():
    needs_gpu("quack")
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

    return Norm.apply


test_layer_norm = layer_norm.benchmark()
test_add_layer_norm = add_layer_norm.benchmark()
