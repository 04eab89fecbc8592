"""Triton kernels, installed as `fastgpt.kernels`: one file per op. `fastgpt.ops` and `fastgpt.records` call them, and nobody else.

Importing this reads TRITON_INTERPRET, and raises ImportError without Triton.
"""

from fastgpt.kernels import (
    accumulate,
    adamw,
    attention,
    common,
    configs,
    embedding,
    gelu_mlp,
    interpreter,
    layer_norm,
    linear,
    linear_cross_entropy,
)

__all__ = [
    "accumulate",
    "adamw",
    "attention",
    "common",
    "configs",
    "embedding",
    "gelu_mlp",
    "interpreter",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
]
