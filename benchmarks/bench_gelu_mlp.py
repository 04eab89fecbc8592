"""The MLP (up, exact GELU, down), with the casts of its weights, against eager and Inductor."""

import torch

from fastgpt import ops
from fastgpt.benchmarks.harness import Op, needs_gpu
from fastgpt.records import Shape

SHAPES = [Shape(32, 1024, 768, 1, 1, bias=False), Shape(16, 1024, 1600, 1, 1, bias=False)]

gelu_mlp = Op("gelu_mlp", SHAPES, Shape(4, 64, 64, 1, 1, bias=False))


@gelu_mlp.provider("inductor-max-autotune")
def max_autotune(it):
    needs_gpu("max-autotune")
    return torch.compile(it.reference, dynamic=False, mode="max-autotune-no-cudagraphs")


@gelu_mlp.provider("fastgpt-recompute")
def recompute(it):
    needs_gpu("the Triton kernel")

    def f(*inputs):
        with torch.autocast("cuda", it.grads[0].dtype):
            return (ops.triton.gelu_mlp.gelu_mlp(*inputs, recompute=True),)

    return f


test_gelu_mlp = gelu_mlp.benchmark()
