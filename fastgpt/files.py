"""Files that outlive a kill, and the lock on a run's folder."""

import contextlib
import errno
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastgpt.config import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file to write, which takes the place of `path` when the block ends well: whole and on the disk, or not at all.

    It has a name that nobody knows before, and is made anew: no link is followed. Such files that a killed process left in the folder are
    removed first, so only one process at a time may write there: see `lock`.
    """
    for left in path.parent.glob(f".{'?' * 16}.part"):
        left.unlink(missing_ok=True)
    part = temporary(path)
    try:
        with open(part, "xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def temporary(path: Path) -> Path:
    """A name for a file that is to take the place of `path`."""
    return path.with_name(f".{secrets.token_hex(8)}.part")


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


@contextlib.contextmanager
def lock(out_dir: str | Path) -> Iterator[None]:
    """Hold a folder, so that no second run writes there. Raises UserError, which names the process that holds it.

    The system releases the lock when the process ends, however it ends. The file .lock may then stay; it locks nothing.
    """
    path = Path(out_dir) / ".lock"
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as e:
            raise UserError(f"{path}: cannot be opened ({e.strerror}); remove it, or give another --out_dir") from None
        with os.fdopen(fd, "r+b", buffering=0) as f:
            locked = try_lock(f, path)
            if locked and not same_file(f, path):  # its holder removed it between the two calls
                continue
            if locked:
                with contextlib.suppress(OSError):  # on a full disk the lock holds too, without a name
                    f.truncate()
                    f.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}".encode())
            try:
                yield
            finally:
                if locked:
                    with contextlib.suppress(OSError):  # in a folder that became read-only it stays
                        path.unlink()
            return


def try_lock(f: BinaryIO, path: Path) -> bool:
    """Lock a file, and return whether its file system has locks. Raises UserError if another process holds it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = f.read(200).decode(errors="replace") or "another process"
        raise UserError(
            f"--out_dir={path.parent}: another run writes there ({holder}); wait for its end, or give another --out_dir"
        ) from None
    except OSError as e:
        print(f"{path.parent}: not locked ({e.strerror}); two runs in this folder would overwrite each other's files")
        return False
    return True


def same_file(f: BinaryIO, path: Path) -> bool:
    """Whether a path still names an open file."""
    try:
        return os.path.samestat(os.fstat(f.fileno()), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
