"""torch.distributed under torchrun: data parallel by DDP or FSDP2, one process for each GPU.

A run on several processes can go wrong in ways that one process cannot: a rank never comes, a rank has other settings or data, a rank
is lost on the way. Each of these is one line, and an end.
"""

import gc
import os
import re
import secrets
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import repeat
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
    sharded: bool = False  # each process keeps a part of the model, by FSDP; a forward then needs all processes

    @property
    def is_main(self) -> bool:
        """Whether this process logs, and says what all draw and save."""
        return self.rank == 0

    @property
    def takes_part(self) -> bool:
        """Whether this process takes part in evaluations and saves."""
        return self.is_main or self.sharded


class PeerLost(UserError):
    """Another process ended, or did not answer in time. The status is 1: torchrun then starts all again, if it may."""

    status = 1


def init(device: str, backend: str, parallel: str = "ddp", join_timeout: int = 300, timeout: int = 600) -> World:
    """Join torchrun's process group if there is one, and return the World. Raises UserError for an unusable device or backend, and where
    a process does not come within join_timeout seconds. No operation among processes may take more than `timeout` seconds then.
    """
    several = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()
    rank, size = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if several else (0, 1)
    if several and device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    check_device(device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if several:
        backend = "gloo" if backend == "nccl" and device == "cpu" else backend
        if not dist.is_backend_available(backend):
            raise UserError(
                f"--backend={backend}: this PyTorch has no such backend; write nccl on GPUs, gloo elsewhere"
            )
        own = torch.device(device) if device.startswith("cuda") else None
        store, limit = join(rank, size, join_timeout), timedelta(seconds=timeout)
        try:  # without a device_id NCCL guesses the GPU at the first barrier
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit, device_id=own)
        except (RuntimeError, ValueError) as e:
            raise PeerLost(f"--backend={backend}: the processes cannot connect ({reason(e)})") from None
    return World(rank, size, device, sharded=size > 1 and parallel == "fsdp")


def join(rank: int, size: int, seconds: int) -> dist.Store:
    """Wait until all processes are here: the store that they share. Raises PeerLost, which names those that did not come."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise UserError(
            "RANK and WORLD_SIZE are set, but MASTER_ADDR and MASTER_PORT are not: torchrun sets all four; start the run by it"
        )
    limit = timedelta(seconds=seconds)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun itself keeps the store
    try:
        store: dist.Store = dist.TCPStore(
            host, int(port), is_master=rank == 0 and not agent, timeout=limit, wait_for_workers=False
        )
    except RuntimeError as e:
        raise PeerLost(f"no rank 0 answers at {host}:{port} within --join_timeout={seconds} s ({reason(e)})") from None
    # torchrun's store outlives the processes, and what an earlier start wrote is still there. TORCHELASTIC_RESTART_COUNT names no start:
    # a node whose workers were well is started again without counting it. So rank 0 names the start, and answers each rank's own word.
    word, end, names = secrets.token_hex(8), time.monotonic() + seconds, ["fastgpt start"]
    try:
        if rank == 0:
            store.set("fastgpt start", word)
        while time.monotonic() < end:
            if store.check(["fastgpt start"]):
                start = f"fastgpt {store.get('fastgpt start').decode()}"
                names, answer = [f"{start} joined {r}" for r in range(size)], f"{start} all"
                store.set(names[rank], word)
                if rank == 0 and store.check(names):
                    store.set(answer, " ".join(store.get(name).decode() for name in names))
                if store.check([answer]) and word in store.get(answer).decode().split():
                    return dist.PrefixStore(start, store)
            time.sleep(0.05)
        late = [r for r, name in enumerate(names) if not store.check([name])] or [0]
    except RuntimeError as e:  # the store's own process is gone
        raise PeerLost(f"rank 0 left before all ranks had joined ({reason(e)})") from None
    raise PeerLost(
        f"{ranks(late)} of {size} did not join within --join_timeout={seconds} s; what they printed says why"
    )


def ranks(some: list[int]) -> str:
    """Ranks as text: "rank 3", "ranks 1, 2 and 5"; of many the first few."""
    if len(some) == 1:
        return f"rank {some[0]}"
    if len(some) > 8:
        return f"ranks {', '.join(map(str, some[:6]))} and {len(some) - 6} more"
    return f"ranks {', '.join(map(str, some[:-1]))} and {some[-1]}"


def lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone or does not answer. gloo's are RuntimeErrors, known by their text."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def reason(error: BaseException) -> str:
    """The first sentence of an error, without the place in PyTorch's sources where it was raised."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[[^\]]*\]\s*", "", lines[0]).split(". ")[0].rstrip(".")


def peer_lost(error: BaseException, timeout: int) -> PeerLost:
    """The PeerLost of an error that is `lost`."""
    return PeerLost(
        f"a peer is lost or did not answer within --timeout={timeout} s ({reason(error)}); "
        "the run can go on from its last checkpoint with --init_from=auto"
    )


@contextmanager
def agreement(world: World) -> Iterator[dict[str, Any]]:
    """A block that every process runs, and that fills a dict {what it is: a value} in which all must agree.

    Raises UserError on the main process where the block fails in any process, or where the dicts differ: it names the value and the ranks.
    The other processes then exit without a word, with the same status. The block may take part in collectives only where no process fails.
    """
    facts: dict[str, Any] = {}
    failure = None
    try:
        yield facts
    except Exception as e:
        if world.size == 1 or lost(e):
            raise
        failure = e
    if world.size == 1:
        return
    told: list[Any] = [None] * world.size
    dist.all_gather_object(told, (None if failure is None else str(failure) or type(failure).__name__, facts))
    if failure is not None and not isinstance(failure, UserError):
        raise failure  # a fault of ours, with its traceback
    problem = next((f"rank {r}: " * (r > 0) + why for r, (why, _) in enumerate(told) if why is not None), "")
    if not problem and (different := differences([facts for _, facts in told])):
        problem = f"the processes do not agree: {'; '.join(different)}; start all of them alike"
    if problem:
        raise UserError(problem) if world.is_main else SystemExit(UserError.status)


def differences(facts: list[dict[str, Any]]) -> list[str]:
    """What is not the same in all dicts, as text: a line for each name, with each value and the ranks that have it."""
    found = []
    for name in dict.fromkeys(name for of_rank in facts for name in of_rank):
        having: dict[str, list[int]] = {}
        for rank, of_rank in enumerate(facts):
            having.setdefault(str(of_rank.get(name)), []).append(rank)
        if len(having) > 1:
            found.append(f"{name} is " + ", ".join(f"{value} on {ranks(some)}" for value, some in having.items()))
    return found


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
            f"--device={device}: PyTorch finds no CUDA GPU here; give --device=cpu (in training --compile=False too, where there is "
            "no C++ compiler), or repair the driver"
        )
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device={device}: this machine has {torch.cuda.device_count()} CUDA GPU(s), counted from cuda:0"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device={device}: PyTorch finds no MPS device here; give --device=cpu")


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


def shard(model: Any, world: World, dtype: torch.dtype, compiled: bool = False, accumulates: bool = False) -> Any:
    """Shard a GPT by FSDP2, in place, and return it: of each weight a process keeps its rows, and of the gradients and moments too.

    A block is one group: its weights are gathered in `dtype` before its forward and its backward. The embeddings are another, in fp32,
    since nanoGPT looks them up in fp32. LayerNorms and biases stay whole: kernels read them in fp32, and they are small. The residual
    stream keeps its dtype. compiled: each block runs under torch.compile. accumulates: an iteration has several micro-steps, and the
    weights stay gathered from the first to the last.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # A block returns views. FSDP warns that a write into one would lose its hook; nothing writes into the stream.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for p in model.parameters():  # each process has drawn its own
        dist.broadcast(p.data, 0)
    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    whole = {p for p in model.parameters() if p.dim() < 2}
    low = dict(param_dtype=dtype, reduce_dtype=torch.float32) if dtype != torch.float32 else {}
    policy: Any = MixedPrecisionPolicy(**low, cast_forward_inputs=False)
    for block in model.transformer.h:
        if compiled:
            block.step = torch.compile(block.step, dynamic=False)
        fully_shard(block, mesh=mesh, ignored_params=whole, mp_policy=policy, reshard_after_forward=not accumulates)
        register_fsdp_forward_method(block, "step")  # the model calls it in place of forward
    fully_shard(model, mesh=mesh, ignored_params=whole)
    if dist.get_backend() == "gloo":  # it has no mean
        model.set_force_sum_reduction_for_comms(True)
    return model


def averages(model: Any, last: bool) -> bool:
    """Whether a micro-step's gradients are averaged over all processes: in the last of an iteration, if DDP or FSDP has the model.

    It tells them so: call it before each forward.
    """
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
    elif hasattr(model, "require_backward_grad_sync"):  # DDP, which reads it at the start of a forward
        model.require_backward_grad_sync = last
    else:
        return False
    return last


def average_whole(model: Any) -> None:
    """Average the gradients of the parameters that FSDP leaves whole, all in one message. Without FSDP nothing is to be done."""
    if not hasattr(model, "set_requires_gradient_sync"):
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None and not hasattr(p, "to_local")]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    torch._foreach_copy_(
        grads, [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads, strict=True)]
    )


class Shown:
    """Batches whose `take` gives every process what the main process draws. Every process must take."""

    def __init__(self, batches: Any, world: World):
        self.batches, self.world = batches, world

    def take(self, n: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield n batches."""
        b = self.batches
        for batch in b.take(n) if self.world.is_main else repeat(None, n):
            shape = 2, b.batch_size, b.block_size
            xy = torch.stack(batch) if batch else torch.empty(shape, dtype=torch.int64, device=self.world.device)
            dist.broadcast(xy, 0)
            x, y = xy.unbind()
            yield x, y


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
