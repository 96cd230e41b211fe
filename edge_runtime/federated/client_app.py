"""The thin ClientApp for a stock flower-supernode: every message goes to the resident and its answer comes back.

Flower starts a process for every message; this one imports Flower, NumPy and the message formats, loads no model and
keeps nothing. Where the resident's socket lies is for the owner of the device to say, in the SuperNode's
``--node-config 'socket="/path/resident.sock"'`` or in ``SEVENFOLD_RESIDENT``; nothing that a server sends (the run's
configuration, the message) is looked at for it.

In Flower's simulation there is no such device. There, the operator of the simulation may set
``SEVENFOLD_SIMULATED_CLIENT=package.module:function``, a function that takes the number of the virtual device
(``partition-id``) and an envelope, and returns the answer.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from edge_runtime.federated.local_socket import Unreachable, ask
from edge_runtime.formats.byte_array import unpack_byte_array
from edge_runtime.formats.envelope import (
    MAX_HEADER_BYTES,
    Envelope,
    envelope_from_text,
    header_text,
    seal,
)
from edge_runtime.formats.errors import MessageError, UserError
from edge_runtime.formats.messages import Decline, Reason

RECORD, PAYLOAD = "sevenfold", "payload"
SOCKET_VARIABLE, SIMULATED_VARIABLE = "SEVENFOLD_RESIDENT", "SEVENFOLD_SIMULATED_CLIENT"
SOCKET_KEY = "socket"
NO_RESIDENT_RETRY_S = 60.0
_DEFAULT_WAIT_S = 600.0

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Greetings, scores and masking."""
    return answer_message(message, context.node_config)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Plans."""
    return answer_message(message, context.node_config)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The same as ``query``, for servers that ask under this name."""
    return answer_message(message, context.node_config)


def answer_message(message: Message, node_config: Mapping[str, object]) -> Message:
    """Flower's message, answered by whoever runs on this device.

    Raises:
        UserError: The device's owner has named no resident.
    """
    reply = answerer(node_config, os.environ)
    try:
        envelope = reply(from_record(message.content))
    except Unreachable as error:
        detail = "".join(letter if " " <= letter <= "~" else "?" for letter in str(error))[:200]
        envelope = seal(Decline(Reason.BUSY, detail, NO_RESIDENT_RETRY_S))
    except MessageError as error:
        detail = "".join(letter if " " <= letter <= "~" else "?" for letter in str(error))[:200]
        envelope = seal(Decline(Reason.INVALID, detail, 0.0))
    return Message(to_record(envelope), reply_to=message)


def answerer(node_config: Mapping[str, object], environment: Mapping[str, str]) -> Callable[[Envelope], Envelope]:
    """Who answers on this device.

    Args:
        node_config: Of the SuperNode, set by the device's owner.
        environment: Of this process.

    Raises:
        UserError: Neither a socket nor a simulated client is named.
    """
    named = node_config.get(SOCKET_KEY) or environment.get(SOCKET_VARIABLE)
    if isinstance(named, str) and named:
        return lambda envelope: ask(Path(named), envelope, wait_s(envelope))
    if simulated := environment.get(SIMULATED_VARIABLE):
        module, _, function = simulated.partition(":")
        client = getattr(importlib.import_module(module), function)
        number = int(str(node_config.get("partition-id", 0)))
        return lambda envelope: client(number, envelope)
    allowed = f"the path of a resident's socket in --node-config 'socket=\"...\"' or {SOCKET_VARIABLE}"
    raise UserError("socket", "none", allowed, f"in a simulation set {SIMULATED_VARIABLE}=module:function")


def wait_s(envelope: Envelope) -> float:
    """How long to wait for the resident: as long as the plan allows, and a little for the transfer."""
    deadline_s = envelope.header.get("deadline_s")
    if isinstance(deadline_s, int | float) and 0 < deadline_s <= 30 * 86400:
        return float(deadline_s) + 60.0
    return _DEFAULT_WAIT_S


def to_record(envelope: Envelope) -> RecordDict:
    """An envelope as Flower carries it: the header as text, the payload as one array of bytes."""
    record = RecordDict({RECORD: ConfigRecord({"header": header_text(envelope)})})
    if envelope.payload:
        record[PAYLOAD] = ArrayRecord({PAYLOAD: Array(np.frombuffer(envelope.payload, np.uint8))})
    return record


def from_record(record: RecordDict) -> Envelope:
    """Inverse of ``to_record`` for what another machine sent: nothing is decoded before its size is known.

    Raises:
        MessageError: Not such a record, or larger than allowed.
    """
    if RECORD not in record.config_records or not set(record) <= {RECORD, PAYLOAD}:
        raise MessageError("message: not of this protocol")
    header = record.config_records[RECORD].get("header")
    if not isinstance(header, str) or len(header) > MAX_HEADER_BYTES:
        raise MessageError("message: no header, or one that is too long")
    return envelope_from_text(header, _payload(record) if PAYLOAD in record else b"")


def _payload(record: RecordDict) -> bytes:
    arrays = record.array_records.get(PAYLOAD)
    array = None if arrays is None else arrays.get(PAYLOAD)
    if array is None or array.dtype != "uint8" or len(array.shape) != 1 or array.stype != "numpy.ndarray":
        raise MessageError("message: the payload is not one array of bytes")
    return unpack_byte_array(array.data, array.shape[0])
