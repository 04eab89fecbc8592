"""CUDA graphs of a micro-step: one replay in place of hundreds of launches, whose host time is saved.

A graph replays the same kernels on the same memory. So inputs are copied to where the graph reads them. The gradients keep their
memory from iteration to iteration: one graph overwrites them, another adds to them. Dropout draws a new mask at each replay:
PyTorch advances the generator's offset, which is in device memory. The update is outside the graphs: it takes only a few launches,
and outside them its learning rate may be a Python number.

The first two iterations run without graphs. The first compiles. The second runs on the graphs' inputs: Triton compiles anew if an address
is no longer a multiple of 16, and a capture must not compile. In it we look for code that waits for the GPU, which cannot be captured.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.config import UserError
from fastgpt.distributed import World

WARM_UP = 2  # iterations


class CaptureEnded(UserError):
    """CUDA itself ended a capture. PyTorch's generator and allocator remain in capture state: this process can compute nothing more."""


def stream(world: World) -> AbstractContextManager:
    """A context with the stream to train on.

    DDP runs its part of the backward on the stream on which it was made, and CUDA's default stream cannot be captured.
    """
    several = world.size > 1 and world.device.startswith("cuda")
    return torch.cuda.stream(torch.cuda.Stream()) if several else nullcontext()


class Graphs:
    """CUDA graphs of run(x, y), which launches a micro-step, adds to the gradients of `parameters`, and returns the loss [].

    The next call overwrites the loss. If a micro-step cannot be captured, `say` gets one line, and run is called without graphs.
    """

    def __init__(
        self, run: Callable[[Tensor, Tensor], Tensor], parameters: Iterable[nn.Parameter], say: Callable[[str], Any] = print,
    ):  # fmt: skip
        self.run, self.parameters, self.say = run, [p for p in parameters if p.requires_grad], say
        self.iterations, self.captured, self.pool, self.failed = 0, {}, None, False
        self.inputs: Any = None
        self.gradients: Any = None

    def __call__(self, x: Tensor, y: Tensor, fresh: bool) -> Tensor:
        """Run a micro-step, and return its loss. fresh: it is the first of an iteration, and all gradients are None."""
        self.iterations += fresh
        if self.iterations == WARM_UP and not self.failed:
            self.feed(x, y)
            with waits() as seen:
                loss = self.run(*self.inputs)
            if seen:
                self.give_up(seen[0])
            return loss
        if self.iterations > WARM_UP and not self.failed and fresh not in self.captured:
            self.capture(fresh)
        if fresh not in self.captured:
            return self.run(x, y)
        if fresh:
            for p, gradient in zip(self.parameters, self.gradients, strict=True):
                p.grad = gradient
        self.feed(x, y)
        replay, loss = self.captured[fresh]
        replay()
        return loss

    def feed(self, *batch: Tensor) -> None:
        """Copy a batch to where the graphs read it."""
        if self.inputs is None:
            self.inputs = tuple(t.clone() for t in batch)
        for static, new in zip(self.inputs, batch, strict=True):
            static.copy_(new)

    def capture(self, fresh: bool) -> None:
        """Capture a micro-step. This computes nothing yet."""
        try:
            replay, loss, self.pool = capture(lambda: self.run(*self.inputs), self.pool)
        except CaptureEnded:
            raise
        except Exception as e:  # any other failure: continue without graphs
            if fresh:
                for p in self.parameters:
                    p.grad = None
            self.give_up(str(e) or type(e).__name__)
            return
        self.captured[fresh] = replay, loss
        if fresh:
            self.gradients = [p.grad for p in self.parameters]
            self.say("CUDA graphs: from here on a micro-step is one replay")

    def give_up(self, reason: str) -> None:
        """Continue without graphs."""
        self.failed = True
        self.captured.clear()
        self.inputs = self.gradients = self.pool = None
        self.say(f"CUDA graphs: a micro-step cannot be captured ({first_line(reason)}); the run goes on without")


def capture(run: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any, Any]:
    """Capture run(): (a function that replays its launches, its return value, its memory pool). pool: an earlier capture's, or None.

    Raises what run raises, and CaptureEnded if CUDA ended the capture.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    # The default stream cannot be captured: with None PyTorch uses one of its own. The capture must not forbid CUDA calls of other
    # threads: one reads the next batch meanwhile.
    own = None if stream == torch.cuda.default_stream() else stream
    failure = None
    try:
        with torch.cuda.graph(graph, pool, own, capture_error_mode="thread_local"):
            try:
                answer = run()
            except Exception as e:
                failure = e
    except Exception as e:
        torch.cuda.set_stream(stream)
        raise CaptureEnded(
            f"--runner=graphs: a micro-step cannot be captured ({first_line(str(failure or e))}); give --runner=eager"
        ) from e
    if failure is not None:
        raise failure
    return graph.replay, answer, graph.pool()


def first_line(reason: str) -> str:
    """The first line of an error's message."""
    return next(iter(reason.strip().splitlines()), "no reason given")


@contextmanager
def waits() -> Iterator[list[str]]:
    """A context whose list names, after the block, each line of code that waited for the GPU."""
    seen, before = [], torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for w in caught:
        if "called a synchronizing" in str(w.message):
            seen.append(f"{w.filename}:{w.lineno} waits for the GPU")
        elif "Synchronization debug mode" not in str(w.message):  # PyTorch's notice that this mode is a prototype
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
