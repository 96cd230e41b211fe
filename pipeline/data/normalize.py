"""One written form for one text: repaired encoding, folded widths, no invisible characters, tidy lines."""

from __future__ import annotations

import re
import unicodedata

# UTF-8 read in a one-byte encoding shows a lead byte's letter and then a continuation byte's sign, or a space where
# a no-break space stood. The last ones of the first set are those of Mac OS Roman and of code page 437.
_SUSPECT_LEAD = "\u00c0-\u04ff\u201a\u221a\u00ac\u251c\u252c"
_SUSPECT = re.compile(f"[{_SUSPECT_LEAD}](?: ?[\u0080-\u2fff]|(?<=[\u00c2-\u00df]) )")

_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, as JSON's escapes can write it; UTF-8 has none

# Full-width forms of ASCII, the ideographic space and signs of money; Chinese punctuation stays.
_KEPT_WIDE = "，！？：；（）．～"
_WIDE = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if chr(code) not in _KEPT_WIDE}
_WIDE |= {0x3000: " ", 0xFFE0: "¢", 0xFFE1: "£", 0xFFE5: "¥"}
_WIDE_SET = "".join(map(chr, sorted(_WIDE)))
_WIDE_RUN = re.compile(f"[{_WIDE_SET}]+")
_NARROW_KANA = re.compile("[\uff61-\uff9f]+")

# Controls, zero-width and bidirectional marks, soft hyphens, noncharacters.
_INVISIBLE_SET = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufdd0-\ufdef\ufeff"
    "\ufff9-\ufffb\ufffe\uffff"
)
_INVISIBLE = re.compile(f"[{_INVISIBLE_SET}]")
# Tags after a black flag name its region; elsewhere nobody sees them.
_TAGS = re.compile("(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0000-\U000e007f]+")
_ASCII_CONTROLS = bytes((*range(0x09), *range(0x0B, 0x20), 0x7F))
# ZERO WIDTH (NON-)JOINER means something between letters of joined and of Indic scripts and, the joiner, in emoji.
_JOINED_LETTER = (
    "\u0620-\u074f\u0750-\u077f\u07c0-\u07ff\u08a0-\u08ff\u0900-\u0dff\u1000-\u109f\u1780-\u17d3\u1820-\u18aa"
    "\ufb50-\ufdcf\ufe70-\ufefc"
)
_EMOJI = "\u2190-\u2bff\U0001f000-\U0001faff"
_STRAY_JOINER = re.compile(
    f"(?<![{_JOINED_LETTER}\ufe0f{_EMOJI}])[\u200c\u200d]+|[\u200c\u200d]{{2,}}"
    f"|(?<=[{_JOINED_LETTER}])[\u200c\u200d](?![{_JOINED_LETTER}])"
    f"|(?<=[\ufe0f{_EMOJI}])(?:\u200c|\u200d(?![{_EMOJI}]))"
)
# One look for anything that the substitutions could change saves six of them on most texts.
_RARE = re.compile(
    f"[{_INVISIBLE_SET}\u200c\u200d\u2028\u2029\ud800-\udfff\uff61-\uff9f\U000e0000-\U000e007f" + _WIDE_SET + "]"
)
_BLANK_LINES = re.compile(r"\n{3,}")


def normalize(text: str) -> str:
    r"""Write a text in its one form; applying it again changes nothing.

    Mojibake (UTF-8 read as Windows-1252, Latin-1 and the like) is repaired line by line with ftfy, which leaves what
    it is not sure of. Full-width ASCII becomes ASCII and half-width katakana full width, while Chinese punctuation
    stays. NFC; unix line ends; no control, zero-width or bidirectional characters, except joiners between letters
    of scripts that need them and in emoji; lone surrogates become U+FFFD; no trailing space; at most two line ends
    together.

    Source: R. Speer, ftfy (https://ftfy.readthedocs.io); Unicode Standard Annex 15 and Annex 11.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.isascii():
        return _tidy_lines(text.encode().translate(None, _ASCII_CONTROLS).decode())
    repaired = _repair_encoding(text)
    while True:
        text = _tidy_lines(_rewrite_characters(repaired))
        repaired = _repair_encoding(text)  # what was removed may have kept a damaged pair apart
        if repaired == text:
            return text


def _repair_encoding(text: str) -> str:
    """Repair the lines that could need it: ftfy judges a line as a whole, and slowly."""
    if not _SUSPECT.search(text):
        return text
    import ftfy

    lines = text.split("\n")
    for number, line in enumerate(lines):
        if _SUSPECT.search(line):
            lines[number] = ftfy.fix_encoding(line)
    return "\n".join(lines)


def _rewrite_characters(text: str) -> str:
    if _RARE.search(text):
        text = _SURROGATE_PAIR.sub(_join_surrogates, text)
        text = _SURROGATE.sub("\ufffd", text)
        text = text.replace("\u2028", "\n").replace("\u2029", "\n\n")
        text = _WIDE_RUN.sub(lambda run: run[0].translate(_WIDE), text)
        text = _NARROW_KANA.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text)
        text = _TAGS.sub("", _INVISIBLE.sub("", text))
        if "\u200c" in text or "\u200d" in text:
            text = _STRAY_JOINER.sub("", text)
    return unicodedata.normalize("NFC", text)  # after the removals: a base may have met its accent only now


def _join_surrogates(pair: re.Match[str]) -> str:
    high, low = map(ord, pair[0])
    return chr(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00))


def _tidy_lines(text: str) -> str:
    text = "\n".join(map(str.rstrip, text.split("\n")))
    return (_BLANK_LINES.sub("\n\n", text) if "\n\n\n" in text else text).strip()
