"""What the tests share: a folder of their own as the working directory, a small dataset, the command line in this process and in two."""

import faulthandler
import json
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.distributed import TCPStore

# Without a GPU the kernels run in Triton's interpreter; it is chosen when they are first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from kernel_case import poisoned

from fastgpt.cli import main

torch.set_num_threads(1)  # models this small only lose by sharing their sums
np.seterr(all="ignore")  # the interpreter computes masked lanes, too
SECONDS = 300  # after which a process that does not end is ended
LOOPBACK = {"GLOO_SOCKET_IFNAME": socket.if_nameindex()[0][1]}  # else gloo asks what the host's name resolves to


def losses(out_dir):
    """The logged losses of a run, in order."""
    lines = (Path(out_dir) / "metrics.jsonl").read_text().splitlines()
    return [r["loss"] for r in map(json.loads, lines) if "loss" in r]


def run_script(script, *words):
    """Run Python code with words as its arguments in a process of its own; what it prints. It must end well."""
    done = subprocess.run([sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def command(*words):
    """Run a command line in this process, to success."""
    assert main([str(w) for w in words]) == 0


def as_rank(environment, folder, f, args):
    """f(*args) in a process that is one of several, as torchrun tells it by the environment; it writes to rankN.log."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    log = os.open(f"rank{environment['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    faulthandler.dump_traceback_later(SECONDS - 10)  # the log then shows where it hangs
    torch.set_num_threads(1)
    f(*args)


def start_ranks(f, arguments):
    """Start a process for each rank, as torchrun would: it runs f with the rank's own arguments. f is a function of a module.

    The processes are forks of a server that has imported everything once, so they begin within milliseconds. The store is returned
    too: it must live as long as they do.
    """
    context = multiprocessing.get_context("forkserver")
    preload = ["fastgpt.trainer", "fastgpt.kernels", "pytest", "torch.distributed.fsdp", "torch.distributed.tensor"]
    context.set_forkserver_preload(preload)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a port that nobody else has
    world = dict(
        WORLD_SIZE=str(len(arguments)), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    ranks = []
    for r, args in enumerate(arguments):
        environment = {**os.environ, **LOOPBACK, **world, "RANK": str(r), "LOCAL_RANK": str(r)}
        ranks.append(context.Process(target=as_rank, args=(environment, os.getcwd(), f, args)))
        ranks[-1].start()
    return ranks, store


def in_processes(size, f, *args):
    """Run f(*args) in several processes; what rank 0 prints. All must end well."""
    ranks, _store = start_ranks(f, [args] * size)
    while (alive := [rank for rank in ranks if rank.exitcode is None]) and wait([a.sentinel for a in alive], SECONDS):
        if any(rank.exitcode for rank in ranks):
            break
    for rank in ranks:
        rank.kill()
        rank.join()
    logs = [Path(f"rank{r}.log").read_text() for r in range(size)]
    assert [rank.exitcode for rank in ranks] == [0] * size, "\n".join(logs)
    return logs[0]


def in_two_processes(f, *args):
    """Run f(*args) in two processes; what rank 0 prints. Both must end well."""
    return in_processes(2, f, *args)


def pytest_terminal_summary(terminalreporter):
    """What tests/test_docs.py ran of each page, what it did not, and why."""
    for report in terminalreporter.stats.get("passed", []):
        for name, line in report.user_properties:
            if name == "page":
                terminalreporter.write_line(line)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A fresh folder as the working directory and home of the cache; torch's generator in a known state."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    return tmp_path


@pytest.fixture
def dataset(workdir):
    """data/letters: nanoGPT's files, 26 characters in learnable runs."""
    folder = workdir / "data" / "letters"
    folder.mkdir(parents=True)
    tokens = (np.arange(5000) // 3 % 26).astype("<u2")
    tokens[:4500].tofile(folder / "train.bin")
    tokens[4500:].tofile(folder / "val.bin")
    chars = "abcdefghijklmnopqrstuvwxyz"
    meta = {"vocab_size": 26, "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


@pytest.fixture
def poison():
    """What a kernel does not write is nan, for as long as a test runs. The same random inputs each time."""
    torch.manual_seed(0)
    with poisoned():
        yield


@pytest.fixture(scope="session")
def compiled():
    """Calls a function in a process of its own, where Triton compiles: in this one its library is the interpreter's."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with patch.dict(os.environ, environment, clear=True):
            pool.submit(int).result()  # the process begins
        yield lambda f, *args: pool.submit(f, *args).result()


TINY = """
    --device=cpu --compile=False --n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4
    --gradient_accumulation_steps=2 --max_iters=8 --eval_interval=4 --eval_iters=2 --warmup_iters=2 --lr_decay_iters=8 --learning_rate=0.01
""".split()  # noqa: SIM905


@pytest.fixture
def fastgpt(capsys):
    """Run a command line in this process: (exit status, stdout, stderr)."""

    def run(*words):
        capsys.readouterr()
        status = main([str(w) for w in words])
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def train(fastgpt, dataset):
    """Train a tiny model on data/letters with further flags, to success: its stdout."""

    def run(*flags):
        status, out, err = fastgpt("train", "--dataset=letters", *TINY, *flags)
        assert status == 0, err
        return out

    return run
