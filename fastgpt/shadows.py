"""Shadow weights: copies of the Linears' fp32 weights in the compute dtype, so that no step casts them.

A shadow is an attribute of its weight, `weight.shadow`. The kernels read it (kernels/common.py, cast), and `optim.AdamW` writes it
together with the weight. A copied model, a replaced weight and a state_dict have no shadow. A model that is pickled as a whole takes its
shadows along: `remove` them first.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import ops


class Shadows:
    """The shadows of a model's nn.Linear weights (not of subclasses) in a 16-bit dtype, from now until `remove`.

    Code that changes the weights without `optim.AdamW` (load_state_dict, another optimizer) must call `refresh` before the next
    forward. With DDP make the shadows after it: only then all processes have the same weights. Make them before the first forward of a
    compiled model: torch.compile of torch 2.11 does not see an attribute that comes later.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        weights = {m.weight: None for m in model.modules() if type(m) is nn.Linear}  # a dict: a tied weight counts once
        self.tensors: dict[Any, Tensor] = {w: torch.empty_like(w, dtype=dtype, requires_grad=False) for w in weights}
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy every weight to its shadow, and set `weight.shadow`."""
        if self.tensors:
            torch._foreach_copy_(list(self.tensors.values()), list(self.tensors))
        for weight, shadow in self.tensors.items():
            weight.shadow = shadow

    def remove(self) -> None:
        """Set `weight.shadow` to None for every weight."""
        for weight in self.tensors:
            weight.shadow = None


def shadow_dtype(kernels: ops.Kernels, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of the shadow weights for an ops.Kernels and a compute dtype; None if no kernel would read them."""
    reads = "triton" in (kernels.linear, kernels.gelu_mlp, kernels.linear_cross_entropy)
    return dtype if reads and dtype != torch.float32 else None
