"""CUDA graphs of a micro-step: hundreds of launches become one, and the host's time for them nothing.

A graph replays the same kernels on the same memory. So inputs are copied to where the graph reads them; the gradients stay
where they are from one iteration to the next, and are begun anew by one graph and added to by another; dropout draws anew each
time, since PyTorch moves the generator's offset, which is in device memory, with each replay. The update stays outside: it is a
handful of launches an iteration, and its learning rate may then be a number.

Nothing is captured before two iterations ran without: the first compiles, and the second is watched for whatever waits for the GPU,
which no graph can hold.
"""

import warnings
from contextlib import contextmanager, nullcontext

import torch

from fastgpt.config import UserError

WARM_UP = 2  # iterations


def stream(world):
    """The stream to train on, as a context. Raises UserError where there is nothing to capture.

    DDP keeps the stream on which it was made for its part of the backward, and the default one cannot be captured.
    """
    if not world.device.startswith("cuda"):
        raise UserError(f"--cuda_graphs=True: there are none on --device={world.device}; leave it out")
    return torch.cuda.stream(torch.cuda.Stream()) if world.size > 1 else nullcontext()


class Graphs:
    """run(x, y), which launches a micro-step, adds to the gradients of `parameters` and gives its loss [], as graphs of it.

    The loss is overwritten by the next call. What cannot be captured goes on without graphs, after one line by `say`.
    """

    def __init__(self, run, parameters, say=print):
        self.run, self.parameters, self.say = run, [p for p in parameters if p.requires_grad], say
        self.iterations, self.captured, self.pool, self.failed = 0, {}, None, False
        self.inputs = self.gradients = None

    def __call__(self, x, y, fresh):
        """A micro-step: its loss. Where `fresh`, an iteration's first, the gradients, which are None, begin anew."""
        self.iterations += fresh
        if self.iterations == WARM_UP and not self.failed:
            with waits() as seen:
                loss = self.run(x, y)
            if seen:
                self.give_up(seen[0])
            return loss
        if self.iterations > WARM_UP and not self.failed and fresh not in self.captured:
            self.capture(x, y, fresh)
        if fresh not in self.captured:
            return self.run(x, y)
        if fresh:
            for p, gradient in zip(self.parameters, self.gradients, strict=True):
                p.grad = gradient
        for static, new in zip(self.inputs, (x, y), strict=True):
            static.copy_(new)
        replay, loss = self.captured[fresh]
        replay()
        return loss

    def capture(self, x, y, fresh):
        """Capture a micro-step, which computes nothing yet."""
        if self.inputs is None:
            self.inputs = x.clone(), y.clone()
        try:
            replay, loss, self.pool = capture(lambda: self.run(*self.inputs), self.pool)
        except UserError:
            raise
        except Exception as e:  # whatever else stops it: the run goes on without
            if fresh:
                for p in self.parameters:
                    p.grad = None
            self.give_up(str(e) or type(e).__name__)
            return
        self.captured[fresh] = replay, loss
        if fresh:
            self.gradients = [p.grad for p in self.parameters]
            self.say("CUDA graphs: from here on a micro-step is one replay")

    def give_up(self, reason):
        """Go on without graphs."""
        self.failed = True
        self.captured.clear()
        self.inputs = self.gradients = self.pool = None
        self.say(f"CUDA graphs: a micro-step cannot be captured ({first_line(reason)}); the run goes on without")


def capture(run, pool):
    """(a function that replays what run() launches, run's answer, the pool of its memory); pool is that of an earlier one, or None.

    Raises what run raises, and UserError where CUDA gave the capture up: PyTorch's generator and allocator are then left in its midst,
    and nothing more can be computed.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    # The default stream cannot be captured: PyTorch then takes one of its own. Another thread reads the next batch meanwhile, and
    # what it does is not this capture's to forbid.
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
        raise UserError(
            f"--cuda_graphs=True: a micro-step cannot be captured ({first_line(str(failure or e))}); leave it out"
        ) from e
    if failure is not None:
        raise failure
    return graph.replay, answer, graph.pool()


def first_line(reason):
    """An error's message without what follows it."""
    return next(iter(reason.strip().splitlines()), "no reason given")


@contextmanager
def waits():
    """A list that will name each place that waited for the GPU."""
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
        elif "Synchronization debug mode" not in str(w.message):  # PyTorch's notice that this mode is young
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
