"""Compile every configuration of every kernel for NVIDIA's architectures, without a GPU.

    python tests/codegen.py [SM ...]     a JSON object for each kernel and architecture, a line each
    python tests/codegen.py --markdown   docs/codegen.md
    python tests/codegen.py --record     tests/sass_figures.json, to which tests/test_codegen.py holds the compiled code
    python tests/codegen.py --candidates [N [SM ...]]   of all that `fastgpt tune` may try, or every N-th, what spills or does not fit

The ops run on CPU tensors whose launches are recorded instead of carried out, so what is compiled is what would be launched:
the same constants, and the same knowledge of what is 1 or a multiple of 16. Run as a script in a process of its own:
TRITON_INTERPRET is read when kernels are first imported.
"""

import functools
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import sass
import torch
import triton
from specialize import arguments_of, label, source
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt import metrics
from fastgpt.kernels import adamw, attention, configs, embedding, gelu_mlp, layer_norm, linear_cross_entropy
from fastgpt.tune import difference

ARCHITECTURES = (80, 89, 90, 100, 120)
# Of an SM: shared memory in KiB, warps, and blocks. CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SM = {80: (164, 64, 32), 89: (100, 48, 24), 90: (228, 64, 32), 100: (228, 64, 32), 120: (100, 48, 24)}
LIMIT = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB of shared memory that one block may have
INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync", "tma": "cp.async.bulk.tensor"}
# Of these cases the SASS is counted (tests/sass.py), for a GPU of each architecture that it has rates of.
COUNTED = (
    "layer_norm C=1024",
    "layer_norm C=1024 bf16 stream",
    "embedding",
    "linear_cross_entropy",
    "adamw",
    "gelu_mlp bf16",
    "gelu_mlp bf16 recompute",
    "gelu_mlp bf16 tanh",
    "gelu_mlp bf16 tanh recompute",
    "attention bf16 D=64",
    "attention bf16 D=64 dropout",
    "attention bf16 D=64 documents",
    "attention bf16 D=128",
)
GPU = {80: "A100", 90: "H100", 100: "B200"}
TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int64": "i64", "int32": "i32", "bool": "i1"}


def cases():
    """(what, function that launches it) of all that a table can choose, for the architecture that is set at the call. The function takes a
    row, the text of a configuration to launch by in place of the table's."""
    bf16, seed = torch.bfloat16, torch.zeros(1, dtype=torch.int64)

    def ones(*shape, dtype=torch.float32):
        return torch.ones(shape, dtype=dtype, requires_grad=True)

    def backward(*outputs):
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])

    for config in configs.LAYER_NORM:
        for what, p, stream in (
            ("", 0.0, torch.float32),
            (" dropout", 0.1, torch.float32),
            (" bf16 stream", 0.0, bf16),
        ):
            C = config.max_width

            def norm(row="", C=C, p=p, stream=stream):
                x, branch = ones(1, 64, C, dtype=stream), ones(1, 64, C, dtype=bf16)
                with torch.autocast("cpu", dtype=bf16):
                    backward(*layer_norm.add_layer_norm(x, branch, ones(C), ones(C), 1e-5, p, seed, row))

            yield f"layer_norm C={C}{what}", norm
    ids = torch.zeros(16, 64, dtype=torch.int64)
    for what, p, stream in (("", 0.0, None), (" dropout", 0.1, None), (" bf16 stream", 0.0, bf16)):
        yield (
            f"embedding{what}",
            lambda row="", p=p, stream=stream: backward(
                embedding.embedding(ids, ones(128, 768), ones(64, 768), p, seed, stream, row)[0]
            ),
        )
    targets = torch.zeros(1, 64, dtype=torch.int64)
    loss = linear_cross_entropy.linear_cross_entropy
    yield (
        "linear_cross_entropy",
        lambda row="": backward(loss(ones(1, 64, 16, dtype=bf16), ones(50304, 16), targets, row=row)),
    )
    for what, n in (("", 4096), (" odd", 4099)):

        def update(row="", n=n):
            p = torch.ones(n)
            tensors = {name: [p] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
            settings = dict(lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
            adamw.adamw(
                [{**tensors, "steps": [torch.zeros(())], "shadows": [p.to(bf16)], **settings}], [p], 1.0, row=row
            )

        yield f"adamw{what}", update
    for what, dtype, C, recompute, form in (
        ("bf16", bf16, 64, False, "none"),
        ("bf16 recompute", bf16, 64, True, "none"),
        ("bf16 tanh", bf16, 64, False, "tanh"),
        ("bf16 tanh recompute", bf16, 64, True, "tanh"),
        ("bf16 odd width", bf16, 67, False, "none"),  # no multiple of 16 bytes: pointers everywhere
        ("fp32", torch.float32, 64, False, "none"),
    ):

        def mlp(row="", dtype=dtype, C=C, recompute=recompute, form=form):
            h, weights = ones(2048, C, dtype=dtype), (ones(4 * C, C), ones(4 * C), ones(C, 4 * C), ones(C))
            with torch.autocast("cpu", dtype=bf16, enabled=dtype == bf16):
                backward(gelu_mlp.gelu_mlp(h, *weights, recompute, row, form))

        yield f"gelu_mlp {what}", mlp
    for dtype in (bf16, torch.float32):
        for D in (64, 128):
            for what, p, docs in (
                ("", 0.0, None),
                (" dropout", 0.1, None),
                (" documents", 0.0, torch.zeros(1, 256, dtype=torch.int32)),
            ):
                if what and (D, dtype) != (64, bf16):
                    continue
                yield (
                    f"attention {TYPES[str(dtype)[6:]]} D={D}{what}",
                    lambda row="", dtype=dtype, D=D, p=p, docs=docs: backward(
                        attention.attention(ones(1, 256, 3 * 12 * D, dtype=dtype), 12, p, seed, docs, row)
                    ),
                )

    for D in (64, 128):

        def group(row="", D=D):
            q, k, v = (ones(1, 256, heads, D, dtype=bf16) for heads in (12, 4, 4))
            backward(attention.attention_qkv(q, k, v, row=row))

        yield f"attention bf16 D={D} group", group


CPU = torch.device("cpu")
TUNED = {  # case: its op, and what that asks its table by: `fastgpt tune` tries rows around the answer
    "gelu_mlp bf16": ("gelu_mlp", CPU, torch.bfloat16, True),
    "attention bf16 D=64": ("attention", CPU, torch.bfloat16, 64),
    "layer_norm C=1024": ("layer_norm", 1024),
    "linear_cross_entropy": ("linear_cross_entropy",),
    "embedding": ("embedding",),
    "adamw": ("adamw",),
}


def candidate_cases(every=1):
    """As `cases`, of the rows of every grid around the shipped rows, or of every so-many-th of an op's."""
    for case, launch in cases():
        if case in TUNED:
            op, *by = TUNED[case]
            shipped = getattr(configs, op)(*by)
            rows = (row for grid in configs.GRIDS[type(shipped)] for row in configs.neighbours(shipped, grid))
            for row in [row for row in dict.fromkeys(rows) if row != shipped][::every]:
                yield f"{op} {difference(row, shipped)}", functools.partial(launch, row.text)


def recorded(architecture, cases):
    """{(what, kernel): (itself, its arguments by name, its options)} of all launches of cases for an architecture."""
    found = {}
    what = None

    def record(kernel, *args, grid, warmup, **options):
        arguments = arguments_of(kernel, args, options)
        found.setdefault((what, label(kernel, arguments)), (kernel, arguments, options))

    JITFunction.run = record
    configs.architecture = lambda device: architecture
    for case, launch in cases:
        what = case
        launch()
    return found


def compiled(counted, architecture, kernel, src, arguments, options):
    """Registers, spilled bytes, shared memory, blocks per SM and matrix instructions of one kernel on one architecture; where it is to be
    counted its `parts` too."""
    options = {"num_warps": 4, **options}
    binary = triton.compile(src, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, stack = sass.resources(binary.asm["cubin"])
    warps, shared = options["num_warps"], binary.metadata.shared
    kib, most_warps, most_blocks = SM[architecture]
    per_warp = -(-registers // 8) * 8 * 32  # registers are given by 256 to a warp
    blocks = min(most_blocks, most_warps // warps, 65536 // (per_warp * warps), kib * 1024 // (shared + 1024))
    ptx, parts = binary.asm["ptx"], []
    if counted:
        text, file = sass.disassembled(binary.asm["cubin"]), Path(kernel.fn.__code__.co_filename)
        parts = sass.parts(text, warps, architecture, file)
    return dict(
        architecture=architecture, warps=warps, registers=registers, spilled=stack, shared=shared,
        limit=LIMIT[architecture] * 1024, blocks_per_sm=blocks, warps_per_sm=blocks * warps,
        dot="tl.dot" in kernel.src or "_step(" in kernel.src,
        tma=any(isinstance(v, TensorDescriptor) for v in arguments.values()),
        instructions=[short for short, long in INSTRUCTIONS.items() if long in ptx],
        parts=parts,
    )  # fmt: skip


def jobs(pool, architecture, cases):
    """{(what, kernel): the future of what `compiled` gives} of cases. Launches of the same code share one."""
    found, same = {}, {}
    for (what, name), (kernel, arguments, options) in recorded(architecture, cases).items():
        src, counted = source(kernel, arguments), what in COUNTED and architecture in GPU
        key = repr((kernel.__name__, src.signature, src.constants, src.attrs, options, counted))
        if key not in same:
            same[key] = pool.submit(compiled, counted, architecture, kernel, src, arguments, options)
        found[what, name] = same[key]
    return found


def rows(*architectures):
    """All of them, in order, of some architectures or of all."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for of_architecture in [jobs(pool, sm, cases()) for sm in architectures or ARCHITECTURES]:
            for (what, name), job in of_architecture.items():
                yield dict(op=what, kernel=name, **job.result())


def candidates(every=1, *architectures):
    """Print for each op and architecture how many of the candidates compile, and which spill or do not fit; a JSON object each."""
    for sm in architectures or (80, 90, 100, 120):
        configs.architecture = lambda device, sm=sm: sm  # its rows are those that the candidates are around
        found, shown = {}, set()
        wanted = list(candidate_cases(every))
        for what, _ in wanted:
            op = what.split()[0]
            found.setdefault(op, dict(op=op, architecture=sm, candidates=0, spill={}, no_fit=[], fail={}))[
                "candidates"
            ] += 1
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for (what, name), job in jobs(pool, sm, wanted).items():
                op, _, row = what.partition(" ")
                of_op, kernel = found[op], f"{row}: {name}"
                if job in shown:  # a grid of the backward leaves the forward as it is
                    continue
                shown.add(job)
                if job.exception():
                    of_op["fail"][kernel] = str(job.exception())
                elif job.result()["spilled"]:
                    of_op["spill"][kernel] = job.result()["spilled"]
                elif job.result()["shared"] > job.result()["limit"]:
                    of_op["no_fit"].append(kernel)
        for of_op in found.values():
            print(json.dumps(of_op), flush=True)


def markdown():
    versions = (
        f"Triton {triton.__version__}, torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"
    )
    print(f"""# What the compiler makes of the kernels

Written by `python tests/codegen.py --markdown > docs/codegen.md` with {versions};
no GPU is needed, and none was used. Every configuration in `kernels/configs.py`, with the arguments of a GPT-2: registers a
thread, bytes that are spilled, shared memory in KiB, warps of a block, warps that an SM can hold of it (of 64; 48 on sm_89 and
sm_120), and the matrix and copy instructions. Warps are a bound, not a measurement. Behind them stands what the kernels
[execute](#executed), and what their [main loops](#main-loops) are made of.""")
    op, found = None, sorted(rows(), key=lambda r: r["op"].split()[0])
    for r in found:
        if r["op"].split()[0] != op:
            op = r["op"].split()[0]
            print(
                f"\n## {op}\n\n| case | kernel | sm | registers | spilled | shared KiB | warps | warps on an SM | instructions |"
            )
            print("|---|---|---:|---:|---:|---:|---:|---:|---|")
        print(
            f"| {case(r)} | {r['kernel']} | {r['architecture']} | {r['registers']} | {r['spilled']} | {r['shared'] / 1024:.1f} "
            f"| {r['warps']} | {r['warps_per_sm']} | {' '.join(r['instructions'])} |"
        )
    sys.stdout.flush()
    subprocess.run([sys.executable, Path(__file__).with_name("figures.py"), "--markdown"], check=True)
    main_loops(found)


def case(r):
    """What tells this row from others of its op."""
    return r["op"].removeprefix(r["op"].split()[0]).strip() or "all"


def main_loops(rows):
    """The second half of the page: a table for each op and architecture. What an earlier case of the op has too is left out."""
    pipes = ("issue", "tensor", "fma", "alu", "xu", "shared", "global")
    memory = {sm: sass.RATES[sm]["tensor"] * metrics.PEAKS[g][1] / metrics.PEAKS[g][0] for sm, g in GPU.items()}
    a_clock = ", ".join(f"{memory[sm]:.1f} on {gpu}" for sm, gpu in GPU.items())
    print(f"""
## Main loops

Counted in the machine code by [tests/sass.py](../tests/sass.py), whose docstring defines every column and says what is not in it. A row
is a pass of a loop, what some passes do besides, or what a program does outside its loops. Under a pipe stands *instructions of a
warp / clocks of an SM that a block's take there*; `other` is what no published rate limits. `bound` is the most of these clocks, `by` the
pipe that has them: an SM finishes no more than one pass of a block in so many clocks, and may well take longer. `memory` is what an
SM's share of the memory's bandwidth moves in `bound` clocks, in bytes (a clock {a_clock}):
a pass that must move more is bound by memory. `copies` and `products` are those in flight across a wait, `exposed` the waits of a pass
for loads that were issued just before: a loop that has none is pipelined. `F2F` are scalar conversions, `div` calls
that divide 64-bit integers.

`python tests/codegen.py --record` writes these figures to `tests/sass_figures.json`; a test holds the compiled code to them. The cases are
those that a GPT-2 trains with; a row that repeats one of an earlier case is left out.""")
    for op in dict.fromkeys(r["op"].split()[0] for r in rows):
        for sm in GPU:
            shown = set()
            print(f"\n### {op}, sm_{sm}\n")
            print(
                f"| case | kernel | part | {' | '.join(pipes)} | other | bound | by | memory | copies | products | exposed | F2F | div |"
            )
            print("|---|---|---|" + "---:|" * 9 + "---|" + "---:|" * 6)
            of_table = [(r, p) for r in rows for p in r["parts"] if (r["op"].split()[0], r["architecture"]) == (op, sm)]
            for r, p in of_table:
                cells = [f"{p['count'][pipe]} / {p['clocks'][pipe]}" if p["count"].get(pipe) else "" for pipe in pipes]
                cells += [p["count"]["other"], p["bound"], p["by"], round(p["bound"] * memory[sm])]
                cells += ["" if p[wait] is None else p[wait] for wait in ("copies", "products", "exposed")]
                cells += [p["converts"] or "", p["divisions"] or ""]
                line = " | ".join(map(str, (r["kernel"], p["part"], *cells)))
                if line not in shown:
                    print(f"| {case(r)} | {line} |")
                shown.add(line)


if __name__ == "__main__":
    if sys.argv[1:] == ["--markdown"]:
        markdown()
    elif sys.argv[1:] == ["--record"]:
        sass.record(list(rows()))
    elif sys.argv[1:2] == ["--candidates"]:
        candidates(*map(int, sys.argv[2:]))
    else:
        for r in rows(*map(int, sys.argv[1:])):
            print(json.dumps(r))
