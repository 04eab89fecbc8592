"""`fastgpt verify`, as a user runs it; and the choice of kernels that rests on the same comparison."""

import json
import os
import subprocess
import sys
import types

import pytest
import torch

pytest.importorskip("triton")
from fastgpt import choose, ops
from fastgpt.verify import Shape, compared

SMALL = Shape(1, 9, 16, 2, 23)


@pytest.fixture(autouse=True)
def afterwards_torch():
    yield
    ops.use("torch")


def test_it_holds_here_and_says_so(workdir):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastgpt.cli", "verify", "--json", "report.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((workdir / "report.json").read_text())
    assert f"all {len(report['rows'])} comparisons hold" in done.stdout
    assert report["holds"] is True
    assert report["versions"]["torch"] in done.stdout
    if not torch.cuda.is_available():
        assert "no CUDA GPU here: Triton's interpreter runs the kernels" in done.stdout
        assert "bfloat16 too: where it computes that wrongly, kernels/interpreter.py mends it" in done.stdout
        assert "Triton" not in done.stderr, "no warning"
    for op in ops.KERNELS:
        assert {r["dtype"] for r in report["rows"] if r["op"] == op} >= {"float32", "float16", "bfloat16"}
        for direction in ("update", "repeat") if op == "adamw" else ("forward", "backward", "repeat"):
            assert any(r["op"] == op and r["direction"] == direction for r in report["rows"])
            assert direction == "repeat" or any(
                line.split()[:2] == [op, direction] and "e-" in line for line in done.stdout.splitlines()
            )
    for row in report["rows"]:
        assert row["direction"] == "repeat" or row["ratio"] <= 2
    assert {r["tensor"] for r in report["rows"] if r["op"] == "attention" and "tensor" in r} == {"out", "dqkv"}


def test_it_fails_with_status_1(monkeypatch, fastgpt):
    sound = ops.kernels("layer_norm")
    wrong = types.SimpleNamespace(**vars(sound))
    wrong.add_layer_norm = lambda *a, **k: sound.add_layer_norm(*a, **k, eps=1e-3)
    monkeypatch.setattr(ops, "KERNELS", {"layer_norm": None})
    monkeypatch.setattr(ops, "kernels", lambda op: wrong)
    status, out, _ = fastgpt("verify")
    assert status == 1
    assert "FAILS: " in out
    assert "comparisons FAIL" in out


def test_nan_and_another_dtype_never_hold():
    ones = torch.ones(3)
    assert compared("forward", "x", ones, ones, ones.double()).holds
    assert not compared("forward", "x", ones * float("nan"), ones, ones.double()).holds
    assert not compared("forward", "x", ones * float("nan"), ones * float("nan"), ones.double()).holds
    with pytest.raises(ArithmeticError, match="float16"):
        compared("forward", "x", ones.half(), ones, ones.double())


def test_a_file_that_cannot_be_written_is_one_line(workdir, fastgpt, monkeypatch):
    monkeypatch.setattr(ops, "KERNELS", {})
    status, _, err = fastgpt("verify", "--json=missing/report.json")
    assert (status, err) == (2, "fastgpt: error: --json=missing/report.json: No such file or directory\n")


def decide(op, times, shape=SMALL):
    """What is decided where the clock gives these times."""
    return choose.decide(
        op, shape, torch.float32, "cpu", False, lambda functions: {name: times[name] for name in functions}
    )


@pytest.mark.parametrize("op", ops.KERNELS)
def test_the_faster_one_is_chosen(op):
    others = {"cudnn": 3.0} if op == "attention" else {}
    assert decide(op, {"torch": 2.0, "triton": 1.0, **others})["chosen"] == "triton"
    assert decide(op, {"torch": 1.0, "triton": 2.0, **others})["chosen"] == "torch"
    assert set(ops.chosen.values()) == {"torch"}, "as it was before"


def test_a_candidate_that_is_not_equal_or_cannot_run_is_rejected(monkeypatch):
    sound = ops.kernels("gelu_mlp")
    wrong = types.SimpleNamespace(takes=sound.takes, gelu_mlp=lambda *a, **k: sound.gelu_mlp(*a, **k) * 1.001)
    monkeypatch.setattr(ops, "kernels", lambda op, others=ops.kernels: wrong if op == "gelu_mlp" else others(op))
    monkeypatch.setitem(ops.loaded, "gelu_mlp", wrong)
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
    sound = ops.kernels("layer_norm")
    wrong = types.SimpleNamespace(**vars(sound))

    def add_layer_norm(x, branch, weight, bias=None, eps=1e-5, dropout_p=0.0, seed=None):
        stream, h = sound.add_layer_norm(x, branch, weight, bias, eps, dropout_p, seed)
        return stream, h * (1.001 if dropout_p else 1)

    wrong.add_layer_norm = add_layer_norm
    monkeypatch.setattr(ops, "kernels", lambda op: wrong)
    monkeypatch.setitem(ops.loaded, "layer_norm", wrong)
    found = decide("layer_norm", {"torch": 2.0, "triton": 1.0}, Shape(1, 9, 16, 2, 23, dropout=0.1))
    assert "is not equal: h has" in found["rejected"]["triton"]


def test_what_was_measured_is_remembered_until_something_changes(workdir, monkeypatch):
    measured = []

    def measure(functions):
        measured.append(list(functions))
        return {"torch": 2.0, "triton": 1.0}

    def ask(shape=SMALL):
        return choose.remembered("embedding", shape, torch.float32, "cpu", False, measure)

    first = ask()
    assert ask() == first
    assert len(measured) == 1
    ask(Shape(2, 9, 16, 2, 23))
    assert len(measured) == 2, "another shape"
    monkeypatch.setattr(choose.tuned, "source_hash", lambda: "another")
    ask()
    assert len(measured) == 3, "another source"
    for file in (workdir / "cache" / "kernels").iterdir():
        file.write_text("{")
    ask()
    assert len(measured) == 4, "a damaged file"


def test_auto_without_a_gpu_is_torch_and_pins_stay(capsys):
    picks = choose.choose("layer_norm=triton", SMALL, torch.float32, "cpu", False)
    assert picks == {**dict.fromkeys(ops.KERNELS, "torch"), "layer_norm": "triton"}
    assert capsys.readouterr().out == ""


def test_the_table_that_a_run_prints(capsys, workdir, monkeypatch):
    """On a machine whose GPU is made up: what is printed, and that the run's random numbers are left alone."""
    monkeypatch.setattr(choose, "time_together", lambda fs: dict(zip(fs, [2.0, 1.0, 3.0], strict=False)))
    monkeypatch.setattr(choose, "is_cuda", lambda device: True)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices, fork=torch.random.fork_rng: fork(devices=[]))
    state = torch.get_rng_state()
    picks = choose.choose("auto", SMALL, torch.float32, "cpu", False)
    assert torch.equal(torch.get_rng_state(), state)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("choosing kernels for 1 x 9 tokens in float32")
    assert out[1].split() == ["op", "torch", "ms", "cudnn", "ms", "triton", "ms", "chosen"]
    assert [line.split()[:5] for line in out[2:]][1] == ["layer_norm", "2.000", "-", "1.000", "triton"]
    assert picks["layer_norm"] == "triton"
