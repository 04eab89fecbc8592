"""GPT-2 in Hugging Face's format, in and out, against transformers itself; and the tokenizers that go with it."""

import hashlib
import json
import os
import pickle
import random
import shutil
import stat
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from conftest import TINY, command, in_processes, run_script
from safetensors.torch import load_file, save_file

from fastgpt import checkpoint, export, files, huggingface, sharded, tokenizer
from fastgpt.config import ExportConfig, GPTConfig, UserError
from fastgpt.model import ACTIVATIONS, GPT

SHAPE = dict(n_layer=3, n_head=2, n_embd=16, vocab_size=40, n_positions=16, bos_token_id=None, eos_token_id=None)
IDS = torch.randint(40, (2, 16), generator=torch.Generator().manual_seed(1))


def save(folder, **settings):
    """A model of transformers with random weights, in eval mode; saved in a folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(**{**SHAPE, **settings})).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)  # biases and LayerNorms too: a swapped one must show
    theirs.save_pretrained(folder)
    return theirs


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, ids)[0] if isinstance(model, GPT) else model(ids).logits


def change(folder, **settings):
    """Change the config.json in a folder; None takes a field out."""
    path = Path(folder) / "config.json"
    config = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def change_weights(folder, f):
    """Change the tensors in a folder's model.safetensors by f(dict)."""
    weights = load_file(Path(folder) / "model.safetensors")
    f(weights)
    save_file({k: v.contiguous() for k, v in weights.items()}, Path(folder) / "model.safetensors")


# ---- in ----


@pytest.mark.parametrize(
    ("settings", "activation"),
    [
        (dict(activation_function="gelu"), ""),
        (dict(activation_function="gelu_new"), "gelu_tanh"),  # OpenAI's
        (dict(activation_function="gelu_pytorch_tanh"), "gelu_tanh"),
        (dict(activation_function="gelu_fast"), "gelu_tanh"),
        (dict(activation_function="relu"), ""),
        (dict(activation_function="gelu", scale_attn_weights=False), ""),
        (dict(activation_function="gelu", scale_attn_by_inverse_layer_idx=True), ""),
        (dict(activation_function="gelu", scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True), ""),
        (dict(activation_function="gelu", reorder_and_upcast_attn=True), ""),
        (dict(activation_function="gelu", n_inner=64, resid_pdrop=0.3), ""),
    ],
)
def test_every_config_computes_what_transformers_computes(tmp_path, settings, activation):
    theirs = save(tmp_path, **settings)
    ours = huggingface.load(str(tmp_path), activation=activation).eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)
    assert ours.config == GPTConfig(16, 40, 3, 2, 16, 0.0, True)


def test_openais_weights_run_with_erf_unless_asked(tmp_path, capsys):
    theirs = save(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path), dict(dropout=0.1)).eval()
    said = capsys.readouterr().out
    assert (
        "activation: gelu, as nanoGPT runs such weights; the weights were trained with what --activation=gelu_tanh"
        in said
    )
    apart = (logits(ours) - logits(theirs)).abs().max()
    assert 1e-5 < apart < 1e-2
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    forms = [ACTIVATIONS[name]()(x) for name in ("gelu", "gelu_tanh")]
    assert 4.7e-4 < (forms[0] - forms[1]).abs().max() < 4.8e-4  # what docs/huggingface.md says
    ours.set_activation("gelu_tanh")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)


def test_files_as_they_are_on_the_hub(tmp_path):
    """OpenAI's: names without `transformer.`, and the causal mask; in parts; in half precision; as pytorch_model.bin."""
    theirs = save(tmp_path, activation_function="gelu")

    def as_openai(weights):
        for key in list(weights):
            weights[key.removeprefix("transformer.")] = weights.pop(key)
        for i in range(3):
            weights[f"h.{i}.attn.bias"] = torch.ones(16, 16).tril()[None, None]
            weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        weights["lm_head.weight"] = weights["wte.weight"].clone()

    change_weights(tmp_path, as_openai)
    weights = load_file(tmp_path / "model.safetensors")
    config = (tmp_path / "config.json").read_text()

    def equal(name, rtol=1e-5):
        (tmp_path / name / "config.json").write_text(config)
        torch.testing.assert_close(
            logits(huggingface.load(str(tmp_path / name)).eval()), logits(theirs), rtol=rtol, atol=rtol
        )

    for name in ("parts", "half", "bin", "bins"):
        (tmp_path / name).mkdir()
    halves = [dict(list(weights.items())[i::2]) for i in range(2)]
    for folder, stem, write in (
        ("parts", "model-{}-of-2.safetensors", save_file),
        ("bins", "pytorch_model-{}-of-2.bin", torch.save),
    ):
        names = {}
        for i, part in enumerate(halves):
            write(part, tmp_path / folder / stem.format(i + 1))
            names |= dict.fromkeys(part, stem.format(i + 1))
        index = "model.safetensors.index.json" if folder == "parts" else "pytorch_model.bin.index.json"
        (tmp_path / folder / index).write_text(json.dumps({"metadata": {}, "weight_map": names}))
        equal(folder)
    save_file({k: v.half() for k, v in weights.items()}, tmp_path / "half" / "model.safetensors")
    equal("half", 2e-2)
    torch.save(weights, tmp_path / "bin" / "pytorch_model.bin")
    equal("bin")
    (tmp_path / "parts" / "model-2-of-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-2-of-2\.safetensors is missing"):
        huggingface.load(str(tmp_path / "parts"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_inner", 32), ("layer_norm_epsilon", 1e-6), ("tie_word_embeddings", False), ("add_cross_attention", True), ("n_ctx", 32),
        ("model_type", "llama"), ("architectures", ["GPT2ForSequenceClassification"]), ("activation_function", "silu"),
        ("quantization_config", {"bits": 4}), ("auto_map", {"AutoModelForCausalLM": "x.Y"}), ("scale_attn_weights", 2), ("n_head", 3),
        ("n_layer", 10**9), ("n_embd", 16.0), ("vocab_size", True), ("n_positions", 2**40), ("is_causal", False),
        ("num_attention_heads", 4), ("num_hidden_layers", 2), ("per_layer_config", {"0": {"scale_attn_weights": False}}),
    ],
)  # fmt: skip
def test_a_config_that_asks_for_another_function_is_refused_by_field_and_value(tmp_path, fastgpt, field, value):
    save(tmp_path)
    change(tmp_path, **{field: value})
    status, _, err = fastgpt("sample", "--device=cpu", f"--init_from={tmp_path}")
    assert (status, err.count("\n")) == (2, 1)
    assert f"--init_from={tmp_path}: config.json" in err
    assert {"n_positions": "block_size"}.get(field, field) in err
    assert json.dumps(value)[:20].strip("[") in err or str(value) in err


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda w: w.pop("transformer.h.1.mlp.c_fc.bias"), "its files lack the tensor transformer.h.1.mlp.c_fc.bias"),
        (lambda w: w.pop("transformer.wte.weight"), "its files lack the tensor transformer.wte.weight"),
        (lambda w: w.update(score=torch.zeros(3)), "its files have the tensor transformer.score, which no GPT-2"),
        (lambda w: w.update({"transformer.wpe.weight": torch.zeros(8, 16)}), r"wpe.weight is of shape \(8, 16\); .* shape \(16, 16\)"),
        (lambda w: w.update({"transformer.h.0.attn.c_attn.weight": torch.zeros(48, 16)}), r"of shape \(48, 16\); .* \(16, 48\)"),
        (lambda w: w.update({"transformer.ln_f.bias": torch.zeros(16).int()}), "ln_f.bias is no tensor of floats"),
        (lambda w: w.update({"lm_head.weight": torch.zeros(40, 16)}), "lm_head.weight and wte.weight differ"),
        (lambda w: w.update({"wte.weight": torch.zeros(40, 16)}), "with and without the prefix"),
        (lambda w: w.update({"transformer.h.0.attn.bias": torch.ones(9)}), r"h.0.attn.bias has the shape \(9,\), and is no mask"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_the_models_are_refused_by_name(tmp_path, how, said):
    save(tmp_path)
    change_weights(tmp_path, how)
    with pytest.raises(UserError, match=said):
        huggingface.load(str(tmp_path))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_files_that_lie_or_want_to_run(workdir):
    save("m")
    weights = load_file("m/model.safetensors")
    os.remove("m/model.safetensors")
    torch.save({**weights, "x": Evil()}, "m/pytorch_model.bin")
    with pytest.raises(UserError, match=r"it asks for posix\.mkdir"):
        huggingface.load("m")
    assert not os.path.exists("ran")
    torch.save({**weights, "transformer.wte.weight": torch.zeros(1, 16).expand(40, 16)}, "m/pytorch_model.bin")
    with pytest.raises(UserError, match=r"larger than its memory|strides"):
        huggingface.load("m")
    shared = torch.zeros(16, 48)
    for i in range(3):
        weights[f"transformer.h.{i}.attn.c_attn.weight"] = shared
    torch.save(weights, "m/pytorch_model.bin")
    huggingface.load("m")  # as a tied one
    Path("m/pytorch_model.bin").write_bytes(pickle.dumps(weights))
    with pytest.raises(UserError, match=r"pytorch_model\.bin: not a readable checkpoint"):
        huggingface.load("m")
    torch.save(weights, "m/pytorch_model.bin")
    with zipfile.ZipFile("m/pytorch_model.bin") as z:
        records = {name: z.read(name) for name in z.namelist()}
    with zipfile.ZipFile("m/pytorch_model.bin", "w") as z:
        for name in [name for name in records if not name.endswith("version")]:
            z.writestr(name, records[name])
    with pytest.raises(UserError, match=r"m: pytorch_model\.bin: PyTorch cannot read it"):
        huggingface.load("m")
    with pytest.raises(UserError, match=r"=m/config\.json: it is no folder; give the one that has"):
        huggingface.load("m/config.json")
    os.remove("m/pytorch_model.bin")
    with pytest.raises(UserError, match=r"it has neither model\.safetensors nor pytorch_model\.bin"):
        huggingface.load("m")
    Path("m/model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match=r"says that 1,099,511,627,776 bytes describe its tensors"):
        huggingface.load("m")
    header = json.dumps({"wte.weight": {"dtype": "F32", "shape": [2**40, 16], "data_offsets": [0, 2**46]}}).encode()
    Path("m/model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match=r"model\.safetensors is no whole safetensors file"):
        huggingface.load("m")
    for name in ("../m", "pytorch_model.bin", 3):
        os.path.exists("m/model.safetensors") and os.remove("m/model.safetensors")
        Path("m/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match=r"does not name files of this folder that end in \.safetensors"):
            huggingface.load("m")


# ---- the hub ----


def cached(home, model, folder):
    """A folder as the hub's cache under HF_HOME has it."""
    place = Path(home) / "hub" / f"models--{model.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("c0ffee")
    shutil.copytree(folder, place / "snapshots" / "c0ffee")
    return place / "snapshots" / "c0ffee"


@pytest.fixture
def offline(monkeypatch, workdir):
    """huggingface_hub with a cache of its own, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(workdir / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return workdir / "home"


def test_an_id_of_the_hub_is_read_from_its_cache_without_transformers(workdir, monkeypatch):
    theirs = save("m", activation_function="gelu")
    cached("home", "somebody/some-gpt2", "m")
    cached("home", "distilgpt2", "m")
    monkeypatch.setenv("HF_HOME", str(workdir / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = run_script(
        """import sys
sys.modules["transformers"] = None
import torch
from fastgpt.model import GPT
for name in sys.argv[1:]:
    model = GPT.from_pretrained(name).eval()
ids = torch.arange(16)[None]
print(model(ids, ids)[0].sum().item())""",
        "somebody/some-gpt2", "distilgpt2",
    )  # fmt: skip
    assert "loading weights from pretrained gpt: somebody/some-gpt2" in said
    assert float(said.splitlines()[-1]) == pytest.approx(logits(theirs, torch.arange(16)[None]).sum().item(), rel=1e-4)


def test_what_the_hub_cannot_give_is_a_line(offline, fastgpt):
    save("m")
    place = cached(offline, "somebody/half", "m")
    (place / "model.safetensors").unlink()
    for name, said in (
        ("gpt2-large", "no GPT-2 weights could be loaded from the hub: Cannot find"),
        ("somebody/nothing", "no GPT-2 weights could be loaded from the hub"),
        ("somebody/half", "it has neither model.safetensors nor pytorch_model.bin"),
        ("no/such/folder", "there is no such folder"),
        ("../elsewhere", "there is no such folder"),
        ("resme", "'resume'"),
    ):
        status, _, err = fastgpt("sample", "--device=cpu", f"--init_from={name}")
        assert (status, err.count("\n")) == (2, 1), err
        assert f"--init_from={name}" in err
        assert said in err
    torch.save(load_file("m/model.safetensors"), place / "pytorch_model.bin")
    assert huggingface.load("somebody/half").config.n_layer == 3


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    save(tmp_path)
    own_tokenizer(tmp_path)
    for library, call in (
        ("huggingface_hub", lambda: huggingface.load("gpt2")),
        ("safetensors", lambda: huggingface.load(str(tmp_path))),
        ("tokenizers", lambda: huggingface.tokenizer_meta(tmp_path)),
    ):
        with monkeypatch.context() as hidden:
            hidden.setitem(sys.modules, library, None)
            with pytest.raises(UserError, match=f"pip install .*{library}"):
                call()


# ---- tokenizers ----

TEXT = "".join(f"Line {i}: the brown fox, {i * 37 % 101} jumps;\n\n  over  the lazy dög ☃ don't\n" for i in range(200))


def own_tokenizer(folder, vocab_size=300):
    """A tokenizer of the library tokenizers, trained on TEXT, in a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[tokenizer.END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    made.enable_truncation(5)  # a tokenizer's own limits are not a dataset's
    made.save(str(Path(folder) / "tokenizer.json"))
    made.no_truncation()
    return made


def texts():
    """Texts with many kinds of characters, the same ones each time."""
    draw = random.Random(0)
    ranges = ((32, 127), (0, 0x3000), (0x1F300, 0x1F700))
    drawn = ("".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(60)) for _ in range(60))
    return ["", "lazy", TEXT[:500], "a\n\n\n b\t\tc  d ", "x <|endoftext|> y", *drawn]


def test_a_folders_own_tokenizer_from_sampling_to_training(workdir, fastgpt):
    save("m", vocab_size=304, activation_function="relu")  # padded beyond the tokenizer's 300
    theirs = own_tokenizer("m")
    status, out, err = fastgpt(
        "sample", "--device=cpu", "--init_from=m", "--num_samples=1", "--max_new_tokens=12", "--start=the fox"
    )
    assert status == 0, err
    assert "\nthe fox" in out
    meta = huggingface.tokenizer_meta("m")
    assert (meta["vocab_size"], meta["tokenizer"]) == (300, "huggingface")
    tok = tokenizer.from_meta(meta)
    assert tok.encode_array(tokenizer.END_OF_TEXT).tolist() != [0]
    for text in texts():
        ids = tok.encode_array(text).tolist()
        assert tok.decode(ids) == text
        assert tok.encode_prompt(text) == theirs.encode(text).ids
        assert (ids == theirs.encode(text).ids) == (tokenizer.END_OF_TEXT not in text)
    assert tok.end_of_text == 0
    assert tok.decodable(304).tolist() == [True] * 300 + [False] * 4

    (workdir / "a.txt").write_text(TEXT)
    assert fastgpt("prepare", "--input=a.txt", "--tokenizer=m", "--out=data/own")[0] == 0
    flags = ["--dataset=own", *TINY]
    status, out, err = fastgpt("train", *flags, "--init_from=m", "--sample_tokens=8")
    assert status == 0, err
    saved = sharded.load("out")
    assert saved["config"]["activation"] == "relu"
    assert saved["fastgpt"]["meta"] == meta
    shutil.rmtree("m")  # the checkpoint has all of it
    status, out, err = fastgpt("sample", "--device=cpu", "--num_samples=1", "--max_new_tokens=4", "--start=the")
    assert status == 0, err
    status, out, err = fastgpt("export", "--format=hf")
    assert status == 0, err
    assert huggingface.tokenizer_meta("out/hf") == meta
    for name in ("config.json", "generation_config.json"):
        ids = json.loads(Path("out/hf", name).read_text())
        assert (ids["bos_token_id"], ids["eos_token_id"]) == (0, 0)
    torch.testing.assert_close(
        logits(huggingface.load("out/hf").eval()), logits(checkpoint.build_model(saved).eval()), rtol=0, atol=0
    )


def test_a_tokenizer_that_does_not_fit_is_named(workdir, fastgpt):
    save("m", vocab_size=100)
    words = ("sample", "--device=cpu", "--init_from=m")
    status, _, err = fastgpt(*words)
    assert status == 2
    assert "m: it has no tokenizer.json, nor vocab.json and merges.txt, and its 100 tokens are not GPT-2's" in err
    own_tokenizer("m")
    status, _, err = fastgpt(*words)
    assert status == 2
    assert "--init_from=m: the model has 100 tokens, but the tokenizer 300: they do not belong together" in err
    for content, said in (("{}", "the library tokenizers cannot read it"), ("[", "tokenizer.json is no JSON")):
        Path("m/tokenizer.json").write_text(content)
        status, _, err = fastgpt(*words)
        assert (status, err.count("\n")) == (2, 1)
        assert said in err


MERGES = [("t", "h"), ("th", "e"), ("Ġ", "t"), ("Ġt", "h"), ("o", "n")]


def gpt2_like(folder, **changes):
    """vocab.json and merges.txt as GPT-2 has them, of a few merges."""
    chars = [huggingface.BYTE_CHARS[b] for b in huggingface.SEEN + huggingface.HIDDEN]
    vocab = {token: i for i, token in enumerate([*chars, *(a + b for a, b in MERGES), tokenizer.END_OF_TEXT])}
    Path(folder, "vocab.json").write_text(json.dumps({**vocab, **changes}))
    text = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES)
    Path(folder, "merges.txt").write_text(text)
    return hashlib.sha256(text.encode()).hexdigest()


def test_gpt2s_tokenizer_is_known_by_its_content(tmp_path, monkeypatch):
    from tiktoken_ext import openai_public
    from transformers import AutoTokenizer

    assert huggingface.GPT2_MERGES in openai_public.gpt2.__code__.co_consts  # tiktoken's own check of the same file
    monkeypatch.setattr(huggingface, "GPT2_MERGES", gpt2_like(tmp_path))
    assert huggingface.tokenizer_meta(tmp_path) is None
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    AutoTokenizer.from_pretrained(str(tmp_path)).save_pretrained(tmp_path)  # as transformers of today writes it
    assert huggingface.tokenizer_meta(tmp_path) is None
    good = json.loads((tmp_path / "tokenizer.json").read_text())
    for name, value in (
        ("added_tokens", [*good["added_tokens"], {**good["added_tokens"][0], "content": "<x>", "id": 300}]),
        ("normalizer", {"type": "Lowercase"}),
        ("pre_tokenizer", {**good["pre_tokenizer"], "add_prefix_space": True}),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**good, name: value}))
        assert huggingface.tokenizer_meta(tmp_path)["tokenizer"] == "huggingface", name
    (tmp_path / "tokenizer.json").unlink()
    gpt2_like(tmp_path, **{"th": 257, "the": 256})  # the same merges, other ids
    assert huggingface.tokenizer_meta(tmp_path)["tokenizer"] == "huggingface"


def test_vocab_and_merges_are_read_as_transformers_reads_them(tmp_path):
    from transformers import GPT2Tokenizer

    gpt2_like(tmp_path)
    theirs = GPT2Tokenizer.from_pretrained(str(tmp_path))
    tok = tokenizer.from_meta(huggingface.tokenizer_meta(tmp_path))
    for text in texts():
        assert tok.encode_prompt(text) == theirs(text)["input_ids"]
    (tmp_path / "added_tokens.json").write_text('{"<x>": 300}')
    with pytest.raises(UserError, match=r"added_tokens\.json and no tokenizer\.json"):
        huggingface.tokenizer_meta(tmp_path)


def small_tiktoken(name):
    """A tiktoken encoding of a few merges. Not as gpt2 it has a hole in its ids, as some of OpenAI's, and a token that no merges make."""
    ranks = {bytes([i]): i for i in range(256)}
    for token in (b"th", b"the", b" t", b" the", b"\n\n", b"  ", b"\xe2\x98", b"\xe2\x98\x83"):
        ranks[token] = len(ranks)
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    if name != "gpt2":
        ranks[b"lazy"] = len(ranks)
        pattern = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    special = {tokenizer.END_OF_TEXT: 264 if name == "gpt2" else 270}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


@pytest.mark.parametrize("name", ["bytes", "chars", "gpt2", "cl100k_base"])
def test_every_tokenizer_is_written_for_transformers_and_encodes_alike(tmp_path, monkeypatch, name):
    from transformers import AutoTokenizer

    every = texts()
    monkeypatch.setattr(tiktoken, "get_encoding", small_tiktoken)
    tok = tokenizer.Chars.of(set("".join(every))) if name == "chars" else tokenizer.get_tokenizer(name)
    spec, end_of_text = export.tokenizer_files(tok.meta(), 50304)
    assert end_of_text == tok.end_of_text
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in every:
        ids = tok.encode_prompt(text)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == tok.decode(ids) == text
    if name in ("bytes", "gpt2"):
        broken = [*range(256), 0xE2, 0x98]  # no UTF-8
        assert theirs.decode(broken) == tok.decode(broken)


def test_a_tokenizer_that_has_no_place_in_the_format_is_said(capsys, monkeypatch):
    assert export.tokenizer_files(tokenizer.Chars({0: "a", 1: "bc"}).meta(), 2) == (None, None)
    assert "no place for the token 'bc'" in capsys.readouterr().out
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: (_ for _ in ()).throw(OSError("no network")))
    assert export.tokenizer_files(None, 65) == (None, None)
    assert "the tokenizer has 50257 tokens, and the model 65" in capsys.readouterr().out
    assert export.tokenizer_files(None, 50304) == (None, 50256)
    assert "GPT-2's table could not be loaded" in capsys.readouterr().out


# ---- out ----


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of a few hundred iterations on bytes of TEXT, by name: their folders."""
    folder, here = tmp_path_factory.mktemp("runs"), os.getcwd()
    os.chdir(folder)
    Path("a.txt").write_text(TEXT)
    command("prepare", "--input=a.txt", "--tokenizer=bytes", "--out=data/text")
    long = ["--max_iters=200", "--lr_decay_iters=200", "--eval_interval=200", "--log_interval=100", "--seed=3"]
    command("train", "--dataset=text", *TINY, *long, "--out_dir=plain", "--dropout=0.1")
    tanh = ["--bias=True", "--activation=gelu_tanh"]
    command("train", "--dataset=text", *TINY, *long, *tanh, "--out_dir=tanh")
    os.chdir(here)
    return folder


def greedy(model, ids, n):
    """The likeliest tokens after ids, by transformers."""
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n, pad_token_id=0)


def assert_transformers_computes(folder, ours, text="the brown"):
    """transformers loads a folder, and has the logits of a GPT, and its greedy text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    tok = AutoTokenizer.from_pretrained(folder)
    ids = torch.randint(ours.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(logits(theirs, ids), logits(ours.eval(), ids), rtol=1e-5, atol=1e-5)
    prompt = torch.tensor([tok(text)["input_ids"]])
    room = 16 - prompt.size(1)
    continued = greedy(theirs, prompt, room)
    assert torch.equal(continued, ours.generate(prompt, room, temperature=0))
    return theirs, tok.decode(continued[0])


@pytest.mark.parametrize("name", ["plain", "tanh"])
def test_a_trained_model_in_transformers_and_back(runs, workdir, fastgpt, name):
    shutil.copytree(runs / name, "out")
    status, out, err = fastgpt("export", "--format=hf")
    assert status == 0, err
    assert "out/ckpt.pt, iteration 200, is now a folder of transformers: out/hf\n" in out
    assert sorted(os.listdir("out/hf")) == sorted(export.HF_FILES)
    assert stat.S_IMODE(os.stat("out/hf").st_mode) == 0o755
    ours = checkpoint.build_model(sharded.load("out"))
    theirs, text = assert_transformers_computes("out/hf", ours)
    c = theirs.config
    assert (c.activation_function, c.resid_pdrop) == (("gelu", 0.1) if name == "plain" else ("gelu_new", 0.0))
    assert (c.tie_word_embeddings, c.bos_token_id, c.eos_token_id) == (True, None, None)
    activation = [] if name == "plain" else ["--activation=gelu_tanh"]
    assert f"fastgpt sample --init_from=out/hf{' '.join(['', *activation])}\n" in out
    flags = ["--device=cpu", "--num_samples=1", "--start=the brown", "--temperature=0", "--max_new_tokens=7"]
    said = [fastgpt("sample", *flags, *words)[1] for words in ([], ["--init_from=out/hf", *activation])]
    assert text in said[0]
    assert text in said[1]


def test_a_sharded_checkpoint_in_transformers(dataset, fastgpt):
    flags = ["--dataset=letters", *TINY, "--max_iters=2", "--eval_interval=1", "--activation=relu"]
    in_processes(2, command, "train", *flags, "--parallel=fsdp")
    for words in ([], ["--out_dir=out/ckpt-0000002"]):
        status, out, err = fastgpt("export", "--format=hf", "--overwrite", *words)
        assert status == 0, err
        assert "out/ckpt-0000002, iteration 2, is now a folder of transformers: out/hf\n" in out
        assert_transformers_computes("out/hf", checkpoint.build_model(sharded.load("out")), "abc")
    status, out, err = fastgpt("export")
    assert status == 0, err
    assert "more text: fastgpt sample --out_dir=out\n" in out
    loaded = checkpoint.load("out", resume=True)
    assert checkpoint.build_model(loaded).activation == "relu"
    status, _, err = fastgpt("export", "--dtype=bfloat16", "--out_dir=out/ckpt-0000002", "--to=x.pt")
    assert "--dtype=bfloat16: a checkpoint to go on from is float32" in err


def test_bfloat16_halves_the_files(runs, workdir, fastgpt):
    from transformers import AutoModelForCausalLM

    ours = checkpoint.build_model(sharded.load(runs / "plain")).bfloat16().state_dict()
    status, _, err = fastgpt("export", f"--out_dir={runs / 'plain'}", "--format=hf", "--to=half", "--dtype=bfloat16")
    assert status == 0, err
    theirs = AutoModelForCausalLM.from_pretrained("half", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.transformer.wte.weight, ours["transformer.wte.weight"])
    assert torch.equal(theirs.transformer.h[1].mlp.c_fc.weight.t(), ours["transformer.h.1.mlp.c_fc.weight"])


def test_one_safetensors_file_has_nanogpts_names_and_the_settings(runs, workdir, fastgpt):
    from safetensors import safe_open

    status, out, err = fastgpt("export", f"--out_dir={runs / 'tanh'}", "--format=safetensors", "--to=a/b.safetensors")
    assert status == 0, err
    assert "is now one file: a/b.safetensors\nin Python: safetensors.torch.load_file('a/b.safetensors')" in out
    saved = sharded.load(runs / "tanh")
    found = load_file("a/b.safetensors")
    assert found.keys() == saved["model"].keys() - {"lm_head.weight"}
    assert all(torch.equal(v, saved["model"][k]) for k, v in found.items())
    with safe_open("a/b.safetensors", "pt") as f:
        about = f.metadata()
    assert GPTConfig(**json.loads(about["model_args"])) == checkpoint.build_model(saved).config
    assert json.loads(about["config"])["activation"] == "gelu_tanh"
    assert json.loads(about["iter_num"]) == 200


def llmc_forward(path, ids):
    """The logits of ids [T] by a file of llm.c's, read and computed as its train_gpt2.c does: in the order of its tensors."""
    header, data = np.fromfile(path, "<i4", 256), path.read_bytes()[1024:]
    magic, version, T, V, L, H, C, padded = header[:8].tolist()
    assert magic == 20240326
    assert not header[8:].any()
    bits = np.frombuffer(data, "<f4" if version == 3 else "<i2").copy()
    flat = torch.from_numpy(bits) if version == 3 else torch.from_numpy(bits).view(torch.bfloat16).float()
    shapes = [(padded, C), (T, C), (L, C), (L, C), (L, 3 * C, C), (L, 3 * C), (L, C, C), (L, C), (L, C), (L, C)]
    shapes += [(L, 4 * C, C), (L, 4 * C), (L, C, 4 * C), (L, C), (C,), (C,)]
    parts = flat.split([int(np.prod(shape)) for shape in shapes])  # raises if the file is longer or shorter
    wte, wpe, *layers, lnfw, lnfb = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
    assert not wte[V:].any()

    def norm(x, w, b):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * w + b

    x = wte[ids] + wpe[: len(ids)]
    for ln1w, ln1b, qkvw, qkvb, projw, projb, ln2w, ln2b, fcw, fcb, fcprojw, fcprojb in zip(*layers, strict=True):
        q, k, v = (t.view(-1, H, C // H).transpose(0, 1) for t in (norm(x, ln1w, ln1b) @ qkvw.t() + qkvb).split(C, -1))
        att = (q @ k.transpose(1, 2) / (C // H) ** 0.5).masked_fill(
            torch.ones(len(ids), len(ids)).triu(1).bool(), -torch.inf
        )
        x = x + (att.softmax(-1) @ v).transpose(0, 1).reshape(-1, C) @ projw.t() + projb
        h = norm(x, ln2w, ln2b) @ fcw.t() + fcb
        h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
        x = x + h @ fcprojw.t() + fcprojb
    return norm(x, lnfw, lnfb) @ wte[:V].t()


@pytest.mark.parametrize(
    ("name", "dtype", "atol"), [("tanh", "float32", 1e-5), ("tanh", "bfloat16", 0.1), ("plain", "float32", 1e-2)]
)
def test_llmcs_file_computes_the_same(runs, workdir, fastgpt, name, dtype, atol):
    status, out, err = fastgpt("export", f"--out_dir={runs / name}", "--format=llmc", "--to=m.bin", f"--dtype={dtype}")
    assert status == 0, err
    assert ("activations differ by at most 4.8e-4" in out) == (name == "plain")
    ours = checkpoint.build_model(sharded.load(runs / name)).eval()
    ids = torch.arange(100, 116)
    torch.testing.assert_close(llmc_forward(Path("m.bin"), ids), logits(ours, ids[None])[0], rtol=0, atol=atol)


def test_llmc_pads_the_vocabulary_and_has_no_relu(train, fastgpt):
    train("--activation=gelu_tanh")
    assert fastgpt("export", "--format=llmc")[0] == 0
    assert np.fromfile("out/model.bin", "<i4", 8).tolist() == [20240326, 3, 16, 26, 2, 2, 16, 128]
    ids = torch.arange(16)
    ours = checkpoint.build_model(sharded.load("out")).eval()
    torch.testing.assert_close(llmc_forward(Path("out/model.bin"), ids), logits(ours, ids[None])[0], rtol=0, atol=1e-5)
    train("--activation=relu", "--out_dir=relu")
    status, _, err = fastgpt("export", "--format=llmc", "--out_dir=relu")
    assert status == 2
    assert "trained with relu" in err
    assert not os.path.exists("relu/model.bin")


def test_what_stands_there_is_kept_and_a_failure_leaves_nothing(runs, workdir, fastgpt, monkeypatch):
    flags = ["export", f"--out_dir={runs / 'plain'}"]

    def refused(*words):
        status, _, err = fastgpt(*flags, *words)
        assert (status, err.count("\n")) == (2, 1), err
        return err

    places = {"hf": "a", "safetensors": "b", "llmc": "c"}
    for how, to in places.items():
        words = [f"--format={how}", f"--to={to}"]
        assert fastgpt(*flags, *words)[0] == 0
        assert f"--to={to}: it exists; replace it by --overwrite" in refused(*words)
        assert fastgpt(*flags, *words, "--overwrite")[0] == 0
    assert "--to=b: it is a file" in refused("--format=hf", "--to=b", "--overwrite")
    assert "--to=a: it is a folder" in refused("--format=llmc", "--to=a", "--overwrite")
    Path("a/mine.txt").write_text("")
    assert "it has mine.txt, which no export wrote" in refused("--format=hf", "--to=a", "--overwrite")
    os.remove("a/mine.txt")
    os.remove("a/config.json")
    Path("a/config.json").mkdir()
    Path("a/config.json/mine.txt").write_text("")
    assert "it has config.json, which no export wrote" in refused("--format=hf", "--to=a", "--overwrite")
    shutil.rmtree("a/config.json")
    assert "is one file already; --format=hf" in refused()
    assert "--to=b/x: cannot be written" in refused("--format=llmc", "--to=b/x")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "data_of", full)
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    for how, to in places.items():
        for words in ([f"--to={to}", "--overwrite"], ["--to=new"]):
            assert "cannot be written (No space left on device)" in refused(f"--format={how}", *words)
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    assert sorted(os.listdir()) == ["a", "b", "c"]


def test_a_run_that_saves_meanwhile_leaves_the_export_alone(runs, workdir, fastgpt, monkeypatch):
    shutil.copytree(runs / "plain", "out")

    def data_of(*args, data_of=export.data_of):
        files.remove_parts(Path("out"))  # what a run does before it saves
        return data_of(*args)

    monkeypatch.setattr(export, "data_of", data_of)
    before = set(os.listdir("out"))
    for how in ("hf", "safetensors", "llmc"):
        status, _, err = fastgpt("export", f"--format={how}")
        assert status == 0, err
    assert set(os.listdir("out")) - before == {"hf", "model.safetensors", "model.bin"}


def test_only_what_an_export_wrote_is_overwritten(runs, workdir, fastgpt):
    shutil.copytree(runs / "plain", "out")
    Path("thesis.tex").write_text("years of work")
    os.mkfifo("pipe")
    for to in ("thesis.tex", "out/ckpt.pt", "pipe"):
        before = os.path.isfile(to) and Path(to).read_bytes()
        for how in ("safetensors", "llmc"):
            status, _, err = fastgpt("export", f"--format={how}", f"--to={to}", "--overwrite")
            assert (status, err.count("\n")) == (2, 1)
            assert f"--to={to}: no export with --format={how} wrote this file" in err
            assert (os.path.isfile(to) and Path(to).read_bytes()) == before
    os.remove("pipe")
    for how, place in {"hf": "a", "safetensors": "b"}.items():  # what a link names is written, and the link stays
        os.symlink(Path(f"real-{place}").absolute(), place)
        for more in ([], ["--overwrite", "--dtype=bfloat16"]):
            assert fastgpt("export", f"--format={how}", f"--to={place}", *more)[0] == 0
        assert Path(place).is_symlink()
        assert Path(place).samefile(f"real-{place}")
    assert sorted(os.listdir()) == ["a", "b", "out", "real-a", "real-b", "thesis.tex"]
    assert {t.dtype for t in [*load_file("a/model.safetensors").values(), *load_file("b").values()]} == {torch.bfloat16}


def test_a_forks_checkpoint_without_a_loss_is_exported(runs, workdir, fastgpt):
    saved = torch.load(runs / "plain/ckpt.pt", weights_only=True)
    itself = []
    itself.append(itself)
    os.mkdir("out")
    for changes, said in (
        ({"best_val_loss": None}, None),
        ({"best_val_loss": torch.tensor(1.5)}, None),
        ({"config": {("a", "b"): 1, **saved["config"]}}, None),
        ({"config": {"a": itself}}, "settings cannot be written as JSON"),
    ):
        torch.save({**saved, **changes}, "out/ckpt.pt")
        status, _, err = fastgpt("export", "--format=safetensors", "--to=x", "--overwrite")
        assert (status, err.count("\n")) == ((2, 1) if said else (0, 0)), err
        assert (said or "") in err


def test_ids_that_are_no_tokens_are_not_drawn_by_transformers(runs, workdir, fastgpt):
    saved = torch.load(runs / "plain/ckpt.pt", weights_only=True)
    saved["fastgpt"]["meta"] = {"vocab_size": 256, "itos": {i: chr(i) for i in range(128) if i != 32}}
    wte = saved["model"]["transformer.wte.weight"]
    wte[200] = 9 * wte[101]  # likelier than any token
    saved["model"]["lm_head.weight"] = wte
    os.mkdir("out")
    torch.save(saved, "out/ckpt.pt")
    status, _, err = fastgpt("export", "--format=hf")
    assert status == 0, err
    from transformers import AutoModelForCausalLM

    theirs, prompt = AutoModelForCausalLM.from_pretrained("out/hf"), torch.tensor([[116, 104]])
    ours, allowed = huggingface.load("out/hf"), tokenizer.from_meta(saved["fastgpt"]["meta"]).decodable(256)
    text = ours.eval().generate(prompt, 14, temperature=0, allowed=allowed)
    assert torch.equal(greedy(theirs, prompt, 14), text)
    assert not torch.equal(ours.generate(prompt, 14, temperature=0), text)
    assert export.not_tokens({"vocab_size": 50304, "itos": {}}, 50304) == []


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"vocab_size": 256, "tokenizer": ["bytes"]}, "the checkpoint's meta: its tokenizer is ['bytes']"),
        ({"tokenizer": "bytes"}, "the checkpoint's meta: it has no vocab_size"),
        ({"vocab_size": 256, "itos": {i * 1000: "a" for i in range(9)}}, "256 tokens, but the tokenizer 8001"),
        ({"vocab_size": 256, "itos": {-1: "a", 0: "b"}}, "no `itos` from ids to characters"),
    ],
)
def test_a_checkpoint_with_another_tokenizer_than_it_can_be_is_a_line(runs, workdir, fastgpt, meta, said):
    saved = torch.load(runs / "plain/ckpt.pt", weights_only=True)
    os.mkdir("out")
    torch.save({**saved, "fastgpt": {**saved["fastgpt"], "meta": meta}}, "out/ckpt.pt")
    status, _, err = fastgpt("sample", "--device=cpu", "--num_samples=1", "--max_new_tokens=3", "--start=a")
    assert (status, err.count("\n")) == (2, 1)
    assert said in err


def test_the_default_places_are_in_the_run(runs):
    targets = {ExportConfig(format=how).to or export.TARGETS[how] for how in ("nanogpt", "hf", "safetensors", "llmc")}
    assert targets == {"ckpt.pt", "hf", "model.safetensors", "model.bin"}
    assert export.run_folder(Path("out")) == Path("out")


# ---- the activation ----


@pytest.mark.parametrize("name", ["gelu_tanh", "relu"])
def test_an_activation_is_kept_by_the_checkpoint(train, fastgpt, name):
    train(f"--activation={name}", "--max_iters=4")
    saved = sharded.load("out")
    assert saved["model_args"].keys() == GPTConfig().__dict__.keys()  # nanoGPT's sample.py makes its config of them
    model = checkpoint.build_model(saved)
    assert model.activation == name
    assert {type(block.mlp.gelu) for block in model.transformer.h} == {type(ACTIVATIONS[name]())}
    out = train("--init_from=resume", "--max_iters=8")
    assert f"from the checkpoint: activation = {name}" in out
    assert sharded.load("out")["config"]["activation"] == name
    train(f"--activation={name}", "--out_dir=whole")
    for key, weight in sharded.load("whole")["model"].items():
        assert torch.equal(weight, sharded.load("out")["model"][key]), key
    status, _, err = fastgpt("train", "--dataset=letters", *TINY, "--init_from=resume", "--activation=gelu")
    assert status == 2
    assert f"--activation=gelu: the checkpoint out/ckpt.pt has activation={name}" in err
    sample = ["sample", "--device=cpu", "--start=a", "--num_samples=1", "--max_new_tokens=2"]
    assert fastgpt(*sample)[0] == fastgpt(*sample, f"--activation={name}")[0] == 0
    status, _, err = fastgpt(*sample, "--activation=gelu")
    assert status == 2
    assert f"--activation=gelu: out/ckpt.pt was trained with {name}" in err


def test_nanogpts_checkpoint_means_erf_and_an_unknown_activation_is_refused(train, fastgpt):
    train()
    saved = torch.load("out/ckpt.pt", weights_only=True)
    assert saved["config"].pop("activation") == "gelu"
    torch.save(saved, "out/ckpt.pt")
    assert checkpoint.build_model(checkpoint.load("out")).activation == "gelu"
    saved["config"]["activation"] = "swiglu"
    for name in ("ckpt.pt", "ckpt-best.pt", "ckpt-0000004.pt"):
        torch.save(saved, f"out/{name}")
    status, _, err = fastgpt("sample", "--device=cpu", "--start=a")
    assert status == 2
    assert "its activation is 'swiglu'; GPT has gelu, gelu_tanh, relu" in err


def test_weights_and_a_flag_that_contradict(workdir, dataset, fastgpt):
    train = ["train", "--dataset=letters", *TINY, "--max_iters=1", "--eval_interval=1"]
    for function, asked, runs_with in (
        ("relu", [], "relu"), ("gelu_new", [], "gelu"), ("gelu_new", ["--activation=gelu_tanh"], "gelu_tanh"),
        ("relu", ["--activation=gelu"], None), ("gelu", ["--activation=relu"], None),
    ):  # fmt: skip
        save("m", vocab_size=26, activation_function=function)
        status, _, err = fastgpt(*train, "--init_from=m", "--overwrite", *asked)
        if runs_with:
            assert status == 0, err
            assert sharded.load("out")["config"]["activation"] == runs_with
        else:
            assert status == 2
            assert "is another function" in err


def test_a_dataset_of_another_tokenizer_than_the_weights_is_said(workdir, fastgpt, monkeypatch):
    os.mkdir("gpt2-like")
    with monkeypatch.context() as m:
        m.setattr(huggingface, "from_meta", None)
        huggingface.compare_tokenizers("gpt2-like", 50257, None, [1])  # loads no table
    save("m", vocab_size=40)
    chars = list(huggingface.BYTE_CHARS.values())[:40]  # themselves
    Path("m/tokenizer.json").write_text(json.dumps(huggingface.byte_level({c: i for i, c in enumerate(chars)}, [], {})))
    for name, itos in (("own", chars), ("other", chars[::-1])):
        os.makedirs(f"data/{name}")
        Path(f"data/{name}/meta.pkl").write_bytes(pickle.dumps({"vocab_size": 40, "itos": itos}))
        for split in ("train", "val"):
            (np.arange(400) % 40).astype("<u2").tofile(f"data/{name}/{split}.bin")
        words = [f"--dataset={name}", f"--out_dir={name}", *TINY, "--max_iters=1", "--eval_interval=1"]
        status, out, err = fastgpt("train", "--init_from=m", *words)
        assert status == 0, err
        assert ("warning: m has another tokenizer than the dataset" in out) == (name == "other")


def test_recomputed_blocks_with_another_activation_have_the_same_bits(workdir):
    from fastgpt.model import draws

    for name in ACTIVATIONS:
        grads = []
        for mode in ("none", "gelu", "block"):
            torch.manual_seed(0)
            model = GPT(GPTConfig(16, 40, 2, 2, 16))
            model.set_activation(name)
            model.set_recompute(mode)
            assert not draws(model.transformer.h[0])
            model(IDS, IDS, return_logits=False)[1].backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert torch.equal(grads[0], grads[1]), name
        assert torch.equal(grads[0], grads[2]), name
