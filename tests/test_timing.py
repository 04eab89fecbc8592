"""What is timed is the GPU: on a made-up one, whose launches take their time on the host, which runs ahead of it."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from fastgpt import timing


class Machine:
    """A host and a GPU, each with a clock in milliseconds. A launch takes the host's time, and then waits for its turn on the GPU."""

    def __init__(self):
        self.host = self.gpu = 0.0

    def launch(self, gpu, host):
        self.host += host
        self.gpu = max(self.gpu, self.host) + gpu

    def synchronize(self, device=None):
        self.host = max(self.host, self.gpu)

    def event(self, **options):
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", max(self.gpu, self.host))
        event.elapsed_time = lambda end: end.at - event.at
        event.query = lambda: self.host >= event.at
        return event


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: machine.host / 1e3)
    monkeypatch.setattr(torch.cuda, "Event", machine.event)
    monkeypatch.setattr(torch.cuda, "synchronize", machine.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: machine.launch(cycles / 3e6, 0.001))
    return machine


def test_the_host_is_not_taken_for_the_gpu(machine):
    """A LayerNorm of 95 us that Python launches in 350."""
    norm = [lambda: machine.launch(0.095, 0.350)] * 3
    other = [lambda: machine.launch(0.190, 0.050)]
    start, end = machine.event(), machine.event()
    start.record(), [call() for call in norm], end.record()
    assert start.elapsed_time(end) / 3 > 0.3, "events alone would take it so"
    found = timing.together({"triton": norm, "torch": other})
    assert found["triton"] == pytest.approx((0.095, 0.350), rel=0.01)
    assert found["torch"] == pytest.approx((0.190, 0.050), rel=0.01)


def test_rounds_take_turns(machine):
    order = []

    def call(name):
        return lambda: order.append(name) or machine.launch(0.1, 0.01)

    rounds = timing.gpu_rounds({"a": [call("a")] * 2, "b": [call("b")]})
    assert {name: len(ms) for name, ms in rounds.items()} == {"a": timing.ROUNDS, "b": timing.ROUNDS}
    assert "".join(order).endswith("aab" * timing.ROUNDS)
