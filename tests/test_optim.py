"""The learning-rate schedule, and the step that uses it."""

import math
from contextlib import nullcontext

import pytest
import torch

from fastgpt.config import TrainConfig
from fastgpt.model import GPT, GPTConfig
from fastgpt.optim import learning_rate
from fastgpt.step import evaluate, train_step


def test_the_schedule_is_nanogpts():
    cfg = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=4, lr_decay_iters=14)
    assert [learning_rate(i, cfg) for i in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert learning_rate(4, cfg) == 1.0
    assert learning_rate(9, cfg) == pytest.approx(0.55)  # half way down the cosine
    assert learning_rate(6, cfg) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.2)))
    assert learning_rate(14, cfg) == learning_rate(15, cfg) == learning_rate(10**9, cfg) == 0.1
    constant = TrainConfig(learning_rate=1.0, decay_lr=False, warmup_iters=4)
    assert learning_rate(0, constant) == learning_rate(10**9, constant) == 1.0
    at_once = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=5, lr_decay_iters=5)
    assert [learning_rate(i, at_once) for i in (4, 5)] == pytest.approx([5 / 6, 0.1])
    warming = TrainConfig(
        learning_rate=1.0, min_lr=0.1, warmup_iters=9, lr_decay_iters=5
    )  # as nanoGPT: the warm-up wins
    assert [learning_rate(i, warming) for i in (8, 9)] == pytest.approx([0.9, 0.1])


class Given:
    """Batches that are given, and a record of when the next one was asked for."""

    def __init__(self, batches):
        self.batches, self.next = batches, 0

    def get(self):
        return self.batches[self.next]

    def prefetch(self):
        self.next = (self.next + 1) % len(self.batches)

    def take(self, n):
        return iter(self.batches[:n])


@pytest.fixture
def four():
    g = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(20, (2, 4, 8), generator=g)) for _ in range(4)]


def new_model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=16, bias=True))
    return model, model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")


def step(model, optimizer, batches, accumulation, clip=1.0):
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    return train_step(model, optimizer, scaler, Given(batches), accumulation, nullcontext(), clip)


def test_accumulation_equals_one_large_batch(four):
    accumulated, at_once = new_model(), new_model()
    loss, norm = step(*accumulated, four, 4)
    whole = [(torch.cat([x for x, _ in four]), torch.cat([y for _, y in four]))]
    expected_loss, expected_norm = step(*at_once, whole, 1)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(norm, expected_norm)
    for a, b in zip(accumulated[0].parameters(), at_once[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_loss_is_the_mean_of_all_micro_steps(four):
    """nanoGPT logs the last one's alone."""
    model, optimizer = new_model()
    expected = torch.stack([model(x, y)[1] for x, y in four]).mean()
    loss, _ = step(model, optimizer, four, 4)
    torch.testing.assert_close(loss, expected.detach())


def test_clipping_scales_the_gradient_to_the_norm_and_zero_switches_it_off(four):
    seen = {}
    for clip in (0.0, 0.1, 1e9):
        model, optimizer = new_model()
        _, norm = step(model, optimizer, four, 1, clip)
        # The first moment of a first update is 1 - beta1 of the gradient that it was made with.
        gradients = [state["exp_avg"] / 0.1 for state in optimizer.state.values()]
        seen[clip] = torch.stack([g.norm() for g in gradients]).norm(), norm
        assert all(p.grad is None for p in model.parameters())
    unclipped = seen[1e9][0]
    assert unclipped > 0.1
    torch.testing.assert_close(seen[0.1][0], torch.tensor(0.1), rtol=1e-3, atol=0)
    torch.testing.assert_close(seen[0.0][0], unclipped)
    for _, reported in seen.values():
        torch.testing.assert_close(reported, unclipped)


def test_evaluation_is_the_mean_without_dropout_and_leaves_train_mode(four):
    model, _ = new_model()
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.5
    expected = torch.stack([model.eval()(x, y)[1] for x, y in four]).mean().item()
    model.train()
    assert evaluate(model, four, nullcontext()) == pytest.approx(expected, rel=1e-6)
    assert model.training
