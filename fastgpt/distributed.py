"""torch.distributed under torchrun: data parallel, one process for each GPU."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastgpt.config import UserError


@dataclass(frozen=True)
class World:
    """This process's place among `size` processes."""

    rank: int
    size: int
    device: str

    @property
    def is_main(self) -> bool:
        """Whether this process logs, evaluates and saves."""
        return self.rank == 0


def init(device: str, backend: str) -> World:
    """Join torchrun's process group if there is one, and return the World. Raises UserError for an unusable device or backend."""
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
        own = torch.device(device) if device.startswith("cuda") else None
        dist.init_process_group(backend, device_id=own)  # NCCL else guesses the GPU at the first barrier
    return World(rank, size, device)


def check_device(device: str) -> None:
    """Raise UserError for a device that this machine does not have."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device={device}: there is no such device; write cuda, cuda:1, cpu or mps")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device={device}: PyTorch finds no CUDA GPU here; train with --device=cpu --compile=False, or repair the driver"
        )
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device={device}: this machine has {torch.cuda.device_count()} CUDA GPU(s), counted from cuda:0"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device={device}: PyTorch finds no MPS device here; train with --device=cpu")


def share(steps: int, world: World) -> int:
    """The micro-steps of an iteration that each process runs. Raises UserError if they cannot be shared evenly."""
    if steps % world.size:
        near = max(1, round(steps / world.size)) * world.size
        raise UserError(
            f"--gradient_accumulation_steps={steps} cannot be shared by {world.size} processes; "
            f"the nearest multiple is {near}"
        )
    return steps // world.size


def wrap(model: Any, world: World) -> Any:
    """The model, in DDP if there are several processes."""
    if world.size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[world.device] if world.device.startswith("cuda") else None)


@contextmanager
def main_first(world: World) -> Iterator[None]:
    """Run the block in the main process first, then in the others: they find the files that it made."""
    if world.size > 1 and not world.is_main:
        dist.barrier()
    try:
        yield
    finally:  # also after an error: the others wait here, and then meet the same error
        if world.size > 1 and world.is_main:
            dist.barrier()


def mean(tensor: Tensor, world: World) -> Tensor:
    """The tensor's mean over all processes. Every process must call it."""
    if world.size > 1:
        dist.all_reduce(tensor)
        tensor /= world.size
    return tensor


def most(number: int, world: World) -> int:
    """The largest of all processes' numbers, an int. Every process must call it."""
    if world.size == 1:
        return number
    tensor = torch.tensor(number, device=world.device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def agree(find: Callable[[], Any], world: World) -> Any:
    """The main process's find(), on every process. Raises what find raises. Every process must call it."""
    if world.size == 1:
        return find()
    answer: list[Any] = [None, None]
    if world.is_main:
        try:
            answer[0] = find()
        except Exception as e:  # else the others would wait for an answer that never comes
            answer[1] = e
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def gather(thing: Any, world: World) -> list[Any] | None:
    """On the main process the list of all processes' things (picklable), by rank; None on the others. Every process must call it."""
    if world.size == 1:
        return [thing]
    things = [None] * world.size if world.is_main else None
    dist.gather_object(thing, things)
    return things


def finish(world: World) -> None:
    """Leave the process group. Nothing may hold DDP any more."""
    if dist.is_initialized():
        gc.collect()  # frees DDP, which holds the group: the group's threads must end before the process
        dist.destroy_process_group()
