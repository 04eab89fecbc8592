"""The tensor memory of sm_100, 128 lanes of 512 columns of 32 bits a block, and the tcgen05 instructions that Triton uses.

Source of the layouts: NVIDIA, PTX ISA 8.7, "TensorCore 5th Generation Family Instructions". A product is computed when it is issued; its
result may be read once an mbarrier that a commit names has been waited for. Every granule, a lane's column, is watched as memory is.
"""

import numpy as np

from ptx import matrix
from ptx.memory import NEVER, ORDERED, Memory, access, conflict
from ptx.parse import Address, Bits, UnknownPTX

LANES, COLUMNS = 128, 512
SWIZZLES = {2: 1, 4: 2, 6: 3}  # of a descriptor of sm_100 -> as sm_90's has it


class TensorMemory:
    """That of the blocks of a wave, what of it is allocated, and products that run."""

    def __init__(self, m, blocks):
        self.m, self.blocks = m, blocks
        self.taken = [{} for _ in range(blocks)]  # first column -> columns
        self.watched = None
        self.running = []  # ((issuing lane, its accumulator's place and shape), done) of products that were not waited for

    def finish(self):
        for taken in self.taken:
            if taken:
                m = self.m
                m.fault(
                    m.kernel.instructions[-1], 0, f"ends with {sum(taken.values())} columns of tensor memory allocated"
                )

    def open(self):
        """Made when it is first used: most kernels have none."""
        if self.watched is None:
            self.words = np.full((self.blocks, LANES, COLUMNS), 0xFFFFFFFF, np.uint32)
            self.watched = Memory("tensor memory", self.blocks * LANES * COLUMNS, 1)
        return self

    def at(self, inst, slot, lane, column, thread):
        """(indices into words, granules) of lanes and columns, arrays that broadcast. Raises Fault."""
        lane, column = np.broadcast_arrays(lane, column)
        mine = np.zeros(COLUMNS, bool)
        for first, n in self.taken[slot].items():
            mine[first : first + n] = True
        inside = (lane >= 0) & (lane < LANES) & (column >= 0) & (column < COLUMNS)
        if not inside.all() or not mine[column].all():
            self.m.fault(
                inst,
                thread,
                f"touches columns {column.min()} to {column.max()} of tensor memory, of which not all are allocated",
            )
        return (slot, lane, column), (slot * LANES + lane) * COLUMNS + column

    def touch(self, inst, granules, tag, thread, write):
        """Watch an access of tensor memory. Raises Fault."""
        space = self.watched
        flat = granules.reshape(-1, 1)
        tags = np.broadcast_to(tag, flat.shape[:1])
        if space.pending[flat].any():
            self.m.fault(inst, thread, "touches tensor memory of a product or a store that was not waited for")
        if write and space.reading[flat].any():
            self.m.fault(inst, thread, "writes tensor memory that a product still reads")
        # What was never written is nan and may be read: of a loop that does not run, Triton's pipeline loads the accumulator all the
        # same, and selects it away.
        race = np.logical_or(*space.touch_write(flat, tags)) if write else space.touch_read(flat, tags)
        if race.any():
            self.m.fault(inst, thread, "touches tensor memory: a race with another warp with no barrier between")


def handler(m, inst):
    what, parts = inst.parts[1], inst.parts
    if what == "alloc":
        return allocate(m, inst)
    if what == "relinquish_alloc_permit" or what.startswith("fence::"):
        return lambda lanes: None
    if what == "dealloc":

        def dealloc(lanes):
            for slot in np.unique(m.slot[lanes]):
                lane = lanes[m.slot[lanes] == slot][0]
                if m.tmem.taken[slot].pop(int(m.registers[inst.operands[0]][lane]), None) != inst.operands[1].value:
                    m.fault(inst, lane, "gives back tensor memory that was not allocated so")

        return dealloc
    if what in ("ld", "st"):
        return load_or_store(m, inst)
    if what == "wait::ld":

        def wait_load(lanes):
            mine = set(lanes.tolist())
            m.in_flight = [r for r in m.in_flight if not mine & set(r[0].tolist())]

        return wait_load
    if what == "wait::st":
        return lambda lanes: m.stores.wait(lanes, 0)
    if what == "mma" and parts[2:] == ("cta_group::1", "kind::f16"):
        return product(m, inst)
    if what == "commit" and parts[2:4] == ("cta_group::1", "mbarrier::arrive::one"):
        return commit(m, inst)  # of an address in shared memory, though Triton 3.6 does not say so
    raise UnknownPTX(inst.name)


def allocate(m, inst):
    if inst.parts[2:] != ("cta_group::1", "sync", "aligned", "shared::cta", "b32"):
        raise UnknownPTX(inst.name)
    address, columns = inst.operands

    def run(lanes):
        m.whole_warps(inst, lanes)
        first = lanes[::32]
        memory = m.tmem.open()
        data = np.zeros((len(first), 1), np.uint32)
        for i, lane in enumerate(first):
            taken, n = memory.taken[m.slot[lane]], columns.value
            free = [c for c in range(0, COLUMNS, n) if not any(c < f + k and f < c + n for f, k in taken.items())]
            if not free:
                m.fault(inst, lane, f"asks for {n} columns of tensor memory: there are not as many left")
            taken[free[0]], data[i] = n, free[0]
        access(m, inst, "shared", first, m.address(address, first), 4, True, data=data)

    return run


def load_or_store(m, inst):
    """tcgen05.ld and st of a warp: 32x32b, a lane of tensor memory to each thread; 16x32bx2, two parts of 16 lanes."""
    what, sync, aligned, shape, count, kind = inst.parts[1:]
    n = int(count[1:])
    if (sync, aligned, kind) != ("sync", "aligned", "b32") or shape not in ("32x32b", "16x32bx2"):
        raise UnknownPTX(inst.name)
    load = what == "ld"
    address, split = (inst.operands[1], inst.operands[2:]) if load else (inst.operands[0], inst.operands[1:-1])
    registers = inst.operands[0] if load else inst.operands[-1]
    if len(registers) != n or len(split) != (shape == "16x32bx2"):
        raise UnknownPTX(inst.text)

    def run(lanes):
        memory = m.tmem.open()
        for warp in lanes.reshape(m.whole_warps(inst, lanes), 32):
            place = int(m.address(address, warp)[0])
            lane, column = place >> 16, place & 0xFFFF
            own = 32 * (int(m.warp[warp[0]]) % 4)
            thread = np.arange(32)[:, None]
            if shape == "32x32b":
                rows, columns = lane + thread, column + np.arange(n)
            else:
                rows, columns = lane + thread % 16, column + thread // 16 * split[0].value + np.arange(n)
            if rows.min() < own or rows.max() >= own + 32:
                m.fault(
                    inst,
                    warp[0],
                    f"touches lanes {rows.min()} to {rows.max()} of tensor memory: its warp has {own} to {own + 31}",
                )
            index, granules = memory.at(inst, m.slot[warp[0]], rows, columns, warp[0])
            memory.touch(inst, granules, m.tag[warp[:1]], warp[0], not load)
            if load:
                values = memory.words[index]
                for j, r in enumerate(registers):
                    m.registers[r][warp] = values[:, j]
            else:
                memory.words[index] = np.stack([m.registers[r][warp] for r in registers], 1)
                memory.watched.pending[granules] = True

                def done(mask, granules=granules):
                    memory.watched.pending[granules] = False

                m.stores.issue(warp[:1], done)
        if load:
            m.in_flight.append((lanes, set(registers), set(), True))
        else:
            m.stores.commit(lanes)

    return run


def descriptor_of(value):
    """A shared-memory descriptor of sm_100 as sm_90's."""
    swizzle = value >> 61
    if swizzle not in SWIZZLES:
        raise UnknownPTX(f"a shared-memory descriptor of swizzle {swizzle}: {value:#x}")
    return value & ((1 << 46) - 1) | SWIZZLES[swizzle] << 62


def product(m, inst):
    """tcgen05.mma: D in tensor memory [M, N] fp32 = A [M, 16] B [16, N], plus D where the last operand says so."""
    d, a, b, kind, added = inst.operands

    def run(lanes):
        for lane in lanes:
            one(lane)

    def one(lane):
        memory, lanes, slot = m.tmem.open(), np.array([lane]), int(m.slot[lane])
        bits = int(m.registers[kind][lane])
        format_a, format_b = bits >> 7 & 7, bits >> 10 & 7
        major = ["MN" if bits >> i & 1 else "K" for i in (15, 16)]
        columns, rows = (bits >> 17 & 0x3F) << 3, (bits >> 24 & 0x1F) << 4
        if (
            bits >> 4 & 3 != 1
            or format_a != format_b
            or format_a > 1
            or bits >> 13 & 3
            or bits & 15
            or rows not in (64, 128)
        ):
            raise UnknownPTX(f"{inst.name} with an instruction descriptor of {bits:#x}")
        dtype = "bf16" if format_a else "f16"
        row, tag = np.arange(rows)[:, None], m.tag[lanes]
        lane_of_row = row if rows == 128 else row // 16 * 32 + row % 16
        read, left_read = [], np.zeros(0, int)
        if isinstance(a, Address):
            place = int(m.address(a, lanes)[0])
            index, left_read = memory.at(inst, slot, (place >> 16) + lane_of_row, (place & 0xFFFF) + np.arange(8), lane)
            memory.touch(inst, left_read, tag, lane, False)
            left = matrix.floats(np.ascontiguousarray(memory.words[index]).view(np.uint16), dtype)
        else:
            descriptor = descriptor_of(int(m.registers[a][lane]))
            values, where = matrix.read_tile(m, inst, lanes, descriptor, rows, 16, major[0], 2)
            left, read = matrix.floats(values, dtype), [where]
        descriptor = descriptor_of(int(m.registers[b][lane]))
        values, where = matrix.read_tile(m, inst, lanes, descriptor, columns, 16, major[1], 2)
        result = left @ matrix.floats(values, dtype).T
        m.flops += 2 * left.size * columns
        place = int(m.address(d, lanes)[0])
        index, granules = memory.at(
            inst, slot, (place >> 16) + lane_of_row, (place & 0xFFFF) + np.arange(columns), lane
        )
        add = bool(added.value) if isinstance(added, Bits) else bool(m.registers[added][lane])
        watched, accumulator = memory.watched, (lane, place, rows, columns)
        if all(other != accumulator for other, _ in memory.running):
            check(m, inst, watched, granules, tag, lane, add)
        watched.writer[granules], watched.pending[granules] = tag[0], True
        if add:
            result = result + memory.words[index].view(np.float32)
        memory.words[index] = result.astype(np.float32).view(np.uint32)
        where = np.concatenate([*read, where])
        m.shared.reading[where] += 1
        watched.reading[left_read] += 1

        def done():
            m.shared.reading[where] -= 1
            watched.reading[left_read] -= 1
            if all(other != accumulator for other, _ in memory.running):
                watched.pending[granules] = False
                watched.writer[granules], watched.reader[granules] = ORDERED, NEVER

        memory.running.append((accumulator, done))

    return run


def check(m, inst, watched, granules, tag, lane, add):
    """What a product needs that does not follow another of its thread into the same accumulator, of the same shape. One that does runs
    behind the other by itself, whether a commit stands between them or not (PTX ISA 8.7, "Pipelined tcgen05 Instructions")."""
    if watched.pending[granules].any():
        m.fault(inst, lane, "writes tensor memory that a store or a product still writes")
    if add and (watched.writer[granules] == NEVER).any():
        m.fault(inst, lane, "adds to tensor memory that was never written")
    tags = np.broadcast_to(tag, granules.shape)
    if (conflict(watched.writer[granules], tags) | conflict(watched.reader[granules], tags)).any():
        m.fault(inst, lane, "writes tensor memory: a race with another warp with no barrier between")


def commit(m, inst):
    """The mbarrier is arrived at when all products that this thread has issued are complete."""
    address = inst.operands[0]

    def run(lanes):
        memory = m.tmem.open()
        for lane in lanes:
            barrier = matrix.barrier_of(m, inst, lane, m.address(address, np.array([lane]))[0])
            mine = [r for r in memory.running if r[0][0] == lane]

            def arrive(mine=mine, barrier=barrier):
                for product in mine:
                    if product in memory.running:  # else another commit has named it too, which was waited for
                        memory.running.remove(product)
                        product[1]()
                barrier.due -= 1

            barrier.copies.append(arrive)

    return run
