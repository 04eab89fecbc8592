"""A run that is stopped, broken or begun twice: what it saves, says and answers, and how it goes on."""

import errno
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LOOPBACK, SECONDS, TINY, command, in_two_processes

from fastgpt import data, health, reporter, signals, step, trainer
from fastgpt.cli import entry, main

TRAIN = ["train", "--dataset=letters", *TINY]


def saved(out_dir="out"):
    return torch.load(Path(out_dir) / "ckpt.pt", weights_only=True)


def weights_equal(a, b):
    return all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())


def records(out_dir="out"):
    return [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(out_dir):
    return [r["loss"] for r in records(out_dir) if "loss" in r]


# ---- signals ----


def heed_signals():
    """What runs in the background may ignore SIGINT, and SIGHUP; and its children then too."""
    for number in signals.SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def as_command(folder, words):
    """Run a command line as the console script does, in a process that is its own. It writes to log."""
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    torch.set_num_threads(1)
    sys.argv = ["fastgpt", *words]
    heed_signals()
    entry()


@pytest.fixture
def begin(dataset):
    """Begin a command line in a process of its own, which ends with the test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastgpt.trainer", "fastgpt.kernels", "pytest"])
    begun = []

    def run(*words):
        begun.append(context.Process(target=as_command, args=(os.getcwd(), words)))
        begun[-1].start()
        return begun[-1]

    yield run
    for process in begun:
        process.kill()


def wait_for(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def trained(iterations, out_dir="out"):
    path = Path(out_dir) / "metrics.jsonl"
    return lambda: path.exists() and path.read_text().count('"loss"') >= iterations


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(begin, train, name):
    number = getattr(signal, name)
    process = begin(*TRAIN, "--dropout=0.1", "--max_iters=1000000", "--eval_interval=1000000")
    wait_for(trained(3))
    os.kill(process.pid, number)
    process.join(SECONDS)
    assert process.exitcode == 128 + number
    said, done = Path("log").read_text(), saved()["iter_num"]
    assert f"fastgpt: {name}: stopped after {done} iterations; out/ckpt.pt is saved; --init_from=auto goes on" in said
    assert "Traceback" not in said
    end = f"--max_iters={done + 3}"
    train("--dropout=0.1", end, "--eval_interval=1000000", "--init_from=auto")
    train("--dropout=0.1", end, "--eval_interval=1000000", "--out_dir=whole")
    assert weights_equal(saved(), saved("whole"))
    assert losses("out") == losses("whole")


def test_a_second_signal_ends_the_process_at_once(begin):
    process = begin(*TRAIN, "--max_iters=1000000", "--eval_interval=1000000")
    wait_for(trained(3))
    os.kill(process.pid, signal.SIGSTOP)  # so that it meets both at once
    for number in (signal.SIGTERM, signal.SIGHUP):
        os.kill(process.pid, number)
    os.kill(process.pid, signal.SIGCONT)
    process.join(SECONDS)
    assert process.exitcode in (128 + signal.SIGTERM, 128 + signal.SIGHUP)
    assert not Path("out/ckpt.pt").exists()  # which one signal would have saved


def test_a_signal_ends_an_evaluation_early(train, fastgpt, monkeypatch):
    """What it has drawn is drawn again by the run that goes on: it evaluates anew."""
    evaluations = itertools.count()

    def evaluate(model, batches, autocast):
        if next(evaluations) == 2:  # the first split at iteration 4
            next(iter(batches))
            monkeypatch.setattr(signals._State, "received", signal.SIGTERM)
        return step.evaluate(model, batches, autocast)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    status, _, err = fastgpt(*TRAIN)
    assert status == 143
    assert "SIGTERM: stopped after 4 iterations; out/ckpt.pt is saved" in err
    monkeypatch.setattr(trainer, "evaluate", step.evaluate)
    monkeypatch.setattr(signals._State, "received", 0)
    train("--init_from=auto")
    train("--out_dir=whole")
    assert weights_equal(saved(), saved("whole"))
    assert [r.get("val_loss") for r in records()] == [r.get("val_loss") for r in records("whole")]


@pytest.mark.parametrize("after", [0.0, 0.4, 1.2])
def test_from_the_first_instruction_on_a_signal_is_one_line(dataset, after):
    script = "import fastgpt.cli as c; c.signals.listen(); print('up', flush=True); c.entry()"
    words = [sys.executable, "-c", script, *TRAIN, "--eval_iters=1000000"]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_signals
    )
    assert process.stdout.readline() == "up\n"
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, err
    assert err.strip() == "fastgpt: SIGINT: stopped" or "nothing new is saved" in err
    assert "Traceback" not in err


def test_the_command_line_handles_signals_before_it_imports_pytorch():
    script = "import sys, fastgpt.cli; print('torch' in sys.modules, 'numpy' in sys.modules, 'pydantic' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).split() == ["False"] * 3


def test_an_ignored_signal_stays_ignored(monkeypatch):
    """As nohup does it."""
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signals.listen()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signals._handle
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped_on_rank_1(*words):
    """A command line in which rank 1 alone gets a signal after its third iteration: both must stop after the same one."""
    train_step, steps = step.train_step, itertools.count(1)

    def counted(*args):
        done = train_step(*args)
        if next(steps) == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    trainer.train_step = counted
    signals.listen()
    assert main(list(words)) == 143


def test_processes_agree_on_a_signal(dataset):
    in_two_processes(stopped_on_rank_1, *TRAIN)
    assert saved()["iter_num"] == 3
    in_two_processes(command, *TRAIN, "--init_from=auto")
    in_two_processes(command, *TRAIN, "--out_dir=whole")
    assert weights_equal(saved(), saved("whole"))


def test_a_checkpoint_is_saved_by_time(train, monkeypatch):
    now = itertools.count(0, 60)
    monkeypatch.setattr(
        trainer, "time", SimpleNamespace(perf_counter=time.perf_counter, monotonic=lambda: float(next(now)))
    )
    out = train("--save_minutes=2.5", "--eval_interval=100", "--max_iters=10")
    assert (
        out.count("saving checkpoint") == 1 + 3
    )  # the clock moves a minute when asked: after a save, and at each iteration


# ---- updates that are not finite ----


def test_a_run_that_diverges_stops_and_keeps_what_was_good(train, fastgpt):
    train()
    status, out, err = fastgpt(
        *TRAIN, "--init_from=resume", "--learning_rate=1e30", "--decay_lr=False", "--max_iters=100", "--max_bad_steps=3"
    )
    assert status == 3
    assert saved()["iter_num"] == 8
    assert all(v.isfinite().all() for v in saved()["model"].values())
    found = re.fullmatch(
        r"fastgpt: error: iteration (\d+): loss or gradients are not finite in 3 updates in a row, which were left out\. "
        r"The first that is not finite: the gradient of transformer\.wte\.weight\. This batch begins at tokens (.+) of the "
        r"training data\. out/ckpt\.pt stays; try a lower --learning_rate\n",
        err,
    )
    assert found, err
    bad = [r for r in records() if "left_out" in r]
    assert [r["left_out"] for r in bad] == [1, 2, 3]
    assert bad[-1]["iter"] == int(found[1])
    assert found[2] == ", ".join(map(str, bad[-1]["offsets"]))
    assert out.count("not finite, so this update was left out") == 3


def test_the_last_evaluation_of_a_broken_run_is_never_saved(train, fastgpt):
    status, out, err = fastgpt(*TRAIN, "--learning_rate=1e30", "--grad_clip=0.0", "--sample_tokens=5")
    assert status == 3
    assert "no new checkpoint: this evaluation is not finite; no checkpoint was saved" in out
    assert "val loss nan" in out
    assert "a sample" not in out
    assert Path("out/loss.png").exists()
    assert not Path("out/ckpt.pt").exists()
    assert "the last evaluation is not finite; no checkpoint was saved" in err


def test_one_gradient_that_is_not_finite_costs_one_update(train, fastgpt, monkeypatch):
    """The run goes on as if that iteration had not been; a culprit is named where it was a gradient."""
    calls, broken = itertools.count(), {6}  # the first micro-step of iteration 3

    def micro_step(model, *args):
        loss = real(model, *args)
        if next(calls) in broken:
            model.lm_head.weight.grad[0, 0] = math.inf
        return loss

    real = step.micro_step
    monkeypatch.setattr(step, "micro_step", micro_step)
    monkeypatch.setattr(trainer, "micro_step", micro_step)
    out = train("--log_interval=100")
    assert "iter 3: loss " in out, out
    assert "gradient norm inf: not finite, so this update was left out" in out
    assert [(r["iter"], r["left_out"]) for r in records() if "left_out" in r] == [(3, 1)]
    assert all(v.isfinite().all() for v in saved()["model"].values())
    assert all(s["step"] == 7 for s in saved()["optimizer"]["state"].values())
    calls, broken = itertools.count(), range(10**6)
    status, _, err = fastgpt(*TRAIN, "--out_dir=bad", "--max_bad_steps=2")
    assert status == 3
    assert "is not finite: the gradient of transformer.wte.weight" in err


def test_a_loss_scale_that_is_too_large_is_no_fault():
    """In float16 the scaler finds its scale by overflows: the loss is finite, and the scale has been halved."""
    scale = SimpleNamespace(is_enabled=lambda: True)
    watch = health.Watch(scale)
    for value, found in ((2.0**15, []), (0.5, [1, 2])):
        scale.get_scale = lambda value=value: value
        for it in range(2):
            watch.add(it, torch.zeros(2), torch.tensor(3.0), torch.tensor(math.inf))
        assert len(watch) == 2
        assert [bad.in_a_row for bad in watch.look()] == found
        assert watch.last == (3.0, math.inf)
    watch.add(2, torch.zeros(2), torch.tensor(3.0), torch.tensor(1.0))
    watch.add(3, torch.zeros(2), torch.tensor(math.nan), torch.tensor(1.0))
    assert [(bad.it, bad.in_a_row) for bad in watch.look()] == [(3, 1)]


def test_sample_says_that_a_checkpoint_is_broken(train, fastgpt):
    train()
    ckpt = saved()
    ckpt["model"]["transformer.h.1.ln_1.weight"][3] = math.nan
    torch.save(ckpt, "out/ckpt.pt")
    status, _, err = fastgpt("sample", "--device=cpu", "--num_samples=1", "--start=a")
    assert status == 2
    assert "out: transformer.h.1.ln_1.weight is not finite: its training diverged" in err


def test_loss_spikes_are_marked():
    spikes = health.Spikes()
    heights = [spikes.height(3 + 0.01 * (-1) ** i) for i in range(50)]
    assert heights == [None] * 50
    assert spikes.height(3.5) == pytest.approx(50, rel=0.01)
    assert spikes.height(3.02) is None
    assert health.Spikes().height(1e9) is None
    flat = health.Spikes()
    assert [flat.height(2.0) for _ in range(20)] == [None] * 20
    assert flat.height(2.1) == math.inf


# ---- resuming ----


def test_a_closed_terminal_keeps_no_run_from_saving(monkeypatch):
    """SIGHUP, after which nothing can be printed any more."""

    def closed(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(reporter.tqdm, "write", closed)
    with pytest.raises(OSError, match="Input/output"):
        reporter.tell("a line")
    monkeypatch.setattr(signals._State, "received", signal.SIGHUP)
    with open(os.dup(1), "wb") as kept:
        reporter.tell("a line")
        os.dup2(kept.fileno(), 1)


def test_offsets_beyond_the_data_are_drawn_anew():
    left = torch.tensor([3, 50, 99, -1])
    drawn = data.Draws(torch.Generator().manual_seed(0), left)(4, 60)
    assert drawn[:2].tolist() == [3, 50]
    assert drawn.max() < 60


def test_auto_resumes_what_there_is(train):
    out = train("--init_from=auto", "--max_iters=4")
    assert "Initializing a new model from scratch" in out
    out = train("--init_from=auto")
    assert "Resuming training from out" in out
    assert "changed since the checkpoint: max_iters 4 -> 8\n" in out
    train("--out_dir=whole")
    assert weights_equal(saved(), saved("whole"))


def test_a_folder_that_holds_a_run_is_not_begun_anew_unasked(train, fastgpt, monkeypatch):
    train()
    before = Path("out/ckpt.pt").read_bytes()
    status, _, err = fastgpt(*TRAIN)
    assert status == 2
    assert err == (
        "fastgpt: error: --out_dir=out: it holds a run; go on with it by --init_from=auto, begin anew by --overwrite, "
        "or give another --out_dir\n"
    )
    train("--eval_only=True")
    assert Path("out/ckpt.pt").read_bytes() == before
    train("--eval_only=True", "--init_from=resume")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # a worker that torchrun began again
    assert "Resuming training" in train("--overwrite", "--max_iters=9")
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    status, _, _ = fastgpt(
        *TRAIN, "--overwrite", "--seed=5", "--learning_rate=1e30", "--decay_lr=False", "--max_bad_steps=1"
    )
    assert status == 3  # before its first checkpoint
    assert saved()["iter_num"] == 9
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "Initializing a new model" in train("--overwrite", "--seed=5", "--max_iters=4")
    assert saved()["iter_num"] == 4
    assert "Resuming training" in train("--overwrite", "--seed=5")


def test_a_signal_in_an_evaluation_alone_saves_nothing(train, fastgpt, monkeypatch):
    """It holds no lock, so another run may be writing there."""
    train()
    before = sorted(os.listdir("out")), Path("out/ckpt.pt").stat().st_mtime_ns
    monkeypatch.setattr(signals._State, "received", signal.SIGTERM)
    status, _, err = fastgpt(*TRAIN, "--init_from=resume", "--eval_only=True")
    assert status == 143
    assert "nothing new is saved" in err
    assert (sorted(os.listdir("out")), Path("out/ckpt.pt").stat().st_mtime_ns) == before


def states(seeds, left=0, bound=1000):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [{"offsets": torch.randint(bound, (left,), generator=g), "rng": g.get_state()} for g in generators]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("batch", [1, 2])
def test_on_other_processes_every_batch_comes_once(size, batch):
    """Three processes began the run, each with a batch of 2 drawn ahead; an iteration has 24 sequences."""

    def iteration(draws, size, batch):
        """The offsets of an iteration, in batches, of `size` processes one after the other."""
        return torch.cat([d(batch, 1000) for d in draws for _ in range(24 // size // batch)]).tolist()

    def shared(states):
        return [data.SharedDraws(states, 24, rank, size) for rank in range(size)]

    begun = states([1, 2, 3], left=2)
    alone = [data.Draws(torch.Generator().set_state(s["rng"]), s["offsets"]) for s in begun]
    ranks = shared(begun)
    for i in range(3):
        if i == 2:  # a checkpoint is made where the next iteration's first batch is drawn
            for draws in ranks:
                draws(batch, 1000)
            ranks = shared(ranks[0].states())
        assert iteration(ranks, size, batch) == iteration(alone, 3, 2)


def test_a_run_goes_on_with_other_batches_and_processes(train, dataset):
    """With another number of sequences at a time, or of processes, the losses are those of the run that was not stopped."""
    flags = ["--eval_seed=1", "--gradient_accumulation_steps=4"]
    in_two_processes(command, *TRAIN, *flags, "--out_dir=whole")
    in_two_processes(command, *TRAIN, *flags, "--max_iters=4")
    halves = ["--batch_size=2", "--gradient_accumulation_steps=8"]
    out = train(*flags, *halves, "--init_from=auto", "--max_iters=6")
    assert "begun by 2 processes, resumed by 1: the batches go on where they were" in out
    train(*flags, "--init_from=auto", "--max_iters=7")
    in_two_processes(command, *TRAIN, *flags, "--init_from=auto")
    assert losses("out") == pytest.approx(losses("whole"), rel=5e-7)


@pytest.mark.slow
def test_torchrun_begins_again_by_itself(dataset):
    """A worker that is killed: torchrun starts all anew, and --init_from=auto goes on from the checkpoint."""
    script = dataset.parent.parent / "worker.py"
    script.write_text(
        "import os, signal\n"
        "from fastgpt import step, trainer\n"
        "from fastgpt.cli import entry\n"
        "real, steps = step.train_step, [0]\n"
        "def counted(*args):\n"
        "    steps[0] += 1\n"
        "    if steps[0] == 6 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*args)\n"
        "trainer.train_step = counted\n"
        "entry('train')\n"
    )
    words = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        "--nproc_per_node=2",
        "--max_restarts=1",
    ]
    env = {**os.environ, **LOOPBACK, "OMP_NUM_THREADS": "1"}
    words += [str(script), *TRAIN[1:], "--init_from=auto"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert "Resuming training from out" in done.stdout
    in_two_processes(command, *TRAIN, "--out_dir=whole")
    assert weights_equal(saved(), saved("whole"))
