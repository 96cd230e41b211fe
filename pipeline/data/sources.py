"""Documents: the demo corpus that every Python carries, or the user's own files."""

from __future__ import annotations

import ast
import inspect
import json
import re
import sysconfig
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from edge_runtime.formats.errors import UserError

_TEXT_CHUNK_CHARS = 2_000
_SUFFIXES = (".txt", ".jsonl", ".parquet")
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "turtledemo"}
# Modules in C whose docstrings no source file shows; each is safe to import.
_BUILT_IN_MODULES = (
    "builtins", "sys", "math", "cmath", "itertools", "time", "_collections", "_functools", "_operator", "_io",
    "_datetime", "_struct", "_random", "_socket", "_thread", "_json", "_csv", "array", "binascii", "select",
    "zlib", "unicodedata", "errno", "gc", "atexit", "marshal", "posix", "_heapq", "_bisect", "_statistics",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Document:
    """One text. ``question`` asks for it, or is None when the text answers nothing."""

    source: str
    text: str
    question: str | None = None


def python_documents() -> Iterator[Document]:
    """Yield the documentation shipped with CPython, in a fixed order.

    The language reference's topics (``pydoc_data``), the docstrings of the standard library read
    from its source files without importing them, and those of the modules written in C. Licence:
    Python Software Foundation License Version 2.
    """
    from pydoc_data.topics import topics

    for name in sorted(topics):
        for heading, section in _sections(topics[name], name):
            yield Document(f"topic:{name}#{heading}", section, f"What does Python say about {heading}?")
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).parts
        if not _SKIPPED_FOLDERS.intersection(parts) and not parts[0].startswith("config-"):
            yield from module_docstrings(path, ".".join(parts).removesuffix(".py").removesuffix(".__init__"))
    for name in _BUILT_IN_MODULES:
        yield from _c_docstrings(name)


def file_documents(path: Path) -> Iterator[Document]:
    """Yield documents of a .txt, .jsonl or .parquet file, or of all such files below a folder.

    A text file is cut at blank lines into documents of about 2,000 characters. A JSON line or a
    parquet row needs ``text``, or ``question`` and ``answer`` (also ``prompt`` and ``response``).

    Raises:
        UserError: Nothing is there, a file has another type, or a row has neither set of fields.
    """
    readers: dict[str, Callable[[Path], Iterator[Document]]] = dict(
        zip(_SUFFIXES, (_read_txt, _read_jsonl, _read_parquet), strict=True)
    )
    for file in document_files(path):
        yield from readers[file.suffix](file)


def document_files(path: Path) -> list[Path]:
    """The files that ``file_documents`` reads, in its order.

    Raises:
        UserError: Nothing is there, or nothing of a type that it reads.
    """
    if not path.exists():
        raise UserError("data.path", str(path), "an existing file or folder", "check the path")
    paths = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    usable = [p for p in paths if p.suffix in _SUFFIXES]
    if not usable:
        raise UserError("data.path", str(path), ".txt, .jsonl or .parquet files", "convert the file to one of these")
    return usable


def _sections(topic: str, name: str) -> Iterator[tuple[str, str]]:
    """Split a topic at its underlined headings: (heading, body); the part before the first keeps the topic's name."""
    parts = re.split(r"^(\S[^\n]*)\n[*=\-^\"]{3,}\n", topic, flags=re.MULTILINE)
    yield name, parts[0]
    yield from zip((heading.strip() for heading in parts[1::2]), parts[2::2], strict=True)


def module_docstrings(path: Path, module: str) -> Iterator[Document]:
    """Yield the docstrings of a source file, read without importing it; none when it is for another Python."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # the library ships files that are broken on purpose
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

    def visit(node: ast.AST, name: str) -> Iterator[Document]:
        if isinstance(node, documented) and (doc := ast.get_docstring(node)):
            yield _docstring(name, _signature(node), doc)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, documented):
                yield from visit(child, f"{name}.{child.name}")  # type: ignore[union-attr]

    yield from visit(tree, module)


def _signature(node: ast.AST) -> str:
    return f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ""


def _c_docstrings(name: str) -> Iterator[Document]:
    try:
        module = import_module(name)
    except ImportError:  # posix on Windows, and the like
        return
    public = name.removeprefix("_")
    for member in sorted(vars(module)):
        value = vars(module)[member]
        if member.startswith("_") or not isinstance(value, type | types.BuiltinFunctionType):
            continue
        yield from _c_docstring(f"{public}.{member}", value)
        if isinstance(value, type):
            for attribute in sorted(vars(value)):
                if not attribute.startswith("__"):
                    yield from _c_docstring(f"{public}.{member}.{attribute}", vars(value)[attribute])


def _c_docstring(name: str, value: Any) -> Iterator[Document]:
    doc = getattr(value, "__doc__", None)
    if isinstance(doc, str) and not isinstance(value, str | int | float | bytes | tuple | dict | list):
        yield _docstring(name, getattr(value, "__text_signature__", None) or "", inspect.cleandoc(doc))


def _docstring(name: str, signature: str, doc: str) -> Document:
    short = name.removeprefix("builtins.")
    return Document(f"doc:{name}", f"{short}{signature}\n\n{doc}", f"What is {short}?")


def _read_txt(path: Path) -> Iterator[Document]:
    chunk: list[str] = []
    number = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            chunk.append(line)
            long_enough = sum(map(len, chunk)) >= _TEXT_CHUNK_CHARS if not line.strip() or len(chunk) > 200 else False
            if long_enough:
                yield Document(f"{path.name}:{number}", "".join(chunk))
                chunk, number = [], number + 1
    if chunk:
        yield Document(f"{path.name}:{number}", "".join(chunk))


def _read_jsonl(path: Path) -> Iterator[Document]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path.name} line {number}", line[:60], f"one JSON object a line ({error})") from None
            yield _row_document(row, f"{path.name}:{number}")


def _read_parquet(path: Path) -> Iterator[Document]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    number = 0
    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=1024)
        for row in (row for batch in batches for row in batch.to_pylist()):
            number += 1
            yield _row_document(row, f"{path.name}:{number}")
    except (ArrowException, OSError) as error:
        raise UserError("data.path", str(path), f"a whole parquet file ({error})") from None


def _row_document(row: Any, source: str) -> Document:
    if isinstance(row, dict):
        for question, answer in (("question", "answer"), ("prompt", "response")):
            if isinstance(row.get(question), str) and isinstance(row.get(answer), str):
                return Document(source, row[answer], row[question])
        if isinstance(row.get("text"), str):
            return Document(source, row["text"])
    found = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise UserError(source, found, "a row with text, or question and answer, or prompt and response")
