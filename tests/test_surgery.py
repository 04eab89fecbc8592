"""A GPT whose modules were replaced, hooked or parametrised calls them as nanoGPT does: the same logits, losses and gradients as a model
that calls every module (modular_gpt.py), by PyTorch and by the kernels, in training and compiled."""

import copy
import functools

import pytest
import torch
from modular_gpt import ModularGPT
from torch import nn
from torch.nn.utils import parametrizations, prune

from fastgpt import ops
from fastgpt.model import GPT, GPTConfig

CONFIG = dict(block_size=8, vocab_size=19, n_layer=2, n_head=2, n_embd=16, bias=True)
IDX, TARGETS = torch.randint(19, (2, 2, 8), generator=torch.Generator().manual_seed(2))
KERNELS = [ops.TORCH] + ([pytest.param("triton", id="triton")] if ops.triton else [])


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def swap(path, make):
    """Puts what make(the old module) makes in the place of a module of the first block, or of the transformer."""

    def cut(model):
        t = model.transformer
        owner, _, name = path.rpartition(".")
        owner = t.h[0].get_submodule(owner) if hasattr(t.h[0], path.split(".")[0]) else model.get_submodule(owner)
        torch.manual_seed(3)
        setattr(owner, name, make(getattr(owner, name)))

    return cut


def like(kind, **options):
    """Makes a module of a kind with the old one's sizes and weights."""

    def make(old):
        sizes = (
            (old.in_features, old.out_features)
            if isinstance(old, nn.Linear)
            else (old.num_embeddings, old.embedding_dim)
        )
        new = kind(*sizes, **options)
        new.load_state_dict(old.state_dict(), strict=False)
        return new

    return make


def replace_block(model):
    torch.manual_seed(3)
    model.transformer.h[1] = nn.Sequential(nn.Linear(16, 16), nn.Tanh())


def untie(model):
    torch.manual_seed(3)
    model.lm_head.weight = nn.Parameter(torch.randn(19, 16) / 4)


def pruned(path):
    return lambda model: prune.l1_unstructured(model.transformer.h[0].get_submodule(path), "weight", 0.4)


def hooked(path, kind="register_forward_hook"):
    """Doubles what a module answers, or is given."""
    change = (lambda m, args: (2 * args[0],)) if kind == "register_forward_pre_hook" else (lambda m, args, out: 2 * out)

    def cut(model):
        first = model.transformer.h[0]
        module = (
            first.get_submodule(path) if hasattr(first, path.split(".")[0]) or not path else model.get_submodule(path)
        )
        getattr(module, kind)(change)

    return cut


PLACES = ["ln_1", "attn", "attn.c_attn", "attn.c_proj", "attn.resid_dropout", "ln_2", "mlp", "mlp.c_fc", "mlp.gelu"]
PLACES += [
    "mlp.c_proj",
    "mlp.dropout",
    "",
    "lm_head",
    *(f"transformer.{name}" for name in ("wte", "wpe", "drop", "ln_f")),
]
CUTS = {
    "relu": swap("mlp.gelu", lambda old: nn.ReLU()),
    "tanh gelu": swap("mlp.gelu", lambda old: nn.GELU("tanh")),
    "a Linear of another class up": swap("mlp.c_fc", like(Doubling)),
    "a Linear of another class for qkv": swap("attn.c_attn", like(Doubling)),
    "a Sequential for c_proj": swap("attn.c_proj", lambda old: nn.Sequential(old, nn.Tanh())),
    "no resid_dropout": swap("attn.resid_dropout", lambda old: nn.Identity()),
    "no dropout in the MLP": swap("mlp.dropout", lambda old: nn.Identity()),
    "no drop": swap("transformer.drop", lambda old: nn.Identity()),
    "another attention": swap("attn", lambda old: nn.Linear(16, 16)),
    "another MLP": swap("mlp", lambda old: nn.Linear(16, 16)),
    "another norm": swap("ln_1", lambda old: nn.RMSNorm(16)),
    "PyTorch's LayerNorm": swap("ln_2", lambda old: nn.LayerNorm(16)),
    "no last norm": swap("transformer.ln_f", lambda old: nn.Identity()),
    "a padding id": swap("transformer.wte", like(nn.Embedding, padding_idx=3)),
    "gradients by frequency": swap("transformer.wte", like(nn.Embedding, scale_grad_by_freq=True)),
    "another block": replace_block,
    "an untied head": untie,
    "a head with a bias": swap("lm_head", lambda old: nn.Linear(16, 19)),
    "weight norm": lambda model: parametrizations.weight_norm(model.transformer.h[0].mlp.c_fc),
    "an orthogonal weight": lambda model: parametrizations.orthogonal(model.transformer.h[0].attn.c_proj),
    "pruned qkv": pruned("attn.c_attn"),
    "pruned down-projection": pruned("mlp.c_proj"),
    **{f"a hook on {path or 'the block'}": hooked(path) for path in PLACES},
    **{f"a pre-hook on {path}": hooked(path, "register_forward_pre_hook") for path in ("attn.c_attn", "mlp.gelu", "ln_2", "attn")},
}  # fmt: skip


def pair(cut, dropout=0.0):
    """(a GPT, a ModularGPT) of the same weights, both operated on."""
    config = GPTConfig(**CONFIG, dropout=dropout)
    torch.manual_seed(1)
    models = GPT(config), ModularGPT(config)
    for p in models[0].parameters():  # biases and gains that show
        p.data += 0.1 * torch.randn_like(p) if p.dim() == 1 else 0.3 * torch.randn_like(p)
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        cut(model)
    return models


def gradients(model, loss):
    """{name: gradient} of a loss, None where a parameter has none."""
    model.zero_grad()
    loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found, expected, exact):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (value is None) == (found[name] is None), name
        if value is not None:
            tolerance = dict(rtol=0, atol=0) if exact else dict(rtol=2e-4, atol=2e-5)
            torch.testing.assert_close(found[name], value, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


BY_KERNELS = [
    "relu",
    "another norm",
    "another attention",
    "another block",
    "an untied head",
    "pruned qkv",
    "a hook on mlp",
]


@pytest.mark.parametrize(
    ("cut", "kernels"),
    [(cut, ops.TORCH) for cut in CUTS]
    + [
        pytest.param(cut, "triton", marks=[pytest.mark.slow] * (i % 2))
        for i, cut in enumerate(BY_KERNELS)
        if ops.triton
    ],
)
def test_what_stands_in_a_modules_place_is_called_as_nanogpt_calls_it(cut, kernels):
    model, modular = pair(CUTS[cut])
    model.set_kernels(kernels)
    exact = kernels == ops.TORCH
    logits, loss = modular(IDX, TARGETS)
    expected = {"logits": logits.detach(), "loss": loss.detach(), **gradients(modular, loss)}
    for training in (False, True):
        logits, loss = model(IDX, TARGETS, return_logits=not training)
        logits = expected["logits"] if training else logits.detach()
        assert_same({"logits": logits, "loss": loss.detach(), **gradients(model, loss)}, expected, exact)
    model.eval()
    torch.testing.assert_close(model(IDX)[0], expected["logits"][:, [-1]], rtol=2e-4, atol=2e-5)
    assert model.generate(IDX[:, :3], 7).shape == (2, 10)  # beyond block_size too


@pytest.mark.parametrize("cut", [lambda model: None, *(CUTS[n] for n in ("relu", "a hook on mlp", "another block"))])
def test_dropout_falls_where_nanogpts_falls(cut):
    model, modular = pair(cut, dropout=0.3)
    losses = []
    for call in (lambda: model(IDX, TARGETS, return_logits=False)[1], lambda: modular(IDX, TARGETS)[1]):
        torch.manual_seed(4)
        losses.append(call())
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    "cut",
    [
        "relu",
        "a hook on attn.c_attn",
        *(pytest.param(c, marks=pytest.mark.slow) for c in ("another block", "an untied head", "pruned qkv")),
    ],
)
def test_compiled(cut):
    model, modular = pair(CUTS[cut])
    if ops.triton:
        model.set_kernels("triton")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph="hook" not in cut)
    expected = modular(IDX, TARGETS)[1]
    loss = compiled(IDX, TARGETS, return_logits=False)[1]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_same(gradients(model, loss), gradients(modular, expected), exact=False)


def test_backward_hooks_fire():
    model, _ = pair(lambda model: None)
    fired = []
    for path in ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp", "transformer.h.1.ln_2", "transformer.h.0"):
        model.get_submodule(path).register_full_backward_hook(lambda m, gi, go, path=path: fired.append(path))
    model(IDX, TARGETS, return_logits=False)[1].backward()
    assert sorted(fired) == sorted(
        {"transformer.h.0.attn.c_attn", "transformer.h.1.mlp", "transformer.h.1.ln_2", "transformer.h.0"}
    )
    assert len(fired) == 4


def test_a_hook_that_was_removed_leaves_the_fused_path():
    model, _ = pair(lambda model: None)
    called = []
    handle = model.transformer.h[0].mlp.gelu.register_forward_hook(lambda *_: called.append(1))
    model(IDX, TARGETS)
    handle.remove()
    model(IDX, TARGETS)
    assert len(called) == 1


def test_documents_are_not_lost_in_another_attention():
    model, _ = pair(CUTS["another attention"])
    model.set_doc_mask(0)
    with pytest.raises(ValueError, match="Linear in place of CausalSelfAttention knows nothing of documents"):
        model(IDX, TARGETS)


def trained(model, steps=3):
    """The losses of a few steps of SGD on what requires a gradient."""
    optimizer, losses = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5), []
    for _ in range(steps):
        loss = model(IDX, TARGETS)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kernels", KERNELS)
def test_lora_by_peft_trains(kernels):
    peft = pytest.importorskip("peft", reason="the extra `test` has it")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc", "c_proj"], init_lora_weights=False)
    model, modular = pair(lambda model: None)
    model.set_kernels(kernels)
    frozen = copy.deepcopy(model.state_dict())
    curves = []
    for each in (model, modular):
        torch.manual_seed(5)
        curves.append(trained(peft.get_peft_model(each, config)))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0][0] > curves[0][-1]
    for name, value in model.state_dict().items():
        if "lora" not in name:
            assert torch.equal(value, frozen[name.replace("base_layer.", "")]), name


def test_dynamic_quantisation():
    model, modular = pair(lambda model: None)
    quantised, other = (torch.ao.quantization.quantize_dynamic(m.eval(), {nn.Linear}) for m in (model, modular))
    with torch.no_grad():
        logits = quantised(IDX, TARGETS)[0]
        assert torch.equal(logits, other(IDX, TARGETS)[0])
        assert not torch.equal(logits, model(IDX, TARGETS)[0])
    assert quantised.generate(IDX[:, :3], 4).shape == (2, 7)


@pytest.mark.parametrize(
    ("gelu", "fused"),
    [(nn.GELU, 2), (functools.partial(nn.GELU, "tanh"), 2), (nn.ReLU, 1)],
    ids=["erf", "tanh", "relu"],
)
def test_the_fused_path_is_taken_where_all_is_plain(gelu, fused, monkeypatch):
    """Else every test of the fused ops in a model would pass by PyTorch's modules."""
    model, _ = pair(swap("mlp.gelu", lambda old: gelu()))
    calls = []
    for name in ("embedding", "add_layer_norm", "linear", "attention", "gelu_mlp", "linear_cross_entropy"):
        op = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, functools.wraps(op)(lambda *a, op=op, **k: calls.append(op.__name__) or op(*a, **k))
        )
    model(IDX, TARGETS, return_logits=False)
    assert {name: calls.count(name) for name in calls} == dict(
        embedding=1, add_layer_norm=5, linear=8 - 2 * fused, attention=2, gelu_mlp=fused, linear_cross_entropy=1
    )
