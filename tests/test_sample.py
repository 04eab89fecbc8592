"""Sampling: nanoGPT's flags, every tokenizer's text, and prompts that cannot be."""

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt import data, tokenizer


@pytest.fixture
def trained(train, tmp_path_factory):
    """A run of long enough to sample from, in out/; trained once."""
    kept = tmp_path_factory.getbasetemp() / "trained"
    if not kept.exists():
        train("--max_iters=150", "--lr_decay_iters=150", "--eval_interval=150", f"--out_dir={kept}")
    shutil.copytree(kept, "out")


SMALL = ("--device=cpu", "--num_samples=2", "--max_new_tokens=12")


def test_samples_are_what_was_learned(trained, fastgpt):
    status, out, err = fastgpt("sample", *SMALL, "--start=bbbccc", "--temperature=0")
    assert status == 0, err
    first, second, rest = out.removeprefix("number of parameters: 0.01M\n").split("\n---------------\n")
    assert (first, rest) == (second, "")
    assert len(first) == 18
    assert first.startswith("bbbcccdd")


def test_a_seed_decides_and_a_file_may_hold_the_prompt(trained, fastgpt, workdir):
    (workdir / "prompt.txt").write_text("abc")
    runs = [
        fastgpt("sample", *SMALL, f"--start={s}", f"--seed={seed}")[1]
        for s, seed in (("abc", 1), ("FILE:prompt.txt", 1), ("abc", 2))
    ]
    assert runs[0] == runs[1] != runs[2]


def test_the_checkpoint_brings_its_tokenizer(trained, fastgpt, dataset):
    (dataset / "meta.pkl").unlink()
    assert fastgpt("sample", *SMALL, "--start=abc")[0] == 0


def test_nanogpts_checkpoint_takes_the_datasets_meta(trained, fastgpt, dataset):
    ckpt = torch.load("out/ckpt.pt", weights_only=True)
    del ckpt["fastgpt"]
    torch.save(ckpt, "out/ckpt.pt")
    assert fastgpt("sample", *SMALL, "--start=abc")[0] == 0
    (dataset / "meta.pkl").rename("elsewhere")
    status, out, err = fastgpt("sample", *SMALL, "--start=abc")
    assert status == 2
    assert "No meta.pkl found, assuming GPT-2 encodings..." in out
    assert err.count("\n") == 1


def test_only_ids_that_the_tokenizer_decodes(trained, fastgpt, dataset):
    """A vocabulary padded beyond the tokenizer's, as 50304 is beyond GPT-2's 50257: the padding is never drawn."""
    ckpt = torch.load("out/ckpt.pt", weights_only=True)
    ckpt["model_args"]["vocab_size"] = 64
    padded = torch.cat((ckpt["model"]["lm_head.weight"], ckpt["model"]["lm_head.weight"][:1].repeat(38, 1) * 50))
    ckpt["model"]["lm_head.weight"] = ckpt["model"]["transformer.wte.weight"] = padded
    torch.save(ckpt, "out/ckpt.pt")
    status, out, err = fastgpt("sample", *SMALL, "--start=abc", "--temperature=5", "--top_k=0", "--max_new_tokens=200")
    assert status == 0, err
    assert len(out.split("\n---------------\n")[1]) == 203


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("", "--start: the prompt is empty"),
        ("abc!", "the character '!' is not among the 26"),
        ("FILE:nowhere", "--start=FILE:nowhere: the file cannot be read"),
    ],
)
def test_prompts_that_cannot_be(trained, fastgpt, start, said):
    status, _, err = fastgpt("sample", *SMALL, f"--start={start}")
    assert status == 2
    assert said in err
    assert err.count("\n") == 1


def test_bytes_end_to_end_by_the_module(workdir, fastgpt):
    """From a text file to its continuation, with `python -m fastgpt.sample`."""
    (workdir / "in.txt").write_text("hé☃ " * 2000, encoding="utf-8")
    assert fastgpt("prepare", "--input", "in.txt", "--tokenizer", "bytes", "--out", "data/snow")[0] == 0
    flags = """--dataset=snow --device=cpu --compile=False --n_layer=1 --n_head=2 --n_embd=32 --block_size=16
        --batch_size=16 --gradient_accumulation_steps=1 --max_iters=60 --lr_decay_iters=60 --warmup_iters=5
        --learning_rate=0.02 --eval_interval=60 --eval_iters=2"""
    assert fastgpt("train", *flags.split())[0] == 0
    command = [sys.executable, "-m", "fastgpt.sample", *SMALL, "--start=hé", "--top_k=1", "--max_new_tokens=16"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "hé☃ hé☃" in done.stdout
    meta = data.load_meta("data/snow")
    assert tokenizer.from_meta(meta).n_vocab == 256
    assert pickle.loads(Path("data/snow/meta.pkl").read_bytes()) == meta
