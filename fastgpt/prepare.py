"""`fastgpt prepare`: turn a text into a dataset. Also the embedded corpus, which every machine has."""

import hashlib
import json
import os
import pickle
import shlex
import shutil
import sysconfig
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import dropwhile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fastgpt import __version__, documents, files
from fastgpt import tokenizer as tokenizers
from fastgpt.config import UserError, cache_folder
from fastgpt.documents import Input, Piece, Survey
from fastgpt.lock import lock
from fastgpt.parse import shown
from fastgpt.tokenizer import Tokenizer

EMBEDDED = "python-stdlib"
SPLITS = ("train", "val")
SAVE_SECONDS = 5.0  # from one record of what is done to the next


def prepare(
    source: str | Path, tokenizer_name: str, out: str | Path, field: str = "", separator: str = "",
    val_fraction: float = 0.1, overwrite: bool = False,
) -> None:  # fmt: skip
    """Write out/train.bin, out/val.bin, out/manifest.json, and meta.pkl unless the tokenizer is GPT-2's. docs/data.md describes them.

    source is a file or a folder. Reads it in parts and tokenizes them in parallel: memory stays constant. What is done lies in out/.part:
    after a kill the same call goes on from there. Raises UserError; then the dataset that `out` held is as it was.
    """
    source, out = Path(source), Path(out)
    found, passed = documents.find(source, out)
    if not found:
        raise UserError(f"--input={source}: no such file, or a folder without files (pipes and devices are none)")
    named = source.is_file()
    if named and source.name.endswith(".jsonl.zst"):
        raise UserError(f"--input={source}: zstd is not read; unpack it first: zstd -d {source}")
    errors = "surrogateescape" if named and tokenizer_name == "bytes" else "strict"
    inputs = [Input(path, field or "text", errors) for path in found]
    if field and not any(i.rows for i in inputs):
        raise UserError(f"--field={field}: there is no .jsonl and no .parquet in {source}; leave the flag out")
    # It raises before any work.
    tokenizer = None if tokenizer_name == "chars" else tokenizers.get_tokenizer(tokenizer_name)
    if separator and tokenizer and tokenizer.end_of_text is not None:
        raise UserError(f"--separator: {tokenizer_name} has a token of its own between documents; leave the flag out")
    for written, meant in (("\\n", "\n"), ("\\t", "\t"), ("\\0", "\0")):
        separator = separator.replace(written, meant)
    recipe = {
        "input": os.path.abspath(source), "tokenizer": tokenizer_name, "field": field, "separator": separator,
        "val_fraction": val_fraction,
    }  # fmt: skip
    if not overwrite:
        check_free(out, recipe)
    part = out / ".part"
    key = identity({**recipe, "meta": tokenizer and tokenizer.meta()}, found)  # a folder may hold another tokenizer now
    found_before = read_survey(part, key, inputs)
    text = found_before or documents.survey(inputs, passed, tokenizer is None, named)
    check_enough(text, source)
    say_taken(text)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with lock(out, "--out"):
            if not overwrite:
                check_free(out, recipe)  # another may have written it while the text was read
            if not found_before:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                write_survey(part, key, text, inputs)
            try:
                counts = write(text, recipe, tokenizer, part, out)
            except KeyboardInterrupt:
                print(f"{part} holds what is done; the same command goes on from there")
                raise
            except Exception as e:
                if not isinstance(e, OSError):  # after a full disk, too, the same command goes on
                    shutil.rmtree(part)
                raise
            shutil.rmtree(part)
    except OSError as e:
        raise UserError(
            f"{out}: cannot be written ({e.strerror}); the same command goes on from what is done, or give another --out"
        ) from None
    for split in SPLITS:
        print(f"{out / split}.bin: {counts[split]:,} tokens")
    name = dataset_name(out)
    print(
        f"next: fastgpt train --preset=quickstart --dataset={shlex.quote(name)} --out_dir={shlex.quote(f'out-{out.name}')}"
    )


def check_free(out: Path, recipe: dict[str, Any]) -> None:
    """Raise UserError if `out` holds a dataset that was not made by this recipe."""
    try:
        made = files.read_json(out / "manifest.json")
    except (FileNotFoundError, NotADirectoryError):
        if not any((out / name).exists() for name in ("train.bin", "val.bin", "meta.pkl")):
            return
        made = None
    except (OSError, ValueError):
        made = None
    if not isinstance(made, dict):
        raise UserError(
            f"--out={out}: it holds a dataset, and no manifest.json says of which text; --overwrite replaces it"
        )
    for name, value in recipe.items():
        if made.get(name) != value:
            raise UserError(
                f"--out={out}: it holds a dataset with another --{name} ({made.get(name)}, not {value}); --overwrite replaces it"
            )


def check_enough(text: Survey, source: Path) -> None:
    """Raise UserError if a text cannot be divided: train and val need a character each, and a row is not divided."""
    if text.characters < 2:
        reasons = f" ({said(text.passed)} passed over)" if text.passed else ""
        raise UserError(f"--input={source}: there is no text in it{reasons}")
    if text.documents == 1 and text.inputs[0].rows:
        raise UserError(f"--input={source}: it has one row; train and val need one each")


def said(counts: Counter) -> str:
    """Counts as words: `3 .py, 1 .txt`."""
    return ", ".join(f"{n:,} {name if name.isprintable() else shown(name)}" for name, n in counts.most_common())


def suffixes(inputs: Iterable[Input]) -> Counter:
    """The numbers of files by their suffix."""
    return Counter(
        "".join(i.path.suffixes[-2:]) if i.path.suffix == ".gz" else i.path.suffix or "no suffix" for i in inputs
    )


def say_taken(text: Survey) -> None:
    """Print what of a folder was taken, and what was not."""
    if len(text.inputs) + text.passed.total() > 1:
        print(f"taken: {said(suffixes(text.inputs))}; {text.documents:,} documents")
    if text.passed:
        print(f"passed over: {said(text.passed)}")


def dataset_name(out: Path) -> str:
    """What --dataset is to be for a folder; see data.dataset_folder."""
    if out.parent == Path("data"):
        return out.name
    return str(out.resolve() if (Path("data") / out).is_dir() else out)


# ---- the token files ----


def write(text: Survey, recipe: dict[str, Any], tokenizer: Tokenizer | None, part: Path, out: Path) -> dict[str, int]:
    """Tokenize all of a survey's text into `part`, then move the dataset to `out`. Returns {split: number of tokens}."""
    separator = recipe["separator"]
    if tokenizer is None:
        tokenizer = tokenizers.Chars.of(text.alphabet | set(separator))
    mark = np.array([], np.uint32)  # what stands behind each document
    if text.documents > 1 and tokenizer.end_of_text is not None:
        mark = np.array([tokenizer.end_of_text])
    elif text.documents > 1 and separator:
        mark = tokenizer.encode_array(separator)
    n_train = min(max(int(text.characters * (1 - recipe["val_fraction"])), 1), text.characters - 1)
    state = write_tokens(text, n_train, tokenizer, mark, part)
    if not all(state["tokens"].values()):
        raise UserError(f"--input={recipe['input']}: too little text for --val_fraction={recipe['val_fraction']}")
    meta = tokenizer.meta()
    if meta is not None:
        if len(mark) == 1:
            meta["separator"] = int(mark[0])
        (part / "meta.pkl").write_bytes(pickle.dumps(meta))
    names = ["meta.pkl"] * (meta is not None) + ["train.bin", "val.bin"]
    manifest = {
        **recipe, "fastgpt": __version__, "files": len(text.inputs), "by_suffix": suffixes(text.inputs),
        "passed_over": text.passed, "bytes": sum(i.path.stat().st_size for i in text.inputs),
        "characters": text.characters, "documents": state["documents"], "tokens": state["tokens"],
        "sha256": {name: file_digest(part / name) for name in names},
    }  # fmt: skip
    (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    if meta is None:
        (out / "meta.pkl").unlink(missing_ok=True)  # left by an earlier tokenizer
    # The manifest first: if this is cut short, it says that the same command may write here.
    for name in ("manifest.json", *names):
        os.replace(part / name, out / name)
    return state["tokens"]


def write_tokens(text: Survey, n_train: int, tokenizer: Tokenizer, mark: np.ndarray, part: Path) -> dict[str, Any]:
    """Tokenize a text into part/train.bin and part/val.bin, from where an earlier call was stopped.

    Returns {"tokens": {split: number}, "documents": {split: number}}; a document counts where it ends. `mark` has the ids behind each.
    """
    dtype = np.dtype("<u4" if tokenizer.n_vocab > 65536 else "<u2")

    def encode(block: list[Piece]) -> np.ndarray:
        parts = []
        for piece in block:
            parts += [tokenizer.encode_array(piece.text), mark] if piece.ends else [tokenizer.encode_array(piece.text)]
        return np.concatenate(parts).astype(dtype)

    state = read_state(part, dtype.itemsize)
    done, first = state["characters"], state["input"]
    if done:
        print(f"going on from {done / text.characters:.0%}, which {part} holds")
    anywhere = getattr(tokenizer, "cut_anywhere", False)
    stream = documents.pieces(text.inputs, n_train, anywhere=anywhere, first=first)
    stream = dropwhile(lambda p: p.input == first and p.done <= state["pieces"], stream)
    blocks = documents.blocks(stream)
    workers = os.cpu_count() or 1
    with (
        ExitStack() as stack,
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=text.characters, initial=done, unit="char", unit_scale=True, desc="tokenizing", disable=None) as bar,
    ):
        out = {split: stack.enter_context(open(part / f"{split}.bin", "ab")) for split in SPLITS}
        for split in SPLITS:
            out[split].truncate(state["tokens"][split] * dtype.itemsize)
        waiting: deque[tuple[list[Piece], Future]] = deque()
        saved = time.monotonic()
        while True:
            while len(waiting) < 2 * workers and (block := next(blocks, None)):  # a bounded number: constant memory
                waiting.append((block, pool.submit(encode, block)))
            if not waiting:
                return state
            block, encoded = waiting.popleft()
            ids, split, last = encoded.result(), block[0].split, block[-1]
            out[split].write(ids.data)
            state["tokens"][split] += len(ids)
            state["documents"][split] += sum(piece.ends for piece in block)
            state["characters"] += (characters := sum(len(piece.text) for piece in block))
            state["input"], state["pieces"] = last.input, last.done
            bar.update(characters)
            if time.monotonic() - saved > SAVE_SECONDS:
                for f in out.values():
                    f.flush()
                    os.fsync(f.fileno())  # the record must not be on the disk before what it counts
                files.write_json(part / "state.json", state)
                saved = time.monotonic()


# ---- what a stopped call leaves ----


def read_state(part: Path, itemsize: int) -> dict[str, Any]:
    """How far the files in `part` are."""
    new = {"characters": 0, "input": 0, "pieces": 0, **{of: dict.fromkeys(SPLITS, 0) for of in ("tokens", "documents")}}
    try:
        state = files.read_json(part / "state.json")
        for split in SPLITS:
            if (part / f"{split}.bin").stat().st_size < state["tokens"][split] * itemsize:
                return new
    except (OSError, ValueError, TypeError, KeyError):
        return new
    return state


def write_survey(part: Path, key: str, text: Survey, inputs: list[Input]) -> None:
    """Keep a survey, and the key of what was surveyed."""
    taken = {id(i) for i in text.inputs}
    counts = [[i.characters, i.documents] if id(i) in taken else None for i in inputs]
    files.write_json(part / "survey.json", [key, counts, text.passed, "".join(sorted(text.alphabet))])


def read_survey(part: Path, key: str, inputs: list[Input]) -> Survey | None:
    """The survey in `part`, if it is of these inputs."""
    try:
        was, counts, passed, alphabet = files.read_json(part / "survey.json", 2**30)
    except (OSError, ValueError, TypeError):
        return None
    if was != key:
        return None
    for one, count in zip(inputs, counts, strict=True):
        one.characters, one.documents = count or (0, 0)
    return Survey([i for i, c in zip(inputs, counts, strict=True) if c], Counter(passed), set(alphabet))


def identity(recipe: dict[str, Any], found: list[Path]) -> str:
    """A text that differs where the recipe, this version, or the names, sizes or times of the files do."""
    try:
        stats = [(str(path), (s := path.stat()).st_size, s.st_mtime_ns) for path in found]
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be read ({e.strerror})") from None
    return hashlib.sha256(json.dumps([recipe, __version__, stats]).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """The sha256 of a file."""
    found = hashlib.sha256()
    with open(path, "rb") as f:
        while part := f.read(2**20):
            found.update(part)
    return found.hexdigest()


# ---- the embedded corpus ----


def embedded_folder() -> Path:
    """The cache folder of the embedded corpus; one for each Python version."""
    return cache_folder() / f"{EMBEDDED}-{sysconfig.get_python_version()}"


def prepare_embedded(folder: Path) -> None:
    """Tokenize the Python standard library's source, without tests and installed packages, into `folder`, once."""
    try:
        files.guard(folder / "val.bin", make=True)
    except OSError as e:
        raise UserError(
            f"{folder}: no place for the embedded text ({e.strerror}); set FASTGPT_CACHE to a folder of your own"
        ) from None
    if (folder / "val.bin").exists():
        return
    stdlib = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    sources = sorted(p for p in stdlib.rglob("*.py") if not skip & set(p.relative_to(stdlib).parts))
    if not sources:
        raise UserError(f"{stdlib}: this Python has no source of its standard library; give --dataset")
    print(f"preparing the embedded corpus, once: the source of Python's standard library ({stdlib}), as bytes")
    text = documents.survey([Input(p) for p in sources], Counter(), alphabet=False, named=False)
    recipe = {"input": str(stdlib), "tokenizer": "bytes", "field": "", "separator": "", "val_fraction": 0.1}
    try:
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as part:  # its own: two runs may begin at once
            counts = write(text, recipe, tokenizers.get_tokenizer("bytes"), Path(part), folder)
    except OSError as e:
        raise UserError(
            f"{folder}: cannot be written ({e.strerror}); give another folder in the environment variable FASTGPT_CACHE"
        ) from None
    for split in SPLITS:
        print(f"{folder / split}.bin: {counts[split]:,} tokens")
