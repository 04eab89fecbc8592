"""Trackers: what a run sends to TensorBoard or Weights & Biases beside its own files. A tracker that fails never ends the run."""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from fastgpt.config import TrainConfig, UserError


def names(cfg: TrainConfig) -> list[str]:
    """The trackers that a TrainConfig asks for. nanoGPT's --wandb_log=True asks for wandb."""
    asked = {cfg.tracker: None} | ({"wandb": None} if cfg.wandb_log else {})
    return [name for name in asked if name != "none"]


def check(cfg: TrainConfig) -> None:
    """Raise UserError if a tracker that is asked for is not installed."""
    for name in names(cfg):
        flag = "--wandb_log=True" if cfg.wandb_log and name == "wandb" else f"--tracker={name}"
        try:
            TRACKERS[name].find()
        except ImportError as e:
            raise UserError(
                f"{flag}: {name} cannot be imported ({e}); pip install {name}, or leave the flag out"
            ) from None


class TensorBoard:
    """Event files in out_dir/tensorboard. A run that goes on replaces what came after its checkpoint."""

    @staticmethod
    def find() -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter

    def __init__(self, cfg: TrainConfig, run_id: str, start: int):
        self.writer = self.find()(str(Path(cfg.out_dir) / "tensorboard"), purge_step=None if cfg.eval_only else start)

    def log(self, iteration: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, iteration)

    def text(self, iteration: int, text: str) -> None:
        self.writer.add_text("sample", f"```\n{text}\n```", iteration)

    def close(self, failed: bool) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases. Its id is the run's own: what goes on has the same id, and so the same curves."""

    @staticmethod
    def find() -> Any:
        import wandb

        if not hasattr(wandb, "init"):
            raise ImportError(f"{next(iter(wandb.__path__))} is a folder, not the package; run elsewhere")
        return wandb

    def __init__(self, cfg: TrainConfig, run_id: str, start: int):
        settings = dict(config=cfg.model_dump(), resume="allow", id=run_id)
        self.run = self.find().init(project=cfg.wandb_project, name=cfg.wandb_run_name, **settings)
        self.run.define_metric("*", step_metric="iter")

    def log(self, iteration: int, values: dict[str, float]) -> None:
        self.run.log({"iter": iteration, **values})

    def text(self, iteration: int, text: str) -> None:
        self.run.log({"iter": iteration, "sample": self.find().Html(f"<pre>{escape(text)}</pre>")})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": Wandb}


class Trackers:
    """The trackers of a run. `say` tells in a line which of them failed: nothing more is sent to that one."""

    def __init__(self, cfg: TrainConfig, run_id: str, start: int, say: Callable[[str], Any]):
        self.say = say
        self.open: dict[str, Any] = {}
        for name in names(cfg):
            try:
                self.open[name] = TRACKERS[name](cfg, run_id, start)
            except Exception as e:  # a login, a network, a disk
                if start == 0:
                    raise UserError(
                        f"{name}: it does not start ({reason(e)}); mend that, or leave the tracker out"
                    ) from None
                say(f"{name}: it does not start ({reason(e)}); the run goes on without it")

    def log(self, iteration: int, **values: float | None) -> None:
        """Send numbers of an iteration by name. What is None is left out."""
        known = {name: value for name, value in values.items() if value is not None}
        self.each(lambda tracker: tracker.log(iteration, known))

    def text(self, iteration: int, text: str) -> None:
        """Send a sample."""
        self.each(lambda tracker: tracker.text(iteration, text))

    def close(self, failed: bool) -> None:
        self.each(lambda tracker: tracker.close(failed))
        self.open.clear()

    def each(self, call: Callable[[Any], Any]) -> None:
        for name, tracker in list(self.open.items()):
            try:
                call(tracker)
            except Exception as e:
                del self.open[name]
                self.say(f"{name}: {reason(e)}; the run goes on without it")


def reason(e: Exception) -> str:
    """An error as a short line."""
    return " ".join(f"{type(e).__name__}: {e}".split())[:300]
