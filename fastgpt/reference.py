"""The hot paths in plain PyTorch: what each op computes, short enough to check by eye.

The kernels are checked against these functions, and without a GPU these functions run. The order of operations is nanoGPT's: on the
CPU in fp32 a model equals nanoGPT bit for bit. Under autocast each line uses the dtypes of nanoGPT's own modules.

Shapes: B sequences, T tokens each, C = n_embd, V = vocab_size. Source: the GPT-2 architecture as nanoGPT
(github.com/karpathy/nanoGPT, model.py) writes it.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adamw import adamw as functional_adamw

EPS = 1e-5  # nanoGPT's and GPT-2's LayerNorm epsilon
IGNORED = -100  # the target that does not count, as in PyTorch; GPT passes nanoGPT's, -1


def embedding(
    idx: Tensor, wte: Tensor, wpe: Tensor, dropout_p: float = 0.0, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(token plus position embeddings [B,T,C], wte).

    idx [B,T] int64; wte [V,C]; wpe [>=T,C], whose row t belongs to column t of idx. dtype: that of the sum; None: the weights'.
    The tied head must use the returned wte. Its gradient then passes through this op, which can add its own gradient to it.
    """
    x = F.embedding(idx, wte) + wpe[: idx.size(1)]
    x = x if dtype is None else x.to(dtype)
    return F.dropout(x, dropout_p, training=dropout_p > 0), wte


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = EPS) -> Tensor:
    """Normalise the last dimension of x [...,C] by weight [C] and bias [C] or None."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None = None, eps: float = EPS, dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add a branch to the residual stream x, and normalise the sum: (new stream, normalised), each [B,T,C].

    Dropout applies to the branch before it is added. If branch is None, the stream is unchanged.
    """
    if branch is not None:
        x = x + F.dropout(branch, dropout_p, training=dropout_p > 0)
    return x, layer_norm(x, weight, bias, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [...,K] times weight [N,K] transposed, plus bias [N] or None: [...,N]."""
    return F.linear(x, weight, bias)


def attention(
    qkv: Tensor, n_head: int, dropout_p: float = 0.0, cache: Any = None, doc_ids: Tensor | None = None
) -> Tensor:
    """Causal self-attention of packed queries, keys and values: [B,T,3C] in (q, then k, then v), [B,T,C] out.

    The scale is 1/sqrt(C/n_head). Dropout applies to the attention probabilities. `cache` is None in training. In generation its
    `append` stores these tokens' keys and values, and returns those of all tokens so far; T is then the whole prompt in the first
    call, and 1 afterwards. doc_ids [B,T], integers: a token attends only to tokens of the same id. With a cache they are
    [B, all so far].
    """
    B, T, C3 = qkv.shape
    q, k, v = (t.view(B, T, n_head, -1).transpose(1, 2) for t in qkv.split(C3 // 3, dim=2))  # [B,H,T,C/H]
    if cache is not None:
        k, v = cache.append(k, v)
    # A single new token attends to everything in the cache: no mask.
    causal, mask = k.size(2) == T, None
    if doc_ids is not None:
        causal, mask = False, (doc_ids[:, None, -T:, None] == doc_ids[:, None, None, :]).tril(k.size(2) - T)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=causal)
    return y.transpose(1, 2).contiguous().view(B, T, C3 // 3)


def attention_qkv(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, doc_ids: Tensor | None = None) -> Tensor:
    """Causal self-attention of queries [B,T,H,D] and of keys and values [B,T,Hk,D], Hk of which divide H: [B,T,H,D] out.

    Head h of the queries meets head h // (H/Hk) of the keys. All else is as in `attention`.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B,H,T,D]
    mask = None if doc_ids is None else (doc_ids[:, None, :, None] == doc_ids[:, None, None, :]).tril()
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=mask is None, enable_gqa=k.size(1) != q.size(1)
    )
    return y.transpose(1, 2).contiguous()


def gelu_mlp(
    h: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, b_proj: Tensor | None, approximate: str = "none"
) -> Tensor:
    """The MLP: up-projection [4C,C], GELU, down-projection [C,4C]; biases may be None. [B,T,C] in and out.

    approximate: "none" for the exact-erf GELU, "tanh" for the one that OpenAI's GPT-2 was trained with.
    """
    return F.linear(F.gelu(F.linear(h, w_fc, b_fc), approximate=approximate), w_proj, b_proj)


def linear_cross_entropy(h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """Mean cross entropy of the logits h weight^T against targets: a scalar, fp32 under autocast. The logits are not returned.

    h [B,T,C]; weight [V,C]; targets [B,T] int64; targets equal to ignore_index do not count. If none counts, the loss is nan.
    A target outside the vocabulary raises IndexError on the CPU, and stops a GPU by an assertion; Triton's loss is nan then.
    """
    return cross_entropy(F.linear(h, weight), targets, ignore_index)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """Mean cross entropy of logits [B,T,V] against targets [B,T] int64: a scalar in the logits' dtype, fp32 under autocast.

    Targets equal to ignore_index do not count; what holds for other targets is said at `linear_cross_entropy`.
    """
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1), ignore_index=ignore_index)


@torch.no_grad()
def adamw(
    groups: list[dict[str, Any]], grads: list[Tensor], max_norm: float | None = None, loss: Tensor | None = None,
    found_inf: Tensor | None = None, squares: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Clip the gradients to a global norm of max_norm, and update by AdamW, in place. Returns the norm before clipping, [] fp32.

    max_norm: infinity only measures the norm; None does not, and returns None. If the norm is measured and not finite, nothing changes.
    loss: [] fp32, or None; with a max_norm, if it is not finite, nothing changes.
    groups: dicts with lists of tensors: params, grads, exp_avgs, exp_avg_sqs, steps ([] fp32, updates so far) and shadows (16-bit
    copies of weights, which the update also writes, or None); and with lr, betas, eps, weight_decay, fused.
    found_inf: [] fp32 or None, only if fused; if it is not 0, no weight changes.
    grads: the gradients of all groups, in the order in which their norms are added up. They are scaled in place.
    squares: the sum of squares from which the norm is, [] fp32, where these tensors are parts of larger ones; None: that of grads.
    """
    norm = None
    if max_norm is not None:
        norm = torch.nn.utils.get_total_norm(grads) if squares is None else squares.sqrt()
        bad = ~torch.isfinite(norm if loss is None else norm + loss)
        if all(g["fused"] for g in groups):  # then the device decides, and the host does not wait
            found_inf = bad.float() if found_inf is None else torch.maximum(found_inf, bad.float())
        elif bad:
            return norm
        if max_norm < math.inf:
            torch._foreach_mul_(grads, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    for g in groups:
        functional_adamw(
            g["params"], g["grads"], g["exp_avgs"], g["exp_avg_sqs"], [], g["steps"], fused=g["fused"], found_inf=found_inf,
            amsgrad=False, beta1=g["betas"][0], beta2=g["betas"][1], lr=g["lr"], weight_decay=g["weight_decay"], eps=g["eps"],
            maximize=False,
        )  # fmt: skip
        if pairs := [(s, p) for s, p in zip(g["shadows"], g["params"], strict=True) if s is not None]:
            shadows, weights = zip(*pairs, strict=True)
            torch._foreach_copy_(shadows, weights)
    return norm
