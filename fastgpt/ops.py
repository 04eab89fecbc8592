"""One function for each hot path. It decides which implementation of the op runs.

Each op has a plain PyTorch implementation, "torch" (`reference`), and Triton kernels, "triton". Attention also has PyTorch's cuDNN
backend, "cudnn". Every op gets a `Kernels` value, which alone says what runs. Its default, `AUTO`, means Triton's kernels on a CUDA GPU,
for all input that they take, and PyTorch elsewhere. Where a `Kernels` names a kernel that cannot take its input (wrong device or GPU, too
wide a row), PyTorch's implementation runs instead, and one warning says so. A name in its place, kernels="triton", is strict: it raises
ValueError then. docs/api.md shows each function at work.
"""

import difflib
import functools
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fastgpt import reference
from fastgpt.config import UserError
from fastgpt.reference import EPS, IGNORED, cross_entropy

try:
    from fastgpt import kernels as triton
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] != "triton":
        raise
    triton = None  # type: ignore[assignment] # not installed: everything runs on PyTorch

__all__ = [
    "AUTO",
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
    """Which implementation runs each op: "torch" or "triton", for attention also "cudnn". "auto": "triton" for input on a CUDA GPU that
    the kernels take, else "torch"; nothing is measured.

    rows: launch configurations that `fastgpt tune` found, pairs of an op and a row's text (kernels/configs.py). The other ops use the
    shipped tables. strict: whether an op raises ValueError if its implementation cannot take the input; else PyTorch's runs, with a
    warning. Raises UserError for an unknown implementation, and for "triton" if Triton is not installed.
    """

    embedding: str = "torch"
    layer_norm: str = "torch"
    linear: str = "torch"
    attention: str = "torch"
    gelu_mlp: str = "torch"
    linear_cross_entropy: str = "torch"
    adamw: str = "torch"
    rows: tuple[tuple[str, str], ...] = ()
    strict: ClassVar[bool] = False

    def __post_init__(self):
        for op in OPS:
            if getattr(self, op) not in ("auto", *IMPLEMENTATIONS[op]):
                raise UserError(f"kernels: there is no {getattr(self, op)!r} of {op!r}")
            if getattr(self, op) == "triton" and triton is None:
                raise UserError("--kernels: Triton is not installed; pip install triton, or --kernels=torch")

    def row(self, op: str) -> str:
        """The text of an op's launch configuration; "" means the table's row."""
        return dict(self.rows).get(op, "") if self.rows else ""


class Strict(Kernels):
    """A Kernels that raises ValueError where an implementation cannot take its input."""

    strict = True


OPS = tuple(f.name for f in fields(Kernels) if f.name != "rows")
IMPLEMENTATIONS = {op: ("torch", "triton", "cudnn") if op == "attention" else ("torch", "triton") for op in OPS}
TORCH = Kernels()
AUTO = Kernels(**dict.fromkeys(OPS, "auto"), rows=())
# Made once: to parse a name takes 8 us, and every call of an op may bring one.
NAMED = {
    name: Strict(**dict.fromkeys(OPS, name), rows=()) for name in ("auto", "torch", "triton")[: 3 if triton else 2]
}
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
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
                hint = f"; the nearest is {near[0]!r}" if near else ""
                raise UserError(f"--kernels={spec}: {name!r} is none of {', '.join(known)}{hint}")
    return dict.fromkeys(OPS, "auto") | picks


def named(kernels: Kernels | str) -> Kernels:
    """A Kernels as it is; a strict one of a name or a list, as of --kernels. Raises UserError as `parse` and Kernels do."""
    if isinstance(kernels, Kernels):
        return kernels
    return NAMED.get(kernels) or Strict(**parse(kernels), rows=())


def refusal(op: str, implementation: str, device: str, dtype: str, size: str) -> str:
    """What is said of an implementation that cannot take its input."""
    hint = " (without a GPU the kernels need TRITON_INTERPRET=1)" if device == "cpu" else ""
    return f"{op}: {implementation} does not take {dtype} rows of {size} on this {device} device{hint}"


@functools.cache
def warn_once(op: str, implementation: str, device: str, dtype: str, size: str) -> None:
    warnings.warn(f"{refusal(op, implementation, device, dtype, size)}; PyTorch's runs instead", stacklevel=4)


def by_triton(op: str, kernels: Kernels, x: Tensor) -> bool:
    """Whether Triton's kernels are to run an op on x, if they take it."""
    chosen = getattr(kernels, op)
    return chosen == "triton" or (chosen == "auto" and x.is_cuda and triton is not None)


def fits(op: str, kernels: Kernels, takes: bool, x: Tensor, note: str = "") -> bool:
    """Return `takes`. If it is false, warn once that the op's implementation does not take x; raise ValueError if kernels are strict."""
    implementation = getattr(kernels, op)
    if not takes and implementation != "auto":
        said = op, implementation, x.device.type, str(x.dtype)[6:], f"{x.size(-1) if x.dim() else 1}{note}"
        if kernels.strict:
            raise ValueError(f"{refusal(*said)}; kernels='auto' takes PyTorch's there")
        warn_once(*said)
    return takes


def accumulate_in_place() -> AbstractContextManager[None]:
    """A context in which a backward may add a weight's gradient to `.grad` itself; see kernels/accumulate.py."""
    return triton.accumulate.in_place() if triton else nullcontext()


def draw_seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """A seed for a kernel's dropout, or None without dropout. It is drawn on x's device, so the host does not wait."""
    return torch.randint(2**63 - 1, (1,), device=x.device) if dropout_p > 0 else None


def embedding(
    idx: Tensor, wte: Tensor, wpe: Tensor, dropout_p: float = 0.0, dtype: torch.dtype | None = None, kernels: Kernels | str = AUTO,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(token plus position embeddings [B,T,C], wte) of idx [B,T] int64, wte [V,C] and wpe [>=T,C]; see `reference.embedding`."""
    kernels = named(kernels)
    if by_triton("embedding", kernels, wte) and fits("embedding", kernels, triton.embedding.takes(wte, wpe), wte):
        seed = draw_seed(wte, dropout_p)
        return triton.embedding.embedding(idx, wte, wpe, dropout_p, seed, dtype, kernels.row("embedding"))
    return reference.embedding(idx, wte, wpe, dropout_p, dtype)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = EPS, kernels: Kernels | str = AUTO
) -> Tensor:
    """The LayerNorm of x [...,C] over its last dimension; weight and bias [C]. See `reference.layer_norm`."""
    kernels = named(kernels)
    if by_triton("layer_norm", kernels, x) and fits("layer_norm", kernels, triton.layer_norm.takes(x), x):
        return triton.layer_norm.layer_norm(x, weight, bias, eps, kernels.row("layer_norm"))
    return reference.layer_norm(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None = None, eps: float = EPS, dropout_p: float = 0.0,
    last: bool = False, kernels: Kernels | str = AUTO,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """(x plus dropout(branch), its LayerNorm), each [...,C]; see `reference.add_layer_norm`. With `last` nobody reads the sum, and it may
    be None."""
    kernels = named(kernels)
    if by_triton("layer_norm", kernels, x) and fits("layer_norm", kernels, triton.layer_norm.takes(x, branch), x):
        seed, row = None if branch is None else draw_seed(x, dropout_p), kernels.row("layer_norm")
        return triton.layer_norm.add_layer_norm(x, branch, weight, bias, eps, dropout_p, seed, row, last)
    return reference.add_layer_norm(x, branch, weight, bias, eps, dropout_p)


def attention(
    qkv: Tensor, n_head: int, dropout_p: float = 0.0, cache: Any = None, doc_ids: Tensor | None = None, kernels: Kernels | str = AUTO,
) -> Tensor:  # fmt: skip
    """Causal self-attention, [B,T,C], of qkv [B,T,3C]: q, then k, then v. See `reference.attention`. With a cache, in generation,
    PyTorch's implementation runs."""
    kernels = TORCH if cache is not None else named(kernels)
    head_size = qkv.size(-1) // 3 // n_head
    if by_triton("attention", kernels, qkv) and fits(
        "attention", kernels, triton.attention.takes(qkv, head_size), qkv, f" for {n_head} heads"
    ):
        seed = draw_seed(qkv, dropout_p)
        return triton.attention.attention(qkv, n_head, dropout_p, seed, doc_ids, kernels.row("attention"))
    if kernels.attention == "cudnn" and fits_cudnn(kernels, qkv, doc_ids):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return reference.attention(qkv, n_head, dropout_p)
    return reference.attention(qkv, n_head, dropout_p, cache, doc_ids)


def attention_qkv(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, doc_ids: Tensor | None = None, kernels: Kernels | str = AUTO,
) -> Tensor:  # fmt: skip
    """Causal self-attention, [B,T,H,D], of q [B,T,H,D] and k and v [B,T,Hk,D]; see `reference.attention_qkv`.

    `kernels.attention` decides."""
    kernels = named(kernels)
    if by_triton("attention", kernels, q) and fits("attention", kernels, triton.attention.takes(q, q.size(-1)), q):
        seed = draw_seed(q, dropout_p)
        return triton.attention.attention_qkv(q, k, v, dropout_p, seed, doc_ids, kernels.row("attention"))
    if kernels.attention == "cudnn" and fits_cudnn(kernels, q, doc_ids, k):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return reference.attention_qkv(q, k, v, dropout_p)
    return reference.attention_qkv(q, k, v, dropout_p, doc_ids)


def fits_cudnn(kernels: Kernels, q: Tensor, doc_ids: Tensor | None, k: Tensor | None = None) -> bool:
    """Whether cuDNN's attention takes q; if not, as `fits`. k: the keys, if they come apart."""
    fewer = k is not None and k.size(2) != q.size(2)
    note = " within documents" * (doc_ids is not None) + " with fewer heads of keys" * fewer
    takes = q.is_cuda and q.dtype != torch.float32 and doc_ids is None and not fewer
    return fits("attention", kernels, takes, q, note)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, kernels: Kernels | str = AUTO) -> Tensor:
    """x weight^T + bias, [...,N], of x [...,K], weight [N,K] and bias [N] or None; see `reference.linear`."""
    kernels = named(kernels)
    if by_triton("linear", kernels, x) and fits("linear", kernels, triton.linear.takes(x), x):
        return triton.linear.linear(x, weight, bias)
    return reference.linear(x, weight, bias)


def gelu_mlp(
    h: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, b_proj: Tensor | None, recompute: bool = False,
    approximate: str = "none", kernels: Kernels | str = AUTO,
) -> Tensor:  # fmt: skip
    """GELU(h w_fc^T + b_fc) w_proj^T + b_proj, [...,C], of h [...,C]; see `reference.gelu_mlp`. recompute: the backward computes the
    activation again; PyTorch's implementation also the pre-activation. approximate: "none" or "tanh", as of F.gelu."""
    kernels = named(kernels)
    if by_triton("gelu_mlp", kernels, h) and fits("gelu_mlp", kernels, triton.gelu_mlp.takes(h), h):
        return triton.gelu_mlp.gelu_mlp(h, w_fc, b_fc, w_proj, b_proj, recompute, kernels.row("gelu_mlp"), approximate)
    if recompute and torch.is_grad_enabled():
        return checkpoint(
            reference.gelu_mlp, h, w_fc, b_fc, w_proj, b_proj, approximate, use_reentrant=False, preserve_rng_state=False
        )  # fmt: skip
    return reference.gelu_mlp(h, w_fc, b_fc, w_proj, b_proj, approximate)


def linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = IGNORED, shadow: Tensor | None = None, kernels: Kernels | str = AUTO,
) -> Tensor:  # fmt: skip
    """The mean cross entropy of the logits h weight^T, a scalar, of h [...,C], weight [V,C] and targets [...] int64; see
    `reference.linear_cross_entropy`. shadow: the shadow of the parameter, if weight is only an alias of it; else None."""
    kernels = named(kernels)
    if by_triton("linear_cross_entropy", kernels, h) and fits(
        "linear_cross_entropy", kernels, triton.linear_cross_entropy.takes(h), h
    ):
        row = kernels.row("linear_cross_entropy")
        return triton.linear_cross_entropy.linear_cross_entropy(h, weight, targets, ignore_index, shadow, row)
    return reference.linear_cross_entropy(h, weight, targets, ignore_index)


def adamw(
    groups: list[dict[str, Any]], grads: list[Tensor], max_norm: float | None = None, loss: Tensor | None = None,
    found_inf: Tensor | None = None, kernels: Kernels | str = AUTO, squares: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Clip and update lists of tensors in place, and return the norm; see `reference.adamw`, and `optim.AdamW`, which calls it."""
    kernels = named(kernels)
    p = next(p for group in groups for p in group["params"])
    if by_triton("adamw", kernels, p) and fits("adamw", kernels, triton.adamw.takes(p, groups), p):
        return triton.adamw.adamw(groups, grads, max_norm, loss, found_inf, kernels.row("adamw"), squares)
    return reference.adamw(groups, grads, max_norm, loss, found_inf, squares)
