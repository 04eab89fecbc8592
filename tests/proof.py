"""Every op of fastgpt by the code that a GPU would run: compiled for an architecture, emulated, held to fp64 by `fastgpt verify`'s rule.

A case is an op, a shape of it and, where it has one, a variation of how it is called. The launch configurations are the table's for the
architecture; nothing is made smaller but the problem.
"""

import functools
import inspect
import itertools
import re
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import faults
import torch
import triton
from kernel_case import SEED, VIEWS, poisoned
from ptx import launch
from ptx.launch import Gpu
from ptx.memory import Fault
from triton.runtime import jit

from fastgpt import kernels
from fastgpt.kernels import configs
from fastgpt.records import Shape, problem
from fastgpt.verify import compare, run

DTYPES = ("bfloat16", "float16", "float32")
KERNELS = {  # that each op launches, forward and backward
    "embedding": {
        "_embed_forward",
        "_embed_keys",
        "_embed_backward_wpe",
        "_embed_backward_wte",
        "_embed_backward_spans",
    },
    "layer_norm": {"_norm_forward", "_norm_backward"},
    "attention": {"_attention_forward", "_attention_delta", "_attention_backward"},
    "gelu_mlp": {"_mlp_gemm"},
    "linear_cross_entropy": {"_loss_rows", "_loss_mean", "_loss_scale"},
    "adamw": {"_adamw_norm", "_adamw_clip", "_adamw_update"},
}


def recomputing(it):
    """gelu_mlp that keeps no activation for its backward."""
    return replace(it, kernel=functools.partial(it.kernel, recompute=True))


def viewed(view, it):
    """Matrices and higher tensors, inputs and gradients, by other strides."""
    of = lambda t: view(t) if torch.is_tensor(t) and t.is_floating_point() and t.dim() > 1 else t  # noqa: E731
    return replace(it, inputs={n: of(t) for n, t in it.inputs.items()}, grads=tuple(map(of, it.grads)))


def one_further(t):
    """t one element further than an allocation begins: no address in it need be a multiple of 16 bytes."""
    return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)


def one_gradient(it):
    """Gradients whose elements are all one in memory, as a sum's are."""
    return replace(
        it, grads=tuple(None if g is None else g.flatten()[:1].view((1,) * g.dim()).expand(g.shape) for g in it.grads)
    )


def some_transposed(it):
    """The first matrix or higher tensor and every second after it, among inputs and among gradients, with two dimensions swapped in memory:
    no two that belong together have the same strides."""
    number = itertools.count()

    def view(t):
        return VIEWS["transposed"](t) if next(number) % 2 == 0 else t

    inputs = viewed(view, replace(it, grads=()))
    number = itertools.count()
    return replace(inputs, grads=viewed(view, it).grads)


def copied_further(it):
    """An update of tensors one element further than an allocation begins: it works on copies, and only they can lie so."""

    def kernel(*inputs):
        with patch.object(torch.Tensor, "clone", one_further):
            return it.kernel(*inputs)

    return replace(it, kernel=kernel)


def in_chunks(it):
    """The loss in chunks of fewer rows than it has, and blocks of fewer columns and rows."""
    row = replace(faults.small_blocks()["LINEAR_CROSS_ENTROPY"], mean_block=64).text
    return replace(it, kernel=functools.partial(it.kernel, row=row))


def in_short_spans(it):
    """The embedding's backward in spans of a few places, and few rows at once."""
    return replace(it, kernel=functools.partial(it.kernel, row=faults.small_blocks()["EMBEDDING"].text))


VARIATIONS = {name: functools.partial(viewed, view) for name, view in {**VIEWS, "one further": one_further}.items()}
VARIATIONS |= {"recompute": recomputing, "some transposed": some_transposed, "chunks": in_chunks}
VARIATIONS |= {"short spans": in_short_spans}
VARIATIONS |= {"one gradient": one_gradient, "copied further": copied_further}

SLOW = {
    "tanh recompute",
    "group, dropout documents",
    "group, other strides",
    "group, whole",
}  # cases of which no plain run has any
S = Shape
CASES = {  # op: {name: (shape, variation or None)}
    "embedding": {
        "partial": (S(2, 67, 48, 3, 101), None),
        "whole": (S(2, 16, 256, 4, 64), None),
        "one token": (S(1, 1, 768, 12, 65), None),
        "dropout": (S(1, 40, 32, 2, 65, dropout=0.2), None),
        "odd width": (S(1, 33, 131, 1, 17), None),
        "wide": (S(1, 40, 1100, 4, 3), None),  # two blocks of columns; runs of one id longer than a program reads at once
        "long runs": (S(2, 200, 48, 3, 5), None),  # over several spans
        "short spans": (S(2, 33, 48, 3, 7), "short spans"),
        "narrow": (S(2, 20, 64, 2, 65, narrow_residual=True), None),
        "narrow dropout": (S(2, 20, 48, 3, 65, dropout=0.2, narrow_residual=True), None),
        "strides": (S(2, 9, 48, 3, 23), "sliced columns"),
        "other strides": (S(2, 9, 48, 3, 23), "some transposed"),
        "unaligned": (S(2, 9, 64, 3, 23), "one further"),
        "one gradient": (S(2, 9, 48, 3, 23), "one gradient"),
    },
    "layer_norm": {
        "partial": (S(2, 67, 48, 3, 101), None),
        "gpt2": (S(1, 20, 768, 12, 101), None),
        "gpt2-xl": (S(1, 9, 1600, 25, 101, bias=False), None),
        "one token": (S(1, 1, 768, 12, 65), None),
        "many rows": (S(3, 180, 264, 12, 65), None),  # more than there are programs: each has several
        "odd width": (S(1, 33, 131, 1, 17, bias=False), None),
        "2100": (S(1, 5, 2100, 1, 17), None),
        "4100": (S(1, 4, 4100, 1, 17), None),
        "dropout": (S(1, 40, 96, 2, 65, dropout=0.2), None),
        "narrow": (S(1, 20, 768, 2, 65, narrow_residual=True), None),
        "narrow dropout": (S(2, 20, 48, 3, 65, dropout=0.2, narrow_residual=True), None),
        "strides": (S(2, 9, 48, 3, 23), "sliced columns"),
        "other strides": (S(2, 9, 48, 3, 23), "some transposed"),
        "part of a row": (S(2, 9, 64, 3, 23), "part of a wider row"),
        "unaligned": (S(2, 9, 64, 3, 23), "one further"),
        "one gradient": (S(2, 9, 48, 3, 23), "one gradient"),
    },
    "attention": {
        "partial": (S(2, 67, 48, 3, 101), None),
        "whole": (S(1, 256, 64, 1, 64), None),
        "tiles": (S(1, 208, 64, 1, 64), None),  # whole ones, those on the diagonal, and a partial one
        "one token": (S(2, 1, 128, 2, 65), None),
        "D=128": (S(1, 130, 128, 1, 64), None),
        "D=40": (S(1, 70, 40, 1, 64), None),
        "dropout": (S(1, 140, 32, 1, 65, dropout=0.2), None),
        "documents": (S(2, 129, 32, 1, 64, doc_mask=True), None),  # one more than whole blocks: the last begins with a document's last
        "documents dropout": (S(1, 70, 16, 1, 65, dropout=0.2, doc_mask=True), None),
        "whole, documents dropout": (S(1, 256, 64, 1, 65, dropout=0.2, doc_mask=True), None),
        "strides": (S(1, 40, 48, 3, 23), "sliced columns"),
        "other strides": (S(2, 40, 48, 3, 23), "some transposed"),
        "part of a row": (S(2, 40, 48, 3, 23), "part of a wider row"),
        "unaligned": (S(2, 40, 64, 2, 23), "one further"),
        "one gradient": (S(2, 40, 48, 3, 23), "one gradient"),
        "group": (S(1, 70, 64, 4, 64, n_head_kv=2), None),
        "group, dropout documents": (S(1, 70, 48, 3, 65, dropout=0.2, doc_mask=True, n_head_kv=1), None),
        "group, strides": (S(2, 40, 64, 4, 23, n_head_kv=2), "sliced columns"),
        "group, other strides": (S(2, 40, 64, 4, 23, n_head_kv=2), "some transposed"),
        "group, whole": (S(1, 256, 128, 2, 64, n_head_kv=1), None),
    },
    "gelu_mlp": {
        "partial": (S(2, 67, 48, 3, 101), None),
        "whole": (S(1, 256, 64, 4, 64), None),
        "tiles": (S(1, 130, 96, 4, 64), None),  # more than there are programs: each has several
        "pipeline": (S(1, 130, 192, 4, 64), None),  # as many steps along K as there are stages; three tiles a program
        "one token": (S(1, 1, 64, 2, 65), None),
        "no bias": (S(1, 40, 64, 2, 65, bias=False), None),
        "many rows": (S(1, 2100, 9, 1, 17), None),  # several groups of tiles, and more tiles than a step of the sums over them
        "recompute": (S(1, 70, 72, 2, 65), "recompute"),
        "odd width": (S(1, 33, 131, 1, 17), None),
        "even width": (S(1, 40, 130, 2, 65), None),  # rows of a multiple of 4 bytes, which cp.async can copy and TMA cannot
        "odd width recompute": (S(1, 70, 33, 1, 17), "recompute"),
        "part of a row": (S(2, 40, 64, 2, 23), "part of a wider row"),
        "unaligned": (S(2, 40, 64, 2, 23), "one further"),
        "one gradient": (S(2, 40, 48, 3, 23), "one gradient"),
        "tanh": (S(1, 40, 64, 2, 65, tanh=True), None),
        "tanh recompute": (S(1, 70, 72, 2, 65, tanh=True), "recompute"),
    },
    "linear_cross_entropy": {
        "partial": (S(2, 67, 48, 3, 101), None),
        "bytes": (S(2, 8, 48, 3, 256), None),
        "several blocks": (S(1, 4, 16, 1, 40000), None),  # two whole ones, and a rest
        "two tokens": (S(1, 2, 64, 2, 65), None),  # of which one counts
        "odd": (S(1, 33, 31, 1, 517), None),
        "chunks": (S(2, 67, 48, 3, 101), "chunks"),
        "strides": (S(2, 9, 48, 3, 23), "sliced columns"),
    },
    "adamw": {
        "partial": (S(2, 67, 48, 3, 101), None),
        "whole": (S(1, 1, 256, 1, 96), None),
        "several chunks": (S(1, 1, 131, 1, 190), None),
        # Elements of the weight, and of the bias, which has one more than the width: 16 divides both.
        "aligned": (S(1, 1, 127, 1, 160), None),
        "unaligned": (S(1, 1, 127, 1, 160), "copied further"),
    },
}  # fmt: skip


def built(op, name, dtype):
    """The Problem of a case."""
    shape, variation = CASES[op][name]
    it = problem(op, shape, getattr(torch, dtype), "cpu")
    return VARIATIONS[variation](it) if variation else it


def hold(op, name, dtype, architecture, **gpu):
    """What falls short of a case, in lines: what is not equal, which kernel did not run; [] where all holds. Raises ptx's errors."""
    torch.set_num_threads(1)
    with poisoned(), Gpu(architecture, **gpu) as emulated:
        it = built(op, name, dtype)
        found = compare(it.kernel, it.reference, it.inputs, it.outputs, it.grads)
    short = [
        f"{c.what}: error {c.error:.3g}, PyTorch's {c.torch_error:.3g}, floor {c.floor:.3g}"
        for c in found
        if not c.holds
    ]
    missing = KERNELS[op] - {kernel for kernel, _ in emulated.launched}
    return short + [f"{kernel} was not launched" for kernel in sorted(missing)]


def unfenced(op, name, architecture):
    """As hold, on a Triton that forgets a fence behind cp.async: what falls short, and whether any kernel with a product copies so."""
    copies = []

    def edit(kernel, text):
        if "mma" in text and "cp.async.c" in text:
            copies.append(f"{kernel} copies asynchronously")
        return text

    with patch.object(configs, "FENCED", False):
        return hold(op, name, "bfloat16", architecture, edit=edit) + copies


def full_cubin(op, name, architecture):
    """The bytes that ptxas makes of a kernel which the emulator has compiled without it, in the same cache."""
    it = built(op, name, "bfloat16")
    with (
        patch.dict(launch.built, clear=True),
        patch.object(triton, "compile", wraps=triton.compile) as calls,
        Gpu(architecture),
    ):
        run(it.kernel, it.inputs.values(), it.grads)
    arguments, options = calls.call_args
    return len(triton.compile(*arguments, **options).asm["cubin"])


def mask(architecture):
    """attention's dropout mask [2, 3, 37, 37] as the compiled kernel exports it, in lists."""
    with Gpu(architecture):
        return kernels.attention.dropout_mask(2, 3, 37, 0.2, torch.tensor([SEED])).tolist()


def equal(value, dtype, architecture):
    """attention [1, 20, 64] of queries, keys and values that are all one value, in a list."""
    with Gpu(architecture):
        return kernels.attention.attention(torch.full((1, 20, 192), value, dtype=getattr(torch, dtype)), 1).tolist()


# ---- what must be seen ----


def broken(op, name, dtype, architecture, edit=None, backward=True):
    """What the emulator says of a case whose kernels were changed; "" where it sees nothing. Not whether results are equal."""
    torch.set_num_threads(1)
    it = built(op, name, dtype)
    grads = it.grads if backward else (None,) * len(it.grads)
    try:
        with Gpu(architecture, edit=edit):
            run(it.kernel, it.inputs.values(), grads)
    except Fault as e:
        return str(e)
    return ""


def without(kernel, pattern, which=None):
    """An edit that makes comments of a kernel's lines that match a pattern: all, or those of a list of numbers."""

    def edit(name, text):
        if name != kernel:
            return text
        number = itertools.count()
        return re.sub(
            pattern,
            lambda m: m[0] if which is not None and next(number) not in which else "// " + m[0],
            text,
            flags=re.M,
        )

    return edit


def dropped(op, name, dtype, architecture, kernel, pattern):
    """What is said where all lines of a kernel that match a pattern are left out."""
    return broken(op, name, dtype, architecture, without(kernel, pattern))


BARRIER = r"^\s*bar\.sync.*$"


def barriers(op, name, dtype, architecture, kernel):
    """Barriers of a kernel that a case runs, left out one by one: (what is said of each, the source lines of those that nothing needs).

    What nothing needs stays out: two barriers may protect the same, and the second to go is then missed.
    """
    texts = []
    it = built(op, name, dtype)
    for backward in (False, True):  # the forward alone where the kernel is of that
        with Gpu(architecture, edit=lambda k, t: texts.append(t) or t if k == kernel else t, keep=True) as gpu:
            run(it.kernel, it.inputs.values(), it.grads if backward else (None,) * len(it.grads))
        if texts:
            break
    text = texts[0]
    machine = next(m for m in gpu.machines if m.kernel.name == kernel)
    lines = [text.count("\n", 0, m.start()) + 1 for m in re.finditer(BARRIER, text, re.M)]
    ran = {inst.line for inst, n in zip(machine.kernel.instructions, machine.executed, strict=True) if n}

    def first(edit):
        """The edit of the first of a kernel's specialisations alone: a barrier's number is a place in its text."""
        return lambda k, t: edit(k, t) if t == text else t

    messages, unneeded = [], []
    for i, line in enumerate(lines):
        if line in ran:
            said = broken(op, name, dtype, architecture, first(without(kernel, BARRIER, [*unneeded, i])), backward)
            messages += [said] if said else []
            unneeded += [] if said else [i]
    sources = {inst.line: inst.source for inst in machine.kernel.instructions}
    return messages, [sources[lines[i]] for i in unneeded]


def misaligned(op, architecture):
    """What is said where the compiler is told of an alignment that inputs have not."""

    def promised(backend, value, *rest, specialize=jit.native_specialize_impl):
        kind, key = specialize(backend, value, *rest)
        return kind, "D" if torch.is_tensor(value) else key

    with patch.object(jit, "native_specialize_impl", promised):
        return broken(op, "unaligned", "bfloat16", architecture)


def small_box(architecture):
    """What is said where a TMA descriptor's box is a row short of what its barrier waits for."""

    def shrunk(descriptor, meta, tensor_map=launch.tensor_map):
        whole = tensor_map(descriptor, meta)
        return replace(whole, box=(whole.box[0] - 8, whole.box[1]))

    with patch.object(launch, "tensor_map", shrunk):
        return broken("gelu_mlp", "whole", "bfloat16", architecture)


def in_kernel(op, text):
    """Whether a text stands in a kernel of an op, and not in what launches it."""
    functions = [f.fn for f in vars(getattr(kernels, op)).values() if isinstance(f, jit.KernelInterface)]
    return any(text in inspect.getsource(f) for f in functions)


def planted(op, right, wrong, shape, dtype, architecture, small=True):
    """What turns red where a text of an op's kernels is replaced: lines, [] where nothing does."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for name, row in faults.small_blocks().items() if small else ():
            stack.enter_context(patch.object(configs, name, row))
        stack.enter_context(patch.object(kernels, op, faults.plant(op, right, wrong, folder)))
        with Gpu(architecture):
            it = problem(op, shape, getattr(torch, dtype), "cpu")
            try:
                found = compare(it.kernel, it.reference, it.inputs, it.outputs, it.grads)
            except (Fault, ArithmeticError) as e:
                return [str(e)]
    return [c.what for c in found if not c.holds]
