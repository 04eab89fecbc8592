"""Bit for bit against nanoGPT itself. Needs a checkout of it: NANOGPT=/path/to/nanoGPT pytest tests/test_against_nanogpt.py

What nanoGPT answered where this was last run is recorded in nanogpt_facts.json (nanogpt.py writes it), and test_parity.py holds the
model to it on any machine.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from nanogpt import CONFIGS, answers_of, load

from fastgpt.model import GPT, GPTConfig

NANOGPT = os.environ.get("NANOGPT")
pytestmark = pytest.mark.skipif(not NANOGPT, reason="NANOGPT does not name a checkout of nanoGPT")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_answer_is_nanogpts(name):
    module = load(NANOGPT)
    theirs, ours = (answers_of(G, C, CONFIGS[name]) for G, C in ((module.GPT, module.GPTConfig), (GPT, GPTConfig)))
    assert theirs.keys() == ours.keys()
    for what, expected in theirs.items():
        if isinstance(expected, dict):
            assert list(expected) == list(ours[what]), what
            for k, v in expected.items():
                assert torch.equal(v, ours[what][k]), f"{what}: {k}"
        elif isinstance(expected, torch.Tensor):
            assert torch.equal(expected, ours[what]), what
        else:
            assert expected == ours[what], what


def test_submodules_alone_and_cropping():
    module = load(NANOGPT)
    x = torch.randn(2, 9, 20)
    models = []
    for G, C in ((module.GPT, module.GPTConfig), (GPT, GPTConfig)):
        torch.manual_seed(1)
        models.append(G(C(**CONFIGS["bias"])))
    theirs, ours = (m.transformer.h[1] for m in models)
    assert torch.equal(theirs(x), ours(x))
    for part in ("ln_1", "attn", "ln_2", "mlp"):
        assert torch.equal(getattr(theirs, part)(x), getattr(ours, part)(x)), part
    assert [n for n, _ in models[0].named_modules()] == [n for n, _ in models[1].named_modules()]
    idx = torch.arange(7)[None]
    for m in models:
        m.crop_block_size(8)
    assert torch.equal(models[0](idx)[0], models[1](idx)[0])


FLAGS = ["--dataset=letters", *TINY]


def train_nanogpt(*flags):
    """Run nanoGPT's train.py here, on the data/ of the working directory: its stdout."""
    for name in ("model.py", "configurator.py", "train.py"):
        if not Path(name).exists():
            Path(name).symlink_to(Path(NANOGPT) / name)
    # As many threads as conftest.py gives this process: sums are split by them.
    env = {**os.environ, "PYTHONPATH": ".", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "train.py", *FLAGS, *flags], capture_output=True, text=True, check=True, env=env
    ).stdout


@pytest.mark.parametrize("dropout", ["0.0", "0.2"])
def test_a_run_of_train_py_sees_the_same_batches(dataset, fastgpt, dropout):
    """Weights after 8 updates, bit for bit: init, batch order, accumulation, clipping, schedule and evaluation agree."""
    # nanoGPT makes max_iters + 1 updates and saves before the last: at max_iters=8 its checkpoint is ours.
    train_nanogpt("--max_iters=8", "--out_dir=theirs", f"--dropout={dropout}")
    assert fastgpt("train", *FLAGS, "--max_iters=8", "--out_dir=ours", f"--dropout={dropout}")[0] == 0
    theirs, ours = (torch.load(f"{d}/ckpt.pt", weights_only=True) for d in ("theirs", "ours"))
    assert theirs["iter_num"] == ours["iter_num"] == 8
    assert list(theirs["model"]) == list(ours["model"])
    assert all(torch.equal(v, ours["model"][k]) for k, v in theirs["model"].items())
    assert theirs["model_args"] == ours["model_args"]
    for i, state in theirs["optimizer"]["state"].items():
        assert all(torch.equal(v, ours["optimizer"]["state"][i][k]) for k, v in state.items())


def test_checkpoints_cross_over_both_ways(dataset, fastgpt):
    assert fastgpt("train", *FLAGS, "--max_iters=4", "--out_dir=ours")[0] == 0
    out = train_nanogpt("--init_from=resume", "--out_dir=ours", "--max_iters=8")
    assert "Resuming training from ours" in out
    assert "iter 8" in out
    train_nanogpt("--max_iters=8", "--out_dir=theirs")
    status, out, err = fastgpt("train", *FLAGS, "--init_from=resume", "--out_dir=theirs", "--max_iters=12")
    assert status == 0, err
    assert "step 12" in out
