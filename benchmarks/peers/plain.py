"""GPT-2 in plain PyTorch modules, as nanoGPT writes it: the peer that fastgpt is measured against.

Parameter names, shapes and order are nanoGPT's, so that one set of weights serves every arm. It has no init of its own, and shares no
line with fastgpt's model or ops. nanoGPT's forward hands the logits back, and torch.compile then fills a gradient of zeros for them;
`loss_only` leaves the logits out.
"""

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias, as nanoGPT writes it. [..., C] in and out."""

    def __init__(self, n_embd, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    """Causal self-attention, by an SDPBackend, or for None by PyTorch's choice. [B, T, C] in and out."""

    def __init__(self, config, backend):
        super().__init__()
        self.backend = backend
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x):
        B, T, C = x.shape
        heads = (B, T, self.n_head, C // self.n_head)
        q, k, v = (t.view(heads).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2))
        p = self.dropout if self.training else 0.0
        with nullcontext() if self.backend is None else sdpa_kernel(self.backend):
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return F.dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C)), self.dropout, self.training)


class MLP(nn.Module):
    """Up, exact GELU, down. [B, T, C] in and out."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x))), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm block. [B, T, C] in and out."""

    def __init__(self, config, norm, backend):
        super().__init__()
        self.ln_1, self.attn = norm(config.n_embd, config.bias), Attention(config, backend)
        self.ln_2, self.mlp = norm(config.n_embd, config.bias), MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class PlainGPT(nn.Module):
    """model(idx, targets) gives (logits, loss), or with loss_only (None, loss); idx and targets [B, T] int64.

    `norm` makes a LayerNorm of (width, whether it has a bias); `backend` is an SDPBackend, or None for PyTorch's choice.
    """

    def __init__(self, config, loss_only=False, norm=LayerNorm, backend=None):
        super().__init__()
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config, norm, backend) for _ in range(config.n_layer)),
                ln_f=norm(config.n_embd, config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.loss_only = loss_only

    def forward(self, idx, targets):
        t = self.transformer
        x = t.drop(t.wte(idx) + t.wpe(torch.arange(idx.size(1), device=idx.device)))
        for block in t.h:
            x = block(x)
        logits, loss = self.head(t.ln_f(x), targets)
        return None if self.loss_only else logits, loss

    def head(self, h, targets):
        """(logits [B, T, V], mean cross entropy) of h [B, T, C]."""
        logits = self.lm_head(h)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
