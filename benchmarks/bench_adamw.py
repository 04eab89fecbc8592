"""The update: the global norm, clipping and AdamW over all of a GPT's parameters, against PyTorch's ways to do it."""

import functools

import torch

from fastgpt import choose, ops, optim, records
from fastgpt.benchmarks.harness import CUDA, DEVICE, Op, needs_gpu
from fastgpt.config import GPTConfig
from fastgpt.model import GPT
from fastgpt.records import Shape

LR, BETAS, DECAY, CLIP = 6e-4, (0.9, 0.95), 0.1, 1.0
LAYERS = {768: 12}  # GPT-2's, by width; a toy has 2
SHAPES, TOY = [Shape(1, 1024, 768, 12, 50304, bias=False)], Shape(1, 64, 64, 2, 256, bias=False)
KERNELS = ops.Kernels(adamw="triton" if CUDA else "torch")


class Update(Op):
    """The Op. Its providers take parameters that have gradients, and give a function that updates them in place."""

    directions, how = ("update",), "queue"  # PyTorch's optimizers count their steps on the host, which no graph holds

    def check(self, name):
        """Hold the kernel to PyTorch on an embedding's weight and a bias; the other providers are PyTorch's."""
        if name == "fastgpt":
            it = self.problem(TOY, torch.float32, DEVICE)
            choose.check(it, functools.partial(it.by_ops, kernels=KERNELS))

    def make(self, name):
        """One call: all parameters of a GPT do not fit into L2."""
        s = self.case.shape
        with torch.device("meta"):
            model = GPT(GPTConfig(s.T, s.vocab_size, LAYERS.get(s.n_embd, 2), s.n_head, s.n_embd, bias=s.bias))
        parameters = [torch.nn.Parameter(torch.randn(p.shape, device=DEVICE)) for p in model.parameters()]
        for p in parameters:
            p.grad = torch.randn_like(p)
        self.calls[name] = [self.providers[name](parameters)]


def parts(shape, itemsize):
    return records.update_parts(records.n_params(shape, LAYERS.get(shape.n_embd, 2)), shadow=0)


def torch_update(parameters, **how):
    """clip_grad_norm_ and torch.optim.AdamW."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, **how)

    def update():
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()

    return update


adamw = Update("adamw", SHAPES, TOY, baseline="fused", inductor=False, parts=parts)
adamw.provider("fused")(functools.partial(torch_update, fused=True))
adamw.provider("foreach")(functools.partial(torch_update, foreach=True))


@adamw.provider("inductor")
def inductor(parameters):
    needs_gpu("a compiled optimizer")
    return torch.compile(torch_update(parameters))


@adamw.provider("fastgpt")
def fastgpt(parameters):
    """As the trainer does where `--kernels` has adamw=triton. Without a GPU PyTorch's runs."""
    optimizer = optim.adamw(torch.nn.ParameterList(parameters), DECAY, LR, BETAS, DEVICE, KERNELS)
    optimizer.max_norm = CLIP
    return optimizer.step


test_adamw = adamw.benchmark()
