"""`fastgpt study`: what initial weights, warm-up, learning rate, depth and activation do to training, over several seeds.

Each run is a small model on the embedded text, in a process of its own. Its result is a file in --out/runs, so a study that was stopped
goes on where it was. Runs of one seed differ in nothing but what they compare: they draw the same random numbers for their weights, see
the same batches, and are measured on the same held-out text. So their losses are compared seed by seed.
"""

import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import fastgpt
from fastgpt import data, files, init, optim
from fastgpt.config import STUDY_ON_GPU, StudyConfig, TrainConfig, UserError
from fastgpt.distributed import check_device
from fastgpt.lock import lock
from fastgpt.model import ACTIVATIONS, new_gpt
from fastgpt.parse import check_heads, close
from fastgpt.prepare import EMBEDDED
from fastgpt.step import evaluate, mixed_precision, train_step
from fastgpt.study_page import rewrite, write_all

EVAL_SEED = 20  # of the held-out batches
MOST_RUNS = 100_000
SHAPE = ("iters", "n_head", "n_embd", "block_size", "batch_size", "eval_iters")  # what all runs of a folder have alike


class Setting(NamedTuple):
    """What is compared, but for the seed."""

    depth: int
    scheme: str
    activation: str
    lr: float
    warmup: int

    @property
    def name(self) -> str:
        """Of the setting in file names, and of its figures in a page."""
        return f"{self.scheme}-L{self.depth}-{self.activation}-lr{self.lr:g}-w{self.warmup}"


def defaults(given: dict[str, Any], has_file: bool) -> dict[str, Any]:
    """The values that --size sets."""
    return STUDY_ON_GPU if given.get("size") == "gpu" else {}


# ---- one run ----


def train_config(cfg: StudyConfig, setting: Setting, seed: int) -> TrainConfig:
    """The settings with which a run trains."""
    settings: dict[str, Any] = dict(
        dataset=EMBEDDED, device=cfg.device, n_layer=setting.depth, n_head=cfg.n_head, n_embd=cfg.n_embd, bias=False,
        block_size=cfg.block_size, batch_size=cfg.batch_size, gradient_accumulation_steps=1,
        learning_rate=setting.lr, min_lr=setting.lr / 10, warmup_iters=setting.warmup,
        max_iters=cfg.iters, lr_decay_iters=cfg.iters,
        eval_iters=cfg.eval_iters, seed=seed, eval_seed=EVAL_SEED, init_scheme=setting.scheme, activation=setting.activation,
    )  # fmt: skip
    return TrainConfig(**settings)


def run(cfg: TrainConfig) -> dict[str, Any]:
    """Train one model: its losses and gradient norms. What is not finite is None."""
    began = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        train_tokens, val_tokens, _, vocab_size = data.load_dataset(cfg)
        torch.manual_seed(cfg.seed)
        model = new_gpt(cfg.gpt_config(vocab_size), cfg.init_scheme, cfg.activation).to(cfg.device)
        dtype, autocast, scaler = mixed_precision(cfg.device, cfg.dtype)
        model.set_kernels(cfg.kernels, cfg.batch_size, dtype)
        kind = cfg.device.split(":")[0]
        optimizer = model.configure_optimizers(cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2), kind)
    shape = cfg.batch_size, cfg.block_size, cfg.device
    batches = data.Batches(train_tokens, *shape)
    batches.prefetch()
    seen = []
    for it in range(cfg.max_iters):
        for group in optimizer.param_groups:
            group["lr"] = optim.learning_rate(it, cfg)
        loss, norm = train_step(model, optimizer, scaler, batches, 1, autocast, cfg.grad_clip)
        seen.append(torch.stack((loss.float(), norm.float())))
    losses, norms = torch.stack(seen).T.tolist()
    held_out = data.Batches(val_tokens, *shape, data.Draws(torch.Generator().manual_seed(EVAL_SEED)))
    val = evaluate(model, held_out.take(cfg.eval_iters), autocast)
    result = {
        "val": val, "first": losses[0], "highest": max(losses, key=lambda x: math.inf if math.isnan(x) else x),
        "norm": max(norms, key=lambda x: math.inf if math.isnan(x) else x),
        "left_out": sum(not math.isfinite(a + b) for a, b in zip(losses, norms, strict=True)),
        "seconds": time.process_time() - began,
    }  # fmt: skip
    return {name: rounded(v) for name, v in result.items()}


def rounded(value: float) -> float | None:
    """A measured number with the digits that mean something; None if it is not finite."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


# ---- many runs ----


def words(name: str, text: str, kind: Callable[[str], Any], known: Iterable[str] = (), least: int = 0) -> list[Any]:
    """The words of a list with commas, each once. Raises UserError for one that is none of the known, or not of its kind."""
    found, known = [], list(known)
    for word in map(str.strip, text.split(",")):
        try:
            value = kind(word)
        except ValueError:
            value = None
        if known and word not in known:
            raise UserError(f"--{name}={text}: there is no {word!r}; the nearest is {close(word, known, 0)!r}")
        if value is None or (kind is not str and not (math.isfinite(value) and value >= least)):
            raise UserError(f"--{name}={text}: {word!r} is not such a number; write them with commas between")
        found.append(value)
    return list(dict.fromkeys(found))


def grid(cfg: StudyConfig) -> list[tuple[Setting, int]]:
    """The (setting, seed) pairs that a StudyConfig asks for: all seeds of one setting after the other."""
    lists = (
        words("depths", cfg.depths, int, least=1),
        list(init.SCHEMES) if cfg.schemes == "all" else words("schemes", cfg.schemes, str, init.SCHEMES),
        words("activations", cfg.activations, str, ACTIVATIONS),
        words("learning_rates", cfg.learning_rates, float), words("warmups", cfg.warmups, int),
    )  # fmt: skip
    if (count := math.prod(map(len, lists)) * cfg.seeds) > MOST_RUNS:
        raise UserError(f"{count:,} runs are more than {MOST_RUNS:,}; give shorter lists, or several studies")
    check_heads(cfg)
    return [(Setting(*values), 1 + i) for values in itertools.product(*lists) for i in range(cfg.seeds)]


def run_path(out: Path, setting: Setting, seed: int) -> Path:
    """The file of a run's result."""
    return out / "runs" / f"{setting.name}-s{seed}.json"


def done_before(out: Path) -> dict[tuple[Setting, int], dict[str, Any]]:
    """The results in a folder, by setting and seed: those in study.json, and those that came after it. A file that is not whole is none."""
    try:
        found = list(files.read_json(out / "study.json", files.DATA)["runs"])
    except FileNotFoundError:
        found = []
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{out / 'study.json'}: not the results of a study ({e}); move it away") from None
    for path in sorted((out / "runs").glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            found.append(files.read_json(path))
    needed = {*Setting._fields, "seed", "val", "shape", "where"}
    whole = [r for r in found if isinstance(r, dict) and needed <= r.keys()]
    return {(Setting(*(r[k] for k in Setting._fields)), r["seed"]): r for r in whole}


def study(cfg: StudyConfig) -> None:
    """Run what a StudyConfig asks for and is not there yet; then write the collected results, a plot and a Markdown table."""
    if cfg.page:
        rewrite(Path(cfg.page), Path(cfg.out))
        return
    check_device(cfg.device)
    asked, out = grid(cfg), Path(cfg.out)
    shape = {name: getattr(cfg, name) for name in SHAPE}
    held = done_before(out)
    for found in (r["shape"] for r in held.values()):
        if found != shape:
            other = next(k for k in shape if found.get(k) != shape[k])
            was, now = found.get(other), shape[other]
            raise UserError(f"{out}: its runs have {other}={was}, not {now}; give another --out, or --{other}={was}")
    todo = [one for one in asked if one not in held]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = cfg.processes or (1 if cfg.device.startswith("cuda") else cores)
    print(f"{len(asked)} runs of {cfg.iters} updates, {len(asked) - len(todo)} of them done before")
    if todo:
        seconds = expected_seconds(cfg, todo)
        processes = min(processes, len(todo))
        together = f"{spoken(seconds / processes)} in {processes} processes, " if processes > 1 else ""
        print(f"the others take about {together}{spoken(seconds)} of one core")
    if cfg.plan:
        return
    try:
        (out / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out={out}: cannot be written ({e.strerror}); give another folder") from None
    with lock(out):
        files.remove_parts(out / "runs")
        run_all(cfg, todo, processes)
        collect(out)
        write_all(out)


def expected_seconds(cfg: StudyConfig, todo: list[tuple[Setting, int]]) -> float:
    """Seconds of one process for these runs: of each depth a few updates and one evaluated batch are measured."""
    few, per_run = 4, {}
    torch.set_num_threads(1)
    for depth in {setting.depth for setting, _ in todo}:
        setting = next(s for s, _ in todo if s.depth == depth)
        took = []
        for iters in (1, 1 + few):  # the difference is that of updates: what a run does once falls out
            short = train_config(cfg.model_copy(update={"iters": iters, "eval_iters": 1}), setting, 1)
            began = time.perf_counter()
            run(short)
            took.append(time.perf_counter() - began)
        update = max(took[1] - took[0], 0.0) / few
        per_run[depth] = took[0] + update * (cfg.iters + cfg.eval_iters / 3)  # a forward is a third of an update
    return sum(per_run[setting.depth] for setting, _ in todo)


def spoken(seconds: float) -> str:
    """A time, as one says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def run_all(cfg: StudyConfig, todo: list[tuple[Setting, int]], processes: int) -> None:
    """Run these in processes of their own, and write each result as it comes."""
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, begin_worker, (cfg.device,))
    live = sys.stderr.isatty() and sys.stdout.isatty()
    try:
        jobs = {pool.submit(run_to_file, cfg, *one): one for one in todo}
        with tqdm(total=len(todo), disable=not live, unit="run", dynamic_ncols=True) as bar:
            for i, job in enumerate(as_completed(jobs), 1):
                setting, seed = jobs[job]
                val = job.result()
                said = f"{setting.name}, seed {seed}: val loss {'not finite' if val is None else f'{val:.4f}'}"
                bar.set_postfix_str(said)
                bar.update()
                if not live:
                    print(f"{i}/{len(todo)} {said}", flush=True)
    except BaseException as e:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - before:
            child.kill()  # the run is lost, and no other
        if isinstance(e, BrokenProcessPool):
            raise UserError(
                "a process of the study was killed, perhaps for its memory; give fewer --processes"
            ) from None
        raise
    pool.shutdown()


def begin_worker(device: str) -> None:
    """In a new process: one thread of arithmetic, and an end with its parent, however that ends."""
    if not device.startswith("cuda"):
        torch.set_num_threads(1)

    def follow():
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def run_to_file(cfg: StudyConfig, setting: Setting, seed: int) -> float | None:
    """Run one, and write its result: the loss on held-out text."""
    result = {
        **setting._asdict(), "seed": seed, **run(train_config(cfg, setting, seed)),
        "shape": {name: getattr(cfg, name) for name in SHAPE}, "where": where(cfg.device),
    }  # fmt: skip
    files.write(run_path(Path(cfg.out), setting, seed), json.dumps(result).encode(), "--out")
    return result["val"]


def where(device: str) -> str:
    """The machine and versions of a result."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        name = next(names, "a CPU")
    return f"{name}, PyTorch {torch.__version__}, fastgpt {fastgpt.__version__}"


def collect(out: Path) -> None:
    """Write study.json, a run a line, of all runs in a folder."""
    runs = [r for _, r in sorted(done_before(out).items())]
    lines = ",\n".join(json.dumps(r) for r in runs)
    files.write(out / "study.json", f'{{"runs": [\n{lines}\n]}}\n'.encode(), "--out")
