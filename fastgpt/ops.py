"""One function per hot path, and the one place that decides which implementation runs.

`use("torch")`, the default, runs every op's plain-PyTorch twin; `use("triton")` runs the kernels of those ops that have
one; `use("layer_norm=triton")` chooses by op. A kernel that cannot take its input (another device or GPU, too wide a row)
leaves it to the twin, with one warning. The model calls these functions and knows nothing of what is behind them.
"""

import difflib
import functools
import importlib
import warnings

import torch

from fastgpt import reference
from fastgpt.config import UserError
from fastgpt.reference import EPS, attention, cross_entropy, embedding, gelu_mlp, linear_cross_entropy

__all__ = [
    "add_layer_norm",
    "attention",
    "cross_entropy",
    "embedding",
    "gelu_mlp",
    "layer_norm",
    "linear_cross_entropy",
    "use",
]

KERNELS = {"layer_norm": "fastgpt.kernels.layer_norm"}  # the ops that have kernels, and where
chosen = {}  # op -> its kernels' module, where they are to run


def use(spec):
    """Choose implementations: "torch", "triton", or a list such as "layer_norm=triton". Raises UserError."""
    picks = (
        dict.fromkeys(KERNELS, spec) if "=" not in spec else dict(part.partition("=")[::2] for part in spec.split(","))
    )
    for op, implementation in picks.items():
        for name, known in ((op, list(KERNELS)), (implementation, ["torch", "triton"])):
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
                raise UserError(f"--kernels={spec}: {name!r} is none of {', '.join(known)}; the nearest is {near!r}")
    chosen.clear()
    for op, implementation in picks.items():
        if implementation == "triton":
            try:
                chosen[op] = importlib.import_module(KERNELS[op])
            except ImportError:
                raise UserError(
                    f"--kernels={spec}: Triton is not installed; pip install triton, or --kernels=torch"
                ) from None


@functools.cache
def warn_once(message):
    warnings.warn(message, stacklevel=3)


def layer_norm_kernels(x):
    """The LayerNorm kernels, where they were chosen and can take x; else None."""
    kernels = chosen.get("layer_norm")
    if kernels is None or kernels.takes(x):
        return kernels
    warn_once(f"layer_norm: no kernel for rows of {x.size(-1)} on this {x.device.type} device; PyTorch's runs instead")
    return None


def layer_norm(x, weight, bias=None, eps=EPS):
    """See `reference.layer_norm`."""
    return (layer_norm_kernels(x) or reference).layer_norm(x, weight, bias, eps)


def add_layer_norm(x, branch, weight, bias=None, eps=EPS, dropout_p=0.0):
    """See `reference.add_layer_norm`."""
    kernels = layer_norm_kernels(x)
    if kernels is None:
        return reference.add_layer_norm(x, branch, weight, bias, eps, dropout_p)
    seed = torch.randint(2**63 - 1, (1,), device=x.device) if dropout_p > 0 else None
    return kernels.add_layer_norm(x, branch, weight, bias, eps, dropout_p, seed)
