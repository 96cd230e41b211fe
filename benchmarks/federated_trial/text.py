"""Two federations of text, and the public text that the base model is trained on.

A client is a speaking role of tinyshakespeare, or a module (or a slice of the language reference's topics) of
Python's documentation. The last part of each client's text is held out.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = "\n" + "".join(chr(code) for code in range(32, 127))
_UNKNOWN = VOCABULARY.index("?")
_CLIENTS = 40
_TOPIC_CLIENTS = 8
_CLIENT_CHARACTERS = 40_000
_HELD_OUT_RATIO = 0.15
_SKIPPED_FOLDERS = frozenset({"site-packages", "test", "tests", "lib2to3", "idlelib", "pydoc_data", "turtledemo"})


@dataclass(frozen=True, slots=True)
class Federation:
    """The clients' text: training characters end to end, and held-out windows.

    Attributes:
        name: What it is called in tables.
        train: Token ids of all clients (total,).
        starts: Where each client's text begins (C,).
        lengths: Its length (C,).
        held_out: Windows of each client (C, W, T + 1).
    """

    name: str
    train: Tensor
    starts: Tensor
    lengths: Tensor
    held_out: Tensor

    @property
    def clients(self) -> int:
        return len(self.starts)

    def to(self, device: torch.device) -> Federation:
        parts = (self.train, self.starts, self.lengths, self.held_out)
        return Federation(self.name, *(part.to(device) for part in parts))


def read_federation(name: str, folder: Path, context: int, windows: int) -> Federation:
    """The federation called ``roles`` or ``docs``.

    Args:
        name: Which.
        folder: Holds tinyshakespeare.txt; docs.json, when there, is used instead of this interpreter's documentation.
        context: Tokens a window predicts.
        windows: Held-out windows a client.

    Raises:
        ValueError: A client's text is too short for its held-out windows.
    """
    if name == "roles":
        texts = split_roles((folder / "tinyshakespeare.txt").read_text(encoding="utf-8"))
    elif (folder / "docs.json").exists():
        texts = json.loads((folder / "docs.json").read_text(encoding="utf-8"))
    else:
        texts = split_documentation()
    return federate(name, texts, context, windows)


def federate(name: str, texts: dict[str, str], context: int, windows: int) -> Federation:
    """One client a text; its tail is held out, at least as long as the windows need.

    Raises:
        ValueError: A text is shorter than three times its held-out part.
    """
    train, held_out, lengths = [], [], []
    for client, text in texts.items():
        ids = encode_text(text)
        kept_back = max(int(len(ids) * _HELD_OUT_RATIO), windows * (context + 1))
        if 3 * kept_back > len(ids):
            raise ValueError(f"{name}: client {client} has {len(ids)} characters, too few to hold out {kept_back}")
        tail = ids[-kept_back:]
        first = torch.linspace(0, kept_back - context - 1, windows).long()
        held_out.append(tail[first[:, None] + torch.arange(context + 1)])
        train.append(ids[:-kept_back])
        lengths.append(len(ids) - kept_back)
    sizes = torch.tensor(lengths)
    return Federation(name, torch.cat(train), sizes.cumsum(0) - sizes, sizes, torch.stack(held_out))


def split_roles(play: str) -> dict[str, str]:
    """The speeches of the roles with the most text, most first."""
    speeches: dict[str, list[str]] = defaultdict(list)
    for speech in play.split("\n\n"):
        role, _, words = speech.partition(":\n")
        if words:
            speeches[role].append(words)
    texts = {role: "\n".join(parts) + "\n" for role, parts in speeches.items()}
    return {role: texts[role] for role in _longest(texts, _CLIENTS)}


def split_documentation() -> dict[str, str]:
    """The language reference's topics in alphabetical slices, and the modules with the most docstrings."""
    from pydoc_data.topics import topics

    reference = "\n".join(topics[name] for name in sorted(topics))
    step = len(reference) // _TOPIC_CLIENTS
    texts = {f"topics {i}": reference[i * step : (i + 1) * step][:_CLIENT_CHARACTERS] for i in range(_TOPIC_CLIENTS)}
    modules = _module_docstrings()
    chosen = _longest(modules, _CLIENTS - _TOPIC_CLIENTS)
    return texts | {name: modules[name][:_CLIENT_CHARACTERS] for name in chosen}


def encode_text(text: str) -> Tensor:
    """Token ids (n,): one a character, unknown characters as a question mark."""
    ids = {character: i for i, character in enumerate(VOCABULARY)}
    return torch.tensor([ids.get(character, _UNKNOWN) for character in text])


def _module_docstrings() -> dict[str, str]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).parts
        if not _SKIPPED_FOLDERS.intersection(parts):
            found[parts[0].removesuffix(".py")] += _docstrings(path)
    return {name: "\n".join(parts) for name, parts in found.items()}


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # the library ships files that are broken on purpose
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return [text for text in texts if text]


def _longest(texts: dict[str, str], count: int) -> list[str]:
    return sorted(texts, key=lambda name: (-len(texts[name]), name))[:count]
