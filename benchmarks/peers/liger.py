"""The plain model with Liger-Kernel's LayerNorm and fused linear cross entropy, the latter in chunks of the fastest size."""

import types

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


def tuned_loss(rows):
    """Liger's loss of (h [N, C], weight, targets [N]) in chunks of at least `rows` rows, its weight's gradient summed in fp32.

    Liger has no argument for that: it takes the power of two from N C / V on, which at GPT-2's sizes makes 64 chunks. This is its own
    function, with another `triton.next_power_of_2`. Raises NotHere without Liger-Kernel.
    """
    liger = importable("liger_kernel.ops.fused_linear_cross_entropy")
    triton = types.SimpleNamespace(
        cdiv=liger.triton.cdiv, next_power_of_2=lambda n: max(rows, liger.triton.next_power_of_2(n))
    )
    theirs = liger.fused_linear_cross_entropy_forward
    forward = types.FunctionType(theirs.__code__, vars(liger) | {"triton": triton}, argdefs=theirs.__defaults__)

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h, weight, targets):
            found = forward(h, weight, targets, ignore_index=-1, accum_dtype=torch.float32)
            ctx.grads = found[-3:]  # of h, of weight, and of a bias that is not there
            return found[0]

        @staticmethod
        def backward(ctx, dloss):
            dh, dweight, _ = liger.fused_linear_cross_entropy_backward(dloss, *ctx.grads)
            return dh, dweight, None

    return torch.compiler.disable(Loss.apply)  # it waits for the GPU, and would break a graph in any case


class LigerGPT(plain.PlainGPT):
    """PlainGPT, loss only. Raises NotHere without Liger-Kernel."""

    def __init__(self, config):
        self.loss = tuned_loss(rows=16384)
        super().__init__(config, loss_only=True, norm=LayerNorm)

    def head(self, h, targets):
        rows, weight = h.view(-1, h.size(-1)), self.lm_head.weight
        if torch.is_autocast_enabled(h.device.type):  # autocast does not reach into Liger's function
            dtype = torch.get_autocast_dtype(h.device.type)
            rows, weight = rows.to(dtype), weight.to(dtype)
        return None, self.loss(rows, weight, targets.view(-1))
