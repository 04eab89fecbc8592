"""Token streams on disk, and the batches drawn from them; preparing a text.

A dataset is a folder: nanoGPT's train.bin and val.bin (headerless little-endian uint16; uint32 where the vocabulary
is above 65,536) with an optional meta.pkl, or llm.c's shards (*train*.bin and *val*.bin, a 1,024-byte header each).
"""

import bisect
import glob
import os
import pickle
import re
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fastgpt import tokenizer as tokenizers
from fastgpt.config import UserError

EMBEDDED = "python-stdlib"
# llm.c's shards: the first two of 256 int32s, and the tokens that follow (dev/data/data_common.py there).
SHARD_KINDS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
HEADER_BYTES = 1024


# ---- reading ----


class Tokens:
    """One stream of tokens over one or more files: `len(tokens)`, `tokens.read(starts, length)`.

    Raises UserError, naming the file, for one that is missing, empty, truncated, or of an odd size.
    """

    def __init__(self, paths, vocab_size):
        self.paths = [str(p) for p in paths]
        self.vocab_size = vocab_size
        self.layout = [self._inspect(path) for path in self.paths]  # (dtype, header bytes, tokens)
        self.ends = np.cumsum([count for *_, count in self.layout]).tolist()

    def __len__(self):
        return self.ends[-1]

    def _inspect(self, path):
        try:
            size = os.path.getsize(path)
            with open(path, "rb") as f:
                head = np.frombuffer(f.read(12), dtype="<i4")
        except OSError as e:
            raise UserError(
                f"{path}: cannot be read ({e.strerror}); prepare the data, or give another --dataset"
            ) from None
        except ValueError:  # shorter than 12 bytes and no multiple of 4: no header
            head = ()
        # Tokens 55432, 308, 1, 0 could open a headerless file too, but 55432 is no GPT-2 token.
        dtype = SHARD_KINDS.get(tuple(head[:2]))
        if dtype is not None:
            expected = HEADER_BYTES + int(head[2]) * dtype.itemsize
            if size != expected:
                raise UserError(
                    f"{path}: the shard's header promises {head[2]:,} tokens, {expected:,} bytes, but the file has {size:,}; fetch it again"
                )
            return dtype, HEADER_BYTES, int(head[2])
        dtype = np.dtype("<u4" if self.vocab_size > 65536 else "<u2")
        if size == 0:
            raise UserError(f"{path}: the file is empty; prepare the data again")
        if size % dtype.itemsize:
            raise UserError(
                f"{path}: {size:,} bytes are no whole number of {dtype.name} tokens; the file is truncated or no token file"
            )
        return dtype, 0, size // dtype.itemsize

    def _map(self, shard):
        # Mapped anew each time, so that pages read long ago are not held in the process's size.
        dtype, offset, count = self.layout[shard]
        return np.memmap(self.paths[shard], dtype=dtype, mode="r", offset=offset, shape=(count,))

    def read(self, starts, length):
        """int64 [len(starts), length]: the tokens from each start on. Raises UserError for an id at or above vocab_size."""
        out = np.empty((len(starts), length), dtype=np.int64)
        maps = {}
        for row, start in zip(out, starts, strict=True):
            done = 0
            while done < length:
                shard = bisect.bisect_right(self.ends, start + done)
                if shard not in maps:
                    maps[shard] = self._map(shard)
                offset = start + done - (self.ends[shard - 1] if shard else 0)
                part = maps[shard][offset : offset + length - done]
                row[done : done + len(part)] = part
                done += len(part)
        if out.max() >= self.vocab_size:
            self._refuse_ids(
                self.paths[bisect.bisect_right(self.ends, starts[int(out.max(1).argmax())])], int(out.max())
            )
        return out

    def check_ids(self, most=2**29):
        """Raise UserError for an id at or above vocab_size among the first `most` tokens; `read` checks each batch besides."""
        for shard, (dtype, _, count) in enumerate(self.layout):
            if self.vocab_size > np.iinfo(dtype).max or most <= 0:
                continue
            tokens = self._map(shard)[:most]
            most -= count
            for start in range(0, len(tokens), 2**24):
                top = int(tokens[start : start + 2**24].max())
                if top >= self.vocab_size:
                    self._refuse_ids(self.paths[shard], top)

    def _refuse_ids(self, path, top):
        raise UserError(
            f"{path}: token id {top} is not below vocab_size={self.vocab_size}; "
            "the file was made with another tokenizer, or its meta.pkl is missing"
        )


class PlainUnpickler(pickle.Unpickler):
    """Admits plain containers, str and int: a pickle that names any class or function is refused, not run."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_meta(folder):
    """The dict in a folder's meta.pkl, or None where there is none. Raises UserError for anything but plain data."""
    path = Path(folder) / "meta.pkl"
    if not path.exists():
        return None
    try:
        with open(path, "rb") as f:
            meta = PlainUnpickler(f).load()
        itos = meta.get("itos", {0: ""})
        if not (
            type(meta["vocab_size"]) is int
            and meta["vocab_size"] > 0
            and all(type(i) is int and type(c) is str for i, c in itos.items())
        ):
            raise ValueError("vocab_size or itos is not what it should be")
        if "tokenizer" not in meta and set(itos) != set(range(len(itos))):
            raise ValueError("itos does not count from 0 on")
    except Exception as e:  # a pickle can fail in any way
        raise UserError(
            f"{path}: not the meta.pkl of a dataset ({type(e).__name__}: {e}); prepare the data again"
        ) from None
    return meta


def dataset_folder(name):
    """Where a dataset lies: data/NAME as in nanoGPT, else the folder NAME itself, else the embedded corpus's cache."""
    folder = Path("data") / name
    if not folder.is_dir() and Path(name).is_dir():
        folder = Path(name)
    return embedded_folder() if name == EMBEDDED and not folder.is_dir() else folder


def find_files(folder, split):
    """The token files of a split, "train" or "val": nanoGPT's one, else shards by name."""
    one = folder / f"{split}.bin"
    return [one] if one.exists() else sorted(folder.glob(f"*{split}*.bin")) or [one]


def load_dataset(cfg):
    """(train Tokens, val Tokens, meta or None, vocab_size) of a TrainConfig; everything about them is checked here."""
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
        raise UserError(
            f"--dataset={cfg.dataset}: there is no folder {folder}; make it with `fastgpt prepare --input PATH --out {folder}`, "
            f"or train on the embedded text with --dataset={EMBEDDED}"
        )
    streams = []
    for split, pattern in (("train", cfg.train_data), ("val", cfg.val_data)):
        paths = sorted(glob.glob(pattern)) or [pattern] if pattern else find_files(folder, split)
        streams.append(Tokens(paths, vocab_size))
    return *streams, meta, vocab_size


class Batches:
    """Random batches of a stream, as nanoGPT draws them, each read and moved in the background.

    `prefetch()` draws the next batch's offsets and starts to read it; `get()` gives (x, y), int64 [batch_size,
    block_size] on the device, y shifted by one token. The draws happen in the caller's order, on the CPU generator
    (or on `generator`): only the reading is done elsewhere. `offsets` are those of the batch under way.
    """

    def __init__(self, tokens, batch_size, block_size, device, generator=None):
        if len(tokens) <= block_size:
            raise UserError(
                f"{tokens.paths[0]}: {len(tokens):,} tokens are too few for block_size={block_size}; "
                "take a smaller --block_size, or more text"
            )
        self.tokens, self.batch_size, self.block_size = tokens, batch_size, block_size
        self.device, self.generator = torch.device(device), generator
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.offsets = None

    def prefetch(self, offsets=None):
        """Begin the next batch: of drawn offsets, or of the ones given (a resumed run's)."""
        if offsets is None:
            offsets = torch.randint(len(self.tokens) - self.block_size, (self.batch_size,), generator=self.generator)
        self.offsets = offsets
        self.pending = self.thread.submit(self._read, offsets.tolist())

    def fits(self, offsets):
        """Whether offsets make a batch of this size within this stream."""
        return len(offsets) == self.batch_size and int(offsets.max()) < len(self.tokens) - self.block_size

    def _read(self, starts):
        batch = torch.from_numpy(self.tokens.read(starts, self.block_size + 1))
        xy = torch.stack((batch[:, :-1], batch[:, 1:]))  # one transfer for both
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):  # a thread begins on GPU 0, where pinning would make a context
                xy = xy.pin_memory().to(self.device, non_blocking=True)
        return xy.to(self.device).unbind()

    def get(self):
        return self.pending.result()

    def take(self, n):
        """n batches; each is read while the one before is in use."""
        self.prefetch()
        for left in range(n - 1, -1, -1):
            batch = self.get()
            if left:
                self.prefetch()
            yield batch


# ---- preparing ----


def prepare(source, tokenizer_name, out, files=None):
    """Write out/train.bin and out/val.bin (the last 10% of the characters), and meta.pkl where nanoGPT has one.

    source is a UTF-8 text file or a folder of them; `files` overrides which of a folder's files are taken. Reads in
    blocks and tokenizes them in parallel, so memory stays constant. With a tiktoken encoding every file of a folder
    ends in the end-of-text token. Nothing is left behind on failure. Raises UserError.
    """
    source, out = Path(source), Path(out)
    files = files or ([source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file()))
    if not files:
        raise UserError(f"--input={source}: no such file, or a folder without any")
    if tokenizer_name != "chars":
        tokenizer = tokenizers.get_tokenizer(tokenizer_name)  # fails before any work
    files, n_chars, alphabet = survey(files, strict=source.is_file(), alphabet=tokenizer_name == "chars")
    if n_chars == 0:
        raise UserError(f"--input={source}: there is no text in it (files that are not UTF-8 are passed over)")
    if tokenizer_name == "chars":
        tokenizer = tokenizers.Chars.of(alphabet)

    end_mark = tokenizer.end_of_text if len(files) > 1 else None
    dtype = np.dtype("<u4" if tokenizer.n_vocab > 65536 else "<u2")
    n_train = int(n_chars * 0.9)
    counts = {"train": 0, "val": 0}
    try:
        out.mkdir(parents=True, exist_ok=True)
        parts = {split: open(out / f"{split}.bin.part", "wb") for split in counts}
    except OSError as e:
        raise UserError(f"--out={out}: cannot be written ({e.strerror})") from None
    try:
        with (
            ThreadPoolExecutor() as pool,
            tqdm(total=n_chars, unit="char", unit_scale=True, desc="tokenizing", disable=None) as bar,
        ):
            stream = blocks(files, n_train)
            while batch := list(islice(stream, 2 * pool._max_workers)):  # a bounded number in flight: constant memory
                encoded = pool.map(tokenizer.encode_array, (text for _, text, _ in batch))
                for (split, text, ends), ids in zip(batch, encoded, strict=True):
                    ids = np.append(ids, end_mark) if ends and end_mark is not None else ids
                    parts[split].write(ids.astype(dtype).tobytes())
                    counts[split] += len(ids)
                    bar.update(len(text))
        for part in parts.values():
            part.close()
        meta = tokenizer.meta()
        if meta is None:
            (out / "meta.pkl").unlink(missing_ok=True)  # of an earlier tokenizer
        else:
            (out / "meta.pkl").write_bytes(pickle.dumps(meta))
        for split in counts:
            os.replace(out / f"{split}.bin.part", out / f"{split}.bin")
    finally:
        for split, part in parts.items():
            part.close()
            (out / f"{split}.bin.part").unlink(missing_ok=True)
    for split, count in counts.items():
        print(f"{out / split}.bin: {count:,} tokens")


def survey(files, strict, alphabet):
    """(files that are UTF-8 text, characters in them, set of the characters if asked for). One pass.

    With `strict` a file that is no text is a UserError; else it is passed over, and the number of such said.
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


# Where a text may be cut without changing its GPT-2 style tokens: before a single space or after a single newline
# between words. Runs of white space are left whole, since their tokens depend on what follows.
SAFE_CUT = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")


def blocks(files, n_train, size=2**19):
    """The text of the files as (split, text, whether a file ends here), cut where tokens allow it and at n_train characters."""
    left = n_train  # characters still to go to train; below 0 once val has begun
    for path in files:
        with open(path, encoding="utf-8") as f:
            text = ""
            while True:
                if left == 0:  # nanoGPT splits by characters, wherever that falls; the file goes on in the other split
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
                if not cut and len(text) > 32 * size:  # no word ends for 16 million characters: not what BPE is for
                    cut = len(text)
                if cut:
                    yield split, text[:cut], False
                    text = text[cut:]


def embedded_folder():
    """The cache folder of the embedded corpus of this interpreter: under FASTGPT_CACHE, XDG_CACHE_HOME or ~/.cache."""
    cache = (
        os.environ.get("FASTGPT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastgpt"
    )
    return Path(cache) / f"{EMBEDDED}-{sysconfig.get_python_version()}"


def prepare_embedded(folder):
    """Tokenize the Python standard library's source, without tests and installed packages, into `folder`, once."""
    if (folder / "val.bin").exists():
        return
    stdlib = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = sorted(p for p in stdlib.rglob("*.py") if not skip & set(p.relative_to(stdlib).parts))
    if not files:
        raise UserError(f"{stdlib}: this Python comes without the source of its standard library; give --dataset")
    print(f"preparing the embedded corpus, once: the source of Python's standard library ({stdlib}), as bytes")
    prepare(stdlib, "bytes", folder, files)
