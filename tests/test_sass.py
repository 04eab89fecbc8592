"""tests/sass.py counts what stands in the code: on code so short that it can be counted by hand."""

import struct
from pathlib import Path

import pytest

pytest.importorskip("triton")

import sass


def parts(code, warps=8, architecture=90):
    """{part: its dict} of instructions and labels, a line each."""
    lines = [line if line.endswith(":") else f"        /*0000*/       {line} ;" for line in code.strip().splitlines()]
    return {p["part"]: p for p in sass.parts("\n".join(lines), warps, architecture, Path(__file__))}


PRODUCTS = """
.L_x_0:
{product}
MUFU.EX2 R0, R0
F2F.BF16.F32 R1, R0
IMAD R2, R2, R3, R4
FFMA R5, R0, R2, R3
LDS.128 R8, [R2]
@!P0 BRA `(.L_x_0)
EXIT
"""


@pytest.mark.parametrize(
    ("architecture", "product", "flop", "clocks"),
    [  # fma: both instructions on 64 lanes; on 128 IMAD alone takes as long as both, on its half
        (80, "HMMA.16816.F32.BF16 R8, R4, R6, R8", 8 * 2 * 16 * 8 * 16, dict(tensor=2048, fma=8)),
        (90, "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24", 2 * 2 * 64 * 128 * 16, dict(tensor=4096, fma=4)),
    ],
)
def test_a_pass_takes_of_each_pipe_what_its_rate_says(architecture, product, flop, clocks):
    loop = parts(PRODUCTS.format(product=product), 8, architecture)["a loop"]
    assert loop["instructions"] == 7
    assert loop["clocks"]["issue"] == 7 * 8 / 4  # warps of the block over four schedulers
    assert loop["clocks"]["xu"] == 2 * 8 * 32 / 16
    assert loop["clocks"]["shared"] == 8 * 32 * 16 / 128
    assert loop["clocks"]["fma"] == 8 * 32 / 64 * clocks["fma"] / 4
    assert loop["clocks"]["tensor"] == flop / clocks["tensor"]
    assert (loop["bound"], loop["by"]) == max((loop["clocks"][pipe], pipe) for pipe in ("tensor", "xu", "shared"))
    assert loop["converts"] == 1


def test_blackwells_products_are_issued_once_with_the_shape_of_their_descriptor():
    code = """
.L_x_0:
BRA.U UP0, `(.L_x_1)
UMOV UR9, 0x8100490
UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR7], tmem[UR8], idesc[UR9], UPT
.L_x_1:
BRA.U !UP1, `(.L_x_0)
EXIT
"""
    assert parts(code, 8, 100)["a loop"]["clocks"]["tensor"] == 2 * 128 * 64 * 16 / 8192


def test_a_tiles_end_is_a_part_of_its_own_and_inner_loops_are_not_counted_twice():
    code = """
S2R R0, SR_TID.X
.L_x_0:
MOV R1, R0
.L_x_1:
HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24
@P0 BRA `(.L_x_2)
F2F.BF16.F32 R1, R24
STG.E [R2.64], R1
.L_x_2:
@P1 BRA `(.L_x_1)
@P2 CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64)
@P3 BRA `(.L_x_0)
EXIT
"""
    found = parts(code)
    assert {name: p["instructions"] for name, p in found.items()} == {
        "a loop": 3,  # MOV, CALL, BRA
        "a loop, 2": 3,  # HGMMA and both branches
        "a loop, 2: in some passes": 2,
        "outside the loops": 2,
    }
    assert found["a loop"]["divisions"] == 1
    assert found["a loop, 2: in some passes"]["converts"] == 1


@pytest.mark.parametrize(
    ("body", "copies", "exposed"),
    [
        (["LDG.E R4, [R2.64]", "FADD R5, R4, R5", *["NOP"] * 8], None, 1),
        (["FADD R5, R4, R5", "LDG.E R4, [R2.64]", *["NOP"] * 8], None, 0),  # for the next pass
        (["LDG.E R4, [R2.64]", "LDG.E.64 R6, [R2.64]", "FADD R5, R4, R7", *["NOP"] * 8], None, 1),  # together
        (["LDG.E R4, [R2.64]", "FADD R5, R4, R5", "LDG.E.64 R6, [R2.64]", "FADD R5, R7, R5", *["NOP"] * 8], None, 2),
        (["DEPBAR.LE SB0, 0x0", *["NOP"] * 8, "LDGSTS.E.128 [R0], [R2.64]", "LDGDEPBAR"], 0, 1),
        (["DEPBAR.LE SB0, 0x0", "LDGSTS.E.128 [R0], [R2.64]", "LDGDEPBAR", *["NOP"] * 8], 0, 0),
        (["DEPBAR.LE SB0, 0x1", *["NOP"] * 8, "LDGSTS.E.128 [R0], [R2.64]", "LDGDEPBAR"], 1, 0),
    ],
)
def test_a_wait_is_exposed_where_its_load_was_issued_just_before(body, copies, exposed):
    loop = "\n".join([".L_x_0:", *body, "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24", "@P0 BRA `(.L_x_0)", "EXIT"])
    found = parts(loop)["a loop"]
    assert (found["copies"], found["exposed"]) == (copies, exposed)


@pytest.mark.parametrize(("stages", "copies", "exposed"), [(1, 0, 1), (2, 1, 0), (3, 2, 0)])
def test_tma_loads_in_flight_are_those_that_lead_to_the_loop(stages, copies, exposed):
    code = "\n".join(
        [
            *["UTMALDG.2D [UR4], [UR6]"] * stages,
            ".L_x_0:",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R4+URZ+0x20000], R5",
            "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
            "WARPGROUP.DEPBAR.LE gsb0, 0x1",
            "SYNCS.ARRIVE.TRANS64 RZ, [UR5+0x20000], R6",
            "UTMALDG.2D [UR4], [UR6]",
            "@P1 BRA `(.L_x_0)",
            "EXIT",
        ]
    )
    found = parts(code)["a loop"]
    assert (found["copies"], found["exposed"], found["products"]) == (stages - 1, exposed, 1)


def cubin(*attributes):
    """An ELF file: a header, the attributes of a section .nv.info, and the table of sections, another one first."""
    info = b"".join(attributes)
    header = struct.pack("<4s36xQ10xHH2x", b"\x7fELF", 64 + len(info), 64, 2)
    sections = [struct.pack("<4xI16xQQ24x", kind, 64, len(info)) for kind in (1, sass.NV_INFO)]
    return header + info + b"".join(sections)


VALUE, LONG = struct.pack("<BBH", 3, 0x2F, 99), struct.pack("<BBHQ", 4, 0x30, 8, 7)  # other forms and attributes
STACK, REGISTERS = struct.pack("<BBHII", 4, 0x12, 8, 5, 16), struct.pack("<BBHII", 4, 0x2F, 8, 5, 40)


def test_registers_and_stack_are_read_in_the_elf_file():
    assert sass.resources(cubin(VALUE, LONG, STACK, REGISTERS)) == (40, 16)


@pytest.mark.parametrize(
    ("data", "says"), [(b"", "no cubin: 0 bytes"), (cubin(VALUE, STACK), "does not say")], ids=["empty", "no registers"]
)
def test_a_file_without_them_is_an_error(data, says):
    with pytest.raises(ValueError, match=says):
        sass.resources(data)


def test_a_tools_own_words_are_in_its_error():
    with pytest.raises(RuntimeError, match=r"nvdisasm: exit status \d+: .*\w"):
        sass.disassembled(b"no cubin")


def test_an_unknown_opcode_is_named():
    with pytest.raises(LookupError, match=r"QFMA9\.F32"):
        parts("QFMA9.F32 R0, R1, R2\nEXIT")
    with pytest.raises(LookupError, match=r"HMMA\.1688\.F32\.TF32"):
        parts("HMMA.1688.F32.TF32 R0, R1, R2, R3\nEXIT")


@pytest.mark.parametrize(
    ("figure", "then", "now", "is_worse"),
    [
        *((name, 3, 4, True) for name in sass.AT_MOST),
        *((name, 3, 2, False) for name in sass.AT_MOST),
        *((name, 2, 1, True) for name in sass.AT_LEAST),
        *((name, 0, None, True) for name in sass.AT_LEAST),
        *((name, None, 0, False) for name in sass.AT_LEAST),
        *((name, 1, 2, False) for name in sass.AT_LEAST),
    ],
)
def test_worse_names_the_figure(figure, then, now, is_worse):
    same = dict.fromkeys(sass.AT_MOST + sass.AT_LEAST, 3)
    found = sass.worse({"which": {**same, figure: then}}, {"which": {**same, figure: now}})
    assert found == [f"which: {figure} {then} -> {now}"] * is_worse


def test_a_part_that_comes_or_goes_is_named():
    assert sass.worse({"old": {}, "kept": {}}, {"new": {}, "kept": {}}) == ["new is not recorded", "old is gone"]
