"""GPT: nanoGPT's model, by its names, its init and its interface, with each hot path one call into `ops`.

Two things differ from nanoGPT's file, neither in what is computed:

- The residual add is left to the LayerNorm that follows it. A block therefore takes and gives the pair
  (stream, branch still to be added); called with a plain tensor it adds by itself, as nanoGPT's does.
- `model(idx, targets, return_logits=False)` answers the loss alone, so that training never keeps the logits.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastgpt import ops, optim
from fastgpt.config import GPTConfig


def project(linear, x):
    """An nn.Linear on x [...,K], by ops; what was put in its place is called as it is."""
    if type(linear) is not nn.Linear:
        return linear(x)
    return ops.linear(x, linear.weight, linear.bias, shadow(linear))


def shadow(linear):
    """The weight of an nn.Linear in the compute dtype, or None where none is kept or it is seen to be behind its weight.

    Seen are another weight and changes that PyTorch counts: not those through `.data`, and not a fused optimizer's. A compiled graph
    sees nothing. Whoever keeps shadows refreshes them.
    """
    kept = getattr(linear, "shadow", None)
    if kept is None or torch.compiler.is_compiling():
        return kept
    return kept if linear.shadow_of == state_of(linear.weight) else None


def state_of(weight):
    """What tells a weight's values from others, as far as PyTorch counts."""
    return id(weight), weight._version


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias, over the last dimension; eps 1e-5."""

    def __init__(self, ndim, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x, *branch, dropout_p=0.0):
        """Normalise x [...,C]. With a branch [...,C] due, or None, (x + dropout(branch), its normalisation)."""
        if not branch:
            return ops.layer_norm(x, self.weight, self.bias)
        return ops.add_layer_norm(x, *branch, self.weight, self.bias, dropout_p=dropout_p)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention with its projections. [B,T,C] in and out."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # rows: q, then k, then v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.n_embd = config.n_embd
        self.dropout = config.dropout

    def forward(self, x, cache=None, doc_ids=None, dropout=True):
        """Attend within x [B,T,C], and within documents where doc_ids [B,T] are given. `dropout=False` leaves the output's dropout
        to the add that follows."""
        qkv = project(self.c_attn, x)
        y = ops.attention(qkv, self.n_head, self.dropout if self.training else 0.0, cache, doc_ids)
        y = project(self.c_proj, y)
        return self.resid_dropout(y) if dropout else y


class MLP(nn.Module):
    """Up-projection to 4C, exact-erf GELU, down-projection. [B,T,C] in and out."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.recompute = False

    def forward(self, x, dropout=True):
        """`dropout=False` leaves the output's dropout to the add that follows."""
        fc, proj = self.c_fc, self.c_proj
        y = ops.gelu_mlp(x, fc.weight, fc.bias, proj.weight, proj.bias, self.recompute, (shadow(fc), shadow(proj)))
        return self.dropout(y) if dropout else y


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, doc_ids=None):
        """x is the stream [B,T,C], or the pair (stream, the last block's branch, not yet added); gives back the same kind."""
        if not isinstance(x, tuple):
            x, branch = self((x, None), cache, doc_ids)
            return x + self.mlp.dropout(branch)
        # To the first block comes no branch. Every block's MLP has one and the same dropout, so this block's stands for the last one's.
        x, h = self.ln_1(*x, dropout_p=dropout_p(self.mlp.dropout))
        branch = self.attn(h, cache, doc_ids, dropout=False)
        x, h = self.ln_2(x, branch, dropout_p=dropout_p(self.attn.resid_dropout))
        return x, self.mlp(h, dropout=False)


class GPT(nn.Module):
    """nanoGPT's `GPT`: names, shapes, tie, initial weights and methods.

    Constructing it prints one line with the number of parameters, and draws from torch's CPU generator exactly
    what nanoGPT draws: its data loader reads the same generator, so a draw left out would change every batch.
    """

    def __init__(self, config):
        super().__init__()
        assert config.vocab_size is not None
        assert config.block_size is not None
        if config.n_embd % config.n_head != 0:
            raise ValueError(f"n_embd={config.n_embd} is not a multiple of n_head={config.n_head}")
        self.config = config
        # The modules draw PyTorch's default weights as they are made. None of these values stays, but the order
        # of the draws is nanoGPT's order of construction.
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied: one tensor under both names
        self.recompute_blocks = False
        self.separator = self.stream_dtype = None
        self._init_weights()
        print(f"number of parameters: {self.get_num_params() / 1e6:.2f}M")

    def _init_weights(self):
        """GPT-2's init as nanoGPT draws it: std 0.02, and 0.02/sqrt(2 n_layer) where a layer writes to the stream."""
        t = self.transformer
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        nn.init.normal_(t.wte.weight, std=0.02)  # thrown away: the tied head below draws it again
        nn.init.normal_(t.wpe.weight, std=0.02)
        for block in t.h:
            # Both c_proj are drawn here too, and thrown away.
            for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.normal_(linear.weight, std=0.02)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        nn.init.normal_(self.lm_head.weight, std=0.02)  # the draw of the shared tensor that stays
        for block in t.h:
            # Each block adds two branches to the stream: the smaller std keeps its final variance free of depth.
            # Drawn anew, not scaled.
            nn.init.normal_(block.attn.c_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)

    def set_recompute(self, mode):
        """What training computes again in the backward instead of keeping it: "none", "gelu" or "block"; the same values each way."""
        self.recompute_blocks = mode == "block"
        for block in self.transformer.h:
            block.mlp.recompute = mode == "gelu"

    def set_doc_mask(self, separator):
        """Keep attention within documents, each of which begins at its separator, a token id; None: across them, as nanoGPT's."""
        self.separator = separator

    def set_residual(self, dtype):
        """The dtype of the residual stream between blocks; None: the weights'. One of 16 bits wants autocast to the same."""
        self.stream_dtype = dtype

    @torch.no_grad()
    def keep_shadows(self, dtype):
        """Keep the weight of every Linear in a dtype too, so that no step casts it; state_dict knows nothing of it.

        After each change of the weights call `refresh_shadows`, or have an `optim.AdamW` write them (its `keeper`). Under DDP keep them
        after it was made, when all processes have the same weights.
        """
        for linear in self._linears():
            linear.register_buffer("shadow", torch.empty_like(linear.weight, dtype=dtype), persistent=False)
        self.refresh_shadows()

    def shadows(self):
        """{weight: its shadow} of all that are kept and not seen to be behind their weights."""
        return {m.weight: m.shadow for m in self._linears() if shadow(m) is not None}

    @torch.no_grad()
    def refresh_shadows(self):
        """Make the shadows equal to the weights again."""
        kept = {m.weight: m.shadow for m in self._linears() if getattr(m, "shadow", None) is not None}
        if kept:
            torch._foreach_copy_(list(kept.values()), list(kept))
        self.mark_shadows(kept)

    def mark_shadows(self, weights):
        """Take these weights' shadows to be equal to them as they are now."""
        for linear in self._linears():
            if linear.weight in weights:
                linear.shadow_of = state_of(linear.weight)

    def _apply(self, *args, **kwargs):
        """After .to(), .half() and the like, shadows are made anew in their own dtype."""
        dtype = next((linear.shadow.dtype for linear in self._linears() if hasattr(linear, "shadow")), None)
        super()._apply(*args, **kwargs)
        if dtype is not None:
            self.keep_shadows(dtype)
        return self

    def _linears(self):
        return [m for m in self.modules() if isinstance(m, nn.Linear)]

    def get_num_params(self, non_embedding=True):
        """Number of parameters; less the position embeddings by default. The token embeddings count: they are the head."""
        n_params = sum(p.numel() for p in self.parameters())
        if non_embedding:
            n_params -= self.transformer.wpe.weight.numel()
        return n_params

    def forward(self, idx, targets=None, return_logits=True):
        """(logits, loss) of token ids idx [B,T], T from 1 to block_size.

        targets [B,T]: the next token of each, -1 where none counts. With them the logits are [B,T,V] and the loss is
        their mean cross entropy; without, the logits are the last position's [B,1,V] and the loss is None.
        `return_logits=False` (targets needed) gives (None, loss).
        Raises AssertionError for a sequence that is empty or longer than block_size.
        """
        h, head = self._hidden(idx)
        if targets is None:
            return self.lm_head(h[:, [-1], :]), None
        if not return_logits:
            return None, ops.linear_cross_entropy(h, head, targets, shadow=shadow(self.lm_head))
        logits = self.lm_head(h)
        return logits, ops.cross_entropy(logits, targets)

    def _hidden(self, idx, caches=None):
        """(the final LayerNorm's output [B,T,C], the tied head's weight) of idx [B,T].

        `caches` holds one KVCache per block, or None: what they hold of idx is not computed again, and left out of the output.
        """
        start = caches[0].length if caches else 0
        end = idx.size(1)
        assert end > start, "Cannot forward an empty sequence"
        assert end <= self.config.block_size, (
            f"Cannot forward sequence of length {end}, block size is only {self.config.block_size}"
        )
        doc_ids = None
        if self.separator is not None:
            # The separator is of the document behind it, which is thereby told that nothing came before.
            doc_ids = (idx == self.separator).cumsum(1, dtype=torch.int32)
        t = self.transformer
        wpe = t.wpe.weight[start:] if start else t.wpe.weight
        x, head = ops.embedding(idx[:, start:], t.wte.weight, wpe, dropout_p(t.drop), self.stream_dtype)
        x = x, None
        for i, block in enumerate(t.h):
            if self.recompute_blocks and self.training and torch.is_grad_enabled():
                # A CUDA graph cannot hold the reading of a random state: without dropout there is none to keep.
                drops = max(block.attn.dropout, dropout_p(block.attn.resid_dropout), dropout_p(block.mlp.dropout)) > 0
                x = checkpoint(block, x, None, doc_ids, use_reentrant=False, preserve_rng_state=drops)
            else:
                x = block(x, caches[i] if caches else None, doc_ids)
        _, h = t.ln_f(*x, dropout_p=dropout_p(t.h[-1].mlp.dropout))
        return h, head

    def crop_block_size(self, block_size):
        """Shorten the context to block_size, in place. Do it before an optimizer is made: wpe becomes a new parameter."""
        assert block_size <= self.config.block_size
        self.config.block_size = block_size
        wpe = self.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone())  # clone: a checkpoint stores whole storages
        wpe.num_embeddings = block_size

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """GPT-2's weights from Hugging Face, by name (gpt2, gpt2-medium, gpt2-large, gpt2-xl) or from a local folder.

        Only dropout may be overridden. Needs the extra `hf` (transformers). nanoGPT runs these weights with the erf
        GELU, where OpenAI trained them with the tanh form; so does this (at most 4.8e-4 apart per activation).
        """
        override_args = override_args or {}
        assert all(k == "dropout" for k in override_args), (
            f"only dropout can be overridden, not {sorted(override_args)}"
        )
        from transformers import GPT2Config, GPT2LMHeadModel

        print(f"loading weights from pretrained gpt: {model_type}")
        c = GPT2Config.from_pretrained(model_type)
        print(f"forcing vocab_size={c.vocab_size}, block_size={c.n_positions}, bias=True")
        if "dropout" in override_args:
            print(f"overriding dropout rate to {override_args['dropout']}")
        shape = dict(
            n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, vocab_size=c.vocab_size, block_size=c.n_positions
        )
        model = cls(GPTConfig(**shape, bias=True, **override_args))
        source = GPT2LMHeadModel.from_pretrained(model_type)
        theirs = {k: v for k, v in source.state_dict().items() if not k.endswith((".attn.masked_bias", ".attn.bias"))}
        ours = model.state_dict()
        assert theirs.keys() == ours.keys(), f"mismatched keys: {sorted(theirs.keys() ^ ours.keys())}"
        conv1d = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
        with torch.no_grad():
            for name, value in theirs.items():
                # OpenAI's Conv1D holds its matrix as (in, out), a Linear as (out, in).
                value = value.t() if name.endswith(conv1d) else value
                assert value.shape == ours[name].shape, f"{name}: {tuple(value.shape)} is not {tuple(ours[name].shape)}"
                ours[name].copy_(value)
        return model

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW over nanoGPT's two parameter groups; see `optim.adamw`."""
        return optim.adamw(self, weight_decay, learning_rate, betas, device_type)

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops=312e12):
        """Model FLOPs utilisation of fwdbwd_per_iter sequences in dt seconds: FLOP/s over peak_flops (default: A100 bf16).

        FLOPs as PaLM's appendix B counts them (arXiv 2204.02311), attention as if it were not causal.
        """
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak_flops

    def flops_per_token(self):
        """FLOPs of one token, forward and backward: 6 N + 12 L H Q T, as nanoGPT counts."""
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, allowed=None):
        """Continue idx [B,T] (T >= 1) by max_new_tokens sampled tokens: [B, T + max_new_tokens].

        temperature 0 takes the likeliest token; top_k keeps the k likeliest (and ties), None or 0 keeps all; allowed,
        bool [V], rules ids out, for a vocabulary that is padded beyond its tokenizer. Call eval() first, as with
        nanoGPT. While the text fits into block_size, the keys and values of earlier tokens are kept; beyond it the
        window slides, every position changes, and each token is computed from the whole window.
        """
        block_size = self.config.block_size
        caches = None
        for _ in range(max_new_tokens):
            # Dropout in train mode draws anew for every token, old ones too: nothing to keep.
            if self.training or idx.size(1) > block_size:
                logits, _ = self(idx[:, -block_size:])
            else:
                caches = caches or [KVCache(block_size) for _ in self.transformer.h]
                logits = self.lm_head(self._hidden(idx, caches)[0][:, [-1], :])
            idx = torch.cat((idx, sample_token(logits[:, -1, :], temperature, top_k, allowed)), dim=1)
        return idx


def sample_token(logits, temperature=1.0, top_k=None, allowed=None):
    """One token id per row of logits [B,V]: [B,1]. See `GPT.generate`."""
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -float("inf"))
    if temperature < 1e-6:  # 0, and what would overflow the division
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < kth, -float("inf"))
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)


class KVCache:
    """The keys and values of one attention layer, kept while text is generated.

    Room for block_size tokens is taken once, so that a step appends without copying what is there.
    """

    def __init__(self, block_size):
        self.block_size = block_size
        self.length = 0

    def append(self, k, v):
        """Store k and v [B,H,T,C/H] behind those held already, and return all of them."""
        if self.length == 0:
            B, H, _, D = k.shape
            self.k, self.v = k.new_empty(2, B, H, self.block_size, D)
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


def dropout_p(module):
    """The probability at which an nn.Dropout drops now: 0 outside training."""
    return module.p if module.training else 0.0
