"""Token files, batches in nanoGPT's order, and preparing a text."""

import contextlib
import gzip
import hashlib
import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import OrderedDict, deque
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import tiktoken
import torch
from conftest import TINY
from helpers import write_shard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fastgpt import __version__, data, documents, huggingface, tokenizer
from fastgpt import prepare as preparing
from fastgpt.config import TrainConfig, UserError
from fastgpt.lock import lock
from fastgpt.parse import parse_train

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


def save(path, tokens, dtype):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.asarray(tokens, dtype))


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "u1", "i1", "<i2", ">i4", "<u4", "<i8", ">u8"])
def test_npy_files_of_any_integers_are_token_files(workdir, dtype):
    tokens = np.random.default_rng(0).integers(0, 127, 300)
    save(workdir / "data/n/edu_train_000000.npy", tokens[:100], dtype)
    save(workdir / "data/n/edu_train_000001.npy", tokens[100:200], dtype)
    save(workdir / "data/n/edu_val_000000.npy", tokens[200:], dtype)
    for flags in ({"dataset": "n"}, {"train_data": "data/n/*train*.npy", "val_data": "data/n/edu_val_000000.npy"}):
        train, val, meta, _ = data.load_dataset(TrainConfig(**flags))
        assert train.read([0, 95], 105).tolist() == [tokens[:105].tolist(), tokens[95:200].tolist()]
        assert val.read([0], 100)[0].tolist() == tokens[200:].tolist()
        assert meta is None
        train.check_ids()


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros(9), "float64"),
        (np.zeros((3, 3), "u2"), r"\(3, 3\)"),
        (np.zeros((), "u2"), r"\(\)"),
        (np.zeros(0, "u2"), r"\(0,\)"),
        (np.array([Path()]), "object"),
        (np.zeros(9, "i2,i2"), "i2"),
        (np.zeros(9, bool), "bool"),
        (np.array(["a"]), "<U1"),
    ],
)
def test_an_npy_file_of_anything_else_is_refused(workdir, array, said):
    np.save("a.npy", array)
    with pytest.raises(UserError, match=rf"a\.npy: it is an array of .*{said}.*integers in one dimension"):
        data.Tokens(["a.npy"], 50304)


def test_an_npy_file_must_be_whole_and_has_no_negative_ids(workdir):
    save(workdir / "a.npy", range(100), "u2")
    good = Path("a.npy").read_bytes()
    for content in (good[:-1], good + b"\0", good + good):
        Path("a.npy").write_bytes(content)
        with pytest.raises(
            UserError, match=rf"a\.npy: its header promises 100 tokens, 328 bytes in all.*has {len(content)}"
        ):
            data.Tokens(["a.npy"], 50304)
    for content in (
        b"",
        good[:64],
        b"\0" * 200,
        good.replace(b"'shape'", b"'shapf'"),
        good.replace(b"\x93NUMPY\1", b"\x93NUMPY\7"),
    ):
        Path("a.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.npy: its \.npy header is damaged"):
            data.Tokens(["a.npy"], 50304)
    Path("a.bin").write_bytes(good)  # by another name it is no less a .npy file
    assert data.Tokens(["a.bin"], 50304).read([0], 100)[0].tolist() == list(range(100))
    for dtype in ("i2", "i8"):
        save(workdir / "b.npy", [5] * 50 + [-1] * 50, dtype)
        stream = data.Tokens(["a.bin", "b.npy"], 50304)
        for check in (stream.check_ids, lambda s=stream: s.read([0, 120], 60)):
            with pytest.raises(UserError, match=r"b\.npy: token id -1 is negative"):
                check()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_text_in_place_of_token_files_is_refused(workdir, name):
    (workdir / name).write_text("It was the best of times, it was the worst of times.")
    with pytest.raises(UserError, match=f"{name}: it is text, and no token file; fastgpt prepare --input={name} "):
        data.Tokens([name], 50304)


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
        pickle.dumps({"vocab_size": "3"}),
        pickle.dumps({"vocab_size": np.float64(3)}),
        pickle.dumps({"vocab_size": -1}),
        pickle.dumps({"vocab_size": 3, "itos": np.array(["a", "b", "c"])}),
        pickle.dumps({"vocab_size": 3, "stoi": {("a", "b"): 0}}),
        pickle.dumps(
            {"vocab_size": 3, "itos": {"a"}}
        ),  # of one: the order of two is another in each worker of xdist, and so the name
        pickle.dumps({"vocab_size": 3, "itos": [["a"]]}),
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


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_meta_of_any_plain_form_is_read(workdir, protocol):
    """As the scripts of others write them: an OrderedDict, tuples, NumPy's numbers and texts."""
    chars = "aé☃"
    forms = {
        "itos": [dict(enumerate(chars)), list(chars), tuple(chars), OrderedDict(enumerate(chars)), list(np.array(list(chars)))],
        "vocab_size": [3, np.int64(3), np.uint16(3), np.int32(3), np.dtype(">i4").type(3), np.array([3], ">i8")[0]],
        "stoi": [{c: np.int64(i) for i, c in enumerate(chars)}, OrderedDict((np.str_(c), i) for i, c in enumerate(chars))],
        "other": [None, True, np.bool_(True), 1.5, np.float32(1.5), b"x", ("a", np.float64(2.5)), np.int8(-3), ()],
    }  # fmt: skip
    for name, values in forms.items():
        for value in values:
            meta = {"vocab_size": 3, "itos": dict(enumerate(chars)), name: value}
            for whole in (meta, OrderedDict(meta)):
                (workdir / "meta.pkl").write_bytes(pickle.dumps(whole, protocol))
                found = data.load_meta(workdir)
                assert found == meta
                assert {type(x) for v in found.values() for x in (v if type(v) in (dict, list, tuple) else [v])} <= {
                    int, float, bool, str, bytes, type(None)
                }  # fmt: skip
                assert tokenizer.from_meta(found).decode([2, 0, 1]) == "☃aé"


def three_datasets(workdir):
    """data/char, data/other and --dataset's default: the same files, with metas of different characters."""
    for name, chars in {"char": "ab", "other": "xy", "openwebtext": "pq"}.items():
        (workdir / "data" / name).mkdir(parents=True)
        meta = {"vocab_size": 2, "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
        (workdir / f"data/{name}/meta.pkl").write_bytes(pickle.dumps(meta))
        for split in ("train", "val"):
            np.array([0, 1] * 500, "<u2").tofile(workdir / f"data/{name}/{split}.bin")


def test_the_meta_beside_the_files_is_theirs(workdir, capsys):
    three_datasets(workdir)
    files = lambda a, b: [f"--train_data=data/{a}/train.bin", f"--val_data=data/{b}/va*.bin"]  # noqa: E731
    for flags, chars in {
        (*files("char", "char"),): "ab",
        ("--preset=tiny", *files("other", "other")): "xy",  # not the meta of tiny's own dataset
        ("--dataset=char", *files("other", "other")): "ab",  # the user's word
        ("--dataset=none", *files("other", "other")): "xy",  # it has no meta
        ("--dataset=char", "--preset=tiny", *files("char", "other")): "ab",
        ("--dataset=other", "--train_data=data/char/train.bin"): "xy",
    }.items():
        *_, meta, vocab_size = data.load_dataset(parse_train([*flags])[0])
        assert "".join(meta["itos"].values()) == chars
        assert vocab_size == 2
        assert f"data/{'char' if chars == 'ab' else 'other'}/meta.pkl" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"data/char/meta\.pkl and data/other/meta\.pkl are of different.*--dataset=NAME"
    ):
        data.load_dataset(parse_train(files("char", "other"))[0])
    (workdir / "data/other/meta.pkl").unlink()
    assert data.load_dataset(parse_train(files("char", "other"))[0])[3] == 2
    (workdir / "data/char/meta.pkl").unlink()
    assert data.load_dataset(parse_train(files("char", "other"))[0])[2:] == (None, 50304)


# ---- tokenizers ----


@pytest.mark.parametrize("extra", [{}, {"itos": [0, 1]}, {"itos": {"a": 0}}, {"itos": {0: 1}}])
def test_a_meta_without_characters_trains_but_is_no_tokenizer(workdir, extra):
    """nanoGPT reads vocab_size alone to train."""
    (workdir / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 2, **extra}))
    meta = data.load_meta(workdir)
    with pytest.raises(UserError, match=r"meta\.pkl has no `itos`"):
        tokenizer.from_meta(meta)


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"itos": list("abc")}, None),
        ({"itos": {}}, r"meta\.pkl has no `itos`"),
        ({"tokenizer": "none/such"}, "tokenizer none/such: unknown"),
    ],
)
def test_a_run_that_is_to_sample_looks_at_its_tokenizer_first(workdir, fastgpt, meta, said):
    """Ids that are no tokens are left out of a sample."""
    (workdir / "data/x").mkdir(parents=True)
    (workdir / "data/x/meta.pkl").write_bytes(pickle.dumps({"vocab_size": 10, **meta}))
    for split in ("train", "val"):
        np.arange(7, 10).repeat(50).astype("<u2").tofile(workdir / f"data/x/{split}.bin")
    status, out, err = fastgpt("train", "--dataset=x", *TINY, "--max_iters=1", "--eval_interval=1", "--sample_tokens=9")
    if said is None:
        assert status == 0, err
        assert Path("out/ckpt.pt").exists()
    else:
        assert (status, err.count("\n")) == (2, 1)
        assert re.search(said, err)
        assert "step 0" not in out


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
    assert sorted(os.listdir("data/x")) == sorted([*["meta.pkl"] * bool(meta), "manifest.json", "train.bin", "val.bin"])
    assert "train.bin: " in capsys.readouterr().out


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(alphabet="ab1 \n\r\t.é☃'", max_size=60), min_size=1, max_size=4), st.integers(1, 40), st.data())
def test_blocks_change_no_token_and_lose_no_text(tmp_path_factory, texts, size, draw):
    """The cuts for streaming are where GPT-2's pattern cuts too, on text full of odd white space."""
    folder = tmp_path_factory.mktemp("blocks")
    files = []
    for i, text in enumerate(texts):
        files.append(folder / str(i))
        files[-1].write_text(text, encoding="utf-8", newline="")
    n_train = draw.draw(st.integers(0, sum(map(len, texts))))
    inputs = [documents.Input(f, characters=len(t), documents=1) for f, t in zip(files, texts, strict=True)]
    encode = merging().encode_ordinary
    got = {"train": [], "val": []}
    ends = 0
    for piece in documents.pieces(inputs, n_train, size):
        got[piece.split] += [*encode(piece.text), "END"] if piece.ends else encode(piece.text)
        ends += piece.ends
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


@pytest.mark.parametrize("name", ["big.txt", "big.jsonl", "one line.jsonl"])
def test_memory_stays_constant(workdir, monkeypatch, name):
    """However large the file, only a bounded number of bounded blocks is in flight."""
    with open(name, "w") as f:
        if name == "big.txt":
            f.write(TEXT * 40)
        else:
            f.writelines(
                json.dumps({"text": text}) + "\n"
                for text in ([TEXT * 40, "end"] if "one" in name else [TEXT[:999]] * 9999)
            )
    live, most = 0, 0
    original = documents.blocks

    def counted(stream):
        nonlocal live, most
        for block in original(stream, size=2**15):
            live += 1
            most = max(most, live)
            assert sum(len(piece.text) for piece in block) < 2**15 + 2**12
            yield block

    def written(ids, write=np.concatenate):
        nonlocal live
        live -= 1
        return write(ids)

    monkeypatch.setattr(documents, "blocks", counted)
    monkeypatch.setattr(documents.pieces, "__defaults__", (2**15, False, 0))
    monkeypatch.setattr(preparing, "np", SimpleNamespace(**vars(np) | {"concatenate": written}))
    preparing.prepare(name, "bytes", "data/big")
    assert 1 < most <= 2 * os.cpu_count()


def test_a_folder_is_its_files_in_order_and_documents_end_in_the_mark(workdir, gpt2, capsys):
    (workdir / "in/sub").mkdir(parents=True)
    for name, text in {"a.txt": "one two ", "sub/b.txt": "three", "z.txt": "four" * 5}.items():
        (workdir / "in" / name).write_text(text)
    (workdir / "in/image.png").write_bytes(b"\xff\xfe\x00")
    (workdir / "in/zeros").write_bytes(b"\0" * 10_000)
    (workdir / "in/.hidden").write_text("hidden")
    preparing.prepare("in", "gpt2", "data/g")
    mark = gpt2.eot_token
    assert np.concatenate(read("data/g")).tolist().count(mark) == 3
    assert (
        gpt2.decode(np.concatenate(read("data/g")).tolist()).replace(tokenizer.END_OF_TEXT, "|")
        == "one two |three|" + "four" * 5 + "|"
    )
    out = capsys.readouterr().out
    assert "taken: 3 .txt; 3 documents\n" in out
    assert "passed over: 1 hidden, 1 not UTF-8, 1 binary\n" in out


def test_another_tokenizers_meta_does_not_stay(workdir, gpt2):
    (workdir / "in.txt").write_text("some text")
    for name in ("bytes", "gpt2"):
        preparing.prepare("in.txt", name, "data/x", overwrite=True)
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
    assert sorted(os.listdir("data/x")) == ["manifest.json", "meta.pkl", "train.bin", "val.bin"]
    assert all((a == b).all() for a, b in zip(before, read("data/x"), strict=True))


def test_the_embedded_corpus_is_real_text_prepared_once(workdir, capsys, monkeypatch):
    train, val, meta, vocab_size = data.load_dataset(TrainConfig(dataset="python-stdlib"))
    assert vocab_size == 256
    assert 5e6 < len(train) < 50e6
    assert len(train) / len(val) == pytest.approx(9, rel=0.05)
    text = tokenizer.from_meta(meta).decode(val.read([0], 20_000)[0].tolist())
    assert text.count("def ") > 20
    assert "preparing the embedded corpus, once" in capsys.readouterr().out
    monkeypatch.setattr(preparing, "write", None)
    data.load_dataset(TrainConfig(dataset="python-stdlib"))


# ---- forms of input ----


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("name", ["bytes", "chars", "gpt2"])
def test_a_row_is_a_document(workdir, gpt2, name, suffix):
    """Rows are not cut between the splits, and gpt2's end-of-text is behind each: the tokens that nanoGPT's openwebtext has."""
    texts = [f"Row {i}: dög\r\n☃ the" * (i % 4) for i in range(100)]
    write_rows(workdir / f"in{suffix}", [{"body": t, "text": "no", "n": i} for i, t in enumerate(texts)])
    preparing.prepare(f"in{suffix}", name, "data/x", field="body")
    total = sum(map(len, texts))
    n_train = next(i for i in range(100) if sum(map(len, texts[: i + 1])) > int(total * 0.9))
    tok = tokenizer.from_meta(data.load_meta("data/x")) if name != "gpt2" else tokenizer.Tiktoken(gpt2)
    mark = [gpt2.eot_token] if name == "gpt2" else []
    for got, of in zip(read("data/x"), (texts[:n_train], texts[n_train:]), strict=True):
        assert got.tolist() == [i for t in of for i in [*tok.encode_array(t).tolist(), *mark]]
    manifest = json.loads(Path("data/x/manifest.json").read_text())
    assert manifest["documents"] == {"train": n_train, "val": 100 - n_train}


def test_text_is_the_field_if_none_is_named(workdir, capsys):
    write_rows(workdir / "in/a.jsonl", [{"text": "one"}, {"text": "two"}])
    write_rows(workdir / "in/b.parquet", [{"text": "three"}])
    (workdir / "in/c.md").write_text("four")
    preparing.prepare("in", "bytes", "data/x", separator="\\n|")
    assert bytes(np.concatenate(read("data/x")).astype("u1")) == b"one\n|two\n|three\n|four\n|"
    assert "taken: 1 .jsonl, 1 .parquet, 1 .md; 4 documents" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a"}\n\n{"body": "b", "n": 1}\n', r"line 3: it has no field 'text', but \['body', 'n'\].*--field"),
        (b'{"text": "a"}\n{"text": null}', "line 2: its 'text' is None, and no text"),
        (b'{"text": "a"}\n{"text": ["b"]}', r"line 2: its 'text' is \['b'\], and no text"),
        (b'{"text": "a"}\n"b"\n', "line 2: it is no JSON object, but 'b'"),
        (b'{"text": "a"}\n{"text": "b"\n', "line 2: it is no JSON .*delimiter"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: it is no JSON .*utf-8"),
        (b'{"text": "a"}\n' + b"[" * 100_000, "line 2: it is no JSON"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2: .*surrogate"),
        (b'{"text": "a"}\n' + b" " * 2**26 + b" \n", "line 2: it has more than 67,108,864 bytes"),
    ],
)
def test_a_broken_line_is_named_before_any_work(workdir, content, said):
    Path("a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"^a\.jsonl, {said}"):
        preparing.prepare("a.jsonl", "bytes", "data/x")
    assert not Path("data").exists()


def test_broken_tables_are_named(workdir, monkeypatch):
    write_rows(workdir / "a.jsonl.gz", [{"text": f"{i * 7919 % 1000}"} for i in range(999)])
    Path("a.jsonl.gz").write_bytes(Path("a.jsonl.gz").read_bytes()[:-50])
    for name, rows, said in (
        ("a.jsonl.gz", None, r"a\.jsonl\.gz, line \d+: the gzip stream is broken"),
        ("b.parquet", [{"body": "x", "n": 1}], r"b\.parquet: it has no column 'text', but \['body', 'n'\].*--field"),
        ("c.parquet", [{"text": "x"}] * 5 + [{"text": None}], r"c\.parquet, row 6: its 'text' is None, and no text"),
        ("d.parquet", [{"text": 3}], r"d\.parquet, row 1: its 'text' is 3, and no text"),
    ):
        if rows:
            write_rows(workdir / name, rows)
        with pytest.raises(UserError, match=said):
            preparing.prepare(name, "bytes", "data/x")
    Path("e.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match=r"e\.parquet, after row 0: it is no Parquet file"):
        preparing.prepare("e.parquet", "bytes", "data/x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"c\.parquet: pyarrow is not installed.*pip install pyarrow"):
        preparing.prepare("c.parquet", "bytes", "data/x")


@pytest.mark.parametrize(
    "content", ["dög\r\nCR\rend\n".encode(), "né".encode("latin-1"), bytes(range(256)) * 99, b"\xed\xa0\x80\xf0\x9f"]
)
def test_with_bytes_a_files_bytes_are_the_tokens(workdir, content):
    Path("a").write_bytes(content)
    preparing.prepare("a", "bytes", "data/x")
    assert bytes(np.concatenate(read("data/x")).astype("u1")) == content


def test_newlines_are_the_files_own(workdir):
    Path("a.txt").write_bytes(b"a\r\nb\rc\n" * 9)
    preparing.prepare("a.txt", "chars", "data/x")
    meta = data.load_meta("data/x")
    assert tokenizer.from_meta(meta).decode(np.concatenate(read("data/x")).tolist()) == "a\r\nb\rc\n" * 9


# ---- separators ----


def test_a_separator_of_one_token_is_the_one_that_doc_mask_takes(workdir):
    for i in range(9):
        (workdir / "in").mkdir(exist_ok=True)
        (workdir / f"in/{i}.txt").write_text(f"text {i}")
    for name, written, there, token in (
        ("bytes", "\\0", "\0", 0),
        ("chars", "\0", "\0", 0),
        ("chars", "\\n\\n", "\n\n", None),
    ):
        preparing.prepare("in", name, "data/x", separator=written, overwrite=True)
        meta = data.load_meta("data/x")
        whole = tokenizer.from_meta(meta).decode(np.concatenate(read("data/x")).tolist())
        assert whole == "".join(f"text {i}{there}" for i in range(9))
        if token is None:
            with pytest.raises(UserError, match="chars, has no token between documents"):
                tokenizer.separator(meta)
        else:
            assert tokenizer.separator(meta) == token


def test_a_tokenizer_with_a_separator_of_its_own_takes_no_other(workdir, gpt2):
    (workdir / "a.txt").write_text("some text")
    with pytest.raises(UserError, match="--separator: gpt2 has a token of its own"):
        preparing.prepare("a.txt", "gpt2", "data/x", separator="|")


# ---- what prepare leaves ----


def test_the_manifest_says_what_was_made(workdir, capsys):
    (workdir / "in/sub").mkdir(parents=True)
    (workdir / "in/a.txt").write_text("a" * 80)
    (workdir / "in/sub/b.py").write_text("b" * 20)
    (workdir / "in/c.png").write_bytes(b"\0")
    preparing.prepare("in", "bytes", "data/x", val_fraction=0.25)
    assert "next: fastgpt train --preset=quickstart --dataset=x --out_dir=out-x\n" in capsys.readouterr().out
    manifest = json.loads(Path("data/x/manifest.json").read_text())
    assert manifest.pop("sha256") == {
        name: hashlib.sha256(Path("data/x", name).read_bytes()).hexdigest()
        for name in ("meta.pkl", "train.bin", "val.bin")
    }
    assert manifest == {
        "input": str(workdir / "in"), "tokenizer": "bytes", "field": "", "separator": "", "val_fraction": 0.25,
        "fastgpt": __version__, "files": 2, "by_suffix": {".txt": 1, ".py": 1}, "passed_over": {"binary": 1}, "bytes": 100,
        "characters": 100, "documents": {"train": 0, "val": 2}, "tokens": {"train": 75, "val": 25},
    }  # fmt: skip


def test_the_next_command_finds_the_dataset(workdir, capsys):
    (workdir / "a.txt").write_text("text " * 99)
    for out in ("data/x", "y", "data/x y", "data/s/t", "x", workdir / "z"):  # data/x hides x
        preparing.prepare("a.txt", "bytes", out)
        words = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: fastgpt train "))
        cfg, _ = parse_train(words)
        assert data.dataset_folder(cfg.dataset).samefile(out)
        assert cfg.out_dir == f"out-{Path(out).name}"


@pytest.mark.parametrize("change", ["input", "tokenizer", "field", "separator", "val_fraction"])
def test_another_dataset_is_not_overwritten(workdir, change):
    write_rows(workdir / "a.jsonl", [{"text": f"text {i}", "body": f"body {i}"} for i in range(20)])
    write_rows(workdir / "b.jsonl", [{"text": f"other {i}", "body": f"body {i}"} for i in range(20)])
    first = dict(input="a.jsonl", tokenizer="bytes", field="", separator="", val_fraction=0.1)
    other = first | {
        change: dict(input="b.jsonl", tokenizer="chars", field="body", separator="|", val_fraction=0.5)[change]
    }

    def run(input, tokenizer, **named):
        preparing.prepare(input, tokenizer, "data/x", **named)
        return [np.concatenate(read("data/x")).tolist(), os.stat("data/x/train.bin").st_size]

    before = run(**first)
    assert run(**first) == before  # the same again
    with pytest.raises(UserError, match=rf"--out=data/x: it holds a dataset with another --{change} .*--overwrite"):
        run(**other)
    assert [np.concatenate(read("data/x")).tolist(), os.stat("data/x/train.bin").st_size] == before
    assert run(**other, overwrite=True) != before
    Path("data/x/manifest.json").unlink()
    with pytest.raises(UserError, match=r"no manifest\.json says of which text; --overwrite"):
        run(**other)


def test_two_cannot_prepare_one_folder(workdir):
    (workdir / "a.txt").write_text("some text")
    (workdir / "data/x").mkdir(parents=True)
    with lock("data/x"), pytest.raises(UserError, match="--out=data/x: another run writes there"):
        preparing.prepare("a.txt", "bytes", "data/x")


def test_what_another_wrote_while_the_text_was_read_is_not_overwritten(workdir, monkeypatch):
    (workdir / "a.txt").write_text("some text")
    (workdir / "b.txt").write_text("more text")
    survey = documents.survey

    def slow(*args, **named):
        monkeypatch.setattr(documents, "survey", survey)
        preparing.prepare("b.txt", "bytes", "data/x")
        return survey(*args, **named)

    monkeypatch.setattr(documents, "survey", slow)
    with pytest.raises(UserError, match="--out=data/x: it holds a dataset with another --input"):
        preparing.prepare("a.txt", "bytes", "data/x")
    assert bytes(np.concatenate(read("data/x")).astype(np.uint8)) == b"more text"


def test_an_input_may_lie_in_out_but_not_be_it(workdir):
    (workdir / "data/x/texts").mkdir(parents=True)
    (workdir / "data/x/texts/a.txt").write_text("some text")
    for _ in range(2):
        preparing.prepare("data/x/texts", "bytes", "data/x")
        assert bytes(np.concatenate(read("data/x")).astype(np.uint8)) == b"some text"
    for source, out in (("data/x", "data/x"), ("data/x/texts/..", "data/../data/x")):
        with pytest.raises(UserError, match="it is the folder of --input"):
            preparing.prepare(source, "bytes", out)


@pytest.mark.parametrize("new", ["b", "z", "\U0010ffff"])
def test_a_character_that_came_later_is_no_other(new):
    with pytest.raises(UserError, match=f"the character {new!r}".replace("\\", r"\\") + " was not in the text"):
        tokenizer.Chars.of("ac").encode_array("aca" + new)


def test_a_folder_that_cannot_be_read_is_said(workdir, monkeypatch, capsys):
    (workdir / "in").mkdir()
    (workdir / "in/a.txt").write_text("text")

    def walk(source, onerror):
        onerror(PermissionError(13, "Permission denied", "in/b"))
        return os.walk(source)

    monkeypatch.setattr(documents, "os", SimpleNamespace(**vars(os) | {"walk": walk}))
    preparing.prepare("in", "bytes", "data/x")
    assert "passed over: 1 unreadable folder\n" in capsys.readouterr().out


def test_names_of_files_are_shown_without_control_characters(workdir, capsys):
    (workdir / "in").mkdir()
    for suffix in (b"\xff", b"t\x1b[31m", b"txt"):
        Path(os.fsdecode(b"in/a." + suffix)).write_text("text")
    preparing.prepare("in", "bytes", "data/x")
    taken = capsys.readouterr().out.splitlines()[0]
    assert taken.isprintable()
    assert "3 documents" in taken
    assert ".txt" in taken


# ---- stopped, and run again ----


class Killed(BaseException):
    """A kill, as far as a process can do it to itself: nothing catches it, and nothing is tidied up."""


@pytest.mark.parametrize("name", ["bytes", "chars", "gpt2"])
def test_a_stopped_preparation_goes_on_where_it_was(workdir, gpt2, name, monkeypatch, capsys):
    """Killed after any of its blocks, recorded or not, it ends with the bits of one that was not. It is not surveyed twice."""
    (workdir / "in").mkdir()
    for i in range(3):
        (workdir / f"in/{i}.txt").write_text(TEXT[: 30_000 * (i + 1)])
    write_rows(workdir / "in/rows.jsonl", [{"text": TEXT[i * 500 : i * 500 + 400]} for i in range(300)])
    (workdir / "in/noise.png").write_bytes(b"\0")
    monkeypatch.setattr(documents.pieces, "__defaults__", (2**12, False, 0))
    monkeypatch.setattr(documents.blocks, "__defaults__", (2**13,))
    preparing.prepare("in", name, "data/whole")
    for calls in (
        8,
        14,
        5,
        20,
        10**6,
    ):  # of the clock: one at the start, one after each block, and one after each record of what is done
        clock = (i * preparing.SAVE_SECONDS for i in range(calls))

        def monotonic(clock=clock):
            if (seconds := next(clock, None)) is None:
                raise Killed
            return seconds

        monkeypatch.setattr(preparing, "time", SimpleNamespace(monotonic=monotonic))
        with contextlib.suppress(Killed):
            preparing.prepare("in", name, "data/x")
        monkeypatch.setattr(documents, "survey", None)  # the first one's is kept
    assert "going on from" in capsys.readouterr().out
    assert all((a == b).all() for a, b in zip(read("data/whole"), read("data/x"), strict=True))
    manifests = [json.loads(Path(f"data/{of}/manifest.json").read_text()) for of in ("whole", "x")]
    assert manifests[0] == manifests[1]
    assert sorted(os.listdir("data/x")) == sorted(os.listdir("data/whole"))


def test_with_another_tokenizer_in_its_folder_a_preparation_begins_anew(workdir, monkeypatch):
    def tokenizer_of(first):
        letters = {c: i for i, c in enumerate((first, *"etx ".replace(first, "")))}
        Path("hf/tokenizer.json").write_text(json.dumps(huggingface.byte_level({**letters, "Ġ": 4}, [], {})))

    (workdir / "hf").mkdir()
    (workdir / "a.txt").write_text("text " * 2000)
    monkeypatch.setattr(documents.pieces, "__defaults__", (2**12, False, 0))
    monkeypatch.setattr(documents.blocks, "__defaults__", (2**12,))
    monkeypatch.setattr(preparing, "SAVE_SECONDS", -1)
    tokenizer_of("e")
    with monkeypatch.context() as m:
        m.setattr(preparing, "deque", Dying)
        with contextlib.suppress(Killed):
            preparing.prepare("a.txt", "hf", "data/x")
    assert Path("data/x/.part/state.json").exists()
    tokenizer_of("t")
    preparing.prepare("a.txt", "hf", "data/x")
    assert tokenizer.from_meta(data.load_meta("data/x")).decode(np.concatenate(read("data/x"))) == "text " * 2000


class Dying(deque):
    """A queue in a process that is killed as it takes the second thing out."""

    taken = 0

    def popleft(self):
        self.taken += 1
        if self.taken == 2:
            raise Killed
        return super().popleft()


@pytest.mark.parametrize("moved", range(4))
def test_a_kill_between_the_files_of_a_dataset(workdir, monkeypatch, moved):
    """The same command then makes it whole: it need not be told to overwrite what it has begun."""
    (workdir / "a.txt").write_text(TEXT)
    preparing.prepare("a.txt", "bytes", "data/whole")
    names = []

    def replace(part, path):
        if len(names) == moved:
            raise Killed
        names.append(path.name)
        os.replace(part, path)

    with monkeypatch.context() as m:
        m.setattr(preparing, "os", SimpleNamespace(**vars(os) | {"replace": replace}))
        with contextlib.suppress(Killed):
            preparing.prepare("a.txt", "bytes", "data/x")
    assert len(names) == moved
    preparing.prepare("a.txt", "bytes", "data/x")
    for name in os.listdir("data/whole"):
        assert Path("data/x", name).read_bytes() == Path("data/whole", name).read_bytes()
    assert not Path("data/x/.part").exists()


@pytest.mark.slow
def test_a_killed_process_loses_nothing(workdir):
    """Real kills, at any moment: SIGKILL, and SIGTERM, which says how to go on."""
    with open("in.jsonl", "w") as f:
        for i in range(30_000):
            f.write(json.dumps({"text": TEXT[i % 2000 : i % 2000 + i % 3000]}) + "\n")
    script = (
        "import sys; from fastgpt import cli, documents, prepare, signals\n"
        "prepare.SAVE_SECONDS = 0.02; documents.pieces.__defaults__ = (2**12, False, 0)\n"
        "documents.blocks.__defaults__ = (2**14,); signals.listen(); sys.exit(cli.main())"
    )

    def start(out):
        words = ["prepare", "--input=in.jsonl", "--tokenizer=chars", f"--out={out}"]
        return subprocess.Popen(
            [sys.executable, "-c", script, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    assert start("data/whole").wait() == 0
    rng = np.random.default_rng(0)
    last, kills = 0, 0
    while (running := start("data/x")).poll() is None:
        state = Path("data/x/.part/state.json")
        while running.poll() is None and (not state.exists() or json.loads(state.read_text())["characters"] <= last):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        if running.poll() is None and kills < 4:
            last = json.loads(state.read_text())["characters"] if state.exists() else last
            running.send_signal(sig := (signal.SIGTERM if kills == 2 else signal.SIGKILL))
            out = running.communicate()[0]
            kills += 1
            if sig == signal.SIGTERM:
                assert running.returncode == 128 + sig
                assert "data/x/.part holds what is done; the same command goes on from there" in out
        else:
            assert running.wait() == 0
            break
    assert kills == 4
    assert all((a == b).all() for a, b in zip(read("data/whole"), read("data/x"), strict=True))
    manifests = [json.loads(Path(f"data/{of}/manifest.json").read_text()) for of in ("whole", "x")]
    assert manifests[0] == manifests[1]
    assert sorted(os.listdir("data/x")) == sorted(os.listdir("data/whole"))
