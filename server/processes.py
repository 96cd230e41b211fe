"""Finding and ending the processes of a SuperLink, and no others.

A SuperLink starts helpers in sessions of their own, so that ending its process group leaves them behind. All of
them inherit one variable that names the federation's home; they are found by it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

MARKER = "SEVENFOLD_FEDERATION_HOME"


def marked_processes(home: Path) -> list[int]:
    """Processes of this user that were started with ``MARKER=home``, the oldest first.

    Only Linux shows the environment of a process; elsewhere the answer is empty, and Flower's helpers end by
    themselves within seconds after their SuperLink.
    """
    wanted = f"{MARKER}={home}".encode()
    if not sys.platform.startswith("linux"):
        return []
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue  # ended, or another user's
    return sorted(found)


def end_processes(pids: list[int], *, grace_s: float, sleep: Callable[[float], None] = time.sleep) -> None:
    """Ask each to end, by its id; after ``grace_s`` seconds kill what is left."""
    for chosen in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            send(pid, chosen)
        deadline = time.monotonic() + grace_s
        while (pids := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
            sleep(0.05)
        if not pids:
            return


def send(pid: int, chosen: signal.Signals) -> None:
    """Signal one process; one that has ended already is no fault."""
    try:
        os.kill(pid, chosen)
    except ProcessLookupError:
        return


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie that waits for its parent."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return not sys.platform.startswith("linux")
