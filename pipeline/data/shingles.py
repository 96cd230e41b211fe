"""A text as a row of hashed units, and the n-grams of that row: one reading for duplicates and for decontamination.

A unit is a run of letters, digits and marks, in lower case, or one character of a script written without spaces
(Han, kana, bopomofo). Five units in a row are a word 5-gram of English and a character 5-gram of Chinese, so that
nothing here asks for the language, and a text in both is read as both.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
_MASK = (1 << 64) - 1
_POWER = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_GRAM_POWER = np.uint64(0xC2B2AE3D27D4EB4F)
_SEPARATOR, _LETTER, _CHARACTER = 0, 1, 2
_TABLED = 0x20000  # code points below are looked up one by one; from here to 0x40000 all are ideographs
_IDEOGRAPHS_END = 0x40000
_CHARACTER_RANGES = (
    (0x3005, 0x3008), (0x3041, 0x3097), (0x309D, 0x30A0), (0x30A1, 0x30FB), (0x30FC, 0x3130), (0x31A0, 0x31C0),
    (0x31F0, 0x3200), (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0xFF66, 0xFF9E), (0x1B000, 0x1B170),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Units:
    """What a text is made of.

    Attributes:
        hashes: (N,) uint64, one a unit; equal units have equal hashes in every process and on every machine.
        characters: (N,) bool: the unit is a single character of a script without spaces.
    """

    hashes: Hashes
    characters: NDArray[np.bool_]


def read_units(text: str) -> Units:
    """The units of a text, in order.

    A unit's hash is a polynomial of its code points modulo 2^64, read off prefix sums and then mixed: one pass over
    the text without a Python loop (Karp and Rabin, "Efficient randomized pattern-matching algorithms", 1987).
    """
    codes = np.frombuffer(text.lower().encode("utf-32-le", "replace"), dtype="<u4")
    kinds = _kinds()[np.minimum(codes, _IDEOGRAPHS_END)]
    before = np.concatenate(([_SEPARATOR], kinds[:-1])) if len(kinds) else kinds
    after = np.concatenate((kinds[1:], [_SEPARATOR])) if len(kinds) else kinds
    single = kinds == _CHARACTER
    starts = np.flatnonzero(single | ((kinds == _LETTER) & (before != _LETTER)))
    ends = np.flatnonzero(single | ((kinds == _LETTER) & (after != _LETTER))) + 1
    powers, inverses = _powers(1 << max(10, len(codes).bit_length()))
    prefix = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum((codes.astype(np.uint64) + np.uint64(1)) * powers[: len(codes)], out=prefix[1:])
    return Units(_mix((prefix[ends] - prefix[starts]) * inverses[starts]), single[starts])


def gram_hashes(hashes: Hashes, length: int) -> Hashes:
    """(N - length + 1,) hashes of ``length`` units in a row; empty when there are fewer units."""
    count = len(hashes) - length + 1
    if count < 1:
        return np.empty(0, np.uint64)
    grams = np.zeros(count, np.uint64)
    for offset in range(length):
        grams = grams * _GRAM_POWER + hashes[offset : offset + count]
    return _mix(grams)


def _mix(values: Hashes) -> Hashes:
    """The finaliser of MurmurHash3: every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


@lru_cache(maxsize=1)
def _kinds() -> NDArray[np.uint8]:
    """(0x40001,) what each code point is; the last entry stands for all above."""
    kinds = np.zeros(_IDEOGRAPHS_END + 1, np.uint8)
    kinds[:_TABLED] = [unicodedata.category(chr(code))[0] in "LNM" for code in range(_TABLED)]
    for start, end in _CHARACTER_RANGES:
        kinds[start:end] *= _CHARACTER
    kinds[_TABLED:_IDEOGRAPHS_END] = _CHARACTER
    return kinds


@lru_cache(maxsize=32)
def _powers(length: int) -> tuple[Hashes, Hashes]:
    """(length,) powers of the polynomial's base, and of its inverse, modulo 2^64."""
    inverse = pow(_POWER, -1, _MASK + 1)
    bases = (np.full(length, base, np.uint64) for base in (_POWER, inverse))
    powers, inverses = (np.concatenate(([np.uint64(1)], np.cumprod(base[:-1]))) for base in bases)
    return powers, inverses
