"""--runner=auto takes the fastest way to run a step, on a made-up GPU; and a default that does not work here ends no run."""

import json
import os
import re
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import TINY, losses
from replay import Recording

pytest.importorskip("triton")
from fastgpt import distributed, graphs, ops, runner, timing, tune, tuned
from fastgpt.config import GPTConfig, TrainConfig, TuneConfig, UserError
from fastgpt.parse import parse
from fastgpt.runner import COMPILE, EAGER, GRAPHS, PLAIN, Runner, Work

WORK = Work(GPTConfig(16, 65, 2, 2, 32), sequences=4, accumulates=True, kernels="auto", dtype="float32")
LONG = 10**9  # micro-steps of a run that earns the timing back


def times(**wall):
    """A made-up `in_a_process`: wall milliseconds by runner, a string for a failure, None for one that is not done in time."""

    def time_one(work, name, device, seconds):
        asked.append(name)
        took = wall[name]
        if isinstance(took, str):
            return {"failed": took, "memory": "out of memory" in took}
        return None if took is None else {"gpu": took / 2, "wall": took}

    asked = time_one.asked = []
    return time_one


@pytest.mark.parametrize(
    ("walls", "fastest", "says"),
    [
        (
            dict(graphs=2.0, plain=3.0, compile=4.0),
            GRAPHS,
            "our kernels, in CUDA graphs, 1.50 times as fast as plain PyTorch compiled",
        ),
        (
            dict(graphs=3.0, plain=2.0, compile=4.0),
            PLAIN,
            "compiled (as nanoGPT trains), 1.00 times as fast as plain PyTorch compiled",
        ),
        (
            dict(graphs=3.0, plain=3.0, compile=2.0),
            COMPILE,
            "our kernels, compiled, 1.50 times as fast as plain PyTorch compiled",
        ),
        (dict(graphs="an error", plain=3.0, compile=2.0), COMPILE, "1.50 times"),
        (dict(graphs=3.0, plain=None, compile=None), GRAPHS, "runner: our kernels, in CUDA graphs\n"),
        (dict(graphs="x", plain="y", compile="z"), GRAPHS, "our kernels, in CUDA graphs, since nothing could be timed"),
    ],
)
def test_the_fastest_is_taken_and_kept(workdir, capsys, walls, fastest, says):
    clock = times(**walls)
    assert runner.find(WORK, "cpu", LONG, time_one=clock) == fastest
    out = capsys.readouterr().out
    assert says in out
    assert clock.asked == ["graphs", "plain", "compile"]
    for name, wall in walls.items():
        (line,) = (line for line in out.splitlines() if line.startswith(f"  {name}: "))
        expected = (
            [f"{wall / 2:.3f}", f"{wall:.3f}"]
            if isinstance(wall, float)
            else [wall or "not reached in 120 s; the next run times it"]
        )
        assert line.split()[-len(" ".join(expected).split()) :] == " ".join(expected).split()
    if not any(isinstance(wall, float) for wall in walls.values()) or None in walls.values():
        return
    again = times()
    assert runner.find(WORK, "cpu", 1, time_one=again) == fastest, "kept, for a short run too"
    assert again.asked == []
    assert says in capsys.readouterr().out
    for other in (
        replace(WORK, sequences=8), replace(WORK, dtype="bfloat16"), replace(WORK, recompute="block"), replace(WORK, accumulates=False),
        replace(WORK, config=GPTConfig(16, 65, 3, 2, 32)), replace(WORK, doc_mask=True), replace(WORK, residual="bf16"),
    ):  # fmt: skip
        clock = times(**walls)
        runner.find(other, "cpu", LONG, time_one=clock)
        assert clock.asked, other


def test_what_was_kept_is_read_with_care(workdir, capsys, monkeypatch):
    runner.find(WORK, "cpu", LONG, time_one=times(graphs=3.0, plain=2.0, compile=4.0))
    (file,) = (workdir / "cache" / "runners").iterdir()
    good = json.loads(file.read_text())
    pair = {"gpu": 1.0, "wall": 1.0}
    damaged = [[], {"graphs": {"gpu": 1, "wall": "x"}}, {"warp": pair}, {"graphs": {**pair, "wall": -1.0}}]
    for wrong in ("{", "[]", *(json.dumps({**good, "found": found}) for found in damaged)):
        file.write_text(wrong)
        clock = times(graphs=1.0, plain=2.0, compile=4.0)
        assert runner.find(WORK, "cpu", LONG, time_one=clock) == GRAPHS
        assert clock.asked
    monkeypatch.setattr(tuned, "source_hash", lambda: "another")
    clock = times(graphs=1.0, plain=2.0, compile=4.0)
    runner.find(WORK, "cpu", LONG, time_one=clock)
    assert clock.asked, "other sources"


def test_a_short_run_does_not_wait(workdir, capsys):
    """Timing would take longer than it saves."""
    assert runner.find(WORK, "cpu", 5000, time_one=times()) == GRAPHS
    assert capsys.readouterr().out == (
        "runner: our kernels, in CUDA graphs; the run takes about 5 s, too short to time others\n"
    )
    ddp = replace(WORK, replays=False)
    assert runner.find(ddp, "cpu", 5000, time_one=times()) == EAGER
    assert ddp.candidates() == ["eager", "plain", "compile"]
    gpt2 = Work(GPTConfig(), 48, True, "auto", "bfloat16")
    assert 0.01 < runner.estimate(gpt2, "cpu") < 1, "an A100 takes a third of a second"


def test_pinned_kernels_stay():
    for spec in ("triton", "torch", "attention=torch"):
        assert replace(WORK, kernels=spec).candidates() == ["graphs", "compile"]


def test_nobody_waits_longer_than_said(workdir):
    """The time is all candidates' together: what is left of it goes to the next one."""
    left, clock = [], iter([0.0, 0.0, 30.0, 110.0, 130.0])

    def time_one(work, name, device, seconds):
        left.append(seconds)
        return {"gpu": 1.0, "wall": 1.0}

    with patch.object(runner, "time", SimpleNamespace(monotonic=lambda: next(clock))):
        runner.time_all(WORK, "cpu", 120.0, {}, time_one)
    assert left == [120.0, 90.0, 10.0]
    began = timing.time.perf_counter()
    assert runner.in_a_process(WORK, "graphs", "cpu", 0.2) is None
    assert timing.time.perf_counter() - began < 5, "the process was ended"


def test_what_was_not_reached_is_timed_by_the_next_run(workdir, capsys):
    """Nobody waits longer for it, and what has had all the time is given up."""
    assert runner.find(WORK, "cpu", LONG, time_one=times(graphs=3.0, plain=None, compile=None)) == GRAPHS
    assert runner.find(WORK, "cpu", 1, time_one=times()) == GRAPHS, "a short run takes what is known"
    second = times(plain=2.0, compile=None)
    assert runner.find(WORK, "cpu", LONG, time_one=second) == PLAIN
    assert second.asked == ["plain", "compile"]
    third = times(compile="CUDA out of memory")
    assert runner.find(WORK, "cpu", LONG, time_one=third) == PLAIN
    fourth = times(compile=None)
    assert runner.find(WORK, "cpu", LONG, time_one=fourth) == PLAIN
    assert third.asked == fourth.asked == ["compile"], "memory may be there another time"
    assert "compile: our kernels, compiled" + " " * 22 in capsys.readouterr().out
    assert runner.find(WORK, "cpu", LONG, time_one=times()) == PLAIN
    assert "not done in 120 s" in capsys.readouterr().out


def test_without_triton_or_without_work_nothing_is_timed(workdir, monkeypatch, capsys):
    assert runner.find(WORK, "cpu", 0, time_one=times()) == GRAPHS
    monkeypatch.setattr(ops, "triton", None)
    assert runner.find(WORK, "cpu", LONG, time_one=times()) == GRAPHS
    assert capsys.readouterr().out == ""


def test_a_candidates_process_imports_this_package(workdir, monkeypatch):
    """Also where fastgpt is not installed and the command was run from elsewhere."""
    seen = {}
    done = SimpleNamespace(stdout='{"gpu": 1.0, "wall": 1.0}', stderr="", returncode=0)
    monkeypatch.setattr(runner.subprocess, "run", lambda words, **how: seen.update(how) or done)
    assert runner.in_a_process(WORK, "graphs", "cuda", 1) == {"gpu": 1.0, "wall": 1.0}
    assert seen["env"]["PYTHONPATH"].split(os.pathsep)[0] == str(Path(runner.__file__).parents[1])


def test_a_device_without_a_number_is_not_set(monkeypatch):
    """torch.cuda.set_device refuses "cuda"."""

    def set_device(device):
        if torch.device(device).index is None:
            raise ValueError("Expected a torch.device with a specified index")
        raise StopIteration

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    with pytest.raises(StopIteration):
        runner.measure(WORK, GRAPHS, "cuda:1")
    monkeypatch.setattr(runner, "GPT", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner.measure(WORK, GRAPHS, "cuda")


def test_a_candidate_that_fails_or_dies_has_a_reason(workdir, monkeypatch):
    """Here there is no CUDA; and a process that is killed."""
    found = runner.in_a_process(WORK, "graphs", "cpu", 100)
    assert "CUDA" in found["failed"] or "NVIDIA" in found["failed"]
    python = workdir / "python"
    python.write_text(f"#!{sys.executable}\nimport os\nprint('half')\nos.kill(os.getpid(), 9)\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert runner.in_a_process(WORK, "graphs", "cpu", 100) == {"failed": "exit status -9: no reason given"}


def test_no_memory_for_any_is_said_as_such(workdir, capsys):
    full = times(graphs="CUDA out of memory", plain="CUDA out of memory", compile="CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        runner.find(WORK, "cpu", LONG, time_one=full)


# ---- the flags ----


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, None),
        (dict(compile=False), EAGER),
        (dict(compile=True), COMPILE),
        (dict(cuda_graphs=True), Runner(True, True)),
        (dict(cuda_graphs=True, compile=False), GRAPHS),
        (dict(cuda_graphs=False), COMPILE),
        (dict(runner="graphs"), GRAPHS),
        (dict(runner="compile"), COMPILE),
        (dict(runner="eager"), EAGER),
        (dict(runner="auto", compile=False), EAGER),
        (dict(device="cpu"), COMPILE),
        (dict(device="cpu", runner="eager"), EAGER),
    ],
)
def test_flags_decide_where_they_are_given(flags, expected):
    """nanoGPT's mean what they mean there; without any of them it is measured, on CUDA alone."""
    assert runner.asked(TrainConfig(**{"device": "cuda", **flags}), flags.keys()) == expected


def test_flags_that_contradict_are_refused(dataset, fastgpt):
    flags = [word for word in TINY if "compile" not in word]
    status, _, err = fastgpt("train", "--dataset=letters", *flags, "--runner=eager", "--compile=True")
    assert (status, err) == (2, "fastgpt: error: --runner=eager: --compile is given too; leave one of them out\n")
    status, _, err = fastgpt("train", "--dataset=letters", *flags, "--runner=fast")
    assert status == 2
    assert "--runner" in err
    assert "eager" in err


# ---- the trainer ----


@pytest.fixture
def made_up(workdir, monkeypatch):
    """A machine whose GPU is made up: auto has nothing to go by but `times`, and graphs are recordings."""

    def capture(run, pool):
        recording = Recording()
        return recording.replay, recording.record(run), None

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "waits", lambda: nullcontext([]))
    real = runner.asked
    monkeypatch.setattr(runner, "asked", lambda cfg, given: real(cfg.model_copy(update={"device": "cuda"}), given))
    monkeypatch.setattr(runner, "estimate", lambda work, device: 1e6)

    def clock(**wall):
        time_one = times(**wall)
        monkeypatch.setattr(runner, "in_a_process", time_one)
        return time_one

    return clock


AUTO = [word for word in TINY if "compile" not in word]


def test_every_runner_trains_as_eager_does(made_up, dataset, fastgpt):
    """The same losses: to the last bit in graphs, up to rounding under the compiler. The answer is asked for once."""
    clock = made_up()
    assert fastgpt("train", "--dataset=letters", *AUTO, "--runner=eager", "--out_dir=eager")[0] == 0
    assert clock.asked == []
    for name, wall in (("graphs", (1.0, 2.0, 2.0)), ("plain", (2.0, 1.0, 2.0)), ("compile", (2.0, 2.0, 1.0))):
        made_up(**dict(zip(("graphs", "plain", "compile"), wall, strict=True)))
        (dataset.parents[1] / "cache" / "runners").mkdir(parents=True, exist_ok=True)
        for file in (dataset.parents[1] / "cache" / "runners").iterdir():
            file.unlink()
        status, out, err = fastgpt("train", "--dataset=letters", *AUTO, f"--out_dir={name}")
        assert status == 0, err
        assert f"runner: {runner.NAMES[name].text}" in out
        assert ("one replay" in out) == (name == "graphs")
        assert ("compiling the model" in out) == (name != "graphs")
        if name == "graphs":
            assert losses(name) == losses("eager")
        else:
            assert losses(name) == pytest.approx(losses("eager"), rel=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        ["--dropout=0.2", "--gradient_accumulation_steps=1"], ["--doc_mask=True", "--micro_batch=8"],
        ["--recompute=block", "--gradient_accumulation_steps=3"], ["--recompute=gelu", "--eval_seed=3", "--bias=True", "--grad_clip=0"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_whatever_a_run_does_graphs_give_eagers_bits(made_up, dataset, fastgpt, flags, monkeypatch):
    """Evaluated, saved and resumed half-way too."""
    monkeypatch.setattr("fastgpt.tokenizer.separator", lambda meta: 3)
    for name in ("eager", "graphs"):
        made_up(graphs=1.0, plain=2.0, compile=2.0)
        own = [f"--out_dir={name}", *(["--runner=eager"] if name == "eager" else [])]
        for half in (["--max_iters=4"], ["--max_iters=8", "--init_from=resume"]):
            status, out, err = fastgpt("train", "--dataset=letters", *AUTO, *flags, *own, *half)
            assert status == 0, err
            assert ("one replay" in out) == (name == "graphs")
    assert losses("graphs") == losses("eager")
    saved = [torch.load(f"{name}/ckpt.pt", weights_only=True) for name in ("eager", "graphs")]
    assert saved[0]["best_val_loss"] == saved[1]["best_val_loss"]
    for name, weight in saved[0]["model"].items():
        assert torch.equal(saved[1]["model"][name], weight), name


def test_plain_pytorch_keeps_the_update_that_was_chosen(monkeypatch):
    chosen = replace(ops.all_triton(), rows=(("adamw", "a row"),))
    asked, shapes = [], []
    monkeypatch.setattr(runner, "choose", lambda *args: (shapes.append(args[1]), asked.append(args[-2:])) and chosen)
    assert WORK.kernels_of(PLAIN, "cpu") == ops.Kernels(adamw="triton", rows=chosen.rows)
    assert WORK.kernels_of(GRAPHS, "cpu") == chosen
    assert WORK.kernels_of(COMPILE, "cpu") == chosen
    assert asked == [(False, False), (False, True), (True, False)], "measured under the runner that will run"
    replace(WORK, activation="gelu_tanh").kernels_of(PLAIN, "cpu")
    assert [shape.tanh for shape in shapes] == [False, False, False, True]


def test_a_default_that_does_not_fit_begins_again_smaller(made_up, dataset, fastgpt, monkeypatch):
    """Found by the candidates: the micro-steps shrink before training begins."""
    monkeypatch.setattr("fastgpt.trainer.merge", lambda spec, *args: 2 if spec == "auto" else 1)
    small = []

    def time_one(work, name, device, seconds):
        small.append(work.sequences)
        if work.sequences > 4:
            return {"failed": "CUDA out of memory. Tried", "memory": True}
        return {"gpu": 1.0, "wall": 1.0}

    monkeypatch.setattr(runner, "in_a_process", time_one)
    status, out, err = fastgpt("train", "--dataset=letters", *AUTO)
    assert status == 0, err
    assert "micro-steps of 8 sequences do not fit" in out
    assert small == [8, 8, 8, 4, 4, 4]


@pytest.fixture
def executed(monkeypatch):
    """What the process is replaced by."""
    calls = []

    def execve(path, words, environment):
        assert Path(runner.__file__).parents[1] == Path(environment["PYTHONPATH"].split(os.pathsep)[0])
        calls.append(words)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", execve)
    return calls


def begun_again(fastgpt, executed, *flags):
    with pytest.raises(SystemExit):
        fastgpt("train", "--dataset=letters", *AUTO, *flags)
    (words,) = executed
    assert words[:4] == [sys.executable, "-m", "fastgpt.cli", "train"]
    return words[-2:]


@pytest.mark.parametrize("saved", [False, True])
def test_a_capture_that_cuda_ended_begins_again_without_graphs(
    made_up, dataset, fastgpt, executed, monkeypatch, saved, capsys
):
    """Where the user asked for no graphs; from the run's own checkpoint, if it has saved one."""
    made_up(graphs=1.0, plain=2.0, compile=2.0)

    def ended(run, pool):
        raise graphs.CaptureEnded("--runner=graphs: a micro-step cannot be captured (a reason); give --runner=eager")

    monkeypatch.setattr(graphs, "capture", ended)
    words = begun_again(fastgpt, executed, f"--eval_interval={1 if saved else 8}")
    assert words == (["--runner=eager", "--init_from=resume"] if saved else ["--eval_interval=8", "--runner=eager"])
    err = capsys.readouterr().err
    assert re.fullmatch(
        r"fastgpt: --runner=graphs: a micro-step cannot be captured \(a reason\); the run begins again with --runner=eager.*\n",
        err,
    )
    status, _, err = fastgpt("train", "--dataset=letters", *AUTO, "--runner=graphs", "--overwrite")
    assert status == 2, "who asks for graphs is told"
    assert err == "fastgpt: error: --runner=graphs: a micro-step cannot be captured (a reason); give --runner=eager\n"


def test_memory_that_a_default_took_is_given_back(made_up, dataset, fastgpt, executed, monkeypatch):
    made_up(graphs=1.0, plain=2.0, compile=2.0)
    monkeypatch.setattr("fastgpt.trainer.merge", lambda spec, *args: 2 if spec == "auto" else 1)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.07 GiB.\nmore")

    monkeypatch.setattr("fastgpt.trainer.train_step", full)
    assert begun_again(fastgpt, executed)[-1] == "--micro_batch=4"
    executed.clear()
    assert begun_again(fastgpt, executed, "--micro_batch=4")[-1] == "--runner=eager", "graphs keep their memory"


def test_processes_agree_on_one_answer(monkeypatch):
    """Also on an error: else the others would wait for ever."""
    sent = []
    monkeypatch.setattr(distributed.dist, "broadcast_object_list", sent.append)
    main = distributed.World(0, 2, "cpu")
    assert distributed.agree(lambda: GRAPHS, main) == GRAPHS
    assert sent == [[GRAPHS, None]]

    def fails():
        raise UserError("no")

    with pytest.raises(UserError):
        distributed.agree(fails, main)

    def receive(answer):
        answer[:] = [PLAIN, None]

    monkeypatch.setattr(distributed.dist, "broadcast_object_list", receive)
    assert distributed.agree(fails, distributed.World(1, 2, "cpu")) == PLAIN


def test_nccl_is_told_its_gpu(monkeypatch):
    """Else it guesses at the first barrier, and says so on every rank."""
    asked = []
    for name, value in dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "check_device", lambda device: None)
    monkeypatch.setattr(distributed, "join", lambda rank, size, seconds: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed.dist, "is_backend_available", lambda backend: True)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *args, **kwargs: asked.append((args, kwargs)))
    assert distributed.init("cuda", "nccl") == distributed.World(1, 2, "cuda:1")
    assert [(args, kwargs["device_id"]) for args, kwargs in asked] == [(("nccl",), torch.device("cuda:1"))]


# ---- what a candidate's process does ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU times for itself: test_candidates_are_timed_on_a_gpu")
@pytest.mark.parametrize("name", ["graphs", "eager"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        dict(doc_mask=True),
        dict(accumulates=False, kernels="triton", sequences=1, config=GPTConfig(4, 31, 1, 1, 16)),
    ],
)
def test_a_candidate_runs_the_run_s_micro_steps(workdir, monkeypatch, name, how, capsys):
    """On a clock that is made up: each sample of the GPU takes 6 ms, and each window of the host's clock."""
    monkeypatch.setattr(graphs, "capture", lambda run, pool: _recorded(run))
    monkeypatch.setattr(graphs, "waits", lambda: nullcontext([]))
    monkeypatch.setattr(timing, "host_ms", lambda calls, least: [call() for call in calls] and 1.0)
    monkeypatch.setattr(timing, "gpu_ms", lambda calls, host: calls[0]() or 6.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(runner, "WINDOWS", 1)
    monkeypatch.setattr(runner, "ITERATIONS", 1)
    work = replace(WORK, **how)
    runner.main([json.dumps(asdict(work)), name, "cpu"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["gpu"] == 6.0 / (2 if work.accumulates else 1)
    assert found["wall"] > 0


def _recorded(run):
    recording = Recording()
    return recording.replay, recording.record(run), None


def test_the_tokens_are_a_text_s():
    torch.manual_seed(0)
    work = replace(WORK, config=GPTConfig(256, 1000, 1, 1, 8), sequences=64)
    x, y = runner.tokens(work, "cpu")
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert int(x.min()) >= 0
    assert int(x.max()) < 999
    assert 0.05 < (x == 0).float().mean() < 0.2, "the commonest word"
    x, _ = runner.tokens(replace(work, doc_mask=True), "cpu")
    assert 0.5 < (x == 999).sum() * runner.DOCUMENT / x.numel() < 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there are no CUDA graphs without a GPU")
@pytest.mark.parametrize("name", list(runner.NAMES))
def test_candidates_are_timed_on_a_gpu(workdir, name):
    work = replace(WORK, dtype="bfloat16")
    found = runner.in_a_process(work, name, "cuda", 120)
    assert 0 < found["gpu"] < 100, found
    assert 0 < found["wall"] < 100


# ---- tune ----


def test_tune_fills_the_answer_beforehand(workdir, monkeypatch, capsys):
    monkeypatch.setattr(tune, "needs_gpu", lambda device: None)
    monkeypatch.setattr(runner, "in_a_process", times(graphs=2.0, plain=1.0, compile=2.0))
    flags = [
        "--preset=tiny",
        "--batch_size=4",
        "--block_size=16",
        "--vocab_size=65",
        "--dtype=float32",
        "--device=cpu",
        "--only=runner",
    ]
    cfg, _ = parse(TuneConfig, flags, "fastgpt tune")
    tune.tune(cfg, lambda functions: {})
    assert "plain: plain PyTorch, compiled (as nanoGPT trains)" in capsys.readouterr().out
    work = Work(GPTConfig(16, 65, 2, 2, 64, bias=False), 4, True, "auto", "float32")
    assert runner.find(work, "cpu", 1, time_one=times()) == PLAIN
