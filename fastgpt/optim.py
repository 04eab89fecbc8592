"""Parameter groups, AdamW with its clipping, and the schedule: nanoGPT's."""

import math

import torch

from fastgpt import ops


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW whose step can clip, by `ops.adamw`, and writes the shadows of weights that have one; its state is torch's.

    `max_norm` is the global norm to clip to (None: `step` leaves the gradients alone, as torch's does; infinity: it is measured),
    `grad_norm` what it was before, [] fp32, after such a step. `in_order` are the parameters as their norms are added up; others come
    behind. `kernels` are the ops.Kernels that it runs by. Raises ValueError for what nanoGPT's has no use for: amsgrad, maximize,
    capturable, differentiable.
    """

    max_norm = grad_norm = None
    in_order = ()
    kernels = ops.TORCH

    @torch.no_grad()
    def step(self, closure=None):
        """One update, of the parameters that have a gradient; closure's answer, which is called first, or None."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "an update cannot be captured in a CUDA graph: it reads addresses and its learning rate on the host"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = []
        for group in self.param_groups:
            if unknown := [k for k in ("amsgrad", "maximize", "capturable", "differentiable") if group[k]]:
                raise ValueError(f"this AdamW has no {unknown[0]}: take torch.optim.AdamW")
            params, grads, exp_avgs, exp_avg_sqs, steps = tensors = [[] for _ in range(5)]
            # Gathers them, and makes moments where there are none.
            self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, [], steps)
            names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")
            shadows = [getattr(p, "shadow", None) for p in params]
            groups.append({**group, **dict(zip(names, tensors, strict=True)), "shadows": shadows})
        order = {p: i for i, p in enumerate(self.in_order)}
        params = sorted((p for group in groups for p in group["params"]), key=lambda p: order.get(p, len(order)))
        grads = [p.grad for p in params]
        # Where torch.amp.GradScaler finds a fused optimizer, it leaves these two to it.
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is not None:
            torch._foreach_div_(grads, scale)
        if grads:
            self.grad_norm = ops.adamw(groups, grads, self.max_norm, found_inf, self.kernels)
        return loss


def adamw(model, weight_decay, learning_rate, betas, device_type, kernels=ops.TORCH):
    """AdamW (eps 1e-8) over nanoGPT's two groups; fused on CUDA. Prints the three lines that nanoGPT prints.

    Tensors of two and more dimensions (matmul weights and both embeddings) decay; biases and LayerNorms do not.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in params if p.dim() >= 2]
    no_decay = [p for p in params if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    for kind, group in (("decayed", decay), ("non-decayed", no_decay)):
        print(f"num {kind} parameter tensors: {len(group)}, with {sum(p.numel() for p in group):,} parameters")
    fused = device_type == "cuda"
    optimizer = AdamW(groups, lr=learning_rate, betas=betas, **({"fused": True} if fused else {}))
    optimizer.in_order, optimizer.kernels = params, kernels
    print(f"using fused AdamW: {fused}")
    return optimizer


def learning_rate(it, cfg):
    """The learning rate of iteration `it` (from 0): linear warm-up, then a cosine down to min_lr; constant without decay_lr."""
    if not cfg.decay_lr:
        return cfg.learning_rate
    if it < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / (cfg.warmup_iters + 1)
    if it >= cfg.lr_decay_iters:
        return cfg.min_lr
    ratio = (it - cfg.warmup_iters) / (cfg.lr_decay_iters - cfg.warmup_iters)
    return cfg.min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (cfg.learning_rate - cfg.min_lr)
