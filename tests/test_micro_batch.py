"""Merged micro-batches: the same tokens, and the same update up to rounding, in fewer steps."""

import pytest
import torch
from conftest import TINY, losses

from fastgpt.config import GPTConfig, TrainConfig
from fastgpt.micro_batch import MEMORY_SHARE, best, filled, sequence_bytes, state_bytes, what_fits
from fastgpt.model import GPT

GPT2 = GPTConfig(bias=False)
SIZES = [12 * n for n in (1, 2, 4, 5, 8, 10, 20, 40)]


def test_a_merged_run_is_the_unmerged_one(train):
    """Tokens as well: the evaluations draw from the same generator, in the midst of a micro-step's draws."""
    flags = ["--gradient_accumulation_steps=4", "--eval_interval=2"]
    train(*flags, "--out_dir=apart")
    out = train(*flags, "--out_dir=merged", "--micro_batch=8")
    assert "micro-steps: 2 of 8 sequences, 2 micro-batches in each" in out
    assert losses("merged") == pytest.approx(losses("apart"), rel=1e-5)
    weights = [torch.load(f"{d}/ckpt.pt", weights_only=True)["model"] for d in ("apart", "merged")]
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-3, atol=1e-5)


def test_a_merged_run_resumes_as_if_it_had_not_stopped(train):
    flags = ["--gradient_accumulation_steps=4", "--micro_batch=16", "--lr_decay_iters=8"]
    train(*flags, "--max_iters=8", "--out_dir=whole")
    train(*flags, "--max_iters=4", "--out_dir=part")
    train(*flags, "--max_iters=8", "--out_dir=part", "--init_from=resume")
    whole, part = (torch.load(f"{d}/ckpt.pt", weights_only=True)["model"] for d in ("whole", "part"))
    assert all(torch.equal(part[name], whole[name]) for name in whole)


@pytest.mark.parametrize(("spec", "near"), [("7", 8), ("12", 8), ("many", 4), ("-4", 4), ("1000", 16)])
def test_what_cannot_be_is_refused_with_the_nearest(dataset, fastgpt, spec, near):
    flags = ["train", "--dataset=letters", *TINY, "--gradient_accumulation_steps=4", f"--micro_batch={spec}"]
    status, _, err = fastgpt(*flags)
    assert status == 2
    assert (
        f"--micro_batch={spec}: it is auto, or batch_size=4 times a divisor of the 4 micro-steps; the nearest is {near}"
        in err
    )


def test_auto_without_a_gpu_leaves_it(train):
    assert "micro-steps: 2 of 4 sequences, 1 micro-batches in each" in train("--micro_batch=auto")


def test_tiles_are_counted():
    """One GEMM by hand: a model of one layer that is nearly all head."""
    head = GPTConfig(block_size=128, vocab_size=128 * 1000, n_layer=1, n_head=1, n_embd=1)
    assert filled(128 * 132, head, 132) == pytest.approx(1.0, abs=0.03)
    assert filled(128 * 133, head, 132) == pytest.approx(1.0, abs=0.03)  # 1,007.6 rounds: the last matters little
    assert filled(1, head, 132) < 0.01  # one row of a tile of 128


def test_auto_fills_the_gpu_and_fits_the_memory():
    roomy = best(SIZES, GPT2, 132, 141e9, sequence_bytes(GPT2, 2))
    assert filled(roomy * 1024, GPT2, 132) > filled(12 * 1024, GPT2, 132) + 0.02
    for free in (24e9, 80e9, 141e9):
        size = best(SIZES, GPT2, 132, free, sequence_bytes(GPT2, 2))
        assert size * sequence_bytes(GPT2, 2) + state_bytes(GPT2) <= free
        assert filled(size * 1024, GPT2, 132) <= filled(roomy * 1024, GPT2, 132) + 0.01
    assert best(SIZES, GPT2, 132, 1e9, sequence_bytes(GPT2, 2)) == 12  # as written, where nothing fits
    twice = best(
        SIZES, GPT2, 132, 24e9, 2 * sequence_bytes(GPT2, 2)
    )  # a graph's micro-step, and beside it one that is none
    assert twice * 2 * sequence_bytes(GPT2, 2) + state_bytes(GPT2) <= 24e9


def test_the_memory_of_gpt2_is_as_counted_by_hand():
    """17.5 GB of activations at B=32 are what compiled nanoGPT keeps of GPT-2 124M; the kernels keep two logits' worth less."""
    assert 32 * sequence_bytes(GPT2, 2) == 1024 * 32 * (12 * 768 * 36 + 2 * 50304 * 2)
    assert state_bytes(GPT2) == pytest.approx(14 * 124.4e6, rel=0.01)


def test_a_stream_of_16_bits_takes_two_bytes_less_an_element():
    """Twice a block and element; once a block where blocks are recomputed, and twice of the one at hand."""
    for recompute, elements in (("none", 2 * 12), ("gelu", 2 * 12), ("block", 12 + 2)):
        saved = sequence_bytes(GPT2, 2, recompute) - sequence_bytes(GPT2, 2, recompute, stream=2)
        assert saved == 1024 * 768 * elements * 2
    big = TrainConfig(batch_size=32, residual="bf16")
    memory = 1e9 * next(
        m for m in range(20, 40) if what_fits(TrainConfig(batch_size=32), GPT2, m * 1e9, 2, 32, 40).endswith("=gelu")
    )
    assert what_fits(big, GPT2, memory - 1e9, 2, 32, 40) == "give --recompute=gelu"
    assert best(SIZES, GPT2, 132, 24e9, sequence_bytes(GPT2, 2, stream=2)) >= best(
        SIZES, GPT2, 132, 24e9, sequence_bytes(GPT2, 2)
    )


# ---- what one GPU of 80 GB holds, by this count ----

XL = GPTConfig(n_layer=48, n_head=25, n_embd=1600, bias=False)


def fits_80_gb(sequences, config, recompute):
    weights = state_bytes(config) * 18 / 14  # with the weights themselves
    return weights + sequences * sequence_bytes(config, 2, recompute) <= MEMORY_SHARE * 80e9


def test_gpt2_xl_fits_one_gpu():
    assert fits_80_gb(12, XL, "block"), "nanoGPT's micro-batch"
    assert not fits_80_gb(24, XL, "none"), "else nothing would be recomputed for"
    assert fits_80_gb(24, XL, "block")
    assert what_fits(TrainConfig(batch_size=24), XL, 80e9, 2, 24, 40) == "give --recompute=block"


def test_gpt2_fits_one_gpu_at_8192_tokens():
    long = GPTConfig(block_size=8192, bias=False)
    assert fits_80_gb(12, long, "none")
    assert fits_80_gb(24, long, "block")
    assert not fits_80_gb(24, long, "none")


def test_8192_tokens_are_trained_on():
    torch.manual_seed(0)
    model = GPT(GPTConfig(8192, 65, 2, 2, 8))
    idx = torch.randint(65, (1, 8192))
    logits, loss = model(idx, idx)
    loss.backward()
    torch.testing.assert_close(model(idx[:, :70], idx[:, :70])[0], logits[:, :70], rtol=1e-4, atol=1e-6)
    last = model(torch.cat((idx[:, 1:], idx[:, :1]), 1))[0]
    assert not torch.allclose(last, logits[:, -1:])
    gradient = model.transformer.wpe.weight.grad
    assert gradient.isfinite().all()
    assert (gradient.abs().sum(1) > 0).all(), "every position has its share"


# ---- recomputation ----


@pytest.mark.parametrize("mode", ["gelu", "block"])
@pytest.mark.parametrize(
    ("kernels", "dropout"),
    [
        ("torch", 0.2),
        pytest.param("torch", 0.0, marks=pytest.mark.slow),
        pytest.param("triton", 0.2, marks=pytest.mark.slow),
    ],
)
def test_recomputing_gives_the_same_bits(mode, kernels, dropout):
    if kernels == "triton":
        pytest.importorskip("triton")
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 31, 2, 2, 32, dropout))
    model.set_kernels(kernels)
    idx = torch.randint(31, (2, 8))
    found = []
    for recompute in ("none", mode):
        model.set_recompute(recompute)
        torch.manual_seed(1)
        model.zero_grad()
        loss = model(idx, idx, return_logits=False)[1]
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("mode", ["gelu", "block"])
def test_recomputing_keeps_less(mode):
    """What autograd holds between forward and backward, counted as it is packed."""
    model = GPT(GPTConfig(64, 31, 4, 2, 64))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    idx = torch.randint(31, (4, 64))
    kept = {}
    for recompute in ("none", mode):
        model.set_recompute(recompute)
        held = {}

        def pack(t, held=held):
            if t.untyped_storage().data_ptr() not in weights:
                held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(idx, idx, return_logits=False)[1]
        kept[recompute] = sum(held.values())
        del loss
    assert kept[mode] < (0.8 if mode == "gelu" else 0.5) * kept["none"]


def test_a_run_may_recompute(train, monkeypatch):
    asked = []
    monkeypatch.setattr(
        GPT, "set_recompute", lambda self, mode, f=GPT.set_recompute: asked.append(mode) or f(self, mode)
    )
    for mode in ("gelu", "block", "none"):
        train(f"--recompute={mode}", f"--out_dir={mode}")
    assert asked == ["gelu", "block", "none"]
    assert losses("gelu") == losses("block") == losses("none")


def test_out_of_memory_is_answered_with_what_fits(dataset, fastgpt, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.07 GiB.\nmore")

    monkeypatch.setattr("fastgpt.trainer.train_step", full)
    status, _, err = fastgpt("train", "--dataset=letters", *TINY)
    assert status == 2
    assert err.count("\n") == 1
    assert (
        "out of memory. Tried to allocate 3.07 GiB. To fit, give --batch_size=1 --gradient_accumulation_steps=8" in err
    )


@pytest.mark.parametrize(
    ("flags", "failed", "graphed", "memory", "says"),
    [
        ({}, 32, False, 24e9, "give --recompute=gelu"),
        ({}, 32, False, 16e9, "give --recompute=block"),
        ({}, 32, True, 16e9, "give --recompute=block"),
        ({}, 32, True, 40e9, "give --runner=eager"),  # in a graph's memory nothing else can be
        (dict(batch_size=32, recompute="block"), 32, False, 8e9, "give --batch_size=8 --gradient_accumulation_steps=160"),
        ({}, 240, False, 40e9, "give --micro_batch=48"),
        ({}, 24, False, 141e9, "give --recompute=gelu"),  # though it should have fitted
        (dict(recompute="block"), 24, False, 3e9, "give --micro_batch=12"),
        (dict(recompute="block"), 12, False, 3e9, "give --batch_size=1 --gradient_accumulation_steps=480"),
        (dict(batch_size=1), 1, False, 3e9, "give --recompute=block"),
        (dict(batch_size=1, recompute="block"), 1, False, 3e9, "give a smaller --block_size or model"),
    ],
)  # fmt: skip
def test_what_fits_is_the_first_that_does(flags, failed, graphed, memory, says):
    assert what_fits(TrainConfig(**{"batch_size": 12, **flags}), GPT2, memory, 2, failed, 40, graphed) == says


def test_a_hint_is_what_this_process_can_take():
    """Of eight processes each has five of the forty micro-steps: it merges one or five."""
    cfg = TrainConfig(batch_size=12, recompute="block")
    assert what_fits(cfg, GPT2, 24e9, 2, 60, 40) == "give --micro_batch=48"
    assert what_fits(cfg, GPT2, 24e9, 2, 60, 5) == "give --micro_batch=12"


def test_auto_keeps_the_size_that_a_run_had_if_it_fits():
    """So that a resumed run goes on with the same bits, though another process takes memory."""
    takes = sequence_bytes(GPT2, 2)
    chosen = best(SIZES, GPT2, 132, 141e9, takes)
    assert chosen != 24
    assert best(SIZES, GPT2, 132, 141e9, takes, before=24) == 24
    assert best(SIZES, GPT2, 132, 141e9, takes, before=7) == chosen, "it is no multiple"
    assert best(SIZES, GPT2, 132, 20e9, takes, before=240) == best(SIZES, GPT2, 132, 20e9, takes)
