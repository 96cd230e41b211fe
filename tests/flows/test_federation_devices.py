"""Devices that lie, and devices that die behind masks, over a real SuperLink: rounds are committed all the same."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from edge_runtime.federated import supernode
from edge_runtime.federated.client_app import RECORD, to_record
from edge_runtime.federated.resident import Resident
from edge_runtime.federated.state import DeviceState
from edge_runtime.formats.codec import Codec, encode
from edge_runtime.formats.envelope import Envelope, header_text, seal, sha256, unseal
from edge_runtime.formats.messages import Plan, Profile, Update
from server.config import FederationConfig
from server.federation import open_federation, read_layout, read_manifest
from server.rounds import run_federation
from tests.flows.federation_link import (
    Meeting,
    make_resident,
    meeting,
    settings,
)
from tests.server.simulated import Clock, Wire

pytestmark = [
    pytest.mark.flow,
    pytest.mark.slow,
    pytest.mark.xdist_group("federation_devices"),
    pytest.mark.filterwarnings("ignore:`verify=<str>` is deprecated:DeprecationWarning"),  # by flwr, to httpx
]

HONEST = ("ada", "grace", "edsger")
LIES = ("nan", "short", "huge", "old", "base", "garbage", "unreadable", "stranger")
NAMES = (*HONEST, *LIES)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Meeting]:
    with meeting(tmp_path_factory.mktemp("meeting"), NAMES) as held:
        yield held


@pytest.fixture
def here(place: Meeting) -> Iterator[Meeting]:
    """Everybody goes after the test; residents' memory of one federation says nothing to another."""
    yield place
    place.dismiss()


# Devices that lie -------------------------------------------------------------------------------------------------


@dataclass
class Liar:
    """Trains as asked, and answers a plan with something else."""

    resident: Resident
    lie: str
    kept: Envelope | None = None

    def __call__(self, envelope: Envelope) -> Envelope:
        reply = self.resident.handle(envelope)
        if self.lie == "stranger" and envelope.kind == "hello":
            return seal(replace(unseal(reply, Profile), base_digest="cd" * 32))
        if envelope.kind != "plan":
            return reply
        assert reply.kind == "update", reply.header
        return self._twist(unseal(envelope, Plan), reply)

    def _twist(self, plan: Plan, reply: Envelope) -> Envelope:
        update, values = unseal(reply, Update), np.frombuffer(reply.payload, np.float32)
        if self.lie == "nan":
            spoiled = values.copy()
            spoiled[7] = np.nan
            return _with_payload(update, spoiled.tobytes())
        if self.lie == "short":
            return _with_payload(update, reply.payload[:-4])
        if self.lie == "huge":
            return _with_payload(update, encode(np.full(values.size, 7.5, np.float32), [values.size], Codec.FP32))
        if self.lie == "base":
            return seal(replace(update, base_digest="cd" * 32), reply.payload)
        if self.lie == "old" and self.kept is not None:
            return self.kept
        self.kept = reply
        if self.lie == "unreadable":
            return Envelope("unreadable", {})
        return Envelope("update", {"plan_id": plan.plan_id, "weight": [["a"] * 9]}, os.urandom(4096))


EXPECTED = {"nan": "finite", "short": "shape", "huge": "norm", "base": "base", "old": "stale", "garbage": "malformed"}
EXPECTED |= {"unreadable": "kind"}


def test_every_lie_is_refused_by_its_name_and_changes_nothing(
    here: Meeting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(supernode, "to_record", _to_record_or_worse)
    for name in HONEST:
        here.device(name)
    for lie in LIES:
        here.device(lie, lambda resident, lie=lie: Liar(resident, lie))
    config = settings(
        "hostile", here.package, "rounds=2", "codec.up=fp32", "gates.max_norm=50", "cohort.size=10",
        f"cohort.quorum={len(HONEST)}",
    )  # fmt: skip
    here.run(config)
    rounds = here.wait_for_end(config.name, 2)

    first = sorted({**EXPECTED, "old": "malformed"}.values())
    later = sorted(EXPECTED.values())
    assert [sorted(Counter(record["refused"]).elements()) for record in rounds] == [first, later]
    assert [(r["round"], r["planned"], r["folded"], r["lost"], r["attempt"]) for r in rounds] == [
        (number, 10, 3, 0, 0) for number in (1, 2)
    ]
    (turned_away,) = here.ledger(config.name, "turned_away")
    assert turned_away["reason"].startswith("base: it holds cdcd")
    calm = _without_a_network(config, HONEST, tmp_path)
    assert [record["adapter_sha256"] for record in rounds] == [record["adapter_sha256"] for record in calm]


def _with_payload(update: Update, payload: bytes) -> Envelope:
    return seal(replace(update, payload_sha256=sha256(payload)), payload)


def _to_record_or_worse(envelope: Envelope) -> RecordDict:
    """A payload whose NumPy header asks its reader for a terabyte."""
    if envelope.kind != "unreadable":
        return to_record(envelope)
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776,), }"
    header += b" " * (117 - len(header)) + b"\n"
    raw = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"abc"
    array = Array("uint8", (1 << 40,), "numpy.ndarray", raw)
    header_of = ConfigRecord({"header": header_text(Envelope("update", {}))})
    return RecordDict({RECORD: header_of, "payload": ArrayRecord({"payload": array})})


def _without_a_network(config: FederationConfig, names: Sequence[str], folder: Path) -> list[dict]:
    """The rounds that the same devices come to with nobody else there: new residents, the round loop, no Flower."""
    devices: dict[int, Callable[[Envelope], Envelope]] = {}
    for node, name in enumerate(names, 1):
        state = DeviceState(folder / name / "state", lambda line: None)
        state.directory.mkdir(parents=True)
        devices[node] = make_resident(name, folder / name, state).handle
    clock, layout = Clock(), read_layout(config, read_manifest(config))
    wire = Wire(devices, clock)
    federation = open_federation(config, layout, folder / "run", wire, clock=clock, sleep=clock.sleep)
    run_federation(federation)
    return [record for record in federation.ledger.records() if record["event"] == "round"]
