"""One training step, from micro-batches to updated weights; and an evaluation."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastgpt import distributed, ops, optim
from fastgpt.data import Batches


def mixed_precision(device: str, dtype: str) -> tuple[torch.dtype, AbstractContextManager[Any], torch.amp.GradScaler]:
    """(the compute dtype, autocast, the loss's scaler) of training on a device, as nanoGPT has them. On CUDA it allows TF32."""
    if not device.startswith("cuda"):
        return torch.float32, nullcontext(), torch.amp.GradScaler("cuda", enabled=False)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    compute = getattr(torch, dtype)
    # Only float16 needs loss scaling: the other dtypes have fp32's range.
    return compute, torch.autocast("cuda", dtype=compute), torch.amp.GradScaler("cuda", enabled=dtype == "float16")


def train_step(
    model: Any, optimizer: optim.AdamW, scaler: torch.amp.GradScaler, batches: Batches, accumulation: int,
    autocast: AbstractContextManager, grad_clip: float, graphs: Callable | None = None,
    mean: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run `accumulation` micro-steps and one update: (mean loss of the micro-steps, global gradient norm before clipping).

    Both are fp32 scalars on the device: nothing here waits for the GPU. If one is not finite, the update changes nothing. `mean` makes of
    this process's loss the mean of all processes', which so decide alike.

    `batches.prefetch` must have started the next batch, before and after. model(x, y, return_logits=False) gives (None, loss). `scaler`
    is a torch.amp.GradScaler, enabled for float16 only. `optimizer` is an optim.AdamW. grad_clip 0 does not clip. `graphs`, a
    graphs.Graphs of `micro_step` on the model, runs the micro-steps in which DDP does not average gradients.
    """
    total: Any = 0.0
    for i in range(accumulation):
        x, y = batches.get()
        averages = distributed.averages(model, i == accumulation - 1)
        if graphs is None or averages:
            loss = micro_step(model, x, y, scaler, accumulation, autocast, not averages, batches.prefetch)
        else:
            loss = graphs(x, y, fresh=i == 0)
            batches.prefetch()
        total = total + loss
    distributed.average_whole(model)
    scaler.unscale_(optimizer)
    total = mean(total)
    optimizer.max_norm, optimizer.loss = grad_clip or float("inf"), total
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total, optimizer.grad_norm


def micro_step(
    model: Any, x: Tensor, y: Tensor, scaler: torch.amp.GradScaler, accumulation: int, autocast: AbstractContextManager,
    in_place: bool = True, then: Callable[[], Any] = lambda: None,
) -> Tensor:  # fmt: skip
    """Forward and backward: returns this micro-step's share of the mean loss, and adds its gradients to the weights' `.grad`.

    in_place: the backward may add to `.grad` itself; not if DDP averages the gradients. `then` is called between forward and
    backward, where nanoGPT draws the next batch: on the CPU the forward's dropout uses the same generator.
    """
    with autocast:
        _, loss = model(x, y, return_logits=False)
        loss = loss / accumulation
    then()
    with ops.accumulate_in_place() if in_place else nullcontext():
        scaler.scale(loss).backward()
    return loss.detach()


@torch.no_grad()
def evaluate(model: Any, batches: Iterable[tuple[Tensor, Tensor]], autocast: AbstractContextManager) -> float:
    """Mean loss of batches (x, y), with dropout off: a float; nan of none."""
    model.eval()
    losses = []
    for x, y in batches:
        with autocast:
            _, loss = model(x, y, return_logits=False)
        losses.append(loss.float())
    model.train()
    return torch.stack(losses).mean().item() if losses else float("nan")
