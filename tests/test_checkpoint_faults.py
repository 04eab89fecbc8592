"""Checkpoints and metrics outlive kills, full disks, second runs and damage; what cannot be used is named, before it takes memory."""

import argparse
import collections
import copy
import errno
import io
import json
import math
import multiprocessing
import os
import pickletools
import random
import resource
import struct
import threading
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import TINY
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fastgpt import checkpoint, files, lock, metrics, plot
from fastgpt.config import GPTConfig, UserError
from fastgpt.model import GPT

SHAPE = dict(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=5, bias=False, dropout=0.0)


def optimizer_of(model):
    return model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")


def made(iteration, fill=None):
    """The checkpoint of a model after one update; `fill` is the value of all its weights."""
    model = GPT(GPTConfig(**SHAPE))
    optimizer = optimizer_of(model)
    model(torch.zeros(1, 4).long(), torch.ones(1, 4).long())[1].backward()
    optimizer.step()
    if fill is not None:
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(fill)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": dict(SHAPE),
        "iter_num": iteration,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "letters", "doc_mask": False},
        "fastgpt": {
            "version": 1,
            "meta": {"vocab_size": 5, "itos": dict(enumerate("ab\0é☃")), "blob": b"\xff"},
            "scaler": {},
            "ranks": [{"rng": torch.get_rng_state(), "cuda_rng": None, "offsets": torch.arange(3)}],
            "micro_batch": 4,
        },
    }


def value_of(path):
    """The value that all weights of a checkpoint have."""
    values = {v for weight in torch.load(path, weights_only=True)["model"].values() for v in weight.unique().tolist()}
    assert len(values) == 1, "of two runs"
    return values.pop()


def writer(out_dir=".", keep=2, background=False, start=0):
    said = []
    return checkpoint.Writer(out_dir, keep, background, said.append, start), said


@contextmanager
def room(size):
    """Files larger than `size` bytes cannot be written: as on a full disk, the system writes a part and then fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def child(f, *args):
    """f(*args) in a process of its own, killed at the end of the block. It is a fork of one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastgpt.trainer", "fastgpt.kernels", "pytest"])
    process = context.Process(target=in_folder, args=(os.getcwd(), f, *args))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def in_folder(folder, f, *args):
    os.chdir(folder)
    f(*args)


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


# ---- what a folder holds ----


def test_the_last_ones_and_the_best_are_kept(workdir):
    w, said = writer(keep=3)
    Path("ckpt-0000007").mkdir()  # of a sharded run that went further
    for i in range(1, 7):
        w.save(made(i, i), best=i == 2)
        assert value_of("ckpt.pt") == i
    assert sorted(os.listdir()) == ["ckpt-0000004.pt", "ckpt-0000005.pt", "ckpt-best.pt", "ckpt.pt"]
    assert [value_of(f"ckpt-{name}.pt") for name in ("0000004", "0000005", "best")] == [4, 5, 2]
    assert not said
    w, _ = writer(keep=1, start=6)
    w.save(made(7, 7), best=True)
    assert sorted(os.listdir()) == ["ckpt-best.pt", "ckpt.pt"]
    assert os.path.samefile("ckpt.pt", "ckpt-best.pt")  # no bytes of its own


def test_folders_of_sharded_checkpoints_count_like_files(workdir):
    for i in (1, 2):
        Path(f"ckpt-{i:07d}").mkdir()
        Path(f"ckpt-{i:07d}/part").touch()
    w, _ = writer(keep=2, start=2)
    w.save(made(3), best=False)
    assert sorted(os.listdir()) == ["ckpt-0000002", "ckpt.pt"]


def test_a_run_that_goes_back_leaves_nothing_of_what_came_after(workdir):
    """Resumed from iteration 2 of a run that went on to 4, or begun anew: the old ones would else pass for newer ones."""
    w, _ = writer(keep=4)
    for i in range(1, 5):
        w.save(made(i, i), best=i == 4)
    w, _ = writer(keep=4, start=2)
    w.save(made(3, 30), best=False)
    assert [value_of(p) for p in checkpoint.find(".")] == [30, 2, 1]  # the best one was of iteration 4
    w, _ = writer(keep=4)
    w.save(made(1, 10), best=False)
    assert [value_of(p) for p in checkpoint.find(".")] == [10]


def test_files_have_the_usual_permissions(workdir):
    writer()[0].save(made(1), best=True)
    Path("usual").touch()
    assert Path("ckpt.pt").stat().st_mode == Path("usual").stat().st_mode


def test_standard_output_is_written_to_and_stays(workdir):
    """As `--json=/dev/stdout`, a link to a pipe or a device, which root could replace by a file."""
    os.mkfifo("pipe")
    Path("stdout").symlink_to("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    with files.replacing(Path("stdout")) as f:
        f.write(b"all of it")
    assert os.read(reader, 100) == b"all of it"
    assert Path("stdout").is_symlink()
    os.close(reader)


def test_without_hard_links_copies_are_kept(workdir, monkeypatch):
    def none(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(files.os, "link", none)
    w, _ = writer()
    for i in (1, 2):
        w.save(made(i, i), best=True)
    assert [value_of(p) for p in checkpoint.find(".")] == [2, 1, 2]


# ---- kills, second writers, links ----


def save_on(fill):
    w, _ = writer("out", keep=2, background=fill % 2 == 1, start=100 * (fill - 1))
    for i in range(1, 100):
        w.save(made(100 * (fill - 1) + i, 100 * (fill - 1) + i), best=i % 2 == 0)


def kill_while_saving(times):
    Path("out").mkdir()
    pick, newest = random.Random(0), 0
    for n in range(1, times + 1):
        with child(save_on, n) as process:
            wait_for(lambda: checkpoint.iteration_of(Path("out/ckpt.pt")) > newest)
            time.sleep(pick.uniform(0, 0.03))
            process.kill()
        found = checkpoint.load("out", resume=True)
        assert found["path"] == Path("out/ckpt.pt")
        assert value_of("out/ckpt.pt") == found["iter_num"] > newest
        for path in checkpoint.find("out"):
            assert value_of(path) == checkpoint.read(path, resume=True)["iter_num"]
        # Save on from there, as a resumed run.
        newest = 100 * n
        w, said = writer("out", start=found["iter_num"])
        w.save(made(newest, newest), best=False)
        assert not said
        assert not list(Path("out").glob(".*"))  # nothing of the killed one


def test_a_kill_while_saving_leaves_a_whole_checkpoint(workdir):
    kill_while_saving(4)


@pytest.mark.slow
def test_many_kills_while_saving(workdir):
    kill_while_saving(50)


def hold_lock():
    with lock.lock("out"):
        time.sleep(600)


def test_a_second_run_is_refused_until_the_first_is_gone(train, fastgpt):
    train("--max_iters=4")
    before = Path("out/ckpt.pt").read_bytes()
    with child(hold_lock) as process:
        wait_for(lambda: Path("out/.lock").exists() and Path("out/.lock").read_text())
        for flags in ([], ["--init_from=resume"]):
            status, _, err = fastgpt("train", "--dataset=letters", *TINY, *flags)
            assert status == 2
            assert f"--out_dir=out: another run writes there (process {process.pid} on " in err
            assert err.count("\n") == 1
        assert Path("out/ckpt.pt").read_bytes() == before
        train("--init_from=resume", "--eval_only=True")  # writes no checkpoint
        assert fastgpt("sample", "--device=cpu", "--num_samples=1", "--max_new_tokens=2", "--start=a")[0] == 0
    assert Path("out/.lock").exists()  # the killed process left it
    train("--init_from=resume")
    assert not Path("out/.lock").exists()


def test_a_lock_that_its_holder_removes_is_not_taken(workdir, monkeypatch):
    """Between opening the file and locking it: the lock would be on a file that nobody else finds."""
    real, opened = lock.try_lock, []

    def slow(f, path, *more):
        opened.append(f)
        if len(opened) == 1:
            path.unlink()
        return real(f, path, *more)

    monkeypatch.setattr(lock, "try_lock", slow)
    with lock.lock("."):
        assert len(opened) == 2
        assert Path(".lock").read_text()


def test_a_lock_follows_no_link(workdir):
    Path("victim").write_text("precious")
    Path(".lock").symlink_to("victim")
    with pytest.raises(UserError, match=r"\.lock: cannot be opened"), lock.lock("."):
        pass
    assert Path("victim").read_text() == "precious"


def test_a_file_system_without_locks_is_named(workdir, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with lock.lock("."):
        assert "not locked (No locks available); two runs in this folder would overwrite" in capsys.readouterr().out


def test_two_writers_in_one_folder_never_mix(workdir):
    """Where locks fail: each file is of one run. One may remove the other's temporary file, and is told so."""
    big = {k: made(1, k) for k in (1, 2)}
    for k, ckpt in big.items():
        ckpt["fastgpt"]["ranks"][0]["rng"] = torch.full((200_000,), k, dtype=torch.uint8)

    def save(k):
        w, _ = writer()
        for _ in range(15):
            w.save(big[k], best=False)

    threads = [threading.Thread(target=save, args=(k,)) for k in big]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if Path("ckpt.pt").exists():
            loaded = checkpoint.load(".", resume=True)
            values = {v for w in loaded["model"].values() for v in w.unique().tolist()}
            assert values == set(loaded["fastgpt"]["ranks"][0]["rng"].unique().tolist())
    assert Path("ckpt.pt").exists()


def test_no_link_is_followed(workdir, monkeypatch):
    Path("victim").write_text("precious")
    Path("ckpt.pt.part").symlink_to("victim")  # the name that earlier versions wrote to
    w, said = writer()
    w.save(made(1, 1), best=False)
    assert not said
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "guessed")
    Path(".guessed.part").symlink_to("victim")
    w.save(made(2, 2), best=False)
    assert "File exists" in w.failed
    assert Path("victim").read_text() == "precious"
    assert value_of("ckpt.pt") == 1


# ---- full disks ----


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_named_and_the_next_save_tries_again(workdir, background):
    w, said = writer(background=background)
    with room(2_000):
        w.save(made(1, 1), best=True)
        w.wait()
        assert said == [
            "ckpt.pt: iteration 1 cannot be saved (File too large); this run has no checkpoint; the next save tries again"
        ]
    w.save(made(2, 2), best=True)
    w.wait()
    with room(2_000):
        w.save(made(3, 3), best=True)
        w.wait()
    assert said[1:] == [
        "ckpt.pt: saved again, at iteration 2",
        "ckpt.pt: iteration 3 cannot be saved (File too large); the last checkpoint is of iteration 2; the next save tries again",
    ]
    assert (w.saved, w.iteration) == (Path("ckpt.pt"), 2)
    assert value_of("ckpt.pt") == 2
    assert not list(Path().glob(".*"))
    w.save(made(4, 4), best=False)
    w.wait()
    assert w.failed is None
    assert [value_of(p) for p in checkpoint.find(".")] == [4, 2, 2]


def test_metrics_on_a_full_disk_wait_for_room(tmp_path):
    said = []
    file = metrics.MetricsFile(tmp_path, 0, said.append)
    file.write(iter=0, loss=1.0)
    with room(40):  # the second record is cut
        for i in range(1, 4):
            file.write(iter=i, loss=1.0)
    assert said == [f"{file.path}: cannot be written (File too large); the run goes on, and tries again at each record"]
    assert file.path.stat().st_size == 40
    assert [r["iter"] for r in metrics.read_metrics(file.path)] == [0]
    file.write(iter=4, loss=1.0)
    assert said[1:] == [f"{file.path}: written again"]
    file.close()
    assert [r["iter"] for r in metrics.read_metrics(file.path)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("cut", range(25, 52))
def test_no_metrics_record_is_lost_or_doubled_wherever_a_write_ends(tmp_path, cut):
    file = metrics.MetricsFile(tmp_path, 0, lambda line: None)
    file.write(iter=0, loss=1.0)
    assert file.path.stat().st_size == 25
    with room(cut):
        file.write(iter=1, loss=2.0)
    file.write(iter=2, loss=3.0)
    file.close()
    assert [r["loss"] for r in metrics.read_metrics(file.path)] == [1.0, 2.0, 3.0]


def test_metrics_that_never_find_room_are_counted(train):
    Path("out").mkdir()
    Path("out/metrics.jsonl").symlink_to("/dev/full")
    out = train("--max_iters=4")
    line = "out/metrics.jsonl: cannot be written (No space left on device); the run goes on, and tries again at each record"
    assert out.count("out/metrics.jsonl: cannot be written") == out.count(line) == 1
    assert "out/metrics.jsonl: the last 6 records could not be written" in out
    assert checkpoint.load("out")["iter_num"] == 4


def read_only():
    """In a child: a folder that becomes read-only while a run saves in it."""
    w, said = writer("out")
    file = metrics.MetricsFile("out", 0, said.append)
    w.save(made(1, 1), best=False)
    os.chmod("out", 0o555)
    os.chmod(".", 0o755)
    if os.geteuid() == 0:  # root may write anywhere
        os.seteuid(65534)
    w.save(made(2, 2), best=False)
    file.write(iter=1, loss=1.0)
    assert (
        w.failed
        == "out/ckpt.pt: iteration 2 cannot be saved (Permission denied); the last checkpoint is of iteration 1"
    )
    assert len(said) == 1
    assert [r["iter"] for r in metrics.read_metrics("out/metrics.jsonl")] == [1]


def test_a_folder_that_becomes_read_only(workdir):
    Path("out").mkdir()
    with child(read_only) as process:
        process.join(60)
        assert process.exitcode == 0
    os.chmod("out", 0o755)
    assert value_of("out/ckpt.pt") == 1


# ---- metrics, killed and damaged ----


def rewrite_metrics():
    for _ in range(10_000):
        metrics.MetricsFile("out", keep_before=500).file.close()
        with open("out/metrics.jsonl", "ab") as f:  # what the resumed run drops
            f.write(b'{"iter": 500, "loss": 1.0}\n')


def kill_while_rewriting(times):
    Path("out").mkdir()
    history = "".join(json.dumps({"iter": i, "loss": 1.0}) + "\n" for i in range(500))
    Path("out/metrics.jsonl").write_text(history)
    pick = random.Random(0)
    for _ in range(times):
        with child(rewrite_metrics) as process:
            began = os.stat("out/metrics.jsonl").st_ino
            wait_for(lambda: os.stat("out/metrics.jsonl").st_ino != began)
            time.sleep(pick.uniform(0, 0.01))
            process.kill()
        assert [r["iter"] for r in metrics.read_metrics("out/metrics.jsonl")][:500] == list(range(500))


def test_a_kill_while_metrics_are_rewritten_loses_nothing(workdir):
    kill_while_rewriting(4)


@pytest.mark.slow
def test_many_kills_while_metrics_are_rewritten(workdir):
    kill_while_rewriting(50)


@pytest.mark.parametrize(
    "line",
    [
        b'{"iter": 1, "lo',
        b"\xff\xfe",
        b"1" * 5_000,
        b"[" * 100_000,
        b'{"iter": ' + b"1" * 5_000 + b"}",
        b"",
        b'{"iter": true}',
    ],
)
def test_a_broken_line_is_passed_over(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iter": 0, "loss": 1}\n' + line + b'\n{"iter": 2, "loss": "x"}\n')
    assert [r["iter"] for r in metrics.read_metrics(path)] == [0, 2]
    plot.plot_losses(metrics.read_metrics(path), tmp_path / "loss.png", "t")
    metrics.MetricsFile(tmp_path, keep_before=3).close()
    assert path.read_bytes() == b'{"iter": 0, "loss": 1}\n{"iter": 2, "loss": "x"}\n'


def test_an_evaluation_alone_appends_to_the_metrics_of_a_run(tmp_path):
    """It takes no lock: what the run writes meanwhile must not go to a file that has been replaced."""
    run = metrics.MetricsFile(tmp_path, 0)
    run.write(iter=0, loss=1.0)
    evaluation = metrics.MetricsFile(tmp_path)
    run.write(iter=1, loss=1.0)
    evaluation.write(iter=1, val_loss=1.0)
    run.write(iter=2, loss=1.0)
    assert [r["iter"] for r in metrics.read_metrics(run.path)] == [0, 1, 1, 2]


# ---- in the background ----


def test_a_background_write_is_of_the_moment_of_the_call(workdir, monkeypatch):
    ckpt, go, real = made(1, 1.0), threading.Event(), checkpoint.replacing

    @contextmanager
    def late(path):
        go.wait()
        with real(path) as f:
            yield f

    monkeypatch.setattr(checkpoint, "replacing", late)
    w, _ = writer(background=True)
    w.save(ckpt, best=True)
    moments = copy.deepcopy(ckpt["optimizer"])
    for tensor in [*ckpt["model"].values(), *(m for s in ckpt["optimizer"]["state"].values() for m in s.values())]:
        tensor.fill_(2.0)  # training goes on
    go.set()
    w.wait()
    assert value_of("ckpt.pt") == 1.0
    kept = torch.load("ckpt.pt", weights_only=True)
    assert all(
        torch.equal(v, moments["state"][i][k]) for i, s in kept["optimizer"]["state"].items() for k, v in s.items()
    )
    assert kept["model"]["lm_head.weight"].data_ptr() == kept["model"]["transformer.wte.weight"].data_ptr()
    w.save({**ckpt, "iter_num": 2}, best=True)  # into the same memory
    w.wait()
    assert value_of("ckpt.pt") == 2.0


def test_a_run_that_saves_in_the_background_is_the_same_run(train, fastgpt):
    train("--out_dir=a")
    out = train("--out_dir=b", "--async_checkpoint=True")
    assert "checkpoint: b/ckpt.pt\n" in out
    assert sorted(os.listdir("a")) == sorted(os.listdir("b"))
    for name in ("ckpt.pt", "ckpt-0000004.pt"):
        a, b = (zipfile.ZipFile(Path(d) / name) for d in "ab")
        assert [(r.filename, r.CRC) for r in a.infolist() if "/data/" in r.filename] == [
            (r.filename, r.CRC) for r in b.infolist() if "/data/" in r.filename
        ]
    with room(30_000):
        status, out, err = fastgpt("train", "--dataset=letters", *TINY, "--out_dir=c", "--async_checkpoint=True")
    assert status == 2
    assert (
        err == "fastgpt: error: c/ckpt.pt: iteration 8 cannot be saved (File too large); this run has no checkpoint\n"
    )
    assert "checkpoint: none saved" in out


# ---- what is not whole ----


def test_a_broken_newest_one_is_named_and_the_one_before_is_used(train, fastgpt):
    train("--out_dir=whole", "--max_iters=12", "--lr_decay_iters=12")
    train("--lr_decay_iters=12")
    damaged = bytearray(Path("out/ckpt.pt").read_bytes())
    damaged[damaged.index(b"data/3FB") + 2_000] ^= 1  # a bit of a weight
    Path("out/ckpt.pt").write_bytes(damaged)
    out = train("--max_iters=12", "--lr_decay_iters=12", "--init_from=resume")
    assert [said for said in out.splitlines() if "ckpt.pt:" in said] == [
        "out/ckpt.pt: the checksum of its record 'archive/data/3' is wrong: the file is damaged; "
        "out/ckpt-0000004.pt, of iteration 4, takes its place"
    ]
    a, b = (torch.load(f"{d}/ckpt.pt", weights_only=True) for d in ("whole", "out"))
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    Path("out/ckpt.pt").unlink()
    _, out, _ = fastgpt("sample", "--device=cpu", "--num_samples=1", "--max_new_tokens=2", "--start=a")
    assert "out/ckpt.pt: there is none; out/ckpt-0000008.pt, of iteration 8, takes its place" in out
    for path in checkpoint.find("out"):
        path.write_bytes(b"")
    status, _, err = fastgpt("sample", "--device=cpu")
    assert status == 2
    assert "nor is any other checkpoint in out whole" in err


def test_a_newer_format_is_refused_by_name(workdir):
    ckpt = made(1)
    ckpt["fastgpt"]["version"] = 2
    torch.save(ckpt, "ckpt.pt")
    writer("old")  # and no older one is taken in its place
    torch.save(made(1), "ckpt-0000000.pt")
    with pytest.raises(
        UserError, match=r"ckpt\.pt: a newer fastgpt wrote it \(format 2; this one reads 1\): update fastgpt"
    ):
        checkpoint.load(".")


def test_claims_are_refused_before_they_take_memory(workdir):
    """8.5 GB of weights, in a file of some kB."""
    ckpt = made(1)
    ckpt["model_args"]["vocab_size"] = 2**28
    ckpt["model"]["lm_head.weight"] = ckpt["model"]["transformer.wte.weight"] = torch.zeros(1, 1).expand(2**28, 8)
    torch.save(ckpt, "ckpt.pt")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="larger than its memory"):
        checkpoint.load(".")
    ckpt["model"]["lm_head.weight"] = ckpt["model"]["transformer.wte.weight"] = torch.zeros(5, 8)
    torch.save(ckpt, "ckpt.pt")
    with pytest.raises(
        UserError, match=r"transformer\.wte\.weight is \(5, 8\) of torch\.float32, and not a tensor of \(268435456, 8\)"
    ):
        checkpoint.load(".")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000  # kB


def test_weights_that_share_their_memory_are_refused(workdir):
    """Twenty layers in the bytes of one: the model would take more memory than its file."""
    ckpt = made(1)
    ckpt["model_args"]["n_layer"] = 20
    for key, weight in list(ckpt["model"].items()):
        ckpt["model"].update({key.replace("h.0", f"h.{i}"): weight for i in range(20)})
    del ckpt["optimizer"]
    torch.save(ckpt, "ckpt.pt")
    with pytest.raises(UserError, match="its tensors share their memory"):
        checkpoint.load(".")
    ckpt["model_args"]["vocab_size"] = 5000
    ckpt["model"]["transformer.wte.weight"] = torch.zeros(5000, 8)
    del ckpt["model"]["lm_head.weight"]  # then the tied tensor is there once, and must not be taken off
    torch.save(ckpt, "ckpt.pt")
    with pytest.raises(UserError, match="its tensors share their memory"):
        checkpoint.load(".")


@pytest.mark.parametrize(
    ("pickled", "said"),
    [
        (b"})q\x00" + b"".join(bytes([104, i, 0x86, 113, i + 1]) for i in range(26)) + b"K\x01s.", "tuples in tuples without end"),
        (b"})" + b"\x85" * 200 + b"K\x01s.", "tuples in tuples without end"),
        (b"}r" + struct.pack("<I", 2**29) + b".", "an index that is too large"),
        (b"\x96" + struct.pack("<Q", 2**40) + b".", "not a readable checkpoint|opcode"),
        (b"cos\nsystem\nX\x0b\x00\x00\x00touch pwned\x85R.", "it asks for posix.system|it asks for os.system"),
        (b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00idna\x86R.", "it asks for the encoding 'idna'"),
    ],
)  # fmt: skip
def test_a_pickle_that_would_take_time_or_memory_or_run(workdir, pickled, said):
    with zipfile.ZipFile("ckpt.pt", "w") as z:
        z.writestr("archive/data.pkl", b"\x80\x02" + pickled)
    with pytest.raises(UserError, match=said):
        checkpoint.load(".")
    assert not Path("pwned").exists()


def with_prefix(prefix):
    return lambda c: c.update(model={prefix + key: weight for key, weight in c["model"].items()})


def with_masks(shape=(1, 1, 4, 4)):
    return lambda c: c["model"].update({"transformer.h.0.attn.bias": torch.ones(shape).tril()})


def with_numbers(c):
    c.update(
        iter_num=np.int64(3),
        best_val_loss=np.float64(1.5),
        model_args={k: np.int64(v) if type(v) is int else v for k, v in SHAPE.items()},
    )
    c["config"] = {
        "dataset": "letters",
        "learning_rate": np.float32(0.5),
        "compile": np.bool_(True),
        "n_layer": np.uint8(1),
    }


@pytest.mark.parametrize(
    "change",
    [
        *map(with_prefix, ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]),
        with_masks(),
        lambda c: (with_masks()(c), with_prefix("module.")(c)),
        lambda c: c["model"].pop("lm_head.weight"),
        lambda c: c["model"].update({"lm_head.weight": c["model"]["lm_head.weight"].clone()}),
        with_numbers,
        lambda c: c.update(config=argparse.Namespace(dataset="letters", opts=argparse.Namespace(x=(1, 2)))),
        lambda c: c.update(config=collections.OrderedDict(dataset="letters", more=collections.OrderedDict(x=1))),
        lambda c: c.update(config={"dataset": "letters", "args": argparse.Namespace(lr=np.float64(0.1))}),
    ],
)  # fmt: skip
def test_what_forks_of_nanogpt_save_is_read(workdir, change):
    ckpt = made(3)
    expected = GPT(GPTConfig(**SHAPE))
    expected.load_state_dict(ckpt["model"])
    change(ckpt)
    torch.save(ckpt, "ckpt.pt")
    loaded = checkpoint.load(".", resume=True)
    assert loaded["config"]["dataset"] == "letters"
    assert type(loaded["config"]) is dict
    assert (type(loaded["iter_num"]), loaded["iter_num"], float(loaded["best_val_loss"])) == (int, 3, 1.5)
    assert all(type(v) in (int, float, bool) for v in loaded["model_args"].values())
    model = checkpoint.build_model(loaded)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))
    optimizer_of(model).load_state_dict(loaded["optimizer"])


def test_numpys_numbers_are_pythons(workdir):
    ckpt = made(1)
    with_numbers(ckpt)
    torch.save(ckpt, "ckpt.pt")
    found = checkpoint.load(".")["config"]
    assert found == {"dataset": "letters", "learning_rate": 0.5, "compile": True, "n_layer": 1}
    assert [type(v) for v in found.values()] == [str, float, bool, int]


class Pretender(argparse.Namespace):
    """Not argparse's own, though it is one."""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_masks((1, 1, 5, 5)), "h.0.attn.bias is .*, and not the causal mask of 4 positions"),
        (lambda c: c["model"].update({"transformer.h.0.attn.bias": 7}), "h.0.attn.bias is 7, and not the causal mask"),
        (lambda c: c["model"].update({"module.lm_head.weight": torch.zeros(5, 8)}), "Unexpected key"),
        (lambda c: c["model"].pop("transformer.wte.weight"), "Missing key 'transformer.wte.weight'"),
        (lambda c: c.update(config={"x": np.array([1.0, 2.0])}), r"it asks for numpy\._?core\.multiarray\._reconstruct"),
        (lambda c: c.update(config={"x": np.datetime64("2020-01-01")}), "a numpy number of the kind 'M8'"),
        (lambda c: c.update(config={"x": np.str_("abc")}), "a numpy number of the kind 'U3'"),
        (lambda c: c.update(config=Pretender(x=1)), "it asks for test_checkpoint_faults.Pretender"),
        (lambda c: c.update(config=argparse.Namespace(x=c["model"]["lm_head.weight"])), "its settings hold"),
    ],
)  # fmt: skip
def test_what_no_fork_saves_is_refused(workdir, change, said):
    ckpt = made(3)
    change(ckpt)
    torch.save(ckpt, "ckpt.pt")
    with pytest.raises(UserError, match=rf"ckpt\.pt: .*{said}"):
        checkpoint.load(".")


SCALAR = b"cnumpy._core.multiarray\nscalar\n"
FLOAT = b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x89\x88\x87R"


@pytest.mark.parametrize(
    ("pickled", "said"),
    [
        (SCALAR + FLOAT + b"X\x01\x00\x00\x00a\x86R.", "a numpy number in it is of no kind"),
        (SCALAR + b"K\x01K\x01\x86R.", "a numpy number in it is of no kind"),
        (FLOAT + b"(K\x03X\x01\x00\x00\x00>NNNK\x00K\x00K\x00tb.", "another byte order"),
        (FLOAT + b"K\x01b.", "not a readable checkpoint"),
        (b"cargparse\nNamespace\n)\x81K\x01b.", "a Namespace in it has no names"),
        (b"cargparse\nNamespace\n)\x81}K\x01K\x02sb.", "a Namespace in it has no names"),
        (b"cargparse\nArgumentParser\n)\x81.", "it asks for argparse.ArgumentParser"),
    ],
)  # fmt: skip
def test_numbers_and_namespaces_that_no_pickle_writes(workdir, pickled, said):
    with zipfile.ZipFile("ckpt.pt", "w") as z:
        z.writestr("archive/data.pkl", b"\x80\x02" + pickled)
    with pytest.raises(UserError, match=said):
        checkpoint.load(".")


def damage(**moments):
    return lambda o: o["state"][3].update(moments)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda o: o.update(state={}), "it is empty, though iteration 3 has been trained"),
        (lambda o: o["state"].pop(2), "moments of 8 parameters, and not of 9"),
        (lambda o: o["state"][2].pop("step"), "'step'"),
        (damage(exp_avg=torch.zeros(3)), r"exp_avg of transformer\.h\.0\.attn\.c_proj\.weight is \(3,\) of torch\.float32"),
        (damage(exp_avg_sq=torch.zeros(8, 8).half()), "exp_avg_sq .* is .* of torch.float16, and not a float32 tensor"),
        (damage(exp_avg=torch.zeros(8, 1).expand(8, 8)), "larger than its memory"),
        (damage(exp_avg=torch.zeros(8, 8).t()), "strides"),
        (damage(step=torch.tensor(-1.0)), "a step that no optimizer counts"),
        (damage(step=torch.tensor(math.nan)), "a step that no optimizer counts"),
        (damage(step=7), "step of .* is 7, and not"),
        (lambda o: o["param_groups"][0]["params"].reverse(), "other groups of parameters"),
        (lambda o: o["param_groups"][0].update(betas=(0.9, 1.0)), "betas"),
        (lambda o: o["param_groups"][0].update(eps="x"), "settings"),
        (lambda o: o["param_groups"][1].update(amsgrad=True), "amsgrad"),
    ],
)  # fmt: skip
def test_an_optimizer_state_that_does_not_fit(workdir, change, said):
    ckpt = made(3)
    change(ckpt["optimizer"])
    torch.save(ckpt, "ckpt.pt")
    with pytest.raises(UserError, match=rf"ckpt\.pt: .*{said}"):
        checkpoint.load(".", resume=True)
    if said not in ("strides", "larger than its memory"):
        assert checkpoint.load(".")["iter_num"] == 3  # enough to sample from


def test_a_loaded_checkpoint_holds_its_file_no_longer_than_the_loading(train):
    """Else the room of a file that the run has replaced would stay taken."""
    from fastgpt import trainer

    train()
    held = []

    def loop(run):
        held.append(Path("/proc/self/maps").read_text().count("ckpt"))

    with patch.object(trainer.Run, "loop", loop):
        train("--init_from=resume")
    assert held == [0]


# ---- any damage ----

JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=5),
    st.sampled_from([[], {}, (), {1, 2}, -(2**70), 2**62, "\0", "x" * 5_000, {"a": {"b": [{}]}}]),
    st.builds(lambda shape, dtype: torch.zeros(shape).to(dtype), st.lists(st.integers(0, 9), max_size=3), st.sampled_from(
        [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64])),
    st.builds(lambda n: torch.zeros(1).expand(n), st.integers(0, 2**31)),
    st.builds(lambda n: torch.zeros(64)[n:].view(-1, 1).t(), st.integers(0, 63)),
    st.just(torch.zeros(8, 8).t()), st.just(torch.zeros(3).to_sparse()), st.just(torch.nn.Parameter(torch.zeros(3))),
)  # fmt: skip


def places(tree):
    """Every (container, key) below a checkpoint."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from places(tree[key])


def nested(depth):
    thing = []
    for _ in range(depth):
        thing = [thing, thing]  # 2 ** depth paths lead to its end
    return thing


def with_other_things(draw, ckpt):
    """The file of a checkpoint in which some things are others, of other types and shapes, or missing."""
    found = list(places(ckpt))  # now: what is put in below may have 2 ** 300 places
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(found))
        if draw(st.booleans()) and isinstance(container, dict):
            value = container.pop(key, None)
            if draw(st.booleans()):
                container[draw(st.one_of(st.text(max_size=3), st.integers(), st.just(("a",))))] = value
        else:
            container[key] = draw(st.one_of(JUNK, st.builds(nested, st.integers(1, 300))))
    file = io.BytesIO()
    torch.save(ckpt, file)
    return file.getvalue()


def with_other_numbers(draw, good):
    """The file with other numbers in its pickle: sizes, strides, offsets, indices; its checksums are right."""
    with zipfile.ZipFile(io.BytesIO(good)) as z:
        records = {name: bytearray(z.read(name)) for name in z.namelist()}
    pickled = records["archive/data.pkl"]
    sizes = {
        "BININT1": "<B",
        "BININT2": "<H",
        "BININT": "<i",
        "BINGET": "<B",
        "BINPUT": "<B",
        "LONG_BINPUT": "<I",
        "LONG_BINGET": "<I",
    }
    found = [(op, at) for op, _, at in pickletools.genops(bytes(pickled)) if op.name in sizes]
    for _ in range(draw(st.integers(1, 3))):
        op, at = draw(st.sampled_from(found))
        kind, width = sizes[op.name], struct.calcsize(sizes[op.name])
        low, high = (-(2**31), 2**31 - 1) if kind == "<i" else (0, 256**width - 1)
        if op.name == "BININT1" and draw(st.booleans()):  # in the same place, and negative: the pickle grows
            pickled[at : at + 2] = b"J" + struct.pack("<i", draw(st.integers(-(2**31), 2**31 - 1)))
            break
        struct.pack_into(kind, pickled, at + 1, draw(st.integers(low, high)))
    if draw(st.integers(0, 3)) == 0:
        name = draw(st.sampled_from(sorted(records)))
        records[name] = records[name][: draw(st.integers(0, len(records[name])))]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", draw(st.sampled_from([zipfile.ZIP_STORED] * 7 + [zipfile.ZIP_DEFLATED]))) as z:
        for name, data in records.items():
            z.writestr(name, bytes(data))
    return file.getvalue()


def with_other_bytes(draw, good):
    """The file with flipped, missing or added bytes."""
    bad = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(bad) - 1) | st.integers(max(0, len(bad) - 400), len(bad) - 1))
        kind = draw(st.sampled_from(["flip"] * 5 + ["cut", "drop", "add"]))
        if kind == "flip":
            bad[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del bad[max(at, 1) :]
        elif kind == "drop":
            del bad[at : min(at + draw(st.integers(1, 100)), len(bad) - 1)]
        else:
            bad[at:at] = draw(st.binary(min_size=1, max_size=100))
    return bytes(bad)


@contextmanager
def memory(size):
    """No more than `size` bytes can be taken."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture(scope="module")
def good():
    torch.manual_seed(0)
    ckpt, file = made(3), io.BytesIO()
    torch.save(ckpt, file)
    return ckpt, file.getvalue()


def any_damage(good, folder, data):
    """Load a damaged checkpoint: a line that says why not, or what can be trained on; from damaged bytes, the right weights."""
    ckpt, whole = good
    kind = data.draw(st.sampled_from(["things", "numbers", "bytes"]))
    draw = data.draw
    file = (
        with_other_things(draw, copy.deepcopy(ckpt)) if kind == "things"
        else with_other_numbers(draw, whole) if kind == "numbers"
        else with_other_bytes(draw, whole)
    )  # fmt: skip
    (folder / "ckpt.pt").write_bytes(file)
    try:
        with memory(2 * len(file) + 2**26):  # 64 MB for threads and arenas
            loaded = checkpoint.load(folder, resume=True)
    except UserError as e:
        said = str(e)
        assert "MemoryError" not in said
        assert "allocate" not in said
        assert "\n" not in said
        return
    if kind == "bytes":
        assert all(torch.equal(v, loaded["model"][k]) for k, v in ckpt["model"].items())
    model = checkpoint.build_model(loaded)
    optimizer = optimizer_of(model)
    optimizer.load_state_dict(loaded["optimizer"])
    args = loaded["model_args"]
    assume(args["n_embd"] == 8)
    model(torch.zeros(1, 1).long(), torch.zeros(1, 1).long())[1].backward()
    optimizer.step()


FUZZ = dict(deadline=10_000, database=None, suppress_health_check=list(HealthCheck))


@settings(max_examples=100, derandomize=True, **FUZZ)
@given(data=st.data())
def test_a_damaged_checkpoint_is_refused_or_right(good, tmp_path_factory, data):
    any_damage(good, tmp_path_factory.getbasetemp(), data)


@pytest.mark.slow
@settings(max_examples=2_000, **FUZZ)
@given(data=st.data())
def test_many_damaged_checkpoints(good, tmp_path_factory, data):
    any_damage(good, tmp_path_factory.getbasetemp(), data)
