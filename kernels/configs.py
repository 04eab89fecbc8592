"""Launch configurations as data: a frozen dataclass for each op, and tables whose rows are its instances.

The first row of a table that fits the device, dtype and shape is used. The rows were not measured on a GPU yet. They were chosen by the
registers and barriers of the generated code, which tests/codegen.py compiles for every architecture (docs/codegen.md). `GRIDS` lists the
values that `fastgpt tune` tries on a GPU.
"""

import functools
import itertools
import json
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import triton

# The most that fields may be: these, warps of a program, and elements at a time. All integers but these must also be powers of two.
COUNTS = {"stages": 8, "backward_stages": 8, "programs_per_sm": 32, "min_chunk": 2**20}
MOST_WARPS, MOST_ELEMENTS = 32, 2**16
LEAST_TILE = 16  # rows and columns of a product's operands, in every Triton


@dataclass(frozen=True)
class Config:
    """Base of the rows. The constructor raises ValueError for values with which a kernel cannot be launched, or would be wrong.

    Rows come from files too, so what a kernel takes for granted of its row is said here, in `__post_init__`.
    """

    def __post_init__(self):
        for field in fields(self):
            value, kinds = getattr(self, field.name), getattr(field.type, "__args__", (field.type,))
            if int in kinds and type(value) is int:
                most = MOST_WARPS if "warps" in field.name else MOST_ELEMENTS
                right = 0 < value <= COUNTS.get(field.name, most)
                right &= field.name in COUNTS or value & (value - 1) == 0
            else:
                right = type(value) in kinds or (float in kinds and type(value) is int)
            if not right:
                raise ValueError(f"{type(self).__name__}: {field.name}={value!r}")

    @property
    def text(self) -> str:
        """The row as text (JSON): an op can take text, but no dataclass."""
        return json.dumps(asdict(self))

    @classmethod
    @functools.cache
    def of(cls, text: str) -> Any:
        """The row with this `text`. Raises ValueError for a text that is not a row."""
        try:
            return cls(**json.loads(text))
        except TypeError as e:
            raise ValueError(f"{cls.__name__}: {e}") from None

    def least(self, least: int, *names: str) -> None:
        """Raise ValueError if one of the fields is below `least`."""
        for name in names:
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{type(self).__name__}: {name}={value} is below {least}")


@dataclass(frozen=True)
class NormConfig(Config):
    """LayerNorm: the largest row width C, the warps that share a row, and the backward's programs on an SM."""

    max_width: int
    forward_warps: int
    backward_warps: int
    programs_per_sm: int


# programs_per_sm: as many as an SM's registers hold, with dropout too. A program more would run after the others, alone.
LAYER_NORM = (
    NormConfig(1024, forward_warps=1, backward_warps=4, programs_per_sm=5),  # one warp for each row needs no barrier
    NormConfig(2048, forward_warps=4, backward_warps=4, programs_per_sm=3),
    NormConfig(4096, forward_warps=8, backward_warps=8, programs_per_sm=2),  # with dropout one, so the two take turns
    NormConfig(8192, forward_warps=16, backward_warps=16, programs_per_sm=1),
)


@dataclass(frozen=True)
class EmbeddingConfig(Config):
    """The embedding: columns and warps of a program; backward, elements that a program reads at once, as rows of `block` columns, and the
    sorted positions of a span, beyond which no program sums."""

    block: int = 1024
    forward_warps: int = 4
    backward_tile: int = 8192
    backward_span: int = 64
    backward_warps: int = 8


EMBEDDING = EmbeddingConfig()


@dataclass(frozen=True)
class LossConfig(Config):
    """The loss: columns of a row that are in registers at once, warps for each row, and how rows are divided into chunks."""

    # An SM has two rows of GPT-2's 50,304 columns at a time: 27 MB on an H100, whose L2 holds 50, so a row's second read comes from there.
    # An A100's are 22 MB of 40; a B200's SM has four, 60 MB of 126. With 8 warps an H100's SM would have four. Columns: 3.07 blocks.
    block: int = 16384
    warps: int = 16
    mean_block: int = 4096
    scale_block: int = 4096
    min_chunk: int = 8192
    memory_share: float = 1 / 16  # of the device's memory that a chunk's logits may take

    def __post_init__(self):
        super().__post_init__()
        self.least(32, "block")  # with fewer elements than threads one would read a logit that another has overwritten
        if not 0 <= self.memory_share <= 1:
            raise ValueError(f"LossConfig: memory_share={self.memory_share} is not from 0 to 1")


LINEAR_CROSS_ENTROPY = LossConfig()


@dataclass(frozen=True)
class AdamWConfig(Config):
    """The update: elements of a program (chunk), and how many of them are in registers at once (block)."""

    chunk: int = 8192
    block: int = 1024  # 16 bytes for each thread and tensor: the shadow then has the same layout, without shuffles
    warps: int = 8
    clip_block: int = 4096

    def __post_init__(self):
        super().__post_init__()
        if self.block < 32 * self.warps:
            raise ValueError(
                f"AdamWConfig: with {self.warps} warps for a block of {self.block} two threads would update the same element in place"
            )
        # The rest of a block would be updated by two programs.
        if self.chunk % self.block or self.chunk > 64 * self.block:
            raise ValueError(f"AdamWConfig: chunk={self.chunk} is not 1 to 64 blocks of {self.block}")


ADAMW = AdamWConfig()


@dataclass(frozen=True)
class GemmConfig(Config):
    """A Triton GEMM: the output tile, the step along K, and how a program runs."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    tma: bool = False
    flatten: bool = False  # pipeline across tiles: the next tile's loads begin in this tile's epilogue
    warp_specialize: bool = False  # loads, products and epilogue have warps of their own; on sm_100 alone
    programs_per_sm: int = 1
    group: int = 8  # rows of tiles that share a column of weights in L2

    def __post_init__(self):
        super().__post_init__()
        self.least(LEAST_TILE, "block_m", "block_n", "block_k")
        if self.warps * self.programs_per_sm > 64:
            raise ValueError(
                f"GemmConfig: an SM has no threads for {self.programs_per_sm} programs of {self.warps} warps"
            )
        held = self.block_m * self.block_n  # fp32 sums, which may take half of a thread's and of an SM's registers
        if held > 128 * 32 * self.warps or held * self.programs_per_sm > 32768:
            raise ValueError(
                f"GemmConfig: {self.programs_per_sm} programs cannot hold {self.block_m} x {self.block_n} sums in registers"
            )

    @property
    def registers(self) -> int | None:
        """The most registers a thread may have for programs_per_sm programs to fit on an SM. None: the compiler's choice."""
        return 65536 // (32 * self.warps * self.programs_per_sm) if self.programs_per_sm > 1 else None


@dataclass(frozen=True)
class MLPConfig(Config):
    """gelu_mlp's two Triton GEMMs, h w_fc^T and dy w_proj. Their epilogues differ, and so do the tiles that fit."""

    forward: GemmConfig
    backward: GemmConfig

    def __post_init__(self):
        for name in ("forward", "backward"):
            if isinstance(half := getattr(self, name), dict):  # a row read from JSON
                object.__setattr__(self, name, GemmConfig(**half))
        super().__post_init__()


def both(*args: Any, **others: Any) -> MLPConfig:
    """The MLPConfig whose two GEMMs run alike."""
    gemm = GemmConfig(*args, **others)
    return MLPConfig(gemm, gemm)


# By (lowest architecture, bytes of an element), newest first. 0 is the interpreter, whose tests have few rows.
GELU_MLP = {
    (120, 2): both(128, 128, 32, warps=8, stages=3, tma=True),
    (100, 2): both(128, 128, 64, warps=8, stages=3, tma=True),
    # 128 x 256 reads three quarters of what 128 x 128 reads from L2. Flattened, the backward's 3 stages would not fit beside its tiles of
    # pre and dpre; with 2 stages no load is under way when a step waits for its own.
    (90, 2): MLPConfig(
        forward=GemmConfig(128, 256, 64, warps=8, stages=3, tma=True, flatten=True),
        backward=GemmConfig(128, 256, 64, warps=8, stages=3, tma=True),
    ),
    (80, 2): both(128, 128, 32, warps=8, stages=3),
    (80, 4): both(64, 64, 32, warps=4, stages=3),
    (0, 2): both(32, 64, 32, warps=4, stages=1),
    (0, 4): both(32, 64, 32, warps=4, stages=1),
}
UNALIGNED = both(64, 64, 32, warps=8, stages=3)  # rows read element by element: no TMA, more registers


@dataclass(frozen=True)
class AttentionConfig(Config):
    """attention: forward, the block of queries (m) and of keys (n); backward, a program's block (outer) and its step (inner)."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    outer: int
    inner: int
    backward_warps: int
    backward_stages: int
    gated_inner: int | None = None  # the step with dropout or documents, if `inner` would spill
    delta_rows: int = 64

    def __post_init__(self):
        super().__post_init__()
        self.least(LEAST_TILE, "block_m", "block_n", "outer", "inner", "gated_inner")
        if self.outer % self.inner or self.outer % (self.gated_inner or self.inner):
            raise ValueError(
                f"AttentionConfig: outer={self.outer} is not a multiple of inner={self.inner} and gated_inner={self.gated_inner}"
            )


# By (lowest architecture, bytes of an element, largest head size), newest first. A loop of two stages waits for the loads that it has just
# issued. With three it has those of the next step in flight.
ATTENTION = {
    (120, 2, 64): AttentionConfig(128, 64, 8, 3, outer=64, inner=32, backward_warps=4, backward_stages=3),
    (120, 2, 128): AttentionConfig(128, 32, 8, 3, outer=128, inner=16, backward_warps=8, backward_stages=3),
    (100, 2, 64): AttentionConfig(
        128, 64, 8, 3, outer=128, inner=64, gated_inner=32, backward_warps=8, backward_stages=3
    ),
    (100, 2, 128): AttentionConfig(
        128, 64, 8, 3, outer=64, inner=64, gated_inner=32, backward_warps=8, backward_stages=2
    ),
    (90, 2, 64): AttentionConfig(
        128, 64, 8, 3, outer=128, inner=64, gated_inner=32, backward_warps=8, backward_stages=3
    ),
    (90, 2, 128): AttentionConfig(
        128, 64, 8, 3, outer=128, inner=32, gated_inner=16, backward_warps=8, backward_stages=3
    ),
    # Each warp reads all keys of a step from shared memory: with 32 rows a warp they are read half as often as with 16.
    (80, 2, 64): AttentionConfig(128, 32, 4, 3, outer=64, inner=32, backward_warps=4, backward_stages=3),
    (80, 2, 128): AttentionConfig(128, 32, 8, 3, outer=128, inner=16, backward_warps=8, backward_stages=3),
    # IEEE fp32 does not use tensor cores: a product keeps its operands in registers.
    (80, 4, 64): AttentionConfig(64, 32, 8, 1, outer=32, inner=32, backward_warps=8, backward_stages=1),
    (80, 4, 128): AttentionConfig(32, 16, 8, 1, outer=16, inner=16, backward_warps=8, backward_stages=1),
    (0, 2, 128): AttentionConfig(64, 32, 4, 1, outer=64, inner=32, backward_warps=4, backward_stages=1),
    (0, 4, 128): AttentionConfig(64, 32, 4, 1, outer=64, inner=32, backward_warps=4, backward_stages=1),
}


@functools.cache
def architecture(device: torch.device) -> int:
    """The architecture of a device: 90 for sm_90; 0 for the CPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of SMs of a GPU. For the CPU 2^16: every tile then has its own program."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2**16


# Before 3.7.1 Triton omits the fence.proxy.async between a cp.async and the wgmma or tcgen05.mma that reads what it wrote
# (triton-lang/triton, pull request 10537). The emulator of tests/ptx found this on 3.6.0 and 3.7.0.
FENCED = tuple(map(int, re.findall(r"\d+", triton.__version__)[:3])) >= (3, 7, 1)


def pipeline(device: torch.device, stages: int) -> int:
    """The stages of a loop that loads a matrix product's operands by pointers. 1, which loads via registers, if the fence is missing."""
    return stages if FENCED or architecture(device) not in (90, 100, 103) else 1


def warp_specialize(device: torch.device, config: GemmConfig) -> bool:
    """Whether a GEMM's warps specialize. On sm_90 Triton ignores it, or the accumulators spill; on sm_120 they spill."""
    return config.warp_specialize and architecture(device) in (100, 103)


def instead_of(shipped: Config, given: Any) -> Config:
    """The row with the given {field: value}, for what the shipped row is for. Raises ValueError that says what is wrong."""
    kind, names = type(shipped).__name__, {f.name for f in fields(shipped)}
    if not isinstance(given, dict) or given.keys() != names:
        raise ValueError(f"{kind}: its fields are not {', '.join(sorted(names))}")
    try:
        row: Any = type(shipped)(**given)
    except TypeError as e:  # of a row within a row
        raise ValueError(f"{kind}: {e}") from None
    if isinstance(row, NormConfig) and isinstance(shipped, NormConfig) and row.max_width != shipped.max_width:
        raise ValueError(f"{kind}: max_width={row.max_width} is not {shipped.max_width}")
    return row


# Each function returns the table's row for its arguments; or, if `row` is given, the row with that text (such as `fastgpt tune` found).


def gelu_mlp(device: torch.device, dtype: torch.dtype, aligned: bool, row: str = "") -> MLPConfig:
    """The MLPConfig for a device and a compute dtype. aligned: all rows begin at multiples of 16 bytes; if not, `row` is ignored."""
    sm = architecture(device)
    if sm and not aligned:
        return UNALIGNED
    if row and aligned:
        return MLPConfig.of(row)
    return next(config for (least, size), config in GELU_MLP.items() if least <= sm and size == dtype.itemsize)


def attention(device: torch.device, dtype: torch.dtype, head_size: int, row: str = "") -> AttentionConfig:
    """The AttentionConfig for a device, a compute dtype and a head size up to 128."""
    if row:
        return AttentionConfig.of(row)
    sm = architecture(device)
    return next(
        config
        for (least, size, largest), config in ATTENTION.items()
        if least <= sm and size == dtype.itemsize and head_size <= largest
    )


def layer_norm(width: int, row: str = "") -> NormConfig:
    """The NormConfig for rows of `width` elements. Raises ValueError if they are too wide."""
    for config in LAYER_NORM:
        if width <= config.max_width:
            return NormConfig.of(row) if row else config
    raise ValueError(f"layer_norm: rows of {width} are wider than {LAYER_NORM[-1].max_width}")


def embedding(row: str = "") -> EmbeddingConfig:
    """The EmbeddingConfig."""
    return EmbeddingConfig.of(row) if row else EMBEDDING


def linear_cross_entropy(row: str = "") -> LossConfig:
    """The LossConfig."""
    return LossConfig.of(row) if row else LINEAR_CROSS_ENTROPY


def adamw(row: str = "") -> AdamWConfig:
    """The AdamWConfig."""
    return AdamWConfig.of(row) if row else ADAMW


def combined(**values: tuple[Any, ...]) -> tuple[dict[str, Any], ...]:
    """Every combination of some fields' values, as changes of a GemmConfig."""
    return tuple(dict(zip(values, of, strict=True)) for of in itertools.product(*values.values()))


# How a tile and a way to hide its epilogue go together: one large tile whose end overlaps with the next one's loads, or two small ones.
GEMM_GRIDS = (
    tuple(
        dict(block_m=m, block_n=n, warps=warps, **way)
        for m, n, warps in ((128, 256, 8), (256, 128, 8), (128, 128, 8), (128, 128, 4), (64, 256, 4), (64, 128, 4))
        for way in (
            dict(stages=3, flatten=True, programs_per_sm=1),
            dict(stages=3, flatten=False, programs_per_sm=1),
            dict(stages=2, flatten=False, programs_per_sm=2),
        )
    ),
    combined(block_k=(32, 64, 128), stages=(2, 3, 4), flatten=(False, True)),
    combined(warp_specialize=(False, True), group=(4, 8, 16)),
)

# What `fastgpt tune` tries, grid by grid. The fields outside a grid keep the best values so far. Forward and backward share few fields.
# A dict among the values is a set of changes of what the field holds.
GRIDS: dict[type, tuple[dict[str, tuple[Any, ...]], ...]] = {
    MLPConfig: tuple({half: changes} for half in ("forward", "backward") for changes in GEMM_GRIDS),
    AttentionConfig: (
        dict(block_m=(64, 128), block_n=(32, 64, 128), warps=(4, 8)),
        dict(stages=(1, 2, 3, 4)),
        dict(outer=(64, 128), inner=(16, 32, 64), backward_warps=(4, 8)),
        dict(backward_stages=(1, 2, 3)),
    ),
    NormConfig: (
        dict(forward_warps=(1, 2, 4, 8)),
        dict(backward_warps=(2, 4, 8, 16), programs_per_sm=(1, 2, 3, 5, 8)),  # fewer warps: more programs fit
    ),
    LossConfig: (
        dict(block=(4096, 8192, 16384, 32768), warps=(8, 16, 32)),
        dict(scale_block=(1024, 2048, 4096, 8192)),
    ),
    AdamWConfig: (
        dict(block=(512, 1024, 2048), warps=(4, 8)),
        dict(chunk=(4096, 8192, 16384)),
    ),
    EmbeddingConfig: (
        dict(block=(512, 1024), forward_warps=(2, 4, 8)),
        dict(backward_tile=(4096, 8192, 16384), backward_warps=(4, 8)),
        dict(backward_span=(32, 64, 128)),
    ),
}


def neighbours(row: Any, grid: dict[str, tuple[Any, ...]]) -> list[Any]:
    """The list of valid rows that result from applying every combination of a grid's values to `row`."""
    rows = []
    for values in itertools.product(*grid.values()):
        try:
            changes = {
                name: replace(getattr(row, name), **value) if isinstance(value, dict) else value
                for name, value in zip(grid, values, strict=True)
            }
            rows.append(replace(row, **changes))
        except ValueError:  # some combinations are not valid
            continue
    return rows
