"""A run from the command line: what it prints, counts, writes and resumes, alone and in parallel."""

import errno
import io
import json
import os
import re
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import LOOPBACK, SECONDS, TINY, command, in_two_processes

from fastgpt import distributed, files, metrics, plot
from fastgpt.cli import main
from fastgpt.model import GPT, GPTConfig

PNG = b"\x89PNG\r\n\x1a\n"


def saved(out_dir="out"):
    return torch.load(Path(out_dir) / "ckpt.pt", weights_only=True)


def equal(a, b):
    return all(torch.equal(v, b["model"][k]) for k, v in a["model"].items()) and a["model"].keys() == b["model"].keys()


def records(out_dir="out"):
    return [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_prints_writes_and_learns(train):
    out = train("--max_iters=60", "--lr_decay_iters=60", "--eval_interval=20", "--sample_tokens=30")
    for line in (
        "tokens per iteration will be: 128",
        "found vocab_size = 26 (inside data/letters/meta.pkl)",
        "Initializing a new model from scratch",
        "number of parameters: 0.01M",
        "using fused AdamW: False",
        "saving checkpoint to out",
    ):
        assert line in out, line
    steps = re.findall(r"^iter (\d+): loss (\d+\.\d{4}), time \d+\.\d\dms, [\d,]+ tok/s$", out, re.M)
    evaluations = re.findall(r"^step (\d+): train loss (\d+\.\d{4}), val loss (\d+\.\d{4})$", out, re.M)
    assert [int(i) for i, _ in steps] == list(range(60))  # the stated number of updates
    assert [int(i) for i, *_ in evaluations] == [0, 20, 40, 60]
    assert float(evaluations[0][2]) > 3.0 > 1.6 > float(evaluations[-1][2])
    final = re.search(r"^iteration 60: train loss ([\d.]+), val loss ([\d.]+) nats per token$", out, re.M)
    assert final.groups() == evaluations[-1][1:]
    assert re.search(r"^60 iterations in [\d.]+ s, evaluations apart; [\d,]+ tok/s$", out, re.M)
    assert re.search(r"^a sample:\n-+\n[a-z]{31}\n-+$", out, re.M)
    for path in ("out/ckpt.pt", "out/metrics.jsonl", "out/loss.png"):
        assert path in out
        assert Path(path).exists()
    assert Path("out/loss.png").read_bytes().startswith(PNG)


def test_metrics_are_an_object_a_line(train):
    train("--log_interval=3")
    steps = [r for r in records() if "loss" in r]
    evaluations = [r for r in records() if "val_loss" in r]
    assert [r["iter"] for r in steps] == [0, 3, 6]
    keys = {"iter", "loss", "lr", "grad_norm", "dt_ms", "tokens_per_s", "mfu", "tokens", "train_s"}
    assert all(set(r) == keys for r in steps)
    assert [r["iter"] for r in evaluations] == [0, 4, 8]
    assert all(set(r) == {"iter", "train_loss", "val_loss", "tokens", "train_s"} for r in evaluations)
    assert all(r["mfu"] is None for r in steps)  # a CPU's peak is not known
    assert all(r["tokens_per_s"] == pytest.approx(128 / r["dt_ms"] * 1e3) for r in steps)
    assert [r["lr"] for r in steps] == pytest.approx(
        [
            0.01 / 3,
            6e-5 + 0.5 * (1 + torch.tensor(torch.pi / 6).cos().item()) * (0.01 - 6e-5),
            6e-5 + 0.5 * (1 + torch.tensor(torch.pi * 4 / 6).cos().item()) * (0.01 - 6e-5),
        ],
        rel=1e-5,
    )


def test_mfu_is_over_the_peak_given(train):
    out = train("--peak_flops=1e12")
    config = saved()["model_args"]
    model = GPT(GPTConfig(**config))
    step = [r for r in records() if "loss" in r][-1]
    assert step["mfu"] == pytest.approx(model.flops_per_token() * step["tokens_per_s"] / 1e12)
    assert re.search(r"ms, mfu \d+\.\d\d%, [\d,]+ tok/s", out)


def test_the_checkpoint_is_nanogpts(train):
    train()
    ckpt = saved()
    assert list(ckpt)[:6] == ["model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"]
    assert set(ckpt) - {"fastgpt"} == set(list(ckpt)[:6])
    assert ckpt["iter_num"] == 8
    assert ckpt["model_args"] == dict(
        n_layer=2, n_head=2, n_embd=16, block_size=16, bias=False, vocab_size=26, dropout=0.0
    )
    assert ckpt["config"]["dataset"] == "letters"
    assert isinstance(ckpt["best_val_loss"], torch.Tensor)
    model = GPT(GPTConfig(**ckpt["model_args"]))
    assert list(ckpt["model"]) == list(model.state_dict())
    assert (
        ckpt["model"]["lm_head.weight"].data_ptr() == ckpt["model"]["transformer.wte.weight"].data_ptr()
    )  # stored once
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    optimizer.load_state_dict(ckpt["optimizer"])
    assert len(optimizer.state) == len(list(model.parameters()))


@pytest.mark.parametrize(
    "flags", [[], ["--dropout=0.2"], ["--eval_seed=5", "--dropout=0.1"], ["--always_save_checkpoint=False"]], ids=str
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(train, flags):
    train(*flags, "--out_dir=whole", "--max_iters=12", "--lr_decay_iters=12")
    train(*flags, "--out_dir=parts", "--max_iters=8", "--lr_decay_iters=12")
    # Stopped at an evaluation, as by a crash behind it: what follows must not depend on where.
    out = train(*flags, "--out_dir=parts", "--max_iters=12", "--lr_decay_iters=12", "--init_from=resume")
    assert "Resuming training from parts" in out
    assert equal(saved("whole"), saved("parts"))
    keep = ("iter", "loss", "lr", "grad_norm", "train_loss", "val_loss")
    assert [{k: r[k] for k in keep if k in r} for r in records("parts")] == [
        {k: r[k] for k in keep if k in r} for r in records("whole")
    ]


def test_a_run_stopped_between_evaluations_goes_on_from_its_checkpoint(train):
    train("--out_dir=whole", "--max_iters=8")
    train("--out_dir=parts", "--max_iters=6")  # evaluated and saved at 4 and, as its end, at 6
    train("--out_dir=parts", "--max_iters=8", "--init_from=resume")
    # The evaluation at 6 is drawn only by the run that ended there; the batches behind it are the same.
    assert equal(saved("whole"), saved("parts"))
    assert [r["iter"] for r in records("parts") if "loss" in r] == list(range(8))


def test_nanogpts_own_checkpoint_resumes(train):
    """No extra keys, compiled names, a best loss as a tensor."""
    train()
    ckpt = saved()
    del ckpt["fastgpt"]
    ckpt["model"] = {f"_orig_mod.{k}": v for k, v in ckpt["model"].items()}
    torch.save(ckpt, "out/ckpt.pt")
    train("--init_from=resume", "--max_iters=10")
    assert saved()["iter_num"] == 10


def test_resume_keeps_the_optimizers_settings_but_for_flags_given(train):
    train("--beta2=0.99", "--weight_decay=0.2")
    train("--init_from=resume", "--max_iters=9", "--beta1=0.8")
    assert saved()["optimizer"]["param_groups"][1]["betas"] == (0.8, 0.99)
    decay, no_decay = saved()["optimizer"]["param_groups"]
    assert (decay["betas"], decay["weight_decay"], no_decay["weight_decay"]) == ((0.8, 0.99), 0.2, 0.0)
    train("--init_from=resume", "--max_iters=10", "--weight_decay=0.3", "--beta2=0.9")
    assert saved()["optimizer"]["param_groups"][0]["betas"] == (0.8, 0.9)
    assert saved()["optimizer"]["param_groups"][0]["weight_decay"] == 0.3


def test_resume_may_crop_the_block_size(train):
    train()
    train("--init_from=resume", "--max_iters=9", "--block_size=8")
    assert saved()["model_args"]["block_size"] == 8
    assert saved()["model"]["transformer.wpe.weight"].shape == (8, 16)


def test_eval_only_evaluates_once_even_on_resume_and_writes_no_checkpoint(train):
    train()
    before, lines = Path("out/ckpt.pt").read_bytes(), records()
    out = train("--init_from=resume", "--eval_only=True", "--max_iters=100")
    assert out.count("step ") == 1
    assert "step 8: " in out
    assert "iter 8" not in out
    assert Path("out/ckpt.pt").read_bytes() == before
    assert records()[:-1] == lines
    assert records()[-1]["iter"] == 8


def test_the_best_checkpoint_stays_unless_always_save(train):
    flags = [
        "--learning_rate=0.5",
        "--warmup_iters=4",
        "--decay_lr=True",
        "--grad_clip=0.0",
        "--max_iters=8",
        "--eval_interval=1",
    ]
    train("--always_save_checkpoint=False", *flags)
    losses = {r["iter"]: r["val_loss"] for r in records() if "val_loss" in r and r["iter"] > 0}
    first = next(r["val_loss"] for r in records() if "val_loss" in r)
    best = min(losses, key=losses.get)
    assert best != 8, "the run is meant to get worse"
    assert losses[best] < first
    assert saved()["iter_num"] == best
    train(*flags, "--overwrite")
    assert saved()["iter_num"] == 8
    assert float(saved()["best_val_loss"]) == pytest.approx(min([first, *losses.values()]))  # the best, not the last


def test_eval_seed_frees_the_training_from_the_evaluations(train):
    for name, flags in {
        "a": [],
        "b": ["--eval_iters=5"],
        "c": ["--eval_seed=3"],
        "d": ["--eval_seed=3", "--eval_iters=5", "--eval_interval=3"],
    }.items():
        train(f"--out_dir={name}", *flags)
    assert not equal(saved("a"), saved("b"))  # nanoGPT's coupling, and the default
    assert equal(saved("c"), saved("d"))
    train("--out_dir=e", "--eval_seed=3", "--max_iters=0")
    train("--out_dir=f", "--eval_seed=3", "--max_iters=0")
    (e,), (f,) = records("e"), records("f")
    assert e | {"train_s": 0} == f | {"train_s": 0}


def test_eval_windows_first_evaluates_a_fixed_part_of_each_split(train, dataset):
    """The mean loss of the first eval_iters * batch_size windows, in order, at every evaluation; training does not see it."""
    first = ["--eval_windows=first", "--eval_interval=8"]
    train("--out_dir=a", *first)
    train("--out_dir=b", *first, "--eval_iters=5", "--eval_interval=3")
    assert equal(saved("a"), saved("b"))
    model = GPT(GPTConfig(**saved("a")["model_args"]))
    model.load_state_dict(saved("a")["model"])
    last = records("a")[-1]
    for split in ("train", "val"):
        tokens = torch.from_numpy(np.fromfile(dataset / f"{split}.bin", "<u2", 2 * 4 * 16 + 1).astype("i8"))
        with torch.no_grad():
            loss = model.eval()(tokens[:-1].view(8, 16), tokens[1:].view(8, 16))[1].item()
        assert last[f"{split}_loss"] == pytest.approx(loss, rel=1e-5)


def test_eval_windows_first_refuses_a_split_that_is_too_short(fastgpt, dataset):
    """In 500 tokens there are 31 windows of 16, and the token behind the last one."""
    words = "train", "--dataset=letters", *TINY, "--eval_windows=first", "--max_iters=0"
    assert fastgpt(*words, "--eval_iters=7")[0] == 0
    status, _, err = fastgpt(*words, "--eval_iters=8", "--overwrite")
    assert status == 2
    assert "val.bin: the first 32 windows of 16 tokens need 513 tokens, and there are 500" in err


def test_a_seed_decides_everything(train):
    train("--out_dir=a", "--seed=1")
    train("--out_dir=b", "--seed=1")
    train("--out_dir=c", "--seed=2")
    assert equal(saved("a"), saved("b"))
    assert not equal(saved("a"), saved("c"))


def test_compiled_training_is_the_same_training(train):
    train("--out_dir=eager", "--n_layer=1")
    out = train("--out_dir=compiled", "--n_layer=1", "--compile=True")
    assert "compiling the model..." in out
    a, b = saved("eager"), saved("compiled")
    assert list(a["model"]) == list(b["model"])  # no _orig_mod. in the file
    for k, v in a["model"].items():
        torch.testing.assert_close(b["model"][k], v, rtol=1e-3, atol=1e-4)


def test_each_split_is_evaluated_on_its_own_data(train, dataset):
    torch.randint(26, (500,)).to(torch.uint16).numpy().tofile(dataset / "val.bin")  # nothing there to learn
    train("--max_iters=60", "--lr_decay_iters=60", "--eval_interval=60")
    final = records()[-1]
    assert final["val_loss"] > 3 > final["train_loss"] + 0.5


def test_settings_reach_the_optimizer(train):
    train("--out_dir=a", "--grad_clip=0.0")
    train("--out_dir=b", "--grad_clip=0.01")
    assert not equal(saved("a"), saved("b"))
    decay, no_decay = saved("a")["optimizer"]["param_groups"]
    assert decay["lr"] == no_decay["lr"] == pytest.approx(6e-5)  # min_lr, at the end


def test_a_run_from_scratch_begins_its_files_anew(train):
    train()
    first = len(records())
    train("--overwrite")
    assert len(records()) == first
    out = train("--out_dir=none", "--max_iters=0")
    assert "checkpoint: none saved" in out
    assert not Path("none/ckpt.pt").exists()


def test_a_resumed_run_knows_the_best_loss_yet(train):
    train()
    ckpt = saved()
    ckpt["best_val_loss"] = torch.tensor(0.0)
    torch.save(ckpt, "out/ckpt.pt")
    train("--init_from=resume", "--max_iters=12", "--always_save_checkpoint=False")
    assert saved()["iter_num"] == 8


def test_the_clock_counts_training_alone(monkeypatch):
    now = 0.0
    synced = []
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    clock = metrics.Clock(lambda: synced.append(now))
    clock.start()
    for seconds, iterations, expected in ((10, 1, 10), (4, 2, 2), (6, 2, 3)):
        now += seconds
        clock.iterations += iterations
        clock.stop()
        now += 100  # an evaluation
        clock.start()
        assert clock.lap() == expected
    assert clock.seconds == 20
    assert clock.iterations_per_s() == 4 / 10  # without the first lap, which compiled
    assert len(synced) == 6


def test_gpt2s_weights_are_finetuned(train, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=26, n_positions=32)).save_pretrained(
        tmp_path / "gpt2-x"
    )
    out = train(f"--init_from={tmp_path / 'gpt2-x'}", "--dropout=0.1")
    assert "Initializing from OpenAI GPT-2 weights" in out
    args = saved()["model_args"]
    assert (args["block_size"], args["bias"], args["dropout"]) == (16, True, 0.1)  # cropped to the run's


def torchrun(*flags):
    """train.py in two processes by torchrun itself, to success: its stdout."""
    script = Path(__file__).parents[1] / "train.py"
    words = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2", script]
    words += ["--dataset=letters", *TINY, *flags]
    env = {**os.environ, **LOOPBACK, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, timeout=SECONDS)
    except subprocess.TimeoutExpired as e:
        pytest.fail(f"{e}\n{e.stdout}\n{e.stderr}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def leave_no_ddp(*words):
    """A command line, to success; where the process group ends nothing of DDP is left that would keep its threads."""
    made, left, wrap, leave = [], [], distributed.wrap, torch.distributed.destroy_process_group

    def wrapped(model, world):
        parallel = wrap(model, world)
        made.append(weakref.ref(parallel))
        return parallel

    def destroy():
        left.append(made[0]())
        leave()

    with patch.object(distributed, "wrap", wrapped), patch.object(torch.distributed, "destroy_process_group", destroy):
        command(*words)
    assert left == [None]


def test_two_processes_share_the_work_and_agree(dataset):
    """Under torchrun: one process speaks, gradients are averaged over both, and resuming is exact."""
    out = torchrun("--out_dir=whole", "--dropout=0.1")
    assert out.count("tokens per iteration will be: 128") == 1
    assert out.count("iter 7: ") == 1
    flags = ["train", "--dataset=letters", *TINY]
    in_two_processes(command, *flags, "--out_dir=parts", "--max_iters=4", "--dropout=0.1")
    in_two_processes(command, *flags, "--out_dir=parts", "--dropout=0.1", "--init_from=resume")
    assert equal(saved("whole"), saved("parts"))
    # By hand: each rank's first batch is drawn from seed + rank after the init; the step takes the mean over both.
    losses = []
    for rank in (0, 1):
        torch.manual_seed(1337 + rank)
        model = GPT(GPTConfig(block_size=16, vocab_size=26, n_layer=2, n_head=2, n_embd=16, bias=False))
        tokens = torch.frombuffer(bytearray((dataset / "train.bin").read_bytes()), dtype=torch.uint16).long()
        ix = torch.randint(len(tokens) - 16, (4,))
        x, y = (torch.stack([tokens[i + d : i + d + 16] for i in ix]) for d in (0, 1))
        if rank == 0:
            weights = model.state_dict()
        model.load_state_dict(weights)  # DDP broadcasts rank 0's
        losses.append(model(x, y)[1].item())
    in_two_processes(leave_no_ddp, *flags, "--out_dir=plain", "--max_iters=1")
    first = next(r for r in records("plain") if "loss" in r)
    assert first["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def refused(*words):
    try:
        status = main(list(words))
    except SystemExit as e:  # of a rank that leaves it to rank 0 to say why
        status = e.code
    assert status == 2


def test_accumulation_that_the_processes_cannot_share_is_refused(dataset):
    said = in_two_processes(refused, "train", "--dataset=letters", *TINY, "--gradient_accumulation_steps=3")
    assert "--gradient_accumulation_steps=3 cannot be shared by 2 processes; the nearest multiple is 4" in said


class Filling(io.FileIO):
    """A file on a disk that is full before long."""

    room = 20_000

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def on_disk(new):
    """`open` where `new` opens the files that are made anew."""
    return lambda path, mode, **how: (new if mode == "xb" else open)(path, mode, **how)


@pytest.mark.parametrize("size", [4_000, 20_000])  # of metrics too; torch's writer answers each with another error
def test_a_full_disk_while_saving_leaves_the_last_checkpoint(train, fastgpt, monkeypatch, size):
    train()
    before = Path("out/ckpt.pt").read_bytes()
    monkeypatch.setattr(Filling, "room", size)
    monkeypatch.setattr(files, "open", on_disk(Filling), raising=False)
    status, out, err = fastgpt("train", "--dataset=letters", *TINY, "--init_from=resume", "--max_iters=12")
    assert status == 2
    reason = "cannot be saved (No space left on device); the last checkpoint is of iteration 8"
    assert f"\nout/ckpt.pt: iteration 8 {reason}; the next save tries again\n" in out
    assert "\niter 11: " in out  # the run went on
    assert "checkpoint: none saved\n" in out
    assert err == f"fastgpt: error: out/ckpt.pt: iteration 12 {reason}\n"
    assert Path("out/ckpt.pt").read_bytes() == before
    kept = {
        "ckpt.pt",
        "ckpt-0000008.pt",
        "ckpt-0000004.pt",
        "ckpt-best.pt",
        "loss.png",
        "metrics.jsonl",
        "train.log",
        "config.json",
    }
    assert set(os.listdir("out")) == kept
    assert os.path.samefile("out/ckpt.pt", "out/ckpt-0000008.pt")  # it was to be kept beside the new one


def test_a_disk_with_room_again(train, monkeypatch):
    """config.json and the saves at 4 and 8 fail, the one at 12 does not: the run ends well."""
    opened = []

    def full_twice(path, mode, **how):
        opened.append(path)
        return (Filling if len(opened) < 4 else open)(path, mode, **how)

    monkeypatch.setattr(files, "open", on_disk(full_twice), raising=False)
    monkeypatch.setattr(metrics, "replacing", nullcontext)  # there is no file of metrics yet
    out = train("--max_iters=12")
    assert [line[:29] for line in out.splitlines() if line.startswith("out/ckpt.pt")] == [
        "out/ckpt.pt: iteration 4 cann",
        "out/ckpt.pt: iteration 8 cann",
        "out/ckpt.pt: saved again, at ",
    ]
    assert saved()["iter_num"] == 12


def test_a_compiler_that_fails_is_one_line(dataset):
    env = {**os.environ, "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(dataset / "cache")}
    command = [sys.executable, "-m", "fastgpt.cli", "train", "--dataset=letters", *TINY, "--compile=True"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2, done.stderr
    assert "fastgpt: error: --compile=True: torch.compile failed" in done.stderr
    assert done.stderr.strip().endswith("give --compile=False")


def test_odd_files_in_out_dir(train, fastgpt):
    train()
    Path("out/metrics.jsonl").write_bytes(b'{"foo": 1}\n[2]\n{"iter": 0, "loss": 1.0}\n\xff\n')
    train("--init_from=resume", "--max_iters=9")
    assert records()[0] == {"iter": 0, "loss": 1.0}
    Path("out/loss.png").unlink()
    Path("out/loss.png").mkdir()
    assert "no loss curve: " in train("--overwrite")
    Path("out/metrics.jsonl").unlink()
    Path("out/metrics.jsonl").mkdir()
    status, _, err = fastgpt("train", "--dataset=letters", *TINY, "--overwrite")
    assert status == 2
    assert "out/metrics.jsonl: cannot be written (Is a directory)" in err


def test_a_terminal_gets_a_progress_bar(dataset):
    """In a pseudo-terminal: a bar with loss, speed and time left, and the evaluations as lines."""
    import fcntl
    import pty
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "fastgpt.cli", "train", "--dataset=letters", *TINY, "--max_iters=40", "--peak_flops=1e12"],
        stdout=slave, stderr=slave, env={**os.environ, "COLUMNS": "120", "TERM": "xterm"},
    )  # fmt: skip
    os.close(slave)
    seen = b""
    while True:
        try:
            chunk = os.read(master, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        seen += chunk
    assert process.wait() == 0
    text = seen.decode()
    assert re.search(r"100%\|█+\| 40/40 \[\d\d:\d\d<\d\d:\d\d, .*loss \d\.\d{4}, mfu \d+\.\d\d%, [\d,]+ tok/s\]", text)
    assert "step 40: train loss" in text
    assert "iter 3: loss" not in text


def test_the_plot_shows_both_curves(tmp_path):
    path = tmp_path / "loss.png"
    plot.plot_losses(
        [{"iter": 0, "train_loss": 3.0, "val_loss": 3.1}, {"iter": 0, "loss": 3.0}, {"iter": 1, "loss": None}],
        path,
        "t",
    )
    assert path.read_bytes().startswith(PNG)
    empty = path.stat().st_size
    plot.plot_losses(
        [{"iter": i, "loss": 3.0 - i / 99} for i in range(99)] + [{"iter": 98, "train_loss": 2.0, "val_loss": 2.1}],
        path,
        "t",
    )
    assert path.stat().st_size > empty


def test_a_metrics_line_cut_short_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iter": 0, "loss": 1}\n{"iter": 1, "lo')
    assert metrics.read_metrics(tmp_path / "metrics.jsonl") == [{"iter": 0, "loss": 1}]
    file = metrics.MetricsFile(tmp_path, keep_before=5)
    file.write(iter=5, loss=float("nan"), lr=1.0)
    file.close()
    assert metrics.read_metrics(tmp_path / "metrics.jsonl") == [
        {"iter": 0, "loss": 1},
        {"iter": 5, "loss": None, "lr": 1.0},
    ]


def test_peaks_are_of_the_gpu_at_hand(monkeypatch):
    names = {
        "NVIDIA H200": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40S": 362e12,
        "Quadro K600": None,
        "NVIDIA RTX A1000": None,
        "NVIDIA RTX A4000": None,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None,
        "NVIDIA GeForce RTX 4090": 165.2e12,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda d, name=name: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (9, 0))
        assert metrics.peak_flops("cuda:0", "bfloat16") == peak
        assert metrics.peak_flops("cuda:0", "float32") == (peak and peak / 2)
    assert metrics.peak_flops("cpu", "bfloat16") is None
