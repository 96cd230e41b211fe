"""Draws from the teacher's distribution, and what the sources give of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedModel

from edge_runtime.formats.errors import UserError
from pipeline.distillation.batches import Batch
from pipeline.distillation.signals import (
    DenseSignal,
    OnlineSource,
    SparseSignal,
    StoredSource,
    checked_head,
    draw,
    head_logits,
)
from tests.pipeline.conftest import VOCABULARY, MakeModel

DRAWS = 50_000


@pytest.mark.parametrize("vocabulary", [40, 64, 200])  # less than a block, one block, blocks and a rest
@pytest.mark.parametrize("draws", [DRAWS, 1])  # in one level; in two
def test_draws_follow_the_softmax(vocabulary: int, draws: int) -> None:
    """Chi-square of four distributions, uniform to sharp; a sampler off by one token or by one percent fails."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(2, 2, 1)
    logits = torch.randn(2, 2, vocabulary, generator=generator) * spread
    ids = draw(logits.repeat_interleave(DRAWS // draws, 0), draws, generator)
    assert ids.shape == (2 * DRAWS // draws, 2, draws) and ids.dtype == torch.int64
    ids = ids.reshape(2, -1, 2, draws).transpose(1, 2).flatten(2)
    probabilities = torch.softmax(logits.double(), dim=-1).reshape(4, -1).numpy()
    for expected, found in zip(probabilities, ids.reshape(4, -1), strict=True):
        counts = np.bincount(found.numpy(), minlength=vocabulary)
        large = expected * DRAWS > 8  # the rare ones together
        observed = np.append(counts[large], counts[~large].sum())
        wanted = np.append(expected[large], expected[~large].sum()) * DRAWS
        observed, wanted = observed[wanted > 0], wanted[wanted > 0]
        assert stats.chisquare(observed, wanted).pvalue > 0.01


def test_draws_are_the_inverse_of_the_cumulative_distribution() -> None:
    """The same uniforms through NumPy's cumsum and searchsorted: equal but where rounding decides."""
    logits = torch.randn(50, 5000, generator=torch.Generator().manual_seed(0)) * 3
    ids = draw(logits, 32, torch.Generator().manual_seed(5))
    uniforms = torch.rand(50, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64).sort(-1).values
    cumulative = np.cumsum(torch.softmax(logits.double(), -1).numpy(), -1)
    expected = [np.searchsorted(row, points, "right") for row, points in zip(cumulative, uniforms.numpy(), strict=True)]
    assert (ids.numpy() == np.stack(expected)).mean() > 0.999


def test_draws_within_a_position_are_independent() -> None:
    """The number of draws that hit a token of probability p in D draws is binomial: variance D p (1 - p)."""
    generator = torch.Generator().manual_seed(2)
    hits = (draw(torch.tensor([0.0, 1.0]).log_softmax(0).expand(1, 20_000, 2), 16, generator) == 1).sum(-1).double()
    p = 1 / (1 + np.exp(-1))
    variance = 16 * p * (1 - p)
    assert abs(float(hits.mean()) - 16 * p) < 4 * np.sqrt(variance / 20_000)
    assert abs(float(hits.var()) / variance - 1) < 4 * np.sqrt(2 / 20_000)


@pytest.mark.parametrize("possible", [[2, 4], [63, 64], [0, 199], [130, 131]])
def test_a_token_without_probability_is_never_drawn(possible: list[int]) -> None:
    logits = torch.full((1, 5000, 200), -torch.inf)
    logits[..., possible] = torch.tensor([0.0, 2.0])
    for draws in (2, 8):
        assert draw(logits, draws, torch.Generator().manual_seed(0)).unique().tolist() == possible


def test_uniforms_at_both_ends_give_the_first_and_the_last_possible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero and the largest number below one, where a rounded sum would fall off the end."""
    ends = torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: ends.expand(500, 2))
    logits = torch.randn(500, 300, generator=torch.Generator().manual_seed(0))
    logits[:, :70] = logits[:, 230:] = -torch.inf  # more than a block at either end
    ids = draw(logits, 2, torch.Generator())
    assert ids.unique(dim=0).tolist() == [[70, 229]]


def test_draws_are_sorted_and_the_same_for_the_same_generator_however_positions_are_split() -> None:
    logits = torch.randn(12, 500, generator=torch.Generator().manual_seed(0))
    first, other = (draw(logits, 6, torch.Generator().manual_seed(seed)) for seed in (5, 6))
    generator = torch.Generator().manual_seed(5)
    parts = torch.cat([draw(part, 6, generator) for part in logits.split([5, 1, 6])])
    assert torch.equal(first, parts) and not torch.equal(first, other)
    assert torch.equal(first, first.sort(-1).values)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    logits = torch.zeros(3, 100)
    logits[1, 70] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        draw(logits, 4, torch.Generator())


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_online_source_gives_what_makes_the_teachers_own_logits(
    make_model: MakeModel, architecture: str, tied: bool
) -> None:
    teacher = make_model(architecture, tie_word_embeddings=tied)
    tokens = torch.arange(24).reshape(2, 12) % VOCABULARY
    signal = OnlineSource.open(teacher, bf16=False).signal(_batch(tokens))
    assert isinstance(signal, DenseSignal) and not signal.hidden.requires_grad and not signal.head.requires_grad
    assert signal.hidden.shape == (2, 12, 64) and signal.head.shape == (VOCABULARY, 64)
    assert signal.head.data_ptr() == teacher.lm_head.weight.data_ptr()  # no second copy of a large matrix
    with torch.no_grad():
        expected = teacher(input_ids=tokens).logits
    torch.testing.assert_close(head_logits(signal.hidden.flatten(0, 1), signal.head).view_as(expected), expected)


def test_bf16_teachers_keep_their_type(make_model: MakeModel) -> None:
    teacher = make_model("llama").to(torch.bfloat16)
    signal = OnlineSource.open(teacher, bf16=True).signal(_batch(torch.zeros(1, 5, dtype=torch.int64)))
    assert signal.hidden.dtype == signal.head.dtype == torch.bfloat16
    assert head_logits(signal.hidden[0], signal.head).dtype == torch.float32


def test_teachers_that_are_not_causal_language_models_are_refused() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=40, initializer_range=0.2, **sizes)
    torch.manual_seed(0)
    with pytest.raises(UserError, match="causal language model with its output matrix"):
        checked_head(BertModel(config).eval())
    masked = BertForMaskedLM(config).eval()
    masked.get_output_embeddings().bias = None
    masked.get_decoder = lambda: masked.bert
    masked.cls.predictions.transform = torch.nn.Identity()
    with pytest.raises(UserError, match="no position sees a later one"):
        checked_head(masked)


def test_logits_made_in_another_way_are_refused(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        capped = make_model("llama", num_hidden_layers=1)
        setattr(capped.config, setting, 30.0)
        with pytest.raises(UserError, match=setting):
            checked_head(capped)
    biased = make_model("llama", num_hidden_layers=1)
    biased.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
    with pytest.raises(UserError, match="bias"):
        checked_head(biased)
    scaled = make_model("llama", num_hidden_layers=1)
    scaled.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits * 1.2)
    with pytest.raises(UserError, match="one matrix times"):
        checked_head(scaled)
    broken = make_model("llama", num_hidden_layers=1)
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="finite"):
        checked_head(broken)


def test_the_stored_source_decodes_once_when_the_batch_was_prepared() -> None:
    calls: list[list[int]] = []
    signal = SparseSignal(torch.zeros(1, 5, 2, dtype=torch.int64), torch.full((1, 5, 2), 0.5))

    def decode(batch: Batch) -> SparseSignal:
        calls.append(batch.rows.tolist())
        return signal

    source = StoredSource(_fake(decode))
    prepared = source.prepare(_batch(torch.zeros(1, 5, dtype=torch.int64)))
    assert source.signal(prepared).weights is signal.weights and calls == [[0]]
    source.signal(_batch(torch.zeros(1, 5, dtype=torch.int64)))
    assert calls == [[0], [0]]


def test_the_probe_leaves_the_teacher_as_it_was(make_model: MakeModel) -> None:
    teacher: PreTrainedModel = make_model("qwen2")
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    checked_head(teacher)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(parameter.grad is not None for parameter in teacher.parameters())


def _batch(tokens: torch.Tensor) -> Batch:
    return Batch(np.arange(len(tokens)), tokens, torch.ones_like(tokens, dtype=torch.bool))


def _fake(decode: Any) -> Any:
    return SimpleNamespace(signal=decode)
