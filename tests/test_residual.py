"""--residual=bf16: a stream of 16 bits from the embedding to the last norm, no pass added for it, and a loss curve that stays near."""

from contextlib import nullcontext

import pytest
import torch
from conftest import TINY, losses

from fastgpt import ops, runner, step, trainer
from fastgpt.config import RESIDUAL, TrainConfig, UserError
from fastgpt.model import GPT, GPTConfig

BF16 = torch.bfloat16
STEPS, SEEDS = 20, 3


def curve(seed, dtype, stream=None):
    """Losses of the first steps under autocast to bf16, or in fp64, from weights at which softmax and GELU bend."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(32, 65, 4, 2, 64))
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.mul_(8)
            block.mlp.c_fc.weight.mul_(8)
    model.set_residual(stream)
    model = model.double() if dtype == torch.float64 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for idx in torch.randint(65, (STEPS, 4, 32)):
        with torch.autocast("cpu", BF16) if dtype == BF16 else nullcontext():
            loss = model(idx, idx * 7 % 65, return_logits=False)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def curves(*how):
    return torch.tensor([curve(seed, *how) for seed in range(SEEDS)], dtype=torch.float64)


@pytest.fixture(scope="module")
def exact_and_plain():
    return curves(torch.float64), curves(BF16)


def away(found, exact):
    """Root mean square over all steps and seeds: a single step's error is as good as random."""
    return (found - exact).square().mean().sqrt().item()


def test_the_loss_curve_is_as_near_the_exact_one_as_bf16_is(exact_and_plain):
    """Of a block's tensors nanoGPT under autocast rounds eight to bf16 and leaves the stream in fp32: rounding that too, twice a block,
    may not double the error."""
    exact, plain = exact_and_plain
    found = curves(BF16, BF16)
    assert not torch.equal(found, plain), "the switch does nothing"
    assert away(found, exact) <= 2 * away(plain, exact)


def test_a_stream_that_is_rounded_worse_is_found(exact_and_plain, monkeypatch):
    def rounded(*args, f=ops.add_layer_norm, **how):
        x, h = f(*args, **how)
        return x + (x.detach().to(torch.float8_e4m3fn).to(BF16) - x.detach()), h

    monkeypatch.setattr(ops, "add_layer_norm", rounded)
    exact, plain = exact_and_plain
    assert away(curves(BF16, BF16), exact) > 2 * away(plain, exact)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_stream_and_its_gradient_are_of_16_bits_throughout(kernels, compiled, monkeypatch):
    """The branches are of the compute dtype either way, the weights' gradients fp32."""
    if kernels == "triton":
        pytest.importorskip("triton")
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 31, 1, 2, 32))
    model.set_kernels(kernels)
    idx = torch.randint(31, (2, 8))
    torch._dynamo.reset()
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    seen, found = set(), {}

    def noted(x, branch, *args, f=ops.add_layer_norm, **how):
        out, h = f(x, branch, *args, **how)
        seen.add(("stream", x.dtype))
        if branch is not None:
            seen.add(("branch", branch.dtype))
        if out is not None:  # the last norm's stream is read by nobody
            seen.add(("stream", out.dtype))
            out.register_hook(note_gradient)
        return out, h

    def note_gradient(g):
        if g is not None:
            seen.add(("gradient", g.dtype))

    if not compiled:
        monkeypatch.setattr(ops, "add_layer_norm", noted)
    for stream in (None, BF16):
        model.set_residual(stream)
        seen.clear()
        model.zero_grad()
        with torch.autocast("cpu", BF16):
            loss = call(idx, idx, return_logits=False)[1]
        loss.backward()
        wide = stream or torch.float32
        assert compiled or seen == {("stream", wide), ("gradient", wide), ("branch", BF16)}
        found[stream] = [loss.detach(), *(p.grad for p in model.parameters())]
    assert not all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))
    for a, b in zip(*found.values(), strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.01 * a.abs().max().item())


def test_a_run_trains_and_evaluates_in_bf16_and_samples_in_fp32(train, monkeypatch):
    """On the CPU, which is made to compute as a GPU does: under autocast."""
    monkeypatch.setattr(trainer, "check_residual", lambda *args: None)
    monkeypatch.setattr(step, "nullcontext", lambda: torch.autocast("cpu", BF16))
    streams, embedding = [], ops.embedding

    def noted(*args, **how):
        x, head = embedding(*args, **how)
        streams.append(x.dtype)
        return x, head

    monkeypatch.setattr(ops, "embedding", noted)
    train("--residual=bf16", "--sample_tokens=3", "--out_dir=bf16")
    assert streams[-3:] == [torch.float32] * 3
    assert set(streams[:-3]) == {BF16}
    streams.clear()
    train("--out_dir=fp32", "--sample_tokens=3")
    assert set(streams) == {torch.float32}
    assert losses("bf16") != losses("fp32")
    assert losses("bf16") == pytest.approx(losses("fp32"), rel=1e-2)
    weights = torch.load("bf16/ckpt.pt", weights_only=True)["model"]
    assert all(w.dtype == torch.float32 for w in weights.values())


def test_it_is_refused_where_products_are_not_in_bf16(dataset, fastgpt):
    status, _, err = fastgpt("train", "--dataset=letters", *TINY, "--residual=bf16")
    assert status == 2
    assert err == (
        "fastgpt: error: --residual=bf16: it needs a CUDA GPU and --dtype=bfloat16, and this is on --device=cpu, "
        "which computes in float32; leave it out\n"
    )
    for dtype in ("float32", "float16"):
        with pytest.raises(UserError, match=f"this is with --dtype={dtype}; leave it out"):
            trainer.check_residual(TrainConfig(residual="bf16", dtype=dtype), True)
    trainer.check_residual(TrainConfig(residual="bf16", dtype="bfloat16"), True)
    trainer.check_residual(TrainConfig(dtype="float32"), False)
    assert RESIDUAL["bf16"] == BF16


def test_kernels_are_chosen_on_such_a_stream(train, monkeypatch):
    shapes, choose = [], runner.choose
    monkeypatch.setattr(trainer, "check_residual", lambda *args: None)
    monkeypatch.setattr(step, "nullcontext", lambda: torch.autocast("cpu", BF16))
    monkeypatch.setattr(runner, "choose", lambda spec, shape, *rest: shapes.append(shape) or choose(spec, shape, *rest))
    train("--residual=bf16")
    train("--overwrite")
    assert [s.narrow_residual for s in shapes] == [True, False]
