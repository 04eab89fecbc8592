"""Shadow weights: the weights of a model's Linears in the compute dtype, kept beside the fp32 ones, so that no step casts them.

A shadow hangs on its weight, as `weight.shadow`. The kernels read it there (kernels/common.py, cast), and `optim.AdamW` writes it with the
weight. So a copy of a model has no shadow, nor has a weight that was put in another's place, nor a checkpoint.
"""

import torch
from torch import nn


class Shadows:
    """The shadows of a model's plain nn.Linear weights in a dtype of 16 bits, from now until `remove`.

    Whoever changes the weights by other means than `optim.AdamW` (load_state_dict, another optimizer) calls `refresh` before the next
    forward. Under DDP make them behind it, when all processes have the same weights.
    """

    def __init__(self, model, dtype):
        weights = {m.weight: None for m in model.modules() if type(m) is nn.Linear}  # a tied one once
        self.tensors = {w: torch.empty_like(w, dtype=dtype, requires_grad=False) for w in weights}
        self.refresh()

    @torch.no_grad()
    def refresh(self):
        """Make every shadow equal to its weight, and hang it there."""
        if self.tensors:
            torch._foreach_copy_(list(self.tensors.values()), list(self.tensors))
        for weight, shadow in self.tensors.items():
            weight.shadow = shadow

    def remove(self):
        """Take every shadow off its weight."""
        for weight in self.tensors:
            weight.shadow = None
