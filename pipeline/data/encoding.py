"""Rows to token ids, with what of them is learned: special tokens come from templates, never from a text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge_runtime.formats.errors import UserError
from pipeline.data.chat_template import (
    TOKEN_CLOSE,
    TOKEN_OPEN,
    ChatFormat,
    RenderedChat,
    render_conversation,
    without_marks,
)
from pipeline.data.instructions import Message


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A tokenizer whose special tokens answer to marks only.

    Attributes:
        tokenizer: Copy with the special tokens renamed.
        special: Text of a special token to its id.
        ids: The copy's ids to the original's, or None when they are the same.
    """

    tokenizer: Tokenizer
    special: Mapping[str, int]
    ids: NDArray[np.int32] | None


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """Tokens (n,) int32 of a conversation, and which of them are an answer's, (n,) bool."""

    tokens: NDArray[np.int32]
    answers: NDArray[np.bool_]


def text_encoder(tokenizer: Tokenizer) -> TextEncoder:
    """A copy in which each special token is called by its mark, so that its own text is ordinary text.

    Raises:
        UserError: The copy does not read the marks as the tokens they stand for.
    """
    state = json.loads(tokenizer.to_str())
    specials = {entry["content"]: entry["id"] for entry in state["added_tokens"] if entry["special"]}
    for entry in state["added_tokens"]:
        if entry["special"]:
            entry.update(content=_mark(entry["id"]), normalized=False)
    _rename_in_model(state["model"], {text: _mark(number) for text, number in specials.items()})
    # Offsets of a byte-level post-processor leave out the space that belongs to a token.
    state.update(post_processor=None, truncation=None, padding=None)
    copy = Tokenizer.from_str(json.dumps(state))
    ids = np.arange(max([copy.get_vocab_size() - 1, *copy.get_vocab().values()]) + 1, dtype=np.int32)
    for text, number in specials.items():
        found = copy.encode(_mark(number), add_special_tokens=False).ids
        typed = copy.encode(text, add_special_tokens=False).ids
        if len(found) != 1 or found[0] in typed:
            raise UserError("tokenizer", text, "special tokens that can be told from text", "use tokenizers' BPE")
        ids[found[0]] = number
    return TextEncoder(copy, specials, None if np.array_equal(ids, np.arange(len(ids))) else ids)


def encode_texts(encoder: TextEncoder, texts: Sequence[str]) -> list[NDArray[np.int32]]:
    """Ids of each text; "</s>" in it is four characters and more, never the token."""
    encodings = encoder.tokenizer.encode_batch_fast([without_marks(text) for text in texts], add_special_tokens=False)
    return [_original(encoder, encoding.ids) for encoding in encodings]


def encode_conversation(
    encoder: TextEncoder, chat: ChatFormat, messages: Sequence[Message], eos_id: int, most_tokens: int, source: str
) -> tuple[list[EncodedChat], bool]:
    """A conversation's tokens, cut behind the last answer that leaves it within ``most_tokens``.

    Args:
        encoder: From ``text_encoder``.
        chat: The template.
        messages: A checked conversation.
        eos_id: Put behind the conversation where the template does not write it.
        most_tokens: The length that must not be passed.
        source: Named in errors.

    Returns:
        The conversation, or its exchanges where the template knows no conversations, none when not even the first
        answer fits; and whether anything was cut.

    Raises:
        UserError: See ``render_conversation``.
    """
    ends = [number + 1 for number, (role, _) in enumerate(messages) if role == "assistant"]
    low, high, best = 0, len(ends), list[EncodedChat]()
    turns = high  # all of it is tried first, then halves
    while turns > low:
        rendered = render_conversation(chat, messages[: ends[turns - 1]], source)
        encoded = [_encode_rendered(encoder, each, eos_id) for each in rendered]
        if len(rendered) > 1 or len(ends) == 1:
            fitting = [each for each in encoded if len(each.tokens) <= most_tokens]
            return fitting, len(fitting) < len(encoded)
        if len(encoded[0].tokens) <= most_tokens:
            low, best = turns, encoded
        else:
            high = turns - 1
        turns = (low + high + 1) // 2
    return best, low < len(ends)


def chat_format(encoder: TextEncoder, template: str, eos_id: int, bos_id: int | None) -> ChatFormat:
    """The template with the texts of its tokens, found as the runtime finds them."""
    name = {number: text for text, number in encoder.special.items()}.get
    bos_token = name(bos_id, "") if bos_id is not None else ""
    return ChatFormat(template, encoder.special, bos_token, name(eos_id, ""))


def _mark(number: int) -> str:
    return f"{TOKEN_OPEN}{number}{TOKEN_CLOSE}"


def _rename_in_model(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Vocabularies that hold their special tokens give them their ids by name."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(text, text): number for text, number in vocabulary.items()}
    elif isinstance(vocabulary, list):  # Unigram: pieces with scores; a typed "</s>" would match its piece
        model["vocab"] = [[names.get(text, text), score] for text, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]


def _encode_rendered(encoder: TextEncoder, rendered: RenderedChat, eos_id: int) -> EncodedChat:
    """A token is an answer's when any of its characters is."""
    encoding = encoder.tokenizer.encode(rendered.text, add_special_tokens=False)
    tokens = _original(encoder, encoding.ids)
    first, behind = np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
    answers = np.zeros(len(tokens), np.bool_)
    for start, end in rendered.learned:
        answers |= (behind > start) & (first < end) & (behind > first)
    if not rendered.closed:
        tokens, answers = np.append(tokens, np.int32(eos_id)), np.append(answers, rendered.learns_end)
    return EncodedChat(tokens, answers)


def _original(encoder: TextEncoder, ids: Sequence[int]) -> NDArray[np.int32]:
    tokens = np.asarray(ids, np.int32)
    return tokens if encoder.ids is None else encoder.ids[tokens]
