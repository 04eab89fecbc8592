"""Config files, nanoGPT's Python and TOML: they are read, and never executed.

Of Python this reads assignments, `if`, and expressions that have no effect. What it reads has the value that Python gives it; anything else
is refused with its line and a reason. A file cannot take long or fill the memory: each value and the whole work are bounded.
"""

import ast
import operator
import re
import sys
import time
from collections.abc import Callable, Container
from typing import Any, get_args

import torch

from fastgpt import files
from fastgpt.config import Preset, UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Found = dict[str, tuple[Any, str]]  # name: (value, where it was said)


def read(path: str, settings: Container[str], known: dict[str, Any], say: Callable[[str], Any]) -> Found:
    """What a config file says, TOML by its ending. known: the values that a line of Python may name. Raises UserError."""
    if path.endswith(".json"):
        return read_start(path, say)
    try:
        text = files.read_text(path, files.CONFIG).removeprefix("\ufeff")  # with which some Windows editors begin
    except FileNotFoundError:
        preset = path in get_args(Preset)
        hint = f"; the preset of this name is --preset={path}" if preset else " (flags are written --key=value)"
        raise UserError(f"{path}: no such config file{hint}") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read as a config file: {e.strerror}") from None
    say(f"Overriding config with {path}:\n{text}")
    return read_toml(path, text) if path.endswith(".toml") else Reader(path, known).read(text, settings)


def read_start(path: str, say: Callable[[str], Any]) -> Found:
    """What was given to a run when it began, and no more, of its config.json; but no leave to overwrite. Raises UserError."""
    try:
        last = files.read_json(path, files.DATA)
        given = [*last.get("earlier", []), last][0]["given"]
        found = {str(name): (value, path) for name, value in given.items() if name != "overwrite"}
    except OSError as e:
        raise UserError(f"{path}: cannot be read as a run's config.json: {e.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{path}: not the config.json of a run ({type(e).__name__}: {e})") from None
    say(f"Overriding config with {path}: " + " ".join(f"--{name}={value!r:.100}" for name, (value, _) in found.items()))
    return found


# ---- TOML ----

# A dotted key of TOML with more than a hundred parts. tomllib's time and memory grow with their square, and no setting has two.
PART = r"""(?:[\w-]+|"[^"\n]*"|'[^'\n]*')"""
MANY_PARTS = re.compile(rf"(?<![\w-]){PART}(?:[ \t]*\.[ \t]*{PART}){{100}}")


def read_toml(path: str, text: str) -> Found:
    """The settings in a TOML text. They may stand in tables, such as [model], whose names mean nothing. Raises UserError."""
    try:
        if MANY_PARTS.search(text):
            raise ValueError("a key has more than 100 parts")
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not TOML: {e}") from None
    found: Found = {}
    for key, value in tree.items():
        place = f" in [{key}]" * isinstance(value, dict)
        for name, inner in value.items() if isinstance(value, dict) else [(key, value)]:
            if isinstance(inner, dict):
                raise UserError(
                    f"{path}{place}: {name!r} is a table in a table; settings stand in one table, or in none"
                )
            if name in found:
                raise UserError(
                    f"{path}: {name!r} stands{found[name][1].removeprefix(path) or ' at the top'} and{place}"
                )
            found[name] = inner, f"{path}{place}"
    return found


# ---- Python ----

MOST = 10_000  # characters and elements of a value, those of its elements included
MOST_WORK = 1_000_000  # of all values of a file together
WIDEST = 1000  # characters to which a number may be formatted
FORMAT = re.compile(r"(?:.?[<>=^])?[ +-]?#?0?(\d{0,9})[,_]?(?:\.(\d{1,9}))?[bdeEfFgGosxX%]?", re.DOTALL)

OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
    ast.LShift: operator.lshift, ast.RShift: operator.rshift,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_,
}  # fmt: skip
CALLS: dict[str, Callable[..., Any]] = {
    "str": str, "int": int, "float": float, "bool": bool, "abs": abs, "round": round, "min": min, "max": max, "len": len,
    "time.time": time.time, "torch.cuda.is_available": torch.cuda.is_available,
}  # fmt: skip


class Unread(Exception):
    """A line that is not read; the message says why."""


class Reader:
    """Reads the Python of one file. `known`: the values of all names so far; `found`: those that the file gave, with their lines."""

    def __init__(self, path: str, known: dict[str, Any]):
        self.path, self.known, self.work = path, dict(known), 0
        self.found: Found = {}

    def read(self, text: str, settings: Container[str]) -> Found:
        """The names that a text gives. One that is no setting may help: it is left out if a line uses it, or if it is a collection."""
        self.line = 1
        try:
            tree = ast.parse(text)
            self.run(tree.body)
        except (SyntaxError, MemoryError) as e:
            line, why = getattr(e, "lineno", None) or self.line, f"not Python: {getattr(e, 'msg', e)}"
        except RecursionError:
            line, why = self.line, "it is nested too deeply"
        except (ValueError, TypeError, ArithmeticError, LookupError) as e:
            line, why = self.line, f"{type(e).__name__}: {e}"
        except Unread as e:
            line, why = self.line, str(e)
        else:
            used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
            helps = (tuple, list, dict)
            return {k: v for k, v in self.found.items() if k in settings or not (k in used or isinstance(v[0], helps))}
        raise UserError(f"{self.path}, line {line}: {why}")

    def run(self, body: list[ast.stmt]) -> None:
        """Take statements for what they say. Raises Unread, and what Python raises."""
        for node in body:
            self.line = node.lineno
            match node:
                case ast.Import(names=names) | ast.ImportFrom(names=names):  # for what is read without it
                    bound = {alias.asname or alias.name.partition(".")[0] for alias in names}
                    if bound & {"*", *self.known, *CALLS}:
                        raise Unread(
                            f"{short(node)} is not read: nothing is taken from another file; give both files, one after the other"
                        )
                case ast.Pass() | ast.Expr(value=ast.Constant()):
                    pass
                case ast.If():
                    self.run(node.body if self.value(node.test) else node.orelse)
                case ast.Assign():
                    value = self.value(node.value)
                    for target in node.targets:
                        self.assign(target, value)
                case ast.AnnAssign(value=ast.expr() as value):
                    self.assign(node.target, self.value(value))
                case ast.AugAssign(target=ast.Name(id=name)):
                    value = self.value(ast.BinOp(ast.Name(name, ast.Load()), node.op, node.value))
                    if isinstance(value, list):
                        raise Unread(f"a list is not changed in place: write {name} = {name} + ...")
                    self.assign(node.target, value)
                case _:
                    raise Unread(
                        "a config file is read, not run: only `name = value`, `if` and imports may stand in it"
                    )

    def assign(self, target: ast.expr, value: Any) -> None:
        names = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
        if not all(isinstance(name, ast.Name) for name in names):
            raise Unread(f"{short(target)} is not assigned to: only names are")
        if names == [target]:
            value = [value]
        elif not isinstance(value, (tuple, list, str)) or len(value) != len(names):
            raise Unread(f"{short(target)} takes {len(names)} values")
        for name, one in zip(names, value, strict=True):
            self.known[name.id] = one  # type: ignore[attr-defined]
            self.found[name.id] = one, f"{self.path}, line {self.line}"  # type: ignore[attr-defined]

    def value(self, node: ast.expr) -> Any:
        """The value of an expression, within bounds. Raises Unread, and what Python raises."""
        value = self.evaluate(node)
        self.work += size(value)
        if self.work > MOST_WORK:
            raise Unread("the file says more than is read of one")
        return value

    def evaluate(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None):
                return node.value
            case ast.Name(id=name):
                if name in self.known:
                    return self.known[name]
                raise Unread(f"{name!r} has no value here: earlier lines and settings have")
            case ast.Tuple() | ast.List():
                values = [self.value(n) for n in node.elts]
                return values if isinstance(node, ast.List) else tuple(values)
            case ast.Dict(keys=keys) if None not in keys:
                return {self.value(k): self.value(v) for k, v in zip(keys, node.values, strict=True)}  # type: ignore[arg-type]
            case ast.Subscript(slice=ast.Slice() as s):
                bounds = [n and self.value(n) for n in (s.lower, s.upper, s.step)]
                return self.value(node.value)[slice(*bounds)]
            case ast.Subscript():
                return self.value(node.value)[self.value(node.slice)]
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Not()):
                return OPERATORS[type(node.op)](self.value(node.operand))
            case ast.BinOp() if type(node.op) in OPERATORS:
                return self.compute(node, self.value(node.left), self.value(node.right))
            case ast.BoolOp():
                for n in node.values:
                    value = self.value(n)
                    if bool(value) is isinstance(node.op, ast.Or):
                        break
                return value
            case ast.IfExp():
                return self.value(node.body if self.value(node.test) else node.orelse)
            case ast.Compare():
                return self.compare(node)
            case ast.JoinedStr():
                return "".join(self.value(n) for n in node.values)
            case ast.FormattedValue():
                return self.format(node)
            case ast.Call(keywords=[]):
                return self.call(node)
        raise Unread(
            f"{short(node)} is not read: a value is made of literals, arithmetic, comparisons and earlier names"
        )

    def compute(self, node: ast.BinOp, left: Any, right: Any) -> Any:
        """An operator's value, where it cannot be large before its size is looked at."""
        whole = isinstance(left, int) and isinstance(right, int)
        if isinstance(node.op, ast.Mod) and isinstance(left, str):
            raise Unread(f"{short(node)} is not read: write an f-string")
        if isinstance(node.op, (ast.Pow, ast.LShift)) and whole and right > 64:
            raise Unread(f"{short(node)} is too large")
        if isinstance(node.op, ast.Mult):
            for times, value in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(value, (str, list, tuple)) and times * len(value) > MOST:
                    raise Unread(f"{short(node)} is too large")
        return OPERATORS[type(node.op)](left, right)

    def compare(self, node: ast.Compare) -> Any:
        left = self.value(node.left)
        for op, n in zip(node.ops, node.comparators, strict=True):
            right = self.value(n)
            if isinstance(op, (ast.Is, ast.IsNot)) and not any(v is None or isinstance(v, bool) for v in (left, right)):
                raise Unread(f"{short(node)} is not read: write == or !=")
            if not OPERATORS[type(op)](left, right):
                return False
            left = right
        return True

    def format(self, node: ast.FormattedValue) -> str:
        """The text of a replacement field of an f-string."""
        value = self.value(node.value)
        spec = self.value(node.format_spec) if node.format_spec else ""
        if node.conversion != -1:
            conversions: dict[str, Callable[[Any], str]] = {"s": str, "r": repr, "a": ascii}
            value = conversions[chr(node.conversion)](value)
        found = FORMAT.fullmatch(spec)
        if not found or any(int(n or 0) > WIDEST for n in found.groups()):
            raise Unread(f"the format {spec[:100]!r} is not read")
        return format(value, spec)

    def call(self, node: ast.Call) -> Any:
        name = ast.unparse(node.func) if isinstance(node.func, (ast.Name, ast.Attribute)) else ""
        if name not in CALLS or name.split(".")[0] in self.known:
            raise Unread(f"{short(node)} is not called: a file is read, not run; what is called is {', '.join(CALLS)}")
        args = [self.value(n) for n in node.args]
        if name == "round" and len(args) > 1 and abs(args[1]) > WIDEST:
            raise Unread(f"{short(node)} is too large")
        return CALLS[name](*args)


def size(value: Any) -> int:
    """The characters and elements of a value. Raises Unread for more than MOST, for a long integer, and for other types."""
    todo, total = [value], 0
    while todo:
        one = todo.pop()
        if isinstance(one, int) and abs(one) >= 2**64:
            raise Unread("an integer is not within 64 bits")
        if not isinstance(one, (int, float, str, type(None), list, tuple, dict)):
            raise Unread(f"a {type(one).__name__} is no value of a setting")
        total += 1 + (len(one) if isinstance(one, (str, list, tuple, dict)) else 0)
        if total > MOST:
            raise Unread(f"a value has more than {MOST:,} characters or elements")
        if isinstance(one, dict):
            todo += [*one, *one.values()]
        elif isinstance(one, (list, tuple)):
            todo += one
    return total


def short(node: ast.AST) -> str:
    """An expression for a message."""
    text = ast.unparse(node)
    return repr(text if len(text) <= 100 else f"{text[:100]}...")
