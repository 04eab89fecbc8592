"""torch.distributed as torchrun starts it: one process a GPU, data parallel."""

import gc
import os
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fastgpt.config import UserError


@dataclass(frozen=True)
class World:
    """This process's place among `size` processes."""

    rank: int
    size: int
    device: str

    @property
    def is_main(self):
        """Whether this process logs, evaluates and saves."""
        return self.rank == 0


def init(device, backend):
    """Join the process group that torchrun's environment names, if it does: a World. Raises UserError for an unusable device."""
    parallel = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()
    rank, size = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if parallel else (0, 1)
    if parallel and device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    check_device(device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if parallel:
        backend = "gloo" if backend == "nccl" and device == "cpu" else backend
        if not dist.is_backend_available(backend):
            raise UserError(
                f"--backend={backend}: this PyTorch has no such backend; write nccl on GPUs, gloo elsewhere"
            )
        dist.init_process_group(backend)
    return World(rank, size, device)


def check_device(device):
    """Raise UserError for a device that is not to be had."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device={device}: there is no such device; write cuda, cuda:1, cpu or mps")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device={device}: PyTorch finds no CUDA GPU here; train with --device=cpu --compile=False, or mend the driver"
        )
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device={device}: this machine has {torch.cuda.device_count()} CUDA GPU(s), counted from cuda:0"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device={device}: PyTorch finds no MPS device here; train with --device=cpu")


def share(steps, world):
    """Each process's share of an iteration's micro-steps. Raises UserError where they cannot be shared evenly."""
    if steps % world.size:
        near = max(1, round(steps / world.size)) * world.size
        raise UserError(
            f"--gradient_accumulation_steps={steps} cannot be shared by {world.size} processes; "
            f"the nearest multiple is {near}"
        )
    return steps // world.size


def wrap(model, world):
    """The model in DDP where there are several processes."""
    if world.size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[world.device] if world.device.startswith("cuda") else None)


@contextmanager
def main_first(world):
    """Let the main process through the block before the others: what it makes on disk is there for them."""
    if world.size > 1 and not world.is_main:
        dist.barrier()
    try:
        yield
    finally:  # after an error too: the others then meet it themselves, and say nothing
        if world.size > 1 and world.is_main:
            dist.barrier()


def mean(tensor, world):
    """The tensor's mean over all processes; every one of them must ask for it."""
    if world.size > 1:
        dist.all_reduce(tensor)
        tensor /= world.size
    return tensor


def least(number, world):
    """The least of all processes' numbers; every one of them must ask for it."""
    if world.size == 1:
        return number
    tensor = torch.tensor(number, device=world.device)
    dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return int(tensor)


def gather(thing, world):
    """A picklable thing of every process, as a list by rank, on the main one; None elsewhere."""
    if world.size == 1:
        return [thing]
    things = [None] * world.size if world.is_main else None
    dist.gather_object(thing, things)
    return things


def finish(world):
    """Leave the process group."""
    if dist.is_initialized():
        gc.collect()  # what still holds the group, DDP first of all: its threads must end before the process does
        dist.destroy_process_group()
