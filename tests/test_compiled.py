"""The compiled proof: what Triton makes of every kernel for an NVIDIA GPU, run without one, equal and without a race.

Each case compiles the kernels of an op as a launch on that architecture would, runs the PTX in the emulator of tests/ptx, which watches
memory and barriers, and holds outputs and gradients to the three-way rule. The rest of this file breaks what was proved.

    pytest tests/test_compiled.py                               sm_80 and sm_90, in bf16: three minutes of one core
    pytest tests/test_compiled.py -m slow                       a sample of all else: seven
    FASTGPT_PROVE=all pytest tests/test_compiled.py -m slow     all else, each case in every dtype on every architecture: twenty
"""

import itertools
import os

import pytest

pytest.importorskip("triton")
import proof
from faults import CASES as FAULTS
from faults import SHAPE
from kernel_case import SEED, philox_uniform

slow = pytest.mark.slow
# sm_89 runs sm_80's instructions with sm_80's rows, and sm_120 few others.
ARCHITECTURES = [80, 90, *(pytest.param(sm, marks=slow) for sm in (89, 100, 120))]


def held():
    """The cases, each with a dtype and an architecture. Quick are all in bf16 on sm_80 and sm_90, and an op's first in fp16 and fp32 too.

    The slow sample has every case on every architecture, in dtypes that take turns: on sm_80 and sm_90 fp16 and fp32, on the others all
    three. So each case meets each dtype and each architecture, and each dtype each architecture.
    """
    bf16, *others = proof.DTYPES
    numbered = [(o, op, c, case) for o, op in enumerate(proof.CASES) for c, case in enumerate(proof.CASES[op])]
    for (o, op, c, case), (s, sm) in itertools.product(numbered, enumerate((80, 90, 89, 100, 120))):
        turns = others if sm in (80, 90) else proof.DTYPES
        turn = turns[(o + c + s) % len(turns)]
        for dtype in proof.DTYPES:
            quick = sm in (80, 90) and (dtype == bf16 or (c == 0 and dtype == turn)) and case not in proof.SLOW
            if (
                quick
                or dtype == turn
                or (case in proof.SLOW and sm in (80, 90) and dtype == bf16)
                or os.environ.get("FASTGPT_PROVE") == "all"
            ):
                yield pytest.param(op, case, dtype, sm, marks=[] if quick else [slow])


@pytest.mark.parametrize(("op", "case", "dtype", "architecture"), list(held()))
def test_an_op_holds(compiled, op, case, dtype, architecture):
    assert compiled(proof.hold, op, case, dtype, architecture) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_exported_mask_is_a_host_philoxs(compiled, architecture):
    assert compiled(proof.mask, architecture) == [
        [[[philox_uniform(SEED, (j, i, h, b)) >= 0.2 for j in range(37)] for i in range(37)] for h in range(3)]
        for b in range(2)
    ]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("value", [1e3, 6e3, 6e4])
def test_a_large_maximum_does_not_reach_the_exponent(compiled, value, dtype):
    """The compiled product with the scale is one FMA, which rounds otherwise than the interpreter's product and sum."""
    (rows,) = compiled(proof.equal, value, dtype, 90)
    assert max(abs(x - value) for row in rows for x in row) <= value * (2**-7 if dtype == "bfloat16" else 2**-10)


@pytest.mark.parametrize(("op", "case"), [("attention", "tiles"), ("gelu_mlp", "even width")])
@pytest.mark.parametrize("architecture", [90, pytest.param(100, marks=slow)])
def test_where_triton_forgets_a_fence_nothing_needs_it(compiled, op, case, architecture):
    """Before 3.7.1 there is none between cp.async and the product that reads the copy: tiles then go by registers."""
    assert compiled(proof.unfenced, op, case, architecture) == []


def test_what_the_emulator_leaves_out_is_missed_by_nobody_else(compiled):
    """It compiles without ptxas, and Triton keeps on disk what it compiles."""
    assert compiled(proof.full_cubin, "layer_norm", "strides", 90) > 1000


# ---- it fails where it should ----


def planted():
    """The faults in kernels, on sm_80 and sm_90 in turn; every second pair is slow, as all are planted in the interpreted kernels too."""
    in_kernels = [f for f in FAULTS if proof.in_kernel(f[0], f[2])]
    for i, fault in enumerate(in_kernels):
        yield pytest.param(*fault, (80, 90)[i % 2], id=f"{fault[0]}: {fault[1]}", marks=[slow] if i // 2 % 2 else [])


@pytest.mark.parametrize(("op", "what", "right", "wrong", "shape", "architecture"), list(planted()))
def test_a_planted_fault_is_found(compiled, op, what, right, wrong, shape, architecture):
    assert compiled(proof.planted, op, right, wrong, shape, "float32", architecture), f"{what}: nothing noticed"


@pytest.mark.parametrize("op", sorted(proof.KERNELS))
def test_nothing_is_found_where_nothing_is_planted(compiled, op):
    """So that what a planted fault turns red is the fault's, not the planting's."""
    assert compiled(proof.planted, op, "import torch", "import torch", SHAPE, "float32", 90) == []


@pytest.mark.parametrize(
    ("op", "case", "kernel", "architecture", "needed"),
    [
        ("layer_norm", "many rows", "_norm_backward", 80, 3),
        ("embedding", "partial", "_embed_backward_wte", 90, 8),
        ("linear_cross_entropy", "several blocks", "_loss_rows", 80, 13),
        # A pipeline ends with a wait for nothing and a barrier behind it; one of three stages has another between its first two fills.
        pytest.param("attention", "tiles", "_attention_forward", 80, 9, marks=slow),
        pytest.param("attention", "tiles", "_attention_backward", 90, 17, marks=slow),
        ("gelu_mlp", "partial", "_mlp_gemm", 80, 5),
        pytest.param("gelu_mlp", "pipeline", "_mlp_gemm", 90, 7, marks=slow),
        pytest.param("attention", "partial", "_attention_forward", 100, 15, marks=slow),
        pytest.param("gelu_mlp", "pipeline", "_mlp_gemm", 100, 7, marks=slow),
    ],
)
def test_a_barrier_that_is_left_out_is_named(compiled, op, case, kernel, architecture, needed):
    """As many as are needed in that case. How many are not differs between versions of Triton: on sm_100 3.8 has 40 barriers in attention's
    forward where 3.7.1 has 32, and 15 are needed in both. A version that has fewer than are counted here needs all that it has."""
    seen, not_needed = compiled(proof.barriers, op, case, "bfloat16", architecture, kernel)
    assert len(seen) >= 2
    assert len(seen) >= needed or not not_needed, not_needed
    for message in seen:
        assert message.startswith(f"{kernel}, "), message
        assert any(
            f in message for f in ("a race with", "no barrier between", "asynchronous", "never written", "still writes")
        ), message


@pytest.mark.parametrize(
    ("op", "case", "architecture", "kernel", "pattern", "says"),
    [
        ("attention", "partial", 80, "_attention_forward", r"^\s*cp\.async\.commit_group.*$", "an asynchronous copy into it was not waited for"),
        ("attention", "partial", 80, "_attention_backward", r"^\s*cp\.async\.wait_group.*$", "an asynchronous copy into it was not waited for"),
        ("gelu_mlp", "partial", 80, "_mlp_gemm", r"^\s*cp\.async\.wait_group.*$", "an asynchronous copy into it was not waited for"),
        ("gelu_mlp", "pipeline", 90, "_mlp_gemm", r"^\s*@!complete bra.*$|^\s*mbarrier\.try_wait.*$", "an asynchronous copy writes and nobody waited for"),
        ("gelu_mlp", "pipeline", 90, "_mlp_gemm", r"^\s*wgmma\.wait_group.*$", "was not waited for"),
        ("gelu_mlp", "pipeline", 90, "_mlp_gemm", r"^\s*wgmma\.commit_group.*$", "was not waited for"),
        ("gelu_mlp", "pipeline", 90, "_mlp_gemm", r"^\s*cp\.async\.bulk\.wait_group.*$", "an asynchronous read of it was not waited for"),
        ("gelu_mlp", "pipeline", 90, "_mlp_gemm", r"^\s*fence\.proxy\.async.*$", "no fence.proxy.async behind it"),
        ("gelu_mlp", "pipeline", 90, "_mlp_gemm", r"^\s*@%p\d+ mbarrier\.init.*$", "it was never written"),
        ("attention", "partial", 90, "_attention_backward", r"^\s*fence\.proxy\.async.*$", "no fence.proxy.async behind it"),
        ("attention", "partial", 90, "_attention_forward", r"^\s*wgmma\.wait_group.*$", "of a matrix product that was not waited for"),
    ],
)  # fmt: skip
def test_what_an_asynchronous_copy_or_product_needs(compiled, op, case, architecture, kernel, pattern, says):
    said = compiled(proof.dropped, op, case, "bfloat16", architecture, kernel, pattern)
    assert said.startswith(f"{kernel}, ")
    assert says in said


@pytest.mark.parametrize("op", ["layer_norm", "attention", "embedding"])
@pytest.mark.parametrize("architecture", [80, 90])
def test_a_false_alignment_is_named(compiled, op, architecture):
    said = compiled(proof.misaligned, op, architecture)
    assert "misaligned, it must be a multiple of " in said
    assert "of global memory at 0x" in said


def test_a_box_that_is_too_small_is_waited_for_without_end(compiled):
    assert "waits without end for an mbarrier's phase" in compiled(proof.small_box, 90)


@pytest.mark.parametrize(
    ("op", "right", "wrong"),
    [
        ("layer_norm", "mask = cols < N", "mask = cols < N + 1"),
        ("attention", "if KNOWN else rows < bound", "if KNOWN else rows < bound + 1"),
        ("attention", "EVEN=T % config.outer == 0", "EVEN=True"),
        ("linear_cross_entropy", "tl.load(x_ptr + i, i < n", "tl.load(x_ptr + i, i < n + 1"),
        ("embedding", "tl.store(x_ptr + row * C + cols, x, mask)", "tl.store(x_ptr + row * C + cols + 1, x, mask)"),
        ("gelu_mlp", "(rm < M)[:, None] & (rk < K)[None, :]", "(rm < M + 1)[:, None] & (rk < K)[None, :]"),
        ("adamw", "mask = i < n", "mask = i < n + 1"),
    ],
)
@pytest.mark.parametrize("architecture", [80, 90])
def test_a_shifted_mask_is_out_of_bounds(compiled, op, right, wrong, architecture):
    """Of the last row it is, of others another row's elements: each row ends at an allocation here."""
    shape = proof.Shape(1, 3, 33, 1, 61)
    said = compiled(proof.planted, op, right, wrong, shape, "float32", architecture, False)
    assert len(said) == 1
    assert "bytes past the end of" in said[0] or "across its end" in said[0] or "a race with" in said[0], said
