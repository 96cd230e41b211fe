"""Tokenizer training, and text packed into sequences of one length."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from edge_runtime.formats.errors import UserError

BOS, EOS = "<s>", "</s>"
_ENCODE_BATCH = 512
_PIECE = r" *[^ \n]+|\n+| +"  # a word with the spaces before it; indentation may become one token


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-fallback BPE: every text round-trips, unknown characters as bytes.

    Spaces stay spaces: with a mark in their place, as Llama has it, a text that holds the mark would not come back.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=None, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS, *byte_tokens], show_progress=False, limit_alphabet=256
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _byte_tokens_unspecial(tokenizer)


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a cleaned file, in its order."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def pack_sequences(
    tokenizer: Tokenizer, texts: Iterable[str], eos_id: int, sequence_tokens: int, max_sequences: int | None = None
) -> NDArray[np.int32]:
    """(S, T) token ids: texts, each closed by ``eos_id``, laid end to end and cut; the last piece is dropped.

    Raises:
        UserError: The text does not fill one sequence.
    """
    rows: list[NDArray[np.int32]] = []
    carry = np.empty(0, np.int32)
    for batch in _batches(texts):
        encoded = tokenizer.encode_batch(batch, add_special_tokens=False)
        ids = [np.asarray([*encoding.ids, eos_id], np.int32) for encoding in encoded]
        carry = np.concatenate([carry, *ids])
        whole = len(carry) // sequence_tokens
        rows.append(carry[: whole * sequence_tokens].reshape(whole, sequence_tokens))
        carry = carry[whole * sequence_tokens :]
        if max_sequences is not None and sum(map(len, rows)) >= max_sequences:
            break
    packed = np.concatenate(rows) if rows else np.empty((0, sequence_tokens), np.int32)
    if not len(packed):
        raise UserError("data", f"{len(carry)} tokens", f"at least {sequence_tokens} tokens of text", "add text")
    return packed[:max_sequences]


def shuffle_texts(texts: list[str], seed: int) -> list[str]:
    """A fixed permutation, so that a prefix of the sequences is a sample of the corpus."""
    order = np.random.default_rng(seed).permutation(len(texts))
    return [texts[index] for index in order]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _ENCODE_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _byte_tokens_unspecial(tokenizer: Tokenizer) -> Tokenizer:
    """Byte tokens got their ids as special tokens; as such they would be dropped when decoding."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in (BOS, EOS)]
    return Tokenizer.from_str(json.dumps(state))
