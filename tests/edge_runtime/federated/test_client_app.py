"""The thin ClientApp: Flower's own client calls it, a resident answers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from edge_runtime.federated import client_app
from edge_runtime.federated.client_app import answerer, app, from_record, to_record, wait_s
from edge_runtime.federated.local_socket import serve_socket
from edge_runtime.formats.envelope import MAX_HEADER_BYTES, Envelope, unseal
from edge_runtime.formats.errors import MessageError, UserError
from edge_runtime.formats.messages import Decline, Reason

PLAN = Envelope("plan", {"n": 1, "deadline_s": 12.5}, b"payload")


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower builds messages inside of a task only."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 7)
    monkeypatch.delenv("SEVENFOLD_RESIDENT", raising=False)
    monkeypatch.delenv("SEVENFOLD_SIMULATED_CLIENT", raising=False)


@pytest.fixture
def resident(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "r.sock"
    with serve_socket(path, lambda e: Envelope("update", {"asked": e.kind}, e.payload[::-1]), print):
        yield path


def call(record: RecordDict, kind: str, node_config: dict[str, object], run_config: dict[str, object]) -> Envelope:
    message = Message(record, dst_node_id=7, message_type=kind)
    message.metadata.__dict__["_message_id"] = "m"
    context = Context(
        run_id=7, node_id=7, node_config=node_config, state=RecordDict(), run_config=run_config, series_id=1
    )
    return from_record(app(message, context).content)


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_every_kind_of_message_goes_to_the_socket_that_the_owner_named(resident: Path, kind: str) -> None:
    reply = call(to_record(PLAN), kind, {"socket": str(resident)}, {})
    assert reply == Envelope("update", {"asked": "plan"}, b"daolyap")


def test_the_socket_may_stand_in_the_environment(resident: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEVENFOLD_RESIDENT", str(resident))
    assert call(to_record(PLAN), "train", {}, {}).kind == "update"


def test_a_server_cannot_name_the_socket(resident: Path) -> None:
    with pytest.raises(UserError, match="node-config"):
        call(to_record(PLAN), "train", {}, {"socket": str(resident), "SEVENFOLD_RESIDENT": str(resident)})


def test_a_resident_that_is_away_is_a_busy_device(tmp_path: Path) -> None:
    decline = unseal(call(to_record(PLAN), "train", {"socket": str(tmp_path / "none")}, {}), Decline)
    assert decline.reason is Reason.BUSY and decline.retry_after_s > 0


def test_a_message_of_another_kind_is_declined(resident: Path) -> None:
    for record in bad_records():
        assert unseal(call(record, "train", {"socket": str(resident)}, {}), Decline).reason is Reason.INVALID


def test_a_simulation_names_a_function_or_hears_how(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="SEVENFOLD_SIMULATED_CLIENT"):
        answerer({"partition-id": 3}, {})
    monkeypatch.setattr(client_app, "simulated", lambda n, e: Envelope("update", {"n": n}), raising=False)
    answer = answerer(
        {"partition-id": 3}, {"SEVENFOLD_SIMULATED_CLIENT": "edge_runtime.federated.client_app:simulated"}
    )
    assert answer(PLAN) == Envelope("update", {"n": 3})


def test_waiting_follows_the_plans_deadline_within_reason() -> None:
    assert wait_s(PLAN) == 72.5
    for odd in (None, "5", -1, 0, 1e30, float("nan"), True):
        expected = 61.0 if odd is True else 600.0
        assert wait_s(Envelope("plan", {"deadline_s": odd})) == expected


@pytest.mark.parametrize("payload", [b"", b"x", bytes(range(256)) * 1000])
def test_an_envelope_survives_flowers_records(payload: bytes) -> None:
    envelope = Envelope("plan", {"n": [1, 2.5, None, "ä"]}, payload)
    inflated = RecordDict.inflate(to_record(envelope).deflate(), children=to_record(envelope).children)
    assert from_record(inflated) == envelope


def test_what_the_server_packs_the_device_reads_and_the_other_way() -> None:
    from server import server_app

    assert from_record(server_app.to_record(PLAN)) == PLAN == server_app.from_record(to_record(PLAN))


def bad_records() -> list[RecordDict]:
    header = ConfigRecord({"header": '["plan",{}]'})

    def with_array(array: Array) -> RecordDict:
        return RecordDict({"sevenfold": header, "payload": ArrayRecord({"payload": array})})

    good = Array(np.frombuffer(b"abcdefgh", np.uint8))
    longer = Array("uint8", (4,), "numpy.ndarray", good.data + b"x" * 10_000)
    trailing = Array("uint8", (8,), "numpy.ndarray", good.data + b"x" * 10_000)
    lying = Array("uint8", (9,), "numpy.ndarray", good.data)
    objects = Array("uint8", (8,), "numpy.ndarray", Array(np.zeros(1, np.float64)).data)
    return [
        RecordDict({}),
        RecordDict({"sevenfold": ConfigRecord({})}),
        RecordDict({"sevenfold": ConfigRecord({"header": b"[]"})}),
        RecordDict({"sevenfold": ConfigRecord({"header": " " * (MAX_HEADER_BYTES + 1)})}),
        RecordDict({"sevenfold": header, "extra": ConfigRecord({})}),
        RecordDict({"sevenfold": header, "payload": MetricRecord({"payload": 1})}),
        RecordDict({"sevenfold": header, "payload": ArrayRecord({"other": good})}),
        with_array(Array(np.zeros((2, 2), np.uint8))),
        with_array(Array(np.zeros(3, np.float32))),
        with_array(Array("uint8", (8,), "pickle", good.data)),
        with_array(Array("uint8", (8,), "numpy.ndarray", b"no numpy file at all")),
        with_array(Array("uint8", (8,), "numpy.ndarray", b"")),
        *(with_array(array) for array in (longer, trailing, lying, objects)),
    ]


def test_a_record_is_checked_before_it_is_decoded() -> None:
    for record in bad_records():
        with pytest.raises(MessageError):
            from_record(record)


def test_it_loads_no_model_and_no_trainer() -> None:
    program = (
        "import sys, edge_runtime.federated.client_app as c\n"
        "heavy = {'torch', 'onnxruntime', 'ai_edge_litert', 'tokenizers', 'transformers', 'safetensors'}\n"
        "print(*(heavy & set(sys.modules)), *(m for m in sys.modules if m.endswith(('.trainer', '.resident'))))"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
