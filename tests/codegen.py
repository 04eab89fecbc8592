"""Compile every configuration of every kernel for NVIDIA's architectures, without a GPU.

    python tests/codegen.py              a JSON object for each kernel and architecture, a line each
    python tests/codegen.py --markdown   docs/codegen.md
    python tests/codegen.py --record     tests/sass_figures.json, to which tests/test_codegen.py holds the compiled code
    python tests/codegen.py --candidates [N]   of all that `fastgpt tune` may try, or every N-th, what spills or does not fit

The ops run on CPU tensors whose launches are recorded instead of carried out, so what is compiled is what would be launched:
the same constants, and the same knowledge of what is 1 or a multiple of 16. Run as a script in a process of its own:
TRITON_INTERPRET is read when kernels are first imported.
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
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
from fastgpt.kernels import adamw, configs, cross_entropy, embedding, flash_attention, gelu_mlp, layer_norm
from fastgpt.tune import difference

ARCHITECTURES = (80, 89, 90, 100, 120)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# Of an SM: shared memory in KiB, warps, and blocks. CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SM = {80: (164, 64, 32), 89: (100, 48, 24), 90: (228, 64, 32), 100: (228, 64, 32), 120: (100, 48, 24)}
LIMIT = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB of shared memory that one block may have
INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync", "tma": "cp.async.bulk.tensor"}
# Of these cases the SASS is counted (tests/sass.py), for a GPU of each architecture that it has rates of.
COUNTED = (
    "layer_norm C=1024",
    "layer_norm C=1024 bf16 stream",
    "embedding",
    "cross_entropy",
    "adamw",
    "gelu_mlp bf16",
    "gelu_mlp bf16 recompute",
    "flash_attention bf16 D=64",
    "flash_attention bf16 D=64 dropout",
    "flash_attention bf16 D=64 documents",
    "flash_attention bf16 D=128",
)
GPU = {80: "A100", 90: "H100", 100: "B200"}
TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int64": "i64", "int32": "i32", "bool": "i1"}


def cases():
    """(what, function that launches it) of all that a table can choose, for the architecture that is set at the call."""
    bf16, seed = torch.bfloat16, torch.zeros(1, dtype=torch.int64)

    def ones(*shape, dtype=torch.float32):
        return torch.ones(shape, dtype=dtype, requires_grad=True)

    def backward(*outputs):
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])

    for row in configs.LAYER_NORM:
        for what, p, stream in (
            ("", 0.0, torch.float32),
            (" dropout", 0.1, torch.float32),
            (" bf16 stream", 0.0, bf16),
        ):
            C = row.max_width

            def norm(C=C, p=p, stream=stream):
                x, branch = ones(1, 64, C, dtype=stream), ones(1, 64, C, dtype=bf16)
                with torch.autocast("cpu", dtype=bf16):
                    backward(*layer_norm.add_layer_norm(x, branch, ones(C), ones(C), 1e-5, p, seed))

            yield f"layer_norm C={C}{what}", norm
    ids = torch.zeros(16, 64, dtype=torch.int64)
    for what, p, stream in (("", 0.0, None), (" dropout", 0.1, None), (" bf16 stream", 0.0, bf16)):
        yield (
            f"embedding{what}",
            lambda p=p, stream=stream: backward(
                embedding.embedding(ids, ones(128, 768), ones(64, 768), p, seed, stream)[0]
            ),
        )
    targets = torch.zeros(1, 64, dtype=torch.int64)
    loss = cross_entropy.linear_cross_entropy
    yield "cross_entropy", lambda: backward(loss(ones(1, 64, 16, dtype=bf16), ones(50304, 16), targets))
    for what, n in (("", 4096), (" odd", 4099)):

        def update(n=n):
            p = torch.ones(n)
            tensors = {name: [p] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
            settings = dict(lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
            adamw.adamw([{**tensors, "steps": [torch.zeros(())], "shadows": [p.to(bf16)], **settings}], [p], 1.0)

        yield f"adamw{what}", update
    for what, dtype, C, recompute in (
        ("bf16", bf16, 64, False),
        ("bf16 recompute", bf16, 64, True),
        ("bf16 odd width", bf16, 67, False),  # no multiple of 16 bytes: pointers everywhere
        ("fp32", torch.float32, 64, False),
    ):

        def mlp(dtype=dtype, C=C, recompute=recompute):
            h = ones(2048, C, dtype=dtype)
            with torch.autocast("cpu", dtype=bf16, enabled=dtype == bf16):
                backward(gelu_mlp.gelu_mlp(h, ones(4 * C, C), ones(4 * C), ones(C, 4 * C), ones(C), recompute))

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
                    f"flash_attention {TYPES[str(dtype)[6:]]} D={D}{what}",
                    lambda dtype=dtype, D=D, p=p, docs=docs: backward(
                        flash_attention.flash_attention(ones(1, 256, 3 * 12 * D, dtype=dtype), 12, p, seed, docs)
                    ),
                )


TUNED = {  # case: the lookup whose rows `fastgpt tune` tries around the shipped one
    "gelu_mlp bf16": ("gelu_mlp", torch.device("cpu"), torch.bfloat16, True),
    "flash_attention bf16 D=64": ("attention", torch.device("cpu"), torch.bfloat16, 64),
    "layer_norm C=1024": ("layer_norm", 1024),
    "cross_entropy": ("cross_entropy",),
    "embedding": ("embedding",),
    "adamw": ("adamw",),
}


def candidate_cases():
    """As `cases`, of every row of every grid around the shipped rows."""
    for case, launch in cases():
        if case in TUNED:
            name, *args = key = TUNED[case]
            shipped = getattr(configs, name)(*args)
            for row in dict.fromkeys(
                row for grid in configs.GRIDS[type(shipped)] for row in configs.around(shipped, grid)
            ):

                def tried(launch=launch, key=key, row=row):
                    configs.use({key: row})
                    launch()
                    configs.use({})

                if row != shipped:
                    yield f"{name} {difference(row, shipped)}", tried


def recorded(architecture, cases=cases):
    """{(what, kernel): (its arguments by name, its options)} of all launches for an architecture."""
    found = {}
    what = None

    def record(kernel, *args, grid, warmup, **options):
        arguments = arguments_of(kernel, args, options)
        found.setdefault((what, label(kernel, arguments)), (kernel, arguments, options))

    JITFunction.run = record
    configs.architecture = lambda device: architecture
    for case, launch in cases():
        what = case
        launch()
    return found


def compiled(what, name, architecture, kernel, arguments, options):
    """Registers, spilled bytes, shared memory, blocks per SM and matrix instructions of one kernel on one architecture; of what is
    COUNTED its `parts` too."""
    options = {"num_warps": 4, **options}
    binary = triton.compile(source(kernel, arguments), target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary.asm["cubin"])
        f.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", f.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    warps, shared = options["num_warps"], binary.metadata.shared
    kib, most_warps, most_blocks = SM[architecture]
    per_warp = -(-registers // 8) * 8 * 32  # registers are given by 256 to a warp
    blocks = min(most_blocks, most_warps // warps, 65536 // (per_warp * warps), kib * 1024 // (shared + 1024))
    ptx, parts = binary.asm["ptx"], []
    if what in COUNTED and architecture in GPU:
        text, file = sass.disassembled(binary.asm["cubin"]), Path(kernel.fn.__code__.co_filename)
        parts = sass.parts(text, warps, architecture, file)
    return dict(
        op=what, kernel=name, architecture=architecture, warps=warps, registers=registers, spilled=stack, shared=shared,
        limit=LIMIT[architecture] * 1024, blocks_per_sm=blocks, warps_per_sm=blocks * warps,
        dot="tl.dot" in kernel.src or "_step(" in kernel.src,
        tma=any(isinstance(v, TensorDescriptor) for v in arguments.values()),
        instructions=[short for short, long in INSTRUCTIONS.items() if long in ptx],
        parts=parts,
    )  # fmt: skip


def rows(only=""):
    """All of them, in order; `only` keeps those whose op contains it."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(compiled, what, name, sm, *launch)
            for sm in ARCHITECTURES
            for (what, name), launch in recorded(sm).items()
            if only in what
        ]
        for job in jobs:
            yield job.result()


def candidates(every=1):
    """Print for each op and architecture how many of the candidates compile, and which spill or do not fit; a JSON object each."""
    for sm in (80, 90, 100, 120):
        found, seen = {}, set()
        launches = recorded(sm, candidate_cases)
        of = {}
        for what, _ in launches:
            of.setdefault(what.split()[0], {})[what] = None
        taken = {what for rows in of.values() for what in list(rows)[::every]}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = {}
            for (what, name), (kernel, arguments, options) in launches.items():
                src = source(kernel, arguments)
                same = repr((kernel.__name__, src.signature, src.constants, src.attrs, options))
                if what in taken and same not in seen:  # what a grid of the backward leaves as it is, is compiled once
                    jobs[what, name] = pool.submit(compiled, what, name, sm, kernel, arguments, options)
                    seen.add(same)
        for what in sorted(taken):
            op, _, row = what.partition(" ")
            of_op = found.setdefault(op, dict(op=op, architecture=sm, candidates=0, spill={}, no_fit=[], fail={}))
            of_op["candidates"] += 1
            for (case, name), job in jobs.items():
                if case != what:
                    continue
                if job.exception():
                    of_op["fail"][f"{row}: {name}"] = str(job.exception())
                elif job.result()["spilled"]:
                    of_op["spill"][f"{row}: {name}"] = job.result()["spilled"]
                elif job.result()["shared"] > job.result()["limit"]:
                    of_op["no_fit"].append(f"{row}: {name}")
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
    memory = {sm: sass.RATES[sm]["tensor"] * metrics.PEAK_BANDWIDTH[g] / metrics.PEAK_FLOPS[g] for sm, g in GPU.items()}
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
        for r in rows(*sys.argv[1:]):
            print(json.dumps(r))
