"""Flower's ServerApp: the round loop over a Grid. It brings no strategy, because a strategy holds every reply.

Started by the SuperLink for a run whose configuration names the federation's home and name; the federation's own
directory holds everything else. If there is a checkpoint, it goes on after it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from edge_runtime.formats.byte_array import unpack_byte_array
from edge_runtime.formats.envelope import Envelope, envelope_from_text, header_text
from edge_runtime.formats.errors import MessageError, SevenfoldError, UserError
from server.config import config_from_json
from server.federation import open_federation, read_layout, read_manifest
from server.home import Home
from server.registry import enrolled
from server.rounds import run_federation
from server.transport import Arrival

RECORD, PAYLOAD = "sevenfold", "payload"
PULL_AT_ONCE = 4  # replies that stand in memory together
LOCK_FILE = "lock"

log = logging.getLogger(__name__)
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation to its last round."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    home, name = Path(str(context.run_config["home"])), str(context.run_config["federation"])
    run_on_grid(grid, home, name)


def run_on_grid(
    grid: Grid,
    home: Path,
    name: str,
    report: Callable[[Mapping[str, Any]], None] = lambda record: None,
    *,
    registered: bool = True,
) -> None:
    """Run a federation whose ``config.json`` lies in its directory.

    Args:
        grid: Flower's, or a LocalGrid.
        home: The federation home.
        name: The federation.
        report: Called after each round.
        registered: Take devices whose keys are in the registry only.
    """
    directory = home / "runs" / name
    with sole_runner(directory):
        config = config_from_json(directory / "config.json")
        layout = read_layout(config, read_manifest(config))
        federation = open_federation(
            config,
            layout,
            directory,
            FlowerTransport(grid),
            clock=time.time,
            sleep=time.sleep,
            enrolled=(lambda node: identify(Home(home), node)) if registered else None,
        )
        try:
            run_federation(federation, report)
        except SevenfoldError as error:
            federation.ledger.append({"event": "failed", "time": time.time(), "reason": str(error)})
            raise


def identify(home: Home, node: int) -> tuple[str, str] | None:
    """The name and the device key (hex) that were enrolled with the key that a node authenticates with."""
    known = {device.node: (device.name, device.public_key) for device in enrolled(home) if not device.revoked}
    return known.get(node)


class FlowerTransport:
    """Envelopes over Flower's Message API: the header in a ConfigRecord, the payload as one Array of bytes."""

    def __init__(self, grid: Grid, patience_s: float = 5.0) -> None:
        self._grid, self._patience_s = grid, patience_s
        self._asked: dict[str, int] = {}
        self._stalled: dict[Future[list[Message]], list[str]] = {}

    def nodes(self) -> list[int]:
        """Nodes that Flower counts as online."""
        return list(self._grid.get_node_ids())

    def push(self, messages: Sequence[tuple[int, Envelope]], ttl_s: float, group: str) -> list[str]:
        """Send; equal payloads become one object that Flower stores once."""
        payloads: dict[int, ArrayRecord] = {}
        outgoing = []
        for node, envelope in messages:
            record = to_record(envelope, payloads)
            kind = MessageType.TRAIN if envelope.kind == "plan" else MessageType.QUERY
            outgoing.append(Message(record, dst_node_id=node, message_type=kind, ttl=ttl_s, group_id=group))
        ids = list(self._grid.push_messages(outgoing))
        if len(ids) != len(outgoing) or None in ids:
            raise ConnectionError("the SuperLink did not take every message")
        self._asked |= {message_id: node for message_id, (node, _) in zip(ids, messages, strict=True)}
        return ids

    def pull(self, message_ids: Collection[str]) -> list[Arrival]:
        """The first few replies that are there.

        Flower hands out a reply as soon as it is announced and then waits, up to three minutes, for its bytes. A
        device that dies while it uploads, or never means to, would stop everybody: a pull that takes longer than
        our patience goes on in its own thread, and the others are pulled meanwhile.
        """
        for future in [future for future in self._stalled if future.done()]:
            del self._stalled[future]
            if replies := future.result():
                return [self._arrival(reply) for reply in replies]
        under_way = {message_id for ids in self._stalled.values() for message_id in ids}
        wanted = [message_id for message_id in message_ids if message_id not in under_way]
        for start in range(0, len(wanted), PULL_AT_ONCE):
            future = _in_background(self._grid, wanted[start : start + PULL_AT_ONCE])
            try:
                replies = future.result(self._patience_s)
            except FutureTimeout:
                log.warning("a reply was announced and does not come; the others are pulled meanwhile")
                self._stalled[future] = wanted[start : start + PULL_AT_ONCE]
                continue
            if replies:
                return [self._arrival(reply) for reply in replies]
        return []

    def _arrival(self, reply: Message) -> Arrival:
        message_id = reply.metadata.reply_to_message_id
        node = self._asked.pop(message_id, reply.metadata.src_node_id)
        if reply.has_error():
            return Arrival(message_id, node, None, f"flower error {reply.error.code}")
        try:
            return Arrival(message_id, node, from_record(reply.content))
        except MessageError as error:
            log.warning("node %d: %s", node, error)
            return Arrival(message_id, node, Envelope("malformed", {}))


def _in_background(grid: Grid, message_ids: list[str]) -> Future[list[Message]]:
    """Pull in a thread that does not keep the process alive."""
    future: Future[list[Message]] = Future()

    def work() -> None:
        try:
            future.set_result(list(grid.pull_messages(message_ids)))
        except BaseException as error:  # raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=work, name="pull", daemon=True).start()
    return future


def to_record(envelope: Envelope, payloads: dict[int, ArrayRecord] | None = None) -> RecordDict:
    """An envelope as Flower carries it; ``payloads`` shares the records of equal payload objects."""
    record = RecordDict({RECORD: ConfigRecord({"header": header_text(envelope)})})
    if envelope.payload:
        known = {} if payloads is None else payloads
        key = hash(envelope.payload)
        if key not in known:
            known[key] = ArrayRecord({PAYLOAD: Array(np.frombuffer(envelope.payload, np.uint8))})
        record[PAYLOAD] = known[key]
    return record


def from_record(record: RecordDict) -> Envelope:
    """Inverse of ``to_record`` for what another machine sent: nothing is decoded before its size is known.

    Raises:
        MessageError: Not such a record, or larger than allowed.
    """
    if RECORD not in record.config_records or not set(record) <= {RECORD, PAYLOAD}:
        raise MessageError("message: not of this protocol")
    header = record.config_records[RECORD].get("header")
    if not isinstance(header, str):
        raise MessageError("message: no header")
    return envelope_from_text(header, _payload(record))


def _payload(record: RecordDict) -> bytes:
    if PAYLOAD not in record:
        return b""
    arrays = record.array_records.get(PAYLOAD)
    array = None if arrays is None else arrays.get(PAYLOAD)
    if array is None or len(arrays or ()) != 1 or array.dtype != "uint8" or len(array.shape) != 1:
        raise MessageError("message: the payload is not one array of bytes")
    if array.stype != "numpy.ndarray":
        raise MessageError("message: the payload is not a NumPy file of bytes")
    return unpack_byte_array(array.data, array.shape[0])


@contextlib.contextmanager
def sole_runner(directory: Path) -> Iterator[None]:
    """Hold a federation's directory; a ServerApp left over from a SuperLink that was killed is ended first."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _end_left_over(file.name)
            _lock_within(file.fileno(), 30.0)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _end_left_over(lock: str) -> None:
    pid = Path(lock).read_text().strip()
    command = Path("/proc") / (pid or "0") / "cmdline"
    if pid.isdigit() and command.exists() and b"flwr-serverapp" in command.read_bytes():
        log.warning("ending process %s, which still runs this federation", pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def _lock_within(descriptor: int, seconds: float) -> None:
    end_s = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end_s:
                raise UserError(
                    "federation", "running already", "one run at a time", "stop the other run, then `resume`"
                ) from None
            time.sleep(0.2)
