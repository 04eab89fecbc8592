"""`fastgpt prepare`: turn a text into a dataset. Also the embedded corpus, which every machine has."""

import os
import pickle
import re
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastgpt import tokenizer as tokenizers
from fastgpt.config import UserError, cache_folder
from fastgpt.files import guard

EMBEDDED = "python-stdlib"


def prepare(source: str | Path, tokenizer_name: str, out: str | Path, files: list[Path] | None = None) -> None:
    """Write out/train.bin and out/val.bin (the last 10% of the characters), and meta.pkl, unless the tokenizer is GPT-2's.

    source is a UTF-8 text file or a folder of them; hidden files and `out` itself do not count. `files` overrides this choice.
    Reads the text in blocks and tokenizes them in parallel: memory stays constant. With a tiktoken encoding every file of a folder
    ends in the end-of-text token. A failure leaves no partial file. Raises UserError.
    """
    source, out = Path(source), Path(out)
    if source.is_file():
        files = [source]
    elif files is None:
        real = Path(os.path.realpath(out))  # unlike resolve, it does not fail where links form a circle
        files = sorted(p for p in source.rglob("*") if p.is_file() and real not in Path(os.path.realpath(p)).parents)
        files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(source).parts)]
    if not files:
        raise UserError(f"--input={source}: no such file, or a folder without files (pipes and devices are none)")
    tokenizer: tokenizers.Tokenizer
    if tokenizer_name != "chars":
        tokenizer = tokenizers.get_tokenizer(tokenizer_name)  # raises before any work
    files, n_chars, alphabet = survey(files, strict=source.is_file(), alphabet=tokenizer_name == "chars")
    if n_chars < 2:  # one character each for train and val
        raise UserError(f"--input={source}: there is no text in it (files that are not UTF-8 are skipped)")
    if tokenizer_name == "chars":
        tokenizer = tokenizers.Chars.of(alphabet)

    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=out) as part:
            counts = write_tokens(files, n_chars, tokenizer, Path(part))
            meta = tokenizer.meta()
            if meta is None:
                (out / "meta.pkl").unlink(missing_ok=True)  # left by an earlier tokenizer
            else:
                (Path(part) / "meta.pkl").write_bytes(pickle.dumps(meta))
            for name in ["meta.pkl"] * (meta is not None) + ["train.bin", "val.bin"]:
                os.replace(Path(part) / name, out / name)
    except (UnicodeDecodeError, IndexError):
        raise UserError(f"--input={source}: its text changed while it was read; begin again") from None
    except OSError as e:
        hint = " in the environment variable FASTGPT_CACHE" if out == embedded_folder() else ""
        raise UserError(f"{out}: cannot be written ({e.strerror}); give another folder{hint}") from None
    for split, count in counts.items():
        print(f"{out / split}.bin: {count:,} tokens")


def write_tokens(files: list[Path], n_chars: int, tokenizer: tokenizers.Tokenizer, out: Path) -> dict[str, int]:
    """Tokenize files, n_chars characters in all, into out/train.bin and out/val.bin. Returns {split: number of tokens}."""
    end_mark = tokenizer.end_of_text if len(files) > 1 else None
    dtype = np.dtype("<u4" if tokenizer.n_vocab > 65536 else "<u2")
    counts = {"train": 0, "val": 0}
    workers = os.cpu_count() or 1
    with (
        open(out / "train.bin", "wb") as train,
        open(out / "val.bin", "wb") as val,
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=n_chars, unit="char", unit_scale=True, desc="tokenizing", disable=None) as bar,
    ):
        file = {"train": train, "val": val}
        stream = blocks(files, int(n_chars * 0.9))
        while batch := list(islice(stream, 2 * workers)):  # a bounded number of blocks: constant memory
            encoded = pool.map(tokenizer.encode_array, [text for _, text, _ in batch])
            for (split, text, ends), ids in zip(batch, encoded, strict=True):
                ids = np.append(ids, end_mark) if ends and end_mark is not None else ids
                file[split].write(ids.astype(dtype).tobytes())
                counts[split] += len(ids)
                bar.update(len(text))
                n_chars -= len(text)
    if n_chars:
        raise UserError(f"{files[0].parent}: the text changed while it was read; begin again")
    return counts


def survey(files: list[Path], strict: bool, alphabet: bool) -> tuple[list[Path], int, set[str]]:
    """(files that are UTF-8 text, number of characters in them, set of the characters if `alphabet`), in one pass.

    Another file raises UserError if `strict`; else it is skipped, and the number of skipped files is printed.
    """
    good, n_chars, seen = [], 0, set()
    for path in tqdm(files, desc="reading", disable=None if len(files) > 1 else True):
        try:
            with open(path, encoding="utf-8") as f:
                n, chars = 0, set()
                while text := f.read(2**20):
                    n += len(text)
                    if alphabet:
                        chars.update(text)
        except UnicodeDecodeError as e:
            if strict:
                raise UserError(f"{path}: not UTF-8 text ({e.reason}); convert it first") from None
            continue
        except OSError as e:
            raise UserError(f"{path}: cannot be read ({e.strerror})") from None
        good.append(path)
        n_chars += n
        seen |= chars
    if len(good) < len(files):
        print(f"passed over {len(files) - len(good)} of {len(files)} files: not UTF-8 text")
    return good, n_chars, seen


# A text can be cut here without changing its GPT-2 style tokens: before a single space or after a single newline, between
# words. Runs of white space are not cut: their tokens depend on what follows.
SAFE_CUT = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")


def blocks(files: list[Path], n_train: int, size: int = 2**19) -> Iterator[tuple[str, str, bool]]:
    """Yield the files' text as (split, text, whether a file ends here), cut at SAFE_CUT, and after n_train characters."""
    left = n_train  # characters still missing in train; -1 once val has begun
    for path in files:
        with open(path, encoding="utf-8") as f:
            text = ""
            while True:
                if left == 0:  # nanoGPT splits at this character; the rest of the file goes to val
                    yield "train", text, False
                    text, left = "", -1
                new = f.read(size if left < 0 else min(size, left))
                text += new
                if left > 0:
                    left -= len(new)
                    if left == 0:
                        continue
                split = "train" if left > 0 else "val"
                if not new:
                    yield split, text, True
                    break
                cut = max((m.start() for m in SAFE_CUT.finditer(text, max(0, len(text) - 2**12))), default=0)
                if not cut and len(text) > 32 * size:  # no word ends within 16 million characters: cut anyway
                    cut = len(text)
                if cut:
                    yield split, text[:cut], False
                    text = text[cut:]


def embedded_folder() -> Path:
    """The cache folder of the embedded corpus; one for each Python version."""
    return cache_folder() / f"{EMBEDDED}-{sysconfig.get_python_version()}"


def prepare_embedded(folder: Path) -> None:
    """Tokenize the Python standard library's source, without tests and installed packages, into `folder`, once."""
    try:
        guard(folder / "val.bin", make=True)
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
    prepare(stdlib, "bytes", folder, sources)
