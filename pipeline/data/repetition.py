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
        if len(places) and places[-1] + size > len(ids):
            inside = int(np.searchsorted(places, len(ids) - size, "right"))
            places, hashes = places[:inside], hashes[:inside]
        hashes = hashes * _HASH_FACTOR + units[places + (size - 1)]
        shared, most = _find_repeating(hashes)
        places, hashes = places[shared], hashes[shared]
        if not len(places):
            return None
        # The exact counts cost more than what bounds them, and most texts stay far below the limits.
        gram_chars = ends[places + size] - ends[places]
        if size in top:
            allowed, spaces = top[size] * text_chars, (size - 1) * space_chars
            if most * (int(gram_chars.max()) + spaces) > allowed < _top_gram_chars(hashes, gram_chars, spaces):
                return DropReason.REPEATED_PHRASE
        if size in repeated:
            allowed = repeated[size] * text_chars
            if int(gram_chars.sum()) > allowed < _repeated_chars(places, hashes, gram_chars, size):
                return DropReason.REPEATED_PASSAGES
    return None


def _find_repeating(hashes: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.bool_], int]:
    """Where a hash stands that stands elsewhere too, (N,) bool, and how often the most frequent one does."""
    order = hashes.argsort()
    ordered = hashes[order]
    starts = np.ones(len(hashes) + 1, np.bool_)  # of runs of equal hashes; one more where the last one ends
    np.not_equal(ordered[1:], ordered[:-1], out=starts[1:-1])
    edges = starts.nonzero()[0]
    shared = np.empty(len(hashes), np.bool_)
    shared[order] = ~(starts[1:] & starts[:-1])
    return shared, int((edges[1:] - edges[:-1]).max(initial=0))


def _top_gram_chars(hashes: npt.NDArray[np.uint64], gram_chars: npt.NDArray[np.int64], spaces: int) -> int:
    """Characters of the most frequent gram, the first of several equally frequent ones, at all its places."""
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    most = int(counts.max())
    return most * (int(gram_chars[first[counts == most].min()]) + spaces)


def _repeated_chars(
    places: npt.NDArray[np.int64],
    hashes: npt.NDArray[np.uint64],
    gram_chars: npt.NDArray[np.int64],
    size: int,
) -> int:
    """Characters of grams that stood before, none counted twice: after one of them the walk goes on behind it."""
    seen: set[int] = set()
    chars = walked = 0
    for place, gram, length in zip(places.tolist(), hashes.tolist(), gram_chars.tolist(), strict=True):
        if place < walked:
            continue
        if gram in seen:
            chars += length
            walked = place + size
        else:
            seen.add(gram)
    return chars
