"""Counting characters by script and letters among them, without a Python loop over the text."""

from __future__ import annotations

import functools
import string
from enum import IntEnum

import numpy as np
import numpy.typing as npt

_ASCII_LETTERS = string.ascii_letters.encode()
_LAST_LETTER = 0x32FFF  # beyond plane 3's ideographs no character is a letter


class Script(IntEnum):
    """Scripts that languages are told apart by; NONE is no letter at all."""

    NONE = 0
    OTHER = 1
    LATIN = 2
    HAN = 3
    KANA = 4
    HANGUL = 5
    CYRILLIC = 6
    GREEK = 7
    ARABIC = 8
    HEBREW = 9
    DEVANAGARI = 10
    THAI = 11


# Blocks of the Unicode Standard 15, half-open; only letters (str.isalpha) inside them count.
_BLOCKS = (
    (0x0041, 0x0250, Script.LATIN), (0x1E00, 0x1F00, Script.LATIN), (0x2C60, 0x2C80, Script.LATIN),
    (0xA720, 0xA800, Script.LATIN), (0xFB00, 0xFB07, Script.LATIN), (0xFF21, 0xFF5B, Script.LATIN),
    (0x0370, 0x0400, Script.GREEK), (0x1F00, 0x2000, Script.GREEK),
    (0x0400, 0x0530, Script.CYRILLIC), (0x1C80, 0x1C90, Script.CYRILLIC), (0xA640, 0xA6A0, Script.CYRILLIC),
    (0x0590, 0x0600, Script.HEBREW), (0xFB1D, 0xFB50, Script.HEBREW),
    (0x0600, 0x0780, Script.ARABIC), (0x08A0, 0x0900, Script.ARABIC), (0xFB50, 0xFE00, Script.ARABIC),
    (0xFE70, 0xFEFF, Script.ARABIC),
    (0x0900, 0x0980, Script.DEVANAGARI), (0x0E00, 0x0E80, Script.THAI),
    (0x1100, 0x1200, Script.HANGUL), (0x3130, 0x3190, Script.HANGUL), (0xA960, 0xA980, Script.HANGUL),
    (0xAC00, 0xD800, Script.HANGUL),
    (0x3041, 0x3100, Script.KANA), (0x31F0, 0x3200, Script.KANA), (0xFF66, 0xFFA0, Script.KANA),
    (0x1B000, 0x1B170, Script.KANA),
    (0x3005, 0x3008, Script.HAN), (0x3400, 0x4DC0, Script.HAN), (0x4E00, 0xA000, Script.HAN),
    (0xF900, 0xFB00, Script.HAN), (0x20000, 0x33000, Script.HAN),
)  # fmt: skip


def code_points(text: str) -> npt.NDArray[np.uint32]:
    """The code points of a text, (C,) uint32; lone surrogates included."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def count_letters(text: str) -> int:
    """How many characters are letters in the sense of ``str.isalpha``."""
    if text.isascii():
        return len(text) - len(text.encode().translate(None, _ASCII_LETTERS))
    return int(count_scripts(text)[1:].sum())


def count_scripts(text: str) -> npt.NDArray[np.int64]:
    """Characters by script, (len(Script),) int64; everything that is no letter under ``Script.NONE``."""
    if text.isascii():
        counts = np.zeros(len(Script), np.int64)
        counts[Script.LATIN] = count_letters(text)
        counts[Script.NONE] = len(text) - counts[Script.LATIN]
        return counts
    return np.bincount(scripts_of(code_points(text)), minlength=len(Script))


def scripts_of(codes: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
    """The script of each code point, (C,) uint8."""
    return _script_table()[np.minimum(codes, _LAST_LETTER + 1)]


@functools.cache
def _script_table() -> npt.NDArray[np.uint8]:
    letters = np.fromiter((chr(code).isalpha() for code in range(_LAST_LETTER + 2)), np.bool_, _LAST_LETTER + 2)
    table = np.full(_LAST_LETTER + 2, Script.OTHER, np.uint8)
    for first, end, script in _BLOCKS:
        table[first:end] = script
    return np.where(letters, table, np.uint8(Script.NONE))
