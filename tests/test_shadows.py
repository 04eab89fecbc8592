"""Shadow weights: the same bits as autocast's casts, in eager mode, compiled, and by the trainer, alone and in two processes."""

import gc
import weakref
from copy import deepcopy
from unittest.mock import patch

import pytest
import torch
from conftest import TINY, command, in_two_processes, losses
from torch import nn

from fastgpt import ops, trainer
from fastgpt.model import GPT, GPTConfig
from fastgpt.shadows import Shadows, shadow_dtype

pytest.importorskip("triton")
from kernel_case import DEVICE

BF16 = torch.bfloat16


@pytest.fixture
def tiny():
    """A model of one block on this machine's device that runs the kernels, and a batch."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=31, n_layer=1, n_head=2, n_embd=32)).to(DEVICE)
    model.set_kernels("triton")
    return model, *torch.randint(31, (2, 2, 8), device=DEVICE)


def forward(model, idx, targets, dtype=BF16):
    """The loss, under autocast where dtype is not fp32."""
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        return model(idx, targets, return_logits=False)[1]


def step(model, idx, targets, dtype=BF16):
    """The loss and the gradients."""
    model.zero_grad(set_to_none=True)
    loss = forward(model, idx, targets, dtype)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def linears(model):
    """Its weights that may have a shadow: four of the block, and the head."""
    found = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(found) == 5
    return found


def test_shadows_stand_for_casts(tiny):
    model, *_ = tiny
    cast, full, names = step(*tiny), step(*tiny, torch.float32), list(model.state_dict())
    shadows = Shadows(model, BF16)
    assert list(model.state_dict()) == names
    assert all(torch.equal(w.shadow, w.detach().to(BF16)) for w in linears(model))
    assert same_bits(step(*tiny), cast)
    assert same_bits(step(*tiny, torch.float32), full), "fp32 takes none"
    for weight in linears(model):
        weight.shadow.zero_()
        assert not torch.equal(forward(*tiny), cast[0]), "they are read, not cast anew"
        shadows.refresh()
    for weight in linears(model):
        weight.shadow.zero_()
    shadows.remove()
    assert same_bits(step(*tiny), cast)


@torch.no_grad()
def test_a_copy_a_checkpoint_and_another_weight_have_none(tiny):
    model, *batch = tiny
    before, start = forward(*tiny), deepcopy(model.state_dict())
    shadows = Shadows(model, BF16)
    copy = deepcopy(model)
    assert not any(hasattr(p, "shadow") for p in (*copy.parameters(), *model.state_dict().values()))
    for p in copy.parameters():
        p.mul_(1.5)
    changed = forward(copy, *batch)
    assert not torch.equal(changed, before)
    assert torch.equal(forward(*tiny), before)

    model.load_state_dict(copy.state_dict())
    assert not torch.equal(forward(*tiny), changed), "a shadow stays until it is refreshed"
    shadows.refresh()
    assert torch.equal(forward(*tiny), changed)

    fc = model.transformer.h[0].mlp.c_fc
    fc.weight = nn.Parameter(start["transformer.h.0.mlp.c_fc.weight"])
    copy.transformer.h[0].mlp.c_fc.load_state_dict(fc.state_dict())
    assert torch.equal(forward(*tiny), forward(copy, *batch))


def test_they_do_not_hold_the_model(tiny):
    """What owns them holds weights and tensors: there is no way back from a weight to its model."""
    model = GPT(tiny[0].config)
    shadows, gone = Shadows(model, BF16), weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    shadows.refresh()


@pytest.mark.slow
def test_training_with_shadows_is_training_without(tiny):
    """The optimizer writes them."""
    model, *batch = tiny
    ends = []
    for trained in (deepcopy(model), model):
        optimizer = trained.configure_optimizers(0.1, 0.1, (0.9, 0.95), DEVICE)
        if trained is model:
            Shadows(trained, BF16)
        for _ in range(2):
            step(trained, *batch)
            optimizer.step()
        ends.append([forward(trained, *batch).detach(), *(p.detach() for p in trained.parameters())])
    assert same_bits(*ends)


@pytest.mark.slow
def test_a_compiled_model_reads_them_while_they_are_there(tiny):
    model, *batch = tiny
    torch._dynamo.reset()
    call = torch.compile(model, backend="aot_eager", fullgraph=True)

    def compiled():
        model.zero_grad(set_to_none=True)
        loss = forward(call, *batch)
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    shadows = Shadows(model, BF16)
    found = compiled()
    for weight in linears(model):
        weight.shadow.zero_()
    assert not torch.equal(forward(call, *batch), found[0])
    shadows.remove()
    assert same_bits(compiled(), found)


FLAGS = [*TINY, "--dataset=letters", "--batch_size=1", "--block_size=8", "--eval_iters=1", "--kernels=triton"]
FLAGS += ["--n_layer=1", "--warmup_iters=0", "--gradient_accumulation_steps=2", "--max_iters=2", "--eval_interval=2"]


def train_in_bf16(with_shadows, *flags):
    """A run of the trainer, which on the CPU computes in fp32 and keeps no shadows: here it is made to do otherwise."""
    made, compile_model = [], torch.compile

    def init(self, *args, init=trainer.Run.__init__):
        init(self, *args)
        self.autocast = torch.autocast("cpu", BF16)
        made.append(getattr(self, "shadows", None))

    with (
        patch.object(trainer.Run, "__init__", init),
        patch.object(trainer, "shadow_dtype", lambda kernels, dtype: BF16 if with_shadows else None),
        patch.object(torch, "compile", lambda model, **options: compile_model(model, backend="aot_eager", **options)),
    ):
        command("train", *FLAGS, *flags, f"--out_dir={with_shadows}")
    assert [type(m) for m in made] == [Shadows if with_shadows else type(None)]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_trainers_shadows_give_the_same_run(dataset, processes):
    for with_shadows in (True, False):
        if processes == 1:
            torch._dynamo.reset()
            train_in_bf16(with_shadows, "--compile=True")
        else:
            in_two_processes(train_in_bf16, with_shadows)
    assert len(losses("True")) == 2
    assert losses("True") == losses("False")


def test_they_are_kept_where_kernels_compute_in_16_bits():
    assert shadow_dtype(ops.TORCH, BF16) is None
    assert shadow_dtype(ops.Kernels(layer_norm="triton"), BF16) is None
    assert shadow_dtype(ops.Kernels(linear="triton"), torch.float32) is None
    for op in ("linear", "gelu_mlp", "linear_cross_entropy"):
        assert shadow_dtype(ops.Kernels(**{op: "triton"}), BF16) == BF16
