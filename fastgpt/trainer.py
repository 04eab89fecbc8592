"""nanoGPT's training loop, with its data order, schedule, evaluations and checkpoints."""

import hashlib
import math
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InductorError
from tqdm import tqdm

import fastgpt
from fastgpt import checkpoint as checkpoints
from fastgpt import data, distributed, graphs, metrics, ops, optim, runner, sharded, tokenizer
from fastgpt.config import RESIDUAL, TrainConfig, UserError
from fastgpt.micro_batch import merge, sequence_bytes, what_fits
from fastgpt.model import GPT
from fastgpt.shadows import Shadows, shadow_dtype
from fastgpt.step import evaluate, micro_step, train_step

# Settings in which processes may differ: names of places, and what only the main process does.
MAY_DIFFER = {
    "out_dir", "dataset", "train_data", "val_data", "preset", "device", "peak_flops", "join_timeout", "sample_tokens",
    "wandb_log", "wandb_project", "wandb_run_name",
}  # fmt: skip


class Again(Exception):
    """The run must begin again with these flags, because a default that it took does not work here. The message says why."""

    def __init__(self, reason: str, *flags: str):
        super().__init__(f"{reason}; the run begins again with {' '.join(flags)}")
        self.flags = flags


def train(cfg: TrainConfig, given: Collection[str] = frozenset()) -> None:
    """Train as a TrainConfig says. `given`: names of the settings that the user gave.

    Raises UserError, if possible before any work; and Again where something fails that the user did not ask for.
    """
    runner.asked(cfg, given)  # raises for contradictory flags
    world = distributed.init(cfg.device, cfg.backend, cfg.parallel, cfg.join_timeout, cfg.timeout)
    run = None
    try:
        with graphs.stream(world):
            run = Run(cfg, given, world)
            run.loop()
    except graphs.CaptureEnded as e:
        if runner.asked(cfg, given) or world.size > 1:
            raise
        raise again(run, str(e).partition("; give")[0], "--runner=eager") from None
    except torch.OutOfMemoryError as e:
        reason = str(e).splitlines()[0]
        if run and run.sequences > cfg.batch_size and "micro_batch" not in given and world.size == 1:
            raise again(run, reason, f"--micro_batch={cfg.batch_size}") from None
        if run and run.asked is None and run.runner.graphs and world.size == 1:  # a graph keeps its memory
            raise again(run, reason, "--runner=eager") from None
        memory = torch.cuda.get_device_properties(world.device).total_memory if world.device.startswith("cuda") else 0
        cfg, config = (run.cfg, run.model.config) if run else (cfg, cfg.gpt_config(50304))
        graphed, sequences = (run.runner.graphs, run.sequences) if run else (False, cfg.batch_size)
        micro_steps = distributed.share(cfg.gradient_accumulation_steps, world)
        hint = what_fits(cfg, config, memory, getattr(torch, cfg.dtype).itemsize, sequences, micro_steps, graphed)
        raise UserError(f"{reason} To fit, {hint}") from None
    except (BackendCompilerFailed, InductorError) as e:
        reason = str(e).strip().splitlines()[0]
        if run and run.asked is None and world.size == 1:
            raise again(run, f"torch.compile failed ({reason})", "--runner=graphs") from None
        raise UserError(f"--compile=True: torch.compile failed ({reason}); give --compile=False") from None
    except RuntimeError as e:
        if not distributed.lost(e):
            raise
        raise distributed.peer_lost(e, cfg.timeout) from None
    finally:
        run = None  # and with it DDP, which holds the process group
        distributed.finish(world)


def again(run: "Run | None", reason: str, flag: str) -> Again:
    """The Again of a run that ends: with a flag in place of a default, and from the checkpoint that the run has saved, if it has."""
    if run and run.wandb:
        run.wandb.finish()
    return Again(reason, flag, *["--init_from=resume"] * bool(run and run.saved))


class Run:
    """One training run. The constructor makes and checks everything before the first iteration."""

    def __init__(self, cfg: TrainConfig, given: Collection[str], world: distributed.World):
        self.began = time.perf_counter()
        self.world = world
        self.cuda = world.device.startswith("cuda")
        with distributed.agreement(world) as facts:
            saved, train_tokens, val_tokens = self.open(cfg, given)
            facts.update(self.facts(saved, train_tokens, val_tokens))
        self.make(given, saved, train_tokens, val_tokens)

    def open(self, cfg: TrainConfig, given: Collection[str]) -> tuple[dict[str, Any] | None, data.Tokens, data.Tokens]:
        """Read the checkpoint and the data, build the model, and check all that this process can check by itself."""
        world = self.world
        saved = sharded.load(cfg.out_dir, whole=not world.sharded) if cfg.init_from == "resume" else None
        self.cfg = cfg = checkpoints.keep_shape(saved, cfg, given) if saved else cfg
        self.asked = runner.asked(cfg, given)
        self.micro_steps = distributed.share(cfg.gradient_accumulation_steps, world)  # nanoGPT's, in an iteration
        self.tokens = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size  # of all processes' iteration
        self.saved: Path | None = None
        print(f"tokens per iteration will be: {self.tokens:,}")
        self.wandb = import_wandb() if cfg.wandb_log else None

        ops.parse(cfg.kernels)  # raises for a wrong word before any work
        check_residual(cfg, self.cuda)
        check_parallel(cfg, self.cuda)
        torch.manual_seed(cfg.seed + world.rank)
        self.dtype = getattr(torch, cfg.dtype) if self.cuda else torch.float32  # as in nanoGPT
        self.autocast: AbstractContextManager[Any] = nullcontext()
        if self.cuda:
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
            self.autocast = torch.autocast("cuda", dtype=self.dtype)

        with distributed.main_first(world):
            check_writable(cfg.out_dir)
            train_tokens, val_tokens, self.meta, vocab_size = data.load_dataset(cfg)
        if saved:
            checkpoints.check_dataset(saved, cfg, self.meta)
            for name in ("doc_mask", "residual"):  # these change what is computed, but model_args lack them
                before, now = saved.get("config", {}).get(name), getattr(cfg, name)
                if before not in (None, now):
                    print(f"--{name}={now}: the checkpoint was trained with {before}")
        self.model = self.build_model(saved, vocab_size).to(world.device)
        self.model.set_recompute(cfg.recompute)
        self.model.set_residual(RESIDUAL[cfg.residual])
        if cfg.doc_mask:
            self.model.set_doc_mask(find_separator(self.meta, train_tokens))
        for tokens in (train_tokens, val_tokens):
            tokens.vocab_size = min(tokens.vocab_size, self.model.config.vocab_size)
            tokens.check_ids()
        return saved, train_tokens, val_tokens

    def facts(self, saved: dict[str, Any] | None, *streams: data.Tokens) -> dict[str, Any]:
        """What all processes must have alike: settings, checkpoint, data, versions. Paths may differ, if the same lies there."""
        facts = {f"--{name}": value for name, value in self.cfg.model_dump().items() if name not in MAY_DIFFER}
        facts |= {"the device": self.world.device.split(":")[0], "the runner": self.asked and self.asked.text}
        facts |= {"PyTorch": torch.__version__, "fastgpt": fastgpt.__version__}
        if saved:
            facts |= {"the checkpoint's iteration": saved.get("iter_num"), "the checkpoint": digest(saved)}
        for split, tokens in zip(("training", "validation"), streams, strict=True):
            facts |= {f"the {split} data's length": len(tokens), f"the {split} data": data_digest(tokens)}
        return facts

    def make(
        self, given: Collection[str], saved: dict[str, Any] | None, train_tokens: data.Tokens, val_tokens: data.Tokens
    ) -> None:
        """Make what trains: together with the other processes, if there are any."""
        cfg, world = self.cfg, self.world
        self.plan(given, saved)
        shape = (cfg.batch_size, cfg.block_size, world.device)
        self.batches = data.Batches(train_tokens, *shape, merged=self.sequences // cfg.batch_size)
        # As in nanoGPT, evaluations draw from training's generator, unless --eval_seed gives them their own.
        self.eval_generator = None if cfg.eval_seed is None else torch.Generator()
        self.eval_batches: dict[str, Any] = {
            "train": data.Batches(train_tokens, *shape, self.eval_generator),
            "val": data.Batches(val_tokens, *shape, self.eval_generator),
        }
        self.parallelize()

        # Only float16 needs loss scaling: the other dtypes have fp32's range.
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.cuda and cfg.dtype == "float16")
        self.optimizer = self.model.configure_optimizers(
            cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2), "cuda" if self.cuda else "cpu"
        )
        self.iter_num, self.best_val_loss, offsets = 0, float("inf"), None
        if saved:
            self.restore_optimizer(saved, given)
            offsets = self.restore_random_state(saved.get("fastgpt"))
        # After DDP has copied rank 0's weights to all. FSDP itself gathers weights in this dtype.
        if (dtype := shadow_dtype(self.model.kernels, self.dtype)) and not world.sharded:
            self.shadows = Shadows(self.model, dtype)

        self.graphs = self.make_graphs() if self.runner.graphs else None

        self.peak_flops = cfg.peak_flops or metrics.peak_flops(world.device, cfg.dtype)
        self.mfu: float | None = None
        self.clock = metrics.Clock(lambda: torch.cuda.synchronize(world.device) if self.cuda else None)
        if world.is_main:
            kept = float("inf") if cfg.eval_only else self.iter_num if saved else 0
            self.metrics = metrics.MetricsFile(cfg.out_dir, keep_before=kept)
        if self.wandb and world.is_main:
            self.wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name, config=cfg.model_dump())
        self.batches.prefetch(offsets)

    def parallelize(self) -> None:
        """Compile the model, and share the work on it among the processes."""
        cfg, world = self.cfg, self.world
        if self.runner.compile:
            print("compiling the model... (takes a ~minute)")
        self.compiled: Any
        if world.sharded:
            several = self.accumulation > 1
            distributed.shard(self.model, world, self.dtype, self.runner.compile, several)
            self.compiled = self.parallel = self.model
            self.eval_batches = {k: distributed.Shown(batches, world) for k, batches in self.eval_batches.items()}
            return
        # Evaluations use smaller batches than merged micro-steps. Compile each size by itself, not one graph with dynamic sizes.
        dynamic = False if self.sequences > cfg.batch_size else None
        self.compiled = torch.compile(self.model, dynamic=dynamic) if self.runner.compile else self.model
        self.parallel = distributed.wrap(self.compiled, world)

    def plan(self, given: Collection[str], saved: dict[str, Any] | None) -> None:
        """Decide how many sequences a micro-step computes, how it runs, and by which kernels: the same on all processes."""
        cfg, world = self.cfg, self.world
        saved = saved or {}
        before = (saved.get("fastgpt") or {}).get("micro_batch")
        done = saved.get("iter_num")
        left = 0 if cfg.eval_only else cfg.max_iters - (done if isinstance(done, int) else 0)  # iterations

        def find():
            if world.sharded:
                print(
                    f"runner: {runner.EAGER.text}: FSDP gathers weights between blocks; --compile=True compiles each block"
                )
                return runner.EAGER
            return runner.find(self.work(), world.device, left * self.accumulation)

        self.merge_micro_batches(cfg.micro_batch, before)
        try:
            self.runner = self.asked or distributed.agree(find, world)
        except torch.OutOfMemoryError:
            if self.sequences == cfg.batch_size or "micro_batch" in given or world.size > 1:
                raise
            print(f"micro-steps of {self.sequences} sequences do not fit")
            self.merge_micro_batches(cfg.batch_size)
            self.runner = find()
        if self.sequences > cfg.batch_size or "micro_batch" in given:
            merged = self.sequences // cfg.batch_size
            print(f"micro-steps: {self.accumulation} of {self.sequences} sequences, {merged} micro-batches in each")
        with distributed.main_first(world):  # the main process measures, and the others read its result
            self.model.set_kernels(self.work().kernels_of(self.runner, world.device))

    def merge_micro_batches(self, spec: str | int, before: Any = None) -> None:
        """Decide how many of nanoGPT's micro-batches one micro-step computes. before: the sequences of a resumed run's micro-step."""
        cfg, world, c = self.cfg, self.world, self.model.config
        takes = sequence_bytes(c, self.dtype.itemsize, cfg.recompute, RESIDUAL[cfg.residual].itemsize)
        beside = 0.0
        if self.cuda and (self.asked is None or self.asked.graphs):
            # A graph keeps its memory. Evaluations take theirs beside it, and so does DDP's last micro-step.
            beside = cfg.batch_size * sequence_bytes(replace(c, n_layer=1), self.dtype.itemsize)
            takes *= 2 if world.size > 1 else 1
        merged = merge(spec, cfg.batch_size, self.micro_steps, c, world.device, takes, beside, before)
        self.sequences = distributed.least(merged, world) * cfg.batch_size
        self.accumulation = self.micro_steps * cfg.batch_size // self.sequences
        if self.cuda:
            free, _ = torch.cuda.mem_get_info(world.device)
            print(f"activations: about {self.sequences * takes / 1e9:.1f} GB, of {free / 1e9:.1f} GB that are free")

    def work(self) -> runner.Work:
        """What a micro-step of this run computes."""
        cfg = self.cfg
        several, replays = self.accumulation > 1, self.world.size == 1 or self.accumulation > 1
        modes = cfg.recompute, cfg.doc_mask, cfg.residual
        return runner.Work(
            self.model.config, self.sequences, several, cfg.kernels, str(self.dtype)[6:], *modes, replays=replays
        )

    def make_graphs(self) -> graphs.Graphs | None:
        """The Graphs of the micro-steps; None if DDP averages in each of them."""
        if self.world.sharded:
            print("CUDA graphs: none with --parallel=fsdp, which gathers weights between blocks")
            return None
        if self.world.size > 1 and self.accumulation == 1:
            print("CUDA graphs: none, since DDP takes part in the only micro-step of an iteration")
            return None
        settings = self.scaler, self.accumulation, self.autocast
        return graphs.Graphs(lambda x, y: micro_step(self.parallel, x, y, *settings), self.model.parameters())

    def build_model(self, saved: dict[str, Any] | None, vocab_size: int) -> GPT:
        """The model of --init_from: new, from a checkpoint, or GPT-2's; cropped if block_size is smaller."""
        cfg = self.cfg
        if cfg.init_from == "scratch":
            print("Initializing a new model from scratch")
            return GPT(cfg.gpt_config(vocab_size))
        if saved:
            print(f"Resuming training from {cfg.out_dir}")
            model = checkpoints.build_model(saved, cfg.out_dir, cfg.dropout)
        else:
            print(f"Initializing from OpenAI GPT-2 weights: {cfg.init_from}")
            model = checkpoints.pretrained(cfg.init_from, cfg.dropout)
        shape = model.config
        if self.meta is not None and vocab_size != shape.vocab_size:
            raise UserError(
                f"--dataset={cfg.dataset}: its vocabulary of {vocab_size} is not the model's of {shape.vocab_size}; "
                "take a dataset of the model's own tokens"
            )
        if cfg.block_size > shape.block_size:
            raise UserError(f"--block_size={cfg.block_size}: {cfg.init_from} has {shape.block_size}; take that or less")
        if cfg.block_size < shape.block_size:
            model.crop_block_size(cfg.block_size)
        return model

    def restore_optimizer(self, saved: dict[str, Any], given: Collection[str]) -> None:
        """Restore the optimizer and the counters. The checkpoint's betas and weight decay remain, unless the user gave them."""
        cfg = self.cfg
        try:
            for old, new in zip(saved["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True):
                old["fused"] = new["fused"]  # depends on this device, not on the one that saved
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.world.sharded:
                sharded.spread(self.optimizer)
                if "folder" in saved:
                    sharded.load_tensors(saved["folder"], self.model, self.optimizer)
            self.iter_num, self.best_val_loss = int(saved["iter_num"]), float(saved["best_val_loss"])
            for p, moments in self.optimizer.state.items():
                for value in (v for v in moments.values() if v.dim() > 0):
                    if value.shape[1:] != p.shape[1:] or value.size(0) < p.size(0):
                        raise ValueError(f"a moment of {tuple(value.shape)} for weights of {tuple(p.shape)}")
            betas = [group["betas"] for group in self.optimizer.param_groups]
        except (KeyError, ValueError, TypeError, AttributeError) as e:
            raise UserError(
                f"{checkpoints.checkpoint_path(cfg.out_dir)}: its optimizer state does not fit this model "
                f"({type(e).__name__}: {e}); train from scratch"
            ) from None
        wpe = self.model.transformer.wpe.weight  # if block_size was cropped, crop its moments too
        moments = self.optimizer.state[wpe]
        crops = {k: v[: wpe.size(0)].clone() for k, v in moments.items() if v.dim() == 2 and v.size(0) > wpe.size(0)}
        moments.update(crops)
        decay, no_decay = self.optimizer.param_groups
        for group, (beta1, beta2) in zip((decay, no_decay), betas, strict=True):
            group["betas"] = cfg.beta1 if "beta1" in given else beta1, cfg.beta2 if "beta2" in given else beta2
        if "weight_decay" in given:
            decay["weight_decay"] = cfg.weight_decay

    def random_state(self) -> list[Any] | None:
        """What a resumed run needs to draw the same random numbers: a list by process, on the main process."""
        return distributed.gather(
            {
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(self.world.device) if self.cuda else None,
                "offsets": self.batches.offsets,
            },
            self.world,
        )

    def restore_random_state(self, extra: dict[str, Any] | None) -> torch.Tensor | None:
        """Restore the random state of a checkpoint. Returns the offsets of its next batch, or None.

        nanoGPT's checkpoints have no such state (`extra` is None): the batches then start again from the seed, as in nanoGPT.
        """
        if extra is None:
            return None
        try:
            if extra["scaler"]:
                self.scaler.load_state_dict(extra["scaler"])
            if len(extra["ranks"]) != self.world.size:
                print(f"saved by {len(extra['ranks'])} processes, resumed by {self.world.size}: batches start anew")
                return None
            mine = extra["ranks"][self.world.rank]
            torch.set_rng_state(mine["rng"])
            if self.cuda and mine["cuda_rng"] is not None:
                torch.cuda.set_rng_state(mine["cuda_rng"], self.world.device)
            offsets = mine["offsets"]
            if self.batches.fits(offsets):
                return offsets
            print("saved with another --batch_size: its next batch is skipped")
            return None
        except (KeyError, TypeError, AttributeError, RuntimeError) as e:
            path = checkpoints.checkpoint_path(self.cfg.out_dir)
            raise UserError(f"{path}: its key 'fastgpt' is damaged ({type(e).__name__}: {e}); remove it") from None

    def loop(self) -> None:
        """Train to max_iters. Evaluate and save every eval_interval iterations and at the end."""
        cfg, main = self.cfg, self.world.is_main
        live = main and sys.stderr.isatty() and sys.stdout.isatty()  # not for `| tee log`, which needs lines
        with tqdm(total=cfg.max_iters, initial=self.iter_num, disable=not live, unit="it", dynamic_ncols=True) as bar:
            say = bar.write if live else lambda line: print(line, flush=True)
            self.clock.start()
            while True:
                lr = optim.learning_rate(self.iter_num, cfg)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                last = cfg.eval_only or self.iter_num >= cfg.max_iters
                if last or self.iter_num % cfg.eval_interval == 0:
                    self.clock.stop()
                    state = self.random_state()  # before the evaluation's draws: a resumed run evaluates here again
                    if self.world.takes_part:
                        self.evaluate(lr, say if main else hush)
                        self.save(state, say if main else hush)
                    self.clock.start()
                if last:
                    break
                loss, grad_norm = train_step(
                    self.parallel, self.optimizer, self.scaler, self.batches, self.accumulation, self.autocast, cfg.grad_clip,
                    self.graphs,
                )  # fmt: skip
                self.clock.iterations += 1
                if self.clock.iterations == 1 and main:
                    self.clock.sync()
                    say(
                        f"the first iteration is done {time.perf_counter() - self.began:.1f} s after the start, evaluation included"
                    )
                if self.iter_num % cfg.log_interval == 0:
                    loss = distributed.mean(loss, self.world)
                    if main:
                        said, took, speed = self.log(loss.item(), lr, grad_norm.item())
                        bar.set_postfix_str(f"{said}, {speed}")
                        if not live:
                            say(f"iter {self.iter_num}: {said}, {took}, {speed}")
                self.iter_num += 1
                bar.update()
        if main:
            self.finish()

    def log(self, loss: float, lr: float, grad_norm: float) -> tuple[str, str, str]:
        """Write an iteration to the metrics. Returns its loss, time and speed as text."""
        dt = self.clock.lap()
        tokens_per_s = self.tokens / dt
        if self.peak_flops:
            self.mfu = self.model.estimate_mfu(self.accumulation * self.sequences, dt, self.peak_flops)
        self.metrics.write(
            iter=self.iter_num, loss=loss, lr=lr, grad_norm=grad_norm, dt_ms=dt * 1e3, tokens_per_s=tokens_per_s, mfu=self.mfu
        )  # fmt: skip
        mfu = "" if self.mfu is None else f"mfu {self.mfu * 100:.2f}%, "
        return f"loss {loss:.4f}", f"time {dt * 1000:.2f}ms", f"{mfu}{tokens_per_s:,.0f} tok/s"

    def evaluate(self, lr: float, say: Callable[[str], Any]) -> None:
        """Measure the loss of both splits, print it, and write it to the metrics."""
        self.losses = {}
        for split, batches in self.eval_batches.items():
            if self.eval_generator is not None:
                self.eval_generator.manual_seed(self.cfg.eval_seed)  # type: ignore[arg-type]  # the same batches every time
            self.losses[split] = evaluate(self.compiled, batches, self.cfg.eval_iters, self.autocast)
        if self.world.sharded:
            self.losses = distributed.agree(lambda: self.losses, self.world)
        train_loss, val_loss = self.losses["train"], self.losses["val"]
        if not self.world.is_main:
            return
        say(f"step {self.iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        self.metrics.write(iter=self.iter_num, train_loss=train_loss, val_loss=val_loss)
        if self.wandb:
            mfu = None if self.mfu is None else self.mfu * 100
            self.wandb.log(
                {"iter": self.iter_num, "train/loss": train_loss, "val/loss": val_loss, "lr": lr, "mfu": mfu}
            )

    def save(self, random_state: list[Any] | None, say: Callable[[str], Any]) -> None:
        """Save a checkpoint if this evaluation is the best, or with always_save_checkpoint. Never at iteration 0 or with eval_only."""
        best = self.losses["val"] < self.best_val_loss
        self.best_val_loss = min(self.best_val_loss, self.losses["val"])
        if self.iter_num == 0 or self.cfg.eval_only or not (best or self.cfg.always_save_checkpoint):
            return
        say(f"saving checkpoint to {self.cfg.out_dir}")
        whole = (
            {} if self.world.sharded else {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        )
        checkpoint = {
            **whole,
            "model_args": asdict(self.model.config),
            "iter_num": self.iter_num,
            "best_val_loss": torch.tensor(self.best_val_loss),
            "config": self.cfg.model_dump(),
            "fastgpt": {
                "meta": self.meta,
                "scaler": self.scaler.state_dict(),
                "ranks": random_state,
                "micro_batch": self.sequences,
            },
        }
        if self.world.sharded:
            self.saved = sharded.save(checkpoint, self.model, self.optimizer, self.cfg.out_dir, self.world)
            return
        checkpoints.save(checkpoint, self.cfg.out_dir)
        self.saved = checkpoints.checkpoint_path(self.cfg.out_dir)

    def finish(self) -> None:
        """Print the final losses, the speed, a sample and the paths of all files; draw the plot."""
        cfg, clock = self.cfg, self.clock
        self.metrics.close()
        train_loss, val_loss = self.losses["train"], self.losses["val"]
        print(f"\niteration {self.iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f} nats per token")
        if clock.iterations:
            speed = self.tokens * clock.iterations_per_s()
            print(f"{clock.iterations} iterations in {clock.seconds:.1f} s, evaluations apart; {speed:,.0f} tok/s")
        plot = self.metrics.path.with_name("loss.png")
        if not cfg.eval_only:
            title = f"{self.model.get_num_params() / 1e6:.2f}M parameters on {cfg.dataset}"
            try:
                metrics.plot_losses(metrics.read_metrics(self.metrics.path), plot, title)
            except OSError as e:
                print(f"no loss curve: {e}")
        if cfg.sample_tokens and self.world.sharded:
            print("a sample: none with --parallel=fsdp; `fastgpt sample` writes one from the checkpoint")
        elif cfg.sample_tokens and math.isfinite(val_loss):
            self.model.eval()
            self.model.set_residual(torch.float32)  # as in `fastgpt sample`
            tok = tokenizer.from_meta(self.meta)
            allowed = tok.decodable(self.model.config.vocab_size).to(self.world.device)
            start, _ = next(self.eval_batches["val"].take(1))
            with self.autocast:
                ids = self.model.generate(start[:1, :1], cfg.sample_tokens, temperature=0.8, top_k=200, allowed=allowed)
            print(f"a sample:\n{'-' * 80}\n{tok.decode(ids[0].tolist())}\n{'-' * 80}")
        if cfg.eval_only:
            return
        print(f"checkpoint: {self.saved or 'none saved'}\nmetrics:    {self.metrics.path}\nloss curve: {plot}")
        if self.saved:
            device = "" if self.cuda else f" --device={self.world.device}"
            print(f"more text:  fastgpt sample --out_dir={cfg.out_dir}{device}")


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


def hush(line: str) -> None:
    """Say nothing: the main process speaks."""


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


def import_wandb() -> Any:
    """The module wandb. Raises UserError if it cannot be imported."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            "--wandb_log=True: wandb is not installed; pip install 'fastgpt[wandb]', or give --wandb_log=False"
        ) from None
    if not hasattr(wandb, "init"):
        raise UserError(f"--wandb_log=True: {wandb.__path__} is a folder, not the package wandb; run elsewhere")
    return wandb
