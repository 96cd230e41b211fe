"""Documents that hold a piece of an evaluation file: 13 words in a row, or 20 characters of Chinese.

The lengths are those of GPT-3's appendix C (Brown et al., "Language models are few-shot learners", 2020) and, for
Chinese, what carries as much text. Evaluation texts are read, normalised and cut into units like the corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_runtime.formats.errors import UserError
from pipeline.artifacts import write_atomic
from pipeline.data.normalize import normalize
from pipeline.data.shingles import Hashes, Units, gram_hashes, read_units
from pipeline.data.sources import Document, file_documents

WORDS, CHARACTERS = 13, 20


@dataclass(frozen=True, slots=True)
class EvaluationGrams:
    """What is looked for.

    Attributes:
        hashes: (G,) sorted, distinct.
        texts: Evaluation texts read.
        too_short: Of these, texts shorter than one n-gram, which therefore cannot be found.
    """

    hashes: Hashes
    texts: int
    too_short: int


def read_evaluation(paths: Sequence[Path]) -> EvaluationGrams:
    """The n-grams of evaluation files (.txt, .jsonl, .parquet or folders of them); memory is 8 bytes a gram.

    Raises:
        UserError: A file is missing or unreadable, or all texts are too short to be looked for.
    """
    found = [_evaluation_grams(document) for path in paths for document in file_documents(path)]
    too_short = sum(not len(grams) for grams in found)
    if too_short == len(found):
        raise UserError(
            "data.decontaminate", [str(path) for path in paths],
            f"files with a text of at least {WORDS} words or {CHARACTERS} Chinese characters", "leave them out",
        )  # fmt: skip
    return EvaluationGrams(np.unique(np.concatenate(found)), len(found), too_short)


def save_grams(grams: EvaluationGrams, path: Path) -> None:
    """Write the hashes as raw little-endian uint64, for every worker to map."""
    write_atomic(path, grams.hashes.astype("<u8").tobytes())


def map_grams(path: Path) -> Hashes:
    """The hashes of ``save_grams``, mapped: workers of one machine share one copy.

    Raises:
        UserError: The file is missing here, as on another machine of a cluster that does not share the folder.
    """
    try:
        return np.memmap(path, dtype="<u8", mode="r")
    except (OSError, ValueError) as error:
        raise UserError(
            "checkpoint", str(path), f"a folder that every worker sees ({error})", "share it between the machines"
        ) from None


def contaminated(units: Units, evaluation: Hashes) -> bool:
    """Whether one n-gram of a document stands in an evaluation file."""
    grams = _grams(units)
    places = np.searchsorted(evaluation, grams)
    return bool(np.any(evaluation[np.minimum(places, len(evaluation) - 1)] == grams))


def joined_text(document: Document) -> str:
    """All that a document says, in reading order: its question or its messages, and its text."""
    parts: Iterable[str] = (content for _, content in document.messages) if document.messages else (document.text,)
    return "\n".join([*([document.question] if document.question else []), *parts])


def _evaluation_grams(document: Document) -> Hashes:
    return _grams(read_units(normalize(joined_text(document))))


def _grams(units: Units) -> Hashes:
    """Hashes of 13 units without a character of Chinese, and of 20 of which most are such characters."""
    before = np.concatenate(([0], np.cumsum(units.characters)))
    words, characters = gram_hashes(units.hashes, WORDS), gram_hashes(units.hashes, CHARACTERS)
    in_words = before[WORDS : WORDS + len(words)] - before[: len(words)]
    in_characters = before[CHARACTERS : CHARACTERS + len(characters)] - before[: len(characters)]
    return np.concatenate((words[in_words == 0], characters[in_characters * 2 > CHARACTERS]))
