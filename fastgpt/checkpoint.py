"""Checkpoints in nanoGPT's layout: out_dir/ckpt.pt, which nanoGPT and fastgpt read from each other.

Keys: model, optimizer, model_args, iter_num, best_val_loss, config, as nanoGPT's train.py writes them, and
`fastgpt`, which nanoGPT passes over: the tokenizer's meta, the loss scaler, and per process the random state and
the batch under way, so that a resumed run goes on as if it had not stopped.
"""

import os
from pathlib import Path

import torch

from fastgpt.config import GPTConfig, UserError
from fastgpt.model import GPT

SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")


def checkpoint_path(out_dir):
    return Path(out_dir) / "ckpt.pt"


def save(checkpoint, out_dir):
    """Write out_dir/ckpt.pt whole or not at all: to a temporary file, flushed to disk, then renamed."""
    path = checkpoint_path(out_dir)
    part = path.with_suffix(".pt.part")
    try:
        with open(part, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({e.strerror}); the last checkpoint is as it was") from None


def load(out_dir, device="cpu"):
    """The dict in out_dir/ckpt.pt, nanoGPT's or fastgpt's; weights only, nothing in it is run. Raises UserError."""
    path = checkpoint_path(out_dir)
    if not path.exists():
        raise UserError(f"{path}: there is no checkpoint to go on from; train first, or give another --out_dir")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        missing = {"model", "model_args"} - checkpoint.keys()
    except Exception as e:  # a damaged file can fail in any way
        raise UserError(f"{path}: not a readable checkpoint ({type(e).__name__}); it is truncated or of another program") from None
    if missing:
        raise UserError(f"{path}: not a checkpoint of nanoGPT or fastgpt: it has no {sorted(missing)[0]!r}")
    return checkpoint


def build_model(checkpoint, out_dir, dropout=None):
    """The GPT that a checkpoint holds, on the CPU. Raises UserError where weights and model_args do not fit each other."""
    args = dict(checkpoint["model_args"])
    if dropout is not None:
        args["dropout"] = dropout
    try:
        model = GPT(GPTConfig(**args))
        model.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in checkpoint["model"].items()})
    except (TypeError, ValueError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(f"{checkpoint_path(out_dir)}: its weights are of another shape than its model_args: {reason}") from None
    return model


def check_shape(checkpoint, cfg, given, out_dir):
    """Raise UserError where the user asked for another shape than the checkpoint's. A smaller block_size may be: it is cropped."""
    args = checkpoint["model_args"]
    for name in SHAPE[:-1]:
        asked = getattr(cfg, name)
        if name in given and asked != args[name] and not (name == "block_size" and asked < args[name]):
            raise UserError(f"--{name}={asked}: the checkpoint {checkpoint_path(out_dir)} has {name}={args[name]}; leave the flag out, or train anew")


def pretrained(name, dropout):
    """GPT.from_pretrained, with what can go wrong as a UserError."""
    try:
        return GPT.from_pretrained(name, dict(dropout=dropout))
    except ImportError:
        raise UserError(f"--init_from={name}: Hugging Face's transformers is not installed; pip install 'fastgpt[hf]'") from None
    except (OSError, ValueError, AssertionError) as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(f"--init_from={name}: no GPT-2 weights could be loaded from there: {reason}") from None
