"""What a run keeps of itself and says of itself: train.log, config.json, trackers, plots, samples, and when it ends early."""

import itertools
import json
import os
import random
import re
import shlex
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import patch

import pytest
import torch
from conftest import TINY, in_two_processes

from fastgpt import export, metrics, plot, reporter, tracker, trainer
from fastgpt.cli import main
from fastgpt.config import PlotConfig, TrainConfig

TRAIN = ["train", "--dataset=letters", *TINY]


def records(out_dir="out"):
    return metrics.read_metrics(Path(out_dir) / "metrics.jsonl")


def config(out_dir="out"):
    return json.loads((Path(out_dir) / "config.json").read_text())


def weights(out_dir="out"):
    return torch.load(Path(out_dir) / "ckpt.pt", weights_only=True)["model"]


def same(a, b):
    return all(torch.equal(v, b[k]) for k, v in a.items())


# ---- train.log ----


def test_the_log_has_each_line_that_is_printed_and_a_mark_at_each_start(train, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fastgpt", "train", "--dataset=let ters"])
    out = train("--sample_tokens=5")
    mark, *lines = Path("out/train.log").read_text().splitlines()
    assert re.fullmatch(
        r"---- \d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}, from iteration 0: fastgpt train '--dataset=let ters'", mark
    )
    assert lines == out.splitlines()
    first = Path("out/train.log").read_text()
    out = train("--init_from=resume", "--max_iters=10")
    added = Path("out/train.log").read_text().removeprefix(first).splitlines()
    assert ", from iteration 8: fastgpt train" in added[0]
    assert added[1:] == out.splitlines()


def test_the_log_says_why_a_run_ended(train, fastgpt):
    status, _, err = fastgpt(*TRAIN, "--learning_rate=1e30", "--grad_clip=0.0")
    assert status == 3
    assert Path("out/train.log").read_text().splitlines()[-1] == err.strip().removeprefix("fastgpt: ")


def test_the_reason_has_a_line_of_its_own(train, monkeypatch):
    """A pipe that breaks within a line, as of `| head`."""
    monkeypatch.setattr(reporter.Reporter, "first", lambda self, seconds: (print("half", end=""), [][0]))
    with pytest.raises(IndexError):
        train()
    assert Path("out/train.log").read_text().endswith("\nhalf\nIndexError: list index out of range\n")


def test_a_log_that_cannot_be_written_ends_no_run(train):
    Path("out").mkdir()
    Path("out/train.log").symlink_to("/dev/full")
    out = train()
    said = "out/train.log: cannot be written (No space left on device); the run goes on, and tries again at each line"
    assert out.count(said) == out.count("out/train.log: cannot") == 1
    assert re.search(r"^out/train\.log: the last \d+ lines could not be written$", out, re.M)
    assert len(records()) == 8 + 3


def test_what_is_printed_in_pieces_is_logged_in_lines(tmp_path):
    said = []
    log = reporter.Log(tmp_path, SimpleNamespace(write=said.append, encoding="ascii"))
    log.write("one")
    log.write(" line\nand \ud800")
    assert not log.file.path.exists()
    log.begin("mark")
    assert log.file.path.read_bytes() == b"mark\none line\n"
    log.close()
    assert log.file.path.read_bytes() == b"mark\none line\nand ?\n"
    assert said == ["one", " line\nand \ud800"]
    assert log.encoding == "ascii"


def test_a_thread_that_tells_and_one_that_prints_do_not_wait_for_each_other(tmp_path, capsys):
    """On a full disk: the one has tqdm's lock and wants the log, the other has the log and wants to tell that it fails."""
    (tmp_path / "train.log").symlink_to("/dev/full")
    log = reporter.Log(tmp_path, SimpleNamespace(write=lambda text: None))
    log.begun = True
    printing = threading.Thread(target=log.write, args=("printed\n",), daemon=True)

    def tells():
        with reporter.tqdm.get_lock():  # as in tqdm.write
            printing.start()
            printing.join(0.2)
            log.write("told\n")

    telling = threading.Thread(target=tells, daemon=True)
    telling.start()
    telling.join(20)
    printing.join(20)
    assert not telling.is_alive()
    assert not printing.is_alive()
    assert [*log.file.pending] == [b"told\n", b"printed\n"]


def test_a_terminal_without_a_size_gets_lines():
    """As in some containers: a bar has no room there."""
    import fcntl
    import pty
    import struct
    import termios

    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal, os.fdopen(master):
        assert not reporter.has_width(terminal)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        assert reporter.has_width(terminal)


# ---- config.json ----


def test_the_config_says_what_ran_and_each_start(train, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fastgpt", "train", "--seed=7"])
    train("--seed=7")
    first = config()
    assert (first["settings"]["seed"], first["settings"]["n_layer"], first["given"]["seed"]) == (7, 2, 7)
    assert "dropout" not in first["given"]
    assert first["settings"]["dropout"] == 0.0
    assert first["versions"].keys() == {"fastgpt", "python", "torch", "triton"}
    assert first["versions"]["torch"] == torch.__version__
    assert (first["command"], first["device"], first["processes"]) == ("fastgpt train --seed=7", "cpu", 1)
    assert (first["iteration"], first["earlier"]) == (0, [])
    for i, end in enumerate((9, 10), 1):
        train("--init_from=auto", f"--max_iters={end}")
        now = config()
        assert now["id"] == first["id"]
        assert (now["iteration"], now["settings"]["max_iters"], now["given"]["init_from"]) == (end - 1, end, "auto")
        assert [start["iteration"] for start in now["earlier"]] == [0, 8][:i]
        assert now["earlier"][0]["given"] == first["given"]
    before = Path("out/config.json").read_bytes()
    train("--init_from=resume", "--eval_only=True")
    assert Path("out/config.json").read_bytes() == before
    train("--overwrite")
    assert config()["id"] != first["id"]
    assert config()["earlier"] == []


def test_a_run_is_repeated_from_its_config(train, fastgpt):
    train("--seed=3", "--learning_rate=0.02")
    status, out, err = fastgpt("train", "out/config.json", "--out_dir=again")
    assert status == 0, err
    assert re.search(
        r"^Overriding config with out/config\.json: .*--dataset='letters' .*--learning_rate=0\.02 ", out, re.M
    )
    assert config("again")["given"] == {**config()["given"], "out_dir": "again"}
    assert same(weights(), weights("again"))


def test_what_is_repeated_is_the_first_start_and_overwrites_nothing(train, fastgpt):
    train("--overwrite", "--seed=3", "--max_iters=4")
    train("--init_from=resume", "--max_iters=5")
    path = Path("out/config.json")
    path.write_text(json.dumps({**config(), "earlier": [*config()["earlier"], *[{"given": {}}] * 200]}))
    train("--init_from=resume", "--max_iters=6")
    assert len(config()["earlier"]) == 1 + reporter.MOST_STARTS
    status, _, err = fastgpt("train", "out/config.json")
    assert (status, "it holds a run" in err) == (2, True)
    assert fastgpt("train", "out/config.json", "--out_dir=again")[0] == 0
    assert {k: config("again")["given"][k] for k in ("seed", "max_iters")} == {"seed": 3, "max_iters": 4}
    assert config("again")["given"].keys().isdisjoint({"overwrite", "init_from"})


def test_the_preset_without_words_is_named(monkeypatch):
    from fastgpt.parse import parse_train

    assert parse_train([])[0].preset == "quickstart"
    assert parse_train(["--dataset=letters"])[0].preset == ""


@pytest.mark.parametrize(
    "text", ['{"given": 3}', "[" * 99999, "\xff", '{"given": {"learning_rte": 1}}']
)  # fmt: skip
def test_a_damaged_config_is_a_line(train, fastgpt, text):
    train()
    Path("out/config.json").write_text(text, encoding="latin1")
    status, _, err = fastgpt("train", "out/config.json", "--out_dir=again")
    assert (status, err.count("\n")) == (2, 1)
    assert "out/config.json" in err
    out = train("--init_from=resume", "--max_iters=9")  # it says so, and goes on
    assert config()["iteration"] == 8
    assert ("out/config.json: not read" in out) == (not text.startswith('{"given"'))


def test_a_config_that_cannot_be_written_ends_no_run(train):
    Path("out/config.json").mkdir(parents=True)
    assert "out/config.json: cannot be written" in train()


# ---- a run that is refused ----


def test_a_refused_run_leaves_no_folder(fastgpt, dataset):
    assert fastgpt(*TRAIN, "--out_dir=new/er/out", "--kernels=nonsense")[0] == 2
    assert fastgpt(*TRAIN, "--out_dir=new/er/out", "--sample_every_eval")[0] == 2
    assert not Path("new").exists()
    Path("mine").mkdir()
    assert fastgpt(*TRAIN, "--out_dir=mine", "--kernels=nonsense")[0] == 2
    assert Path("mine").is_dir(), "it was there before"
    assert fastgpt(*TRAIN, "--out_dir=new/out")[0] == 0
    assert Path("new/out/ckpt.pt").exists()


# ---- tokens, seconds ----


def test_tokens_and_seconds_go_on_where_a_run_goes_on(train):
    train("--max_iters=4")
    first = records()
    assert [r["tokens"] for r in first if "loss" in r] == [128, 256, 384, 512]
    assert [r["tokens"] for r in first if "val_loss" in r] == [0, 512]
    train("--init_from=resume", "--max_iters=6", "--batch_size=8", "--gradient_accumulation_steps=4")
    later = records()[len(first) - 1 :]  # the evaluation at 4 came again
    assert [r["tokens"] for r in later if "loss" in r] == [512 + 512, 512 + 1024]
    assert first[-1]["tokens"] == later[0]["tokens"]
    seconds = [r["train_s"] for r in records()]
    assert seconds == sorted(seconds)
    assert later[0]["train_s"] == pytest.approx(first[-1]["train_s"], abs=0.01)
    steps = [r for r in records() if "loss" in r]
    assert seconds[-1] == pytest.approx(sum(r["dt_ms"] for r in steps) / 1e3, rel=0.05, abs=0.02)


def test_a_save_between_evaluations_is_no_training(train, monkeypatch):
    now = [0.0]
    clock = lambda: now[0]  # noqa: E731
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=clock))

    def train_step(*args, step=trainer.train_step):
        now[0] += 1
        return step(*args)

    def save(run, *args, save=trainer.Run.save):
        now[0] += 100
        return save(run, *args)

    monkeypatch.setattr(trainer, "train_step", train_step)
    monkeypatch.setattr(trainer.Run, "save", save)
    train("--save_minutes=1e-9")
    assert [r["train_s"] for r in records() if "loss" in r] == list(range(1, 9))


@pytest.mark.parametrize(
    "progress", [{"tokens": "x"}, {"train_s": float("nan")}, {"what": 1}, [1], {"waited": 0.5}, None]
)
def test_a_damaged_progress_is_a_line(train, fastgpt, progress):
    train()
    ckpt = torch.load("out/ckpt.pt", weights_only=True)
    ckpt["fastgpt"]["progress"] = progress
    torch.save(ckpt, "out/ckpt.pt")
    Path("out/ckpt-0000008.pt").unlink(missing_ok=True)
    status, _, err = fastgpt(*TRAIN, "--init_from=resume", "--max_iters=9")
    assert (status, err.count("\n")) == (2, 1)
    assert "its key 'fastgpt' is damaged" in err


# ---- samples ----


@pytest.mark.parametrize("flags", [["--dropout=0.1"], ["--eval_seed=3"]], ids=str)
def test_samples_at_evaluations_change_no_bit(train, flags):
    out = train(*flags, "--sample_tokens=12", "--sample_every_eval", "--out_dir=with")
    assert len(re.findall(r"^a sample:\n-+\n[a-z]{13}\n-+$", out, re.M)) == 3
    assert train(*flags, "--sample_tokens=12", "--out_dir=end").count("a sample:") == 1
    train(*flags, "--out_dir=without")
    keys = ("iter", "loss", "grad_norm", "train_loss", "val_loss")
    plain = [[r.get(k) for k in keys] for r in records("without")]
    assert [[r.get(k) for k in keys] for r in records("with")] == plain
    assert same(weights("with"), weights("without"))
    text = Path("with/train.log").read_text()
    assert text.count("a sample:") == 3


# ---- when a run ends early ----


def evaluations(monkeypatch, values):
    """The trainer's evaluations answer these val losses, in order."""
    left = iter([loss for value in values for loss in (9.0, value)])  # train, then val
    monkeypatch.setattr(trainer, "evaluate", lambda *args: next(left))


def test_patience_ends_a_run_well(train, monkeypatch):
    evaluations(monkeypatch, [3.0, 2.0, 2.5, 2.0, 1.0])
    out = train("--patience=2", "--max_iters=100", "--eval_interval=2")
    assert "no better val loss than 2.0000 in 2 evaluations: --patience=2 ends the run after 6 iterations\n" in out
    assert "\niteration 6: train loss 9.0000, val loss 2.0000 nats per token\n" in out
    assert "checkpoint: out/ckpt.pt\n" in out
    assert torch.load("out/ckpt.pt", weights_only=True)["iter_num"] == 6


def test_patience_waits_for_evaluations_in_a_row_and_over_a_resume(train, monkeypatch):
    flags = "--patience=3", "--eval_interval=2"
    evaluations(monkeypatch, [3.0, 2.0, 2.5, 2.4])
    out = train(*flags, "--max_iters=6")  # two in a row at its end
    assert "ends the run" not in out
    evaluations(monkeypatch, [2.4, 1.9, 2.0, 2.1, 2.2])  # the first comes again, and counts once
    out = train(*flags, "--init_from=resume", "--max_iters=100")
    assert "--patience=3 ends the run after 14 iterations\n" in out
    assert "iteration 14: train loss 9.0000, val loss 2.2000" in out
    assert "checkpoint: out/ckpt.pt\n" in out
    assert torch.load("out/ckpt.pt", weights_only=True)["iter_num"] == 14
    evaluations(monkeypatch, [2.2])  # begun again by a scheduler, it has still ended
    out = train(*flags, "--init_from=auto", "--max_iters=100")
    assert "--patience=3 ends the run after 14 iterations\n" in out


def test_a_target_ends_a_run_and_says_what_it_took(train, monkeypatch):
    evaluations(monkeypatch, [4.0, 3.4, 3.28, 3.0])
    out = train("--target_loss=3.28", "--max_iters=100")
    assert re.search(
        r"^val loss 3\.2800: --target_loss=3\.28 is reached after 8 iterations, 1,024 tokens and \d+\.\d s of training, "
        r"evaluations apart$", out, re.M,
    )  # fmt: skip
    assert torch.load("out/ckpt.pt", weights_only=True)["iter_num"] == 8
    assert len([r for r in records() if "loss" in r]) == 8


def stop_early(*flags):
    """In a process of two: a run whose val loss never falls."""
    with patch.object(trainer, "evaluate", lambda *args: 3.0):
        assert main([*TRAIN, *flags, "--patience=2", "--max_iters=100"]) == 0


def test_processes_agree_on_the_end(dataset):
    said = in_two_processes(stop_early)
    assert "--patience=2 ends the run after 8 iterations" in said
    assert len(records()) == 8 + 3


@pytest.mark.slow
def test_processes_of_fsdp_agree_on_the_end(dataset):
    said = in_two_processes(stop_early, "--parallel=fsdp", "--sample_tokens=5", "--sample_every_eval")
    assert "--patience=2 ends the run after 8 iterations" in said
    assert said.count("a sample: none with --parallel=fsdp") == 1


# ---- trackers ----


class Recorder:
    """A tracker that notes what it is told, and fails when it is told to."""

    made: ClassVar = []

    @staticmethod
    def find():
        return None

    def __init__(self, cfg, run_id, start):
        if isinstance(self.fails, tuple) and start in self.fails:
            raise OSError(28, "No space left on device")
        self.begun, self.told, self.closed = (run_id, start), [], None
        self.made.append(self)

    def log(self, iteration, values):
        if self.fails == "log" and iteration == 2:
            raise ConnectionError("the network\nis down")
        self.told.append((iteration, values))

    def text(self, iteration, text):
        self.told.append((iteration, text))

    def close(self, failed):
        self.closed = failed


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(Recorder, "made", [])
    monkeypatch.setattr(Recorder, "fails", None, raising=False)
    monkeypatch.setitem(tracker.TRACKERS, "tensorboard", Recorder)
    monkeypatch.setitem(tracker.TRACKERS, "wandb", Recorder)
    return Recorder


def test_a_tracker_is_told_what_the_metrics_hold(train, recorder):
    train("--tracker=tensorboard", "--peak_flops=1e12", "--sample_tokens=3", "--sample_every_eval")
    (told,) = recorder.made
    assert told.begun == (config()["id"], 0)
    expected = []
    for r in records():
        both = dict(lr=r.get("lr"), mfu=r.get("mfu") and r["mfu"] * 100)
        if "loss" in r:
            mine = {
                "train/batch_loss": r["loss"],
                "grad_norm": r["grad_norm"],
                "tokens_per_s": r["tokens_per_s"],
                **both,
            }
            expected.append((r["iter"], mine))
        else:
            expected.append((r["iter"], {"train/loss": r["train_loss"], "val/loss": r["val_loss"]}))
    scalars = [(it, values) for it, values in told.told if isinstance(values, dict)]
    assert [it for it, _ in scalars] == [it for it, _ in expected]
    for (_, values), (_, wanted) in zip(scalars, expected, strict=True):
        assert {k: values[k] for k in wanted} == wanted
        assert values.keys() - wanted.keys() <= {"lr", "mfu"}
    assert [it for it, text in told.told if isinstance(text, str)] == [0, 4, 8]
    assert told.closed is False


def test_a_run_that_goes_on_has_its_id(train, recorder):
    train("--wandb_log=True")
    train("--tracker=wandb", "--init_from=resume", "--max_iters=9")
    train("--tracker=wandb", "--init_from=resume", "--eval_only")
    train("--tracker=tensorboard", "--wandb_log=True", "--overwrite", "--max_iters=1")
    first, second, evaluated, *both = (made.begun for made in recorder.made)
    assert second == (first[0], 8)
    assert evaluated[0] != first[0], "the run may be going on in another process"
    assert len(both) == 2
    assert both[0][0] == both[1][0] != first[0]


def test_a_tracker_that_fails_ends_no_run(train, fastgpt, recorder, monkeypatch):
    monkeypatch.setattr(recorder, "fails", "log")
    out = train("--tracker=wandb")
    assert out.count("wandb: ConnectionError: the network is down; the run goes on without it\n") == 1
    assert len(records()) == 8 + 3
    monkeypatch.setattr(recorder, "fails", (0, 8))
    out = train("--tracker=wandb", "--init_from=resume", "--max_iters=9")
    assert "wandb: it does not start (OSError: [Errno 28] No space left on device); the run goes on without it\n" in out
    status, _, err = fastgpt(*TRAIN, "--tracker=wandb", "--out_dir=new")  # nothing is lost yet: the user may mend it
    assert status == 2
    assert "wandb: it does not start" in err
    assert not Path("new").exists()


def test_a_tracker_learns_that_a_run_failed(fastgpt, dataset, recorder):
    assert fastgpt(*TRAIN, "--tracker=wandb", "--learning_rate=1e30", "--grad_clip=0.0")[0] == 3
    assert recorder.made[0].closed is True


def test_a_folder_named_wandb_is_not_the_package(fastgpt, dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(__path__=["/here/wandb"]))
    status, _, err = fastgpt(*TRAIN, "--tracker=wandb")
    assert status == 2
    assert "/here/wandb is a folder, not the package" in err


def scalars(folder):
    """{name: [(step, value)]} of a folder's TensorBoard files, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder)
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.slow
def test_tensorboard_shows_one_curve_of_a_run_that_was_resumed(train):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    train("--tracker=tensorboard", "--max_iters=8", "--sample_tokens=3")
    for path in ("out/ckpt.pt", "out/ckpt-best.pt", "out/ckpt-0000008.pt"):
        Path(path).unlink(missing_ok=True)
    os.link("out/ckpt-0000004.pt", "out/ckpt.pt")  # it goes on from 4
    train("--tracker=tensorboard", "--max_iters=10", "--init_from=resume")
    shown = scalars("out/tensorboard")
    assert shown.keys() == {"train/batch_loss", "train/loss", "val/loss", "lr", "grad_norm", "tokens_per_s"}
    steps = [(r["iter"], pytest.approx(r["loss"])) for r in records() if "loss" in r]
    assert [it for it, _ in steps] == list(range(10))
    assert shown["train/batch_loss"] == steps
    assert [it for it, _ in shown["val/loss"]] == [0, 4, 8, 10]
    train("--tracker=tensorboard", "--init_from=resume", "--eval_only")  # another process may be training on
    assert [it for it, _ in scalars("out/tensorboard")["val/loss"]] == [0, 4, 8, 10, 10]
    train("--tracker=tensorboard", "--overwrite", "--max_iters=1")
    assert [it for it, _ in scalars("out/tensorboard")["val/loss"]] == [0, 1]


@pytest.mark.slow
def test_wandb_works_without_a_network(train, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = train("--wandb_log=True", "--sample_tokens=3")
    assert "goes on without it" not in out
    train("--tracker=wandb", "--init_from=resume", "--max_iters=10")
    files = sorted(Path("wandb").glob("offline-run-*/*.wandb"))
    assert [path.name for path in files] == [f"run-{config()['id']}.wandb"] * 2


# ---- plots ----


def write_run(folder, losses=50, settings=None, **more):
    """A run's files, as training writes them."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    lines = []
    for i in range(losses):
        lines.append(
            dict(
                iter=i,
                loss=5 - i / losses,
                lr=1e-3,
                grad_norm=1.0,
                tokens_per_s=1e3,
                tokens=8 * (i + 1),
                train_s=2.0 * i,
                **more,
            )
        )
        if i % 10 == 0:
            lines.append(
                dict(iter=i, train_loss=5 - i / losses, val_loss=5.1 - i / losses, tokens=8 * i, train_s=2.0 * i)
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if settings:
        (folder / "config.json").write_text(json.dumps({"settings": settings}))


def page_data(path):
    """The runs in an HTML page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.S)[1])


def test_runs_are_drawn_on_one_page(fastgpt, workdir):
    write_run("a", settings={"learning_rate": 1e-3, "n_layer": 2, "out_dir": "a"})
    write_run("b", settings={"learning_rate": 2e-3, "n_layer": 2, "out_dir": "b"})
    status, out, err = fastgpt("plot", "a", "b/metrics.jsonl", "--out=here/curves", "--x=tokens", "--title=mine")
    assert (status, err) == (0, "")
    assert out == "2 runs: here/curves.png, here/curves.html\n"
    assert Path("here/curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    page = Path("here/curves.html").read_text()
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org/2000/svg)|@import|fetch\(", page), "it needs no network"
    data = page_data(Path("here/curves.html"))
    assert (data["x"], data["title"]) == ("tokens", "mine")
    assert [run["legend"] for run in data["runs"]] == ["a: learning_rate=0.001", "b: learning_rate=0.002"]
    curves = data["runs"][0]["curves"]
    assert curves.keys() == {"loss", "smooth", "val_loss", "lr", "tokens_per_s", "grad_norm"}
    assert curves["loss"][10] == [10, 88, pytest.approx(20 / 3600, rel=1e-5), 4.8]
    assert [p[0] for p in curves["val_loss"]] == [0, 10, 20, 30, 40]


def test_what_cannot_be_plotted_is_a_line(fastgpt, workdir):
    Path("empty").mkdir()
    Path("other.jsonl").write_text('{"epoch": 1, "loss": 2}\n{"iter": 3, "accuracy": 1}\nnot JSON\n')
    write_run("a")
    Path("taken.png").mkdir()
    for words, said in (
        ([], "there is nothing to plot; write fastgpt plot RUN"),
        (["absent"], "absent: cannot be read as a run's metrics: No such file"),
        (["empty"], "empty/metrics.jsonl: cannot be read"),
        (["a", "other.jsonl"], "other.jsonl: it has no losses of a run"),
        (["/dev/zero"], "/dev/zero: cannot be read as a run's metrics: it is a device"),
        (["a"] * 29, "29 runs are too many"),
        (["a", "--out=taken"], "--out=taken: cannot be written"),
        (["a", "--x=epochs"], "--x: 'epochs'"),
    ):
        status, out, err = fastgpt("plot", *words)
        assert (status, out, err.count("\n")) == (2, "", 1), words
        assert said in err
    assert not Path("plot.png").exists()


def test_runs_of_older_and_of_other_programs_are_drawn_as_far_as_they_go(fastgpt, workdir):
    Path("old").mkdir()
    lines = [
        {"iter": 1, "loss": 3.0},
        {"iter": 0, "loss": 4.0},
        {"iter": 2, "loss": None, "lr": "x"},
        {"iter": 3, "loss": 1e300},
    ]
    text = (
        "\n".join(map(json.dumps, lines))
        + '\n{"iter": 4, "loss": NaN, "tokens": [], "val_loss": 1}\n{"iter": 1'
        + "0" * 400
        + ', "loss": 1}'
    )
    Path("old/metrics.jsonl").write_text(text)
    Path("old/config.json").write_text('{"settings": 3}')
    status, out, err = fastgpt("plot", "old")
    assert (status, err) == (0, "")
    assert "old: its records have no tokens, and it is not drawn against them\n" in out
    (run,) = page_data(Path("plot.html"))["runs"]
    assert run["curves"]["loss"] == [[0, None, None, 4.0], [1, None, None, 3.0]]
    assert run["curves"]["val_loss"] == [[4, None, None, 1]]
    assert run["legend"] == "old"


def test_names_are_drawn_as_they_are(fastgpt, workdir):
    name = "_</script><b>$\\frac{$ \x1b\u4e00"
    for folder in (f"x/{name}/r", f"y/{name}/r", "_r"):
        write_run(folder, 3, settings={"dataset": f"{folder}" + "z" * 500, "x": [["y"]]})
    status, _, err = fastgpt("plot", f"x/{name}/r", f"y/{name}/r", "_r", "--title=</script>$")
    assert (status, err) == (0, "")
    page = Path("plot.html").read_text()
    assert "</script><b>" not in page
    names = [run["name"] for run in page_data(Path("plot.html"))["runs"]]
    assert names[2] == "_r"
    assert len(set(names)) == 3, "two runs of one name are told apart by their folders"


def test_labels_stand_apart_and_move_no_further_than_they_must():
    pick = random.Random(0)
    for _ in range(100):
        places = [pick.uniform(0, 20) for _ in range(pick.randint(1, 9))]
        moved = plot.spread(places, 3.0)
        ordered = sorted(moved)
        assert all(b - a >= 3.0 - 1e-9 for a, b in itertools.pairwise(ordered))
        assert sorted(range(len(places)), key=places.__getitem__) == sorted(range(len(places)), key=moved.__getitem__)
    assert plot.spread([0.0, 10.0, 20.0], 3.0) == [0.0, 10.0, 20.0]
    assert plot.spread([5.0, 5.0], 3.0) == [3.5, 6.5]


def drawn_texts(draw):
    """The boxes of the texts beside curves in what `draw` saves, by axes."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    found = []

    def savefig(figure, *args, save=Figure.savefig, **how):
        save(figure, *args, **how)
        for axes in figure.axes:
            boxes = [Text.get_window_extent(t) for t in axes.texts]  # without its line to the curve
            found.append(
                (axes.get_window_extent(), boxes, [axes.transData.transform(line.get_xydata()) for line in axes.lines])
            )

    with patch.object(Figure, "savefig", savefig):
        draw()
    return found


def apart(found, labels):
    for inside, boxes, lines in found:
        assert len(boxes) == labels
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:i])
            assert not any(box.contains(*p) for line in lines for p in line), "no curve is written over"
            assert box.x1 <= inside.x1 + 4


def test_no_label_is_over_another(tmp_path):
    evals = [{"iter": i, "train_loss": 3 - i / 100, "val_loss": 3.004 - i / 100} for i in range(0, 101, 20)]
    apart(drawn_texts(lambda: plot.plot_losses(evals, tmp_path / "loss.png", "t")), 2)
    runs = []
    for i in range(8):
        mine = [dict(e, val_loss=e["val_loss"] + i / 1e4, tokens=9, train_s=i * 60.0 + e["iter"]) for e in evals]
        runs.append(plot.Curves(f"run-{'x' * 3 * i}", {}, mine))
    apart(drawn_texts(lambda: plot.write_picture(open(tmp_path / "p.png", "wb"), runs, PlotConfig()))[:3], 8)


def test_runs_are_told_apart_without_colours():
    styles = [(str(plot.style(i)["linestyle"]), plot.MARKERS[i % len(plot.MARKERS)]) for i in range(plot.MOST_RUNS)]
    assert len(set(styles)) == plot.MOST_RUNS
    assert len({(plot.style(i)["color"], str(plot.style(i)["linestyle"])) for i in range(plot.MOST_RUNS)}) == 28


def test_a_long_run_is_thinned_and_keeps_its_spikes():
    points = [plot.Point(i, i, i, 2.0) for i in range(100_000)]
    points[54_321] = points[54_321]._replace(value=9.0)
    kept = plot.thinned(points)
    assert len(kept) <= plot.MOST_POINTS
    assert points[54_321] in kept
    assert kept == sorted(kept)
    line = [plot.Point(i, None, None, float(i)) for i in range(100)]
    calm = plot.smoothed(line, 0.1)
    assert calm[:95] == line[:95], "a mean of as many before as after moves no straight line"
    assert calm[-1].value == 96.5, "at the end it is of those before"
    zigzag = [plot.Point(i, None, None, float(i % 2)) for i in range(1000)]
    assert all(abs(p.value - 0.5) < 0.1 for p in plot.smoothed(zigzag, 0.04)[50:-50])
    assert plot.smoothed(zigzag, 0.0) == zigzag


@pytest.mark.slow
def test_a_browser_draws_the_page(fastgpt, workdir):
    """Its script runs: all panels have curves, and a label at each end."""
    import shutil
    import subprocess

    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("there is no browser on this machine")
    for name in ("a", "b"):
        write_run(name)
    assert fastgpt("plot", "a", "b")[0] == 0
    clicks = """<script>
    state.zoom = [3.2, 3.4];  // between two records
    draw();
    if (document.querySelector("#panels text").textContent !== "no records") throw "there are records";
    document.querySelector("#panels svg").dispatchEvent(new MouseEvent("dblclick"));
    document.title = "clicked";
    </script>"""
    Path("plot.html").write_text(Path("plot.html").read_text() + clicks)
    words = f"{browser} --headless --no-sandbox --disable-gpu --virtual-time-budget=2000 --dump-dom file://{workdir}/plot.html"
    page = subprocess.run(shlex.split(words), capture_output=True, text=True, timeout=120).stdout
    panels = page[page.index('<div id="panels">') : page.index('<p id="hint">')]
    assert "<title>clicked</title>" in page
    assert panels.count("<svg") == 4
    assert panels.count('stroke-dasharray="6 3"') == 4
    assert "4.3 a</text>" in panels
    for i in range(30):
        write_run(f"run{i:02}")
    for runs in (20, 28):  # too many to be named beside their ends
        assert fastgpt("plot", *[f"run{i:02}" for i in range(runs)])[0] == 0
        page = subprocess.run(shlex.split(words), capture_output=True, text=True, timeout=120).stdout
        labels = sorted(float(y) for y in re.findall(r'<text x="[\d.]+" y="([\d.]+)">[\d.]+ run\d\d</text>', page))
        assert len(labels) == (20 if runs == 20 else 0)
        assert all(0 < y <= 420 - 42 + 4 for y in labels)
        assert all(b - a > 14 for a, b in itertools.pairwise(labels))
    assert "no records" not in panels


def test_the_commands_of_a_run_in_a_folder_with_a_space_can_be_pasted(capsys):
    cfg = TrainConfig(out_dir="my run", device="cpu")
    run = SimpleNamespace(cfg=cfg, out_dir=Path("my run"), metrics=SimpleNamespace(path="my run/metrics.jsonl"))
    reporter.Reporter.paths(run, Path("my run/ckpt.pt"), "")
    assert "fastgpt sample --out_dir='my run' --device=cpu" in capsys.readouterr().out
    assert "--init_from='my run/hf'" in export.says("hf", Path("my run/hf"), "gelu")
    assert "--out_dir='my run'" in export.says("nanogpt", Path("my run/ckpt.pt"), "gelu")
    assert "-e 'my run/model.bin'" in export.says("llmc", Path("my run/model.bin"), "gelu")
