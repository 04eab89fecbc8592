"""How long functions take: the GPU's time, and apart from it the host's.

Events around a few calls measure Python wherever the host is slower than the GPU: a LayerNorm of 95 us would count as 350. So the calls
are queued behind a kernel that keeps the GPU busy until the host has launched them all.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

ROUNDS = 7
SLEEP_CYCLES_PER_MS = 3_000_000  # of torch.cuda._sleep: no GPU's clock is above 3 GHz


class Times(NamedTuple):
    """Milliseconds of a call: on the GPU, and of the host to launch it."""

    gpu: float
    host: float


def together(functions: dict[Any, list[Callable]]) -> dict[Any, Times]:
    """{name: its Times, medians} of {name: calls}; see `gpu_rounds`."""
    host = {name: host_ms(calls) for name, calls in functions.items()}
    return {name: Times(statistics.median(ms), host[name]) for name, ms in gpu_rounds(functions, host).items()}


def gpu_rounds(functions: dict[Any, list[Callable]], host: dict[Any, float] | None = None) -> dict[Any, list[float]]:
    """{name: [milliseconds of one call on the GPU, one for each round]} of {name: calls}. host: {name: `host_ms`}, if it is known.

    The calls of a name do the same on inputs of their own. Every round runs all names, so that they share clock rates and heat.
    """
    host = host or {name: host_ms(calls) for name, calls in functions.items()}
    times = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, calls in functions.items():
            times[name].append(gpu_ms(calls, host[name]))
    return times


def gpu_ms(calls: list[Callable], host: float) -> float:
    """GPU milliseconds of one call, the mean of all. host: milliseconds that the host takes to launch one.

    CUDA's queue holds about a thousand launches: all calls together may make that many.
    """
    return between_events(calls, 2 * host * len(calls))[0]


def between_events(calls: list[Callable], ahead: float) -> tuple[float, bool]:
    """(milliseconds of one call, the mean of all; whether the GPU began only when all were launched).

    ahead: milliseconds for which the GPU is kept busy before the first call. A call that waits for the GPU ends that.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if ahead:
        torch.cuda._sleep(round(ahead * SLEEP_CYCLES_PER_MS))
    start.record()
    for call in calls:
        call()
    queued = not start.query()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / len(calls), queued


def host_ms(calls: list[Callable], least: int = 9) -> float:
    """The median milliseconds in which the host launches a call, of `least` calls or more, while the GPU has nothing else to do."""
    for call in calls:  # compilers and caches
        call()
    times = []
    for call in calls * -(-least // len(calls)):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)
