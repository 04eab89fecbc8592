"""Bit for bit against nanoGPT itself. Needs a checkout of it: NANOGPT=/path/to/nanoGPT pytest tests/test_against_nanogpt.py

What nanoGPT answered where this was last run is recorded in nanogpt_facts.json (`python tests/test_against_nanogpt.py
/path/to/nanoGPT` writes it), and test_parity.py holds the model to it on any machine.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt.model import GPT, GPTConfig

NANOGPT = os.environ.get("NANOGPT")
pytestmark = pytest.mark.skipif(not NANOGPT, reason="NANOGPT does not name a checkout of nanoGPT")

CONFIGS = {
    "plain": dict(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=32, dropout=0.0, bias=False),
    "bias": dict(block_size=24, vocab_size=50, n_layer=3, n_head=4, n_embd=20, dropout=0.0, bias=True),
    "dropout": dict(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=32, dropout=0.2, bias=True),
}


def nanogpt(path=None):
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(path or NANOGPT) / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(GPT, GPTConfig, config, steps=20):
    """Everything that a model answers from a seed, by nanoGPT's interface: weights, generator, losses, gradients, text."""
    torch.manual_seed(1337)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        model = GPT(GPTConfig(**config))
        optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    answers = {
        "printed": printed.getvalue(),
        "initial": {k: v.clone() for k, v in model.state_dict().items()},
        "generator": torch.get_rng_state(),
        "losses": [],
    }
    for step in range(steps):
        data = torch.randint(config["vocab_size"], (4, config["block_size"] - 3 + 1))
        x, y = data[:, :-1].contiguous(), data[:, 1:].contiguous()
        y[0, :5] = -1
        logits, loss = model(x, y)
        loss.backward()
        if step == 0:
            answers["logits"] = logits.detach()
            answers["gradients"] = {n: p.grad.clone() for n, p in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        answers["losses"].append(loss.item())
    answers["final"] = {k: v.clone() for k, v in model.state_dict().items()}
    model.eval()
    prompt = torch.arange(5)[None]
    answers["last logits"] = model(prompt)[0].detach()
    answers["text"] = model.generate(
        prompt, 60, temperature=0.8, top_k=10
    )  # beyond block_size, where the window slides
    answers["mfu"] = model.estimate_mfu(12, 0.5)
    return answers


@pytest.mark.parametrize("name", CONFIGS)
def test_every_answer_is_nanogpts(name):
    module = nanogpt()
    theirs, ours = run(module.GPT, module.GPTConfig, CONFIGS[name]), run(GPT, GPTConfig, CONFIGS[name])
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
    module = nanogpt()
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


FLAGS = """
    --dataset=letters --device=cpu --compile=False --n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4
    --gradient_accumulation_steps=2 --eval_interval=4 --eval_iters=2 --warmup_iters=2 --lr_decay_iters=8 --learning_rate=0.01
""".split()  # noqa: SIM905


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


if __name__ == "__main__":
    facts = {}
    module = nanogpt(sys.argv[1])
    for name in ("plain", "bias"):  # without dropout, whose draws on the CPU may differ between PyTorch's versions
        a = run(module.GPT, module.GPTConfig, CONFIGS[name])
        facts[name] = {
            "config": CONFIGS[name],
            "shapes": {k: list(v.shape) for k, v in a["initial"].items()},
            "initial_sums": {k: v.double().sum().item() for k, v in a["initial"].items()},
            "generator_sha256": hashlib.sha256(a["generator"].numpy().tobytes()).hexdigest(),
            "losses": a["losses"],
            "gradient_norms": {k: v.double().norm().item() for k, v in a["gradients"].items()},
            "printed": a["printed"],
        }
    Path(__file__).with_name("nanogpt_facts.json").write_text(json.dumps(facts, indent=1) + "\n")
