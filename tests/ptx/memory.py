"""Global and shared memory of the emulated GPU, all that is watched about them, and the instructions that read, write and copy.

Global memory is the process's own: addresses are real, so that a table of addresses in a tensor works too. An access must lie in one
of the allocations that a launch was given. Shared memory is one array, a part of it for each block.

Beside each granule (the narrowest access that the kernel makes, 16 bytes at most) stands who touched it: a tag of block, epoch and warp,
where a barrier begins a new epoch of its block. An access whose granule another warp touched in the same epoch, or another block at
all, one of the two writing, is a race.
"""

import ctypes

import numpy as np

from ptx.arithmetic import BITS, NUMPY, bits_of
from ptx.parse import Bits, UnknownPTX

NEVER, ORDERED = -1, -2  # tags: not written yet; written by an asynchronous copy that was waited for
MANY = 255  # in place of a warp: several read it
ANY_BLOCK = 1 << 20
WARP_BITS, EPOCH_BITS = 8, 24
SHARED_BASE = 1024  # where dynamic shared memory begins: aligned as swizzled tiles need it, and no valid address is 0


class Fault(Exception):
    """What a kernel did wrong: kernel, source line, thread, address."""


def conflict(before, now):
    """Whether a touch by `before` and one by `now` are not ordered, as tags."""
    touched = before >= 0
    if not touched.any():
        return touched
    other_block = before >> (EPOCH_BITS + WARP_BITS) != now >> (EPOCH_BITS + WARP_BITS)
    return touched & (other_block | ((before >> WARP_BITS == now >> WARP_BITS) & (before != now)))


class Memory:
    """A flat space of `size` bytes in `granule`s: who wrote and read each, and copies in flight. Subclasses find bytes by address."""

    def __init__(self, name, size, granule):
        self.name, self.granule = name, granule
        n = -(-size // granule)
        self.writer = np.full(n, NEVER, np.int64)
        self.reader = np.full(n, NEVER, np.int64)
        self.pending = np.zeros(n, bool)  # an asynchronous copy into it was issued and not waited for
        self.reading = np.zeros(n, np.int32)  # asynchronous reads of it that were not waited for
        self.unfenced = np.zeros(n, bool)  # written by threads, not yet visible to asynchronous reads

    def granules(self, offset, nbytes):
        """Granules [n, k] of n accesses of nbytes each, from their offsets."""
        k = max(1, nbytes // self.granule)
        first = offset // self.granule
        return first[:, None] if k == 1 else first[:, None] + np.arange(k)

    def touch_read(self, where, tag):
        """Note a read of granules [n, k] by threads of tags [n]: a bool [n] of races."""
        tag = tag[:, None]
        race = conflict(self.writer[where], tag)
        before = self.reader[where]
        block = EPOCH_BITS + WARP_BITS
        earlier = (before >> WARP_BITS < tag >> WARP_BITS) & (before >> block == tag >> block)
        fresh = (before < 0) | (before == tag) | earlier
        tag = np.broadcast_to(tag, where.shape)
        if fresh.all():
            self.reader[where] = tag
        else:
            both = np.where(before >> WARP_BITS == tag >> WARP_BITS, tag | MANY, ANY_BLOCK << block)
            self.reader[where] = np.where(fresh, tag, both)
        shared = self.reader[where] != tag  # several warps in this very access
        if shared.any():
            late = shared & fresh
            same = self.reader[where[late]] >> WARP_BITS == tag[late] >> WARP_BITS
            self.reader[where[late]] = np.where(same, tag[late] | MANY, ANY_BLOCK << block)
        return race.any(1)

    def touch_write(self, where, tag):
        """As touch_read, of a write: races with readers, and with other writers, each bool [n]."""
        tag = np.broadcast_to(tag[:, None], where.shape)
        read, written = conflict(self.reader[where], tag), conflict(self.writer[where], tag)
        self.writer[where] = tag
        written |= self.writer[where] != tag  # by several warps in this very access
        return read.any(1), written.any(1)


class Shared(Memory):
    """Shared memory of `blocks` blocks, `size` bytes each."""

    def __init__(self, size, blocks, granule):
        self.size = -(-size // 128) * 128 + 128
        self.limit = size
        super().__init__("shared memory", self.size * blocks, granule)
        self.bytes = np.full(self.size * blocks, 0xFF, np.uint8)  # nan in every dtype: what is read unwritten shows

    def view(self, dtype):
        return self.bytes.view(dtype)

    def outside(self, address, nbytes):
        return (address < SHARED_BASE) | (address + nbytes > SHARED_BASE + self.limit)

    def offset(self, address, block):
        """Offsets in `bytes` of addresses in a block's shared memory."""
        return address - SHARED_BASE + block * self.size


class Global(Memory):
    """The allocations [(address, bytes, name)] of a launch, at their real addresses."""

    def __init__(self, allocations, granule):
        allocations = sorted(set(allocations))
        self.names = [name for *_, name in allocations]
        self.start = np.array([a for a, *_ in allocations], np.int64)
        self.end = self.start + np.array([n for _, n, _ in allocations], np.int64)
        self.low = int(self.start.min()) // 64 * 64 if len(allocations) else 0
        length = -(-(int(self.end.max()) - self.low) // 64) * 64 if len(allocations) else 64
        whole = (ctypes.c_uint8 * length).from_address(self.low) if len(allocations) else bytearray(64)
        self.bytes = np.frombuffer(whole, np.uint8)
        self.views = {}
        # Where the granules of each begin: at the same place within 64 bytes, none shared with another's.
        lengths = (self.end - self.start + 127) // 64 * 64
        self.shadow = np.cumsum(lengths) - lengths + self.start % 64
        super().__init__("global memory", int(lengths.sum()) + 64, granule)

    def view(self, dtype):
        if dtype not in self.views:
            self.views[dtype] = self.bytes.view(dtype)
        return self.views[dtype]

    def allocation(self, address):
        return np.searchsorted(self.start, address, "right") - 1

    def outside(self, address, nbytes):
        k = self.allocation(address)
        return (k < 0) | (address + nbytes > self.end[np.maximum(k, 0)])

    def granules(self, address, nbytes):
        k = self.allocation(address)
        return super().granules(address - self.start[k] + self.shadow[k], nbytes)

    def near(self, address):
        """What an address lies behind, in words."""
        k = int(self.allocation(address))
        if k < 0:
            return "before every allocation"
        beyond = address - int(self.end[k])
        return (
            f"{beyond} bytes past the end of {self.names[k]}" if beyond >= 0 else f"in {self.names[k]}, across its end"
        )


# ---- accesses ----


def access(m, inst, name, lanes, address, nbytes, write, align=None, data=None):
    """Check accesses of nbytes a thread and note them: their offsets in the space's bytes. Raises Fault.

    data [lanes, n] unsigned, if any, is written. Several warps may write the same bits to a place: Triton's layouts hold some values
    more than once, and each holder stores them.
    """
    space = m.space(name)
    verb = "writes" if write else "reads"

    def first(bad, what):
        i = int(np.flatnonzero(bad)[0])
        m.fault(inst, lanes[i], f"{verb} {nbytes} bytes of {name} memory at {int(address[i]):#x}: {what}")

    bad = address % (align or nbytes) != 0
    if bad.any():
        first(bad, f"misaligned, it must be a multiple of {align or nbytes}")
    bad = space.outside(address, nbytes)
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        first(
            bad,
            space.near(int(address[i]))
            if name == "global"
            else f"there are {space.limit} bytes from {SHARED_BASE:#x} on",
        )
    if name == "global":
        offset = address - space.low
        where = space.granules(address, nbytes)
    else:
        offset = space.offset(address, m.slot[lanes])
        where = space.granules(offset, nbytes)
    watch(m, inst, space, lanes, where, write, first, offset, data)
    if m.counting:
        count(m, inst, name, lanes, address, nbytes)
    return offset


def watch(m, inst, space, lanes, where, write, first, offset, data):
    """What no access may meet: copies in flight, memory that was never written, other warps. Writes data."""
    tag = m.tag[lanes]
    if space is m.shared:
        bad = space.pending[where].any(1)
        if bad.any():
            first(bad, "an asynchronous copy into it was not waited for")
        bad = (space.reading[where] > 0).any(1) if write else (space.writer[where] == NEVER).any(1)
        if bad.any():
            first(bad, "an asynchronous read of it was not waited for" if write else "it was never written")
    writers, readers = space.writer[where], space.reader[where]
    if write:
        race, written = space.touch_write(where, tag)
        if space is m.shared:
            space.unfenced[where] = True
        if data is not None:
            memory = space.view(data.dtype)
            at = (offset // data.itemsize)[:, None] + np.arange(data.shape[1])
            before = memory[at[written]] if written.any() else None
            memory[at] = data
            if written.any():
                written[written] = conflict(writers, tag[:, None]).any(1)[written] & (before != data[written]).any(1)
            written |= (memory[at] != data).any(1)  # by another thread, be it of the same warp
        race = race | written
    else:
        race = space.touch_read(where, tag)
    if race.any():
        i = int(np.flatnonzero(race)[0])
        first(race, f"a race with {other(tag[i], writers[i], readers[i])}")


def other(tag, writers, readers):
    """Who else touched it, in words."""
    for verb, tags in (("writing", writers), ("reading", readers)):
        for t in tags[conflict(tags, tag)]:
            block, warp = int(t) >> (EPOCH_BITS + WARP_BITS), int(t) & ((1 << WARP_BITS) - 1)
            who = "several warps" if warp == MANY else f"warp {warp}"
            if block == ANY_BLOCK:
                return f"several blocks, {verb}"
            mine = block == int(tag) >> (EPOCH_BITS + WARP_BITS)
            return f"{who} {'' if mine else f'of block {block} '}{verb} it with no barrier between"
    return "another warp or block in this very instruction"


def count(m, inst, name, lanes, address, nbytes):
    """Note of an access bytes, requests by warps, and pieces that memory serves one by one, beside the fewest that would do.

    A piece of global memory is a sector of 32 bytes. One of shared memory is a wavefront: a word of each of 32 banks, for eight
    threads of a warp where they access 16 bytes each, for 16 where 8, else for all.
    """
    warp = lanes >> 5
    if name == "global":
        step = min(nbytes, 32)
        sectors = np.concatenate([(warp << 48) + (address + d) // 32 for d in range(0, nbytes, step)])
        pieces = len(np.unique(sectors))
        places = np.unique((warp << 48) + address) >> 48
        fewest = int((-(-np.unique(places, return_counts=True)[1] * nbytes // 32)).sum())
    else:
        words = max(1, nbytes // 4)
        part = warp * 4 + lanes % 32 * words // 32
        distinct = np.unique(np.concatenate([(part << 32) + address // 4 + d for d in range(words)]))
        banks, depth = np.unique((distinct >> 32 << 5) + distinct % 32, return_counts=True)
        first = np.flatnonzero(np.diff(banks >> 5, prepend=-1))
        pieces, fewest = int(np.maximum.reduceat(depth, first).sum()), len(first)
    note = m.traffic.setdefault(name, dict(bytes=0, requests=0, pieces=0, fewest=0))
    for key, value in zip(note, (nbytes * len(lanes), len(np.unique(warp)), pieces, fewest), strict=True):
        note[key] += value


def granule(code, space):
    """The narrowest access of a space that a kernel makes, in bytes, 16 at most."""
    widths = [16]
    for inst in code:
        if inst.parts[0] in ("ld", "st") and space in inst.name:
            widths.append(BITS.get(bits_of(inst.parts[-1]), 32) // 8)
        elif inst.name.startswith(("cp.async.ca", "cp.async.cg")) and isinstance(inst.operands[2], Bits):
            widths.append(inst.operands[2].value)
        elif inst.parts[0] == "mbarrier" and space == "shared":
            widths.append(8)
        elif inst.name.startswith("tcgen05.alloc") and space == "shared":
            widths.append(4)
    return max(1, min(widths))


# ---- instructions ----

SPACES = {"global", "shared", "shared::cta"}
HINTS = {"weak", "L1::evict_last", "L1::evict_first", "L1::no_allocate", "nc", "L2::cache_hint"}


def load_or_store(m, inst):
    op, space, *mods = inst.parts
    *mods, kind = mods
    count = next((int(p[1:]) for p in mods if p in ("v2", "v4", "v8")), 1)
    if space not in SPACES or set(mods) - {"v2", "v4", "v8"} - HINTS or bits_of(kind) not in NUMPY:
        raise UnknownPTX(inst.name)
    address, registers = inst.operands[:2] if op == "st" else inst.operands[1::-1]
    registers = registers if isinstance(registers, list) else [registers]
    if len(registers) != count:
        raise UnknownPTX(inst.name)
    kind, space = bits_of(kind), space.removesuffix("::cta")
    size = BITS[kind] // 8
    unsigned = np.dtype(f"u{size}")
    if any(m.kernel.is_register(r) and m.kernel.width(r) < BITS[kind] for r in registers if isinstance(r, str)):
        raise UnknownPTX(f"{inst.name} of a register that is narrower")

    def load(lanes):
        first = access(m, inst, space, lanes, m.address(address, lanes), size * count, False) // size
        memory = m.space(space).view(unsigned)
        for j, r in enumerate(registers):
            if r != "_":
                value = memory[first + j]
                m.registers[r][lanes] = value.view(NUMPY[kind]) if kind[0] == "s" else value

    def store(lanes):
        data = np.empty((len(lanes), count), unsigned)
        for j, r in enumerate(registers):
            data[:, j] = m.value(r, f"u{m.kernel.width(r)}" if isinstance(r, str) else kind, lanes)
        access(m, inst, space, lanes, m.address(address, lanes), size * count, True, data=data)

    return load if op == "ld" else store


def copy(m, inst):
    """cp.async of 4, 8 or 16 bytes a thread, and its groups."""
    what = inst.parts[2]
    if what == "commit_group":
        return lambda lanes: m.copies.commit(lanes)
    if what == "wait_group":
        return lambda lanes: m.copies.wait(lanes, inst.operands[0].value)
    if what == "wait_all":
        return lambda lanes: (m.copies.commit(lanes), m.copies.wait(lanes, 0))
    if what not in ("ca", "cg") or inst.parts[3:] not in (("shared", "global"), ("shared::cta", "global")):
        raise UnknownPTX(inst.name)
    to, of, size, *rest = inst.operands
    size = size.value

    def run(lanes):
        source = m.address(of, lanes)
        taken = (
            np.full(len(lanes), size)
            if not rest
            else np.broadcast_to(m.value(rest[0], "u32", lanes), lanes.shape).astype(int)
        )
        data = np.zeros((len(lanes), size), np.uint8)
        for n in np.unique(taken[taken > 0]):
            some = taken == n
            offset = access(m, inst, "global", lanes[some], source[some], int(n), False, align=size)
            data[some, :n] = m.memory.bytes[offset[:, None] + np.arange(n)]
        issue_copy(m, inst, lanes, m.address(to, lanes), size, data)

    return run


def issue_copy(m, inst, lanes, address, size, data):
    """A copy into shared memory that is checked now and written when it is waited for."""
    offset = access(m, inst, "shared", lanes, address, size, True)
    where = m.shared.granules(offset, size)
    m.shared.pending[where] = True

    def done(mask):
        m.shared.pending[where[mask]] = False
        m.shared.bytes[offset[mask][:, None] + np.arange(size)] = data[mask]
        m.shared.writer[where[mask]] = m.tag[lanes[mask]][:, None]

    m.copies.issue(lanes, done)
