"""The plain model with Liger-Kernel's LayerNorm and fused linear cross entropy, as its users put them in."""

import torch

from fastgpt.benchmarks.harness import importable
from fastgpt.benchmarks.peers import plain


class LayerNorm(plain.LayerNorm):
    """Liger's LayerNorm, which always takes a bias."""

    def __init__(self, *args):
        super().__init__(*args)
        self.norm = importable("liger_kernel.transformers.functional").liger_layer_norm

    def forward(self, x):
        bias = torch.zeros_like(self.weight) if self.bias is None else self.bias
        return self.norm(x, self.weight, bias, 1e-5)


class LigerGPT(plain.PlainGPT):
    """PlainGPT, loss only. Raises NotHere without Liger-Kernel."""

    def __init__(self, config):
        self.loss = importable("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
        super().__init__(config, loss_only=True, norm=LayerNorm)

    def head(self, h, targets):
        rows, weight = h.view(-1, h.size(-1)), self.lm_head.weight
        if torch.is_autocast_enabled(h.device.type):  # autocast does not reach into Liger's function
            dtype = torch.get_autocast_dtype(h.device.type)
            rows, weight = rows.to(dtype), weight.to(dtype)
        return None, self.loss(rows, weight, targets.view(-1), ignore_index=-1)
