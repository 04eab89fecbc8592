"""How things are timed, and what is timed against what.

Everything that is compared is measured together, in rounds (a b c a b c ...), so that clocks and heat hit all alike, and is held
equal before: an implementation that computes something else has no time. pytest-benchmark then gets the rounds, by a clock that
advances by what was measured.

On a GPU one sample is the replay of a CUDA graph of several calls, each on other inputs so that none finds its own in L2; what cannot
be captured is issued call by call. Events stand around it. Without a GPU it is the wall clock.
"""

import functools
import gc
import itertools
import statistics
import time
import traceback
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import pytest
import torch

from fastgpt import verify
from fastgpt.benchmarks import roofline

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32  # what the runs compute in
WHOLE = {torch.bfloat16: 0.03, torch.float16: 5e-3, torch.float32: 1e-3}  # relative, of norms; TF32 counted in
PARITY_TOKENS = 4096 if CUDA else 256  # the fp64 side of the comparison takes many times the memory


class NotHere(Exception):
    """An implementation that this machine cannot run; the reason is the message."""


def needs_gpu(what):
    """Raises NotHere without a GPU."""
    if not CUDA:
        raise NotHere(f"{what} needs a GPU")


@dataclass
class Failed:
    """Why an implementation has no time. Text alone: an exception would keep the tensors of its frames."""

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
        """End the test: fastgpt's own must run and be equal; a peer that is not, or is not here, is skipped with its reason."""
        if provider.startswith("fastgpt") and not self.not_here:
            pytest.fail(f"{self.reason}\n{self.trace}", pytrace=False)
        pytest.skip(self.reason)


def importable(module):
    """A module of an optional package. Raises NotHere."""
    try:
        return __import__(module, fromlist=["*"])
    except ImportError as e:
        raise NotHere(f"{module} is not importable ({e})") from None


if not CUDA:
    torch.set_num_threads(1)  # at toy size threads wait for one another more than they compute
# An arm beyond the limit would run eagerly under a compiled one's name: all share a few functions.
torch._dynamo.config.recompile_limit = 64
torch._dynamo.config.fail_on_recompile_limit_hit = True

# ---- clocks ----


class Clock:
    """A timer for pytest-benchmark that stands still but for what was measured."""

    now = 0.0

    def __call__(self):
        return self.now


clock = Clock()


@dataclass
class Timing:
    """Seconds of a call, a value a round; and beside it: of one call before, host seconds to issue it, bytes at the peak, and how
    it was timed."""

    seconds: list = field(default_factory=list)
    once: float = 0.0
    host: float | None = None
    peak: int | None = None
    how: str = "wall clock"

    @property
    def median(self):
        return statistics.median(self.seconds)

    def ratios_of(self, base):
        """(median, least, greatest) over the rounds of base's time by this one's: above 1, this is faster."""
        ratios = [b / a for a, b in zip(self.seconds, base.seconds, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


def sync():
    if CUDA:
        torch.cuda.synchronize()


busy = False  # whether something is being timed: clocks and power are watched only then


@contextmanager
def watched():
    """Around what is timed."""
    global busy
    busy = True
    try:
        yield
    finally:
        busy = False


def prepare(calls, graph=True):
    """(issue, Timing) of functions without arguments: issue() runs them all, as a graph where they can be captured."""
    timing = Timing()
    for call in calls * 2:  # compilers and caches
        call()
    if not CUDA:
        return lambda: [call() for call in calls], timing
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    calls[0]()
    torch.cuda.synchronize()
    timing.peak = torch.cuda.max_memory_allocated() - before
    host = []
    for call in calls * 3:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        host.append(time.perf_counter() - start)
    timing.host = statistics.median(host)
    torch.cuda.synchronize()
    captured = capture(calls) if graph else None
    timing.how = "cuda events" if captured is None else "cuda graph"
    return (lambda: [call() for call in calls]) if captured is None else captured.replay, timing


def capture(calls):
    """A CUDA graph of the calls, or None where they cannot be captured."""
    torch.cuda.set_sync_debug_mode("error")
    try:  # what waits for the host would break off the capture, and leave the allocator in the middle of it
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
        torch.cuda.synchronize()
        return graph
    except Exception:  # whatever else a graph cannot hold
        torch.cuda.set_stream(stream)
        torch.cuda.synchronize()
        return None


def sample(issue, repeats):
    """Seconds of repeats of issue()."""
    if not CUDA:
        start = time.perf_counter()
        for _ in range(repeats):
            issue()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        issue()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def time_together(calls, rounds, seconds, graph=True):
    """{name: Timing, or Failed} of {name: functions without arguments}, a sample each in turn; `seconds`: what one lasts at least."""
    found, prepared, repeats = {}, {}, {}
    for name, each in calls.items():
        try:
            prepared[name] = issue, found[name] = prepare(each, graph)
            found[name].once = min(sample(issue, 1) for _ in range(2))
            repeats[name] = max(1, round(seconds / max(found[name].once, 1e-6)))
        except Exception as e:  # memory, most of all: at full size for the first time
            found[name] = Failed.by(e)
            prepared.pop(name, None)
    with watched():
        for _ in range(rounds):
            for name, (issue, timing) in prepared.items():
                timing.seconds.append(sample(issue, repeats[name]) / repeats[name] / len(calls[name]))
    return found


@functools.cache
def ceilings():
    """{"flops": FLOP/s of a large product in DTYPE, "bandwidth": bytes/s of a large copy} of this machine, measured once."""
    n, bytes_ = (8192, 2**30) if CUDA else (512, 2**25)
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))
    source, target = (torch.randn(bytes_ // 4, device=DEVICE) for _ in range(2))
    found = time_together({"gemm": [lambda: a @ b], "copy": [lambda: target.copy_(source)]}, 7, 0.05 if CUDA else 0.01)
    # The fastest round: a ceiling is not to be lowered by whatever else the machine did.
    return {
        "flops": 2 * n**3 / min(found["gemm"].seconds),
        "bandwidth": 2 * bytes_ / min(found["copy"].seconds),
        "dtype": str(DTYPE)[6:],
    }


# ---- ops ----


@dataclass(frozen=True)
class Case:
    """One thing that implementations are compared at."""

    shape: verify.Shape
    direction: str  # "forward", or "train": forward and backward
    dtype: torch.dtype
    first: bool  # whether it is the op's most important shape

    def __str__(self):
        s = self.shape
        sizes = f"{s.B}x{s.T}x{s.n_embd}" + (f" h{s.n_head}" if s.n_head > 1 else "")
        return f"{sizes} {str(self.dtype)[6:]} {self.direction}"


class Op:
    """An op and its providers. A provider takes a Problem and gives a function of its inputs, or raises NotHere.

    problem(shape, dtype, device) makes the Problem, by default verify's; shapes: of a GPU, the most important first; toy: without
    one. The first provider is `baseline`, PyTorch's reference; fastgpt's is another, and Inductor's too where `inductor`.
    """

    def __init__(
        self, name, shapes, toy, problem=None, baseline="eager", inductor=True, directions=("forward", "train")
    ):
        self.name, self.baseline = name, baseline
        self.problem = problem or functools.partial(verify.problem, name)
        self.providers = {baseline: lambda it: it.reference}
        if inductor:
            self.providers["inductor"] = lambda it: torch.compile(it.reference, dynamic=False)
        # Without a GPU the op is what fastgpt runs there.
        self.providers["fastgpt"] = lambda it: it.kernel if CUDA else it.chosen
        shapes = shapes if CUDA else [toy]
        self.cases = [Case(s, d, DTYPE, s is shapes[0]) for s in shapes for d in directions]
        self.measured, self.checked = {}, set()
        self.graph = True  # whether a GPU is to replay graphs of it

    def provider(self, name):
        """Register what the decorated function makes under a name."""
        return functools.partial(self.providers.setdefault, name)

    def benchmark(self):
        """The op's benchmark, for pytest to collect."""
        params = [
            pytest.param(self, case, provider, id=f"{self.name} {case} {provider}", marks=[
                pytest.mark.benchmark(group=f"{self.name} {case}", timer=clock),
                pytest.mark.importance(10 if case.first else 40),
            ])
            for case in self.cases for provider in self.providers
        ]  # fmt: skip

        @pytest.mark.parametrize(("op", "case", "provider"), params)
        def bench(benchmark, request, op, case, provider):
            bench_op(benchmark, request, op, case, provider)

        return bench

    def measure(self, case, only, rounds, seconds):
        """{provider: Timing, or the reason why there is none} of a Case for these providers and the baseline."""
        key = case, frozenset(only)
        if key not in self.measured:
            self.measured.clear()
            gc.collect()
            torch._dynamo.reset()
            calls, found, check_whole = {}, {}, self.check_whole(case)
            for name in self.providers:
                if name not in only and name != self.baseline:
                    continue
                try:
                    self.check(case, name)
                    calls[name], f = self.calls(case, name)
                    check_whole(f)
                except Exception as e:  # whatever stops one is said, and the others go on
                    found[name] = Failed.by(e)
            self.measured[key] = found | time_together(calls, rounds, seconds, self.graph)
        return self.measured[key]

    def check(self, case, provider):
        """Hold a provider to PyTorch by the three-way rule, on a part of the case's tokens. Raises ArithmeticError, NotHere."""
        s = case.shape
        small = replace(s, B=max(1, min(s.B, PARITY_TOKENS // s.T)), T=min(s.T, PARITY_TOKENS))
        # Biases, which the shapes that are timed have none of, are held as well.
        for shape in (small, replace(small, bias=True)) if provider.startswith("fastgpt") else (small,):
            if (shape, provider) in self.checked or provider == self.baseline:
                continue
            it = self.problem(shape, case.dtype, DEVICE)
            for c in verify.compare(self.providers[provider](it), it.reference, it.inputs, it.outputs, it.grads):
                if not c.holds:
                    raise ArithmeticError(f"not equal: {c.what} has {c.ratio:.1f} times PyTorch's error")
            self.checked.add((shape, provider))

    def check_whole(self, case):
        """A check of a provider at the whole size, where fp64 has no room: its distance from the baseline is that of rounding.

        check(f) takes a provider's function, and raises ArithmeticError.
        """
        it = self.problem(case.shape, case.dtype, DEVICE)
        names, same = [*it.outputs, *(f"d{n}" for n, x in it.inputs.items() if verify.is_floating(x))], None

        def check(f):
            nonlocal same
            found = verify.run(f, it.inputs.values(), it.grads)
            same = found if same is None else same
            for name, a, b in zip(names, found, same, strict=True):
                distance = (a.float() - b.float()).norm().item()
                if not distance <= WHOLE[case.dtype] * b.float().norm().item():
                    raise ArithmeticError(f"not equal at full size: {name} is {distance:.2g} from PyTorch's")

        return check

    def parts(self, case):
        """The roofline's Parts of a case."""
        parts = roofline.op_parts(self.name, case.shape, case.dtype.itemsize)
        return [p for p in parts if case.direction == "train" or p.direction == "forward"]

    def calls(self, case, provider):
        """Functions without arguments, each on inputs of its own, as many as keep an input from still being in L2; and the provider's
        function, which they call."""
        first = self.problem(case.shape, case.dtype, DEVICE)
        size = sum(t.numel() * t.element_size() for t in [*first.inputs.values(), *first.grads] if torch.is_tensor(t))
        l2 = torch.cuda.get_device_properties(0).L2_cache_size if CUDA else 0
        sets = min(8, max(1, -(-3 * l2 // max(size, 1)))) if CUDA else 1
        make, calls, f = self.providers[provider], [], None
        for i in range(sets):
            it = self.problem(case.shape, case.dtype, DEVICE) if i else first
            f = f if i else make(it)
            args = [x.detach().requires_grad_() if verify.is_floating(x) else x for x in it.inputs.values()]
            calls.append(functools.partial(once, f, args, it.grads, case.direction == "train"))
        return calls, f


def once(f, args, grads, backward):
    """One call of an op: forward with what a backward needs, and the backward where wanted. Gradients are thrown away."""
    outputs = f(*args)
    if backward:
        wanted = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
        leaves = [a for a in args if verify.is_floating(a)]
        torch.autograd.grad([o for o, _ in wanted], leaves, [g for _, g in wanted])


def bench_op(benchmark, request, op, case, provider):
    """Measure a case with all of its selected providers, and hand one's rounds to pytest-benchmark."""
    quick = request.config.getoption("--quick") or not CUDA
    only = {i.callspec.params["provider"] for i in request.session.items if has(i, op=op, case=case)}
    rounds, seconds = (1, 0.0) if benchmark.disabled else (5, 0.005) if quick else (9, 0.02)
    found = op.measure(case, only, rounds, seconds)
    timing, base = found[provider], found.get(op.baseline)
    if isinstance(timing, Failed):
        timing.report(provider)
    replay(benchmark, timing, kind="op", op=op.name, provider=provider, baseline=provider == op.baseline)
    describe(benchmark, case, timing, op.parts(case))
    if isinstance(base, Timing):
        median, least, greatest = timing.ratios_of(base)
        benchmark.extra_info.update(
            ratio_to_baseline=median, ratio_to_baseline_min=least, ratio_to_baseline_max=greatest
        )


def has(item, **parameters):
    """Whether a collected benchmark has these parameters."""
    found = item.callspec.params if hasattr(item, "callspec") else {}
    return all(found.get(name) == value for name, value in parameters.items())


def replay(benchmark, timing, **info):
    """Give a Timing's rounds to pytest-benchmark, by its clock."""
    rounds = itertools.cycle(timing.seconds)

    def advance():
        clock.now += next(rounds)

    benchmark.pedantic(advance, rounds=len(timing.seconds))
    benchmark.extra_info.update(
        info, device=DEVICE, timed_by=timing.how,
        host_us=None if timing.host is None else timing.host * 1e6,
        peak_memory_gb=None if timing.peak is None else timing.peak / 1e9,
    )  # fmt: skip


def sizes(shape):
    """The sizes of a Shape that mean something to the op: the others are 1."""
    return {k: v for k, v in asdict(shape).items() if k in ("B", "T") or (type(v) is int and v > 1)}


def describe(benchmark, case, timing, parts):
    """What a time means: rates, and how near to this machine's ceilings and to the floor of the op's parts."""
    top = ceilings()
    flops, bytes_ = (sum(p.times * getattr(p, what) for p in parts) for what in ("flops", "bytes"))
    floor = sum(p.seconds(top["flops"], top["bandwidth"]) for p in parts)
    benchmark.extra_info.update(
        direction=case.direction, dtype=str(case.dtype)[6:], shape=sizes(case.shape),
        tflops=flops / timing.median / 1e12 if flops else None, gb_per_s=bytes_ / timing.median / 1e9, floor_ms=floor * 1e3,
        of_floor=floor / timing.median, of_flops_ceiling=flops / timing.median / top["flops"],
        of_bandwidth_ceiling=bytes_ / timing.median / top["bandwidth"],
    )  # fmt: skip
