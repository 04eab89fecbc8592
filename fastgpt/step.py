"""One optimizer step, from micro-batches to updated weights; and an evaluation."""

import torch


def train_step(model, optimizer, scaler, batches, accumulation, autocast, grad_clip):
    """Run `accumulation` micro-steps and one update: (mean loss of the micro-steps, global gradient norm before clipping).

    Both are fp32 scalars on the device: nothing here waits for the GPU. `batches` has its next batch under way, and
    is left so. model(x, y, return_logits=False) gives (None, loss); `scaler` is a torch.amp.GradScaler, enabled for
    float16 only; `optimizer` is an optim.AdamW; grad_clip 0 clips nothing.
    """
    total = 0.0
    for micro_step in range(accumulation):
        x, y = batches.get()
        if hasattr(
            model, "require_backward_grad_sync"
        ):  # DDP: average in the last backward only; read when a forward begins
            model.require_backward_grad_sync = micro_step == accumulation - 1
        with autocast:
            _, loss = model(x, y, return_logits=False)
            loss = loss / accumulation
        batches.prefetch()  # here, as nanoGPT draws it: after the forward, whose dropout shares the generator on the CPU
        total = total + loss.detach()
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    optimizer.max_norm = grad_clip or float("inf")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total, optimizer.grad_norm


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
