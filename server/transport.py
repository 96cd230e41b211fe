"""How the round loop reaches devices. Flower is one implementation (``server_app``), a test's dictionary another."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from edge_runtime.formats.envelope import Envelope


@dataclass(frozen=True, slots=True)
class Arrival:
    """What came back for a message.

    Attributes:
        message_id: As ``push`` returned it.
        node: Who was asked.
        envelope: The reply, or None when there is none.
        error: Why there is none (the node is gone, its app failed); empty beside an envelope.
    """

    message_id: str
    node: int
    envelope: Envelope | None
    error: str = ""


class Transport(Protocol):
    """Messages to devices and their replies, none of which it keeps once they were pulled."""

    def nodes(self) -> list[int]:
        """Devices that are connected now."""
        ...

    def push(self, messages: Sequence[tuple[int, Envelope]], ttl_s: float, group: str) -> list[str]:
        """Send messages and return an id for each, in order; they and their replies live for ``ttl_s``."""
        ...

    def pull(self, message_ids: Collection[str]) -> list[Arrival]:
        """Replies that are there; may return fewer than there are, so that few stand in memory at once."""
        ...


def polling_pause_s(waited_s: float) -> float:
    """Seconds until the next question after ``waited_s`` without an answer: it comes at most a tenth too late."""
    return min(max(waited_s / 10, 0.02), 1.0)
