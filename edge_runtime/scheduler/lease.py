"""The right to train: inference goes first, across all processes of a device.

Two files are locked with ``flock``, which the kernel releases when a process ends, however it ends:

* inference holds both, shared, for the length of one generation;
* training takes ``wanted`` alone, which it gets only while no inference runs or waits, then ``running``, gives
  ``wanted`` back, and runs one step.

So a generation that begins during a step waits for that step and no longer: while it waits it holds ``wanted``, and
the next step cannot begin.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from edge_runtime.config import state_directory
from edge_runtime.formats.errors import UserError

if sys.platform != "win32":  # inference needs no lease there, because nothing can train
    import fcntl

WANTED_FILE, RUNNING_FILE = "wanted", "running"
POLL_S = 0.02


def lease_directory() -> Path:
    """Where the two files of this machine lie."""
    return state_directory() / "lease"


@contextlib.contextmanager
def inference_lease(
    directory: Path | None = None, *, warn: Callable[[str], None] = lambda line: None
) -> Iterator[None]:
    """Hold training back for as long as the block runs; waits for the step that may be under way.

    Args:
        directory: None: ``lease_directory()``.
        warn: Told when the directory cannot be written. Nothing can train there either, and text must still come.
    """
    if sys.platform == "win32":
        yield
        return
    with contextlib.ExitStack() as held:
        try:
            wanted, running = _open(directory or lease_directory(), held)
            fcntl.flock(wanted, fcntl.LOCK_SH)
            fcntl.flock(running, fcntl.LOCK_SH)
        except OSError as error:
            warn(f"{error.filename or directory}: {error.strerror}; running without a lease, training will not yield")
        yield


@contextlib.contextmanager
def training_lease(
    directory: Path | None = None, *, wait: Callable[[float], None], give_up: Callable[[], bool] = lambda: False
) -> Iterator[bool]:
    """Hold the right to run one training step; false when ``give_up`` said so before it was granted.

    Asks again and again instead of sleeping in the kernel, so that a device which is told to stop stops.

    Args:
        directory: None: ``lease_directory()``.
        wait: Sleeps for so many seconds, or shorter.
        give_up: Asked between two attempts.

    Raises:
        UserError: The platform has no ``flock``.
        OSError: The directory cannot be written.
    """
    if sys.platform == "win32":
        raise UserError("client", os.name, "a system with flock (Linux, Android, macOS)", "train on another device")
    with contextlib.ExitStack() as held:
        wanted, running = _open(directory or lease_directory(), held)
        while not (granted := _try_both(wanted, running)) and not give_up():
            wait(POLL_S)
        yield granted


def _try_both(wanted: int, running: int) -> bool:
    """Take ``running`` alone if nobody wants or has it; ``wanted`` is given back either way."""
    try:
        fcntl.flock(wanted, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    try:
        fcntl.flock(running, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False  # another trainer's step
    finally:
        fcntl.flock(wanted, fcntl.LOCK_UN)
    return True


def _open(directory: Path, held: contextlib.ExitStack) -> tuple[int, int]:
    """Both files, made when missing; closing them releases the locks."""
    directory.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    handles = []
    for name in (WANTED_FILE, RUNNING_FILE):
        handle = os.open(directory / name, flags, 0o600)
        held.callback(os.close, handle)
        handles.append(handle)
    return handles[0], handles[1]
