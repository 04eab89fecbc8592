"""How long functions take: the GPU's time, and apart from it the host's.

Events around a few calls measure Python wherever the host is slower than the GPU: a LayerNorm of 95 us would count as 350. So the GPU's
time is that of a CUDA graph's replays. What cannot be captured is queued behind a kernel that keeps the GPU busy meanwhile.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastgpt import graphs

ROUNDS = 7
SAMPLE_MS = 1.0  # of GPU time, at least, between two events
SLEEP_CYCLES_PER_MS = 2_000_000  # of torch.cuda._sleep: no GPU's clock is above 2 GHz by much


class Times(NamedTuple):
    """Milliseconds of a call: on the GPU, and of the host to launch it."""

    gpu: float
    host: float


def together(functions: dict[Any, list[Callable]]) -> dict[Any, Times]:
    """{name: its Times, medians} of {name: calls}; see `gpu_rounds`."""
    host = {name: host_ms(calls) for name, calls in functions.items()}
    return {name: Times(statistics.median(ms), host[name]) for name, ms in gpu_rounds(functions).items()}


def gpu_rounds(functions: dict[Any, list[Callable]]) -> dict[Any, list[float]]:
    """{name: [milliseconds of one call on the GPU, one for each round]} of {name: calls}.

    The calls of a name do the same on inputs of their own. Every round runs all names, so that they share clock rates and heat.
    """
    issues = {name: issue(calls) for name, calls in functions.items()}
    samples = dict.fromkeys(functions, 1)
    for name, f in issues.items():
        samples[name] = max(1, round(SAMPLE_MS / max(sample(f, 1), 1e-3)))
    times = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, f in issues.items():
            times[name].append(sample(f, samples[name]) / len(functions[name]))
    return times


def issue(calls: list[Callable]) -> tuple[Callable, float]:
    """(a function that launches all calls, host milliseconds that must pass while it does): a graph's replay, if they can be captured."""

    def run():
        for call in calls:
            call()

    run()  # compilers and caches
    with graphs.waits() as seen:
        run()
    if not seen:
        try:
            replay, _, _ = graphs.capture(run, None)
            return replay, 0.0
        except graphs.CaptureEnded:
            raise
        except Exception:  # whatever else a graph cannot hold is launched as it is
            torch.cuda.synchronize()
    return run, 2 * len(calls) * host_ms(calls)


def sample(issued: tuple[Callable, float], repeats: int) -> float:
    """GPU milliseconds of one launch, the mean of `repeats`; of a single one where launches must be queued: a queue is not endless."""
    f, host = issued
    repeats = 1 if host else repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if host:
        torch.cuda._sleep(int(SLEEP_CYCLES_PER_MS * host))
    start.record()
    for _ in range(repeats):
        f()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def host_ms(calls: list[Callable]) -> float:
    """The median milliseconds in which the host launches a call, while the GPU has nothing else to do."""
    for call in calls:
        call()
    times = []
    for call in calls * -(-9 // len(calls)):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)
