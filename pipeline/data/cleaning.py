"""Rules that keep a document or say why not; exact duplicates; the held-out split."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pipeline.data.sources import Document

_ANSWER_CHARS = 600
_EXAMPLES = 3  # sources named for each reason
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2060\ufeff\ufffe\uffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, as JSON's escapes can write it; UTF-8 has none


@dataclass(frozen=True, slots=True)
class Row:
    """One training text. Rows of one document share ``document`` and so fall on one side of the split."""

    document: str
    text: str
    kind: str
    held_out: bool


@dataclass(slots=True)
class CleaningReport:
    """Counts by reason, with the first few sources of each."""

    documents: int = 0
    kept: int = 0
    held_out: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)


def clean(
    documents: Iterable[Document], report: CleaningReport, *, min_chars: int, max_chars: int, held_out_modulus: int
) -> Iterator[Row]:
    """Yield the rows of documents that are kept and count the others by reason.

    A document is held out when its hash modulo ``held_out_modulus`` is 0: whether a text is held
    out depends on that text alone, not on the corpus around it.
    """
    seen: set[bytes] = set()
    for document in documents:
        report.documents += 1
        text = normalize(document.text)
        digest = hashlib.sha256(text.encode()).digest()
        reason = drop_reason(text, min_chars, max_chars) or ("duplicate" if digest in seen else None)
        if reason is not None:
            _count_drop(report, reason, document.source)
            continue
        seen.add(digest)
        held_out = int.from_bytes(digest, "big") % held_out_modulus == 0
        report.kept += 1
        report.held_out += held_out
        for kind, rendered in renderings(text, document.question):
            report.rows[kind] = report.rows.get(kind, 0) + 1
            yield Row(digest.hex()[:16], rendered, kind, held_out)


def normalize(text: str) -> str:
    """NFC, unix line ends, no control or zero-width characters, no trailing space, at most two line ends together."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _INVISIBLE.sub("", _SURROGATE.sub("\ufffd", text))
    text = unicodedata.normalize("NFC", text)  # after the removal: a base may have met its accent only now
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def drop_reason(text: str, min_chars: int, max_chars: int) -> str | None:
    """Why a normalised text is dropped, or None."""
    if len(text) < min_chars:
        return "too_short"
    if len(text) > max_chars:
        return "too_long"
    if text.count("\ufffd") * 100 > len(text):
        return "undecodable"
    if sum(character.isalpha() for character in text) * 4 < len(text):
        return "few_letters"
    return None


def renderings(text: str, question: str | None) -> Iterator[tuple[str, str]]:
    """The plain text, and the same as a question with its answer's first paragraphs."""
    yield "plain", text
    if question is not None:
        yield "question_answer", f"Question: {question}\nAnswer: {_lead(text)}"


def _count_drop(report: CleaningReport, reason: str, source: str) -> None:
    report.dropped[reason] = report.dropped.get(reason, 0) + 1
    examples = report.examples.setdefault(reason, [])
    if len(examples) < _EXAMPLES:
        examples.append(source)


def _lead(text: str) -> str:
    """Whole paragraphs up to 600 characters, at least one, cut at a word."""
    paragraphs = text.split("\n\n")
    lead = paragraphs[0]
    for paragraph in paragraphs[1:]:
        if len(lead) + len(paragraph) > _ANSWER_CHARS:
            break
        lead += "\n\n" + paragraph
    return lead if len(lead) <= _ANSWER_CHARS else lead[:_ANSWER_CHARS].rsplit(" ", 1)[0]
