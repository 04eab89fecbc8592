"""Global and shared memory of the emulated GPU, and all that is watched about them.

Global memory is the process's own: addresses are real, so that a table of addresses in a tensor works too. An access must lie in one
of the allocations that a launch was given. Shared memory is one array, a part of it for each block.

Beside each granule (the narrowest access that the kernel makes, 16 bytes at most) stands who touched it: a tag of block, epoch and warp,
where a barrier begins a new epoch of its block. An access whose granule another warp touched in the same epoch, or another block at
all, one of the two writing, is a race.
"""

import ctypes

import numpy as np

NEVER, ORDERED = -1, -2  # tags: not written yet; written by an asynchronous copy that was waited for
MANY = 255  # in place of a warp: several read it
ANY_BLOCK = 1 << 20
WARP_BITS, EPOCH_BITS = 8, 24
SHARED_BASE = 1024  # where dynamic shared memory begins: aligned as swizzled tiles need it, and no valid address is 0


class Fault(Exception):
    """What a kernel did wrong: kernel, source line, thread, address."""


def conflict(before, now):
    """Whether a touch by `before` and one by `now` are not ordered, as tags."""
    other_block = before >> (EPOCH_BITS + WARP_BITS) != now >> (EPOCH_BITS + WARP_BITS)
    return (before >= 0) & (other_block | ((before >> WARP_BITS == now >> WARP_BITS) & (before != now)))


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
        both = np.where(before >> WARP_BITS == tag >> WARP_BITS, tag | MANY, ANY_BLOCK << (EPOCH_BITS + WARP_BITS))
        fresh = (before < 0) | (before == tag) | ((before >> WARP_BITS < tag >> WARP_BITS) & ~conflict(before, tag))
        tag = np.broadcast_to(tag, where.shape)
        self.reader[where] = np.where(fresh, tag, both)
        shared = self.reader[where] != tag  # several warps in this very access
        if shared.any():
            late = shared & fresh
            same = self.reader[where[late]] >> WARP_BITS == tag[late] >> WARP_BITS
            self.reader[where[late]] = np.where(same, tag[late] | MANY, ANY_BLOCK << (EPOCH_BITS + WARP_BITS))
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
        lengths = (self.end - self.start + 127) // 64 * 64  # in the shadows alone; each begins at a granule
        self.shadow = np.concatenate([[0], np.cumsum(lengths)])[:-1] + self.start % 64
        super().__init__("global memory", int(lengths.sum()) + 64 * len(allocations) + 64, granule)
        self.shadow += 64 * np.arange(len(allocations))

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
        return f"{beyond} bytes past the end of {self.names[k]}" if beyond >= 0 else f"in {self.names[k]}, across its end"
