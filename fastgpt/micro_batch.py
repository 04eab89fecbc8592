"""How many of nanoGPT's micro-batches are computed at a time: the same update up to rounding, in fewer steps.

A GPU computes a product in tiles, one on each SM at a time. The last round of tiles is rarely full, and at 12 sequences a good part of
the machine idles in it. Larger micro-steps waste less, and write each weight's gradient less often.
"""

import math
from typing import get_args

import torch

from fastgpt.config import RESIDUAL, GPTConfig, Recompute, TrainConfig, UserError

TILE = 128  # rows and columns of a GEMM's tile, as cuBLAS and the kernels take them on sm_80 to sm_90
MEMORY_SHARE = 0.85  # of the free memory, for activations; the rest is for the allocator and the estimate's error


def merge(
    spec: str | int, batch_size: int, accumulation: int, config: GPTConfig, device: str | torch.device, takes: float,
    beside: float = 0.0, before: int | None = None,
) -> int:  # fmt: skip
    """How many micro-batches of batch_size make one micro-step: a divisor of accumulation.

    spec is --micro_batch: "auto" for the best size on this device, or an int, the sequences of a micro-step. `takes`: bytes of one
    sequence's activations. `beside`: bytes that something else needs at the same time. `before`: the size that "auto" took earlier in
    this run, which it keeps if that fits. Raises UserError.
    """
    sizes = [batch_size * n for n in range(1, accumulation + 1) if accumulation % n == 0]
    if spec != "auto":
        wanted = spec if type(spec) is int else 0
        if wanted not in sizes:
            nearest = min(sizes, key=lambda s: (abs(s - wanted), s))
            raise UserError(
                f"--micro_batch={spec}: it is auto, or batch_size={batch_size} times a divisor of the {accumulation} micro-steps; "
                f"the nearest is {nearest}"
            )
        return wanted // batch_size
    if not str(device).startswith("cuda"):
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return best(sizes, config, sms, free - beside, takes, before) // batch_size


def best(
    sizes: list[int], config: GPTConfig, sms: int, free: float, takes: float, before: int | None = None
) -> int:  # fmt: skip
    """The smallest of the sizes, in sequences, that is within 1% of the best SM utilisation and fits into `free` bytes;
    `before`, if that fits.

    `takes`: bytes of one sequence's activations. The largest that fits would gain no more, and leave an estimate no room to be wrong.
    """
    room = MEMORY_SHARE * free - state_bytes(config)
    fitting = [s for s in sizes if s * takes <= room] or sizes[:1]
    if before in fitting:
        return before
    most = max(filled(s * config.block_size, config, sms) for s in fitting)
    return next(s for s in fitting if filled(s * config.block_size, config, sms) >= most - 0.01)


def filled(rows: int, config: GPTConfig, sms: int) -> float:
    """SM utilisation of the forward GEMMs on `rows` tokens, from 0 to 1: the share of their rounds of tiles that is work, by FLOPs."""
    C, L = config.n_embd, config.n_layer
    shapes = [(3 * C, C, L), (C, C, L), (4 * C, C, L), (C, 4 * C, L), (config.vocab_size, C, 1)]  # N, K, times
    ideal = took = 0.0
    for n, k, times in shapes:
        tiles = math.ceil(rows / TILE) * math.ceil(n / TILE)
        ideal += times * k * rows * n / TILE**2
        took += times * k * math.ceil(tiles / sms) * sms
    return ideal / took


def sequence_bytes(config: GPTConfig, itemsize: int, recompute: str = "none", stream: int = 4) -> int:
    """Bytes that one sequence's activations take between forward and backward: what the kernels save.

    A block keeps the stream twice, in `stream` bytes an element. In the compute dtype it keeps the outputs of two norms, q, k, v,
    attention's output, and twice the hidden layer of 4 C; with recompute="gelu" the hidden layer once. With "block" a block keeps only the
    stream and the branch that it begins with, and one block at a time has the rest. The head takes the logits, and as much again for
    temporaries.
    """
    block = 2 * stream + (2 + 3 + 1 + (4 if recompute == "gelu" else 8)) * itemsize
    blocks = config.n_layer * (stream + itemsize) + block if recompute == "block" else config.n_layer * block
    return config.block_size * (config.n_embd * blocks + 2 * config.vocab_size * itemsize)


def what_fits(
    cfg: TrainConfig, config: GPTConfig, memory: float, itemsize: int, failed: int, micro_steps: int, graphed: bool = False
) -> str:  # fmt: skip
    """The flags to give, as text, where a run did not fit into `memory` bytes: to recompute, or to compute fewer sequences at a time.

    failed: the sequences of its micro-steps. micro_steps: how many of nanoGPT's a process has. graphed: whether they were CUDA graphs.
    """
    room = MEMORY_SHARE * memory - state_bytes(config) * 18 / 14  # the weights too
    modes, stream = get_args(Recompute), RESIDUAL[cfg.residual].itemsize
    sequence = sequence_bytes(config, itemsize, cfg.recompute, stream)
    if graphed and failed * sequence <= room:  # a graph keeps its memory beside all else's
        return "give --runner=eager"
    for mode in modes[modes.index(cfg.recompute) + 1 :]:
        if failed * sequence_bytes(config, itemsize, mode, stream) <= room:
            return f"give --recompute={mode}"
    total = cfg.batch_size * cfg.gradient_accumulation_steps
    mine = cfg.batch_size * micro_steps
    merged = [n for n in range(cfg.batch_size, failed, cfg.batch_size) if mine % n == 0 and n * sequence <= room]
    if merged:
        return f"give --micro_batch={merged[-1]}"
    if failed > cfg.batch_size:
        return f"give --micro_batch={cfg.batch_size}"
    fewer = [n for n in range(1, cfg.batch_size) if cfg.batch_size % n == 0]
    if not fewer:
        return "give --recompute=block" if cfg.recompute != "block" else "give a smaller --block_size or model"
    size = max((n for n in fewer if n * sequence <= room), default=1)
    return f"give --batch_size={size} --gradient_accumulation_steps={total // size}"


def state_bytes(config: GPTConfig) -> int:
    """Bytes of gradients, two moments and shadows. The weights are not counted: they are in memory already."""
    C = config.n_embd
    n = (config.vocab_size + config.block_size) * C + config.n_layer * 12 * C * C
    return n * (4 + 8 + 2)
