"""How things are timed, and how implementations are compared.

An implementation is first held equal to PyTorch: one that computes something else has no time. Then all are measured together, in rounds
(a b c a b c ...), so that clocks and heat hit all alike. pytest-benchmark receives the rounds from a clock that only they move.

On a GPU one sample replays a CUDA graph of several calls, between two CUDA events. Each call has inputs of its own, so that none finds
them in L2. What cannot be captured is called one by one, behind a kernel that keeps the GPU until all calls are issued: the events then
measure the GPU, and not the host. Without a GPU a sample is wall-clock time.
"""

import functools
import gc
import itertools
import statistics
import threading
import time
import traceback
from dataclasses import dataclass, field, replace

import pytest
import torch

from fastgpt import choose, ops, records, verify
from fastgpt.records import RECORDS, Shape
from fastgpt.timing import between_events, host_ms

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32  # what a run computes in
DISTANCE = {torch.bfloat16: 0.03, torch.float32: 1e-3}  # the largest relative one, of norms; fp32 may be TF32
PARITY_TOKENS = 4096 if CUDA else 256  # the fp64 side of the comparison takes many times their memory

if not CUDA:
    torch.set_num_threads(1)  # at toy size threads wait for one another more than they compute
# Many arms compile the same few functions. Beyond the limit one would run eagerly under a compiled arm's name.
torch._dynamo.config.recompile_limit = 64
torch._dynamo.config.fail_on_recompile_limit_hit = True


class NotHere(Exception):
    """This machine cannot run an implementation; the message says why."""


def needs_gpu(what):
    """Raise NotHere without a GPU."""
    if not CUDA:
        raise NotHere(f"{what} needs a GPU")


def importable(module):
    """A module of an optional package. Raises NotHere."""
    try:
        return __import__(module, fromlist=["*"])
    except ImportError as e:
        raise NotHere(f"{module} is not importable ({e})") from None


@dataclass
class Failed:
    """Why an implementation has no time, as text: an exception would keep the tensors of its frames alive."""

    reason: str
    trace: str
    not_here: bool

    @classmethod
    def by(cls, error):
        reason = (str(error).splitlines() or [""])[0]
        if type(error) not in (NotHere, ArithmeticError):
            reason = f"{type(error).__name__}: {reason}"
        return cls(reason, "".join(traceback.format_exception(error)), isinstance(error, NotHere))

    def report(self, provider):
        """End the test. fastgpt's own providers must run and be equal; a peer that fails is skipped with its reason."""
        if provider.startswith("fastgpt") and not self.not_here:
            pytest.fail(f"{self.reason}\n{self.trace}", pytrace=False)
        pytest.skip(self.reason)


# ---- time ----


def clock():
    """A timer for pytest-benchmark: it stands still until `clock.now` is set."""
    return clock.now


clock.now = 0.0


@dataclass
class Timing:
    """Seconds of a call, one value a round; the host's seconds to issue a call, bytes at the peak, and how it was timed.

    ahead: for how many seconds the GPU is kept busy before the calls of a sample, one time through them.
    """

    seconds: list = field(default_factory=list)
    host: float | None = None
    peak: int | None = None
    how: str = "wall clock"
    ahead: float = 0.0

    @property
    def median(self):
        return statistics.median(self.seconds)

    def ratios_of(self, base):
        """(median, least, greatest) of base's time over this one's, round by round: above 1 this one is faster."""
        ratios = [b / a for a, b in zip(self.seconds, base.seconds, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


busy = threading.Event()  # set while something is timed: machine.Watch reads clocks and power only then


def sync():
    if CUDA:
        torch.cuda.synchronize()


def wall(f, repeats=1):
    """Mean seconds of f() on the wall clock, the GPU's work included."""
    sync()
    start = time.perf_counter()
    for _ in range(repeats):
        f()
    sync()
    return (time.perf_counter() - start) / repeats


def prepare(calls, how):
    """(issue, Timing) of functions without arguments: issue() runs them all. how: a Comparison's."""
    timing, issue = Timing(), lambda: [call() for call in calls]
    issue(), issue()  # compilers and caches
    if not CUDA:
        return issue, timing
    sync()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    calls[0]()
    sync()
    timing.peak, timing.how = torch.cuda.max_memory_allocated() - before, "cuda events"
    if how != "events":
        timing.host = host_ms(calls, 3 * len(calls)) / 1e3
        if how == "graph" and (captured := capture(calls)):
            issue, timing.how = captured.replay, "cuda graph"
        elif sample(issue, 1, ahead := 2 * timing.host * len(calls))[1]:
            timing.how, timing.ahead = "cuda events, the calls queued", ahead
    return issue, timing


def capture(calls):
    """A CUDA graph of the calls, or None where they cannot be captured."""
    sync()
    torch.cuda.set_sync_debug_mode("error")
    try:  # a call that waits for the GPU would break off the capture and leave the allocator in the middle of it
        calls[0]()
    except RuntimeError:
        return None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        sync()
        return graph
    except Exception:  # whatever else a graph cannot hold
        torch.cuda.set_stream(stream)
        sync()
        return None


def sample(issue, repeats, ahead=0.0):
    """(seconds of one issue(), the mean of `repeats`; whether the GPU began only when all were issued).

    ahead: seconds for each repeat, for which the GPU is kept busy before the first.
    """
    if not CUDA:
        return wall(issue, repeats), False
    ms, queued = between_events([issue] * repeats, ahead * repeats * 1e3)
    return ms / 1e3, queued


def time_together(calls, rounds, seconds, how="graph", settle=lambda name: None):
    """{name: Timing, or Failed} of {name: functions without arguments}, timed in turn.

    seconds: how long a sample lasts at least. how: a Comparison's. settle(name) goes before each sample: it may find the allocator as
    another left it.
    """
    found, samples = {}, {}

    def attempt(name, f):
        if not isinstance(found.get(name), Failed):
            try:
                f(name)
            except Exception as e:  # out of memory, most of all
                found[name] = Failed.by(e)

    def begin(name):
        issue, timing = prepare(calls[name], how)
        found[name], once = timing, min(sample(issue, 1, timing.ahead)[0] for _ in range(2))
        samples[name] = functools.partial(sample, issue, max(1, round(seconds / max(once, 1e-6))), timing.ahead)

    def take(name):
        settle(name)
        found[name].seconds.append(samples[name]()[0] / len(calls[name]))

    for name in calls:
        attempt(name, begin)
    busy.set()
    try:
        for name in [*calls] * rounds:
            attempt(name, take)
    finally:
        busy.clear()
    return found


@functools.cache
def ceilings():
    """{"flops": FLOP/s of a large product in DTYPE, "bandwidth": bytes/s of a large copy, "dtype"} of this machine, measured once."""
    n, bytes_ = (8192, 2**30) if CUDA else (512, 2**25)
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))
    source, target = (torch.randn(bytes_ // 4, device=DEVICE) for _ in range(2))
    found = time_together({"gemm": [lambda: a @ b], "copy": [lambda: target.copy_(source)]}, 7, 0.05 if CUDA else 0.01)
    # The fastest round: whatever else the machine did must not lower a ceiling.
    return {
        "flops": 2 * n**3 / min(found["gemm"].seconds), "bandwidth": 2 * bytes_ / min(found["copy"].seconds),
        "dtype": str(DTYPE)[6:],
    }  # fmt: skip


# ---- what is compared ----


class Comparison:
    """Cases, and the providers that are measured together on each: the base of Op, and of the step in bench_train.py.

    providers: {name: how it is made}; the first is the baseline. A subclass has begin(case), which prepares a case; `stages`, methods of a
    provider's name that hold it equal and put the functions to time into `calls`; info(name, timing) for the result file;
    importance(case, provider), 0 for what is due first; `full` and `quick`, each (rounds, seconds of a sample).

    Of a provider that was measured on the current case, `timings` has its Timing and `ratios` its speed over the baseline's. Of one that
    was not, `failed` says why.
    """

    # What is timed on a GPU. "graph": replays of a CUDA graph; what cannot be captured, as with "queue". "queue": the GPU's work in calls
    # that were all issued before it began. "events": calls as they come, where the GPU may wait for the host, as in a run.
    how = "graph"
    case = profile_to = None

    def __init__(self, name, cases, providers):
        self.name, self.cases, self.providers, self.baseline = name, cases, providers, next(iter(providers))

    def provider(self, name):
        """Register the decorated function as a provider."""

        def register(make):
            self.providers[name] = make
            return make

        return register

    def wave(self, provider):
        """The providers that are measured with one."""
        return self.providers

    def settle(self, name):
        """Go before each sample of a provider."""

    def finish(self, name):
        """Look at a provider once it was timed."""

    def measure(self, case, names, rounds, seconds):
        """Measure providers beside the baseline."""
        if case is not self.case:
            self.case, self.calls, self.timings, self.ratios, self.failed = case, {}, {}, {}, {}
            gc.collect()
            torch._dynamo.reset()
            try:
                self.begin(case)
            except Exception as e:  # not for each provider anew
                self.failed = dict.fromkeys(self.providers, Failed.by(e))
        together = list(dict.fromkeys([self.baseline, *names]))
        for stage in self.stages:
            self.attempt(together, stage)
        calls = {name: self.calls[name] for name in together if name not in self.failed}
        found = time_together(calls, rounds, seconds, self.how, self.settle)
        base = found.get(self.baseline)
        for name, timing in found.items():
            if isinstance(timing, Failed):
                self.fail(name, timing)
            elif name in names:
                self.timings[name] = timing
                self.ratios[name] = timing.ratios_of(base) if isinstance(base, Timing) else None
        self.attempt(names, self.finish)

    def attempt(self, names, stage):
        """A stage of each provider that has not failed. An exception fails its provider, and the others go on."""
        for name in [n for n in names if n not in self.failed]:
            try:
                stage(name)
            except Exception as e:
                self.fail(name, Failed.by(e))

    def fail(self, name, why):
        """Give a provider up, and free what it left behind."""
        self.failed[name] = why
        self.calls.pop(name, None)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()

    def benchmark(self):
        """The benchmarks, for pytest to collect."""
        params = [
            pytest.param(
                self, case, provider, id=f"{self.name} {case} {provider}",
                marks=[
                    pytest.mark.benchmark(group=f"{self.name} {case}", timer=clock),
                    pytest.mark.importance(self.importance(case, provider)),
                ],
            )
            for case in self.cases for provider in self.providers
        ]  # fmt: skip

        @pytest.mark.parametrize(("comparison", "case", "provider"), params)
        def test(benchmark, request, comparison, case, provider):
            comparison.run(benchmark, request, case, provider)

        return test

    def run(self, benchmark, request, case, provider):
        """Measure a case with all of its selected providers, and give one's rounds to pytest-benchmark."""
        if case is not self.case or provider not in self.timings | self.failed:
            params = [i.callspec.params for i in request.session.items if hasattr(i, "callspec")]
            selected = [p["provider"] for p in params if p.get("comparison") is self and p["case"] is case]
            self.profile_to = request.config.getoption("--profile-to")
            effort = self.quick if request.config.getoption("--quick") or not CUDA else self.full
            self.measure(case, [n for n in self.wave(provider) if n in selected], *effort)
        if provider in self.failed:
            self.failed[provider].report(provider)
        timing = self.timings[provider]
        rounds = itertools.cycle(timing.seconds)

        def advance():
            clock.now += next(rounds)

        benchmark.pedantic(advance, rounds=len(timing.seconds))
        benchmark.extra_info.update(
            self.info(provider, timing), provider=provider, baseline=provider == self.baseline, ratio=self.ratios[provider],
            device=DEVICE, dtype=str(DTYPE)[6:], timed_by=timing.how, peak_memory_gb=timing.peak and timing.peak / 1e9,
        )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A shape and direction at which an op's providers are compared. `first` marks the op's most important shape."""

    shape: Shape
    direction: str  # "forward"; "train": forward and backward; "update"
    first: bool

    def __str__(self):
        s = self.shape
        heads = f" h{s.n_head}" if s.n_head > 1 else ""
        return f"{s.B}x{s.T}x{s.n_embd}{heads} {str(DTYPE)[6:]} {self.direction}"

    @property
    def sizes(self):
        """The sizes that mean something to the op, as text: the others are 1."""
        s = self.shape
        others = (f"{k}={v}" for k, v in vars(s).items() if type(v) is int and v > 1 and k not in ("B", "T"))
        return " ".join([f"B={s.B} T={s.T}", *others])


class Op(Comparison):
    """An op with its providers. A provider takes a records.Problem and gives a function of the Problem's inputs, or raises NotHere.

    shapes: of a GPU, the most important first; toy: the shape without one. problem(shape, dtype, device) makes a Problem, and
    parts(shape, itemsize) the roofline's Parts; by default they are the record's. The baseline is PyTorch's reference. fastgpt is a
    provider, and Inductor where `inductor`.
    """

    directions, full, quick = ("forward", "train"), (9, 0.02), (5, 0.005)

    def __init__(self, name, shapes, toy, baseline="eager", inductor=True, problem=None, parts=None):
        providers = {baseline: lambda it: it.reference}
        if inductor:
            providers["inductor"] = lambda it: torch.compile(it.reference, dynamic=False)
        # Without a GPU the op is PyTorch's, as in a run.
        providers["fastgpt"] = lambda it: it.kernel if CUDA else functools.partial(it.by_ops, kernels=ops.TORCH)
        shapes = shapes if CUDA else [toy]
        super().__init__(name, [Case(s, d, s is shapes[0]) for s in shapes for d in self.directions], providers)
        self.problem = problem or functools.partial(records.problem, name)
        self.parts, self.checked = parts or RECORDS[name].parts, set()
        self.stages = self.check, self.make

    def importance(self, case, provider):
        return 10 if case.first else 40

    def begin(self, case):
        self.same = None

    def check(self, name):
        """Hold a provider to PyTorch by the three-way rule, on a part of the case's tokens. Raises ArithmeticError, NotHere."""
        s = self.case.shape
        small = replace(s, B=max(1, min(s.B, PARITY_TOKENS // s.T)), T=min(s.T, PARITY_TOKENS))
        # The shapes that are timed have no biases: fastgpt is held with them as well.
        for shape in (small, replace(small, bias=True)) if name.startswith("fastgpt") else (small,):
            if (shape, name) not in self.checked and name != self.baseline:
                it = self.problem(shape, DTYPE, DEVICE)
                choose.check(it, self.providers[name](it))
                self.checked.add((shape, name))

    def make(self, name):
        """Make a provider's calls. Each has inputs of its own, and there are enough of them that none finds its inputs in L2."""
        first = self.problem(self.case.shape, DTYPE, DEVICE)
        tensors = [t for t in [*first.inputs.values(), *first.grads] if torch.is_tensor(t)]
        l2 = torch.cuda.get_device_properties(0).L2_cache_size if CUDA else 0
        sets = min(8, max(1, -(-3 * l2 // sum(t.nbytes for t in tensors))))
        f, self.calls[name] = self.providers[name](first), []
        for i in range(sets):
            it = self.problem(self.case.shape, DTYPE, DEVICE) if i else first
            args = [x.detach().requires_grad_() if verify.is_floating(x) else x for x in it.inputs.values()]
            self.calls[name].append(functools.partial(call_once, f, args, it.grads, self.case.direction == "train"))
        self.check_whole(f, first)

    def check_whole(self, f, it):
        """Hold a function to the baseline's, which comes first, at the whole size, where fp64 has no room. Raises ArithmeticError."""
        # First other gradients: a backward that leaves some unwritten finds what lay there, and that must not be the right ones.
        verify.run(f, it.inputs.values(), [g if g is None else -g for g in it.grads])
        found = verify.run(f, it.inputs.values(), it.grads)
        self.same = found if self.same is None else self.same
        names = [*it.outputs, *(f"d{n}" for n, x in it.inputs.items() if verify.is_floating(x))]
        for name, a, b in zip(names, found, self.same, strict=True):
            distance, norm = (a.float() - b.float()).norm().item(), b.float().norm().item()
            if not distance <= DISTANCE[DTYPE] * norm:
                what = f"{name} is {distance:.2g} from PyTorch's, of norm {norm:.2g}"
                raise ArithmeticError(f"is not equal at full size: {what}")

    def info(self, name, timing):
        top, forward = ceilings(), self.case.direction == "forward"
        parts = self.parts(self.case.shape, DTYPE.itemsize)
        parts = [p for p in parts if not forward or p.direction == "forward"]
        flops, bytes_ = (sum(p.times * getattr(p, what) for p in parts) for what in ("flops", "bytes"))
        floor = sum(p.seconds(top["flops"], top["bandwidth"]) for p in parts)
        return dict(
            kind="op", op=self.name, direction=self.case.direction, shape=self.case.sizes,
            host_us=timing.host and timing.host * 1e6, tflops=flops / timing.median / 1e12 if flops else None,
            gb_per_s=bytes_ / timing.median / 1e9, floor_ms=floor * 1e3, of_floor=floor / timing.median,
        )  # fmt: skip


def call_once(f, args, grads, backward):
    """One call of an op, with what a backward needs, and the backward where wanted. The gradients are thrown away."""
    outputs = f(*args)
    if backward:
        wanted = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
        leaves = [a for a in args if verify.is_floating(a)]
        torch.autograd.grad([o for o, _ in wanted], leaves, [g for _, g in wanted])
