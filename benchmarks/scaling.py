"""`fastgpt bench scaling`: what a step sends over the links, how much of that its computation hides, and what is left, for many GPUs.

Nothing is measured here. Bytes are counted from the model's parameters. The time of the computation is the roofline's, of each GPU's own
sequences at shares of a data sheet's rates. The GPUs' number grows and a GPU's sequences stay, so the batch grows with them.

    DDP     all-reduce of the fp32 gradients, in buckets, while the last micro-step's backward goes on
    FSDP    all-gather of each block's 16-bit weights before its forward, and with one micro-step before its backward again; reduce-scatter
            of its fp32 gradients behind its backward. The embeddings are gathered in fp32. LayerNorms and biases are all-reduced

A ring all-reduce sends 2 (n - 1) / n of the bytes from each GPU, an all-gather or reduce-scatter half of that (nccl-tests,
doc/PERFORMANCE.md). All GPUs of a node share its network cards, one for each GPU: rings leave a node by all cards at once, so the bandwidth
of a ring is the smaller of NVLink's and of all cards together.

The tied embedding's gradient is complete only where the backward ends. So its part of the traffic is never hidden, nor is the first gather.
"""

import math
from dataclasses import dataclass

from pydantic import Field

from fastgpt.benchmarks.roofline import step_parts
from fastgpt.config import StepShape, UserError
from fastgpt.metrics import PEAKS, peaks
from fastgpt.records import Shape, n_params

# Bytes/s in one direction. NVLink of a GPU: 18 links of the fourth generation in an H100 and H200, 900 GB/s both ways together
# (NVIDIA's H100 data sheet; "Introducing NVIDIA HGX H100", developer.nvidia.com, 2022). Network: ConnectX-7, 400 Gb/s a port, a card for
# each GPU (NVIDIA DGX H100 user guide, table 6).
NVLINK = 450e9
INFINIBAND = 50e9


# fmt: off
class ScalingConfig(StepShape):
    """Predict bytes between GPUs and the efficiency of many, of a micro-step's shape."""

    GROUPS = {"preset": "the step", "gpus": "the machines"}
    EXAMPLES = ["fastgpt bench scaling --gpus=8,64", "fastgpt bench scaling --preset=gpt2-xl --network=25e9"]

    gpus: str = Field("8,64,512", description="how many GPUs, with commas")
    node: int = Field(8, gt=0, description="GPUs of a node")
    micro_steps: int = Field(1, gt=0, description="micro-steps of an iteration in each process")
    gpu: str = Field("H100", description="a GPU by name; its data sheet gives the rates")
    flops_share: float = Field(0.6, gt=0, le=1, description="of a data sheet's FLOP/s, which products and attention reach together")
    memory_share: float = Field(0.85, gt=0, le=1, description="of a data sheet's bytes/s, which a streaming kernel reaches")
    nvlink: float = Field(NVLINK, gt=0, description="bytes/s of a GPU to the others of its node, one direction")
    network: float = Field(INFINIBAND, gt=0, description="bytes/s of a GPU's network card, one direction")
    link_share: float = Field(0.8, gt=0, le=1, description="of these bytes/s, which a large collective reaches")
    hop_us: float = Field(2.0, ge=0, description="microseconds from a GPU to the next, beside the bytes: an assumption")
# fmt: on


@dataclass
class Links:
    """What joins n GPUs: bytes/s of a ring through all of them, and seconds of a hop."""

    n: int
    bandwidth: float
    hop: float

    def half(self, moved, messages=1):
        """(bytes that a GPU sends, seconds) of an all-gather or reduce-scatter of `moved` bytes, in some messages: a ring's n - 1 hops."""
        sent = moved * (self.n - 1) / self.n
        return sent, sent / self.bandwidth + messages * (self.n - 1) * self.hop

    def all_reduce(self, moved, messages=1):
        """The same of an all-reduce, whose tree has 2 log2(n) hops."""
        sent = 2 * moved * (self.n - 1) / self.n
        return sent, sent / self.bandwidth + messages * 2 * math.log2(self.n) * self.hop


BUCKET = 25 * 2**20  # bytes of DDP's buckets, by default


def ddp(links, model, times):
    """(bytes that a GPU sends in an iteration, seconds of all messages, seconds that nothing hides)."""
    rest = 4 * (model["blocks"] + model["small"])
    behind, late = links.all_reduce(rest, math.ceil(rest / BUCKET)), links.all_reduce(4 * model["embeddings"])
    return behind[0] + late[0], behind[1] + late[1], late[1] + max(0.0, behind[1] - times["backward"])


def fsdp(links, model, times, micro_steps, n_layer):
    """The same."""
    first, late = links.half(4 * model["embeddings"]), links.half(4 * model["embeddings"])
    block = links.half(2 * model["blocks"] / n_layer)
    gather, scatter = links.half(2 * model["blocks"], n_layer), links.half(4 * model["blocks"], n_layer)
    small = links.all_reduce(4 * model["small"])
    again = gather if micro_steps == 1 else (0.0, 0.0)
    parts = first, late, gather, again, scatter, small
    shown = first[1] + block[1] + max(0.0, gather[1] - block[1] - times["forward"])
    shown += max(0.0, again[1] + scatter[1] - times["backward"]) + late[1] + small[1]
    return sum(sent for sent, _ in parts), sum(seconds for _, seconds in parts), shown


def scaling(cfg):
    """Print the table of a ScalingConfig. Raises UserError for an unknown GPU or number of GPUs."""
    sheet = peaks(cfg.gpu)
    if not sheet:
        raise UserError(f"--gpu={cfg.gpu}: not in the table ({', '.join(PEAKS)})")
    if not all(word.strip().isdecimal() and int(word) > 1 for word in cfg.gpus.split(",")):
        raise UserError(f"--gpus={cfg.gpus}: numbers above 1 with commas, such as 8,64,512")
    config = cfg.gpt_config()
    shape, C, L = Shape.of(cfg.batch_size, config), config.n_embd, config.n_layer
    model = {"embeddings": (cfg.vocab_size + cfg.block_size) * C, "blocks": 12 * L * C * C}
    n = n_params(shape, L)
    model["small"] = n - sum(model.values())
    rates = sheet[0] * cfg.flops_share, sheet[1] * cfg.memory_share
    times = dict.fromkeys(("forward", "backward", "update"), 0.0)
    for part in step_parts(shape, L):
        times[part.direction] += part.seconds(*rates)
    computing = cfg.micro_steps * (times["forward"] + times["backward"])
    alone = computing + times["update"]
    tokens = cfg.batch_size * cfg.block_size * cfg.micro_steps
    print(
        f"{cfg.preset}: {n / 1e6:.1f}M parameters; a GPU's iteration is {cfg.micro_steps} x {cfg.batch_size} x {cfg.block_size} tokens, "
        f"{alone * 1e3:.1f} ms alone on an {cfg.gpu} at {cfg.flops_share:.0%} of its FLOP/s\n"
    )
    print(
        f"{'GPUs':>5} {'by':5}{'GB sent':>9}{'of it ms':>10}{'hidden ms':>11}{'step ms':>9}{'efficiency':>12}{'tok/s':>14}{'state GB':>10}"
    )
    for gpus in map(int, cfg.gpus.split(",")):
        ring = cfg.nvlink if gpus <= cfg.node else min(cfg.nvlink, cfg.node * cfg.network)
        links = Links(gpus, ring * cfg.link_share, cfg.hop_us * 1e-6)
        whole = 4 * model["small"] * 4  # weights, gradients, two moments in fp32, on each GPU
        held = 2 if cfg.micro_steps == 1 else L  # blocks, gathered in 16 bits, and with fp32 gradients that are whole
        gathered = 8 * model["embeddings"] + 6 * held * model["blocks"] / L
        kinds = {
            "ddp": (ddp(links, model, times), times["update"], 16 * n + 2 * model["blocks"] + 2 * model["embeddings"]),
            "fsdp": (
                fsdp(links, model, times, cfg.micro_steps, L), times["update"] / gpus, 16 * (n - model["small"]) / gpus + whole + gathered,
            ),
        }  # fmt: skip
        for kind, ((sent, took, shown), update, state) in kinds.items():
            step = computing + update + shown
            print(
                f"{gpus:5} {kind:5}{sent / 1e9:9.2f}{took * 1e3:10.2f}{(took - shown) * 1e3:11.2f}{step * 1e3:9.2f}{alone / step:11.1%} "
                f"{gpus * tokens / step:14,.0f}{state / 1e9:10.2f}"
            )
