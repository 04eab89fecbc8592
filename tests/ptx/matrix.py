"""Matrix instructions and the copies that feed them: mma, ldmatrix, stmatrix; wgmma; TMA, mbarriers and fences.

Source of all layouts: NVIDIA, PTX ISA 8.7, "Warp Level Matrix Instructions" and "Asynchronous Warpgroup Level Matrix Instructions".
Products are exact in fp32 and summed in fp32; a tensor core sums in another order, with a few bits less.
"""

import functools
from dataclasses import dataclass

import numpy as np

from ptx.arithmetic import widen
from ptx.memory import MANY, NEVER, ORDERED, SHARED_BASE, WARP_BITS, access
from ptx.parse import Bits, UnknownPTX


@dataclass(frozen=True)
class TensorMap:
    """A TMA descriptor of a matrix [rows, columns]: its address, bytes of an element and from row to row; the box of a copy in rows
    and columns, and how shared memory is swizzled: 0, or as CUDA numbers it, 1: 32 bytes, 2: 64, 3: 128."""

    address: int
    element: int
    rows: int
    columns: int
    pitch: int
    box: tuple
    swizzle: int


def handler(m, inst):
    """A function of the lanes that run an instruction of this file."""
    op = inst.parts[0]
    if op == "mma":
        return mma(m, inst)
    if op in ("ldmatrix", "stmatrix"):
        return eight_by_eight(m, inst)
    if op == "wgmma":
        return wgmma(m, inst)
    if op == "mbarrier":
        return mbarrier(m, inst)
    if op == "fence":
        return fence(m, inst)
    return bulk(m, inst)


# ---- values ----


def floats(bits, kind):
    """fp32 of 16-bit values, or of tf32's 32 (the last 13 bits do not count)."""
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    return widen(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def fragments(m, registers, lanes, n):
    """Registers of n whole warps as [n, 8, 4] each: row lane / 4, four neighbours of it."""
    return [np.ascontiguousarray(m.registers[r][lanes]).reshape(n, 8, 4) for r in registers]


def halves_of(x):
    """[n, 8, 4] registers as [n, 8, 8] of 16 bits."""
    return x.view(np.uint16)


def operand_a(parts, kind):
    """A [n, 16, k] of its four registers."""
    parts = [floats(p if kind == "tf32" else halves_of(p), kind) for p in parts]
    return np.concatenate([np.concatenate(parts[0::2], 2), np.concatenate(parts[1::2], 2)], 1)


def scatter_d(m, registers, lanes, d):
    """D [n, 16, 8 j] into pairs of registers: columns 2 q and 2 q + 1 of rows lane / 4 and, the pair after, of eight below."""
    n = len(d)
    for i, r in enumerate(registers):
        half, column = i % 4 // 2, i // 4 * 8 + i % 2
        values = d[:, 8 * half : 8 * half + 8, column : column + 7 : 2]
        m.registers[r].view(np.float32)[lanes] = np.ascontiguousarray(values, np.float32).reshape(n * 32)


def gather_d(m, registers, lanes, n):
    """The inverse of scatter_d: [n, 16, 8 j]."""
    d = np.empty((n, 16, len(registers) * 2), np.float32)
    for i, r in enumerate(registers):
        half, column = i % 4 // 2, i // 4 * 8 + i % 2
        d[:, 8 * half : 8 * half + 8, column : column + 7 : 2] = m.registers[r].view(np.float32)[lanes].reshape(n, 8, 4)
    return d


# ---- a warp's ----


def mma(m, inst):
    """mma.sync m16n8k16 of fp16 or bf16, m16n8k8 of tf32, in fp32."""
    shape, *layout, d_kind, a_kind, b_kind, c_kind = inst.parts[3:]
    known = {("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32")}
    if layout != ["row", "col"] or (shape, a_kind) not in known or (d_kind, b_kind, c_kind) != ("f32", a_kind, "f32"):
        raise UnknownPTX(inst.name)
    d, a, b, c = inst.operands

    def run(lanes):
        n = m.whole_warps(inst, lanes)
        left = operand_a(fragments(m, a, lanes, n), a_kind)
        right = [floats(p if a_kind == "tf32" else halves_of(p), a_kind) for p in fragments(m, b, lanes, n)]
        right = np.concatenate(right, 2)  # [n, 8 columns, k]
        m.flops += 2 * left.size * 8
        scatter_d(m, d, lanes, left @ right.transpose(0, 2, 1) + gather_d(m, c, lanes, n))

    return run


def eight_by_eight(m, inst):
    """ldmatrix and stmatrix of one, two or four matrices of 8 x 8 16-bit elements, whose rows' addresses the lanes have."""
    mods = inst.parts[1:]
    count = {"x1": 1, "x2": 2, "x4": 4}.get(mods[3])
    trans = "trans" in mods
    if (
        mods[:3] != ("sync", "aligned", "m8n8")
        or not count
        or mods[-2] not in ("shared", "shared::cta")
        or mods[-1] != "b16"
    ):
        raise UnknownPTX(inst.name)
    load = inst.parts[0] == "ldmatrix"
    registers, address = inst.operands if load else inst.operands[::-1]

    def run(lanes):
        n = m.whole_warps(inst, lanes)
        rows = lanes.reshape(n, 32)[:, : 8 * count].reshape(-1)
        if load:
            offset = access(m, inst, "shared", rows, m.address(address, rows), 16, False)
            matrices = m.shared.view(np.uint16)[(offset // 2)[:, None] + np.arange(8)].reshape(n, count, 8, 8)
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3) if trans else matrices)
            for j, r in enumerate(registers):
                m.registers[r][lanes] = np.ascontiguousarray(matrices[:, j]).view(np.uint32).reshape(n * 32)
        else:
            matrices = np.stack([halves_of(p) for p in fragments(m, registers, lanes, n)], 1)
            data = np.ascontiguousarray((matrices.swapaxes(2, 3) if trans else matrices).reshape(n * count * 8, 8))
            access(m, inst, "shared", rows, m.address(address, rows), 16, True, data=data)

    return run


# ---- a warpgroup's ----

SWIZZLES = {1: (128, 7), 2: (64, 3), 3: (32, 1)}  # of a descriptor: bytes of a row, and the address bits that change it


@functools.lru_cache(4096)
def tile_addresses(descriptor, rows, k, major, element):
    """Addresses [rows, k] of a tile that a shared-memory descriptor names; major "K" or "MN"; element: bytes of one."""
    start = (descriptor & 0x3FFF) << 4
    leading, stride = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    if descriptor >> 62 not in SWIZZLES:
        raise UnknownPTX(f"a shared-memory descriptor without a swizzle: {descriptor:#x}")
    pitch, mask = SWIZZLES[descriptor >> 62]
    r, c = np.arange(rows)[:, None], np.arange(k)[None, :]
    if major == "K":
        at = r % 8 * pitch + r // 8 * stride + element * c
    else:
        wide = pitch // element
        at = c % 8 * pitch + c // 8 * stride + r // wide * leading + element * (r % wide)
    address = start + at
    return address ^ ((address >> 7 & mask) << 4)


@functools.lru_cache(4096)
def tile_granules(granule, *tile):
    """The granules that a tile has a part of, counted from where a block's shared memory begins."""
    return np.unique((tile_addresses(*tile) - SHARED_BASE) // granule)


def read_tile(m, inst, lanes, *tile):
    """A tile [rows, k], named as by tile_addresses, as bits, read asynchronously by the block of lanes; and its granules. Raises Fault."""
    space, slot, addresses, element = m.shared, m.slot[lanes[0]], tile_addresses(*tile), tile[-1]
    first = int(addresses.min())
    if space.outside(first, 2) or space.outside(int(addresses.max()), element):
        m.fault(
            inst,
            lanes[0],
            f"reads a tile from {first:#x} to {int(addresses.max()):#x} of {space.limit} bytes of shared memory",
        )
    offset = space.offset(addresses, slot)
    where = tile_granules(space.granule, *tile) + slot * (space.size // space.granule)
    for bad, what in (
        (space.writer[where] == NEVER, "was never written"),
        (space.pending[where], "an asynchronous copy writes and nobody waited for"),
        (space.unfenced[where], "threads wrote, with no fence.proxy.async behind it"),
    ):
        if bad.any():
            at = int(where[bad][0]) * space.granule - slot * space.size + SHARED_BASE
            m.fault(inst, lanes[0], f"reads shared memory at {at:#x} which {what}")
    # A warpgroup's four warps read it all: what one of them wrote, the others have not seen before a barrier, nor may one write it.
    tag = m.tag[lanes[0]] | (MANY if len(lanes) > 1 else 0)
    race = space.touch_read(where[:, None], np.broadcast_to(tag, where.shape))
    if race.any():
        at = int(where[race][0]) * space.granule - slot * space.size + SHARED_BASE
        m.fault(
            inst,
            lanes[0],
            f"reads shared memory at {at:#x}: a race with another warp that writes it with no barrier between",
        )
    return space.view(np.dtype(f"u{element}"))[offset // element], where


def is_fenced(m, inst):
    """Whether a wgmma.fence begins the group of products that a wgmma is of.

    What writes their registers may stand behind it: LLVM moves that, and ptxas minds registers by itself.
    """
    code = m.kernel.instructions
    i = m.place[id(inst)]
    while i > 0 and i not in m.targets:
        i -= 1
        if code[i].parts[0] in ("bra", "bar") or code[i].name.startswith(("wgmma.commit", "wgmma.wait")):
            return False
        if code[i].name.startswith("wgmma.fence"):
            return True
    return False


def wgmma(m, inst):
    what = inst.parts[1]
    if what == "fence":
        return lambda lanes: None
    if what == "commit_group":
        return lambda lanes: m.products.commit(lanes)
    if what == "wait_group":
        return lambda lanes: m.products.wait(lanes, inst.operands[0].value)
    shape, d_kind, a_kind, b_kind = inst.parts[4:]
    found = {"bf16": 16, "f16": 16, "tf32": 8}
    n_columns, k = map(int, shape.removeprefix("m64n").split("k"))
    if what != "mma_async" or d_kind != "f32" or a_kind != b_kind or found.get(a_kind) != k:
        raise UnknownPTX(inst.name)
    element = 4 if a_kind == "tf32" else 2
    d, a, b, scale_d, scale_a, scale_b, *major = inst.operands
    majors = [("MN" if o.value else "K") for o in major]
    if scale_a.value != 1 or scale_b.value != 1:
        raise UnknownPTX(f"{inst.name} with a negated operand")
    b_major = majors[-1] if majors else "K"
    a_major = majors[0] if len(majors) == 2 else "K"
    fenced = is_fenced(m, inst)

    def run(lanes):
        n = m.whole_warps(inst, lanes)
        if not fenced:
            m.fault(inst, lanes[0], "begins products with no wgmma.fence before them")
        if n % 4 or (m.warp[lanes[::128]] % 4).any():
            m.fault(inst, lanes[0], "runs an instruction of a warpgroup without all of its warps")
        for group in lanes.reshape(-1, 128):
            one(group)

    def one(lanes):
        added = scale_d.value if isinstance(scale_d, Bits) else m.registers[scale_d][lanes]
        if not isinstance(scale_d, Bits) and added.any() != added.all():
            m.fault(inst, lanes[0], "has a scale-d that differs between threads")
        where = []
        if isinstance(a, list):
            left = operand_a(fragments(m, a, lanes, 4), a_kind).reshape(64, k)
        else:
            bits, used = read_tile(m, inst, lanes, int(m.registers[a][lanes[0]]), 64, k, a_major, element)
            left, where = floats(bits, a_kind), [used]
        bits, used = read_tile(m, inst, lanes, int(m.registers[b][lanes[0]]), n_columns, k, b_major, element)
        product = left @ floats(bits, a_kind).T
        m.flops += 2 * left.size * n_columns
        where = np.concatenate([*where, used])
        accumulators = np.ix_([m.number[r] for r in d], lanes)
        if np.any(added):
            if not m.defined[accumulators].all():
                m.fault(inst, lanes[0], "adds to accumulators that nothing has written")
            product = product + gather_d(m, d, lanes, 4).reshape(64, n_columns)
        m.defined[accumulators] = True
        scatter_d(m, d, lanes, product.reshape(4, 16, n_columns))
        m.shared.reading[where] += 1
        record = (lanes, set(d), set(a) if isinstance(a, list) else set(), False)
        m.in_flight.append(record)

        def done(mask):
            m.shared.reading[where] -= 1
            m.shared.reader[where] = (
                m.tag[lanes[0]] | MANY
            )  # only now is it read: other warps may write it behind a barrier
            m.in_flight = [r for r in m.in_flight if r is not record]

        m.products.issue(lanes[:1], done)

    return run


# ---- TMA and mbarriers ----


class Barrier:
    """An mbarrier: arrivals that are still due in this phase and in each, bytes that are still to come, the phase; copies in flight."""

    def __init__(self, count):
        self.count = self.due = count
        self.bytes, self.phase, self.copies = 0, 0, []

    def turn(self):
        """Begin the next phase if this one is complete."""
        if self.due == 0 and self.bytes == 0:
            self.phase, self.due = self.phase ^ 1, self.count


def barrier_of(m, inst, lane, address):
    """The Barrier at a shared address of a lane's block."""
    key = int(m.slot[lane]), int(address)
    if key not in m.barriers:
        m.fault(inst, lane, f"uses an mbarrier at {int(address):#x} that was not initialised")
    return m.barriers[key]


def mbarrier(m, inst):
    what = inst.parts[1]
    if what not in ("init", "inval", "arrive") or inst.parts[-1] != "b64":
        raise UnknownPTX(inst.name)
    address = next(o for o in inst.operands if not isinstance(o, (str, Bits)))
    number = inst.operands[-1]

    def run(lanes):
        at = m.address(address, lanes)
        space = m.shared
        for lane, where in zip(lanes, at, strict=True):
            if what == "inval":  # while it lives, nothing else may write there, another init neither
                barrier_of(m, inst, lane, where)
                space.reading[space.granules(space.offset(where[None], m.slot[lane]), 8)] -= 1
        access(m, inst, "shared", lanes, at, 8, what != "arrive")  # threads that arrive do not race with one another
        for lane, where in zip(lanes, at, strict=True):
            if what == "init":
                m.barriers[int(m.slot[lane]), int(where)] = Barrier(number.value)
                space.reading[space.granules(space.offset(where[None], m.slot[lane]), 8)] += 1
                continue
            barrier = barrier_of(m, inst, lane, where)
            if what == "inval":
                if barrier.copies:
                    m.fault(inst, lane, "invalidates an mbarrier whose copies are in flight")
                del m.barriers[int(m.slot[lane]), int(where)]
                continue
            arrivals = 1
            if "expect_tx" in inst.parts:
                barrier.bytes += int(number.value if isinstance(number, Bits) else m.registers[number][lane])
            elif isinstance(number, Bits):
                arrivals = number.value
            if barrier.due < arrivals:
                m.fault(inst, lane, f"arrives at an mbarrier of {barrier.count} once more than its phase expects")
            barrier.due -= arrivals
            barrier.turn()

    return run


def try_wait(m, inst, lanes):
    """Whether the phase of the parity that each thread names is complete: bool [lanes]. Copies arrive now, as late as they may."""
    m.whole_warps(inst, lanes)
    at = m.address(inst.operands[1], lanes)
    parity = np.broadcast_to(m.value(inst.operands[2], "u32", lanes), lanes.shape)
    passed = np.zeros(len(lanes), bool)
    access(m, inst, "shared", lanes, at, 8, False)
    keys = np.stack([m.slot[lanes], at])
    for slot, where in np.unique(keys, axis=1).T:
        some = (keys[0] == slot) & (keys[1] == where)
        barrier = barrier_of(m, inst, lanes[some][0], where)
        while barrier.copies:
            barrier.copies.pop(0)()
            barrier.turn()
        passed[some] = barrier.phase != parity[some]
    return passed


def box_addresses(descriptor, column, row, start):
    """Of a box: global addresses [rows, columns] of its elements, whether each is in the matrix, and its shared addresses."""
    rows, columns = descriptor.box
    r, c = np.arange(rows)[:, None], np.arange(columns)[None, :]
    inside = (row + r >= 0) & (row + r < descriptor.rows) & (column + c >= 0) & (column + c < descriptor.columns)
    source = descriptor.address + (row + r) * descriptor.pitch + (column + c) * descriptor.element
    to = start + (r * columns + c) * descriptor.element
    mask = {0: 0, 1: 1, 2: 3, 3: 7}[descriptor.swizzle]
    return source, inside, to ^ ((to >> 7 & mask) << 4)


def bulk(m, inst):
    """cp.async.bulk: copies of a box between global and shared memory by one thread."""
    what = inst.parts[3]
    if what == "commit_group":
        return lambda lanes: m.bulk.commit(lanes)
    if what == "wait_group":
        return lambda lanes: m.bulk.wait(lanes, inst.operands[0].value)
    load = ("2d", "shared::cta", "global", "mbarrier::complete_tx::bytes")
    load_cluster = ("2d", "shared::cluster", "global", "mbarrier::complete_tx::bytes")
    store = ("2d", "global", "shared::cta", "bulk_group")
    if what != "tensor" or inst.parts[4:] not in (load, load_cluster, store):
        raise UnknownPTX(inst.name)
    storing = inst.parts[4:] == store
    box, shared = inst.operands[:2] if storing else inst.operands[1::-1]

    def run(lanes):
        for i, lane in enumerate(lanes):
            one(lanes[i : i + 1], lane)

    def one(lanes, lane):
        descriptor = m.maps.get(int(m.registers[box.base][lane]))
        if descriptor is None:
            m.fault(inst, lane, "names a tensor map that is no parameter")
        column, row = (int(m.value(c, "s32", lanes).reshape(-1)[0]) for c in box.coordinates)
        start = int(m.address(shared, lanes)[0])
        if start % 128:
            m.fault(inst, lane, f"copies a box at shared address {start:#x}: it must be a multiple of 128")
        there, inside, here = box_addresses(descriptor, column, row, start)
        size = descriptor.element
        space = m.shared
        if space.outside(start, here.size * size):
            m.fault(
                inst,
                lane,
                f"copies {here.size * size} bytes at {start:#x}: there are {space.limit} bytes of shared memory",
            )
        offset = space.offset(here, m.slot[lane])
        # Rows of a box are watched by 16 bytes: that is what a swizzle moves.
        where = np.unique(offset // space.granule)
        tag = np.broadcast_to(m.tag[lane], where.shape)
        for bad, text in ((space.pending[where], "a copy into it"), (space.reading[where] > 0, "a read of it")):
            if bad.any() and (not storing or text == "a copy into it"):
                m.fault(inst, lane, f"copies a box at {start:#x} over an asynchronous one: {text} was not waited for")
        unsigned = np.dtype(f"u{size}")
        flat = there[inside]
        if storing:
            for bad, text in (
                (space.writer[where] == NEVER, "never written"),
                (space.unfenced[where], "written with no fence.proxy.async behind it"),
            ):
                if bad.any():
                    m.fault(inst, lane, f"copies shared memory from {start:#x} that was {text}")
            race = space.touch_read(where[:, None], tag)
            if len(flat):
                at = access(m, inst, "global", np.full(len(flat), lane), flat, size, True)
                m.memory.view(unsigned)[at // size] = space.view(unsigned)[offset[inside] // size]
            space.reading[where] += 1

            def done(mask):
                space.reading[where] -= 1
                space.touch_read(where[:, None], np.broadcast_to(m.tag[lane], where.shape))

            m.bulk.issue(lanes, done)
        else:
            race = np.logical_or(*space.touch_write(where[:, None], tag))
            data = np.zeros(here.shape, unsigned)
            if len(flat):
                at = access(m, inst, "global", np.full(len(flat), lane), flat, size, False)
                data[inside] = m.memory.view(unsigned)[at // size]
            space.pending[where] = True
            barrier = barrier_of(m, inst, lane, m.address(inst.operands[2], lanes)[0])

            def deliver():
                space.pending[where], space.writer[where], space.reader[where] = False, ORDERED, NEVER
                space.unfenced[where] = False
                space.view(unsigned)[offset // size] = data
                barrier.bytes -= here.size * size

            barrier.copies.append(deliver)
        if race.any():
            m.fault(inst, lane, f"copies a box at {start:#x} which another warp touches with no barrier between")

    return run


def fence(m, inst):
    """Of fences one has an effect here: what threads have written is seen by asynchronous reads after fence.proxy.async."""
    if inst.name in ("fence.proxy.async.shared::cta", "fence.proxy.async"):

        def run(lanes):
            space = m.shared
            written = np.flatnonzero(space.unfenced)
            mine = np.isin(space.writer[written] & ((1 << WARP_BITS) - 1), np.unique(m.warp[lanes]))
            slots = written * space.granule // space.size
            mine &= np.isin(slots, np.unique(m.slot[lanes]))
            space.unfenced[written[mine]] = False

        return run
    if inst.name.startswith(("fence.mbarrier_init", "fence.acq_rel", "fence.sc")):
        return lambda lanes: None
    raise UnknownPTX(inst.name)
