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

from fastgpt import metrics, ops
from fastgpt.benchmarks import profile
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
from fastgpt.step import train_step
from fastgpt.trainer import shadow_dtype
from fastgpt.verify import Shape

STEPS = 20  # whose losses must agree
SEED = 1337


@dataclass(frozen=True)
class Case:
    """A model by preset, sequences of a micro-step (0: the best of each arm), micro-steps of an iteration, and when it is due."""

    model: str
    batch_size: int
    accumulation: int
    importance: int

    def __str__(self):
        return f"{self.model} B={self.batch_size or 'best'}" + (
            f" x {self.accumulation}" if self.accumulation > 1 else ""
        )

    @property
    def config(self):
        """The GPTConfig: nanoGPT's defaults, without biases; without a GPU a toy."""
        shape = {k: v for k, v in preset(self.model).items() if k in ("n_layer", "n_head", "n_embd", "block_size")}
        return GPTConfig(**shape, vocab_size=50304 if CUDA else 256, bias=False)


CASES = (
    [
        Case("gpt2", 32, 1, 0), Case("gpt2", 12, 40, 20), Case("gpt2-medium", 32, 1, 30), Case("gpt2-xl", 16, 1, 50),
        Case("gpt2", 0, 1, 60),
    ]
    if CUDA
    else [Case("tiny", 8, 2, 0)]
)  # fmt: skip


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
        with torch.device(
            DEVICE
        ):  # where drawing billions takes no time; on the CPU the bits are nanoGPT's (tests/test_parity.py)
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
    """A way to take the step: call(idx, targets) gives (anything, loss); module holds the parameters."""

    def __init__(self, module, call, optimizer, before=lambda: None):
        self.module, self.call, self.optimizer, self.before = module, call, optimizer, before

    def __call__(self, idx, targets, return_logits=False):
        return self.call(idx, targets)

    def parameters(self):
        return self.module.parameters()

    def weights(self):
        """By nanoGPT's names."""
        return self.module.weights() if hasattr(self.module, "weights") else self.module.state_dict()

    @torch.no_grad()
    def reset(self, initial):
        """Take the initial weights, and forget the moments."""
        if hasattr(self.module, "load"):
            self.module.load(initial)
        else:
            for name, value in self.module.state_dict().items():
                value.copy_(initial[name])
        self.optimizer.state.clear()
        self.optimizer.zero_grad(set_to_none=True)

    def resident(self):
        """Bytes of its weights and moments."""
        own = [p for p in self.parameters() if p.requires_grad]
        moments = [t for p in own for t in self.optimizer.state[p].values()]
        return sum(t.numel() * t.element_size() for t in [*self.parameters(), *moments])


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
    module = setup.adopt(lambda: PlainGPT(setup.config, loss_only=True))
    mode = "max-autotune-no-cudagraphs" if CUDA else None
    inner, backend = torch.compile(module, dynamic=False, mode=mode), None

    def call(idx, targets):
        nonlocal backend
        if not CUDA:
            return inner(idx, targets)
        c = setup.config
        backend = backend or fastest_attention(c.n_head, c.n_embd, c.block_size, idx.size(0))
        with sdpa_kernel(backend):
            return inner(idx, targets)

    return Arm(module, call, setup.optimizer)


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


def ours(setup, spec, compile_):
    c = setup.config
    module = setup.adopt(lambda: GPT(c))
    inner = torch.compile(module, dynamic=False) if compile_ else module
    shape = Shape(setup.case.batch_size or 32, c.block_size, c.n_embd, c.n_head, c.vocab_size, c.bias, c.dropout)
    picks = choose(spec, shape, DTYPE, DEVICE, compile_)
    if dtype := shadow_dtype(picks, DTYPE):
        module.keep_shadows(dtype)

    def before():  # other arms change the weights too: shadows are made anew each time, where the trainer's optimizer does it
        ops.use(picks)
        module.refresh_shadows()

    return Arm(module, lambda idx, targets: inner(idx, targets, return_logits=False), setup.optimizer, before)


@arm("liger")
def liger(setup):
    """The compiled model with Liger-Kernel's LayerNorm and loss."""
    needs_gpu("Liger-Kernel")
    module = setup.adopt(lambda: LigerGPT(setup.config))
    return Arm(module, torch.compile(module, dynamic=False), setup.optimizer)


@arm("huggingface")
def huggingface(setup):
    """Hugging Face's GPT-2, compiled."""
    module = HuggingFaceGPT(setup.config).to(DEVICE)
    return Arm(module, torch.compile(module, dynamic=False), optimizer_of(list(module.parameters())))


# ---- equality, then time ----


def autocast(dtype=DTYPE):
    """What the trainer runs in on this machine."""
    return torch.autocast("cuda", dtype=dtype) if CUDA and dtype != torch.float32 else nullcontext()


def iterate(arm, tokens, accumulation, context=None):
    """One iteration of an arm: its loss, on the device."""
    arm.before()
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    return train_step(arm, arm.optimizer, scaler, tokens, accumulation, context or autocast(), 1.0)[0]


def micro_step(arm, tokens):
    """Forward and backward of an arm."""
    arm.before()
    with autocast():
        _, loss = arm(*tokens.get())
    loss.backward()
    arm.optimizer.zero_grad(set_to_none=True)


def losses(arm, initial, tokens, steps, accumulation=1, context=None):
    """The losses of the first steps from the initial weights. Raises ArithmeticError where the arm's are others."""
    arm.reset(initial)
    for name, value in arm.weights().items():
        if name in initial and not torch.equal(value.cpu(), initial[name]):
            raise ArithmeticError(f"not equal: the initial {name}")
    tokens.rewind()
    return torch.stack([iterate(arm, tokens, accumulation, context) for _ in range(steps)]).double().cpu()


def plain_and_exact(setup, tokens, steps):
    """The losses of the plain model, and those in a higher precision: fp64 on the CPU; on a GPU fp32 with products in TF32, which
    has eight times bf16's digits. On a GPU in slices of a batch, since fp32 may not fit whole."""
    slices = max(1, tokens.batches[0][0].size(0) // 4) if CUDA else 1
    tokens = tokens.sliced(slices)
    plain = losses(eager(setup), setup.initial, tokens, steps, slices)
    if CUDA:
        before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
        exact = losses(eager(setup), setup.initial, tokens, steps, slices, nullcontext())
        torch.backends.cuda.matmul.allow_tf32 = before
        return plain, exact
    module = PlainGPT(setup.config).double()
    double = {n: t.double() for n, t in setup.initial.items()}
    arm = Arm(module, module, optimizer_of(list(module.parameters())))
    return plain, losses(arm, double, tokens, steps)


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
    """All arms of a case, measured together, once."""

    def __init__(self, case, names, rounds, seconds, steps, trace_to=None):
        self.case, self.failed, self.timings, self.facts = case, {}, {}, {}
        gc.collect()
        torch._dynamo.reset()
        self.setup = setup = Setup(case)
        self.batch_sizes = {}
        tokens, arms = Tokens(setup.config, case.batch_size or 8), {}
        plain, exact = plain_and_exact(setup, tokens, steps)
        for name in names:
            try:
                arms[name] = made = ARMS[name](setup)
                agree(losses(made, setup.initial, tokens, steps), plain, exact)
                self.batch_sizes[name] = case.batch_size or best_batch_size(made, setup.config)
            except Exception as e:  # whatever stops one is said, and the others go on
                self.failed[name] = Failed.by(e)
                arms.pop(name, None)
        data = {b: Tokens(setup.config, b) for b in set(self.batch_sizes.values())}
        turns = {
            name: functools.partial(iterate, a, data[self.batch_sizes[name]], case.accumulation)
            for name, a in arms.items()
        }
        repeats = {}
        for name, turn in turns.items():
            repeats[name] = max(1, round(seconds / self.warm(name, arms[name], turn)))
        for _ in range(rounds):
            for name, turn in turns.items():
                self.timings[name].seconds.append(wall(turn, repeats[name]))
        for name, a in arms.items():
            batches = data[self.batch_sizes[name]]
            self.facts[name] = profile.facts(functools.partial(micro_step, a, batches))
            if trace_to:
                step = functools.partial(iterate, a, batches, 1)
                profile.write(step, setup.config, self.batch_sizes[name], f"{trace_to}/{case} {name}".replace(" ", "-"))

    def warm(self, name, arm, turn):
        """Seconds of an iteration, after the first; the peak of the memory on the way."""
        wall(turn, 2)
        timing = self.timings[name] = Timing()
        if CUDA:
            timing.how = "wall clock around synchronised iterations"
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        seconds = wall(turn, 1)
        if CUDA:
            timing.peak = torch.cuda.max_memory_allocated() - before + arm.resident()
        return seconds


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
        except torch.OutOfMemoryError:
            arm.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            break
        if now < speed * 1.01:
            break
        best, speed = batch_size, now
    if best is None:
        raise NotHere("not even 16 sequences fit into the memory")
    return best


measured = {}


def group_of(config, items, case):
    """The Group of a case, for the arms that were selected and the baseline."""
    names = [n for n in ARMS if n == "compiled" or any(selects(i, case, n) for i in items)]
    if case not in measured:
        measured.clear()
        quick = config.getoption("--quick") or not CUDA
        rounds, seconds, steps = (7, 0.05, 5) if quick else (7, 1.0, STEPS)
        if not CUDA:
            steps = STEPS
        measured[case] = Group(case, names, rounds, seconds, steps, config.getoption("--profile-to"))
    return measured[case]


def selects(item, case, name):
    params = getattr(item, "callspec", None) and item.callspec.params
    return bool(params) and params.get("case") == case and params.get("provider") == name


@pytest.mark.parametrize(
    ("case", "provider"),
    [
        pytest.param(
            case, name, id=f"step {case} {name}",
            marks=[pytest.mark.benchmark(group=f"step {case}", timer=clock), pytest.mark.importance(case.importance)],
        )
        for case in CASES for name in ARMS
    ],
)  # fmt: skip
def test_step(benchmark, request, case, provider):
    group = group_of(request.config, request.session.items, case)
    if provider in group.failed:
        group.failed[provider].report(provider)
    timing, batch_size = group.timings[provider], group.batch_sizes[provider]
    sequences = batch_size * case.accumulation
    tokens_per_s = sequences * group.setup.config.block_size / timing.median
    flops = tokens_per_s * group.setup.flops_per_token()
    peak = metrics.peak_flops(DEVICE, str(DTYPE)[6:])
    replay(benchmark, timing, kind="step", provider=provider, baseline=provider == "compiled")
    benchmark.extra_info.update(
        model=case.model, batch_size=batch_size, accumulation=case.accumulation, block_size=group.setup.config.block_size,
        dtype=str(DTYPE)[6:], ms=timing.median * 1e3, tokens_per_s=tokens_per_s,
        mfu=None if peak is None else flops / peak, mfu_of_ceiling=flops / ceilings()["flops"],
        **group.facts[provider],
    )  # fmt: skip
    if "compiled" in group.timings:
        base = group.timings["compiled"]
        # Of tokens a second, since arms may run at batch sizes of their own.
        scale = sequences / (group.batch_sizes["compiled"] * case.accumulation)
        median, least, greatest = (r * scale for r in timing.ratios_of(base))
        benchmark.extra_info.update(
            ratio_to_compiled=median, ratio_to_compiled_min=least, ratio_to_compiled_max=greatest
        )
