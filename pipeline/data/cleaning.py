"""A corpus cleaned: documents judged in parallel, settled in corpus order, written in parts that survive a kill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from edge_runtime.formats.errors import UserError
from pipeline.data.cleaning_journal import Journal, Progress, full_disk_refused, progress_report
from pipeline.data.cleaning_report import CleaningReport, count_dropped, count_kept
from pipeline.data.decontamination import read_evaluation, save_grams
from pipeline.data.duplicates import Bands, DuplicateIndex, choose_bands
from pipeline.data.judging import Chunk, CleaningSettings, Judged, JudgePlan, Outcome, judge_chunk
from pipeline.data.ordered_work import map_ordered
from pipeline.data.sources import Document
from pipeline.data.verdicts import DropReason

__all__ = ["CleaningReport", "CleaningSettings", "clean_corpus"]
_CHUNK_CHARS = 1 << 20  # of a chunk, unless one document is longer
_LARGEST_CLUSTERS = 10
_WORKERS_ALONE = ("workers", "engine", "chunk_documents", "part_documents")  # change when, never what is written


class ProgressReport(Protocol):
    """Called with the number of documents done and a few words."""

    def __call__(self, done: int, text: str = "") -> None:
        """Show it."""


def clean_corpus(
    documents: Iterable[Document],
    output: Path,
    settings: CleaningSettings,
    checkpoint: Path,
    progress: ProgressReport = lambda done, text="": None,
) -> CleaningReport:
    """Write the rows of kept documents into ``output``: ``train.jsonl`` and ``held_out.jsonl``.

    The bytes depend on the documents and on the settings but for workers, engine and sizes of chunks and parts; they
    are the same after any number of kills. Memory is that of a few chunks a worker; all that grows with the corpus is
    on disk. Whether a text is held out depends on that text alone, not on the corpus around it.

    Args:
        documents: The same ones in the same order when work goes on.
        settings: How.
        output: An empty folder; nothing is written before all documents are done.
        checkpoint: Where unfinished work is kept; for the caller to remove when the output is safe.
        progress: Shown now and then.

    Raises:
        UserError: The disk is full, a worker was killed, documents changed between two runs, or a setting cannot be.
    """
    with full_disk_refused(checkpoint):
        checkpoint.mkdir(parents=True, exist_ok=True)
        setup = _set_up(settings, checkpoint)
        with closing(Journal(checkpoint, setup.identity)) as journal:
            report = _clean_rest(documents, journal, setup, progress)
            journal.assemble(output)
    return report


@dataclass(frozen=True, slots=True)
class _Setup:
    plan: JudgePlan
    bands: Bands | None
    evaluation: dict[str, int] | None
    identity: str


def _set_up(settings: CleaningSettings, checkpoint: Path) -> _Setup:
    values = {name: value for name, value in asdict(settings).items() if name not in _WORKERS_ALONE}
    bands = None if settings.near_duplicates is None else choose_bands(settings.near_duplicates)
    path, evaluation = None, None
    if settings.decontaminate:
        grams = read_evaluation(settings.decontaminate)
        path = checkpoint / "evaluation.u64"
        save_grams(grams, path)
        evaluation = {"texts": grams.texts, "too_short": grams.too_short, "grams": len(grams.hashes)}
        values["decontaminate"] = hashlib.sha256(grams.hashes.tobytes()).hexdigest()
    return _Setup(JudgePlan(settings, path), bands, evaluation, json.dumps(values, sort_keys=True))


def _clean_rest(
    documents: Iterable[Document], journal: Journal, setup: _Setup, progress: ProgressReport
) -> CleaningReport:
    """Clean what the journal does not hold yet."""
    settings = setup.plan.settings
    report = CleaningReport(**progress_report(journal.done))
    index = DuplicateIndex(journal.database, settings.near_duplicates, setup.bands)
    chunks = _read_chunks(documents, journal.done, settings.chunk_documents)
    finished, judged = report.documents, None
    engine = _engine(settings)
    with closing(engine(partial(judge_chunk, setup.plan), chunks, settings.workers)) as results:
        for judged in results:
            for outcome in judged.outcomes:
                _settle(outcome, report, index, journal)
            progress(report.documents, "documents")
            if report.documents - finished >= settings.part_documents:
                _finish_part(journal, report, judged)
                finished = report.documents
    if judged is not None and report.documents > finished:
        _finish_part(journal, report, judged)
    report.evaluation = setup.evaluation
    if settings.near_duplicates is not None:
        largest = [asdict(cluster) for cluster in index.largest_clusters(_LARGEST_CLUSTERS)]
        report.near_duplicates = {"clusters": index.clusters(), "largest": largest}
    return report


def _read_chunks(documents: Iterable[Document], done: Progress | None, chunk_documents: int) -> Iterator[Chunk]:
    """Documents that are not done, in chunks that are small in documents and in characters.

    Raises:
        UserError: Those that are done are not what they were.
    """
    digest, chunk, chars = hashlib.sha256(), list[Document](), 0
    skipped = 0 if done is None else done.documents
    number = 0
    for number, document in enumerate(documents, 1):
        _update_digest(digest.update, document)
        if number < skipped:
            continue
        if number == skipped:
            _require_same(done, digest.hexdigest())
            continue
        chunk.append(document)
        chars += len(document.text) + sum(len(content) for _, content in document.messages)
        if len(chunk) >= chunk_documents or chars >= _CHUNK_CHARS:
            yield Chunk(tuple(chunk), digest.hexdigest())
            chunk, chars = [], 0
    if number < skipped:
        _require_same(done, "")
    if chunk:
        yield Chunk(tuple(chunk), digest.hexdigest())


def _update_digest(update: Callable[[bytes], None], document: Document) -> None:
    """Every field with its length before it, so that no two documents are told apart by their sum alone."""
    for value in (
        document.source,
        document.text,
        document.question or "",
        *(x for pair in document.messages for x in pair),
    ):
        encoded = value.encode("utf-8", "surrogatepass")
        update(len(encoded).to_bytes(8, "little"))
        update(encoded)


def _require_same(done: Progress | None, input_digest: str) -> None:
    if done is not None and done.input_digest != input_digest:
        raise UserError(
            "data", f"other documents than when cleaning began ({done.documents} were done)", "the same ones to go on",
            "remove the checkpoint folder to begin again",
        )  # fmt: skip


def _settle(outcome: Outcome, report: CleaningReport, index: DuplicateIndex, journal: Journal) -> None:
    """Decide what depends on the documents before, and write."""
    if outcome.reason is not None:
        count_dropped(report, outcome, outcome.reason)
    elif index.holds(outcome.digest):
        count_dropped(report, outcome, DropReason.DUPLICATE)
    elif (original := index.nearest(outcome.signature)) is not None:
        count_dropped(report, outcome, DropReason.NEAR_DUPLICATE, copy_of=index.count_copy(original))
    else:
        index.add(report.documents, outcome.source, outcome.digest, outcome.signature)
        journal.write("held_out" if outcome.held_out else "train", outcome.lines)
        count_kept(report, outcome)


def _finish_part(journal: Journal, report: CleaningReport, judged: Judged) -> None:
    journal.finish_part(Progress(report.documents, judged.input_digest, json.dumps(asdict(report))))


def _engine(settings: CleaningSettings) -> Callable[..., Generator[Judged, None, None]]:
    if settings.engine == "ray":
        from pipeline.data.ray_engine import map_on_ray

        return map_on_ray
    return map_ordered
