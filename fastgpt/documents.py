"""The documents of a user's files, and the pieces in which they are tokenized.

A text file is one document. Each line of a .jsonl or .jsonl.gz is one, and each row of a .parquet. Files are read in parts, so that memory
stays constant; a single line or row is read as a whole.
"""

import gzip
import io
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from fastgpt import files
from fastgpt.config import UserError
from fastgpt.parse import shown

LONGEST_LINE = 2**26  # bytes of a line of JSON


@dataclass
class Input:
    """A file that is read. `survey` fills in how many characters and documents it has."""

    path: Path
    field: str = "text"  # the field of a JSON object, or the column of a Parquet table, that has the text
    errors: str = (
        "strict"  # with "surrogateescape" a text file may hold any bytes: what is not UTF-8 becomes surrogates
    )
    characters: int = 0
    documents: int = 0

    @property
    def rows(self) -> bool:
        """Whether it has a document a row, rather than being one."""
        return self.path.name.endswith((".jsonl", ".jsonl.gz", ".parquet"))

    def read(self) -> Iterator[TextIO]:
        """Yield its documents, each open to be read, with the newlines that it has. Raises UserError, and UnicodeDecodeError for a text."""
        try:
            with files.opened(self.path) as f:
                if self.rows:
                    read_rows = parquet_rows if self.path.suffix == ".parquet" else json_rows
                    yield from map(io.StringIO, read_rows(f, self.path, self.field))
                else:
                    yield io.TextIOWrapper(io.BufferedReader(f), "utf-8", self.errors, newline="")
        except OSError as e:
            raise UserError(f"{self.path}: cannot be read ({e.strerror or e})") from None


def json_rows(file: io.FileIO, path: Path, name: str) -> Iterator[str]:
    """Yield the text of each line of a JSON lines file; empty lines are passed over. Raises UserError with the line's number."""
    lines = io.BufferedReader(file, 2**20)
    if path.suffix == ".gz":
        lines = gzip.GzipFile(fileobj=lines)  # type: ignore[assignment]
    number = 0
    while True:
        number += 1
        where = f"{path}, line {number}"
        try:
            line = lines.readline(LONGEST_LINE + 1)
            if len(line) > LONGEST_LINE:
                raise UserError(f"{where}: it has more than {LONGEST_LINE:,} bytes; is each document a line?")
            if not line:
                return
            if not line.strip():
                continue
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise UserError(f"{where}: the gzip stream is broken ({e}); fetch it again") from None
        except json.JSONDecodeError as e:
            raise UserError(f"{where}: it is no JSON ({e.msg}, at column {e.colno}); mend or remove the line") from None
        except (ValueError, RecursionError) as e:
            raise UserError(f"{where}: it is no JSON ({e}); mend or remove the line") from None
        if type(row) is not dict:
            raise UserError(f"{where}: it is no JSON object, but {shown(row)}")
        if name not in row:
            raise UserError(
                f"{where}: it has no field {name!r}, but {shown(list(row))}; name the field of the text by --field"
            )
        yield checked(row[name], name, where)


def parquet_rows(file: io.FileIO, path: Path, name: str) -> Iterator[str]:
    """Yield the text of each row of a Parquet table. Raises UserError with the row's number."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: pyarrow is not installed, which reads Parquet; pip install pyarrow") from None
    number = 0
    try:
        table = parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)  # in parts, not a row group at once
        names = table.schema_arrow.names
        if name not in names:
            raise UserError(
                f"{path}: it has no column {name!r}, but {shown(names)}; name the column of the text by --field"
            )
        for batch in table.iter_batches(64, columns=[name]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield checked(text, name, f"{path}, row {number}")
    except (pyarrow.ArrowException, ValueError) as e:
        raise UserError(f"{path}, after row {number}: it is no Parquet file, or damaged ({e})") from None


def checked(text: object, name: str, where: str) -> str:
    """The value of a field, if it is text that UTF-8 can write. Raises UserError."""
    if type(text) is not str:
        raise UserError(f"{where}: its {name!r} is {shown(text)}, and no text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: its {name!r} has half of a surrogate pair, which is no text") from None
    return text


def find(source: Path, out: Path) -> tuple[list[Path], Counter]:
    """(the files of an input, why others were passed over: {reason: number of files}).

    Of a folder these are all but the hidden ones and those in `out`. Raises UserError if both are one.
    """
    if source.is_file():
        return [source], Counter()
    real, here = (Path(os.path.realpath(p)) for p in (out, source))  # resolve fails where links form a circle
    if real == here:
        raise UserError(f"--out={out}: it is the folder of --input; give a folder in it, or another")
    out_is_around = real in here.parents
    failed: list[OSError] = []
    walk = os.walk(source, onerror=failed.append)  # Path.rglob would leave out such a folder without a word
    found = sorted(p for folder, _, names in walk for name in names if (p := Path(folder, name)).is_file())
    found = [p for p in found if out_is_around or real not in Path(os.path.realpath(p)).parents]
    seen = [p for p in found if not any(part.startswith(".") for part in p.relative_to(source).parts)]
    return seen, +Counter({"hidden": len(found) - len(seen), "unreadable folder": len(failed)})


@dataclass
class Survey:
    """What a first pass over the inputs finds: those that are text, and the set of their characters if it was asked for."""

    inputs: list[Input] = field(default_factory=list)
    passed: Counter = field(default_factory=Counter)  # why files were passed over: {reason: number of files}
    alphabet: set[str] = field(default_factory=set)

    @property
    def characters(self) -> int:
        return sum(i.characters for i in self.inputs)

    @property
    def documents(self) -> int:
        return sum(i.documents for i in self.inputs)


def survey(inputs: list[Input], passed: Counter, alphabet: bool, named: bool) -> Survey:
    """Read all inputs once. A file that is not UTF-8 raises UserError if it is `named` by the user; of a folder's it is passed over.

    So is a folder's file with a NUL in it, which no text has. Raises UserError for a row that has no text.
    """
    found = Survey(passed=Counter(passed))
    for one in tqdm(inputs, desc="reading", disable=None if len(inputs) > 1 else True):
        characters, documents, seen, reason = 0, 0, set(), ""
        try:
            for document in one.read():
                documents += 1
                while text := document.read(2**20):
                    characters += len(text)
                    if alphabet:
                        seen.update(text)
                    if not (named or one.rows) and "\0" in text:
                        reason = "binary"
                        break
        except UnicodeDecodeError as e:
            if named:
                raise UserError(
                    f"{one.path}: not UTF-8 text ({e.reason}); convert it first, or take --tokenizer=bytes"
                ) from None
            reason = "not UTF-8"
        if reason:
            found.passed[reason] += 1
            continue
        one.characters, one.documents = characters, documents
        found.inputs.append(one)
        found.alphabet |= seen
    return found


# A text can be cut here without changing its GPT-2 style tokens: before a single space or after a single newline, between
# words. Runs of white space are not cut: their tokens depend on what follows.
SAFE_CUT = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")


def cut(document: TextIO, most: int, size: int, anywhere: bool) -> Iterator[tuple[str, bool]]:
    """Yield the next `most` characters of a document as (text, whether it ends here), of about `size` characters each, cut at SAFE_CUT."""
    text = ""
    while True:
        asked = min(size, most)
        new = document.read(asked)
        text += new
        most -= len(new)
        if not most or len(new) < asked:  # only at a document's end is less read than asked for
            yield text, bool(most)
            return
        end = len(text)
        if not anywhere:
            end = max((m.start() for m in SAFE_CUT.finditer(text, max(0, end - 2**12))), default=0)
        if not end and len(text) > 32 * size:  # no word ends within 16 million characters: cut anyway
            end = len(text)
        if end:
            yield text[:end], False
            text = text[end:]


@dataclass
class Piece:
    """A part of a document, which is tokenized by itself."""

    split: str  # train or val
    text: str
    ends: bool  # the document ends with it
    input: int  # of which input it is, and how many pieces of that input it completes
    done: int


def pieces(
    inputs: list[Input], n_train: int, size: int = 2**19, anywhere: bool = False, first: int = 0
) -> Iterator[Piece]:
    """Yield all text from the input `first` on. The first n_train characters go to train, the others to val.

    A text file is cut there, at that character. A row is not: it goes to val if it ends behind it. But the very first document always
    begins train. Raises UserError if an input is not what it was in the survey.
    """
    at = sum(i.characters for i in inputs[:first])
    begun = any(i.documents for i in inputs[:first])
    for number, one in enumerate(inputs[first:], first):
        done, start = 0, at
        try:
            for document in one.read():
                left = n_train - at  # characters still missing in train
                if isinstance(document, io.StringIO):
                    whole = len(document.getvalue()) <= left or not begun
                    parts = [("train" if whole else "val", sys.maxsize)]
                else:
                    parts = [("train", left)] * (left > 0) + [("val", sys.maxsize)]
                begun, ends = True, False
                for split, most in parts:
                    if ends:
                        break
                    for text, ends in cut(document, most, size, anywhere):
                        done += 1
                        at += len(text)
                        yield Piece(split, text, ends, number, done)
        except UnicodeDecodeError:
            at = -1
        if at != start + one.characters:
            raise UserError(f"{one.path}: its text changed while it was read; begin again")


def blocks(stream: Iterator[Piece], size: int = 2**19) -> Iterator[list[Piece]]:
    """Yield the pieces of a stream in lists of one split and about `size` characters."""
    block: list[Piece] = []
    characters = 0
    for piece in stream:
        if block and (piece.split != block[0].split or characters + len(piece.text) > size):
            yield block
            block, characters = [], 0
        block.append(piece)
        characters += len(piece.text)
    if block:
        yield block
