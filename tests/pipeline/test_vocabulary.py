"""A trimmed tokenizer encodes every text, texts of kept tokens exactly as before; oracle: the tokenizers library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

from edge_runtime.formats.errors import UserError
from pipeline.data.packing import train_tokenizer
from pipeline.distillation.remapped_signals import first_pieces, remap_ids, remap_tokens
from pipeline.distillation.vocabulary import (
    TrimmedVocabulary,
    choose_ids,
    count_ids,
    named_ids,
    remap_token_ids,
    token_pieces,
    trim_tokenizer,
    write_tokenizer,
)

_SYLLABLES = [
    "re",
    "turn",
    "ex",
    "cept",
    "self",
    "lamb",
    "da",
    "func",
    "tion",
    "ing",
    "str",
    "Eq",
    "é",
    "函",
    "数",
    "列表",
]
_RANDOM = np.random.default_rng(4)
WORDS = ["".join(_RANDOM.choice(_SYLLABLES, _RANDOM.integers(1, 5))) for _ in range(150)]
TEXTS = [f"def {' '.join(_RANDOM.choice(WORDS, 9))}(x):\n    return {n} + x  # 返回。\n" for n in range(120)]
FEW = TEXTS[:3]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PADDING_ROWS = 5


def qwen(ignore_merges: bool = False) -> Tokenizer:
    """Byte-level BPE with Qwen2.5's splitting; added tokens stand after the model's own."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


def llama_3() -> Tokenizer:
    """Whole words are looked up before any merge; a template puts a token in front."""
    tokenizer = qwen(ignore_merges=True)
    begin = tokenizer.token_to_id("<|im_start|>")
    template = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("<|endoftext|>"), pad_token="<|endoftext|>")
    return tokenizer


def llama_2() -> Tokenizer:
    """Byte fallback, a mark for spaces, and every split of a token among the merges, as SentencePiece gives."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *[f"<0x{value:02X}>" for value in range(256)]]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, show_progress=False, limit_alphabet=60, max_token_length=12
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    state = json.loads(tokenizer.to_str())
    vocab = state["model"]["vocab"]
    splits = [(i, t[:k], t[k:]) for t, i in vocab.items() if i >= len(special) for k in range(1, len(t))]
    state["model"]["merges"] = [f"{a} {b}" for _, a, b in sorted(s for s in splits if {s[1], s[2]} <= vocab.keys())]
    state["added_tokens"] = state["added_tokens"][:3]
    state["decoder"] = json.loads(
        '{"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},'
        ' {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}'
    )
    return Tokenizer.from_str(json.dumps(state))


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "qwen": qwen, "llama_3": llama_3, "llama_2": llama_2, "ours": lambda: train_tokenizer(TEXTS, 600),
}  # fmt: skip
CHOICES = {"covers a little": {"coverage": 0.6}, "covers all": {"coverage": 1.0}, "a size": {"vocab_size": 400}}


@pytest.fixture(scope="module")
def built() -> dict[str, Tokenizer]:
    return {name: make() for name, make in FAMILIES.items()}


@pytest.fixture(scope="module")
def trimmed(built: dict[str, Tokenizer]) -> dict[tuple[str, str], TrimmedVocabulary]:
    return {(f, c): _trim(built[f], **kwargs) for f in FAMILIES for c, kwargs in CHOICES.items()}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_text_comes_back_and_known_text_is_cut_as_before(
    built: dict[str, Tokenizer], trimmed: dict[tuple[str, str], TrimmedVocabulary], family: str, choice: str, data: Any
) -> None:
    old, vocabulary = built[family], trimmed[family, choice]
    new = Tokenizer.from_str(vocabulary.tokenizer)
    piece = st.sampled_from(["".join(FEW), *WORDS, *TEXTS]) | st.text(max_size=8)
    text = "".join(data.draw(st.lists(piece.map(lambda t: t[:40]), max_size=6)))
    before, after = old.encode(text), new.encode(text)
    decoded = old.decode(before.ids, skip_special_tokens=False)
    assert new.decode(after.ids, skip_special_tokens=False) == decoded
    if all(vocabulary.new_ids[i] >= 0 for i in before.ids):
        assert after.tokens == before.tokens
    assert [new.id_to_token(i) for i in after.ids] == [old.id_to_token(int(vocabulary.kept_ids[i])) for i in after.ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_corpus_uses_stays_what_it_was(built: dict[str, Tokenizer], family: str) -> None:
    old, vocabulary = built[family], _trim(built[family])
    new = Tokenizer.from_str(vocabulary.tokenizer)
    assert new.get_vocab_size() == len(vocabulary.kept_ids) < old.get_vocab_size() - 20
    for text in FEW:
        assert new.encode(text).tokens == old.encode(text).tokens
        assert [int(vocabulary.new_ids[i]) for i in old.encode(text).ids] == new.encode(text).ids
    assert {new.id_to_token(i): i for i in range(new.get_vocab_size())} == new.get_vocab()


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_changes_nothing(built: dict[str, Tokenizer], family: str) -> None:
    old = built[family]
    vocabulary = _trim(old, vocab_size=old.get_vocab_size())
    assert json.loads(vocabulary.tokenizer) == json.loads(old.to_str())
    np.testing.assert_array_equal(vocabulary.kept_ids, np.arange(old.get_vocab_size()))
    assert (vocabulary.new_ids[-PADDING_ROWS:] == -1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_size_is_met_exactly_by_the_most_frequent(built: dict[str, Tokenizer], family: str) -> None:
    tokenizer = built[family]
    counts = _counts(tokenizer)
    kept = choose_ids(tokenizer.to_str(), counts, vocab_size=400)
    assert len(kept) == 400 and (np.diff(kept) > 0).all()
    least = int(counts[kept].sum())
    for size in (420, 500):
        more = choose_ids(tokenizer.to_str(), counts, vocab_size=size)
        assert len(more) == size and int(counts[more].sum()) >= least
    assert int(counts[choose_ids(tokenizer.to_str(), counts, coverage=0.9)].sum()) >= 0.9 * counts.sum()


def test_added_tokens_and_named_ids_stay_with_their_new_numbers(built: dict[str, Tokenizer]) -> None:
    old, vocabulary = built["llama_3"], _trim(built["llama_3"])
    new = Tokenizer.from_str(vocabulary.tokenizer)
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"):
        assert new.token_to_id(token) == vocabulary.new_ids[old.token_to_id(token)]
    assert new.encode("x").ids[0] == new.token_to_id("<|im_start|>")
    assert new.padding is not None and new.padding["pad_id"] == new.token_to_id("<|endoftext|>")
    end = old.token_to_id("<|im_end|>")
    values = {"eos_token_id": [end, end], "bos_token_id": end, "pad_token_id": None, "hidden_size": 599}
    expected = int(vocabulary.new_ids[end])
    assert remap_token_ids(values, vocabulary) == {"eos_token_id": [expected] * 2, "bos_token_id": expected}
    dropped = int(np.flatnonzero(vocabulary.new_ids < 0)[0])
    with pytest.raises(UserError, match=rf"^eos_token_id: got {dropped}, allowed: a token that the vocabulary keeps"):
        remap_token_ids({"eos_token_id": dropped}, vocabulary)
    assert dropped in choose_ids(old.to_str(), _counts(old), always=[dropped])


def test_transformers_reads_the_trimmed_tokenizer_of_a_qwen(built: dict[str, Tokenizer], tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    end = built["qwen"].token_to_id("<|im_end|>")
    Qwen2Config(eos_token_id=end).save_pretrained(source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [end], "top_k": 20}))
    fast = PreTrainedTokenizerFast(tokenizer_object=built["qwen"], eos_token="<|im_end|>")
    fast.chat_template = "{{ messages[0]['content'] }}"
    fast.save_pretrained(source)
    settings_file = source / "tokenizer_config.json"
    added = json.loads(built["qwen"].to_str())["added_tokens"]
    entry = {"added_tokens_decoder": {str(token.pop("id")): token for token in added}}
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | entry))
    (source / "vocab.json").write_text("{}")
    assert named_ids(source) == {end}
    vocabulary = _trim(built["qwen"])
    output.mkdir()
    write_tokenizer(source, output, vocabulary)
    Qwen2Config().save_pretrained(output)
    loaded = AutoTokenizer.from_pretrained(output, local_files_only=True)
    expected = Tokenizer.from_str(vocabulary.tokenizer)
    for text in (*TEXTS[:5], "<|im_start|>hello<|im_end|>", "\U0001f600 é"):
        assert loaded(text)["input_ids"] == expected.encode(text).ids
    new_end = int(vocabulary.new_ids[end])
    assert loaded.eos_token_id == new_end and loaded.chat_template and not (output / "vocab.json").exists()
    assert json.loads((output / "generation_config.json").read_text()) == {"eos_token_id": [new_end], "top_k": 20}
    assert (
        json.loads((output / "tokenizer_config.json").read_text())["added_tokens_decoder"][str(new_end)]["content"]
        == "<|im_end|>"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_spell_what_the_token_spelt(built: dict[str, Tokenizer], family: str) -> None:
    old, vocabulary = built[family], _trim(built[family], vocab_size=400)
    new, pieces = Tokenizer.from_str(vocabulary.tokenizer), token_pieces(built[family].to_str(), vocabulary)
    assert len(pieces) == old.get_vocab_size() + PADDING_ROWS and pieces[-PADDING_ROWS:] == [()] * PADDING_ROWS
    assert any(len(piece) > 1 for piece in pieces)
    anchor = old.token_to_id("d")
    for index in range(old.get_vocab_size()):
        # Beside another token, so that a decoder that strips a leading space strips the same.
        found = new.decode([int(vocabulary.new_ids[anchor]), *pieces[index]], skip_special_tokens=False)
        assert found == old.decode([anchor, index], skip_special_tokens=False)
        assert (len(pieces[index]) == 1) >= (vocabulary.new_ids[index] >= 0)


def test_draws_of_dropped_tokens_are_left_out_and_the_rest_weighs_more() -> None:
    table = np.array([0, -1, 1, 2, -1])
    ids = torch.tensor([[3, 1, 0, 0], [1, 4, 0, 0], [2, 3, 0, 1]])
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    signal = remap_ids(ids, weights, table)
    torch.testing.assert_close(signal.kept_mass, torch.tensor([0.75, 0.0, 0.75]))
    assert _as_dicts(signal) == [
        {2: pytest.approx(2 / 3), 0: pytest.approx(1 / 3)},
        {},
        dict.fromkeys((0, 1, 2), pytest.approx(1 / 3)),
    ]
    torch.testing.assert_close(signal.weights.sum(-1), torch.tensor([1.0, 0.0, 1.0]))


def test_draws_of_dropped_tokens_may_stand_for_their_first_piece() -> None:
    table = first_pieces([(0,), (2, 1), (1,), (2,), ()])
    np.testing.assert_array_equal(table, [0, 2, 1, 2, -1])
    signal = remap_ids(torch.tensor([[[3, 1, 0]]]), torch.tensor([[[0.5, 0.25, 0.25]]]), table)
    assert _as_dicts(signal) == [{2: 0.75, 0: 0.25}] and float(signal.kept_mass) == 1
    assert (signal.ids.shape, signal.ids.dtype, signal.weights.dtype) == ((1, 1, 3), torch.int64, torch.float32)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_remapped_draws_are_the_distribution_that_numpy_sums(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = rng.integers(-1, 6, 12)
    ids = torch.from_numpy(np.stack([rng.permutation(12)[:7] for _ in range(9)]).reshape(3, 3, 7))
    weights = torch.from_numpy(rng.random((3, 3, 7)) * rng.integers(0, 2, (3, 3, 7)))
    signal = remap_ids(ids, weights, table)
    for found, old, mass, kept in zip(
        _as_dicts(signal),
        ids.reshape(-1, 7).numpy(),
        weights.reshape(-1, 7).numpy(),
        signal.kept_mass.flatten().tolist(),
        strict=True,
    ):
        expected = np.zeros(6)
        for index, weight in zip(table[old], mass, strict=True):
            expected[index] += weight if index >= 0 else 0
        assert kept == pytest.approx(expected.sum() / mass.sum() if mass.sum() else 0, abs=1e-6)
        assert found == pytest.approx({i: w / expected.sum() for i, w in enumerate(expected) if w}, abs=1e-6)


def test_sequences_become_the_pieces_of_their_tokens() -> None:
    pieces = [(0,), (2, 1), (1,), (2, 2, 0)]
    found = remap_tokens(
        np.array([[0, 1, 2, 3], [3, 3, 0, 0]], np.int32), np.array([[1, 1, 0, 1], [1, 0, 1, 1]], bool), pieces
    )
    np.testing.assert_array_equal(found.tokens, [[0, 2, 1, 1], [2, 2, 0, 2]])
    np.testing.assert_array_equal(found.source, [[0, -1, 1, 2], [-1, -1, 0, -1]])
    np.testing.assert_array_equal(found.counts, [[True, False, True, False], [False, False, True, False]])
    assert (found.tokens.dtype, found.counts.dtype) == (np.int32, np.bool_)


@pytest.mark.parametrize("family", FAMILIES)
def test_remapped_sequences_read_as_the_old_ones(built: dict[str, Tokenizer], family: str) -> None:
    old, vocabulary = built[family], _trim(built[family], vocab_size=400)
    ids = [i for text in TEXTS[:40] for i in old.encode(text, add_special_tokens=False).ids]
    sequences = np.array(ids[: len(ids) // 64 * 64], np.int32).reshape(-1, 64)
    found = remap_tokens(sequences, None, token_pieces(old.to_str(), vocabulary))
    new = Tokenizer.from_str(vocabulary.tokenizer)
    assert (found.source < 0).any()
    for row, tokens, source in zip(sequences, found.tokens, found.source, strict=True):
        text = old.decode(row.tolist(), skip_special_tokens=False)
        last = int(np.flatnonzero(source >= 0)[-1])
        assert (
            new.decode(tokens[: last + 1].tolist(), skip_special_tokens=False)
            == old.decode(row[: source[last] + 1].tolist(), skip_special_tokens=False)
            and text
        )
        assert (np.diff(source[source >= 0]) == 1).all()


def test_counts_are_those_of_the_packed_corpus() -> None:
    sequences = np.random.default_rng(1).integers(0, 50, (3000, 7)).astype(np.int32)
    np.testing.assert_array_equal(count_ids(sequences, 60), np.bincount(sequences.ravel(), minlength=60))
    for bad in (-1, 60):
        with pytest.raises(UserError, match=rf"^sequences: got 'ids .*{bad}.*', allowed: 0 to 59$"):
            count_ids(np.array([[1, bad]]), 60)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.Unigram([("a", 0.0)], 0, False), "'Unigram', allowed: a byte-level or byte-fallback BPE"),
        (models.WordLevel({"a": 0}, "a"), "'WordLevel'"),
        (models.WordPiece({"a": 0}, unk_token="a"), "'WordPiece'"),
        (models.BPE({"a": 0}, []), "a BPE of characters"),
        (models.BPE({"a": 0}, [], end_of_word_suffix="</w>"), "BPE with prefixes or suffixes"),
        (models.BPE({"a": 0}, [], byte_fallback=True), "no token <0x00>"),
    ],
)
def test_tokenizers_that_cannot_be_cut_are_refused_in_one_line(model: Any, message: str) -> None:
    text = Tokenizer(model).to_str()
    for call in (
        lambda: choose_ids(text, np.ones(1, np.int64)),
        lambda: trim_tokenizer(text, np.zeros(1, np.int64), 1),
    ):
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert str(caught.value).startswith("tokenizer.json: got ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model": 3}'])
def test_what_is_no_tokenizer_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^tokenizer\.json: got .*, allowed: a tokenizer of the tokenizers library$"):
        choose_ids(text, np.ones(1, np.int64))


def test_impossible_choices_are_refused(built: dict[str, Tokenizer]) -> None:
    tokenizer = built["qwen"]
    text, counts = tokenizer.to_str(), _counts(tokenizer)
    with pytest.raises(UserError, match=r"^submodel\.vocab_size: got 100, allowed: at least 260 \(bytes"):
        choose_ids(text, counts, vocab_size=100)
    for coverage in (0, 1.5):
        with pytest.raises(UserError, match=rf"^coverage: got {coverage}, allowed: above 0, at most 1$"):
            choose_ids(text, counts, coverage=coverage)
    kept, total = choose_ids(text, counts), tokenizer.get_vocab_size()
    for ids, rows in ((np.append(kept, total), total + 5), (kept[:-1], total + 5), (kept, total - 1)):
        with pytest.raises(UserError, match=r"^kept ids: got \["):
            trim_tokenizer(text, ids, rows)
    with pytest.raises(UserError, match=r"^targets: got 9, allowed: ids below 3; record them with this teacher$"):
        remap_ids(torch.tensor([[9, 0]]), torch.tensor([[0.5, 0.5]]), np.array([0, 1, 2]))
    with pytest.raises(UserError, match=r"^sequences: got 'row 1', allowed: ids that the tokenizer has"):
        remap_tokens(np.array([[0, 1], [0, 2]]), None, [(0,), (1,), ()])


def _trim(tokenizer: Tokenizer, **choice: Any) -> TrimmedVocabulary:
    kept = choose_ids(tokenizer.to_str(), _counts(tokenizer), **choice)
    return trim_tokenizer(tokenizer.to_str(), kept, tokenizer.get_vocab_size() + PADDING_ROWS)


def _counts(tokenizer: Tokenizer) -> Any:
    ids = np.array([i for text in FEW for i in tokenizer.encode(text).ids])
    return count_ids(ids[None], tokenizer.get_vocab_size() + PADDING_ROWS)


def _as_dicts(signal: Any) -> list[dict[int, float]]:
    rows = zip(
        signal.ids.reshape(-1, signal.ids.shape[-1]).tolist(),
        signal.weights.reshape(-1, signal.ids.shape[-1]).tolist(),
        strict=True,
    )
    found = []
    for ids, weights in rows:
        held = [(i, w) for i, w in zip(ids, weights, strict=True) if w]
        assert len({i for i, _ in held}) == len(held)
        found.append(dict(held))
    return found
