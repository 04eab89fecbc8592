"""The initial weights: nanoGPT's random draws, one by one, and other schemes to compare with them.

`GPT(config)` draws as nanoGPT does. `apply` then gives the model another scheme's weights. It draws nothing from torch's generator: all
schemes leave it where nanoGPT's init leaves it, so runs of one seed see the same batches whatever their scheme.
"""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastgpt.config import GPTConfig

STD = 0.02  # of every matrix and embedding but the two c_proj of a block


class Scheme(NamedTuple):
    """How weights are drawn. `std` is that of both c_proj of a block, which write to the residual stream; None: PyTorch's own init."""

    formula: str
    std: "Callable[[GPTConfig], float] | None"


# By the names of --init_scheme. All but the last draw c_proj as nanoGPT does, and scale what was drawn.
SCHEMES = {
    "nanogpt": Scheme("0.02 / sqrt(2 n_layer)", lambda c: STD / math.sqrt(2 * c.n_layer)),
    "no_rescale": Scheme("0.02", lambda c: STD),
    "times_0.02": Scheme("0.02 * 0.02", lambda c: STD * 0.02),
    "over_sqrt_layers": Scheme("0.02 / sqrt(n_layer)", lambda c: STD / math.sqrt(c.n_layer)),
    "times_sqrt_2_over_layers": Scheme("0.02 * sqrt(2 / n_layer)", lambda c: STD * math.sqrt(2 / c.n_layer)),
    "over_sqrt_width": Scheme("0.02 / sqrt(n_embd)", lambda c: STD / math.sqrt(c.n_embd)),
    "pytorch": Scheme("the defaults of nn.Linear and nn.Embedding", None),
}


@torch.no_grad()
def apply(model: Any, scheme: str) -> None:
    """Give a new GPT the weights of a scheme. Torch's generator is not touched.

    "pytorch" has a generator of its own, with torch's seed. It draws what the modules' constructors drew, before nanoGPT's init replaced
    it. The tied tensor then is the head's: it is tied before PyTorch draws the head.
    """
    std = SCHEMES[scheme].std
    if scheme == "nanogpt":
        return
    if std is None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(torch.initial_seed())
            for module in model.modules():
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    module.reset_parameters()
        return
    factor = std(model.config) / SCHEMES["nanogpt"].std(model.config)  # type: ignore[misc]
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            p.mul_(factor)


class Draw(NamedTuple):
    """Random numbers that nanoGPT draws at once, for a parameter. `size` is a normal's std, or the bound of a uniform around 0."""

    name: str
    shape: tuple[int, ...]
    kind: str  # "normal" or "uniform"
    size: float

    def __call__(self) -> Tensor:
        """The numbers, from torch's generator."""
        t = torch.empty(self.shape)
        return t.normal_(0, self.size) if self.kind == "normal" else t.uniform_(-self.size, self.size)


WTE, WPE = "transformer.wte.weight", "transformer.wpe.weight"


def draws(c: "GPTConfig") -> Iterator[Draw]:
    """All of nanoGPT's draws in their order. Of a parameter the last one stays; of a bias none does, since it is set to 0.

    The draws are written down here a second time, apart from the model, so that one can be held against the other.
    """
    C = c.n_embd
    linears = [
        (f"transformer.h.{i}.{name}", (out, fan_in))
        for i in range(c.n_layer)
        for name, out, fan_in in (
            ("attn.c_attn", 3 * C, C), ("attn.c_proj", C, C), ("mlp.c_fc", 4 * C, C), ("mlp.c_proj", C, 4 * C)
        )
    ]  # fmt: skip
    wte, wpe = (c.vocab_size, C), (c.block_size, C)
    # The constructors of PyTorch's modules.
    yield Draw(WTE, wte, "normal", 1.0)  # of the tensor that the tie throws away
    yield Draw(WPE, wpe, "normal", 1.0)
    for name, shape in linears:
        yield Draw(f"{name}.weight", shape, "uniform", shape[1] ** -0.5)
        if c.bias:
            yield Draw(f"{name}.bias", shape[:1], "uniform", shape[1] ** -0.5)
    yield Draw(WTE, wte, "uniform", C**-0.5)  # lm_head
    # nanoGPT's _init_weights, module by module: the tied tensor is drawn through both of its modules.
    yield Draw(WTE, wte, "normal", STD)
    yield Draw(WPE, wpe, "normal", STD)
    for name, shape in linears:
        yield Draw(f"{name}.weight", shape, "normal", STD)
    yield Draw(WTE, wte, "normal", STD)
    # The loop over c_proj.weight at the end of nanoGPT's constructor.
    for name, shape in linears:
        if name.endswith("c_proj"):
            yield Draw(f"{name}.weight", shape, "normal", STD / math.sqrt(2 * c.n_layer))
