"""Whether cleaning and datatrove say the same of the same documents; tables for cleaning.py.

The peer's verdicts come from cleaning_datatrove.py, one line a document. Near duplicates, which both sides estimate,
are held against the exact similarity of the documents' word 5-grams.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.data.judging import Chunk, CleaningSettings, JudgePlan, judge_chunk
from pipeline.data.sources import file_documents

_THRESHOLD = 0.8
_WORD = re.compile(r"[^\W_]+")


def print_agreement(corpus: Path, verdicts: Path, words: str) -> None:
    """Print how many documents both keep, both drop, and why the rest differ."""
    plan = JudgePlan(CleaningSettings(max_chars=100_000, rules="web"))
    ours = [
        outcome.reason
        for document in file_documents(corpus)
        for outcome in judge_chunk(plan, Chunk((document,), "")).outcomes
    ]
    theirs: list[str | None] = [json.loads(line) for line in verdicts.read_text(encoding="utf-8").splitlines()]
    pairs = Counter(zip(ours, theirs, strict=True))
    same = sum(count for (one, other), count in pairs.items() if (one is None) == (other is None))
    print(f"datatrove's words {words}: the same verdict on {same} of {len(ours)} documents ({same / len(ours):.2%}).\n")
    print("| Sevenfold | datatrove | documents |\n|---|---|---|")
    for (one, other), count in pairs.most_common():
        print(f"| {one or 'keeps'} | {other or 'keeps'} | {count} |")
    print(flush=True)


def print_near_duplicates(corpus: Path, ours: Path, theirs: Path) -> None:
    """Print how many near duplicates each dropped of those that its rules kept, rightly and wrongly.

    Args:
        corpus: Its rows carry their number.
        ours: Our output; a row's source ends with its line.
        theirs: The peer's folder: ``rules`` before, ``kept`` after duplicates are dropped.
    """
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    passed = {int(row["id"]) for row in _rows(sorted((theirs / "rules").iterdir()))}
    sides = {
        "Sevenfold": {int(row["source"].rpartition(":")[2]) - 1 for row in _rows(sorted(ours.iterdir()))},
        "datatrove, words by spaces": {int(row["id"]) for row in _rows(sorted((theirs / "kept").iterdir()))},
    }
    grams = {number: _grams(texts[number]) for number in sorted(passed.union(*sides.values()))}
    print(f"Near duplicates among the {len(passed)} documents that the rules keep, by exact similarity from 0.8:\n")
    print("| | dropped | of them without a similar document that stays | similar pairs that both stay |")
    print("|---|---|---|---|")
    for name, kept in sides.items():
        dropped = passed - kept
        similar = {number: _similar(number, grams, index) for index in [_index(grams, kept)] for number in grams}
        wrongly = sum(not similar[number] for number in dropped)
        missed = sum(len(similar[number]) for number in kept) // 2
        print(f"| {name} | {len(dropped)} | {wrongly} | {missed} |")
    print(flush=True)


def _rows(files: Sequence[Path]) -> Iterator[dict[str, str]]:
    for file in files:
        with file.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def _grams(text: str) -> frozenset[int]:
    words = _WORD.findall(text.lower())
    return frozenset(hash(tuple(words[start : start + 5])) for start in range(len(words) - 4))


def _index(grams: dict[int, frozenset[int]], kept: set[int]) -> dict[int, list[int]]:
    """Gram to the kept documents that have it."""
    index: defaultdict[int, list[int]] = defaultdict(list)
    for number in sorted(kept):
        for gram in grams[number]:
            index[gram].append(number)
    return index


def _similar(number: int, grams: dict[int, frozenset[int]], index: dict[int, list[int]]) -> list[int]:
    """Kept documents, other than this one, whose exact Jaccard similarity reaches the threshold."""
    shared = Counter(other for gram in grams[number] for other in index.get(gram, ()))
    sizes = ((other, count, len(grams[number]) + len(grams[other]) - count) for other, count in shared.items())
    return [other for other, count, union in sizes if other != number and count >= _THRESHOLD * union]
