"""What a result says of the machine that made it."""

import platform
import shutil
import statistics
import subprocess
import threading
from pathlib import Path

import torch

from fastgpt.benchmarks import harness


class Watch:
    """The clock of the SMs and the power of the GPU, five times a second while something is timed, where nvidia-smi tells."""

    def __init__(self):
        self.process, self.rows = None, []
        if torch.cuda.is_available() and shutil.which("nvidia-smi"):
            gpu = f"GPU-{torch.cuda.get_device_properties(0).uuid}"  # CUDA_VISIBLE_DEVICES counts otherwise than nvidia-smi
            query = ["--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-lms", "200", "-i", gpu]
            pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            self.process = subprocess.Popen(["nvidia-smi", *query], **pipes)
            threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            if harness.busy:
                self.rows.append(line.split(","))

    def stop(self):
        """{"sm_mhz": [least, median, greatest], "power_w": ...}, or None. Ends the watch."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = None
        columns = {"sm_mhz": [], "power_w": []}
        for row in self.rows:
            for name, word in zip(columns, row, strict=False):
                try:
                    columns[name].append(float(word))
                except ValueError:  # [N/A]
                    continue
        return {k: [min(v), statistics.median(v), max(v)] for k, v in columns.items() if v} or None


def gpu_name():
    """The GPU's name, or the CPU's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = open("/proc/cpuinfo").read().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def driver():
    """The version of NVIDIA's driver, or None."""
    if not (torch.cuda.is_available() and shutil.which("nvidia-smi")):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0].strip() or None


def commit():
    """{"id", "dirty"} of the source's commit; "unknown" outside a checkout."""

    def git(*words):
        try:
            done = subprocess.run(
                ["git", "-C", str(Path(__file__).resolve().parent), *words], capture_output=True, text=True
            )
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    return {
        "id": git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
    }
