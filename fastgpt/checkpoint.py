"""Checkpoints in nanoGPT's layout: out_dir/ckpt.pt. nanoGPT and fastgpt can read each other's.

Keys as nanoGPT's train.py writes them: model, optimizer, model_args, iter_num, best_val_loss, config. The key `fastgpt`,
which nanoGPT ignores, holds the tokenizer's meta, the loss scaler, and for each process its random state and the offsets of
its next batch. With these a resumed run continues as if it had not stopped.
"""

import difflib
import os
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastgpt.config import MODEL_SIZES, GPTConfig, TrainConfig, UserError
from fastgpt.model import GPT
from fastgpt.parse import check_value


def checkpoint_path(out_dir: str | Path) -> Path:
    return Path(out_dir) / "ckpt.pt"


def save(checkpoint: dict[str, Any], out_dir: str | Path) -> None:
    """Write out_dir/ckpt.pt completely or not at all: write a temporary file, flush it to disk, rename it. Raises UserError."""
    path = checkpoint_path(out_dir)
    part = path.with_suffix(".pt.part")
    try:
        with open(part, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:
        # On a full disk torch's writer raises a RuntimeError; the system's error, which says why, is its context.
        system = e if isinstance(e, OSError) else e.__context__
        reason = getattr(system, "strerror", None) or str(e).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}); the last checkpoint is as it was") from None
    finally:
        part.unlink(missing_ok=True)


def load(out_dir: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The dict in out_dir/ckpt.pt, written by nanoGPT or fastgpt. Loaded with weights_only: no code in it runs. Raises UserError."""
    path = checkpoint_path(out_dir)
    if not path.exists():
        raise UserError(f"{path}: there is no checkpoint; train first, or give another --out_dir")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        missing = {"model", "model_args"} - checkpoint.keys()
    except Exception as e:  # a damaged file can fail in any way
        raise UserError(
            f"{path}: not a readable checkpoint ({type(e).__name__}); it is truncated, or another program wrote it"
        ) from None
    if missing:
        raise UserError(f"{path}: not a checkpoint of nanoGPT or fastgpt: it has no {sorted(missing)[0]!r}")
    return checkpoint


def shape(checkpoint: dict[str, Any], out_dir: str | Path) -> GPTConfig:
    """The GPTConfig of a checkpoint. Raises UserError if its model_args are not valid."""
    path = checkpoint_path(out_dir)
    try:
        config = GPTConfig(**checkpoint["model_args"])
    except TypeError as e:
        raise UserError(f"{path}: its model_args are not valid: {e}") from None
    for name in ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout"):
        check_value(TrainConfig, name, getattr(config, name), f"{path}: {name}")
    if type(config.vocab_size) is not int or not 0 < config.vocab_size < 2**31:
        raise UserError(f"{path}: its vocab_size={config.vocab_size!r} is not a valid number of tokens")
    return config


def build_model(checkpoint: dict[str, Any], out_dir: str | Path, dropout: float | None = None) -> GPT:
    """The GPT that a checkpoint holds, on the CPU. dropout None: the checkpoint's. Raises UserError if weights and model_args differ."""
    config = shape(checkpoint, out_dir)
    config.dropout = config.dropout if dropout is None else dropout
    try:
        model = GPT(config)
        if "folder" not in checkpoint:  # the rest of a sharded checkpoint: sharded.load_tensors reads the weights
            model.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in checkpoint["model"].items()})
    except (ValueError, RuntimeError, AttributeError, TypeError) as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(
            f"{checkpoint_path(out_dir)}: its weights do not have the shapes of its model_args: {reason}"
        ) from None
    return model


def check_dataset(checkpoint: dict[str, Any], cfg: TrainConfig, meta: dict[str, Any] | None) -> None:
    """Raise UserError if a run is resumed on data of another tokenizer: its token ids would mean other text."""
    if "fastgpt" in checkpoint and checkpoint["fastgpt"].get("meta") != meta:
        was = checkpoint.get("config", {}).get("dataset")
        raise UserError(
            f"--dataset={cfg.dataset}: its tokens are not those that {checkpoint_path(cfg.out_dir)} was trained on "
            f"({was}); give --dataset={was}, or train from scratch"
        )


def keep_shape(checkpoint: dict[str, Any], cfg: TrainConfig, given: Collection[str]) -> TrainConfig:
    """The TrainConfig with the checkpoint's shape for each setting that is not in `given`; prints what changed.

    A smaller block_size may be given: the model is cropped to it. Raises UserError for any other given shape that differs.
    """
    args, changed = asdict(shape(checkpoint, cfg.out_dir)), {}
    for name in ("n_layer", "n_head", "n_embd", "block_size", "bias"):
        asked = getattr(cfg, name)
        if asked == args[name] or (name == "block_size" and name in given and asked < args[name]):
            continue
        if name in given:
            raise UserError(
                f"--{name}={asked}: the checkpoint {checkpoint_path(cfg.out_dir)} has {name}={args[name]}; "
                "leave the flag out, or train from scratch"
            )
        changed[name] = args[name]
    if changed:
        print("from the checkpoint: " + ", ".join(f"{k} = {v}" for k, v in changed.items()))
    return cfg.model_copy(update=changed)


def pretrained(name: str, dropout: float) -> GPT:
    """GPT.from_pretrained of a GPT-2 size or a local folder. Raises UserError for whatever goes wrong."""
    if name not in MODEL_SIZES and not Path(name).is_dir():
        near = difflib.get_close_matches(name, ["resume", *MODEL_SIZES], n=1, cutoff=0)[0]
        raise UserError(f"--init_from={name}: neither a known name nor a folder; the nearest name is {near!r}")
    try:
        return GPT.from_pretrained(name, dict(dropout=dropout))
    except ImportError:
        raise UserError(
            f"--init_from={name}: Hugging Face's transformers is not installed; pip install 'fastgpt[hf]'"
        ) from None
    except Exception as e:  # transformers and the network fail in many ways
        reason = " ".join(str(e).split())[:300]
        raise UserError(f"--init_from={name}: no GPT-2 weights could be loaded from there: {reason}") from None
