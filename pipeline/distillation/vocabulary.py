"""A smaller vocabulary: the tokens that a corpus uses, and a tokenizer that still encodes every text.

Of a 135M model a 152K vocabulary is half. Byte-level BPE (Qwen, Llama 3) and byte-fallback BPE (Llama 2, Mistral, ours)
can lose any token but the bytes: what was one token becomes several. Kept tokens keep the tokens that they are built
through, so that a text whose tokens are all kept is cut exactly as before: BPE applies the merge of lowest rank first,
the merges inside a final token are those of its string alone, and what is left of the list keeps its order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.errors import UserError

Ids = NDArray[np.int64]
_BYTE_TOKENS = [f"<0x{value:02X}>" for value in range(256)]
_LISTED_IDS = ("suppress_tokens", "begin_suppress_tokens")
_COUNT_ROWS = 1024


@dataclass(frozen=True, slots=True)
class TrimmedVocabulary:
    """A choice of tokens, and their tokenizer.

    Attributes:
        kept_ids: (V',) the old id of each new one.
        new_ids: (V,) the new id of each old one, -1 for those dropped.
        tokenizer: The text of tokenizer.json.
    """

    kept_ids: Ids
    new_ids: Ids
    tokenizer: str


def count_ids(sequences: NDArray[np.integer[Any]], vocab_size: int) -> Ids:
    """How often each id (V,) occurs in packed sequences (S, T), a memory map too.

    Raises:
        UserError: An id is outside the vocabulary.
    """
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(sequences), _COUNT_ROWS):
        ids = np.asarray(sequences[start : start + _COUNT_ROWS]).ravel()
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise UserError("sequences", f"ids {ids.min()} to {ids.max()}", f"0 to {vocab_size - 1}")
        counts += np.bincount(ids, minlength=vocab_size)
    return counts


def choose_ids(
    tokenizer: str, counts: Ids, *, vocab_size: int | None = None, coverage: float | None = None,
    always: Iterable[int] = (),
) -> Ids:  # fmt: skip
    """Ids to keep, in their old order: bytes and added tokens, then the most frequent with all they are built through.

    Args:
        tokenizer: The text of tokenizer.json.
        counts: Occurrences (V,) of each id in the corpus; rows beyond the tokenizer are never kept.
        vocab_size: Most tokens; without ``coverage`` filled with unused tokens in the order of their ids.
        coverage: Share (0..1) of all occurrences after which no more tokens are taken; None with no ``vocab_size``: 1.
        always: Ids that must stay, as those which config.json names.

    Raises:
        UserError: Not a BPE that falls back to bytes, or ``vocab_size`` is too small for what must stay.
    """
    state = _read_tokenizer(tokenizer)
    vocab, added = state["model"]["vocab"], {token["id"] for token in state["added_tokens"]}
    strings: dict[int, str] = {index: token for token, index in vocab.items()}
    kept = added | set(always) | {vocab[token] for token in _essential(state)}
    for index in sorted(kept & strings.keys()):
        kept |= _builders(strings[index], state)
    budget = len(strings.keys() | added) if vocab_size is None else vocab_size
    if len(kept) > budget:
        raise UserError("submodel.vocab_size", vocab_size, f"at least {len(kept)} (bytes, added tokens, their parts)")
    if coverage is not None and not 0 < coverage <= 1:
        raise UserError("coverage", coverage, "above 0, at most 1")
    fills = coverage is None and vocab_size is not None
    wanted = counts.sum() * (1.0 if coverage is None else coverage)
    covered = int(counts[[index for index in kept if index < len(counts)]].sum())
    for index in np.argsort(-counts, kind="stable").tolist():
        if len(kept) == budget or (covered >= wanted and not fills):
            break
        if index in kept or index not in strings:
            continue
        new = (_builders(strings[index], state) | {index}) - kept
        if len(kept) + len(new) <= budget:
            kept |= new
            covered += int(counts[list(new)].sum())
    return np.array(sorted(kept), np.int64)


def trim_tokenizer(tokenizer: str, kept_ids: Ids, rows: int) -> TrimmedVocabulary:
    """A tokenizer of the kept ids, numbered anew in their old order (tokens outside the model's own come last).

    Args:
        tokenizer: The text of tokenizer.json.
        kept_ids: What ``choose_ids`` chose.
        rows: Rows V of the model's embedding; those beyond the tokenizer are dropped.

    Raises:
        UserError: Ids that the tokenizer does not have, or not a BPE that falls back to bytes.
    """
    state = _read_tokenizer(tokenizer)
    model, wanted = state["model"], set(kept_ids.tolist())
    old: list[tuple[str, int]] = [item for item in sorted(model["vocab"].items(), key=_id) if item[1] in wanted]
    own = {index for _, index in old}
    extra = sorted(token["id"] for token in state["added_tokens"] if token["id"] not in own)
    order = np.array([index for _, index in old] + extra, np.int64)
    unknown = sorted(wanted - set(order.tolist()))
    if unknown or set(extra) - wanted or (len(order) and int(order.max()) >= rows):
        faults = unknown or sorted(set(extra) - wanted) or [int(order.max())]
        raise UserError("kept ids", faults[:5], f"tokens that tokenizer.json has, below {rows}, every added token")
    new_ids = np.full(rows, -1, np.int64)
    new_ids[order] = np.arange(len(order))
    kept = {token: int(new_ids[index]) for token, index in old}
    model["vocab"] = kept
    model["merges"] = [merge for merge in model["merges"] if {*_parts(merge), "".join(_parts(merge))} <= kept.keys()]
    for token in state["added_tokens"]:
        token["id"] = int(new_ids[token["id"]])
    state["added_tokens"].sort(key=lambda token: token["id"])
    _renumber(state, new_ids)
    return TrimmedVocabulary(order, new_ids, json.dumps(state, ensure_ascii=False))


def token_pieces(tokenizer: str, vocabulary: TrimmedVocabulary) -> list[tuple[int, ...]]:
    """The new ids of each old id's string: one for a kept token, several for a dropped one, none for unused rows."""
    from tokenizers import Tokenizer

    old = json.loads(tokenizer)
    bare = json.loads(vocabulary.tokenizer) | {"normalizer": None, "pre_tokenizer": None, "post_processor": None}
    model = Tokenizer.from_str(json.dumps(bare | {"added_tokens": [], "truncation": None, "padding": None}))
    dropped = [(token, index) for token, index in old["model"]["vocab"].items() if vocabulary.new_ids[index] < 0]
    pieces: list[tuple[int, ...]] = [(int(index),) if index >= 0 else () for index in vocabulary.new_ids]
    encodings = model.encode_batch([token for token, _ in dropped], add_special_tokens=False)
    for (_, index), encoding in zip(dropped, encodings, strict=True):
        pieces[index] = tuple(encoding.ids)
    return pieces


def remap_token_ids(values: dict[str, Any], vocabulary: TrimmedVocabulary) -> dict[str, Any]:
    """Those settings of config.json or generation_config.json that name tokens, with their new ids.

    Raises:
        UserError: One names a token that was dropped.
    """
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        if value is None or not (key.endswith("_token_id") or key in _LISTED_IDS):
            continue
        listed = value if isinstance(value, list) else [value]
        for old in listed:
            if not 0 <= old < len(vocabulary.new_ids) or vocabulary.new_ids[old] < 0:
                raise UserError(key, old, "a token that the vocabulary keeps", "choose ids with always=")
        new = [int(vocabulary.new_ids[old]) for old in listed]
        renamed[key] = new if isinstance(value, list) else new[0]
    return renamed


def named_ids(directory: Path) -> set[int]:
    """Ids that config.json and generation_config.json name: they must stay."""
    ids: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (directory / name).is_file():
            for key, value in json.loads((directory / name).read_text(encoding="utf-8")).items():
                if value is not None and (key.endswith("_token_id") or key in _LISTED_IDS):
                    ids.update(value if isinstance(value, list) else [value])
    return ids


def write_tokenizer(source: Path, output: Path, vocabulary: TrimmedVocabulary) -> None:
    """The trimmed tokenizer.json with the settings around it; files that hold the old vocabulary stay behind."""
    (output / "tokenizer.json").write_text(vocabulary.tokenizer, encoding="utf-8")
    for name in ("special_tokens_map.json", "chat_template.jinja"):
        if (source / name).is_file():
            (output / name).write_bytes((source / name).read_bytes())
    if (source / "generation_config.json").is_file():
        values = json.loads((source / "generation_config.json").read_text(encoding="utf-8"))
        text = json.dumps(values | remap_token_ids(values, vocabulary), indent=2) + "\n"
        (output / "generation_config.json").write_text(text, encoding="utf-8")
    path = source / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # Classes named after a family may build their tokenizer from other files; this one reads tokenizer.json.
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "added_tokens_decoder" in values:
        decoder = values["added_tokens_decoder"].items()
        values["added_tokens_decoder"] = {str(vocabulary.new_ids[int(old)]): token for old, token in decoder}
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    (output / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _read_tokenizer(text: str) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(text)
        model = state["model"]
        kind = model.get("type", "BPE")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError("tokenizer.json", text[:40], "a tokenizer of the tokenizers library") from None
    if kind != "BPE":
        raise UserError("tokenizer.json", kind, "a byte-level or byte-fallback BPE", "leave submodel.vocab_size out")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError("tokenizer.json", "BPE with prefixes or suffixes of words", "a BPE without them")
    if not (_is_byte_level(state) or model.get("byte_fallback")):
        raise UserError("tokenizer.json", "a BPE of characters", "one that falls back to bytes: others cannot be cut")
    missing = sorted(set(_BYTE_TOKENS) - model["vocab"].keys())
    if not _is_byte_level(state) and missing:
        raise UserError("tokenizer.json", f"no token {missing[0]}", "all 256 byte tokens, or texts would be lost")
    state["added_tokens"] = state.get("added_tokens") or []
    state["ranks"] = {tuple(_parts(merge)): rank for rank, merge in enumerate(model["merges"])}
    return state


def _is_byte_level(state: dict[str, Any]) -> bool:
    return any('"ByteLevel"' in json.dumps(state.get(part)) for part in ("pre_tokenizer", "normalizer"))


def _essential(state: dict[str, Any]) -> set[str]:
    """Tokens without which some text could not be written: bytes and the unknown token."""
    from tokenizers import pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet() if _is_byte_level(state) else _BYTE_TOKENS
    return {token for token in (*alphabet, state["model"].get("unk_token")) if token in state["model"]["vocab"]}


def _builders(token: str, state: dict[str, Any]) -> set[int]:
    """Ids of all that stands on the way from characters to a token when its string is encoded."""
    vocab, ranks = state["model"]["vocab"], state["ranks"]
    symbols = list(token)
    if not all(symbol in vocab for symbol in symbols):
        return set()  # a byte token, or an added one: not built by merges
    seen = set(symbols)
    while len(symbols) > 1:
        rank, place = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(symbols)))
        if rank == len(ranks):
            break
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
        seen.add(symbols[place])
    return {vocab[symbol] for symbol in seen}


def _parts(merge: str | Sequence[str]) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _id(item: tuple[str, int]) -> int:
    return item[1]


def _renumber(state: dict[str, Any], new_ids: Ids) -> None:
    """Ids in the post-processor and in padding."""
    del state["ranks"]
    for processor in _processors(state.get("post_processor")):
        for token in (processor.get("special_tokens") or {}).values():
            token["ids"] = [int(new_ids[index]) for index in token["ids"]]
        for key in ("sep", "cls"):
            if key in processor:
                processor[key][1] = int(new_ids[processor[key][1]])
    if state.get("padding"):
        state["padding"]["pad_id"] = int(new_ids[state["padding"]["pad_id"]])


def _processors(processor: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if processor is not None:
        yield processor
        for inner in processor.get("processors") or ():
            yield from _processors(inner)
