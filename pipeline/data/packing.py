"""Tokenizer training; texts and conversations packed into sequences of one length, in memory or in files."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from edge_runtime.formats.errors import UserError
from edge_runtime.formats.manifest import TOKENIZER_FILE
from edge_runtime.formats.package import CHAT_TEMPLATE_FILE, Package
from pipeline.data.encoding import (
    EncodedChat,
    TextEncoder,
    chat_format,
    encode_conversation,
    encode_texts,
    text_encoder,
)
from pipeline.data.sources import file_documents

BOS, EOS = "<s>", "</s>"
_ENCODE_BATCH = 512
_Item = TypeVar("_Item")
_OPEN_SEQUENCES = 32  # that conversations are put into; the more, the less room is lost
_PIECE = r" *[^ \n]+|\n+| +"  # a word with the spaces before it; indentation may become one token


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-fallback BPE: every text round-trips, unknown characters as bytes.

    Spaces stay spaces: with a mark in their place, as Llama has it, a text that holds the mark would not come back.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=None, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS, *byte_tokens], show_progress=False, limit_alphabet=256
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _byte_tokens_unspecial(tokenizer)


@dataclass(frozen=True, slots=True)
class Packed:
    """Sequences of one length.

    Attributes:
        tokens: (S, T) int32, mapped from a file when one was asked for.
        counts: (S, T): whether the prediction made at a position, of the token behind it, is learned.
        cut: Conversations that lost their last turns.
        dropped: Conversations, or exchanges, that do not fit a sequence with even one answer.
    """

    tokens: NDArray[np.int32]
    counts: NDArray[np.bool_]
    cut: int = 0
    dropped: int = 0


def shuffled_rows(path: Path, seed: int) -> Iterator[dict[str, Any]]:
    """The rows of a cleaned file in a fixed random order: ``text``, or ``messages`` with role and content.

    A prefix is a sample of the corpus. Memory holds 16 bytes a row, not its text; rows are read where they lie.

    Raises:
        UserError: A line is not such a row.
    """
    offsets = _line_offsets(path)
    with path.open("rb") as file:
        for index in _order(len(offsets), seed):
            file.seek(offsets[index])
            yield _row(file.readline(), f"{path.name} at byte {offsets[index]}")


def document_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The documents of a user's file (see ``file_documents``) as rows, uncleaned, in its order.

    Raises:
        UserError: The file cannot be read.
    """
    for document in file_documents(path):
        if document.messages:
            yield {"messages": [{"role": role, "content": content} for role, content in document.messages]}
        else:
            yield {"text": document.text}


def shuffled_document_rows(path: Path, seed: int) -> Iterator[dict[str, Any]]:
    """What ``document_rows`` gives, all of it in memory; of a cleaned file in the order of ``shuffled_rows``."""
    rows = list(document_rows(path))
    return (rows[index] for index in _order(len(rows), seed))


def row_text(row: Mapping[str, Any]) -> str:
    """A row as plain text; of a conversation the contents, for whoever only counts words."""
    if "messages" in row:
        return "\n".join(message["content"] for message in row["messages"])
    text: str = row["text"]
    return text


def pack_rows(
    tokenizer: Tokenizer,
    rows: Iterable[Mapping[str, Any]],
    *,
    template: str | None,
    eos_id: int,
    sequence_tokens: int,
    max_sequences: int | None,
    bos_id: int | None = None,
    output: Path | None = None,
) -> Packed:
    """Sequences of texts and conversations, with what of them is learned.

    Texts, each closed by ``eos_id``, are laid end to end and cut; all of them is learned. Conversations stay whole:
    each goes to the fullest of a few open sequences that has room (best fit), the rest of a sequence is ``eos_id``, not
    learned; of conversations the answers are learned, their end-of-turn tokens included. A conversation too long for a
    sequence loses its last turns. Special tokens come from the template alone: "</s>" in a text is text.

    Args:
        tokenizer: Its special tokens are those that templates write.
        rows: ``text``, or ``messages`` with role and content, as the functions above give them; read once, as far as
                needed.
        template: Jinja chat template; needed for conversations only.
        eos_id: Ends a text.
        sequence_tokens: T, 2 or more.
        max_sequences: S at most, 1 or more; None: all rows.
        bos_id: Begins a conversation in templates that ask for ``bos_token``.
        output: Without it sequences are held in memory. With it memory does not grow: ``<output>`` gets the tokens and
            ``<stem>_counts.npy`` the rest, each renamed into place when whole.

    Raises:
        UserError: The rows do not fill one sequence, there is no template for a conversation, or it does not fit.
    """
    tally = _Tally()
    encoder = text_encoder(tokenizer)
    chunks = _sequences(encoder, rows, template, eos_id, bos_id, sequence_tokens, tally)
    limited = _limit(chunks, max_sequences)
    if output is None:
        tokens, counts = _collect(limited, sequence_tokens)
    else:
        tokens, counts = _write(limited, sequence_tokens, output)
    if not len(tokens):
        raise UserError(
            "data", f"{tally.tokens} tokens", f"rows that fill a sequence of {sequence_tokens} tokens", "add text"
        )
    return Packed(tokens, counts, tally.cut, tally.dropped)


def pack_for_package(
    package: Package, rows: Iterable[Mapping[str, Any]], sequence_tokens: int, max_sequences: int | None
) -> Packed:
    """``pack_rows`` with the tokenizer, chat template and tokens of a package.

    Raises:
        UserError: As ``pack_rows``, or the package has no end-of-text token.
    """
    manifest, template = package.manifest, package.directory / CHAT_TEMPLATE_FILE
    if not manifest.eos:
        raise UserError("package", str(package.directory), "one with an end-of-text token", "export it again")
    return pack_rows(
        Tokenizer.from_file(str(package.path(TOKENIZER_FILE))), rows,
        template=template.read_text(encoding="utf-8") if CHAT_TEMPLATE_FILE in manifest.files else None,
        eos_id=manifest.eos[0], bos_id=manifest.bos, sequence_tokens=sequence_tokens, max_sequences=max_sequences,
    )  # fmt: skip


@dataclass(slots=True)
class _Tally:
    """What was met so far."""

    tokens: int = 0
    cut: int = 0
    dropped: int = 0


@dataclass(slots=True)
class _OpenSequence:
    """Conversations that share a sequence, and the tokens it still has room for."""

    room: int
    chats: list[EncodedChat] = field(default_factory=list)


_Chunk = tuple[NDArray[np.int32], NDArray[np.bool_]]
"""Sequences (n, T) and their counts (n, T)."""


def _order(count: int, seed: int) -> NDArray[np.int64]:
    """A fixed permutation."""
    return np.random.default_rng(seed).permutation(count)


def _row(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        messages = row.get("messages")
        if messages is None:
            good = isinstance(row["text"], str)
        else:
            good = all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in messages)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        good = False
    if not good:
        raise UserError(place, line[:60], "a cleaned row with text or messages", "run stage=clean again")
    return row  # type: ignore[no-any-return]


def _line_offsets(path: Path) -> NDArray[np.int64]:
    offsets = array("q")
    position = 0
    with path.open("rb") as file:
        for line in file:
            offsets.append(position)
            position += len(line)
    return np.frombuffer(offsets, np.int64) if offsets else np.empty(0, np.int64)


def _sequences(
    encoder: TextEncoder,
    rows: Iterable[Mapping[str, Any]],
    template: str | None,
    eos_id: int,
    bos_id: int | None,
    length: int,
    tally: _Tally,
) -> Iterator[_Chunk]:
    """Sequences as they fill, texts before conversations within a batch of rows."""
    chat = None if template is None else chat_format(encoder, template, eos_id, bos_id)
    carry = np.empty(0, np.int32)
    opened: list[_OpenSequence] = []
    for batch in _batches(rows):
        ids = encode_texts(encoder, [row["text"] for row in batch if "messages" not in row])
        carry = np.concatenate([carry, *(np.append(each, np.int32(eos_id)) for each in ids)])
        tally.tokens += sum(map(len, ids))
        whole = len(carry) // length
        if whole:
            yield carry[: whole * length].reshape(whole, length), np.ones((whole, length), np.bool_)
            carry = carry[whole * length :]
        for row in (row for row in batch if "messages" in row):
            source = f"document {row.get('document', '?')}"
            if chat is None:
                raise UserError(source, "a conversation", "rows of text: the teacher has no chat template",
                    "give it a chat_template.jinja")  # fmt: skip
            messages = [(message["role"], message["content"]) for message in row["messages"]]
            chats, was_cut = encode_conversation(encoder, chat, messages, eos_id, length, source)
            tally.tokens += sum(len(each.tokens) for each in chats)
            tally.cut, tally.dropped = tally.cut + (was_cut and bool(chats)), tally.dropped + (not chats)
            for each in chats:
                yield from (_close(done, length, eos_id) for done in _place(opened, each, length))
    yield from (_close(done, length, eos_id) for done in opened)


def _place(opened: list[_OpenSequence], chat: EncodedChat, length: int) -> Iterator[_OpenSequence]:
    """Put a conversation where it leaves least room; give up a sequence that is full, or the fullest of too many."""
    size = len(chat.tokens)
    fitting = [each for each in opened if each.room >= size]
    if fitting:
        chosen = min(fitting, key=lambda each: each.room)
    else:
        if len(opened) == _OPEN_SEQUENCES:
            fullest = min(opened, key=lambda each: each.room)
            opened.remove(fullest)
            yield fullest
        chosen = _OpenSequence(length)
        opened.append(chosen)
    chosen.chats.append(chat)
    chosen.room -= size
    if chosen.room < 2:  # no conversation is shorter
        opened.remove(chosen)
        yield chosen


def _close(sequence: _OpenSequence, length: int, eos_id: int) -> _Chunk:
    """A position counts when the token behind it is an answer's."""
    tokens = np.full((1, length), eos_id, np.int32)
    counts = np.zeros((1, length), np.bool_)
    start = 0
    for chat in sequence.chats:
        end = start + len(chat.tokens)
        tokens[0, start:end] = chat.tokens
        counts[0, start : end - 1] = chat.answers[1:]
        start = end
    return tokens, counts


def _limit(chunks: Iterable[_Chunk], most: int | None) -> Iterator[_Chunk]:
    """The first ``most`` sequences; nothing is read beyond them."""
    left = most
    for tokens, counts in chunks:
        yield tokens[:left], counts[:left]
        if left is not None:
            left -= min(left, len(tokens))
            if not left:
                return


def _collect(chunks: Iterable[_Chunk], length: int) -> _Chunk:
    tokens, counts = [np.empty((0, length), np.int32)], [np.empty((0, length), np.bool_)]
    for some, counted in chunks:
        tokens.append(some)
        counts.append(counted)
    return np.concatenate(tokens), np.concatenate(counts)


def _write(chunks: Iterable[_Chunk], length: int, output: Path) -> _Chunk:
    """Stream to two .npy files beside their final names; their headers are written last, when the number is known."""
    paths = output, output.with_name(f"{output.stem}_counts.npy")
    partials = [path.with_name(f".{path.name}.partial") for path in paths]
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partials[0].open("wb") as first, partials[1].open("wb") as second:
            number = 0
            for file, dtype in ((first, np.int32), (second, np.bool_)):
                _write_header(file, (0, length), dtype)
            for tokens, counts in chunks:
                first.write(np.ascontiguousarray(tokens).data)
                second.write(np.ascontiguousarray(counts).data)
                number += len(tokens)
            for file, dtype in ((first, np.int32), (second, np.bool_)):
                file.seek(0)
                _write_header(file, (number, length), dtype)
                file.flush()
                os.fsync(file.fileno())
        if not number:
            return np.empty((0, length), np.int32), np.empty((0, length), np.bool_)
        for partial, path in zip(partials, paths, strict=True):
            partial.replace(path)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
    return np.load(paths[0], mmap_mode="r"), np.load(paths[1], mmap_mode="r")


def _write_header(file: BinaryIO, shape: tuple[int, int], dtype: type[np.generic]) -> None:
    """numpy leaves room for the first axis to grow: the header's length does not depend on it."""
    descriptor = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(file, {"descr": descriptor, "fortran_order": False, "shape": shape})


def _batches(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    batch: list[_Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == _ENCODE_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _byte_tokens_unspecial(tokenizer: Tokenizer) -> Tokenizer:
    """Byte tokens got their ids as special tokens; as such they would be dropped when decoding."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in (BOS, EOS)]
    return Tokenizer.from_str(json.dumps(state))
