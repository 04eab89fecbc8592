"""What --help and --print_config print of a schema's settings."""

import shutil
import textwrap
from collections.abc import Container
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from fastgpt.config import Settings, as_path

MOST = 90  # characters of choices
COLUMN = 30  # where the descriptions begin
WORDS = {str: "TEXT", int: "INT", float: "FLOAT", bool: "BOOL"}


def groups(schema: type[Settings]) -> dict[str, list[str]]:
    """{title: names} of a schema's settings, by its GROUPS: {the first name of a group: title}. A title may come again."""
    found: dict[str, list[str]] = {}
    title = "settings"
    for name in schema.model_fields:
        title = schema.GROUPS.get(name, title)
        found.setdefault(title, []).append(name)
    return found


def choices(field: FieldInfo) -> list[str]:
    """The words that a setting may be, or [] where it is no choice of words."""
    return list(get_args(field.annotation)) if get_origin(field.annotation) is Literal else []


def is_path(field: FieldInfo) -> bool:
    """Whether a setting is a file or a folder."""
    return any(getattr(m, "func", None) is as_path for m in field.metadata)


def kind(field: FieldInfo) -> str:
    """What a setting takes, as --help shows it: {a,b}, INT, PATH, ..."""
    if words := choices(field):
        text = f"{{{','.join(filter(None, words))}}}"
        return text if len(text) <= MOST else "NAME"  # the description then has the names
    if is_path(field):
        return "PATH"
    return "|".join(WORDS[t] for t in get_args(field.annotation) or (field.annotation,) if t in WORDS)


def help_text(schema: type[Settings], prog: str) -> str:
    """What --help prints: every flag with its kind, a line and its default, in groups; then examples."""
    width = min(max(shutil.get_terminal_size().columns, 60), 120)
    lines = [f"usage: {prog} [FILE.py|FILE.toml ...] [--key=value ...]", ""]
    lines += textwrap.wrap(" ".join((schema.__doc__ or "").split()), width)
    for title, names in groups(schema).items():
        lines += ["", f"{title}:"]
        for name in names:
            field = schema.model_fields[name]
            default = field.get_default(call_default_factory=True)
            lines += row(f"--{name}={kind(field)}", f"{field.description} (default: {default!r})", width)
    lines += ["", "help:"]
    lines += row("--print_config", "print all settings as a config file, and do nothing else", width)
    lines += row("--help", "print this", width)
    if schema.EXAMPLES:
        lines += ["", "examples:", *(f"  {line}" for line in schema.EXAMPLES)]
    return "\n".join(lines) + "\n"


def row(flag: str, says: str, width: int) -> list[str]:
    """The lines of a flag."""
    body = textwrap.wrap(says, width - COLUMN, break_on_hyphens=False)
    first = [f"  {flag}"] if len(flag) > COLUMN - 4 else [f"  {flag:{COLUMN - 2}}{body.pop(0)}"]
    return first + [" " * COLUMN + line for line in body]


def config_text(cfg: Settings, given: Container[str], prog: str) -> str:
    """Settings as a config file, which gives the same settings again. What was not given is a comment; but a preset is named."""
    lines = [f"# {prog}: its settings. A line behind # is a default, or the preset's."]
    for title, names in groups(type(cfg)).items():
        lines += ["", f"# ---- {title} ----"]
        for name in names:
            value: Any = getattr(cfg, name)
            named = name == "preset" and value != type(cfg).model_fields[name].default
            default = name not in given and not named
            lines.append(f"{'# ' * default}{name} = {value!r}")
    return "\n".join(lines) + "\n"
