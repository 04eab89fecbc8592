"""What a run says and keeps of itself: its lines, the progress bar, train.log, metrics.jsonl, config.json, trackers, the summary."""

import json
import math
import os
import platform
import re
import secrets
import shlex
import sys
import time
from collections.abc import Collection
from contextlib import ExitStack, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fastgpt
from fastgpt import files, health, metrics, plot, signals, tracker
from fastgpt.config import TrainConfig, UserError

MOST_STARTS = 100  # of a run, that config.json keeps beside the first


def tell(line: str) -> None:
    """Print a line at once, above a progress bar if there is one."""
    try:
        tqdm.write(line)
        sys.stdout.flush()
    except OSError:  # the terminal is closed, or who read the pipe has ended
        if not signals.received():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the run is to be saved, whether somebody reads it or not


class Log:
    """A stream that also keeps in out_dir/train.log what is printed to it: when the run begins (`begin`), and from then on."""

    def __init__(self, out_dir: str | Path, stream: Any):
        self.stream = stream
        self.file = metrics.LineFile(Path(out_dir) / "train.log", tell, "line")
        self.begun, self.text = False, ""  # text: printed, but not yet in the file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.keep(text)
        return self.stream.write(text)

    def keep(self, text: str) -> None:
        """Keep a text that is not printed."""
        # The writer of checkpoints tells from a thread of its own, and `tell` takes this lock before the file's.
        with tqdm.get_lock():
            self.text += text
            if self.begun:
                *lines, self.text = self.text.split("\n")
                for line in lines:
                    self.file.add(line.encode(errors="replace"))

    def begin(self, line: str) -> None:
        """The run begins: mark the place."""
        self.begun, self.text = True, f"{line}\n{self.text}"
        self.keep("")

    def close(self) -> None:
        if self.begun:
            self.keep("\n" * bool(self.text))
            self.file.close()


class Quiet:
    """The Reporter of a process that is not the main one."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def __getattr__(self, name):
        return lambda *args, **more: None


class Reporter:
    """The main process's reports of a run. In its context all that is printed goes to train.log, too, if the run begins."""

    def __init__(self, cfg: TrainConfig, given: Collection[str]):
        """cfg, given: as the command said them."""
        self.out_dir = Path(cfg.out_dir)
        preset = {"preset": cfg.preset} if cfg.preset else {}  # which may be the default of a command without words
        self.given = preset | {name: value for name, value in cfg.model_dump().items() if name in given}
        self.log = Log(self.out_dir, sys.stdout)
        self.live = has_width(sys.stderr) and sys.stdout.isatty()  # not for `| tee log`, which needs lines
        self.spikes = health.Spikes()
        self.mfu: float | None = None
        self.trackers: Any = None
        self.bar: Any = None

    def __enter__(self):
        self.stack = ExitStack()
        self.stack.callback(self.log.close)
        self.stack.enter_context(redirect_stdout(self.log))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error:
            name = "error" if isinstance(error, UserError) else type(error).__name__
            begun = "\n" * bool(self.log.text)  # a line that could not be printed to its end
            self.log.keep(f"{begun}{name}: {' '.join(str(error).split())}\n")
        if self.bar:
            self.bar.close()
        if self.trackers:
            self.trackers.close(failed=error is not None)
        self.stack.close()

    def begin(
        self,
        cfg: TrainConfig,
        device: str,
        processes: int,
        start: int,
        resumed: bool,
        tokens: int,
        at_peak: float | None,
    ) -> None:
        """Open the files of a run that begins, with iteration `start`.

        tokens: of an iteration. at_peak: the MFU if an iteration took a second; None: the device's peak is unknown. Raises UserError.
        """
        self.cfg, self.tokens, self.at_peak = cfg, tokens, at_peak
        path = self.out_dir / "config.json"
        before = earlier(path) if resumed else {}
        # An evaluation alone is a run of its own for trackers: another process may be training this one.
        run_id = (not cfg.eval_only and before.get("id")) or secrets.token_hex(8)
        now, command = time.strftime("%Y-%m-%d %H:%M:%S %z"), shlex.join([program(), *sys.argv[1:]])
        self.trackers = tracker.Trackers(cfg, run_id, start, tell)
        self.metrics = metrics.MetricsFile(self.out_dir, math.inf if cfg.eval_only else start if resumed else 0, tell)
        self.log.begin(f"---- {now}, from iteration {start}: {command}")
        self.bar = tqdm(
            total=cfg.max_iters, initial=start, disable=not self.live, unit="it", dynamic_ncols=True, file=sys.stderr
        )
        if cfg.eval_only:
            return  # no start of the run: another process may be training it
        starts = [*before.pop("earlier", []), before] if before else []
        starts[1:-MOST_STARTS] = []  # the first one, and the last ones
        config = dict(
            id=run_id, started=now, iteration=start, command=command, given=self.given, settings=cfg.model_dump(),
            versions=versions(), device=device_name(device), processes=processes, earlier=starts,
        )  # fmt: skip
        try:
            with files.replacing(path) as f:
                f.write(json.dumps(config, indent=1).encode())
        except OSError as e:
            tell(f"{path}: cannot be written ({e.strerror}); the run goes on without it")

    def first(self, seconds: float) -> None:
        """The first iteration is done, seconds after the start."""
        tell(f"the first iteration is done {seconds:.1f} s after the start, evaluation included")

    def iteration(
        self, iteration: int, loss: float, grad_norm: float, lr: float, seconds: float, progress: metrics.Progress
    ) -> None:
        """Say and keep an iteration that is to be logged, which took so many seconds."""
        speed = self.tokens / seconds
        self.mfu = self.at_peak and self.at_peak / seconds
        height = self.spikes.height(loss) if math.isfinite(loss) else None
        self.metrics.write(
            iter=iteration, loss=loss, lr=lr, grad_norm=grad_norm, dt_ms=seconds * 1e3, tokens_per_s=speed, mfu=self.mfu,
            tokens=progress.tokens, train_s=progress.train_s, **({} if height is None else {"spike": height}),
        )  # fmt: skip
        self.trackers.log(
            iteration,
            **{"train/batch_loss": loss},
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_s=speed,
            mfu=percent(self.mfu),
        )
        mfu = "" if self.mfu is None else f"mfu {self.mfu * 100:.2f}%, "
        said, took, speeds = f"loss {loss:.4f}", f"time {seconds * 1000:.2f}ms", f"{mfu}{speed:,.0f} tok/s"
        self.bar.set_postfix_str(f"{said}, {speeds}")
        line = f"iter {iteration}: {said}, {took}, {speeds}"
        if self.live:
            self.log.keep(f"{line}\n")
        else:
            tell(line)

    def done(self) -> None:
        """An iteration is done."""
        self.bar.update()

    def left_out(self, bad: health.LeftOut) -> None:
        """Say and keep an update that was left out."""
        tell(
            f"iter {bad.it}: loss {bad.loss:.4f}, gradient norm {bad.norm:.4g}: not finite, so this update was left out"
        )
        self.metrics.write(iter=bad.it, left_out=bad.in_a_row, offsets=bad.offsets.tolist())

    def evaluation(self, iteration: int, losses: dict[str, float], lr: float, progress: metrics.Progress) -> None:
        """Say and keep an evaluation."""
        train_loss, val_loss = losses["train"], losses["val"]
        tell(f"step {iteration}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        self.metrics.write(
            iter=iteration, train_loss=train_loss, val_loss=val_loss, tokens=progress.tokens, train_s=progress.train_s
        )
        self.trackers.log(iteration, **{"train/loss": train_loss, "val/loss": val_loss}, lr=lr, mfu=percent(self.mfu))

    def sample(self, iteration: int, text: str) -> None:
        """Say a text that the model wrote."""
        tell(f"a sample:\n{'-' * 80}\n{text}\n{'-' * 80}")
        self.trackers.text(iteration, text)

    def end(self, iteration: int, losses: dict[str, float], clock: metrics.Clock, parameters: int) -> None:
        """Print the final losses and the speed; draw the loss curve."""
        self.bar.close()
        self.metrics.close()
        train_loss, val_loss = losses["train"], losses["val"]
        print(f"\niteration {iteration}: train loss {train_loss:.4f}, val loss {val_loss:.4f} nats per token")
        if clock.iterations:
            speed = self.tokens * clock.iterations_per_s()
            print(f"{clock.iterations} iterations in {clock.seconds:.1f} s, evaluations apart; {speed:,.0f} tok/s")
        if not self.cfg.eval_only:
            title = f"{parameters / 1e6:.2f}M parameters on {self.cfg.dataset}"
            try:
                plot.plot_losses(metrics.read_metrics(self.metrics.path), self.out_dir / "loss.png", title)
            except OSError as e:
                print(f"no loss curve: {e}")

    def paths(self, saved: Path | None, older: str) -> None:
        """Print where everything lies. older: what is to be said of the checkpoint."""
        print(f"checkpoint: {saved or 'none saved'}{older}\nmetrics:    {self.metrics.path}")
        print(f"loss curve: {self.out_dir / 'loss.png'}")
        if saved:
            device = "" if self.cfg.device.startswith("cuda") else f" --device={self.cfg.device}"
            print(f"more text:  fastgpt sample --out_dir={shlex.quote(self.cfg.out_dir)}{device}")


def earlier(path: Path) -> dict[str, Any]:
    """What config.json says of the start before this one; its settings are left out. Empty where there is none that can be read."""
    try:
        found = files.read_json(path, files.DATA)
        if not isinstance(found, dict) or not isinstance(found.get("earlier", []), list):
            raise ValueError("no settings of a run")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        tell(f"{path}: not read ({e}); what it says of earlier starts is lost")
        return {}
    found.pop("settings", None)
    run_id = found.get("id")
    return {**found, "id": run_id if isinstance(run_id, str) and re.fullmatch("[0-9a-f]{16}", run_id) else None}


def program() -> str:
    """The command's name, as it would be written again."""
    name = Path(sys.argv[0]).name
    return "fastgpt" if name in ("cli.py", "__main__.py") else name


def versions() -> dict[str, str | None]:
    """{name: version} of what a run's numbers depend on."""
    try:
        triton: str | None = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {
        "fastgpt": fastgpt.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
    }


def device_name(device: str) -> str:
    """A device's name as its maker calls it, where it is known."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def has_width(stream: Any) -> bool:
    """Whether a stream is a terminal on which something can be drawn."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        return False


def percent(share: float | None) -> float | None:
    return None if share is None else share * 100
