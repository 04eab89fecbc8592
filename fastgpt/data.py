"""A dataset's token streams, and the batches drawn from them.

A dataset is a folder with an optional meta.pkl and token files: train.bin and val.bin, or shards *train*.bin and *val*.bin, or *train*.npy
and *val*.npy. fastgpt/token_files.py reads them.
"""

import glob
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fastgpt.config import TrainConfig, UserError
from fastgpt.meta import load_meta
from fastgpt.prepare import EMBEDDED, embedded_folder, prepare_embedded
from fastgpt.token_files import Tokens, find_files


def dataset_folder(name: str) -> Path:
    """A dataset's folder: data/NAME as in nanoGPT, else the folder NAME itself, else the embedded corpus's cache."""
    folder = Path("data") / name
    if not folder.is_dir() and Path(name).is_dir():
        folder = Path(name)
    return embedded_folder() if name == EMBEDDED and not folder.is_dir() else folder


def meta_of(cfg: TrainConfig, paths: list[str]) -> tuple[dict[str, Any] | None, Path]:
    """(the meta of these token files, its folder): of the dataset that the user named, if it has one, else the one beside the files.

    Raises UserError if files of one run lie beside different ones.
    """
    folder = dataset_folder(cfg.dataset)
    if "dataset" in cfg.model_fields_set and (meta := load_meta(folder)) is not None:
        return meta, folder
    found = {f: meta for f in sorted({Path(p).parent for p in paths}) if (meta := load_meta(f)) is not None}
    if not found:
        return None, folder
    folder, *others = found
    for other in others:
        if found[other] != found[folder]:
            raise UserError(
                f"--train_data, --val_data: {folder / 'meta.pkl'} and {other / 'meta.pkl'} are of different tokenizers; "
                "give files of one dataset, or say by --dataset=NAME whose meta.pkl holds for both"
            )
    return found[folder], folder


def load_dataset(cfg: TrainConfig) -> tuple[Tokens, Tokens, dict[str, Any] | None, int]:
    """(train Tokens, val Tokens, meta or None, vocab_size) of a TrainConfig. Raises UserError for what is missing or damaged."""
    folder = dataset_folder(cfg.dataset)
    if cfg.dataset == EMBEDDED and folder == embedded_folder():
        prepare_embedded(folder)
    if not (cfg.train_data and cfg.val_data) and not folder.is_dir():
        if cfg.train_data or cfg.val_data:
            missing = "val_data" if cfg.train_data else "train_data"
            raise UserError(f"--{missing} is missing, and there is no folder {folder} to read it from; give both")
        raise UserError(
            f"--dataset={cfg.dataset}: there is no folder {folder}; make it with `fastgpt prepare --input PATH --out {folder}`, "
            f"or train on the embedded text with --dataset={EMBEDDED}"
        )
    train, val = (
        [str(p) for p in (sorted(glob.glob(pattern)) or [pattern] if pattern else find_files(folder, split))]
        for split, pattern in (("train", cfg.train_data), ("val", cfg.val_data))
    )
    meta, where = meta_of(cfg, train + val)
    if meta is not None:
        vocab_size = meta["vocab_size"]
        print(f"found vocab_size = {vocab_size} (inside {where / 'meta.pkl'})")
    else:
        vocab_size = 50304
        print("defaulting to vocab_size of GPT-2 to 50304 (50257 rounded up for efficiency)")
    return Tokens(train, vocab_size), Tokens(val, vocab_size), meta, vocab_size


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
