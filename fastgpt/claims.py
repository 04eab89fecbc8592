"""What a checkpoint file says it holds, read before any memory is taken and without running any code of it.

torch.save writes a zip: `data.pkl`, a pickle of protocol 2, and for each tensor's memory a record `data/N`. Each has a CRC-32. torch.load
with weights_only runs no code either, but takes whatever memory the pickle asks for.
"""

import argparse
import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "ByteStorage": torch.uint8, "CharStorage": torch.int8, "ShortStorage": torch.int16, "IntStorage": torch.int32,
    "LongStorage": torch.int64, "BoolStorage": torch.bool,
}  # fmt: skip
OPCODES = set(
    """PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE
    TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS BINGET LONG_BINGET BINPUT LONG_BINPUT GLOBAL REDUCE
    NEWOBJ BUILD BINPERSID""".split()  # noqa: SIM905
)  # of pickle's protocol 2, in which torch.save writes
MOST_PICKLE = 2**24  # bytes; GPT-2 XL's are 350 kB, and a tokenizer of all characters' are 4 MB


class Fault(Exception):
    """Why a file is no checkpoint to go on from."""


class Storage(NamedTuple):
    """What a checkpoint says of a tensor's memory."""

    key: str
    dtype: torch.dtype
    numel: int


class Claim(NamedTuple):
    """What a checkpoint says of a tensor. Its memory is in the file, and it is dense in it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Rebuild:
    """Takes the arguments of torch's _rebuild_tensor_v2, and returns a Claim. It has no attributes that a pickle could set."""

    __slots__ = ()

    def __call__(self, storage, offset, shape, stride, requires_grad=False, hooks=None, metadata=None):
        plain = isinstance(storage, Storage) and not requires_grad and not hooks and not metadata
        numbers = [offset, *shape, *stride]
        if (
            not plain
            or len(shape) != len(stride)
            or len(shape) > 4
            or not all(type(n) is int and n >= 0 for n in numbers)
        ):
            raise Fault("a tensor in it is of no kind that training saves")
        if offset + math.prod(shape) > storage.numel:
            raise Fault(f"a tensor of {tuple(shape)} in it is larger than its memory")
        dense = 1
        for n, step in zip(reversed(shape), reversed(stride), strict=True):
            if n > 1 and step != dense:
                raise Fault(f"a tensor of {tuple(shape)} in it has the strides {tuple(stride)}")
            dense *= n
        return Claim(storage, offset, tuple(shape))


class Encode:
    """Takes the arguments of _codecs.encode, by which protocol 2 writes bytes."""

    __slots__ = ()

    def __call__(self, text, encoding):
        if encoding != "latin1":
            raise Fault(f"it asks for the encoding {encoding!r}")
        return text.encode("latin1")


class Namespace(dict[str, Any]):
    """An argparse.Namespace, as a dict of its names."""

    def __setstate__(self, state):
        if type(state) is not dict or not all(type(name) is str for name in state):
            raise Fault("a Namespace in it has no names")
        self.update(state)


class DType:
    """Takes the arguments of numpy.dtype: a number's."""

    __slots__ = ("numpy",)

    def __init__(self, code, align, copy):
        if code not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
            raise Fault(f"it has a numpy number of the kind {code!r}"[:100])
        self.numpy = np.dtype(code).newbyteorder("<")

    def __setstate__(self, state):
        if state[:5] not in ((3, "<", None, None, None), (3, "|", None, None, None)):
            raise Fault("it has a numpy number of another byte order")


class Scalar:
    """Takes the arguments by which a numpy number is written, and returns Python's number."""

    __slots__ = ()

    def __call__(self, dtype, data):
        if type(dtype) is not DType or type(data) is not bytes or len(data) != dtype.numpy.itemsize:
            raise Fault("a numpy number in it is of no kind that it can be")
        return np.frombuffer(data, dtype.numpy)[0].item()


# What forks of nanoGPT have in their settings, and torch.load must be told of. Here each is a stand-in of its own.
SCALAR = type(np.float64(0)).__reduce__(np.float64(0))[0]
ELSEWHERE: list[Any] = [
    argparse.Namespace, np.dtype, *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"},
    *((SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]  # fmt: skip

KNOWN = {
    ("argparse", "Namespace"): Namespace, ("numpy", "dtype"): DType, ("numpy.core.multiarray", "scalar"): Scalar(),
    ("numpy._core.multiarray", "scalar"): Scalar(),
    ("collections", "OrderedDict"): OrderedDict, ("builtins", "set"): set, ("_codecs", "encode"): Encode(),
    ("torch._utils", "_rebuild_tensor_v2"): Rebuild(), **{("torch", name): dtype for name, dtype in DTYPES.items()},
}  # fmt: skip


class Reader(pickle.Unpickler):
    """Loads a checkpoint's data.pkl with a Claim for each tensor. Runs no code of it, and takes memory for nothing that it only claims.

    `sizes` are the bytes of each record in the file. Raises whatever a damaged pickle raises.
    """

    def __init__(self, data: bytes, sizes: dict[str, int]):
        check_pickle(data)
        super().__init__(io.BytesIO(data))
        self.sizes = sizes

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise Fault(f"it asks for {module}.{name}, which no checkpoint needs")
        return KNOWN[module, name]

    def persistent_load(self, saved: Any) -> Storage:
        _, dtype, key, _, numel = saved
        if (
            not isinstance(dtype, torch.dtype)
            or type(numel) is not int
            or self.sizes.get(f"data/{key}") != numel * dtype.itemsize
        ):
            raise Fault(f"its record {key!r} has another size than it says")
        return Storage(key, dtype, numel)


def check_pickle(data: bytes) -> None:
    """Raise Fault for a pickle that no checkpoint needs, and that would take time or memory out of proportion.

    That is an index beyond those in use, up to which the unpickler takes memory, and tuples of the same tuples of the same tuples: their
    hash, if they are the key of a dict, takes time exponential in their depth, and a deep one's overflows the stack.
    """
    stack: list[
        Any
    ] = []  # for each thing that the unpickler will have there (things in it, its depth); None for a mark
    memo: dict[Any, Any] = {}
    fetched = 0
    for op, arg, _ in pickletools.genops(data):
        if op.name not in OPCODES:
            raise Fault(f"its pickle has the opcode {op.name}")
        items = []
        if pickletools.markobject in op.stack_before:
            while (item := stack.pop()) is not None:
                items.append(item)
        below = [kind for kind in op.stack_before if kind not in (pickletools.markobject, pickletools.stackslice)]
        items += [stack.pop() for _ in below]
        made = (1, 0)
        if "TUPLE" in op.name:
            made = 1 + sum(n for n, _ in items), 1 + max((depth for _, depth in items), default=0)
        elif op.name in ("BINGET", "LONG_BINGET"):
            made = memo[arg]
            fetched += made[0]
        if fetched > MOST_PICKLE or made[1] > 100:
            raise Fault("its pickle has tuples in tuples without end")
        stack += [None if kind is pickletools.markobject else made for kind in op.stack_after]
        if op.name in ("BINPUT", "LONG_BINPUT"):
            if int(arg or 0) > len(memo):
                raise Fault("its pickle has an index that is too large")
            memo[arg] = stack[-1]


def claims(path: Path, check: bool = True) -> dict[str, Any]:
    """The dict in a checkpoint, with a Claim for each tensor. `check`: read all of the file, and compare its checksums. Raises Fault."""
    if not path.is_file():
        raise Fault("not a file")
    try:
        with zipfile.ZipFile(path) as z:
            records = z.infolist()
            if any(r.compress_type != zipfile.ZIP_STORED or r.file_size != r.compress_size for r in records):
                raise Fault("it is compressed; torch.save writes it plain")
            folder = records[0].filename.partition("/")[0] + "/"
            sizes = {r.filename.removeprefix(folder): r.file_size for r in records}
            if len(sizes) < len(records) or sum(sizes.values()) > path.stat().st_size:
                raise Fault("its records overlap")
            if sizes["data.pkl"] > MOST_PICKLE:
                raise Fault(f"its data.pkl has {sizes['data.pkl']:,} bytes")
            if check and (bad := z.testzip()):
                raise Fault(f"the checksum of its record {bad!r} is wrong: the file is damaged")
            tree = Reader(z.read(folder + "data.pkl"), sizes).load()
    except Fault:
        raise
    except Exception as e:  # a damaged file can fail in any way
        raise Fault(
            f"not a readable checkpoint ({type(e).__name__}: {e}); it is truncated, or another program wrote it"
        ) from None
    if not isinstance(tree, dict):
        raise Fault("not a checkpoint of nanoGPT or fastgpt")
    return tree
