"""Hugging Face's GPT2LMHeadModel with nanoGPT's weights, its GELU the exact one and its dropout off."""

from torch import nn
from torch.nn import functional as F

from fastgpt.benchmarks.harness import importable

# Its Conv1D holds a matrix as [in, out].
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


class HuggingFaceGPT(nn.Module):
    """model(idx, targets) gives (logits, loss). Where a GPTConfig has bias=False, its biases are zeros that do not train.

    Raises NotHere without transformers.
    """

    def __init__(self, config):
        super().__init__()
        hf = importable("transformers")
        # Under torch.compile transformers makes a mask, and SDPA then misses the causal kernels. By another name it makes none.
        attend = importable("transformers.integrations.sdpa_attention").sdpa_attention_forward
        hf.AttentionInterface.register("causal_sdpa", attend)
        p = config.dropout
        self.model = hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
                n_head=config.n_head, activation_function="gelu", resid_pdrop=p, embd_pdrop=p, attn_pdrop=p, use_cache=False,
                attn_implementation="causal_sdpa",
            )
        )  # fmt: skip
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(config.bias or not name.endswith(".bias"))

    def forward(self, idx, targets):
        logits = self.model(input_ids=idx, use_cache=False).logits
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)

    def load(self, weights):
        """Take nanoGPT's weights by name. A bias that they lack is zeros."""
        theirs = self.model.state_dict()
        for name, value in theirs.items():
            if name in weights:
                value.copy_(weights[name].t() if name.endswith(TRANSPOSED) else weights[name])
            elif name.endswith(".bias"):
                value.zero_()

    def weights(self):
        """The weights by nanoGPT's names."""
        return {n: v.t() if n.endswith(TRANSPOSED) else v for n, v in self.model.state_dict().items()}
