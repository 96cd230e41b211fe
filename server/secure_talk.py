"""Asking the members of a masked round, and counting what became of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from edge_runtime.formats.envelope import Envelope, header_text, unseal
from edge_runtime.formats.errors import MessageError, SignatureError
from edge_runtime.formats.messages import Decline, Reason
from server.gates import Refusal
from server.transport import Transport, polling_pause_s

_TTL_MARGIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Member:
    """A device that is asked to take part.

    Attributes:
        public_key: Raw Ed25519 key, hex, as enrolled.
        rank: The end of the last segment that it trains.
    """

    node: int
    device_name: str
    public_key: str
    rank: int


@dataclass(frozen=True, slots=True)
class SecureSettings:
    """How a masked round is run.

    Attributes:
        min_cohort: Fewer devices are never summed, nor a segment of fewer.
        largest_code: Of one device and value, before its weight.
        stage_timeout_s: For each exchange of keys, shares and secrets.
        deadline_s: For training.
        weight_cap: Largest weight of one device, as its plan says.
        noise_std: What each device adds, as its plan says; the field gets room for it.
        enough: Close the sum at so many updates (or at two thirds of every segment's members, if that is more);
            the others count as lost. 0: wait for all until the deadline.
    """

    min_cohort: int
    largest_code: int
    stage_timeout_s: float
    deadline_s: float
    weight_cap: int = 1
    noise_std: float = 0.0
    enough: int = 0


@dataclass(slots=True)
class Tally:
    """What became of the members, by node, and the bytes of headers and payloads.

    Attributes:
        lost: Did not answer in time, or their node went away: the stage they were lost at.
        declined: Said no.
        refused: Sent what may not be used: the reason.
    """

    lost: dict[int, str] = field(default_factory=dict)
    declined: dict[int, Decline] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0


class TooFew(Exception):
    """Ends an attempt; ``run_secure_round`` turns it into a value."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage


class Refused(Exception):
    """A reply that may not be used."""

    def __init__(self, reason: Refusal) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Talk:
    """Messages to members and their replies.

    Args:
        group: Names the round to the transport.
    """

    def __init__(
        self, transport: Transport, group: str, clock: Callable[[], float], sleep: Callable[[float], None]
    ) -> None:
        self._transport, self._group, self._clock, self._sleep = transport, group, clock, sleep
        self.tally = Tally()

    def ask(
        self,
        stage: str,
        messages: Mapping[int, Envelope],
        timeout_s: float,
        accept: Callable[[int, Envelope], None],
        *,
        done: Callable[[], bool] = lambda: False,
        again: Callable[[int], Envelope] | None = None,
    ) -> None:
        """Send messages by node and hand every reply to ``accept``, until none is missing or time is up.

        Args:
            stage: Names it in the tally.
            messages: One a node.
            timeout_s: From now.
            accept: Called with node and reply; raises Refused, MessageError or SignatureError when it may not
                be used.
            done: Asked after every reply: whether the others need not be waited for.
            again: The message for a node that declined because it lacks factors; each gets one.
        """
        quiet_since_s = self._clock()
        end_s = quiet_since_s + timeout_s
        pending, repeated = self._push(messages, timeout_s), set[int]()
        while pending and self._clock() < end_s and not done():
            arrivals = self._transport.pull(list(pending))
            for arrival in arrivals:
                node, envelope = pending.pop(arrival.message_id, None), arrival.envelope
                if node is None:
                    continue
                if envelope is None:
                    self.tally.lost[node] = f"{stage}: {arrival.error}"[:60]
                    continue
                self.tally.bytes_up += _wire_bytes(envelope)
                if again is not None and node not in repeated and _lacks_factors(envelope):
                    repeated.add(node)
                    pending |= self._push({node: again(node)}, end_s - self._clock())
                else:
                    self._judge(node, envelope, accept)
            now_s = self._clock()
            if arrivals:
                quiet_since_s = now_s
            elif pending:
                self._sleep(min(polling_pause_s(now_s - quiet_since_s), max(end_s - now_s, 0.0)))
        for node in pending.values():
            self.tally.lost[node] = stage

    def _push(self, messages: Mapping[int, Envelope], timeout_s: float) -> dict[str, int]:
        self.tally.bytes_down += sum(map(_wire_bytes, messages.values()))
        ids = self._transport.push(list(messages.items()), max(timeout_s, 1.0) + _TTL_MARGIN_S, self._group)
        return dict(zip(ids, messages, strict=True))

    def _judge(self, node: int, envelope: Envelope, accept: Callable[[int, Envelope], None]) -> None:
        try:
            if envelope.kind == "decline":
                self.tally.declined[node] = unseal(envelope, Decline)
            else:
                accept(node, envelope)
        except Refused as error:
            self.tally.refused[node] = error.reason.value
        except MessageError:
            self.tally.refused[node] = Refusal.MALFORMED.value
        except SignatureError:
            self.tally.refused[node] = "signature"


def _lacks_factors(envelope: Envelope) -> bool:
    return envelope.kind == "decline" and envelope.header.get("reason") == Reason.FACTORS.value


def _wire_bytes(envelope: Envelope) -> int:
    return len(header_text(envelope)) + len(envelope.payload)
