"""What the machine code of a kernel says of its speed: counted, without a GPU and without a clock.

    parts(disassembled(cubin), warps, architecture, source) -> a dict for each part of a kernel that is executed as one

**Parts.** A main loop is one that multiplies matrices, or, in a kernel that multiplies none, one that loads from global memory; the
loops around it count too. Of a loop its pass is counted: what every pass executes, loops within it apart. What only some passes
execute is a part of its own where it writes results: the end of a tile, where the compiler has made the loops over tiles and over
K one. Last comes what lies outside all loops; a kernel without a main loop is one part. What else stands behind a branch (the slow
path of a division, the wait for a barrier that is not there yet) is not counted; what a predicate may switch off is.

**Bound.** What a pass of one block takes of each pipe of an SM, in clocks, by `RATES`; the largest is the bound. However many blocks
an SM runs, it finishes no more than one pass in so many clocks. It is a floor and no prediction: latencies, barriers, bank
conflicts, what matrix instructions read of shared memory, tensor memory, L2 and DRAM are not in it.

**Waits.** `copies`: groups of cp.async, or TMA loads, that may still be under way when a pass has waited for its own; the least of its
waits. `products`: groups of wgmma that may still be under way after a wait for one; the most of its waits. `exposed`: the waits of
a pass for a load, to shared memory or to registers, that was issued less than half a pass of instructions before: the warp itself
has too little to do meanwhile. A wait ends all loads that are then under way. A loop is pipelined where `exposed` is 0.

**Converts** are scalar conversions between floating-point types (F2F), which share the XU with exponentials; packed ones (F2FP) do not.
**Divisions** are calls of the routine that divides 64-bit integers, behind a branch or not.
"""

import ast
import functools
import json
import math
import re
import struct
import subprocess
import tempfile
from collections import Counter, namedtuple
from pathlib import Path

import triton

NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
# In a cubin: the type of the sections .nv.info, and two of their attributes, by cuobjdump's names EIATTR_REGCOUNT and so on.
NV_INFO, REGCOUNT, MIN_STACK_SIZE = 0x70000000, 0x2F, 0x12

# Of an SM in a clock: results of threads; bytes of shared and global; FLOP of tensor. The sources, NVIDIA's:
# - results: CUDA C++ Best Practices Guide, "Throughput of Native Arithmetic Instructions" (for a type conversion and for a special function
#   it has 16 each; the XU does both; sm_100's alu is the most that it has for any of them); issue: four schedulers, an instruction each;
# - which pipe executes what, and that of FMA's two halves one alone takes IMAD: Nsight Compute, Profiling Guide, "Pipelines";
# - shared: 32 banks of 4 bytes, CUDA C++ Programming Guide; global: a cache line of 128 bytes a wavefront, Profiling Guide, "Quantities";
# - tensor, dense bf16: white papers of A100 and H100; B200: its data sheet's FLOP/s, twice H100's an SM and clock.
RATES = {
    80: {"issue": 128, "tensor": 2048, "fma": 64, "imad": 64, "alu": 64, "xu": 16, "shared": 128, "global": 128},
    90: {"issue": 128, "tensor": 4096, "fma": 128, "imad": 64, "alu": 64, "xu": 16, "shared": 128, "global": 128},
    100: {"issue": 128, "tensor": 8192, "fma": 128, "imad": 64, "alu": 128, "xu": 16, "shared": 128, "global": 128},
}
OPCODES = {
    "tensor": "HMMA HGMMA UTCHMMA",
    "fma": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 FHADD",
    "imad": "IMAD",
    "alu": """F2FP FMNMX FMNMX3 FSEL FSET FSETP I2FP IABS IADD3 IMNMX ISETP LEA LOP3 MOV P2R PLOP3 PRMT R2P SEL SGXT SHF VIADD
        VIADDMNMX VIMNMX VIMNMX3""",
    "xu": "F2F F2I I2F FLO MUFU",
    "shared": "ATOMS LDS LDSM SHFL STS STSM",
    "global": "LDG LDGSTS LDL STG STL UTMALDG UTMASTG",
    # of no published rate; of 16-bit arithmetic the kernels have next to none
    "other": """BAR BPT BRA BREAK BSSY BSYNC CALL CCTL CREDUX CS2R DEPBAR ELECT ENDCOLLECTIVE EXIT FENCE HADD2 HFMA2 HSETP2 LDC LDCU
        LDGDEPBAR LDTM MEMBAR NANOSLEEP NOP R2UR REDUX RET S2R S2UR STTM SYNCS UFLO UIADD3 UIMAD UISETP ULDC ULEA ULOP3 UMOV
        UP2UR UPLOP3 USEL USGXT USHF UTCATOMSWS UTCBAR UTMACMDFLUSH UVIRTCOUNT VOTE VOTEU WARPGROUP WARPSYNC""",
}
PIPE = {opcode: pipe for pipe, opcodes in OPCODES.items() for opcode in opcodes.split()}
PASSES = 8  # after so many, what is in flight repeats from pass to pass

Instruction = namedtuple("Instruction", "where predicate opcode name operands")
Loop = namedtuple("Loop", "blocks latches")


@functools.cache  # of several cases a kernel is the same
def disassembled(cubin):
    """The instructions of a cubin, with the lines of the source that they come from."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        command = [NVDISASM, "--no-dataflow", "--print-code", "--print-line-info", f.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvdisasm: exit status {done.returncode}: {done.stderr}")
    return done.stdout


def resources(cubin):
    """(registers of a thread, bytes of its stack) of the kernel in a cubin, which is an ELF file. Raises ValueError where it does not say.

    They are in sections .nv.info, lists of attributes. An attribute is a byte for its form, a byte for its name, and 16 bits: of form 4
    these are the length of what follows, here a symbol and a number of 32 bits each.
    """
    if cubin[:4] != b"\x7fELF":
        raise ValueError(f"no cubin: {len(cubin)} bytes that begin with {cubin[:4]}")
    (sections,), (size, number) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HH", cubin, 58)
    found = {}
    for header in range(sections, sections + size * number, size):
        kind, at, length = struct.unpack_from("<4xI16xQQ", cubin, header)
        end = at + length if kind == NV_INFO else 0
        while at < end:
            form, attribute, value = struct.unpack_from("<BBH", cubin, at)
            if form == 4 and attribute in (REGCOUNT, MIN_STACK_SIZE):
                found[attribute] = struct.unpack_from("<8xI", cubin, at)[0]
            at += 4 + value * (form == 4)
    if found.keys() != {REGCOUNT, MIN_STACK_SIZE}:
        raise ValueError("a cubin that does not say how many registers and how much stack its kernel has")
    return found[REGCOUNT], found[MIN_STACK_SIZE]


def parsed(text):
    """(instructions in the order of their addresses, {label: the index at which it stands})."""
    code, labels, where = [], {}, None
    for line in text.splitlines():
        if found := re.match(r"\s+/\*\w+\*/\s+(?:@(!?\w+) )?\s*([A-Z]\w*)([\w.]*) *(.*?) *;", line):
            predicate, opcode, suffix, operands = found.groups()
            if opcode == "UTCHMMA":  # its shape is in a register, which a UMOV has filled
                shape = re.search(r"idesc\[(UR\d+)\]", operands)[1] + ", 0x"
                bits = next(int(i.operands.split()[1], 16) for i in reversed(code) if i.operands.startswith(shape))
                suffix += f".{(bits >> 24 & 31) * 16}x{(bits >> 17 & 63) * 8}x16"
            code.append(Instruction(where, predicate, opcode, opcode + suffix, operands))
        elif found := re.search(r'//## File ".*?([^/"]+)", line (\d+)', line):
            where = found[1], int(found[2])
        elif found := re.match(r"(\S+):$", line):
            labels[found[1]] = len(code)
    return code, labels


def control_flow(code, labels):
    """(basic blocks as ranges of indices, for each the blocks that may follow)."""

    def target(i):  # a CALL of a label within the kernel is a far branch
        found = re.search(r"`\((\.L\w+)\)", i.operands)
        return labels[found[1]] if found and i.opcode in ("BRA", "CALL", "WARPSYNC") else None

    def ends(i):
        return i.opcode in ("EXIT", "RET") or target(i) is not None

    starts = {0} | {target(i) for i in code} - {None} | {n + 1 for n, i in enumerate(code) if ends(i)}
    starts = sorted(n for n in starts if n < len(code))
    blocks = [range(*block) for block in zip(starts, [*starts[1:], len(code)], strict=True)]
    number, follow = {block.start: n for n, block in enumerate(blocks)}, []
    for block in blocks:
        last = code[block[-1]]
        always = ends(last) and last.predicate is None and not re.match(r"[!~]?U?[PR]\w*, `", last.operands)
        follow.append([number[n] for n in (target(last), None if always else block.stop) if n in number])
    return blocks, follow


def dominators(follow):
    """{a block that can be reached: the blocks that every way to it passes}."""
    found, changed = {0: {0}}, True
    while changed:
        changed = False
        for b in sorted(found):
            for f in follow[b]:
                passed = {f} | (found[b] & found.get(f, found[b]))
                changed |= found.get(f) != passed
                found[f] = passed
    return found


def loops(follow, dominate):
    """{first block: Loop}, by the edges that lead back to a block which dominates where they come from."""
    before = {b: [p for p in dominate if b in follow[p]] for b in dominate}
    found = {}
    for latch in dominate:
        for first in set(follow[latch]) & dominate[latch]:
            loop = found.setdefault(first, Loop({first}, []))
            loop.latches.append(latch)
            todo = [latch]
            while todo:
                if (b := todo.pop()) not in loop.blocks:
                    loop.blocks.add(b)
                    todo += before[b]
    return found


def work(i, warps):
    """(the pipe, what a block asks of it in the units of RATES) of an instruction. Raises LookupError for one that it does not know."""
    if i.opcode not in PIPE:
        raise LookupError(f"{i.name}: tests/sass.py has this opcode in no pipe")
    pipe, lanes, suffixes = PIPE[i.opcode], 32 * warps, i.name.split(".")
    if i.predicate == "!PT":  # never executed
        return "other", 0
    if pipe == "tensor":
        if not {"BF16", "UTCHMMA"} & {*suffixes}:
            raise LookupError(f"{i.name}: tests/sass.py has the rates of bf16 products alone")
        m, n, k = (16, 8, 16) if "16816" in suffixes else map(int, re.search(r"(\d+)x(\d+)x(\d+)", i.name).groups())
        return pipe, 2 * m * n * k * {"HMMA": warps, "HGMMA": warps / 4, "UTCHMMA": 1}[i.opcode]
    if pipe in ("shared", "global"):
        words = {"256": 8, "128": 4, "64": 2} | ({"4": 4, "2": 2} if i.opcode in ("LDSM", "STSM") else {})
        return pipe, 0 if i.opcode.startswith("UTMA") else max(words.get(s, 1) for s in suffixes) * 4 * lanes
    return pipe, lanes * (2 if i.opcode in ("FADD2", "FMUL2", "FFMA2") else 1)


def bound(steps, warps, architecture):
    """({pipe: instructions of a warp}, {pipe: clocks of a block}) of instructions that all warps execute."""
    count, clocks, rate = Counter(), Counter(), RATES[architecture]
    for i in steps:
        pipe, amount = work(i, warps)
        count[pipe] += 1
        clocks[pipe] += amount / rate.get(pipe, math.inf)
    imad = clocks.pop("imad", 0)
    clocks["fma"] = max(clocks["fma"] + imad * rate["imad"] / rate["fma"], imad)
    count["fma"] += count.pop("imad", 0)
    count["issue"], clocks["issue"] = len(steps), len(steps) * 32 * warps / rate["issue"]
    return count, clocks


def waits(steps, before=(), passes=1):
    """(copies, exposed, products) of the last of some passes; before: the instructions that lead to the first."""

    def offset(i):  # the constant part of its address
        return (re.findall(r"0x\w+(?=\])", i.operands) or [None])[0]

    def loads_of(instructions):
        return sum(i.opcode == "UTMALDG" for i in instructions)

    def waits_of(instructions):
        return sum(i.name.startswith("SYNCS.PHASECHK") and offset(i) in barriers for i in instructions)

    barriers = {offset(i) for i in steps if i.name.startswith("SYNCS.ARRIVE.TRANS64")}  # those that TMA loads report to
    a_wait = loads_of(steps) // max(waits_of(steps), 1)
    n = len(steps)
    tma = [-n] * (loads_of(before) - a_wait * waits_of(before))  # when each was issued, counted in instructions
    registers, filling, groups = {}, -n, []
    for start in range(0, passes * n, n):
        copies, exposed, products = [], 0, []
        for now, i in enumerate(steps, start):
            awaited = []
            if i.name == "DEPBAR.LE" and i.operands.startswith("SB0") and groups:
                done = len(groups) - int(i.operands.split()[1], 16)
                awaited, groups = groups[:done], groups[done:]
                copies.append(len(groups))
            elif a_wait and waits_of([i]):
                awaited, tma = tma[:a_wait], tma[a_wait:]
                copies.append(len(tma))
            elif i.name == "WARPGROUP.DEPBAR.LE":
                products.append(int(i.operands.split()[1], 16))
            elif used := registers.keys() & set(re.findall(r"\bR\d+", i.operands)):
                awaited, registers = [registers[r] for r in used], {}
            exposed += bool(awaited) and now - max(awaited) < n / 2
            if i.opcode == "LDG":
                first = int(re.search(r"\bR(\d+)", i.operands)[1])
                registers |= {f"R{first + word}": now for word in range(work(i, 1)[1] // 128)}
            elif i.opcode == "LDGSTS":
                filling = now
            elif i.opcode == "LDGDEPBAR":
                groups = [*groups, filling]
            elif i.opcode == "UTMALDG":
                tma = [*tma, now]
    if passes == 1:
        return None, exposed, None
    return min(copies, default=None), exposed, max(products, default=None)


@functools.cache
def loops_of(source):
    return [n for n in ast.walk(ast.parse(source.read_text())) if isinstance(n, ast.For | ast.While)]


def loop_name(instructions, source):
    """What the innermost `for` or `while` of the source says that the last of these instructions lies in."""
    for i in reversed(instructions):
        file, line = i.where or (None, 0)
        if around := [n for n in loops_of(source) if file == source.name and n.lineno <= line <= n.end_lineno]:
            loop = max(around, key=lambda n: n.lineno)
            head = loop.test if isinstance(loop, ast.While) else ast.Compare(loop.target, [ast.In()], [loop.iter])
            name = ast.unparse(head)
            return name if len(name) <= 52 else name.split("(")[0] + "(...)"
    return "a loop"


def parts(text, warps, architecture, source):
    """The module's docstring says which and what; warps of a block; source: the file of the kernel, for the names of its loops."""
    code, labels = parsed(text)
    blocks, follow = control_flow(code, labels)
    dominate = dominators(follow)
    found = loops(follow, dominate)

    def of(some):
        return [code[n] for b in sorted(some) for n in blocks[b]]

    def has(some, *opcodes):
        return any(i.opcode in opcodes for i in of(some))

    def part(name, always, rarely=(), before=(), passes=1):
        """always: the blocks that every warp executes; rarely: those that one warp does for all, or none."""
        steps = of(always)
        count, clocks = bound(steps, warps, architecture)
        for i in of(rarely):
            if i.opcode == "UTCHMMA":
                count["tensor"] += 1
                clocks["tensor"] += work(i, warps)[1] / RATES[architecture]["tensor"]
        copies, exposed, products = waits(steps, of(before), passes)
        calls = [i.operands for i in of({*always, *rarely}) if i.opcode == "CALL"]
        by = max(clocks, key=clocks.get)
        return dict(
            part=name, instructions=len(steps), count=count, clocks={pipe: round(c) for pipe, c in clocks.items()},
            bound=round(clocks[by]), by=by, copies=copies, exposed=exposed, products=products,
            converts=sum(i.opcode == "F2F" for i in steps),
            divisions=sum(bool(re.search(r"_(div|rem)_[su]64", c)) for c in calls),
        )  # fmt: skip

    main = [first for first in sorted(found) if has(found[first].blocks, *OPCODES["tensor"].split())]
    main = main or [first for first in sorted(found) if has(found[first].blocks, "LDG", "LDGSTS", "UTMALDG")]
    results, names = [], Counter()
    for first in main:
        loop = found[first]
        own = loop.blocks.difference(*(o.blocks for o in found.values() if o.blocks < loop.blocks))
        always = {b for b in own if all(b in dominate[latch] for latch in loop.latches)}
        at_times = own - always if has(own - always, "STG", "UTMASTG") else set()
        name = loop_name(of(always), source)
        names[name] += 1
        name += f", {names[name]}" * (names[name] > 1)
        # What leads to it: from where the loop around it begins, or the one before it has ended.
        around = [f for f, o in found.items() if o.blocks > loop.blocks]
        ended = [max(o.latches) + 1 for f, o in found.items() if f not in around and max(o.latches) < first]
        before = {*range(max(around + ended, default=0), first)} & dominate.keys()
        results.append(part(name, always, own - always - at_times, before, PASSES))
        if at_times:
            results.append(part(f"{name}: in some passes", at_times))
    reached, todo = set(), main or [0]
    while todo:
        if (b := todo.pop()) not in reached:
            reached.add(b)
            todo += follow[b]
    lasts = {b: code[blocks[b][-1]] for b in reached}
    ends = [b for b, last in lasts.items() if last.opcode == "EXIT" and last.predicate is None]
    outside = dominate.keys() - set().union(*(loop.blocks for loop in found.values()))
    always = {b for b in outside if all(b in dominate[end] for end in ends)}
    return [*results, part("outside the loops" if results else "the whole kernel", always, outside - always)]


# ---- the record of what stands ----

RECORD = Path(__file__).with_name("sass_figures.json")  # {version of Triton: {which part: its figures}}
AT_MOST = ("bound", "instructions", "exposed", "converts", "divisions")
AT_LEAST = ("copies", "products")  # None: it has no such waits


def figures(rows):
    """{which part of which kernel: its figures}, of the rows that tests/codegen.py prints."""
    return {
        f"{r['op']} | {r['kernel']} | sm_{r['architecture']} | {p['part']}": {n: p[n] for n in AT_MOST + AT_LEAST}
        for r in rows
        for p in r["parts"]
    }


def record(rows):
    """Write the figures of these rows as those of the installed version of Triton; those of others stay."""
    versions = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    versions[triton.__version__] = figures(rows)
    lines = (
        f"{json.dumps(version)}: {{\n"
        + ",\n".join(f"{json.dumps(k)}: {json.dumps(f)}" for k, f in found.items())
        + "\n}"
        for version, found in versions.items()
    )
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def worse(then, now):
    """A line for each figure of `now` that is worse than `then`'s, and for each part that one of them has not."""
    found = [f"{which} is gone" for which in then.keys() - now.keys()]
    found += [f"{which} is not recorded" for which in now.keys() - then.keys()]
    for which in then.keys() & now.keys():
        for name, was in then[which].items():
            value = now[which][name]
            if value > was if name in AT_MOST else was is not None and (value is None or value < was):
                found.append(f"{which}: {name} {was} -> {value}")
    return sorted(found)
