"""`fastgpt verify`, as a user runs it; and the choice of kernels that rests on the same comparison."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from fastgpt import choose, ops, reference, verify
from fastgpt.kernels import attention, configs, embedding, gelu_mlp, layer_norm, linear, linear_cross_entropy
from fastgpt.records import Shape, problem
from fastgpt.timing import Times
from fastgpt.verify import compared

SMALL = Shape(1, 9, 16, 2, 23)
RUN = torch.float32, "cpu", False


def says_that_it_holds(out, ops):
    """Whether what is printed, and report.json, say so of these ops."""
    report = json.loads(Path("report.json").read_text())
    assert f"all {len(report['rows'])} comparisons hold" in out
    assert report["holds"] is True
    assert report["versions"]["torch"] in out
    if not torch.cuda.is_available():
        assert "no CUDA GPU here: Triton's interpreter runs the kernels" in out
        assert "bfloat16 too: kernels/interpreter.py corrects the interpreter's arithmetic" in out
    assert {row["op"] for row in report["rows"]} == set(ops)
    for op in ops:
        assert {r["dtype"] for r in report["rows"] if r["op"] == op} >= {"float32", "float16", "bfloat16"}
        for direction in ("update", "repeat") if op == "adamw" else ("forward", "backward", "repeat"):
            assert any(r["op"] == op and r["direction"] == direction for r in report["rows"])
            lines = [line for line in out.splitlines() if line.split()[:2] == [op, direction]]
            assert direction == "repeat" or (lines and all("e-" in line for line in lines))
    assert all(row["direction"] == "repeat" or row["ratio"] <= 2 for row in report["rows"])


def test_it_holds_here_and_says_so(workdir, fastgpt, monkeypatch):
    few = ("linear", "adamw")
    monkeypatch.setattr(verify, "RECORDS", {op: verify.RECORDS[op] for op in few})
    status, out, err = fastgpt("verify", "--json=report.json")
    assert (status, err) == (0, "")
    says_that_it_holds(out, few)


def test_one_dtype_is_checked_alone(workdir, fastgpt, monkeypatch):
    monkeypatch.setattr(verify, "RECORDS", {"linear": verify.RECORDS["linear"]})
    status, out, _ = fastgpt("verify", "--dtype=float16", "--json=report.json")
    assert status == 0
    assert {row["dtype"] for row in json.loads(Path("report.json").read_text())["rows"]} == {"float16"}
    assert "bfloat16" not in out
    assert "float32" not in out


@pytest.mark.slow
def test_every_op_holds_here(workdir):
    """As a user runs it, who sets nothing; each op's own tests hold it to more."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastgpt.cli", "verify", "--json", "report.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Triton" not in done.stderr, "no warning"
    says_that_it_holds(done.stdout, ops.OPS)


def test_it_fails_with_status_1(monkeypatch, fastgpt):
    sound = linear.linear
    monkeypatch.setattr(linear, "linear", lambda *a: sound(*a) * 1.01)
    monkeypatch.setattr(verify, "RECORDS", {"linear": verify.RECORDS["linear"]})
    status, out, _ = fastgpt("verify")
    assert status == 1
    assert "FAILS: " in out
    assert "comparisons FAIL" in out


def test_everything_is_compiled_at_once(monkeypatch):
    """Backwards too: autograd would run them all on one thread of its own, one after the other."""
    busy, most, gate = set(), [], threading.Barrier(2, timeout=30)

    def backward(it, inputs, grads):
        busy.add(threading.get_ident())
        most.append(torch.autograd.is_multithreading_enabled())
        gate.wait()  # nobody goes on alone

    monkeypatch.setattr(verify, "run", backward)
    monkeypatch.setattr(
        verify, "problem", lambda op, shape, dtype, device: SimpleNamespace(kernel=None, inputs={}, grads=())
    )
    monkeypatch.setattr(verify.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(verify, "RECORDS", {"linear": SimpleNamespace(cases=lambda dtype, gpu: [1, 2, 3, 4])})
    verify.compile_all([torch.float32])
    assert most == [False] * 4
    assert len(busy) == 2


def test_a_machine_without_triton_is_told(monkeypatch, capsys):
    monkeypatch.setattr(choose, "is_cuda", lambda device: True)
    monkeypatch.setattr(ops, "triton", None)
    assert choose.choose("auto", SMALL, torch.float32, "cuda", False) == ops.TORCH
    assert (
        capsys.readouterr().out
        == "--kernels=auto: PyTorch's operators, since Triton is not installed; pip install triton\n"
    )


def test_nan_and_another_dtype_never_hold():
    ones = torch.ones(3)
    assert compared("forward", "x", ones, ones, ones.double()).holds
    assert not compared("forward", "x", ones * float("nan"), ones, ones.double()).holds
    assert not compared("forward", "x", ones * float("nan"), ones * float("nan"), ones.double()).holds
    with pytest.raises(ArithmeticError, match="float16"):
        compared("forward", "x", ones.half(), ones, ones.double())


def test_a_file_that_cannot_be_written_is_one_line(workdir, fastgpt, monkeypatch):
    monkeypatch.setattr(verify, "RECORDS", {})
    Path("folder").mkdir()
    status, _, err = fastgpt("verify", "--json=folder")
    assert (status, err) == (2, "fastgpt: error: --json=folder: it is a folder, and no file\n")
    status, _, err = fastgpt("verify", "--json=missing/report.json")
    assert (status, err) == (2, "fastgpt: error: --json=missing/report.json: No such file or directory\n")


def test_a_verify_that_is_stopped_leaves_the_last_report_as_it_was(fastgpt, workdir, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    Path("report.json").write_text("the last one")
    monkeypatch.setattr("fastgpt.verify.problem", stopped)
    assert fastgpt("verify", "--json=report.json")[0] == 130
    assert Path("report.json").read_text() == "the last one"
    assert [p.name for p in Path().glob("*report*")] == ["report.json"]


def decide(op, times, shape=SMALL):
    """What is decided where the clock gives these times, in milliseconds of the GPU."""
    found = choose.measured(op, shape, *RUN, (), lambda calls: {name: Times(times[name], 0.0) for name in calls})
    chosen, _ = choose.fastest({op: found["ms"]}, True)
    return {"chosen": chosen[op], **found}


@pytest.mark.parametrize("op", ops.OPS)
def test_the_faster_one_is_chosen(op):
    others = {"cudnn": 3.0} if op == "attention" else {}
    assert decide(op, {"torch": 2.0, "triton": 1.0, **others})["chosen"] == "triton"
    assert decide(op, {"torch": 1.0, "triton": 2.0, **others})["chosen"] == "torch"


def test_a_slow_host_counts_only_where_the_step_waits_for_it():
    """An op of 95 us GPU and 350 us host is judged by the 95 under graphs, and beside work that keeps the GPU busy."""
    norm = {"torch": Times(0.190, 0.050), "triton": Times(0.095, 0.350)}
    assert choose.fastest({"layer_norm": norm}, True) == ({"layer_norm": "triton"}, "GPU")
    assert choose.fastest({"layer_norm": norm}, False) == ({"layer_norm": "torch"}, "host")
    busy = {"torch": Times(9.0, 0.1), "triton": Times(8.0, 0.2)}
    both = choose.fastest({"layer_norm": norm, "gelu_mlp": busy}, False)
    assert both == ({"layer_norm": "triton", "gelu_mlp": "triton"}, "GPU")


def test_pytorch_too_may_be_rejected_and_one_must_be_left(monkeypatch):
    """Where only the fused loss fits into memory."""

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.00 GiB")

    monkeypatch.setattr(reference, "linear_cross_entropy", full)
    found = decide("linear_cross_entropy", {"torch": 1.0, "triton": 2.0})
    assert found["chosen"] == "triton"
    assert "out of memory" in found["rejected"]["torch"]
    monkeypatch.setattr(linear_cross_entropy, "linear_cross_entropy", full)
    with pytest.raises(torch.OutOfMemoryError):
        decide("linear_cross_entropy", {})


def test_what_does_not_fit_beside_the_other_is_timed_alone():
    def measure(calls):
        if len(calls) > 1 or "torch" in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
        return {name: Times(1.0, 0.0) for name in calls}

    found = choose.measured("linear", SMALL, *RUN, (), measure)
    assert found["ms"] == {"triton": (1.0, 0.0)}
    assert "out of memory" in found["rejected"]["torch"]


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("op", [op for op in ops.OPS if op != "adamw"])
def test_what_is_timed_runs_as_in_training(op, implementation, monkeypatch):
    """Weights are not cast where kernels read shadows, their gradients are added, and the head's gradient is written into."""
    casts, added, owned = [], [], []
    for module in (linear, gelu_mlp, linear_cross_entropy):
        spied(monkeypatch, module, "cast", lambda given, answer: casts.append(answer is not given[0].shadow))
    for module in (linear, gelu_mlp):
        spied(monkeypatch, module, "weight_gradient", lambda given, answer: added.append(answer[1]))
    spied(monkeypatch, embedding, "is_owned", lambda given, answer: owned.append(answer))
    it = problem(op, SMALL, torch.bfloat16, "cpu")
    (call,) = choose.prepared(it, ops.Kernels(**{op: implementation}), False)
    call()
    call()
    kernels = implementation == "triton"
    assert casts == [False] * (2 * kernels * {"linear": 1, "gelu_mlp": 2, "linear_cross_entropy": 1}.get(op, 0))
    assert added == [True] * (2 * kernels * {"linear": 1, "gelu_mlp": 2}.get(op, 0))
    assert owned == [True] * (2 * kernels * (op == "embedding"))


def spied(monkeypatch, module, name, see):
    """Let see(arguments, answer) hear of a module's function."""
    f = getattr(module, name)

    def call(*args):
        answer = f(*args)
        see(args, answer)
        return answer

    monkeypatch.setattr(module, name, call)


def test_a_candidate_that_is_not_equal_or_cannot_run_is_rejected(monkeypatch):
    sound = gelu_mlp.gelu_mlp
    monkeypatch.setattr(gelu_mlp, "gelu_mlp", lambda *a, **k: sound(*a, **k) * 1.001)
    found = decide("gelu_mlp", {"torch": 2.0, "triton": 1.0})
    assert found["chosen"] == "torch"
    assert "is not equal: y has" in found["rejected"]["triton"]
    if not torch.cuda.is_available():
        found = decide("attention", {"torch": 2.0, "triton": 3.0, "cudnn": 1.0})
        assert found["chosen"] == "torch"
        assert "cudnn does not take" in found["rejected"]["cudnn"]
    found = decide("attention", {"torch": 2.0, "triton": 1.0, "cudnn": 3.0}, Shape(1, 9, 136, 1, 23))
    assert found["chosen"] == "torch"
    assert "triton does not take float32 rows of 408" in found["rejected"]["triton"]


def test_a_fault_in_the_dropout_is_found_too(monkeypatch):
    sound = layer_norm.add_layer_norm

    def add_layer_norm(x, branch, weight, bias=None, eps=1e-5, dropout_p=0.0, *others, **named):
        stream, h = sound(x, branch, weight, bias, eps, dropout_p, *others, **named)
        return stream, h * (1.001 if dropout_p else 1)

    monkeypatch.setattr(layer_norm, "add_layer_norm", add_layer_norm)
    found = decide("layer_norm", {"torch": 2.0, "triton": 1.0}, Shape(1, 9, 16, 2, 23, dropout=0.1))
    assert "is not equal: h has" in found["rejected"]["triton"]


def test_what_was_measured_is_remembered_until_something_changes(workdir, monkeypatch):
    measured = []

    def measure(functions):
        measured.append(list(functions))
        return {"torch": Times(2.0, 0.5), "triton": Times(1.0, 0.25)}

    def ask(shape=SMALL, rows=()):
        return choose.remembered("embedding", shape, *RUN, rows, measure)

    first = ask()
    assert ask() == first
    assert len(measured) == 1
    ask(Shape(2, 9, 16, 2, 23))
    assert len(measured) == 2, "another shape"
    row = "embedding", configs.EmbeddingConfig(block=512).text
    ask(rows=(row,))
    assert len(measured) == 3, "another launch configuration"
    ask(rows=(row, ("adamw", configs.ADAMW.text)))
    assert len(measured) == 3, "of another op"
    monkeypatch.setattr(choose.tuned, "source_hash", lambda: "another")
    ask()
    assert len(measured) == 4, "another source"
    files = {file: json.loads(file.read_text()) for file in (workdir / "cache" / "kernels").iterdir()}
    for i, damage in enumerate(
        ("{", "[]", {"ms": {}}, {"ms": {"torch": [2.0, "fast"]}}, {"ms": {"torch": [-1.0, 1.0]}})
    ):
        for file, good in files.items():
            file.write_text(damage if isinstance(damage, str) else json.dumps(good | damage))
        assert ask() == first
        assert len(measured) == 5 + i, "a damaged file"


def test_auto_without_a_gpu_is_torch_and_pins_stay(capsys):
    assert choose.choose("layer_norm=triton", SMALL, *RUN) == ops.Kernels(layer_norm="triton")
    assert capsys.readouterr().out == ""


def test_the_table_that_a_run_prints(capsys, workdir, monkeypatch):
    """On a machine whose GPU is made up: what is printed, and that the run's random numbers are left alone."""
    times = {"torch": Times(2.0, 0.5), "triton": Times(1.0, 0.25)}
    monkeypatch.setattr(choose.timing, "together", lambda calls: {name: times[name] for name in calls})
    monkeypatch.setattr(choose, "is_cuda", lambda device: True)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices, fork=torch.random.fork_rng: fork(devices=[]))
    monkeypatch.setattr(attention, "takes", lambda qkv, n_head: False)
    state = torch.get_rng_state()
    kernels = choose.choose("auto", SMALL, *RUN)
    assert torch.equal(torch.get_rng_state(), state)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("choosing kernels for 1 x 9 tokens in float32")
    assert out[1].split() == [
        "op",
        "torch",
        "ms",
        "host",
        "ms",
        "cudnn",
        "ms",
        "host",
        "ms",
        "triton",
        "ms",
        "host",
        "ms",
        "chosen",
    ]
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in out[2:-1]}
    assert list(lines) == list(ops.OPS)
    assert lines["layer_norm"].split() == ["2.000", "0.500", "-", "-", "1.000", "0.250", "triton"]
    assert lines["attention"].split()[:7] == ["2.000", "0.500", "-", "-", "-", "-", "torch;"]
    assert out[-1] == "  chosen by the GPU's time, which decides in such a step"
    assert "triton does not take float32 rows of 48" in lines["attention"]
    assert kernels == ops.Kernels(**dict.fromkeys(ops.OPS, "triton") | {"attention": "torch"})
