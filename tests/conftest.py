"""What the tests share: a folder of their own as the working directory, a small dataset, and the command line in-process."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

# Without a GPU the kernels run in Triton's interpreter; it is chosen when they are first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from kernel_case import poisoned

from fastgpt.cli import main

torch.set_num_threads(1)  # models this small only lose by sharing their sums


def losses(out_dir):
    """The logged losses of a run, in order."""
    lines = (Path(out_dir) / "metrics.jsonl").read_text().splitlines()
    return [r["loss"] for r in map(json.loads, lines) if "loss" in r]


def run_script(script, processes, *words):
    """Run Python code with words as its arguments, in so many processes as torchrun starts them; what it prints. It must end well."""
    Path("run.py").write_text(script)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    done = subprocess.run([sys.executable, *launch, "run.py", *words], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
