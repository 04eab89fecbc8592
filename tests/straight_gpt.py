"""A GPT in straight lines of tensor maths, written from GPT-2's equations: what the model is held against.

It shares no code with fastgpt: no modules, no F.layer_norm, no F.gelu, no scaled_dot_product_attention; weights are a
plain dict. Its init replays nanoGPT's draws by hand, from the list in which they fall.
"""

import math

import torch


def initial_weights(block_size, vocab_size, n_layer, n_head, n_embd, dropout=0.0, bias=True):
    """Weights by name, drawn from torch's default generator in nanoGPT's order."""
    C = n_embd
    linears = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    layers = [f"transformer.h.{i}." for i in range(n_layer)]
    w = {}

    def uniform(shape, fan_in):  # nn.Linear's default: kaiming_uniform with a = sqrt(5) is +-1/sqrt(fan_in)
        bound = 1 / math.sqrt(fan_in)
        return torch.empty(shape).uniform_(-bound, bound)

    # 1. what the constructors draw; none of it stays
    torch.empty(vocab_size, C).normal_()
    torch.empty(block_size, C).normal_()
    for _ in layers:
        for rows, cols in linears.values():
            uniform((rows, cols), cols)
            if bias:
                uniform((rows,), cols)
    uniform((vocab_size, C), C)
    # 2. std 0.02 for all, the tied tensor first and last
    torch.empty(vocab_size, C).normal_(0.0, 0.02)
    w["transformer.wpe.weight"] = torch.empty(block_size, C).normal_(0.0, 0.02)
    for layer in layers:
        for name, shape in linears.items():
            w[f"{layer}{name}.weight"] = torch.empty(shape).normal_(0.0, 0.02)
            if bias:
                w[f"{layer}{name}.bias"] = torch.zeros(shape[0])
    w["lm_head.weight"] = w["transformer.wte.weight"] = torch.empty(vocab_size, C).normal_(0.0, 0.02)
    # 3. the projections into the stream again
    for layer in layers:
        for name in ("attn.c_proj", "mlp.c_proj"):
            w[f"{layer}{name}.weight"] = torch.empty(linears[name]).normal_(0.0, 0.02 / math.sqrt(2 * n_layer))
    # constants
    for norm in [layer + ln for layer in layers for ln in ("ln_1", "ln_2")] + ["transformer.ln_f"]:
        w[f"{norm}.weight"] = torch.ones(C)
        if bias:
            w[f"{norm}.bias"] = torch.zeros(C)
    return w


def layer_norm(x, w, name):
    centred = x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * w[f"{name}.weight"]
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def linear(x, w, name):
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def logits_and_loss(w, idx, targets, n_layer, n_head):
    """Logits [B,T,V] and the mean cross entropy over the targets that are not -1."""
    B, T = idx.shape
    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][torch.arange(T)]
    C = x.size(-1)
    D = C // n_head
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    for i in range(n_layer):
        h = f"transformer.h.{i}."
        q, k, v = (
            linear(layer_norm(x, w, h + "ln_1"), w, h + "attn.c_attn")
            .reshape(B, T, 3, n_head, D)
            .permute(2, 0, 3, 1, 4)
        )
        scores = (q @ k.transpose(-1, -2) / math.sqrt(D)).masked_fill(~mask, -float("inf"))
        p = torch.exp(scores - scores.amax(-1, keepdim=True))
        y = (p / p.sum(-1, keepdim=True)) @ v
        x = x + linear(y.transpose(1, 2).reshape(B, T, C), w, h + "attn.c_proj")
        u = linear(layer_norm(x, w, h + "ln_2"), w, h + "mlp.c_fc")
        x = x + linear(u * 0.5 * (1 + torch.erf(u / math.sqrt(2))), w, h + "mlp.c_proj")
    logits = layer_norm(x, w, "transformer.ln_f") @ w["lm_head.weight"].T
    kept = targets != -1
    log_z = torch.logsumexp(logits[kept], -1)
    return logits, (log_z - logits[kept].gather(-1, targets[kept][:, None])[:, 0]).mean()


def adamw_step(w, grads, state, step, lr, betas, weight_decay, grad_clip):
    """One AdamW step on a dict of tensors, clipped by global norm; matrices decay. `step` counts from 1."""
    names = [n for n in w if n != "lm_head.weight"]  # tied
    norm = torch.sqrt(sum((grads[n] ** 2).sum() for n in names))
    scale = min(1.0, grad_clip / (norm.item() + 1e-6))
    new = {}
    for n in names:
        g = grads[n] * scale
        m, v = state.setdefault(n, (torch.zeros_like(g), torch.zeros_like(g)))
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        state[n] = m, v
        p = w[n] * (1 - lr * weight_decay) if w[n].dim() >= 2 else w[n]
        new[n] = p - lr * (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + 1e-8)
    new["lm_head.weight"] = new["transformer.wte.weight"]
    return new, norm.item()
