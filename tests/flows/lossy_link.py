"""A slow, lossy link between two network namespaces, packet by packet.

``tc netem`` would do, where the kernel has it; many do not. Here each namespace gets a TUN device, and a thread
carries the packets between them: it drops some, holds each back for the delay, and lets through no more than the
rate. TCP above it sees real losses. Needs root and /dev/net/tun.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
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

ADDRESSES = ("10.77.0.1", "10.77.0.2")
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_PACKET_BYTES = 65536


@dataclass(slots=True)
class Link:
    """Names of the two namespaces, and packets carried and dropped so far."""

    spaces: tuple[str, str]
    carried: int = 0
    dropped: int = 0

    def inside(self, side: int, *command: str) -> list[str]:
        """A command line that runs in one of the namespaces."""
        return ["ip", "netns", "exec", self.spaces[side], *command]


def missing() -> str:
    """What this machine lacks for such a link; empty when nothing."""
    if os.geteuid() != 0:
        return "root"
    if shutil.which("ip") is None:
        return "the ip command"
    if not os.path.exists("/dev/net/tun"):
        return "/dev/net/tun"
    probe = subprocess.run(["ip", "netns", "add", "s7probe"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", "s7probe"], capture_output=True, check=False)
    return "network namespaces" if probe.returncode else ""


@contextlib.contextmanager
def lossy_link(bits_per_s: float, round_trip_s: float, loss: float, seed: int = 0) -> Iterator[Link]:
    """Two namespaces with ADDRESSES, joined by such a link in both directions."""
    link = Link((f"s7a{os.getpid()}", f"s7b{os.getpid()}"))
    ends: list[int] = []
    stop = threading.Event()
    try:
        for index, (space, address) in enumerate(zip(link.spaces, ADDRESSES, strict=True)):
            _ip("netns", "add", space)
            device = f"s7t{index}{os.getpid() % 100000}"
            ends.append(_tun(device))
            _ip("link", "set", device, "netns", space)
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", device)
            _ip("-n", space, "link", "set", device, "up", "mtu", "1500")
        carrier = threading.Thread(
            target=_carry, args=(link, ends, bits_per_s, round_trip_s / 2, loss, random.Random(seed), stop), daemon=True
        )
        carrier.start()
        yield link
        stop.set()
        carrier.join(5)
    finally:
        stop.set()
        for end in ends:
            os.close(end)
        for space in link.spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def _carry(
    link: Link, ends: list[int], bits_per_s: float, delay_s: float, loss: float, chance: random.Random,
    stop: threading.Event,
) -> None:  # fmt: skip
    waiting: list[tuple[float, int, int, bytes]] = []  # due, order, to, packet
    free_s, order = [0.0, 0.0], 0
    while not stop.is_set():
        pause_s = min(0.05, max(waiting[0][0] - time.monotonic(), 0.0)) if waiting else 0.05
        for end in select.select(ends, [], [], pause_s)[0]:
            packet, now_s = os.read(end, _PACKET_BYTES), time.monotonic()
            to = 1 - ends.index(end)
            # A queue of 200 ms in front of the link; what does not fit is lost, as in any router.
            if chance.random() < loss or free_s[to] - now_s > 0.2:
                link.dropped += 1
                continue
            free_s[to] = max(free_s[to], now_s) + len(packet) * 8 / bits_per_s
            order += 1
            heapq.heappush(waiting, (free_s[to] + delay_s, order, to, packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, to, packet = heapq.heappop(waiting)
            with contextlib.suppress(OSError):  # the far side is not up yet
                os.write(ends[to], packet)
            link.carried += 1


def _tun(name: str) -> int:
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return end


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
