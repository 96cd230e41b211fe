"""What is known of the federations of a home, read from their files alone: for the page, the metrics and the terminal.

Files are read up to a bound and may be half written by another process; what cannot be read is left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.home import Home
from server.ledger import LEDGER_FILE, read_records

MAX_LEDGER_BYTES = 8 << 20
MAX_FILE_BYTES = 16 << 20
MAX_FEDERATIONS = 100
GATES_FILE = "gates.jsonl"


@dataclass(frozen=True, slots=True)
class FederationView:
    """One federation.

    Attributes:
        settings: config.json; empty when it cannot be read.
        rounds: Ledger records of committed rounds by number, of each the latest.
        events: The other records, oldest first.
        devices: As in devices.json.
        candidates: (round, verdict) of each candidate adapter, oldest first.
    """

    name: str
    settings: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    devices: Sequence[Mapping[str, Any]]
    candidates: Sequence[tuple[int, str]]

    @property
    def round(self) -> int:
        """The last committed round; 0 before the first."""
        return int(self.rounds[-1]["round"]) if self.rounds else 0

    @property
    def wanted_rounds(self) -> int | None:
        """How many there shall be."""
        wanted = self.settings.get("rounds")
        return wanted if type(wanted) is int else None

    @property
    def state(self) -> str:
        """``ended``, ``failed``, ``waiting`` for its first round, or ``running``; a kill leaves no trace here."""
        last = self.events[-1].get("event") if self.events else None
        if last == "failed" or (last == "end" and self.round >= (self.wanted_rounds or 0)):
            return "failed" if last == "failed" else "ended"
        return "running" if self.rounds else "waiting"

    @property
    def last_time(self) -> float | None:
        """Seconds since the epoch of the latest record."""
        times = [number(record.get("time")) for record in (*self.rounds, *self.events)]
        return max((value for value in times if value is not None), default=None)

    def total(self, key: str) -> int:
        """Sum of a count over all rounds."""
        return sum(int(number(record.get(key)) or 0) for record in self.rounds)

    def reasons(self, key: str) -> dict[str, int]:
        """Declines or refusals by reason, over all rounds."""
        counts: Counter[str] = Counter()
        for record in self.rounds:
            found = record.get(key)
            for reason, count in found.items() if isinstance(found, dict) else ():
                counts[str(reason)[:40]] += int(number(count) or 0)
        return dict(sorted(counts.items()))

    def latest(self, key: str) -> float | None:
        """The last round's value that is a number."""
        for record in reversed(self.rounds):
            if (value := number(record.get(key))) is not None:
                return value
        return None

    def curve(self, key: str) -> list[tuple[int, float]]:
        """(round, value) wherever the value is a number; held-out loss begins with that before the first round."""
        points = [(int(record["round"]), number(record.get(key))) for record in self.rounds]
        if key == "held_out_loss":
            points[:0] = [(0, number(e.get(key))) for e in self.events if e.get("event") == "baseline"][:1]
        return [(index, value) for index, value in points if value is not None]


def read_federations(home: Home) -> list[FederationView]:
    """Every federation of a home, in the order of their names."""
    try:
        folders = sorted(path for path in home.runs.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []
    return [read_federation(folder) for folder in folders[:MAX_FEDERATIONS]]


def read_federation(directory: Path) -> FederationView:
    """One federation's files."""
    try:
        records = read_records(directory / LEDGER_FILE, MAX_LEDGER_BYTES)
    except OSError:
        records = []
    rounds = {r["round"]: r for r in records if r.get("event") == "round" and type(r.get("round")) is int}
    settings, devices = _read_json(directory / "config.json"), _read_json(directory / "devices.json")
    return FederationView(
        directory.name,
        settings if isinstance(settings, dict) else {},
        [rounds[key] for key in sorted(rounds)],
        [record for record in records if record.get("event") != "round"],
        [device for device in devices if isinstance(device, dict)] if isinstance(devices, list) else [],
        _candidates(directory, records),
    )


def number(value: object) -> float | None:
    """The value when it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        return None
    return float(value)


def bytes_text(count: float) -> str:
    """``1.4 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def reasons_text(counts: Mapping[str, int]) -> str:
    """``battery 2, busy 1``."""
    return ", ".join(f"{reason} {count}" for reason, count in counts.items())


def _candidates(directory: Path, records: Iterable[Mapping[str, Any]]) -> list[tuple[int, str]]:
    try:
        verdicts = {r.get("round"): str(r.get("verdict"))[:40] for r in read_records(directory / GATES_FILE, 1 << 20)}
    except OSError:
        verdicts = {}
    made = sorted({r["round"] for r in records if r.get("event") == "candidate" and type(r.get("round")) is int})
    return [(index, verdicts.get(index, "not evaluated")) for index in made]


def _read_json(path: Path) -> object:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        return json.loads(raw) if len(raw) <= MAX_FILE_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None
