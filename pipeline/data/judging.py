"""What one document becomes, on its own: rows, or a reason to drop it. Runs in workers; knows no other document."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pipeline.data.decontamination import contaminated, map_grams
from pipeline.data.duplicates import sign
from pipeline.data.language import identify
from pipeline.data.normalize import normalize
from pipeline.data.pii import scrub
from pipeline.data.rules import Drop, DropReason, Rule, apply_rules, basic_rules, web_rules
from pipeline.data.shingles import Hashes, read_units
from pipeline.data.sources import Document

_ANSWER_CHARS = 600
_SAMPLE_CHARS = 120
_SCRUBBED_CHARS = 400  # for a sample: what is cut through at its end is far beyond what is shown


@dataclass(frozen=True, slots=True)
class CleaningSettings:
    """How a corpus is cleaned.

    Attributes:
        min_chars: Shortest text kept, at least 1.
        max_chars: Longest text kept, at most 200,000.
        held_out_modulus: A document is held out when its hash modulo this is 0; at least 2.
        rules: ``basic`` looks at length and characters, ``web`` also at what web pages suffer from.
        languages: Codes of the languages kept (``en``, ``zh``); empty keeps all.
        pii: Personal data is left (``off``), replaced by placeholders, or drops its document.
        near_duplicates: Jaccard similarity of 5-grams, in (0, 1], from which the later document is dropped; None: only
            equal texts are.
        decontaminate: Evaluation files; documents that hold a piece of them are dropped.
        workers: Processes, at least 1; Ray's processors with ``engine="ray"``.
        engine: ``local`` processes, or Ray Data.
        chunk_documents: Documents a worker takes at once, 1 to 4096.
        part_documents: Documents after which progress is kept on disk, at least 1.
    """

    min_chars: int = 40
    max_chars: int = 20_000
    held_out_modulus: int = 20
    rules: Literal["basic", "web"] = "basic"
    languages: tuple[str, ...] = ()
    pii: Literal["off", "replace", "drop"] = "replace"
    near_duplicates: float | None = None
    decontaminate: tuple[Path, ...] = ()
    workers: int = 1
    engine: Literal["local", "ray"] = "local"
    chunk_documents: int = 64
    part_documents: int = 8192


@dataclass(frozen=True, slots=True)
class JudgePlan:
    """What workers need beside the documents.

    Attributes:
        evaluation: Where ``map_grams`` finds the evaluation files' n-grams; None: nothing is looked for.
    """

    settings: CleaningSettings
    evaluation: Path | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Documents in corpus order, and the digest of the corpus up to their end."""

    documents: tuple[Document, ...]
    input_digest: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one document.

    Attributes:
        reason: Why it is dropped, or None.
        sample: Its first characters without personal data.
        digest: sha256 of its final text; with ``held_out_modulus`` it decides the side of the split.
        signature: For near duplicates, or empty.
        kinds: Of its rows, in order.
        lines: Its rows as JSON lines in UTF-8.
        personal_data: Kind to how many were replaced.
    """

    source: str
    reason: str | None
    sample: str
    language: str | None
    digest: bytes = b""
    signature: bytes = b""
    held_out: bool = False
    kinds: tuple[str, ...] = ()
    lines: bytes = b""
    personal_data: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Judged:
    """The outcomes of a chunk's documents, in their order, and the chunk's digest."""

    outcomes: tuple[Outcome, ...]
    input_digest: str


@dataclass(frozen=True, slots=True)
class _Tools:
    rules: tuple[Rule, ...]
    message_rules: tuple[Rule, ...]
    evaluation: Hashes | None
    needs_language: bool


def judge_chunk(plan: JudgePlan, chunk: Chunk) -> Judged:
    """Judge every document of a chunk; the same result in every process."""
    tools = _tools(plan)
    return Judged(tuple(_judge(document, plan.settings, tools) for document in chunk.documents), chunk.input_digest)


def renderings(text: str, question: str | None) -> Iterator[tuple[str, str]]:
    """The plain text, and the same as a question with its answer's first paragraphs."""
    yield "plain", text
    if question is not None:
        yield "question_answer", f"Question: {question}\nAnswer: {_lead(text)}"


@lru_cache(maxsize=1)
def _tools(plan: JudgePlan) -> _Tools:
    settings = plan.settings
    web = settings.rules == "web"
    return _Tools(
        (web_rules if web else basic_rules)(settings.min_chars, settings.max_chars),
        basic_rules(settings.min_chars, settings.max_chars),
        None if plan.evaluation is None else map_grams(plan.evaluation),
        web or bool(settings.languages),
    )


def _judge(document: Document, settings: CleaningSettings, tools: _Tools) -> Outcome:
    texts = [normalize(content) for _, content in document.messages] or [normalize(document.text)]
    question = None if document.question is None else normalize(document.question)
    whole = "\n".join(texts)
    language = identify(whole).code if tools.needs_language else None

    def drop(reason: str) -> Outcome:
        return Outcome(document.source, str(reason), _sample(whole), language)

    kept = _apply_rules(texts, bool(document.messages), language or "", settings, tools)
    if isinstance(kept, Drop):
        return drop(kept.reason)
    if settings.languages and language not in settings.languages:
        return drop(DropReason.OTHER_LANGUAGE)
    asked = [] if question is None else [question]
    if tools.evaluation is not None and contaminated(read_units("\n".join([*asked, *kept])), tools.evaluation):
        return drop(DropReason.CONTAMINATED)
    personal_data: Counter[str] = Counter()
    if settings.pii != "off":
        scrubbed = [scrub(text) for text in [*asked, *kept]]
        for one in scrubbed:
            personal_data.update(one.counts)
        if settings.pii == "drop" and personal_data.total():
            return drop(DropReason.PERSONAL_DATA)
        clean = [one.text for one in scrubbed]
        question, kept = (None, clean) if question is None else (clean[0], clean[1:])
    return _keep(document, question, kept, language, settings, dict(personal_data))


def _apply_rules(
    texts: Sequence[str], conversation: bool, language: str, settings: CleaningSettings, tools: _Tools
) -> list[str] | Drop:
    """The texts that rules keep, or why they do not.

    Rules for pages would refuse every chat, and a short answer is a good one: a conversation's length counts as a
    whole, and only those of its messages that are long enough to be judged are judged alone.
    """
    if conversation:
        if not all(texts) or sum(map(len, texts)) < settings.min_chars:
            return Drop(DropReason.TOO_SHORT)
        if sum(map(len, texts)) > settings.max_chars:
            return Drop(DropReason.TOO_LONG)
    kept = []
    for text in texts:
        if conversation and len(text) < settings.min_chars:
            kept.append(text)
            continue
        verdict = apply_rules(text, language, tools.message_rules if conversation else tools.rules)
        if isinstance(verdict, Drop):
            return verdict
        kept.append(verdict.text)
    return kept


def _keep(
    document: Document,
    question: str | None,
    texts: Sequence[str],
    language: str | None,
    settings: CleaningSettings,
    personal_data: dict[str, int],
) -> Outcome:
    roles = [role for role, _ in document.messages]
    final = "\n\n".join(f"{role}: {text}" for role, text in zip(roles, texts, strict=True)) if roles else texts[0]
    digest = hashlib.sha256(final.encode()).digest()
    rows: list[tuple[str, object]]
    if roles:
        content = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        rows = [("messages", content)]
    else:
        rows = list(renderings(final, question))
    origin = {"document": digest.hex()[:16], "source": document.source.encode(errors="backslashreplace").decode()}
    lines = [{**origin, "kind": kind, "messages" if roles else "text": value} for kind, value in rows]
    return Outcome(
        document.source,
        None,
        _sample(final),
        language,
        digest,
        b"" if settings.near_duplicates is None else sign(read_units("\n".join(texts))),
        int.from_bytes(digest, "big") % settings.held_out_modulus == 0,
        tuple(kind for kind, _ in rows),
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode(),
        personal_data,
    )


def _sample(text: str) -> str:
    """The start of a text for the report, free of personal data whatever is done to the corpus."""
    return scrub(text[:_SCRUBBED_CHARS]).text[:_SAMPLE_CHARS]


def _lead(text: str) -> str:
    """Whole paragraphs up to 600 characters, at least one, cut at a word."""
    paragraphs = text.split("\n\n")
    lead = paragraphs[0]
    for paragraph in paragraphs[1:]:
        if len(lead) + len(paragraph) > _ANSWER_CHARS:
            break
        lead += "\n\n" + paragraph
    return lead if len(lead) <= _ANSWER_CHARS else lead[:_ANSWER_CHARS].rsplit(" ", 1)[0]
