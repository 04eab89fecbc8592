"""--doc_mask: in a batch of many documents each is computed as if it stood alone, in training, resumed, merged and sampled."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, losses
from helpers import uncached
from torch.func import functional_call
from torch.nn import functional as F

from fastgpt import ops, runner, tokenizer
from fastgpt.config import UserError
from fastgpt.model import GPT, GPTConfig

SEPARATOR, V, T = 3, 31, 24
# Of documents: the first without its separator, one of the separator alone, one cut at the end.
STARTS = [0, 5, 6, 15, 22]


def make(dropout=0.0):
    """A model on PyTorch, and a batch of documents of all lengths, in the second row others."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(T, V, 2, 2, 32, dropout))
    for block in model.transformer.h:
        block.attn.c_attn.weight.data.mul_(20)  # at nanoGPT's small initial weights who is attended to hardly shows
    model.set_doc_mask(SEPARATOR)
    idx = torch.randint(SEPARATOR + 1, V, (2, T))
    idx[0, STARTS[1:]] = SEPARATOR
    idx[1, [0, 9]] = SEPARATOR
    return model, idx, torch.randint(V, (2, T))


@pytest.fixture
def packed():
    return make()


@pytest.fixture(params=["torch", "triton"])
def packed_by_each(request):
    """The same on PyTorch and on the kernels."""
    if request.param == "triton":
        pytest.importorskip("triton")
    found = make()
    found[0].set_kernels(request.param)
    return found


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def alone(model, idx, targets):
    """The mean loss of a batch's tokens with each document in a forward of its own on PyTorch, at its positions in its row."""
    separator, kernels = model.separator, model.kernels
    model.set_doc_mask(None)
    model.set_kernels("torch")
    total = 0.0
    for row, answers in zip(idx, targets, strict=True):
        starts = sorted({0, *(row == SEPARATOR).nonzero().flatten().tolist()})
        for start, end in zip(starts, [*starts[1:], T], strict=True):
            wpe = {"transformer.wpe.weight": model.transformer.wpe.weight[start:end]}
            logits, _ = functional_call(model, wpe, (row[None, start:end], answers[None, start:end]))
            total = total + F.cross_entropy(logits[0], answers[start:end], reduction="sum")
    model.set_doc_mask(separator)
    model.set_kernels(kernels)
    return total / idx.numel()


def differ(model, idx, targets):
    """What of the loss and the gradients of a packed batch is not that of its documents alone, as text; empty: nothing."""
    together, apart = model(idx, targets, return_logits=False)[1], alone(model, idx, targets)
    pairs = [(together, apart), *zip(gradients(model, together), gradients(model, apart), strict=True)]
    names = ["loss", *(n for n, _ in model.named_parameters())]
    return [n for n, (a, b) in zip(names, pairs, strict=True) if not torch.allclose(a, b, rtol=1e-4, atol=1e-6)]


def test_documents_in_a_batch_are_computed_as_if_alone(packed_by_each):
    assert differ(*packed_by_each) == []


FAULTS = {
    "no mask": lambda ids: None,
    "the separator in the document before it": lambda ids: F.pad(ids[:, :-1], (1, 0)),
    "each begun a token early": lambda ids: F.pad(ids[:, 1:], (0, 1), value=int(ids.max())),
    "another row's documents": lambda ids: ids.flip(0),
    "two documents taken for one": lambda ids: ids.clamp(max=1),
}


def test_evaluation_masks_as_training_does(packed_by_each):
    model, idx, targets = packed_by_each
    torch.testing.assert_close(model.eval()(idx, targets)[1], alone(model, idx, targets), rtol=1e-5, atol=1e-6)


def test_more_documents_than_a_byte_counts():
    """A token's document is not the one 256 before it, whose number has the same last byte."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(300, V, 1, 1, 16)).eval()
    model.set_doc_mask(SEPARATOR)
    idx = torch.full((1, 300), SEPARATOR)
    idx[0, 1:40] = 5  # of the first document
    targets = torch.zeros_like(idx)
    changed = idx.clone()
    changed[0, 1:40] = 7
    at = 40 + 255  # the 257th
    assert torch.equal(model(idx, targets)[0][0, at], model(changed, targets)[0][0, at])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_mask_is_found(packed, fault, monkeypatch):
    def attention(qkv, n_head, p, cache, ids, kernels, right=ops.attention):
        return right(qkv, n_head, p, cache, FAULTS[fault](ids), kernels)

    monkeypatch.setattr(ops, "attention", attention)
    model, idx, targets = packed
    together = model(idx, targets, return_logits=False)[1]
    monkeypatch.undo()
    assert not torch.allclose(together, alone(model, idx, targets), rtol=1e-4)


@pytest.mark.slow
def test_it_compiles_without_a_graph_break(packed_by_each):
    model, idx, targets = packed_by_each
    eager = model(idx, targets, return_logits=False)[1]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(idx, targets, return_logits=False)[1]
    for a, b in zip([compiled, *gradients(model, compiled)], [eager, *gradients(model, eager)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_it_runs_under_autocast(packed_by_each):
    model, idx, targets = packed_by_each
    right = alone(model, idx, targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, targets, return_logits=False)[1]
    assert loss.item() == pytest.approx(right.item(), rel=5e-3)
    assert all(g.isfinite().all() for g in gradients(model, loss))


def test_recomputing_blocks_gives_the_same_bits():
    model, idx, targets = make(dropout=0.2)
    found = []
    for recompute in ("none", "block"):
        model.set_recompute(recompute)
        torch.manual_seed(1)
        loss = model(idx, targets, return_logits=False)[1]
        found.append([loss, *gradients(model, loss)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_takes_no_documents_says_so_and_leaves_them_to_pytorch(packed):
    model, idx, targets = packed
    model.set_kernels("attention=cudnn")
    ops.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="attention: cudnn does not take float32 rows of 96 within documents"):
        assert differ(model, idx, targets) == []


# ---- generation ----


@pytest.mark.parametrize("prompt", [1, 6, T, T + 3])
def test_the_key_value_cache_changes_no_token(packed, prompt):
    model = packed[0].eval()
    idx = torch.randint(V, (3, prompt))
    idx[:, prompt // 2] = SEPARATOR
    expected = uncached(model, idx, T, temperature=0)
    assert torch.equal(model.generate(idx, T, temperature=0), expected)


@torch.no_grad()
def test_what_stands_before_a_separator_is_not_read(packed):
    model = packed[0].eval()
    a, b = torch.randint(SEPARATOR + 1, V, (2, 1, 12))
    a[:, 5], b[:, 5:] = SEPARATOR, a[:, 5:]
    b[:, 5] = SEPARATOR
    assert not torch.equal(a, b)
    assert torch.equal(model(a)[0], model(b)[0])
    assert torch.equal(model.generate(a, 20, temperature=0)[:, 6:], model.generate(b, 20, temperature=0)[:, 6:])
    model.set_doc_mask(None)
    assert not torch.equal(model(a)[0], model(b)[0])


# ---- runs ----


@pytest.fixture
def documents(workdir):
    """data/documents: GPT-2's tokens by what is known of them, for there is no meta.pkl; a document is of one letter, three times."""
    folder = workdir / "data" / "documents"
    folder.mkdir(parents=True)
    tokens = np.repeat(np.random.default_rng(0).integers(26, size=1000), 4).astype("<u2")
    tokens[3::4] = tokenizer.GPT2_END_OF_TEXT
    tokens[:3600].tofile(folder / "train.bin")
    tokens[3600:].tofile(folder / "val.bin")
    return folder


@pytest.fixture
def train(fastgpt, documents):
    def run(*flags):
        status, out, err = fastgpt("train", "--dataset=documents", *TINY, *flags)
        assert (status, err) == (0, "")
        return out

    return run


def test_a_run_keeps_to_documents(train):
    said = "documents begin at token 50256, and attention stays within them"
    assert said in train("--doc_mask", "--out_dir=within")
    assert said not in train("--out_dir=across")
    within, across = losses("within"), losses("across")
    assert len(within) == len(across) == 8
    assert within != across
    assert within[0] == pytest.approx(across[0], rel=1e-2), "the same batch, at weights that hardly attend yet"


def test_a_merged_run_is_the_unmerged_one(train):
    train("--doc_mask", "--eval_seed=3", "--out_dir=apart")
    train("--doc_mask", "--eval_seed=3", "--out_dir=merged", "--micro_batch=8")
    assert losses("merged") == pytest.approx(losses("apart"), rel=1e-5)


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(train):
    train("--doc_mask", "--out_dir=whole")
    train("--doc_mask", "--max_iters=4", "--out_dir=part")
    train("--doc_mask", "--out_dir=part", "--init_from=resume")
    saved = [torch.load(f"{d}/ckpt.pt", weights_only=True) for d in ("whole", "part")]
    assert all(torch.equal(saved[1]["model"][n], v) for n, v in saved[0]["model"].items())
    assert "doc_mask" not in saved[0]["model_args"]


def test_kernels_are_chosen_on_documents(train, monkeypatch):
    shapes = []
    choose = runner.choose
    monkeypatch.setattr(runner, "choose", lambda spec, shape, *rest: shapes.append(shape) or choose(spec, shape, *rest))
    train("--doc_mask")
    train("--overwrite")
    assert shapes[0] == replace(shapes[1], doc_mask=True)


def test_a_checkpoint_is_sampled_as_it_was_trained(dataset, fastgpt, monkeypatch):
    assert fastgpt("train", "--dataset=letters", *TINY)[0] == 0
    monkeypatch.setattr(tokenizer.Chars, "end_of_text", 25)
    sample = ["sample", "--device=cpu", "--num_samples=1", "--max_new_tokens=9", "--temperature=0"]
    texts = []
    for doc_mask in (False, True):
        saved = torch.load("out/ckpt.pt", weights_only=True)
        saved["config"]["doc_mask"] = doc_mask
        for name, weight in saved["model"].items():
            if "c_attn" in name and not doc_mask:
                weight.mul_(100)
        torch.save(saved, "out/ckpt.pt")
        texts.append([fastgpt(*sample, f"--start={before}zab")[1].partition("zab")[2] for before in ("mmmm", "aqxk")])
    across, within = texts
    assert across[0] != across[1]
    assert within[0] == within[1]


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        (
            dict(vocab_size=50304, itos={0: "a"}, stoi={"a": 0}),
            "the dataset's tokenizer, chars, has no token between documents",
        ),
        (dict(vocab_size=50304, tokenizer="bytes"), "the dataset's tokenizer, bytes, has no token between documents"),
        (None, "train.bin has no separator, token 50256; it is one document: leave the flag out"),
    ],
)
def test_a_dataset_without_separators_is_refused(documents, fastgpt, meta, said):
    if meta is None:
        np.zeros(900, "<u2").tofile(documents / "train.bin")
    else:
        (documents / "meta.pkl").write_bytes(pickle.dumps(meta))
    status, _, err = fastgpt("train", "--dataset=documents", *TINY, "--doc_mask")
    assert status == 2
    assert err.startswith("fastgpt: error: --doc_mask=True: ")
    assert said in err
    assert err.count("\n") == 1


def test_the_separator_is_the_tokenizers(monkeypatch):
    class Encoding:
        n_vocab, eot_token, special_tokens_set = 9, 7, {tokenizer.END_OF_TEXT}

    monkeypatch.setattr(tokenizer, "get_tokenizer", lambda name: tokenizer.Tiktoken(Encoding()))
    assert tokenizer.separator(dict(vocab_size=9, tokenizer="o200k_base")) == 7
    Encoding.special_tokens_set = set()
    with pytest.raises(UserError, match="r50k"):
        tokenizer.separator(dict(vocab_size=9, tokenizer="r50k"))
