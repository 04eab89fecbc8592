"""Token files, batches in nanoGPT's order, and preparing a text."""

import os
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from helpers import write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import data, tokenizer
from fastgpt import prepare as preparing
from fastgpt.config import TrainConfig, UserError

# ---- reading ----


def test_shards_are_one_stream(workdir):
    all_tokens = np.random.default_rng(0).integers(0, 50257, 1000)
    cuts = [0, 400, 401, 700, 1000]  # one shard of a single token: a row may cross two borders
    for i, (a, b) in enumerate(pairwise(cuts)):
        write_shard(workdir / f"x_train_{i:06d}.bin", all_tokens[a:b])
    tokens = data.Tokens(sorted(workdir.glob("*.bin")), 50304)
    assert len(tokens) == 1000
    for start in (0, 395, 399, 400, 401, 690, 990):
        assert tokens.read([start, 0], 10).tolist() == [
            all_tokens[start : start + 10].tolist(),
            all_tokens[:10].tolist(),
        ]
    mixed = data.Tokens([workdir / "x_train_000000.bin", workdir / "x_train_000003.bin"], 50304)
    assert mixed.read([398], 4)[0].tolist() == [*all_tokens[398:400], *all_tokens[700:702]]


def test_llama_shards_and_large_vocabularies_are_uint32(workdir):
    write_shard(workdir / "a.bin", [1, 100_000, 3], 20240801, 7, "<u4")
    assert data.Tokens([workdir / "a.bin"], 128_256).read([0], 3)[0].tolist() == [1, 100_000, 3]
    np.array([1, 70_000], "<u4").tofile(workdir / "b.bin")
    assert data.Tokens([workdir / "b.bin"], 100_277).read([0], 2)[0].tolist() == [1, 70_000]


def test_a_folder_of_shards_is_a_dataset(workdir):
    for split in ("train", "val"):
        (workdir / "data/fineweb").mkdir(parents=True, exist_ok=True)
        write_shard(workdir / f"data/fineweb/fineweb_{split}_000001.bin", range(100))
    train, val, meta, vocab_size = data.load_dataset(TrainConfig(dataset="fineweb"))
    assert (len(train), len(val), meta, vocab_size) == (100, 100, None, 50304)
    train, val, *_ = data.load_dataset(
        TrainConfig(
            dataset="none", train_data="data/fineweb/*train*.bin", val_data="data/fineweb/fineweb_val_000001.bin"
        )
    )
    assert (len(train), len(val)) == (100, 100)


def test_batches_are_nanogpts_from_the_same_generator(dataset):
    """Offsets with replacement from torch's own generator, y one token on; drawn when asked, read when it may."""
    stream = np.fromfile(dataset / "train.bin", "<u2").astype(np.int64)
    torch.manual_seed(7)
    expected = []
    for _ in range(3):
        ix = torch.randint(len(stream) - 16, (4,))
        expected.append((np.stack([stream[i : i + 16] for i in ix]), np.stack([stream[i + 1 : i + 17] for i in ix])))
    after = torch.get_rng_state()
    torch.manual_seed(7)
    batches = data.Batches(data.Tokens([dataset / "train.bin"], 26), 4, 16, "cpu")
    for x, y in expected:
        batches.prefetch()
        got = batches.get()
        assert got[0].dtype == torch.int64
        assert got[0].is_contiguous()
        assert (got[0].numpy() == x).all()
        assert (got[1].numpy() == y).all()
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(7)
    assert all((a.numpy() == x).all() for (a, _), (x, _) in zip(batches.take(3), expected, strict=True))
    assert torch.equal(torch.get_rng_state(), after)  # three batches, three draws: none ahead of its time


def test_a_generator_of_its_own_leaves_torchs_alone(dataset):
    before = torch.get_rng_state()
    batches = data.Batches(
        data.Tokens([dataset / "val.bin"], 26), 4, 16, "cpu", data.Draws(torch.Generator().manual_seed(3))
    )
    list(batches.take(5))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_last_token_is_reached_and_no_further(workdir):
    np.arange(18, dtype="<u2").tofile(workdir / "t.bin")
    batches = data.Batches(data.Tokens([workdir / "t.bin"], 26), 200, 16, "cpu")
    batches.prefetch()
    x, y = batches.get()
    assert set(x[:, 0].tolist()) == {0, 1}  # nanoGPT's range: len - block_size starts
    assert y.max() == 17


# ---- meta.pkl ----


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Evil()),
        pickle.dumps({"vocab_size": Evil()}),
        pickle.dumps({"vocab_size": np.int64(3)}),
        pickle.dumps({"vocab_size": "3"}),
        pickle.dumps({"vocab_size": -1}),
        pickle.dumps([1, 2]),
        pickle.dumps({"itos": {0: "a"}}),
        b"",
        b"\x80",
    ],
)
def test_a_meta_that_is_not_plain_data_is_refused_and_not_run(workdir, content):
    (workdir / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError, match=r"meta\.pkl: not the meta\.pkl of a dataset"):
        data.load_meta(workdir)
    assert not (workdir / "pwned").exists()


# ---- tokenizers ----


@pytest.mark.parametrize("extra", [{}, {"itos": ["a", "b"]}, {"itos": {"a": 0}}, {"itos": {0: 1}}])
def test_a_meta_without_characters_trains_but_is_no_tokenizer(workdir, extra):
    """nanoGPT reads vocab_size alone to train."""
    (workdir / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 2, **extra}))
    meta = data.load_meta(workdir)
    with pytest.raises(UserError, match=r"meta\.pkl has no `itos`"):
        tokenizer.from_meta(meta)


def test_ids_in_an_encodings_holes_are_not_decodable():
    """cl100k_base's last ids have such: to sample one would be an error in decode."""
    ranks = {bytes([i]): i for i in range(256)}
    tok = tokenizer.Tiktoken(
        tiktoken.Encoding("holes", pat_str=r".", mergeable_ranks=ranks, special_tokens={"<|endofprompt|>": 260})
    )
    assert tok.decodable(264).nonzero().flatten().tolist() == [*range(256), 260]
    assert tok.encode_prompt("<|endofprompt|>") == list(b"<|endofprompt|>")
    assert tokenizer.Chars({0: "a", 2: "b"}).decodable(4).tolist() == [True, False, True, False]


@given(st.text())
def test_bytes_are_the_texts_bytes(text):
    tok = tokenizer.get_tokenizer("bytes")
    assert tok.encode_array(text).tolist() == tok.encode_prompt(text) == list(text.encode())
    assert tok.decode(tok.encode_prompt(text)) == text
    assert tok.n_vocab == 256


def test_every_byte_sequence_decodes():
    tok = tokenizer.get_tokenizer("bytes")
    assert tok.decode(range(256)).count("\ufffd") == 128


@given(st.text(min_size=1))
def test_chars_round_trip(text):
    tok = tokenizer.Chars.of(set(text))
    assert tok.decode(tok.encode_array(text).tolist()) == text
    assert tok.encode_prompt(text) == tok.encode_array(text).tolist()
    assert [tok.itos[i] for i in range(tok.n_vocab)] == sorted(set(text))


# ---- preparing ----

TEXT = "".join(f"Line {i}: the quick brown fox, {i * 37 % 101} jumps;\n\n  over  the lazy dög ☃\n" for i in range(3000))


def merging():
    """A tiktoken encoding with GPT-2's pattern and a few merges, and its end-of-text mark: no download."""
    ranks = {bytes([i]): i for i in range(256)}
    for merge in (b"th", b"the", b" t", b" the", b"\n\n", b"  ", b" o", b"er", b"qu"):
        ranks[merge] = len(ranks)
    pat = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    return tiktoken.Encoding(
        "gpt2", pat_str=pat, mergeable_ranks=ranks, special_tokens={tokenizer.END_OF_TEXT: len(ranks)}
    )


@pytest.fixture
def gpt2(monkeypatch):
    """The name gpt2 leads to `merging()`: the real table needs the network."""
    encoding = merging()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    return encoding


def read(folder, dtype="<u2"):
    return [np.fromfile(Path(folder) / f"{split}.bin", dtype) for split in ("train", "val")]


@pytest.mark.parametrize("name", ["bytes", "chars", "gpt2"])
def test_prepare_is_nanogpts_prepare(workdir, gpt2, name, capsys):
    """90% and 10% of the characters, each part tokenized as if whole, whatever blocks it was read in."""
    (workdir / "in.txt").write_text(TEXT, encoding="utf-8")
    preparing.prepare("in.txt", name, "data/x")
    n = int(len(TEXT) * 0.9)
    chars = sorted(set(TEXT))
    whole = {
        "bytes": lambda s: list(s.encode()),
        "chars": lambda s: [chars.index(c) for c in s],
        "gpt2": gpt2.encode_ordinary,
    }[name]
    for got, text in zip(read("data/x"), (TEXT[:n], TEXT[n:]), strict=True):
        assert got.tolist() == whole(text)
    meta = data.load_meta("data/x")
    assert meta is None if name == "gpt2" else meta["vocab_size"] == {"bytes": 256, "chars": len(chars)}[name]
    if name != "gpt2":  # nanoGPT's sample.py reads these two
        assert all(meta["stoi"][c] == i for i, c in meta["itos"].items())
        assert tokenizer.from_meta(meta).decode(read("data/x")[1].tolist()) == TEXT[n:]
    assert sorted(os.listdir("data/x")) == (["meta.pkl"] if meta else []) + ["train.bin", "val.bin"]
    assert "train.bin: " in capsys.readouterr().out


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(alphabet="ab1 \n\t.é☃'", max_size=60), min_size=1, max_size=4), st.integers(1, 40), st.data())
def test_blocks_change_no_token_and_lose_no_text(tmp_path_factory, texts, size, draw):
    """The cuts for streaming are where GPT-2's pattern cuts too, on text full of odd white space."""
    folder = tmp_path_factory.mktemp("blocks")
    files = []
    for i, text in enumerate(texts):
        files.append(folder / str(i))
        files[-1].write_text(text, encoding="utf-8", newline="")
    texts = [f.read_text(encoding="utf-8") for f in files]  # universal newlines
    n_train = draw.draw(st.integers(0, sum(map(len, texts))))
    encode = merging().encode_ordinary
    got = {"train": [], "val": []}
    ends = 0
    for split, text, end in preparing.blocks(files, n_train, size):
        got[split] += [*encode(text), "END"] if end else encode(text)
        ends += end
    expected = {"train": [], "val": []}
    left = n_train
    for text in texts:
        head, tail = text[:left], text[left:]
        expected["train"] += encode(head)
        expected["val"] += encode(tail)
        left -= len(head)
        expected["train" if left > 0 else "val"].append("END")
    assert ends == len(texts)
    assert got == expected


def test_memory_stays_constant(workdir, monkeypatch):
    """However large the file, only a bounded number of bounded blocks is in flight."""
    with open("big.txt", "w") as f:
        for _ in range(40):
            f.write(TEXT)
    live, most = 0, 0
    original = preparing.blocks

    def counted(files, n_train):
        nonlocal live, most
        for block in original(files, n_train, size=2**15):
            live += 1
            most = max(most, live)
            yield block

    def encoded(text):
        nonlocal live
        live -= 1
        assert len(text) < 2**15 + 2**12
        return np.zeros(len(text))

    monkeypatch.setattr(preparing, "blocks", counted)
    monkeypatch.setattr(tokenizer.Bytes, "encode_array", lambda self, text: encoded(text))
    preparing.prepare("big.txt", "bytes", "data/big")
    assert 1 < most <= 2 * os.cpu_count()


def test_a_folder_is_its_files_in_order_and_documents_end_in_the_mark(workdir, gpt2, capsys):
    (workdir / "in/sub").mkdir(parents=True)
    for name, text in {"a.txt": "one two ", "sub/b.txt": "three", "z.txt": "four" * 5}.items():
        (workdir / "in" / name).write_text(text)
    (workdir / "in/image.bin").write_bytes(b"\xff\xfe\x00")
    preparing.prepare("in", "gpt2", "data/g")
    mark = gpt2.eot_token
    assert np.concatenate(read("data/g")).tolist().count(mark) == 3
    assert (
        gpt2.decode(np.concatenate(read("data/g")).tolist()).replace(tokenizer.END_OF_TEXT, "|")
        == "one two |three|" + "four" * 5 + "|"
    )
    assert "passed over 1 of 4 files: not UTF-8 text" in capsys.readouterr().out


def test_another_tokenizers_meta_does_not_stay(workdir, gpt2):
    (workdir / "in.txt").write_text("some text")
    for name in ("bytes", "gpt2"):
        preparing.prepare("in.txt", name, "data/x")
    assert data.load_meta("data/x") is None


def test_the_end_mark_within_a_text_is_text(gpt2):
    tok = tokenizer.Tiktoken(gpt2)
    assert gpt2.eot_token not in tok.encode_array(tokenizer.END_OF_TEXT)
    assert tok.encode_prompt(tokenizer.END_OF_TEXT) == [gpt2.eot_token]


def test_shards_are_read_in_the_order_of_their_names(workdir):
    (workdir / "data/s").mkdir(parents=True)
    for i in (2, 1, 3):
        for split in ("train", "val"):
            write_shard(workdir / f"data/s/s_{split}_{i}.bin", [i] * 9)
    for flags in ({}, {"train_data": "data/s/*train*"}):
        train, *_ = data.load_dataset(TrainConfig(dataset="s", **flags))
        assert train.read([0], 27)[0].tolist() == [1] * 9 + [2] * 9 + [3] * 9


def test_what_was_prepared_is_not_prepared_again(workdir):
    (workdir / "a.txt").write_text("some text")
    (workdir / ".git").mkdir()
    (workdir / ".git/index").write_text("hidden")
    for _ in range(3):
        preparing.prepare(".", "bytes", "data/x")
        assert len(np.concatenate(read("data/x"))) == 9


def test_vocabularies_above_65536_are_written_as_uint32(workdir, monkeypatch):
    class Large(tokenizer.Bytes):
        def __init__(self):
            super().__init__()
            self.n_vocab = 70_000

        def encode_array(self, text):
            return np.full(len(text), 69_999)

        def meta(self):
            return {"vocab_size": 70_000, "tokenizer": "cl100k_base"}

    monkeypatch.setattr(tokenizer, "get_tokenizer", lambda name: Large())
    (workdir / "in.txt").write_text("x" * 100)
    preparing.prepare("in.txt", "cl100k_base", "data/l")
    assert [set(part) for part in read("data/l", "<u4")] == [{69_999}, {69_999}]
    train, *_ = data.load_dataset(TrainConfig(dataset="l"))
    assert train.read([3], 5)[0].tolist() == [69_999] * 5


def test_a_failure_leaves_nothing_and_overwrites_nothing(workdir, monkeypatch):
    (workdir / "in.txt").write_text(TEXT)
    preparing.prepare("in.txt", "bytes", "data/x")
    before = read("data/x")
    monkeypatch.setattr(tokenizer.Bytes, "encode_array", lambda self, text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        preparing.prepare("in.txt", "bytes", "data/x")
    assert sorted(os.listdir("data/x")) == ["meta.pkl", "train.bin", "val.bin"]
    assert all((a == b).all() for a, b in zip(before, read("data/x"), strict=True))


def test_the_embedded_corpus_is_real_text_prepared_once(workdir, capsys, monkeypatch):
    train, val, meta, vocab_size = data.load_dataset(TrainConfig(dataset="python-stdlib"))
    assert vocab_size == 256
    assert 5e6 < len(train) < 50e6
    assert len(train) / len(val) == pytest.approx(9, rel=0.05)
    text = tokenizer.from_meta(meta).decode(val.read([0], 20_000)[0].tolist())
    assert text.count("def ") > 20
    assert "preparing the embedded corpus, once" in capsys.readouterr().out
    monkeypatch.setattr(preparing, "prepare", None)
    data.load_dataset(TrainConfig(dataset="python-stdlib"))
