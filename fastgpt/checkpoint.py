"""Checkpoints in nanoGPT's layout, in out_dir: ckpt.pt, the newest. nanoGPT and fastgpt can read each other's.

Keys as nanoGPT's train.py writes them: model, optimizer, model_args, iter_num, best_val_loss, config. The key `fastgpt`,
which nanoGPT ignores, holds the format's version, the tokenizer's meta, the loss scaler, and for each process its random state and the
offsets of its next batch. With these a resumed run continues as if it had not stopped.

Beside ckpt.pt stand the ones before it, ckpt-0000500.pt by their iteration, and the one with the best val loss, ckpt-best.pt.
docs/checkpoints.md says what is checked, and what a kill or a full disk leaves.
"""

import io
import math
import os
import re
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.claims import ELSEWHERE, Claim, Fault, claims
from fastgpt.config import GPTConfig, TrainConfig, UserError
from fastgpt.files import link, remove_parts, replacing, sync_folder
from fastgpt.init import SCHEMES
from fastgpt.model import ACTIVATIONS, GPT
from fastgpt.parse import check_value

VERSION = 1  # of what stands under the key `fastgpt`; a file without it is of version 1, or nanoGPT's
NUMBERED = re.compile(r"ckpt-(\d{7,})(\.pt)?")  # a file, or the folder of a sharded checkpoint


def checkpoint_path(out_dir: str | Path) -> Path:
    """The newest checkpoint."""
    return Path(out_dir) / "ckpt.pt"


def numbered(out_dir: Path) -> dict[int, Path]:
    """The kept checkpoints of a folder by iteration, newest first."""
    found = {int(m[1]): path for path in out_dir.glob("ckpt-*") if (m := NUMBERED.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


def find(out_dir: str | Path) -> list[Path]:
    """The checkpoints of a folder, newest first; the best one, which may be old, comes last."""
    out_dir = Path(out_dir)
    paths = [checkpoint_path(out_dir), *numbered(out_dir).values(), out_dir / "ckpt-best.pt"]
    return [path for path in paths if path.exists()]


# ---- saving ----


def write(thing: Any, path: Path) -> None:
    """torch.save to a file, completely or not at all, and on the disk. Raises OSError."""
    try:
        with replacing(path) as f:
            torch.save(thing, f)
    except RuntimeError as e:  # torch's writer on a full disk; the system's error, which says why, is its context
        if not isinstance(e.__context__, OSError):
            raise
        raise e.__context__ from None


class Writer:
    """Saves a run's checkpoints in out_dir: the last `keep` of them, and the best one. The run must hold `lock(out_dir)`.

    With `background`, `save` takes a snapshot of all tensors in the CPU's memory, and a thread writes it. A file that cannot be written
    is named by `say`, in a line, and the last good ones stay: `failed` is then that line, until a later save succeeds. `start` is the
    iteration that the run goes on from; the first save removes what an earlier run left of later iterations. `saved` is the newest file
    of this run, `iteration` its iteration.
    """

    def __init__(self, out_dir: str | Path, keep: int, background: bool, say: Callable[[str], Any], start: int = 0):
        self.path, self.keep, self.say = checkpoint_path(out_dir), keep, say
        self.thread = ThreadPoolExecutor(max_workers=1) if background else None
        self.buffers: list[Tensor] = []
        self.pending: Future | None = None
        self.saved: Path | None = None
        self.failed: str | None = None
        self.iteration = start

    def save(self, checkpoint: dict[str, Any], best: bool) -> None:
        """Write a checkpoint, or with `background` begin to. Waits for the one before it."""
        self.wait()
        if self.thread:
            self.pending = self.thread.submit(self.write, self.snapshot(checkpoint), best)
        else:
            self.write(checkpoint, best)

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        if self.pending:
            pending, self.pending = self.pending, None
            pending.result()

    def snapshot(self, tree: Any) -> Any:
        """A checkpoint with each tensor copied to the CPU, into the memory of the last snapshot where it fits."""
        copies: dict[Any, Tensor] = {}
        devices = set()

        def copy(value):
            if isinstance(value, Tensor):
                memory = value.data_ptr(), value.shape, value.stride(), value.dtype, value.device
                if memory not in copies:  # else it is tied to another one, and stays so
                    copies[memory] = self.buffer(len(copies), value).copy_(value, non_blocking=value.is_cuda)
                    devices.add(value.device)
                return copies[memory]
            if isinstance(value, dict):
                new = type(value)((k, copy(v)) for k, v in value.items())
                if hasattr(value, "_metadata"):  # of a module's state_dict
                    new._metadata = value._metadata
                return new
            return type(value)(map(copy, value)) if isinstance(value, (list, tuple)) else value

        tree = copy(tree)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        return tree

    def buffer(self, i: int, like: Tensor) -> Tensor:
        """The i-th tensor of the snapshot, with room for `like`; pinned for what comes from a GPU."""
        if i == len(self.buffers):
            self.buffers.append(torch.empty(0))
        if (old := self.buffers[i]).shape != like.shape or old.dtype != like.dtype:
            self.buffers[i] = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
        return self.buffers[i]

    def write(self, checkpoint: dict[str, Any], best: bool) -> None:
        """Put a checkpoint in the folder. At every moment a whole ckpt.pt stands there, if one has."""
        iteration, before, out_dir = checkpoint["iter_num"], self.iteration, self.path.parent
        first, replaced = self.saved is None, False
        try:
            remove_parts(out_dir)
            if self.keep > 1 and before < iteration and iteration_of(self.path) == before:
                link(self.path, out_dir / f"ckpt-{before:07d}.pt")
            write(checkpoint, self.path)
            if self.failed:
                self.say(f"{self.path}: saved again, at iteration {iteration}")
            replaced, self.saved, self.iteration, self.failed = True, self.path, iteration, None
            (out_dir / ".overwrite").unlink(missing_ok=True)
            best_path = out_dir / "ckpt-best.pt"
            if best:
                link(self.path, best_path)
            elif first and best_path.exists() and not 0 < iteration_of(best_path) <= before:
                best_path.unlink()  # of another run
            self.prune(min(before, iteration - 1), self.keep - 1)
            sync_folder(out_dir)
        except OSError as system:
            if replaced:
                self.say(f"{out_dir}: the older checkpoints cannot be put in order ({system.strerror})")
                return
            last = f"the last checkpoint is of iteration {before}" if before else "this run has no checkpoint"
            self.failed = f"{self.path}: iteration {iteration} cannot be saved ({system.strerror}); {last}"
            self.say(f"{self.failed}; the next save tries again")

    def took(self, folder: Path, iteration: int, prune: bool) -> None:
        """Note a sharded checkpoint, which others wrote. prune: remove the older ones."""
        before, self.saved, self.iteration, self.failed = self.iteration, folder, iteration, None
        if not prune:
            return
        (self.path.parent / ".overwrite").unlink(missing_ok=True)
        if self.path.exists():  # what this run went on from is an older one now; another run's goes
            if 0 < iteration_of(self.path) == before:
                os.replace(self.path, self.path.with_name(f"ckpt-{before:07d}.pt"))
            else:
                self.path.unlink()
        best = self.path.with_name("ckpt-best.pt")
        if best.exists() and not 0 < iteration_of(best) <= before:
            best.unlink()
        self.prune(iteration, self.keep)

    def prune(self, latest: int, most: int) -> None:
        """Remove all numbered checkpoints but the newest `most` of those up to the iteration `latest`."""
        found = numbered(self.path.parent)
        kept = [i for i in found if i <= latest][:most]
        for path in (found[i] for i in found if i not in kept):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---- loading ----

TIED = "lm_head", "transformer.wte"
SETTINGS = "lr", "betas", "eps", "weight_decay"  # of a group of the optimizer
PLAIN = bool, int, float, str, bytes, type(None)
WRAPPERS = re.compile(r"(module\.|_orig_mod\.)+")  # DDP's and torch.compile's, in whatever order they wrapped the model
MASK = re.compile(r"transformer\.h\.\d+\.attn\.bias")  # nanoGPT's causal mask, where its PyTorch had no fused attention


def iteration_of(path: Path) -> int:
    """The iteration of a checkpoint; -1 if it cannot be read."""
    try:
        found = claims(path, check=False).get("iter_num")
    except Fault:
        return -1
    return found if type(found) is int else -1


def load(out_dir: str | Path, resume: bool = False) -> dict[str, Any]:
    """The newest whole checkpoint of out_dir, written by nanoGPT or fastgpt; `path` names its file. Prints a line for each broken one.

    Its keys are those that nanoGPT knows, and `fastgpt`. Weights and moments are mapped from the file, not read. `resume`: the optimizer
    and the counters must be whole, too. No code in the file runs. Raises UserError if there is none.
    """
    newest, paths, faults = checkpoint_path(out_dir), find(out_dir), []
    if not paths:
        raise UserError(f"{newest}: there is no checkpoint; train first, or give another --out_dir")
    if paths[0] != newest:
        faults.append(f"{newest}: there is none")
    for path in paths:
        try:
            checkpoint = read(path, resume)
        except Fault as e:
            faults.append(f"{path}: {' '.join(str(e).split())[:300]}")
            continue
        for fault in faults:
            print(f"{fault}; {path}, of iteration {checkpoint['iter_num']}, takes its place")
        return checkpoint
    others = f"; nor is any other checkpoint in {out_dir} whole" if len(faults) > 1 else ""
    raise UserError(faults[0] + others)


def read(path: Path, resume: bool) -> dict[str, Any]:
    """The dict in one checkpoint; see `load`. What it claims is checked before memory is taken.

    Raises Fault; UserError for a format that is newer than this program.
    """
    tree = claims(path)
    try:
        if (version := (tree.get("fastgpt") or {}).get("version", 1)) > VERSION:
            raise UserError(
                f"{path}: a newer fastgpt wrote it (format {version}; this one reads {VERSION}): update fastgpt"
            )
        check_plain(tree)
        shapes = weight_shapes(tree)
        keys = check_weights(tree["model"], shapes)
        if resume:
            check_run(tree, shapes)
        check_memory(tree, keys, path.stat().st_size)
        with torch.serialization.safe_globals(ELSEWHERE):
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        # Settings are taken from `tree`, where numbers are Python's; tensors from `loaded`.
        best = tree.get("best_val_loss")
        checkpoint: dict[str, Any] = {k: tree.get(k) for k in ("model_args", "iter_num")}
        checkpoint["best_val_loss"] = loaded["best_val_loss"] if isinstance(best, Claim) else best
        checkpoint |= {"path": path, "model": {name: loaded["model"][key] for name, key in keys.items()}}
        if not torch.equal(*(checkpoint["model"][f"{name}.weight"] for name in TIED)):
            raise Fault("lm_head.weight and transformer.wte.weight differ, but they are one")
        checkpoint["config"] = dict(tree.get("config") or {})
        if extra := loaded.get("fastgpt"):
            # The few tensors here outlive the loading, and must not hold the file: its memory on the disk would stay taken.
            states = {name: extra.get(name) and [cloned(state) for state in extra[name]] for name in ("ranks", "draws")}
            checkpoint["fastgpt"] = {**extra, **states}
        if resume:
            state, groups = loaded["optimizer"]["state"], tree["optimizer"]["param_groups"]
            if not all(0 <= float(moments["step"]) < 2**31 for moments in state.values()):
                raise Fault(
                    "its optimizer state does not fit this model (a step that no optimizer counts); train from scratch"
                )
            groups = [{k: group[k] for k in ("params", *SETTINGS)} for group in groups]
            checkpoint["optimizer"] = {"state": state, "param_groups": groups}
    except (Fault, UserError):
        raise
    except Exception as e:  # another program may have written anything
        raise Fault(f"not a checkpoint of nanoGPT or fastgpt ({type(e).__name__}: {e})") from None
    return checkpoint


def cloned(state: dict[str, Any]) -> dict[str, Any]:
    """A dict whose tensors are copies."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}


def check_plain(tree: dict[str, Any]) -> None:
    """Raise Fault if what stands beside weights and moments is not of the kinds that training saves."""
    if missing := sorted({"model", "model_args"} - tree.keys()):
        raise Fault(f"not a checkpoint of nanoGPT or fastgpt: it has no {missing[0]!r}")
    extra = tree.get("fastgpt") or {"meta": None, "scaler": {}, "ranks": []}
    check_kinds([tree["model_args"], tree.get("config"), extra["meta"], extra["scaler"]], PLAIN)
    check_kinds(extra, (*PLAIN, Claim))
    for thing, kind in (
        (tree["model"], dict), (tree.get("config"), dict | None), (extra["meta"], dict | None), (extra["ranks"], list),
        (extra.get("micro_batch"), int | None), (extra.get("draws"), list | None),
        *((state, dict) for state in [*extra["ranks"], *(extra.get("draws") or [])]),
    ):  # fmt: skip
        if not isinstance(thing, kind):
            raise Fault(f"{describe(thing)} stands in place of a {kind}")
    activation_of(tree)
    scheme_of(tree)


def activation_of(checkpoint: dict[str, Any]) -> str:
    """The name of a checkpoint's activation; nanoGPT's have none in their config, and mean gelu. Raises Fault for an unknown one."""
    name = (checkpoint.get("config") or {}).get("activation", "gelu")
    if type(name) is not str or name not in ACTIVATIONS:
        raise Fault(f"its activation is {describe(name)}; GPT has {', '.join(ACTIVATIONS)}")
    return name


def scheme_of(checkpoint: dict[str, Any]) -> str:
    """The name of the scheme of a checkpoint's initial weights; nanoGPT's name none. Raises Fault for an unknown one."""
    name = (checkpoint.get("config") or {}).get("init_scheme", "nanogpt")
    if type(name) is not str or name not in SCHEMES:
        raise Fault(f"its init_scheme is {describe(name)}; there are {', '.join(SCHEMES)}")
    return name


def check_kinds(thing: Any, kinds: tuple[type, ...]) -> None:
    """Raise Fault if something in nested containers is of no such kind."""
    left, seen = [thing], set()
    while left:  # each once: a small pickle can say a list of the same list of the same list, or one in itself
        thing = left.pop()
        if id(thing) not in seen and not isinstance(thing, kinds):
            if not isinstance(thing, (dict, list, tuple, set)):
                raise Fault(f"its settings hold {describe(thing)}")
            left += [*thing, *thing.values()] if isinstance(thing, dict) else thing
            seen.add(id(thing))


def weight_shapes(tree: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's weights by name, as its model_args ask for them. Raises Fault."""
    config = gpt_config(tree["model_args"])
    if config.n_layer > len(tree["model"]):
        raise Fault(f"its weights are not those of its model_args: too few for n_layer={config.n_layer}")
    return shapes_of(config)


def shapes_of(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's weights by name."""
    with torch.device("meta"), redirect_stdout(io.StringIO()):
        return {name: tuple(weight.shape) for name, weight in GPT(config).state_dict().items()}


def gpt_config(args: dict[str, Any], where: str = "its model_args") -> GPTConfig:
    """The GPTConfig of a checkpoint's model_args. Raises Fault."""
    try:
        config = GPTConfig(**args)
        for name, value in args.items():
            if type(value) not in (bool, int, float):  # and not shown: a list may hold itself a million times
                raise TypeError(f"{name} is {describe(value)}")
        for name in ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout"):
            check_value(TrainConfig, name, getattr(config, name), name)
        if type(config.vocab_size) is not int or not 0 < config.vocab_size < 2**31:
            raise TypeError(f"vocab_size={config.vocab_size!r} is not a valid number of tokens")
        if config.n_embd % config.n_head:
            raise TypeError(f"n_head={config.n_head} does not divide n_embd={config.n_embd}")
    except (TypeError, UserError) as e:
        raise Fault(f"{where}: not valid: {e}") from None
    return config


def check_weights(model: dict[str, Claim], shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """The key of each weight by its name, without what wrapped the model. Raises Fault if a weight is not what it must be.

    nanoGPT's masks are left out. A head that is missing is the embedding, to which it is tied.
    """
    keys = {WRAPPERS.sub("", key, count=1) if WRAPPERS.match(key) else key: key for key in model}
    where = "its weights are not those of its model_args"
    twice = len(keys) < len(model)
    T = shapes["transformer.wpe.weight"][0]
    for name in [name for name in keys if MASK.fullmatch(name)]:
        claim = model[keys.pop(name)]
        if not isinstance(claim, Claim) or claim.shape != (1, 1, T, T):
            raise Fault(f"{where}: {name} is {describe(claim)}, and not the causal mask of {T} positions")
    head, embedding = (f"{name}.weight" for name in TIED)
    if head not in keys and embedding in keys:
        keys[head] = keys[embedding]
    if missing := shapes.keys() - keys.keys():
        raise Fault(f"{where}: Missing key {min(missing)!r}")
    if unexpected := keys.keys() - shapes.keys() or (twice and keys.keys()):
        raise Fault(f"{where}: Unexpected key {min(unexpected)!r}")
    for name, shape in shapes.items():
        claim = model[keys[name]]
        if not isinstance(claim, Claim) or claim.shape != shape or not claim.dtype.is_floating_point:
            raise Fault(f"{where}: {name} is {describe(claim)}, and not a tensor of {shape}")
    return keys


def describe(thing: Any) -> str:
    if isinstance(thing, Claim):
        return f"{thing.shape} of {thing.dtype}"
    return repr(thing)[:50] if isinstance(thing, PLAIN) else f"a {type(thing).__name__}"


def check_run(tree: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise Fault if the optimizer state or the counters are not those of a run with these weights."""
    if type(tree.get("iter_num")) is not int or not 0 <= tree["iter_num"] < 2**62:
        raise Fault(f"its iter_num is {describe(tree.get('iter_num'))}, and not a number of iterations")
    best = tree.get("best_val_loss")
    if (
        not isinstance(best, float)
        and not (type(best) is int and abs(best) < 2**63)
        and not (isinstance(best, Claim) and best.shape == () and best.dtype.is_floating_point)
    ):
        raise Fault("its best_val_loss is not a number")
    try:
        check_optimizer(tree["optimizer"], shapes, tree["iter_num"])
    except (Fault, KeyError, TypeError, AttributeError, ValueError) as e:
        said = e if isinstance(e, Fault) else f"{type(e).__name__}: {e}"
        raise Fault(f"its optimizer state does not fit this model ({said}); train from scratch") from None


def check_optimizer(optimizer: dict[str, Any], shapes: dict[str, tuple[int, ...]], iteration: int) -> None:
    """Raise Fault, or what a wrong type raises, if this is not the state of nanoGPT's AdamW at an iteration."""
    names = sorted(
        (name for name in shapes if name != "lm_head.weight"), key=lambda name: len(shapes[name]) < 2
    )  # nanoGPT's two groups
    decayed = sum(len(shapes[name]) >= 2 for name in names)
    groups = optimizer["param_groups"]
    if [list(group["params"]) for group in groups] != [list(range(decayed)), list(range(decayed, len(names)))]:
        raise Fault("other groups of parameters")
    for group in groups:
        numbers = {name: group[name] for name in SETTINGS}
        betas = numbers.pop("betas")
        if not all(type(n) in (int, float) and 0 <= n < math.inf for n in numbers.values()):
            raise Fault(f"one of the settings {', '.join(numbers)} is no number that it can be")
        if len(betas) != 2 or not all(type(beta) in (int, float) and 0 <= beta < 1 for beta in betas):
            raise Fault("betas that are not from 0 to 1")
        if wrong := [name for name in ("amsgrad", "maximize", "capturable", "differentiable") if group.get(name)]:
            raise Fault(f"{wrong[0]}, which this AdamW lacks")
    state = optimizer["state"]
    if not state and iteration > 0:
        raise Fault(f"it is empty, though iteration {iteration} has been trained")
    if state and set(state) != set(range(len(names))):
        raise Fault(f"moments of {len(state)} parameters, and not of {len(names)}")
    for i, moments in state.items():
        for key, shape in (("step", ()), ("exp_avg", shapes[names[i]]), ("exp_avg_sq", shapes[names[i]])):
            claim = moments[key]
            if not isinstance(claim, Claim) or claim.shape != shape or claim.dtype != torch.float32:
                raise Fault(f"{key} of {names[i]} is {describe(claim)}, and not a float32 tensor of {shape}")


def check_memory(tree: dict[str, Any], keys: dict[str, str], size: int) -> None:
    """Raise Fault if tensors share their memory, so that the model would be larger than its file; the tied pair may."""
    model = tree["model"]
    head, embedding = (keys[f"{name}.weight"] for name in TIED)
    tied = head != embedding and model[head] == model[embedding]
    total = sum(claim.nbytes for claim in model.values()) - tied * model[head].nbytes
    for moments in (tree.get("optimizer") or {}).get("state", {}).values():
        total += sum(claim.nbytes for claim in moments.values() if isinstance(claim, Claim))
    if total > size:
        raise Fault("its tensors share their memory")


def build_model(checkpoint: dict[str, Any], dropout: float | None = None) -> GPT:
    """The GPT that a loaded checkpoint holds, on the CPU. dropout None: the checkpoint's."""
    config = GPTConfig(**checkpoint["model_args"])
    config.dropout = config.dropout if dropout is None else dropout
    model = GPT(config)
    model.set_activation(activation_of(checkpoint))
    if "folder" not in checkpoint:  # of a sharded checkpoint: sharded.load_tensors reads the weights
        model.load_state_dict(checkpoint["model"])
    return model


def check_dataset(checkpoint: dict[str, Any], cfg: TrainConfig, meta: dict[str, Any] | None) -> None:
    """Raise UserError if a run is resumed on data of another tokenizer: its token ids would mean other text."""
    if "fastgpt" in checkpoint and checkpoint["fastgpt"].get("meta") != meta:
        was = checkpoint.get("config", {}).get("dataset")
        raise UserError(
            f"--dataset={cfg.dataset}: its tokens are not those that {checkpoint['path']} was trained on "
            f"({was}); give --dataset={was}, or train from scratch"
        )


def say_changes(checkpoint: dict[str, Any], cfg: TrainConfig) -> None:
    """Print each setting that is not what the checkpoint was trained with."""
    before = checkpoint.get("config") or {}
    names = TrainConfig.model_fields.keys() & before.keys() - {"init_from", "overwrite", "out_dir", "preset"}
    changed = [name for name in TrainConfig.model_fields if name in names and before[name] != getattr(cfg, name)]
    if changed:
        print("changed since the checkpoint: " + ", ".join(f"{k} {before[k]} -> {getattr(cfg, k)}" for k in changed))


def keep_shape(checkpoint: dict[str, Any], cfg: TrainConfig, given: Collection[str]) -> TrainConfig:
    """The TrainConfig with the checkpoint's shape, activation and init_scheme where they are not in `given`; prints what changed.

    A smaller block_size may be given: the model is cropped to it. Raises UserError for any other given shape that differs.
    """
    args, changed = asdict(GPTConfig(**checkpoint["model_args"])), {}
    args |= {"activation": activation_of(checkpoint), "init_scheme": scheme_of(checkpoint)}
    for name in ("n_layer", "n_head", "n_embd", "block_size", "bias", "activation", "init_scheme"):
        asked = getattr(cfg, name)
        if asked == args[name] or (name == "block_size" and name in given and asked < args[name]):
            continue
        if name in given:
            raise UserError(
                f"--{name}={asked}: the checkpoint {checkpoint['path']} has {name}={args[name]}; "
                "leave the flag out, or train from scratch"
            )
        changed[name] = args[name]
    if changed:
        print("from the checkpoint: " + ", ".join(f"{k} = {v}" for k, v in changed.items()))
    return cfg.model_copy(update=changed)
