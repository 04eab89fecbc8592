"""The peak rates of GPUs, the metrics file, the clock of a run, and the loss curve."""

import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastgpt.config import UserError

# (FLOP/s, bytes/s) of a GPU, from NVIDIA's data sheets (GeForce: the architecture white papers). FLOP/s are dense, of bf16 and fp16 with
# fp32 accumulation. The first name that the GPU's own name has as whole words counts. A laptop's GPU is another one.
PEAKS = {
    "B300": (2.25e15, 8e12),
    "B200": (2.25e15, 8e12),
    "GH200": (989e12, 4.9e12),
    "H200 NVL": (835e12, 4.8e12),
    "H200": (989e12, 4.8e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100 NVL": (835e12, 3.9e12),
    "H100": (989e12, 3.35e12),
    "A100": (312e12, 2.039e12),  # of 80 GB; 40 GB have 1.555e12 bytes/s
    "A800": (312e12, 2.039e12),
    "L40S": (362e12, 864e9),
    "L40": (181e12, 864e9),
    "L4": (121e12, 300e9),
    "RTX 6000 Ada": (364e12, 960e9),
    "A6000": (155e12, 768e9),
    "A40": (150e12, 696e9),
    "A30": (165e12, 933e9),
    "A10G": (70e12, 600e9),
    "A10": (125e12, 600e9),
    "RTX 5090": (209.5e12, 1.792e12),
    "RTX 4090": (165.2e12, 1.008e12),
    "RTX 4080": (97.5e12, 716.8e9),
    "RTX 3090": (71e12, 936e9),
    "V100": (125e12, 900e9),
    "T4": (65e12, 320e9),
}


def peaks(name: str) -> tuple[float, float] | None:
    """(FLOP/s, bytes/s) of a GPU by its name, or None where it is not in PEAKS."""
    if "laptop" in name.lower():
        return None
    return next((rates for gpu, rates in PEAKS.items() if re.search(rf"\b{gpu}\b", name, re.IGNORECASE)), None)


def peak_flops(device: str | torch.device, dtype: str) -> float | None:
    """Peak FLOP/s of a device in a dtype ("bfloat16", "float16" or "float32", which runs as TF32), or None where unknown."""
    rates = peaks(torch.cuda.get_device_name(device)) if str(device).startswith("cuda") else None
    if rates is None or dtype != "float32":
        return rates and rates[0]
    # From Ampere on TF32 runs at half of bf16's rate. Older GPUs have no TF32, and their fp32 rate is not in the table.
    return rates[0] / 2 if torch.cuda.get_device_capability(device) >= (8, 0) else None


class MetricsFile:
    """out_dir/metrics.jsonl, an object a line: `iter`, `loss`, `lr`, `grad_norm`, `dt_ms`, `tokens_per_s`, `mfu` of a logged
    iteration, and `spike` where the loss is that many standard deviations above the last ones' mean; `iter`, `train_loss`, `val_loss`
    of an evaluation; `iter`, `left_out` (in a row), `offsets` of an update that was left out. What is unknown or not finite is null."""

    def __init__(self, out_dir: str | Path, keep_before: float = 0):
        self.path = Path(out_dir) / "metrics.jsonl"
        # Of an earlier run that this one goes on from, what came after its checkpoint will come again.
        kept = [r for r in read_metrics(self.path) if r["iter"] < keep_before]
        try:
            self.file = open(self.path, "w", encoding="utf-8", buffering=1)  # line by line, so that it can be followed
        except OSError as e:
            raise UserError(f"{self.path}: cannot be written ({e.strerror}); give another --out_dir") from None
        for record in kept:
            self.write(**record)

    def write(self, **record: Any) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.file.write(json.dumps(finite) + "\n")

    def close(self) -> None:
        self.file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order; a last line cut short by a crash is left out."""
    records = []
    if Path(path).is_file():
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break
            if isinstance(record, dict) and isinstance(record.get("iter"), int):
                records.append(record)
    return records


class Clock:
    """Seconds and iterations of training, evaluations apart.

    `sync` waits for the device, so that queued work counts where it was queued. Set `iterations` on at each.
    """

    def __init__(self, sync: Callable[[], Any]):
        self.sync = sync
        self.seconds, self.iterations = 0.0, 0
        self.laps = [(0.0, 0)]

    def start(self) -> None:
        self.began = time.perf_counter()

    def stop(self) -> None:
        self.sync()
        self.seconds += time.perf_counter() - self.began

    def lap(self) -> float:
        """Mean seconds of an iteration since the last lap."""
        self.stop()
        self.start()
        seconds, iterations = self.laps[-1]
        self.laps = [*self.laps[:2], (self.seconds, self.iterations)]
        return (self.seconds - seconds) / (self.iterations - iterations)

    def iterations_per_s(self) -> float:
        """Of all iterations, less those of the first lap where there are more: they may have waited for a compiler."""
        seconds, iterations = self.laps[min(1, len(self.laps) - 1)]
        if iterations == self.iterations:
            seconds, iterations = 0.0, 0
        return (self.iterations - iterations) / (self.seconds - seconds)


def plot_losses(records: list[dict[str, Any]], path: str | Path, title: str) -> None:
    """Draw the loss curves of metrics records into a PNG: training loss by iteration, evaluations as points."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    steps = [r for r in records if r.get("loss") is not None]
    evals = [r for r in records if r.get("val_loss") is not None]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([r["iter"] for r in steps], [r["loss"] for r in steps], lw=1, alpha=0.6, label="training batches")
    for key, style, label in (("train_loss", "o--", "train, evaluated"), ("val_loss", "o-", "held out, evaluated")):
        axes.plot([r["iter"] for r in evals], [r[key] for r in evals], style, ms=4, label=label)
        if evals:
            axes.annotate(
                f"{evals[-1][key]:.3f}",
                (evals[-1]["iter"], evals[-1][key]),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
            )
    axes.set(xlabel="iteration", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_xlim(right=axes.get_xlim()[1] * 1.05)  # room for the last values
    figure.savefig(path)
