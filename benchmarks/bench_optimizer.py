"""The update: the global norm, clipping and AdamW over all of a GPT's parameters, against PyTorch's ways to do it."""

import functools
from dataclasses import replace

import torch

from fastgpt import ops, optim, verify
from fastgpt.benchmarks import roofline
from fastgpt.benchmarks.harness import CUDA, DEVICE, Op, needs_gpu
from fastgpt.config import GPTConfig, preset
from fastgpt.model import GPT
from fastgpt.verify import Shape

LR, BETAS, DECAY, CLIP = 6e-4, (0.9, 0.95), 0.1, 1.0


def model_of(shape):
    """The GPT of a width, on no device: GPT-2's of 768 and 1600, and a toy."""
    layers = {768: 12, 1600: 48}.get(shape.n_embd, 2)
    with torch.device("meta"):
        return GPT(GPTConfig(shape.T, shape.vocab_size, layers, shape.n_head, shape.n_embd, bias=False))


class Update(Op):
    """The Op, whose providers take parameters that have gradients and give a function that updates them in place."""

    def __init__(self, *shapes, toy):
        super().__init__("optimizer", shapes, toy, baseline="fused", inductor=False, directions=("update",))
        self.providers, self.graph = {}, False  # PyTorch's count their steps on the host
        self.cases = [replace(c, dtype=torch.float32) for c in self.cases]

    def parameters(self, shape):
        """New parameters with gradients, the same each time."""
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(p.shape, device=DEVICE)) for p in model_of(shape).parameters()]
        for p in parameters:
            p.grad = torch.randn_like(p)
        return parameters

    def calls(self, case, provider):
        update = self.providers[provider](self.parameters(case.shape))
        return [update], update

    def check_whole(self, case):
        return lambda update: None  # elements are alone: `check` has them all

    def parts(self, case):
        n = sum(p.numel() for p in model_of(case.shape).parameters())
        return roofline.optimizer(n, shadow=0)

    def check(self, case, provider):
        """Three updates, by new gradients each time, against PyTorch's simplest AdamW in fp32 and in fp64."""
        toy = Shape(1, 64, 64, 2, 256)
        found, same = self.parameters(toy), self.parameters(toy)
        exact = [torch.nn.Parameter(p.detach().double()) for p in found]
        updates = self.providers[provider](found), torch_update(same, foreach=False), torch_update(exact, foreach=False)
        for seed in range(3):
            torch.manual_seed(seed)
            for tensors in zip(found, same, exact, strict=True):
                gradient = torch.randn_like(tensors[0])
                for p in tensors:
                    p.grad = gradient.to(p.dtype, copy=True)
            for update in updates:
                update()
        for i, tensors in enumerate(zip(found, same, exact, strict=True)):
            c = verify.compared("update", f"parameter {i}", *(t.detach() for t in tensors))
            if not c.holds:
                raise ArithmeticError(f"not equal: {c.what} has {c.ratio:.1f} times PyTorch's error")


def torch_update(parameters, **how):
    """clip_grad_norm_ and torch.optim.AdamW."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return clipped(torch.optim.AdamW(groups, lr=LR, betas=BETAS, **how), parameters)


def clipped(optimizer, parameters):
    def update():
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()

    return update


update = Update(Shape(1, 1024, 768, 12, 50304), toy=Shape(1, 64, preset("tiny")["n_embd"], 2, 256))
update.provider("fused")(functools.partial(torch_update, fused=True))
update.provider("foreach")(functools.partial(torch_update, foreach=True))


@update.provider("inductor")
def inductor(parameters):
    needs_gpu("a compiled optimizer")
    return torch.compile(torch_update(parameters))


@update.provider("fastgpt")
def fastgpt(parameters):
    """As the trainer does where `--kernels` has adamw=triton; without a GPU PyTorch's runs."""
    optimizer = optim.adamw(torch.nn.ParameterList(parameters), DECAY, LR, BETAS, DEVICE)
    optimizer.max_norm = CLIP
    ops.use({"adamw": "triton" if CUDA else "torch"})
    return optimizer.step


test_optimizer = update.benchmark()
