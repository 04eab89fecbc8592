"""What a command does when it is told to stop: SIGINT (Ctrl-C), SIGTERM, SIGHUP, SIGUSR1.

Until a command begins, it ends at once. While it runs, `Stopped` is raised. While a run trains, the signal waits until the iteration is
finished and saved (`deferred`). Each way ends with one line and status 128 + the signal. A second signal ends the process at once.

This module imports nothing that takes time: `listen` is called before anything else.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """The process was told to stop by a signal. The message says what was done."""

    def __init__(self, number: int, message: str = "stopped"):
        super().__init__(f"{name(number)}: {message}")
        self.status = 128 + number


class _State:
    received = 0  # the first signal's number
    running = waits = False


def name(number: int) -> str:
    """A signal's name, such as SIGTERM."""
    return signal.Signals(number).name


def listen() -> None:
    """Handle the signals from now on. One that the parent process ignores, as nohup does SIGHUP, remains ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


@contextmanager
def raised() -> Iterator[None]:
    """Within this context a signal raises `Stopped`."""
    _State.running = True
    try:
        yield
    finally:
        _State.running = False


@contextmanager
def deferred() -> Iterator[None]:
    """Within this context a signal raises nothing: the block asks for `received`."""
    _State.waits = True
    try:
        yield
    finally:
        _State.waits = False


def received() -> int:
    """The number of the signal that waits, or 0."""
    if _State.received:
        _end_at_next()
    return _State.received


def _end_at_next() -> None:
    """From now on the system ends the process at the next signal, whatever it waits for."""
    for number in SIGNALS:
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.SIG_DFL)


def _handle(number: int, frame: FrameType | None) -> None:
    again, _State.received = _State.received, number
    if again or not _State.running:
        _say(f"{name(number)}: stopped")
        os._exit(128 + number)
    if not _State.waits:
        _end_at_next()
        raise Stopped(number)
    _say(f"{name(number)}: the run stops when this iteration is finished and saved; a second signal ends it at once")


def _say(line: str) -> None:
    """Write a line to stderr. In a signal's handler print could meet its own half-written buffer."""
    if os.environ.get("RANK", "0") == "0":
        try:
            os.write(2, f"\nfastgpt: {line}\n".encode())
        except OSError:  # the terminal is closed: nothing that comes may fail by it
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
