"""Training through the kernels: a model runs those that it was given, gradients are added in place, nothing is copied between the ops,
and what cannot run falls back, said once."""

import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import TINY, command, in_two_processes, losses
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import ops
from fastgpt.model import GPT, GPTConfig
from fastgpt.records import Shape

triton = pytest.importorskip("triton")
from kernel_case import DEVICE, DTYPES  # noqa: E402

from fastgpt.kernels import (  # noqa: E402
    accumulate,
    attention,
    embedding,
    gelu_mlp,
    layer_norm,
    linear,
    linear_cross_entropy,
)

# The interpreter takes milliseconds a row.
FEW_ROWS = ["--batch_size=1", "--block_size=4", "--gradient_accumulation_steps=1", "--eval_iters=1"]


@pytest.fixture
def tiny():
    """A model of two blocks on this machine's device, and a batch with an ignored target."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=31, n_layer=2, n_head=2, n_embd=32)).to(DEVICE)
    idx, targets = torch.randint(31, (2, 2, 8), device=DEVICE)
    targets[0, 0] = -1
    return model, idx, targets


@pytest.fixture
def calls(monkeypatch):
    """How often each op of the kernels is called."""
    counts = Counter()
    for module in (embedding, layer_norm, linear, attention, gelu_mlp, linear_cross_entropy):
        for name in {module.__name__.rpartition(".")[2], "add_layer_norm"} & vars(module).keys():
            f = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, n=name, f=f, **k: counts.update([n]) or f(*a, **k))
    return counts


EVERY_OP = dict(embedding=1, add_layer_norm=5, linear=4, attention=2, gelu_mlp=2, linear_cross_entropy=1)


def gradients(model, idx, targets, call=None):
    """The loss and every parameter's gradient of one forward and backward."""
    model.zero_grad()
    _, loss = (model if call is None else call)(idx, targets, return_logits=False)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}


def assert_near(a, b, rtol=1e-4, atol=1e-6):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_twenty_steps_are_the_references(dataset, fastgpt):
    flags = ["--dataset=letters", *TINY, "--bias=True", *FEW_ROWS, "--n_layer=1"]
    flags += ["--max_iters=20", "--lr_decay_iters=20", "--eval_interval=20"]
    for kernels in ("torch", "triton"):
        status, _, err = fastgpt("train", *flags, f"--out_dir={kernels}", f"--kernels={kernels}")
        assert status == 0, err
    assert losses("triton") == pytest.approx(losses("torch"), rel=1e-5)
    assert losses("triton") != losses("torch"), "the kernels sum in another order: equal bits would mean that none ran"


def test_two_processes_train_as_one(dataset):
    flags = ["train", "--dataset=letters", *TINY, "--bias=True", *FEW_ROWS, "--gradient_accumulation_steps=2"]
    flags += ["--max_iters=2", "--eval_interval=2", "--warmup_iters=0"]
    for kernels in ("torch", "triton"):
        in_two_processes(command, *flags, f"--out_dir={kernels}", f"--kernels={kernels}")
    assert losses("triton") == pytest.approx(losses("torch"), rel=1e-5)


# ---- the choice of kernels, a value that a model carries ----


def test_a_model_runs_the_kernels_that_it_was_given(tiny, calls):
    """Two models in one process, each by its own: the second is PyTorch's, as every new model is on a CPU, with the interpreter too."""
    model, idx, targets = tiny
    reference = deepcopy(model)
    if DEVICE == "cuda":
        reference.set_kernels("torch")
    model.set_kernels("triton")
    expected = gradients(reference, idx, targets)
    assert calls == {}
    assert_near(gradients(*tiny), expected)
    assert calls == EVERY_OP
    part = deepcopy(reference)
    part.set_kernels("attention=triton")
    assert_near(gradients(part, idx, targets), expected)
    assert calls == EVERY_OP | {"attention": 4}
    copy = deepcopy(model)
    model.set_kernels("torch")
    gradients(*tiny)
    assert calls == EVERY_OP | {"attention": 4}
    gradients(copy, idx, targets)
    assert calls == {op: 2 * n for op, n in EVERY_OP.items()} | {"attention": 6}


def test_set_kernels_takes_a_name_a_list_and_a_value(tiny):
    model, *_ = tiny
    assert model.kernels == ops.AUTO
    mixed = ops.Kernels(linear="triton", attention="cudnn")
    for given, meant in (
        ("triton", ops.all_triton()),
        ("torch", ops.TORCH),
        ("attention=cudnn, linear=triton, adamw=torch", mixed),
        (mixed, mixed),
        *([] if DEVICE == "cuda" else [("auto", ops.TORCH)]),
    ):
        assert model.set_kernels(given) == meant
        assert {m.kernels for m in model.modules() if hasattr(m, "kernels")} == {meant}
    model.set_kernels("adamw=triton")
    assert model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), DEVICE).kernels == ops.Kernels(adamw="triton")


def test_auto_measures_on_the_problem_that_the_model_is(tiny, monkeypatch):
    model, *_ = tiny
    asked = []
    monkeypatch.setattr("fastgpt.model.choose", lambda *args: asked.append(args) or ops.TORCH)
    plain = Shape(8, 8, 32, 2, 31)
    model.set_kernels()
    assert asked == [("auto", plain, torch.float32, model.lm_head.weight.device, False)]
    model.set_doc_mask(3)
    model.set_residual(torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        model.set_kernels("auto", batch_size=3, compiled=True)
    assert asked[1][1:3] == (replace(plain, B=3, doc_mask=True, narrow_residual=True), torch.bfloat16)
    assert asked[1][4] is True
    model.set_kernels("auto", dtype=torch.float16)
    assert asked[2][2] == torch.float16
    model.set_activation("gelu_tanh")
    model.set_kernels()
    assert asked[3][1].tanh
    with pytest.raises(ops.UserError, match="there is no activation 'silu'; there are gelu, gelu_tanh, relu"):
        model.set_activation("silu")
    assert model.activation == "gelu_tanh"


WRONG = {
    "tritn": "'triton'",
    "layernorm=triton": "'layer_norm'",
    "layer_norm=trition": "the nearest is 'triton'",
    "layer_norm=cuda": "'cuda' is none of auto, torch, triton\n",
    "layer_norm=triton,x=torch": "'x'",
    "gelu_mlp=cudnn": "auto, torch, triton",
    "layer_norm=": "''",
}


@pytest.mark.parametrize("spec", WRONG)
def test_a_wrong_choice_is_named(spec, tiny, dataset, fastgpt):
    status, _, err = fastgpt("train", "--dataset=letters", *TINY, f"--kernels={spec}")
    assert status == 2
    assert err.startswith(f"fastgpt: error: --kernels={spec}: ")
    assert WRONG[spec] in err
    assert err.count("\n") == 1
    before = tiny[0].kernels
    with pytest.raises(ops.UserError) as e:
        tiny[0].set_kernels(spec)
    assert err == f"fastgpt: error: {e.value}\n"
    assert tiny[0].kernels == before


def test_a_value_of_kernels_holds_what_there_is():
    with pytest.raises(ops.UserError, match="there is no 'cudnn' of 'linear'"):
        ops.Kernels(linear="cudnn")
    assert ops.parse("attention=cudnn, layer_norm=torch") == dict(
        dict.fromkeys(ops.OPS, "auto"), attention="cudnn", layer_norm="torch"
    )


# ---- torch.compile ----


class Compiled:
    """torch.compile of a whole model, by a backend; `graphs` counts what it was given to compile."""

    def __init__(self, model, backend="aot_eager"):
        torch._dynamo.reset()
        self.graphs = 0
        compile_fx = torch._dynamo.lookup_backend(backend)

        def counted(graph, inputs):
            self.graphs += 1
            return compile_fx(graph, inputs)

        self.call = torch.compile(model, fullgraph=True, backend=counted)

    def __call__(self, *args, **kwargs):
        return self.call(*args, **kwargs)


def test_the_whole_model_compiles_to_one_graph(tiny):
    model, *_ = tiny
    model.set_kernels("triton")
    eager, call = gradients(*tiny), Compiled(model, "inductor")
    assert_near(gradients(*tiny, call), eager, rtol=1e-5)
    assert call.graphs == 1


@pytest.mark.slow
def test_twelve_layers_compile_in_under_a_minute():
    """torch 2.10 to 2.12 print the chain of producers of each custom op: with ops that return tensors that is exponential in layers."""
    model = GPT(GPTConfig(4, 31, n_layer=12, n_head=1, n_embd=16)).to(DEVICE)
    model.set_kernels("triton")
    idx = torch.randint(31, (1, 4), device=DEVICE)
    began = time.process_time()
    call = Compiled(model, "inductor")
    call(idx, idx, return_logits=False)[1].backward()
    assert time.process_time() - began < 60
    assert call.graphs == 1


def test_another_choice_is_compiled_anew_and_the_same_is_not(tiny):
    model, idx, targets = tiny
    call, found, graphs = Compiled(model, "eager"), [], []
    for kernels in ("torch", "attention=triton", "torch", "attention=triton"):
        model.set_kernels(kernels)
        found.append(call(idx, targets, return_logits=False)[1])
        graphs.append(call.graphs)
    assert graphs == [1, 2, 2, 2]
    assert found[:2] == found[2:], "each choice its own bits"
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.slow
def test_a_second_length_does_not_compile_per_length(tiny):
    model, idx, targets = tiny
    model.set_kernels("triton")
    call = Compiled(model, "eager")
    for T in (8, 5, 6, 7):
        call(idx[:, :T], targets[:, :T], return_logits=False)
    assert call.graphs <= 2, "one for the first length, one for all others"


# ---- gradients that are added in the GEMM that makes them ----


def two_micro_steps(model, idx, targets, dtype, in_place):
    """Every weight's gradient after two backward passes of other tokens."""
    model.zero_grad()
    for tokens in (idx, idx.flip(0, 1)):
        with torch.autocast(DEVICE, dtype, enabled=dtype.itemsize == 2):
            _, loss = model(tokens, targets, return_logits=False)
        with ops.accumulate_in_place() if in_place else nullcontext():
            loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}


SLOW_BUT_BF16 = [d if d == torch.bfloat16 else pytest.param(d, marks=pytest.mark.slow) for d in DTYPES]


@pytest.mark.parametrize("dtype", SLOW_BUT_BF16, ids=str)
def test_gradients_added_in_place_are_no_further_from_exact_ones(tiny, dtype):
    model, idx, targets = tiny
    exact = two_micro_steps(deepcopy(model).double(), idx, targets, torch.float64, False)
    plain = {n: g.clone() for n, g in two_micro_steps(model, idx, targets, dtype, False).items()}
    model.set_kernels("triton")
    apart = {n: g.clone() for n, g in two_micro_steps(model, idx, targets, dtype, False).items()}
    found = two_micro_steps(model, idx, targets, dtype, True)
    for name, g in exact.items():
        away, allowed = ((grads[name] - g).square().mean().sqrt() for grads in (found, plain))
        assert away <= 2 * allowed + torch.finfo(torch.float32).eps * g.abs().max(), name
    assert_near(found, apart, rtol=1e-5)


def test_a_second_micro_step_adds_nothing_but_in_the_gemm(tiny):
    """By autograd itself are added the gradients that no GEMM makes: of norms, positions, and the tied embedding."""
    model, idx, targets = tiny
    model.set_kernels("triton")
    gradients(*tiny)
    before = {n: p.grad for n, p in model.named_parameters()}
    _, loss = model(idx, targets, return_logits=False)
    with Dispatched() as record, ops.accumulate_in_place():
        loss.backward()
    added = Counter(shapes[0] for name, shapes in record.seen if name == "add_")
    elsewhere = Counter(
        tuple(p.shape)
        for n, p in model.named_parameters()
        if p.dim() == 1 or n in ("transformer.wte.weight", "transformer.wpe.weight")
    )
    assert added == elsewhere
    assert all(p.grad is before[n] for n, p in model.named_parameters()), "one memory, as a CUDA graph needs it"


def test_a_frozen_weight_keeps_what_gradient_it_has_and_whoever_waits_for_one_gets_it(tiny):
    model, idx, targets = tiny
    model.set_kernels("triton")
    gradients(*tiny)
    first, second = model.transformer.h
    frozen = first.attn.c_attn.weight.requires_grad_(False)
    before = frozen.grad.clone()
    heard = []
    c_attn, c_fc = second.attn.c_attn.weight, second.mlp.c_fc.weight
    c_attn.register_hook(lambda g: heard.append(g.shape))
    c_fc.register_post_accumulate_grad_hook(lambda p: heard.append(p.shape))
    _, loss = model(idx, targets, return_logits=False)
    with ops.accumulate_in_place():
        loss.backward()
    assert torch.equal(frozen.grad, before)
    assert sorted(heard) == sorted([c_attn.shape, c_fc.shape])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"), ops.accumulate_in_place():
        loss.backward()
    assert not accumulate.allowed, "after an error too"


# ---- what runs ----


class Dispatched(TorchDispatchMode):
    """Every operation that reaches PyTorch, with the shapes of its tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        shapes = [tuple(t.shape) for t in [*args, out] if torch.is_tensor(t)]
        self.seen.append((func.overloadpacket.__name__, shapes))
        return out


# Views and allocations, the GEMMs that cuBLAS does, bias gradients; the loss's chunk of tokens, ids sorted for their rows.
FREE = {
    "t", "view", "_unsafe_view", "slice", "select", "expand", "detach", "alias", "transpose", "empty", "empty_like", "new_empty",
    "unbind",
}  # fmt: skip
WORK = {"mm", "addmm", "sum", "sort", "clamp", "zero_", "ones_like", "lift_fresh"}


@pytest.mark.parametrize("stream", [None, torch.bfloat16])
def test_nothing_is_copied_between_the_ops(tiny, stream, monkeypatch):
    """One step under autocast: no copy, cat, add or cast of an activation, in whatever layout; weights alone are cast."""
    model, idx, targets = tiny
    model.set_residual(stream)
    model.set_kernels("triton")
    if DEVICE == "cpu":  # the interpreter's own work on tensors is not the step's
        monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", lambda self, *a, **k: None)
        for module in (linear, gelu_mlp, linear_cross_entropy):  # in fp32 by casts on the CPU alone
            monkeypatch.setattr(module, "mm", lambda a, b, out, accumulate=False: torch.mm(a, b))
    with Dispatched() as record, torch.autocast(DEVICE, torch.bfloat16):
        _, loss = model(idx, targets, return_logits=False)
        loss.backward()
    weights = {tuple(p.shape) for p in model.parameters()}
    weights |= {tuple(p.t().shape) for p in model.parameters() if p.dim() == 2} | {
        (1, p.size(0)) for p in model.parameters()
    }
    counts = Counter()
    for name, shapes in record.seen:
        if name in FREE:
            continue
        counts[name] += 1
        if name == "_to_copy":
            assert shapes[0] in weights | {(idx.numel(),)}, f"a cast of {shapes[0]}"  # the ids, for their sorting
        else:
            assert name in WORK, f"{name} of {shapes}"
    # Per block: c_attn, c_proj and down-projection forward; two backward of each of the first two, three of the MLP. The loss: three.
    assert counts["mm"] + counts["addmm"] == 2 * (3 + 4 + 3) + 3, counts
    assert counts["sort"] == 1
    assert counts["add"] == 0


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no stream to wait for without a GPU")
def test_no_host_waits_and_a_cuda_graph_replays_it(tiny):
    model, idx, targets = tiny
    model.set_kernels("triton")
    reference = gradients(model, idx, targets)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = gradients(model, idx, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_near(again, reference, rtol=0, atol=0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(model, idx, targets)
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, loss = model(idx, targets, return_logits=False)
        loss.backward()
    graph.replay()
    assert torch.equal(loss, reference["loss"])
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, reference[name]), name


def test_dropout_draws_anew_each_call_and_from_the_seed():
    x, weight = torch.zeros(1, 8, 64, device=DEVICE), torch.ones(64, device=DEVICE)
    dropped = lambda: ops.add_layer_norm(x, x + 1, weight, dropout_p=0.5, kernels=ops.all_triton())[0]  # noqa: E731
    torch.manual_seed(0)
    first, second = dropped(), dropped()
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(dropped(), first)


def test_what_a_kernel_cannot_take_goes_to_pytorch_with_one_warning():
    ops.warn_once.cache_clear()
    kernels = ops.all_triton()
    x, weight = torch.randn(1, 2, 9000, device=DEVICE), torch.ones(9000, device=DEVICE)
    with pytest.warns(UserWarning, match="triton does not take float32 rows of 9000") as caught:
        h = [ops.layer_norm(x, weight, kernels=kernels) for _ in range(3)][-1]
    assert len(caught) == 1
    torch.testing.assert_close(h, torch.nn.functional.layer_norm(x, (9000,)))
    qkv = torch.randn(1, 4, 3 * 136, device=DEVICE)
    with pytest.warns(UserWarning, match="attention: triton does not take"):
        y = torch.compile(lambda q: ops.attention(q, 1, kernels=kernels), backend="aot_eager")(qkv)
    torch.testing.assert_close(y, torch.nn.functional.scaled_dot_product_attention(*qkv.split(136, 2), is_causal=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: the kernels run on it")
def test_without_a_gpu_and_the_interpreter_it_trains_on_pytorch(dataset):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastgpt.cli", "train", "--dataset=letters", *TINY, "--kernels=triton"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    for op in ops.OPS:
        assert done.stderr.count(f"{op}: triton does not take") == 1, done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr
