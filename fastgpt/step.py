"""One training step, from micro-batches to updated weights; and an evaluation."""

from contextlib import nullcontext

import torch

from fastgpt import ops


def train_step(model, optimizer, scaler, batches, accumulation, autocast, grad_clip, graphs=None):
    """Run `accumulation` micro-steps and one update: (mean loss of the micro-steps, global gradient norm before clipping).

    Both are fp32 scalars on the device: nothing here waits for the GPU. `batches.prefetch` must have started the next batch, before
    and after. model(x, y, return_logits=False) gives (None, loss). `scaler` is a torch.amp.GradScaler, enabled for float16 only.
    `optimizer` is an optim.AdamW. grad_clip 0 does not clip. `graphs`, a graphs.Graphs of `micro_step` on the model, runs the
    micro-steps in which DDP does not average gradients.
    """
    total = 0.0
    for i in range(accumulation):
        x, y = batches.get()
        last = i == accumulation - 1
        parallel = hasattr(model, "require_backward_grad_sync")
        if parallel:  # DDP averages in the last backward only; it reads this at the start of a forward
            model.require_backward_grad_sync = last
        averages = parallel and last
        if graphs is None or averages:
            loss = micro_step(model, x, y, scaler, accumulation, autocast, not averages, batches.prefetch)
        else:
            loss = graphs(x, y, fresh=i == 0)
            batches.prefetch()
        total = total + loss
    scaler.unscale_(optimizer)
    optimizer.max_norm = grad_clip or float("inf")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total, optimizer.grad_norm


def micro_step(model, x, y, scaler, accumulation, autocast, in_place=True, then=lambda: None):
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
def evaluate(model, batches, n, autocast):
    """Mean loss of n batches, with dropout off: a float."""
    model.eval()
    losses = []
    for x, y in batches.take(n):
        with autocast:
            _, loss = model(x, y, return_logits=False)
        losses.append(loss.float())
    model.train()
    return torch.stack(losses).mean().item()
