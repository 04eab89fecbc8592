"""The training loop: nanoGPT's, with its data order, schedule, evaluations and checkpoints."""

import shutil
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from fastgpt import checkpoint as checkpoints
from fastgpt import data, distributed, metrics, optim, tokenizer
from fastgpt.config import UserError
from fastgpt.model import GPT
from fastgpt.step import evaluate, train_step


def train(cfg, given=frozenset()):
    """Train as a TrainConfig says; `given` names the settings that the user gave. Raises UserError before any work."""
    world = distributed.init(cfg.device, cfg.backend)
    try:
        Run(cfg, given, world).loop()
    finally:
        distributed.finish(world)


class Run:
    """One training run: what is set up before the first iteration, and the loop."""

    def __init__(self, cfg, given, world):
        self.cfg, self.world = cfg, world
        if cfg.gradient_accumulation_steps % world.size:
            raise UserError(
                f"--gradient_accumulation_steps={cfg.gradient_accumulation_steps} cannot be shared by {world.size} processes; the nearest "
                f"multiple is {max(1, round(cfg.gradient_accumulation_steps / world.size)) * world.size}"
            )
        self.accumulation = cfg.gradient_accumulation_steps // world.size
        self.sequences = cfg.gradient_accumulation_steps * cfg.batch_size  # of an iteration, over all processes
        print(f"tokens per iteration will be: {self.sequences * cfg.block_size:,}")
        if world.is_main:
            check_writable(cfg.out_dir)
        wandb = import_wandb() if cfg.wandb_log and world.is_main else None

        torch.manual_seed(cfg.seed + world.rank)
        self.device_type = "cuda" if "cuda" in world.device else "cpu"  # nanoGPT's: on mps too, autocast stays off
        if self.device_type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        self.autocast = torch.autocast("cuda", dtype=getattr(torch, cfg.dtype)) if self.device_type == "cuda" else nullcontext()

        train_tokens, val_tokens, self.meta, vocab_size = data.load_dataset(cfg)
        for tokens in (train_tokens, val_tokens) if world.is_main else ():
            tokens.check_ids()
        self.tokens = {"train": train_tokens, "val": val_tokens}
        self.batches = self.make_batches("train")
        self.make_batches("val")  # too short a val.bin is found now, not at the first evaluation

        self.iter_num, self.best_val_loss = 0, float("inf")
        saved = checkpoints.load(cfg.out_dir) if cfg.init_from == "resume" else None
        self.model = self.build_model(saved, given, vocab_size).to(world.device)
        shape = self.model.config
        self.model_args = {k: getattr(shape, k) for k in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")}

        # Loss scaling is float16's; enabled elsewhere it would only cost.
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.device_type == "cuda" and cfg.dtype == "float16")
        self.optimizer = self.model.configure_optimizers(cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2), self.device_type)
        offsets = self.restore(saved, given) if saved else None
        if cfg.compile:
            print("compiling the model... (takes a ~minute)")
        self.compiled = torch.compile(self.model) if cfg.compile else self.model
        self.parallel = distributed.wrap(self.compiled, world)
        self.peak_flops = cfg.peak_flops or metrics.peak_flops(world.device, cfg.dtype)
        self.metrics = None
        if world.is_main:
            resumed = None if saved is None else float("inf") if cfg.eval_only else self.iter_num
            self.metrics = metrics.MetricsFile(cfg.out_dir, resumed)
        if wandb:
            wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name, config=cfg.model_dump())
        self.wandb = wandb
        self.batches.prefetch(offsets)

    def build_model(self, saved, given, vocab_size):
        """The model of init_from: new, from a checkpoint, or GPT-2's, cropped to a smaller block_size."""
        cfg = self.cfg
        if cfg.init_from == "scratch":
            print("Initializing a new model from scratch")
            return GPT(cfg.gpt_config(vocab_size))
        if saved is not None:
            print(f"Resuming training from {cfg.out_dir}")
            checkpoints.check_shape(saved, cfg, given, cfg.out_dir)
            model = checkpoints.build_model(saved, cfg.out_dir, cfg.dropout)
        else:
            print(f"Initializing from OpenAI GPT-2 weights: {cfg.init_from}")
            model = checkpoints.pretrained(cfg.init_from, cfg.dropout)
        if vocab_size > model.config.vocab_size and self.meta is not None:
            raise UserError(f"--dataset={cfg.dataset}: its vocabulary of {vocab_size} is larger than the model's {model.config.vocab_size}")
        for tokens in self.tokens.values():
            tokens.vocab_size = min(vocab_size, model.config.vocab_size)
        if cfg.block_size > model.config.block_size:
            raise UserError(f"--block_size={cfg.block_size}: the model of --init_from={cfg.init_from} has {model.config.block_size}; take that or less")
        if cfg.block_size < model.config.block_size:
            model.crop_block_size(cfg.block_size)
        return model

    def restore(self, saved, given):
        """Put optimizer, counters and random state back; the offsets of the batch under way, if the checkpoint has them."""
        cfg, path = self.cfg, checkpoints.checkpoint_path(self.cfg.out_dir)
        try:
            self.optimizer.load_state_dict(saved["optimizer"])
            self.iter_num, self.best_val_loss = saved["iter_num"], float(saved["best_val_loss"])
        except (KeyError, ValueError, TypeError) as e:
            raise UserError(f"{path}: its optimizer state does not fit this model ({type(e).__name__}: {e}); start from scratch") from None
        # The checkpoint's values stand, but for what the user asks for by name.
        decay, no_decay = self.optimizer.param_groups
        for group in (decay, no_decay):
            group["betas"] = tuple(cfg_value if name in given else old for name, cfg_value, old in zip(("beta1", "beta2"), (cfg.beta1, cfg.beta2), group["betas"], strict=True))
        if "weight_decay" in given:
            decay["weight_decay"] = cfg.weight_decay
        extra = saved.get("fastgpt")
        if extra is None:  # nanoGPT's own
            return None
        self.scaler.load_state_dict(extra["scaler"]) if extra["scaler"] else None
        if len(extra["ranks"]) != self.world.size:
            print(f"the checkpoint is of {len(extra['ranks'])} processes, this run of {self.world.size}: batches are drawn anew")
            return None
        mine = extra["ranks"][self.world.rank]
        torch.set_rng_state(mine["rng"].cpu())
        if mine["cuda_rng"] is not None and self.device_type == "cuda":
            torch.cuda.set_rng_state(mine["cuda_rng"].cpu(), self.world.device)
        same_batches = mine["offsets"].numel() == cfg.batch_size and int(mine["offsets"].max()) < len(self.tokens["train"]) - cfg.block_size
        return mine["offsets"].cpu() if same_batches else None

    def make_batches(self, split, generator=None):
        return data.Batches(self.tokens[split], self.cfg.batch_size, self.cfg.block_size, self.world.device, generator)

    def random_state(self):
        """What a resumed run needs to draw what this one would: per process, gathered on the main one."""
        cuda_rng = torch.cuda.get_rng_state(self.world.device) if self.device_type == "cuda" else None
        return distributed.gather({"rng": torch.get_rng_state(), "cuda_rng": cuda_rng, "offsets": self.batches.offsets}, self.world)

    def loop(self):
        """Train to max_iters; evaluate and save on the way and at the end."""
        cfg, world = self.cfg, self.world
        live = world.is_main and sys.stderr.isatty()
        clock = Clock(self.sync)
        with tqdm(total=cfg.max_iters, initial=self.iter_num, disable=not live, unit="it", dynamic_ncols=True) as bar:
            self.say = bar.write if live else lambda line: print(line, flush=True)
            clock.start()
            while True:
                lr = optim.learning_rate(self.iter_num, cfg)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                last = cfg.eval_only or self.iter_num >= cfg.max_iters
                if last or self.iter_num % cfg.eval_interval == 0:
                    with clock.paused():
                        self.evaluate_and_save(lr, clock)
                if last:
                    break
                loss, grad_norm = train_step(
                    self.parallel, self.optimizer, self.scaler, self.batches, self.accumulation, self.autocast, cfg.grad_clip
                )
                clock.count()
                if self.iter_num % cfg.log_interval == 0:
                    loss = distributed.mean(loss, world)
                    if world.is_main:
                        self.log(loss.item(), lr, grad_norm.item(), clock, bar if live else None)
                self.iter_num += 1
                if live:
                    bar.update()
        if world.is_main:
            self.finish(clock)

    def sync(self):
        if self.device_type == "cuda":
            torch.cuda.synchronize(self.world.device)

    def log(self, loss, lr, grad_norm, clock, bar):
        dt = clock.lap()
        tokens_per_s = self.sequences * self.cfg.block_size / dt
        mfu = self.model.estimate_mfu(self.sequences / self.world.size, dt, self.peak_flops) if self.peak_flops else None
        self.metrics.write(iter=self.iter_num, loss=loss, lr=lr, grad_norm=grad_norm, dt_ms=dt * 1e3, tokens_per_s=tokens_per_s, mfu=mfu)
        self.mfu = mfu
        mfu_text = "" if mfu is None else f", mfu {mfu * 100:.2f}%"
        if bar is not None:
            bar.set_postfix_str(f"loss {loss:.4f}{mfu_text}, {tokens_per_s:,.0f} tok/s")
        else:
            self.say(f"iter {self.iter_num}: loss {loss:.4f}, time {dt * 1000:.2f}ms{mfu_text}, {tokens_per_s:,.0f} tok/s")

    def evaluate_and_save(self, lr, clock):
        cfg = self.cfg
        state = self.random_state()  # before the evaluation draws: a resumed run evaluates here again
        if not self.world.is_main:
            return
        self.losses = {}
        for split in ("train", "val"):
            generator = None if cfg.eval_seed is None else torch.Generator().manual_seed(cfg.eval_seed)
            self.losses[split] = evaluate(self.compiled, self.make_batches(split, generator), cfg.eval_iters, self.autocast)
        self.say(f"step {self.iter_num}: train loss {self.losses['train']:.4f}, val loss {self.losses['val']:.4f}")
        self.metrics.write(iter=self.iter_num, train_loss=self.losses["train"], val_loss=self.losses["val"])
        if self.wandb:
            mfu = getattr(self, "mfu", None)
            self.wandb.log({"iter": self.iter_num, "train/loss": self.losses["train"], "val/loss": self.losses["val"], "lr": lr, "mfu": mfu and mfu * 100})
        best = self.losses["val"] < self.best_val_loss
        self.best_val_loss = min(self.best_val_loss, self.losses["val"])
        if self.iter_num > 0 and not cfg.eval_only and (best or cfg.always_save_checkpoint):
            self.say(f"saving checkpoint to {cfg.out_dir}")
            checkpoints.save(
                {
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "model_args": self.model_args,
                    "iter_num": self.iter_num,
                    "best_val_loss": torch.tensor(self.best_val_loss),
                    "config": cfg.model_dump(),
                    "fastgpt": {"meta": self.meta, "scaler": self.scaler.state_dict(), "ranks": state},
                },
                cfg.out_dir,
            )

    def finish(self, clock):
        """What a run ends with: losses, speed, a sample, the plot, and where everything lies."""
        cfg = self.cfg
        self.metrics.close()
        print(f"\niteration {self.iter_num}: train loss {self.losses['train']:.4f}, val loss {self.losses['val']:.4f} nats per token")
        if clock.iterations:
            speed = clock.iterations * self.sequences * cfg.block_size / clock.seconds
            print(f"{clock.iterations} iterations in {clock.seconds:.1f} s, evaluations apart: {speed:,.0f} tok/s")
        if cfg.sample_tokens:
            self.model.eval()
            tok = tokenizer.from_meta(self.meta)
            start = torch.tensor([tok.encode_prompt("\n")], device=self.world.device)
            with self.autocast:
                ids = self.model.generate(start, cfg.sample_tokens, temperature=0.8, top_k=200, n_vocab=tok.n_vocab)
            rule = "-" * min(80, shutil.get_terminal_size().columns)
            print(f"a sample:\n{rule}{tok.decode(ids[0].tolist())}\n{rule}")
        if cfg.eval_only:
            return
        out = Path(cfg.out_dir)
        records = metrics.read_metrics(out / "metrics.jsonl")
        metrics.plot_losses(records, out / "loss.png", f"{cfg.out_dir}: {self.model.get_num_params() / 1e6:.2f}M parameters on {cfg.dataset}")
        files = {"checkpoint": checkpoints.checkpoint_path(out), "metrics": out / "metrics.jsonl", "loss curve": out / "loss.png"}
        for what, path in files.items():
            print(f"{what:>10}: {path}" if path.exists() else f"{what:>10}: none yet")
        print(f"more text:  fastgpt sample --out_dir={cfg.out_dir}" + ("" if self.device_type == "cuda" else f" --device={self.world.device}"))


class Clock:
    """Seconds of training, evaluations apart. `sync` waits for the device, so that queued work counts where it was queued."""

    def __init__(self, sync):
        self.sync = sync
        self.seconds, self.iterations = 0.0, 0
        self.lap_seconds, self.lap_iterations = 0.0, 0

    def start(self):
        self.began = time.perf_counter()

    def count(self):
        self.iterations += 1

    def stop(self):
        self.sync()
        self.seconds += time.perf_counter() - self.began

    def paused(self):
        return Pause(self)

    def lap(self):
        """Mean seconds of an iteration since the last lap."""
        self.stop()
        self.start()
        dt = (self.seconds - self.lap_seconds) / max(1, self.iterations - self.lap_iterations)
        self.lap_seconds, self.lap_iterations = self.seconds, self.iterations
        return dt


class Pause:
    def __init__(self, clock):
        self.clock = clock

    def __enter__(self):
        self.clock.stop()

    def __exit__(self, *error):
        self.clock.start()


def check_writable(out_dir):
    """Make out_dir; raise UserError where it cannot be written."""
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir):
            pass
    except OSError as e:
        raise UserError(f"--out_dir={out_dir}: cannot be written ({e.strerror}); give another folder") from None


def import_wandb():
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb_log=True: wandb is not installed; pip install 'fastgpt[wandb]', or give --wandb_log=False") from None
    return wandb
