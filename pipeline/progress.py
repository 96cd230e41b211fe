"""Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

CONSOLE = Console(stderr=True, highlight=False)
_PLAIN_INTERVAL_S = 10.0


class Report(Protocol):
    """Called with how much is done and a few words."""

    def __call__(self, done: int, text: str = "") -> None:
        """Show it."""


@contextmanager
def progress(label: str | None, total: int | None) -> Iterator[Report]:
    """Show the progress of ``total`` units of work (None: unknown) with the time left; no label: show nothing."""
    if label is None:
        yield lambda done, text="": None
        return
    if CONSOLE.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[text]}"), console=CONSOLE) as bar:
            task = bar.add_task(label, total=total, text="")
            yield lambda done, text="": bar.update(task, completed=done, text=text)
        return
    start_s = last_s = time.monotonic()

    def plain(done: int, text: str = "") -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s >= _PLAIN_INTERVAL_S and done:
            left = f"/{total} {text} ({(now_s - start_s) / done * (total - done):.0f} s left)" if total else f" {text}"
            print(f"{label}: {done}{left}", file=sys.stderr, flush=True)
            last_s = now_s

    yield plain
