"""Readings below a root of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.federated.readiness import Limits, check_readiness
from edge_runtime.formats.envelope import seal, unseal
from edge_runtime.formats.messages import Decline, Reason

LIMITS = Limits(battery_ratio=0.3, zone_celsius=70.0, memory_bytes=100 << 20, retry_after_s=42.0)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def battery(percent: str, status: str = "Discharging", **more: str) -> dict[str, str]:
    folder = "sys/class/power_supply/BAT0/"
    values = {"type": "Battery", "status": status, "capacity": percent} | more
    return {folder + name: text + "\n" for name, text in values.items()}


def zone(millidegrees: str, number: int = 0) -> dict[str, str]:
    folder = f"sys/class/thermal/thermal_zone{number}/"
    return {folder + "temp": millidegrees + "\n", folder + "type": "cpu-thermal\n"}


def memory(kibibytes: str) -> dict[str, str]:
    return {"proc/meminfo": f"MemTotal:       8000000 kB\nMemFree:  1 kB\nMemAvailable:   {kibibytes} kB\n"}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (battery("29"), Reason.BATTERY),
        (battery("30"), None),
        (battery("5", "Charging"), None),
        (battery("5", "Full"), None),
        (battery("5", type="Mains"), None),
        (battery("5", scope="Device"), None),
        (battery("garbage"), None),
        (zone("70001"), Reason.HEAT),
        (zone("70000"), None),
        (zone("50000") | zone("90000", 1), Reason.HEAT),
        (zone("-274000"), None),
        (zone("2147483647"), None),
        (zone(""), None),
        (memory("102399"), Reason.BUSY),
        (memory("102400"), None),
        (memory("many"), None),
        ({}, None),
    ],
)
def test_each_reading_has_its_limit(tmp_path: Path, files: dict[str, str], reason: Reason | None) -> None:
    write(tmp_path, files)
    found = check_readiness(LIMITS, tmp_path)
    assert (found.reason if found else None) is reason
    if found is not None:
        assert found.retry_after_s == 42.0
        assert unseal(seal(found), Decline) == found  # it can be sent as it is


def test_a_metered_network_and_the_owners_pause_are_files(tmp_path: Path) -> None:
    limits = Limits(metered_file=tmp_path / "metered", pause_file=tmp_path / "pause")
    assert check_readiness(limits, tmp_path) is None
    (tmp_path / "pause").touch()
    found = check_readiness(limits, tmp_path)
    assert found is not None and found.reason is Reason.BUSY
    (tmp_path / "metered").touch()
    found = check_readiness(limits, tmp_path)
    assert found is not None and found.reason is Reason.METERED


def test_names_that_cannot_be_sent_are_made_printable(tmp_path: Path) -> None:
    write(tmp_path, zone("99000") | {"sys/class/thermal/thermal_zone0/type": "zöne\x01" + "x" * 500})
    found = check_readiness(LIMITS, tmp_path)
    assert found is not None and unseal(seal(found), Decline).detail == found.detail
