"""Launch configurations, as data: a frozen dataclass an op, a table by shape class.

A table's rows are tried in order; the first whose bound holds is taken. Not measured on a GPU yet: the rows were chosen
by the registers and barriers of the generated code, which tests/codegen.py compiles for every architecture (docs/codegen.md).
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
    """The embedding: columns and warps of a program, and the elements that its backward reads at once, as rows of them."""

    block: int = 1024
    forward_warps: int = 4
    backward_tile: int = 8192
    backward_warps: int = 8


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
class AdamWConfig:
    """The update: elements of a program, and how many of them are in registers at once."""

    chunk: int = 8192
    block: int = 1024  # 16 bytes a thread and tensor: the shadow then has the same layout, and no shuffling
    warps: int = 8
    clip_block: int = 4096


ADAMW = AdamWConfig()


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


# By (lowest architecture, bytes of an element), newest first; 0 is the interpreter, whose tests are of few rows.
GELU_MLP = {
    (120, 2): MLPConfig(128, 128, 32, warps=8, stages=3, tma=True),
    (100, 2): MLPConfig(128, 128, 64, warps=8, stages=3, tma=True),
    (90, 2): MLPConfig(128, 128, 64, warps=8, stages=3, tma=True, flatten=True),
    (80, 2): MLPConfig(128, 128, 32, warps=8, stages=3),
    (80, 4): MLPConfig(64, 64, 32, warps=4, stages=3),
    (0, 2): MLPConfig(32, 64, 32, warps=4, stages=1),
    (0, 4): MLPConfig(32, 64, 32, warps=4, stages=1),
}
UNALIGNED = MLPConfig(64, 64, 32, warps=4, stages=3)  # rows that are read element by element: no TMA, more registers


@dataclass(frozen=True)
class AttentionConfig:
    """flash_attention: the forward's blocks of queries and of keys; the backward's block and its step."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    outer: int
    inner: int
    backward_warps: int
    backward_stages: int
    gated_inner: int | None = None  # the step with dropout or documents, where the usual one would spill
    delta_rows: int = 64


# By (lowest architecture, bytes of an element, largest head size), newest first.
ATTENTION = {
    (120, 2, 64): AttentionConfig(128, 64, 8, 2, outer=128, inner=32, backward_warps=8, backward_stages=2),
    (120, 2, 128): AttentionConfig(64, 64, 8, 2, outer=64, inner=32, backward_warps=8, backward_stages=1),
    (100, 2, 64): AttentionConfig(
        128, 64, 8, 3, outer=128, inner=64, gated_inner=32, backward_warps=8, backward_stages=2
    ),
    (100, 2, 128): AttentionConfig(
        128, 64, 8, 2, outer=64, inner=64, gated_inner=32, backward_warps=8, backward_stages=1
    ),
    (90, 2, 64): AttentionConfig(
        128, 64, 8, 3, outer=128, inner=64, gated_inner=32, backward_warps=8, backward_stages=2
    ),
    (90, 2, 128): AttentionConfig(128, 64, 8, 2, outer=64, inner=32, backward_warps=8, backward_stages=2),
    (80, 2, 64): AttentionConfig(128, 64, 8, 2, outer=128, inner=32, backward_warps=8, backward_stages=2),
    (80, 2, 128): AttentionConfig(64, 64, 8, 2, outer=64, inner=32, backward_warps=8, backward_stages=1),
    # IEEE fp32 has no tensor cores: a product keeps its operands in registers.
    (80, 4, 64): AttentionConfig(64, 32, 8, 1, outer=32, inner=32, backward_warps=8, backward_stages=1),
    (80, 4, 128): AttentionConfig(32, 16, 8, 1, outer=16, inner=16, backward_warps=8, backward_stages=1),
    (0, 2, 128): AttentionConfig(64, 32, 4, 1, outer=64, inner=32, backward_warps=4, backward_stages=1),
    (0, 4, 128): AttentionConfig(64, 32, 4, 1, outer=64, inner=32, backward_warps=4, backward_stages=1),
}


def architecture(device):
    """90 for sm_90; 0 for the CPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def gelu_mlp(device, dtype, aligned=True):
    """The MLPConfig for a device, a compute dtype, and whether all rows begin on 16 bytes."""
    sm = architecture(device)
    if sm and not aligned:
        return UNALIGNED
    return next(config for (least, size), config in GELU_MLP.items() if least <= sm and size == dtype.itemsize)


def attention(device, dtype, head_size):
    """The AttentionConfig for a device, a compute dtype and a head size to 128."""
    sm = architecture(device)
    return next(
        config
        for (least, size, largest), config in ATTENTION.items()
        if least <= sm and size == dtype.itemsize and head_size <= largest
    )


def layer_norm(width):
    """The NormConfig of a row width. Raises ValueError above the widest."""
    for config in LAYER_NORM:
        if width <= config.max_width:
            return config
    raise ValueError(f"layer_norm: rows of {width} are wider than {LAYER_NORM[-1].max_width}")
