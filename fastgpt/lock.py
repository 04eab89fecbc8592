"""The lock on a run's folder."""

import contextlib
import os
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
def lock(out_dir: str | Path, flag: str = "--out_dir") -> Iterator[None]:
    """Hold a folder, which `flag` has named, so that no second run writes there. Raises UserError, which names the process that holds it.

    The system releases the lock when the process ends, however it ends. The file .lock may then stay; it locks nothing.
    """
    path = Path(out_dir) / ".lock"
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as e:
            raise UserError(f"{path}: cannot be opened ({e.strerror}); remove it, or give another {flag}") from None
        with os.fdopen(fd, "r+b", buffering=0) as f:
            locked = try_lock(f, path, flag)
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


def try_lock(f: BinaryIO, path: Path, flag: str) -> bool:
    """Lock a file, and return whether its file system has locks. Raises UserError if another process holds it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = f.read(200).decode(errors="replace") or "another process"
        raise UserError(
            f"{flag}={path.parent}: another run writes there ({holder}); wait for its end, or give another {flag}"
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
