"""First contact: who is there, what they can do, and whether they hold the federation's base."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from edge_runtime.formats.envelope import Envelope, seal, unseal
from edge_runtime.formats.errors import MessageError
from edge_runtime.formats.messages import Decline, Profile, Reason, hello
from server.federation import Federation, write_devices
from server.selection import Device, device_from_profile
from server.transport import Arrival

HELLO_TTL_S = 600.0
ANSWER_S = 10.0  # a greeting that is older is waited for no longer, though its answer still counts
_POLL_S = 0.2
_NEVER = (Reason.BASE, Reason.LAYOUT, Reason.INVALID)

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Greeter:
    """Greets each node once a run; one that failed, or said "not now", again after a while.

    Attributes:
        waiting: message_id of an unanswered greeting to its node.
        known: Node to the device's name.
        turned_away: Nodes that cannot take part, and why.
        asked_s: Clock time of the last greetings.
        again_s: Node to the clock time before which it is not greeted again.
    """

    waiting: dict[str, int] = field(default_factory=dict)
    known: dict[int, str] = field(default_factory=dict)
    turned_away: dict[int, str] = field(default_factory=dict)
    asked_s: float = 0.0
    again_s: dict[int, float] = field(default_factory=dict)

    def present(self, federation: Federation) -> list[Device]:
        """Devices that are connected now and may be selected; new ones are greeted on the way.

        A device that is connected as two nodes is there once, as the node that answered last.
        """
        connected, now_s = federation.transport.nodes(), federation.clock()
        greeted = set(self.known) | set(self.turned_away) | set(self.waiting.values())
        new = [node for node in connected if node not in greeted and self.again_s.get(node, now_s) <= now_s]
        if new:
            envelope = seal(hello(federation.config.name, federation.layout))
            ids = federation.transport.push([(node, envelope) for node in new], HELLO_TTL_S, "hello")
            self.waiting |= dict(zip(ids, new, strict=True))
            self.asked_s = now_s
        if self.waiting:
            for arrival in federation.transport.pull(list(self.waiting)):
                self._take(federation, arrival)
        devices = {node: federation.devices[self.known[node]] for node in connected if node in self.known}
        return [device for node, device in devices.items() if device.node == node]

    def wait_for(self, federation: Federation, enough: int, patience_s: float) -> list[Device]:
        """As ``present``, but wait until ``enough`` are there and new greetings had time, or time is up."""
        end_s = federation.clock() + patience_s
        while True:
            devices = self.present(federation)
            now_s = federation.clock()
            answered = not self.waiting or now_s >= self.asked_s + ANSWER_S
            if (len(devices) >= enough and answered) or now_s >= end_s:
                return devices
            federation.sleep(_POLL_S)

    def _take(self, federation: Federation, arrival: Arrival) -> None:
        node = self.waiting.pop(arrival.message_id, None)
        if node is None:
            return
        pause_s = ANSWER_S if arrival.envelope is None else _pause_s(arrival.envelope)
        if arrival.envelope is None or pause_s:
            self.again_s[node] = federation.clock() + pause_s
            log.info("node %d cannot answer the greeting now (%s); it will be greeted again", node, arrival.error)
            return
        reason, profile = _judge(federation, node, arrival.envelope)
        if profile is None:
            self.turned_away[node] = reason
            federation.ledger.append(
                {"event": "turned_away", "time": federation.clock(), "node": str(node), "reason": reason}
            )
            log.warning("node %d cannot take part: %s", node, reason)
            return
        known = federation.devices.get(profile.device)
        federation.devices[profile.device] = device_from_profile(node, profile, federation.layout, known)
        self.known[node] = profile.device
        write_devices(federation)


def _pause_s(envelope: Envelope) -> float:
    """Seconds after which to greet a device again that declined for now; 0: it did not."""
    if envelope.kind != "decline":
        return 0.0
    try:
        decline = unseal(envelope, Decline)
    except MessageError:
        return 0.0
    return 0.0 if decline.reason in _NEVER else max(decline.retry_after_s, ANSWER_S)


def _judge(federation: Federation, node: int, envelope: Envelope) -> tuple[str, Profile | None]:
    """("", profile) of a device that may take part, or (reason, None)."""
    try:
        if envelope.kind == "decline":
            decline = unseal(envelope, Decline)
            return f"{decline.reason}: {decline.detail}", None
        profile = unseal(envelope, Profile)
    except MessageError as error:
        return f"{Reason.INVALID}: {error}", None
    layout = federation.layout
    if profile.base_digest != layout.base_digest:
        return f"{Reason.BASE}: it holds {profile.base_digest}, the federation trains {layout.base_digest}", None
    if profile.layout_digest != layout.digest:
        return f"{Reason.LAYOUT}: it read {profile.layout_digest}, the federation sent {layout.digest}", None
    if profile.rank < layout.ranks[0]:
        return f"rank: it trains {profile.rank}, the smallest of the federation is {layout.ranks[0]}", None
    tokens = federation.config.local.sequence_tokens
    if tokens not in profile.buckets:
        return f"buckets: it trains sequences of {list(profile.buckets)} tokens, not of {tokens}", None
    if federation.enrolled is not None and federation.enrolled(node) != (profile.device, profile.public_key):
        return "key: its name and device key are not the enrolled ones", None
    other = federation.devices.get(profile.device)
    if other is not None and other.public_key not in ("", profile.public_key):
        return f"name: {profile.device} belongs to another key", None
    return "", profile
