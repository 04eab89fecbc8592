"""Triton kernels, installed as `fastgpt.kernels`: one file for each op. Only `fastgpt.ops` and `fastgpt.records` call them.

The import reads TRITON_INTERPRET, and raises ImportError if Triton is not installed.
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
