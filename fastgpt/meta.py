"""A dataset's meta.pkl: whose tokens its files hold. Files of others are hostile until checked, so pickle never reads one."""

import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt import files
from fastgpt.config import UserError
from fastgpt.parse import shown

ATOMS = {
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT",
    "BINFLOAT", "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip
ATOM_TYPES = (str, bytes, int, float, bool, type(None))
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
SCALAR = re.compile(r"[iuf][1248]|b1|U\d")  # the dtypes of NumPy's numbers and short texts
ORDERS = {"<": "<", ">": ">", "|": "<"}  # byte orders; | is that of single bytes
MOST_VALUES = 2_000_000  # a vocabulary of 200,000 has 1.2 million
MOST_COLLECTIONS = 100_000


def plain_pickle(data: bytes) -> Any:
    """What a pickle holds: dicts, lists and tuples of text, bytes, numbers, bool and None. Raises an exception of any kind for others.

    pickle itself is not called, and so no code of the file runs. An OrderedDict becomes a dict, and a NumPy scalar the number or text that
    it is. Keys are atoms: no key takes more than one look.
    """
    stack, marks, memo, collections = [], [], {}, 0

    def popped(n=None):  # the last n values of the stack, or those behind the last mark
        at = len(stack) - n if n is not None else marks.pop()
        found = stack[at:]
        if at < 0 or (n is not None and len(found) != n):
            raise pickle.UnpicklingError("its stack is empty")
        del stack[at:]
        return found

    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        # Each of these is a byte or a few, and takes up to a hundred of memory.
        collections += name in ("MARK", "REDUCE") or name.startswith("EMPTY_") or "TUPLE" in name or "GLOBAL" in name
        if collections > MOST_COLLECTIONS or count > MOST_VALUES:
            raise pickle.UnpicklingError(
                f"it has more than {MOST_COLLECTIONS:,} collections, or {MOST_VALUES:,} values"
            )
        if name in ATOMS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[name])
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(popped(int(name[5:]) if name[5:] else None)))
        elif name == "LIST":
            stack.append(popped())
        elif name in ("APPEND", "APPENDS"):
            values = popped(1 if name == "APPEND" else None)
            of_type(stack[-1], list).extend(values)
        elif name in ("DICT", "SETITEM", "SETITEMS"):
            values = popped(2 if name == "SETITEM" else None)
            if name == "DICT":
                stack.append({})
            of_type(stack[-1], dict).update(zip(map(as_key, values[::2]), values[1::2], strict=True))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(Global(str(argument) if name == "GLOBAL" else " ".join(popped(2))))
        elif name == "REDUCE":
            f, arguments = popped(2)
            stack.append(of_type(f, Global).called(of_type(arguments, tuple)))
        elif name == "BUILD":
            (state,) = popped(1)
            of_type(stack[-1], Dtype).order = ORDERS[of_type(state[1], str)]
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise pickle.UnpicklingError(f"it has {name}{f' {shown(argument)}' if argument else ''}")


def of_type(value: Any, kind: type) -> Any:
    """The value. Raises UnpicklingError if it is not of exactly this type."""
    if type(value) is not kind:
        raise pickle.UnpicklingError(f"it has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def as_key(value: Any) -> Any:
    """The value. Raises UnpicklingError if it is no atom: the hash of a tuple may take forever."""
    if type(value) not in ATOM_TYPES:
        raise pickle.UnpicklingError(f"it has a {type(value).__name__} as a key")
    return value


class Dtype:
    """A NumPy dtype as a pickle describes it: its text, such as i8, and its byte order."""

    def __init__(self, text: str):
        self.text, self.order = text, "<"


class Global:
    """A name in a pickle that stands for a function or class; one of those that are known, and replaced by code of ours."""

    def __init__(self, name: str):
        self.name = name.replace("numpy._core", "numpy.core")  # NumPy 2's name of it
        if self.name not in (
            "collections OrderedDict",
            "numpy dtype",
            "numpy.core.multiarray scalar",
            "_codecs encode",
        ):
            raise pickle.UnpicklingError(f"it has {shown(name)}")

    def called(self, arguments: tuple) -> Any:
        """What a call of it gives. Raises an exception of any kind for arguments that are not such a pickle's."""
        if self.name == "collections OrderedDict" and not arguments:
            return {}
        if self.name == "numpy dtype" and SCALAR.fullmatch(arguments[0]):
            return Dtype(arguments[0])
        if self.name == "_codecs encode" and len(arguments[0]) < 64:  # how protocol 2 writes a scalar's bytes
            return of_type(arguments[0], str).encode("latin1")
        if self.name == "numpy.core.multiarray scalar":
            dtype, content = of_type(arguments[0], Dtype), of_type(arguments[1], bytes)
            (value,) = np.frombuffer(content, dtype.order + dtype.text).tolist()
            return value
        raise pickle.UnpicklingError(f"it calls {self.name} with other arguments than those of such data")


def check_meta(meta: Any) -> dict[str, Any]:
    """The dict of a meta.pkl, if it is one. Raises ValueError that says why not."""
    if type(meta) is not dict or type(meta.get("vocab_size")) is not int or not 0 < meta["vocab_size"] < 2**31:
        raise ValueError("it has no vocab_size, a number of tokens")
    for name, value in meta.items():
        inside = value.values() if type(value) is dict else value if type(value) in (list, tuple) else [value]
        if not all(type(x) in ATOM_TYPES for x in inside):
            raise ValueError(f"its {shown(name)} holds more than text and numbers")
    if type(meta.get("tokenizer", "")) is not str:
        raise ValueError(f"its tokenizer is {shown(meta['tokenizer'])}")
    return meta


def load_meta(folder: str | Path) -> dict[str, Any] | None:
    """The dict in a folder's meta.pkl, or None without one. Raises UserError for anything but plain data."""
    path = Path(folder) / "meta.pkl"
    try:
        return check_meta(plain_pickle(files.read(path, files.DATA)))
    except FileNotFoundError:
        return None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except Exception as e:  # a pickle can fail in any way
        raise UserError(
            f"{path}: not the meta.pkl of a dataset ({type(e).__name__}: {e}); prepare the data again"
        ) from None
