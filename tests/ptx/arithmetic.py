"""Instructions on registers, as numpy expressions over the threads that run them.

`translate` gives for an instruction [(destination, type, expression)]; the expressions' names are the functions below. A register is
kept as unsigned bits; a value is read and written as the type that the instruction names. Rounding is to nearest even; what a GPU
approximates (ex2.approx, div.full) is computed to fp32's last digit.
"""

import functools
import re

import numpy as np

from ptx.parse import Bits, UnknownPTX

NUMPY = {"u16": np.uint16, "s16": np.int16, "f16": np.float16, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "u64": np.uint64,
         "s64": np.int64, "f64": np.float64, "pred": np.bool_, "u8": np.uint8, "s8": np.int8}  # fmt: skip
PACKED = {"f32x2", "f16x2", "bf16x2"}
BITS = {
    **{t: np.dtype(n).itemsize * 8 for t, n in NUMPY.items()},
    "bf16": 16,
    "f32x2": 64,
    "f16x2": 32,
    "bf16x2": 32,
    "pred": 1,
}
TINY = np.finfo(np.float32).tiny


def bits_of(kind):
    """The type of a bare width: b32 is u32."""
    return "u" + kind[1:] if kind[0] == "b" and kind[1:].isdigit() else kind


# ---- what expressions call ----


def widen(x):
    """fp32 of bf16's bits."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def narrow(x):
    """bf16's bits of fp32, rounded to nearest even; nan stays nan."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (u + (0x7FFF + (u >> 16 & 1))) >> 16
    return np.where(x != x, 0x7FFF, rounded).astype(np.uint16)


def fma(a, b, c):
    """a b + c, rounded once: the product of two fp32 is exact in fp64."""
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)


def fma16(a, b, c):
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float16)


def ftz(x):
    """Subnormal numbers are zero."""
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def pack(low, high):
    """A register of 32 bits of two of 16, of whatever type."""
    low, high = (np.asarray(x).view(np.uint16).astype(np.uint32) for x in (low, high))
    return low | high << 16


def pairs(x):
    """bf16x2 as fp32 [..., 2]: the low half, then the high one."""
    return np.stack((x << 16, x & np.uint32(0xFFFF0000)), -1).view(np.float32)


def pair_up(x):
    """The inverse of `pairs`."""
    h = narrow(x)
    return pack(np.ascontiguousarray(h[..., 0]), np.ascontiguousarray(h[..., 1]))


def quotient(a, b):
    """Integer division that truncates; of nothing, by zero, all ones, as GPUs have it."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b) if np.ndim(b) else b
    if np.issubdtype(a.dtype, np.unsignedinteger):
        q = a // safe
    else:
        q = a // safe
        q = q + ((q < 0) & (q * safe != a)).astype(a.dtype)
    return np.where(zero, ~np.zeros_like(a), q)


def remainder(a, b):
    return a - quotient(a, b) * b


def high(a, b):
    """The upper half of a product of 32-bit integers."""
    wide = np.int64 if np.issubdtype(a.dtype, np.signedinteger) else np.uint64
    return (a.astype(wide) * b.astype(wide) >> 32).astype(a.dtype)


def shift_left(a, n):
    bits = a.dtype.itemsize * 8
    return np.where(n < bits, a << np.minimum(n, bits - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a, n):
    """Beyond the width what is left are zeros, or copies of the sign."""
    bits = a.dtype.itemsize * 8
    shifted = a >> np.minimum(n, bits - 1).astype(a.dtype)
    return shifted if np.issubdtype(a.dtype, np.signedinteger) else np.where(n < bits, shifted, a.dtype.type(0))


def field(a, position, length):
    """Bits of a from a position on, the sign extended where a is signed; none beyond its highest. Both numbers are Python's."""
    bits = a.dtype.itemsize * 8
    length = min(length, bits - position)
    return (a << a.dtype.type(bits - position - length)) >> a.dtype.type(bits - length)


def permute(a, b, selector):
    """prmt: four bytes chosen of eight, by a nibble each; its high bit copies the byte's sign."""
    of = np.stack(
        [np.asarray(x, np.uint32) >> np.uint32(8 * i) & np.uint32(0xFF) for x in (a, b) for i in range(4)], -1
    )
    result = np.uint32(0)
    for i in range(4):
        nibble = np.broadcast_to(np.asarray(selector, np.uint32) >> np.uint32(4 * i) & np.uint32(0xF), of.shape[:-1])
        byte = np.take_along_axis(of, (nibble & 7)[..., None].astype(np.int64), -1)[..., 0]
        byte = np.where(nibble & 8, np.where(byte & 0x80, np.uint32(0xFF), np.uint32(0)), byte)
        result = result | byte << np.uint32(8 * i)
    return result


def saturated(x, kind):
    """An integer of a float, cut to its range; nan is 0."""
    info = np.iinfo(kind)
    x = np.nan_to_num(np.asarray(x, np.float64), nan=0.0)
    return np.clip(x, info.min, info.max).astype(kind)


FUNCTIONS = dict(
    widen=widen, narrow=narrow, fma=fma, fma16=fma16, ftz=ftz, pack=pack, pairs=pairs, pair_up=pair_up, quotient=quotient,
    remainder=remainder, high=high, shift_left=shift_left, shift_right=shift_right, field=field, permute=permute,
    saturated=saturated, where=np.where, exp2=np.exp2, log2=np.log2, sqrt=np.sqrt, tanh=np.tanh, fmax=np.fmax, fmin=np.fmin,
    maximum=np.maximum, minimum=np.minimum, isnan=np.isnan, trunc=np.trunc, rint=np.rint, floor=np.floor, ceil=np.ceil,
    bitwise_count=np.bitwise_count, **{f"as_{t}": n for t, n in NUMPY.items()},
)  # fmt: skip

# ---- instructions ----

ROUNDING = {"rn", "approx", "full", "sat"}
SIMPLE = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
APPROXIMATE = {
    "ex2": "exp2({0})", "lg2": "log2({0})", "sqrt": "sqrt({0})", "tanh": "tanh({0})", "rcp": "as_f32(1) / {0}",
    "rsqrt": "as_f32(1) / sqrt({0})",
}  # fmt: skip
OPCODES = {*SIMPLE, *APPROXIMATE, "fma", "mad", "div", "rem", "min", "max", "abs", "neg", "not", "shl", "shr", "bfe", "selp",
           "setp", "mov", "cvt", "cvta", "prmt", "popc"}  # fmt: skip
INTEGER = {"u16", "s16", "u32", "s32", "u64", "s64"}
ROUND = {"rzi": "trunc", "rni": "rint", "rmi": "floor", "rpi": "ceil"}


@functools.cache
def places(expression):
    """How many operands an expression has; None where their numbers have a gap."""
    found = {int(n) for n in re.findall(r"{(\d)}", expression)}
    return len(found) if found == {*range(len(found))} else None


def fill(expression, args, inst):
    """An expression with its operands in their places; an operand that has none is an error."""
    if expression is None or places(expression) != len(args):
        raise UnknownPTX(inst.name)
    return expression.format(*args)


def extreme(op, mods, floating, count, inst):
    """min and max of two or three: without NaN a number is taken before nan."""
    if not set(mods) <= {"NaN"} or not 2 <= count <= 3:
        raise UnknownPTX(inst.name)
    name = f"{op}imum" if mods or not floating else f"f{op}"
    return f"{name}({{0}}, {{1}})" if count == 2 else f"{name}({name}({{0}}, {{1}}), {{2}})"


def translate(inst, read):
    """[(destination, type, expression)] of an instruction on registers; read(operand, type) is an operand's expression.

    None for one that is not of this kind. Raises UnknownPTX.
    """
    op, *mods = inst.parts
    if op not in OPCODES:
        return None
    if op == "mov":
        return move(inst, mods, read)
    if op == "cvt":
        return convert(inst, mods, read)
    if op == "cvta":
        return [(inst.operands[0], "u64", read(inst.operands[1], "u64"))]
    kind = bits_of(mods[-1])
    flush, mods = "ftz" in mods[:-1], [m for m in mods[:-1] if m != "ftz"]
    dest, *sources = inst.operands
    if op in ("shl", "shr"):
        a, n = sources
        function = "shift_left" if op == "shl" else "shift_right"
        return [(dest, kind, f"{function}({read(a, kind)}, {read(n, 'u32')})")]
    if op == "selp":
        a, b, p = sources
        return [(dest, kind, f"where({read(p, 'pred')}, {read(a, kind)}, {read(b, kind)})")]
    if op == "bfe":
        a, position, length = sources
        if length.value < 1 or position.value >= BITS[kind]:
            raise UnknownPTX(inst.name)
        return [(dest, kind, f"field({read(a, kind)}, {position.value}, {length.value})")]
    if op == "popc":
        return [(dest, "u32", f"as_u32(bitwise_count({read(sources[0], kind)}))")]
    if op == "prmt":
        return [(dest, kind, "permute({}, {}, {})".format(*(read(s, "u32") for s in sources)))]
    if op in ("mul", "mad") and kind in INTEGER:
        return multiply(op, mods, kind, dest, sources, read, inst)
    if op in ("add", "sub") and mods == ["rn", "f32"] and kind in ("bf16", "f16"):  # the first operand alone is narrow
        wide = "widen({})" if kind == "bf16" else "as_f32({})"
        return [(dest, "f32", SIMPLE[op].format(wide.format(read(sources[0], kind)), read(sources[1], "f32")))]
    args = [read(s, kind) for s in sources]
    if flush:
        args = [f"ftz({a})" for a in args]
    if op == "setp":
        return compare(dest, mods, kind, args, inst)
    if kind in ("bf16", "bf16x2", "f16x2"):
        return halves(op, mods, kind, dest, args, inst)
    floating = kind[0] == "f"
    if op in SIMPLE:
        expression = SIMPLE[op]
        if mods not in ([], ["rn"]):
            expression = None
    elif op == "fma" and mods == ["rn"]:
        expression = "fma16({0}, {1}, {2})" if kind == "f16" else "fma({0}, {1}, {2})" if "32" in kind else None
    elif op == "div":
        expression = "{0} / {1}" if floating else "quotient({0}, {1})"
    elif op == "rem":
        expression = "remainder({0}, {1})"
    elif op in ("min", "max"):
        expression = extreme(op, mods, floating, len(args), inst)
    elif op in ("abs", "neg", "not") and not mods:
        expression = {"abs": "abs({0})", "neg": "-{0}", "not": "~{0}"}[op]
    elif op in APPROXIMATE and kind == "f32" and set(mods) <= ROUNDING:
        expression = APPROXIMATE[op]
    else:
        expression = None
    expression = fill(expression, args, inst)
    return [(dest, kind, f"ftz({expression})" if flush else expression)]


def multiply(op, mods, kind, dest, sources, read, inst):
    """mul and mad of integers: the lower half, the upper one, or a product twice as wide."""
    wide = kind[0] + str(2 * BITS[kind])
    a, b = (read(s, kind) for s in sources[:2])
    if mods == ["lo"]:
        result, product = kind, f"{a} * {b}"
    elif mods == ["hi"] and BITS[kind] == 32:
        result, product = kind, f"high({a}, {b})"
    elif mods == ["wide"] and wide in NUMPY:
        result, product = wide, f"as_{wide}({a}) * as_{wide}({b})"
    else:
        raise UnknownPTX(inst.name)
    return [(dest, result, f"{product} + {read(sources[2], result)}" if op == "mad" else product)]


def compare(dest, mods, kind, args, inst):
    """setp; of a packed type it writes a pair of predicates, low half first."""
    if len(mods) != 1:
        raise UnknownPTX(inst.name)
    (relation,) = mods
    unordered = relation[-1] == "u" and relation[:-1] in COMPARE and kind[0] in "fb"
    relation = relation[:-1] if unordered else relation
    if relation not in COMPARE:
        raise UnknownPTX(inst.name)
    if kind in ("bf16", "bf16x2"):
        args = [f"{'widen' if kind == 'bf16' else 'pairs'}({a})" for a in args]
    a, b = args
    expression = f"({a} {COMPARE[relation]} {b})"
    if relation == "ne" and kind[0] in "fb" and not unordered:  # of nan no comparison holds
        expression = f"(({a} < {b}) | ({a} > {b}))"
    if unordered:
        expression = f"({expression} | isnan({a}) | isnan({b}))"
    if kind in PACKED:
        return [(d, "pred", f"{expression}[:, {i}]") for i, d in enumerate(dest)]
    if isinstance(dest, tuple):
        raise UnknownPTX(inst.name)
    return [(dest, "pred", expression)]


def halves(op, mods, kind, dest, args, inst):
    """bf16 and packed arithmetic, rounded once."""
    if kind == "f16x2":
        up, down, f = "{}", "{}", "fma16"
    else:
        up, down, f = ("widen({})", "narrow({})", "fma") if kind == "bf16" else ("pairs({})", "pair_up({})", "fma")
    args = [up.format(a) for a in args]
    if op in ("add", "sub", "mul") and set(mods) <= {"rn"}:
        expression = SIMPLE[op]
    elif op == "fma" and mods == ["rn"]:
        expression = f + "({0}, {1}, {2})"
    elif op in ("min", "max"):
        expression = extreme(op, mods, True, len(args), inst)
    elif op in ("abs", "neg") and not mods:
        expression = {"abs": "abs({0})", "neg": "-{0}"}[op]
    else:
        expression = None
    expression = fill(expression, args, inst)
    return [(dest, kind, down.format(expression))]


def move(inst, mods, read):
    """mov, which also splits a register into parts and joins them."""
    dest, source = inst.operands
    kind = bits_of(mods[-1])
    if len(mods) != 1:
        raise UnknownPTX(inst.name)
    if isinstance(dest, list):
        part = f"u{BITS[kind] // len(dest)}"
        whole = read(source, kind)
        return [(d, part, f"as_{part}({whole} >> as_{kind}({i * BITS[part]}))") for i, d in enumerate(dest) if d != "_"]
    if isinstance(source, list):
        part = BITS[kind] // len(source)
        terms = [f"as_{kind}({read(s, f'u{part}')}) << as_{kind}({i * part})" for i, s in enumerate(source)]
        return [(dest, kind, " | ".join(f"({t})" for t in terms))]
    return [(dest, kind, read(source, kind))]


def convert(inst, mods, read):
    """cvt from the last type to the one before it."""
    *mods, to, of = (bits_of(m) for m in mods)
    dest, *sources = inst.operands
    flush, mods = "ftz" in mods, [m for m in mods if m not in ("ftz", "sat")]
    if to in ("bf16x2", "f16x2") and of == "f32" and mods == ["rn"]:
        upper, lower = (read(s, "f32") for s in sources)
        half = "narrow({})" if to == "bf16x2" else "as_f16({})"
        return [(dest, "u32", f"pack({half.format(lower)}, {half.format(upper)})")]
    x = f"ftz({read(sources[0], of)})" if flush else read(sources[0], of)
    if len(sources) == 1 and to in INTEGER and of in INTEGER and not mods:
        expression = f"as_{to}({x})"
    elif to in INTEGER and of in ("f32", "f64") and len(mods) == 1 and mods[0] in ROUND:
        expression = f"saturated({ROUND[mods[0]]}({x}), as_{to})"
    elif mods in ([], ["rn"]) and of == "bf16" and to == "f32":
        expression = f"widen({x})"
    elif mods == ["rn"] and to == "bf16" and of == "f32":
        expression = f"narrow({x})"
    elif mods in ([], ["rn"]) and to in ("f16", "f32", "f64") and of in (*INTEGER, "f16", "f32", "f64"):
        expression = f"as_{to}({x})"
    else:
        raise UnknownPTX(inst.name)
    return [(dest, to, expression)]


def literal(value, kind):
    """A literal as a numpy scalar of a type."""
    kind = bits_of(kind)
    width = BITS[kind]
    if not isinstance(value, Bits):
        raise TypeError(value)
    unsigned = np.dtype(f"u{max(width, 8) // 8}").type(value.value & ((1 << width) - 1))
    if kind == "pred":
        return np.bool_(value.value != 0)
    return np.asarray(unsigned).view(NUMPY[kind])[()] if kind in NUMPY else unsigned
