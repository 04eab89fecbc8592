"""Launch configurations, as data: a frozen dataclass an op, a table by shape class.

A table's rows are tried in order; the first whose bound holds is taken. Not measured on a GPU yet: the rows were chosen
by the registers and barriers of the generated code, which tests/test_codegen.py compiles for every architecture.
"""

from dataclasses import dataclass

import torch


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


@dataclass(frozen=True)
class EmbeddingConfig:
    """The embedding: columns and warps of a program, and of its backward the rows that are read at once."""

    forward_block: int = 1024
    forward_warps: int = 4
    backward_block: int = 256
    backward_rows: int = 16
    backward_warps: int = 4


EMBEDDING = EmbeddingConfig()


@dataclass(frozen=True)
class CrossEntropyConfig:
    """The loss: columns of a row that are in registers at once, warps of a row, and how the rows are cut into chunks."""

    block: int = 8192  # GPT-2's 50,304 are 6.1 of these; 65,536 at once would spill
    warps: int = 8
    mean_block: int = 4096
    scale_block: int = 4096
    min_chunk: int = 8192
    memory_share: float = 1 / 16  # of the device's memory that a chunk's logits may take


CROSS_ENTROPY = CrossEntropyConfig()


@dataclass(frozen=True)
class MLPConfig:
    """gelu_mlp's two GEMMs: the tile of the output, the step along K, and how a program runs."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    tma: bool = False
    flatten: bool = False  # pipeline across tiles: the next one's loads begin in this one's epilogue
    programs_per_sm: int = 1
    group: int = 8  # rows of tiles that share a column of weights in L2
    sum_rows: int = 32  # of the bias gradient's second kernel
    sum_columns: int = 64


# By (lowest architecture, bytes of an element), newest first.
GELU_MLP = {
    (120, 2): MLPConfig(128, 128, 32, warps=8, stages=3, tma=True),
    (120, 4): MLPConfig(64, 64, 32, warps=4, stages=3),
    (100, 2): MLPConfig(128, 128, 64, warps=8, stages=3, tma=True),
    (100, 4): MLPConfig(64, 64, 32, warps=4, stages=3),
    (90, 2): MLPConfig(128, 128, 64, warps=8, stages=3, tma=True, flatten=True),
    (90, 4): MLPConfig(64, 64, 32, warps=4, stages=3),
    (89, 2): MLPConfig(128, 128, 32, warps=8, stages=3),
    (89, 4): MLPConfig(64, 64, 32, warps=4, stages=3),
    (80, 2): MLPConfig(128, 128, 32, warps=8, stages=4),
    (80, 4): MLPConfig(64, 64, 32, warps=4, stages=3),
}
INTERPRETED = {"mlp": MLPConfig(32, 64, 32, warps=4, stages=1)}  # small tiles: tests are of few rows


def by_architecture(table, device, dtype):
    """The entry of a table for a CUDA device: the newest architecture that is not newer than it, and the element's size."""
    capability = torch.cuda.get_device_capability(device)
    sm = capability[0] * 10 + capability[1]
    return next(entry for (least, size), entry in table.items() if least <= sm and size == dtype.itemsize)


def gelu_mlp(device, dtype):
    """The MLPConfig for a device and a compute dtype; one for the interpreter on the CPU."""
    return by_architecture(GELU_MLP, device, dtype) if device.type == "cuda" else INTERPRETED["mlp"]


def layer_norm(width):
    """The NormConfig of a row width. Raises ValueError above the widest."""
    for config in LAYER_NORM:
        if width <= config.max_width:
            return config
    raise ValueError(f"layer_norm: rows of {width} are wider than {LAYER_NORM[-1].max_width}")
