"""One function per hot path, and the one place that decides which implementation runs.

The model calls these names and knows nothing of what is behind them. Today every op is its plain-PyTorch
twin; a fused kernel takes its op's place here, where it is proved equal.
"""

from fastgpt.reference import (
    add_layer_norm,
    attention,
    cross_entropy,
    embedding,
    gelu_mlp,
    layer_norm,
    linear_cross_entropy,
)

__all__ = [
    "add_layer_norm",
    "attention",
    "cross_entropy",
    "embedding",
    "gelu_mlp",
    "layer_norm",
    "linear_cross_entropy",
]
