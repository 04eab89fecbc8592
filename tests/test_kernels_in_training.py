"""Training through the kernels: the loss curve is the reference's, nothing is copied between the ops, and what cannot run falls
back, said once."""

import os
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from conftest import TINY, losses, run_script
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastgpt import ops
from fastgpt.model import GPT, GPTConfig
from fastgpt.verify import compared

triton = pytest.importorskip("triton")
from kernel_case import DEVICE, DTYPES  # noqa: E402

from fastgpt.kernels import common, cross_entropy, embedding, flash_attention, gelu_mlp, layer_norm, linear  # noqa: E402

# The interpreter takes milliseconds a row.
FEW_ROWS = ["--batch_size=1", "--block_size=8", "--gradient_accumulation_steps=1", "--eval_iters=1"]


@pytest.fixture(autouse=True)
def afterwards_torch():
    yield
    ops.use("torch")


@pytest.fixture
def tiny():
    """A model of two blocks on this machine's device, and a batch with an ignored target."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=32)).to(DEVICE)
    idx, targets = torch.randint(31, (2, 2, 16), device=DEVICE)
    targets[0, 0] = -1
    return model, idx, targets


def test_twenty_steps_are_the_references(dataset, fastgpt):
    flags = ["--dataset=letters", *TINY, "--bias=True", *FEW_ROWS]
    flags += ["--max_iters=20", "--lr_decay_iters=20", "--eval_interval=20"]
    for kernels in ("torch", "triton"):
        status, _, err = fastgpt("train", *flags, f"--out_dir={kernels}", f"--kernels={kernels}")
        assert status == 0, err
    assert losses("triton") == pytest.approx(losses("torch"), rel=1e-5)
    assert losses("triton") != losses("torch"), "the kernels sum in another order: equal bits would mean that none ran"


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


def test_every_op_of_the_model_runs_the_kernels(tiny, monkeypatch):
    calls = Counter()
    modules = {layer_norm: ["layer_norm", "add_layer_norm"], embedding: ["embedding"], gelu_mlp: ["gelu_mlp"]}
    modules |= {flash_attention: ["flash_attention"], cross_entropy: ["linear_cross_entropy"], linear: ["linear"]}
    reference = gradients(*tiny)
    ops.use("triton")
    for module, names in modules.items():
        for name in names:
            f = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, n=name, f=f, **k: calls.update([n]) or f(*a, **k))
    assert_near(gradients(*tiny), reference)
    assert calls == dict(embedding=1, add_layer_norm=5, linear=4, flash_attention=2, gelu_mlp=2, linear_cross_entropy=1)


# ---- gradients that are added in the GEMM that makes them ----


def two_micro_steps(model, idx, targets, dtype, in_place):
    """Every weight's gradient after two backward passes of other tokens."""
    model.zero_grad()
    for tokens in (idx, idx.flip(0, 1)):
        with torch.autocast(DEVICE, dtype, enabled=dtype.itemsize == 2):
            _, loss = model(tokens, targets, return_logits=False)
        with ops.adding_in_place() if in_place else nullcontext():
            loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_added_in_place_are_no_further_from_exact_ones(tiny, dtype):
    model, idx, targets = tiny
    exact = two_micro_steps(deepcopy(model).double(), idx, targets, torch.float64, False)
    plain = {n: g.clone() for n, g in two_micro_steps(model, idx, targets, dtype, False).items()}
    ops.use("triton")
    apart = {n: g.clone() for n, g in two_micro_steps(model, idx, targets, dtype, False).items()}
    found = two_micro_steps(model, idx, targets, dtype, True)
    for name in exact:
        c = compared("backward", name, found[name], plain[name], exact[name])
        assert c.holds, (name, c.ratio)
    assert_near(found, apart, rtol=1e-5)


def test_a_second_micro_step_adds_nothing_but_in_the_gemm(tiny):
    """By autograd itself are added the gradients that no GEMM makes: of norms, positions, and the tied embedding."""
    model, idx, targets = tiny
    ops.use("triton")
    gradients(*tiny)
    before = {n: p.grad for n, p in model.named_parameters()}
    _, loss = model(idx, targets, return_logits=False)
    with Dispatched() as record, ops.adding_in_place():
        loss.backward()
    added = Counter(shapes[0] for name, shapes in record.seen if name == "add_")
    elsewhere = Counter(
        tuple(p.shape)
        for n, p in model.named_parameters()
        if p.dim() == 1 or n in ("transformer.wte.weight", "transformer.wpe.weight")
    )
    assert added == elsewhere
    assert all(p.grad is before[n] for n, p in model.named_parameters()), "one memory, as a CUDA graph needs it"


def test_a_frozen_weight_keeps_what_gradient_it_has(tiny):
    model, idx, targets = tiny
    ops.use("triton")
    gradients(*tiny)
    frozen = model.transformer.h[0].attn.c_attn.weight.requires_grad_(False)
    before = frozen.grad.clone()
    _, loss = model(idx, targets, return_logits=False)
    with ops.adding_in_place():
        loss.backward()
    assert torch.equal(frozen.grad, before)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"), ops.adding_in_place():
        loss.backward()
    assert not common.adding, "after an error too"


def test_whoever_waits_for_a_gradient_gets_it(tiny):
    model, idx, targets = tiny
    ops.use("triton")
    gradients(*tiny)
    heard = []
    c_attn, c_fc = model.transformer.h[0].attn.c_attn.weight, model.transformer.h[0].mlp.c_fc.weight
    c_attn.register_hook(lambda g: heard.append(g.shape))
    c_fc.register_post_accumulate_grad_hook(lambda p: heard.append(p.shape))
    _, loss = model(idx, targets, return_logits=False)
    with ops.adding_in_place():
        loss.backward()
    assert sorted(heard) == sorted([c_attn.shape, c_fc.shape])


# ---- shadow weights ----


def in_bf16(model, idx, targets, call=None):
    with torch.autocast(DEVICE, torch.bfloat16):
        return gradients(model, idx, targets, call)


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a), [n for n in a if not torch.equal(a[n], b[n])]


def test_shadows_are_what_autocast_would_cast(tiny):
    model, *_ = tiny
    ops.use("triton")
    cast, full = in_bf16(*tiny), gradients(*tiny)
    names = set(model.state_dict())
    model.keep_shadows(torch.bfloat16)
    assert set(model.state_dict()) == names
    assert_same_bits(in_bf16(*tiny), cast)
    for module in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
        module.shadow.zero_()  # they are read, not cast anew: spoiled they show, until they are refreshed
        assert in_bf16(*tiny)["loss"] != cast["loss"]
        model.refresh_shadows()
    assert_same_bits(in_bf16(*tiny), cast)
    assert_same_bits(gradients(*tiny), full)  # fp32 does not take them
    model.float()
    assert model.lm_head.shadow.dtype == torch.bfloat16
    assert_same_bits(in_bf16(*tiny), cast)


def test_shadows_that_are_behind_their_weights_are_not_taken(tiny):
    model, *_ = tiny
    ops.use("triton")
    model.keep_shadows(torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    stale = in_bf16(*tiny)
    model.refresh_shadows()
    assert_same_bits(in_bf16(*tiny), stale)
    copy = deepcopy(model)
    with torch.no_grad():
        for p in copy.parameters():
            p.mul_(0.5)
    found = in_bf16(copy, *tiny[1:])
    copy.refresh_shadows()
    assert_same_bits(in_bf16(copy, *tiny[1:]), found)


@pytest.mark.parametrize("compiled", [False, True])
def test_training_with_shadows_is_training_without(tiny, compiled):
    model, idx, targets = tiny
    ops.use("triton")
    start = {k: v.clone() for k, v in model.state_dict().items()}
    runs = []
    for shadows in (False, True):
        model.load_state_dict(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        if shadows:
            model.keep_shadows(torch.bfloat16)
            optimizer.register_step_post_hook(lambda *_: model.refresh_shadows())
        torch._dynamo.reset()
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else None
        for _ in range(3):
            found = in_bf16(model, idx, targets, call)
            optimizer.step()
        runs.append(found)
    assert_same_bits(*runs)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_trainers_shadows_give_the_same_run(dataset, processes, compiled):
    """On the CPU it computes in fp32 and keeps none: here it is made to compute in bf16."""
    script = """
import os, sys, torch
from fastgpt import trainer
keep = sys.argv.pop(1) == "True"
init, compile_ = trainer.Run.__init__, torch.compile
def made(self, *args):
    init(self, *args)
    self.autocast = torch.autocast("cpu", torch.bfloat16)
trainer.Run.__init__ = made
trainer.shadow_dtype = lambda picks, dtype: torch.bfloat16 if keep else None
torch.compile = lambda model, **options: compile_(model, backend="aot_eager", **options)
from fastgpt.cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""
    flags = [
        *TINY,
        "--dataset=letters",
        *FEW_ROWS,
        f"--compile={compiled}",
        "--kernels=triton",
        "--max_iters=3",
        "--eval_interval=3",
    ]
    flags += [f"--gradient_accumulation_steps={processes}", "--warmup_iters=0"]
    for keep in (True, False):
        run_script(script, processes, str(keep), *flags, f"--out_dir={keep}")
    assert len(losses("True")) == 3
    assert losses("True") == losses("False")


def test_shadows_are_kept_where_kernels_compute_in_16_bits():
    from fastgpt.trainer import shadow_dtype

    picks = dict.fromkeys(ops.KERNELS, "torch")
    assert shadow_dtype(picks, torch.bfloat16) is None
    assert shadow_dtype(picks | {"linear": "triton"}, torch.bfloat16) == torch.bfloat16
    assert shadow_dtype(picks | {"layer_norm": "triton"}, torch.bfloat16) is None
    assert shadow_dtype(picks | {"linear": "triton"}, torch.float32) is None


def test_another_module_in_place_of_a_linear_is_called(tiny):
    class Doubling(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, idx, targets = tiny
    other = Doubling(32, 96).to(DEVICE)
    other.load_state_dict(model.transformer.h[0].attn.c_attn.state_dict())
    before = model(idx, targets)[1]
    model.transformer.h[0].attn.c_attn = other
    assert model(idx, targets)[1] != before


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_whole_model_compiles_without_a_graph_break(tiny, backend):
    model, idx, targets = tiny
    ops.use("triton")
    eager = gradients(model, idx, targets)
    torch._dynamo.reset()
    compiled = gradients(model, idx, targets, torch.compile(model, fullgraph=True, backend=backend))
    assert_near(compiled, eager, rtol=1e-5)


def test_a_second_length_does_not_compile_per_length(tiny):
    model, idx, targets = tiny
    ops.use("triton")
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for T in (16, 9, 11, 13):
        compiled(idx[:, :T], targets[:, :T], return_logits=False)
    assert len(graphs) <= 2, "one for the first length, one for all others"


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_activation_checkpointing_changes_no_bit(tiny, p):
    model, idx, targets = tiny
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = p
    ops.use("triton")
    torch.manual_seed(3)
    plain = gradients(model, idx, targets)
    for block in model.transformer.h:
        block.forward = lambda *args, f=block.forward: checkpoint(f, *args, use_reentrant=False)
    torch.manual_seed(3)
    again = gradients(model, idx, targets)
    assert all(torch.equal(plain[n], again[n]) for n in plain)


def test_two_processes_train_as_one(dataset):
    flags = [
        "--dataset=letters",
        *TINY,
        "--bias=True",
        "--block_size=8",
        "--batch_size=1",
        "--max_iters=2",
        "--eval_interval=2",
    ]
    flags += ["--eval_iters=1", "--warmup_iters=0"]
    for kernels in ("torch", "triton"):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "-m",
            "fastgpt.cli",
            "train",
        ]
        done = subprocess.run(
            [*command, *flags, f"--out_dir={kernels}", f"--kernels={kernels}"],
            capture_output=True,
            text=True,
            env=os.environ,
        )
        assert done.returncode == 0, done.stderr
    assert losses("triton") == pytest.approx(losses("torch"), rel=1e-5)


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
    "t",
    "view",
    "_unsafe_view",
    "slice",
    "select",
    "expand",
    "detach",
    "alias",
    "transpose",
    "empty",
    "empty_like",
    "new_empty",
}
WORK = {"mm", "addmm", "sum", "sort", "clamp", "zero_", "ones_like", "lift_fresh"}


@pytest.mark.parametrize("stream", [None, torch.bfloat16])
def test_nothing_is_copied_between_the_ops(tiny, stream, monkeypatch):
    """One step under autocast: no copy, cat, add or cast of an activation, in whatever layout; weights alone are cast."""
    model, idx, targets = tiny
    model.set_residual(stream)
    ops.use("triton")
    if DEVICE == "cpu":  # the interpreter's own work on tensors is not the step's
        monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", lambda self, *a, **k: None)
        monkeypatch.setattr(
            cross_entropy, "mm", lambda a, b, dtype, into=None: torch.mm(a, b)
        )  # in fp32 by casts on the CPU alone
        monkeypatch.setattr(gelu_mlp, "mm", lambda a, b, dtype, into=None: torch.mm(a, b))
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
    ops.use("triton")
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
    ops.use("triton")
    x, weight = torch.zeros(1, 8, 64, device=DEVICE), torch.ones(64, device=DEVICE)
    torch.manual_seed(0)
    first, second = (ops.add_layer_norm(x, x + 1, weight, dropout_p=0.5)[0] for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(ops.add_layer_norm(x, x + 1, weight, dropout_p=0.5)[0], first)


def test_what_a_kernel_cannot_take_goes_to_pytorch_with_one_warning():
    ops.use("triton")
    x, weight = torch.randn(1, 2, 9000, device=DEVICE), torch.ones(9000, device=DEVICE)
    with pytest.warns(UserWarning, match="triton does not take float32 rows of 9000") as caught:
        h = [ops.layer_norm(x, weight) for _ in range(3)][-1]
    assert len(caught) == 1
    torch.testing.assert_close(h, torch.nn.functional.layer_norm(x, (9000,)))
    qkv = torch.randn(1, 4, 3 * 136, device=DEVICE)
    with pytest.warns(UserWarning, match="attention: triton does not take"):
        y = torch.compile(lambda q: ops.attention(q, 1), backend="aot_eager")(qkv)
    torch.testing.assert_close(y, torch.nn.functional.scaled_dot_product_attention(*qkv.split(136, 2), is_causal=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: the kernels run on it")
def test_without_a_gpu_and_the_interpreter_it_trains_on_pytorch(dataset):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastgpt.cli", "train", "--dataset=letters", *TINY, "--kernels=triton"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    for op in ops.KERNELS:
        assert done.stderr.count(f"{op}: triton does not take") == 1, done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("tritn", "'triton'"),
        ("layernorm=triton", "'layer_norm'"),
        ("layer_norm=cuda", "the nearest is 'auto'"),
        ("layer_norm=triton,x=torch", "'x'"),
        ("gelu_mlp=cudnn", "auto, torch, triton"),
        ("layer_norm=", "''"),
    ],
)
def test_wrong_choices_are_named(spec, said, dataset, fastgpt):
    status, _, err = fastgpt("train", "--dataset=letters", *TINY, f"--kernels={spec}")
    assert status == 2
    assert err.startswith(f"fastgpt: error: --kernels={spec}: ")
    assert said in err
    assert err.count("\n") == 1


def test_a_list_leaves_the_rest_to_auto():
    assert ops.parse("attention=cudnn, layer_norm=torch") == dict(
        embedding="auto",
        layer_norm="torch",
        linear="auto",
        attention="cudnn",
        gelu_mlp="auto",
        linear_cross_entropy="auto",
        adamw="auto",
    )
