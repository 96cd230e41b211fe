"""What the tokens of a vocabulary stand for, as bytes, however their tokenizer writes them.

Byte-level tokenizers write each byte as a letter, SentencePiece's mark spaces and spell rare bytes as <0xNN>. Bytes are
what vocabularies have in common: they tell which tokens of two are the same, and what a text cost each to predict.
"""

from __future__ import annotations

import json
import re
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


class TokenKind(StrEnum):
    """Ordinary text, one byte as such, or something that templates write."""

    TEXT = "text"
    BYTE = "byte"
    SPECIAL = "special"


class TokenBytes(NamedTuple):
    """What a token stands for; of a special token ``spelt`` is its name."""

    kind: TokenKind
    spelt: bytes


def token_bytes(tokenizer: Tokenizer) -> dict[int, TokenBytes]:
    """What each id of a tokenizer stands for, in the order of ids."""
    decoder = json.dumps(json.loads(tokenizer.to_str())["decoder"])
    letters = _byte_letters() if "ByteLevel" in decoder else None
    marks_spaces = "\\u2581" in decoder or "Metaspace" in decoder
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    found = {}
    for token, id in sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]):
        if token in special:
            found[id] = TokenBytes(TokenKind.SPECIAL, token.encode())
        elif letters is not None and set(token) <= letters.keys():
            found[id] = TokenBytes(TokenKind.TEXT, bytes(letters[letter] for letter in token))
        elif _BYTE_TOKEN.fullmatch(token):
            found[id] = TokenBytes(TokenKind.BYTE, bytes.fromhex(token[3:5]))
        else:
            plain = token.replace("\u2581", " ") if marks_spaces else token
            found[id] = TokenBytes(TokenKind.TEXT, plain.encode())
    return found


def text_bytes(tokenizer: Tokenizer, rows: int) -> NDArray[np.int32]:
    """Bytes of text (V,) that each of a model's ids stands for; special tokens and rows without a token are none.

    Raises:
        UserError: The tokenizer has ids that the model has no row for.
    """
    sizes = np.zeros(rows, np.int32)
    for id, (kind, spelt) in token_bytes(tokenizer).items():
        if id >= rows:
            raise UserError("tokenizer.json", f"id {id}", f"0..{rows - 1}, the rows of the model beside it")
        sizes[id] = 0 if kind == TokenKind.SPECIAL else len(spelt)
    return sizes


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes with: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
