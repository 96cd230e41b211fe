"""A network namespace behind a slow, long and lossy wire: ``tc`` shapes it where it can, else this process does.

The wire is a veth pair with netem at both ends, or two TUN devices with a thread in between that keeps every packet
for its time and loses some. Either way TCP meets a real bottleneck, and the devices in the namespace nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SERVER, DEVICES = "198.18.77.1", "198.18.77.2"  # of the range for benchmarks, RFC 2544
LONGEST_QUEUE = 1000  # packets, as netem's
_TUN, _TUNSETIFF, _IFF_TUN, _IFF_NO_PI = Path("/dev/net/tun"), 0x400454CA, 0x0001, 0x1000


@dataclass(frozen=True, slots=True)
class Wire:
    """What a packet meets, in each direction."""

    bits_per_s: int = 10_000_000
    delay_s: float = 0.05
    loss: float = 0.02


def missing() -> str:
    """Why there can be no such wire here; empty when there can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the command ip is missing (apt-get install iproute2)"
    name = f"sf{os.getpid()}"
    if _ip("netns", "add", name, check=False).returncode != 0:
        return "this system allows no network namespaces"
    try:
        if not _has_netem(name) and not _TUN.exists():
            return "tc has no netem here, and there is no /dev/net/tun"
        return ""
    finally:
        _ip("netns", "del", name)


@contextlib.contextmanager
def slow_wire(wire: Wire) -> Iterator[tuple[str, str]]:
    """Yields (namespace, how it is shaped); the two ends are at ``SERVER``, here, and ``DEVICES``, there."""
    name = f"sf{os.getpid()}"
    _ip("netns", "add", name)
    try:
        shaped = _netem_pair if _has_netem(name) else _tun_pair
        with shaped(name, wire) as how:
            yield name, how
    finally:
        _ip("netns", "del", name)


@contextlib.contextmanager
def _netem_pair(name: str, wire: Wire) -> Iterator[str]:
    here, there = f"{name}a", f"{name}b"
    _ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
    try:
        _address(name, here, there)
        netem = f"netem rate {wire.bits_per_s}bit delay {wire.delay_s * 1000:g}ms loss {wire.loss:.2%}".split()
        for command in (["tc"], ["ip", "netns", "exec", name, "tc"]):
            end = here if command == ["tc"] else there
            subprocess.run([*command, "qdisc", "add", "dev", end, "root", *netem], check=True)
        yield "netem"
    finally:
        _ip("link", "del", here)


@contextlib.contextmanager
def _tun_pair(name: str, wire: Wire) -> Iterator[str]:
    here, there = f"{name}a", f"{name}b"
    stop, ends = threading.Event(), (_open_tun(here), _open_tun(there))
    thread = threading.Thread(target=_carry, args=(ends, wire, stop), name="wire", daemon=True)
    try:
        _ip("link", "set", there, "netns", name)
        _address(name, here, there)
        thread.start()
        yield "tun"
    finally:
        stop.set()
        thread.join(timeout=10)
        for end in ends:
            os.close(end)


def _carry(ends: tuple[int, int], wire: Wire, stop: threading.Event) -> None:
    """Each direction sends one packet after the other at its rate; what was sent is in the air for ``delay_s``."""
    draw, order, air = random.Random(7), itertools.count(), list[tuple[float, int, int, bytes]]()
    free_s = [0.0, 0.0]
    while not stop.is_set():
        wait_s = min(max(air[0][0] - time.monotonic(), 0.0), 0.2) if air else 0.2
        for end in select.select(ends, (), (), wait_s)[0]:
            packet, side = os.read(end, 1 << 16), ends.index(end)
            if draw.random() < wire.loss or len(air) > LONGEST_QUEUE:
                continue
            free_s[side] = max(time.monotonic(), free_s[side]) + len(packet) * 8 / wire.bits_per_s
            heapq.heappush(air, (free_s[side] + wire.delay_s, next(order), ends[1 - side], packet))
        while air and air[0][0] <= time.monotonic():
            _, _, end, packet = heapq.heappop(air)
            with contextlib.suppress(OSError):  # the interface is not up yet, or no more
                os.write(end, packet)


def _open_tun(name: str) -> int:
    handle = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(handle, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return handle


def _address(name: str, here: str, there: str) -> None:
    for namespace, device, address in (([], here, SERVER), (["-n", name], there, DEVICES)):
        _ip(*namespace, "address", "add", f"{address}/30", "dev", device)
        _ip(*namespace, "link", "set", device, "up")
    _ip("-n", name, "link", "set", "lo", "up")


def _has_netem(name: str) -> bool:
    if shutil.which("tc") is None:
        return False
    command = ["ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["ip", *words], capture_output=True, check=check)
