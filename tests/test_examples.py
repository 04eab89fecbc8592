"""The recipes of examples/: each runs as it stands, at toy size; and a run's log in the form of the speedruns."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import LOOPBACK
from helpers import write_shard
from pages import ROOT, check, commands

EXAMPLES = ROOT / "examples"
RECIPES = sorted(path.name for path in EXAMPLES.glob("*.sh"))
TOY = """
    --device=cpu --compile=False --block_size=16 --batch_size=2 --gradient_accumulation_steps=2 --max_iters=4 --lr_decay_iters=4
    --warmup_iters=1 --eval_interval=2 --eval_iters=2 --log_interval=1 --sample_tokens=0
""".split()  # noqa: SIM905
SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=16"]


def test_every_recipe_parses_and_is_listed():
    table = (EXAMPLES / "README.md").read_text()
    for name in RECIPES:
        text = (EXAMPLES / name).read_text()
        assert f"]({name})" in table
        assert os.access(EXAMPLES / name, os.X_OK), name
        assert '"$@"' in text, name
        ours = list(commands(text))
        assert any(words[0] == "train" for words in ours), name
        for words in ours:
            assert check([w for w in words if w != "$@"]) == "", name


def run(recipe, folder, *flags, **environment):
    """Run a recipe in a folder with more flags, as a user does: what it prints. It must end well."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [EXAMPLES / recipe, *TOY, *flags], cwd=folder, capture_output=True, text=True,
        env={**os.environ, **LOOPBACK, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def shards(workdir):
    """A function that writes a dataset of GPT-2 tokens in llm.c's shards, with these names: 3,000 tokens in each."""

    def write(name, *files):
        (workdir / "data" / name).mkdir(parents=True)
        for i, file in enumerate(files):
            write_shard(workdir / "data" / name / file, (np.arange(3000) * (7 + i)) % 101)

    return write


@pytest.mark.slow
def test_embedded_text_on_a_cpu(workdir, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp().parent / "docs-cache"  # the one of tests/test_docs.py
    assert "iteration 4: " in run("embedded_text_cpu.sh", workdir, *SMALL, FASTGPT_CACHE=str(cache))
    assert records(workdir / "out-embedded-text")[-1]["iter"] == 4


@pytest.mark.slow
def test_shakespeare_by_characters(workdir):
    (workdir / "input.txt").write_text("To be, or not to be, that is the question.\n" * 40)
    run("shakespeare_char.sh", workdir, *SMALL)
    assert records(workdir / "out-shakespeare-char")[-1]["iter"] == 4


@pytest.mark.slow
def test_finetuning_gpt2(workdir):
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=101, n_positions=32))
    theirs.save_pretrained(workdir / "small-gpt2")
    (workdir / "data/finetune").mkdir(parents=True)
    for split in ("train", "val"):
        (np.arange(1000) % 101).astype("<u2").tofile(workdir / f"data/finetune/{split}.bin")
    assert "small-gpt2" in run("finetune_gpt2.sh", workdir, "--init_from=small-gpt2")
    assert records(workdir / "out-finetune")[-1]["iter"] == 4


@pytest.mark.slow
def test_gpt2_on_one_gpu_and_on_several(workdir, shards):
    """Here on the CPU, and on two processes by gloo: the same batch, so nearly the same losses."""
    shards("openwebtext", "train_000001.bin", "val_000000.bin")
    flags = *SMALL, "--dtype=float32"
    run("gpt2_124m_1gpu.sh", workdir, *flags, "--out_dir=alone")
    run("gpt2_124m_8gpu.sh", workdir, *flags, "--backend=gloo", "--out_dir=two", NPROC="2")
    alone, two = (records(workdir / name) for name in ("alone", "two"))
    assert [r["iter"] for r in alone] == [r["iter"] for r in two]
    assert two[0]["val_loss"] == pytest.approx(alone[0]["val_loss"], abs=1e-4)


@pytest.mark.slow
def test_to_a_loss_and_its_log(workdir, shards):
    shards("fineweb10B", "fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin")
    said = run("gpt2_3.28_1gpu.sh", workdir, *SMALL, OUT="run")
    log = (workdir / "run/speedrun.txt").read_text()
    evaluations = [r for r in records(workdir / "run") if "val_loss" in r]
    assert [r["iter"] for r in evaluations] == [0, 2, 4]
    assert log.splitlines()[-1] == said.splitlines()[-1]
    assert said.splitlines()[-1].startswith(f"step:4/4 val_loss:{evaluations[-1]['val_loss']:.4f} train_time:")
    assert (ROOT / "kernels/attention.py").read_text() in log
    first = run("gpt2_3.28_1gpu.sh", workdir, *SMALL, "--target_loss=1000", OUT="early").splitlines()[-1]
    assert first.startswith("step:0/4 "), "the first evaluation is below the target"


def test_a_log_in_the_form_of_the_speedruns(workdir):
    (workdir / "out").mkdir()
    (workdir / "out/config.json").write_text('{"settings": {"max_iters": 8}}')
    log = runpy.run_path(str(EXAMPLES / "speedrun_log.py"))
    lines = [
        dict(iter=0, val_loss=10.8258, train_s=0.0),
        dict(iter=4, loss=3.0),
        dict(iter=8, val_loss=3.27996, train_s=1.4724),
    ]
    (workdir / "out/metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    assert log["lines"]("out") == [
        "step:0/8 val_loss:10.8258 train_time:0ms step_avg:nanms",
        "step:8/8 val_loss:3.2800 train_time:1472ms step_avg:184.05ms",
    ]
    assert "# kernels/adamw.py\n" in log["code"]()
    assert "# fastgpt/trainer.py\n" in log["code"]()
