"""Envelopes between processes of one device, over a Unix socket that only its owner may open.

The thin ClientApp, which Flower starts anew for every message, asks the resident, which has the base loaded.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from edge_runtime.formats.envelope import Envelope, read_envelope
from edge_runtime.formats.errors import MessageError, UserError

SOCKET_FILE = "resident.sock"
TRANSFER_S = 60.0  # for the bytes of one message, either way
MOST_CONNECTIONS = 4
_LONGEST_PATH_BYTES = 100  # 104 on macOS, 108 on Linux, the end included


class Unreachable(MessageError):
    """No resident answers at a socket."""


@contextlib.contextmanager
def serve_socket(
    path: Path, handle: Callable[[Envelope], Envelope], log: Callable[[str], None]
) -> Iterator[threading.Thread]:
    """Answer requests at ``path`` from a thread of its own until the block ends.

    Requests are handled one at a time, whoever sends them; a connection may bring several.

    Args:
        path: Of the socket; a socket that a dead process left there is replaced.
        handle: Never raises.
        log: Takes one line an event.

    Raises:
        UserError: The path is too long for a socket here, or taken.
    """
    closing, turn = threading.Event(), threading.Lock()
    seats = threading.BoundedSemaphore(MOST_CONNECTIONS)

    def converse(connection: socket.socket) -> None:
        with seats, connection:
            try:
                while not closing.is_set():
                    request = read_envelope(_receiver(connection))
                    with turn:
                        reply = handle(request)
                    connection.settimeout(TRANSFER_S)
                    connection.sendall(reply.to_bytes())
            except EOFError:
                pass
            except (MessageError, OSError) as error:
                log(f"{path.name}: a request was dropped ({error})")

    def accept(listener: socket.socket) -> None:
        while not closing.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            if seats.acquire(blocking=False):
                seats.release()
                threading.Thread(target=converse, args=(connection,), daemon=True).start()
            else:
                connection.close()

    with _listen(path) as listener:
        thread = threading.Thread(target=accept, args=(listener,), daemon=True, name="resident-socket")
        thread.start()
        try:
            yield thread
        finally:
            closing.set()
            listener.close()
            thread.join(timeout=2)
            path.unlink(missing_ok=True)


def ask(path: Path, envelope: Envelope, timeout_s: float) -> Envelope:
    """Send one message to the resident at ``path`` and return its answer.

    Args:
        path: Its socket.
        envelope: The message.
        timeout_s: For all of it, training included.

    Raises:
        Unreachable: Nobody answers there, or not in time.
        MessageError: The answer is not an envelope.
    """
    end_s = time.monotonic() + timeout_s
    try:
        with socket.socket(socket.AF_UNIX) as connection, _reachable(path) as address:
            connection.settimeout(min(TRANSFER_S, timeout_s))
            connection.connect(address)
            connection.sendall(envelope.to_bytes())
            return read_envelope(_receiver(connection, end_s))
    except (OSError, EOFError) as error:
        reason = "closed the connection" if isinstance(error, EOFError) else (str(error) or type(error).__name__)
        raise Unreachable(
            f"{path}: no answer from the resident ({reason}); start `python -m edge_runtime client`"
        ) from error


@contextlib.contextmanager
def _listen(path: Path) -> Iterator[socket.socket]:
    listener = socket.socket(socket.AF_UNIX)
    with listener, _reachable(path) as address:
        if path.is_socket():
            _refuse_living(path, address)
            path.unlink()
        try:
            # Nobody else may connect, not even before a chmod: the mode is part of creating it.
            before = os.umask(0o177)
            try:
                listener.bind(address)
            finally:
                os.umask(before)
        except OSError as error:
            raise UserError("--state", str(path), f"a place for a socket ({error.strerror})") from error
        listener.listen(MOST_CONNECTIONS)
        listener.settimeout(0.2)
        yield listener


def _refuse_living(path: Path, address: str) -> None:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        with contextlib.suppress(OSError):
            probe.connect(address)
            raise UserError("--state", str(path), "a socket that no other client serves", "stop the other client")


@contextlib.contextmanager
def _reachable(path: Path) -> Iterator[str]:
    """The address to bind or connect to: a path that is too long is reached through its open directory."""
    if len(os.fsencode(path)) <= _LONGEST_PATH_BYTES:
        yield str(path)
        return
    if not Path("/proc/self/fd").is_dir():
        raise UserError("--state", str(path.parent), f"a path of at most {_LONGEST_PATH_BYTES} bytes with its socket")
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def _receiver(connection: socket.socket, first_byte_by_s: float | None = None) -> Callable[[int], bytes]:
    """Reads exactly so many bytes. The first may take until then (None: for ever), the others ``TRANSFER_S``.

    Raises:
        EOFError: The other side closed between two messages.
        TimeoutError: Too slow.
    """
    end_s: float | None = first_byte_by_s
    started = False

    def receive(size: int) -> bytes:
        nonlocal end_s, started
        content = bytearray()
        while len(content) < size:
            connection.settimeout(None if end_s is None else max(end_s - time.monotonic(), 0.001))
            piece = connection.recv(min(size - len(content), 1 << 20))
            if not piece:
                raise MessageError("message: cut short") if started else EOFError
            content += piece
            if not started:
                started, end_s = True, time.monotonic() + TRANSFER_S
        return bytes(content)

    return receive
