"""A tokenizer.json in llama.cpp's words, refused where llama.cpp would cut a text differently.

Three kinds are known. Byte-level BPE (Qwen, Llama 3, Mistral Nemo, GPT-2, SmolLM): the pre-tokenizer's pattern gives
llama.cpp's name for it. Byte-fallback BPE with marks for spaces (Llama 2, Mistral): merges become scores. Byte-fallback
BPE with plain spaces, as we train it: cut at line ends alone, because no merge crosses the cuts that ours makes too.

llama.cpp normalizes nothing: texts outside of NFC may be cut differently (Qwen), and with the last two kinds "▁" in a
text is read as a space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from edge_runtime.formats.errors import ExportError
from edge_runtime.formats.manifest import TOKENIZER_FILE
from edge_runtime.formats.package import CHAT_TEMPLATE_FILE

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
SPACE = "▁"
_PIECE = r" *[^ \n]+|\n+| +"  # how tokenizers that are trained here split: a word with the spaces before it
_BYTE_TOKENS = [f"<0x{value:02X}>" for value in range(256)]
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What a byte-level pre-tokenizer does, step by step, and whether whole words skip the merges: llama.cpp's name.
_BYTE_LEVEL = {
    ((f"split {_CONTRACTIONS}|{_WORDS}|\\p{{N}}|{_REST}", "bytes"), False): "qwen2",
    ((f"split {_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}", "bytes"), True): "llama-bpe",
    ((f"split {_TEKKEN}", "bytes"), True): "tekken",
    (("words",), False): "gpt-2",
    (("digits", "words"), False): "smollm",
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What llama.cpp needs to cut a text as tokenizer.json does.

    Attributes:
        model: ``gpt2`` for merges, ``llama`` for scores.
        pre: How a text is split before merging.
        tokens: Text of each id (V), with spaces and bytes as llama.cpp writes them.
        types: Kind of each id (V).
        merges: Pairs in their order.
        scores: Of each id (V); empty where merges decide.
        bos: Begins every prompt, or None.
        eos: Ends a generation, one or more.
        chat_template: Jinja source, or None.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    scores: Sequence[float]
    bos: int | None
    eos: Sequence[int]
    chat_template: str | None


def read_vocabulary(folder: Path, vocab_size: int, *, bos: int | None, eos: Sequence[int]) -> Vocabulary:
    """The tokenizer.json of a folder, and its chat template.

    Args:
        folder: Holds ``tokenizer.json``, perhaps ``chat_template.jinja``.
        vocab_size: Rows of the embedding; ids that the tokenizer lacks are filled up.
        bos: Id put before every prompt.
        eos: Ids that end a generation.

    Raises:
        ExportError: llama.cpp has no tokenizer that cuts as this one does.
    """
    state = json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
    template = folder / CHAT_TEMPLATE_FILE
    model = state["model"]
    if model.get("type", "BPE") != "BPE" or any(
        model.get(option) for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        _refuse("a tokenizer that is no plain BPE")
    if not eos:
        _refuse("no token that ends a text", "llama.cpp would take token 11 for it")
    merges = [_parts(merge) for merge in model["merges"]]
    kind, pre, scores = _kind(state, merges)
    spaced = kind == "plain spaces"
    tokens, types = _tokens(state, vocab_size, byte_tokens=kind != "byte level", spaced=spaced)
    if spaced:
        merges = [(first.replace(" ", SPACE), second.replace(" ", SPACE)) for first, second in merges]
    return Vocabulary(
        "llama" if scores else "gpt2", pre, tokens, types,
        [] if scores else [f"{first} {second}" for first, second in merges],
        [scores.get(token, 0.0) for token in tokens] if scores else [], bos, list(eos),
        template.read_text(encoding="utf-8") if template.is_file() else None,
    )  # fmt: skip


def _kind(state: dict[str, Any], merges: list[tuple[str, str]]) -> tuple[str, str, dict[str, float]]:
    """(kind, llama.cpp's name of the split, scores by token)."""
    steps = _steps(state.get("pre_tokenizer"))
    normalizer = _steps(state.get("normalizer"))
    model = state["model"]
    if steps and steps[-1] in ("bytes", "words"):
        name = _BYTE_LEVEL.get((steps, bool(model.get("ignore_merges"))))
        if name is None or normalizer not in ((), ("NFC",)):
            _refuse(f"the byte-level pre-tokenizer {' > '.join((*normalizer, *steps))[:160]!r}")
        return "byte level", name, {}
    if not model.get("byte_fallback") or not set(_BYTE_TOKENS) <= set(model["vocab"]):
        _refuse("a BPE that does not fall back to bytes")
    if (normalizer, steps) in (((f"prepend {SPACE}", f"replace ' ' {SPACE}"), ()), ((), ("metaspace",))):
        return "marked spaces", "default", _scores(model["vocab"], merges)
    if (normalizer, steps) == ((), (f"split {_PIECE}",)):
        _require_pieces(model["vocab"], merges)
        return "plain spaces", "sarvam-moe", {}
    _refuse(f"the pre-tokenizer {' > '.join((*normalizer, *steps))[:160]!r}")


def _steps(part: dict[str, Any] | None) -> tuple[str, ...]:
    """A normalizer or pre-tokenizer as a list of words."""
    if part is None:
        return ()
    kind = part["type"]
    if kind == "Sequence":
        inner = part.get("pretokenizers") or part.get("normalizers") or []
        return tuple(step for entry in inner for step in _steps(entry))
    pattern = part.get("pattern") or {}
    if kind == "Split" and part["behavior"] == "Isolated" and not part["invert"] and "Regex" in pattern:
        return (f"split {pattern['Regex']}",)
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return ("words" if part.get("use_regex", True) else "bytes",)
    if kind == "Digits" and part["individual_digits"]:
        return ("digits",)
    if kind == "Prepend":
        return (f"prepend {part['prepend']}",)
    if kind == "Replace":
        return (f"replace {pattern.get('String')!r} {part['content']}",)
    if kind == "Metaspace" and part["replacement"] == SPACE and not part.get("split", True):
        return ("metaspace" if part.get("prepend_scheme") in ("first", "always") else "metaspace without a prefix",)
    return (kind,)


def _scores(vocab: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, float]:
    """Minus the place of each merged token: llama.cpp joins whatever two neighbours make the best token.

    That is what the merges say when every way to halve a token into two others is among them, one token after another.
    """
    scores: dict[str, float] = {}
    halvings: dict[str, int] = {}
    last = ""
    for first, second in merges:
        token = first + second
        if token != last and token in scores:
            _refuse(f"merges that make {token!r} in several places")
        scores.setdefault(token, -1.0 - len(scores))
        halvings[token] = halvings.get(token, 0) + 1
        last = token
    for token in scores:
        possible = sum(token[:cut] in vocab and token[cut:] in vocab for cut in range(1, len(token)))
        if halvings[token] != possible:
            _refuse(f"{halvings[token]} of {possible} merges that could make {token!r}")
    return scores


def _require_pieces(vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Refuse merges across the cuts of our own pattern, and marks that stand for spaces in llama.cpp."""
    whole = re.compile(_PIECE)
    for token in (first + second for first, second in merges):
        if not whole.fullmatch(token):
            _refuse(f"a merge across words, {token!r}")
    marked = [token for token in vocab if SPACE in token]
    if marked:
        _refuse(f"the token {marked[0]!r}, in which llama.cpp reads a space")


def _tokens(state: dict[str, Any], vocab_size: int, *, byte_tokens: bool, spaced: bool) -> tuple[list[str], list[int]]:
    """Text and type of every id."""
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    entries = [(index, token, NORMAL) for token, index in state["model"]["vocab"].items()]
    named = [(entry["id"], entry["content"], CONTROL if entry["special"] else USER_DEFINED)
             for entry in state.get("added_tokens") or []]  # fmt: skip
    bytes_here = set(_BYTE_TOKENS) if byte_tokens else set()
    for index, token, kind in entries + named:
        if index >= vocab_size:
            _refuse(f"id {index} for {token!r}", f"the embedding has {vocab_size} rows")
        types[index] = kind
        if kind == NORMAL and token in bytes_here:
            types[index] = BYTE
        if token == state["model"].get("unk_token"):
            types[index] = UNKNOWN
        tokens[index] = token.replace(" ", SPACE) if spaced and kind == NORMAL else token
    if len(set(tokens)) < vocab_size:
        _refuse("two ids with the same text", "llama.cpp does not load it")
    return tokens, types


def _parts(merge: str | Sequence[str]) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _refuse(fault: str, why: str = "llama.cpp would cut texts differently") -> NoReturn:
    raise ExportError(f"{TOKENIZER_FILE} has {fault}: {why}; leave gguf out of export.containers")
