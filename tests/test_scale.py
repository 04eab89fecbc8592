"""Several processes train as one, by DDP and by FSDP; and what goes wrong among them is one line."""

import os
import pickle
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import SECONDS, TINY, command, in_processes, losses, start_ranks
from torch.distributed import TCPStore

from fastgpt import data, distributed, sharded, trainer
from fastgpt.cli import main
from fastgpt.config import GPTConfig, UserError
from fastgpt.model import GPT

MICRO_STEPS = 4  # of all processes, in an iteration
FLAGS = ["--dataset=letters", *TINY, f"--gradient_accumulation_steps={MICRO_STEPS}", "--grad_clip=0.3", "--bias=True"]


def batch(batches, number):
    """The batch with a number: the same for any number of processes."""
    tokens = torch.from_numpy(batches.tokens.read([(number * 997 + row * 131) % 400 for row in range(4)], 17))
    return tokens[:, :-1], tokens[:, 1:]


def train_shared(*words, begin=0):
    """Train on batches that the processes share: of each iteration a process takes its micro-steps. begin: the first iteration."""
    rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    mine = MICRO_STEPS // size

    def get(batches):
        n = batches.__dict__.setdefault("taken", begin * mine)
        batches.taken += 1
        return batch(batches, n // mine * MICRO_STEPS + rank * mine + n % mine)

    with (
        patch.object(data.Batches, "get", get),
        patch.object(data.Batches, "take", lambda batches, n: (batch(batches, 1000 + i) for i in range(n))),
    ):
        command("train", *FLAGS, *words)


def trainings(*runs):
    """Several trainings in this rank, one after the other: pairs of words and the first iteration."""
    for i, (words, begin) in enumerate(runs):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(i)  # so that the store is as new for each
        train_shared(*words, begin=begin)


def weights(out_dir):
    return sharded.load(out_dir)["model"]


def assert_trained_alike(*out_dirs):
    expected, expected_losses = weights(out_dirs[0]), losses(out_dirs[0])
    assert expected_losses[-1] < 0.9 * expected_losses[0]
    for out_dir in out_dirs[1:]:
        assert losses(out_dir) == pytest.approx(expected_losses, rel=5e-7), out_dir
        found = weights(out_dir)
        assert found.keys() == expected.keys()
        for name, weight in found.items():
            torch.testing.assert_close(
                weight, expected[name], rtol=1e-4, atol=3e-6, msg=lambda m, o=out_dir, n=name: f"{o} {n}: {m}"
            )


FSDP = "--parallel=fsdp"
FILES = ["config.json", "loss.png", "metrics.jsonl", "train.log"]


def test_one_two_and_four_processes_train_as_one_by_ddp_and_by_fsdp(dataset, fastgpt):
    """And a sharded checkpoint goes on in any number of processes, in one process, and from one file."""
    train_shared("--out_dir=one")
    half = ("--out_dir=half", FSDP, "--max_iters=4")
    said = in_processes(4, trainings, (("--out_dir=ddp4",), 0), (("--out_dir=fsdp4", FSDP), 0), (half, 0))
    assert said.count("tokens per iteration") == 3
    assert sorted(os.listdir("fsdp4")) == ["ckpt-0000004", "ckpt-0000008", *FILES]
    for copy in ("two", "again", "file"):
        shutil.copytree("half", copy)
    status, out, err = fastgpt("export", "--out_dir=file")
    assert status == 0, err
    assert "iteration 4, is now one file: file/ckpt.pt" in out
    shutil.rmtree("file/ckpt-0000004")
    on = "--init_from=resume"
    in_processes(
        2, trainings, (("--out_dir=ddp2",), 0), (("--out_dir=fsdp2", FSDP, "--sample_tokens=9"), 0),
        (("--out_dir=two", FSDP, on), 4), (("--out_dir=file", FSDP, on), 4),
    )  # fmt: skip
    train_shared("--out_dir=again", on, begin=4)
    assert_trained_alike("one", "ddp2", "ddp4", "fsdp2", "fsdp4", "two", "file", "again")
    assert (Path("again") / "ckpt.pt").exists()


def count_messages(world):
    """A list to which each large message of FSDP from now on adds the bytes that this rank sends in it."""
    dist, sent = distributed.dist, []
    names = (
        ("all_gather_single", "reduce_scatter_single") if hasattr(dist, "all_gather_single") else ()
    )  # newer PyTorch

    def counting(call):
        def counted(*args, **kwargs):
            part = min(t.nbytes for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
            sent.append(part * (world.size - 1))
            return call(*args, **kwargs)

        return counted

    for name in names or ("all_gather_into_tensor", "reduce_scatter_tensor"):
        setattr(dist, name, counting(getattr(dist, name)))
    return sent


def train_in_bf16(rank):
    """One micro-step of a GPT that FSDP gathers in bf16: its loss, and the gradients of all processes' mean, are those of autocast.

    The last line of the log is the bytes that this rank sent in its large messages.
    """
    world = distributed.init("cpu", "gloo", "fsdp")
    torch.manual_seed(0)
    plain = GPT(GPTConfig(16, 32, 2, 2, 16, 0.0, True))
    torch.manual_seed(rank)  # rank 0's weights count
    model = GPT(plain.config)
    if rank == 0:
        model.load_state_dict(plain.state_dict())
    distributed.shard(model, world, torch.bfloat16)
    torch.manual_seed(7)
    parts = torch.randint(32, (world.size, 2, 3, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = [plain(x, y, return_logits=False)[1] for x, y in parts]
        distributed.averages(model, True)
        sent = count_messages(world)
        loss = model(*parts[rank], return_logits=False)[1]
    assert loss.item() == expected[rank].item()
    torch.stack(expected).mean().backward()
    loss.backward()
    distributed.average_whole(model)
    for (name, p), whole in zip(model.named_parameters(), plain.parameters(), strict=True):
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        assert (grad.dtype, p.dtype) == (torch.float32, torch.float32)
        assert (grad - whole.grad).norm() < 0.01 * whole.grad.norm(), name
    block = model.transformer.h[0]
    assert block.mlp.c_fc.weight.to_local().shape == (64 // world.size, 16)
    assert not hasattr(block.ln_1.weight, "to_local")
    distributed.finish(world)
    print(sum(sent))


def test_fsdp_gathers_in_bf16_what_autocast_would_cast(workdir):
    ranks, _store = start_ranks(train_in_bf16, [(0,), (1,)])
    for rank in ranks:
        rank.join(100)
    assert [rank.exitcode for rank in ranks] == [0, 0], Path("rank0.log").read_text() + Path("rank1.log").read_text()
    from fastgpt.benchmarks import scaling

    links, model = scaling.Links(2, 1e9, 0.0), dict(embeddings=48 * 16, blocks=2 * 12 * 16 * 16, small=0)
    counted, *_ = scaling.fsdp(links, model, dict(forward=0.0, backward=0.0), 1, 2)
    assert int(Path("rank1.log").read_text().split()[-1]) == counted


def test_the_page_on_many_gpus_says_what_the_command_prints(fastgpt):
    page = (Path(__file__).parents[1] / "docs/scaling.md").read_text()
    blocks = re.findall(r"```\n\$ fastgpt (bench scaling.*)\n([^`]+)```", page)
    assert len(blocks) == 3
    for words, printed in blocks:
        assert fastgpt(*words.split()) == (0, printed, "")
    for wrong in ("--gpus=1,8", "--gpu=abacus"):
        assert fastgpt("bench", "scaling", wrong)[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--kernels=triton", "--compile=True", "--recompute=block"])
def test_fsdp_trains_with_kernels_compiled_and_recomputing(dataset, flag):
    few = ["--max_iters=2", "--eval_interval=2", "--eval_iters=1", "--n_layer=3"]
    if flag == "--kernels=triton":
        few += ["--n_layer=1", "--batch_size=1", "--block_size=4", "--gradient_accumulation_steps=2"]
    words = ["train", *FLAGS, *few]
    in_processes(2, command, *words, "--out_dir=ddp")
    in_processes(2, command, *words, "--out_dir=fsdp", FSDP, flag)
    assert losses("fsdp") == pytest.approx(losses("ddp"), rel=1e-5)
    assert flag == "--recompute=block" or losses("fsdp") != losses("ddp"), "equal bits would mean that other code ran"


# ---- what goes wrong ----


def status(*words):
    sys.exit(main(list(words)))


def fails(f, *arguments, stopped=False):
    """Run ranks of which some fail: [(exit status, log)]. stopped: the last rank never ends; it is killed at the end."""
    ranks, _store = start_ranks(f, arguments)
    for rank in ranks[: len(ranks) - stopped]:
        rank.join(100)
    for rank in ranks:
        rank.kill()
        rank.join()
    return [(rank.exitcode, Path(f"rank{r}.log").read_text()) for r, rank in enumerate(ranks)]


def error(log):
    """The only line of an error in a log: no traceback, no other noise."""
    lines = [line for line in log.splitlines() if "error" in line.lower() or "traceback" in line.lower()]
    assert len(lines) == 1, log
    return lines[0]


def test_ranks_that_disagree_are_refused_at_the_start(dataset):
    words = ["train", *FLAGS, "--gradient_accumulation_steps=3"]
    other = [*words, "--grad_clip=0.5", "--eval_interval=3", "--join_timeout=99", "--wandb_project=else"]
    (status0, log0), (status1, log1), (status2, log2) = fails(status, other, words, words)
    assert (status0, status1, status2) == (2, 2, 2)
    assert error(log0) == (
        "fastgpt: error: the processes do not agree: --eval_interval is 3 on rank 0, 4 on ranks 1 and 2; "
        "--grad_clip is 0.5 on rank 0, 0.3 on ranks 1 and 2; start all of them alike"
    )
    assert (log1, log2) == ("", "")
    # The same name, but other data: on a node whose disk differs.
    words = ["train", *FLAGS]
    shutil.copytree(dataset, dataset.parent / "other")
    tokens = (dataset / "train.bin").read_bytes()
    (dataset.parent / "other" / "train.bin").write_bytes(tokens[:-2] + b"\7\0")
    (status0, log0), (status1, log1) = fails(status, words, [*words, "--dataset=other"])
    assert (status0, status1, log1) == (2, 2, "")
    assert re.search("the training data is [0-9a-f]{12} on rank 0, [0-9a-f]{12} on rank 1; start", error(log0))
    # A rank without its data.
    (status0, log0), (status1, log1) = fails(status, words, [*words, "--dataset=missing"])
    assert (status0, status1, log1) == (2, 2, "")
    assert error(log0).startswith("fastgpt: error: rank 1: --dataset=missing: there is no folder data/missing")


def test_ranks_with_other_checkpoints_are_refused(dataset):
    for seed in (1, 2):
        command("train", *FLAGS, f"--out_dir={seed}", f"--seed={seed}", "--max_iters=1")
    words = ["train", *FLAGS, "--init_from=resume"]
    (status0, log0), (status1, log1) = fails(status, [*words, "--out_dir=1"], [*words, "--out_dir=2"])
    assert (status0, status1, log1) == (2, 2, "")
    assert re.search("the checkpoint is [0-9a-f]{12} on rank 0, [0-9a-f]{12} on rank 1; start", error(log0))


def test_a_rank_that_fails_before_it_joins_is_named(dataset):
    (status0, log0), (status1, log1) = fails(
        status, ["train", *FLAGS, "--join_timeout=2"], ["train", *FLAGS, "--grad_clop=1"]
    )
    assert (status0, status1) == (1, 2)
    assert error(log0) == (
        "fastgpt: error: rank 1 of 2 did not join within --join_timeout=2 s; what they printed says why"
    )
    assert "rank 1: error: --grad_clop=1" in error(log1)


def test_a_rank_without_a_rank_0_gives_up(dataset, fastgpt, monkeypatch):
    port = distributed.dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port  # free again
    world = dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    began, stdout = time.monotonic(), sys.stdout
    code, _, err = fastgpt("train", *FLAGS, "--join_timeout=1")
    sys.stdout = stdout  # which a rank above 0 closes
    assert code == 1
    assert time.monotonic() - began < 30
    assert err.startswith(f"fastgpt: rank 1: error: no rank 0 answers at 127.0.0.1:{port} within --join_timeout=1 s (")
    assert err.count("\n") == 1
    monkeypatch.delenv("MASTER_ADDR")
    code, _, err = fastgpt("train", *FLAGS)
    sys.stdout = stdout
    assert (code, "MASTER_ADDR and MASTER_PORT are not" in err) == (2, True)


def end_at_the_third(fault, words):
    """Train; in the third iteration the signal `fault` hits this rank."""
    step, done = trainer.train_step, []

    def train_step(*args, **kwargs):
        done.append(1)
        if len(done) == 3 and fault:
            os.kill(os.getpid(), fault)
        return step(*args, **kwargs)

    with patch.object(trainer, "train_step", train_step):
        status(*words)


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_is_one_line(dataset, fault, parallel):
    words = ["train", *FLAGS, "--timeout=3", f"--parallel={parallel}"]
    stopped = fault == signal.SIGSTOP
    (status0, log0), _ = fails(end_at_the_third, (0, words), (fault, words), stopped=stopped)
    assert status0 == 1
    said = error(log0)
    assert said.startswith("fastgpt: error: a peer is lost or did not answer within --timeout=3 s (")
    assert said.endswith("; the run can go on from its last checkpoint with --init_from=auto")
    assert ("Timed out" in said) == stopped


def test_ranks_that_are_started_again_join_anew(monkeypatch):
    """torchrun keeps its store, with what an earlier start wrote; and it counts a restart only on the node that failed."""
    agents = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in (("ADDR", "127.0.0.1"), ("PORT", str(agents.port))):
        monkeypatch.setenv(f"MASTER_{name}", value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for start in range(3):
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(lambda rank: distributed.join(rank, 2, SECONDS), range(2))
        assert not second.check(["a word"])
        first.set("a word", str(start))
        assert second.get("a word") == str(start).encode()


# ---- a folder that is damaged, or that wants to run code ----


@pytest.fixture
def folder(dataset):
    """A sharded checkpoint of two processes."""
    in_processes(2, command, "train", *FLAGS, FSDP, "--max_iters=1", "--eval_interval=1")
    return Path("out/ckpt-0000001")


def test_a_broken_newest_folder_is_named_and_the_one_before_is_used(dataset, fastgpt):
    in_processes(2, command, "train", *FLAGS, FSDP, "--max_iters=2", "--eval_interval=1")
    (Path("out/ckpt-0000002") / ".metadata").write_bytes(b"damaged")
    status, out, err = fastgpt("train", *FLAGS, "--init_from=auto", "--max_iters=3")
    assert status == 0, err
    assert "out/ckpt-0000002: its metadata is damaged" in out
    assert "; out/ckpt-0000001 takes its place\n" in out
    assert "iter 1: " in out
    for older in Path("out").glob("ckpt-000000[12]*"):
        (older / ".metadata").write_bytes(b"damaged") if older.is_dir() else older.unlink()
    assert fastgpt("sample", "--device=cpu", "--start=a", "--max_new_tokens=1")[0] == 0  # ckpt.pt is newer
    Path("out/ckpt.pt").unlink()
    status, _, err = fastgpt("sample", "--device=cpu", "--start=a")
    assert status == 2
    assert "its metadata is damaged" in err


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_no_code_in_a_folder_is_run_and_damage_is_one_line(folder, fastgpt):
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert good.keys() == {".metadata", "rest.pt", "__0_0.distcp", "__1_0.distcp"}
    metadata = pickle.loads(good[".metadata"])
    key = next(iter(metadata.storage_data))
    metadata.storage_data[key].relative_path = "../../elsewhere"
    outside = pickle.dumps(metadata)
    metadata = pickle.loads(good[".metadata"])
    metadata.state_dict_metadata["model.transformer.wte.weight"].size = torch.Size([2**40, 16])
    huge = pickle.dumps(metadata)
    metadata = pickle.loads(good[".metadata"])
    del metadata.state_dict_metadata["model.transformer.ln_f.weight"]
    lacking = pickle.dumps(metadata)
    torch.save({**torch.load(folder / "rest.pt"), "names": 5}, folder / "rest.pt")
    other = (folder / "rest.pt").read_bytes()
    (folder / "rest.pt").write_bytes(good["rest.pt"])
    for name, content, reason in (
        (".metadata", pickle.dumps(Evil(), 2), "it asks for posix.mkdir"),
        (".metadata", outside, "a part is outside"),
        (".metadata", huge, "it promises more than its files hold"),
        (".metadata", lacking, "its transformer.ln_f.weight is not the one of its model_args"),
        (".metadata", good[".metadata"][:-20], "is damaged"),
        ("rest.pt", other, "names is missing, or something else"),
        ("rest.pt", pickle.dumps(Evil(), 2), "not readable"),
        ("rest.pt", good["rest.pt"][:100], "not readable"),
        ("__1_0.distcp", good["__1_0.distcp"][:500], "or it is damaged"),
        ("__1_0.distcp", None, "or it is damaged"),
    ):
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        status, _, err = fastgpt("export", "--out_dir=out")
        assert (status, err.count("\n")) == (2, 1), err
        assert reason in err, err
        assert not Path("ran").exists()
        assert not Path("out/ckpt.pt").exists()
        (folder / name).write_bytes(good[name])
    assert fastgpt("sample", "--out_dir=out", "--device=cpu", "--num_samples=1", "--start=a")[0] == 0
    assert fastgpt("export", "--out_dir=out")[0] == 0
    assert "is one file already" in fastgpt("export", "--out_dir=out")[2]
    assert "there is no sharded checkpoint, nor another; train first" in fastgpt("export", "--out_dir=data")[2]


def test_a_save_that_fails_leaves_the_last_checkpoint(folder):
    """On one rank, as on a node whose disk is full."""
    before = (folder / "rest.pt").read_bytes()
    words = ["train", *FLAGS, FSDP, "--init_from=resume", "--max_iters=2", "--eval_interval=1"]
    (status0, log0), (status1, log1) = fails(save_on_a_full_disk, (False, words), (True, words))
    reason = "cannot be written (No space left on device); the last checkpoint is as it was"
    assert (status0, status1, log1) == (2, 0, "")
    assert f"out/ckpt-0000001: {reason}; the next save tries again\n" in log0
    assert "\niter 1: " in log0  # the run went on
    assert error(log0).endswith(f"out/ckpt-0000002: {reason}")
    assert sorted(os.listdir("out")) == ["ckpt-0000001", *FILES]
    assert (folder / "rest.pt").read_bytes() == before


def save_on_a_full_disk(full, words):
    def write(self, *args):
        raise OSError(28, os.strerror(28))

    with patch.object(sharded.dcp.FileSystemWriter, "write_data", write) if full else nullcontext():
        status(*words)


def test_float16_is_refused_under_fsdp():
    cfg = trainer.TrainConfig(parallel="fsdp", dtype="float16")
    with pytest.raises(UserError, match="give --dtype=bfloat16 or --parallel=ddp"):
        trainer.check_parallel(cfg, cuda=True)
    trainer.check_parallel(cfg, cuda=False)
