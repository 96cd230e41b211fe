"""How much of a text repeats itself: Gopher's shares of repeated lines, phrases and passages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.data.rule_limits import WebLimits
from pipeline.data.verdicts import DropReason

_HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit is lost


def repeated_share(parts: Sequence[str], text_chars: int) -> tuple[float, float]:
    """Shares of ``parts`` that stood before: of their number, and of the text's characters."""
    unique = set(parts)
    if len(unique) == len(parts):
        return 0.0, 0.0
    repeated_chars = sum(map(len, parts)) - sum(map(len, unique))
    return (len(parts) - len(unique)) / len(parts), repeated_chars / text_chars


def repetition(
    ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], text_chars: int, space_chars: int, limits: WebLimits
) -> DropReason | None:
    """Test a text's units against the limits on grams, or None.

    Only a gram whose beginning repeats can repeat, so each length looks at the places that the one before left:
    on most texts the long grams cost nothing.

    Args:
        ids: The units, (N,): equal numbers for equal units.
        lengths: Their characters, (N,).
        text_chars: Characters of the whole text.
        space_chars: Characters between two units of a phrase: 1 for words, 0 for characters.
        limits: Limits on the most frequent gram and on repeated ones.

    Source: Rae et al. 2021, arXiv 2112.11446, table A1; the counting of the long grams as datatrove does it.
    """
    top, repeated = dict(limits.top_grams), dict(limits.repeated_grams)
    ends = np.concatenate(([0], np.cumsum(lengths)))
    units = ids.astype(np.uint64) + np.uint64(1)
    hashes, places = units, np.arange(len(ids))
    for size in range(2, max((*top, *repeated), default=0) + 1):
        inside = places + size <= len(ids)
        places = places[inside]
        hashes = hashes[inside] * _HASH_FACTOR + units[places + size - 1]
        places, hashes = _repeating(places, hashes)
        if not len(places):
            return None
        if size in top:
            chars = _top_gram_chars(places, hashes, ends, size, (size - 1) * space_chars)
            if chars > top[size] * text_chars:
                return DropReason.REPEATED_PHRASE
        # The places are all that can count twice: their lengths bound what the exact walk would find.
        allowed = repeated[size] * text_chars if size in repeated else np.inf
        if (ends[places + size] - ends[places]).sum() > allowed < _repeated_chars(places, hashes, ends, size):
            return DropReason.REPEATED_PASSAGES
    return None


def _repeating(
    places: npt.NDArray[np.int64], hashes: npt.NDArray[np.uint64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
    """The places whose hash stands at another place too, in their order."""
    order = np.argsort(hashes)
    ordered = hashes[order]
    same = ordered[1:] == ordered[:-1]
    shared = np.zeros(len(hashes), np.bool_)
    shared[order[1:][same]] = True
    shared[order[:-1][same]] = True
    return places[shared], hashes[shared]


def _top_gram_chars(
    places: npt.NDArray[np.int64],
    hashes: npt.NDArray[np.uint64],
    ends: npt.NDArray[np.int64],
    size: int,
    space_chars: int,
) -> int:
    """Characters of the most frequent gram, the first of several equally frequent ones, at all its places."""
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    most = int(counts.max())
    place = places[first[counts == most].min()]
    return most * (int(ends[place + size] - ends[place]) + space_chars)


def _repeated_chars(
    places: npt.NDArray[np.int64], hashes: npt.NDArray[np.uint64], ends: npt.NDArray[np.int64], size: int
) -> int:
    """Characters of grams that stood before, none counted twice: after one of them the walk goes on behind it."""
    seen: set[int] = set()
    chars = walked = 0
    lengths = (ends[places + size] - ends[places]).tolist()
    for place, gram, length in zip(places.tolist(), hashes.tolist(), lengths, strict=True):
        if place < walked:
            continue
        if gram in seen:
            chars += length
            walked = place + size
        else:
            seen.add(gram)
    return chars
