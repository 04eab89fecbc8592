"""AdamW with clipping, for any model; nanoGPT's parameter groups and learning rate schedule."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.config import TrainConfig


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW, for any model, whose step also clips the gradients and writes the weights' shadows, by `ops.adamw`.

    params, lr, betas, eps, weight_decay and `options` are torch's; so are `state_dict`, schedulers and GradScaler. On a CUDA GPU the update
    is fused: of dense fp32 parameters by Triton's kernel, of others by PyTorch's (`kernels`, an `ops.Kernels` or a name, as for `ops`).

    `max_norm` is the global norm to clip to. None: `step` does not touch the gradients, like torch's. Infinity: it only measures.
    `grad_norm`, [] fp32, is the norm before clipping; a step with a max_norm sets it. Such a step changes nothing if the norm is not
    finite, or if `loss`, [] fp32 or None, is not. The device decides that: the host does not wait.

    `in_order` is the order of the parameters in which their norms are added up; other parameters come last. `sharded`: some parameters are
    DTensors, as FSDP makes them; then each process updates its own rows, and the norm is that of all processes' rows together.
    Raises ValueError for amsgrad, maximize, capturable and differentiable, which nanoGPT does not use, and for complex parameters.
    Source: Loshchilov and Hutter, arXiv 1711.05101.
    """

    grad_norm: Any = None
    loss: Tensor | None = None
    in_order: Sequence[Tensor] = ()

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, *, max_norm: float | None = None, kernels: ops.Kernels | str = ops.AUTO, **options: Any,
    ):  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay, **options)
        self.max_norm = max_norm
        self.kernels = ops.named(kernels)
        self.sharded = any(hasattr(p, "to_local") for group in self.param_groups for p in group["params"])
        if all(group["fused"] for group in self.param_groups):
            self._step_supports_amp_scaling = True  # GradScaler then leaves unscaling and skipping to `step`

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch's. It is fused if it does not say otherwise and all its parameters are on a CUDA GPU."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check(group)
        if group["fused"] is None and not group["foreach"]:
            group["fused"] = all(p.is_cuda and p.is_floating_point() for p in group["params"]) or None

    def __getstate__(self):
        """torch's, and what a copy needs to update as this one does."""
        return {
            **super().__getstate__(),
            **{name: getattr(self, name) for name in ("max_norm", "in_order", "kernels", "sharded")},
        }

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        """Update the parameters that have a gradient. Calls closure first, if given, and returns its result, else None."""
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
            check(group)  # once more: load_state_dict replaces groups
            params, grads, exp_avgs, exp_avg_sqs, steps = tensors = [[] for _ in range(5)]
            # Fills these lists, and makes the moments that do not exist yet.
            self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, [], steps)
            names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")
            shadows = [getattr(p, "shadow", None) for p in params]
            groups.append({**group, **dict(zip(names, tensors, strict=True)), "shadows": shadows})
        order = {id(p): i for i, p in enumerate(self.in_order)}  # a tensor's own hash is slow
        params = sorted((p for group in groups for p in group["params"]), key=lambda p: order.get(id(p), len(order)))
        grads, squares = [p.grad for p in params], None
        if self.sharded:
            for group in groups:
                for name in names[:4]:
                    group[name] = local(group[name])
            if self.max_norm is not None:
                squares = sum_of_squares(grads)
            grads = local(grads)
        # torch.amp.GradScaler sets these two on a fused optimizer, which must then unscale and skip.
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is not None:
            torch._foreach_div_(grads, scale)
        if grads:
            self.grad_norm = ops.adamw(groups, grads, self.max_norm, self.loss, found_inf, self.kernels, squares)
        return loss


def check(group: dict[str, Any]) -> None:
    """Raise ValueError if a parameter group asks for what this AdamW does not have."""
    if unknown := [k for k in ("amsgrad", "maximize", "capturable", "differentiable") if group[k]]:
        raise ValueError(f"this AdamW has no {unknown[0]}: take torch.optim.AdamW")
    if any(p.is_complex() for p in group["params"]):
        raise ValueError("this AdamW has no complex parameters: take torch.optim.AdamW")


def local(tensors: list[Tensor]) -> list[Tensor]:
    """This process's rows of sharded tensors; the other tensors as they are."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def sum_of_squares(grads: list[Tensor]) -> Tensor:
    """The sum of squares of gradients, [] fp32: of the sharded ones over all processes, of the others once. Every process must call it."""
    sharded = [hasattr(g, "to_local") for g in grads]
    parts = [local([g for g, s in zip(grads, sharded, strict=True) if s is which]) for which in (True, False)]
    # Summed up by itself: of a rank that has no row of any tensor too.
    mine, whole = (
        torch.stack(torch._foreach_norm(part)).square().sum() if part else grads[0].new_zeros(()) for part in parts
    )
    dist.all_reduce(mine)
    return mine + whole


def adamw(
    model: nn.Module, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str,
    kernels: ops.Kernels = ops.AUTO,
) -> AdamW:  # fmt: skip
    """AdamW (eps 1e-8) over nanoGPT's two groups; fused on CUDA. Prints the three lines that nanoGPT prints.

    Tensors of two or more dimensions (matmul weights and both embeddings) decay. Biases and LayerNorms do not.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in params if p.dim() >= 2]
    no_decay = [p for p in params if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    for kind, group in (("decayed", decay), ("non-decayed", no_decay)):
        print(f"num {kind} parameter tensors: {len(group)}, with {sum(p.numel() for p in group):,} parameters")
    fused = device_type == "cuda"
    optimizer = AdamW(groups, learning_rate, betas, kernels=kernels, **({"fused": True} if fused else {}))
    optimizer.in_order = params
    print(f"using fused AdamW: {fused}")
    return optimizer


def learning_rate(it: int, cfg: TrainConfig) -> float:
    """The learning rate of iteration `it` (from 0): linear warm-up, then a cosine down to min_lr; constant without decay_lr."""
    if not cfg.decay_lr:
        return cfg.learning_rate
    if it < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / (cfg.warmup_iters + 1)
    if it >= cfg.lr_decay_iters:
        return cfg.min_lr
    ratio = (it - cfg.warmup_iters) / (cfg.lr_decay_iters - cfg.warmup_iters)
    return cfg.min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (cfg.learning_rate - cfg.min_lr)
