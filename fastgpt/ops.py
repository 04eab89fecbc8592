"""One function per hot path, and the one place that decides which implementation runs.

Each op has its plain-PyTorch twin, "torch", and its Triton kernels, "triton"; attention has PyTorch's cuDNN backend too.
`use` chooses by op; `choose.choose` measures which is fastest. A kernel that cannot take its input (another device or GPU,
a wider row) leaves it to the twin, with one warning. The model calls these functions and knows nothing of what is
behind them.
"""

import difflib
import functools
import importlib
import warnings
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fastgpt import reference
from fastgpt.config import UserError
from fastgpt.reference import EPS, cross_entropy

__all__ = [
    "adamw",
    "add_layer_norm",
    "attention",
    "cross_entropy",
    "embedding",
    "gelu_mlp",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "use",
]

KERNELS = {  # the ops, and where their kernels are
    "embedding": "fastgpt.kernels.embedding",
    "layer_norm": "fastgpt.kernels.layer_norm",
    "linear": "fastgpt.kernels.linear",
    "attention": "fastgpt.kernels.flash_attention",
    "gelu_mlp": "fastgpt.kernels.gelu_mlp",
    "linear_cross_entropy": "fastgpt.kernels.cross_entropy",
    "adamw": "fastgpt.kernels.adamw",
}
IMPLEMENTATIONS = {op: ["torch", "triton"] + ["cudnn"] * (op == "attention") for op in KERNELS}
chosen = dict.fromkeys(KERNELS, "torch")
FALLS_BACK = ".*PyTorch's runs instead"  # how the warning ends that an implementation cannot take its input
loaded = {}  # op -> the module of its kernels, once it was asked for


def parse(spec):
    """{op: implementation} of --kernels: one word for all, or a list such as "attention=torch,layer_norm=triton".

    "auto" stands for what a list leaves open. Raises UserError.
    """
    if "=" not in spec:
        picks = dict.fromkeys(KERNELS, spec)
    else:
        picks = dict(part.strip().partition("=")[::2] for part in spec.split(","))
    for op, implementation in picks.items():
        words = ["auto", "triton", "torch"] if "=" not in spec else ["auto", *IMPLEMENTATIONS.get(op, [])]
        for name, known in ((op, list(KERNELS)), (implementation, words)):
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
                raise UserError(f"--kernels={spec}: {name!r} is none of {', '.join(known)}; the nearest is {near!r}")
    return dict.fromkeys(KERNELS, "auto") | picks


def use(picks):
    """Run these implementations from now on: {op: "torch", "triton" or "cudnn"}, or as `parse` reads it; what is left to "auto"
    stays as it is. Raises UserError."""
    picks = parse(picks) if isinstance(picks, str) else picks
    picks = {op: implementation for op, implementation in picks.items() if implementation != "auto"}
    for op, implementation in picks.items():
        if implementation not in IMPLEMENTATIONS.get(op, ()):
            raise UserError(f"kernels: there is no {implementation!r} of {op!r}")
    if "triton" in picks.values():
        try:
            for op in KERNELS:
                kernels(op)
        except ImportError:
            raise UserError("--kernels: Triton is not installed; pip install triton, or --kernels=torch") from None
    chosen.update(picks)


def kernels(op):
    """The module of an op's kernels. Raises ImportError without Triton."""
    loaded[op] = importlib.import_module(KERNELS[op])
    return loaded[op]


def configs():
    """The module of the kernels' launch configurations."""
    return importlib.import_module("fastgpt.kernels.configs")


def interpreter_computes_bf16():
    """Whether Triton's interpreter does, mended where it can be: see kernels/interpreter.py."""
    return importlib.import_module("fastgpt.kernels.interpreter").computes_bf16()


@functools.cache
def warn_once(op, implementation, device, dtype, size):
    hint = " (without a GPU, kernels run where TRITON_INTERPRET=1 is set)" if device == "cpu" else ""
    warnings.warn(
        f"{op}: {implementation} does not take {dtype} rows of {size} on this {device} device{hint}; PyTorch's runs instead",
        stacklevel=4,
    )


@contextmanager
def adding_in_place():
    """Within it a backward that runs eagerly may add a weight's gradient to its .grad in the GEMM that makes it.

    It is for a `loss.backward()` that is for all weights, and where nobody but they waits for gradients: DDP's hooks, say, would be
    called without one.
    """
    common = importlib.import_module("fastgpt.kernels.common") if loaded else None
    if common is None:
        yield
        return
    before, common.adding = common.adding, True
    try:
        yield
    finally:
        common.adding = before


def triton_for(op, x, *args):
    """The op's kernels, where they were chosen and can take x; else None."""
    if chosen[op] != "triton":
        return None
    if loaded[op].takes(x, *args):
        return loaded[op]
    warn_once(op, "triton", x.device.type, str(x.dtype)[6:], x.size(-1) if x.dim() else 1)
    return None


def draw_seed(x, dropout_p):
    """A seed for a kernel's dropout, drawn on x's device: no host waits for it, and torch.manual_seed decides it."""
    return torch.randint(2**63 - 1, (1,), device=x.device) if dropout_p > 0 else None


def embedding(idx, wte, wpe, dropout_p=0.0, dtype=None):
    """See `reference.embedding`."""
    if triton := triton_for("embedding", wte, wpe):
        return triton.embedding(idx, wte, wpe, dropout_p, draw_seed(wte, dropout_p), dtype)
    return reference.embedding(idx, wte, wpe, dropout_p, dtype)


def layer_norm(x, weight, bias=None, eps=EPS):
    """See `reference.layer_norm`."""
    return (triton_for("layer_norm", x) or reference).layer_norm(x, weight, bias, eps)


def add_layer_norm(x, branch, weight, bias=None, eps=EPS, dropout_p=0.0):
    """See `reference.add_layer_norm`."""
    if triton := triton_for("layer_norm", x, branch):
        seed = None if branch is None else draw_seed(x, dropout_p)
        return triton.add_layer_norm(x, branch, weight, bias, eps, dropout_p, seed)
    return reference.add_layer_norm(x, branch, weight, bias, eps, dropout_p)


def attention(qkv, n_head, dropout_p=0.0, cache=None, doc_ids=None):
    """See `reference.attention`. With a cache, in generation, PyTorch's runs."""
    if cache is None:
        if triton := triton_for("attention", qkv, n_head):
            return triton.flash_attention(qkv, n_head, dropout_p, draw_seed(qkv, dropout_p), doc_ids)
        if chosen["attention"] == "cudnn":
            if qkv.is_cuda and doc_ids is None:
                with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                    return reference.attention(qkv, n_head, dropout_p)
            size = f"{qkv.size(-1)}" + " within documents" * (doc_ids is not None)
            warn_once("attention", "cudnn", qkv.device.type, str(qkv.dtype)[6:], size)
    return reference.attention(qkv, n_head, dropout_p, cache, doc_ids)


def linear(x, weight, bias=None, shadow=None):
    """See `reference.linear`. shadow is the weight in the compute dtype, where one is kept: kernels then need not cast it."""
    if triton := triton_for("linear", x):
        return triton.linear(x, weight, bias, shadow)
    return reference.linear(x, weight, bias)


def gelu_mlp(h, w_fc, b_fc, w_proj, b_proj, recompute=False, shadows=(None, None)):
    """See `reference.gelu_mlp`. shadows are w_fc and w_proj in the compute dtype, where they are kept; recompute keeps the activation
    for the backward no longer than it is used, and PyTorch's twin then not even the pre-activation."""
    if triton := triton_for("gelu_mlp", h):
        return triton.gelu_mlp(h, w_fc, b_fc, w_proj, b_proj, recompute, shadows)
    if recompute and torch.is_grad_enabled():
        return checkpoint(
            reference.gelu_mlp, h, w_fc, b_fc, w_proj, b_proj, use_reentrant=False, preserve_rng_state=False
        )
    return reference.gelu_mlp(h, w_fc, b_fc, w_proj, b_proj)


def linear_cross_entropy(h, weight, targets, ignore_index=-1, shadow=None):
    """See `reference.linear_cross_entropy`. shadow is the weight in the compute dtype, where one is kept."""
    if triton := triton_for("linear_cross_entropy", h):
        return triton.linear_cross_entropy(h, weight, targets, ignore_index, shadow)
    return reference.linear_cross_entropy(h, weight, targets, ignore_index)


def adamw(groups, grads, max_norm=None, found_inf=None):
    """See `reference.adamw`."""
    first = next(p for group in groups for p in group["params"])
    return (triton_for("adamw", first, groups) or reference).adamw(groups, grads, max_norm, found_inf)
