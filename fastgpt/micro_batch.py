"""How many of nanoGPT's micro-batches are computed at a time: the same update up to rounding, in fewer steps.

A GPU computes a product in tiles, as many at a time as it has SMs: the last round of tiles is rarely full, and at 12 sequences
a good part of the machine stands idle in it. Larger micro-steps waste less, and write each weight's gradient less often.
"""

import math
from typing import get_args

import torch

from fastgpt.config import RESIDUAL, Recompute, UserError

TILE = 128  # rows and columns of a GEMM's tile, as cuBLAS and the kernels take them on sm_80 to sm_90
MEMORY_SHARE = 0.85  # of what is free, for activations: the rest is the allocator's and the estimate's


def merge(spec, batch_size, accumulation, config, device, takes):
    """How many micro-batches of batch_size make one micro-step, a divisor of accumulation, where a sequence takes so many bytes.

    spec is --micro_batch: "" for one, "auto" for the best of this device, or sequences of a micro-step, an int. Raises UserError.
    """
    if not spec:
        return 1
    sizes = [batch_size * n for n in range(1, accumulation + 1) if accumulation % n == 0]
    if spec != "auto":
        wanted = spec if type(spec) is int else 0
        if wanted not in sizes:
            nearest = min(sizes, key=lambda s: (abs(s - wanted), s))
            raise UserError(
                f"--micro_batch={spec}: it is auto, or batch_size={batch_size} times a divisor of the {accumulation} micro-steps; "
                f"the nearest is {nearest}"
            )
        return spec // batch_size
    if not str(device).startswith("cuda"):
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return best(sizes, config, sms, free, takes) // batch_size


def best(sizes, config, sms, free, takes):
    """Of sizes in sequences, each of which takes so many bytes, the one whose GEMMs fill the SMs best within free bytes of memory; of
    equals, to a percent, the least."""
    room = MEMORY_SHARE * free - state_bytes(config)
    fitting = [s for s in sizes if s * takes <= room] or sizes[:1]
    most = max(filled(s * config.block_size, config, sms) for s in fitting)
    return next(s for s in fitting if filled(s * config.block_size, config, sms) >= most - 0.01)


def filled(rows, config, sms):
    """The share of the SMs' tiles that the forward GEMMs on so many rows of tokens fill, by FLOPs; from 0 to 1."""
    C, L = config.n_embd, config.n_layer
    shapes = [(3 * C, C, L), (C, C, L), (4 * C, C, L), (C, 4 * C, L), (config.vocab_size, C, 1)]  # N, K, how often
    ideal = took = 0.0
    for n, k, times in shapes:
        tiles = math.ceil(rows / TILE) * math.ceil(n / TILE)
        ideal += times * k * rows * n / TILE**2
        took += times * k * math.ceil(tiles / sms) * sms
    return ideal / took


def sequence_bytes(config, itemsize, recompute="none", stream=4):
    """Bytes that one sequence's activations take between forward and backward, by what the kernels save.

    Of each block and element of the stream: the stream twice, in `stream` bytes, and in the compute dtype two norms' outputs, q, k, v,
    attention's output, and twice the hidden layer of 4 C, or with recompute="gelu" once. With "block" a block keeps the stream and the
    branch that it begins with, and one block at a time the rest. Of the head: logits, and as much again for what comes and goes.
    """
    block = 2 * stream + (2 + 3 + 1 + (4 if recompute == "gelu" else 8)) * itemsize
    blocks = config.n_layer * (stream + itemsize) + block if recompute == "block" else config.n_layer * block
    return config.block_size * (config.n_embd * blocks + 2 * config.vocab_size * itemsize)


def what_fits(cfg, config, memory, itemsize):
    """What to give so that a run that does not fit into so many bytes should, as text: recomputing, or fewer sequences at a time."""
    room = MEMORY_SHARE * memory - state_bytes(config) * 18 / 14  # the weights too
    failed = cfg.micro_batch if type(cfg.micro_batch) is int else cfg.batch_size
    modes, stream = get_args(Recompute), RESIDUAL[cfg.residual].itemsize
    sequence = sequence_bytes(config, itemsize, cfg.recompute, stream)
    if cfg.cuda_graphs and failed * sequence <= room:  # beside whose memory what is not replayed has its own
        return "leave out --cuda_graphs"
    for mode in modes[modes.index(cfg.recompute) + 1 :]:
        if failed * sequence_bytes(config, itemsize, mode, stream) <= room:
            return f"give --recompute={mode}"
    total = cfg.batch_size * cfg.gradient_accumulation_steps
    merged = [n for n in range(cfg.batch_size, failed, cfg.batch_size) if total % n == 0 and n * sequence <= room]
    if merged:
        return f"give --micro_batch={merged[-1]}"
    if cfg.micro_batch and failed > cfg.batch_size:
        return "leave out --micro_batch"
    fewer = [n for n in range(1, cfg.batch_size) if cfg.batch_size % n == 0]
    if not fewer:
        return "give --recompute=block" if cfg.recompute != "block" else "give a smaller --block_size or model"
    size = max((n for n in fewer if n * sequence <= room), default=1)
    return f"give --batch_size={size} --gradient_accumulation_steps={total // size}"


def state_bytes(config):
    """Bytes still to be taken for gradients, two moments and shadows, before any activation: the weights are there already."""
    C = config.n_embd
    n = (config.vocab_size + config.block_size) * C + config.n_layer * 12 * C * C
    return n * (4 + 8 + 2)
