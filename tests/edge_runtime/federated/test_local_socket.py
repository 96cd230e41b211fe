"""Asking the resident over its socket, politely and otherwise."""

from __future__ import annotations

import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

from edge_runtime.federated import local_socket
from edge_runtime.federated.local_socket import Unreachable, ask, serve_socket
from edge_runtime.formats.envelope import MAX_PAYLOAD_BYTES, Envelope, read_envelope
from edge_runtime.formats.errors import UserError

HELLO = Envelope("hello", {"n": 1}, b"abc")
Serve = Callable[..., AbstractContextManager[Path]]


def echo(envelope: Envelope) -> Envelope:
    return Envelope("echo", dict(envelope.header), envelope.payload[::-1])


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def serve(tmp_path: Path, lines: list[str]) -> Serve:
    @contextmanager
    def run(handle: Callable[[Envelope], Envelope] = echo, path: Path = tmp_path / "r.sock") -> Iterator[Path]:
        with serve_socket(path, handle, lines.append):
            yield path

    return run


def test_a_question_gets_its_answer_whatever_its_size(serve: Serve) -> None:
    with serve() as path:
        for payload in (b"", b"abc", bytes(range(256)) * 20_000):
            reply = ask(path, Envelope("plan", {"n": 1}, payload), 30)
            assert reply == Envelope("echo", {"n": 1}, payload[::-1])


def test_the_socket_is_the_owners_alone_and_goes_with_the_server(serve: Serve) -> None:
    with serve() as path:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


def test_a_path_that_is_too_long_for_a_socket_works(serve: Serve, tmp_path: Path) -> None:
    deep = tmp_path / ("a" * 100) / ("b" * 100)
    deep.mkdir(parents=True)
    with serve(path=deep / "r.sock") as path:
        assert ask(path, HELLO, 30).payload == b"cba"


def test_what_a_killed_server_left_is_replaced_and_a_living_one_is_not(serve: Serve, tmp_path: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "r.sock"))
    left.close()
    with serve() as path:
        assert ask(path, HELLO, 30).kind == "echo"
        with pytest.raises(UserError, match="no other client"), serve():
            pass
        assert ask(path, HELLO, 30).kind == "echo"


def test_a_file_in_the_way_is_not_removed(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "r.sock").write_text("mine")
    with pytest.raises(UserError), serve():
        pass
    assert (tmp_path / "r.sock").read_text() == "mine"


def test_requests_are_handled_one_at_a_time(serve: Serve) -> None:
    inside: list[int] = []

    def handle(envelope: Envelope) -> Envelope:
        inside.append(1)
        assert len(inside) == 1
        threading.Event().wait(0.02)
        inside.pop()
        return echo(envelope)

    with serve(handle) as path:
        replies: list[Envelope] = []
        threads = [threading.Thread(target=lambda: replies.append(ask(path, HELLO, 30))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert len(replies) == 4


def test_one_connection_may_bring_several_requests(serve: Serve) -> None:
    with serve() as path, socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        for _ in range(3):
            connection.sendall(HELLO.to_bytes())
            assert read_envelope(lambda size: connection.recv(size, socket.MSG_WAITALL)).payload == b"cba"


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"S7M1" + struct.pack("<IQ", 1 << 30, 0),
        b"S7M1" + struct.pack("<IQ", 2, MAX_PAYLOAD_BYTES + 1),
        HELLO.to_bytes()[:-2],
        b"S7M1" + struct.pack("<IQ", 2, 0) + b"\xff\xff",
    ],
)
def test_bytes_that_are_no_message_cost_one_line_and_the_connection(serve: Serve, lines: list[str], raw: bytes) -> None:
    with serve() as path:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(str(path))
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        assert ask(path, HELLO, 30).kind == "echo"
    assert len(lines) == 1 and "dropped" in lines[0]


def test_a_sender_that_stops_halfway_is_cut_off(
    serve: Serve, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_socket, "TRANSFER_S", 0.1)
    with serve() as path, socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(path))
        connection.sendall(HELLO.to_bytes()[:20])
        assert connection.recv(1) == b""
    assert len(lines) == 1


def test_too_many_connections_are_turned_away(serve: Serve) -> None:
    with serve() as path:
        held = [socket.socket(socket.AF_UNIX) for _ in range(local_socket.MOST_CONNECTIONS)]
        for connection in held:
            connection.connect(str(path))
            connection.sendall(HELLO.to_bytes())
            assert connection.recv(1)
        with pytest.raises(Unreachable):
            ask(path, HELLO, 30)
        for connection in held:
            connection.close()


def test_nobody_there_is_said_with_what_to_start(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="edge_runtime client"):
        ask(tmp_path / "none.sock", HELLO, 1)


def test_a_resident_that_is_too_slow_is_given_up(serve: Serve) -> None:
    done = threading.Event()

    def slow(envelope: Envelope) -> Envelope:
        done.wait(30)
        return echo(envelope)

    with serve(slow) as path:
        with pytest.raises(Unreachable):
            ask(path, HELLO, 0.1)
        done.set()


def test_a_resident_that_is_killed_is_noticed_at_once(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from edge_runtime.federated.local_socket import serve_socket\n"
        "def handle(e): print('asked', flush=True); time.sleep(600)\n"
        "with serve_socket(Path(sys.argv[1]), handle, print): print('up', flush=True); time.sleep(600)"
    )
    root = Path(__file__).resolve().parents[3]
    path = tmp_path / "r.sock"
    other = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=root, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"up\n"
    failed: list[BaseException] = []

    def question() -> None:
        try:
            ask(path, HELLO, 300)
        except Unreachable as error:
            failed.append(error)

    asking = threading.Thread(target=question)
    asking.start()
    assert other.stdout.readline() == b"asked\n"
    other.kill()
    asking.join(30)
    assert not asking.is_alive() and len(failed) == 1
    other.communicate()
