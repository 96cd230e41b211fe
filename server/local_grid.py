"""Flower's Grid without a network: devices are functions in this process. For tests, studies and simulations.

A reply is computed when it is pulled and forgotten at once, so that any number of devices takes the memory of one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

from flwr.app import Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

Handler = Callable[[RecordDict], RecordDict]
NODE_UNAVAILABLE = 5


class LocalGrid(Grid):
    """A Grid over handlers.

    Args:
        handlers: Node id to the function that answers its messages. One that raises ConnectionError is a node that
            went away; one that raises TimeoutError never answers.
    """

    def __init__(self, handlers: Mapping[int, Handler]) -> None:
        self.handlers = dict(handlers)
        self._waiting: dict[str, Message] = {}
        self._ids = (f"local-{number}" for number in itertools.count())
        # Flower refuses to build a Message outside a task; this process is the server's.
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1

    def set_run(self, run: Run) -> None:
        """Runs mean nothing here."""

    @property
    def run(self) -> Run:
        """An empty run."""
        return Run.create_empty(1)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As Flower's, which is deprecated there."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes."""
        return list(self.handlers)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """All nodes, without keys."""
        return [NodeInfo(node_id=node) for node in self.handlers]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep the messages until their replies are pulled."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message_id = next(self._ids)
            self._waiting[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answer those of the messages whose handlers answer."""
        replies = []
        for message_id in message_ids:
            message = self._waiting.pop(message_id, None)
            reply = None if message is None else self._answer(message)
            if reply is not None:
                replies.append(reply)
            elif message is not None:
                self._waiting[message_id] = message
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push and pull in one call, as Flower's own strategies need it."""
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message | None:
        handler = self.handlers.get(message.metadata.dst_node_id)
        try:
            if handler is None:
                raise ConnectionError("no such node")
            reply = Message(handler(message.content), reply_to=message)
        except ConnectionError as error:
            reply = Message(Error(NODE_UNAVAILABLE, str(error)), reply_to=message)
        except TimeoutError:
            return None
        # `reply_to` is read from the message's id, which a real Grid also sets at push.
        return reply
