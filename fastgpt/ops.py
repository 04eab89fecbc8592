"""One function for each hot path. It decides which implementation of the op runs.

Each op has a plain PyTorch implementation, "torch" (`reference`), and Triton kernels, "triton". Attention also has PyTorch's cuDNN
backend, "cudnn". Every op gets a `Kernels` value, which alone says what runs. If a kernel cannot take its input (wrong device or GPU,
too wide a row), PyTorch's implementation runs instead, and one warning says so.
"""

import difflib
import functools
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fastgpt import reference
from fastgpt.config import UserError
from fastgpt.reference import EPS, cross_entropy

try:
    from fastgpt import kernels as triton
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] != "triton":
        raise
    triton = None  # type: ignore[assignment] # not installed: everything runs on PyTorch

__all__ = [
    "OPS",
    "TORCH",
    "Kernels",
    "adamw",
    "add_layer_norm",
    "attention",
    "attention_qkv",
    "cross_entropy",
    "embedding",
    "gelu_mlp",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
]


@dataclass(frozen=True)
class Kernels:
    """Which implementation runs each op: "torch" or "triton", for attention also "cudnn".

    rows: launch configurations that `fastgpt tune` found, pairs of an op and a row's text (kernels/configs.py). The other ops use the
    shipped tables. Raises UserError for an unknown implementation, and for "triton" if Triton is not installed.
    """

    embedding: str = "torch"
    layer_norm: str = "torch"
    linear: str = "torch"
    attention: str = "torch"
    gelu_mlp: str = "torch"
    linear_cross_entropy: str = "torch"
    adamw: str = "torch"
    rows: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        for op in OPS:
            if getattr(self, op) not in IMPLEMENTATIONS[op]:
                raise UserError(f"kernels: there is no {getattr(self, op)!r} of {op!r}")
            if getattr(self, op) == "triton" and triton is None:
                raise UserError("--kernels: Triton is not installed; pip install triton, or --kernels=torch")

    def row(self, op: str) -> str:
        """The text of an op's launch configuration; "" means the table's row."""
        return dict(self.rows).get(op, "") if self.rows else ""


OPS = tuple(f.name for f in fields(Kernels) if f.name != "rows")
IMPLEMENTATIONS = {op: ("torch", "triton", "cudnn") if op == "attention" else ("torch", "triton") for op in OPS}
TORCH = Kernels()
FALLS_BACK = ".*PyTorch's runs instead"  # matches `warn_once`'s warning


def all_triton() -> Kernels:
    """The Kernels with "triton" for every op. Raises UserError if Triton is not installed."""
    return Kernels(**dict.fromkeys(OPS, "triton"), rows=())


def parse(spec: str) -> dict[str, str]:
    """{op: implementation} of --kernels: one word for all, or a list such as "attention=torch,layer_norm=triton".

    An op that a list does not name is "auto". Raises UserError for an unknown op or implementation.
    """
    if "=" not in spec:
        picks = dict.fromkeys(OPS, spec)
    else:
        picks = dict(part.strip().partition("=")[::2] for part in spec.split(","))
    for op, implementation in picks.items():
        words = ["auto", "triton", "torch"] if "=" not in spec else ["auto", *IMPLEMENTATIONS.get(op, [])]
        for name, known in ((op, list(OPS)), (implementation, words)):
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
                raise UserError(f"--kernels={spec}: {name!r} is none of {', '.join(known)}; the nearest is {near!r}")
    return dict.fromkeys(OPS, "auto") | picks


@functools.cache
def warn_once(op: str, implementation: str, device: str, dtype: str, size: str) -> None:
    hint = " (without a GPU the kernels need TRITON_INTERPRET=1)" if device == "cpu" else ""
    warnings.warn(
        f"{op}: {implementation} does not take {dtype} rows of {size} on this {device} device{hint}; PyTorch's runs instead",
        stacklevel=4,
    )


def fits(op: str, implementation: str, takes: bool, x: Tensor, note: str = "") -> bool:
    """Return `takes`. If it is false, warn once that the op's implementation does not take x."""
    if not takes:
        size = f"{x.size(-1) if x.dim() else 1}{note}"
        warn_once(op, implementation, x.device.type, str(x.dtype)[6:], size)
    return takes


def accumulate_in_place() -> AbstractContextManager[None]:
    """A context in which a backward may add a weight's gradient to `.grad` itself; see kernels/accumulate.py."""
    return triton.accumulate.in_place() if triton else nullcontext()


def draw_seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """A seed for a kernel's dropout, or None without dropout. It is drawn on x's device, so the host does not wait."""
    return torch.randint(2**63 - 1, (1,), device=x.device) if dropout_p > 0 else None


def embedding(
    idx: Tensor, wte: Tensor, wpe: Tensor, dropout_p: float = 0.0, dtype: torch.dtype | None = None, kernels: Kernels = TORCH,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `reference.embedding`."""
    if kernels.embedding == "triton" and fits("embedding", "triton", triton.embedding.takes(wte, wpe), wte):
        seed = draw_seed(wte, dropout_p)
        return triton.embedding.embedding(idx, wte, wpe, dropout_p, seed, dtype, kernels.row("embedding"))
    return reference.embedding(idx, wte, wpe, dropout_p, dtype)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = EPS, kernels: Kernels = TORCH
) -> Tensor:
    """See `reference.layer_norm`."""
    if kernels.layer_norm == "triton" and fits("layer_norm", "triton", triton.layer_norm.takes(x), x):
        return triton.layer_norm.layer_norm(x, weight, bias, eps, kernels.row("layer_norm"))
    return reference.layer_norm(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None = None, eps: float = EPS, dropout_p: float = 0.0,
    last: bool = False, kernels: Kernels = TORCH,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """See `reference.add_layer_norm`. With `last` nobody reads the sum, and it may be None."""
    if kernels.layer_norm == "triton" and fits("layer_norm", "triton", triton.layer_norm.takes(x, branch), x):
        seed, row = None if branch is None else draw_seed(x, dropout_p), kernels.row("layer_norm")
        return triton.layer_norm.add_layer_norm(x, branch, weight, bias, eps, dropout_p, seed, row, last)
    return reference.add_layer_norm(x, branch, weight, bias, eps, dropout_p)


def attention(
    qkv: Tensor, n_head: int, dropout_p: float = 0.0, cache: Any = None, doc_ids: Tensor | None = None, kernels: Kernels = TORCH,
) -> Tensor:  # fmt: skip
    """See `reference.attention`. With a cache, in generation, PyTorch's implementation runs."""
    chosen = "torch" if cache is not None else kernels.attention
    if chosen == "triton" and fits(
        "attention", "triton", triton.attention.takes(qkv, qkv.size(-1) // 3 // n_head), qkv
    ):
        seed = draw_seed(qkv, dropout_p)
        return triton.attention.attention(qkv, n_head, dropout_p, seed, doc_ids, kernels.row("attention"))
    if chosen == "cudnn" and fits_cudnn(qkv, doc_ids):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return reference.attention(qkv, n_head, dropout_p)
    return reference.attention(qkv, n_head, dropout_p, cache, doc_ids)


def attention_qkv(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, doc_ids: Tensor | None = None, kernels: Kernels = TORCH,
) -> Tensor:  # fmt: skip
    """See `reference.attention_qkv`. `kernels.attention` decides."""
    if kernels.attention == "triton" and fits("attention_qkv", "triton", triton.attention.takes(q, q.size(-1)), q):
        seed = draw_seed(q, dropout_p)
        return triton.attention.attention_qkv(q, k, v, dropout_p, seed, doc_ids, kernels.row("attention"))
    if kernels.attention == "cudnn" and fits_cudnn(q, doc_ids, k):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return reference.attention_qkv(q, k, v, dropout_p)
    return reference.attention_qkv(q, k, v, dropout_p, doc_ids)


def fits_cudnn(q: Tensor, doc_ids: Tensor | None, k: Tensor | None = None) -> bool:
    """Whether cuDNN's attention takes q; if not, warn once. k: the keys, if they come apart."""
    fewer = k is not None and k.size(2) != q.size(2)
    note = " within documents" * (doc_ids is not None) + " with fewer heads of keys" * fewer
    return fits("attention", "cudnn", q.is_cuda and q.dtype != torch.float32 and doc_ids is None and not fewer, q, note)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, kernels: Kernels = TORCH) -> Tensor:
    """See `reference.linear`."""
    if kernels.linear == "triton" and fits("linear", "triton", triton.linear.takes(x), x):
        return triton.linear.linear(x, weight, bias)
    return reference.linear(x, weight, bias)


def gelu_mlp(
    h: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, b_proj: Tensor | None, recompute: bool = False,
    approximate: str = "none", kernels: Kernels = TORCH,
) -> Tensor:  # fmt: skip
    """See `reference.gelu_mlp`. recompute: the backward computes the activation again; PyTorch's implementation also the
    pre-activation."""
    if kernels.gelu_mlp == "triton" and fits("gelu_mlp", "triton", triton.gelu_mlp.takes(h), h):
        return triton.gelu_mlp.gelu_mlp(h, w_fc, b_fc, w_proj, b_proj, recompute, kernels.row("gelu_mlp"), approximate)
    if recompute and torch.is_grad_enabled():
        return checkpoint(
            reference.gelu_mlp,
            h,
            w_fc,
            b_fc,
            w_proj,
            b_proj,
            approximate,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return reference.gelu_mlp(h, w_fc, b_fc, w_proj, b_proj, approximate)


def linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -1, shadow: Tensor | None = None, kernels: Kernels = TORCH,
) -> Tensor:  # fmt: skip
    """See `reference.linear_cross_entropy`. shadow: the shadow of the parameter, if weight is only an alias of it; else None."""
    if kernels.linear_cross_entropy == "triton" and fits(
        "linear_cross_entropy", "triton", triton.linear_cross_entropy.takes(h), h
    ):
        row = kernels.row("linear_cross_entropy")
        return triton.linear_cross_entropy.linear_cross_entropy(h, weight, targets, ignore_index, shadow, row)
    return reference.linear_cross_entropy(h, weight, targets, ignore_index)


def adamw(
    groups: list[dict[str, Any]], grads: list[Tensor], max_norm: float | None = None, loss: Tensor | None = None,
    found_inf: Tensor | None = None, kernels: Kernels = TORCH, squares: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """See `reference.adamw`."""
    p = next(p for group in groups for p in group["params"])
    if kernels.adamw == "triton" and fits("adamw", "triton", triton.adamw.takes(p, groups), p):
        return triton.adamw.adamw(groups, grads, max_norm, loss, found_inf, kernels.row("adamw"), squares)
    return reference.adamw(groups, grads, max_norm, loss, found_inf, squares)
