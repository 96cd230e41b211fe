"""Instruction rows: alpaca, sharegpt and messages columns become one form, a tuple of (role, content).

Roles are ``system``, ``user`` and ``assistant``: an optional system message first, then user and assistant in turn,
with at least one answer. Rows that hold anything else are refused by name, never repaired.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edge_runtime.formats.errors import UserError

Message = tuple[str, str]
"""(role, content)"""

MAX_MESSAGES = 4096
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
_TOOL_ROLES = {"tool", "function", "function_call", "observation", "tool_call", "tool_response", "ipython"}
_TOOL_FIELDS = ("tool_calls", "function_call", "tool_call_id")
_SHOWN_CHARS = 60


def row_messages(row: Mapping[str, Any], source: str) -> tuple[Message, ...] | None:
    """The conversation of a row, or None when it has no instruction columns.

    Columns, the first that fits: ``messages`` (role, content); ``conversations`` (from, value, or role, content), with
    an optional ``system``; ``instruction`` and ``output`` with optional ``input``, ``system`` and ``history``, a list
    of pairs. A list may also be a string of JSON, as parquet files have it.

    Args:
        row: Column to value.
        source: File and line, for the error.

    Raises:
        UserError: Roles are unknown, out of order or of a tool; contents are no text or empty.
    """
    for column in ("messages", "conversations"):
        if row.get(column) is not None:
            _refuse_tools(row, source)
            opening = _system(row, source) if column == "conversations" else []
            items = _items(row[column], f"{source} {column}")
            return check_messages([*opening, *(_message(item, f"{source} {column}") for item in items)], source)
    if isinstance(row.get("instruction"), str) and "output" in row:
        return check_messages(_alpaca(row, source), source)
    return None


def check_messages(messages: list[Message], source: str) -> tuple[Message, ...]:
    """The messages, when they are a conversation that something can be learned from.

    Args:
        messages: (role, content) with roles of ours.
        source: Named in the error.

    Raises:
        UserError: A content is empty, roles do not alternate, or nobody answers.
    """
    turns = messages[1:] if messages and messages[0][0] == "system" else messages
    for number, (role, _) in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            place = f"{source} message {len(messages) - len(turns) + number + 1}"
            raise UserError(place, role, f"{expected}: user and assistant take turns, a system message stands first")
    if len(turns) < 2:
        raise UserError(source, [role for role, _ in messages], "a user's message and an assistant's answer")
    for number, (role, content) in enumerate(messages, 1):
        if not content.strip():
            raise UserError(f"{source} message {number}", content[:_SHOWN_CHARS], f"some text of the {role}")
    return tuple(messages)


def _items(value: Any, place: str) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UserError(place, value[:_SHOWN_CHARS], "a list, or a string that holds one as JSON") from None
    if not isinstance(value, list):
        raise UserError(place, type(value).__name__, "a list of messages")
    if len(value) > MAX_MESSAGES:
        raise UserError(place, f"{len(value)} messages", f"at most {MAX_MESSAGES}")
    return value


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, dict):
        raise UserError(place, type(item).__name__, "messages with role and content, or from and value")
    role, content = (item.get("role"), item.get("content")) if "role" in item else (item.get("from"), item.get("value"))
    shown = str(role)[:_SHOWN_CHARS]
    if shown in _TOOL_ROLES or any(item.get(field) for field in _TOOL_FIELDS):
        raise UserError(place, f"a tool message, role {shown}", "system, user and assistant: tools are not supported")
    if not isinstance(role, str) or role not in _ROLES:
        raise UserError(place, f"role {shown}", f"a role of {' '.join(_ROLES)}")
    return _ROLES[role], _text(content, place)


def _text(content: Any, place: str) -> str:
    """A string, or a list of parts that are all text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        kinds = [part.get("type") if isinstance(part, dict) else type(part).__name__ for part in content]
        if other := next((kind for kind in kinds if kind != "text"), None):
            raise UserError(place, f"a part of type {other}", "parts of type text", "pictures and sound go elsewhere")
        texts = [part.get("text") for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)
    raise UserError(place, f"a content of type {type(content).__name__}", "text, or a list of parts of type text")


def _refuse_tools(row: Mapping[str, Any], source: str) -> None:
    if tools := row.get("tools"):
        raise UserError(f"{source} tools", str(tools)[:_SHOWN_CHARS], "no tools: they are not supported")


def _system(row: Mapping[str, Any], place: str) -> list[Message]:
    """The system column of sharegpt and alpaca rows; often there and empty."""
    system = row.get("system")
    if system is None or system == "":
        return []
    return [("system", _text(system, f"{place} system"))]


def _alpaca(row: Mapping[str, Any], source: str) -> list[Message]:
    """The input stands under its instruction, an empty line between."""
    messages = _system(row, source)
    for pair in _items(row.get("history") or [], f"{source} history"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"{source} history", str(pair)[:_SHOWN_CHARS], "pairs of instruction and answer")
        messages += [("user", _text(pair[0], source)), ("assistant", _text(pair[1], source))]
    parts = [row["instruction"], row.get("input") or ""]
    prompt = "\n\n".join(part for part in (_text(part, source) for part in parts) if part)
    return [*messages, ("user", prompt), ("assistant", _text(row["output"], f"{source} output"))]
