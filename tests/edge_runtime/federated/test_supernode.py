"""Our SuperNode against Flower's own Fleet API: messages, reconnection, crashes, refusals."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import flwr
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.proto.message_pb2 import ObjectTree

from edge_runtime.config import ClientConfig
from edge_runtime.federated import supernode
from edge_runtime.federated.identity import node_key
from edge_runtime.federated.state import DeviceState
from edge_runtime.federated.stopping import Stop
from edge_runtime.federated.supernode import MOST_OBJECTS, Link, serve_superlink
from edge_runtime.formats.envelope import Envelope, unseal
from edge_runtime.formats.errors import MessageError, UserError
from edge_runtime.formats.messages import Decline, Reason
from tests.edge_runtime.federated.flower_link import FlowerLink, free_port, wait_for

# Flower's own use of Alembic and SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:No path_separator:DeprecationWarning")

CONFIG = ClientConfig(shortest_poll_s=0.01, longest_poll_s=0.02, idle_poll_s=0.02)


@dataclass
class Node:
    """A SuperNode in a thread, with a resident that says what it is told to say."""

    directory: Path
    link: FlowerLink
    handle: Callable[[Envelope], Envelope]
    lines: list[str] = field(default_factory=list)
    stop: Stop = field(default_factory=Stop)
    thread: threading.Thread | None = None
    error: BaseException | None = None

    def start(self) -> Node:
        self.directory.mkdir(exist_ok=True)
        state = DeviceState(self.directory, self.lines.append)

        def run() -> None:
            try:
                link = Link(self.link.address, None)
                serve_superlink(
                    link, node_key(self.directory), state, self.handle, self.stop, self.lines.append, CONFIG
                )
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        return self

    def end(self) -> None:
        self.stop.tell()
        if self.thread is not None:
            self.thread.join(timeout=30)
            assert not self.thread.is_alive()

    def connected(self) -> int:
        wait_for(lambda: any("connected" in text for text in self.lines) or self.error)
        assert self.error is None, self.error
        return int(next(text for text in self.lines if "connected" in text).split()[-1])


def echo(envelope: Envelope) -> Envelope:
    return Envelope("score", {"asked": envelope.kind, **envelope.header}, envelope.payload[::-1])


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlowerLink]:
    running = FlowerLink(tmp_path_factory.mktemp("superlink") / "link.db", free_port())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fixture of a module is outside of pytestmark
        running.start()
    yield running
    running.kill()


@pytest.fixture
def link(superlink: FlowerLink, monkeypatch: pytest.MonkeyPatch) -> FlowerLink:
    monkeypatch.setattr(supernode, "SHORTEST_PAUSE_S", 0.05)
    monkeypatch.setattr(supernode, "LONGEST_PAUSE_S", 0.2)
    superlink.app.state.enable_supernode_auth = False
    superlink.begin_run()
    return superlink


@pytest.fixture
def nodes(tmp_path: Path, link: FlowerLink) -> Iterator[Callable[..., Node]]:
    started: list[Node] = []

    def start(handle: Callable[[Envelope], Envelope] = echo, name: str = "device") -> Node:
        started.append(Node(tmp_path / name, link, handle).start())
        return started[-1]

    yield start
    for node in started:
        node.end()


def test_the_internals_that_this_is_pinned_to() -> None:
    assert flwr.__version__.startswith("1.41.")
    calls = {"ActivateNode", "ConfirmMessageReceived", "DeactivateNode", "PullMessages", "PullObject", "PushMessages"}
    calls |= {"PushObject", "RegisterNode", "SendNodeHeartbeat"}
    assert all(callable(getattr(supernode.FleetHttpClient, name)) for name in calls)
    assert not hasattr(supernode._NodeOfLink, "get_fab")


def test_messages_are_answered_by_the_resident_whatever_their_size(
    link: FlowerLink, nodes: Callable[..., Node]
) -> None:
    node = nodes().connected()
    for payload in (b"", b"x", bytes(range(256)) * 22_000):  # the last one is cut into chunks of 5 MiB
        asked = link.send(node, Envelope("plan", {"n": len(payload)}, payload))
        reply = link.receive(asked)
        wait_for(lambda asked=asked: link.state.get_object(link.run_id, asked) is None)  # confirmed, so deleted
        assert reply == Envelope("score", {"asked": "plan", "n": len(payload)}, payload[::-1])


def test_a_node_that_ends_says_so(link: FlowerLink, nodes: Callable[..., Node]) -> None:
    node = nodes()
    number = node.connected()
    assert number in link.nodes()
    node.end()
    assert number not in link.nodes()


def test_a_device_killed_before_its_reply_answers_after_its_restart_as_the_same_node(
    link: FlowerLink, nodes: Callable[..., Node], tmp_path: Path
) -> None:
    reached = threading.Event()

    class Killed(BaseException):
        pass

    def die(envelope: Envelope) -> Envelope:
        reached.set()
        raise Killed

    # A killed process sends no farewell.
    leave = supernode._NodeOfLink.leave
    supernode._NodeOfLink.leave = lambda self: None  # type: ignore[method-assign]
    try:
        first = nodes(die)
        number = first.connected()
        asked = link.send(number, Envelope("plan", {"n": 1}, b"factors"))
        assert reached.wait(30) and first.thread is not None
        first.thread.join(timeout=30)
        assert isinstance(first.error, Killed)
    finally:
        supernode._NodeOfLink.leave = leave  # type: ignore[method-assign]
    assert number in link.nodes()  # the SuperLink still takes it for present
    again = nodes(echo)
    assert again.connected() == number
    assert link.receive(asked).payload == b"srotcaf"
    wait_for(lambda: not (tmp_path / "device" / "inbox").exists())


def test_a_superlink_that_was_killed_is_waited_for(link: FlowerLink, nodes: Callable[..., Node]) -> None:
    node = nodes()
    number = node.connected()
    link.kill()
    wait_for(lambda: any("is away" in text for text in node.lines))
    link.start()
    assert link.receive(link.send(number, Envelope("hello", {}))).header["asked"] == "hello"
    assert node.error is None and sum("is away" in text for text in node.lines) == 1


def test_a_superlink_killed_during_an_answer_gets_it_after_its_return(
    link: FlowerLink, nodes: Callable[..., Node]
) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def slow(envelope: Envelope) -> Envelope:
        reached.set()
        assert go_on.wait(60)
        return echo(envelope)

    node = nodes(slow)
    asked = link.send(node.connected(), Envelope("plan", {}, b"abc"))
    assert reached.wait(30)
    link.kill()
    go_on.set()
    link.start()
    assert link.receive(asked).payload == b"cba"


def test_a_run_that_has_ended_costs_the_message_and_nothing_else(link: FlowerLink, nodes: Callable[..., Node]) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def slow(envelope: Envelope) -> Envelope:
        reached.set()
        assert go_on.wait(60)
        return echo(envelope)

    node = nodes(slow)
    number = node.connected()
    link.send(number, Envelope("plan", {}))
    assert reached.wait(30)
    link.end_run()
    go_on.set()
    wait_for(lambda: any("its run has ended" in text for text in node.lines))
    link.begin_run()
    assert link.receive(link.send(number, Envelope("hello", {}))).kind == "score"


def test_an_unregistered_device_is_refused_in_one_line(link: FlowerLink, nodes: Callable[..., Node]) -> None:
    link.app.state.enable_supernode_auth = True
    node = nodes()
    wait_for(lambda: node.error is not None)
    assert isinstance(node.error, UserError) and "python -m server enrol" in str(node.error)
    assert "\n" not in str(node.error)


def test_a_registered_device_connects_where_devices_may_not_register_themselves(
    link: FlowerLink, nodes: Callable[..., Node], tmp_path: Path
) -> None:
    link.app.state.enable_supernode_auth = True
    (tmp_path / "device").mkdir()
    number = link.register(node_key(tmp_path / "device"))
    assert nodes().connected() == number


def test_a_message_of_another_kind_is_declined_and_the_next_is_answered(
    link: FlowerLink, nodes: Callable[..., Node]
) -> None:
    floats = ArrayRecord({"payload": Array(np.zeros(3, np.float32))})
    records = [
        RecordDict({}),
        RecordDict({"sevenfold": ConfigRecord({"header": 5})}),
        RecordDict({"sevenfold": ConfigRecord({"header": "{}"})}),
        RecordDict({"other": ConfigRecord({"header": "[]"})}),
        RecordDict({"sevenfold": ConfigRecord({"header": '["plan",{}]'}), "payload": floats}),
        RecordDict({f"m{n}": ConfigRecord({"x": n}) for n in range(MOST_OBJECTS)}),
    ]
    number = nodes().connected()
    for asked in [link.send(number, record) for record in records]:
        assert unseal(link.receive(asked), Decline).reason is Reason.INVALID
    assert link.receive(link.send(number, Envelope("hello", {}))).kind == "score"


def test_a_message_that_is_too_large_is_declined(
    link: FlowerLink, nodes: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supernode, "MOST_MESSAGE_BYTES", 100_000)
    number = nodes().connected()
    decline = unseal(link.receive(link.send(number, Envelope("plan", {}, bytes(200_000)))), Decline)
    assert decline.reason is Reason.INVALID and "too large" in decline.detail


def test_trees_are_bounded_before_anything_is_pulled() -> None:
    deep = ObjectTree(object_id="0")
    for n in range(20):
        deep = ObjectTree(object_id=str(n), children=[deep])
    shared = ObjectTree(object_id="s")
    for n in range(12):  # 4096 paths to the same leaf
        shared = ObjectTree(object_id=f"s{n}", children=[shared, shared])
    wide = ObjectTree(object_id="w", children=[ObjectTree(object_id=str(n)) for n in range(MOST_OBJECTS)])
    for tree in (deep, shared, wide):
        with pytest.raises(MessageError, match="objects"):
            supernode._object_ids(tree)
    twice = ObjectTree(object_id="t", children=[ObjectTree(object_id="c"), ObjectTree(object_id="c")])
    assert supernode._object_ids(twice) == ["c", "t"]


def test_objects_that_are_not_what_their_names_say_are_refused(
    link: FlowerLink, nodes: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    number = nodes().connected()
    make = supernode.make_pull_object_fn_protobuf

    def lie(*arguments: object) -> Callable[[str], bytes]:
        def pull(name: str) -> bytes:
            content = make(*arguments)(name)  # type: ignore[arg-type]
            return content[:-1] + b"?" if content.startswith(b"ArrayChunk") else content

        return pull

    monkeypatch.setattr(supernode, "make_pull_object_fn_protobuf", lie)
    asked = link.send(number, Envelope("plan", {}, b"abc"))
    assert unseal(link.receive(asked), Decline).reason is Reason.INVALID


def test_telemetry_and_update_checks_are_off_whatever_the_environment_says() -> None:
    program = (
        "import os; os.environ.update(FLWR_TELEMETRY_ENABLED='1', FLWR_DISABLE_UPDATE_CHECK='0')\n"
        "import edge_runtime.federated.supernode\n"
        "from flwr.supercore import telemetry\n"
        "print(telemetry.FLWR_TELEMETRY_ENABLED, os.environ['FLWR_DISABLE_UPDATE_CHECK'])"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1"]
