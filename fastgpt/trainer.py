"""nanoGPT's training loop, with its data order, schedule, evaluations and checkpoints."""

import itertools
import math
import time
from collections.abc import Collection
from dataclasses import asdict, replace
from typing import Any

import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InductorError

import fastgpt
from fastgpt import checkpoint as checkpoints
from fastgpt import (
    data,
    distributed,
    graphs,
    health,
    huggingface,
    metrics,
    ops,
    optim,
    runner,
    sharded,
    signals,
    tokenizer,
    tracker,
)
from fastgpt.config import RESIDUAL, Diverged, TrainConfig, UserError
from fastgpt.micro_batch import merge, sequence_bytes, what_fits
from fastgpt.model import GPT, new_gpt
from fastgpt.opening import begin_or_resume, check_parallel, check_residual, data_digest, digest, find_separator, hold
from fastgpt.reporter import Quiet, Reporter, tell
from fastgpt.shadows import Shadows, shadow_dtype
from fastgpt.step import evaluate, micro_step, mixed_precision, train_step

# Settings in which processes may differ: names of places, and what only the main process does.
MAY_DIFFER = {
    "out_dir", "dataset", "train_data", "val_data", "preset", "device", "peak_flops", "join_timeout", "sample_tokens",
    "tracker", "wandb_log", "wandb_project", "wandb_run_name", "overwrite", "save_minutes", "keep", "async_checkpoint",
    "sample_every_eval",
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
        report: Any = Reporter(cfg, given) if world.is_main else Quiet()
        with graphs.stream(world), hold(cfg, world), report:
            try:
                run = Run(cfg, given, world, report)
                run.loop()
            finally:
                if run:
                    run.writer.wait()
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
    return Again(reason, flag, *["--init_from=resume"] * bool(run and run.writer.saved))


class Run:
    """One training run. The constructor makes and checks everything before the first iteration."""

    def __init__(self, cfg: TrainConfig, given: Collection[str], world: distributed.World, report: Any):
        self.began = time.perf_counter()
        self.world, self.report = world, report
        self.cuda = world.device.startswith("cuda")
        cfg = begin_or_resume(cfg, world)
        with distributed.agreement(world) as facts:
            saved, train_tokens, val_tokens = self.open(cfg, given)
            facts.update(self.facts(saved, train_tokens, val_tokens))
        self.make(given, saved, train_tokens, val_tokens)

    def open(self, cfg: TrainConfig, given: Collection[str]) -> tuple[dict[str, Any] | None, data.Tokens, data.Tokens]:
        """Read the checkpoint and the data, build the model, and check all that this process can check by itself."""
        world = self.world
        with distributed.main_first(world):  # before all that can fail in one process alone: the others would wait here
            train_tokens, val_tokens, self.meta, vocab_size = data.load_dataset(cfg)
        saved = sharded.load(cfg.out_dir, resume=True, whole=not world.sharded) if cfg.init_from == "resume" else None
        self.cfg = cfg = checkpoints.keep_shape(saved, cfg, given) if saved else cfg
        self.asked = runner.asked(cfg, given)
        self.micro_steps = distributed.share(cfg.gradient_accumulation_steps, world)  # nanoGPT's, in an iteration
        self.tokens = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size  # of all processes' iteration
        print(f"tokens per iteration will be: {self.tokens:,}")
        tracker.check(cfg)
        if cfg.sample_every_eval and not cfg.sample_tokens:
            raise UserError("--sample_every_eval=True: it says not how many tokens; give --sample_tokens=200")
        ops.parse(cfg.kernels)  # raises for a wrong word before any work
        check_residual(cfg, self.cuda)
        if cfg.init_scheme != "nanogpt" and not (saved or cfg.init_from == "scratch"):
            raise UserError(f"--init_scheme={cfg.init_scheme}: the weights are those of {cfg.init_from}; leave it out")
        check_parallel(cfg, self.cuda)
        torch.manual_seed(cfg.seed + world.rank)
        self.dtype, self.autocast, self.scaler = mixed_precision(world.device, cfg.dtype)

        if saved:
            checkpoints.check_dataset(saved, cfg, self.meta)
            checkpoints.say_changes(saved, cfg)
        self.model = self.build_model(saved, vocab_size, "activation" in given).to(world.device)
        self.model.set_recompute(cfg.recompute)
        self.model.set_residual(RESIDUAL[cfg.residual])
        if cfg.doc_mask:
            self.model.set_doc_mask(find_separator(self.meta, train_tokens))
        for tokens in (train_tokens, val_tokens):
            tokens.vocab_size = min(tokens.vocab_size, self.model.config.vocab_size)
            tokens.check_ids()
        if not saved and cfg.init_from != "scratch":
            first = train_tokens.read([0], min(len(train_tokens), 256))[0].tolist()
            huggingface.compare_tokenizers(cfg.init_from, self.model.config.vocab_size, self.meta, first)
        if cfg.sample_tokens and world.is_main and not world.sharded:
            self.tokenizer = tokenizer.from_meta(self.meta)  # raises for one that cannot be loaded, before any work
        return saved, train_tokens, val_tokens

    def facts(self, saved: dict[str, Any] | None, *streams: data.Tokens) -> dict[str, Any]:
        """What all processes must have alike: settings, checkpoint, data, versions. Paths may differ, if the same lies there."""
        facts = {f"--{name}": value for name, value in self.cfg.model_dump().items() if name not in MAY_DIFFER}
        facts |= {"the device": self.world.device.split(":")[0], "the runner": self.asked and self.asked.text}
        facts |= {"PyTorch": torch.__version__, "fastgpt": fastgpt.__version__}
        facts["the model"] = self.model.config
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
        self.parallelize()
        self.optimizer = self.model.configure_optimizers(
            cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2), "cuda" if self.cuda else "cpu"
        )
        self.iter_num, self.best_val_loss = 0, float("inf")
        self.before = metrics.Progress()  # up to this start
        if saved:
            self.restore_optimizer(saved, given)
        draws = self.restore_random_state(saved.get("fastgpt")) if saved else data.Draws()
        shape = (cfg.batch_size, cfg.block_size, world.device)
        self.batches = data.Batches(train_tokens, *shape, draws, merged=self.sequences // cfg.batch_size)
        # As in nanoGPT, evaluations draw from training's generator, unless a flag gives them windows of their own.
        self.eval_generator = None if cfg.eval_seed is None else torch.Generator()
        eval_draws = data.Draws(self.eval_generator)
        self.eval_batches: dict[str, Any] = {}
        for split, tokens in (("train", train_tokens), ("val", val_tokens)):
            first = cfg.eval_windows == "first"
            in_order = data.InOrder(tokens, cfg.eval_iters * cfg.batch_size, cfg.block_size) if first else None
            batches = data.Batches(tokens, *shape, in_order or eval_draws)
            self.eval_batches[split] = distributed.Shown(batches, world) if world.sharded else batches
        self.sample_batches = data.Batches(val_tokens, *shape)
        # After DDP has copied rank 0's weights to all. FSDP itself gathers weights in this dtype.
        if (dtype := shadow_dtype(self.model.kernels, self.dtype)) and not world.sharded:
            self.shadows = Shadows(self.model, dtype)

        self.graphs = self.make_graphs() if self.runner.graphs else None

        peak = cfg.peak_flops or metrics.peak_flops(world.device, cfg.dtype)
        at_peak = peak and self.model.estimate_mfu(self.accumulation * self.sequences, 1.0, peak)
        self.clock = metrics.Clock(lambda: torch.cuda.synchronize(world.device) if self.cuda else None)
        self.writer = checkpoints.Writer(cfg.out_dir, cfg.keep, cfg.async_checkpoint, tell, self.iter_num)
        self.watch = health.Watch(self.scaler)
        self.saved_at = time.monotonic()
        self.report.begin(cfg, world.device, world.size, self.iter_num, bool(saved), self.tokens, at_peak)
        self.batches.prefetch()

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
        self.sequences = -distributed.most(-merged, world) * cfg.batch_size
        self.accumulation = self.micro_steps * cfg.batch_size // self.sequences
        if self.cuda:
            free, _ = torch.cuda.mem_get_info(world.device)
            print(f"activations: about {self.sequences * takes / 1e9:.1f} GB, of {free / 1e9:.1f} GB that are free")

    def work(self) -> runner.Work:
        """What a micro-step of this run computes."""
        cfg = self.cfg
        several, replays = self.accumulation > 1, self.world.size == 1 or self.accumulation > 1
        modes = cfg.recompute, cfg.doc_mask, cfg.residual, replays, cfg.activation
        return runner.Work(self.model.config, self.sequences, several, cfg.kernels, str(self.dtype)[6:], *modes)

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

    def build_model(self, saved: dict[str, Any] | None, vocab_size: int, activation_given: bool) -> GPT:
        """The model of --init_from: new, from a checkpoint, or GPT-2's; cropped if block_size is smaller."""
        cfg = self.cfg
        if cfg.init_from == "scratch":
            print("Initializing a new model from scratch")
            return new_gpt(cfg.gpt_config(vocab_size), cfg.init_scheme, cfg.activation)
        if saved:
            print(f"Resuming training from {cfg.out_dir}")
            model = checkpoints.build_model(saved, cfg.dropout)
        else:
            print(f"Initializing from OpenAI GPT-2 weights: {cfg.init_from}")
            model = huggingface.load(cfg.init_from, cfg.dropout, cfg.activation if activation_given else "")
            self.cfg = cfg = cfg.model_copy(update={"activation": model.activation})
        shape = model.config
        padded = self.meta is not None and self.meta.get("tokenizer") == "huggingface" and vocab_size < shape.vocab_size
        if self.meta is not None and vocab_size != shape.vocab_size and not padded:
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
        for old, new in zip(saved["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True):
            old["fused"] = new["fused"]  # depends on this device, not on the one that saved
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.world.sharded:
            sharded.spread(self.optimizer)
            if "folder" in saved:
                sharded.load_tensors(saved["folder"], self.model, self.optimizer)
        self.iter_num, self.best_val_loss = saved["iter_num"], float(saved["best_val_loss"])
        for p, moments in self.optimizer.state.items():
            # Copies, which do not hold the file. If block_size was cropped, crop the moments too.
            whole = {k: v for k, v in moments.items() if not hasattr(v, "to_local")}
            moments.update({k: (v[: p.size(0)] if v.dim() else v).clone() for k, v in whole.items()})
        betas = [group["betas"] for group in self.optimizer.param_groups]
        decay, no_decay = self.optimizer.param_groups
        for group, (beta1, beta2) in zip((decay, no_decay), betas, strict=True):
            group["betas"] = cfg.beta1 if "beta1" in given else beta1, cfg.beta2 if "beta2" in given else beta2
        if "weight_decay" in given:
            decay["weight_decay"] = cfg.weight_decay

    def random_state(self) -> dict[str, Any]:
        """What a resumed run needs to draw the same random numbers: by process, and where others began the draws, by these."""
        draws = self.batches.draws
        shared = draws.states() if isinstance(draws, data.SharedDraws) else None
        own = {
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.world.device) if self.cuda else None,
            "offsets": torch.cat((self.batches.offsets, draws.left)),
        }
        return {"ranks": distributed.gather(own, self.world), "draws": shared}

    def restore_random_state(self, extra: dict[str, Any] | None) -> data.Draws | data.SharedDraws:
        """Restore the random state of a checkpoint, and its Progress. Returns the draws of its next batches.

        nanoGPT's checkpoints have no such state (`extra` is None): the batches then start again from the seed, as in nanoGPT.
        """
        self.before = metrics.Progress(tokens=self.iter_num * self.tokens)
        if extra is None:
            return data.Draws()
        cfg, world = self.cfg, self.world
        try:
            if "progress" in extra:
                self.before = metrics.Progress.restored(extra["progress"])
            if extra["scaler"]:
                self.scaler.load_state_dict(extra["scaler"])
            ranks, states = extra["ranks"], extra.get("draws") or extra["ranks"]
            if len(ranks) == world.size:
                mine = ranks[world.rank]
                torch.set_rng_state(mine["rng"])
                if self.cuda and mine["cuda_rng"] is not None:
                    torch.cuda.set_rng_state(mine["cuda_rng"], world.device)
            if states is ranks and len(ranks) == world.size:
                return data.Draws(None, mine["offsets"])
            sequences = cfg.gradient_accumulation_steps * cfg.batch_size
            if sequences % len(states):
                print(
                    f"begun by {len(states)} processes, which do not divide {sequences} sequences: batches start anew"
                )
                return data.Draws()
            print(f"begun by {len(states)} processes, resumed by {world.size}: the batches go on where they were")
            return data.SharedDraws(states, sequences, world.rank, world.size)
        except (KeyError, TypeError, AttributeError, RuntimeError) as e:
            path = checkpoints.checkpoint_path(self.cfg.out_dir)
            raise UserError(f"{path}: its key 'fastgpt' is damaged ({type(e).__name__}: {e}); remove it") from None

    def loop(self) -> None:
        """Train to max_iters. Evaluate and save every eval_interval iterations and at the end."""
        cfg, main = self.cfg, self.world.is_main
        with signals.deferred():
            self.clock.start()
            while True:
                lr = optim.learning_rate(self.iter_num, cfg)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                last = cfg.eval_only or self.iter_num >= cfg.max_iters
                if last or self.iter_num % cfg.eval_interval == 0:
                    self.clock.stop()
                    if len(self.watch):
                        self.look()
                    state = self.random_state()  # before the evaluation's draws: a resumed run evaluates here again
                    if self.world.takes_part and self.evaluate(lr):
                        self.save_evaluated(state)
                    elif self.world.size == 1:
                        self.react(state)
                    last = self.enough() or last
                    if cfg.sample_every_eval and not last and not self.world.sharded:
                        self.sample()
                    self.clock.start()
                if last:
                    break
                offsets = self.batches.offsets
                loss, grad_norm = train_step(
                    self.parallel, self.optimizer, self.scaler, self.batches, self.accumulation, self.autocast, cfg.grad_clip,
                    self.graphs, lambda loss: distributed.mean(loss, self.world),
                )  # fmt: skip
                self.clock.iterations += 1
                if self.clock.iterations == 1 and main:
                    self.clock.sync()
                    self.report.first(time.perf_counter() - self.began)
                self.watch.add(self.iter_num, offsets, loss, grad_norm)
                logged = self.iter_num % cfg.log_interval == 0
                looked = logged or len(self.watch) >= cfg.max_bad_steps
                seen = self.look() if looked else None
                if seen and logged and main:
                    self.report.iteration(self.iter_num, *seen, lr, self.clock.lap(), self.progress())
                self.iter_num += 1
                self.report.done()
                if self.world.size == 1 or looked:  # several processes must all see the same signal
                    self.react()
        if main:
            self.finish()

    def progress(self) -> metrics.Progress:
        """How far the run has come, up to the last lap or stop of its clock."""
        tokens = self.before.tokens + self.clock.iterations * self.tokens
        return replace(self.before, tokens=tokens, train_s=self.before.train_s + self.clock.seconds)

    def enough(self) -> bool:
        """Whether this evaluation ends the run, by --target_loss or --patience; says which. Every process must call it."""
        cfg, why = self.cfg, ""
        if cfg.eval_only or not (cfg.patience or cfg.target_loss):
            return False
        if self.world.is_main:
            val_loss, progress = self.losses["val"], self.progress()
            if cfg.target_loss and val_loss <= cfg.target_loss:
                why = (
                    f"val loss {val_loss:.4f}: --target_loss={cfg.target_loss} is reached after {self.iter_num} iterations, "
                    f"{progress.tokens:,} tokens and {progress.train_s:.1f} s of training, evaluations apart"
                )
            elif cfg.patience and progress.waited >= cfg.patience:
                why = (
                    f"no better val loss than {self.best_val_loss:.4f} in {progress.waited} evaluations: "
                    f"--patience={cfg.patience} ends the run after {self.iter_num} iterations"
                )
            if why:
                tell(why)
        return bool(distributed.most(int(bool(why)), self.world))

    def look(self) -> tuple[float, float]:
        """Wait for the GPU, and look at the updates since the last look. Returns the last one's (loss, gradient norm).

        Raises Diverged after max_bad_steps updates in a row that were left out.
        """
        for bad in self.watch.look():
            self.report.left_out(bad)
            if bad.in_a_row >= self.cfg.max_bad_steps:
                raise Diverged(self.why(bad))
        return self.watch.last

    def why(self, bad: health.LeftOut) -> str:
        """What ends the run, in words, with this update. Every process must call it."""
        culprit = health.first_not_finite(self.model)
        if culprit is None:
            (x, y), copied = self.batches.read(bad.offsets.tolist())
            if copied is not None:
                torch.cuda.current_stream(self.world.device).wait_event(copied)
            self.optimizer.zero_grad(set_to_none=True)
            micro_step(self.model, x, y, self.scaler, self.accumulation, self.autocast, not self.world.sharded)
            culprit = health.first_not_finite(self.model, gradients=True)
        at = ", ".join(map(str, bad.offsets[:4].tolist())) + ", ..." * (len(bad.offsets) > 4)
        return (
            f"iteration {bad.it}: loss or gradients are not finite in {bad.in_a_row} updates in a row, which were left out. "
            f"The first that is not finite: {culprit or 'none of the weights, and of the first micro-batch no gradient'}. "
            f"This batch begins at tokens {at} of the training data. {self.kept()}; try a lower --learning_rate"
        )

    def react(self, state: dict[str, Any] | None = None) -> None:
        """Save if --save_minutes have passed, or if a signal came: then raise signals.Stopped. Every process must call it.

        state: the random_state with which a resumed run repeats this iteration's evaluation; None: there was no evaluation.
        """
        minutes = self.cfg.save_minutes
        due = minutes is not None and self.world.is_main and time.monotonic() - self.saved_at >= 60 * minutes
        signal = signals.received()
        wish = distributed.most(signal + 1 if signal else int(due), self.world)  # 1: save
        if not wish:
            return
        training = state is None
        if training:
            self.clock.stop()
        state = state or self.random_state()
        if self.world.takes_part:
            self.save(state, False)
        if training:
            self.clock.start()
        if wish > 1:
            self.writer.wait()
            done = self.writer.saved and self.writer.iteration == self.iter_num
            what = f"{self.writer.saved} is saved; --init_from=auto goes on from it" if done else "nothing new is saved"
            raise signals.Stopped(wish - 1, f"stopped after {self.iter_num} iterations; {what}")

    def evaluate(self, lr: float) -> bool:
        """Measure the loss of both splits, print it, and write it to the metrics. Returns False if a signal ended it: alone, without others
        that would have to know."""
        self.losses = {}
        for split, batches in self.eval_batches.items():
            if self.eval_generator is not None:
                self.eval_generator.manual_seed(self.cfg.eval_seed)  # type: ignore[arg-type]  # the same batches every time
            taken = itertools.takewhile(
                lambda _: self.world.size > 1 or not signals.received(), batches.take(self.cfg.eval_iters)
            )
            self.losses[split] = evaluate(self.compiled, taken, self.autocast)
            if self.world.size == 1 and signals.received():
                return False
        if self.world.sharded:
            self.losses = distributed.agree(lambda: self.losses, self.world)
        self.report.evaluation(self.iter_num, self.losses, lr, self.progress())
        return True

    def save_evaluated(self, state: dict[str, Any]) -> None:
        """Save if this evaluation is the best, or with always_save_checkpoint. Never with eval_only, or where it is not finite."""
        best = self.losses["val"] < self.best_val_loss
        self.best_val_loss = min(self.best_val_loss, self.losses["val"])
        self.before.evaluation(self.iter_num, best)
        if self.cfg.eval_only or not (best or self.cfg.always_save_checkpoint):
            return
        if not all(map(math.isfinite, self.losses.values())):
            tell(f"no new checkpoint: this evaluation is not finite; {self.kept()}")
            return
        self.save(state, best)

    def kept(self) -> str:
        """Which checkpoint stands, in words."""
        self.writer.wait()
        return next((f"{path} stays" for path in checkpoints.find(self.cfg.out_dir)), "no checkpoint was saved")

    def save(self, state: dict[str, Any], best: bool) -> None:
        """Save a checkpoint with this random_state; but not at iteration 0, and no weights that are not finite. With FSDP every process
        must call it."""
        if self.iter_num == 0 or self.cfg.eval_only:
            return
        if culprit := health.first_not_finite(self.model):
            tell(f"no new checkpoint: {culprit} is not finite; {self.kept()}")
            return
        tell(f"saving checkpoint to {self.cfg.out_dir}")
        whole = (
            {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            if not self.world.sharded
            else {}
        )
        checkpoint = {
            **whole,
            "model_args": asdict(self.model.config),
            "iter_num": self.iter_num,
            "best_val_loss": torch.tensor(self.best_val_loss),
            "config": self.cfg.model_dump(),
            "fastgpt": {
                "version": checkpoints.VERSION,
                "meta": self.meta,
                "scaler": self.scaler.state_dict(),
                "micro_batch": self.sequences,
                "progress": asdict(self.progress()),
                **state,
            },
        }
        if self.world.sharded:
            try:
                folder = sharded.save(checkpoint, self.model, self.optimizer, self.cfg.out_dir, self.world)
            except (UserError, SystemExit) as e:  # the main process raises the one, and says it, the others the other
                self.writer.failed = str(e)
                tell(f"{e}; the next save tries again")
                return
            self.writer.took(folder, self.iter_num, prune=self.world.is_main)
        else:
            self.writer.save(checkpoint, best)
        self.saved_at = time.monotonic()

    def sample(self) -> None:
        """Say a text that the model writes. What training draws, and the model's state, stay as they are."""
        if not (self.world.is_main and math.isfinite(self.losses["val"])):
            return
        self.model.eval()
        self.model.set_residual(torch.float32)  # as in `fastgpt sample`
        allowed = self.tokenizer.decodable(self.model.config.vocab_size).to(self.world.device)
        with torch.random.fork_rng([self.world.device] if self.cuda else []), self.autocast:
            start, _ = next(self.sample_batches.take(1))
            ids = self.model.generate(
                start[:1, :1], self.cfg.sample_tokens, temperature=0.8, top_k=200, allowed=allowed
            )
        self.model.train()
        self.model.set_residual(RESIDUAL[self.cfg.residual])
        known = [i for i in ids[0].tolist() if allowed[i]]  # the data may begin with an id that is no token
        self.report.sample(self.iter_num, self.tokenizer.decode(known))

    def finish(self) -> None:
        """Say how the run ended, write a sample, name all files. Raises UserError if it did not end well."""
        self.writer.wait()
        self.report.end(self.iter_num, self.losses, self.clock, self.model.get_num_params())
        if self.cfg.sample_tokens and self.world.sharded:
            print("a sample: none with --parallel=fsdp; `fastgpt sample` writes one from the checkpoint")
        elif self.cfg.sample_tokens:
            self.sample()
        if not math.isfinite(self.losses["val"]):
            raise Diverged(f"the last evaluation is not finite; {self.kept()}")
        if self.cfg.eval_only:
            return
        saved = self.writer.saved
        older = f" (iteration {self.writer.iteration})" if saved and self.writer.iteration < self.iter_num else ""
        self.report.paths(saved, older)
        if self.writer.failed:
            raise UserError(self.writer.failed)
