"""The text of a PTX kernel as instructions.

What is read is what LLVM's NVPTX backend writes for Triton: one entry, parameters, registers, labels, guarded instructions, and
inline assembly, whose braces are scopes of labels and registers. Anything else is an error that names the line.
"""

import functools
import re
from dataclasses import dataclass, field

VERSIONS = (7.0, 9.9)  # of PTX, from and to
TARGETS = {80, 86, 89, 90, 100, 103, 120}


class UnknownPTX(Exception):
    """The text is no PTX that this emulator reads, or has an instruction that it does not know."""


@dataclass(frozen=True)
class Bits:
    """A literal as it is in the text: an integer, or a float by its bits (0f..., 0d...)."""

    value: int
    floating: bool = False


@dataclass(frozen=True)
class Address:
    """[base + offset], or of a TMA copy [map, {coordinates}]; base is a register, a symbol or a literal."""

    base: object
    offset: int = 0
    coordinates: tuple = ()


@dataclass
class Instruction:
    """name is the whole opcode; operands are registers and symbols (str), Bits, Address, lists of those (in braces), or pairs (a|b)."""

    name: str
    operands: list
    guard: tuple | None  # (predicate register, whether it is negated)
    line: int  # of the PTX
    source: str  # the line of Triton source, "file.py:12", inlined calls from the inside out
    text: str
    parts: tuple = field(init=False)
    results: list = field(init=False)  # the registers that it writes
    registers: set = field(init=False)  # all registers and symbols in its operands and its guard

    def __post_init__(self):
        self.parts = tuple(self.name.split("."))
        outer = self.operands[:1]
        if self.parts[0] in NO_RESULT and not self.name.startswith(RESULT):
            outer = []
        elif outer and isinstance(outer[0], (list, tuple)):
            outer = outer[0]
        self.results = [o for o in outer if o != "_"]
        self.registers = set(registers_of([*self.operands, *(self.guard or ())[:1]]))


# Opcodes that write no register, and those of them that do.
NO_RESULT = {"st", "bra", "ret", "bar", "cp", "fence", "mbarrier", "stmatrix", "wgmma", "griddepcontrol", "tcgen05", "red"}  # fmt: skip
RESULT = ("mbarrier.try_wait", "tcgen05.ld", "wgmma.mma_async")


def registers_of(operands):
    """All registers and symbols in operands."""
    for o in operands:
        if isinstance(o, str):
            yield o
        elif isinstance(o, (list, tuple)):
            yield from registers_of(o)
        elif isinstance(o, Address):
            yield from registers_of([o.base, *o.coordinates])


@dataclass
class Kernel:
    """params: (name, type, bytes) in order; widths: bits of a register by its name's prefix, or by its whole name (inline assembly);
    labels: the index of the instruction that follows each."""

    name: str
    target: int
    params: list
    threads: int
    widths: dict
    instructions: list
    labels: dict

    def __post_init__(self):
        self.width = functools.cache(self.width)

    def is_register(self, name):
        return self.width(name) is not None

    def width(self, register):
        """Bits of a register, 1 of a predicate; None of what is no register."""
        return self.widths.get(register) or self.widths.get(register.rstrip("0123456789"))


TYPE_BITS = {
    "pred": 1,
    "b8": 8,
    "b16": 16,
    "b32": 32,
    "b64": 64,
    "f32": 32,
    "f64": 64,
    "u16": 16,
    "u32": 32,
    "u64": 64,
    "s32": 32,
}
LABEL = re.compile(r"([$\w]+):(?!:)")
OPCODE = re.compile(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
LITERAL = re.compile(r"(-?)(0[fd])?(0x[0-9a-fA-F]+|[0-9a-fA-F]+)U?$")


@functools.lru_cache(64)
def parse(text):
    """The Kernel of a PTX text with one entry. Raises UnknownPTX."""
    version = re.search(r"^\.version (\d+\.\d+)", text, re.M)
    target = re.search(r"^\.target sm_(\d+)", text, re.M)
    if not version or not VERSIONS[0] <= float(version[1]) <= VERSIONS[1]:
        raise UnknownPTX(
            f"PTX version {version[1] if version else 'missing'}: this emulator reads {VERSIONS[0]} to {VERSIONS[1]}"
        )
    if not target or int(target[1]) not in TARGETS:
        raise UnknownPTX(
            f"PTX for {'sm_' + target[1] if target else 'no target'}: this emulator runs {sorted(TARGETS)}"
        )
    entry = re.search(r"\.entry (\w+)\((.*?)\)\s*(.*?)\{", text, re.S)
    if not entry:
        raise UnknownPTX("PTX without an .entry: there is no kernel to run")
    threads = re.search(r"\.reqntid (\d+)", entry[3])
    if not threads:
        raise UnknownPTX(f"{entry[1]}: no .reqntid, so the number of threads is not known")
    params = []
    for p in filter(None, map(str.strip, entry[2].split(","))):
        found = re.match(r"\.param (?:\.align \d+ )?\.(\w+)(?: .*)? (\w+)(?:\[(\d+)\])?$", p)
        if not found:
            raise UnknownPTX(f"{entry[1]}: a parameter that is not understood: {p}")
        params.append((found[2], found[1], int(found[3] or TYPE_BITS[found[1]] // 8)))
    kernel = Kernel(entry[1], int(target[1]), params, int(threads[1]), {}, [], {})
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:.*/)?([^"/]+)"', text, re.M))
    Body(kernel, files).read(text[entry.end() :], text.count("\n", 0, entry.end()) + 1)
    return kernel


class Body:
    """Reads a kernel's body, statement by statement."""

    def __init__(self, kernel, files):
        self.kernel, self.files = kernel, files
        self.scopes, self.starts, self.opened, self.source = [{}], [0], 0, ""

    def read(self, text, line):
        rest = ""
        for number, whole in enumerate(text.split("\n"), line):
            code, _, comment = whole.partition("//")
            if not rest.strip() and (found := re.match(r"\s*\.loc\s+(\d+) (\d+)", code)):
                self.locate(*found.groups(), comment)
                continue
            rest += " " + code.strip()
            while rest := rest.strip():
                if rest[0] == "}":
                    rest = rest[1:]
                    self.close()
                    if not self.scopes:
                        return
                elif rest[0] == "{":
                    rest = rest[1:]
                    self.opened += 1
                    self.scopes.append({})
                    self.starts.append(len(self.kernel.instructions))
                elif found := LABEL.match(rest):
                    rest = rest[found.end() :]
                    self.kernel.labels[self.scoped(found[1], True)] = len(self.kernel.instructions)
                elif ";" in rest:
                    statement, _, rest = rest.partition(";")
                    self.statement(statement.strip(), number)
                else:
                    break  # it goes on in the next line
        raise UnknownPTX(f"{self.kernel.name}: the body does not end")

    def close(self):
        """End a scope: branches in it may have named a label of it before it came."""
        scope = self.scopes.pop()
        for inst in self.kernel.instructions[self.starts.pop() :]:
            if inst.parts[0] == "bra":
                inst.operands = [scope.get(o, o) for o in inst.operands]

    def locate(self, file, line, comment):
        """From a comment such as "standard.py:43:17 @[ gelu_mlp.py:115:34 ]" all lines; without one, the .loc's own."""
        places = re.findall(r"([\w.<>-]+):(\d+):\d+", comment)
        self.source = " @ ".join(f"{f}:{n}" for f, n in places) or f"{self.files.get(file, file)}:{line}"

    def scoped(self, name, declare=False):
        """The name of a label or register, which braces may have made another one of."""
        if declare and len(self.scopes) > 1:
            self.scopes[-1][name] = f"{name}@{self.opened}"
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def statement(self, text, line):
        if text.startswith(".reg"):
            kind, names = re.match(r"\.reg \.(\w+)\s+(.*)", text, re.S).groups()
            for name in names.split(","):
                plain, _, many = name.strip().partition("<")
                self.kernel.widths[plain if many else self.scoped(plain, True)] = TYPE_BITS[kind]
            return
        if text.startswith("."):
            if not text.startswith((".pragma", ".loc")):
                raise UnknownPTX(f"{self.kernel.name}: line {line}: a directive that is not known: {text}")
            return
        negated, guard, name, operands = OPCODE.match(text).groups()
        self.kernel.instructions.append(
            Instruction(
                name,
                [self.operand(o) for o in split(operands)],
                (self.scoped(guard), bool(negated)) if guard else None,
                line,
                self.source,
                text,
            )
        )

    def operand(self, text):
        text = text.strip()
        if text[0] == "{":
            return [self.operand(o) for o in split(text[1:-1])]
        if text[0] == "[":
            base, *coordinates = split(text[1:-1])
            if coordinates:
                return Address(self.operand(base), 0, tuple(self.operand(coordinates[0])))
            base, plus, offset = base.partition("+")
            return Address(self.operand(base), int(offset, 0) if plus else 0)
        if "|" in text:
            return tuple(self.operand(o) for o in text.split("|"))
        if text[0] in "-0123456789":
            if text == "1.0":  # the fraction of a cache policy
                return Bits(0x3F800000, True)
            found = LITERAL.match(text)
            if not found:
                raise UnknownPTX(f"{self.kernel.name}: a literal that is not understood: {text}")
            minus, floating, digits = found.groups()
            value = int(digits, 16) if floating else int(digits, 0)
            return Bits(-value if minus else value, bool(floating))
        return self.scoped(text)


def split(text):
    """The parts between commas that stand in no bracket."""
    if "{" not in text and "[" not in text:
        return [p for p in text.split(",") if p.strip()]
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "[{") - (c in "]}")
        if c == "," and not depth:
            parts.append(text[start:i])
            start = i + 1
    return [p for p in [*parts, text[start:]] if p.strip()]
