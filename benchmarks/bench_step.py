"""Time of one training step on the machine at hand: `pytest benchmarks`.

On the CPU the preset tiny; on a GPU the 124M model at B=12, T=1024 in bf16, eager and compiled.
"""

from contextlib import nullcontext

import pytest
import torch

from fastgpt.config import TrainConfig, preset
from fastgpt.model import GPT
from fastgpt.step import train_step

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


class RandomTokens:
    """One batch of random tokens, over and over: the step alone is timed, not the loader."""

    def __init__(self, cfg, vocab_size):
        self.batch = torch.randint(vocab_size, (2, cfg.batch_size, cfg.block_size), device=DEVICE).unbind()

    def get(self):
        return self.batch

    def prefetch(self):
        """Nothing to fetch."""


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_step(benchmark, compiled):
    if compiled and not CUDA:
        pytest.skip("on the CPU compiling takes minutes and the trainer's small presets do not do it")
    cfg = TrainConfig() if CUDA else TrainConfig(**preset("tiny"))
    vocab_size = 50304 if CUDA else 256
    torch.manual_seed(cfg.seed)
    model = GPT(cfg.gpt_config(vocab_size)).to(DEVICE)
    optimizer = model.configure_optimizers(cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2), DEVICE)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    autocast = torch.autocast("cuda", dtype=torch.bfloat16) if CUDA else nullcontext()
    arguments = (
        torch.compile(model) if compiled else model,
        optimizer,
        scaler,
        RandomTokens(cfg, vocab_size),
        1,
        autocast,
    )

    def step():
        loss, _ = train_step(*arguments, cfg.grad_clip)
        return loss.item()  # waits for the device

    first = step()
    last = benchmark.pedantic(step, rounds=20, warmup_rounds=3)
    assert last < first, "the step that is timed must train"
    if benchmark.stats:
        tokens = cfg.batch_size * cfg.block_size
        benchmark.extra_info.update(
            device=DEVICE, torch=torch.__version__, tokens_per_s=tokens / benchmark.stats["median"]
        )
