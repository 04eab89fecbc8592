"""Sharded checkpoints: out_dir/ckpt-0000500/, which all processes of an FSDP run write together, each its own part.

The tensors are torch.distributed.checkpoint's. Their names, model.NAME and optimizer.NAME.exp_avg, say nothing of how they were shared:
a run on any number of processes can read them. rest.pt holds the other keys of ckpt.pt (checkpoint.py). `fastgpt export` makes one
ckpt.pt of a folder. No code in a folder is run: its tensors and rest.pt are loaded with weights_only, and .metadata, a pickle, may name
only a few classes.
"""

import os
import pickle
import secrets
import shutil
import tempfile
import warnings
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta

from fastgpt import checkpoint as checkpoints
from fastgpt import distributed
from fastgpt.config import UserError
from fastgpt.files import sync_folder

REST = "rest.pt"
# What is in it.
KINDS: dict[str, Any] = dict(
    model_args=dict, iter_num=int, config=dict, fastgpt=dict, names=list, optimizer=dict, id=str,
    best_val_loss=(float, int, Tensor),
)  # fmt: skip
# What torch.distributed.checkpoint's metadata of tensors consist of. Entries of bytes are left out: to load one runs its pickle.
CLASSES = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch", "float32"),
    ("torch.serialization", "_get_layout"),
}  # fmt: skip


class MetadataUnpickler(pickle.Unpickler):
    """Loads a checkpoint's metadata. Refuses a pickle that names anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return PurePath  # where the checkpoint was written: nobody opens it
        if (module, name) not in CLASSES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """Reads a folder's tensors, without running code in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with open(Path(self.path) / ".metadata", "rb") as f:
            metadata = MetadataUnpickler(f).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise ValueError(f"a part is outside: {info.relative_path}")
        return metadata


def folders(out_dir: str | Path) -> list[Path]:
    """A run's sharded checkpoints, newest first; or out_dir alone, if it is one."""
    out = Path(out_dir)
    found = {it: path for it, path in checkpoints.numbered(out).items() if path.is_dir()}
    return [out] if (out / REST).exists() else list(found.values())


def newest(out_dir: str | Path) -> Path | None:
    """The newest sharded checkpoint of a run, or out_dir itself if it is one; None if there is none, or ckpt.pt is not older."""
    folder = next(iter(folders(out_dir)), None)
    if folder is None or folder == Path(out_dir):
        return folder
    return folder if checkpoints.iteration_of(checkpoints.checkpoint_path(out_dir)) < int(folder.name[5:]) else None


def load(out_dir: str | Path, resume: bool = False, whole: bool = True) -> dict[str, Any]:
    """A run's newest checkpoint, a sharded one or ckpt.pt: see checkpoint.load. Prints a line for each broken folder. Raises UserError.

    Not whole: of a sharded one without the tensors; then `load_tensors` reads this process's part of them into a model and an optimizer.
    """
    if newest(out_dir) is None:
        return checkpoints.load(out_dir, resume)
    faults: list[str] = []
    for folder in folders(out_dir):
        try:
            checkpoint = one(folder, whole)
        except UserError as e:
            faults.append(str(e))
            continue
        for fault in faults:
            print(f"{fault}; {folder} takes its place")
        return checkpoint
    raise UserError(faults[0])


def one(folder: Path, whole: bool) -> dict[str, Any]:
    """The checkpoint in one folder. Raises UserError."""
    try:
        rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
        wrong = [name for name, kind in KINDS.items() if not isinstance(rest.get(name), kind)]
        if not wrong:
            checkpoints.gpt_config(rest["model_args"])
            checkpoints.activation_of(rest)
            checkpoints.scheme_of(rest)
    except Exception as e:  # a damaged file can fail in any way
        raise UserError(f"{folder / REST}: not readable ({type(e).__name__}); the checkpoint is damaged") from None
    if wrong:
        raise UserError(
            f"{folder / REST}: not a part of a checkpoint of fastgpt: {wrong[0]} is missing, or something else"
        )
    rest["path"] = folder
    sizes = sizes_of(folder)
    return single(folder, rest, sizes) if whole else {**rest, "folder": str(folder)}


def sizes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a folder, by name. Raises UserError if its files cannot hold them."""
    try:
        sizes = {name: tuple(t.size) for name, t in Reader(folder).read_metadata().state_dict_metadata.items()}
        held = sum(path.stat().st_size for path in folder.glob("*.distcp"))
        if sum(torch.Size(size).numel() for size in sizes.values()) * 4 > held:
            raise ValueError("it promises more than its files hold")
    except Exception as e:  # a damaged file can fail in any way
        raise UserError(f"{folder}: its metadata is damaged ({type(e).__name__}: {e})") from None
    return sizes


def tensors(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{name: tensor} of all that is saved in parts: weights and the optimizer's state, sharded or whole, a tied weight once."""
    found = {}
    for name, p in model.named_parameters():
        found[f"model.{name}"] = p.detach()
        found |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[p].items()}
    return found


def save(
    rest: dict[str, Any], model: Any, optimizer: torch.optim.Optimizer, out_dir: str | Path, world: distributed.World
) -> Path:
    """Write out_dir/ckpt-ITERATION/ completely or not at all, and return it. Every process must call it. Raises UserError.

    rest: what ckpt.pt would hold, without the model and the optimizer's state; the main process's counts.
    """
    for module in model.modules():  # an evaluation leaves weights gathered
        if hasattr(module, "reshard"):
            module.reshard()
    folder = Path(out_dir) / f"ckpt-{rest['iter_num']:07d}"
    part = Path(distributed.agree(lambda: made(folder), world))
    try:
        with distributed.agreement(world):
            try:
                dcp.save(tensors(model, optimizer), storage_writer=dcp.FileSystemWriter(part))
                if world.is_main:
                    names, group_of = {p: name for name, p in model.named_parameters()}, optimizer.param_groups
                    rest["names"] = [names[p] for group in group_of for p in group["params"]]
                    rest["optimizer"] = {"state": {}, "param_groups": optimizer.state_dict()["param_groups"]}
                    rest["id"] = secrets.token_hex(16)
                    checkpoints.write(rest, part / REST)
                    replace(part, folder)
            except (OSError, CheckpointException) as e:
                raise UserError(f"{folder}: cannot be written ({why(e)}); the last checkpoint is as it was") from None
    finally:
        if world.is_main:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def made(folder: Path) -> str:
    """A new folder beside `folder`, with a name that nobody knows before."""
    for left in folder.parent.glob(".ckpt-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        part.chmod(0o755)
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror}); the last checkpoint is as it was") from None
    return str(part)


def replace(part: Path, folder: Path) -> None:
    """Give a finished folder its name. What had the name is removed: a run that went back and came here again."""
    old = part.with_name(part.name + "-old")
    if folder.exists():
        os.rename(folder, old)
    os.rename(part, folder)
    shutil.rmtree(old, ignore_errors=True)
    sync_folder(folder.parent)


def why(error: BaseException) -> str:
    """The reason why a checkpoint could not be written or read, in a line: of a CheckpointException that of the first failing process."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_tensors(folder: str, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Read a sharded checkpoint into a model and an optimizer: of sharded tensors this process's rows. Raises UserError."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            step = torch.zeros((), device=p.device if group["fused"] else "cpu")
            optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    read(Path(folder), tensors(model, optimizer), alone=False)


def read(folder: Path, into: dict[str, Tensor], alone: bool = True) -> None:
    """Fill tensors from a folder, by name. Not alone: all processes call it, for tensors that they share. Raises UserError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # no_dist says so
            dcp.load(into, storage_reader=Reader(folder), no_dist=alone)
    except (Exception, CheckpointException) as e:  # a damaged file can fail in any way
        if isinstance(e, Exception) and distributed.lost(e):
            raise
        raise UserError(f"{folder}: its tensors are not those of this model, or it is damaged ({why(e)})") from None


def spread(optimizer: torch.optim.Optimizer) -> None:
    """Shard an optimizer's whole moments, from a ckpt.pt, as its parameters are sharded; rows of positions that were cropped go."""
    from torch.distributed.tensor import distribute_tensor

    for p, state in optimizer.state.items():
        for key, value in state.items():
            if value.dim() and hasattr(p, "to_local") and not hasattr(value, "to_local"):
                rows = value[: p.size(0)].contiguous()
                state[key] = distribute_tensor(rows, p.device_mesh, p.placements, src_data_rank=None)  # type: ignore[attr-defined]


def single(folder: Path, rest: dict[str, Any], sizes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The dict that ckpt.pt would hold, of a sharded checkpoint: in nanoGPT's layout, on the CPU. Raises UserError."""
    into = {name: torch.empty(size) for name, size in sizes.items()}
    read(folder, into)
    model = {name.removeprefix("model."): t for name, t in into.items() if name.startswith("model.")}
    if "transformer.wte.weight" in model:
        model["lm_head.weight"] = model["transformer.wte.weight"]  # tied
    found = {name: tuple(t.shape) for name, t in model.items()}
    shapes = checkpoints.shapes_of(checkpoints.gpt_config(rest["model_args"]))
    if wrong := sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name)):
        raise UserError(f"{folder}: its {wrong[0]} is not the one of its model_args; it is damaged")
    state: dict[int, dict[str, Tensor]] = {}
    for i, name in enumerate(rest["names"]):
        keys = [f"optimizer.{name}.{key}" for key in ("step", "exp_avg", "exp_avg_sq")]
        if not all(key in into for key in keys):
            raise UserError(f"{folder}: it has no optimizer state of {name}; it is damaged")
        state[i] = {key.rpartition(".")[2]: into[key] for key in keys}
    kept = {key: value for key, value in rest.items() if key not in ("names", "id")}
    return {"model": model, **kept, "optimizer": {**rest["optimizer"], "state": state}}
