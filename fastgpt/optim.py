"""Parameter groups and AdamW, clipping's partner the schedule: nanoGPT's."""

import math

import torch


def adamw(model, weight_decay, learning_rate, betas, device_type):
    """torch.optim.AdamW (eps 1e-8) over nanoGPT's two groups; fused on CUDA. Prints the three lines that nanoGPT prints.

    Tensors of two and more dimensions (matmul weights and both embeddings) decay; biases and LayerNorms do not.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in params if p.dim() >= 2]
    no_decay = [p for p in params if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    for kind, group in (("decayed", decay), ("non-decayed", no_decay)):
        print(f"num {kind} parameter tensors: {len(group)}, with {sum(p.numel() for p in group):,} parameters")
    fused = device_type == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, **({"fused": True} if fused else {}))
    print(f"using fused AdamW: {fused}")
    return optimizer


def learning_rate(it, cfg):
    """The learning rate of iteration `it` (from 0): linear warm-up, then a cosine down to min_lr; constant without decay_lr."""
    if not cfg.decay_lr:
        return cfg.learning_rate
    if it < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / (cfg.warmup_iters + 1)
    if it >= cfg.lr_decay_iters:
        return cfg.min_lr
    ratio = (it - cfg.warmup_iters) / (cfg.lr_decay_iters - cfg.warmup_iters)
    return cfg.min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (cfg.learning_rate - cfg.min_lr)
