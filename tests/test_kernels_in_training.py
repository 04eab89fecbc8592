"""Training through the kernels: the loss curve is the reference's, and what cannot run falls back, said once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

from fastgpt import ops
from fastgpt.model import GPT, GPTConfig

# The interpreter takes milliseconds a row.
FEW_ROWS = ["--batch_size=1", "--block_size=8", "--gradient_accumulation_steps=1", "--eval_iters=1"]

triton = pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def afterwards_torch():
    yield
    ops.use("torch")


def losses(out_dir):
    return [
        r["loss"] for r in map(json.loads, (Path(out_dir) / "metrics.jsonl").read_text().splitlines()) if "loss" in r
    ]


def test_twenty_steps_are_the_references(dataset, fastgpt):
    flags = ["--dataset=letters", *TINY, "--bias=True", *FEW_ROWS]
    flags += ["--max_iters=20", "--lr_decay_iters=20", "--eval_interval=20"]
    for kernels in ("torch", "triton"):
        status, _, err = fastgpt("train", *flags, f"--out_dir={kernels}", f"--kernels={kernels}")
        assert status == 0, err
    assert losses("triton") == pytest.approx(losses("torch"), rel=1e-5)
    assert losses("triton") != losses("torch"), "the kernels sum in another order: equal bits would mean that none ran"


def test_every_layer_norm_of_the_model_runs_the_kernels(monkeypatch):
    ops.use("triton")
    calls = []
    for name in ("layer_norm", "add_layer_norm"):
        original = getattr(ops.chosen["layer_norm"], name)
        monkeypatch.setattr(ops.chosen["layer_norm"], name, lambda *a, n=name, f=original: calls.append(n) or f(*a))
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=3, n_head=1, n_embd=8))
    idx = torch.zeros(1, 8, dtype=torch.long)
    model(idx, idx)[1].backward()
    assert calls == ["layer_norm"] + ["add_layer_norm"] * 6
    assert all(p.grad is not None for p in model.parameters())


def test_dropout_draws_anew_each_call_and_from_the_seed():
    ops.use("triton")
    x, weight = torch.zeros(1, 8, 64), torch.ones(64)
    torch.manual_seed(0)
    first, second = (ops.add_layer_norm(x, x + 1, weight, dropout_p=0.5)[0] for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(ops.add_layer_norm(x, x + 1, weight, dropout_p=0.5)[0], first)


def test_what_a_kernel_cannot_take_goes_to_pytorch_with_one_warning():
    ops.use("triton")
    x, weight = torch.randn(1, 2, 9000), torch.ones(9000)
    with pytest.warns(UserWarning, match="no kernel for rows of 9000") as caught:
        h = [ops.layer_norm(x, weight) for _ in range(3)][-1]
    assert len(caught) == 1
    torch.testing.assert_close(h, torch.nn.functional.layer_norm(x, (9000,)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: the kernels run on it")
def test_without_a_gpu_and_the_interpreter_it_trains_on_pytorch(dataset):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastgpt.cli", "train", "--dataset=letters", *TINY, "--kernels=triton"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no kernel for rows of 16 on this cpu device") == 1


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("tritn", "'triton'"),
        ("layernorm=triton", "'layer_norm'"),
        ("layer_norm=cuda", "'triton' or 'torch'"),
        ("layer_norm=triton,x=torch", "'x'"),
    ],
)
def test_wrong_choices_are_named(spec, said, dataset, fastgpt):
    status, _, err = fastgpt("train", "--dataset=letters", *TINY, f"--kernels={spec}")
    assert status == 2
    assert err.startswith(f"fastgpt: error: --kernels={spec}: ")
    assert err.count("\n") == 1
