"""What ``run`` shows of a federation: a table that grows, or one line a round where nobody watches."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from server.view import bytes_text, number, reasons_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SHOWN_ROUNDS = 20
_COLUMNS = ("round", "phase", "loss", "held-out", "up", "down", "folded", "declined", "refused", "lost", "seconds")


@contextlib.contextmanager
def live_rounds(
    console: Console, name: str, wanted: int, before: Sequence[Mapping[str, Any]]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that shows ledger records as they come.

    Args:
        console: Where; a terminal gets a table that changes in place, anything else a line a record.
        name: Of the federation.
        wanted: Rounds that there shall be.
        before: Rounds committed by an earlier run.
    """
    if not console.is_terminal:
        yield lambda record: console.print(record_line(record, wanted), markup=False, highlight=False, soft_wrap=True)
        return
    from rich.live import Live

    rounds: deque[Mapping[str, Any]] = deque(before, maxlen=SHOWN_ROUNDS)
    with Live(_table(name, wanted, rounds, "waiting for devices"), console=console, refresh_per_second=4) as live:

        def show(record: Mapping[str, Any]) -> None:
            if record.get("event") == "round":
                rounds.append(record)
            live.update(_table(name, wanted, rounds, "" if record.get("event") == "round" else event_text(record)))

        yield show


def record_line(record: Mapping[str, Any], wanted: int) -> str:
    """One record as one line."""
    if record.get("event") != "round":
        return event_text(record)
    cells = dict(zip(_COLUMNS, _cells(record, wanted), strict=True))
    parts = [f"round {cells['round']}", cells["phase"], f"loss {cells['loss']}", f"held-out {cells['held-out']}"]
    parts += [f"{cells['up']} up, {cells['down']} down", f"{cells['folded']} folded"]
    parts += [f"{key}: {cells[key]}" for key in ("declined", "refused", "lost") if cells[key] not in ("", "0")]
    return "  ".join([*parts, f"{cells['seconds']} s"])


def event_text(record: Mapping[str, Any]) -> str:
    """What happened, in words."""
    index, loss = record.get("round"), number(record.get("held_out_loss"))
    known = {
        "start": "started; waiting for devices",
        "resume": f"resumed after round {index}; waiting for devices",
        "baseline": "held-out loss without an adapter: " + ("no answer" if loss is None else f"{loss:.4f}"),
        "candidate": f"round {index} is a candidate",
        "abandoned": f"round {index} is tried again: {record.get('reason')}",
        "turned_away": f"node {record.get('node')} cannot take part: {record.get('reason')}",
        "failed": f"stopped: {record.get('reason')}",
        "end": "every round is committed",
    }
    return known.get(str(record.get("event")), str(record.get("event")))


def _cells(record: Mapping[str, Any], wanted: int) -> tuple[str, ...]:
    seconds = record.get("seconds")
    spent = sum(value or 0 for value in map(number, seconds.values())) if isinstance(seconds, dict) else 0
    return (
        f"{record.get('round')}/{wanted}",
        str(record.get("phase")),
        f"{_loss(record, 'loss_before')} > {_loss(record, 'loss_after')}",
        _loss(record, "held_out_loss"),
        bytes_text(number(record.get("bytes_up")) or 0),
        bytes_text(number(record.get("bytes_down")) or 0),
        f"{record.get('folded')}/{record.get('planned')}",
        reasons_text(record.get("declined") or {}),
        reasons_text(record.get("refused") or {}),
        str(record.get("lost") or 0),
        f"{spent:.1f}",
    )


def _loss(record: Mapping[str, Any], key: str) -> str:
    value = number(record.get(key))
    return "-" if value is None else f"{value:.4f}"


def _table(name: str, wanted: int, rounds: Sequence[Mapping[str, Any]], note: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"federation {escape(name)}", caption=escape(note) or None, caption_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in ("phase", "declined", "refused") else "right")
    for record in rounds:
        table.add_row(*map(escape, _cells(record, wanted)))
    return table
