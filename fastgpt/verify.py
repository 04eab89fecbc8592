"""`fastgpt verify`: hold every kernel to PyTorch, on this machine, and say how near it comes.

The rule is three-way: against fp64, a kernel's error is at most twice that of the same maths in PyTorch at the same dtypes,
plus a floor, since on few elements PyTorch's own error may be near nothing: one unit in the last place of the largest element,
in fp32, where the order of a sum decides, four. It holds for every output and every gradient; and repeated runs must give
the same bits.
"""

import json
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from torch.nn import functional as F

from fastgpt import ops, reference
from fastgpt.config import UserError


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
    documents: bool = False
    narrow: bool = False  # the residual stream in the compute dtype, not in fp32

    @classmethod
    def of(cls, B, config, **others):
        """That of B sequences through a GPTConfig's model; others as above, in place of the config's."""
        c = config
        shape = dict(
            T=c.block_size, n_embd=c.n_embd, n_head=c.n_head, vocab_size=c.vocab_size, bias=c.bias, dropout=c.dropout
        )
        return cls(B, **shape | others)


@dataclass
class Problem:
    """An op at a shape: inputs by name, gradients of its outputs, and three functions of the inputs that give a tuple.

    `kernel` is the Triton op, `reference` PyTorch's with the kernel's dropout mask, `chosen` what ops would run; `targets` are the
    loss's. `timed` is `chosen` where it works in place, the others then on copies.
    """

    inputs: dict
    outputs: tuple
    grads: tuple
    kernel: Callable
    reference: Callable
    chosen: Callable
    targets: torch.Tensor | None = None
    timed: Callable | None = None


def widened(x, dtype):
    """x in dtype, or in fp64 where it is: the exact path is rounded nowhere."""
    return x if x.dtype == torch.float64 else x.to(dtype)


class LateModule:
    """An op's kernels, imported where they are first used: PyTorch's side of a Problem needs no Triton."""

    def __init__(self, op):
        self.op = op

    def __getattr__(self, name):
        return getattr(ops.kernels(self.op), name)


def problem(op, shape, dtype, device):
    """The Problem of an op at a Shape, as training under autocast to dtype would have it (float32: without autocast)."""
    B, T, C, V, p = shape.B, shape.T, shape.n_embd, shape.vocab_size, shape.dropout
    module = LateModule(op)
    seed = torch.tensor([0x1234567_89ABCDE], device=device) if p else None
    random = torch.Generator(device).manual_seed(1)
    stream = dtype if shape.narrow else torch.float32

    def randn(*size, dtype=torch.float32, scale=1.0, shift=0.0):
        return (torch.randn(size, device=device, generator=random) * scale + shift).to(dtype)

    def autocast(f):
        def call(*inputs):
            with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
                return f(*inputs)

        return call

    def bias(n):
        return randn(n) if shape.bias else None

    def dropped(x, mask):
        return x if mask is None else x * mask / (1 - p)

    if op == "embedding":
        idx = torch.randint(V, (B, T), device=device, generator=random)
        idx[:, ::3] = 0  # as in a text, one token comes often
        mask = None
        if p:
            one, nothing = torch.ones(1, C, device=device), torch.zeros(T, C, device=device)
            mask = module.embedding(idx * 0, one, nothing, p, seed)[0] != 0

        def reference_embedding(wte, wpe):
            x, head = reference.embedding(idx, wte, wpe)
            return dropped(widened(x, stream), mask), head

        return Problem(
            dict(wte=randn(V, C), wpe=randn(T + 1, C)), ("x", "head"), (randn(B, T, C, dtype=stream), randn(V, C)),
            autocast(lambda wte, wpe: module.embedding(idx, wte, wpe, p, seed, stream)), autocast(reference_embedding),
            autocast(lambda wte, wpe: ops.embedding(idx, wte, wpe, p, stream)),
        )  # fmt: skip
    if op == "layer_norm":
        mask = None
        if p:
            zeros, ones = torch.zeros(B, T, C, device=device), torch.ones(B, T, C, device=device)
            mask = module.add_layer_norm(zeros, ones, ones[0, 0], dropout_p=p, seed=seed)[0] != 0

        def reference_norm(x, branch, weight, bias):
            x = x + dropped(branch, mask).to(x.dtype)
            return x, widened(reference.layer_norm(x, weight, bias), dtype)

        return Problem(
            dict(x=randn(B, T, C, dtype=stream), branch=randn(B, T, C, dtype=dtype), weight=randn(C, shift=1.0), bias=bias(C)),
            ("stream", "h"), (randn(B, T, C, dtype=stream), randn(B, T, C, dtype=dtype)),
            autocast(lambda x, branch, weight, bias: module.add_layer_norm(x, branch, weight, bias, dropout_p=p, seed=seed)),
            autocast(reference_norm),
            autocast(lambda x, branch, weight, bias: ops.add_layer_norm(x, branch, weight, bias, dropout_p=p)),
        )  # fmt: skip
    if op == "attention":
        H = shape.n_head
        docs = None
        if shape.documents:
            # Short ones and a long one: what short ones spare a kernel is not to decide which implementation is the fastest.
            starts = 11 * torch.arange(B, device=device, dtype=torch.int32)[:, None]  # no two sequences alike
            docs = ((torch.arange(T, device=device, dtype=torch.int32) + starts) // 37).clamp(max=4)
        mask = module.dropout_mask(B, H, T, p, seed) if p else None

        def reference_attention(qkv):
            if mask is None:
                return (reference.attention(qkv, H, doc_ids=docs),)
            q, k, v = (t.view(B, T, H, -1).transpose(1, 2) for t in qkv.split(C, dim=2))
            scores = q @ k.transpose(-1, -2) / (C // H) ** 0.5
            allowed = torch.ones(T, T, dtype=torch.bool, device=device).tril()
            if docs is not None:
                allowed = allowed & (docs[:, None, :, None] == docs[:, None, None, :])
            probabilities = widened(scores, torch.float32).masked_fill(~allowed, -float("inf")).softmax(-1)
            y = dropped(probabilities, mask).to(v.dtype) @ v
            return (y.transpose(1, 2).reshape(B, T, C),)

        return Problem(
            dict(qkv=randn(B, T, 3 * C, dtype=dtype)), ("out",), (randn(B, T, C, dtype=dtype),),
            autocast(lambda qkv: (module.flash_attention(qkv, H, p, seed, docs),)), autocast(reference_attention),
            autocast(lambda qkv: (ops.attention(qkv, H, p, doc_ids=docs),)),
        )  # fmt: skip
    if op == "linear":
        return Problem(
            dict(h=randn(B, T, C, dtype=dtype), weight=randn(3 * C, C, scale=C**-0.5), bias=bias(3 * C)),
            ("y",), (randn(B, T, 3 * C, dtype=dtype),),
            autocast(lambda *inputs: (module.linear(*inputs),)),
            autocast(lambda *inputs: (reference.linear(*inputs),)),
            autocast(lambda *inputs: (ops.linear(*inputs),)),
        )  # fmt: skip
    if op == "gelu_mlp":
        return Problem(
            dict(
                h=randn(B, T, C, dtype=dtype), w_fc=randn(4 * C, C, scale=C**-0.5), b_fc=bias(4 * C),
                w_proj=randn(C, 4 * C, scale=C**-0.5 / 2), b_proj=bias(C),
            ),
            ("y",), (randn(B, T, C, dtype=dtype),),
            autocast(lambda *inputs: (module.gelu_mlp(*inputs),)),
            autocast(lambda *inputs: (reference.gelu_mlp(*inputs),)),
            autocast(lambda *inputs: (ops.gelu_mlp(*inputs),)),
        )  # fmt: skip
    if op == "adamw":
        return update_problem(shape, dtype, device, randn)
    targets = torch.randint(V, (B, T), device=device, generator=random)
    targets[:, ::7] = -1

    def reference_loss(h, weight):
        return (reference.cross_entropy(widened(F.linear(h, weight), torch.float32), targets),)

    return Problem(
        dict(h=randn(B, T, C, dtype=dtype), weight=randn(V, C, scale=2 * C**-0.5)),
        ("loss",), (torch.tensor(3.0, device=device),),
        autocast(lambda h, weight: (module.linear_cross_entropy(h, weight, targets),)),
        autocast(reference_loss),
        autocast(lambda h, weight: (ops.linear_cross_entropy(h, weight, targets),)), targets,
    )  # fmt: skip


def update_problem(shape, dtype, device, randn):
    """The Problem of an update: of the embedding's weight, with a shadow in dtype, and of a bias."""
    V, C = shape.vocab_size, shape.n_embd
    inputs = {}
    for name, size in (("weight", (V, C)), ("bias", (C + 1,))):
        # Gradients from far below eps to far above, as those of tokens that a text rarely has; moments that fit them.
        g = randn(*size) * 10 ** (3 * randn(*size).clamp(-2, 2) - 4)
        inputs |= {
            name: randn(*size),
            "gradient of " + name: g,
            "exp_avg of " + name: g * randn(*size),
            "exp_avg_sq of " + name: g * g,
        }
    clip = inputs["gradient of weight"].norm().item() / 2
    low = dtype != torch.float32

    def in_place(op):
        @torch.no_grad()
        def call(*tensors):
            weight, bias = tensors[:4], tensors[4:]
            shadow = torch.empty_like(weight[0], dtype=widened(weight[0], dtype).dtype) if low else None
            groups = [
                dict(
                    params=[p], grads=[g], exp_avgs=[m], exp_avg_sqs=[v], steps=[torch.full((), t, device=device)], lr=0.1,
                    betas=(0.9, 0.95), eps=1e-8, weight_decay=decay, fused=torch.device(device).type == "cuda", shadows=[kept],
                )
                for (p, g, m, v), t, decay, kept in ((weight, 1.0, 0.5, shadow), (bias, 900.0, 0.0, None))
            ]  # fmt: skip
            norm = op.adamw(groups, [weight[1], bias[1]], clip)
            return *(t for i, t in enumerate(tensors) if i % 4 != 1), norm, *([shadow] if low else [])

        return call

    def copying(op):
        return lambda *tensors: in_place(op)(*(t.clone() for t in tensors))

    outputs = *(name for name in inputs if "gradient" not in name), "norm", *(["shadow"] if low else [])
    functions = copying(LateModule("adamw")), copying(reference), copying(ops)
    return Problem(inputs, outputs, (None,) * len(outputs), *functions, timed=in_place(ops))


@dataclass
class Comparison:
    """One tensor: the kernel's and PyTorch's largest error against fp64, the largest element, and the floor of the rule."""

    direction: str
    what: str
    dtype: str
    error: float
    torch_error: float
    largest: float
    floor: float

    @property
    def ratio(self):
        """The kernel's error in PyTorch's, half of the floor added to the latter: the rule is that it is 2 at most."""
        allowed = self.torch_error + self.floor / 2
        return self.error / allowed if allowed else float(self.error > 0) * float("inf")

    @property
    def holds(self):
        """Whether the rule holds; nan never does."""
        return self.error <= 2 * self.torch_error + self.floor


def compared(direction, what, kernel, same, exact):
    """The Comparison of one tensor: the kernel's, PyTorch's at the same dtypes, and fp64's."""
    if kernel is None:
        raise ArithmeticError(f"not equal: there is no {what}")
    if kernel.dtype != same.dtype or kernel.shape != exact.shape:
        kinds = (f"{t.dtype} {tuple(t.shape)}" for t in (kernel, same))
        raise ArithmeticError("not equal: {} is {}, not {}".format(what, *kinds))
    error, allowed = ((t.double() - exact).abs().max().item() if t.numel() else 0.0 for t in (kernel, same))
    largest = exact.abs().max().item() if exact.numel() else 0.0
    units = 4 if kernel.dtype == torch.float32 else 1
    floor = units * torch.finfo(kernel.dtype).eps * largest
    return Comparison(direction, what, str(kernel.dtype).removeprefix("torch."), error, allowed, largest, floor)


def run(f, inputs, grads, exact=False):
    """f's outputs and then the gradients of its floating inputs, as detached tensors; in fp64 where `exact`.

    grads are the outputs' gradients, None where an output is not to be differentiated; of all None nothing is. Strides are kept.
    """
    args = [(x.detach().double() if exact else x.detach()).requires_grad_() if is_floating(x) else x for x in inputs]
    outputs = f(*args)
    pairs = [(o, g.double() if exact else g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    if not pairs:
        return list(outputs)
    torch.autograd.backward(*zip(*pairs, strict=True))
    return [o.detach() for o in outputs] + [a.grad for a in args if is_floating(a)]


def is_floating(x):
    """Whether x is a tensor that has a gradient."""
    return torch.is_tensor(x) and x.is_floating_point()


def compare(kernel, same, inputs, outputs, grads, found=None):
    """A Comparison of each output and of each input's gradient. inputs by name; outputs names what the functions give.

    found: what `run` gave of the kernel, where it has run.
    """
    any_grad = any(g is not None for g in grads)
    names = [("forward" if any_grad else "update", n) for n in outputs]
    names += [("backward", "d" + n) for n, x in inputs.items() if any_grad and is_floating(x)]
    found = found or run(kernel, inputs.values(), grads)
    expected = [run(same, inputs.values(), grads, exact) for exact in (False, True)]
    return [compared(*name, *tensors) for name, *tensors in zip(names, found, *expected, strict=True)]


GPU_SHAPES = [
    Shape(2, 1024, 768, 12, 50304),
    Shape(1, 1023, 1600, 25, 50257, bias=False),
    Shape(2, 256, 384, 6, 65, dropout=0.2),
]
GPU_HEADS = [Shape(1, 300, 512, 4, 1000), Shape(1, 300, 480, 10, 1000)]  # heads of 128; of 48, which are padded
INTERPRETER_SHAPES = [
    Shape(2, 67, 48, 3, 101),
    Shape(1, 33, 130, 2, 517, bias=False),
    Shape(1, 40, 32, 2, 65, dropout=0.2),
]


def cases(op, dtype, gpu):
    """The shapes that an op is held at in a dtype: those at which each of its options takes part, none of them twice."""
    shapes = GPU_SHAPES if gpu else INTERPRETER_SHAPES
    by_row = op in ("embedding", "layer_norm")
    low = dtype != torch.float32
    if by_row and not gpu:  # the interpreter takes milliseconds a row; LayerNorm adds up 64 at once
        shapes = [replace(shape, T=shape.T // 2) for shape in shapes]
    wide = op != "embedding" or not low  # an embedding has nothing in 16 bits but a narrow stream
    for shape in shapes:
        if wide and (not shape.dropout or by_row or op == "attention"):
            yield shape
    if op == "attention":
        yield replace(shapes[0], documents=True)
        yield replace(shapes[-1], documents=True)
        yield from GPU_HEADS if gpu else ()
    if by_row and low:
        yield replace(shapes[0], narrow=True)
        yield replace(shapes[-1], narrow=True)


def compile_all(dtypes):
    """Run every case once on the GPU from as many threads as there are cores: nearly all of that time is compiling."""

    def once(case):
        it = problem(*case, "cuda")
        run(it.kernel, it.inputs.values(), it.grads)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        all_cases = [(op, shape, dtype) for dtype in dtypes for op in ops.KERNELS for shape in cases(op, dtype, True)]
        list(pool.map(once, all_cases))


def verify(json_file=""):
    """Hold every kernel on this machine and print the table; 1 if a row fails, else 0. Raises UserError where it cannot."""
    gpu = torch.cuda.is_available()
    dtypes, place = where(gpu)
    report = {"where": place, "versions": versions(), "rows": []}
    try:
        file = open(json_file, "w") if json_file else None  # before the work
    except OSError as e:
        raise UserError(f"--json={json_file}: {e.strerror}") from None
    print(f"{report['where']}\n{', '.join(f'{k} {v}' for k, v in report['versions'].items())}\n")
    print(f"{'op':22}{'direction':11}{'dtype':10}{'kernel error':>13}{'PyTorch error':>15}{'ratio':>7}")
    device = "cuda" if gpu else "cpu"
    np.seterr(all="ignore")  # the interpreter computes in numpy, masked lanes too
    repeats = 20 if gpu else 2
    if gpu:
        compile_all(dtypes)
    for op in ops.KERNELS:
        for dtype in dtypes:
            worst, same_bits = {}, True
            for shape in cases(op, dtype, gpu):
                it = problem(op, shape, dtype, device)
                found = run(it.kernel, it.inputs.values(), it.grads)
                for _ in range(repeats - 1):
                    again = run(it.kernel, it.inputs.values(), it.grads)
                    same_bits &= all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
                for c in compare(it.kernel, it.reference, it.inputs, it.outputs, it.grads, found):
                    row = dict(
                        op=op, direction=c.direction, dtype=str(dtype)[6:], tensor=c.what, shape=asdict(shape), error=c.error,
                        torch_error=c.torch_error, largest=c.largest, ratio=c.ratio, holds=c.holds,
                    )  # fmt: skip
                    report["rows"].append(row)
                    rank = (not c.holds, c.ratio)
                    if c.direction not in worst or rank > worst[c.direction][0]:
                        worst[c.direction] = rank, row
            for _, row in worst.values():
                size = row["largest"] or 1.0
                print(
                    f"{op:22}{row['direction']:11}{row['dtype']:10}{row['error'] / size:13.1e}{row['torch_error'] / size:15.1e}"
                    f"{row['ratio']:7.2f}" + ("" if row["holds"] else f"  FAILS: {row['tensor']} at {row['shape']}")
                )
            row = dict(op=op, direction="repeat", dtype=str(dtype)[6:], runs=repeats, holds=same_bits)
            report["rows"].append(row)
            if not same_bits:
                print(f"{op:22}{'repeat':11}{row['dtype']:10}  FAILS: {repeats} runs gave different bits")
    failed = sum(not row["holds"] for row in report["rows"])
    print(
        "\nErrors are against fp64, relative to the largest element; each row is the worst of its tensors and shapes. A ratio of 2 is"
        f"\nallowed, half a unit in the last place (fp32: two) counted with PyTorch's error; {repeats} runs must give the same bits."
    )
    print(
        f"{failed} of {len(report['rows'])} comparisons FAIL"
        if failed
        else f"all {len(report['rows'])} comparisons hold"
    )
    report["holds"] = not failed
    if file:
        with file:
            file.write(json.dumps(report, indent=1) + "\n")
    return int(failed > 0)


def where(gpu):
    """(The dtypes that are held where the kernels run, that place in words). Raises UserError where they run nowhere."""
    if gpu:
        if torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 0):
            raise UserError(
                f"verify: the kernels need an NVIDIA GPU from sm_80 on, and this is {torch.cuda.get_device_name()}"
            )
    else:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
    try:
        for op in ops.KERNELS:
            ops.kernels(op)
    except ImportError:
        raise UserError("verify: Triton is not installed; pip install triton") from None
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    if gpu:
        return dtypes, f"{torch.cuda.get_device_name()}, sm_{''.join(map(str, torch.cuda.get_device_capability()))}"
    triton, numpy = version("triton"), version("numpy")
    if triton.startswith("3.6.") and tuple(map(int, numpy.split(".")[:2])) >= (2, 4):
        raise UserError(f"verify: Triton {triton}'s interpreter breaks on numpy {numpy}; pip install 'numpy<2.4'")
    place = (
        f"no CUDA GPU here: Triton's interpreter runs the kernels on the CPU ({platform.machine()}), in small sizes;\n"
    )
    if ops.interpreter_computes_bf16():
        return dtypes, place + "bfloat16 too: where it computes that wrongly, kernels/interpreter.py mends it"
    return dtypes[:2], place + "bfloat16 is a GPU's to verify: this Triton's interpreter computes it wrongly"


def versions():
    """The versions that a report depends on."""
    found = {"python": platform.python_version()}
    for name in ("fastgpt", "torch", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
