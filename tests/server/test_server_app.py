from __future__ import annotations

import fcntl
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from edge_runtime.formats import byte_array
from edge_runtime.formats.envelope import MAX_HEADER_BYTES, Envelope, header_text
from edge_runtime.formats.errors import MessageError, UserError
from server import server_app
from server.local_grid import LocalGrid
from server.server_app import LOCK_FILE, FlowerTransport, from_record, sole_runner, to_record

ENVELOPE = Envelope("update", {"b": [1, 2.5, "x"], "a": None}, bytes(range(256)) * 9)


def over_the_wire(record):
    """A record as it arrives: through Flower's own objects."""
    contents = {key: item.deflate() for key, item in get_all_nested_objects(record).items()}
    return inflate_object_from_contents(record.object_id, contents)


@pytest.mark.parametrize("payload", [b"", b"\0", b"x" * 99, bytes(range(256)) * 5000])
def test_an_envelope_survives_flowers_objects(payload) -> None:
    envelope = Envelope("plan", {"round": 3, "text": "\u00e9\n"}, payload)
    assert from_record(over_the_wire(to_record(envelope))) == envelope
    assert ("payload" in to_record(envelope)) == bool(payload)


def test_a_record_holds_the_header_as_text_and_the_payload_as_bytes() -> None:
    record = to_record(ENVELOPE)
    assert record.config_records["sevenfold"]["header"] == header_text(ENVELOPE)
    assert record.array_records["payload"]["payload"].numpy().tobytes() == ENVELOPE.payload
    assert set(record) == {"sevenfold", "payload"}


def test_equal_payloads_share_one_record() -> None:
    payloads = {}
    records = [to_record(Envelope("plan", {"n": n}, bytes(bytearray(b"same"))), payloads) for n in range(3)]
    other = to_record(Envelope("plan", {}, b"another"), payloads)
    assert records[0]["payload"] is records[1]["payload"] is records[2]["payload"] is not other["payload"]
    assert from_record(other).payload == b"another"


# Hostile records ---------------------------------------------------------------------------------------------------


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return os.abort, ()


def saved(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def npy(header, data=b"1234"):
    text = header.encode("latin1").ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


GOOD = saved(np.frombuffer(b"1234", np.uint8))
GOOD_ARRAY = Array("uint8", (4,), "numpy.ndarray", GOOD)
HEADER = "{'descr': '|u1', 'fortran_order': False, 'shape': (4,), }"


def record_of(data=GOOD, shape=(4,), dtype="uint8", stype="numpy.ndarray", header='["update",{}]', **more):
    records = {"sevenfold": ConfigRecord({"header": header}), "payload": ArrayRecord({"payload": Array(dtype, shape, stype, data)})}  # fmt: skip  # noqa: E501
    return RecordDict(records | more)


def without(name):
    record = record_of()
    del record[name]
    return record


def with_payload(value):
    record = record_of()
    record["payload"] = value
    return record


HOSTILE = {
    "nothing": RecordDict(),
    "no header record": without("sevenfold"),
    "another record": record_of(extra=ConfigRecord({"x": 1})),
    "a metric": record_of(metrics=MetricRecord({"loss": 1.0})),
    "metrics for a payload": with_payload(MetricRecord({"payload": 1})),
    "a configuration for a payload": with_payload(ConfigRecord({"payload": b"1234"})),
    "no array": with_payload(ArrayRecord({})),
    "another array": with_payload(ArrayRecord({"weights": Array("uint8", (4,), "numpy.ndarray", GOOD)})),
    "two arrays": with_payload(ArrayRecord({n: Array("uint8", (4,), "numpy.ndarray", GOOD) for n in ("payload", "b")})),
    "an array for a header": RecordDict({"sevenfold": ArrayRecord({"header": GOOD_ARRAY})}),
    "no header": RecordDict({"sevenfold": ConfigRecord({"head": "[]"})}),
    "bytes for a header": record_of(header=b'["update",{}]'),
    "numbers for a header": record_of(header=[1, 2, 3]),
    "a header that is not JSON": record_of(header="update"),
    "a header too long": record_of(header='["update",{"a":"' + "x" * MAX_HEADER_BYTES + '"}]'),
    "a header of NaN": record_of(header='["update",{"a":NaN}]'),
    "a header of brackets": record_of(header="[" * 9999),
    "another dtype": record_of(saved(np.zeros(4, np.float32)), dtype="float32"),
    "a dtype that lies": record_of(saved(np.zeros(1, np.float32)), shape=(4,)),
    "two dimensions": record_of(saved(np.zeros((2, 2), np.uint8)), shape=(2, 2)),
    "two dimensions told as one": record_of(saved(np.zeros((2, 2), np.uint8))),
    "no dimension": record_of(saved(np.uint8(1)), shape=()),
    "a huge shape": record_of(shape=(10**12,)),
    "a huge shape in the file": record_of(npy(HEADER.replace("4,", "999999999999,"))),
    "a huge shape in both": record_of(npy(HEADER.replace("4,", "999999999999,")), shape=(999999999999,)),
    "a negative shape": record_of(npy(HEADER.replace("4,", "-4,")), shape=(-4,)),
    "a shape that lies": record_of(shape=(3,)),
    "a byte short": record_of(GOOD[:-1]),
    "a byte more": record_of(GOOD + b"5"),
    "only a magic": record_of(GOOD[:8]),
    "no bytes": record_of(b""),
    "text": record_of(b"1234"),
    "a pickle": record_of(pickle.dumps(Bomb())),
    "an array of objects": record_of(saved(np.array([Bomb()], object), allow_pickle=True), shape=(1,)),
    "objects told as bytes": record_of(npy(HEADER.replace("|u1", "|O"), pickle.dumps(Bomb()))),
    "an archive": record_of(b"PK\x03\x04" + bytes(99), shape=(4,)),
    "an expression for a header": record_of(npy("{'descr': '|u1', 'fortran_order': False, 'shape': (2+2,), }")),
    "a header length that lies": record_of(GOOD[:8] + b"\xff\xff" + GOOD[10:]),
    "another serialization": record_of(stype="pickle"),
}  # fmt: skip


@pytest.mark.parametrize("record", HOSTILE.values(), ids=HOSTILE)
def test_hostile_records_are_refused_without_memory_or_pickle(record, monkeypatch) -> None:
    monkeypatch.setattr(pickle, "load", None)
    tracemalloc.start()
    try:
        with pytest.raises(MessageError, match=r"^message: "):
            from_record(record)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_the_good_record_of_these_is_good() -> None:
    assert from_record(record_of()) == Envelope("update", {}, b"1234")
    assert from_record(record_of(npy(HEADER))) == Envelope("update", {}, b"1234")  # padded as older NumPys pad


def test_a_payload_above_the_limit_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(byte_array, "MAX_PAYLOAD_BYTES", 4)
    assert from_record(record_of()).payload == b"1234"
    with pytest.raises(MessageError, match="longer than allowed"):
        from_record(record_of(saved(np.zeros(5, np.uint8)), shape=(5,)))


# The transport -----------------------------------------------------------------------------------------------------


def echo(record):
    envelope = from_record(record)
    return to_record(Envelope("score", {"of": envelope.kind}, envelope.payload))


def gone(record):
    raise ConnectionError("its cable")


def silent(record):
    raise TimeoutError


def transport(**handlers):
    return FlowerTransport(LocalGrid({int(name[1:]): handler for name, handler in handlers.items()}))


def test_replies_name_their_message_and_their_node_and_are_pulled_once() -> None:
    wire = transport(n3=echo, n4=echo)
    assert sorted(wire.nodes()) == [3, 4]
    ids = wire.push([(4, Envelope("hello", {})), (3, Envelope("plan", {}, b"x"))], 60.0, "g")
    found = {a.message_id: a for a in wire.pull(ids)}
    assert [(found[i].node, found[i].envelope) for i in ids] == [
        (4, Envelope("score", {"of": "hello"})),
        (3, Envelope("score", {"of": "plan"}, b"x")),
    ]
    assert all(arrival.error == "" for arrival in found.values())
    assert wire.pull(ids) == [] and not wire._asked


def test_errors_of_nodes_are_told_and_silence_is_none() -> None:
    wire = transport(n1=gone, n2=silent, n3=echo, n4=lambda record: RecordDict())
    ids = wire.push([(node, Envelope("plan", {})) for node in (1, 2, 3, 4, 5)], 60.0, "g")
    found = {a.node: a for _ in ids for a in wire.pull(ids)}
    assert {node: (a.envelope and a.envelope.kind, a.error[:12]) for node, a in found.items()} == {
        1: (None, "flower error"),
        3: ("score", ""),
        4: ("malformed", ""),
        5: (None, "flower error"),
    }
    assert [a.message_id for a in wire.pull(ids)] == []


def test_few_replies_stand_in_memory_at_once() -> None:
    wire = transport(**{f"n{node}": echo for node in range(1, 31)})
    ids = wire.push([(node, Envelope("plan", {})) for node in range(1, 31)], 60.0, "g")
    sizes, left = [], set(ids)
    while left:
        arrivals = wire.pull(sorted(left))
        sizes.append(len(arrivals))
        left -= {a.message_id for a in arrivals}
    assert max(sizes) <= server_app.PULL_AT_ONCE == 4 and sum(sizes) == 30


def test_replies_behind_many_silent_nodes_are_found() -> None:
    wire = transport(**{f"n{node}": silent for node in range(1, 21)}, n99=echo)
    ids = wire.push([(node, Envelope("plan", {})) for node in [*range(1, 21), 99]], 60.0, "g")
    assert [a.node for a in wire.pull(ids)] == [99]


def test_a_reply_that_is_announced_and_does_not_come_holds_up_nobody_else(monkeypatch) -> None:
    monkeypatch.setattr(server_app, "PULL_AT_ONCE", 1)
    uploaded = threading.Event()

    def uploading(record):
        uploaded.wait(60)
        return echo(record)

    link = FlowerTransport(LocalGrid({1: uploading, 2: echo}), patience_s=0.05)
    ids = link.push([(1, Envelope("plan", {})), (2, Envelope("plan", {}))], 60.0, "round-1")
    assert [arrival.node for arrival in link.pull(ids)] == [2]
    assert link.pull(ids[:1]) == []  # still under way, and not asked for twice
    uploaded.set()
    while not (late := link.pull(ids[:1])):
        pass
    assert [(arrival.node, arrival.message_id) for arrival in late] == [(1, ids[0])]


def test_plans_are_training_messages_and_the_rest_queries() -> None:
    grid, seen = LocalGrid({1: echo}), []
    push = grid.push_messages
    grid.push_messages = lambda messages: (seen.extend(m.metadata for m in messages), push(messages))[1]
    FlowerTransport(grid).push([(1, Envelope("plan", {})), (1, Envelope("hello", {}))], 77.0, "round-3")
    assert [(m.message_type, m.ttl, m.group_id, m.dst_node_id) for m in seen] == [
        ("train", 77.0, "round-3", 1),
        ("query", 77.0, "round-3", 1),
    ]


@pytest.mark.parametrize("taken", [0, 1, [None, None]])
def test_a_superlink_that_does_not_take_every_message_is_an_error(taken) -> None:
    grid = LocalGrid({1: echo})
    grid.push_messages = lambda messages: taken if isinstance(taken, list) else ["id"] * taken
    with pytest.raises(ConnectionError, match="did not take every message"):
        FlowerTransport(grid).push([(1, Envelope("plan", {})), (1, Envelope("hello", {}))], 77.0, "round-3")


# One run at a time -------------------------------------------------------------------------------------------------

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(str(__import__("os").getpid()))
file.flush()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the directory's lock."""
    running = []

    def start(*names):
        command = [sys.executable, "-c", HOLD, str(tmp_path / LOCK_FILE), *names]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert running[-1].stdout.readline() == "held\n"
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def test_the_directory_of_a_run_is_its_own_while_it_lasts(tmp_path) -> None:
    with sole_runner(tmp_path / "new"), (tmp_path / "new" / LOCK_FILE).open() as file:
        assert file.read() == str(os.getpid())
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with sole_runner(tmp_path / "new"):
        pass


def test_a_second_run_is_refused_and_the_first_lives_on(tmp_path, holder, monkeypatch) -> None:
    process, clock, ended = holder(), iter(range(0, 1000, 10)), []
    monkeypatch.setattr(server_app.os, "kill", lambda *which: ended.append(which))
    monkeypatch.setattr(server_app.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(server_app.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match="running already"), sole_runner(tmp_path):
        pass
    assert process.poll() is None and not ended
    assert (tmp_path / LOCK_FILE).read_text() == str(process.pid)


def test_a_server_app_left_over_from_a_dead_superlink_is_ended(tmp_path, holder) -> None:
    process, started = holder("flwr-serverapp"), time.monotonic()
    with sole_runner(tmp_path):
        assert process.wait(10) == -signal.SIGKILL
        assert (tmp_path / LOCK_FILE).read_text() == str(os.getpid())
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("text", ["", "0", "-1", "nobody", "99999999"])
def test_a_lock_that_names_nobody_ends_nobody(tmp_path, text, monkeypatch) -> None:
    (tmp_path / LOCK_FILE).write_text(text)
    monkeypatch.setattr(server_app.os, "kill", None)
    server_app._end_left_over(str(tmp_path / LOCK_FILE))
    with sole_runner(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text() == str(os.getpid())
