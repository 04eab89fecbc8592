"""The hot paths in plain PyTorch: what each op computes, in lines that can be checked by eye.

This is the oracle that kernels are held against, and the path that runs without a GPU. The order of
operations is nanoGPT's, so on the CPU in fp32 a model built on it equals nanoGPT bit for bit; under
autocast each line takes the dtypes that nanoGPT's own modules take.

Shapes: B sequences, T tokens each, C = n_embd, V = vocab_size. Source: the GPT-2 architecture as nanoGPT
(github.com/karpathy/nanoGPT, model.py) writes it.
"""

import math

import torch
from torch.nn import functional as F
from torch.optim.adamw import adamw as functional_adamw

EPS = 1e-5  # nanoGPT's and GPT-2's LayerNorm epsilon


def embedding(idx, wte, wpe, dropout_p=0.0, dtype=None):
    """(token plus position embeddings [B,T,C] in dtype, None: the weights'; wte again).

    idx [B,T] int64; wte [V,C]; wpe [>=T,C], whose row t belongs to column t of idx. The tied head takes its weight from
    here: an implementation may then have the head's gradient come by, and add to it.
    """
    x = F.embedding(idx, wte) + wpe[: idx.size(1)]
    x = x if dtype is None else x.to(dtype)
    return F.dropout(x, dropout_p, training=dropout_p > 0), wte


def layer_norm(x, weight, bias=None, eps=EPS):
    """Normalise the last dimension of x [...,C] by weight [C] and bias [C] or None."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(x, branch, weight, bias=None, eps=EPS, dropout_p=0.0):
    """Add a branch to the residual stream, and normalise the sum: (new stream, normalised), each [B,T,C].

    Dropout falls on the branch before it is added. Where there is none, None, the stream stays as it is.
    """
    if branch is not None:
        x = x + F.dropout(branch, dropout_p, training=dropout_p > 0)
    return x, layer_norm(x, weight, bias, eps)


def linear(x, weight, bias=None):
    """x [...,K] times weight [N,K] transposed, plus bias [N] or None: [...,N]."""
    return F.linear(x, weight, bias)


def attention(qkv, n_head, dropout_p=0.0, cache=None, doc_ids=None):
    """Causal self-attention of packed queries, keys and values: [B,T,3C] in (q, then k, then v), [B,T,C] out.

    Scale 1/sqrt(C/n_head); dropout falls on the attention probabilities. `cache` is None in training; in
    generation its `append` takes the keys and values of these tokens and gives those of all so far; T is then
    the whole prompt on the first call, and 1 afterwards. doc_ids [B,T], integers, keep a token to those of its own id; with a
    cache they are [B, all so far].
    """
    B, T, C3 = qkv.shape
    q, k, v = (t.view(B, T, n_head, -1).transpose(1, 2) for t in qkv.split(C3 // 3, dim=2))  # [B,H,T,C/H]
    if cache is not None:
        k, v = cache.append(k, v)
    # A lone new token attends to all that the cache holds: nothing is masked.
    causal, mask = k.size(2) == T, None
    if doc_ids is not None:
        causal, mask = False, (doc_ids[:, None, -T:, None] == doc_ids[:, None, None, :]).tril(k.size(2) - T)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=causal)
    return y.transpose(1, 2).contiguous().view(B, T, C3 // 3)


def gelu_mlp(h, w_fc, b_fc, w_proj, b_proj):
    """The MLP: up-projection [4C,C], exact-erf GELU, down-projection [C,4C]; biases may be None. [B,T,C] in and out."""
    return F.linear(F.gelu(F.linear(h, w_fc, b_fc)), w_proj, b_proj)


def linear_cross_entropy(h, weight, targets, ignore_index=-1):
    """Mean cross entropy of logits h.weight^T against targets, without handing out the logits. A scalar, fp32 under autocast.

    h [B,T,C]; weight [V,C]; targets [B,T] int64, where `ignore_index` counts for nothing. All ignored gives nan,
    as torch's mean over nothing does.
    """
    return cross_entropy(F.linear(h, weight), targets, ignore_index)


def cross_entropy(logits, targets, ignore_index=-1):
    """Mean cross entropy of logits [B,T,V] against targets [B,T]: a scalar."""
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=ignore_index)


@torch.no_grad()
def adamw(groups, grads, max_norm=None, found_inf=None):
    """Clip to a global norm of max_norm and update by AdamW, in place: the norm before clipping [] fp32, or None where max_norm is.

    To infinity nothing is clipped, and the norm measured.
    groups: dicts with lists of tensors, params, grads, exp_avgs, exp_avg_sqs, steps ([] fp32, updates done so far) and shadows (a
    weight in 16 bits, which the update writes too, or None), and lr, betas, eps, weight_decay, fused. found_inf [] fp32 (fused alone),
    or None: where it is not 0, no weight changes. grads are all groups', in the order in which their norms are added up; they
    are scaled in place.
    """
    norm = None
    if max_norm is not None:
        norm = torch.nn.utils.get_total_norm(grads)
        if max_norm < math.inf:
            torch._foreach_mul_(grads, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    for g in groups:
        functional_adamw(
            g["params"], g["grads"], g["exp_avgs"], g["exp_avg_sqs"], [], g["steps"], fused=g["fused"], found_inf=found_inf,
            amsgrad=False, beta1=g["betas"][0], beta2=g["betas"][1], lr=g["lr"], weight_decay=g["weight_decay"], eps=g["eps"],
            maximize=False,
        )  # fmt: skip
        if kept := [(s, p) for s, p in zip(g["shadows"], g["params"], strict=True) if s is not None]:
            torch._foreach_copy_(*zip(*kept, strict=True))
    return norm
