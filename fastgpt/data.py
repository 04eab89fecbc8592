"""Token streams on disk, and the batches drawn from them.

A dataset is a folder with an optional meta.pkl and token files in one of two formats. nanoGPT's: train.bin and val.bin,
little-endian uint16 without a header (uint32 if the vocabulary is above 65,536). llm.c's: shards *train*.bin and *val*.bin,
each with a header of 1,024 bytes.
"""

import bisect
import glob
import os
import pickle
import pickletools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgpt import files
from fastgpt.config import TrainConfig, UserError
from fastgpt.parse import shown
from fastgpt.prepare import EMBEDDED, embedded_folder, prepare_embedded

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
                head = np.frombuffer(f.read(12), dtype="<i4")
        except OSError as e:
            raise UserError(
                f"{path}: cannot be read ({e.strerror}); prepare the data, or give another --dataset"
            ) from None
        except ValueError:  # shorter than 12 bytes and not a multiple of 4: no header
            head = ()
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
        if out.max() >= self.vocab_size:
            self._refuse_ids(
                self.paths[bisect.bisect_right(self.ends, starts[int(out.max(1).argmax())])], int(out.max())
            )
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
            if self.vocab_size > np.iinfo(dtype).max or most <= 0:
                continue
            for part in self._parts(shard, most):
                if (top := int(part.max())) >= self.vocab_size:
                    self._refuse_ids(self.paths[shard], top)
            most -= count

    def _refuse_ids(self, path, top):
        raise UserError(
            f"{path}: token id {top} is not below vocab_size={self.vocab_size}; "
            "the file was made with another tokenizer, or its meta.pkl is missing"
        )


# What pickle writes for dicts and lists of str, numbers, bool and None, in all of its protocols. Without tuples, classes and copies of what
# is on the stack no key needs more than one look, and nothing can be made to hold itself many times over.
PLAIN = {
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET",
    "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "NONE", "NEWTRUE", "NEWFALSE",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4",
    "FLOAT", "BINFLOAT",
}  # fmt: skip


def plain_pickle(data: bytes) -> Any:
    """What a pickle holds. No code of it runs. Raises an exception of any kind for what is not made of PLAIN alone."""
    memo = collections = 0
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in PLAIN:
            raise pickle.UnpicklingError(f"it has {opcode.name}{f' {shown(argument)}' if argument else ''}")
        if opcode.name.endswith("PUT"):
            if argument is not None and argument > memo:  # pickle would make room for all the places before it
                raise pickle.UnpicklingError("its memo has gaps")
            memo += 1
        collections += opcode.name in ("MARK", "EMPTY_DICT", "EMPTY_LIST")
        if collections > 10_000:  # each is one byte, and takes 64 of memory
            raise pickle.UnpicklingError("it has more than 10,000 lists and dicts")
    return pickle.loads(data)


def check_meta(meta: Any) -> dict[str, Any]:
    """The dict of a meta.pkl, if it is one. Raises ValueError that says why not."""
    if type(meta) is not dict or type(meta.get("vocab_size")) is not int or not 0 < meta["vocab_size"] < 2**31:
        raise ValueError("it has no vocab_size, a number of tokens")
    if type(meta.get("tokenizer", "")) is not str:
        raise ValueError(f"its tokenizer is {shown(meta['tokenizer'])}")
    for name, value in meta.items():
        inside = value.values() if type(value) is dict else value if type(value) is list else ()
        if any(type(x) in (dict, list) for x in inside):
            raise ValueError(f"its {shown(name)} holds more than text and numbers")
    return meta


def load_meta(folder: str | Path) -> dict[str, Any] | None:
    """The dict in a folder's meta.pkl, or None without one. Raises UserError for anything but plain data."""
    path = Path(folder) / "meta.pkl"
    try:
        return check_meta(plain_pickle(files.read(path, files.DATA)))
    except FileNotFoundError:
        return None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except Exception as e:  # a pickle can fail in any way
        raise UserError(
            f"{path}: not the meta.pkl of a dataset ({type(e).__name__}: {e}); prepare the data again"
        ) from None


def dataset_folder(name: str) -> Path:
    """A dataset's folder: data/NAME as in nanoGPT, else the folder NAME itself, else the embedded corpus's cache."""
    folder = Path("data") / name
    if not folder.is_dir() and Path(name).is_dir():
        folder = Path(name)
    return embedded_folder() if name == EMBEDDED and not folder.is_dir() else folder


def find_files(folder: Path, split: str) -> list[Path]:
    """The token files of a split, "train" or "val": nanoGPT's single file, else the shards."""
    one = folder / f"{split}.bin"
    return [one] if one.exists() else sorted(folder.glob(f"*{split}*.bin")) or [one]


def load_dataset(cfg: TrainConfig) -> tuple[Tokens, Tokens, dict[str, Any] | None, int]:
    """(train Tokens, val Tokens, meta or None, vocab_size) of a TrainConfig. Raises UserError for what is missing or damaged."""
    folder = dataset_folder(cfg.dataset)
    if cfg.dataset == EMBEDDED and folder == embedded_folder():
        prepare_embedded(folder)
    meta = load_meta(folder)
    if meta is not None:
        vocab_size = meta["vocab_size"]
        print(f"found vocab_size = {vocab_size} (inside {folder / 'meta.pkl'})")
    else:
        vocab_size = 50304
        print("defaulting to vocab_size of GPT-2 to 50304 (50257 rounded up for efficiency)")
    if not (cfg.train_data and cfg.val_data) and not folder.is_dir():
        if cfg.train_data or cfg.val_data:
            missing = "val_data" if cfg.train_data else "train_data"
            raise UserError(f"--{missing} is missing, and there is no folder {folder} to read it from; give both")
        raise UserError(
            f"--dataset={cfg.dataset}: there is no folder {folder}; make it with `fastgpt prepare --input PATH --out {folder}`, "
            f"or train on the embedded text with --dataset={EMBEDDED}"
        )
    streams = []
    for split, pattern in (("train", cfg.train_data), ("val", cfg.val_data)):
        paths = sorted(glob.glob(pattern)) or [pattern] if pattern else find_files(folder, split)
        streams.append(Tokens(paths, vocab_size))
    return *streams, meta, vocab_size


class Draws:
    """nanoGPT's draws of offsets: uniform, by a generator (None: torch's own). `left` are offsets that are drawn, but not yet given.

    One draw of n offsets and n draws of one give the same offsets: a run may go on with another batch size.
    """

    def __init__(self, generator: torch.Generator | None = None, left: torch.Tensor | None = None):
        self.generator, self.left = generator, torch.empty(0, dtype=torch.int64) if left is None else left

    def __call__(self, n: int, bound: int) -> torch.Tensor:
        """The next n offsets below `bound`, int64 [n]."""
        self.left = self.left[(self.left >= 0) & (self.left < bound)]  # a resumed run's data may be shorter
        first, self.left = self.left[:n], self.left[n:]
        drawn = torch.randint(bound, (n - len(first),), generator=self.generator)
        return torch.cat((first, drawn)) if len(first) else drawn


class SharedDraws:
    """The draws of one process in a run that another number of processes began.

    Each of these had Draws of its own. Here every process makes all of them, for one iteration after the other, and takes its share: so
    no batch is lost, and none comes twice. states: of the generators, and the offsets left, by process: [{"rng", "offsets"}].
    sequences: offsets of an iteration, of all processes; a multiple of the number of states, and of `size`.
    """

    def __init__(self, states: list[dict[str, Any]], sequences: int, rank: int, size: int):
        self.all = [Draws(torch.Generator().set_state(s["rng"]), s["offsets"]) for s in states]
        self.each, share = sequences // len(states), sequences // size
        self.mine = slice(rank * share, (rank + 1) * share)
        self.iteration: list[torch.Tensor] = []
        self.left = torch.empty(0, dtype=torch.int64)

    def __call__(self, n: int, bound: int) -> torch.Tensor:
        """This process's next n offsets below `bound`, int64 [n]."""
        while len(self.left) < n:
            self.iteration = [draws(self.each, bound) for draws in self.all]
            self.left = torch.cat((self.left, torch.cat(self.iteration)[self.mine]))
        given, self.left = self.left[:n], self.left[n:]
        return given

    def states(self) -> list[dict[str, Any]]:
        """`states` from which the latest iteration is drawn again; to be called between two iterations."""
        every = zip(self.all, self.iteration, strict=True)
        return [{"rng": d.generator.get_state(), "offsets": torch.cat((o, d.left))} for d, o in every]  # type: ignore[union-attr]


class InOrder(Draws):
    """The offsets of a stream's first `count` windows, one behind the other, again and again: for evaluations. Nothing is drawn.

    Raises UserError if the stream is shorter.
    """

    def __init__(self, tokens: Tokens, count: int, block_size: int):
        if len(tokens) < count * block_size + 1:
            raise UserError(
                f"--eval_windows=first: {tokens.paths[0]}: the first {count:,} windows of {block_size} tokens need "
                f"{count * block_size + 1:,} tokens, and there are {len(tokens):,}; take a smaller --eval_iters"
            )
        super().__init__()
        self.count, self.block_size, self.next = count, block_size, 0

    def __call__(self, n: int, bound: int) -> torch.Tensor:
        """The next n offsets, int64 [n]; all are below `bound`."""
        self.next += n
        return torch.arange(self.next - n, self.next) % self.count * self.block_size


class Batches:
    """Random batches of a token stream, drawn as nanoGPT draws them. A thread reads each and copies it to the device.

    `prefetch()` draws offsets and starts to read. `get()` returns that batch (x, y), int64 [merged * batch_size, block_size] on the
    device; y is x shifted by one token. `draws` gives the offsets, in the caller's order. `merged` batches of nanoGPT form one: `prefetch`
    draws the first, and `get` the others. nanoGPT too has drawn one batch when it evaluates, so that an evaluation with the same
    generator gets nanoGPT's tokens, and so do the batches after it. `offsets` are the first one's.
    """

    def __init__(
        self, tokens: Tokens, batch_size: int, block_size: int, device: str | torch.device,
        draws: Draws | SharedDraws | None = None, merged: int = 1,
    ):  # fmt: skip
        if len(tokens) <= block_size:
            raise UserError(
                f"{tokens.paths[0]}: {len(tokens):,} tokens are too few for block_size={block_size}; "
                "take a smaller --block_size, or more text"
            )
        self.tokens, self.batch_size, self.block_size = tokens, batch_size, block_size
        self.device, self.draws, self.merged = torch.device(device), draws or Draws(), merged
        self.bound = len(tokens) - block_size
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.stream: torch.cuda.Stream | None = None
        self.offsets = torch.empty(0, dtype=torch.int64)

    def prefetch(self) -> None:
        """Start to read the next batch."""
        self.offsets = self.draws(self.batch_size, self.bound)
        self.pending = self.thread.submit(self.read, self.offsets.tolist())

    def read(self, starts: list[int]) -> tuple[torch.Tensor, Any]:
        """(x and y [2, len(starts), block_size] at these offsets, the event of their copy to a GPU or None)."""
        batch = torch.from_numpy(self.tokens.read(starts, self.block_size + 1))
        xy = torch.stack((batch[:, :-1], batch[:, 1:]))  # one transfer for both
        if self.device.type != "cuda":
            return xy.to(self.device), None
        with torch.cuda.device(self.device):  # a new thread is on GPU 0: pinning there would create a context
            if self.stream is None:
                self.stream = torch.cuda.Stream()
            # On a stream of its own the copy waits for no kernel, and kernels wait for it only in `get`.
            with torch.cuda.stream(self.stream):
                return xy.pin_memory().to(self.device, non_blocking=True), self.stream.record_event()

    def get(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, y) of the batch that `prefetch` started."""
        parts = [self.pending]
        if self.merged > 1:
            others = self.draws((self.merged - 1) * self.batch_size, self.bound)
            parts.append(self.thread.submit(self.read, others.tolist()))
        read = []
        for part in parts:
            xy, copied = part.result()
            if copied is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_event(copied)
                xy.record_stream(current)  # the allocator then reuses its memory only after this stream has read it
            read.append(xy)
        x, y = (read[0] if len(read) == 1 else torch.cat(read, 1)).unbind()
        return x, y

    def take(self, n: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield n batches. Each is read while the one before it is in use."""
        self.prefetch()
        for left in range(n - 1, -1, -1):
            batch = self.get()
            if left:
                self.prefetch()
            yield batch
