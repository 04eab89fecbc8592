"""The model is nanoGPT's: init bit for bit, and logits, loss, gradients and a training run, against straight-line maths
(straight_gpt.py) and against what nanoGPT itself answered (nanogpt_facts.json)."""

import contextlib
import hashlib
import io
import json
import math
from pathlib import Path

import pytest
import straight_gpt
import torch
from nanogpt import CONFIGS, answers_of

from fastgpt.model import GPT, GPTConfig

FACTS = json.loads(Path(__file__).with_name("nanogpt_facts.json").read_text())
SHAPES = {
    "no bias": dict(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=32, bias=False),
    "bias": dict(block_size=24, vocab_size=50, n_layer=3, n_head=4, n_embd=20, bias=True),
    "one head, odd sizes": dict(block_size=7, vocab_size=11, n_layer=1, n_head=1, n_embd=5, bias=True),
}


def make(config, seed=1337):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**config))


def batch(config, T=None, B=3):
    T = T or config["block_size"]
    g = torch.Generator().manual_seed(5)
    x, y = torch.randint(config["vocab_size"], (2, B, T), generator=g)
    y[0, : T // 2] = -1
    return x, y


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_init_is_an_independent_replay_bit_for_bit(config):
    model = make(config)
    after = torch.get_rng_state()
    torch.manual_seed(1337)
    replay = straight_gpt.initial_weights(**config)
    state = model.state_dict()
    assert state.keys() == replay.keys()
    for name, value in replay.items():
        assert torch.equal(state[name], value), name
    assert torch.equal(torch.get_rng_state(), after)


def test_init_draws_in_the_recorded_order(monkeypatch):
    """nanogpt_contract's rows I1 to I4: which function, which shape, which spread, in which order."""
    C, V, T, L = 8, 11, 6, 2
    draws = []
    for name in ("normal_", "uniform_"):
        original = getattr(torch.Tensor, name)

        def record(self, a=0.0, b=1.0, *, generator=None, name=name, original=original):
            draws.append((name, tuple(self.shape), round(b, 9)))
            return original(self, a, b, generator=generator)

        monkeypatch.setattr(torch.Tensor, name, record)
    make(dict(block_size=T, vocab_size=V, n_layer=L, n_head=2, n_embd=C, bias=False))
    linears = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)]
    bound = {shape: round(1 / math.sqrt(shape[1]), 9) for shape in [*linears, (V, C)]}
    small = round(0.02 / math.sqrt(2 * L), 9)
    assert draws == (
        [("normal_", (V, C), 1.0), ("normal_", (T, C), 1.0)]
        + [("uniform_", s, bound[s]) for s in linears] * L
        + [("uniform_", (V, C), bound[(V, C)])]
        + [("normal_", (V, C), 0.02), ("normal_", (T, C), 0.02)]
        + [("normal_", s, 0.02) for s in linears] * L
        + [("normal_", (V, C), 0.02)]
        + [("normal_", (C, C), small), ("normal_", (C, 4 * C), small)] * L
    )
    assert len(draws) == 10 * L + 6


@pytest.mark.parametrize("name", FACTS)
def test_what_nanogpt_answered(name):
    facts = FACTS[name]
    assert facts["config"] == CONFIGS[name]
    answers = answers_of(GPT, GPTConfig, facts["config"])
    assert {k: list(v.shape) for k, v in answers["initial"].items()} == facts["shapes"]
    assert list(answers["initial"]) == list(facts["shapes"])
    # The generator's state is the same on every machine; the last bits of normal_ depend on the CPU's vector unit.
    assert hashlib.sha256(answers["generator"].numpy().tobytes()).hexdigest() == facts["generator_sha256"]
    for k, total in facts["initial_sums"].items():
        assert answers["initial"][k].double().sum().item() == pytest.approx(total, rel=1e-6, abs=1e-5), k
    for k, norm in facts["gradient_norms"].items():
        assert answers["gradients"][k].double().norm().item() == pytest.approx(norm, rel=1e-4), k
    assert answers["losses"] == pytest.approx(facts["losses"], rel=1e-4)
    assert answers["printed"] == facts["printed"]


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_logits_loss_and_gradients(config):
    """fp32 against straight lines in fp64: as near as fp32 goes."""
    model = make(config)
    x, y = batch(config)
    logits, loss = model(x, y)
    loss.backward()
    w = {k: v.detach().double() for k, v in model.state_dict().items()}
    leaves = {k: v.requires_grad_() for k, v in w.items() if k != "lm_head.weight"}
    w = {**leaves, "lm_head.weight": leaves["transformer.wte.weight"]}
    expected_logits, expected = straight_gpt.logits_and_loss(w, x, y, config["n_layer"], config["n_head"])
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(logits.double(), expected_logits, rtol=1e-4, atol=1e-6)
    for name, p in model.named_parameters():
        scale = leaves[name].grad.abs().max().item()
        torch.testing.assert_close(p.grad.double(), leaves[name].grad, rtol=0, atol=2e-5 * scale + 1e-9, msg=name)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_twenty_steps_of_training(config):
    model = make(config).double()  # in fp64 two ways of summing agree to where any fault would show
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    w, state = {k: v.detach().clone() for k, v in model.state_dict().items()}, {}
    x, y = batch(config)
    for step in range(1, 21):
        _, loss = model(x, y, return_logits=False)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        leaves = {k: v.requires_grad_() for k, v in w.items() if k != "lm_head.weight"}
        w = {**leaves, "lm_head.weight": leaves["transformer.wte.weight"]}
        _, expected = straight_gpt.logits_and_loss(w, x, y, config["n_layer"], config["n_head"])
        expected.backward()
        grads = {k: v.grad for k, v in leaves.items()}
        w, expected_norm = straight_gpt.adamw_step(
            {k: v.detach() for k, v in w.items()}, grads, state, step, 1e-2, (0.9, 0.95), 0.1, 1.0
        )
        # AdamW divides by sqrt(v) + 1e-8: where a gradient is all rounding (the key bias), so is its step.
        assert loss.item() == pytest.approx(expected.item(), rel=1e-7), step
        assert norm.item() == pytest.approx(expected_norm, rel=1e-6), step
    assert expected.item() < 0.9 * math.log(config["vocab_size"])  # and it learned


@pytest.mark.parametrize("T", [1, 2, 31, 32])
def test_loss_only_is_the_same_loss(T):
    config = SHAPES["no bias"]
    model = make(config)
    x, y = batch(config, T)
    logits, loss = model(x, y)
    none, alone = model(x, y, return_logits=False)
    assert none is None
    assert torch.equal(loss, alone)
    assert logits.shape == (3, T, config["vocab_size"])
    last, no_loss = model(x)
    assert no_loss is None
    assert last.shape == (3, 1, config["vocab_size"])
    torch.testing.assert_close(last[:, 0], logits[:, -1])


def test_blocks_alone_give_what_the_fused_chain_gives():
    model = make(SHAPES["bias"]).eval()
    x, y = batch(SHAPES["bias"])
    t = model.transformer
    h = t.wte(x) + t.wpe(torch.arange(x.size(1)))
    for block in t.h:
        alone = block(h)
        torch.testing.assert_close(
            alone, h + block.attn(block.ln_1(h)) + block.mlp(block.ln_2(h + block.attn(block.ln_1(h))))
        )
        h = alone
    assert torch.equal(model.lm_head(t.ln_f(h)), model(x, y)[0])


def test_all_targets_ignored_is_nan_and_a_bad_target_is_refused():
    model = make(SHAPES["no bias"])
    x, y = batch(SHAPES["no bias"])
    for logits in (True, False):
        assert model(x, torch.full_like(y, -1), return_logits=logits)[1].isnan()
        with pytest.raises(IndexError):
            model(x, torch.full_like(y, -100), return_logits=logits)


@pytest.mark.parametrize("site", ["embedding", "attention", "attention output", "mlp output"])
def test_dropout_falls_at_nanogpts_four_sites_and_only_in_training(site):
    config = SHAPES["no bias"]
    plain, dropped = make(config), make(config)
    x, y = batch(config)
    t = dropped.transformer
    for module in dropped.modules():
        if site == "embedding":
            t.drop.p = 0.5
        if hasattr(module, "attn_dropout") and site == "attention":
            module.dropout = 0.5
        if hasattr(module, "resid_dropout") and site == "attention output":
            module.resid_dropout.p = 0.5
        if hasattr(module, "c_fc") and site == "mlp output":
            module.dropout.p = 0.5
    expected = plain(x, y)[1].item()
    torch.manual_seed(0)
    first = dropped(x, y)[1].item()
    assert first != expected
    torch.manual_seed(0)
    assert dropped(x, y)[1].item() == first
    assert dropped.eval()(x, y)[1].item() == expected


def test_sequences_that_cannot_be():
    model = make(SHAPES["no bias"])
    with pytest.raises(AssertionError, match="Cannot forward sequence of length 33, block size is only 32"):
        model(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(AssertionError, match="empty"):
        model(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="n_embd=32 is not a multiple of n_head=3"):
        make(dict(SHAPES["no bias"], n_head=3))
