"""In place of a GPU: ops of fastgpt on CPU tensors, whose kernels are compiled for an NVIDIA architecture and emulated.

    with Gpu(90) as gpu:
        layer_norm.add_layer_norm(x, branch, weight)

It belongs in a process in which TRITON_INTERPRET was never set: Triton's own library is made for the interpreter there.
"""

import math
from contextlib import ExitStack
from unittest.mock import patch

import torch
import triton
from specialize import arguments_of, label, source
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt import kernels
from fastgpt.kernels import configs
from ptx.machine import Machine
from ptx.matrix import TensorMap
from ptx.parse import parse


def storage_of(t, name):
    """(address, bytes, name) of the memory that a tensor is a view of."""
    return t.untyped_storage().data_ptr(), t.untyped_storage().nbytes(), name


def tensor_map(descriptor, meta):
    """The TensorMap that Triton's launcher would make of a host-side descriptor of a matrix."""
    t, size = descriptor.base, descriptor.base.element_size()
    pitch = descriptor.strides[0] * size
    return TensorMap(t.data_ptr(), size, *descriptor.shape, pitch, tuple(meta["block_size"]), meta["swizzle"])


built = {}  # what was compiled in this process


class Gpu:
    """An emulated GPU of an architecture, 90 for sm_90, while it is entered.

    multiprocessors: how many SMs persistent kernels see. edit(name, ptx) may change a kernel's text before it runs. blocks: of each
    launch only the first so many run, a number or a function of the launch's, for figures, not for results. With `keep` the machines of all
    launches are in `machines`, in order; with `counting` they count memory's traffic.
    """

    def __init__(self, architecture, multiprocessors=2, edit=None, blocks=None, counting=False, keep=False):
        self.architecture, self.multiprocessors, self.edit = architecture, multiprocessors, edit
        self.blocks, self.counting, self.keep = blocks, counting, keep
        self.machines, self.known, self.launched = [], [], []

    def __enter__(self):
        self.stack = ExitStack()
        gpu, adamw = self, kernels.adamw  # at times one with a planted fault
        table_of = adamw.table_of

        def run(kernel, *args, grid, warmup, **options):
            gpu.launch(kernel, args, grid, options)

        def known_table(groups, *args):
            """What a table of addresses leads to may be read and written."""
            tensors = [t for g in groups for column in adamw.lists(g).values() for t in column if t is not None]
            gpu.known = [storage_of(t, "a tensor of the table") for t in tensors]
            return table_of(groups, *args)

        for what in (
            patch.object(JITFunction, "run", run),
            patch.object(configs, "architecture", lambda device: gpu.architecture),
            patch.object(configs, "multiprocessors", lambda device: gpu.multiprocessors),
            patch.object(adamw, "table_of", known_table),
            # The emulator does not need ptxas, which takes a third of compiling: the cubin stays empty. Triton's cache on disk finds a
            # result by the backend's hash too. Another hash keeps the empty cubin from those who want a full one.
            patch.object(CUDABackend, "make_cubin", lambda *args: b""),
            patch.object(CUDABackend, "hash", lambda backend, hash=CUDABackend.hash: f"{hash(backend)}, without ptxas"),
        ):
            self.stack.enter_context(what)
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    def compiled(self, kernel, arguments, options):
        """(kernel, metadata) of a launch."""
        src = source(kernel, arguments)
        key = repr((kernel.cache_key, src.signature, src.constants, src.attrs, options, self.architecture))
        if key not in built:
            binary = triton.compile(
                src, target=GPUTarget("cuda", self.architecture, 32), options={"num_warps": 4, **options}
            )
            built[key] = binary.asm["ptx"], binary.metadata, src.signature
        ptx, metadata, signature = built[key]
        return parse(self.edit(kernel.__name__, ptx) if self.edit else ptx), metadata, signature

    def launch(self, kernel, args, grid, options):
        arguments = arguments_of(kernel, args, options)
        code, metadata, signature = self.compiled(kernel, arguments, options)
        values, allocations, maps = [], list(self.known), iter(getattr(metadata, "tensordesc_meta", None) or ())
        for name, kind in signature.items():
            value = arguments[name]
            if kind == "constexpr":
                continue
            if isinstance(value, TensorDescriptor):
                values += [tensor_map(value, next(maps)), *value.shape, *value.strides]
                allocations.append(storage_of(value.base, name))
            elif torch.is_tensor(value):
                values.append(value.data_ptr())
                allocations.append(storage_of(value, name))
            else:
                values.append(value)
        values += [0] * (len(code.params) - len(values))  # scratch memory, of which our kernels have none
        machine = Machine(code, values, [a for a in allocations if a[1]], metadata.shared, grid)
        machine.counting = self.counting
        machine.label = label(kernel, arguments)
        self.launched.append((kernel.__name__, math.prod(grid)))
        machine.run(self.blocks(math.prod(grid)) if callable(self.blocks) else self.blocks)
        if self.keep:
            self.machines.append(machine)
