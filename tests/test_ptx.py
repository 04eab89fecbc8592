"""The emulator of tests/ptx on kernels written by hand: what instructions compute, and that each thing it watches is named."""

import struct

import numpy as np
import pytest
import torch
from ptx.machine import Machine
from ptx.memory import Fault
from ptx.parse import UnknownPTX, parse

REGISTERS = ".reg .pred %p<9>; .reg .b16 %rs<99>; .reg .b32 %r<99>; .reg .b64 %rd<99>;"


def kernel(body, threads=32, pointers=1, version="8.7", target="sm_90a"):
    """PTX of a kernel whose parameters are addresses, each in %rd0, %rd1, ...; %r0 is the thread."""
    params = ", ".join(f".param .u64 k_param_{i}" for i in range(pointers))
    loads = " ".join(f"ld.param.b64 %rd{i}, [k_param_{i}];" for i in range(pointers))
    return f""".version {version}
.target {target}
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k({params})
.reqntid {threads}
{{
{REGISTERS}
{loads} mov.u32 %r0, %tid.x;
.loc 1 12 4 // kernel.py:12:4 @[ kernel.py:30:1 ]
{body}
ret;
}}
"""


def execute(body, *arrays, threads=32, blocks=1, shared=0):
    """Run it on numpy arrays, in place."""
    code = parse(kernel(body, threads, len(arrays)))
    allocations = [(a.ctypes.data, a.nbytes, f"array {i}") for i, a in enumerate(arrays)]
    return Machine(code, [a.ctypes.data for a in arrays], allocations, shared, (blocks,)).run()


def computed(instruction, result, *operands):
    """What an instruction gives, as a type of numpy: operands are arrays of 32 values, in registers named {0}, {1} and so on; {d} is written."""
    kinds = {2: ("%rs", "b16"), 4: ("%r", "b32"), 8: ("%rd", "b64")}
    out = np.zeros(32, result)
    lines, names = [], []
    for i, a in enumerate([*operands, out], 1):
        prefix, kind = kinds[a.itemsize]
        names.append(f"{prefix}{20 + i}")
        lines += [f"mul.wide.u32 %rd{40 + i}, %r0, {a.itemsize}; add.s64 %rd{60 + i}, %rd{40 + i}, %rd{i - 1};"]
        if i <= len(operands):
            lines += [f"ld.global.{kind} {names[-1]}, [%rd{60 + i}];"]
    lines += [instruction.format(*names, d=names[-1]), f"st.global.{kind} [%rd{60 + i}], {names[-1]};"]
    execute("\n".join(lines), *operands, out)
    return out


RANDOM = np.random.default_rng(0)
SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -2.5,
    float("inf"),
    -float("inf"),
    float("nan"),
    1e-40,
    65504.0,
    3e38,
    1e-45,
    1.00390625,
    1.01171875,
]
F = np.array([*SPECIAL, *RANDOM.standard_normal(32 - len(SPECIAL)) * 100], np.float32)
G = np.roll(F, 5)
I = RANDOM.integers(-(2**31), 2**31, 32).astype(np.int32)  # noqa: E741
I[:6] = [0, 1, -1, 2**31 - 1, -(2**31), 7]
J = np.roll(I, 3)
N = np.array([*range(16), 30, 31, 32, 33, 63, 64, 200, *range(9)], np.uint32)


def python(f, result=np.int32):
    """f of Python numbers, one by one, cut to a type's bits."""
    bits = np.dtype(result).itemsize * 8
    return lambda *operands: np.array(
        [f(*map(int, row)) % 2**bits for row in zip(*operands, strict=True)], f"u{bits // 8}"
    ).view(result)


def bf16(x):
    return torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def quotient(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else -1


@pytest.mark.parametrize(
    ("instruction", "operands", "expected"),
    [
        ("add.s32 {d}, {0}, {1};", (I, J), python(lambda a, b: a + b)),
        ("mul.lo.s32 {d}, {0}, {1};", (I, J), python(lambda a, b: a * b)),
        ("mul.hi.u32 {d}, {0}, {1};", (I, J), python(lambda a, b: (a % 2**32) * (b % 2**32) >> 32)),
        ("mul.wide.s32 {d}, {0}, {1};", (I, J), python(lambda a, b: a * b, np.int64)),
        ("mad.lo.s32 {d}, {0}, {1}, 7;", (I, J), python(lambda a, b: a * b + 7)),
        ("div.s32 {d}, {0}, {1};", (I, J), python(quotient)),
        ("rem.s32 {d}, {0}, 7;", (I,), python(lambda a: a - quotient(a, 7) * 7)),
        ("shl.b32 {d}, {0}, {1};", (I, N), python(lambda a, n: a << n if n < 32 else 0)),
        ("shr.s32 {d}, {0}, {1};", (I, N), python(lambda a, n: a >> min(n, 31))),
        ("shr.u32 {d}, {0}, {1};", (I, N), python(lambda a, n: a % 2**32 >> n)),
        ("bfe.s32 {d}, {0}, 4, 3;", (I,), python(lambda a: ((a >> 4 & 7) ^ 4) - 4)),
        ("bfe.u32 {d}, {0}, 4, 3;", (I,), python(lambda a: a >> 4 & 7)),
        ("bfe.s32 {d}, {0}, 28, 6;", (I,), python(lambda a: ((a >> 28 & 15) ^ 8) - 8)),
        ("shfl.sync.idx.b32 {d}, {0}, 35, 31, -1;", (I,), lambda a: np.full(32, a[3])),
        ("shfl.sync.bfly.b32 {d}, {0}, 33, 31, -1;", (I,), lambda a: a.reshape(16, 2)[:, ::-1].reshape(32)),
        ("createpolicy.fractional.L2::evict_last.b64 %rd9, 1.0; ld.global.L1::evict_last.L2::cache_hint.b32 {d}, [%rd61], %rd9;", (I,), lambda a: a),
        ("popc.b32 {d}, {0};", (I,), python(lambda a: bin(a % 2**32).count("1"))),
        ("prmt.b32 {d}, {0}, {1}, 0x7531;", (I, J), python(lambda a, b: int.from_bytes(((b % 2**32 << 32) + a % 2**32).to_bytes(8, "little")[1::2], "little"))),
        ("setp.lt.u32 %p1, {0}, {1}; selp.b32 {d}, 1, 0, %p1;", (I, J), python(lambda a, b: a % 2**32 < b % 2**32)),
        ("not.b32 {d}, {0};", (I,), python(lambda a: ~a)),
        ("max.s32 {d}, {0}, {1};", (I, J), python(max)),
        ("cvt.s64.s32 {d}, {0};", (I,), python(lambda a: a, np.int64)),
        ("cvt.u64.u32 {d}, {0};", (I,), python(lambda a: a % 2**32, np.int64)),
        ("cvt.rn.f32.s32 {d}, {0};", (I,), lambda a: a.astype(np.float64).astype(np.float32)),
        ("mul.f32 {d}, {0}, {1};", (F, G), lambda a, b: a * b),
        ("fma.rn.f32 {d}, {0}, {1}, {0};", (F, G), lambda a, b: (a.astype(np.longdouble) * b + a).astype(np.float32)),
        ("add.ftz.f32 {d}, {0}, 0f00000000;", (F,), lambda a: np.where(abs(a) < 2.0**-126, np.float32(0), a)),
        ("max.f32 {d}, {0}, {1};", (F, G), np.fmax),
        ("max.NaN.f32 {d}, {0}, {1};", (F, G), np.maximum),
        ("max.f32 {d}, {0}, {1}, 0f40000000;", (F, G), lambda a, b: np.fmax(np.fmax(a, b), np.float32(2))),
        ("setp.ltu.f32 %p1, {0}, {1}; selp.b32 {d}, 1, 0, %p1;", (F, G), lambda a, b: (~(a >= b)).astype(np.int32)),
        ("setp.ne.f32 %p1, {0}, {1}; selp.b32 {d}, 1, 0, %p1;", (F, G), lambda a, b: ((a < b) | (a > b)).astype(np.int32)),
        ("ex2.approx.ftz.f32 {d}, {0};", (F / 10,), lambda a: np.exp2(a)),
        ("cvt.rn.bf16.f32 {d}, {0};", (F,), bf16),
        ("cvt.rn.f16.f32 {d}, {0};", (F,), lambda a: a.astype(np.float16).view(np.uint16)),
        ("cvt.f32.bf16 {d}, {0};", (bf16(F),), lambda a: (a.astype(np.uint32) << 16).view(np.float32)),
        ("cvt.rn.bf16x2.f32 {d}, {0}, {1};", (F, G), lambda a, b: (bf16(a).astype(np.uint32) << 16 | bf16(b)).view(np.int32)),
        ("add.bf16x2 {d}, {0}, {1};", (bf16(F), bf16(G)), None),
        ("cvt.rzi.s32.f32 {d}, {0};", (F,), lambda a: np.clip(np.nan_to_num(np.trunc(a.astype(np.float64)), nan=0), -(2**31), 2**31 - 1).astype(np.int32)),
        ("mov.b64 {d}, {{{0}, {1}}};", (I, J), lambda a, b: (b.view(np.uint32).astype(np.uint64) << 32 | a.view(np.uint32)).view(np.int64)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_an_instruction(instruction, operands, expected):
    with np.errstate(all="ignore"):
        if expected is None:  # two halves of one register
            a, b = (o.astype(np.uint32) << 16 | np.roll(o, 1) for o in operands)
            whole = lambda o: torch.from_numpy(np.stack([np.roll(o, 1), o], 1).view(np.int16)).view(torch.bfloat16)  # noqa: E731
            right = (whole(operands[0]) + whole(operands[1])).view(torch.int16).numpy().view(np.uint32)[:, 0]
            operands = a, b
        else:
            right = expected(*operands)
        found = computed(instruction, right.dtype, *operands)
    if right.dtype == np.float32:
        exact = "ex2" not in instruction
        np.testing.assert_array_max_ulp(
            *(np.where(np.isnan(x), 0, x) for x in (found, right)), maxulp=0 if exact else 1
        )
        np.testing.assert_array_equal(np.isnan(found), np.isnan(right))
    elif "bf16" in instruction or "f16" in instruction:  # a nan has many bit patterns
        assert all(
            f == r or (f & r & 0x7C00) == 0x7C00
            for f, r in zip(*(x.view(np.uint16) for x in (found, right)), strict=True)
        )
    else:
        np.testing.assert_array_equal(found, right)


def fragments(matrix, places, dtype):
    """Registers [n, 32] of 32 bits that hold a matrix: places(lane, register) names a register's two elements, as (row, column) of the first and
    whether the second is beside or below it; of fp32 one."""
    out = []
    for place in places:
        row = []
        for lane in range(32):
            values = [matrix[at] for at in place(lane // 4, lane % 4)]
            row.append(np.array(values, dtype).view(np.uint32)[0])
        out.append(row)
    return np.array(out, np.uint32)


A = [lambda g, q, r=r, c=c: [(g + r, 2 * q + c), (g + r, 2 * q + 1 + c)] for c in (0, 8) for r in (0, 8)]
B = [lambda g, q, r=r: [(2 * q + r, g), (2 * q + 1 + r, g)] for r in (0, 8)]
D = [lambda g, q, r=r, c=c: [(g + r, 2 * q + c)] for r in (0, 8) for c in (0, 1)]


def test_mma_multiplies():
    """m16n8k16 in fp16, by the layouts that the PTX ISA draws."""
    a, b, c = (RANDOM.integers(-8, 8, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    parts = [fragments(a, A, np.float16), fragments(b, B, np.float16), fragments(c, D, np.float32)]
    memory = np.concatenate(parts)
    lines = ["mul.wide.u32 %rd50, %r0, 4; add.s64 %rd51, %rd50, %rd0;"]
    lines += [f"ld.global.b32 %r{10 + i}, [%rd51+{128 * i}];" for i in range(10)]
    lines += [
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r16, %r17, %r18, %r19}, {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%r16, %r17, %r18, %r19};"
    ]
    lines += [f"st.global.b32 [%rd51+{128 * i}], %r{10 + i};" for i in range(6, 10)]
    execute("\n".join(lines), memory)
    np.testing.assert_array_equal(memory[6:], fragments(a @ b + c, D, np.float32))


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_gives_each_lane_its_pair(trans):
    matrix = RANDOM.integers(0, 2**16, (8, 8)).astype(np.uint16)
    out = np.zeros(32, np.uint32)
    execute(
        f"""
        mul.wide.u32 %rd50, %r0, 4; add.s64 %rd51, %rd50, %rd0; add.s64 %rd52, %rd50, %rd1;
        ld.global.b32 %r10, [%rd51]; shl.b32 %r11, %r0, 2; add.s32 %r12, %r11, global_smem; st.shared.b32 [%r12], %r10;
        bar.sync 0;
        shl.b32 %r13, %r0, 4; add.s32 %r14, %r13, global_smem;
        ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r15}}, [%r14];
        st.global.b32 [%rd52], %r15;""",
        matrix,
        out,
        shared=128,
    )
    right = matrix.T if trans else matrix
    assert out.tolist() == [
        struct.unpack("<I", right[lane // 4, 2 * (lane % 4) :][:2].tobytes())[0] for lane in range(32)
    ]


HALF = "shl.b32 %r1, %r0, 2; add.s32 %r2, %r1, global_smem; mul.wide.u32 %rd1, %r0, 4; add.s64 %rd2, %rd1, %rd0;"


@pytest.mark.parametrize(
    ("what", "body", "says"),
    [
        ("past the end", HALF + "ld.global.b32 %r5, [%rd2];", r"thread 32 of block \(0, 0, 0\) reads 4 bytes of global memory at 0x\w+: 0 bytes past the end of array 0"),
        ("across the end", HALF + "ld.global.b64 %rd5, [%rd0+252];", "misaligned, it must be a multiple of 8"),
        ("shared, past the end", HALF + "st.shared.b32 [%r2+4], %r0;", "thread 63 .* writes 4 bytes of shared memory .* there are 256 bytes"),
        ("misaligned", HALF + "ld.global.b32 %r5, [%rd2+2];", "misaligned, it must be a multiple of 4"),
        ("shared, not written", HALF + "ld.shared.b32 %r5, [%r2];", "it was never written"),
        ("a register, not written", "add.s32 %r5, %r6, 1;", "reads register %r6, which nothing has written"),
        ("written on one path", "setp.lt.s32 %p1, %r0, 5; @%p1 bra L; mov.b32 %r6, 1; L: add.s32 %r5, %r6, 1;", "thread 0 .* reads register %r6"),
        ("a race in shared memory", HALF + "xor.b32 %r3, %r2, 128; st.shared.b32 [%r2], %r0; ld.shared.b32 %r5, [%r3];",
         "thread 0 .* reads 4 bytes of shared memory at 0x480: a race with warp 1 writing it with no barrier between"),
        ("a write behind a read", HALF + "st.shared.b32 [%r2], %r0; bar.sync 0; ld.shared.b32 %r5, [%r2]; xor.b32 %r3, %r2, 128; st.shared.b32 [%r3], %r0;",
         "writes 4 bytes of shared memory at 0x480: a race with warp 1 reading it with no barrier between"),
        ("a race in global memory", HALF + "st.global.b32 [%rd2], %r0; ld.global.b32 %r5, [%rd0+128];", "thread 0 .* a race with warp 1 writing it"),
        ("two warps write", HALF + "shr.u32 %r4, %r0, 5; st.global.b32 [%rd0], %r4;", "a race with another warp or block in this very instruction"),
        ("a barrier for some", "setp.lt.s32 %p1, %r0, 32; @%p1 bra L; bar.sync 0; bra M; L: bar.sync 0; M: mov.b32 %r5, 1;", "waits at a barrier that not all threads of its block reach"),
        ("part of a warp", "setp.lt.s32 %p1, %r0, 16; @%p1 shfl.sync.bfly.b32 %r5, %r0, 1, 31, -1;", "without all of its threads"),
        ("an mbarrier, not initialised", "add.s32 %r1, %r0, 1; mov.b32 %r2, global_smem; st.shared.b64 [%r2], %rd0; bar.sync 0; W: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r2], 0; @!%p1 bra W;",
         "uses an mbarrier at 0x400 that was not initialised"),
        ("an mbarrier, never complete",
         "mov.b32 %r2, global_smem; setp.eq.b32 %p2, %r0, 0; @%p2 mbarrier.init.shared::cta.b64 [%r2], 1; bar.sync 0; W: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r2], 0; @!%p1 bra W;",
         "waits without end for an mbarrier's phase"),
        ("a copy, not waited for", HALF + "cp.async.ca.shared.global [%r2], [%rd2], 4; cp.async.commit_group; ld.shared.b32 %r5, [%r2];", "an asynchronous copy into it was not waited for"),
        ("a copy, not committed", HALF + "cp.async.ca.shared.global [%r2], [%rd2], 4; cp.async.wait_group 0; ld.shared.b32 %r5, [%r2];", "an asynchronous copy into it was not waited for"),
        ("an mbarrier, written over", HALF + "setp.eq.b32 %p2, %r0, 0; @%p2 mbarrier.init.shared::cta.b64 [%r2], 1; bar.sync 0; @%p2 st.shared.b64 [%r2], %rd0;",
         "thread 0 .* writes 8 bytes of shared memory at 0x400: an asynchronous read of it was not waited for"),
        ("an mbarrier, made twice", HALF + "setp.eq.b32 %p2, %r0, 0; @%p2 mbarrier.init.shared::cta.b64 [%r2], 1; bar.sync 0; @%p2 mbarrier.init.shared::cta.b64 [%r2], 1;",
         "an asynchronous read of it was not waited for"),
        ("a copy onto what is read", HALF + "st.shared.b32 [%r2], %r0; bar.sync 0; ld.shared.b32 %r5, [%r2]; xor.b32 %r3, %r2, 128; cp.async.ca.shared.global [%r3], [%rd2], 4;",
         "writes 4 bytes of shared memory at 0x480: a race with warp 1 reading it"),
    ],
    ids=lambda x: x if " " in str(x) and len(str(x)) < 35 else "",
)  # fmt: skip
def test_what_is_wrong_is_named(what, body, says):
    with pytest.raises(Fault, match=says) as error:
        execute(body, np.zeros(32 if what == "past the end" else 64, np.int32), threads=64, shared=256)
    assert str(error.value).startswith("k, kernel.py:12 @ kernel.py:30: thread ")
    assert "; PTX line " in str(error.value)


def test_a_race_between_blocks():
    with pytest.raises(Fault, match="a race with another warp or block"):
        execute("mov.u32 %r1, %ctaid.x; st.global.b32 [%rd0], %r1;", np.zeros(1, np.int32), blocks=2)


def test_a_race_between_threads_of_a_warp():
    with pytest.raises(Fault, match=r"thread 0 .* a race with another warp or block in this very instruction"):
        execute("st.global.b32 [%rd0], %r0;", np.zeros(1, np.int32))


def product(before, between):
    """Warp 0 writes a tile of ones, then a product reads it: with the lines given before and behind wgmma.fence."""
    tile = (
        -(1 << 62) + (256 >> 4 << 32) + (1024 >> 4)
    )  # rows of 32 bytes, swizzled; eight of them 256 bytes from the next eight
    out = np.zeros(128, np.float32)
    stores = "".join(f"@%p1 st.shared.v4.b32 [%r2+{512 * i}], {{%r5, %r5, %r5, %r5}};" for i in range(4))
    accumulators = "{%r10, %r11, %r12, %r13}"
    execute(
        f"""shl.b32 %r1, %r0, 4; add.s32 %r2, %r1, global_smem; mov.b32 %r5, 0x3c003c00; setp.lt.u32 %p1, %r0, 32; {stores}
        mov.b64 %rd5, {tile}; {before} wgmma.fence.sync.aligned; {between}
        wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {accumulators}, %rd5, %rd5, 0, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        mul.wide.u32 %rd6, %r0, 4; add.s64 %rd7, %rd6, %rd0; st.global.b32 [%rd7], %r10;""",
        out, threads=128, shared=2048,
    )  # fmt: skip
    return out


def test_wgmma_multiplies():
    assert (product("fence.proxy.async.shared::cta; bar.sync 0;", "") == 16).all()


@pytest.mark.parametrize(
    ("before", "between", "says"),
    [
        ("fence.proxy.async.shared::cta;", "", "a race with another warp that writes it"),
        ("bar.sync 0;", "", "no fence.proxy.async behind it"),
        (
            "fence.proxy.async.shared::cta; bar.sync 0;",
            "wgmma.commit_group.sync.aligned;",
            "no wgmma.fence before them",
        ),
    ],
)
def test_what_wgmma_needs(before, between, says):
    with pytest.raises(Fault, match=says):
        product(before, between)


FIRST = "tcgen05.mma.cta_group::1.kind::f16 [%r6], %rd5, %rd5, %r7, 0; @%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r4];"
SECOND = "tcgen05.mma.cta_group::1.kind::f16 [%r6], %rd5, %rd5, %r7, 1; {0} tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r4+8];"
WAIT = "{0}: mbarrier.try_wait.parity.shared::cta.b64 %p4, [{1}], 0; @!%p4 bra {0};"
ONES = "tcgen05.st.sync.aligned.32x32b.x8.b32 [%r8+16], {%r5, %r5, %r5, %r5, %r5, %r5, %r5, %r5};"


def tensor_products(products):
    """Sums of 16 ones for each product that adds to them in tensor memory, read at the end. %p2 is thread 0, %p3 another one of its warp; %r8
    the lanes of a warp."""
    tile = (6 << 61) + (256 >> 4 << 32) + (1024 >> 4)  # as above, by sm_100's number of a swizzle
    out = np.zeros(128, np.float32)
    execute(
        f"""shl.b32 %r1, %r0, 5; add.s32 %r2, %r1, global_smem; mov.b32 %r5, 0x3c003c00; mov.b32 %r3, global_smem; add.s32 %r4, %r3, 4096;
        st.shared.v4.b32 [%r2], {{%r5, %r5, %r5, %r5}}; st.shared.v4.b32 [%r2+16], {{%r5, %r5, %r5, %r5}};
        setp.lt.u32 %p1, %r0, 32; setp.eq.u32 %p2, %r0, 0; setp.eq.u32 %p3, %r0, 1;
        @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r4+16], 32;
        @%p2 mbarrier.init.shared::cta.b64 [%r4], 1; @%p2 mbarrier.init.shared::cta.b64 [%r4+8], 1;
        fence.proxy.async.shared::cta; bar.sync 0;
        ld.shared.b32 %r6, [%r4+16]; shr.u32 %r8, %r0, 5; shl.b32 %r8, %r8, 21; add.s32 %r8, %r8, %r6;
        mov.b64 %rd5, {tile}; mov.b32 %r7, {1 << 4 | 8 >> 3 << 17 | 128 >> 4 << 24}; mov.b32 %r9, {1 << 4 | 16 >> 3 << 17 | 128 >> 4 << 24};
        {products}
        tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r10}}, [%r8]; tcgen05.wait::ld.sync.aligned;
        mul.wide.u32 %rd6, %r0, 4; add.s64 %rd7, %rd6, %rd0; st.global.b32 [%rd7], %r10;
        bar.sync 0; @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r6, 32;""",
        out, threads=128, shared=4224,
    )  # fmt: skip
    return out


def test_a_product_follows_another_into_its_accumulator():
    """The first was committed, and not waited for. The wait for the second is one for both."""
    second = SECOND.format("@%p2")
    assert (tensor_products(f"@%p2 {FIRST} @%p2 {second} {WAIT.format('W', '%r4+8')}") == 32).all()
    from_tensor_memory = second.replace("[%r6], %rd5", "[%r6], [%r6+16]")
    stored = f"{ONES} tcgen05.wait::st.sync.aligned; bar.sync 0; @%p2 {FIRST} @%p2 {from_tensor_memory}"
    assert (tensor_products(f"{stored} {WAIT.format('W', '%r4+8')} bar.sync 0; {ONES}") == 32).all()


@pytest.mark.parametrize(
    ("products", "says"),
    [
        (f"@%p2 {FIRST} @%p2 {SECOND.format('@%p2').replace('%r7', '%r9')}", "writes tensor memory that a store or a product still writes"),
        (f"@%p2 {FIRST} @%p3 {SECOND.format('@%p3')}", "writes tensor memory that a store or a product still writes"),
        (f"tcgen05.st.sync.aligned.32x32b.x1.b32 [%r8], {{%r5}}; bar.sync 0; @%p2 {SECOND.format('@%p2')}", "writes tensor memory that a store or a product still writes"),
        (f"@%p2 {FIRST} @%p2 {SECOND.format('@%p2')} {WAIT.format('W', '%r4')}", "touches tensor memory of a product or a store that was not waited for"),
        (f"{ONES} tcgen05.wait::st.sync.aligned; bar.sync 0; @%p2 {FIRST.replace('[%r6], %rd5', '[%r6], [%r6+16]')} bar.sync 0; {ONES}", "writes tensor memory that a product still reads"),
    ],
    ids=("another shape", "another thread", "behind a store", "a wait for the first", "its operand overwritten"),
)  # fmt: skip
def test_what_a_product_into_tensor_memory_needs(products, says):
    with pytest.raises(Fault, match=says):
        tensor_products(products)


def test_several_warps_may_write_the_same():
    out = np.zeros(1, np.int32)
    execute("mov.b32 %r1, 7; st.global.b32 [%rd0], %r1;", out, threads=128)
    assert out[0] == 7


def test_threads_that_parted_meet_again():
    """A loop of another length in each thread, then an instruction of the whole warp."""
    out = np.zeros(32, np.int32)
    execute(
        """mov.b32 %r1, 0; mov.b32 %r2, 0;
        L: add.s32 %r2, %r2, %r1; add.s32 %r1, %r1, 1; setp.le.s32 %p1, %r1, %r0; @%p1 bra L;
        redux.sync.add.s32 %r3, %r2, -1; mul.wide.u32 %rd1, %r0, 4; add.s64 %rd2, %rd1, %rd0; st.global.b32 [%rd2], %r3;""",
        out,
    )
    assert set(out) == {sum(i * (i + 1) // 2 for i in range(32))}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (kernel("", version="12.0"), "PTX version 12.0"),
        (kernel("", target="sm_70"), "PTX for sm_70"),
        (kernel("").replace(".version 8.7", ""), "PTX version missing"),
        (kernel("").replace(".entry", ".func"), "no kernel to run"),
        (kernel("").replace(".reqntid 32", ""), "no .reqntid"),
        (kernel("ld.global.b32 %r5, [12q];"), "a literal that is not understood: 12q"),
        (kernel("").rstrip().rstrip("}"), "the body does not end"),
    ],
)
def test_text_that_is_no_kernel_is_one_clear_error(text, says):
    with pytest.raises(UnknownPTX, match=says):
        parse(text)


@pytest.mark.parametrize(
    "instruction",
    [
        "fma.rz.f32 %r1, %r0, %r0, %r0;", "atom.global.add.u32 %r1, [%rd0], %r0;", "max.f32 %r1, %r0, %r0, %r0, %r0;", "add.sat.s32 %r1, %r0, %r0;",
        "bar.sync 1, 64;", "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r1}, {%r1}, {%r1}, {%r1};", "mov.b32 %r1, %clock;",
        "shl.sat.b32 %r1, %r0, 1;", "selp.sat.b32 %r1, %r0, %r0, %p1;", "div.rz.f32 %r1, %r0, %r0;", "rcp.approx.sat.f32 %r1, %r0;",
        "min.xorsign.abs.f32 %r1, %r0, %r0;", "add.ftz.s32 %r1, %r0, %r0;", "setp.lt.b32 %p1, %r0, %r0;", "mul.lo.s32 %r1, %r0, %r0, %r0;",
        "cvt.sat.s16.s32 %rs1, %r0;", "cvt.rn.sat.f16.f32 %rs1, %r0;", "cvt.sat.f32.f32 %r1, %r0;", "cvta.to.shared.u64 %rd1, %rd0;",
        "ld.volatile.global.b32 %r1, [%rd0];", "ld.global.L2::cache_hint.b32 %r1, [%rd0], %rd1;", "ld.global.b64 %r1, [%rd0];",
        "ld.param.b64 %rd1, [k_param_0+4];", "st.global.b64 [%rd0], %r0;", "mov.b32 %rd1, %r0;",
        "shfl.sync.bfly.b32 %r1, %r0, 1, 7, -1;", "shfl.sync.idx.b32 %r1, %r0, 0, 31, 0xffff;", "redux.sync.add.s32 %r1, %r0, 0xff;",
        "vote.sync.ballot.b32 %r1, !%p1, -1;", "elect.sync %r1|%p1, 0xfffffff0;", "bar.sync 1;", "bar.sync 0, 32;", "@%p1 bar.sync 0;",
        "bar.warp.sync 0xff;", "fence.acq_rel_foo;", "mbarrier.arrive.noComplete.shared.b64 %rd1, [%r0], 1;",
        "mbarrier.try_wait.shared.b64 %p1, [%r0], %rd1;", "cp.async.ca.shared.global [%r0], [%rd0], 4, %p1;",
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r1}, [%r0];", "tcgen05.fence::foo;",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r1, %r2, %r3, %r4}, %rd0, %rd0, 1, -1, 1, 0, 0;",
        "setp.lt.and.s32 %p1, %r0, %r0, %p2;", "ld.global.v3.b32 {%r1, %r2, %r3}, [%rd0];", "cvt.rn.satfinite.e4m3x2.f32 %rs1, %r0, %r0;",
    ],
)  # fmt: skip
def test_an_instruction_that_is_not_known_is_named(instruction):
    with pytest.raises(UnknownPTX) as error:
        execute(instruction, np.zeros(1, np.int32), threads=64)
    assert instruction.rstrip(";").removeprefix("@%p1 ") in str(error.value)
