"""``python -m pipeline.data.shards``: the training documents dealt out to clients, each the owner of whole modules.

A natural split that is not IID: one client holds the documentation of ``asyncio`` and ``xml``, another that of
``email``. A module is one .jsonl file, so that a device knows where its documents end. Held-out documents go to
nobody, so that the pipeline's held-out text stays unseen by the federation too.
"""

from __future__ import annotations

import argparse
import heapq
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from edge_runtime.formats.errors import SevenfoldError, UserError
from pipeline.artifacts import PROJECT, Layout, atomic_directory


class _Row(NamedTuple):
    document: str
    text: str
    source: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the shards, print a line for each client, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.data.shards", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="takes client-1 .. client-N")
    parser.add_argument("--clients", type=int, required=True, help="how many")
    corpus = Layout(PROJECT).corpus / "train.jsonl"
    parser.add_argument("--corpus", type=Path, default=corpus, help="cleaned training text (the pipeline's)")
    given = parser.parse_args(arguments)
    try:
        modules = group_by_module(read_training_rows(given.corpus))
        shards = deal(modules, given.clients)
        write_shards(given.out, shards)
    except SevenfoldError as error:
        print(error, file=sys.stderr)
        return 2
    for name, shard in shards.items():
        size_bytes = sum(map(len, shard.values()))
        largest = sorted(shard, key=lambda module: -len(shard[module]))[:4]
        print(f"{given.out / name}: {len(shard)} modules, {size_bytes} bytes: {' '.join(largest)} ...")
    return 0


def read_training_rows(corpus: Path) -> list[_Row]:
    """The rows of a cleaned training file.

    Raises:
        UserError: It is missing, holds something else, or shares documents with ``held_out.jsonl`` beside it.
    """
    rows = list(_read_rows(corpus))
    held_out = corpus.with_name("held_out.jsonl")
    if held_out.exists() and {row.document for row in rows} & {row.document for row in _read_rows(held_out)}:
        raise UserError("--corpus", str(corpus), "training documents only, it holds held-out ones", "take train.jsonl")
    if not rows:
        raise UserError("--corpus", str(corpus), "a file with at least one document", "run python -m pipeline")
    return rows


def group_by_module(rows: Sequence[_Row]) -> dict[str, list[str]]:
    """Module or topic to its texts, in the corpus' order."""
    modules: dict[str, list[str]] = {}
    for row in rows:
        modules.setdefault(module_of(row.source), []).append(row.text)
    return modules


def module_of(source: str) -> str:
    """``doc:asyncio.locks.Lock`` -> ``asyncio``, ``topic:with#as`` -> ``topic-with``, as a file name."""
    kind, _, name = source.partition(":")
    top = re.split(r"[.#]", name or kind)[0]
    return re.sub(r"[^A-Za-z0-9_-]", "_", f"topic-{top}" if kind == "topic" else top)[:80] or "_"


def deal(modules: Mapping[str, Sequence[str]], clients: int) -> dict[str, dict[str, str]]:
    """Client to module to its file's content: the largest module first, each to the client that has least.

    Longest-processing-time scheduling: no client holds more than 4/3 of the fullest client of the best split
    (Graham, "Bounds on multiprocessing timing anomalies", SIAM J. Appl. Math. 17, 1969).

    Raises:
        UserError: Fewer modules than clients, or no clients.
    """
    if not 1 <= clients <= len(modules):
        raise UserError("--clients", clients, f"1 to {len(modules)}, the number of modules", "choose fewer")
    files = {module: "".join(_line(text) for text in texts) for module, texts in modules.items()}
    shards: dict[str, dict[str, str]] = {f"client-{number}": {} for number in range(1, clients + 1)}
    loads = [(0, number) for number in range(1, clients + 1)]
    for module in sorted(files, key=lambda name: (-len(files[name]), name)):
        size_bytes, number = heapq.heappop(loads)
        shards[f"client-{number}"][module] = files[module]
        heapq.heappush(loads, (size_bytes + len(files[module]), number))
    return shards


def write_shards(out: Path, shards: Mapping[str, Mapping[str, str]]) -> None:
    """Write ``client-1/MODULE.jsonl`` and so on; the same shards again change nothing.

    Raises:
        UserError: A client's directory is there and holds something else, or belongs to another split.
    """
    present = sorted(path for path in out.glob("client-*")) if out.is_dir() else []
    if out.exists() and not out.is_dir():
        raise UserError("--out", str(out), "a new directory, or the same split's", "name another one")
    current = [path.name for path in present if path.name in shards and _holds(path, shards[path.name])]
    if other := next((path for path in present if path.name not in current), None):
        raise UserError("--out", str(other), "a new directory, or the same split's", "name another one, or remove it")
    for name, shard in shards.items():
        if name not in current:
            with atomic_directory(out / name) as folder:
                for module, content in shard.items():
                    (folder / f"{module}.jsonl").write_text(content, encoding="ascii")


def _line(text: str) -> str:
    return json.dumps({"text": text}) + "\n"  # ASCII


def _read_rows(path: Path) -> Iterator[_Row]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                yield _row(path, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("--corpus", str(path), f"a cleaned text file ({error})", "run python -m pipeline") from None


def _row(path: Path, number: int, line: str) -> _Row:
    try:
        row = json.loads(line)
        document, text, source = row["document"], row["text"], row["source"]
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        document = text = source = None
    if not (isinstance(document, str) and isinstance(text, str) and isinstance(source, str)):
        raise UserError(
            f"{path} line {number}", line[:60], "an object with document, source and text", "run python -m pipeline"
        )
    return _Row(document, text, source)


def _holds(folder: Path, shard: Mapping[str, str]) -> bool:
    if not folder.is_dir() or {path.name for path in folder.iterdir()} != {f"{module}.jsonl" for module in shard}:
        return False
    return all((folder / f"{module}.jsonl").read_bytes() == content.encode() for module, content in shard.items())


if __name__ == "__main__":
    sys.exit(main())
