"""Whether a device should train now: not on a low battery, not when hot, not when its owner says so.

Readings come from sysfs and procfs below a root, so that a test brings its own. What a device does not have, or
does not tell, never holds it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.config import CLIENT_DEFAULTS
from edge_runtime.formats.messages import Decline, Reason

# A zone that reads outside of this is not connected; drivers report such values.
_COLDEST_CELSIUS, _HOTTEST_CELSIUS = -40.0, 200.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Beyond these a device declines.

    Attributes:
        battery_ratio: Least charge, in [0, 1], of a battery that is being discharged.
        zone_celsius: Hottest thermal zone.
        memory_bytes: Least available main memory.
        metered_file: While this file exists, the network is one that costs; None: never.
        pause_file: While this file exists, the owner wants the device for himself; None: never.
        retry_after_s: Told to the server.
    """

    battery_ratio: float = CLIENT_DEFAULTS.battery_ratio
    zone_celsius: float = CLIENT_DEFAULTS.zone_celsius
    memory_bytes: int = CLIENT_DEFAULTS.memory_bytes
    metered_file: Path | None = None
    pause_file: Path | None = None
    retry_after_s: float = CLIENT_DEFAULTS.retry_after_s


def check_readiness(limits: Limits, root: Path = Path("/")) -> Decline | None:
    """Why not to train now, or None.

    Args:
        limits: Of this device.
        root: Where ``sys`` and ``proc`` are.
    """
    for name, ratio in _discharging(root):
        if ratio < limits.battery_ratio:
            return _decline(limits, Reason.BATTERY, f"{name} at {ratio:.0%}, {limits.battery_ratio:.0%} is needed")
    for name, celsius in _zones(root):
        if celsius > limits.zone_celsius:
            return _decline(limits, Reason.HEAT, f"{name} at {celsius:.0f} C, at most {limits.zone_celsius:.0f} C")
    if limits.metered_file is not None and limits.metered_file.exists():
        return _decline(limits, Reason.METERED, "the network is metered")
    if limits.pause_file is not None and limits.pause_file.exists():
        return _decline(limits, Reason.BUSY, "paused by its owner")
    available_bytes = _available_bytes(root)
    if available_bytes is not None and available_bytes < limits.memory_bytes:
        return _decline(limits, Reason.BUSY, f"{available_bytes} bytes of memory free, {limits.memory_bytes} needed")
    return None


def _discharging(root: Path) -> Iterator[tuple[str, float]]:
    """(name, charge in [0, 1]) of the device's own batteries that are being discharged."""
    for supply in sorted((root / "sys/class/power_supply").glob("*")):
        if _text(supply / "type") != "Battery" or _text(supply / "scope") == "Device":  # a mouse's battery
            continue
        percent = _number(supply / "capacity")
        if _text(supply / "status") == "Discharging" and percent is not None:
            yield supply.name, percent / 100


def _zones(root: Path) -> Iterator[tuple[str, float]]:
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        millidegrees = _number(zone / "temp")
        if millidegrees is not None and _COLDEST_CELSIUS < millidegrees / 1000 < _HOTTEST_CELSIUS:
            yield _text(zone / "type") or zone.name, millidegrees / 1000


def _available_bytes(root: Path) -> int | None:
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable" and value.split()[:1] and value.split()[0].isdigit():
            return int(value.split()[0]) << 10
    return None


def _number(path: Path) -> float | None:
    try:
        return float(_text(path))
    except ValueError:
        return None


def _text(path: Path) -> str:
    """Content of a small file; empty when it cannot be read, as sensors of sleeping devices cannot."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _decline(limits: Limits, reason: Reason, detail: str) -> Decline:
    return Decline(reason, "".join(c if " " <= c <= "~" else "?" for c in detail)[:200], limits.retry_after_s)
