"""Ending when told to: at once while waiting, after the running step while training."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stopped(BaseException):
    """The process was told to end while it waited. Not an Exception: nothing on the way may take it for a fault."""


class Stop:
    """Set by SIGTERM and SIGINT once ``listen`` was called."""

    def __init__(self) -> None:
        self._told = threading.Event()
        self._waiting = False

    def __call__(self) -> bool:
        """Whether to end."""
        return self._told.is_set()

    def tell(self) -> None:
        """End."""
        self._told.set()

    def wait(self, seconds: float) -> None:
        """Sleep, but not beyond the moment when the process is told to end."""
        self._told.wait(seconds)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block of the main thread that only waits for others: a signal leaves it with ``Stopped``."""
        if self._told.is_set():
            raise Stopped
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """A block inside of an interruptible one that decides for itself where to end."""
        before, self._waiting = self._waiting, False
        try:
            yield
        finally:
            self._waiting = before

    def listen(self) -> None:
        """Take SIGTERM and SIGINT; for the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._told.set()
        if self._waiting:
            self._waiting = False
            raise Stopped
