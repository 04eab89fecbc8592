"""Bad input: one line that names the file or flag, what is wrong and what to do; status 2, no traceback, nothing overwritten."""

import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY
from helpers import write_shard


@pytest.fixture
def refused(fastgpt, dataset):
    """Train with further flags to a refusal: the one line. What is in out/ must not change."""

    def run(*flags, command="train", base=("--dataset=letters", *TINY)):
        before = {f: open(f"out/{f}", "rb").read() for f in os.listdir("out")} if os.path.isdir("out") else {}
        status, _, err = fastgpt(command, *base, *flags)
        assert status == 2, err
        assert err.startswith("fastgpt: error: ")
        assert err.count("\n") == 1, "one line"
        assert "Traceback" not in err
        after = {f: open(f"out/{f}", "rb").read() for f in os.listdir("out")} if os.path.isdir("out") else {}
        assert after == before
        return err

    return run


def says(line, *parts):
    for part in parts:
        assert part in line


def test_missing_data(refused, dataset):
    says(
        refused("--dataset=nowhere"), "--dataset=nowhere", "data/nowhere", "fastgpt prepare", "--dataset=python-stdlib"
    )
    (dataset / "val.bin").unlink()
    says(refused(), "data/letters/val.bin", "cannot be read (No such file or directory)", "prepare")
    says(refused("--val_data=x/*.bin"), "x/*.bin", "cannot be read")
    says(refused("--dataset=nowhere", "--train_data=x"), "--val_data is missing")


@pytest.mark.parametrize("split", ["train", "val"])
def test_data_that_cannot_be(refused, dataset, split):
    path = dataset / f"{split}.bin"
    good = path.read_bytes()
    path.write_bytes(b"")
    says(refused(), f"data/letters/{split}.bin", "empty", "prepare the data again")
    path.write_bytes(good[:32])
    says(refused(), f"data/letters/{split}.bin", "16 tokens are too few for block_size=16", "--block_size")
    path.write_bytes(good[:-1])
    says(refused(), f"data/letters/{split}.bin", f"{len(good) - 1:,} bytes", "truncated")
    tokens = np.frombuffer(good, "<u2").copy()
    tokens[len(tokens) // 2] = 26
    path.write_bytes(tokens.tobytes())
    says(refused(), f"data/letters/{split}.bin", "token id 26 is not below vocab_size=26", "another tokenizer")
    write_shard(path, tokens[:100] % 26, count=101)
    says(refused(), f"data/letters/{split}.bin", "promises 101 tokens", "fetch it again")
    write_shard(path, tokens[:100] % 26, version=2)
    says(refused(), f"data/letters/{split}.bin", "its version is unknown")
    path.write_bytes(path.read_bytes()[:8])
    says(refused(), f"data/letters/{split}.bin", "truncated")
    write_shard(path, tokens[:100] % 26)
    assert path.stat().st_size == 1224


def test_ids_beyond_what_is_scanned_at_the_start_are_caught_when_read(dataset):
    from fastgpt.config import UserError
    from fastgpt.data import Batches, Draws, Tokens

    tokens = np.zeros(100, "<u2")
    tokens[90] = 26
    tokens.tofile(dataset / "late.bin")
    stream = Tokens([dataset / "train.bin", dataset / "late.bin"], 26)
    stream.check_ids(most=50)
    batches = Batches(stream, 1, 16, "cpu", Draws(left=torch.tensor([4500 + 80])))
    batches.prefetch()
    with pytest.raises(UserError, match=r"late\.bin: token id 26"):
        batches.get()


def test_a_damaged_meta(refused, dataset):
    (dataset / "meta.pkl").write_bytes(b"not a pickle")
    says(refused(), "data/letters/meta.pkl", "not the meta.pkl of a dataset", "prepare the data again")


def test_checkpoints_that_cannot_be(refused, train):
    resume = "--init_from=resume"
    says(refused(resume), "out/ckpt.pt", "there is no checkpoint", "--out_dir")
    train()
    says(refused(resume, "--n_layer=3"), "--n_layer=3", "out/ckpt.pt", "n_layer=2", "leave the flag out")
    says(refused(resume, "--block_size=32"), "--block_size=32", "block_size=16")
    for other in ("0000004", "best"):  # else they would take the damaged one's place
        os.remove(f"out/ckpt-{other}.pt")
    good = open("out/ckpt.pt", "rb").read()
    ckpt = torch.load("out/ckpt.pt", weights_only=True)

    def keep(**changes):
        torch.save({k: v for k, v in {**ckpt, **changes}.items() if v is not None}, "out/ckpt.pt")

    keep(model_args={**ckpt["model_args"], "n_embd": 32})
    flags = [f for f in TINY if "n_embd" not in f]
    says(
        refused(resume, base=("--dataset=letters", *flags)),
        "out/ckpt.pt",
        "weights are not those of its model_args",
        "(26, 16)",
        "not a tensor of (26, 32)",
    )
    keep(model=None)
    says(refused(resume), "out/ckpt.pt", "has no 'model'")
    keep(optimizer=None)
    says(refused(resume), "out/ckpt.pt", "optimizer state does not fit")
    keep(optimizer={**ckpt["optimizer"], "param_groups": ckpt["optimizer"]["param_groups"][:1]})
    says(refused(resume), "out/ckpt.pt", "optimizer state does not fit")
    keep(model={k: v for k, v in ckpt["model"].items() if "ln_f" not in k})
    says(refused(resume), "out/ckpt.pt", "Missing key", "ln_f")
    open("out/ckpt.pt", "wb").write(good[: len(good) // 2])
    says(refused(resume), "out/ckpt.pt", "truncated")
    says(refused("--out_dir=out", "--device=cpu", command="sample", base=()), "out/ckpt.pt", "truncated")


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c["model_args"].update(n_head=0),
        lambda c: c["model_args"].update(n_layer="x"),
        lambda c: c["model_args"].update(n_layer=10**9),
        lambda c: c["model_args"].update(vocab_size=None),
        lambda c: c["model_args"].update(extra=1),
        lambda c: c.update(model=[1]),
        lambda c: c.update(iter_num="a"),
        lambda c: c["optimizer"]["param_groups"][0].pop("betas"),
        lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
        lambda c: c["fastgpt"].pop("scaler"),
        lambda c: c["fastgpt"]["ranks"][0].update(rng=torch.zeros(3, dtype=torch.uint8)),
    ],
)
def test_a_damaged_checkpoint(refused, train, damage):
    train("--max_iters=2", "--eval_interval=2")
    ckpt = torch.load("out/ckpt.pt", weights_only=True)
    damage(ckpt)
    torch.save(ckpt, "out/ckpt.pt")
    says(refused("--init_from=resume", base=("--dataset=letters", *(f for f in TINY if "n_" not in f))), "out/ckpt.pt")


def test_another_tokenizers_data_is_not_gone_on_with(refused, train, dataset):
    """Of the same size, but other characters: the weights would be read as other text, and saved so."""
    train()
    itos = dict(enumerate("ZYXWVUTSRQPONMLKJIHGFEDCBA"))
    other = dataset.parent / "capitals"
    shutil.copytree(dataset, other)
    (other / "meta.pkl").write_bytes(
        pickle.dumps({"vocab_size": 26, "itos": itos, "stoi": {c: i for i, c in itos.items()}})
    )
    says(refused("--init_from=resume", "--dataset=capitals"), "--dataset=capitals", "out/ckpt.pt", "--dataset=letters")


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_checkpoint_that_would_run_code(refused, train):
    train("--max_iters=2")
    os.remove("out/ckpt-best.pt")
    torch.save({"model": Evil(), "model_args": {}}, "out/ckpt.pt")
    says(refused("--init_from=resume"), "out/ckpt.pt", "posix.system")
    assert not os.path.exists("pwned")


def test_an_out_dir_that_cannot_be_written(refused, workdir):
    (workdir / "file").write_text("")
    says(refused("--out_dir=file"), "--out_dir=file", "cannot be written", "another folder")
    says(refused("--out_dir=file/below"), "--out_dir=file/below", "cannot be written")
    says(refused("--out_dir=/proc/fastgpt"), "--out_dir=/proc/fastgpt", "cannot be written")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA: asking for it is no error")
def test_cuda_asked_for_and_absent(refused):
    says(refused("--device=cuda"), "--device=cuda", "no CUDA GPU", "--device=cpu")
    says(refused("--device=cuda", command="sample", base=()), "--device=cuda", "no CUDA GPU")


def test_devices_that_cannot_be(refused):
    says(refused("--device=cdua"), "--device=cdua", "no such device", "cpu")


def test_a_hub_that_cannot_be_reached(refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    says(refused("--init_from=gpt2"), "--init_from=gpt2", "no GPT-2 weights could be loaded")
    says(refused("--init_from=resme"), "--init_from=resme", "the nearest name is 'resume'")
    says(
        refused("--init_from=llama"),
        "--init_from=llama: there is no such folder",
        "known words are scratch, resume, auto, gpt2,",
    )


def test_what_is_not_installed(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    says(refused("--init_from=gpt2"), "--init_from=gpt2", "pip install huggingface_hub safetensors tokenizers")
    monkeypatch.setitem(sys.modules, "wandb", None)
    says(refused("--wandb_log=True"), "--wandb_log=True", "pip install wandb, or leave the flag out")
    says(refused("--tracker=wandb"), "--tracker=wandb", "pip install wandb")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    says(refused("--tracker=tensorboard"), "--tracker=tensorboard", "pip install tensorboard")


def test_wrong_flags_and_commands(refused):
    says(refused("--batch_sze=3"), "batch_sze", "'batch_size'")
    says(refused(command="trian", base=()), "there is no command 'trian'; the nearest is 'train'")
    says(refused(command="frob", base=()), "there is no command 'frob'; fastgpt --help lists them")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--input=nowhere", "--out=data/x"], ["--input=nowhere", "no such file"]),
        (["--out=data/x"], ["--input", "missing"]),
        (["--input=in.txt"], ["--out", "missing"]),
        (["--input=in.txt", "--out=data/x", "--tokenizer=gtp2"], ["tokenizer gtp2", "gpt2"]),
        (["--input=empty.txt", "--out=data/x"], ["--input=empty.txt", "no text"]),
        (["--input=latin.txt", "--out=data/x", "--tokenizer=chars"], ["latin.txt", "not UTF-8", "--tokenizer=bytes"]),
        (["--input=binary", "--out=data/x"], ["--input=binary", "no text", "1 binary, 1 not UTF-8"]),
        (["--input=in.txt", "--out=data/x", "--field=a"], ["--field=a", "no .jsonl", "leave the flag out"]),
        (["--input=in.txt", "--out=data/x", "--val_fraction=1"], ["--val_fraction", "less than 1"]),
        (["--input=one.jsonl", "--out=data/x"], ["--input=one.jsonl", "one row"]),
        (["--input=a.jsonl.zst", "--out=data/x"], ["--input=a.jsonl.zst", "zstd -d"]),
        (["--input=in.txt", "--out=in.txt"], ["in.txt: cannot be written"]),
    ],
)
def test_preparing_what_cannot_be(refused, workdir, flags, said):
    (workdir / "in.txt").write_text("some text")
    (workdir / "empty.txt").write_text("")
    (workdir / "latin.txt").write_bytes("né".encode("latin-1"))
    (workdir / "binary").mkdir()
    (workdir / "binary/a").write_bytes(b"text\0" * 9)
    (workdir / "binary/b.txt").write_bytes("né".encode("latin-1"))
    (workdir / "one.jsonl").write_text('{"text": "some text"}\n')
    (workdir / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    says(refused(*flags, command="prepare", base=()), *said)
    assert not (workdir / "data/x").exists()


def test_gpt2s_table_without_the_network(refused, workdir, monkeypatch):
    import tiktoken
    from requests import ConnectionError

    def unreachable(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    (workdir / "in.txt").write_text("some text")
    line = refused("--input=in.txt", "--out=data/x", "--tokenizer=gpt2", command="prepare", base=())
    says(line, "tokenizer gpt2", "network", "TIKTOKEN_CACHE_DIR", "--tokenizer=bytes")


def test_a_real_process_exits_with_2_and_one_line(dataset):
    done = subprocess.run(
        [sys.executable, "-m", "fastgpt.cli", "train", "--dataset=nowhere", *TINY], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["prepare", "--input=LONG", "--out=x"],
        ["export", "--out_dir=LONG"],
        ["export", "--format=hf", "--to=LONG"],
        ["sample", "--out_dir=LONG"],
        ["train", "--dataset=LONG"],
    ],
)
def test_a_path_that_cannot_be_looked_up_is_a_line(workdir, fastgpt, words):
    """As a name that is too long; a folder that this user may not search is another."""
    status, _, err = fastgpt(*[word.replace("LONG", "x" * 300) for word in words])
    assert (status, err.count("\n")) == (2, 1)
    assert "x" * 300 in err
    assert "File name too long" in err
