"""Streams of tokens in files: nanoGPT's .bin, llm.c's shards, NumPy's .npy.

nanoGPT's are little-endian uint16 without a header (uint32 if the vocabulary is above 65,536). llm.c's have a header of 1,024 bytes. A .npy
has its own, which names any integer dtype.
"""

import bisect
import io
import os
import shlex
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from fastgpt import files
from fastgpt.config import UserError
from fastgpt.parse import shown

# llm.c's shards: {(magic, version), the header's first two int32s: dtype of the tokens}; see its dev/data/data_common.py.
SHARD_KINDS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
MAGICS = {magic for magic, _ in SHARD_KINDS}
HEADER_BYTES = 1024
MOST_OPEN = 64  # shards at a time: a process may have about a thousand files


class Tokens:
    """One stream of tokens over one or more files: `len(tokens)`, `tokens.read(starts, length)`.

    Raises UserError with the file's name if a file is missing, empty, truncated, or not a whole number of tokens. Files are read, not
    mapped: where one becomes shorter during a run, a map would end the process by a signal, and a read says so.
    """

    def __init__(self, paths: Iterable[str | Path], vocab_size: int):
        self.paths = [str(p) for p in paths]
        self.vocab_size = vocab_size
        self.layout = [self._inspect(path) for path in self.paths]  # (dtype, header bytes, tokens)
        self.ends = np.cumsum([count for *_, count in self.layout]).tolist()

    def __len__(self):
        return self.ends[-1]

    def _inspect(self, path):
        try:
            with files.opened(path) as f:
                size = os.fstat(f.fileno()).st_size
                begin = f.read(2**16)
        except OSError as e:
            raise UserError(f"{path}: cannot be read ({e.strerror}); prepare the data, or give other files") from None
        if path.endswith(".npy") or begin.startswith(npy.MAGIC_PREFIX):
            return npy_layout(path, begin, size)
        head = np.frombuffer(begin[: min(len(begin), 12) // 4 * 4], dtype="<i4")
        # A headerless file could begin with the same bytes: tokens 55432 and 308. But 55432 is not a GPT-2 token.
        if len(head) and head[0] in MAGICS:
            dtype = SHARD_KINDS.get(tuple(head[:2]))
            count = int(head[2]) if len(head) > 2 else 0
            if dtype is None or count <= 0:
                raise UserError(f"{path}: the shard is truncated, or its version is unknown; fetch it again")
            expected = HEADER_BYTES + count * dtype.itemsize
            if size != expected:
                raise UserError(
                    f"{path}: the shard's header promises {count:,} tokens, {expected:,} bytes in all, "
                    f"but the file has {size:,}; fetch it again"
                )
            return dtype, HEADER_BYTES, count
        if path.endswith((".txt", ".jsonl", ".jsonl.gz", ".parquet")):
            raise UserError(
                f"{path}: it is text, and no token file; fastgpt prepare --input={shlex.quote(path)} --out=data/NAME "
                "makes a dataset of it"
            )
        dtype = np.dtype("<u4" if self.vocab_size > 65536 else "<u2")
        if size == 0:
            raise UserError(f"{path}: the file is empty; prepare the data again")
        if size % dtype.itemsize:
            raise UserError(
                f"{path}: {size:,} bytes are not a whole number of {dtype.name} tokens; the file is truncated, or not a token file"
            )
        return dtype, 0, size // dtype.itemsize

    def _part(self, shard, start, length, opened, stack):
        """At most `length` tokens of a shard from one on. `opened` {shard: file} has those that are open, which the stack closes."""
        dtype, offset, count = self.layout[shard]
        part = np.empty(min(length, count - start), dtype)
        try:
            if shard not in opened:
                if len(opened) == MOST_OPEN:
                    stack.close()
                    opened.clear()
                opened[shard] = stack.enter_context(files.opened(self.paths[shard]))
            opened[shard].seek(offset + start * dtype.itemsize)
            read = opened[shard].readinto(part.view(np.uint8))
        except OSError as e:
            raise UserError(f"{self.paths[shard]}: cannot be read any more ({e.strerror})") from None
        if read < part.nbytes:
            raise UserError(
                f"{self.paths[shard]}: the file has become shorter since the run began; prepare the data again"
            )
        return part

    def _parts(self, shard, most):
        """Yield the first `most` tokens of a shard, part by part."""
        size, count, opened = 2**22, min(most, self.layout[shard][2]), {}
        with ExitStack() as stack:
            for start in range(0, count, size):
                yield self._part(shard, start, min(size, count - start), opened, stack)

    def read(self, starts: list[int], length: int) -> np.ndarray:
        """`length` tokens from each start on, int64 [len(starts), length]. Raises UserError for an id at or above vocab_size."""
        out = np.empty((len(starts), length), dtype=np.int64)
        opened = {}
        with ExitStack() as stack:
            for row, start in zip(out, starts, strict=True):
                done = 0
                while done < length:
                    shard = bisect.bisect_right(self.ends, start + done)
                    offset = start + done - (self.ends[shard - 1] if shard else 0)
                    part = self._part(shard, offset, length - done, opened, stack)
                    row[done : done + len(part)] = part
                    done += len(part)
        if out.min() < 0 or out.max() >= self.vocab_size:
            for row, start in zip(out, starts, strict=True):
                self._check(row, self.paths[bisect.bisect_right(self.ends, start)])
        return out

    def holds(self, token: int) -> bool:
        """Whether the stream contains a token. Reads from the beginning until it finds one."""
        return any(
            bool((part == token).any())
            for shard, (*_, count) in enumerate(self.layout)
            for part in self._parts(shard, count)
        )

    def check_ids(self, most: int = 2**29) -> None:
        """Raise UserError for an id at or above vocab_size among the first `most` tokens. `read` also checks each batch."""
        for shard, (dtype, _, count) in enumerate(self.layout):
            if (self.vocab_size > np.iinfo(dtype).max and dtype.kind == "u") or most <= 0:
                continue
            for part in self._parts(shard, most):
                self._check(part, self.paths[shard])
            most -= count

    def _check(self, ids, path):
        low, high = int(ids.min()), int(ids.max())
        if low < 0:
            raise UserError(f"{path}: token id {low} is negative; the file is damaged, or holds something else")
        if high >= self.vocab_size:
            raise UserError(
                f"{path}: token id {high} is not below vocab_size={self.vocab_size}; "
                "the file was made with another tokenizer, or its meta.pkl is missing"
            )


def npy_layout(path: str, begin: bytes, size: int) -> tuple[np.dtype, int, int]:
    """(dtype, bytes of the header, number of tokens) of a .npy file that has `size` bytes and begins so. Raises UserError."""
    f = io.BytesIO(begin)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of headers that Python 2 wrote
            read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(f)]
            shape, _, dtype = read_header(f)
    except Exception as e:  # numpy parses a text: it can fail in any way
        raise UserError(f"{path}: its .npy header is damaged ({type(e).__name__}); make the file again") from None
    if dtype.kind not in "ui" or len(shape) != 1 or shape[0] <= 0:
        raise UserError(
            f"{path}: it is an array of {dtype}, of shape {shown(shape)}; token ids are integers in one dimension: "
            "np.save(path, np.array(ids, dtype=np.uint16))"
        )
    expected = f.tell() + shape[0] * dtype.itemsize
    if size != expected:
        raise UserError(
            f"{path}: its header promises {shape[0]:,} tokens, {expected:,} bytes in all, but the file has {size:,}; "
            "it is not whole: make or fetch it again"
        )
    return dtype, f.tell(), shape[0]


def find_files(folder: Path, split: str) -> list[Path]:
    """The token files of a split, "train" or "val": nanoGPT's single file, else the shards, else .npy files."""
    one = folder / f"{split}.bin"
    if one.exists():
        return [one]
    return sorted(folder.glob(f"*{split}*.bin")) or sorted(folder.glob(f"*{split}*.npy")) or [one]
