"""Pairs in, tar shards out: parallel, streaming, resumable, every drop counted by its reason."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from edge_runtime.formats.errors import UserError
from pipeline.artifacts import file_digest, write_json
from pipeline.data.cleaning_journal import full_disk_refused
from pipeline.data.multimodal.audio import AudioSettings
from pipeline.data.multimodal.images import ImageSettings
from pipeline.data.multimodal.pairs import BadRow, Pair, PairDrop, Refused, pair_files, read_pairs
from pipeline.data.multimodal.preparing import CaptionSettings, Preparation, Prepared, prepare
from pipeline.data.multimodal.processors import ProcessorNeed, read_processor_need
from pipeline.data.multimodal.seen import Seen, open_seen
from pipeline.data.multimodal.tar_shards import ShardPlace, ShardWriter
from pipeline.data.ordered_work import map_ordered
from pipeline.progress import Report

_EXAMPLES = 3  # rows named for each reason
_SPLITS = ("train", "held_out")
_COMMIT_ROWS = 256  # at most so many are done again after a crash
_ALONE = 2  # processes asked for when one item gets a process of its own


@dataclass(frozen=True, slots=True)
class PairSettings:
    """How pairs are cleaned.

    Attributes:
        processor: Folder of a Hugging Face processor whose sizes and rate are prepared for, or None.
        held_out_modulus: A pair is held out when the sha256 of its clean text modulo this is 0; at least 2.
        near_duplicate_bits: A picture from which at most so many of 64 bits differ to one already kept
            is dropped, 0 to 15; None: only equal ones are.
        shard_bytes: Largest tar shard.
        workers: Processes; with 1 a decoder that crashes ends the run, with more it costs its pair.
    """

    processor: Path | None = None
    held_out_modulus: int = 20
    near_duplicate_bits: int | None = 4
    shard_bytes: int = 256 << 20
    workers: int = 1
    caption: CaptionSettings = field(default_factory=CaptionSettings)
    image: ImageSettings = field(default_factory=ImageSettings)
    audio: AudioSettings = field(default_factory=AudioSettings)


@dataclass(slots=True)
class PairsReport:
    """Counts by reason, with the first few rows of each, and the shards written.

    Attributes:
        media: Kept pairs by medium.
        pii: Replacements by kind.
        examples: ``FILE:ROW`` by reason.
        shards: Name to number of samples, size in bytes and sha256.
    """

    pairs: int = 0
    kept: int = 0
    held_out: int = 0
    media: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    pii: dict[str, int] = field(default_factory=dict)
    shards: dict[str, dict[str, int | str]] = field(default_factory=dict)


def clean_pairs(
    source: Path, output: Path, settings: PairSettings, checkpoint: Path, progress: Report | None = None
) -> PairsReport:
    """Write ``train-*.tar``, ``held_out-*.tar`` and ``shards.json`` of the pairs in ``source`` that are kept.

    A run killed anywhere goes on from ``checkpoint`` and ends with the same bytes, whatever the number of
    workers; of two duplicates the first row stays. Memory does not depend on the number of pairs. Nothing
    is in ``output`` before everything is done; the caller removes the checkpoint.

    Args:
        source: Folder with .jsonl or .parquet lists and the media they name by relative paths.
        output: Folder that takes the shards.
        settings: What is kept and what it becomes.
        checkpoint: Folder for unfinished work, best on the file system of ``output``.
        progress: Called with the number of rows done.

    Raises:
        UserError: The source cannot be used, nothing in it is kept, the disk is full, or the checkpoint belongs to
            other work.
    """
    _check(settings)
    need = ProcessorNeed() if settings.processor is None else read_processor_need(settings.processor)
    preparation = Preparation(source, need, settings.caption, settings.image, settings.audio)
    checkpoint.mkdir(parents=True, exist_ok=True)
    with full_disk_refused(checkpoint), open_seen(checkpoint / "seen.sqlite") as seen, ExitStack() as stack:
        writers = {split: ShardWriter(checkpoint, split, settings.shard_bytes) for split in _SPLITS}
        for writer in writers.values():
            stack.callback(writer.close)
        identity = _identity(source, settings, need)
        report = _resume(seen, writers, identity)
        rows = islice(read_pairs(source), report.pairs, None)
        for row, prepared in _map(partial(prepare, preparation=preparation), rows, settings.workers):
            _take(row, prepared, report, seen, writers, settings)
            if report.pairs % _COMMIT_ROWS == 0:
                _commit(seen, writers, report, identity)
            if progress is not None:
                progress(report.pairs, f"{report.kept} kept")
        for writer in writers.values():
            writer.finish()
        _commit(seen, writers, report, identity)
    if not report.kept:
        raise UserError(
            "data.path", f"{report.pairs} rows, none kept ({_reasons(report)})",
            "rows with image or audio, and text, whose files are there", "correct the rows or the limits",
        )  # fmt: skip
    with full_disk_refused(output):
        _publish(checkpoint, output, report)
    return report


def _check(settings: PairSettings) -> None:
    bits = settings.near_duplicate_bits
    checks: dict[str, tuple[Any, bool, str]] = {
        "held_out_modulus": (settings.held_out_modulus, settings.held_out_modulus >= 2, "at least 2"),
        "near_duplicate_bits": (bits, bits is None or 0 <= bits <= 15, "0 to 15, or none"),
        "shard_bytes": (settings.shard_bytes, settings.shard_bytes >= 1 << 16, "at least 65536"),
        "workers": (settings.workers, settings.workers >= 1, "at least 1"),
    }
    for name, (value, good, allowed) in checks.items():
        if not good:
            raise UserError(f"data.{name}", value, allowed, "choose another value")


def _identity(source: Path, settings: PairSettings, need: ProcessorNeed) -> str:
    """Digest of what the result depends on; the number of workers is not part of it."""
    values = asdict(settings) | {"workers": None, "processor": asdict(need)}
    lists = [[file.name, file_digest(file)] for file in pair_files(source)]
    return hashlib.sha256(json.dumps([values, lists], sort_keys=True, default=str).encode()).hexdigest()


def _resume(seen: Seen, writers: dict[str, ShardWriter], identity: str) -> PairsReport:
    state = seen.load()
    if state is not None and state["identity"] != identity:
        raise UserError("checkpoint", "that of other pairs or settings", "an empty folder", "remove it")
    for split, writer in writers.items():
        writer.resume(ShardPlace() if state is None else ShardPlace(**state["places"][split]))
    return PairsReport() if state is None else PairsReport(**state["report"])


def _map(
    function: Callable[[Pair | BadRow], Prepared | Refused], rows: Iterator[Pair | BadRow], workers: int
) -> Iterator[tuple[Pair | BadRow, Prepared | Refused]]:
    """Every row with its result, in order; a row that kills its process is dropped and the others go on."""
    waiting: deque[Pair | BadRow] = deque()

    def noted(items: Iterator[Pair | BadRow]) -> Iterator[Pair | BadRow]:
        for row in items:
            waiting.append(row)
            yield row

    while True:
        try:
            for result in map_ordered(function, noted(rows), workers):
                yield waiting.popleft(), result
            return
        except UserError:  # a worker died; the function itself raises none
            if workers == 1:
                raise
        while waiting:
            row = waiting.popleft()
            yield row, _alone(function, row)


def _alone(function: Callable[[Pair | BadRow], Prepared | Refused], row: Pair | BadRow) -> Prepared | Refused:
    try:
        return next(map_ordered(function, [row], _ALONE))
    except UserError:
        return Refused(PairDrop.DECODER_CRASHED)


def _take(
    row: Pair | BadRow,
    prepared: Prepared | Refused,
    report: PairsReport,
    seen: Seen,
    writers: dict[str, ShardWriter],
    settings: PairSettings,
) -> None:
    """Count a pair, and write it unless it is a duplicate."""
    report.pairs += 1
    if isinstance(prepared, Prepared):
        reason = _duplicate_reason(row, prepared, seen, settings.near_duplicate_bits)
        if reason is not None:
            prepared = Refused(reason)
    if isinstance(prepared, Refused) or isinstance(row, BadRow):
        _count_drop(report, str(prepared.reason) if isinstance(prepared, Refused) else PairDrop.BAD_ROW.value, row)
        return
    held_out = int.from_bytes(prepared.text_digest, "big") % settings.held_out_modulus == 0
    report.kept += 1
    report.held_out += held_out
    report.media[row.medium] = report.media.get(row.medium, 0) + 1
    for kind, count in prepared.pii.items():
        report.pii[kind] = report.pii.get(kind, 0) + count
    writers["held_out" if held_out else "train"].append(f"{row.number:09d}", _members(row, prepared))


def _count_drop(report: PairsReport, reason: str, row: Pair | BadRow) -> None:
    report.dropped[reason] = report.dropped.get(reason, 0) + 1
    if report.dropped[reason] <= _EXAMPLES:
        report.examples.setdefault(reason, []).append(row.origin)


def _duplicate_reason(row: Pair | BadRow, prepared: Prepared, seen: Seen, bits: int | None) -> PairDrop | None:
    """Why an earlier pair replaces this one; otherwise remember it."""
    key = row.key if isinstance(row, Pair) else None
    if key is not None and seen.has("key", key.encode(errors="surrogatepass")):
        return PairDrop.DUPLICATE_KEY
    if seen.has("medium", prepared.content):
        return PairDrop.DUPLICATE
    hash_ = prepared.perceptual_hash
    if bits is not None and hash_ is not None:
        if seen.has_similar(hash_, bits):
            return PairDrop.NEAR_DUPLICATE
        seen.add_similar(hash_, bits)
    seen.add("medium", prepared.content)
    if key is not None:
        seen.add("key", key.encode(errors="surrogatepass"))
    return None


def _members(row: Pair, prepared: Prepared) -> dict[str, bytes]:
    """The files of one sample. No path of the source: names of files name people."""
    facts = {"document": prepared.text_digest.hex()[:16], "row": row.number, **prepared.facts}
    text = prepared.text.encode()
    return {prepared.suffix: prepared.content, "json": json.dumps(facts, sort_keys=True).encode(), "txt": text}


def _commit(seen: Seen, writers: dict[str, ShardWriter], report: PairsReport, identity: str) -> None:
    places = {split: asdict(writer.flush()) for split, writer in writers.items()}
    seen.commit({"identity": identity, "report": asdict(report), "places": places})


def _reasons(report: PairsReport) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(report.dropped.items())) or "no rows"


def _publish(checkpoint: Path, output: Path, report: PairsReport) -> None:
    """Give the finished shards a second name in the output, or copy them to another file system."""
    output.mkdir(parents=True, exist_ok=True)
    for shard in sorted(checkpoint.glob("*.tar")):
        target = output / shard.name
        target.unlink(missing_ok=True)
        try:
            os.link(shard, target)
        except OSError:  # another file system
            shutil.copyfile(shard, target)
        with tarfile.open(target) as members:
            samples = sum(member.name.endswith(".json") for member in members)
        size_bytes, digest = target.stat().st_size, file_digest(target)
        report.shards[shard.name] = {"samples": samples, "size_bytes": size_bytes, "sha256": digest}
    write_json(output / "shards.json", report.shards)
