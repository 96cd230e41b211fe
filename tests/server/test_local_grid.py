from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from server.local_grid import NODE_UNAVAILABLE, LocalGrid


def record(**values):
    return RecordDict({"c": ConfigRecord(values)})


def doubled(content):
    return record(n=2 * content.config_records["c"]["n"])


def message(node, n=1):
    return Message(record(n=n), dst_node_id=node, message_type="train", ttl=60.0, group_id="g")


def refuse(content):
    raise ConnectionError("its cable")


def ignore(content):
    raise TimeoutError


def test_it_is_a_grid_of_its_handlers() -> None:
    grid = LocalGrid({3: doubled, 5: doubled})
    assert isinstance(grid, Grid) and list(grid.get_node_ids()) == [3, 5]
    assert [node.node_id for node in grid.get_nodes()] == [3, 5] and grid.run.run_id == 1


def test_a_reply_is_computed_when_it_is_pulled_and_only_once() -> None:
    calls = []
    grid = LocalGrid({1: lambda content: (calls.append(1), doubled(content))[1]})
    ids = list(grid.push_messages([message(1, 21), message(1, 4)]))
    assert len(set(ids)) == 2 and not calls
    replies = list(grid.pull_messages(ids[:1]))
    assert len(calls) == 1 and replies[0].content.config_records["c"]["n"] == 42
    assert (replies[0].metadata.reply_to_message_id, replies[0].metadata.src_node_id) == (ids[0], 1)
    assert list(grid.pull_messages(ids[:1])) == [] and len(calls) == 1
    assert next(iter(grid.pull_messages(ids))).content.config_records["c"]["n"] == 8
    assert not grid._waiting


def test_a_node_that_went_away_or_never_was_is_an_error_and_a_silent_one_stays_silent() -> None:
    grid = LocalGrid({1: refuse, 2: ignore})
    ids = list(grid.push_messages([message(1), message(2), message(9)]))
    for reply, node in zip(grid.pull_messages(ids), (1, 9), strict=True):
        assert reply.has_error() and reply.error.code == NODE_UNAVAILABLE and reply.metadata.src_node_id == node
    assert list(grid.pull_messages(ids)) == []
    grid.handlers[2] = doubled
    assert [r.content.config_records["c"]["n"] for r in grid.pull_messages(ids)] == [2]


def test_a_bug_in_a_simulated_device_is_not_hidden() -> None:
    grid = LocalGrid({1: lambda content: 1 / 0})
    ids = list(grid.push_messages([message(1)]))
    with pytest.raises(ZeroDivisionError):
        list(grid.pull_messages(ids))


def test_flowers_own_way_to_send_and_wait_works() -> None:
    grid = LocalGrid({1: doubled, 2: doubled})
    replies = list(grid.send_and_receive([message(1, 5), message(2, 6)], timeout=1.0))
    assert [r.content.config_records["c"]["n"] for r in replies] == [10, 12]
    created = grid.create_message(record(n=1), "train", 2, "g", 9.0)
    assert (created.metadata.dst_node_id, created.metadata.ttl) == (2, 9.0)
