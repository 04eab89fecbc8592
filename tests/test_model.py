"""nanoGPT's interface beside the forward: parameters, optimizer, MFU, cropping, GPT-2's weights, generation."""

import pytest
import torch
from helpers import uncached

from fastgpt import ops
from fastgpt.model import GPT, GPTConfig, KVCache

CONFIG = dict(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=16, bias=True)


@pytest.fixture
def model():
    torch.manual_seed(3)
    return GPT(GPTConfig(**CONFIG)).eval()


def test_the_124m_model_has_nanogpts_names_and_numbers(capsys):
    with torch.device("meta"):
        model = GPT(GPTConfig(bias=False))
    assert capsys.readouterr().out == "number of parameters: 123.59M\n"
    assert model.get_num_params(non_embedding=False) == 124_373_760
    assert model.lm_head.weight is model.transformer.wte.weight
    assert [n for n, _ in model.named_parameters()][:2] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert list(model.state_dict())[-1] == "lm_head.weight"
    assert all(v.dtype == torch.float32 for v in model.state_dict().values())
    model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    assert capsys.readouterr().out == (
        "num decayed parameter tensors: 50, with 124,354,560 parameters\n"
        "num non-decayed parameter tensors: 25, with 19,200 parameters\n"
        "using fused AdamW: False\n"
    )
    assert model.flops_per_token() == 854_770_176  # 6 N + 12 L H Q T
    assert model.estimate_mfu(12, 1.0) == pytest.approx(model.flops_per_token() * 1024 * 12 / 312e12)
    assert model.estimate_mfu(12, 1.0, peak_flops=989e12) == pytest.approx(model.flops_per_token() * 1024 * 12 / 989e12)


def test_optimizer_groups_leave_frozen_parameters_out(model):
    model.transformer.wpe.weight.requires_grad_(False)
    decay, no_decay = model.configure_optimizers(0.3, 1e-3, (0.8, 0.9), "cpu").param_groups
    assert (decay["weight_decay"], no_decay["weight_decay"], decay["betas"], decay["eps"]) == (
        0.3,
        0.0,
        (0.8, 0.9),
        1e-8,
    )
    assert all(p.dim() >= 2 for p in decay["params"])
    assert all(p.dim() < 2 for p in no_decay["params"])
    assert len(decay["params"]) == 1 + 4 * 2  # wte; four matrices a layer
    assert len(no_decay["params"]) == 8 * 2 + 2


def test_crop_block_size(model):
    idx = torch.arange(8)[None]
    before = model(idx)[0]
    model.crop_block_size(8)
    assert model.config.block_size == 8
    assert torch.equal(model(idx)[0], before)
    assert model.transformer.wpe.weight.untyped_storage().nbytes() == 8 * 16 * 4  # a checkpoint does not carry the rest
    with pytest.raises(AssertionError):
        model(torch.arange(9)[None])
    with pytest.raises(AssertionError):
        model.crop_block_size(9)


@pytest.mark.parametrize(
    "how",
    [dict(temperature=0), dict(temperature=1.3), dict(temperature=0.7, top_k=5), dict(allowed=torch.arange(40) < 7)],
    ids=str,
)
@pytest.mark.parametrize("prompt", [1, 6, 16, 20])
def test_the_key_value_cache_changes_no_token(model, how, prompt):
    """From prompts shorter than, as long as, and longer than block_size, to past it."""
    idx = torch.randint(7, (3, prompt))
    torch.manual_seed(1)
    expected = uncached(model, idx, 24, **how)
    torch.manual_seed(1)
    assert torch.equal(model.generate(idx, 24, **how), expected)


@torch.no_grad()
def test_a_cached_step_computes_the_full_forwards_logits(model):
    """The numbers themselves, not only the tokens they lead to: a wrong position or mask shows here."""
    idx = torch.randint(40, (2, 16))
    caches = [KVCache(16) for _ in model.transformer.h]
    steps = [model._hidden(idx[:, :t], caches)[0] for t in range(5, 17)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model._hidden(idx)[0], rtol=1e-4, atol=1e-5)


def test_the_cache_is_used_and_spares_work(model, monkeypatch):
    lengths = []
    embedding = ops.embedding
    monkeypatch.setattr(
        ops, "embedding", lambda idx, *rest, **how: lengths.append(idx.size(1)) or embedding(idx, *rest, **how)
    )
    model.generate(torch.zeros(1, 4, dtype=torch.long), 15)
    assert lengths == [4] + [1] * 12 + [16, 16]


def test_dropout_in_train_mode_draws_as_without_a_cache():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**CONFIG, dropout=0.3))
    idx = torch.zeros(1, 4, dtype=torch.long)
    torch.manual_seed(1)
    expected = uncached(model, idx, 6)
    torch.manual_seed(1)
    assert torch.equal(model.generate(idx, 6), expected)


def test_sampling_keeps_to_top_k_and_what_is_allowed(model):
    idx = torch.zeros(64, 1, dtype=torch.long)
    logits = model(idx)[0][:, -1]
    best = set(logits[0].topk(3).indices.tolist())
    assert set(model.generate(idx, 1, top_k=3)[:, 1].tolist()) <= best
    assert model.generate(idx, 12, temperature=2.0, allowed=torch.arange(40) < 5)[:, 1:].max() < 5
    assert torch.equal(model.generate(idx, 3, temperature=0), model.generate(idx, 3, top_k=1))
    assert model.generate(idx, 2, top_k=0).shape == (64, 3)
    assert model.generate(idx, 2, top_k=10**6).shape == (64, 3)


@pytest.fixture
def hugging_face(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    # erf GELU, as nanoGPT runs these weights; "gelu_new" is the tanh form
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=16, activation_function="gelu")
    theirs = GPT2LMHeadModel(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)  # biases and LayerNorms too: a swapped one must show
    theirs.save_pretrained(tmp_path / "gpt2-small")
    return theirs, str(tmp_path / "gpt2-small")


def test_gpt2s_weights_compute_what_they_compute_in_transformers(hugging_face, capsys):
    theirs, folder = hugging_face
    ours = GPT.from_pretrained(folder, dict(dropout=0.1)).eval()
    idx = torch.randint(40, (2, 16))
    torch.testing.assert_close(ours(idx, idx)[0], theirs(idx).logits, rtol=1e-4, atol=1e-4)
    assert ours.config == GPTConfig(16, 40, 2, 2, 16, 0.1, True)
    out = capsys.readouterr().out
    assert f"loading weights from pretrained gpt: {folder}" in out
    assert "overriding dropout rate to 0.1" in out
    with pytest.raises(AssertionError, match="only dropout"):
        GPT.from_pretrained(folder, dict(n_layer=3))
