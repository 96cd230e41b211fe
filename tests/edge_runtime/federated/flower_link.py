"""A SuperLink's own HTTP application in a thread, and a ServerApp's side of its state: Flower judges what we send."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SubStatus
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity

from edge_runtime.federated.client_app import from_record, to_record
from edge_runtime.formats.envelope import Envelope


@dataclass
class FlowerLink:
    """One SuperLink over a database; ``start`` and ``kill`` may follow each other."""

    database: Path
    port: int
    app: Any = None
    server: uvicorn.Server | None = None
    thread: threading.Thread | None = None
    run_id: int = 0
    certificate: Path | None = None
    key: Path | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def state(self) -> Any:
        return self.app.state.linkstate_factory.state()

    def start(self) -> None:
        from flwr.superlink.main import create_app

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FLWR_DATABASE", str(self.database))
            self.app = create_app()
        self.server = uvicorn.Server(self._settings())
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait_for(lambda: self.server is not None and self.server.started)

    def _settings(self) -> uvicorn.Config:
        files = {"ssl_certfile": self.certificate, "ssl_keyfile": self.key}
        return uvicorn.Config(self.app, port=self.port, log_level="critical", ws="none", **files)  # type: ignore[arg-type]

    def kill(self) -> None:
        """Close every connection at once."""
        assert self.server is not None and self.thread is not None
        self.server.force_exit = self.server.should_exit = True
        self.thread.join(timeout=20)

    def register(self, key: Any) -> int:
        public = public_key_to_bytes(key.public_key())
        return int(self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public, 0))

    def begin_run(self) -> None:
        kind = TaskType.SERVER_APP
        self.run_id = self.state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, kind)
        task = self.state.get_run_info(run_ids=[self.run_id])[0].primary_task_id
        assert self.state.claim_task(task) and self.state.activate_task(task)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task, self.run_id, 1

    def end_run(self) -> None:
        task = self.state.get_run_info(run_ids=[self.run_id])[0].primary_task_id
        assert self.state.finish_task(task, SubStatus.COMPLETED, "")

    def nodes(self) -> set[int]:
        return set(self.state.get_nodes(self.run_id))

    def send(self, node: int, record: Envelope | RecordDict, ttl_s: float = 600.0) -> str:
        """As a ServerApp pushes; the message's id."""
        content = to_record(record) if isinstance(record, Envelope) else record
        message = Message(content, node, "query", ttl=ttl_s)
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            tree, objects = get_object_tree(message), get_all_nested_objects(message)
            bare = message_from_proto(message_to_proto(remove_content_from_message(message)))
            session = self.state.start_session(self.run_id)
            stored, missing = self.state.store_message_and_object_tree(bare, tree, session)
            assert stored
            for object_id in missing:
                if not self.state.store_object(self.run_id, session, object_id, objects[object_id].deflate()):
                    break  # a message that is declined for its tree is confirmed before its objects are here
        return str(message.metadata.message_id)

    def receive(self, message_id: str, timeout_s: float = 60.0) -> Envelope:
        """As a ServerApp pulls."""
        found: list[Message] = []
        wait_for(lambda: bool(found.extend(self.state.get_message_res({message_id}, self.run_id)) or found), timeout_s)
        reply = found[0]
        assert not reply.has_error(), reply.error
        tree: ObjectTree = self.state.object_store.get_object_tree(reply.metadata.message_id)

        def pull(object_id: str) -> bytes:
            wait_for(lambda: bool(self.state.get_object(self.run_id, object_id)), timeout_s)
            return bytes(self.state.get_object(self.run_id, object_id))

        whole = pull_and_inflate_object_from_tree(tree, pull, lambda object_id: None, return_type=Message)
        return from_record(whole.content)


def wait_for(condition: Any, timeout_s: float = 60.0) -> None:
    """Another thread's work; fails loudly instead of hanging."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come about in time"
        threading.Event().wait(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
