"""What a benchmark run is: its options, its order, its budget, and what the result file says of the machine."""

import platform
import shutil
import signal
import statistics
import subprocess
import time

import pytest
import torch

from fastgpt.benchmarks import harness
from fastgpt.verify import versions


def pytest_addoption(parser):
    group = parser.getgroup("fastgpt")
    group.addoption("--budget", type=float, help="seconds for everything; what they do not reach is skipped")
    group.addoption("--quick", action="store_true", help="fewer cases and rounds")
    group.addoption("--profile-to", metavar="DIR", help="write a trace of each arm's step here, and its time by op")


def pytest_configure(config):
    config.addinivalue_line("markers", "importance(n): when a benchmark is due; 0 comes first")
    config.fastgpt_start = time.monotonic()
    config.fastgpt_left_out = {}
    config.fastgpt_watch = Watch()


def pytest_unconfigure(config):
    config.fastgpt_watch.stop()


def pytest_collection_modifyitems(items):
    items.sort(key=importance)  # stable


def importance(item):
    marker = item.get_closest_marker("importance")
    return marker.args[0] if marker else 50


def remaining(config):
    """Seconds of the budget that are left, or None without one."""
    budget = config.getoption("--budget")
    return None if budget is None else budget - (time.monotonic() - config.fastgpt_start)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    """Stop a benchmark where the budget ends, wherever it is."""
    left = remaining(item.config)
    reason = f"the budget of {item.config.getoption('--budget') or 0:.0f} s is spent"

    def stop(*_):
        raise pytest.skip.Exception(reason)  # no Exception: what catches those goes on

    before = signal.signal(signal.SIGALRM, stop)
    if left is not None:
        signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when != "teardown" and report.outcome in ("skipped", "failed"):
        why = report.longrepr[2] if report.outcome == "skipped" else str(call.excinfo.value).strip()
        lines = why.removeprefix("Skipped: ").splitlines() or [type(call.excinfo.value).__name__]
        kind = "" if report.outcome == "skipped" else f"FAILED: {type(call.excinfo.value).__name__}: "
        item.config.fastgpt_left_out[item.name] = kind + lines[0]


# ---- what the result file says of the machine ----


class Watch:
    """The clock of the SMs and the power of the GPU, twice a second while the run lasts, where nvidia-smi tells."""

    def __init__(self):
        self.process = None
        if torch.cuda.is_available() and shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-lms", "500", "-i", "0"]
            self.process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def stop(self):
        """{"sm_mhz": [least, median, greatest], "power_w": ...}, or None. Ends the watch."""
        if self.process is None:
            return None
        self.process.terminate()
        text, self.process = self.process.communicate()[0], None
        rows = [line.split(",") for line in text.splitlines()]
        columns = {"sm_mhz": [], "power_w": []}
        for row in rows:
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
    return subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()[:1] or None


def pytest_benchmark_update_json(config, benchmarks, output_json):
    step = [b["extra_info"] for b in output_json["benchmarks"] if b["extra_info"].get("kind") == "step"]
    kernels = [x["attention_kernel"] for x in step if x["provider"] == "compiled" and x.get("attention_kernel")]
    output_json["fastgpt"] = {
        "device": harness.DEVICE, "gpu": gpu_name(), "driver": (driver() or [None])[0],
        "versions": {**versions(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()},
        "ceilings": harness.ceilings(), "clocks": config.fastgpt_watch.stop(),
        "attention_kernel": kernels[0] if kernels else None,
        "budget_s": config.getoption("--budget"), "seconds": time.monotonic() - config.fastgpt_start,
        "quick": bool(config.getoption("--quick")),
        "left_out": [{"name": name, "why": why} for name, why in config.fastgpt_left_out.items()],
    }  # fmt: skip
