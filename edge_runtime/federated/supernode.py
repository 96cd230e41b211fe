"""Our SuperNode: one process that takes messages from the SuperLink and answers them with the resident.

Flower's own SuperNode starts a process for every message and runs code that the server brings (a FAB). This one does
neither: it speaks the Fleet API with Flower's message classes, and fetches no FAB. It is pinned to the internals of
flwr 1.41, which a contract test holds on to.

What a crash may not lose: the message being answered is noted in the ``inbox`` before its objects are pulled and
confirmed only after the reply was pushed; the reply itself is in the resident's state. So a device that was killed
anywhere in between answers after its restart. It comes back under the node id it had, without waiting until
the SuperLink has taken it for gone, which Flower's activation of a node would need.
"""

from __future__ import annotations

import os

# flwr reads these when it is imported.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
    validate_object_content,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from edge_runtime.config import CLIENT_DEFAULTS, ClientConfig
from edge_runtime.federated.client_app import from_record, to_record
from edge_runtime.federated.state import DeviceState
from edge_runtime.federated.stopping import Stop, Stopped
from edge_runtime.formats.envelope import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, Envelope, seal
from edge_runtime.formats.errors import MessageError, UserError
from edge_runtime.formats.messages import Decline, Reason

MOST_OBJECTS = 256  # a payload of 512 MiB in chunks of 5 MiB, and the records around it
MOST_TREE_DEPTH = 8
MOST_MESSAGE_BYTES = MAX_PAYLOAD_BYTES + MAX_HEADER_BYTES + (1 << 20)
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 20.0
_PULL_WITHIN_S = 600.0
_INBOX, _NODE_FILE = "inbox", "node.json"


@dataclass(frozen=True, slots=True)
class Link:
    """Where the SuperLink is.

    Attributes:
        address: ``host:port``.
        root_certificate: Of its TLS certificate; None: no TLS, and the node registers itself.
    """

    address: str
    root_certificate: Path | None


def serve_superlink(
    link: Link,
    key: ec.EllipticCurvePrivateKey,
    state: DeviceState,
    handle: Callable[[Envelope], Envelope],
    stop: Stop,
    log: Callable[[str], None],
    config: ClientConfig = CLIENT_DEFAULTS,
) -> None:
    """Answer messages until told to stop; a SuperLink that is away is waited for.

    Args:
        link: The SuperLink.
        key: EC P-384, registered there.
        state: Remembers the node's id and the message being answered.
        handle: The resident.
        stop: Ends it.
        log: Takes one line an event.
        config: How often to ask.

    Raises:
        UserError: The SuperLink does not know the key, or its certificate is not signed by the given one.
    """
    pause_s, known = SHORTEST_PAUSE_S, False
    while not stop():
        try:
            with stop.interruptible(), _connect(link, key, state, config) as node:
                pause_s, known = SHORTEST_PAUSE_S, True
                log(f"connected to {link.address} as node {node.id}")
                _converse(node, state, handle, stop, log, config)
        except (httpx.TransportError, _Away, ValueError) as error:  # ValueError: no Fleet API answers there
            if not known and "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise _untrusted(link) from error
            if pause_s == SHORTEST_PAUSE_S:
                reason = str(error)[:120] or type(error).__name__
                log(f"{link.address} is away ({reason}); trying again until it is back")
            # Devices that lost the same SuperLink must not come back in step.
            stop.wait(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
        except Stopped:
            return


class _Away(Exception):
    """The SuperLink answers, but not with what the conversation needs; connect again."""


class _NodeOfLink:
    """The calls of one node."""

    def __init__(self, client: FleetHttpClient, node_id: int, config: ClientConfig) -> None:
        self.id, self._node = node_id, Node(node_id=node_id)
        self._client, self._config = client, config

    def beat(self) -> bool:
        """Say that the device is there; false when the SuperLink does not know the node."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=self._config.heartbeat_s)
        return bool(self._client.SendNodeHeartbeat(request).success)

    def receive(self) -> PullMessagesResponse | None:
        """The next message without its objects."""
        response: PullMessagesResponse = self._client.PullMessages(PullMessagesRequest(node=self._node))
        return response if response.messages_list and response.message_object_trees else None

    def pull(self, message: Message, tree: ObjectTree) -> Envelope:
        """The message's content.

        Raises:
            MessageError: More or larger objects than a message may have, or not a message of this protocol.
            ObjectPullError: The SuperLink has forgotten them.
        """
        ids = _object_ids(tree)
        fetch = make_pull_object_fn_protobuf(self._client.PullObject, self._node, message.metadata.run_id)
        lock, left_bytes = threading.Lock(), MOST_MESSAGE_BYTES

        def fetch_bounded(object_id: str) -> bytes:
            nonlocal left_bytes
            content = fetch(object_id)
            with lock:
                left_bytes -= len(content)
            if left_bytes < 0 or get_object_id(content) != object_id:
                raise MessageError("message: an object is too large, or not what its name says")
            return content

        contents = pull_objects(ids, fetch_bounded, max_time=_PULL_WITHIN_S, initial_backoff=0.1, backoff_cap=2.0)
        try:
            for content in contents.values():
                validate_object_content(content)
            whole = inflate_object_from_contents(tree.object_id, contents)
            if not isinstance(whole, Message) or not whole.has_content():
                raise MessageError("message: the objects are not a message with content")
            return from_record(whole.content)
        except MessageError:
            raise
        except Exception as error:  # Flower's inflating code raises whatever damaged bytes lead it to
            raise MessageError(f"message: its objects cannot be read ({str(error)[:80]})") from error

    def push(self, reply: Message, seconds: float) -> None:
        """Send a reply, its objects first known by name, then those that the SuperLink lacks."""
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            tree, objects = get_object_tree(reply), get_all_nested_objects(reply)
            response = self._client.PushMessages(
                PushMessagesRequest(
                    node=self._node,
                    messages_list=[message_to_proto(remove_content_from_message(reply))],
                    message_object_trees=[tree],
                    clientapp_runtime_list=[seconds],
                )
            )
            store = make_push_object_fn_protobuf(
                self._client.PushObject, self._node, reply.metadata.run_id, response.session_id
            )
            push_objects(objects, store, object_ids_to_push=set(response.objects_to_push))

    def confirm(self, message: Message) -> None:
        """Tell the SuperLink that it may delete the message."""
        metadata = message.metadata
        self._client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self._node, run_id=metadata.run_id, message_object_id=metadata.message_id
            )
        )

    def leave(self) -> None:
        """Say that the device goes."""
        self._client.DeactivateNode(DeactivateNodeRequest(node_id=self.id))


@contextlib.contextmanager
def _connect(
    link: Link, key: ec.EllipticCurvePrivateKey, state: DeviceState, config: ClientConfig
) -> Iterator[_NodeOfLink]:
    """A node of the SuperLink, its heart beating in a thread until the block ends."""
    certificate = None if link.root_certificate is None else str(link.root_certificate)
    signer = NodeAuthHttpInterceptor(key, key.public_key())
    with FleetHttpClient.from_server_address(link.address, certificate is None, certificate, [signer]) as client:
        node = _join(client, link, key, state, config)
        gone = threading.Event()
        beating = threading.Thread(target=_beat_until, args=(node, gone, config.heartbeat_s), daemon=True)
        beating.start()
        try:
            yield node
        finally:
            gone.set()
            with contextlib.suppress(httpx.HTTPError):
                node.leave()


def _join(
    client: FleetHttpClient, link: Link, key: ec.EllipticCurvePrivateKey, state: DeviceState, config: ClientConfig
) -> _NodeOfLink:
    """The node that this key is registered as."""
    remembered = state.load_json(_NODE_FILE)
    if remembered.get("superlink") == link.address and type(remembered.get("node")) is int:
        node = _NodeOfLink(client, remembered["node"], config)
        # A heartbeat of a node that is online, or was, is an activation; activating it again would be refused.
        with contextlib.suppress(httpx.HTTPStatusError):
            if node.beat():
                return node
    raw_key = public_key_to_bytes(key.public_key())
    activation = ActivateNodeRequest(public_key=raw_key, heartbeat_interval=config.heartbeat_s)
    try:
        if link.root_certificate is None:
            with contextlib.suppress(httpx.HTTPStatusError):  # registered before
                client.RegisterNode(RegisterNodeFleetRequest(public_key=raw_key))
        node = _NodeOfLink(client, client.ActivateNode(activation).node_id, config)
    except httpx.HTTPStatusError as error:
        if error.response.status_code >= 500:
            raise _Away(f"status {error.response.status_code}") from error
        next_step = "give device.json of `client keys` to its operator: python -m server enrol device.json"
        raise UserError("--superlink", link.address, "a SuperLink where this device is enrolled", next_step) from error
    state.save_json(_NODE_FILE, {"superlink": link.address, "node": node.id})
    return node


def _beat_until(node: _NodeOfLink, gone: threading.Event, every_s: float) -> None:
    while not gone.wait(every_s * random.uniform(0.7, 0.9)):
        # Whatever is wrong, the conversation notices it too; this thread only must not end by it.
        with contextlib.suppress(httpx.HTTPError, RuntimeError, ValueError):
            node.beat()


def _converse(
    node: _NodeOfLink,
    state: DeviceState,
    handle: Callable[[Envelope], Envelope],
    stop: Stop,
    log: Callable[[str], None],
    config: ClientConfig,
) -> None:
    """Ask for messages and answer them, often while they come, rarely when they do not."""
    if (left := state.load_bytes(_INBOX)) is not None:
        _answer_noted(node, left, state, handle, stop, log)
    last_s = time.monotonic()
    while not stop():
        try:
            received = node.receive()
        except (httpx.HTTPStatusError, ValueError) as error:
            raise _Away(str(error).splitlines()[0]) from error
        if received is not None:
            noted = received.SerializeToString()
            state.save_bytes(_INBOX, noted)
            _answer_noted(node, noted, state, handle, stop, log)
            last_s = time.monotonic()
            continue
        quiet_s = time.monotonic() - last_s
        longest_s = config.idle_poll_s if quiet_s > config.idle_after_s else config.longest_poll_s
        stop.wait(min(max(quiet_s / 10, config.shortest_poll_s), longest_s))  # at most a tenth later than it could


def _answer_noted(
    node: _NodeOfLink,
    noted: bytes,
    state: DeviceState,
    handle: Callable[[Envelope], Envelope],
    stop: Stop,
    log: Callable[[str], None],
) -> None:
    """Answer the message in the inbox, and forget it once its reply is with the SuperLink or nobody waits for it."""
    try:
        response = PullMessagesResponse.FromString(noted)
        message, tree = message_from_proto(response.messages_list[0]), response.message_object_trees[0]
        if message.metadata.created_at + message.metadata.ttl > time.time():
            _answer(node, message, tree, handle, stop)
    except ObjectPullError as error:
        log(f"a message was dropped ({str(error)[:120]})")
    except ObjectPushError as error:
        raise _Away(str(error)) from error
    except httpx.HTTPStatusError as error:
        if error.response.status_code >= 500:
            raise _Away(f"status {error.response.status_code}") from error
        log(f"a message was dropped: its run has ended ({error.response.status_code})")
    state.forget(_INBOX)


def _answer(
    node: _NodeOfLink, message: Message, tree: ObjectTree, handle: Callable[[Envelope], Envelope], stop: Stop
) -> None:
    started_s = time.monotonic()
    try:
        envelope = node.pull(message, tree)
    except MessageError as error:
        detail = "".join(letter if " " <= letter <= "~" else "?" for letter in str(error))[:200]
        answer = seal(Decline(Reason.INVALID, detail, 0.0))
    else:
        with stop.finishing():
            answer = handle(envelope)
    node.push(Message(to_record(answer), reply_to=message), time.monotonic() - started_s)
    node.confirm(message)


def _object_ids(tree: ObjectTree) -> list[str]:
    """Ids of a message's objects, each once, children first.

    Raises:
        MessageError: More than a message may have, or nested deeper.
    """
    found: dict[str, None] = {}
    seen = 0

    def walk(part: ObjectTree, depth: int) -> None:
        nonlocal seen
        seen += 1
        if seen > MOST_OBJECTS or depth > MOST_TREE_DEPTH:
            raise MessageError(f"message: more than {MOST_OBJECTS} objects, or nested deeper than {MOST_TREE_DEPTH}")
        for child in part.children:
            walk(child, depth + 1)
        found[part.object_id] = None

    walk(tree, 1)
    return list(found)


def _untrusted(link: Link) -> UserError:
    next_step = "take the SuperLink's ca.crt"
    return UserError(
        "--root-certificate", str(link.root_certificate), f"the one that {link.address} is signed by", next_step
    )
