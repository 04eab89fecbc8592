"""The benchmark suite: what it times is equal, a slowdown shows, a budget ends it, and its peers are what they are named for."""

import contextlib
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")
from replay import Recording

from fastgpt import graphs, ops, timing, verify
from fastgpt.benchmarks import bench_train, compare, harness, machine, profile, report, roofline
from fastgpt.benchmarks.bench_adamw import adamw
from fastgpt.benchmarks.bench_attention import attention, deterministic
from fastgpt.benchmarks.bench_layer_norm import layer_norm
from fastgpt.benchmarks.bench_linear_cross_entropy import linear_cross_entropy
from fastgpt.benchmarks.peers.huggingface import HuggingFaceGPT
from fastgpt.benchmarks.peers.plain import PlainGPT
from fastgpt.config import GPTConfig
from fastgpt.model import GPT
from fastgpt.records import Shape, n_params
from fastgpt.shadows import Shadows

FOLDER = Path(harness.__file__).parent
ENV = {k: v for k, v in os.environ.items() if "XDIST" not in k}  # beside which pytest-benchmark would not measure
CASE = bench_train.Case("tiny", 4, 2, 0)


def suite(name, json_file, *flags, plant=""):
    """Run one file of the suite as `pytest benchmarks` would, behind planted lines: (exit status, output)."""
    code = f"import sys, pytest\n{plant}\nsys.exit(pytest.main(sys.argv[1:]))"
    words = [str(FOLDER / f"{name}.py"), f"--benchmark-json={json_file}", "-q", "-rs", "-p", "no:cacheprovider", *flags]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=ENV)
    return done.returncode, done.stdout + done.stderr


# ---- planted faults ----


@pytest.mark.slow
def test_a_planted_sleep_is_slower_in_compare(tmp_path, capsys):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    only = "-k", "eager or fastgpt"
    assert suite("bench_embedding", a, *only)[0] == 0
    plant = """
import time; from fastgpt import ops
f = ops.embedding; ops.embedding = lambda *args, **how: time.sleep(2e-4) or f(*args, **how)"""
    assert suite("bench_embedding", b, *only, plant=plant)[0] == 0
    assert compare.compare(a, b, 1.5) == 1
    said = capsys.readouterr().out.splitlines()
    assert any("fastgpt" in line and "  slower" in line for line in said)


def test_a_planted_wrong_result_has_no_time(tmp_path):
    plant = """
from torch.nn import functional as F
from fastgpt import ops
ops.gelu_mlp = lambda h, w, b, v, c, **k: F.linear(F.gelu(F.linear(h, w, b), approximate="tanh"), v, c)"""
    status, said = suite("bench_gelu_mlp", tmp_path / "a.json", "-k", "eager or fastgpt", plant=plant)
    assert status == 1
    assert "not equal: y has" in said
    result = json.loads((tmp_path / "a.json").read_text())
    assert {b["extra_info"]["provider"] for b in result["benchmarks"] if b["extra_info"]} == {"eager"}
    assert any("FAILED" in x["why"] and "not equal" in x["why"] for x in result["fastgpt"]["left_out"])


def test_a_gradient_that_is_left_unwritten_has_no_time_and_the_report_says_it(tmp_path):
    """As Inductor's of LayerNorm's weight (pytorch issue 193061): there lies what was written last, and of equal inputs that is right."""
    plant = """
import torch
last = []
def stale(gradient):
    last.append(gradient)
    return last.pop(0) if len(last) > 1 else gradient
def compile(f, **how):
    def compiled(x, weight, *rest):
        if weight.requires_grad: weight.register_hook(stale)
        return f(x, weight, *rest)
    return compiled
torch.compile = compile"""
    only = "-k", "layer_norm and (eager or inductor) and not add_layer_norm"
    status, said = suite("bench_layer_norm", tmp_path / "a.json", *only, plant=plant)
    assert status == 0, said
    text = report.write(tmp_path / "a.json").read_text()
    (why,) = re.findall(r"^- (.*): layer_norm \S+ float32 forward inductor, .* train inductor$", text, re.MULTILINE)
    pattern = r"is not equal at full size: dweight is (\S+) from PyTorch's, of norm (\S+);"
    distance, norm = map(float, re.match(pattern, why).groups())
    assert distance == pytest.approx(2 * norm, rel=0.1), "there lies the opposite of the right one"
    assert why.endswith("Inductor left gradients of LayerNorm's weights unwritten before (pytorch issue 193061)")


@pytest.fixture
def measured():
    """Measure planted arms beside plain PyTorch's, in this process: the Step."""

    def measure(**planted):
        arms = {"eager": bench_train.eager, "fastgpt-eager": bench_train.fastgpt_eager, **planted}
        comparison = bench_train.Step("step", [CASE], arms)
        comparison.measure(CASE, list(arms), rounds=3, seconds=0.01)
        return comparison

    return measure


def test_an_arm_that_computes_or_begins_otherwise_is_not_timed(measured):
    def eps(setup):
        arm = bench_train.eager(setup)
        for block in arm.module.transformer.h:
            norm = block.ln_1
            norm.forward = lambda x, n=norm: torch.nn.functional.layer_norm(x, n.weight.shape, n.weight, n.bias, 1e-6)
        return arm

    def tanh(setup):
        arm = bench_train.eager(setup)
        for block in arm.module.transformer.h:
            c_fc, c_proj = block.mlp.c_fc, block.mlp.c_proj
            block.mlp.forward = lambda x, a=c_fc, b=c_proj: b(torch.nn.functional.gelu(a(x), approximate="tanh"))
        return arm

    def forgetful(setup):
        """Each micro-step's gradient in place of the sum."""
        arm = bench_train.eager(setup)

        def call(x, y):
            setup.optimizer.zero_grad(set_to_none=True)
            return arm.module(x, y)

        return bench_train.Arm(arm.module, call, setup.optimizer)

    def later(setup):
        """Half of the batch, once it has been looked at."""
        arm, calls = bench_train.eager(setup), itertools.count()
        whole = bench_train.STEPS * bench_train.MICRO_STEPS

        def call(x, y):
            half = slice(None if next(calls) < whole else 2)
            return arm.module(x[half], y[half])

        return bench_train.Arm(arm.module, call, setup.optimizer)

    def half_the_batch(setup):
        arm = bench_train.eager(setup)
        return bench_train.Arm(arm.module, lambda x, y: arm.module(x[:2], y[:2]), setup.optimizer)

    def other_weights(setup):
        arm = bench_train.eager(setup)
        arm.weights = lambda: {n: w + 1e-7 for n, w in arm.module.state_dict().items()}
        return arm

    wrong = dict(eps=eps, tanh=tanh, forgetful=forgetful, later=later, half=half_the_batch, other=other_weights)
    found = measured(**wrong)
    assert set(found.failed) == set(wrong)
    assert all(f.reason.startswith("not equal: losses are") for name, f in found.failed.items() if name != "other")
    assert found.failed["other"].reason == "not equal: the initial transformer.wte.weight"


def test_a_sleep_in_an_arm_shows_in_its_ratio_and_a_crash_stops_no_other(measured):
    def slow(setup):
        arm = bench_train.eager(setup)
        return bench_train.Arm(arm.module, lambda x, y: (time.sleep(0.02), arm.module(x, y))[1], setup.optimizer)

    def broken(setup):
        raise torch.OutOfMemoryError("of memory there is none")

    found = measured(slow=slow, broken=broken)
    median, least, greatest = found.ratios["slow"]
    assert least <= median <= greatest < 0.9
    assert found.timings["slow"].median > 2 * 0.02  # two micro-steps
    assert found.failed["broken"].reason == "OutOfMemoryError: of memory there is none"
    assert "eager" in found.timings


# ---- shared weights ----


def test_arms_share_weights_and_the_optimizer_but_neither_shadows_nor_kernels():
    setup = bench_train.Setup(CASE)
    tokens = bench_train.Tokens(CASE.config, CASE.batch_size)
    plain, ours = bench_train.eager(setup), bench_train.ours(setup, "torch", False)
    ours.shadows, ours.kernels = Shadows(ours.module, torch.bfloat16), ops.Kernels(adamw="torch", rows=(("adamw", ""),))
    ours.shadows.remove()
    assert ours.optimizer is plain.optimizer
    weight = setup.parameters["transformer.h.0.attn.c_attn.weight"]
    for _ in range(2):
        bench_train.iterate(ours, tokens, 1)
        kept = weight.shadow
        assert torch.equal(kept, weight.bfloat16())
        assert setup.optimizer.kernels is ours.kernels
        bench_train.iterate(plain, tokens, 1)
        assert weight.shadow is None
        assert setup.optimizer.kernels == ops.TORCH
        assert not torch.equal(kept, weight.bfloat16()), "the other arm's update does not write it"
    ours.take_over()
    ours.reset(setup.initial)
    assert weight.shadow is None


# ---- a GPU that is made up: what only runs there is at least run ----


class MadeUpEvent:
    """An event of a GPU that works through its queue beside the host."""

    free = 0.0  # when the queue is empty
    now, wait = time.perf_counter, time.sleep

    def __init__(self, enable_timing):
        self.at = None

    @staticmethod
    def launch(seconds):
        MadeUpEvent.free = max(MadeUpEvent.free, MadeUpEvent.now()) + seconds

    @staticmethod
    def synchronize():
        MadeUpEvent.wait(max(0.0, MadeUpEvent.free - MadeUpEvent.now()))

    def record(self):
        self.launch(1e-6)  # nothing takes no time
        self.at = MadeUpEvent.free

    def query(self):
        return MadeUpEvent.now() >= self.at

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class MadeUpGraph:
    replay = staticmethod(lambda: time.sleep(1e-5))


@pytest.fixture
def made_up_gpu(monkeypatch):
    """torch.cuda as the harness asks it, around work of the CPU."""
    properties = types.SimpleNamespace(L2_cache_size=2**16, total_memory=80 * 10**9, multi_processor_count=132)
    answers = dict(get_device_properties=properties, memory_allocated=100, max_memory_allocated=1000, current_stream=0)
    names = ("reset_peak_memory_stats", "empty_cache", "set_sync_debug_mode", "set_stream")
    for name, answer in (answers | dict.fromkeys(names)).items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: MadeUpEvent.launch(cycles / 3e9))
    monkeypatch.setattr(torch.cuda, "synchronize", MadeUpEvent.synchronize)
    for name, what in (("Event", MadeUpEvent), ("CUDAGraph", MadeUpGraph), ("graph", contextlib.nullcontext)):
        monkeypatch.setattr(torch.cuda, name, what)
    for module in (harness, bench_train, profile):
        monkeypatch.setattr(module, "CUDA", True)


@pytest.mark.slow
def test_ops_are_replayed_from_graphs_and_one_failure_stops_no_other(made_up_gpu, monkeypatch):
    monkeypatch.setitem(attention.providers, "fastgpt", lambda it: functools.partial(it.by_ops, kernels=ops.TORCH))
    names = {"sdpa", "sdpa-flash", "sdpa-cudnn", "fastgpt"}
    attention.measure(attention.cases[1], names, rounds=2, seconds=1e-3)
    for name in ("sdpa", "sdpa-flash", "fastgpt"):
        timing = attention.timings[name]
        assert timing.how == "cuda graph"
        assert (len(timing.seconds), timing.peak) == (2, 900)
        assert timing.host > 0
    assert "No viable backend" in attention.failed["sdpa-cudnn"].reason
    adamw.measure(adamw.cases[0], {"fused", "foreach"}, rounds=2, seconds=1e-3)
    assert {t.how for t in adamw.timings.values()} == {"cuda events, the calls queued"}
    assert all(t.host > 0 for t in adamw.timings.values())
    found = harness.time_together({"sound": [lambda: 1], "broken": [lambda: 1 / 0]}, rounds=2, seconds=1e-3)
    assert len(found["sound"].seconds) == 2
    assert found["broken"].reason == "ZeroDivisionError: division by zero"


def test_what_cannot_be_captured_is_issued(made_up_gpu, monkeypatch):
    def refuses(graph):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuses)
    calls = {"a": [lambda: (time.sleep(4e-3), MadeUpEvent.launch(1e-3))]}
    found = harness.time_together(calls, rounds=2, seconds=1e-3)
    assert found["a"].how == "cuda events, the calls queued"


def test_where_the_host_is_slower_the_gpus_time_counts_and_the_hosts_is_beside_it(made_up_gpu, monkeypatch):
    """An update takes the host 4 ms and the GPU 1 ms, on a clock that is made up too. A step is as long as its host holds it up."""
    clock = types.SimpleNamespace(at=0.0)
    wait = lambda seconds: setattr(clock, "at", clock.at + seconds)  # noqa: E731
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: clock.at))
    for name, f in (("now", lambda: clock.at), ("wait", wait), ("free", 0.0)):
        monkeypatch.setattr(MadeUpEvent, name, f if name == "free" else staticmethod(f))

    def update():
        wait(4e-3)
        MadeUpEvent.launch(1e-3)

    calls = {"update": [update], "waits": [lambda: (update(), torch.cuda.synchronize())]}
    found = harness.time_together(calls, rounds=3, seconds=4e-3, how="queue")
    assert found["update"].median == pytest.approx(1e-3, rel=0.01)
    assert found["update"].host == pytest.approx(4e-3)
    assert found["update"].how == "cuda events, the calls queued"
    assert found["waits"].median == pytest.approx(5e-3, rel=0.01)
    assert found["waits"].how == "cuda events", "it ends the wait by which the others are queued"
    step = harness.time_together({"step": [update]}, rounds=3, seconds=4e-3, how="events")["step"]
    assert step.median > 4e-3
    assert (step.how, step.host) == ("cuda events", None)
    assert (adamw.how, bench_train.Step.how, attention.how) == ("queue", "events", "graph")


@pytest.mark.slow
def test_steps_on_a_gpu_have_their_memory(made_up_gpu, monkeypatch):
    monkeypatch.setattr(bench_train, "agree", lambda *curves: None)  # fp32 is the higher precision there
    monkeypatch.setattr(bench_train, "STEPS", 2)
    found = bench_train.Step("step", [CASE], {"eager": bench_train.eager})
    found.measure(CASE, ["eager"], rounds=2, seconds=0.01)
    assert not found.failed
    states = 3 * sum(p.numel() for p in found.arms["eager"].parameters()) * 4
    assert found.timings["eager"].peak == pytest.approx(900 + states, abs=100)  # and each tensor's step
    assert found.timings["eager"].how == "cuda events"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has graphs of its own, which the suite holds equal there")
def test_an_arm_of_graphs_is_held_equal_among_others(measured, monkeypatch):
    """On graphs that are made up: its gradients are where the graphs have them, whatever the other arms did between."""
    recordings = []

    def capture(run, pool):
        recordings.append(Recording())
        return recordings[-1].replay, recordings[-1].record(run), None

    def frozen(run, pool):
        capture(run, pool)
        return lambda: None, torch.zeros(()), None

    graphed = lambda setup: bench_train.ours(setup, "torch", False, graphed=True)  # noqa: E731
    monkeypatch.setattr(graphs, "waits", lambda: contextlib.nullcontext([]))
    monkeypatch.setattr(graphs, "capture", capture)
    assert not measured(graphed=graphed).failed
    assert min(r.replays for r in recordings) > 0
    monkeypatch.setattr(graphs, "capture", frozen)
    assert "not equal" in measured(graphed=graphed).failed["graphed"].reason


# ---- the peers of ops ----

PACKAGES = {
    layer_norm: {"liger": "liger_kernel", "quack": "quack"},
    attention: {"flash-attn-2": "flash_attn", "flash-attn-3": "flash_attn_interface", "flash-attn-4": "flash_attn"},
    linear_cross_entropy: {
        "liger": "liger_kernel", "liger-tuned": "liger_kernel", "quack": "quack", "quack-tuned": "quack", "quack-whole": "quack",
    },
}  # fmt: skip


@pytest.mark.parametrize("op", PACKAGES, ids=lambda op: op.name)
@pytest.mark.parametrize("gpu", [False, True])
def test_a_peer_that_is_not_here_says_why(monkeypatch, op, gpu):
    monkeypatch.setattr(harness, "CUDA", gpu)
    it = op.problem(op.cases[0].shape, torch.float32, "cpu")
    for name, package in PACKAGES[op].items():
        monkeypatch.setitem(sys.modules, package, None)  # not installed, whatever is
        with pytest.raises(harness.NotHere, match=f"{package}.* is not importable" if gpu else "needs a GPU"):
            op.providers[name](it)


def test_pytorchs_own_loss_is_a_peer_in_both_paths(monkeypatch):
    """The chunked path has the gradients before backward asks for them; the last one sums over all rows at once."""
    names = {"torch", "torch-chunked", "torch-tuned"}
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        linear_cross_entropy.measure(linear_cross_entropy.cases[1], names, rounds=1, seconds=1e-4)
        assert set(linear_cross_entropy.timings) == names
        monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy")
    it = linear_cross_entropy.problem(linear_cross_entropy.cases[0].shape, torch.float32, "cpu")
    for name in names:
        with pytest.raises(harness.NotHere, match=r"has no F\.linear_cross_entropy; 2\.13 has"):
            linear_cross_entropy.providers[name](it)


def test_a_deterministic_peer_is_so_forward_and_backward_and_alone(made_up_gpu, monkeypatch):
    seen = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(torch.are_deterministic_algorithms_enabled())
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            filled = torch.utils.deterministic.fill_uninitialized_memory
            seen.append(torch.are_deterministic_algorithms_enabled() and not filled)
            return dx

    it = attention.problem(attention.cases[0].shape, torch.float32, "cpu")
    f = deterministic(lambda it: lambda qkv: it.reference(Watched.apply(qkv)))(it)
    for a, b in zip(*(verify.run(g, it.inputs.values(), it.grads) for g in (f, it.reference)), strict=True):
        assert torch.equal(a, b)
    assert seen == [True, True]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    names = {"sdpa-flash-deterministic", "sdpa-cudnn-deterministic"}
    attention.measure(attention.cases[1], names, rounds=1, seconds=1e-4)
    assert names & set(attention.timings) == {"sdpa-flash-deterministic"}
    assert "No viable backend" in attention.failed["sdpa-cudnn-deterministic"].reason


def test_the_first_wave_has_the_peer_and_graphs():
    assert {"compiled", "fastgpt", "fastgpt-graphs"} <= set(bench_train.WAVES[0])
    assert set(itertools.chain(*bench_train.WAVES)) == set(bench_train.ARMS)


# ---- the run ----


def command(tmp_path, *flags):
    """Run `python -m benchmarks --quick` to success: (its result, its output, the result's path)."""
    words = [sys.executable, "-m", "benchmarks", "--quick", "--out", str(tmp_path / "results"), *flags]
    env = {**ENV, "PYTHONPATH": os.pathsep.join(filter(None, [str(FOLDER.parent), ENV.get("PYTHONPATH")]))}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (f for f in tmp_path.rglob("*.json"))
    assert file.parent.parent == tmp_path / "results"
    assert file.with_suffix(".md").is_file()
    return json.loads(file.read_text()), done.stdout, file


def test_the_command_writes_a_result_and_says_it(tmp_path):
    result, said, _ = command(tmp_path, "--only=embedding")
    assert {b["extra_info"]["provider"] for b in result["benchmarks"]} == {"eager", "inductor", "fastgpt"}
    for b in result["benchmarks"]:
        info, seconds = b["extra_info"], b["stats"]["median"]
        assert info["of_floor"] == pytest.approx(info["floor_ms"] / 1e3 / seconds)
        assert f"{info['provider']:28}{seconds * 1e3:11.4f} ms{info['ratio'][0]:7.2f}x" in said
    assert torch.__version__.startswith(result["fastgpt"]["versions"]["torch"])  # some builds add +cu130
    assert result["commit_info"]["id"] == machine.commit()["id"]
    assert said.startswith("No CUDA GPU here: toy sizes on a CPU.") != harness.CUDA
    assert "how many times as fast as the first line of its group" in said
    assert not (tmp_path / ".benchmarks").exists()


@pytest.mark.slow
def test_the_step_as_the_command_measures_it(tmp_path):
    result, said, file = command(tmp_path, "--only=step", "--profile")
    arms = {b["extra_info"]["provider"]: b["extra_info"] for b in result["benchmarks"]}
    assert {"eager", "compiled", "pytorch", "fastgpt", "fastgpt-eager"} <= set(arms)
    for b in result["benchmarks"]:
        info = b["extra_info"]
        assert info["tokens_per_s"] == pytest.approx(8 * 2 * 64 / b["stats"]["median"])
        assert (info["model"], info["batch_size"], info["device"], info["mfu"]) == ("tiny", 8, harness.DEVICE, None)
        median, least, greatest = info["ratio"]
        assert least <= median <= greatest
        assert info["provider"] in said
    assert arms["compiled"]["ratio"] == [1, 1, 1]
    assert "flash_attention" in result["fastgpt"]["attention_kernel"]
    profiles = file.with_name(f"{file.stem}-profile")
    assert len(list(profiles.glob("*.json.gz"))) == len(arms)
    assert "| gemm |" in next(profiles.glob("*-fastgpt.md")).read_text()


@pytest.mark.slow
def test_a_spent_budget_stops_what_runs_and_skips_the_rest(tmp_path):
    stuck = """
import time; from fastgpt import ops
def embedding(*args, **how):
  while True:
    try: time.sleep(60)
    except Exception: print("went on")
ops.embedding = embedding"""
    start = time.monotonic()
    status, said = suite("bench_embedding", tmp_path / "a.json", "--budget=4", "-k", "fastgpt", plant=stuck)
    assert time.monotonic() - start < 30
    assert status == 0
    assert "went on" not in said
    assert said.startswith("ss")
    assert "the budget of 4 s is spent" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only=gelu"], "--only=gelu: it is one of headline, step, ops, layer_norm"),
        (["fast"], "there is no command 'fast'; they are compare, report, count, roofline, scaling"),
        (["a.json"], "`fastgpt bench compare` and `fastgpt bench report` take files"),
        (["compare", "a.json"], "give two result files, or none"),
        (["compare", "--out=nowhere"], "there are no two results of one GPU"),
        (["report", "--out=nowhere"], "no result under nowhere"),
        (["report", "nowhere.json"], "nowhere.json: cannot be read"),
        (["roofline", "--gpu=abacus"], "--gpu=abacus: not in the table"),
        (["--out=/proc/nowhere"], "--out=/proc/nowhere: cannot be written"),
    ],
)
def test_what_a_user_can_mend_is_one_line(fastgpt, workdir, words, says):
    status, _, err = fastgpt("bench", *words)
    assert status == 2
    assert says in err
    assert err.count("\n") == 1


# ---- the roofline ----


@pytest.mark.parametrize("bias", [True, False])
def test_the_roofline_counts_the_models_parameters_and_flops(bias):
    config = GPTConfig(64, 256, 3, 2, 32, bias=bias)
    model, shape = GPT(config), Shape.of(4, config)
    assert n_params(shape, 3) == model.get_num_params(non_embedding=False)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "wpe" not in n)
    parts = roofline.step_parts(shape, 3, itemsize=2)
    assert sum(p.times * p.flops for p in parts if p.op != "attention") == 6 * 4 * 64 * matrices
    order = list(dict.fromkeys(p.op for p in parts if p.direction == "forward"))
    assert order == [
        "embedding", "layer_norm", "add_layer_norm", "qkv", "attention", "proj", "mlp up + GELU", "mlp down", "head", "cross_entropy",
    ]  # fmt: skip


def test_the_roofline_of_gpt2_at_a_known_machine(fastgpt):
    """The floor that was worked out by hand for 788 TFLOP/s and 4.3 TB/s, and the bytes that the count is held against."""
    status, out, _ = fastgpt("bench", "roofline", "--flops=788e12", "--bandwidth=4.3e12")
    assert status == 0
    assert "29.2 GB of it outside GEMMs and attention" in out
    assert "40.24 ms" in out
    assert "33.58 ms" in out


# ---- the peers ----


@pytest.mark.slow  # the suite at toy size holds each peer equal, too
@pytest.mark.parametrize("bias", [True, False])
def test_the_peers_are_the_same_model(bias):
    config = GPTConfig(16, 40, 2, 2, 32, bias=bias)
    torch.manual_seed(0)
    model = GPT(config)
    weights, idx = model.state_dict(), torch.randint(40, (2, 16))
    plain = PlainGPT(config)
    plain.load_state_dict(weights)  # every name and shape
    logits, loss = plain(idx, idx)
    assert torch.equal(logits, model(idx, idx)[0])
    assert torch.equal(loss, model(idx, idx)[1])
    assert PlainGPT(config, loss_only=True)(idx, idx)[0] is None
    theirs = HuggingFaceGPT(config)
    with torch.no_grad():
        theirs.load(weights)
    torch.testing.assert_close(theirs(idx, idx)[0], logits)
    found = theirs.weights()
    assert all(torch.equal(found[n], w) for n, w in weights.items())
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert trained == model.get_num_params(non_embedding=False)


def test_the_compiled_arms_are_one_graph():
    """A break in the peer would slow the baseline down."""
    idx = torch.randint(40, (2, 16))
    for make in (PlainGPT, GPT):
        model = make(GPTConfig(16, 40, 2, 2, 32, bias=False))
        torch._dynamo.reset()
        torch.compile(model, fullgraph=True, backend="eager")(idx, idx)


def test_tokens_are_as_unequal_as_a_texts_and_slices_keep_their_order():
    tokens = bench_train.Tokens(GPTConfig(64, 256, 1, 1, 8), 8)
    x, y = tokens.get()
    assert torch.equal(x[:, 1:], y[:, :-1])
    counts = torch.bincount(torch.cat([b[0] for b in tokens.batches]).flatten(), minlength=256)
    assert counts[0] > 5 * counts[50:60].float().mean()
    sliced = tokens.sliced(4)
    assert torch.equal(torch.cat([sliced.batches[i][0] for i in range(4)]), x)
