"""Every shipped configuration compiles for sm_80 to sm_120, without spilling a register; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


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


@pytest.fixture(scope="module")
def rows():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("codegen.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


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
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("codegen.py"), "--candidates", "12"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {r["architecture"] for r in found} == {80, 90, 100, 120}
    assert {r["op"] for r in found} == {"gelu_mlp", "attention", "layer_norm", "cross_entropy", "embedding", "adamw"}
    for r in found:
        assert r["candidates"] >= 1
        assert r["fail"] == {}, r


def test_the_page_is_of_this_code():
    """docs/codegen.md names every case; its figures are written by the command that it names."""
    page = (Path(__file__).parent.parent / "docs/codegen.md").read_text()
    assert "python tests/codegen.py --markdown > docs/codegen.md" in page
