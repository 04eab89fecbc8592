"""How files are read that may be anything, and how fastgpt's own results are kept.

`read` gives the bytes of a regular file, or an OSError whose `strerror` says why not: it never waits, as a pipe would, and never takes more
memory than it was told. What lies in the cache folder is believed by later runs, so only its owner may write there.
"""

import errno
import functools
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from fastgpt.config import UserError, cache_folder

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
    with replacing(path, private=True) as file:
        file.write(text.encode())


@contextmanager
def replacing(path: Path, private: bool = False) -> Iterator[BinaryIO]:
    """A new file to write, which takes the place of `path` when the block ends well: whole and on the disk, or not at all.

    It has a name that nobody knows before, and is made anew: no link is followed. Only this user can read it, with `private`. A device, and
    a link to a pipe, as /dev/stdout may be, is written to: root could replace it.
    """
    if path.is_char_device() or (path.is_symlink() and path.is_fifo()):
        with open(path, "wb") as f:
            yield f
        return
    part = temporary(path)
    try:
        with open(part, "xb", opener=lambda name, how: os.open(name, how, 0o600 if private else 0o666)) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def write(path: Path, content: bytes, flag: str) -> None:
    """Write a file that a flag names, whole or not at all, and its folder if there is none. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as f:
            f.write(content)
    except OSError as e:
        raise UserError(f"{flag}: {path} cannot be written ({e.strerror})") from None


def temporary(path: Path) -> Path:
    """A name for a file that is to take the place of `path`."""
    return path.with_name(f".{secrets.token_hex(8)}.part")


def remove_parts(folder: Path) -> None:
    """Remove what killed processes left of files that they wrote. Nobody else may be writing in the folder."""
    for part in folder.glob(f".{'?' * 16}.part"):
        part.unlink(missing_ok=True)


def link(path: Path, name: Path) -> None:
    """Give a file a second name, in place of what has it; a copy where the file system has no hard links."""
    part = temporary(name)
    try:
        os.link(path, part)
        os.replace(part, name)
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        with replacing(name) as f, open(path, "rb") as whole:
            shutil.copyfileobj(whole, f)
    finally:
        part.unlink(missing_ok=True)  # it stays where both names were the file's already


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk: a file's own fsync does not."""
    if os.name == "nt":  # Windows opens no folder
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno != errno.EINVAL:  # some network file systems have no such call for folders
            raise
    finally:
        os.close(fd)


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
