"""GPT: nanoGPT's model with its names, initial weights and interface. Each hot path is one call into `ops`.

Two things differ from nanoGPT's file; neither changes what is computed:

- The LayerNorm does the residual add before it. So a block passes on the residual stream, the last branch, which is not added yet,
  and p, the probability of the dropout that is not applied to that branch yet.
- `model(idx, targets, return_logits=False)` returns the loss alone, so training never keeps the logits.

The modules are those of nn.py. A fused path replaces the calls of several of them. It runs only if all of them are `plain`. A module that
a user has replaced, hooked or parametrised is called as nanoGPT calls it.
"""

import math
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastgpt import init, ops, optim
from fastgpt import nn as modules
from fastgpt.choose import choose
from fastgpt.config import GPTConfig, UserError
from fastgpt.nn import LayerNorm, plain
from fastgpt.records import Shape

IGNORED = -1  # the target that does not count, in nanoGPT


def plain_embedding(module: nn.Module) -> TypeGuard[Any]:
    """Whether a module is a plain nn.Embedding that only looks up."""
    return plain(module, nn.Embedding) and not (
        module.max_norm or module.padding_idx is not None or module.scale_grad_by_freq or module.sparse
    )


def add_branch(x: Tensor, branch: Tensor | None, p: float) -> Tensor:
    """The stream x plus dropout(branch), each [B,T,C]; x itself if branch is None."""
    return x if branch is None else x + F.dropout(branch, p, training=p > 0)


def add_norm(norm: nn.Module, x: Tensor, branch: Tensor | None, p: float, last: bool = False) -> tuple[Any, Tensor]:
    """(the stream x plus dropout(branch), its norm), each [B,T,C]. With `last` nobody reads the stream, and it may be None."""
    if plain(norm, LayerNorm):
        return ops.add_layer_norm(x, branch, norm.weight, norm.bias, norm.eps, p, last, norm.kernels)
    x = add_branch(x, branch, p)
    return x, norm(x)


class CausalSelfAttention(modules.CausalSelfAttention):
    """Multi-head causal self-attention with its projections, of a GPTConfig. [B,T,C] in and out."""

    def __init__(self, config: GPTConfig):
        super().__init__(config.n_embd, config.n_head, config.bias, config.dropout)


class MLP(modules.MLP):
    """Up-projection to 4C, GELU, by erf unless someone sets another, down-projection, of a GPTConfig. [B,T,C] in and out."""

    def __init__(self, config: GPTConfig):
        super().__init__(config.n_embd, config.bias, config.dropout)


def call_module(module: nn.Module, kind: type, x: Tensor, **context: Any) -> Tensor:
    """A module's output for x [B,T,C]. A module of `kind` also gets the context; any other gets x alone, as in nanoGPT.

    Raises ValueError if another kind of module would have to attend within documents.
    """
    context = {name: value for name, value in context.items() if value is not None}
    if context and not isinstance(module, kind):
        raise ValueError(
            f"{type(module).__name__} in place of {kind.__name__} knows nothing of documents: set_doc_mask(None)"
        )
    return module(x, **context)


def run_branch(module: nn.Module, kind: type, h: Tensor, **context: Any) -> tuple[Tensor, float]:
    """(the branch [B,T,C] that a block's attention or MLP computes from h [B,T,C], p of the dropout still to be applied)."""
    return module.branch(h, **context) if plain(module, kind) else (call_module(module, kind, h, **context), 0.0)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: "KVCache | None" = None, doc_ids: Tensor | None = None) -> Tensor:
        """The stream [B,T,C] after the block, from x, the stream before it."""
        return add_branch(*self.step(x, None, 0.0, cache, doc_ids))

    def step(
        self, x: Tensor, branch: Tensor | None, p: float, cache: "KVCache | None" = None, doc_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor, float]:
        """(stream, branch, p) after the block, from the same before it: a branch not added yet, and p of its dropout."""
        x, h = add_norm(self.ln_1, x, branch, p)
        branch, p = run_branch(self.attn, CausalSelfAttention, h, cache=cache, doc_ids=doc_ids)
        x, h = add_norm(self.ln_2, x, branch, p)
        return x, *run_branch(self.mlp, MLP, h)


def stepping(block: nn.Module) -> TypeGuard[Any]:
    """Whether a block's `step` may be called in place of its forward: it is plain, or FSDP's, whose hooks stand around `step` then."""
    return plain(block, Block) or (isinstance(block, Block) and "step" in block.__dict__)


# What an MLP may have between its Linears, by the names of --activation. nanoGPT's is "gelu".
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
}


def draws(block: nn.Module) -> bool:
    """Whether a block may draw random numbers. If not, checkpointing preserves no random state: a CUDA graph cannot read one."""

    def p(module):
        if type(module) is nn.Dropout:
            return module.p
        if type(module) is CausalSelfAttention:
            return module.dropout
        # A user's module may draw.
        return float(type(module) not in (nn.Linear, nn.GELU, nn.ReLU, LayerNorm, MLP, Block))

    return any(p(module) > 0 for module in block.modules())


class GPT(nn.Module):
    """nanoGPT's `GPT`: names, shapes, tie, initial weights and methods.

    The constructor prints one line with the number of parameters. It draws from torch's CPU generator exactly what nanoGPT draws:
    the data loader uses the same generator, so a missing draw would change every batch.

    `kernels`, an `ops.Kernels`, says what runs each hot path. At first it is `ops.AUTO`: Triton's kernels on a CUDA GPU, for all input that
    they take, and PyTorch's operators elsewhere. `set_kernels` pins them, or chooses by measuring.
    """

    kernels = ops.AUTO

    transformer: Any  # nn.ModuleDict, whose modules no checker knows
    separator: int | None
    residual_dtype: torch.dtype | None
    activation = "gelu"

    def __init__(self, config: GPTConfig):
        super().__init__()
        assert config.vocab_size is not None
        assert config.block_size is not None
        if config.n_embd % config.n_head != 0:
            raise ValueError(f"n_embd={config.n_embd} is not a multiple of n_head={config.n_head}")
        self.config = config
        # Each module draws PyTorch's default weights when it is made. `_init_weights` overwrites them all, but the draws
        # advance the generator: keep nanoGPT's order of construction.
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
        self.separator = self.residual_dtype = None
        self._init_weights()
        print(f"number of parameters: {self.get_num_params() / 1e6:.2f}M")

    def _init_weights(self):
        """GPT-2's init, drawn as nanoGPT does: std 0.02, but 0.02/sqrt(2 n_layer) for the layers that write to the stream."""
        t = self.transformer
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        nn.init.normal_(t.wte.weight, std=0.02)  # overwritten: the tied head below draws it again
        nn.init.normal_(t.wpe.weight, std=0.02)
        for block in t.h:
            # Both c_proj are drawn here too, and overwritten below.
            for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.normal_(linear.weight, std=0.02)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        nn.init.normal_(self.lm_head.weight, std=0.02)  # the final values of the shared tensor
        for block in t.h:
            # Each block adds two branches to the stream. With the smaller std its final variance does not depend on depth.
            # These are new draws, not the old ones scaled.
            nn.init.normal_(block.attn.c_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)

    def set_recompute(self, mode: str) -> None:
        """What the backward computes again, so that training need not keep it: "none", "gelu" or "block". The values are the same."""
        self.recompute_blocks = mode == "block"
        for module in self.modules():
            if isinstance(module, MLP):
                module.recompute = mode == "gelu"

    def set_doc_mask(self, separator: int | None) -> None:
        """Keep attention within documents. Each begins at a separator, a token id. None: attend across documents, as nanoGPT."""
        self.separator = separator

    def set_residual(self, dtype: torch.dtype | None) -> None:
        """Set the dtype of the residual stream between blocks. None: that of the weights. A 16-bit dtype needs autocast to the same."""
        self.residual_dtype = dtype

    def set_activation(self, name: str) -> None:
        """Set what stands between an MLP's Linears: one of ACTIVATIONS. It belongs to the weights, as the sizes in GPTConfig do.

        Raises UserError for an unknown name."""
        if name not in ACTIVATIONS:
            raise UserError(f"there is no activation {name!r}; there are {', '.join(ACTIVATIONS)}")
        self.activation = name
        for module in self.modules():
            if isinstance(module, MLP):
                module.gelu = ACTIVATIONS[name]()

    def set_kernels(
        self, kernels: str | ops.Kernels = "auto", batch_size: int = 8, dtype: torch.dtype | None = None, compiled: bool = False,
    ) -> ops.Kernels:  # fmt: skip
        """Decide which kernels run from now on, and return the `ops.Kernels`.

        kernels: an `ops.Kernels`, which is taken as it is; or, as for the flag --kernels, "triton", "torch", "auto", or a list such as
        "attention=torch,gelu_mlp=triton". "auto" checks and times every implementation on the device of the weights, and chooses the
        fastest; without a CUDA GPU it means "torch". It measures batch_size sequences of block_size tokens in `dtype` (None:
        autocast's if that is on, else the weights'). compiled: whether the model will run under torch.compile. Call it before
        `configure_optimizers`, since the optimizer's update is one of these ops. Raises UserError for an unknown or missing kernel.
        """
        if isinstance(kernels, str):
            weight = self.lm_head.weight
            kind = weight.device.type
            auto = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
            narrow = self.residual_dtype not in (None, torch.float32)
            modes = dict(
                doc_mask=self.separator is not None, narrow_residual=narrow, tanh=self.activation == "gelu_tanh"
            )
            shape = Shape.of(batch_size, self.config, **modes)
            kernels = choose(kernels, shape, dtype or auto, weight.device, compiled)
        for module in self.modules():
            if isinstance(module, (GPT, LayerNorm, modules.CausalSelfAttention, modules.MLP)):
                module.kernels = kernels
        return kernels

    @staticmethod
    def from_checkpoint(path: str | PathLike[str]) -> "GPT":
        """The GPT of a checkpoint, on the CPU and in eval mode. path: an out_dir, of which it takes the newest whole checkpoint; a
        ckpt.pt; or a sharded folder.

        nanoGPT's checkpoints are read too. No code in a file runs. Call `train()` to go on training; `to("cuda")` moves the model. A run
        with --doc_mask needs `set_doc_mask` again. Raises UserError if there is no checkpoint, or it is damaged.
        """
        from fastgpt import checkpoint, sharded

        path = Path(path)
        if path.is_file():
            try:
                saved = checkpoint.read(path, resume=False)
            except checkpoint.Fault as e:
                raise UserError(f"{path}: {' '.join(str(e).split())[:300]}") from None
        else:
            saved = sharded.load(path)
        return checkpoint.build_model(saved).eval()

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters, by default without the position embeddings. The token embeddings count: they are the head."""
        n_params = sum(p.numel() for p in self.parameters())
        if non_embedding:
            n_params -= self.transformer.wpe.weight.numel()
        return n_params

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, return_logits: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """(logits, loss) of token ids idx [B,T], T from 1 to block_size.

        targets [B,T]: the next token at each position, or -1 to ignore it. With targets the logits are [B,T,V] and the loss is
        their mean cross entropy. Without targets the logits are the last position's [B,1,V] and the loss is None.
        `return_logits=False`, with targets, gives (None, loss).
        Raises AssertionError for a sequence that is empty or longer than block_size.
        """
        h, head = self._hidden(idx)
        if targets is None:
            return self.lm_head(h[:, [-1], :]), None
        if not return_logits and plain(self.lm_head, nn.Linear) and self.lm_head.bias is None:
            weight = self.lm_head.weight
            shadow = getattr(weight, "shadow", None)  # `head`, an alias of the tied parameter, has no shadow
            weight = head if weight is self.transformer.wte.weight else weight
            return None, ops.linear_cross_entropy(h, weight, targets, IGNORED, shadow, self.kernels)
        logits = self.lm_head(h)
        return logits if return_logits else None, ops.cross_entropy(logits, targets, IGNORED)

    def _hidden(self, idx, caches=None):
        """(the final LayerNorm's output [B,T,C], the tied head's weight) of idx [B,T].

        caches: one KVCache for each block, or None. Tokens of idx that they hold are not computed again, and not in the output.
        """
        start = caches[0].length if caches else 0
        end = idx.size(1)
        assert end > start, "Cannot forward an empty sequence"
        assert end <= self.config.block_size, (
            f"Cannot forward sequence of length {end}, block size is only {self.config.block_size}"
        )
        doc_ids = None
        if self.separator is not None:
            # The separator belongs to the document that it begins, and tells the model that nothing came before.
            doc_ids = (idx == self.separator).cumsum(1, dtype=torch.int32)
        t = self.transformer
        x, head = self._embed(idx[:, start:], start)
        branch, p = None, 0.0
        for i, block in enumerate(t.h):
            if not stepping(block):
                cache = caches[i] if caches else None
                x, branch = call_module(block, Block, add_branch(x, branch, p), cache=cache, doc_ids=doc_ids), None
            elif self.recompute_blocks and self.training and torch.is_grad_enabled():
                x, branch, p = checkpoint(
                    block.step, x, branch, p, None, doc_ids, use_reentrant=False, preserve_rng_state=draws(block)
                )
            else:
                x, branch, p = block.step(x, branch, p, caches[i] if caches else None, doc_ids)
        return add_norm(t.ln_f, x, branch, p, last=True)[1], head

    def _embed(self, idx, start):
        """(the stream [B,T,C], the tied head's weight) of idx [B,T], whose first column has position `start`."""
        t = self.transformer
        if plain_embedding(t.wte) and plain_embedding(t.wpe) and plain(t.drop, nn.Dropout):
            wpe = t.wpe.weight[start:] if start else t.wpe.weight
            p = t.drop.p if t.drop.training else 0.0
            return ops.embedding(idx, t.wte.weight, wpe, p, self.residual_dtype, kernels=self.kernels)
        x = t.wte(idx) + t.wpe(torch.arange(start, start + idx.size(1), device=idx.device))
        return t.drop(x if self.residual_dtype is None else x.to(self.residual_dtype)), self.lm_head.weight

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context to block_size, in place. Call it before an optimizer is made: wpe becomes a new parameter."""
        assert block_size <= self.config.block_size
        self.config.block_size = block_size
        wpe = self.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone())  # clone: a checkpoint saves whole storages
        wpe.num_embeddings = block_size

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict[str, Any] | None = None) -> "GPT":
        """GPT-2's weights in Hugging Face's format: a local folder, or an id of the hub such as gpt2-medium or distilgpt2.

        Only dropout may be overridden. OpenAI trained its weights with the tanh GELU. nanoGPT runs them with the erf GELU, and so does
        this; `set_activation("gelu_tanh")` computes OpenAI's function. Raises UserError for what is no GPT-2, or another function than
        GPT's.
        """
        override_args = override_args or {}
        assert all(k == "dropout" for k in override_args), (
            f"only dropout can be overridden, not {sorted(override_args)}"
        )
        from fastgpt import huggingface

        return huggingface.load(model_type, **override_args)

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> optim.AdamW:
        """AdamW over nanoGPT's two parameter groups; see `optim.adamw`."""
        return optim.adamw(self, weight_decay, learning_rate, betas, device_type, self.kernels)

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float, peak_flops: float = 312e12) -> float:
        """Model FLOPs utilisation of fwdbwd_per_iter sequences in dt seconds: FLOP/s over peak_flops (default: A100 bf16).

        FLOPs are counted as in PaLM's appendix B (arXiv 2204.02311): attention counts as if it were not causal.
        """
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak_flops

    def flops_per_token(self) -> int:
        """FLOPs of one token, forward and backward: 6 N + 12 L H Q T, as nanoGPT counts (H heads of size Q: H Q = n_embd)."""
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    @torch.no_grad()
    def generate(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, allowed: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Continue idx [B,T] (T >= 1) by max_new_tokens sampled tokens: [B, T + max_new_tokens].

        temperature 0 chooses the likeliest token. top_k samples from the k likeliest (and ties); None or 0: from all. allowed,
        bool [V], is False for ids that must not be sampled, such as the padding of a vocabulary. Call eval() first, as with
        nanoGPT. While the text fits into block_size, the keys and values of earlier tokens are cached. Beyond it the window
        slides and every position changes, so each token is computed from the whole window.
        """
        block_size = self.config.block_size
        caches = None
        # Only our blocks and attention use caches. In train mode dropout draws new masks for old tokens too: nothing can be cached.
        cacheable = all(isinstance(b, Block) and isinstance(b.attn, CausalSelfAttention) for b in self.transformer.h)
        for _ in range(max_new_tokens):
            if self.training or not cacheable or idx.size(1) > block_size:
                logits, _ = self(idx[:, -block_size:])
            else:
                caches = caches or [KVCache(block_size) for _ in self.transformer.h]
                logits = self.lm_head(self._hidden(idx, caches)[0][:, [-1], :])
            idx = torch.cat((idx, sample_token(logits[:, -1, :], temperature, top_k, allowed)), dim=1)
        return idx


def new_gpt(config: GPTConfig, init_scheme: str = "nanogpt", activation: str = "gelu") -> GPT:
    """A new GPT on the CPU, with the weights of a scheme of `init.SCHEMES` and an activation of ACTIVATIONS."""
    model = GPT(config)
    init.apply(model, init_scheme)
    model.set_activation(activation)
    return model


def sample_token(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, allowed: Tensor | None = None
) -> Tensor:
    """One token id per row of logits [B,V]: [B,1]. See `GPT.generate`."""
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -float("inf"))
    if temperature < 1e-6:  # 0, or so small that the division would overflow
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < kth, -float("inf"))
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)


class KVCache:
    """The keys and values of one attention layer, cached while text is generated.

    Memory for block_size tokens is allocated once, so appending copies no old tokens.
    """

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [B,H,T,C/H] after the cached ones, and return all of them."""
        if self.length == 0:
            B, H, _, D = k.shape
            self.k, self.v = k.new_empty(2, B, H, self.block_size, D)
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]
