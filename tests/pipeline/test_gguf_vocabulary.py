"""tokenizer.json in llama.cpp's words: what is written, and what is refused because it would be cut differently."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import generate_merges

from edge_runtime.formats.errors import ExportError
from pipeline.export.gguf_vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_vocabulary

Edit = Callable[[dict[str, Any]], object]
TEXTS = ["the cat sat on the mat, the cats sat on mats\n\n  if x == 10:\n\treturn 'naïve' + \"中文\"\n" * 4]
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)


def save(folder: Path, tokenizer: Tokenizer, edit: Edit | None = None) -> Path:
    state = json.loads(tokenizer.to_str())
    if edit is not None:
        edit(state)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    return folder


def byte_level(pattern: str | None, *, ignore_merges: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = (
        split if pattern is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), split])
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """As Llama 2's is converted: merges made of scores, every halving of a token among them."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=90, show_progress=False))
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    pieces += sorted(trained.get_vocab(), key=lambda piece: (len(piece) == 1, trained.token_to_id(piece)))
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = generate_merges(vocab, {piece: -float(index) for piece, index in vocab.items()})
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    return tokenizer


def greedy_pairs(text: str, scores: dict[str, float]) -> list[str]:
    """What llama.cpp does with scores: the neighbours that make the best token first, from the left."""
    pieces = list(text)
    while True:
        found = [(-scores[a + b], place) for place, (a, b) in enumerate(pairwise(pieces))
                 if a + b in scores]  # fmt: skip
        if not found:
            return pieces
        place = min(found)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]


def test_types_are_those_of_the_gguf_package() -> None:
    names = {"NORMAL": NORMAL, "UNKNOWN": UNKNOWN, "CONTROL": CONTROL, "USER_DEFINED": USER_DEFINED, "UNUSED": UNUSED,
             "BYTE": BYTE}  # fmt: skip
    assert {name: int(gguf.TokenType[name]) for name in names} == names


def test_our_own_tokenizer_is_cut_at_line_ends_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    vocabulary = read_vocabulary(save(tmp_path, tokenizer), 324, bos=None, eos=[1])
    assert (vocabulary.model, vocabulary.pre, vocabulary.scores) == ("gpt2", "sarvam-moe", [])
    assert vocabulary.chat_template == "{{ messages[0].content }}"
    state = json.loads(tokenizer.to_str())["model"]
    assert len(vocabulary.tokens) == 324 and vocabulary.types[320:] == [UNUSED] * 4
    for token, index in state["vocab"].items():
        assert vocabulary.tokens[index] == token.replace(" ", "▁")
    marked = [(a.replace(" ", "▁"), b.replace(" ", "▁")) for a, b in state["merges"]]
    assert vocabulary.merges == [f"{a} {b}" for a, b in marked]
    kinds = [vocabulary.types[tokenizer.token_to_id(token)] for token in ("</s>", "<0x41>", "e")]
    assert kinds == [CONTROL, BYTE, NORMAL]


def test_texts_merge_the_same_without_our_cuts(tokenizer: Tokenizer) -> None:
    """Why the coarser cut will do: no merge crosses ours."""
    coarse = Tokenizer.from_str(tokenizer.to_str())
    coarse.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), "isolated")
    for text in (*TEXTS, "  def  f( x ):\n\n\n    return  x\t+ 1  \n", " lead", "trail  ", "é中\U0001f600 a"):
        assert coarse.encode(text).ids == tokenizer.encode(text).ids


@pytest.mark.parametrize(
    ("pattern", "ignore_merges", "name"), [(QWEN2, False, "qwen2"), (LLAMA3, True, "llama-bpe"), (None, False, "gpt-2")]
)
def test_byte_level_patterns_have_names(pattern: str | None, ignore_merges: bool, name: str, tmp_path: Path) -> None:
    tokenizer = byte_level(pattern, ignore_merges=ignore_merges)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    size = tokenizer.get_vocab_size()
    vocabulary = read_vocabulary(save(tmp_path, tokenizer), size, bos=0, eos=[0])
    assert (vocabulary.model, vocabulary.pre, vocabulary.bos) == ("gpt2", name, 0)
    assert list(vocabulary.tokens) == [tokenizer.id_to_token(index) for index in range(size)]
    assert vocabulary.types == [CONTROL] + [NORMAL] * (size - 2) + [USER_DEFINED]
    assert [merge.split(" ") for merge in vocabulary.merges] == json.loads(tokenizer.to_str())["model"]["merges"]


def test_a_sentencepiece_like_tokenizer_becomes_scores_that_cut_the_same(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like()
    vocabulary = read_vocabulary(save(tmp_path, tokenizer), tokenizer.get_vocab_size(), bos=1, eos=[2])
    assert (vocabulary.model, vocabulary.merges) == ("llama", [])
    assert [vocabulary.types[index] for index in (0, 1, 2, 3)] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    scores = {token: score for token, score in zip(vocabulary.tokens, vocabulary.scores, strict=True) if score < 0}
    for text in ("the cats sat on the mat", "mat the  sat cats on", "return cat if mats"):
        assert (
            greedy_pairs("▁" + text.replace(" ", "▁"), scores)
            == tokenizer.encode(text, add_special_tokens=False).tokens
        )


def test_a_tokenizer_with_one_merge_a_token_is_refused_as_scores(tmp_path: Path) -> None:
    def cut(state: dict[str, Any]) -> None:
        state["model"]["merges"] = [m for m in state["model"]["merges"] if "".join(m) != "the"] + [["th", "e"]]

    with pytest.raises(ExportError, match="merges that could make"):
        read_vocabulary(save(tmp_path, sentencepiece_like(), cut), 400, bos=1, eos=[2])


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda s: s.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda s: s["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+"), "byte-level pre-tokenizer"),
        (lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "fall back to bytes"),
        (lambda s: s["model"].update(ignore_merges=True), "byte-level pre-tokenizer"),
        (lambda s: s["model"].update(dropout=0.1), "plain BPE"),
        (lambda s: s.update(pre_tokenizer=None), "fall back to bytes"),
    ],
)
def test_what_llama_cpp_would_cut_differently_is_refused_in_one_line(edit: Edit, fault: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=fault) as refused:
        read_vocabulary(save(tmp_path, byte_level(QWEN2), edit), 300, bos=None, eos=[0])
    assert "\n" not in str(refused.value)


def test_our_own_tokenizer_is_refused_where_marks_or_merges_would_mislead(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def mark(state: dict[str, Any]) -> None:
        state["model"]["vocab"]["▁"] = 320

    def cross(state: dict[str, Any]) -> None:
        state["model"]["vocab"]["e "] = 320
        state["model"]["merges"].append(["e", " "])

    for edit, fault in ((mark, "reads a space"), (cross, "across words")):
        with pytest.raises(ExportError, match=fault):
            read_vocabulary(save(tmp_path, tokenizer, edit), 321, bos=None, eos=[1])
    with pytest.raises(ExportError, match=r"id 319 .* the embedding has 319 rows"):
        read_vocabulary(save(tmp_path, tokenizer), 319, bos=None, eos=[1])
    with pytest.raises(ExportError, match="ends a text"):
        read_vocabulary(save(tmp_path, tokenizer), 320, bos=None, eos=[])
