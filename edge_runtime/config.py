"""Defaults of the command line; the only place where they stand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.formats.errors import UserError


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """How a package is run when the user says nothing.

    Attributes:
        threads: Threads of the runtime; None: every core that this process may use.
        bench_prompt_tokens: Length of the prompt that ``bench`` prefills, in tokens.
        bench_tokens: Tokens that ``bench`` decodes after it.
        bench_repeat: How often ``bench`` does both.
    """

    threads: int | None = None
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 0.95
    seed: int = 0
    max_tokens: int = 128
    bench_prompt_tokens: int = 64
    bench_tokens: int = 64
    bench_repeat: int = 3


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """When and how a device takes part in a federation when the user says nothing.

    Attributes:
        battery_ratio: Least charge of a battery that is being discharged.
        zone_celsius: Hottest thermal zone.
        memory_bytes: Least main memory that could be used without swapping.
        retry_after_s: Told to the server with a refusal by one of these.
        text_bytes: Most local text that is held as tokens; the newest files are taken.
        shortest_poll_s: Between two questions to the SuperLink, right after a message.
        longest_poll_s: The same while a federation is active.
        idle_poll_s: The same when nothing came for ``idle_after_s``.
        heartbeat_s: How often the SuperLink hears from the device; after two missed ones it is taken for gone.
    """

    battery_ratio: float = 0.3
    zone_celsius: float = 80.0
    memory_bytes: int = 256 << 20
    retry_after_s: float = 300.0
    text_bytes: int = 16 << 20
    shortest_poll_s: float = 0.05
    longest_poll_s: float = 1.0
    idle_poll_s: float = 5.0
    idle_after_s: float = 120.0
    heartbeat_s: float = 10.0


DEFAULTS = RuntimeConfig()
CLIENT_DEFAULTS = ClientConfig()


def state_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Where this machine keeps what it can make anew: leases and the state of federations.

    ``$SEVENFOLD_STATE_DIR``, else ``$XDG_STATE_HOME/sevenfold``, else ``~/.local/state/sevenfold``.
    """
    if named := environment.get("SEVENFOLD_STATE_DIR"):
        return Path(named)
    if xdg := environment.get("XDG_STATE_HOME"):
        return Path(xdg) / "sevenfold"
    return Path.home() / ".local" / "state" / "sevenfold"


def choose_threads(threads: int | None, cores: int) -> int:
    """Threads to run with.

    Raises:
        UserError: Fewer than one, or more than 256.
    """
    if threads is None:
        return cores
    if not 1 <= threads <= 256:
        raise UserError("--threads", threads, "1 to 256", f"this device has {cores} usable cores")
    return threads
