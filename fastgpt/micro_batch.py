"""How many of nanoGPT's micro-batches are computed at a time: the same tokens and the same update up to rounding, in fewer steps.

A GPU computes a product in tiles, as many at a time as it has SMs: the last round of tiles is rarely full, and at 12 sequences
a good part of the machine stands idle in it. Larger micro-steps waste less, and write each weight's gradient less often.
"""

import math

import torch

from fastgpt.config import UserError

TILE = 128  # rows and columns of a GEMM's tile, as cuBLAS and the kernels take them on sm_80 to sm_90
MEMORY_SHARE = 0.85  # of what is free, for activations: the rest is the allocator's and the estimate's


def merge(spec, batch_size, accumulation, config, device, dtype):
    """How many micro-batches of batch_size make one micro-step, a divisor of accumulation.

    spec is --micro_batch: "" for one, "auto" for the best of this device, or sequences of a micro-step. Raises UserError.
    """
    if not spec:
        return 1
    sizes = [batch_size * n for n in range(1, accumulation + 1) if accumulation % n == 0]
    if spec != "auto":
        wanted = int(spec) if spec.isdecimal() else 0
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
    return best(sizes, config, sms, free, dtype.itemsize) // batch_size


def best(sizes, config, sms, free, itemsize):
    """Of sizes in sequences, the one whose GEMMs fill the SMs best within free bytes of memory; of equals, to a percent, the least."""
    room = MEMORY_SHARE * free - state_bytes(config)
    fitting = [s for s in sizes if s * sequence_bytes(config, itemsize) <= room] or sizes[:1]
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


def sequence_bytes(config, itemsize):
    """Bytes that one sequence's activations take between forward and backward, by what the kernels save.

    Of each block and element of the stream: the stream twice in fp32, and in the compute dtype two norms' outputs, q, k, v, attention's
    output, and twice the hidden layer of 4 C. Of the head: logits, and as much again for what comes and goes.
    """
    block = 2 * 4 + (2 + 3 + 1 + 2 * 4) * itemsize
    return config.block_size * (config.n_layer * config.n_embd * block + 2 * config.vocab_size * itemsize)


def state_bytes(config):
    """Bytes still to be taken for gradients, two moments and shadows, before any activation: the weights are there already."""
    C = config.n_embd
    n = (config.vocab_size + config.block_size) * C + config.n_layer * 12 * C * C
    return n * (4 + 8 + 2)
