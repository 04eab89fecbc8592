"""Modules for a model of one's own: LayerNorm, AddLayerNorm, CausalSelfAttention, MLP and LinearCrossEntropy, on top of `ops`.

They are nanoGPT's modules with plain arguments. The names in `state_dict` are nanoGPT's too (c_attn, c_proj, c_fc, weight, bias). So
weights move freely between these modules, nanoGPT's and GPT's, which are built on them (model.py). A module's first weights are those of
`torch.nn.Linear` and `torch.nn.LayerNorm`.

Each module takes fp32, fp16 and bf16 input, and under autocast answers in autocast's dtype, as PyTorch's modules do. `kernels` says what
runs it: an `ops.Kernels`, or a name. The default, `ops.AUTO`, is Triton's kernels on a CUDA GPU, for all input that they take, and PyTorch
elsewhere. "triton" and "torch" pin one; "triton" raises ValueError for input that the kernels do not take. A kernel's gradient has no
gradient. An unknown name raises UserError.

A fused path replaces the calls of several modules. It runs only if all of them are `plain`. A module that a user has replaced, hooked or
parametrised is called.
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgpt import ops
from fastgpt.reference import EPS, IGNORED

__all__ = ["MLP", "AddLayerNorm", "CausalSelfAttention", "LayerNorm", "LinearCrossEntropy"]


def plain(module: nn.Module, kind: type) -> TypeGuard[Any]:
    """Whether a module is what nanoGPT has: exactly of this class, without hooks or a forward of its own."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def apply_linear(linear: nn.Module, x: Tensor, kernels: ops.Kernels) -> Tensor:
    """A Linear's output for x [...,K]."""
    if plain(linear, nn.Linear):
        return ops.linear(x, linear.weight, linear.bias, kernels=kernels)
    return linear(x)


def defer_dropout(module: nn.Module, x: Tensor) -> tuple[Tensor, float]:
    """(x, p of the dropout still to be applied) of an nn.Dropout. A plain one is left to the code that adds x to the stream."""
    if plain(module, nn.Dropout):
        return x, module.p if module.training else 0.0
    return module(x), 0.0


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension, with an optional bias. [...,n_embd] in and out.

    weight and bias, [n_embd]. The kernels take rows of at most 8,192 elements. Source: Ba et al., arXiv 1607.06450.
    """

    def __init__(self, n_embd: int, bias: bool = True, eps: float = EPS, kernels: ops.Kernels | str = ops.AUTO):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None
        self.eps = eps
        self.kernels = ops.named(kernels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [...,n_embd]."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps, self.kernels)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, bias={self.bias is not None}, eps={self.eps}"


class AddLayerNorm(nn.Module):
    """The residual add and the LayerNorm that follows it, in one pass over memory: x = x + dropout(branch), h = LayerNorm(x).

    weight and bias, [n_embd], are a LayerNorm's. `dropout` is the probability of the dropout on the branch, in training.
    """

    def __init__(
        self, n_embd: int, bias: bool = True, eps: float = EPS, dropout: float = 0.0, kernels: ops.Kernels | str = ops.AUTO
    ):  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None
        self.eps, self.dropout = eps, dropout
        self.kernels = ops.named(kernels)

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x plus dropout(branch), its LayerNorm), each [...,n_embd], of x and branch [...,n_embd]. Without a branch x stays as it is.

        The sum has the wider of their dtypes. Raises ValueError on a GPU, and RuntimeError elsewhere, for shapes that do not match.
        """
        p = self.dropout if self.training else 0.0
        x, h = ops.add_layer_norm(x, branch, self.weight, self.bias, self.eps, p, kernels=self.kernels)  # type: ignore[assignment]
        return x, h

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, bias={self.bias is not None}, eps={self.eps}, dropout={self.dropout}"


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention with its projections. [B,T,n_embd] in and out.

    c_attn: Linear from n_embd to a token's queries, then its keys, then its values, each head after head. c_proj: Linear from n_embd
    to n_embd. `dropout` applies to the attention probabilities and to the output, in training. The scale is 1/sqrt(n_embd / n_head).

    n_kv_head: the number of heads that keys and values have; it divides n_head, and n_head / n_kv_head query heads share one (grouped-query
    attention, Ainslie et al., arXiv 2305.13245). None: as many as there are query heads. The kernels take heads of at most 128 elements.
    Raises ValueError for heads that do not divide.
    """

    def __init__(
        self, n_embd: int, n_head: int, bias: bool = True, dropout: float = 0.0, n_kv_head: int | None = None,
        kernels: ops.Kernels | str = ops.AUTO,
    ):  # fmt: skip
        super().__init__()
        kv = n_head if n_kv_head is None else n_kv_head
        if min(n_head, kv) < 1 or n_embd % n_head or n_head % kv:
            raise ValueError(f"n_head={n_head} must divide n_embd={n_embd}, and n_kv_head={kv} must divide n_head")
        self.c_attn = nn.Linear(n_embd, n_embd + 2 * kv * (n_embd // n_head), bias=bias)  # rows: q, then k, then v
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.attn_dropout = nn.Dropout(dropout)
        self.resid_dropout = nn.Dropout(dropout)
        self.n_head = n_head
        self.n_kv_head = n_kv_head
        self.n_embd = n_embd
        self.dropout = dropout
        self.kernels = ops.named(kernels)

    def forward(self, x: Tensor, cache: Any = None, doc_ids: Tensor | None = None) -> Tensor:
        """Attend within x [B,T,n_embd]; within documents if doc_ids [B,T], integers, are given: tokens of a document have one id.

        cache: of keys and values, in generation (model.KVCache). Raises ValueError for a cache with n_kv_head.
        """
        y, p = self.branch(x, cache, doc_ids)
        return F.dropout(y, p, training=p > 0)

    def branch(self, x: Tensor, cache: Any = None, doc_ids: Tensor | None = None) -> tuple[Tensor, float]:
        """(the output before the last dropout, p of that dropout)."""
        qkv = apply_linear(self.c_attn, x, self.kernels)
        p = self.dropout if self.training else 0.0
        if self.n_kv_head is None:
            y = ops.attention(qkv, self.n_head, p, cache, doc_ids, kernels=self.kernels)
        elif cache is None:
            D = self.n_embd // self.n_head
            kv = self.n_kv_head
            q, k, v = qkv.unflatten(-1, (-1, D)).split((self.n_head, kv, kv), dim=-2)
            y = ops.attention_qkv(q, k, v, p, doc_ids, kernels=self.kernels).flatten(-2)
        else:
            raise ValueError("attention with n_kv_head has no cache")
        return defer_dropout(self.resid_dropout, apply_linear(self.c_proj, y, self.kernels))


class MLP(nn.Module):
    """Up-projection to n_hidden, exact-erf GELU, down-projection. [...,n_embd] in and out.

    c_fc: Linear from n_embd to n_hidden, by default 4 n_embd. c_proj: Linear back. `dropout` applies to the output, in training.
    recompute: the backward computes the activation again, so that training need not keep it.
    """

    def __init__(
        self, n_embd: int, bias: bool = True, dropout: float = 0.0, n_hidden: int | None = None, recompute: bool = False,
        kernels: ops.Kernels | str = ops.AUTO,
    ):  # fmt: skip
        super().__init__()
        n_hidden = 4 * n_embd if n_hidden is None else n_hidden
        self.c_fc = nn.Linear(n_embd, n_hidden, bias=bias)
        self.gelu: nn.Module = nn.GELU()
        self.c_proj = nn.Linear(n_hidden, n_embd, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.recompute = recompute
        self.kernels = ops.named(kernels)

    def forward(self, x: Tensor) -> Tensor:
        """The MLP of x [...,n_embd]."""
        y, p = self.branch(x)
        return F.dropout(y, p, training=p > 0)

    def branch(self, x: Tensor) -> tuple[Tensor, float]:
        """(the output before the last dropout, p of that dropout)."""
        fc, gelu, proj = self.c_fc, self.gelu, self.c_proj
        if plain(fc, nn.Linear) and plain(proj, nn.Linear) and plain(gelu, nn.GELU):
            weights = fc.weight, fc.bias, proj.weight, proj.bias
            y = ops.gelu_mlp(x, *weights, self.recompute, gelu.approximate, kernels=self.kernels)
        else:
            y = apply_linear(proj, gelu(apply_linear(fc, x, self.kernels)), self.kernels)
        return defer_dropout(self.dropout, y)


class LinearCrossEntropy(nn.Linear):
    """The head of a language model, a Linear without bias from n_embd to vocab_size, and its loss in one: training never keeps the logits.

    weight, [vocab_size, n_embd], may be an embedding's: `head.weight = wte.weight`. Targets equal to ignore_index do not count.
    """

    def __init__(
        self, n_embd: int, vocab_size: int, ignore_index: int = IGNORED, kernels: ops.Kernels | str = ops.AUTO
    ):
        super().__init__(n_embd, vocab_size, bias=False)
        self.ignore_index = ignore_index
        self.kernels = ops.named(kernels)

    def forward(self, h: Tensor, targets: Tensor | None = None) -> Tensor:
        """The mean cross entropy, a scalar, of h [...,n_embd] against targets [...], int64. Without targets the logits [...,vocab_size].

        The loss is nan if no target counts. A target outside the vocabulary raises IndexError in PyTorch on the CPU, and stops a GPU by an
        assertion; Triton's loss is nan then. Raises ValueError for shapes that do not match.
        """
        if targets is None:
            return ops.linear(h, self.weight, kernels=self.kernels)
        return ops.linear_cross_entropy(h, self.weight, targets, self.ignore_index, kernels=self.kernels)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, ignore_index={self.ignore_index}"
