"""What is timed is the GPU: on a made-up one, whose launches take their time on the host, which runs ahead of it."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from fastgpt import graphs, timing


class Machine:
    """A host and a GPU, each with a clock in milliseconds. A launch takes the host's time, and then waits for its turn on the GPU."""

    def __init__(self):
        self.host = self.gpu = 0.0
        self.capturing = None

    def launch(self, gpu, host):
        self.host += host
        if self.capturing is not None:
            self.capturing.append(gpu)
        else:
            self.gpu = max(self.gpu, self.host) + gpu

    def synchronize(self, device=None):
        self.host = max(self.host, self.gpu)

    def event(self, **options):
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", max(self.gpu, self.host))
        event.elapsed_time = lambda end: end.at - event.at
        return event

    def capture(self, run, pool):
        self.capturing = []
        try:
            answer = run()
        finally:
            launches, self.capturing = self.capturing, None
        return lambda: self.launch(sum(launches), 0.005), answer, None


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: machine.host / 1e3)
    monkeypatch.setattr(torch.cuda, "Event", machine.event)
    monkeypatch.setattr(torch.cuda, "synchronize", machine.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: machine.launch(cycles / 2e6, 0.001))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(graphs, "capture", machine.capture)
    return machine


def test_the_host_is_not_taken_for_the_gpu(machine):
    """A LayerNorm of 95 us that Python launches in 350."""
    norm = [lambda: machine.launch(0.095, 0.350)] * 3
    other = [lambda: machine.launch(0.190, 0.050)]
    found = timing.together({"triton": norm, "torch": other})
    assert found["triton"] == pytest.approx((0.095, 0.350), rel=0.01)
    assert found["torch"] == pytest.approx((0.190, 0.050), rel=0.01)


@pytest.mark.parametrize("why", ["it raises", "it waits"])
def test_what_cannot_be_captured_is_queued_first(machine, why, monkeypatch):
    def capture(run, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    seen = ["a line waits for the GPU"] if why == "it waits" else []
    captures = []
    monkeypatch.setattr(graphs, "capture", lambda run, pool: captures.append(run) or capture(run, pool))
    monkeypatch.setattr(graphs, "waits", lambda: nullcontext(seen))
    found = timing.together({"op": [lambda: machine.launch(0.095, 0.350)] * 3})
    assert found["op"] == pytest.approx((0.095, 0.350), rel=0.01)
    assert len(captures) == (why == "it raises")


def test_a_capture_that_cuda_ended_is_not_hidden(machine, monkeypatch):
    def capture(run, pool):
        raise graphs.CaptureEnded("nothing more can be computed")

    monkeypatch.setattr(graphs, "capture", capture)
    with pytest.raises(graphs.CaptureEnded):
        timing.gpu_rounds({"op": [lambda: machine.launch(0.1, 0.1)]})


def test_rounds_take_turns_and_a_sample_is_long_enough(machine, monkeypatch):
    order = []

    def call(name, gpu):
        def launch():
            order.append(name)
            machine.launch(gpu, 1e-4)

        return launch

    monkeypatch.setattr(graphs, "capture", lambda run, pool: (run, None, None))  # a replay that shows when it runs
    rounds = timing.gpu_rounds({"a": [call("a", 0.1)], "b": [call("b", 2.0)]})
    assert {name: len(ms) for name, ms in rounds.items()} == {"a": timing.ROUNDS, "b": timing.ROUNDS}
    last = "".join(order)[-2 * 11 :]
    assert last == "a" * 10 + "b" + "a" * 10 + "b", "ten of 0.1 ms are a millisecond"
