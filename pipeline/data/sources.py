"""Documents: the demo corpus that every Python carries, or the user's own files."""

from __future__ import annotations

import ast
import gzip
import inspect
import json
import re
import sysconfig
import types
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from edge_runtime.formats.errors import UserError
from pipeline.data.instructions import Message, row_messages

MAX_ROW_CHARS = 16 << 20
_TEXT_CHUNK_CHARS = 2_000
_READ_CHARS = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "turtledemo"}
# Modules in C whose docstrings no source file shows; each is safe to import.
_BUILT_IN_MODULES = (
    "builtins", "sys", "math", "cmath", "itertools", "time", "_collections", "_functools", "_operator", "_io",
    "_datetime", "_struct", "_random", "_socket", "_thread", "_json", "_csv", "array", "binascii", "select",
    "zlib", "unicodedata", "errno", "gc", "atexit", "marshal", "posix", "_heapq", "_bisect", "_statistics",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Document:
    """One text, or one conversation.

    Attributes:
        source: File and line, or the name of what is documented.
        text: Empty when there are messages.
        question: Asks for the text; None when the text answers nothing.
        messages: (role, content) of instruction data.
    """

    source: str
    text: str
    question: str | None = None
    messages: tuple[Message, ...] = ()


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
    """Yield documents of a file, or of all files of a known type below a folder.

    A .txt file is cut at blank lines into documents of about 2,000 characters. A row of .jsonl, .jsonl.gz, .parquet or
    of a .json list needs ``text``, or ``question`` and ``answer`` (also ``prompt`` and ``response``), or the columns
    of instruction data that ``row_messages`` reads. Rows are read one after another: memory does not grow with files.

    Raises:
        UserError: Nothing is there, a file has another type or is damaged, or a row has none of these fields.
    """
    for file in document_files(path):
        yield from _reader(file)(file)


def document_files(path: Path) -> list[Path]:
    """The files that ``file_documents`` reads, in its order.

    Raises:
        UserError: Nothing is there, or nothing of a type that it reads.
    """
    if not path.exists():
        raise UserError("data.path", str(path), "an existing file or folder", "check the path")
    paths = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    usable = [p for p in paths if p.name.endswith(tuple(_READERS))]
    if not usable:
        allowed = f"{', '.join(list(_READERS)[:-1])} or {list(_READERS)[-1]} files"
        raise UserError("data.path", str(path), allowed, "convert the file to one of these")
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
        yield from _line_documents(file, path.name)


def _read_gzip(path: Path) -> Iterator[Document]:
    try:
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
            yield from _line_documents(file, path.name)
    except (EOFError, OSError, zlib.error) as error:
        raise UserError("data.path", str(path), f"a whole gzip file ({error})", "fetch it again") from None


def _line_documents(file: TextIO, name: str) -> Iterator[Document]:
    number = 0
    while line := file.readline(MAX_ROW_CHARS + 1):
        number += 1
        if len(line) > MAX_ROW_CHARS:
            raise _too_long(f"{name} line {number}")
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{name} line {number}", line[:60], f"one JSON object a line ({error})") from None
            yield _row_document(row, f"{name}:{number}")


def _read_json(path: Path) -> Iterator[Document]:
    """A list of rows, one row in memory at a time; many files of this name hold JSON lines, and are read as such."""
    with path.open(encoding="utf-8", errors="replace") as file:
        buffer = file.read(_READ_CHARS).lstrip("\ufeff \t\r\n")  # a mark of the byte order is no fault
        if buffer.startswith("{"):
            file.seek(0)
            yield from _line_documents(file, path.name)
            return
        if not buffer.startswith("["):
            raise UserError(path.name, buffer[:60], "a list of rows, or one JSON object a line")
        for number, row in enumerate(_list_items(file, buffer[1:], path.name), 1):
            yield _row_document(row, f"{path.name}:{number}")


def _list_items(file: TextIO, buffer: str, name: str) -> Iterator[Any]:
    """Items of a JSON list whose bracket is read already; ``buffer`` grows to the largest item and no further."""
    position, number, wanted = 0, 0, _READ_CHARS
    while True:
        item, end, fault = _next_item(buffer, position, first=number == 0)
        if not fault:
            if item is None:
                break
            yield item[0]
            position, number, wanted = end, number + 1, _READ_CHARS
            continue
        if len(buffer) - position > MAX_ROW_CHARS:
            raise _too_long(f"{name} row {number + 1}")
        more = file.read(wanted)
        if not more:
            raise UserError(f"{name} row {number + 1}", buffer[position:][:60], f"rows of a JSON list ({fault})")
        buffer, position = buffer[position:] + more, 0
        wanted *= 2  # so that a long row is not decoded again and again
    if (rest := buffer[end:] + file.read(_READ_CHARS)).strip():
        raise UserError(name, rest.strip()[:60], "nothing after the list")


def _next_item(buffer: str, position: int, first: bool) -> tuple[tuple[Any] | None, int, str]:
    """(item, where what follows it begins, "") or (None, end, "") at the list's end; a fault when more is needed."""
    position = _after_space(buffer, position)
    if buffer.startswith("]", position):
        return None, position + 1, ""
    if not first:
        if not buffer.startswith(",", position):
            return None, position, "a comma or the list's end is missing"
        position = _after_space(buffer, position + 1)
    try:
        item, end = json.JSONDecoder().raw_decode(buffer, position)
    except (ValueError, RecursionError) as error:
        return None, position, str(error)
    if _after_space(buffer, end) == len(buffer):  # a number, say, may go on
        return None, position, "the list does not end"
    return (item,), end, ""


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _read_parquet(path: Path) -> Iterator[Document]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for row in (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist()):
                number += 1
                yield _row_document(row, f"{path.name}:{number}")
    except (ArrowException, OSError) as error:
        raise UserError("data.path", str(path), f"a whole parquet file ({error})") from None


def _row_document(row: Any, source: str) -> Document:
    if isinstance(row, dict):
        if (messages := row_messages(row, source)) is not None:
            return Document(source, "", messages=messages)
        for question, answer in (("question", "answer"), ("prompt", "response")):
            if isinstance(row.get(question), str) and isinstance(row.get(answer), str):
                return Document(source, row[answer], row[question])
        if isinstance(row.get("text"), str):
            return Document(source, row["text"])
    found = sorted(map(str, row))[:20] if isinstance(row, dict) else type(row).__name__
    raise UserError(
        source,
        found,
        "a row with text, or question and answer, or prompt and response, or messages, or conversations,"
        " or instruction and output",
    )


def _too_long(place: str) -> UserError:
    return UserError(place, f"more than {MAX_ROW_CHARS} characters", f"rows of at most {MAX_ROW_CHARS} characters")


def _reader(path: Path) -> Callable[[Path], Iterator[Document]]:
    return next(reader for suffix, reader in _READERS.items() if path.name.endswith(suffix))


_READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_gzip,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
