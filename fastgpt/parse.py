"""How config files and flags become settings.

Words of a command line apply from left to right. A config file is read and never executed. A wrong word is refused with a `UserError`
before any work; its message names the nearest right one.
"""

import argparse
import ast
import difflib
import math
import operator
import os
import re
import sys
import time
from collections.abc import Callable, Container
from typing import Any, get_args

from pydantic import ValidationError

from fastgpt import files
from fastgpt.config import QUICKSTART_OUT, Settings, TrainConfig, UserError, preset

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


LONGEST = 100  # characters of a value or a name in a message


def parse(
    schema: type[Settings], argv: list[str], prog: str, base: Callable[[dict[str, Any], bool], dict[str, Any]] | None = None,
) -> tuple[Any, set[str]]:  # fmt: skip
    """(settings of a schema, names that the words and their files gave), of command-line words.

    A word is a config file (nanoGPT's .py, or .toml), `--key=value`, `--key value`, or for a switch `--key` alone; later ones win. What
    nothing gives comes from `base(given values, whether a file was read)`, else from the schema's defaults. Prints the help and exits
    on -h. Raises UserError.
    """
    given, has_file = {}, False  # given: name -> (value, where it was said)
    words = enumerate(argv, 1)
    for i, word in words:
        if word in ("-h", "--help"):
            print(help_text(schema, prog), end="")
            raise SystemExit(0)
        if not word.startswith("--"):
            # An expression in a file may name any setting: it has the value given before, else its default.
            known = {n: f.get_default(call_default_factory=True) for n, f in schema.model_fields.items()}
            known.update({name: value for name, (value, _) in given.items()})
            given.update(read_config(os.path.expanduser(word), schema, known))
            has_file = True
            continue
        key, equals, text = word[2:].partition("=")
        check_key(schema, key, word)
        kind = schema.model_fields[key].annotation
        bare = i == len(argv) or argv[i].startswith("-") or argv[i].endswith((".py", ".toml"))
        if not equals and bare and kind is bool:
            text = "True"
        elif not equals:
            text = next(words, (i, None))[1]  # type: ignore[assignment]
            if text is None or text.startswith("--"):
                raise UserError(f"--{key}: a value is missing; write --{key}=VALUE")
        given[key] = (text if kind is str else literal(text), f"--{key}")
    values = {name: check_value(schema, name, value, where) for name, (value, where) in given.items()}
    return schema(**{**(base(values, has_file) if base else {}), **values}), set(values)


def parse_train(argv: list[str], prog: str = "train.py") -> tuple[TrainConfig, set[str]]:
    """(TrainConfig, names given) of command-line words; see `parse`.

    The words change nanoGPT's defaults, or the preset that they name. Where nothing says what is to be trained they change the preset
    quickstart.
    """
    cfg, given = parse(TrainConfig, argv, prog, train_base)
    if cfg.n_embd % cfg.n_head:
        near = min((h for h in range(1, cfg.n_embd + 1) if cfg.n_embd % h == 0), key=lambda h: abs(h - cfg.n_head))
        raise UserError(f"--n_head={cfg.n_head} does not divide n_embd={cfg.n_embd}; the nearest that does is {near}")
    return cfg, given


def train_base(given: dict[str, Any], has_file: bool) -> dict[str, Any]:
    """The values that a training run's files and flags change: a preset's.

    A config file, --preset, --dataset and --train_data say what is to be trained. So do weights to start from, another run's or GPT-2's:
    they must not go on with the quickstart's text and settings.
    """
    named = has_file or given.keys() & {"preset", "dataset", "train_data"}
    start = given.get("init_from", "scratch")
    own = start == "scratch" or (start in ("resume", "auto") and given.get("out_dir", QUICKSTART_OUT) == QUICKSTART_OUT)
    name = "quickstart" if own and not named else given.get("preset", "")
    return {**preset(name), "preset": name}


def literal(text: str) -> Any:
    """The Python literal that a flag's text is, as in nanoGPT; the text itself where it is none."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text


def check_key(schema: type[Settings], key: str, where: str) -> None:
    """Raise UserError for a name that is no setting."""
    if key not in schema.model_fields:
        near = difflib.get_close_matches(key[:LONGEST], schema.model_fields, n=1, cutoff=0)
        raise UserError(f"{where}: there is no setting {shown(key)}; the nearest is {near[0]!r}")


def check_value(schema: type[Settings], name: str, value: Any, where: str) -> Any:
    """The value in the setting's type. Raises UserError, which names the setting, the value and the nearest right one."""
    try:
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise OverflowError
        return getattr(schema.__pydantic_validator__.validate_assignment(schema.model_construct(), name, value), name)
    except ValidationError as e:
        problem = e.errors()[0]["msg"].lower().removeprefix("input ").removeprefix("value error, ")
    except OverflowError:
        problem = "is not within 64 bits"
    raise UserError(f"{where}: {shown(value)} {problem}; the nearest right value is {nearest(schema, name, value)!r}")


def shown(value: Any) -> str:
    """A value of a file or flag for a message: whatever it is, as text that is not long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists within lists
        return f"this {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def nearest(schema: type[Settings], name: str, value: Any) -> Any:
    """A right value close to a wrong one; the default where none is close."""
    field = schema.model_fields[name]
    kind = next(t for t in (get_args(field.annotation) or (field.annotation,)) if t is not type(None))
    if not isinstance(kind, type):  # a Literal's choices
        return difflib.get_close_matches(shown(value).strip("'"), get_args(field.annotation), n=1, cutoff=0)[0]
    if kind is bool:
        return shown(value).strip("'").lower() in ("1", "1.0", "yes", "y", "on", "true", "t")
    try:
        number = round(float(value)) if kind is int else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        return field.get_default(call_default_factory=True)
    step = 1 if kind is int else 1e-3
    for bound in field.metadata:
        if hasattr(bound, "gt"):
            number = max(number, bound.gt + step)
        if hasattr(bound, "ge"):
            number = max(number, bound.ge)
        if hasattr(bound, "le"):
            number = min(number, bound.le)
        if hasattr(bound, "lt"):
            number = min(number, bound.lt - step)
    return kind(number)


def help_text(schema: type[Settings], prog: str) -> str:
    """What --help prints: every flag with its default and a line."""
    usage = f"{prog} [FILE.py|FILE.toml ...] [--key=value ...]"
    parser = argparse.ArgumentParser(prog, usage=usage, description=schema.__doc__, add_help=False)
    for name, field in schema.model_fields.items():
        kind = getattr(field.annotation, "__name__", "value").upper()
        said = f"{field.description} (default: {field.get_default(call_default_factory=True)!r})"
        parser.add_argument(f"--{name}", metavar=kind, help=said.replace("%", "%%"))
    return parser.format_help()


# ---- config files ----

# A dotted key of TOML with more than a hundred parts. tomllib's time and memory grow with their square, and no setting has two.
PART = r"""(?:[\w-]+|"[^"\n]*"|'[^'\n]*')"""
MANY_PARTS = re.compile(rf"(?<![\w-]){PART}(?:[ \t]*\.[ \t]*{PART}){{100}}")

BINARY = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip


def read_config(path: str, schema: type[Settings], known: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """{name: (value, where)} of a config file: TOML by its ending, else nanoGPT's assignments. Raises UserError."""
    if path.endswith(".json"):
        return read_start(path, schema)
    try:
        text = files.read_text(path, files.CONFIG)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file (flags are written --key=value)") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read as a config file: {e.strerror}") from None
    print(f"Overriding config with {path}:\n{text}")
    if path.endswith(".toml"):
        try:
            if MANY_PARTS.search(text):
                raise ValueError("a key has more than 100 parts")
            found = {key: (value, path) for key, value in tomllib.loads(text).items()}
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}: not TOML: {e}") from None
    else:
        found = read_assignments(path, text, known, schema.model_fields)
    for key, (_, where) in found.items():
        check_key(schema, key, where)
    return found


def read_start(path: str, schema: type[Settings]) -> dict[str, tuple[Any, str]]:
    """{name: (value, where)} of a run's config.json: what was given when it began, and no more. Raises UserError."""
    try:
        given = files.read_json(path, files.DATA)["given"]
        found = {str(name): (value, path) for name, value in given.items()}
    except OSError as e:
        raise UserError(f"{path}: cannot be read as a run's config.json: {e.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{path}: not the config.json of a run ({type(e).__name__}: {e})") from None
    for key in found:
        check_key(schema, key, path)
    print(
        f"Overriding config with {path}: " + " ".join(f"--{name}={shown(value)}" for name, (value, _) in found.items())
    )
    return found


def read_assignments(
    path: str, text: str, known: dict[str, Any], settings: Container[str]
) -> dict[str, tuple[Any, str]]:
    """{name: (value, where)} of Python text made of assignments; imports and docstrings are passed over.

    As in nanoGPT, a name that is no setting may help in later lines: it is left out where one uses it.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
        raise UserError(f"{path}, line {getattr(e, 'lineno', None) or 1}: not Python: {getattr(e, 'msg', e)}") from None
    known, found = dict(known), {}
    for node in tree.body:
        where = f"{path}, line {node.lineno}"
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if docstring or isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        assigns = isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None
        if not assigns or not all(isinstance(t, ast.Name) for t in targets):
            raise UserError(f"{where}: a config file is read, not run: only assignments `name = value` may stand in it")
        try:
            value = evaluate(node.value, known, where)  # type: ignore[attr-defined]
        except (TypeError, ValueError, ArithmeticError, RecursionError) as e:
            raise UserError(f"{where}: {e}") from None
        for target in targets:
            known[target.id] = value
            found[target.id] = (value, where)
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    return {name: v for name, v in found.items() if name in settings or name not in used}


def evaluate(node: ast.expr, known: dict[str, Any], where: str) -> Any:
    """The value of an expression of literals, arithmetic, known names and str(time.time()). Raises UserError for any other."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, bool, str, type(None))):
        return node.value
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    if isinstance(node, ast.Call) and ast.unparse(node) == "time.time()":
        return time.time()
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "str" and len(node.args) == 1 and not node.keywords:
        return str(evaluate(node.args[0], known, where))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd, ast.Not)):
        value = evaluate(node.operand, known, where)
        return not value if isinstance(node.op, ast.Not) else -value if isinstance(node.op, ast.USub) else +value
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        left, right = evaluate(node.left, known, where), evaluate(node.right, known, where)
        # Text is only ever added to, and no value grows large: a file must not be able to fill the memory.
        text = isinstance(left, str) or isinstance(right, str)
        if (not text or isinstance(node.op, ast.Add)) and not (isinstance(node.op, ast.Pow) and abs(right) > 64):
            value = BINARY[type(node.op)](left, right)
            if (len(value) if isinstance(value, str) else abs(value) / 2**50) < 10_000:
                return value
    raise UserError(
        f"{where}: {ast.unparse(node)!r} is not read: a value is made of literals, arithmetic, earlier names and str(time.time())"
    )
