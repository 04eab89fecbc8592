"""What a result says of the machine and the source that made it."""

import platform
import statistics
import subprocess
import threading
from pathlib import Path

import torch

from fastgpt.benchmarks import harness


def output(*words):
    """What a program prints, stripped; "" where it fails or is not there."""
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


class Watch:
    """The SMs' clock and the GPU's power, five times a second while something is timed, from nvidia-smi."""

    def __init__(self):
        self.process, self.columns = None, {"sm_mhz": [], "power_w": []}
        if harness.CUDA and driver():
            gpu = f"GPU-{torch.cuda.get_device_properties(0).uuid}"  # nvidia-smi does not heed CUDA_VISIBLE_DEVICES
            query = ["--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-lms", "200", "-i", gpu]
            pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            self.process = subprocess.Popen(["nvidia-smi", *query], **pipes)
            threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            for values, word in zip(self.columns.values(), line.split(","), strict=False):
                if harness.busy.is_set() and word.strip().replace(".", "", 1).isdigit():  # else [N/A]
                    values.append(float(word))

    def stop(self):
        """End the watch: {"sm_mhz": [least, median, greatest], "power_w": ...}, or None."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = None
        return {k: [min(v), statistics.median(v), max(v)] for k, v in self.columns.items() if v} or None


def gpu_name():
    """The GPU's name, or the CPU's."""
    if harness.CUDA:
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def driver():
    """The version of NVIDIA's driver, or None."""
    return output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0] or None


def commit():
    """{"id", "dirty"} of the source's commit; "unknown" outside of a checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    dirty = output(*git, "status", "--porcelain", "--untracked-files=no")
    return {"id": output(*git, "rev-parse", "HEAD") or "unknown", "dirty": bool(dirty)}
