"""The step: full iterations (micro-steps, clip, AdamW, zero_grad) of every arm, from the same weights, on the same tokens.

Before it is timed, an arm shows that its weights are the initial ones bit for bit, and that its losses over the first steps agree with
plain PyTorch's up to rounding. Arms of nanoGPT's modules share one set of weights and moments: all are in memory at once, and take turns.
"""

import copy
import functools
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt import graphs, metrics, ops, optim, step
from fastgpt.benchmarks import harness, profile
from fastgpt.benchmarks.harness import CUDA, DEVICE, DTYPE, NotHere, Timing, ceilings, needs_gpu
from fastgpt.benchmarks.peers.huggingface import HuggingFaceGPT
from fastgpt.benchmarks.peers.liger import LigerGPT
from fastgpt.benchmarks.peers.plain import PlainGPT
from fastgpt.choose import choose
from fastgpt.config import GPTConfig, preset
from fastgpt.model import GPT
from fastgpt.records import Shape, n_params
from fastgpt.shadows import Shadows, shadow_dtype

STEPS, MICRO_STEPS = 20, 2  # whose losses must agree; two micro-steps hold the accumulation too
STEPS_AFTER = 3  # steps that must agree once more after the timing
STRESS = (
    8  # factor on the weights that feed softmax and GELU: at nanoGPT's small initial weights both are nearly linear
)
SEED = 1337


@dataclass(frozen=True)
class Case:
    """A preset's model, sequences of a micro-step, micro-steps of an iteration, and when it is due."""

    model: str
    batch_size: int
    accumulation: int
    importance: int

    def __str__(self):
        return f"{self.model} B={self.batch_size} x {self.accumulation}"

    @property
    def config(self):
        """The GPTConfig: the preset's sizes, without biases or dropout."""
        sizes = {k: v for k, v in preset(self.model).items() if k in ("n_layer", "n_head", "n_embd", "block_size")}
        return GPTConfig(**sizes, vocab_size=50304 if CUDA else 256, bias=False)


def cases():
    """The Cases of this machine; without a GPU a toy."""
    if not CUDA:
        return [Case("tiny", 8, 2, 0)]
    xl = 16 if torch.cuda.get_device_properties(0).total_memory > 100e9 else 8
    return [
        Case("gpt2", 32, 1, 0),
        Case("gpt2", 12, 40, 20),
        Case("gpt2-medium", 32, 1, 50),
        Case("gpt2-xl", xl, 1, 60),
    ]


# Arms are measured wave by wave, each wave beside the baseline: a budget that ends cuts off the least important.
# The first wave is what `--only=headline` measures.
WAVES = (
    ("compiled", "fastgpt", "fastgpt-graphs"),
    ("pytorch", "eager"),
    ("fastgpt-eager", "fastgpt-triton", "liger", "huggingface"),
)


class Tokens:
    """A few batches that lie on the device, over and over. Their tokens are as unequal in number as a text's (Zipf's law)."""

    def __init__(self, config, batch_size, batches=8):
        generator = torch.Generator().manual_seed(SEED)
        weights = 1 / (torch.arange(min(config.vocab_size, 50257)) + 2.7)
        n = batches * batch_size * (config.block_size + 1)
        ids = torch.multinomial(weights, n, replacement=True, generator=generator)
        ids = ids.view(batches, batch_size, -1).to(DEVICE)
        self.batches, self.at = [(b[:, :-1].contiguous(), b[:, 1:].contiguous()) for b in ids], 0

    def get(self):
        return self.batches[self.at % len(self.batches)]

    def prefetch(self):
        self.at += 1

    def sliced(self, slices):
        """The same tokens in the same order, each batch cut into `slices`."""
        cut = copy.copy(self)
        cut.batches = [pair for x, y in self.batches for pair in zip(x.chunk(slices), y.chunk(slices), strict=True)]
        return cut


class Setup:
    """What the arms of a case share: the initial weights, and one set of parameters with its optimizer."""

    def __init__(self, case):
        self.case, self.config = case, case.config
        torch.manual_seed(SEED)
        with torch.device(DEVICE):  # on a GPU billions of weights are drawn at once; on the CPU the bits are nanoGPT's
            state = GPT(self.config).state_dict()
        shared = {}  # tied weights are one tensor under two names
        self.parameters = {n: shared.setdefault(t.data_ptr(), torch.nn.Parameter(t)) for n, t in state.items()}
        self.initial = {n: t.detach().to("cpu", copy=True) for n, t in self.parameters.items()}
        # From these weights, losses show any maths that is not the model's.
        stressed = ("c_attn.weight", "c_fc.weight")
        self.stressed = {n: t * STRESS if n.endswith(stressed) else t for n, t in self.initial.items()}
        self.optimizer = optimizer_of(shared.values())

    def adopt(self, make):
        """make(), a module with nanoGPT's names, on the shared parameters."""
        with torch.device("meta"):
            module = make()
        for name in list(dict(module.named_parameters(remove_duplicate=False))):
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, self.parameters[name])
        return module


def optimizer_of(parameters):
    """nanoGPT's AdamW, over the parameters that train."""
    holder = torch.nn.ParameterList(p for p in parameters if p.requires_grad)
    return optim.adamw(holder, 0.1, 6e-4, (0.9, 0.95), DEVICE)


class Arm:
    """A way to take the step: call(idx, targets) gives (anything, loss), and `module` holds the parameters.

    kernels: the ops.Kernels of fastgpt's arms, for the update too. graphed: whether micro-steps are replays of CUDA graphs.
    """

    running = None  # the arm that went last: most share one optimizer and its weights, on which its shadows hang

    def __init__(self, module, call, optimizer, kernels=ops.TORCH, shadows=None, graphed=False):
        self.module, self.call, self.optimizer, self.kernels = module, call, optimizer, kernels
        self.shadows, self.graphs = shadows, {} if graphed else None

    def __call__(self, idx, targets, return_logits=False):
        return self.call(idx, targets)

    def parameters(self):
        return self.module.parameters()

    @staticmethod
    def vacate():
        """Take the shadows of the arm that went last off the weights: the next arm's update must not spend time on them."""
        if Arm.running and Arm.running.shadows:
            Arm.running.shadows.remove()
        Arm.running = None

    def take_over(self):
        """Where another arm went last: hang this one's shadows on the weights as they are now, and update by its kernels."""
        if Arm.running is not self:
            Arm.vacate()
            Arm.running, self.optimizer.kernels = self, self.kernels
            if self.shadows:
                self.shadows.refresh()

    def graphs_of(self, shape, scaler, accumulation, context):
        """The graphs.Graphs of micro-steps of a shape, `accumulation` to an iteration; None where none are wanted."""
        if self.graphs is None:
            return None
        settings = scaler, accumulation, context
        made = graphs.Graphs(lambda x, y: step.micro_step(self, x, y, *settings), self.parameters(), self.say)
        return self.graphs.setdefault((shape, accumulation), made)

    def say(self, line):
        """Hear what graphs.Graphs says. Where it goes on without graphs, the arm fails."""
        if "goes on without" in line:
            raise RuntimeError(line)

    def weights(self):
        """The weights by nanoGPT's names."""
        return self.module.weights() if hasattr(self.module, "weights") else self.module.state_dict()

    @torch.no_grad()
    def reset(self, weights):
        """Take these weights, and forget the moments."""
        Arm.vacate()
        if hasattr(self.module, "load"):
            self.module.load(weights)
        else:
            for name, value in self.module.state_dict().items():
                value.copy_(weights[name])
        self.optimizer.state.clear()
        self.optimizer.zero_grad(set_to_none=True)

    def resident(self):
        """Bytes of its weights, their shadows, and moments."""
        moments = [t for p in self.parameters() if p.requires_grad for t in self.optimizer.state[p].values()]
        shadows = self.shadows.tensors.values() if self.shadows else []
        return sum(t.nbytes for t in [*self.parameters(), *self.module.buffers(), *shadows, *moments])


# ---- the arms ----

ARMS = {}


def arm(name):
    """Register a function of a Setup that gives an Arm, or raises NotHere. The first one is the baseline."""
    return functools.partial(ARMS.setdefault, name)


def compiled_arm(setup, module):
    return Arm(module, torch.compile(module, dynamic=False), setup.optimizer)


@arm("compiled")
def compiled(setup):
    """nanoGPT's model as it trains by default."""
    return compiled_arm(setup, setup.adopt(lambda: PlainGPT(setup.config)))


@arm("eager")
def eager(setup):
    """nanoGPT's model without the compiler."""
    module = setup.adopt(lambda: PlainGPT(setup.config))
    return Arm(module, module, setup.optimizer)


@arm("pytorch")
def pytorch(setup):
    """The best of plain PyTorch: loss alone, the fastest attention backend, tuned GEMMs."""
    c = setup.config
    backend = fastest_attention(c.n_head, c.n_embd, c.block_size, setup.case.batch_size) if CUDA else None
    module = setup.adopt(lambda: PlainGPT(c, loss_only=True, backend=backend))
    mode = "max-autotune-no-cudagraphs" if CUDA else None
    return Arm(module, torch.compile(module, dynamic=False, mode=mode), setup.optimizer)


@functools.cache
def fastest_attention(n_head, n_embd, block_size, batch_size):
    """The SDPA backend that is fastest forward and backward."""
    shape = (batch_size, n_head, block_size, n_embd // n_head)
    q, k, v, dout = (torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=True) for _ in range(4))

    def call(backend):
        with sdpa_kernel(backend):
            torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), dout)

    backends = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
    found = harness.time_together({b: [functools.partial(call, b)] for b in backends}, 5, 0.01)
    return min((b for b in backends if isinstance(found[b], Timing)), key=lambda b: found[b].median)


def ours(setup, spec, compile_, graphed=False):
    """The Arm of a GPT by a --kernels spec."""
    c = setup.config
    module = setup.adopt(lambda: GPT(c))
    inner = torch.compile(module, dynamic=False) if compile_ else module
    kernels = choose(spec, Shape.of(setup.case.batch_size, c), DTYPE, DEVICE, compile_, graphed)
    module.set_kernels(kernels)
    shadows = None
    if dtype := shadow_dtype(kernels, DTYPE):
        shadows = Shadows(module, dtype)
        shadows.remove()  # until this arm takes over
    call = lambda idx, targets: inner(idx, targets, return_logits=False)  # noqa: E731
    return Arm(module, call, setup.optimizer, kernels, shadows, graphed)


@arm("fastgpt")
def fastgpt(setup):
    """--runner=compile: each op by the fastest implementation that is equal, compiled."""
    return ours(setup, "auto", True)


@arm("fastgpt-eager")
def fastgpt_eager(setup):
    """--runner=eager."""
    return ours(setup, "auto", False)


@arm("fastgpt-triton")
def fastgpt_triton(setup):
    """Every Triton kernel, compiled."""
    needs_gpu("the Triton kernel")
    return ours(setup, "triton", True)


@arm("fastgpt-graphs")
def fastgpt_graphs(setup):
    """--runner=graphs: each micro-step replays a CUDA graph. By default train.py takes the fastest of this, `fastgpt` and plain PyTorch."""
    needs_gpu("a CUDA graph")
    if setup.case.model != "gpt2":
        raise NotHere("only the smallest model leaves its graphs room beside the other arms")
    return ours(setup, "auto", False, graphed=True)


@arm("liger")
def liger(setup):
    """The compiled model with Liger-Kernel's LayerNorm and loss."""
    needs_gpu("Liger-Kernel")
    return compiled_arm(setup, setup.adopt(lambda: LigerGPT(setup.config)))


@arm("huggingface")
def huggingface(setup):
    """Hugging Face's GPT-2, compiled, on weights of its own."""
    with torch.device(DEVICE):
        module = HuggingFaceGPT(setup.config)
    return Arm(module, torch.compile(module, dynamic=False), optimizer_of(module.parameters()))


# ---- equality ----


def autocast():
    """The context in which the trainer runs on this machine."""
    return torch.autocast("cuda", dtype=DTYPE) if CUDA else nullcontext()


def iterate(arm, tokens, accumulation, context=None):
    """One iteration of an arm: its loss, on the device."""
    arm.take_over()
    scaler, context = torch.amp.GradScaler("cuda", enabled=False), context or autocast()
    replays = arm.graphs_of(tokens.get()[0].shape, scaler, accumulation, context)
    return step.train_step(arm, arm.optimizer, scaler, tokens, accumulation, context, 1.0, replays)[0]


def micro_step(arm, tokens):
    """Forward and backward of an arm."""
    arm.take_over()
    with autocast():
        _, loss = arm(*tokens.get())
    loss.backward()
    arm.optimizer.zero_grad(set_to_none=True)


def begins_equal(arm, initial):
    """Raise ArithmeticError unless an arm's weights are the initial ones, bit for bit."""
    arm.reset(initial)
    for name, value in arm.weights().items():
        if name in initial and not torch.equal(value.cpu(), initial[name]):
            raise ArithmeticError(f"not equal: the initial {name}")


def losses(arm, weights, tokens, steps, slices=1, context=None):
    """The losses of an arm's first steps from these weights; tokens has each batch in `slices`."""
    arm.reset(weights)
    tokens.at = 0
    return torch.stack([iterate(arm, tokens, MICRO_STEPS * slices, context) for _ in range(steps)]).double().cpu()


def plain_and_exact(setup, tokens):
    """The losses of the plain model, and those in a higher precision.

    On the CPU that is fp64. On a GPU it is fp32 with products in TF32, which has eight times bf16's digits; batches are sliced there,
    since in fp32 a whole one may not fit.
    """
    slices = max(1, tokens.batches[0][0].size(0) // 4) if CUDA else 1
    tokens, weights = tokens.sliced(slices), setup.stressed
    plain = losses(eager(setup), weights, tokens, STEPS, slices)
    if not CUDA:
        module = PlainGPT(setup.config).double()
        arm = Arm(module, module, optimizer_of(module.parameters()))
        return plain, losses(arm, {n: t.double() for n, t in weights.items()}, tokens, STEPS)
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    try:
        return plain, losses(eager(setup), weights, tokens, STEPS, slices, nullcontext())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def agree(found, plain, exact):
    """The three-way rule on loss curves: found is no further from exact than twice plain is, plus the rounding of one step in the compute
    dtype. Raises ArithmeticError."""
    floor = torch.finfo(DTYPE).eps * exact.abs().max().item() * (0.05 if CUDA else 4)
    error, allowed = ((x - exact).abs().max().item() for x in (found, plain))
    if not error <= 2 * allowed + floor:
        raise ArithmeticError(
            f"not equal: losses are {error:.2g} from exact ones over {len(exact)} steps, plain PyTorch's {allowed:.2g}"
        )


# ---- the comparison ----


class Step(harness.Comparison):
    """The step with its arms as providers. Each arm is built once for a case, and measured in its wave."""

    how, full, quick = "events", (7, 1.0), (5, 0.3) if CUDA else (7, 0.05)

    def importance(self, case, provider):
        return case.importance + WAVES.index(self.wave(provider))

    def wave(self, provider):
        return next(wave for wave in WAVES if provider in wave)

    def begin(self, case):
        self.arms, self.facts = {}, {}
        self.setup, self.tokens = Setup(case), Tokens(case.config, case.batch_size)
        self.curves = plain_and_exact(self.setup, self.tokens)
        self.stages = self.build, self.hold  # all are built before one is compiled: choosing kernels resets compilers

    def build(self, name):
        if name not in self.arms:
            self.arms[name] = self.providers[name](self.setup)

    def hold(self, name):
        """Hold an arm equal, and leave it at the initial weights."""
        if name not in self.calls:
            begins_equal(self.arms[name], self.setup.initial)
            self.agree(name, STEPS)
            self.arms[name].reset(self.setup.initial)
            self.calls[name] = [functools.partial(iterate, self.arms[name], self.tokens, self.case.accumulation)]

    def agree(self, name, steps):
        found = losses(self.arms[name], self.setup.stressed, self.tokens, steps)
        agree(found, *(curve[:steps] for curve in self.curves))

    def fail(self, name, why):
        self.arms.pop(name, None)
        self.setup.optimizer.zero_grad(set_to_none=True)
        super().fail(name, why)

    def settle(self, name):
        """One micro-step: it finds the allocator as another arm left it."""
        iterate(self.arms[name], self.tokens, 1)

    def finish(self, name):
        """Hold an arm equal again, now that it was timed; see what it launches and keeps; write its profile where one is wanted."""
        arm, timing = self.arms[name], self.timings[name]
        timing.peak = timing.peak and timing.peak + arm.resident()
        self.agree(name, STEPS_AFTER)
        self.facts[name] = profile.facts(functools.partial(micro_step, arm, self.tokens))
        if self.profile_to:
            path = f"{self.profile_to}/{self.case} {name}".replace(" ", "-")
            shape = Shape.of(self.case.batch_size, self.case.config)
            profile.write(functools.partial(iterate, arm, self.tokens, 1), shape, self.case.config.n_layer, path)

    def info(self, name, timing):
        case, c = self.case, self.case.config
        tokens_per_s = case.batch_size * case.accumulation * c.block_size / timing.median
        # nanoGPT's count: 6 N + 12 L C T a token, N without the position embeddings.
        n = n_params(Shape.of(1, c), c.n_layer) - c.block_size * c.n_embd
        flops = tokens_per_s * (6 * n + 12 * c.n_layer * c.n_embd * c.block_size)
        peak = metrics.peak_flops(DEVICE, str(DTYPE)[6:])
        return dict(
            kind="step", model=case.model, shape=f"B={case.batch_size} x {case.accumulation}, T={c.block_size}",
            batch_size=case.batch_size, tokens_per_s=tokens_per_s, mfu=peak and flops / peak,
            mfu_of_ceiling=flops / ceilings()["flops"], **self.facts[name],
        )  # fmt: skip


test_step = Step("step", cases(), ARMS).benchmark()
