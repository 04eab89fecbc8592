"""One record for each op: everything that the tools know about it.

A record holds the op's test problem: inputs, PyTorch's function, Triton's function, and the shapes that `fastgpt verify` checks. It also
holds the op's launch configuration, what its Triton kernels read and write, the least bytes and FLOPs that it needs, and how often a
step runs it. verify, choose, tune, `bench count`, `bench roofline` and the benchmarks read the records.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt import ops, reference
from fastgpt.config import GPTConfig

FP32 = 4  # bytes of an element; the dtype of the residual stream, the weights, their gradients and moments


@dataclass(frozen=True)
class Shape:
    """The sizes of a problem: B sequences of T tokens, a model's width, heads and vocabulary."""

    B: int
    T: int
    n_embd: int
    n_head: int
    vocab_size: int
    bias: bool = True
    dropout: float = 0.0
    doc_mask: bool = False
    narrow_residual: bool = False  # the residual stream is in the compute dtype, not in fp32
    tanh: bool = False  # the tanh GELU
    n_head_kv: int = 0  # heads of keys and values, if these come apart from the queries

    @classmethod
    def of(cls, B: int, config: GPTConfig, **others: Any) -> "Shape":
        """The Shape of B sequences through a GPTConfig's model; `others` override fields."""
        c = config
        shape = dict(
            T=c.block_size, n_embd=c.n_embd, n_head=c.n_head, vocab_size=c.vocab_size, bias=c.bias, dropout=c.dropout
        )
        return cls(B, **shape | others)


@dataclass
class Problem:
    """An op at a shape: inputs by name, outputs' names and gradients, and functions from the inputs to a tuple of outputs.

    `flowing` names the inputs whose gradient goes on to another op; the others are parameters.
    `reference` is PyTorch's function, with the kernel's dropout mask. `kernel` is Triton's; its argument `row` is the text of a launch
    configuration. `by_ops` is the function of `ops`; its argument `kernels` is a Kernels value. If the op changes inputs in place,
    these three work on copies, and `timed` is `by_ops` without copies.
    """

    inputs: dict[str, torch.Tensor | None]
    outputs: tuple[str, ...]
    grads: tuple[torch.Tensor | None, ...]
    reference: Callable
    kernel: Callable
    by_ops: Callable
    flowing: tuple[str, ...] = ()
    timed: Callable | None = None
    targets: torch.Tensor | None = None  # of the loss


@dataclass(frozen=True)
class Part:
    """One piece of work: FLOPs of the matrix units, bytes of memory, and how often a step does it."""

    op: str
    direction: str
    flops: float
    bytes: float
    times: int = 1

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The least time that all of its repetitions take."""
        return self.times * max(self.flops / flops_per_s, self.bytes / bytes_per_s)


@dataclass(frozen=True)
class Record:
    """What the tools know about an op.

    problem(Draw): its Problem.
    kernels: {Triton kernel: "what it reads -> what it writes"}: names of parameters without `_ptr`. a:b means as many rows of a as b
    has elements. A parameter that is None does not count. In kernels named "mlp_gemm..." the first three are the GEMM itself.
    parts(shape, itemsize): [Part] of one call.
    times(n_layer): calls in a step.
    step(shape, n_layer, itemsize): [Part] of a step; None: `parts` for each call.
    row(shape, dtype, device): the launch configuration from the shipped tables; None for an op without a table.
    """

    name: str
    problem: Callable
    kernels: dict[str, str]
    parts: Callable
    times: Callable
    step: Callable | None = None
    row: Callable | None = None
    dropout: bool = False  # this and the next three: options that the op has, and that verify checks
    doc_mask: bool = False
    narrow_residual: bool = False
    tanh: bool = False
    halves: bool = True  # whether its outputs are of 16 bits under autocast
    by_row: bool = False  # runs one program for each row, which takes Triton's interpreter milliseconds

    def cases(self, dtype: torch.dtype, gpu: bool) -> Iterator[Shape]:
        """Yield the shapes at which `fastgpt verify` checks the op in a dtype. They use each of its options, and no shape comes twice."""
        shapes = GPU_SHAPES if gpu else INTERPRETER_SHAPES
        half = dtype != torch.float32
        if self.by_row and not gpu:
            shapes = [replace(shape, T=shape.T // 2) for shape in shapes]
        for shape in shapes:
            if (self.halves or not half) and (not shape.dropout or self.dropout):
                yield shape
        if self.doc_mask:
            yield replace(shapes[0], doc_mask=True)
            yield replace(shapes[-1], doc_mask=True)
            yield from GPU_HEADS if gpu else ()
            yield from GPU_GROUPS if gpu else INTERPRETER_GROUPS
        if self.tanh:
            yield replace(shapes[0], tanh=True)
        if self.narrow_residual and half:
            yield replace(shapes[0], narrow_residual=True)
            yield replace(shapes[-1], narrow_residual=True)

    def parts_of_step(self, shape: Shape, n_layer: int, itemsize: int) -> list[Part]:
        """[Part] of all its calls in a step of n_layer blocks."""
        if self.step:
            return self.step(shape, n_layer, itemsize)
        times = self.times(n_layer)
        return [replace(p, times=p.times * times) for p in self.parts(shape, itemsize)]


GPU_SHAPES = [
    Shape(2, 1024, 768, 12, 50304),
    Shape(1, 1023, 1600, 25, 50257, bias=False),
    Shape(2, 256, 384, 6, 65, dropout=0.2),
]
GPU_HEADS = [Shape(1, 300, 512, 4, 1000), Shape(1, 300, 480, 10, 1000)]  # heads of 128, and of 48, which are padded
GPU_GROUPS = [Shape(2, 1024, 768, 12, 1000, n_head_kv=4), Shape(1, 300, 512, 4, 1000, dropout=0.2, n_head_kv=1)]
INTERPRETER_SHAPES = [
    Shape(2, 67, 48, 3, 101),
    Shape(1, 33, 130, 2, 517, bias=False),
    Shape(1, 40, 32, 2, 65, dropout=0.2),
]
INTERPRETER_GROUPS = [Shape(1, 67, 64, 4, 101, n_head_kv=2), Shape(1, 40, 48, 3, 65, dropout=0.2, n_head_kv=1)]
RECORDS: dict[str, Record] = {}  # by op, in the order of ops.OPS


def record(**facts: Any) -> Callable:
    """A decorator that registers a function of a Draw as the problem of the op of its name. facts: the Record's other fields."""

    def register(problem):
        RECORDS[problem.__name__] = Record(problem.__name__, problem, **facts)
        return problem

    return register


def problem(op: str, shape: Shape, dtype: torch.dtype, device: str | torch.device) -> Problem:
    """The Problem of an op at a Shape, as in training under autocast to dtype (float32: without autocast)."""
    return RECORDS[op].problem(Draw(shape, dtype, device))


def widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in dtype; but fp64 stays fp64, so that the exact path rounds nowhere."""
    return x if x.dtype == torch.float64 else x.to(dtype)


class Draw:
    """Draws the random tensors of a Problem for a Shape, a compute dtype and a device. They are the same each time."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str | torch.device):
        self.shape, self.dtype, self.device = shape, dtype, device
        self.residual_dtype = dtype if shape.narrow_residual else torch.float32
        self.seed = torch.tensor([0x1234567_89ABCDE], device=device) if shape.dropout else None
        self.generator = torch.Generator(device).manual_seed(1)

    def randn(self, *size: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        """A tensor of normal values."""
        return (torch.randn(size, device=self.device, generator=self.generator) * scale + shift).to(dtype)

    def randint(self, high: int, *size: int) -> Tensor:
        """Integers below high."""
        return torch.randint(high, size, device=self.device, generator=self.generator)

    def bias(self, n: int) -> Tensor | None:
        """A bias [n], or None if the shape has no biases."""
        return self.randn(n) if self.shape.bias else None

    def dropped(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x after dropout that keeps the elements of mask; None keeps all."""
        return x if mask is None else x * mask / (1 - self.shape.dropout)

    def problem(
        self, inputs: dict[str, Any], outputs: tuple[str, ...], grads: tuple[Tensor | None, ...], reference: Callable,
        kernel: Callable, by_ops: Callable, **others: Any,
    ) -> Problem:  # fmt: skip
        """A Problem whose functions run under autocast."""
        reference, kernel, by_ops = map(self.autocast, (reference, kernel, by_ops))
        return Problem(inputs, outputs, grads, reference, kernel, by_ops, **others)

    def autocast(self, f: Callable) -> Callable:
        """f under autocast to the compute dtype, if that has 16 bits."""

        def call(*inputs, **how):
            with torch.autocast(torch.device(self.device).type, self.dtype, enabled=self.dtype != torch.float32):
                return f(*inputs, **how)

        return call


# ---- parts that several ops share ----


def gemm(
    op: str, direction: str, m: int, n: int, k: int, itemsize: int, out_itemsize: int | None = None, extra: float = 0,
    times: int = 1,
) -> Part:  # fmt: skip
    """The Part of [m, k] times [k, n]. extra: bytes that an epilogue moves in addition."""
    moved = (m * k + k * n) * itemsize + m * n * (out_itemsize or itemsize) + extra
    return Part(op, direction, 2 * m * n * k, moved, times)


def linear_parts(op: str, m: int, n: int, k: int, itemsize: int, times: int = 1) -> list[Part]:
    """The Parts of a Linear [n, k] on m rows: the product, the input's gradient, and the weight's gradient in fp32."""
    return [
        gemm(op, "forward", m, n, k, itemsize, times=times),
        gemm(op + " dX", "backward", m, k, n, itemsize, times=times),
        gemm(op + " dW", "backward", n, k, m, itemsize, FP32, times=times),
    ]


# ---- the ops ----


def embedding_parts(s: Shape, itemsize: int) -> list[Part]:
    """Forward: reads each row of the table that can occur, and writes a row for each token. Backward: reads the stream's gradient
    once, and adds it to those rows."""
    M, C = s.B * s.T, s.n_embd
    rows = min(M, s.vocab_size)
    return [
        Part("embedding", "forward", 0, (M + rows) * C * FP32),
        Part("embedding", "backward", 0, (M + 2 * rows + s.T) * C * FP32),
    ]


@record(
    kernels={
        "embed_forward": "idx wte:idx wpe:idx seed -> x",
        "embed_backward_wpe": "dx seed -> dwpe",
        "embed_keys": "idx -> keys",
        "embed_backward_wte": "dx ids places seed dwte:ids -> dwte:ids runs partial",
        "embed_backward_spans": "runs partial dwte:runs -> dwte:runs",
    },
    row=lambda s, dtype, device: ops.triton.configs.embedding(),
    parts=embedding_parts,
    times=lambda n_layer: 1,
    dropout=True, narrow_residual=True, halves=False, by_row=True,
)  # fmt: skip
def embedding(draw: Draw) -> Problem:
    s, p, seed, dtype = draw.shape, draw.shape.dropout, draw.seed, draw.residual_dtype
    idx = draw.randint(s.vocab_size, s.B, s.T)
    idx[:, ::3] = 0  # one token is frequent, as in a text
    mask = None
    if p:
        one, nothing = (torch.ones(1, s.n_embd, device=draw.device), torch.zeros(s.T, s.n_embd, device=draw.device))
        mask = ops.triton.embedding.embedding(idx * 0, one, nothing, p, seed)[0] != 0

    def by_reference(wte, wpe):
        x, head = reference.embedding(idx, wte, wpe)
        return draw.dropped(widened(x, dtype), mask), head

    return draw.problem(
        dict(wte=draw.randn(s.vocab_size, s.n_embd), wpe=draw.randn(s.T + 1, s.n_embd)), ("x", "head"),
        (draw.randn(s.B, s.T, s.n_embd, dtype=dtype), draw.randn(s.vocab_size, s.n_embd)),
        by_reference,
        lambda wte, wpe, row="": ops.triton.embedding.embedding(idx, wte, wpe, p, seed, dtype, row),
        lambda wte, wpe, kernels: ops.embedding(idx, wte, wpe, p, dtype, kernels),
    )  # fmt: skip


def layer_norm_parts(s: Shape, itemsize: int) -> list[Part]:
    """The first LayerNorm of a model: it has no branch to add."""
    n = s.B * s.T * s.n_embd
    return [
        Part("layer_norm", "forward", 0, n * (FP32 + itemsize)),
        Part("layer_norm", "backward", 0, n * (2 * FP32 + itemsize)),
    ]


def add_layer_norm_parts(s: Shape, itemsize: int, times: int = 1) -> list[Part]:
    """Reads the stream and a branch, writes the new stream and its norm; backward the same for gradients. Branch: compute dtype."""
    n = s.B * s.T * s.n_embd
    return [
        Part("add_layer_norm", "forward", 0, n * 2 * (FP32 + itemsize), times),
        Part("add_layer_norm", "backward", 0, n * (3 * FP32 + 2 * itemsize), times),
    ]


@record(
    kernels={
        "norm_forward": "x branch weight bias seed -> stream h stats",
        "norm_backward": "dh dstream stream stats weight seed -> dx dbranch partial",
    },
    row=lambda s, dtype, device: ops.triton.configs.layer_norm(s.n_embd),
    parts=add_layer_norm_parts,
    step=lambda s, n_layer, itemsize: layer_norm_parts(s, itemsize) + add_layer_norm_parts(s, itemsize, 2 * n_layer),
    times=lambda n_layer: 2 * n_layer + 1,
    dropout=True, narrow_residual=True, by_row=True,
)  # fmt: skip
def layer_norm(draw: Draw) -> Problem:
    """The problem of add_layer_norm; layer_norm is the same without a branch."""
    s, p, seed, size = draw.shape, draw.shape.dropout, draw.seed, (draw.shape.B, draw.shape.T, draw.shape.n_embd)
    mask = None
    if p:
        zeros, ones = torch.zeros(size, device=draw.device), torch.ones(size, device=draw.device)
        mask = ops.triton.layer_norm.add_layer_norm(zeros, ones, ones[0, 0], dropout_p=p, seed=seed)[0] != 0

    def by_reference(x, branch, weight, bias):
        x = x + draw.dropped(branch, mask).to(x.dtype)
        return x, widened(reference.layer_norm(x, weight, bias), draw.dtype)

    return draw.problem(
        dict(
            x=draw.randn(*size, dtype=draw.residual_dtype), branch=draw.randn(*size, dtype=draw.dtype),
            weight=draw.randn(s.n_embd, shift=1.0), bias=draw.bias(s.n_embd),
        ),
        ("stream", "h"), (draw.randn(*size, dtype=draw.residual_dtype), draw.randn(*size, dtype=draw.dtype)),
        by_reference,
        lambda *inputs, row="": ops.triton.layer_norm.add_layer_norm(*inputs, dropout_p=p, seed=seed, row=row),
        lambda *inputs, kernels: ops.add_layer_norm(*inputs, dropout_p=p, kernels=kernels), flowing=("x", "branch"),
    )  # fmt: skip


@record(
    kernels={},
    parts=lambda s, itemsize: linear_parts("linear", s.B * s.T, 3 * s.n_embd, s.n_embd, itemsize),
    step=lambda s, n_layer, itemsize: [
        *linear_parts("qkv", s.B * s.T, 3 * s.n_embd, s.n_embd, itemsize, n_layer),
        *linear_parts("proj", s.B * s.T, s.n_embd, s.n_embd, itemsize, n_layer),
    ],
    times=lambda n_layer: 2 * n_layer,
)
def linear(draw: Draw) -> Problem:
    s, C = draw.shape, draw.shape.n_embd
    return draw.problem(
        dict(h=draw.randn(s.B, s.T, C, dtype=draw.dtype), weight=draw.randn(3 * C, C, scale=C**-0.5), bias=draw.bias(3 * C)),
        ("y",), (draw.randn(s.B, s.T, 3 * C, dtype=draw.dtype),),
        lambda *inputs: (reference.linear(*inputs),),
        lambda *inputs, row="": (ops.triton.linear.linear(*inputs),),
        lambda *inputs, kernels: (ops.linear(*inputs, kernels=kernels),), flowing=("h",),
    )  # fmt: skip


def attention_parts(s: Shape, itemsize: int) -> list[Part]:
    """Causal: half of the scores count. Two products forward, five backward; 4 bytes of lse for each row and head."""
    M, C = s.B * s.T, s.n_embd
    return [
        Part("attention", "forward", 2 * M * s.T * C, 4 * M * C * itemsize + 4 * M * s.n_head),
        Part("attention", "backward", 5 * M * s.T * C, 8 * M * C * itemsize + 4 * M * s.n_head),
    ]


@record(
    kernels={
        "attention_forward": "q k v doc_ids seed -> out lse",
        "attention_delta": "out dout -> delta",
        "attention_backward": "q k v dout doc_ids seed lse delta -> dq dk dv",
    },
    row=lambda s, dtype, device: ops.triton.configs.attention(torch.device(device), dtype, s.n_embd // s.n_head),
    parts=attention_parts,
    times=lambda n_layer: n_layer,
    dropout=True, doc_mask=True,
)  # fmt: skip
def attention(draw: Draw) -> Problem:
    s, p, seed, H = draw.shape, draw.shape.dropout, draw.seed, draw.shape.n_head
    B, T, C = s.B, s.T, s.n_embd
    doc_ids = None
    if s.doc_mask:
        # Short documents and a long one: a kernel that skips much for short documents must not be chosen for that alone.
        starts = 11 * torch.arange(B, device=draw.device, dtype=torch.int32)[:, None]  # sequences differ
        doc_ids = ((torch.arange(T, device=draw.device, dtype=torch.int32) + starts) // 37).clamp(max=4)
    mask = ops.triton.attention.dropout_mask(B, H, T, p, seed) if p else None
    name, size, options = "attention", [B, T, C], [H]
    inputs = dict(qkv=draw.randn(B, T, 3 * C, dtype=draw.dtype))
    if s.n_head_kv:
        name, size, options = "attention_qkv", [B, T, H, C // H], []
        heads = dict(q=H, k=s.n_head_kv, v=s.n_head_kv)
        inputs = {n: draw.randn(B, T, of, C // H, dtype=draw.dtype) for n, of in heads.items()}

    def by_reference(*inputs):
        if mask is None:
            return (getattr(reference, name)(*inputs, *options, doc_ids=doc_ids),)
        q, k, v = inputs if s.n_head_kv else (t.view(B, T, H, -1) for t in inputs[0].split(C, dim=2))
        q, k, v = (t.repeat_interleave(H // t.size(2), 2).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) / (C // H) ** 0.5
        allowed = torch.ones(T, T, dtype=torch.bool, device=draw.device).tril()
        if doc_ids is not None:
            allowed = allowed & (doc_ids[:, None, :, None] == doc_ids[:, None, None, :])
        probabilities = widened(scores, torch.float32).masked_fill(~allowed, -float("inf")).softmax(-1)
        y = draw.dropped(probabilities, mask).to(v.dtype) @ v
        return (y.transpose(1, 2).reshape(size),)

    return draw.problem(
        inputs, ("out",), (draw.randn(*size, dtype=draw.dtype),), by_reference,
        lambda *inputs, row="": (getattr(ops.triton.attention, name)(*inputs, *options, p, seed, doc_ids, row),),
        lambda *inputs, kernels: (getattr(ops, name)(*inputs, *options, p, doc_ids=doc_ids, kernels=kernels),), flowing=tuple(inputs),
    )  # fmt: skip


def gelu_mlp_parts(s: Shape, itemsize: int) -> list[Part]:
    """Two Linears with the GELU in their epilogues. Forward also writes the pre-activation, and backward reads it."""
    M, C, F = s.B * s.T, s.n_embd, 4 * s.n_embd
    up, up_dx, up_dw = linear_parts("mlp up", M, F, C, itemsize)
    down, down_dx, down_dw = linear_parts("mlp down", M, C, F, itemsize)
    gelu = M * F * itemsize
    return [
        Part("mlp up + GELU", "forward", up.flops, up.bytes + gelu), down,
        Part("mlp down dX + GELU'", "backward", down_dx.flops, down_dx.bytes + gelu), down_dw, up_dx, up_dw,
    ]  # fmt: skip


@record(
    kernels={"mlp_gemm forward": "a b bias -> post pre", "mlp_gemm backward": "a b pre -> dpre post partial"},
    row=lambda s, dtype, device: ops.triton.configs.gelu_mlp(
        torch.device(device), dtype, s.n_embd * dtype.itemsize % 16 == 0
    ),
    parts=gelu_mlp_parts,
    times=lambda n_layer: n_layer,
    tanh=True,
)
def gelu_mlp(draw: Draw) -> Problem:
    s, C, form = draw.shape, draw.shape.n_embd, "tanh" if draw.shape.tanh else "none"
    return draw.problem(
        dict(
            h=draw.randn(s.B, s.T, C, dtype=draw.dtype), w_fc=draw.randn(4 * C, C, scale=C**-0.5), b_fc=draw.bias(4 * C),
            w_proj=draw.randn(C, 4 * C, scale=C**-0.5 / 2), b_proj=draw.bias(C),
        ),
        ("y",), (draw.randn(s.B, s.T, C, dtype=draw.dtype),),
        lambda *inputs: (reference.gelu_mlp(*inputs, approximate=form),),
        lambda *inputs, row="", recompute=False: (ops.triton.gelu_mlp.gelu_mlp(*inputs, recompute=recompute, row=row, approximate=form),),
        lambda *inputs, kernels: (ops.gelu_mlp(*inputs, approximate=form, kernels=kernels),), flowing=("h",),
    )  # fmt: skip


def linear_cross_entropy_parts(s: Shape, itemsize: int) -> list[Part]:
    """The head's three GEMMs, and one pass over the logits: it reads them for the loss, and overwrites them with their gradient."""
    M, V = s.B * s.T, s.vocab_size
    head = linear_parts("head", M, V, s.n_embd, itemsize)
    return [
        head[0],
        Part("cross_entropy", "forward", 0, M * V * itemsize),
        Part("cross_entropy", "backward", 0, M * V * itemsize),
        *head[1:],
    ]


@record(
    kernels={
        "loss_rows": "logits targets -> loss logits",
        "loss_mean": "losses targets -> loss share",
        "loss_scale": "x dloss share -> out",
    },
    row=lambda s, dtype, device: ops.triton.configs.linear_cross_entropy(),
    parts=linear_cross_entropy_parts,
    times=lambda n_layer: 1,
)
def linear_cross_entropy(draw: Draw) -> Problem:
    s, C = draw.shape, draw.shape.n_embd
    targets = draw.randint(s.vocab_size, s.B, s.T)
    targets[:, ::7] = ignored = -1  # as in a GPT

    def by_reference(h, weight):
        return (reference.cross_entropy(widened(F.linear(h, weight), torch.float32), targets, ignored),)

    return draw.problem(
        dict(h=draw.randn(s.B, s.T, C, dtype=draw.dtype), weight=draw.randn(s.vocab_size, C, scale=2 * C**-0.5)),
        ("loss",), (torch.tensor(3.0, device=draw.device),),
        by_reference,
        lambda h, weight, row="": (ops.triton.linear_cross_entropy.linear_cross_entropy(h, weight, targets, ignored, row=row),),
        lambda h, weight, kernels: (ops.linear_cross_entropy(h, weight, targets, ignored, kernels=kernels),),
        flowing=("h", "weight"), targets=targets,  # the tied head's gradient goes to the embedding
    )  # fmt: skip


def update_parts(n_params: int, shadow: int = 2) -> list[Part]:
    """The gradients' norm, and AdamW. AdamW reads weight, gradient and two moments, and writes all but the gradient.
    shadow: bytes of a shadow's element, which it also writes."""
    return [
        Part("gradient norm", "update", 0, n_params * FP32),
        Part("AdamW", "update", 0, n_params * (7 * FP32 + shadow)),
    ]


def n_params(s: Shape, n_layer: int) -> int:
    """Number of parameters of a GPT of a Shape, with the position embeddings."""
    C, F = s.n_embd, 4 * s.n_embd
    weights = 4 * C * C + 2 * C * F + 2 * C
    biases = (3 * C + C + F + C + 2 * C) * s.bias
    return (s.vocab_size + s.T + 1 + s.bias) * C + n_layer * (weights + biases)


@record(
    kernels={},  # `bench count` counts a micro-step, and the update is outside it
    row=lambda s, dtype, device: ops.triton.configs.adamw(),
    parts=lambda s, itemsize: update_parts(s.vocab_size * s.n_embd + s.n_embd + 1),
    step=lambda s, n_layer, itemsize: update_parts(n_params(s, n_layer)),
    times=lambda n_layer: 1,
)
def adamw(draw: Draw) -> Problem:
    """An update of the embedding's weight, with a shadow in the compute dtype, and of a bias."""
    V, C, device, half = draw.shape.vocab_size, draw.shape.n_embd, draw.device, draw.dtype != torch.float32
    inputs = {}
    for name, size in (("weight", (V, C)), ("bias", (C + 1,))):
        # Gradients from far below eps (rare tokens have such) to far above it, and moments that match them.
        g = draw.randn(*size) * 10 ** (3 * draw.randn(*size).clamp(-2, 2) - 4)
        inputs |= {
            name: draw.randn(*size),
            "gradient of " + name: g,
            "exp_avg of " + name: g * draw.randn(*size),
            "exp_avg_sq of " + name: g * g,
        }
    clip = inputs["gradient of weight"].norm().item() / 2

    def in_place(update):
        @torch.no_grad()
        def call(*tensors, **how):
            weight, bias = tensors[:4], tensors[4:]
            shadow = torch.empty_like(weight[0], dtype=widened(weight[0], draw.dtype).dtype) if half else None
            groups = [
                dict(
                    params=[p], grads=[g], exp_avgs=[m], exp_avg_sqs=[v], steps=[torch.full((), t, device=device)], lr=0.1,
                    betas=(0.9, 0.95), eps=1e-8, weight_decay=decay, fused=torch.device(device).type == "cuda", shadows=[s],
                )
                for (p, g, m, v), t, decay, s in ((weight, 1.0, 0.5, shadow), (bias, 900.0, 0.0, None))
            ]  # fmt: skip
            norm = update(groups, [weight[1], bias[1]], clip, **how)
            return *(t for i, t in enumerate(tensors) if i % 4 != 1), norm, *([shadow] if half else [])

        return call

    def copying(update):
        return lambda *tensors, **how: in_place(update)(*(t.clone() for t in tensors), **how)

    outputs = *(name for name in inputs if "gradient" not in name), "norm", *(["shadow"] if half else [])
    return Problem(
        inputs, outputs, (None,) * len(outputs), copying(reference.adamw),
        copying(lambda *args, **how: ops.triton.adamw.adamw(*args, **how)), copying(ops.adamw), timed=in_place(ops.adamw),
    )  # fmt: skip
