"""The modules and the optimizer for a model of one's own: equal to plain PyTorch's, with weights that move freely, by PyTorch's operators
and by the kernels; what is refused; and a checkpoint as a model."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_case import DEVICE
from torch import nn
from torch.nn import functional as F

import fastgpt
from fastgpt import ops
from fastgpt.model import GPT, GPTConfig
from fastgpt.nn import MLP, AddLayerNorm, CausalSelfAttention, LayerNorm, LinearCrossEntropy
from fastgpt.optim import AdamW

C, H, V = 32, 4, 19
TRITON = pytest.param("triton", marks=pytest.mark.skipif(ops.triton is None, reason="Triton is not installed"))
both = pytest.mark.parametrize("kernels", ["torch", TRITON])


# ---- plain twins, as nanoGPT and PyTorch write them ----


class PlainNorm(nn.LayerNorm):
    def forward(self, x, branch=None):
        x = x if branch is None else x + branch
        return x, super().forward(x)


class PlainAttention(nn.Module):
    def __init__(self, kv):
        super().__init__()
        self.sizes = C, kv * C // H, kv * C // H
        self.c_attn, self.c_proj = nn.Linear(C, sum(self.sizes)), nn.Linear(C, C)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (-1, C // H)).transpose(1, 2) for t in self.c_attn(x).split(self.sizes, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class PlainMLP(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(C, hidden), nn.Linear(hidden, C)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class PlainLoss(nn.Linear):
    def forward(self, h, targets):
        return F.cross_entropy(super().forward(h).flatten(0, 1), targets.flatten())


def x():
    return torch.randn(2, 5, C, device=DEVICE)


def targets():
    t = torch.randint(V, (2, 5), device=DEVICE)
    t[0, :2] = -100  # PyTorch's, not nanoGPT's
    return t


CASES = {  # ours with options, the twin, inputs
    "LayerNorm": (LayerNorm, dict(n_embd=C, eps=1e-2), lambda: nn.LayerNorm(C, eps=1e-2), [x]),
    "LayerNorm, no bias": (LayerNorm, dict(n_embd=C, bias=False), lambda: nn.LayerNorm(C, bias=False), [x]),
    "AddLayerNorm": (AddLayerNorm, dict(n_embd=C, eps=1e-2), lambda: PlainNorm(C, eps=1e-2), [x, x]),
    "AddLayerNorm, no branch": (AddLayerNorm, dict(n_embd=C, bias=False), lambda: PlainNorm(C, bias=False), [x]),
    "attention": (CausalSelfAttention, dict(n_embd=C, n_head=H), lambda: PlainAttention(H), [x]),
    "attention, as many": (CausalSelfAttention, dict(n_embd=C, n_head=H, n_kv_head=H), lambda: PlainAttention(H), [x]),
    "attention, fewer": (CausalSelfAttention, dict(n_embd=C, n_head=H, n_kv_head=2), lambda: PlainAttention(2), [x]),
    "MLP": (MLP, dict(n_embd=C), lambda: PlainMLP(4 * C), [x]),
    "MLP, hidden": (MLP, dict(n_embd=C, n_hidden=48, recompute=True), lambda: PlainMLP(48), [x]),
    "loss": (LinearCrossEntropy, dict(n_embd=C, vocab_size=V), lambda: PlainLoss(C, V, bias=False), [x, targets]),
}  # fmt: skip


def answers(module, inputs, autocast=None):
    """Outputs, and the gradients of inputs and parameters by name."""
    inputs = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    with torch.autocast(DEVICE, autocast or torch.bfloat16, enabled=autocast is not None):
        outputs = module(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    g = torch.Generator(DEVICE).manual_seed(1)
    grads = [torch.randn(t.shape, generator=g, device=DEVICE).to(t.dtype) for t in outputs]
    torch.autograd.backward(outputs, grads)
    leaves = {f"input {i}": t for i, t in enumerate(inputs)} | dict(module.named_parameters())
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    return found | {name: t.grad for name, t in leaves.items() if t.grad is not None}


def pair(name, kernels):
    """(our module, its twin with the same weights, inputs)."""
    torch.manual_seed(0)
    kind, options, twin, inputs = CASES[name]
    plain = twin()
    for p in plain.parameters():
        nn.init.normal_(p, std=0.3)  # biases and LayerNorms too
    ours = kind(**options, kernels=kernels)
    ours.load_state_dict(plain.state_dict())  # by name, each of the same shape
    return ours.to(DEVICE), plain.to(DEVICE), [make() for make in inputs]


def assert_near(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        torch.testing.assert_close(found[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@both
@pytest.mark.parametrize("name", CASES)
def test_a_module_is_its_plain_twin(name, kernels):
    ours, plain, inputs = pair(name, kernels)
    assert_near(answers(ours, inputs), answers(plain, inputs), rtol=1e-4, atol=1e-5)


def assert_as_exact(found, plain, exact):
    """Each answer has plain's dtype, and against fp32 at most twice its error, plus one unit of bf16 in the last place of the largest."""
    assert found.keys() == plain.keys() == exact.keys()
    for name, value in exact.items():
        assert found[name].dtype == plain[name].dtype, name
        error, allowed = ((t[name].float() - value).abs().max() for t in (found, plain))
        assert error <= 2 * allowed + 2**-8 * value.abs().max(), name


@both
@pytest.mark.parametrize("name", CASES)
def test_under_autocast_a_module_is_as_exact_as_its_plain_twin(name, kernels):
    """And every dtype is the twin's; PyTorch's LayerNorm alone answers on the CPU in fp32."""
    ours, plain, inputs = pair(name, kernels)
    found, expected = (answers(m, inputs, torch.bfloat16) for m in (ours, plain))
    plain.zero_grad()
    if "Norm" in name:
        assert found["output 0" if name.startswith("LayerNorm") else "output 1"].dtype == (
            torch.bfloat16 if kernels == "triton" else torch.float32
        )
        expected = {k: v.to(found[k].dtype) for k, v in expected.items()}
    assert_as_exact(found, expected, answers(plain, inputs))


@both
@pytest.mark.parametrize("name", ["LayerNorm", "attention, fewer", "MLP"])
def test_a_module_in_bf16_answers_in_bf16(name, kernels):
    ours, plain, inputs = pair(name, kernels)
    rounded = [t.bfloat16() for t in inputs]
    found, expected = (answers(copy.deepcopy(m).bfloat16(), rounded) for m in (ours, plain))
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    assert_as_exact(found, expected, answers(plain, inputs))


@both
def test_dropout_is_drawn_in_training_alone(kernels):
    torch.manual_seed(0)
    for make in (
        lambda: CausalSelfAttention(C, H, dropout=0.5, kernels=kernels),
        lambda: CausalSelfAttention(C, H, dropout=0.5, n_kv_head=2, kernels=kernels),
        lambda: MLP(C, dropout=0.5, kernels=kernels),
    ):
        module, given = make().to(DEVICE), x()
        y = module(given)
        assert 0.2 < (y == 0).float().mean() < 0.8
        assert not torch.equal(module(given), y)
        module.eval()
        assert torch.equal(module(given), module(given))
    given, branch = x(), x()
    add = AddLayerNorm(C, dropout=1.0, kernels=kernels).to(DEVICE)
    assert torch.equal(add(given, branch)[0], given)
    assert torch.equal(add.eval()(given, branch)[0], given + branch)


def test_shared_heads_attend_within_documents():
    """As they attend to each document alone; and GPT's cache is not theirs."""
    torch.manual_seed(0)
    attn, given = CausalSelfAttention(C, H, n_kv_head=2).to(DEVICE), x()
    whole = attn(given, doc_ids=torch.tensor([[0, 0, 1, 1, 1]] * 2, device=DEVICE))
    torch.testing.assert_close(whole, torch.cat((attn(given[:, :2]), attn(given[:, 2:])), 1))
    with pytest.raises(ValueError, match="no cache"):
        attn(given, cache=object())


# ---- weights move freely ----


def test_weights_move_between_these_modules_and_gpts():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=8, vocab_size=V, n_layer=1, n_head=H, n_embd=C, bias=True))
    block = gpt.transformer.h[0]
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    given = torch.randn(2, 5, C)
    for theirs, ours in (
        (block.ln_1, LayerNorm(C)),
        (block.attn, CausalSelfAttention(C, H)),
        (block.mlp, MLP(C)),
        (gpt.lm_head, LinearCrossEntropy(C, V)),
    ):
        ours.load_state_dict(theirs.state_dict())
        assert torch.equal(ours(given), theirs(given))
        theirs.load_state_dict(ours.state_dict())
    grouped = CausalSelfAttention(C, H, n_kv_head=H)  # as many heads of keys: the same rows of c_attn
    grouped.load_state_dict(block.attn.state_dict())
    torch.testing.assert_close(grouped(given), block.attn(given))


def test_a_head_may_be_tied_to_an_embedding():
    wte, head = nn.Embedding(V, C), LinearCrossEntropy(C, V)
    head.weight = wte.weight
    idx = torch.randint(V, (2, 5))
    head(wte(idx), idx).backward()
    twin = wte.weight.detach().clone().requires_grad_()
    F.cross_entropy((F.embedding(idx, twin) @ twin.t()).flatten(0, 1), idx.flatten()).backward()
    torch.testing.assert_close(wte.weight.grad, twin.grad)


# ---- the choice of kernels ----


def test_the_default_is_triton_on_a_gpu_and_pytorch_elsewhere():
    on_gpu, on_cpu = SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=False)
    for op in ops.OPS:
        assert ops.by_triton(op, ops.AUTO, on_gpu) == (ops.triton is not None)
        assert not ops.by_triton(op, ops.AUTO, on_cpu)  # in the interpreter neither
    for module in (LayerNorm(C), AddLayerNorm(C), CausalSelfAttention(C, H), MLP(C), LinearCrossEntropy(C, V)):
        assert module.kernels == ops.AUTO
    assert AdamW(MLP(C).parameters()).kernels == ops.AUTO


def test_a_name_pins_the_kernels_and_a_value_falls_back():
    wide = torch.randn(2, 4, 3 * 136, device=DEVICE)
    assert ops.attention(wide, 1, kernels="auto").shape == (2, 4, 136)
    assert MLP(C, kernels="gelu_mlp=torch").kernels.gelu_mlp == "torch"
    for wrong in ("trtion", "gelu=torch"):
        with pytest.raises(fastgpt.UserError, match="the nearest is"):
            LayerNorm(C, kernels=wrong)
    if ops.triton:
        with pytest.raises(ValueError, match="attention: triton does not take float32 rows of 408 for 1 heads"):
            ops.attention(wide, 1, kernels="triton")
        with pytest.raises(ValueError, match="triton does not take float64"):
            LayerNorm(C, kernels="triton").double().to(DEVICE)(x().double())


@pytest.mark.skipif(ops.triton is None, reason="Triton is not installed")
def test_by_name_every_module_runs_its_kernel(monkeypatch):
    ran = []
    for op in ("layer_norm", "attention", "gelu_mlp", "linear", "linear_cross_entropy"):
        module = getattr(ops.triton, op)
        for name in {op, f"add_{op}", f"{op}_qkv"} & vars(module).keys():
            f = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, n=name, f=f, **k: ran.append(n) or f(*a, **k))
    model = Model("triton").to(DEVICE).eval()
    model(x(), targets())
    assert set(ran) == {"layer_norm", "add_layer_norm", "attention_qkv", "gelu_mlp", "linear", "linear_cross_entropy"}
    ran.clear()
    CausalSelfAttention(C, H, kernels="triton").to(DEVICE)(x())
    assert ran == ["linear", "attention", "linear"]
    ran.clear()
    model.head(x())  # logits
    assert ran == ["linear"]


def test_heads_that_do_not_divide_are_refused():
    for how in (dict(n_head=5), dict(n_head=4, n_kv_head=3), dict(n_head=4, n_kv_head=0)):
        with pytest.raises(ValueError, match="must divide"):
            CausalSelfAttention(C, **how)


@both
def test_the_target_that_does_not_count_is_pytorchs(kernels):
    h, weight, t = x(), torch.randn(V, C, device=DEVICE), targets()
    loss = ops.linear_cross_entropy(h, weight, t, kernels=kernels)
    torch.testing.assert_close(loss, F.cross_entropy((h @ weight.t()).flatten(0, 1), t.flatten()))
    torch.testing.assert_close(ops.cross_entropy((h @ weight.t()).transpose(0, 1), t.t()), loss)  # by any strides
    assert ops.linear_cross_entropy(h, weight, torch.full_like(t, -100), kernels=kernels).isnan()
    t[1, 1] = -1
    if kernels == "triton":
        assert ops.linear_cross_entropy(h, weight, t, kernels=kernels).isnan()
    elif DEVICE == "cpu":  # on a GPU it is an assertion that ends the process's use of it
        with pytest.raises(IndexError):
            ops.linear_cross_entropy(h, weight, t, kernels=kernels)


class Model(nn.Module):
    """A block and a head of these modules."""

    def __init__(self, kernels):
        super().__init__()
        self.norm, self.add = LayerNorm(C, kernels=kernels), AddLayerNorm(C, dropout=0.1, kernels=kernels)
        self.attn, self.mlp = CausalSelfAttention(C, H, n_kv_head=2, kernels=kernels), MLP(C, kernels=kernels)
        self.head, self.kernels = LinearCrossEntropy(C, V, kernels=kernels), kernels

    def forward(self, x, targets):
        x, h = self.add(x, self.attn(self.norm(x)))
        h = ops.layer_norm(x + self.mlp(h), self.norm.weight, kernels=self.kernels)  # a name in a compiled function
        return self.head(h, targets)


@pytest.mark.parametrize("kernels", [pytest.param("torch", marks=pytest.mark.slow), TRITON])
def test_they_compile_without_a_graph_break(kernels):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, inputs = Model(kernels).to(DEVICE).eval(), (x(), targets())
    expected = answers(model, inputs)
    model.zero_grad()
    assert_near(answers(torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager"), inputs), {
        (name if name[:2] in ("ou", "in") else f"_orig_mod.{name}"): t for name, t in expected.items()
    }, rtol=1e-4, atol=1e-5)  # fmt: skip


NOWHERE = """
import pytest, torch, fastgpt
from fastgpt import nn, ops
x, w = torch.randn(2, 3, 16), torch.ones(16)
assert torch.equal(nn.LayerNorm(16)(x), torch.nn.functional.layer_norm(x, (16,)))
with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
    ops.layer_norm(x, w, kernels="triton")
with pytest.raises(RuntimeError, match="_norm_forward: its tensors are on the cpu.*NVIDIA GPU.*kernels='torch'.*TRITON_INTERPRET=1"):
    fastgpt.kernels.layer_norm.layer_norm(x, w)
"""


@pytest.mark.skipif(ops.triton is None, reason="Triton is not installed")
@pytest.mark.slow
def test_without_a_gpu_and_the_interpreter_an_error_names_the_cure():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", NOWHERE], check=True, env=env)


# ---- the optimizer ----


def trained(make, clip=None, steps=4):
    """(weights, optimizer) of a small net after a few steps with a schedule; gradients clipped by PyTorch to `clip`."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).to(DEVICE)
    optimizer = make([{"params": net[0].parameters(), "weight_decay": 0.3}, {"params": net[2].parameters()}])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(5, 8, device=DEVICE)).square().sum().backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        schedule.step()
    return [p.detach().clone() for p in net.parameters()], optimizer


@both
def test_adamw_is_torchs_with_clipping_inside(kernels):
    how = dict(lr=0.02, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    theirs, reference = trained(lambda groups: torch.optim.AdamW(groups, **how), clip=0.5)
    ours, optimizer = trained(lambda groups: AdamW(groups, **how, max_norm=0.5, kernels=kernels))
    torch.testing.assert_close(ours, theirs)
    assert optimizer.grad_norm > 0.5
    unclipped, _ = trained(lambda groups: AdamW(groups, **how, kernels=kernels))
    torch.testing.assert_close(unclipped, trained(lambda groups: torch.optim.AdamW(groups, **how))[0])
    # Their states are each other's; a copy goes on as the original.
    optimizer.load_state_dict(reference.state_dict())
    reference.load_state_dict(optimizer.state_dict())
    again = pickle.loads(pickle.dumps(optimizer))
    assert (again.max_norm, again.kernels) == (0.5, ops.named(kernels))


def test_adamw_takes_any_parameters_and_leaves_out_what_is_not_finite():
    p, half = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = AdamW(iter([p, half, nn.Parameter(torch.ones(1))]), 0.1, max_norm=1.0)  # one without a gradient
    p.grad, half.grad = torch.tensor([1.0, float("inf"), 0.0]), torch.ones(2, dtype=torch.bfloat16)
    optimizer.step()
    assert torch.equal(p, torch.ones(3))
    p.grad = torch.ones(3)
    optimizer.step()
    assert (p < 1).all()
    assert (half < 1).all()


def test_adamw_refuses_what_it_lacks_when_it_is_made():
    p = nn.Parameter(torch.ones(3))
    for name in ("amsgrad", "maximize", "capturable", "differentiable"):
        with pytest.raises(ValueError, match=f"this AdamW has no {name}"):
            AdamW([p], **{name: True})
    with pytest.raises(ValueError, match="complex"):
        AdamW([nn.Parameter(torch.ones(3, dtype=torch.complex64))])


# ---- a checkpoint as a model ----


def test_a_model_of_a_checkpoint(train, fastgpt):
    from fastgpt import GPT, UserError

    train("--dropout=0.2", "--max_iters=4")
    saved = torch.load("out/ckpt.pt", weights_only=True)["model"]
    for path in ("out", Path("out"), "out/ckpt.pt"):
        model = GPT.from_checkpoint(path)
        assert not model.training
        assert model.config.dropout == 0.2
        assert all(torch.equal(saved[k], v) for k, v in model.state_dict().items())
    with pytest.raises(UserError, match="nowhere"):
        GPT.from_checkpoint("nowhere")
    Path("bad.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"bad\.pt: "):
        GPT.from_checkpoint("bad.pt")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_model_of_a_sharded_checkpoint(workdir):
    from fastgpt import distributed, sharded

    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=V, n_layer=1, n_head=H, n_embd=C))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    model(*torch.zeros(2, 1, 8, dtype=torch.int64))[1].backward()
    optimizer.step()
    rest = {
        "iter_num": 3,
        "model_args": vars(model.config).copy(),
        "config": {},
        "fastgpt": {"meta": None},
        "best_val_loss": torch.tensor(1.0),
    }
    folder = sharded.save(rest, model, optimizer, ".", distributed.World(0, 1, "cpu"))
    for path in (folder, "."):
        found = GPT.from_checkpoint(path).state_dict()
        assert all(torch.equal(found[k], v) for k, v in model.state_dict().items())


def test_the_api_is_what_dir_says():
    assert dir(fastgpt) == sorted(fastgpt.__all__) == ["GPT", "GPTConfig", "UserError", "nn", "ops", "optim"]
    assert all(getattr(fastgpt, name) is not None for name in dir(fastgpt))
    with pytest.raises(AttributeError, match="no attribute 'GTP'"):
        fastgpt.GTP
    assert {"attention", "layer_norm", "linear_cross_entropy", "adamw", "AUTO"} <= set(ops.__all__)
