"""The instructions that the emulator knows, whole: a name with all of its modifiers, and its operands.

What is not here is an error before anything runs, so that no other file can skip a modifier or an operand that it does not read.
"""

import functools
import re

from ptx.parse import Address, Bits

# An operand as text: r a register or a symbol, p a predicate, _ a sink, f a float's literal, an integer's is its digits; [] an address,
# [2] one of a tensor map with so many coordinates, {4} a list of so many registers, p|p a pair.
V = r"(?:r|f|-?\d+)"
P = r"(?:p|-?\d+)"
ALL = r"(?:-1|4294967295)"  # lanes of a warp
SHARED = r"shared(?:::cta)?"
FORMS = {
    # integers and bits
    r"(?:add|sub|div|rem|min|max)\.[su](?:16|32|64)|mul\.(?:lo\.[su](?:16|32|64)|wide\.[su](?:16|32)|hi\.[su]32)": f"r {V} {V}",
    r"mad\.(?:lo\.[su](?:16|32|64)|wide\.[su](?:16|32)|hi\.[su]32)": f"r {V} {V} {V}",
    r"(?:and|or|xor)\.b(?:16|32|64)|shl\.b(?:16|32|64)|shr\.[sub](?:16|32|64)": f"r {V} {V}",
    r"(?:and|or|xor)\.pred": f"p {P} {P}",
    r"not\.pred": "p p",
    r"not\.b(?:16|32|64)|(?:neg|abs)\.s(?:16|32|64)|popc\.b(?:32|64)": f"r {V}",
    r"bfe\.[su](?:32|64)": rf"r {V} \d+ \d+",
    r"prmt\.b32": rf"r {V} {V} {V}",
    # floats
    r"(?:add|sub|mul)(?:\.rn)?(?:\.ftz)?\.f32(?:x2)?|(?:add|sub|mul)(?:\.rn)?\.(?:f64|b?f16(?:x2)?)": f"r {V} {V}",
    r"(?:add|sub)\.rn\.f32\.b?f16|div\.(?:full|rn|approx)(?:\.ftz)?\.f32|div\.rn\.f64": f"r {V} {V}",
    r"fma\.rn(?:\.ftz)?\.f32(?:x2)?|fma\.rn\.b?f16(?:x2)?": f"r {V} {V} {V}",
    r"(?:min|max)(?:\.ftz)?(?:\.NaN)?\.f32": f"r {V} {V}(?: {V})?",
    r"(?:min|max)(?:\.NaN)?\.b?f16(?:x2)?": f"r {V} {V}",
    r"(?:neg|abs)(?:(?:\.ftz)?\.f32|\.b?f16(?:x2)?)": f"r {V}",
    r"(?:(?:ex2|lg2|rsqrt)\.approx|(?:sqrt|rcp)\.(?:approx|rn))(?:\.ftz)?\.f32|tanh\.approx\.f32": f"r {V}",
    # choices, copies, conversions
    r"setp\.(?:eq|ne)\.b(?:16|32|64)|setp\.(?:eq|ne|lt|le|gt|ge)\.[su](?:16|32|64)": f"p {V} {V}",
    r"setp\.(?:eq|ne|lt|le|gt|ge)u?(?:(?:\.ftz)?\.f32|\.b?f16)": f"p {V} {V}",
    r"setp\.(?:eq|ne|lt|le|gt|ge)u?\.b?f16x2": rf"(?:p|_)\|(?:p|_) {V} {V}",
    r"selp\.(?:[bsu](?:16|32|64)|f32)": f"r {V} {V} p",
    r"mov\.(?:[bsu](?:16|32|64)|f32)": f"r {V}",
    r"mov\.b(?:32|64)": r"(?:r \{[24]\}|\{[24]\} r)",
    r"mov\.pred": f"p {P}",
    r"cvta\.param\.u64": "r r",
    r"cvt\.[su](?:8|16|32|64)\.[su](?:16|32|64)|cvt\.rn\.(?:f16|f32)\.[su](?:16|32|64)": f"r {V}",
    r"cvt\.(?:rzi|rni|rmi|rpi)(?:\.ftz)?\.[su]32\.f32": f"r {V}",
    r"cvt\.f32\.b?f16|cvt\.rn\.b?f16\.f32|cvt\.f64\.f32|cvt\.rn\.f32\.f64": f"r {V}",
    r"cvt\.rn\.b?f16x2\.f32": f"r {V} {V}",
    # control, warps
    r"bra(?:\.uni)?": "r",
    r"ret": "",
    r"bar\.sync": "0",
    r"bar\.warp\.sync": ALL,
    r"shfl\.sync\.(?:bfly|idx)\.b32": rf"r {V} {V} 31 {ALL}",
    r"redux\.sync\.(?:(?:add|min|max)\.[su]32|(?:and|or|xor)\.b32|(?:min|max)\.f32)": f"r {V} (?:r|{ALL})",
    r"vote\.sync\.ballot\.b32": f"r p {ALL}",
    r"elect\.sync": rf"(?:r|_)\|p {ALL}",
    r"griddepcontrol\.(?:wait|launch_dependents)": "",
    # memory
    r"ld\.param\.(?:[bsu](?:32|64)|f32)": r"r \[\]",
    rf"ld\.(?:global|{SHARED})(?:\.L1::evict_(?:last|first)|\.L1::no_allocate)?(?:\.v[248])?\.[bsu](?:8|16|32|64)": r"(?:r|\{\d\}) \[\]",
    r"createpolicy\.fractional\.L2::evict_(?:last|first)\.b64": "r f",
    r"ld\.global\.L1::evict_(?:last|first)\.L2::cache_hint(?:\.v[248])?\.b(?:8|16|32|64)": r"(?:r|\{\d\}) \[\] r",
    r"st\.global\.L1::evict_(?:last|first)\.L2::cache_hint(?:\.v[248])?\.b(?:8|16|32|64)": rf"\[\] (?:{V}|\{{\d\}}) r",
    rf"st\.(?:global|{SHARED})(?:\.v[248])?\.b(?:8|16|32|64)": rf"\[\] (?:{V}|\{{\d\}})",
    rf"cp\.async\.ca\.{SHARED}\.global": rf"\[\] \[\] (?:4|8|16)(?: {V})?",
    rf"cp\.async\.cg\.{SHARED}\.global": rf"\[\] \[\] 16(?: {V})?",
    r"cp\.async\.(?:commit_group|wait_all)|cp\.async\.bulk\.commit_group": "",
    r"cp\.async\.wait_group|cp\.async\.bulk\.wait_group(?:\.read)?": r"\d+",
    r"cp\.async\.bulk\.tensor\.2d\.shared::(?:cta|cluster)\.global\.mbarrier::complete_tx::bytes": r"\[\] \[2\] \[\]",
    r"cp\.async\.bulk\.tensor\.2d\.global\.shared::cta\.bulk_group": r"\[2\] \[\]",
    rf"mbarrier\.init\.{SHARED}\.b64": r"\[\] \d+",
    rf"mbarrier\.inval\.{SHARED}\.b64": r"\[\]",
    rf"mbarrier\.arrive\.{SHARED}\.b64": r"_ \[\](?: \d+)?",
    rf"mbarrier\.arrive\.expect_tx\.{SHARED}\.b64": rf"_ \[\] {V}",
    rf"mbarrier\.try_wait\.parity\.{SHARED}\.b64": rf"[pr] \[\] {V}",
    r"fence\.(?:proxy\.async(?:\.shared::cta)?|mbarrier_init\.release\.cluster|acq_rel\.(?:cta|gpu)|sc\.(?:cta|gpu))": "",
    # matrices
    r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(b?f16)\.\1\.f32": r"\{4\} \{4\} \{2\} \{4\}",
    r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32\.tf32\.f32": r"\{4\} \{4\} \{2\} \{4\}",
    **{
        rf"{op}matrix\.sync\.aligned\.m8n8\.x{n}(?:\.trans)?\.{SHARED}\.b16": " ".join(
            (rf"\{{{n}\}}", r"\[\]")[:: 1 if op == "ld" else -1]
        )
        for op in ("ld", "st")
        for n in (1, 2, 4)
    },
    r"wgmma\.(?:fence|commit_group)\.sync\.aligned": "",
    r"wgmma\.wait_group\.sync\.aligned": r"\d+",
    r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(b?f16)\.\1": rf"\{{\d+\}} (?:r {V} {P} 1 1 [01] [01]|\{{4\}} r {P} 1 1 [01])",
    r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k8\.f32\.tf32\.tf32": rf"\{{\d+\}} (?:r|\{{4\}}) r {P} 1 1",
    r"tcgen05\.alloc\.cta_group::1\.sync\.aligned\.shared::cta\.b32": r"\[\] \d+",
    r"tcgen05\.dealloc\.cta_group::1\.sync\.aligned\.b32": r"r \d+",
    r"tcgen05\.relinquish_alloc_permit\.cta_group::1\.sync\.aligned|tcgen05\.wait::(?:ld|st)\.sync\.aligned": "",
    r"tcgen05\.fence::(?:before|after)_thread_sync": "",
    r"tcgen05\.ld\.sync\.aligned\.(?:32x32b|16x32bx2)\.x\d+\.b32": r"\{\d+\} \[\](?: \d+)?",
    r"tcgen05\.st\.sync\.aligned\.(?:32x32b|16x32bx2)\.x\d+\.b32": r"\[\] (?:\d+ )?\{\d+\}",
    r"tcgen05\.mma\.cta_group::1\.kind::f16": rf"\[\] (?:\[\]|r) r r {P}",
    r"tcgen05\.commit\.cta_group::1\.mbarrier::arrive::one(?:\.shared::cluster)?\.b64": r"\[\]",
}  # fmt: skip


@functools.cache
def operands_of(name):
    """The regular expressions of the operands that an instruction of this name may have."""
    return [re.compile(operands) for form, operands in FORMS.items() if re.fullmatch(form, name)]


def known(inst, kernel):
    """Whether the emulator knows an instruction of a kernel, with its modifiers and operands."""

    def shape(o):
        if isinstance(o, str):
            if not o.startswith("%") and not re.fullmatch(r"[$\w@]+", o):
                return "?"  # a negated predicate
            return "_" if o == "_" else "p" if kernel.width(o) == 1 else "r"
        if isinstance(o, list):
            return f"{{{len(o)}}}" if all(isinstance(r, (str, Bits)) for r in o) else "?"
        if isinstance(o, tuple):
            return "|".join(map(shape, o))
        if isinstance(o, Address):
            return f"[{len(o.coordinates) or ''}]"
        return "f" if o.floating else str(o.value)

    if inst.guard and inst.name.startswith(("bar.sync", "mbarrier.try_wait")):
        return False
    text = " ".join(map(shape, inst.operands))
    return any(form.fullmatch(text) for form in operands_of(inst.name))
