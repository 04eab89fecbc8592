"""Every shipped configuration compiles for sm_80 to sm_120, without spilling a register, to code no slower than the record says; no GPU
is needed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import sass
import triton

# Bytes that may spill: LayerNorm at a width that no GPT-2 has, and IEEE fp32, whose products have no tensor cores. Of a bf16 stream ptxas
# keeps to 64 registers on sm_80, eight bytes too few, so that four blocks fit an SM in place of three.
ALLOWED = {
    "layer_norm C=8192 dropout": 48,
    "layer_norm C=2048 bf16 stream": 8,
    "flash_attention fp32": 24,
    "gelu_mlp fp32": 24,
}


def allowed(r):
    return max([bytes_ for case, bytes_ in ALLOWED.items() if r["op"].startswith(case)], default=0)


def compiling(*command):
    """What a Python command prints that compiles kernels, which a process cannot where they are interpreted: its lines, of JSON."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=env, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def rows():
    return compiling("codegen.py")


def test_every_kernel_compiles_for_every_architecture(rows):
    kernels = {
        "layer_norm": {"norm_forward", "norm_backward", "norm_reduce"},
        "embedding": {"embed_forward", "embed_keys", "embed_backward_wpe", "embed_backward_wte"},
        "cross_entropy": {"loss_rows", "loss_mean", "loss_scale"},
        "adamw": {"adamw_norm", "adamw_clip", "adamw_update"},
        "gelu_mlp": {"mlp_gemm forward", "mlp_gemm backward", "mlp_column_sums"},
        "flash_attention": {"attention_forward", "attention_delta", "attention_backward"},
    }
    for sm in (80, 89, 90, 100, 120):
        for op, names in kernels.items():
            assert {r["kernel"] for r in rows if r["architecture"] == sm and r["op"].split()[0] == op} == names


def test_nothing_spills_and_all_fits(rows):
    for r in rows:
        assert r["spilled"] <= allowed(r), r
        assert r["shared"] <= r["limit"], r
        assert r["blocks_per_sm"] >= 1, r


def test_products_run_on_the_tensor_cores_and_copies_on_tma(rows):
    instruction = {80: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}
    dots = [r for r in rows if r["dot"] and "fp32" not in r["op"]]
    assert {r["kernel"] for r in dots} == {
        "mlp_gemm forward",
        "mlp_gemm backward",
        "attention_forward",
        "attention_backward",
    }
    for r in dots:
        assert instruction[r["architecture"]] in r["instructions"], r
    for r in rows:
        assert ("tma" in r["instructions"]) == r["tma"], r
        if r["op"] == "gelu_mlp bf16" and "gemm" in r["kernel"]:
            assert r["tma"] == (r["architecture"] >= 90), r


def test_what_tune_may_try_compiles():
    """A sample of it; `python tests/codegen.py --candidates` compiles all, in minutes."""
    found = compiling("codegen.py", "--candidates", "12")
    assert {r["architecture"] for r in found} == {80, 90, 100, 120}
    assert {r["op"] for r in found} == {"gelu_mlp", "attention", "layer_norm", "cross_entropy", "embedding", "adamw"}
    for r in found:
        assert r["candidates"] >= 1
        assert r["fail"] == {}, r


def test_no_figure_is_worse_than_the_record(rows):
    """Better ones may stand unrecorded. Where a kernel's work has changed: `python tests/codegen.py --record`, and say why."""
    record = json.loads(sass.RECORD.read_text())
    if triton.__version__ not in record:
        pytest.skip(
            f"{sass.RECORD.name} has the figures of Triton {', '.join(record)}, and this is {triton.__version__}"
        )
    assert sass.worse(record[triton.__version__], sass.figures(rows)) == []


PLANTED = """
import json
from dataclasses import replace

import codegen
import torch
from fastgpt.kernels import configs, gelu_mlp, layer_norm

def compiled(case, kernel):
    launches = codegen.recorded(90, lambda: [c for c in codegen.cases() if c[0] == case])
    print(json.dumps(codegen.compiled(case, kernel, 90, *launches[case, kernel])))

def plant(kernel, right, wrong):
    assert right in kernel.src, f"plant it anew, the kernel has changed: {right}"
    kernel._unsafe_update_src(kernel.src.replace(right, wrong))

configs.architecture = lambda device: 90
key = "attention", torch.device("cpu"), torch.bfloat16, 64
configs.use({key: replace(configs.attention(*key[1:]), stages=1, backward_stages=3)})
compiled("flash_attention bf16 D=64", "attention_forward")
compiled("flash_attention bf16 D=64", "attention_backward")
plant(gelu_mlp._mlp_gemm, "gelu(z.to(tl.float32), tl.float32 == DTYPE)", "gelu(gelu(z.to(tl.float32), False), False)")
compiled("gelu_mlp bf16", "mlp_gemm forward")
plant(layer_norm._norm_forward, "row // T", "row * row // T")
compiled("layer_norm C=1024", "norm_forward")
"""


def test_what_makes_code_worse_is_named(rows):
    shipped = sass.figures(rows)
    planted = [sass.figures([r]) for r in compiling("-c", PLANTED)]
    one_stage, three_stages, two_gelus, division = (
        sass.worse({which: shipped[which] for which in figures}, figures) for figures in planted
    )

    loop = "flash_attention bf16 D=64 | attention_forward | sm_90 | n0 in range(0, diagonal, BN)"
    assert any(line.startswith(f"{loop}: copies {shipped[loop]['copies']} -> ") for line in one_stage)
    assert any(line.startswith(f"{loop}: exposed 0 -> ") for line in one_stage)
    assert shipped[loop]["copies"] > 0 == shipped[loop]["exposed"]

    loops = [figures for which, figures in planted[1].items() if which.endswith("INNER)")]
    assert [(f["copies"], f["exposed"]) for f in loops] == [(4, 0), (4, 0), (2, 0), (2, 0)]
    assert not any("copies" in line or "exposed" in line for line in three_stages if "INNER)" in line)

    tile = "gelu_mlp bf16 | mlp_gemm forward | sm_90 | tile in tl.range(...): in some passes"
    assert planted[2][tile]["bound"] > 1.2 * shipped[tile]["bound"]
    assert f"{tile}: bound {shipped[tile]['bound']} -> {planted[2][tile]['bound']}" in two_gelus

    norm = "layer_norm C=1024 | norm_forward | sm_90 | the whole kernel"
    assert f"{norm}: divisions 0 -> 1" in division


def test_the_page_is_of_this_code():
    """docs/codegen.md names every case; its figures are written by the command that it names."""
    page = (Path(__file__).parent.parent / "docs/codegen.md").read_text()
    assert "python tests/codegen.py --markdown > docs/codegen.md" in page


def test_what_is_quoted_stands_on_the_page():
    """Clocks and bytes under "What binds it" in docs/kernels.md are cells of that op's tables in docs/codegen.md."""
    docs = Path(__file__).parent.parent / "docs"
    loops = (docs / "codegen.md").read_text().split("## Main loops")[1]
    cells = {}
    for table in loops.split("\n### ")[1:]:
        cells.setdefault(table.split(",")[0], set()).update(re.findall(r"\d+", table))
    quoted = re.findall(
        r"## (?:linear_)?(\w+)[^#]*?\*What binds it\*(.*?)\n\n", (docs / "kernels.md").read_text(), re.DOTALL
    )
    assert {op for op, _ in quoted} == cells.keys()
    for op, text in quoted:
        found = {figure.replace(",", "") for figure in re.findall(r"([\d,]+)\s(?:clocks|bytes)", text)}
        assert len(found) >= 3
        assert found <= cells[op], f"{op}: {found - cells[op]}"
