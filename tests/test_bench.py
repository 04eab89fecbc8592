"""The benchmark suite: what it times is equal, a slowdown shows, a budget ends it, and its peers are what they are named for."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")
from replay import Recording

from fastgpt import graphs
from fastgpt.benchmarks import bench_train, compare, harness, machine, profile, roofline
from fastgpt.benchmarks.peers.huggingface import HuggingFaceGPT
from fastgpt.benchmarks.peers.plain import PlainGPT
from fastgpt.config import GPTConfig
from fastgpt.model import GPT

FOLDER = Path(harness.__file__).parent
ENV = {k: v for k, v in os.environ.items() if "XDIST" not in k}  # beside which pytest-benchmark would not measure
CASE = bench_train.Case("tiny", 4, 2, 0)


def suite(name, json_file, *flags, plant=""):
    """Run one file of the suite as `pytest benchmarks` would, after some planted lines: (exit status, output)."""
    code = f"import sys, pytest\n{plant}\nsys.exit(pytest.main(sys.argv[1:]))"
    words = [str(FOLDER / f"{name}.py"), f"--benchmark-json={json_file}", "-q", "-rs", "-p", "no:cacheprovider", *flags]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=ENV)
    return done.returncode, done.stdout + done.stderr


# ---- planted faults ----


def test_a_planted_sleep_or_copy_is_slower_in_compare(tmp_path, capsys):
    a, slow, copied = (tmp_path / f"{name}.json" for name in ("a", "slow", "copied"))
    only = "-k", "eager or fastgpt"
    assert suite("bench_embedding", a, *only)[0] == 0
    plant = "import time; from fastgpt import ops; f = ops.embedding; ops.embedding = lambda *a: {} or f(*a)"
    assert suite("bench_embedding", slow, *only, plant=plant.format("time.sleep(2e-4)"))[0] == 0
    copies = plant.replace("import time", "import torch; x = torch.ones(2**20)").format("x.clone() is x")
    assert suite("bench_embedding", copied, *only, plant=copies)[0] == 0
    for b in (slow, copied):
        capsys.readouterr()
        assert compare.compare(a, b, 1.5) == 1
        said = capsys.readouterr().out.splitlines()
        assert any("fastgpt" in line and "  slower" in line for line in said)


def test_a_planted_wrong_result_has_no_time(tmp_path):
    plant = """
from torch.nn import functional as F
from fastgpt import ops
ops.gelu_mlp = lambda h, w, b, v, c: F.linear(F.gelu(F.linear(h, w, b), approximate="tanh"), v, c)"""
    status, said = suite("bench_gelu_mlp", tmp_path / "a.json", "-k", "eager or fastgpt", plant=plant)
    assert status == 1
    assert "not equal: y has" in said
    result = json.loads((tmp_path / "a.json").read_text())
    assert {b["extra_info"]["provider"] for b in result["benchmarks"] if b["extra_info"]} == {"eager"}
    assert any("FAILED" in x["why"] and "not equal" in x["why"] for x in result["fastgpt"]["left_out"])


@pytest.fixture
def group(monkeypatch):
    """Measure planted arms beside plain PyTorch's, in this process."""

    def measure(**planted):
        for name, make in planted.items():
            monkeypatch.setitem(bench_train.ARMS, name, make)
        monkeypatch.setitem(bench_train.ARMS, "compiled", bench_train.eager)  # sooner made
        group = bench_train.Group(CASE, rounds=3, seconds=0.01)
        group.measure(["eager", "fastgpt-eager", *planted])
        return group

    return measure


def test_an_arm_that_computes_or_begins_otherwise_is_not_timed(group):
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
    found = group(**wrong)
    assert set(found.failed) == set(wrong)
    assert all(f.reason.startswith("not equal: losses are") for name, f in found.failed.items() if name != "other")
    assert found.failed["other"].reason == "not equal: the initial transformer.wte.weight"


def test_a_sleep_in_an_arm_shows_in_its_ratio_and_a_crash_stops_no_other(group):
    def slow(setup):
        arm = bench_train.eager(setup)
        return bench_train.Arm(arm.module, lambda x, y: (time.sleep(0.02), arm.module(x, y))[1], setup.optimizer)

    def broken(setup):
        raise torch.OutOfMemoryError("of memory there is none")

    found = group(slow=slow, broken=broken)
    median, least, greatest = found.timings["slow"].ratios_of(found.bases["slow"])
    assert least <= median <= greatest < 0.9
    assert found.timings["slow"].median > 2 * 0.02  # two micro-steps
    assert found.failed["broken"].reason == "OutOfMemoryError: of memory there is none"
    assert "eager" in found.timings


# ---- a GPU that is made up: what only runs there is at least run ----


class MadeUpEvent:
    def __init__(self, enable_timing):
        self.at = None

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class MadeUpGraph:
    replay = staticmethod(lambda: time.sleep(1e-5))


@pytest.fixture
def made_up_gpu(monkeypatch):
    """torch.cuda as the harness asks it, around work of the CPU."""
    properties = types.SimpleNamespace(L2_cache_size=2**16, total_memory=80 * 10**9, multi_processor_count=132)
    answers = dict(get_device_properties=properties, memory_allocated=100, max_memory_allocated=1000, current_stream=0)
    names = ("synchronize", "reset_peak_memory_stats", "empty_cache", "set_sync_debug_mode", "set_stream")
    for name, answer in (answers | dict.fromkeys(names)).items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    for name, what in (("Event", MadeUpEvent), ("CUDAGraph", MadeUpGraph), ("graph", contextlib.nullcontext)):
        monkeypatch.setattr(torch.cuda, name, what)
    for module in (harness, bench_train, profile):
        monkeypatch.setattr(module, "CUDA", True)


def test_ops_are_replayed_from_graphs_and_one_failure_stops_no_other(made_up_gpu, monkeypatch):
    from fastgpt.benchmarks.bench_attention import attention
    from fastgpt.benchmarks.bench_optimizer import update

    monkeypatch.setitem(attention.providers, "fastgpt", lambda it: it.chosen)
    found = attention.measure(attention.cases[1], set(attention.providers), rounds=2, seconds=1e-3)
    for name in ("sdpa", "sdpa-flash", "fastgpt"):
        assert found[name].how == "cuda graph"
        assert (len(found[name].seconds), found[name].peak) == (2, 900)
        assert found[name].host > 0
    assert "No viable backend" in found["sdpa-cudnn"].reason
    found = update.measure(update.cases[0], {"fused", "foreach"}, rounds=2, seconds=1e-3)
    assert {t.how for t in found.values()} == {"cuda events"}
    found = harness.time_together({"sound": [lambda: 1], "broken": [lambda: 1 / 0]}, rounds=2, seconds=1e-3)
    assert len(found["sound"].seconds) == 2
    assert found["broken"].reason == "ZeroDivisionError: division by zero"


def test_what_cannot_be_captured_is_issued(made_up_gpu, monkeypatch):
    def refuses(graph):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuses)
    found = harness.time_together({"a": [lambda: time.sleep(1e-4)]}, rounds=2, seconds=1e-3)
    assert found["a"].how == "cuda events"
    assert found["a"].median >= 1e-4


def test_steps_on_a_gpu_have_their_memory_and_each_its_best_batch(made_up_gpu, group, monkeypatch):
    monkeypatch.setattr(bench_train, "agree", lambda *curves: None)  # fp32 is the higher precision there
    found = group()
    assert not found.failed
    states = 3 * sum(p.numel() for p in found.arms["eager"].parameters()) * 4
    assert found.timings["eager"].peak == pytest.approx(900 + states, abs=100)  # and each tensor's step
    monkeypatch.setattr(bench_train, "CASES", [bench_train.Case("tiny", 0, 1, 0)])
    best = bench_train.Group(bench_train.CASES[0], rounds=2, seconds=1e-3)
    best.measure(["eager"])
    assert not best.failed
    assert best.batch_sizes["eager"] in (16, 32, 64, 128, 256)
    assert len(best.timings["eager"].seconds) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has graphs of its own, which the suite holds equal there")
def test_an_arm_of_graphs_is_held_equal_among_others(group, monkeypatch):
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
    assert not group(graphed=graphed).failed
    assert min(r.replays for r in recordings) > 0
    monkeypatch.setattr(graphs, "capture", frozen)
    assert "not equal" in group(graphed=graphed).failed["graphed"].reason


# ---- the run ----


def test_the_step_as_the_command_measures_it(tmp_path):
    out = tmp_path / "results"
    words = [sys.executable, "-m", "benchmarks", "--quick", "--only", "step", "--profile", "--out", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=FOLDER.parent, env=ENV)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (f for f in out.rglob("*.json"))
    assert file.parent.parent == out
    result = json.loads(file.read_text())
    arms = {b["extra_info"]["provider"]: b["extra_info"] for b in result["benchmarks"]}
    assert {"eager", "compiled", "strongest", "fastgpt", "fastgpt-eager"} <= set(arms)
    for b in result["benchmarks"]:
        info = b["extra_info"]
        assert info["tokens_per_s"] == pytest.approx(8 * 2 * 64 / b["stats"]["median"])
        assert (info["model"], info["batch_size"], info["device"], info["mfu"]) == ("tiny", 8, harness.DEVICE, None)
        assert info["ratio_to_compiled_min"] <= info["ratio_to_compiled"] <= info["ratio_to_compiled_max"]
        assert info["provider"] in done.stdout
    assert arms["compiled"]["ratio_to_compiled"] == 1
    assert "flash_attention" in result["fastgpt"]["attention_kernel"]
    assert result["fastgpt"]["versions"]["torch"] == torch.__version__
    assert result["commit_info"]["id"] == machine.commit()["id"]
    assert file.with_suffix(".md").is_file()
    assert len(list(out.rglob("*-profile/*.json.gz"))) == len(arms)
    assert "| gemm |" in next(out.rglob("*-profile/*fastgpt.md")).read_text()


def test_a_spent_budget_skips_and_says_what(tmp_path):
    status, said = suite("bench_embedding", tmp_path / "a.json", "--budget=0.001")
    assert status == 0
    assert "the budget of 0.001 s is spent" in said
    stuck = """
import time; from fastgpt import ops
def embedding(*args):
  while True:
    try: time.sleep(60)
    except Exception: print("went on")
ops.embedding = embedding"""
    start = time.monotonic()
    status, said = suite("bench_embedding", tmp_path / "b.json", "--budget=4", "-k", "fastgpt", plant=stuck)
    assert time.monotonic() - start < 30
    assert status == 0
    assert "the budget of 4 s is spent" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only=gelu"], "--only=gelu: it is one of step, ops, layer_norm"),
        (["fast"], "there is no command 'fast'; they are compare, report, count and roofline"),
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
    model = GPT(config)
    assert roofline.n_params(config) == model.get_num_params(non_embedding=False)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "wpe" not in n)
    flops = sum(p.times * p.flops for p in roofline.step_parts(config, 4) if p.op != "attention")
    assert flops == 6 * 4 * 64 * matrices


def test_the_roofline_of_gpt2_at_a_known_machine(fastgpt):
    """The floor that was worked out by hand for 788 TFLOP/s and 4.3 TB/s, and the bytes that the count is held against."""
    status, out, _ = fastgpt("bench", "roofline", "--flops=788e12", "--bandwidth=4.3e12")
    assert status == 0
    assert "29.2 GB of it outside GEMMs and attention" in out
    assert "40.24 ms" in out
    assert "33.58 ms" in out


# ---- the peers ----


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
