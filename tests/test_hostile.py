"""Files that are broken, or made to do harm. Whatever a file holds, its loader gives a right result or one line; it never waits, nor fills
the memory.

`fuzz` does this for any loader: it mutates a valid file, and calls the loader. A few hundred cases run each time, 10,000 with `-m slow`.
To add a loader, write a case in LOADERS: the file's name, its valid content, and a function that loads it and looks at what came out.
"""

import contextlib
import gzip
import io
import json
import math
import os
import pickle
import resource
import socket
import stat
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import results
import torch
from conftest import TINY
from helpers import write_shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fastgpt import choose, cli, data, documents, export, files, huggingface, prepare, runner, token_files, tuned
from fastgpt.benchmarks import compare, report
from fastgpt.config import GPTConfig, TrainConfig, UserError
from fastgpt.model import GPT
from fastgpt.parse import parse_train
from fastgpt.records import RECORDS, Shape
from fastgpt.timing import Times

SHAPE = Shape(1, 16, 64, 2, 65, bias=False)
RUN = SHAPE, torch.float32, "cpu"
WORK = runner.Work(GPTConfig(16, 65, 2, 2, 32), 4, True, "auto", "float32")

# ---- mutations ----

HARD = [
    None,
    True,
    -1,
    0,
    2**63,
    10**400,
    0.0,
    -0.5,
    1e308,
    math.nan,
    math.inf,
    "",
    "9" * 5000,
    "\0",
    "\ud800",
    "$\\frac{$",
    [],
    {},
    [[]],
]


def places(tree, path=()):
    """The paths of all values in a tree of dicts and lists."""
    yield path
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inside:
        yield from places(value, (*path, key))


def changed(tree, path, f):
    """A copy of a tree whose value at a path is f(value); f returns ... to leave the value out."""
    if not path:
        return f(tree)
    copy = tree.copy()
    value = changed(tree[path[0]], path[1:], f)
    if value is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = value
    return copy


@st.composite
def damaged_bytes(draw, good):
    """Bytes of a valid file, cut, or with parts changed, doubled or left out."""
    found = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at, n = draw(st.integers(0, len(found))), draw(st.integers(0, 16))
        how = draw(st.sampled_from(["cut", "replace", "insert", "repeat", "flip"]))
        if how == "cut":
            del found[at:]
        elif how == "replace":
            found[at : at + n] = draw(st.binary(max_size=16))
        elif how == "insert":
            found[at:at] = draw(
                st.sampled_from([b"\xff" * 8, b"9" * 5000, b"[" * 3000, b"\0", b"-", b"'", b'"', b"\n", b"1e999"])
            )
        elif how == "repeat":
            found[at:at] = found[at : at + n] * draw(st.sampled_from([2, 100]))
        elif at < len(found):
            found[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(found)


def damaged_tree(tree):
    """A tree of dicts and lists with one to three values changed for other ones, left out, or put in each other's place."""

    @st.composite
    def strategy(draw):
        found = tree
        for _ in range(draw(st.integers(1, 3))):
            path = draw(st.sampled_from(list(places(found))))
            value = draw(st.sampled_from([*HARD, ...]) | st.integers() | st.floats() | st.text(max_size=8))
            if value is not ... or path:
                found = changed(found, path, lambda _, value=value: value)
        return found

    return strategy()


def write_json(path, tree):
    """JSON as Python writes it: nan and integers of any size among it."""
    sys.set_int_max_str_digits(0)
    try:
        path.write_text(json.dumps(tree))
    finally:
        sys.set_int_max_str_digits(4300)


def fuzz(path, good, load, cases, write=None, tree=None):
    """Call load() on `cases` mutations of the file at `path`, whose valid content is `good`, in bytes.

    They are mutations of the bytes; with a tree of dicts and lists, which write(path, tree) writes, half of them are mutations of that.
    load() may raise UserError, in a message that becomes one line; any other exception is a fault. The cases are the same each time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(good)
    load()  # the valid one: a load that always fails would prove nothing
    bytes_of = damaged_bytes(good) | st.binary(max_size=64)
    strategy = st.one_of(bytes_of, damaged_tree(tree)) if write else bytes_of
    how = settings(
        max_examples=cases, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    @how
    @given(strategy)
    def one(content):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            write(path, content)
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                load()
            except UserError as e:
                line = cli.one_line(str(e))
                assert "\n" not in line
                assert len(line) <= 2100
                assert path.name in line or "--" in line, line

    one()


# ---- the loaders ----


CONFIG = b"""'''A config.'''
import time
from x import y
n = 2
n_layer = n * 2
out_dir = 'out' + '-' + str(n)
wandb_run_name = 'run' + str(time.time())
learning_rate: float = 1e-3 / 4
dropout = -(-0.1)
compile = not True
sizes = {'a': [4, (64, 2)]}
if n == 2 and out_dir != 'x':
    n_embd, n_head = sizes['a'][1]
else:
    n_embd *= 2
wandb_project = f'{n_embd:>5}-{dropout:.2f}'
dtype = 'float16' if 1 < n <= 3 else 'float32'
"""
TOML = b'n_layer = 4\nout_dir = "o"\nlearning_rate = 2.5e-4\ncompile = false\ndtype = """float16"""\nwandb_project = \'\'\n[a]\nseed = 6\n'
META = {"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "c"}, "stoi": {"a": 0, "b": 1, "c": 2}}


def config(path):
    def load():
        cfg, given = parse_train([str(path)])
        assert TrainConfig.model_validate(cfg.model_dump()) == cfg
        assert given <= TrainConfig.model_fields.keys()

    return load


def meta(path):
    def load():
        found = data.load_meta(path.parent)
        assert type(found["vocab_size"]) is int
        assert found["vocab_size"] > 0
        pickle.dumps(found)  # as a checkpoint does
        assert repr(found) == repr(data.load_meta(path.parent))

    return load


def tokens(path):
    def load():
        stream = data.Tokens([path], 50304)
        stream.check_ids()
        whole = stream.read([0], len(stream))
        assert whole.shape == (1, len(stream))
        assert whole.max() < 50304
        body = path.read_bytes()[-2 * len(stream) :]
        assert whole[0].tolist() == np.frombuffer(body, "<u2").tolist() or len(body) < 4 * len(stream)

    return load


def text(path):
    def load():
        out = path.parent / "out"
        with contextlib.redirect_stderr(io.StringIO()):
            prepare.prepare(path, "bytes", out)
        made = b"".join((out / f"{split}.bin").read_bytes()[::2] for split in ("train", "val"))
        assert made == path.read_bytes()

    return load


def npy(path):
    def load():
        stream = data.Tokens([path], 50304)
        stream.check_ids()
        array = np.load(path)
        assert stream.read([0], len(stream))[0].tolist() == array.tolist()

    return load


def rows(path):
    """A table of documents: each whole, in its order, between the two splits."""

    def load():
        out = path.parent / "out"
        with contextlib.redirect_stderr(io.StringIO()):
            prepare.prepare(path, "bytes", out)
        made = b"".join((out / f"{split}.bin").read_bytes()[::2] for split in ("train", "val")).decode()
        if path.suffix == ".jsonl":
            lines = path.read_bytes().decode("utf-8-sig").split("\n")
            assert made == "".join(json.loads(line)["text"] for line in lines if line.strip())

    return load


def tuned_rows(path):
    def load():
        for op, row in tuned.load_rows(*RUN):
            kind = type(RECORDS[op].row(*RUN))
            assert kind.of(row).text == row  # the constructor has accepted it

    return load


def choice(path):
    times = {name: Times(1.0, 0.5) for name in ("torch", "triton")}

    def load():
        found = choose.remembered("adamw", *RUN, False, (), lambda calls: times)
        choose.fastest({"adamw": found["ms"]}, True)
        assert not found["ms"].keys() & found["rejected"].keys()
        assert all(0 <= t < 1e9 for pair in found["ms"].values() for t in pair)

    return load


def runners_answer(path):
    def load():
        found = runner.find(WORK, "cpu", 10**9, time_one=lambda *_: {"gpu": 1.0, "wall": 2.0})
        assert found in (runner.GRAPHS, runner.COMPILE, runner.PLAIN)

    return load


def result(path):
    def load():
        report.load(path)
        report.write(path)
        report.readme_table(path)
        compare.compare(path, path, 0.05)

    return load


RESULT = [
    results.step("fastgpt", 12, 0.1),
    results.step("compiled", 12, 0.1),
    results.op("attention", "train", "fastgpt"),
]


@pytest.fixture
def loader(request, workdir, monkeypatch):
    """The arguments of `fuzz` for a loader of LOADERS."""
    monkeypatch.setattr(report, "plot", lambda *_: [])  # it takes a second, and has a test of its own
    path, good, load, *others = LOADERS[request.param](workdir, monkeypatch)
    return path, good, load(path), *others


def kept_file(folder):
    """The only file in a folder of the cache, its bytes and its tree."""
    (path,) = folder.iterdir()
    return path, path.read_bytes(), json.loads(path.read_bytes())


def of_tuned(workdir, monkeypatch):
    ops_ = {op: dict(kept=True, row=asdict(r.row(*RUN))) for op, r in RECORDS.items() if r.row}
    tree, path = dict(where=tuned.conditions(*RUN), ops=ops_), tuned.path(*RUN)
    files.write_json(path, tree)
    monkeypatch.setattr(tuned, "conditions", lambda *_: tree["where"])  # its hash of the sources takes a millisecond
    return path, path.read_bytes(), tuned_rows, tree


def of_choice(workdir, monkeypatch):
    monkeypatch.setattr(
        choose, "measured", lambda *_: {"ms": {"torch": Times(1.0, 0.5)}, "rejected": {"triton": "is slow"}}
    )
    environment = tuned.environment("cpu")
    monkeypatch.setattr(tuned, "environment", lambda device: environment)
    choice(None)()
    path, good, tree = kept_file(workdir / "cache" / "kernels")
    return path, good, choice, tree


def of_runner(workdir, monkeypatch):
    environment = tuned.environment("cpu")
    monkeypatch.setattr(tuned, "environment", lambda device: environment)
    runners_answer(None)()
    path, good, tree = kept_file(workdir / "cache" / "runners")
    return path, good, runners_answer, tree


def of_result(workdir, monkeypatch):
    path = results.write_result(workdir, RESULT)
    return path, path.read_bytes(), result, json.loads(path.read_bytes())


def of_shard(workdir, monkeypatch):
    write_shard(path := workdir / "shard.bin", range(20))
    return path, path.read_bytes(), tokens


def of_npy(workdir, monkeypatch):
    np.save(path := workdir / "a.npy", np.arange(20, dtype=">i4"))
    return path, path.read_bytes(), npy


ROWS = "".join(
    json.dumps({"text": text, "n": 1}) + "\n" for text in ("Der Fluss fließt.", "", "☃", "Er ist lang.\n")
).encode()


def of_parquet(workdir, monkeypatch):
    path = workdir / "a.parquet"
    parquet.write_table(
        pyarrow.table({"text": ["Der Fluss fließt.", "", "☃", "Er ist lang.\n"], "n": [1, 2, 3, 4]}), path
    )
    return path, path.read_bytes(), rows


def hugging_face(path):
    def load():
        with contextlib.redirect_stdout(io.StringIO()):
            model = huggingface.load(str(path.parent))
            huggingface.tokenizer_meta(path.parent)
        assert model.config == GPTConfig(4, 260, 1, model.config.n_head, 8, 0.0, True)

    return load


HUGGING_FACE = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"


def of_hugging_face(name):
    """A loader of one of the files in a folder of a small GPT-2."""

    def of(workdir, monkeypatch):
        folder = workdir / "gpt2-small"
        folder.mkdir()
        model = GPT(GPTConfig(4, 260, 1, 2, 8, 0.0, True))
        args = {"model_args": asdict(model.config), "model": model.state_dict()}
        chars = {huggingface.BYTE_CHARS[b]: b for b in range(256)}
        vocab = {**chars, "th": 256, "the": 257, "an": 258, "<|endoftext|>": 259}
        spec = huggingface.byte_level(vocab, [["t", "h"], ["th", "e"], ["a", "n"]], {"<|endoftext|>": 259})
        sizes = {"vocab_size": 260, "n_positions": 4, "n_embd": 8, "n_layer": 1, "n_head": 2}
        config = {
            "model_type": "gpt2",
            **sizes,
            "activation_function": "gelu",
            "n_inner": None,
            "scale_attn_weights": True,
        }
        index = {"weight_map": {"wte.weight": "model-1.safetensors"}}
        for file, tree in (("config.json", config), ("tokenizer.json", spec), ("model.safetensors.index.json", index)):
            (folder / file).write_text(json.dumps(tree))
        whole = "model-1.safetensors" if name.endswith("index.json") else "model.safetensors"
        with open(folder / whole, "wb") as f:
            export.write_safetensors(f, export.of_transformers(args), "float32", {})
        trees = {"config.json": config, "tokenizer.json": spec, "model.safetensors.index.json": index}
        return folder / name, (folder / name).read_bytes(), hugging_face, *([trees[name]] if name in trees else [])

    return of


LOADERS = {
    "config": lambda workdir, _: (workdir / "a.py", CONFIG, config),
    "toml": lambda workdir, _: (workdir / "a.toml", TOML, config),
    "meta": lambda workdir, _: (workdir / "meta.pkl", pickle.dumps(META), meta, META),
    "tokens": lambda workdir, _: (workdir / "train.bin", np.arange(20, dtype="<u2").tobytes(), tokens),
    "shard": of_shard,
    "npy": of_npy,
    "jsonl": lambda workdir, _: (workdir / "a.jsonl", ROWS, rows),
    "gzip": lambda workdir, _: (workdir / "a.jsonl.gz", gzip.compress(ROWS), rows),
    "parquet": of_parquet,
    "text": lambda workdir, _: (workdir / "a.txt", "Der Fluss fließt.\n\nEr ist lang.".encode(), text),
    "tuned": of_tuned,
    "choice": of_choice,
    "runner": of_runner,
    "result": of_result,
    **{f"gpt2 {name}": of_hugging_face(name) for name in HUGGING_FACE},
}


def mutated(loader, cases):
    path, good, load, *tree = loader
    write = (lambda path, tree: path.write_bytes(pickle.dumps(tree))) if path.suffix == ".pkl" else write_json
    fuzz(path, good, load, cases, *([write, *tree] if tree else []))


@pytest.mark.parametrize("loader", LOADERS, indirect=True)
def test_a_mutated_file_is_a_line_or_right(loader):
    mutated(loader, 25)


SLOWER = ("text", "jsonl", "gzip", "parquet", "choice", "runner")


@pytest.mark.slow
@pytest.mark.parametrize("loader", [name for name in LOADERS if name not in SLOWER], indirect=True)
def test_nine_thousand_mutated_files(loader):
    mutated(loader, 1285)


@pytest.mark.slow
@pytest.mark.parametrize("loader", SLOWER, indirect=True)
def test_a_thousand_of_those_that_write_to_disk(loader):
    mutated(loader, 335)


# ---- planted ones ----


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "socket", "loop", "empty"])
@pytest.mark.parametrize("loader", LOADERS, indirect=True)
def test_what_is_no_file_is_refused_at_once(loader, kind, capsys):
    path, _, load, *_ = loader
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX)
    make = {
        "folder": lambda: path.mkdir(), "pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path), "empty": path.touch, "socket": lambda: bound(server, path),
    }  # fmt: skip
    make[kind]()
    began = time.monotonic()
    with server, contextlib.suppress(UserError):
        load()
        kept = path.parent.parent.name == "cache"
        configs = path.suffix in (".py", ".toml") and kind == "empty"
        assert kept or configs or "folder" in capsys.readouterr().out, "else it is a UserError"
    assert time.monotonic() - began < 5


def bound(server, path):
    """A socket at a path, which may be too long for one: it is then made in the folder above and moved."""
    here = os.getcwd()
    os.chdir(path.parent)
    server.bind(path.name[-60:])
    os.rename(path.name[-60:], path.name)
    os.chdir(here)


def test_a_nul_in_a_name_is_a_line(workdir):
    for ending in (".py", ".toml"):
        with pytest.raises(UserError, match="there is a NUL in its name"):
            parse_train([f"a\0{ending}"])
    with pytest.raises(UserError, match=r"--out_dir: 'a.*b' has a nul in it"):
        parse_train(["--out_dir=a\0b"])


PLANTED = """
import codecs, json, os, pickle, resource, sys, time
from collections import OrderedDict
from pathlib import Path
import numpy as np
from fastgpt import choose, data, files, prepare
from fastgpt.benchmarks import report
from fastgpt.config import UserError
from fastgpt.parse import parse_train

def meta(content):
    Path("meta.pkl").write_bytes(content)
    return "meta.pkl", lambda: data.load_meta(".")

def config(content, name="a.toml"):
    Path(name).write_text(content)
    return name, lambda: parse_train([name])

def sparse(load, name):
    with open(name, "wb") as f:
        f.truncate(2**40)
    return name, load

def tokens():
    with open("a.bin", "wb") as f:
        f.write(b"".join(n.to_bytes(4, "little") for n in (20240520, 1, 2**31 - 1)))
    return "a.bin", lambda: data.Tokens(["a.bin"], 50304)

def result(text):
    Path("a.json").write_text(text)
    return "a.json", lambda: report.load("a.json")

copied = b")" + b"2\\x86" * 60  # () and then sixty times the pair of what is there
def doubled(kind):  # each holds the one before it twice: written in a few hundred bytes, looked at in 2^60 steps
    x = kind()
    for _ in range(60):
        x = kind((x, x))
    return x

class Calls:  # f(*arguments), and with a state a __setstate__ of that
    def __init__(self, f, *arguments, state=None):
        self.what = f, arguments, state

    def __reduce__(self):
        return self.what

def plain(value, name="n"):
    return meta(pickle.dumps({"vocab_size": 3, name: value}))

scalar = np.int64(1).__reduce__()[0]
encode, big = codecs.encode, "a" * 2**20
cases = {
    "a memo of 2^31 places": lambda: meta(b"\\x80\\x04}r\\xff\\xff\\xff\\x7f."),
    "a key of 2^60 tuples": lambda: meta(b"\\x80\\x04}" + copied + b"K\\x01s."),
    "2^60 lists in lists": lambda: meta(b"\\x80\\x04]" + b"2l" * 9 + b"."),
    "a tokenizer of 2^60 lists": lambda: plain(doubled(list), "tokenizer"),
    "a tokenizer of 2^60 tuples": lambda: plain(doubled(tuple), "tokenizer"),
    "a key of 2^60 shared tuples": lambda: meta(b"\\x80\\2}" + pickle.dumps(doubled(tuple), 2)[2:-1] + b"K\\1s."),
    "an OrderedDict of 2^60 pairs": lambda: plain(Calls(OrderedDict, doubled(tuple))),
    "200,000 OrderedDicts": lambda: plain([OrderedDict() for _ in range(200_000)]),
    "OrderedDicts within each other": lambda: plain(doubled(lambda inner=(): OrderedDict(enumerate(inner)))),
    "an OrderedDict with a state": lambda: plain(Calls(OrderedDict, state=doubled(tuple))),
    "a dtype": lambda: plain(np.dtype("i8")),
    "a dtype of objects": lambda: plain(Calls(scalar, np.dtype("O"), b"12345678")),
    "a dtype of a gigabyte": lambda: plain(Calls(scalar, np.dtype("U268435456"), b"1234")),
    "a dtype that is a record": lambda: plain(Calls(scalar, np.dtype("i4,i4"), b"12345678")),
    "a dtype in an order of 2^60 tuples": lambda: plain(Calls(scalar, Calls(np.dtype, "i8", state=(3, doubled(tuple))), b"12345678")),
    "a scalar of other bytes": lambda: plain(Calls(scalar, np.dtype("i8"), b"1234")),
    "a scalar of 2^60 tuples": lambda: plain(Calls(scalar, np.dtype("i8"), doubled(tuple))),
    "a megabyte in a thousand copies": lambda: plain([Calls(encode, big, "latin1") for _ in range(1000)]),
    "an array": lambda: plain(np.zeros(2)),
    "a function of NumPy's": lambda: plain(np.frombuffer),
    "three million values": lambda: plain([None] * 3_000_000),
    "a million lists": lambda: meta(b"\\x80\\x04" + b"]" * 10**6 + b"."),
    "text of 2^60 bytes": lambda: meta(b"\\x80\\x04\\x8d" + (2**60).to_bytes(8, "little") + b"a."),
    "a meta.pkl of a terabyte": lambda: sparse(lambda: data.load_meta("."), "meta.pkl"),
    "a config of a terabyte": lambda: sparse(lambda: parse_train(["b.py"]), "b.py"),
    "a prompt": lambda: sparse(lambda: files.read_text("c.txt", files.DATA), "c.txt"),
    "a key of 50,000 parts": lambda: config(".".join("a" * 50_000) + " = 1"),
    "a key of 30,000 parts": lambda: config(".".join("a" * 30_000) + " = 1"),
    "a table of 30,000 parts": lambda: config("[" + " . ".join(["'a'"] * 9_000) + "]"),
    "tables within tables": lambda: config("a = " + "{a = " * 9_000),
    "a word of 60,000 letters": lambda: config("a" * 60_000 + " = 1"),
    "tens of words": lambda: config(("a" * 600 + ".") * 90 + " = 1"),
    "a long number": lambda: config("n_layer = " + "9" * 5000),
    "a long hexadecimal number": lambda: config("n_layer = 0x" + "f" * 50_000),
    "a number of many digits": lambda: config("n_layer = 0x" + "f" * 50_000, "a.py"),
    "a power of powers": lambda: config("n = 2" + "**9" * 20_000, "a.py"),
    "text that grows": lambda: config("a = 'x'\\n" + "a = a + a\\n" * 6_000, "a.py"),
    "brackets": lambda: config("n = " + "-" * 60_000 + "1", "a.py"),
    "a long sum": lambda: config("n = 1" + "+1" * 30_000, "a.py"),
    "a wide format": lambda: config("n = f'{1:>999999999}'", "a.py"),
    "many wide formats": lambda: config("a = [" + "f'{1:>999}'," * 4_000 + "]", "a.py"),
    "a format of a large number": lambda: config("a = 0x" + "f" * 50_000 + "\\nn = f'{a:b}'", "a.py"),
    "a long list": lambda: config("n = [0] * 10**9", "a.py"),
    "lists of lists": lambda: config("n = " + "[" * 30 + "0" + "] * 99" * 30, "a.py"),
    "2^60 lists in lists, read": lambda: config("a = [0]\\n" + "a = [a, a]\\n" * 60, "a.py"),
    "comparisons of lists": lambda: config("a = [0] * 9000\\n" + "b = a == a\\n" * 5_000, "a.py"),
    "text of lists": lambda: config("a = ['x' * 900] * 9\\n" + "b = f'{a}'\\n" * 5_000, "a.py"),
    "branches within branches": lambda: config("if 0: n = 1\\n" + "elif 0: n = 1\\n" * 4_000, "a.py"),
    "calls within calls": lambda: config("n = " + "str(" * 9_000 + "1" + ")" * 9_000, "a.py"),
    "a shift": lambda: config("n = 1 << 10**12", "a.py"),
    "a rounding": lambda: config("n = round(1, -10**12)", "a.py"),
    "tables of settings": lambda: config("".join(f"[t{i}]\\nseed = 1\\n" for i in range(3_000))),
    "a shard that promises 4 GB": tokens,
    "lists in a result": lambda: result("[" * 10**6),
    "a result of lists": lambda: result("[" + "[]," * 300_000 + "[]]"),
}
for name, make in cases.items():
    path, load = make()
    size = min(os.path.getsize(path), 2**24)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    said, sys.stdout = sys.stdout, open(os.devnull, "w")
    try:
        load()
        outcome = "loaded"
    except (UserError, OSError) as e:
        outcome = "refused"
    finally:
        sys.stdout = said
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(json.dumps([name, outcome, time.monotonic() - began, grown, size]), flush=True)
    os.unlink(path)
"""


def test_no_file_takes_long_or_fills_the_memory(workdir):
    done = subprocess.run([sys.executable, "-c", PLANTED], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 55
    for name, outcome, seconds, grown, size in lines:
        assert outcome == "refused", name
        assert seconds < 10, name
        assert grown < 2 * size + 2**26, (name, grown, size)


def test_data_that_becomes_shorter_during_a_run_is_a_line(fastgpt, dataset, monkeypatch):
    """A map of the file would end the process by SIGBUS."""
    from fastgpt import trainer

    def train_step(*args, step=trainer.train_step):
        os.truncate(dataset / "train.bin", 100)
        return step(*args)

    monkeypatch.setattr(trainer, "train_step", train_step)
    status, _, err = fastgpt("train", "--dataset=letters", *TINY, "--max_iters=50")
    assert status == 2
    assert err == (
        "fastgpt: error: data/letters/train.bin: the file has become shorter since the run began; prepare the data again\n"
    )
    stream = data.Tokens([dataset / "val.bin"], 26)
    (dataset / "val.bin").unlink()
    with pytest.raises(UserError, match=r"val\.bin: cannot be read any more \(No such file or directory\)"):
        stream.read([0], 4)


def test_a_batch_of_many_shards_opens_few_files(workdir):
    for i in range(100):
        write_shard(workdir / f"{i:03}.bin", [i] * 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    stream = data.Tokens(sorted(workdir.glob("*.bin")), 100)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + token_files.MOST_OPEN + 8, hard))
    try:
        assert stream.read([0], 300)[0].tolist() == [i // 3 for i in range(300)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_text_that_changes_while_it_is_prepared(workdir, monkeypatch):
    (workdir / "a.txt").write_text("some text " * 20)

    def survey(*args, survey=documents.survey, **named):
        found = survey(*args, **named)
        (workdir / "a.txt").write_text("less")
        return found

    monkeypatch.setattr(documents, "survey", survey)
    with pytest.raises(UserError, match=r"a\.txt: its text changed while it was read"):
        prepare.prepare("a.txt", "bytes", "out")
    assert os.listdir("out") == []


def test_a_message_is_one_short_line_without_control_characters():
    line = cli.one_line("a\r\x1b[2Jb\x85c\u2028d" + "e" * 10**6 + "\nend")
    assert line.startswith("a  [2Jb c d")
    assert line.endswith("e end")
    assert len(line) < 2100


def test_home_is_expanded_in_every_flag_that_is_a_path(monkeypatch, tmp_path):
    from fastgpt.benchmarks.command import BenchConfig
    from fastgpt.benchmarks.compare import CompareConfig
    from fastgpt.benchmarks.report import ReportConfig
    from fastgpt.config import PrepareConfig, SampleConfig, TuneConfig, VerifyConfig
    from fastgpt.parse import parse

    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {
        TrainConfig: ("out_dir", "init_from", "dataset", "train_data", "val_data"), SampleConfig: ("out_dir", "init_from"),
        PrepareConfig: ("input", "out"), TuneConfig: ("out",), VerifyConfig: ("json",), BenchConfig: ("out",), CompareConfig: ("out",),
        ReportConfig: ("out",),
    }  # fmt: skip
    words = ("folder", "file", "path")  # what the help of a path says
    for schema, names in paths.items():
        said = {
            n
            for n, f in schema.model_fields.items()
            if f.annotation is str and any(w in f.description.split()[:6] for w in words)
        }
        assert said - {"start"} <= {*names}, "a flag that is a path, and not among these"
        for name in names:
            cfg, _ = parse(schema, [f"--{name}=~/x"], "")
            assert getattr(cfg, name) == str(tmp_path / "x"), (schema, name)
    (tmp_path / "a.toml").write_text("out_dir = '~/y'\n")
    assert parse_train(["~/a.toml"])[0].out_dir == str(tmp_path / "y")
    monkeypatch.setenv("FASTGPT_CACHE", "~/cache")
    assert prepare.cache_folder() == tmp_path / "cache"


# ---- what is kept ----


def as_owner(uid, mode=0o700):
    """What os is to fastgpt.files where folders belong to a user, and have a mode."""
    found = SimpleNamespace(st_uid=uid, st_mode=stat.S_IFDIR | mode)
    return SimpleNamespace(
        **vars(os) | {"stat": lambda path: found if Path(path).is_dir() else os.stat(path), "geteuid": lambda: 1000}
    )


@pytest.mark.parametrize(
    ("uid", "mode", "says"),
    [
        (1001, 0o700, "belongs to another user"),
        (1000, 0o770, "others can write into"),
        (1000, 0o707, "others can write into"),
    ],
)
def test_a_cache_where_others_can_write_is_not_read_nor_written(workdir, monkeypatch, capsys, uid, mode, says):
    key = {"op": "adamw"}
    choose.remember("kernels", key, {"found": 1})
    file = choose.kept("kernels", key)
    before = file.read_bytes()

    def recall():
        return choose.recall("kernels", key, lambda saved: saved["found"])

    assert recall() == 1
    capsys.readouterr()
    monkeypatch.setattr(files, "os", as_owner(uid, mode))
    assert recall() is None
    assert recall() is None
    out = capsys.readouterr().out
    assert out.count("\n") == 1, "once, for all that is kept"
    assert says in out
    choose.remember("kernels", key, {"found": 2})
    assert says in capsys.readouterr().out
    assert file.read_bytes() == before
    with pytest.raises(UserError, match=says):
        prepare.prepare_embedded(prepare.embedded_folder())
    with pytest.raises(files.NotOurs):
        tuned.read(tuned.path(*RUN), *RUN)
    for right in (as_owner(1000, 0o755), as_owner(0, 0o755)):  # root may do anything anyway
        monkeypatch.setattr(files, "os", right)
        assert recall() == 1


def test_what_is_kept_is_its_owners_and_follows_no_link(workdir, monkeypatch):
    """The folder, the file's mode, and its temporary name, which must be new: a link that lies there is not written through."""
    victim = workdir / "victim"
    victim.write_text("precious")
    file = workdir / "cache" / "kernels" / "a.json"
    files.write_json(file, {"a": 1})
    for path, mode in ((file.parents[1], 0o700), (file.parent, 0o700), (file, 0o600)):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    file.unlink()
    file.symlink_to(victim)
    guessed = file.parent / ".guessed.part"
    guessed.symlink_to(victim)
    with monkeypatch.context() as m:
        m.setattr(files, "temporary", lambda path: guessed)
        with pytest.raises(FileExistsError):
            files.write_json(file, {"a": 2})
    assert victim.read_text() == "precious"
    files.write_json(file, {"a": 2})
    assert victim.read_text() == "precious"
    assert not file.is_symlink()
    assert files.read_json(file) == {"a": 2}
    with pytest.raises(IsADirectoryError):
        files.write_json(file.parent, {})
    assert [f.name for f in file.parent.iterdir()] == ["a.json"], "a failure leaves nothing"


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (dict(rejected={"triton": "is not equal"}), "each implementation once"),  # it rejects what it would have chosen
        (dict(ms={"torch": [1.0, 1.0]}), "each implementation once"),
        (dict(ms={"torch": [1.0, 1.0], "triton": [1.0, "fast"]}), "the times of triton are none"),
        (dict(ms={"torch": [1.0, 1.0], "triton": [1.0, math.nan]}), "the times of triton are none"),
        (dict(ms={"torch": [1.0, 1.0], "triton": [1.0, 10**400]}), "the times of triton are none"),
        (dict(ms={"torch": [1.0, 1.0], "triton": [1.0]}), "the times of triton are none"),
        (dict(ms={"torch": [1.0, 1.0]}, rejected={"triton": 1}), "why one was rejected"),
        (dict(ms=[]), "it has no times"),
        (dict(rejected=None), "it has no times"),
        (dict(key=1), "it is damaged"),
    ],
)
def test_a_kept_choice_that_cannot_be_is_named_and_measured_anew(workdir, monkeypatch, capsys, damage, why):
    right = {"ms": {"torch": Times(1.0, 0.5), "triton": Times(0.5, 0.5)}, "rejected": {}}
    monkeypatch.setattr(choose, "measured", lambda *_: right)
    ask = lambda: choose.remembered("adamw", *RUN, False)  # noqa: E731
    ask()
    file, _, tree = kept_file(workdir / "cache" / "kernels")
    write_json(file, tree | damage)
    capsys.readouterr()
    assert ask() == right
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{file} is not taken: ")
    assert why in line
    assert json.loads(file.read_text()) == tree, "overwritten"


@pytest.mark.parametrize(
    "wrong",
    [
        {"gpu": 1.0, "wall": 1.0, "failed": "it is not equal"},
        {"failed": 1},
        {"gpu": 1.0},
        {"gpu": True, "wall": 1.0},
        5,
        None,
    ],
)
def test_a_runner_that_its_own_record_rejects_is_not_taken(workdir, capsys, wrong):
    runners_answer(None)()
    file, _, tree = kept_file(workdir / "cache" / "runners")
    write_json(file, tree | {"found": tree["found"] | {"compile": wrong}})
    capsys.readouterr()
    runners_answer(None)()
    assert f"{file} is not taken: compile has neither times nor a reason" in capsys.readouterr().out
    assert json.loads(file.read_text()) == tree


def test_names_in_a_result_are_drawn_as_they_are(workdir):
    """matplotlib would take $...$ for mathematics, and fail at what is none."""
    run = json.loads(json.dumps(RESULT))
    run[0]["extra_info"]["provider"] = "$\\frac{$ \x1b\n\n\n" + "x" * 5000
    page = report.write(results.write_result(workdir, run, gpu="$\\x$"))
    assert list(workdir.glob("*.png"))
    assert "x" * 5000 in page.read_text()
