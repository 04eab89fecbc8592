"""The step: full iterations (micro-steps, clip, AdamW, zero_grad) of every arm, from the same weights, on the same tokens.

Before anything is timed an arm shows that its weights are the initial ones bit for bit, and that its losses over the first steps
agree with plain PyTorch's within rounding. Arms that nanoGPT's modules fit share one set of weights and moments, so that all are
in memory at once and can take turns.
"""

import copy
import functools
import gc
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt import graphs, metrics, ops, step
from fastgpt.benchmarks import harness, profile
from fastgpt.benchmarks.harness import (
    CUDA,
    DEVICE,
    DTYPE,
    Failed,
    NotHere,
    Timing,
    ceilings,
    clock,
    needs_gpu,
    replay,
    sync,
)
from fastgpt.benchmarks.peers.huggingface import HuggingFaceGPT
from fastgpt.benchmarks.peers.liger import LigerGPT
from fastgpt.benchmarks.peers.plain import PlainGPT
from fastgpt.choose import choose
from fastgpt.config import GPTConfig, preset
from fastgpt.model import GPT
from fastgpt.optim import adamw
from fastgpt.trainer import shadow_dtype
from fastgpt.verify import Shape

STEPS, MICRO_STEPS = 20, 2  # whose losses must agree: accumulation is held too
AGAIN = 3  # steps that must agree after the timing as well
STRESS = 8  # the factor on what feeds softmax and GELU: at nanoGPT's small initial weights both are nearly linear
SEED = 1337


@dataclass(frozen=True)
class Case:
    """A model by preset, sequences of a micro-step (0: the best of each arm), micro-steps of an iteration, and when it is due."""

    model: str
    batch_size: int
    accumulation: int
    importance: int

    def __str__(self):
        times = f" x {self.accumulation}" if self.accumulation > 1 else ""
        return f"{self.model} B={self.batch_size or 'best'}{times}"

    @property
    def config(self):
        """The GPTConfig: nanoGPT's defaults, without biases; without a GPU a toy."""
        shape = {k: v for k, v in preset(self.model).items() if k in ("n_layer", "n_head", "n_embd", "block_size")}
        return GPTConfig(**shape, vocab_size=50304 if CUDA else 256, bias=False)


MEMORY = torch.cuda.get_device_properties(0).total_memory if CUDA else 0
CASES = (
    [
        Case("gpt2", 32, 1, 0),
        Case("gpt2", 12, 40, 20),
        Case("gpt2-medium", 32, 1, 50),
        Case("gpt2-xl", 16 if MEMORY > 100e9 else 8, 1, 60),
        Case("gpt2", 0, 1, 70),
    ]
    if CUDA
    else [Case("tiny", 8, 2, 0)]
)
# Arms are measured in waves, each beside the baseline: what the budget cuts off is then the least that is missed.
WAVES = (
    ("eager", "compiled", "fastgpt"),
    ("strongest", "fastgpt-graphs"),
    ("fastgpt-eager", "fastgpt-triton", "liger", "huggingface"),
)


class Tokens:
    """Batches that lie on the device: a few, over and over, of tokens as unequal in number as a text's (Zipf)."""

    def __init__(self, config, batch_size, batches=8):
        generator = torch.Generator().manual_seed(SEED)
        weights = 1 / (torch.arange(min(config.vocab_size, 50257)) + 2.7)
        n = batches * batch_size * (config.block_size + 1)
        ids = torch.multinomial(weights, n, replacement=True, generator=generator)
        ids = ids.view(batches, batch_size, -1).to(DEVICE)
        self.batches = [(b[:, :-1].contiguous(), b[:, 1:].contiguous()) for b in ids]
        self.rewind()

    def rewind(self):
        self.at = 0

    def get(self):
        return self.batches[self.at % len(self.batches)]

    def prefetch(self):
        self.at += 1

    def sliced(self, slices):
        """The same tokens in the same order, each batch as so many."""
        smaller = copy.copy(self)
        smaller.batches = [pair for x, y in self.batches for pair in zip(x.chunk(slices), y.chunk(slices), strict=True)]
        return smaller


class Setup:
    """What the arms of a case share: the shape, the initial weights, and one set of parameters with its optimizer."""

    def __init__(self, case):
        self.case, self.config = case, case.config
        torch.manual_seed(SEED)
        # Where drawing billions takes no time; on the CPU the bits are nanoGPT's (tests/test_parity.py).
        with torch.device(DEVICE):
            state = GPT(self.config).state_dict()
        shared = {}  # tied weights are one tensor under two names
        self.parameters = {n: shared.setdefault(t.data_ptr(), torch.nn.Parameter(t)) for n, t in state.items()}
        self.initial = {n: t.detach().to("cpu", copy=True) for n, t in self.parameters.items()}
        self.optimizer = optimizer_of(list(shared.values()))
        self.n_params = sum(p.numel() for p in shared.values())

    def adopt(self, make):
        """make(), a module with nanoGPT's names, on the shared parameters."""
        with torch.device("meta"):
            module = make()
        for name in list(dict(module.named_parameters(remove_duplicate=False))):
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, self.parameters[name])
        return module

    def flops_per_token(self):
        """nanoGPT's count: 6 N + 12 L C T, position embeddings left out of N."""
        c = self.config
        n = self.n_params - c.block_size * c.n_embd
        return 6 * n + 12 * c.n_layer * c.n_embd * c.block_size


class Arm:
    """A way to take the step: call(idx, targets) gives (anything, loss); module holds the parameters; picks are fastgpt's kernels.

    graphed: whether micro-steps are replays of CUDA graphs.
    """

    running = None  # the arm that went last: all use one table of kernels, and most one optimizer and its weights

    def __init__(self, module, call, optimizer, picks=None, graphed=False):
        self.module, self.call, self.optimizer, self.picks = module, call, optimizer, picks
        self.graphed, self.graphs = graphed, {}

    def __call__(self, idx, targets, return_logits=False):
        return self.call(idx, targets)

    def parameters(self):
        return self.module.parameters()

    def take_over(self):
        """Where another arm went last: have this one's kernels, and shadows of the weights as they are now."""
        if Arm.running is not self:
            Arm.running = self
            ops.use(self.picks or "torch")
            self.optimizer.keeper = self.module if self.picks else None
            if self.picks:
                self.module.refresh_shadows()

    def graphs_of(self, shape, scaler, accumulation, context):
        """The Graphs of micro-steps of a shape, which are so many to an iteration; None where none are wanted."""
        if not self.graphed:
            return None
        settings = scaler, accumulation, context
        made = graphs.Graphs(lambda x, y: step.micro_step(self, x, y, *settings), self.parameters(), self.say)
        return self.graphs.setdefault((shape, accumulation), made)

    def say(self, line):
        """What graphs say: that there are none is a failure here, where they are what is measured."""
        if "goes on without" in line:
            raise RuntimeError(line)

    def weights(self):
        """By nanoGPT's names."""
        return self.module.weights() if hasattr(self.module, "weights") else self.module.state_dict()

    @torch.no_grad()
    def reset(self, initial):
        """Take the initial weights, and forget the moments."""
        Arm.running = None
        if hasattr(self.module, "load"):
            self.module.load(initial)
        else:
            for name, value in self.module.state_dict().items():
                value.copy_(initial[name])
        self.optimizer.state.clear()
        self.optimizer.zero_grad(set_to_none=True)

    def resident(self):
        """Bytes of its weights, their shadows, and moments."""
        moments = [t for p in self.parameters() if p.requires_grad for t in self.optimizer.state[p].values()]
        kept = [*self.parameters(), *self.module.buffers(), *moments]
        return sum(t.numel() * t.element_size() for t in kept)


def optimizer_of(parameters):
    """nanoGPT's AdamW, over the parameters that train."""
    holder = torch.nn.ParameterList(p for p in parameters if p.requires_grad)
    return adamw(holder, 0.1, 6e-4, (0.9, 0.95), DEVICE)


# ---- the arms ----

ARMS = {}


def arm(name):
    """Register a function of a Setup that gives an Arm, or raises NotHere."""
    return functools.partial(ARMS.setdefault, name)


@arm("eager")
def eager(setup):
    """As nanoGPT writes it, without its compiler."""
    module = setup.adopt(lambda: PlainGPT(setup.config))
    return Arm(module, module, setup.optimizer)


@arm("compiled")
def compiled(setup):
    """As nanoGPT trains by default: the baseline."""
    module = setup.adopt(lambda: PlainGPT(setup.config))
    return Arm(module, torch.compile(module, dynamic=False), setup.optimizer)


@arm("strongest")
def strongest(setup):
    """The best that plain PyTorch has: loss alone, the fastest attention backend, tuned GEMMs."""
    c = setup.config
    backend = fastest_attention(c.n_head, c.n_embd, c.block_size, setup.case.batch_size or 32) if CUDA else None
    module = setup.adopt(lambda: PlainGPT(c, loss_only=True, backend=backend))
    mode = "max-autotune-no-cudagraphs" if CUDA else None
    return Arm(module, torch.compile(module, dynamic=False, mode=mode), setup.optimizer)


@functools.cache
def fastest_attention(n_head, n_embd, block_size, batch_size):
    """The SDPA backend that takes least for forward and backward."""
    shape = (batch_size, n_head, block_size, n_embd // n_head)
    q, k, v, dout = (torch.randn(shape, device=DEVICE, dtype=DTYPE) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def seconds(backend):
        try:
            with sdpa_kernel(backend):
                for i in range(13):
                    if i == 3:
                        sync()
                        start = time.perf_counter()
                    y = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
                    torch.autograd.grad(y, leaves, dout)
        except RuntimeError:  # not on this GPU
            return math.inf
        sync()
        return time.perf_counter() - start

    return min((SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION), key=seconds)


@arm("fastgpt")
def fastgpt(setup):
    """As train.py runs by default: exact, each op the fastest that is shown equal, compiled."""
    return ours(setup, "auto", True)


@arm("fastgpt-eager")
def fastgpt_eager(setup):
    """The same without a compiler."""
    return ours(setup, "auto", False)


@arm("fastgpt-triton")
def fastgpt_triton(setup):
    """Every Triton kernel, compiled."""
    needs_gpu("the Triton kernel")
    return ours(setup, "triton", True)


@arm("fastgpt-graphs")
def fastgpt_graphs(setup):
    """Without a compiler, each micro-step the replay of a CUDA graph."""
    needs_gpu("a CUDA graph")
    if setup.case.model != "gpt2":
        raise NotHere("its graphs' memory beside the other arms' is for the smallest model")
    return ours(setup, "auto", False, graphed=True)


def ours(setup, spec, compile_, graphed=False):
    c = setup.config
    module = setup.adopt(lambda: GPT(c))
    inner = torch.compile(module, dynamic=False) if compile_ else module
    picks = choose(spec, Shape.of(setup.case.batch_size or 32, c), DTYPE, DEVICE, compile_)
    if dtype := shadow_dtype(picks, DTYPE):
        module.keep_shadows(dtype)
    return Arm(module, lambda idx, targets: inner(idx, targets, return_logits=False), setup.optimizer, picks, graphed)


@arm("liger")
def liger(setup):
    """The compiled model with Liger-Kernel's LayerNorm and loss."""
    needs_gpu("Liger-Kernel")
    module = setup.adopt(lambda: LigerGPT(setup.config))
    return Arm(module, torch.compile(module, dynamic=False), setup.optimizer)


@arm("huggingface")
def huggingface(setup):
    """Hugging Face's GPT-2, compiled."""
    with torch.device(DEVICE):
        module = HuggingFaceGPT(setup.config)
    return Arm(module, torch.compile(module, dynamic=False), optimizer_of(list(module.parameters())))


# ---- equality, then time ----


def autocast(dtype=DTYPE):
    """What the trainer runs in on this machine."""
    return torch.autocast("cuda", dtype=dtype) if CUDA and dtype != torch.float32 else nullcontext()


def iterate(arm, tokens, accumulation, context=None):
    """One iteration of an arm: its loss, on the device."""
    arm.take_over()
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    context = context or autocast()
    replays = arm.graphs_of(tokens.get()[0].shape, scaler, accumulation, context)
    return step.train_step(arm, arm.optimizer, scaler, tokens, accumulation, context, 1.0, replays)[0]


def micro_step(arm, tokens):
    """Forward and backward of an arm."""
    arm.take_over()
    with autocast():
        _, loss = arm(*tokens.get())
    loss.backward()
    arm.optimizer.zero_grad(set_to_none=True)


def held_from(setup):
    """Weights from which any maths that is not the model's shows in the losses."""
    return {n: t * STRESS if n.endswith(("c_attn.weight", "c_fc.weight")) else t for n, t in setup.initial.items()}


def begins_equal(arm, initial):
    """Raise ArithmeticError where an arm's weights are not the initial ones, bit for bit."""
    arm.reset(initial)
    for name, value in arm.weights().items():
        if name in initial and not torch.equal(value.cpu(), initial[name]):
            raise ArithmeticError(f"not equal: the initial {name}")


def losses(arm, weights, tokens, steps, slices=1, context=None):
    """The losses of the first steps of MICRO_STEPS micro-steps from the weights; tokens are in so many slices of a batch."""
    arm.reset(weights)
    tokens.rewind()
    return torch.stack([iterate(arm, tokens, MICRO_STEPS * slices, context) for _ in range(steps)]).double().cpu()


def plain_and_exact(setup, tokens):
    """The losses of the plain model, and those in a higher precision: fp64 on the CPU; on a GPU fp32 with products in TF32, which
    has eight times bf16's digits. On a GPU in slices of a batch, since fp32 may not fit whole."""
    slices = max(1, tokens.batches[0][0].size(0) // 4) if CUDA else 1
    tokens, weights = tokens.sliced(slices), held_from(setup)
    plain = losses(eager(setup), weights, tokens, STEPS, slices)
    if CUDA:
        before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
        try:
            return plain, losses(eager(setup), weights, tokens, STEPS, slices, nullcontext())
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
    module = PlainGPT(setup.config).double()
    double = {n: t.double() for n, t in weights.items()}
    arm = Arm(module, module, optimizer_of(list(module.parameters())))
    return plain, losses(arm, double, tokens, STEPS)


def agree(found, plain, exact):
    """The three-way rule on loss curves: no further from the exact losses than twice plain PyTorch's, plus one unit in the last
    place of the compute dtype for a step's rounding. Raises ArithmeticError."""
    floor = torch.finfo(DTYPE).eps * exact.abs().max().item() * (0.05 if CUDA else 4)
    error, allowed = ((x - exact).abs().max().item() for x in (found, plain))
    if not error <= 2 * allowed + floor:
        raise ArithmeticError(
            f"not equal: losses are {error:.2g} from exact ones over {len(exact)} steps, plain PyTorch's {allowed:.2g}"
        )


class Group:
    """The arms of a case: built once, held equal, and measured wave by wave."""

    def __init__(self, case, rounds, seconds, trace_to=None):
        self.case, self.rounds, self.seconds, self.trace_to = case, rounds, seconds, trace_to
        self.arms, self.batch_sizes, self.data = {}, {}, {}
        self.timings, self.bases, self.facts, self.failed = {}, {}, {}, {}
        gc.collect()
        torch._dynamo.reset()
        self.setup = Setup(case)
        self.tokens = Tokens(self.setup.config, case.batch_size or 8)
        self.curves = plain_and_exact(self.setup, self.tokens)

    def measure(self, wave):
        """Measure a wave's arms beside the baseline: timings, the baseline's timings of the same rounds, and facts; or why not."""
        names = list(dict.fromkeys([*wave, "compiled"]))
        # All are built before one is compiled: choosing kernels resets compilers.
        for stage in (self.build, self.hold, self.warm):
            for name in names:
                if name not in self.failed:
                    self.attempt(name, stage)
        rounds = {name: Timing() for name in names if name not in self.failed}
        with harness.watched():
            for _ in range(self.rounds):
                for name in [n for n in rounds if n not in self.failed]:
                    self.attempt(name, lambda name: rounds[name].seconds.append(self.sample(name)))
        for name in [n for n in wave if n not in self.failed]:
            self.timings[name].seconds = rounds[name].seconds
            self.bases[name] = rounds["compiled"] if "compiled" not in self.failed else None
            self.attempt(name, self.look)

    def attempt(self, name, stage):
        """A stage of one arm; what stops it is kept, and the others go on."""
        try:
            stage(name)
            return
        except Exception as e:
            self.failed[name] = Failed.by(e)
        self.arms.pop(name, None)
        self.setup.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()

    def build(self, name):
        if name not in self.arms:
            self.arms[name] = ARMS[name](self.setup)

    def hold(self, name):
        """Hold an arm equal, and find its batch size."""
        if name not in self.batch_sizes:
            begins_equal(self.arms[name], self.setup.initial)
            self.agree(name, STEPS)
            self.arms[name].reset(self.setup.initial)
            size = self.case.batch_size or best_batch_size(self.arms[name], self.setup.config)
            self.batch_sizes[name] = size
            self.data.setdefault(size, Tokens(self.setup.config, size))

    def agree(self, name, steps):
        found = losses(self.arms[name], held_from(self.setup), self.tokens, steps)
        agree(found, *(curve[:steps] for curve in self.curves))

    def turn(self, name):
        """One iteration of an arm, as a function."""
        return functools.partial(iterate, self.arms[name], self.data[self.batch_sizes[name]], self.case.accumulation)

    def warm(self, name):
        """Run an arm until nothing compiles; note the seconds of an iteration, and the peak of the memory."""
        turn, timing = self.turn(name), Timing()
        wall(turn, 2)
        if CUDA:
            timing.how = "wall clock around synchronised iterations"
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        timing.once = wall(turn, 1)
        if CUDA:
            timing.peak = torch.cuda.max_memory_allocated() - before + self.arms[name].resident()
        self.timings.setdefault(name, timing)

    def sample(self, name):
        """Mean seconds of an arm's iterations, as many as the sample is to last. One goes before: the allocator, left as another
        arm needed it, is not to be timed."""
        iterate(self.arms[name], self.data[self.batch_sizes[name]], 1)
        return wall(self.turn(name), max(1, round(self.seconds / self.timings[name].once)))

    def look(self, name):
        """Hold an arm equal again, now that it was timed; what it launches; its profile where one is wanted."""
        self.agree(name, AGAIN)
        batches = self.data[self.batch_sizes[name]]
        self.facts[name] = profile.facts(functools.partial(micro_step, self.arms[name], batches))
        if self.trace_to:
            turn = functools.partial(iterate, self.arms[name], batches, 1)
            path = f"{self.trace_to}/{self.case} {name}".replace(" ", "-")
            profile.write(turn, self.setup.config, self.batch_sizes[name], path)


def wall(turn, repeats):
    """Mean seconds of repeats of an iteration."""
    sync()
    start = time.perf_counter()
    for _ in range(repeats):
        turn()
    sync()
    return (time.perf_counter() - start) / repeats


def best_batch_size(arm, config):
    """The batch size of most tokens a second, doubling from 16 until it is no faster or no longer fits."""
    best, speed = None, 0.0
    for batch_size in (16, 32, 64, 128, 256):
        try:
            turn = functools.partial(iterate, arm, Tokens(config, batch_size, 2), 1)
            wall(turn, 3)
            now = batch_size / wall(turn, 5)
        except Exception:  # memory runs out under many names: the allocator's, the compiler's, cuBLAS's
            if best is None:
                raise
            arm.optimizer.zero_grad(set_to_none=True)
            break
        if now < speed * 1.01:
            break
        best, speed = batch_size, now
    gc.collect()
    torch.cuda.empty_cache()
    return best


groups = {}


def group_of(config, items, case, provider):
    """The Group of a case with the provider's wave measured, of which the selected arms take part."""
    if case not in groups:
        groups.clear()  # one model at a time
        quick = config.getoption("--quick") or not CUDA
        rounds, seconds = (7, 0.05) if not CUDA else (5, 0.3) if quick else (7, 1.0)
        try:
            groups[case] = Group(case, rounds, seconds, config.getoption("--profile-to"))
        except Exception as e:  # not for each arm anew
            groups[case] = Failed.by(e)
    group = groups[case]
    if isinstance(group, Failed):
        group.report(provider)
    if provider not in group.failed and provider not in group.bases:
        wave = next(w for w in WAVES if provider in w)
        group.measure([n for n in wave if n == provider or any(harness.has(i, case=case, provider=n) for i in items)])
    return group


@pytest.mark.parametrize(
    ("case", "provider"),
    [
        pytest.param(
            case, name, id=f"step {case} {name}",
            marks=[pytest.mark.benchmark(group=f"step {case}", timer=clock), pytest.mark.importance(case.importance + wave)],
        )
        for case in CASES for wave, names in enumerate(WAVES) for name in names
    ],
)  # fmt: skip
def test_step(benchmark, request, case, provider):
    group = group_of(request.config, request.session.items, case, provider)
    if provider in group.failed:
        group.failed[provider].report(provider)
    timing, batch_size = group.timings[provider], group.batch_sizes[provider]
    tokens_per_s = batch_size * case.accumulation * group.setup.config.block_size / timing.median
    flops = tokens_per_s * group.setup.flops_per_token()
    peak = metrics.peak_flops(DEVICE, str(DTYPE)[6:])
    replay(benchmark, timing, kind="step", provider=provider, baseline=provider == "compiled")
    benchmark.extra_info.update(
        model=case.model, batch_size=batch_size, accumulation=case.accumulation, block_size=group.setup.config.block_size,
        dtype=str(DTYPE)[6:], ms=timing.median * 1e3, tokens_per_s=tokens_per_s,
        mfu=None if peak is None else flops / peak, mfu_of_ceiling=flops / ceilings()["flops"],
        **group.facts[provider],
    )  # fmt: skip
    if base := group.bases[provider]:
        # Of tokens a second, since arms may run at batch sizes of their own.
        scale = batch_size / group.batch_sizes["compiled"]
        median, least, greatest = (r * scale for r in timing.ratios_of(base))
        benchmark.extra_info.update(
            ratio_to_compiled=median, ratio_to_compiled_min=least, ratio_to_compiled_max=greatest
        )
