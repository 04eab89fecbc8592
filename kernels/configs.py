"""Launch configurations, as data: a frozen dataclass an op, a table by shape class.

A table's rows are tried in order; the first whose bound holds is taken. Not measured on a GPU yet: the rows were chosen
by the registers and barriers of the generated code, which tests/test_codegen.py compiles for every architecture.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class NormConfig:
    """LayerNorm: the widest row that this is for, and the warps that share a row."""

    max_width: int
    forward_warps: int
    backward_warps: int
    reduce_columns: int = 32  # of the second backward kernel: columns that a program sums
    reduce_rows: int = 64  # and rows that it reads at once


LAYER_NORM = (
    NormConfig(1024, forward_warps=1, backward_warps=8),  # one warp a row needs no barrier
    NormConfig(2048, forward_warps=4, backward_warps=8),
    NormConfig(4096, forward_warps=8, backward_warps=16),
    NormConfig(8192, forward_warps=16, backward_warps=16),
)


def layer_norm(width):
    """The NormConfig of a row width. Raises ValueError above the widest."""
    for config in LAYER_NORM:
        if width <= config.max_width:
            return config
    raise ValueError(f"layer_norm: rows of {width} are wider than {LAYER_NORM[-1].max_width}")
