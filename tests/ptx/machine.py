"""Threads of many blocks at once: registers, control flow, barriers, and what each piece of code may not do.

A register is an array over all threads of a wave of blocks. Instructions that run one after the other whatever happens are a piece, a
Python function made of their text; threads are groups at a piece, and the group at the least one runs first, together with all others
there: so threads that parted meet again. A barrier holds its block's threads until all that live are there.
"""

import functools

import numpy as np

from ptx import grammar, matrix, memory, tmem
from ptx.arithmetic import BITS, FUNCTIONS, NUMPY, PACKED, bits_of, literal, translate
from ptx.memory import EPOCH_BITS, SHARED_BASE, WARP_BITS, Fault, Global, Shared, granule
from ptx.parse import Bits, UnknownPTX, registers_of

WAVE = 8192  # threads that run at once: numpy's cost of a call is spread over them
PARAMETERS = 1 << 56  # addresses of parameters that are not read but pointed to: maps of tensors
SPECIAL = {"%tid": "thread", "%ctaid": "block_index", "%nctaid": "blocks", "%ntid": "threads"}
ENDS = (
    "bra",
    "ret",
    "bar.sync",
    "mbarrier.try_wait",
    "wgmma.commit_group",
    "wgmma.wait_group",
    "tcgen05.ld",
    "tcgen05.wait",
)  # of a piece


class Groups:
    """Asynchronous operations by the group in which a thread commits them: the last n may be left in flight by a wait."""

    def __init__(self, threads):
        self.committed, self.items = np.zeros(threads, np.int64), []

    def issue(self, lanes, done):
        """done(mask of lanes) is called for the threads that have waited."""
        self.items.append((lanes, self.committed[lanes], done))

    def commit(self, lanes):
        self.committed[lanes] += 1

    def wait(self, lanes, n):
        limit = np.full(len(self.committed), -1, np.int64)
        limit[lanes] = self.committed[lanes] - n
        left = []
        for of, group, done in self.items:
            ready = group < limit[of]
            if ready.any():
                done(ready)
            if not ready.all():
                left.append((of[~ready], group[~ready], lambda mask, done=done, r=ready: done(spread(mask, ~r))))
        self.items = left


def spread(mask, where):
    """A mask over all, of one over those that `where` names."""
    whole = np.zeros(len(where), bool)
    whole[np.flatnonzero(where)[mask]] = True
    return whole


class Piece:
    """Instructions start .. end - 1; `last` decides where threads go on, None: at the next piece.

    `reads`: registers whose value from before it needs; `writes`: those that it leaves written; `may_touch` and `may_write`: those that may
    not be in flight (see Machine.check_in_flight).
    """

    def __init__(self, start, end, instructions):
        self.start, self.end = start, end
        self.last = instructions[-1] if instructions[-1].name.startswith(ENDS) else None
        self.reads, self.writes = set(), set()
        self.may_touch, self.may_write = set(), set()
        for inst in instructions:
            operands = inst.operands
            if inst.name.startswith(("wgmma.mma_async", "tcgen05.ld")) or (
                inst.results and inst.parts[0] not in ("wgmma", "tcgen05")
            ):
                operands = operands[1:]
            if inst.parts[0] == "mov" and isinstance(inst.operands[1], list):
                operands = []  # a pair may have a half that nobody asks for
            self.reads.update(set(registers_of([*operands, *(inst.guard or ())[:1]])) - self.writes)
            if not inst.name.startswith("wgmma"):  # it may read what it writes: its handler asks, and notes it
                self.writes.update(inst.results)
            if not inst.name.startswith(("wgmma", "tcgen05.wait")):
                self.may_touch |= inst.registers
                self.may_write.update(inst.results)


@functools.lru_cache(64)
def code_of(text, name):
    """Python's code of the pieces of a kernel."""
    return compile(text, name, "exec")


class Machine:
    """A kernel, its memory, and a grid of blocks.

    arguments: a value for each parameter, an integer, a float or (of a TMA descriptor) a matrix.TensorMap. allocations: [(address, bytes,
    name)] of global memory. shared: bytes of dynamic shared memory.
    """

    def __init__(self, kernel, arguments, allocations, shared, grid):
        self.kernel, self.grid = kernel, (*grid, 1, 1)[:3]
        self.maps = {}
        self.parameters = self.bind(arguments)
        code = kernel.instructions
        self.place = {id(inst): i for i, inst in enumerate(code)}
        for inst in code:
            if not grammar.known(inst, kernel):
                self.unknown(inst)
        self.global_granule = granule(code, "global")
        self.shared_granule = granule(code, "shared")
        self.memory = Global(allocations, self.global_granule)
        self.shared_bytes = shared
        self.pieces, self.piece_at = [], {}
        # Of labels only those that a branch names: those of debuggers stand everywhere.
        self.targets = {kernel.labels[inst.operands[0]] for inst in code if inst.parts[0] == "bra"}
        starts = {0} | self.targets | {i + 1 for i, inst in enumerate(code) if inst.name.startswith(ENDS)}
        starts |= {i for i, inst in enumerate(code) if inst.name.startswith("mbarrier.try_wait")}
        starts = sorted(s for s in starts if s < len(code))
        for start, end in zip(starts, [*starts[1:], len(code)], strict=True):
            self.piece_at[start] = len(self.pieces)
            self.pieces.append(Piece(start, end, code[start:end]))
        self.names = sorted(filter(kernel.is_register, set().union(*(inst.registers for inst in code))))
        self.number = {r: i for i, r in enumerate(self.names)}
        for p in self.pieces:
            p.reads = np.array(sorted({self.number[r] for r in p.reads if r in self.number}), int)
            p.writes = np.array(sorted(self.number[r] for r in p.writes), int)
        self.namespace = dict(FUNCTIONS, lanes_of=self.lanes_of)
        self.views = {}  # what the pieces call registers -> (register, type)
        self.compile()
        self.executed = np.zeros(len(code), np.int64)  # by warps
        self.traffic = {}  # space -> what `count` notes, where a caller asks for it
        self.counting, self.flops = False, 0

    def unknown(self, inst, cause=None):
        place = f"{self.kernel.name}, {inst.source}, PTX line {inst.line}"
        raise UnknownPTX(f"{place}: unknown instruction: {inst.text}") from cause

    def bind(self, arguments):
        """{parameter: its value}, of maps of tensors the address that points to them."""
        if len(arguments) != len(self.kernel.params):
            raise UnknownPTX(f"{self.kernel.name}: {len(arguments)} arguments for {len(self.kernel.params)} parameters")
        values = {}
        for i, ((name, kind, _), value) in enumerate(zip(self.kernel.params, arguments, strict=True)):
            if isinstance(value, matrix.TensorMap):
                address = PARAMETERS + 128 * i
                self.maps[address], value = value, address
                kind = "u64"
            array = np.asarray(
                value, np.float32 if kind == "f32" else np.int64 if value is not None and value < 0 else np.uint64
            )
            values[name] = array.view(np.uint32 if kind == "f32" else np.uint64)
        return values

    # ---- the text of the pieces ----

    def compile(self):
        self.lines = []
        for number, piece in enumerate(self.pieces):
            self.lines += [f"def piece{number}(s):", "    L = lanes_of(s, None)"]
            for i in range(piece.start, piece.end):
                inst = self.kernel.instructions[i]
                if inst is not piece.last or inst.name.startswith(("wgmma", "tcgen05")):
                    try:
                        self.translate(i, inst)
                    except UnknownPTX as e:
                        self.unknown(inst, e)
        exec(code_of("\n".join(self.lines), self.kernel.name), self.namespace)
        for number, piece in enumerate(self.pieces):
            piece.run = self.namespace[f"piece{number}"]

    def translate(self, i, inst):
        guard = None
        if inst.guard:
            guard = ("~" if inst.guard[1] else "") + self.read(inst.guard[0], "pred")
        results = translate(inst, self.read)
        if results is None:
            name = f"i{i}"
            self.namespace[name] = handler(self, inst)
            call = f"    if len(G := lanes_of(s, {guard})): {name}(G)" if guard else f"    {name}(L)"
            self.lines.append(call)
            return
        if len(results) > 1:  # computed before the first is written: it may be among the operands
            self.lines.append(f"    t = {', '.join(r[2] for r in results)}")
            results = [(d, kind, f"t[{j}]") for j, (d, kind, _) in enumerate(results)]
        for dest, kind, expression in results:
            if dest == "_":
                continue
            target = f"{self.name(dest, kind)}[s]"
            self.lines.append(
                f"    {target} = where({guard}, {expression}, {target})" if guard else f"    {target} = {expression}"
            )

    def name(self, register, kind):
        """What a piece calls a register seen as a type."""
        width = self.kernel.width(register)
        if BITS[kind] != width:
            raise UnknownPTX(f"{register} of {width} bits as {kind}")
        name = f"{register.strip('%').replace('@', '_at_')}_{kind}"
        self.views[name] = (register, kind)
        return name

    def read(self, operand, kind):
        """The expression of an operand as a type."""
        kind = bits_of(kind)
        if isinstance(operand, Bits):
            value = literal(operand, "u64" if kind in PACKED and BITS[kind] == 64 else kind)
        elif operand.startswith("%") and (special := operand.partition(".")[0]) in SPECIAL:
            axis = "xyz".index(operand[-1])
            name = f"{SPECIAL[special]}_{axis}"
            self.views[name] = None
            return f"{name}[s]"
        elif operand == "%laneid":
            self.views["lane_in_warp"] = None
            return "lane_in_warp[s]"
        elif operand in self.parameters:
            value = PARAMETERS + 128 * [p[0] for p in self.kernel.params].index(operand)
            value = np.uint64(value)
        elif operand == "global_smem":
            value = NUMPY[kind](SHARED_BASE)
        elif self.kernel.is_register(operand):
            width = self.kernel.width(operand)
            if 1 < BITS[kind] < width:  # cvt takes the lower part of a wider register
                return f"as_{kind}({self.name(operand, f'u{width}')}[s])"
            return f"{self.name(operand, kind)}[s]"
        else:
            raise UnknownPTX(f"a symbol that is not known: {operand}")
        name = f"k{len(self.namespace)}"
        self.namespace[name] = value
        return name

    # ---- threads ----

    def lanes_of(self, s, guard):
        lanes = self.all[s]
        return lanes if guard is None else lanes[guard]

    def run(self, blocks=None):
        """All blocks, or the first so many, wave by wave. Raises Fault."""
        number = min(blocks or 2**62, int(np.prod(self.grid)))
        per_wave = max(1, WAVE // self.kernel.threads)
        with np.errstate(all="ignore"):
            for first in range(0, number, per_wave):
                self.wave(np.arange(first, min(number, first + per_wave)))
        return self

    def start(self, blocks):
        threads, n = self.kernel.threads, len(blocks) * self.kernel.threads
        self.all = np.arange(n)
        self.slot = self.all // threads  # which block of the wave
        self.warp = self.all % threads // 32
        self.index = blocks[self.slot]
        self.epoch = np.zeros(len(blocks), np.int64)
        self.tag = self.index << (EPOCH_BITS + WARP_BITS) | self.warp
        bound = dict(thread_0=self.all % threads, lane_in_warp=self.all % 32)
        x, y, _ = self.grid
        places = (self.index % x, self.index // x % y, self.index // (x * y))
        for axis in range(3):
            bound[f"block_index_{axis}"] = places[axis]
            bound[f"blocks_{axis}"] = np.full(n, self.grid[axis])
            bound[f"threads_{axis}"] = np.full(n, threads if axis == 0 else 1)
            bound.setdefault(f"thread_{axis}", np.zeros(n, int))
        self.registers = {}
        for width in set(map(self.kernel.width, self.names)):
            names = [r for r in self.names if self.kernel.width(r) == width]
            junk = np.uint64(0x5A5A5A5A5A5A5A5A).astype(f"u{width // 8}") if width > 1 else False
            self.registers |= zip(names, np.full((len(names), n), junk), strict=True)
        for name, of in self.views.items():
            if of is None:
                self.namespace[name] = bound[name].astype(np.uint32)
            else:
                self.namespace[name] = self.seen_as(*of)
        self.defined = np.zeros((len(self.names), n), bool)
        self.shared = Shared(self.shared_bytes, len(blocks), self.shared_granule)
        self.copies, self.bulk, self.products, self.stores = (Groups(n) for _ in range(4))
        self.in_flight = []  # registers of what was not waited for: (lanes, written, read, whether pairs of them may be formed)
        self.barriers, self.tmem = {}, tmem.TensorMemory(self, len(blocks))
        self.living = np.ones(n, bool)
        self.held = np.full(n, -1)  # the piece after the barrier at which a thread waits
        for piece in self.pieces:
            piece.known = False

    def seen_as(self, register, kind):
        array = self.registers[register]
        if kind in PACKED and kind != "bf16x2":
            part = "f" + kind[1:3]
            return array.view(NUMPY[part]).reshape(len(array), 2)
        return array.view(NUMPY[kind]) if kind in NUMPY else array

    def wave(self, blocks):
        self.start(blocks)
        self.ready, self.asleep = {0: [self.all]}, []
        changed = True
        while self.ready or self.asleep:
            if not self.ready:
                if not changed:
                    self.stuck()
                for at, lanes in self.asleep:
                    self.go(at, lanes)
                self.asleep, changed = [], False
            at = min(self.ready)
            groups = self.ready.pop(at)
            lanes = groups[0] if len(groups) == 1 else np.sort(np.concatenate(groups))
            changed |= self.step(at, lanes)
        if self.living.any():
            self.stuck()
        if self.bulk.items:
            last = self.kernel.instructions[-1]
            self.fault(last, self.bulk.items[0][0][0], "ends while a bulk copy still reads its shared memory")
        self.tmem.finish()

    def go(self, at, lanes):
        if len(lanes):
            self.ready.setdefault(at, []).append(lanes)

    def step(self, at, lanes):
        """Run a piece for some threads, and send them on; whether that was progress."""
        piece = self.pieces[at]
        whole = len(lanes) == len(self.all)
        if whole:
            s = slice(None)
        elif lanes[-1] - lanes[0] + 1 == len(lanes):
            s = slice(lanes[0], lanes[-1] + 1)
        else:
            s = lanes
        if not piece.known:
            self.check_defined(piece, s, lanes)
        if self.in_flight:
            self.check_in_flight(piece, lanes)
        last = piece.last
        if last is not None and last.name.startswith("mbarrier.try_wait"):
            passed = matrix.try_wait(self, last, lanes)
            self.asleep += [(at, lanes[~passed])] if not passed.all() else []
            if not passed.any():
                return False
            lanes = lanes[passed]
            self.registers[last.operands[0]][lanes] = True
            s = lanes
        if not piece.known:
            self.defined[(piece.writes, s) if isinstance(s, slice) else np.ix_(piece.writes, lanes)] = True
            piece.known = whole
        piece.run(s)
        self.executed[piece.start : piece.end] += (
            len(lanes) // 32 if len(lanes) == len(self.all) else 1 + np.count_nonzero(np.diff(lanes >> 5))
        )
        following = at + 1
        if last is None or last.name.startswith(("mbarrier", "wgmma", "tcgen05")):
            self.go(following, lanes)
        elif last.parts[0] == "bra":
            taken = np.ones(len(lanes), bool)
            if last.guard:
                taken = self.registers[last.guard[0]][lanes] ^ last.guard[1]
            self.go(self.piece_at[self.kernel.labels[last.operands[0]]], lanes[taken])
            self.go(following, lanes[~taken])
        elif last.parts[0] == "ret":
            taken = (
                np.ones(len(lanes), bool) if not last.guard else self.registers[last.guard[0]][lanes] ^ last.guard[1]
            )
            self.living[lanes[taken]] = False
            self.go(following, lanes[~taken])
            self.release()
        else:
            self.held[lanes] = following
            self.release()
        return True

    def release(self):
        """Let those blocks go whose living threads all wait at one barrier, and begin their next epoch."""
        for slot in np.unique(self.slot[self.held >= 0]):
            mine = (self.slot == slot) & self.living
            at = np.unique(self.held[mine])
            if len(at) == 1 and at[0] >= 0:
                lanes = self.all[mine]
                self.held[lanes] = -1
                self.epoch[slot] += 1
                self.tag[lanes] += 1 << WARP_BITS
                self.go(int(at[0]), lanes)

    def stuck(self):
        """Nothing can go on."""
        if self.asleep:
            at, lanes = self.asleep[0]
            self.fault(self.pieces[at].last, lanes[0], "waits without end for an mbarrier's phase")
        lane = self.all[self.held >= 0][0]
        here = self.held[lane]
        other = self.all[(self.slot == self.slot[lane]) & (self.held != here)]
        inst = self.pieces[here - 1].last
        where = f"thread {other[0] % self.kernel.threads} " if len(other) else ""
        if len(other):
            held = self.held[other[0]]
            where += f"waits at the one of {self.pieces[held - 1].last.source}" if held >= 0 else "has ended"
        self.fault(inst, lane, f"waits at a barrier that not all threads of its block reach: {where}")

    # ---- what is watched of registers ----

    def check_defined(self, piece, s, lanes):
        if not len(piece.reads):
            return
        known = self.defined[piece.reads][:, s] if isinstance(s, slice) else self.defined[np.ix_(piece.reads, lanes)]
        if known.all():
            return
        which, lane = np.argwhere(~known)[0]
        register = self.names[piece.reads[which]]
        for inst in self.kernel.instructions[piece.start : piece.end]:
            if register in inst.registers:
                self.fault(inst, lanes[lane], f"reads register {register}, which nothing has written")

    def check_in_flight(self, piece, lanes):
        """Registers of products and loads that run must not be read or written.

        But pairs may be formed of loaded ones: LLVM moves that before tcgen05.wait::ld, and in ptxas's registers it is no instruction.
        """
        for of, written, read, paired in self.in_flight:
            if piece.may_touch.isdisjoint(written) and piece.may_write.isdisjoint(read):
                continue
            if not np.isin(lanes, of).any():
                continue
            for inst in self.kernel.instructions[piece.start : piece.end]:
                if inst.name.startswith(("wgmma", "tcgen05.wait")) or (paired and inst.parts[0] == "mov"):
                    continue
                touched = inst.registers & written or read.intersection(inst.results)
                if touched:
                    lane = lanes[np.isin(lanes, of)][0]
                    self.fault(
                        inst, lane, f"touches register {sorted(touched)[0]} of a matrix product that was not waited for"
                    )

    # ---- values and accesses ----

    def value(self, operand, kind, lanes):
        """An operand as a type, of some threads."""
        if isinstance(operand, Bits):
            return literal(operand, kind)
        if operand == "global_smem":
            return NUMPY[kind](SHARED_BASE)
        return self.registers[operand].view(NUMPY[kind])[lanes]

    def address(self, operand, lanes):
        """The addresses [lanes] of an Address, int64."""
        base = operand.base
        if isinstance(base, str) and base != "global_smem":
            return self.registers[base][lanes].astype(np.int64) + operand.offset
        value = base.value if isinstance(base, Bits) else SHARED_BASE
        return np.full(lanes.shape, value + operand.offset)

    def fault(self, inst, lane, what):
        block = self.index[lane]
        x, y, _ = self.grid
        place = f"({block % x}, {block // x % y}, {block // (x * y)})"
        raise Fault(
            f"{self.kernel.name}, {inst.source}: thread {lane % self.kernel.threads} of block {place} {what}; PTX line {inst.line}: "
            f"{inst.text}"
        )

    def space(self, name):
        return self.memory if name == "global" else self.shared

    def whole_warps(self, inst, lanes):
        """The number of warps that lanes are, all their threads. Raises Fault."""
        if len(lanes) % 32 or (lanes[::32] % 32).any() or (lanes[31::32] - lanes[::32] != 31).any():
            self.fault(inst, lanes[0], "runs an instruction of a whole warp without all of its threads")
        return len(lanes) // 32


# ---- instructions that are more than registers ----


def handler(m, inst):
    """A function of the lanes that run an instruction."""
    op = inst.parts[0]
    if inst.name.startswith(("cp.async.bulk", "mbarrier", "wgmma", "mma", "ldmatrix", "stmatrix", "fence")):
        return matrix.handler(m, inst)
    if op == "tcgen05":
        return tmem.handler(m, inst)
    if op == "ld" and inst.parts[1] == "param":
        return parameter(m, inst)
    if op in ("ld", "st"):
        return memory.load_or_store(m, inst)
    if inst.name.startswith("cp.async"):
        return memory.copy(m, inst)
    if op in ("shfl", "redux", "elect", "vote"):
        return across_warp(m, inst)
    if op == "createpolicy":  # of a cache, of which there is none
        return lambda lanes: m.registers[inst.operands[0]].__setitem__(lanes, 0)
    if inst.name == "bar.warp.sync":  # groups that met run together: of a warp all are here
        return lambda lanes: m.whole_warps(inst, lanes) and None
    if inst.name == "griddepcontrol.wait" or inst.name == "griddepcontrol.launch_dependents":
        return lambda lanes: None
    raise UnknownPTX(inst.name)


def parameter(m, inst):
    dest, address = inst.operands
    kind = bits_of(inst.parts[-1])
    size = next((bytes_ for name, _, bytes_ in m.kernel.params if name == address.base), 0)
    if address.offset + BITS[kind] // 8 > size:
        raise UnknownPTX(f"{inst.name} of what is no parameter")
    whole = m.parameters[address.base]
    value = whole.reshape(1).view(f"u{BITS[kind] // 8}")[address.offset // (BITS[kind] // 8)].view(NUMPY[kind])

    def run(lanes):
        m.registers[dest][lanes] = value.astype(np.int64 if kind[0] == "s" else value.dtype).astype(
            m.registers[dest].dtype
        )

    return run


def across_warp(m, inst):
    op = inst.parts[0]
    if op == "elect":
        dest, elected = inst.operands[0]

        def run(lanes):
            m.whole_warps(inst, lanes)
            m.registers[elected][lanes] = lanes % 32 == 0
            if dest != "_":
                m.registers[dest][lanes] = 0

        return run
    dest, source, *rest = inst.operands
    if op == "redux":
        _, _, operation, kind = inst.parts[:4]
        reduce = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }
        if operation not in reduce or inst.parts[4:]:
            raise UnknownPTX(inst.name)
        kind = bits_of(kind)
        if kind == "f32" and operation in ("min", "max"):
            reduce = {"min": np.fmin, "max": np.fmax}
        total = reduce[operation].reduce

        def run(lanes):
            n = m.whole_warps(inst, lanes)
            if not np.all(m.value(rest[0], "u32", lanes) == 0xFFFFFFFF):
                raise UnknownPTX(f"{inst.name} of a part of a warp")
            x = np.broadcast_to(m.value(source, kind, lanes), lanes.shape).reshape(n, 32)
            m.registers[dest].view(NUMPY[kind])[lanes] = np.repeat(total(x, axis=1).astype(NUMPY[kind]), 32)

        return run
    if op == "vote":
        if inst.parts[2] != "ballot":
            raise UnknownPTX(inst.name)

        def run(lanes):
            n = m.whole_warps(inst, lanes)
            bits = m.registers[source][lanes].reshape(n, 32).astype(np.uint32) << np.arange(32, dtype=np.uint32)
            m.registers[dest][lanes] = np.repeat(bits.sum(1, dtype=np.uint32), 32)

        return run
    mode = inst.parts[2]

    def run(lanes):
        n = m.whole_warps(inst, lanes)
        x = np.broadcast_to(m.value(source, "u32", lanes), lanes.shape).reshape(n, 32)
        b = np.broadcast_to(m.value(rest[0], "u32", lanes), lanes.shape).reshape(n, 32).astype(int)
        of = b % 32 if mode == "idx" else np.arange(32) ^ b % 32
        m.registers[dest][lanes] = np.take_along_axis(x, of, 1).reshape(-1)

    return run
