"""Teachers of another vocabulary, against TRL's GOLD and against what the tokenizers themselves decode."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from edge_runtime.formats.errors import UserError
from pipeline.data.packing import train_tokenizer
from pipeline.distillation import aligned_signal
from pipeline.distillation.aligned_signal import (
    AlignedLoss,
    AlignedSignal,
    AlignedSource,
    SharedVocabulary,
    TextTokens,
    align,
    aligned_divergence,
    aligned_loss,
    aligned_objective,
    match_vocabularies,
    span_ends,
)
from pipeline.distillation.batches import Batch
from tests.pipeline.conftest import MakeModel

TEXT = "The häuser of 中文字符 are 12 metres high \U0001f600, and naïve ones higher.\n\tdef f(x): return x + 1\n"
CORPUS = [TEXT, "the theory of other things", "  return the other\n", "return metres and characters 中文"]
EOS = 1


@pytest.fixture(scope="module")
def small() -> TextTokens:
    return _byte_level(270)


@pytest.fixture(scope="module")
def large() -> TextTokens:
    return _byte_level(340)


@pytest.fixture(scope="module")
def marked() -> TextTokens:
    """As SentencePiece writes it: a mark for every space, bytes for what is not known."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    ordinary = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<unk>", "</s>", *ordinary])
    tokenizer.train_from_iterator(CORPUS[1:], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in ordinary]
    return TextTokens(Tokenizer.from_str(json.dumps(content)), EOS, tokenizer.get_vocab_size())


@pytest.fixture(scope="module")
def plain() -> TextTokens:
    return TextTokens(train_tokenizer(CORPUS, 320), EOS, 320)


@pytest.fixture(scope="module")
def gold() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gold import gold_trainer
    return gold_trainer


SIDES = ["small", "large", "marked", "plain"]


@pytest.mark.parametrize("student", SIDES)
@pytest.mark.parametrize("teacher", SIDES)
def test_both_sides_have_read_the_same_text_at_every_shared_end(
    student: str, teacher: str, request: pytest.FixtureRequest
) -> None:
    """The tokenizers' own decoders say so, for a sequence of three documents that is cut anywhere."""
    ours, theirs = request.getfixturevalue(student), request.getfixturevalue(teacher)
    document = ours.tokenizer.encode(TEXT).ids
    packed = np.array([*document, EOS, *document, EOS, *document])
    for start, stop in ((0, len(packed)), (3, len(packed) - 5), (len(document), len(packed) - 2)):
        tokens = packed[start:stop]
        found = align(tokens, ours, theirs)
        whole = [_decode(theirs, found.tokens), _decode(ours, tokens)]
        assert whole[0] == whole[1].rstrip("�") and len(found.student) > 40
        for mine, other in zip(found.student, found.teacher, strict=True):
            assert _decode(ours, tokens[: mine + 1]) == _decode(theirs, found.tokens[: other + 1])
        ends = tokens == EOS
        assert set(np.flatnonzero(ends)) <= set(found.student)
        assert (found.tokens[found.teacher][np.isin(found.student, np.flatnonzero(ends))] == EOS).all()


def test_no_shared_end_is_missed(small: TextTokens, large: TextTokens, gold: Any) -> None:
    """GOLD's groups end at bytes; those of its ends that are whole characters are ours."""
    from trl.experimental.utils import encode_with_byte_offsets

    [(ids, s_offsets)], [(_, t_offsets)] = (encode_with_byte_offsets(side.tokenizer, [TEXT]) for side in (small, large))
    s_groups, t_groups = gold.ULDLoss._align_by_byte_offsets(s_offsets, t_offsets)
    character_ends = set(np.cumsum([len(character.encode()) for character in TEXT]).tolist())
    expected = [
        (mine[-1], other[-1])
        for mine, other in zip(s_groups, t_groups, strict=True)
        if s_offsets[mine[-1]][1] in character_ends
    ]
    found = align(np.array(ids), small, large)
    assert list(zip(found.student.tolist(), found.teacher.tolist(), strict=True)) == expected
    assert len(expected) < len(t_offsets) < len(ids)  # some tokens of either side end alone


def test_the_same_tokenizer_aligns_every_token_but_parts_of_characters(plain: TextTokens) -> None:
    ids = plain.tokenizer.encode("return the other things").ids
    found = align(np.array([*ids, EOS, *ids]), plain, plain)
    assert found.tokens.tolist() == [*ids, EOS, *ids]
    assert found.student.tolist() == found.teacher.tolist() == list(range(2 * len(ids) + 1))


def test_bytes_of_one_character_end_with_the_last() -> None:
    assert span_ends([(0, 1), (1, 2), (1, 2), (1, 2), (2, 2), (2, 4)]) == {1: 0, 2: 3, 4: 5}
    assert span_ends([]) == {}


def test_sequences_without_text_have_no_shared_end(small: TextTokens, large: TextTokens) -> None:
    character = small.tokenizer.encode("\U0001f600").ids[:1]  # one byte of four
    found = align(np.array(character), small, large)
    assert not len(found.student) and not len(found.tokens)
    assert align(np.array([EOS, EOS]), small, large).tokens.tolist() == [EOS, EOS]


def test_shared_tokens_are_those_of_equal_bytes(small: TextTokens, large: TextTokens, gold: Any) -> None:
    """TRL pairs equal strings, which between byte-level tokenizers are equal bytes."""
    shared = match_vocabularies(small, large)
    pairs = dict(zip(shared.teacher_ids.tolist(), shared.student_ids.tolist(), strict=True))
    assert pairs == _gold_loss(gold, small, large)._vocab_mapping
    assert shared.student_only.sum() == small.vocabulary - len(pairs)
    assert set(shared.teacher_only.nonzero().flatten().tolist()) == set(range(large.vocabulary)) - pairs.keys()


def test_tokens_are_paired_however_a_tokenizer_writes_them(
    large: TextTokens, marked: TextTokens, plain: TextTokens
) -> None:
    for first, second in ((large, marked), (marked, plain), (plain, large)):
        shared = match_vocabularies(first, second)
        pairs = list(zip(shared.student_ids.tolist(), shared.teacher_ids.tolist(), strict=True))
        decoded = [(_decode(first, [mine]), _decode(second, [other])) for mine, other in pairs]
        assert all(mine == other for mine, other in decoded if "�" not in mine + other)
        assert (" the", " the") in decoded and len(pairs) > 256
        assert len({mine for mine, _ in pairs}) == len({other for _, other in pairs}) == len(pairs)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("weight", [None, 0.0, 0.25, 1.0])
def test_the_hybrid_distance_is_golds(
    small: TextTokens, large: TextTokens, gold: Any, beta: float, weight: float | None
) -> None:
    q, p = _distributions(7, small.vocabulary, large.vocabulary)
    oracle = _gold_loss(gold, small, large)
    oracle.beta, oracle.hybrid_matched_weight = beta, weight
    oracle.hybrid_unmatched_weight = None if weight is None else 1 - weight
    expected = oracle._compute_hybrid_uld_loss(q, p)
    shared = match_vocabularies(small, large)
    found = aligned_divergence(q, p, shared, AlignedLoss(beta, weight)).mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_without_shared_tokens_the_distance_is_that_of_sorted_probabilities() -> None:
    """Universal Logit Distillation, with NumPy as the oracle."""
    q, p = _distributions(5, 30, 44)
    none = torch.tensor([], dtype=torch.int64)
    shared = SharedVocabulary(none, none, torch.ones(30, dtype=torch.bool), torch.ones(44, dtype=torch.bool))
    padded = np.pad(q.numpy(), ((0, 0), (0, 14)))
    expected = np.abs(np.sort(padded)[:, ::-1] - np.sort(p.numpy())[:, ::-1]).sum(-1)
    torch.testing.assert_close(aligned_divergence(q, p, shared, AlignedLoss()), torch.from_numpy(expected.copy()))


def test_the_loss_of_a_shared_vocabulary_is_the_forward_kl(make_model: MakeModel, plain: TextTokens) -> None:
    teacher, student = make_model("llama"), make_model("qwen2")
    tokens = torch.tensor([plain.tokenizer.encode(CORPUS[1] + CORPUS[1]).ids[:16]])
    source = AlignedSource.open(teacher, plain, plain, bf16=False)
    hidden, head = _student(student, tokens)
    signal = source.signal(source.prepare(_batch(tokens)))
    found = aligned_loss(hidden, head, signal, match_vocabularies(plain, plain), AlignedLoss(0.0, 1.0))
    with torch.no_grad():
        p, q = (model(input_ids=tokens).logits.double().log_softmax(-1) for model in (teacher, student))
    assert float(found.weight) == 16
    torch.testing.assert_close(found.total.double(), (p.exp() * (p - q)).sum(), rtol=2e-5, atol=0)


def test_chunks_change_neither_the_loss_nor_its_gradients(
    make_model: MakeModel, small: TextTokens, large: TextTokens
) -> None:
    teacher, student = make_model("llama", vocab_size=340), make_model("qwen2", vocab_size=270)
    tokens = torch.tensor([small.tokenizer.encode(text * 9).ids[:50] for text in CORPUS[1:3]])
    signal = AlignedSource.open(teacher, small, large, bf16=False).signal(_batch(tokens))
    shared = match_vocabularies(small, large)
    results = []
    for chunk in (1000, 7):
        hidden, head = (value.requires_grad_() for value in _student(student, tokens))
        loss = aligned_loss(hidden, head, signal, shared, AlignedLoss(chunk_positions=chunk))
        loss.total.backward()
        results.append((loss.total.detach(), hidden.grad, head.grad))
    for whole, parts in zip(*results, strict=True):
        assert whole.abs().sum() > 0
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_a_student_of_another_vocabulary_comes_nearer_to_its_teacher(
    make_model: MakeModel, small: TextTokens, large: TextTokens
) -> None:
    """Thirty steps on one batch: a fifth of the distance is left; the teacher stays as it is."""
    teacher, student = make_model("llama", vocab_size=340), make_model("qwen2", vocab_size=270)
    batch = _batch(torch.tensor([small.tokenizer.encode(TEXT).ids[:40], small.tokenizer.encode(TEXT).ids[20:60]]))
    source = AlignedSource.open(teacher, small, large, bf16=False)
    objective = aligned_objective(source, AlignedLoss())
    optimizer = torch.optim.AdamW(student.parameters(), 3e-3)
    means = []
    for _ in range(30):
        loss = objective(student, source.prepare(batch))
        (loss.total / loss.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        means.append(float(loss.total.detach() / loss.weight))
    assert means[-1] < means[0] / 5
    assert float(loss.weight) == sum(len(align(row.numpy(), small, large).student) for row in batch.tokens)
    assert not any(parameter.grad is not None for parameter in teacher.parameters())


def test_logits_of_one_chunk_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    divergence = aligned_signal.aligned_divergence

    def watched(q: torch.Tensor, *others: Any) -> torch.Tensor:
        sizes.append(len(q))
        return divergence(q, *others)

    monkeypatch.setattr(aligned_signal, "aligned_divergence", watched)
    ids = torch.arange(20)
    shared = SharedVocabulary(ids, ids, torch.zeros(20, dtype=torch.bool), torch.zeros(20, dtype=torch.bool))
    hidden, head = torch.randn(1, 25, 4, requires_grad=True), torch.randn(20, 4)
    signal = AlignedSignal(torch.randn(25, 4), head, torch.arange(25))
    aligned_loss(hidden, head, signal, shared, AlignedLoss(chunk_positions=10)).total.backward()
    assert sizes == [10, 10, 5, 5, 10, 10]  # made again for the backward pass


def test_only_predictions_that_count_are_compared(make_model: MakeModel, plain: TextTokens) -> None:
    teacher = make_model("llama")
    tokens = torch.tensor([plain.tokenizer.encode(CORPUS[1] * 2).ids[:12]] * 2)
    counts = torch.zeros_like(tokens, dtype=torch.bool)
    counts[0, 4:6] = counts[1, 2] = True
    source = AlignedSource.open(teacher, plain, plain, bf16=False)
    signal = source.signal(Batch(np.arange(2), tokens, counts))
    assert signal.places.tolist() == [4, 5, 12 + 2]
    with torch.no_grad():
        torch.testing.assert_close(signal.hidden, teacher.model(tokens).last_hidden_state.flatten(0, 1)[signal.places])
    nothing = source.signal(Batch(np.arange(2), tokens, torch.zeros_like(counts)))
    loss = aligned_loss(
        torch.zeros(2, 12, 64), torch.zeros(320, 64), nothing, match_vocabularies(plain, plain), AlignedLoss()
    )
    assert (float(loss.total), float(loss.weight)) == (0.0, 0.0)


def test_bad_input_is_one_line(make_model: MakeModel, small: TextTokens, large: TextTokens) -> None:
    with pytest.raises(UserError, match=r"teacher\.tokenizer"):
        AlignedSource.open(make_model("llama", vocab_size=300), small, large, bf16=False)
    with pytest.raises(UserError, match=r"student\.tokenizer: got 'id 269'"):
        match_vocabularies(TextTokens(small.tokenizer, EOS, 269), large)
    for wrong in ({"beta": 1.5}, {"beta": -0.1}, {"shared_weight": 2.0}):
        with pytest.raises(UserError, match=r"0\.\.1"):
            AlignedLoss(**wrong)


def _byte_level(size: int) -> TextTokens:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    )
    return TextTokens(tokenizer, EOS, tokenizer.get_vocab_size())


def _gold_loss(gold: Any, student: TextTokens, teacher: TextTokens) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = gold.GOLDConfig(uld_use_hybrid_loss=True, use_cpu=True, bf16=False, report_to=[])
        sides = (PreTrainedTokenizerFast(tokenizer_object=side.tokenizer) for side in (student, teacher))
        loss = gold.ULDLoss(config, *sides)
    return loss


def _distributions(positions: int, *sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.softmax(3 * torch.randn(positions, size, generator=generator), -1) for size in sizes]


def _student(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model.model(input_ids=tokens).last_hidden_state.clone(), model.lm_head.weight.detach().clone()


def _batch(tokens: torch.Tensor) -> Batch:
    return Batch(np.arange(len(tokens)), tokens, torch.ones_like(tokens, dtype=torch.bool))


def _decode(side: TextTokens, ids: Any) -> str:
    return str(side.tokenizer.decode([int(id) for id in ids], skip_special_tokens=False))
