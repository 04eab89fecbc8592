"""The peak rates of GPUs, files of lines that outlive a full disk, the metrics, and the clock of a run."""

import json
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from fastgpt.config import UserError
from fastgpt.files import replacing

MOST_PENDING = 10_000  # records that wait for room on the disk, about 2 MB

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


class LineFile:
    """A file to which lines are added, each at once, so that it can be followed.

    A line that cannot be written, as on a full disk, is written before the next one. `say` tells when that begins and when it ends.
    Threads may share it.
    """

    def __init__(self, path: Path, say: Callable[[str], Any], kind: str):
        self.path, self.say, self.kind = path, say, kind
        self.file: FileIO | None = None
        self.pending: deque[bytes] = deque(maxlen=MOST_PENDING)
        self.failing = self.torn = False  # torn: the file ends within a line
        self.lock = threading.RLock()  # `say` may add a line to this very file

    def add(self, line: bytes) -> None:
        """Write a line, and those before it that could not be written."""
        with self.lock:
            self.pending.append(line + b"\n")
            self.flush()

    def flush(self) -> None:
        """Try to write what is pending."""
        try:
            if self.pending and self.file is None:
                self.file = open(self.path, "ab", buffering=0)
            while self.pending:
                line = b"\n" * self.torn + self.pending[0]
                written = self.file.write(line)  # type: ignore[union-attr]
                if written >= len(line) - 1:  # the line is whole, at least
                    self.pending.popleft()
                self.torn = written < len(line)  # the disk is full: the next try says so
        except OSError as e:
            failed, self.failing = self.failing, True
            if not failed:
                self.say(
                    f"{self.path}: cannot be written ({e.strerror}); the run goes on, and tries again at each {self.kind}"
                )
        else:
            failed, self.failing = self.failing, False
            if failed:
                self.say(f"{self.path}: written again")

    def close(self) -> None:
        with self.lock:
            self.flush()
            if self.pending:
                self.say(f"{self.path}: the last {len(self.pending)} {self.kind}s could not be written")
            if self.file:
                self.file.close()


class MetricsFile(LineFile):
    """out_dir/metrics.jsonl, an object a line: `iter`, `loss`, `lr`, `grad_norm`, `dt_ms`, `tokens_per_s`, `mfu`, `tokens`, `train_s` of a
    logged iteration, and `spike` where the loss is that many standard deviations above the last ones' mean; `iter`, `train_loss`,
    `val_loss`, `tokens`, `train_s` of an evaluation; `iter`, `left_out` (in a row), `offsets` of an update that was left out. What is
    unknown or not finite is null. `tokens` and `train_s` are Progress's.
    """

    def __init__(self, out_dir: str | Path, keep_before: float = math.inf, say: Callable[[str], Any] = print):
        super().__init__(Path(out_dir) / "metrics.jsonl", say, "record")
        try:
            lines = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []
            # Of an earlier run that this one goes on from, what came after its checkpoint will come again.
            kept = [line for line in lines if (r := parse_line(line)) and r["iter"] < keep_before]
            if kept != lines and keep_before < math.inf:
                with replacing(self.path) as f:
                    f.writelines(line.rstrip(b"\r\n") + b"\n" for line in kept)
            else:
                self.torn = bool(lines) and not lines[-1].endswith(b"\n")
            self.file = open(self.path, "ab", buffering=0)
        except OSError as e:
            raise UserError(f"{self.path}: cannot be written ({e.strerror}); give another --out_dir") from None

    def write(self, **record: Any) -> None:
        """Write a record, and those before it that could not be written."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.add(json.dumps(finite).encode())


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order. A line that is none, as one cut short by a crash, is left out."""
    lines = Path(path).read_bytes().splitlines() if Path(path).is_file() else []
    return [record for line in lines if (record := parse_line(line))]


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The record in a line of a metrics.jsonl, or None."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, a number of too many digits; lists in lists
        return None
    return record if isinstance(record, dict) and type(record.get("iter")) is int else None


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


@dataclass
class Progress:
    """How far a run has come, in all its starts together. Its checkpoint keeps it."""

    tokens: int = 0  # that it was trained on
    train_s: float = 0.0  # seconds of training, evaluations apart
    evaluated: int = -1  # the iteration of the last evaluation
    waited: int = 0  # evaluations in a row without a better val loss

    @classmethod
    def restored(cls, saved: Any) -> "Progress":
        """The Progress of a checkpoint. Raises TypeError for anything else."""
        progress = cls(**saved)
        for field in fields(cls):
            value = getattr(progress, field.name)
            if type(value) not in (int, float) or not -1 <= value < 2**62 or (field.name != "train_s" and value % 1):
                raise TypeError(f"progress: {field.name} is not a number that it can be")
        return progress

    def evaluation(self, iteration: int, better: bool) -> None:
        """Count an evaluation. The one that a resumed run repeats counts once."""
        self.waited = 0 if better else self.waited + (iteration > self.evaluated)
        self.evaluated = iteration
