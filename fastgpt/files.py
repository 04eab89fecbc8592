"""How files are read that may be anything, and how fastgpt's own results are kept.

`read` gives the bytes of a regular file, or an OSError whose `strerror` says why not: it never waits, as a pipe would, and never takes more
memory than it was told. What lies in the cache folder is believed by later runs, so only its owner may write there.
"""

import errno
import functools
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from fastgpt.config import cache_folder

CONFIG = 2**16  # bytes that a config file may have
KEPT = 2**20  # or a file of the cache
DATA = 2**24  # or any other that is read as a whole: a prompt, a meta.pkl, a benchmark's result


class NotOurs(OSError):
    """A folder of the cache where others can write: nothing in it is believed."""


@contextmanager
def opened(path: str | Path) -> Iterator[FileIO]:
    """A regular file, open for reading, without a buffer. Raises OSError for anything else."""
    try:
        check_kind(os.stat(path))  # before it is opened: to open a device may already do something
        flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
        file = open(path, "rb", buffering=0, opener=lambda name, wanted: os.open(name, wanted | flags))
    except ValueError:
        raise OSError(errno.EINVAL, "there is a NUL in its name") from None
    with file:
        check_kind(os.fstat(file.fileno()))
        yield file


def check_kind(found: os.stat_result) -> None:
    """Raise OSError for what is no regular file."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, f"it is {kinds.get(stat.S_IFMT(found.st_mode), 'a device')}, and no file")


def read(path: str | Path, most: int) -> bytes:
    """All of a file. Raises OSError, also if it has more than `most` bytes."""
    data = b""
    with opened(path) as file:
        while part := file.read(most + 1 - len(data)):
            data += part
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than the {most:,} bytes that are read of such a file")
    return data


def read_text(path: str | Path, most: int) -> str:
    """All of a UTF-8 text file, its lines ended by newlines. Raises OSError."""
    try:
        return read(path, most).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as e:
        raise OSError(errno.EILSEQ, f"it is no UTF-8 text ({e.reason} at byte {e.start})") from None


def read_json(path: str | Path, most: int = KEPT) -> Any:
    """What a JSON file holds. Raises OSError if it cannot be read, or must not be believed; and ValueError if it is no JSON."""
    guard(path)
    try:
        return json.loads(read_text(path, most))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_json(path: Path, contents: Any) -> None:
    """Write a JSON file, completely or not at all. Raises OSError.

    The file that takes its place has a name that nobody can foresee, so that no link lies in wait for it.
    """
    text = json.dumps(contents, indent=1)
    guard(path, make=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    number, part = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    try:
        with open(number, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def guard(path: str | Path, make: bool = False) -> None:
    """Raise NotOurs if a path is in the cache, and others than this user and root can write there. make: make its folder, if there is none.

    A path outside of the cache is the user's own to judge.
    """
    root, folder = cache_folder(), Path(path).parent
    if root not in (folder, *folder.parents):
        return
    for place in (root, folder):
        if make:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.stat(place)
        if os.name != "posix":
            continue
        if found.st_uid not in (os.geteuid(), 0):
            raise NotOurs(errno.EPERM, f"{place} belongs to another user")
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise NotOurs(
                errno.EPERM, f"others can write into {place}; if you trust what is there, chmod -R go-w {root}"
            )


@functools.cache
def say_once(line: str) -> None:
    """Print a line, but not again: as many results may be refused for one reason."""
    print(line)
