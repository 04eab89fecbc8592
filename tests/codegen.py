"""Compile every configuration of every kernel for NVIDIA's architectures, without a GPU: a JSON object a line.

Run as a script in a process of its own: TRITON_INTERPRET is read when kernels are first imported.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgpt.kernels import configs, layer_norm

ARCHITECTURES = (80, 89, 90, 100, 120)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def layer_norm_cases():
    """(what, kernel, pointer and scalar types, constants, warps) of each row of the table, at its widest, in bf16 training."""
    pointers = dict.fromkeys(
        (
            "x_ptr",
            "stream_ptr",
            "weight_ptr",
            "bias_ptr",
            "stats_ptr",
            "dstream_ptr",
            "dx_ptr",
            "partial_ptr",
            "dweight_ptr",
            "dbias_ptr",
        ),
        "*fp32",
    )
    pointers |= dict.fromkeys(("branch_ptr", "h_ptr", "dh_ptr", "dbranch_ptr"), "*bf16") | {
        "seed_ptr": "*i64",
        "eps": "fp32",
        "p": "fp32",
        "scale": "fp32",
    }
    for row in configs.LAYER_NORM:
        width = {"N": row.max_width, "BLOCK": row.max_width, "HAS_BRANCH": True}
        for dropout in (False, True):
            name = f"N={row.max_width}" + " dropout" * dropout
            flags = {**width, "DROPOUT": dropout}
            yield (
                f"layer_norm forward {name}",
                layer_norm._forward,
                pointers,
                {**flags, "HAS_BIAS": True},
                row.forward_warps,
            )
            yield (
                f"layer_norm backward {name}",
                layer_norm._backward,
                pointers,
                {**flags, "HAS_DSTREAM": True},
                row.backward_warps,
            )
        tile = {"ROWS": row.reduce_rows, "COLUMNS": row.reduce_columns, "HAS_BIAS": True}
        yield f"layer_norm reduce N={row.max_width}", layer_norm._reduce, pointers, tile, 4


def compile_case(case, architecture):
    """Registers, spilled bytes and shared memory of one kernel on one architecture."""
    what, kernel, types, constants, warps = case
    names = kernel.arg_names
    constants = {**constants, **{n: 1 for n in names if n.startswith("stride") and n.endswith("n")}}  # rows are dense
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    # As at a launch: pointers, and strides that are multiples of 16, are known to be aligned.
    aligned = [i for i, n in enumerate(names) if n.endswith("_ptr") or (n.startswith("stride") and n not in constants)]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary.asm["cubin"])
        f.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", f.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return dict(
        kernel=what, architecture=architecture, warps=warps,
        registers=int(registers), spilled=int(stack), shared=binary.metadata.shared,
    )  # fmt: skip


if __name__ == "__main__":
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(compile_case, case, sm) for case in layer_norm_cases() for sm in ARCHITECTURES]
        for job in jobs:
            print(json.dumps(job.result()))
    sys.exit(0)
