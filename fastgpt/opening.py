"""Before a run begins: its folder and the lock on it, whether it goes on from a checkpoint, and what contradicts itself."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from fastgpt import checkpoint as checkpoints
from fastgpt import data, distributed, tokenizer
from fastgpt.config import TrainConfig, UserError
from fastgpt.lock import lock


@contextmanager
def hold(cfg: TrainConfig, world: distributed.World) -> Iterator[None]:
    """Make out_dir and lock it, for a run that writes checkpoints. Raises UserError, on all processes.

    A folder that was made for the run, and in which it wrote nothing, is removed at the end.
    """

    def take():
        if cfg.init_from == "resume" and not Path(cfg.out_dir).is_dir():
            return  # loading says that there is nothing to resume
        out = Path(cfg.out_dir)
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        stack.callback(remove_empty, made)
        check_writable(cfg.out_dir)
        if not cfg.eval_only:
            stack.enter_context(lock(cfg.out_dir))

    with ExitStack() as stack:
        distributed.agree(take, world)
        yield


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, from the innermost on, up to the first that is not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def begin_or_resume(cfg: TrainConfig, world: distributed.World) -> TrainConfig:
    """The TrainConfig with --init_from=auto decided. Raises UserError if a new run would replace another's checkpoint."""
    mark = Path(cfg.out_dir) / ".overwrite"  # while it stands, the checkpoints are those of the run to be replaced
    held, replacing, overwrite = distributed.agree(
        lambda: (bool(checkpoints.find(cfg.out_dir)), mark.exists(), cfg.overwrite), world
    )
    # Workers that torchrun started again must not overwrite what they had begun. Only the node of the failure counts that start.
    again = distributed.most(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), world) > 0 and overwrite
    if cfg.init_from == "auto" or again:
        cfg = cfg.model_copy(update={"init_from": "resume" if held and not (again and replacing) else "scratch"})
    if world.is_main and held and overwrite and cfg.init_from != "resume" and not cfg.eval_only:
        mark.touch()
    if held and not (cfg.init_from == "resume" or overwrite or cfg.eval_only):
        raise UserError(
            f"--out_dir={cfg.out_dir}: it holds a run; go on with it by --init_from=auto, begin anew by --overwrite, "
            "or give another --out_dir"
        )
    return cfg


def check_residual(cfg: TrainConfig, cuda: bool) -> None:
    """Raise UserError if the residual stream cannot have its dtype: it must not be narrower than the branches added to it."""
    if cfg.residual == "bf16" and not (cuda and cfg.dtype == "bfloat16"):
        here = f"with --dtype={cfg.dtype}" if cuda else f"on --device={cfg.device}, which computes in float32"
        raise UserError(f"--residual=bf16: it needs a CUDA GPU and --dtype=bfloat16, and this is {here}; leave it out")


def check_parallel(cfg: TrainConfig, cuda: bool) -> None:
    """Raise UserError if FSDP cannot train in this dtype."""
    if cfg.parallel == "fsdp" and cuda and cfg.dtype == "float16":
        raise UserError(
            "--parallel=fsdp: it does not train in float16, whose loss scaler knows no shards; give --dtype=bfloat16 or --parallel=ddp"
        )


def digest(saved: dict[str, Any]) -> str:
    """A short text that differs where two checkpoints do: of a sharded one its id, else of some of each weight."""
    if "id" in saved:
        return saved["id"][:12]
    found = hashlib.sha256()
    for name, weight in saved["model"].items():
        flat = weight.flatten()
        found.update(f"{name} {tuple(weight.shape)} {flat[:64].tolist()} {flat[-64:].tolist()}".encode())
    return found.hexdigest()[:12]


def data_digest(tokens: data.Tokens, places: int = 16, length: int = 1024) -> str:
    """A short text that differs where two streams of tokens do: of the head, the tail and some places between."""
    length = min(length, len(tokens))
    starts = sorted({(len(tokens) - length) * i // (places - 1) for i in range(places)})
    return hashlib.sha256(tokens.read(starts, length).tobytes()).hexdigest()[:12]


def find_separator(meta: dict[str, Any] | None, tokens: data.Tokens) -> int:
    """The token at which --doc_mask separates documents. Raises UserError if the dataset has none."""
    separator = tokenizer.separator(meta)
    if not tokens.holds(separator):
        raise UserError(
            f"--doc_mask=True: {tokens.paths[0]} has no separator, token {separator}; it is one document: leave the flag out"
        )
    print(f"documents begin at token {separator}, and attention stays within them")
    return separator


def check_writable(out_dir: str) -> None:
    """Make out_dir. Raises UserError if it cannot be written."""
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir):
            pass
    except OSError as e:
        raise UserError(f"--out_dir={out_dir}: cannot be written ({e.strerror}); give another folder") from None
