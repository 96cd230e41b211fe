from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from edge_runtime.formats.errors import UserError
from pipeline.distillation.needles import NeedleFormat, needle_prompt
from pipeline.evaluation import long_context
from pipeline.evaluation.long_context import (
    AttentionPattern,
    attention_mask,
    needle_recall,
    perplexity_by_position,
    wilson_interval,
)

FORM = NeedleFormat(np.arange(10, 60, dtype=np.int32), np.array([1, 2], np.int32), np.array([1], np.int32))
FULL, WINDOW = AttentionPattern(), AttentionPattern(window_tokens=20, sink_tokens=4)
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
TEXT = np.random.default_rng(0).integers(0, 64, (3, 150)).astype(np.int32)


def build(config: type = LlamaConfig, model: type = LlamaForCausalLM, **options: Any) -> Any:
    torch.manual_seed(0)
    return model(config(**(SIZES | options))).eval()


def losses_of(logits: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), torch.from_numpy(TEXT[:, 1:].astype(np.int64)), reduction="none"
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("chunk_tokens", [1_000, 150, 64, 7])
@pytest.mark.parametrize("pattern", [FULL, WINDOW])
def test_losses_are_those_of_one_pass_with_a_dense_mask(
    attention: str, chunk_tokens: int, pattern: AttentionPattern
) -> None:
    model = build(attn_implementation=attention)
    seen = torch.ones(150, 150).tril().bool()
    if pattern is WINDOW:
        for query in range(150):
            seen[query, 4 : max(4, query - 19)] = False
    mask = torch.zeros(150, 150).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        expected = losses_of(model(torch.from_numpy(TEXT.astype(np.int64)), attention_mask=mask).logits)

    found = perplexity_by_position(model, TEXT, pattern, edges=(0, 1, 33, 150, 400), chunk_tokens=chunk_tokens)

    assert [(bucket.first, bucket.end, bucket.tokens) for bucket in found] == [(1, 33, 96), (33, 150, 351)]
    for bucket in found:
        mean = expected[:, bucket.first - 1 : bucket.end - 1].mean().item()
        assert bucket.loss == pytest.approx(mean, abs=2e-5) and bucket.perplexity == pytest.approx(np.exp(bucket.loss))


@pytest.mark.parametrize("chunk_tokens", [150, 31])
def test_a_window_without_sinks_is_mistrals_own(chunk_tokens: int) -> None:
    plain = build(MistralConfig, MistralForCausalLM, sliding_window=None)
    own = build(MistralConfig, MistralForCausalLM, sliding_window=20)
    with torch.no_grad():
        expected = losses_of(own(torch.from_numpy(TEXT.astype(np.int64))).logits).mean().item()
    pattern = AttentionPattern(window_tokens=20, sink_tokens=0)
    (bucket,) = perplexity_by_position(plain, TEXT, pattern, edges=(0, 150), chunk_tokens=chunk_tokens)
    assert bucket.loss == pytest.approx(expected, abs=2e-5)


def test_a_window_that_holds_everything_is_full_attention() -> None:
    model = build(Qwen2Config, Qwen2ForCausalLM)
    wide = perplexity_by_position(model, TEXT, AttentionPattern(150), edges=(0, 150), chunk_tokens=40)
    full = perplexity_by_position(model, TEXT, FULL, edges=(0, 150), chunk_tokens=40)
    assert wide[0].loss == pytest.approx(full[0].loss, abs=1e-5)
    narrow = perplexity_by_position(model, TEXT, WINDOW, edges=(0, 150), chunk_tokens=40)
    assert abs(narrow[0].loss - full[0].loss) > 1e-3


def test_a_mask_row_by_row() -> None:
    mask = attention_mask(AttentionPattern(3, 2), 5, 8, torch.float32, torch.device("cpu"))
    assert mask is not None and mask.shape == (1, 1, 3, 8)
    seen = [[key for key in range(8) if row[key] == 0] for row in mask[0, 0]]
    assert seen == [[0, 1, 3, 4, 5], [0, 1, 4, 5, 6], [0, 1, 5, 6, 7]]


def test_bfloat16_is_close() -> None:
    model = build()
    exact = perplexity_by_position(model, TEXT, WINDOW, edges=(0, 150), chunk_tokens=64)
    rounded = perplexity_by_position(model, TEXT, WINDOW, edges=(0, 150), chunk_tokens=64, bf16=True)
    assert 0 < abs(rounded[0].loss - exact[0].loss) < 0.05


class Copier:
    """A model that looks for the last two tokens among what it sees and writes what followed them there."""

    config, device, dtype = LlamaConfig(**SIZES), torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        self.tokens = torch.empty(0, 0, dtype=torch.int64)

    def get_decoder(self) -> Any:
        return self.forward

    def get_output_embeddings(self) -> Any:
        return lambda hidden: hidden

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, **_: Any) -> Any:
        start = int(position_ids[0, 0])
        self.tokens = torch.cat([self.tokens, input_ids], dim=1) if start else input_ids
        hidden = torch.zeros(*input_ids.shape, 64)
        for row, tokens in enumerate(self.tokens.tolist()):
            for query in range(start, len(tokens)):
                seen = range(query) if attention_mask is None else (attention_mask[0, 0, query - start] == 0).nonzero()
                for key in map(int, seen):
                    if 1 < key < query and tokens[key - 2 : key] == tokens[query - 1 : query + 1]:
                        hidden[row, query - start, tokens[key]] = 1
        return SimpleNamespace(last_hidden_state=hidden)


@pytest.mark.parametrize("chunk_tokens", [200, 37])
def test_full_attention_finds_every_needle_and_a_window_those_inside(chunk_tokens: int) -> None:
    haystack = np.random.default_rng(1).integers(60, 64, 400).astype(np.int32)
    options: dict[str, Any] = {
        "lengths": (120,), "depths": (0.0, 0.5, 0.9, 1.0), "trials": 6, "distractors": 2, "batch_sequences": 4,
        "chunk_tokens": chunk_tokens,
    }  # fmt: skip
    full = needle_recall(Copier(), FORM, haystack, FULL, **options)
    assert [(score.tokens, score.depth, score.found) for score in full] == [
        (120, 0.0, 6), (120, 0.5, 6), (120, 0.9, 6), (120, 1.0, 6),
    ]  # fmt: skip
    window = needle_recall(Copier(), FORM, haystack, AttentionPattern(40, 4), **options)
    assert [score.found for score in window] == [0, 0, 6, 6]
    sunk = needle_recall(Copier(), FORM, haystack, AttentionPattern(40, 60), **options)
    assert sunk[0].found == 6 and sunk[1].found < 6


@pytest.mark.parametrize("chunk_tokens", [300, 50, 119])
def test_an_answer_counts_exactly_when_greedy_decoding_writes_it(chunk_tokens: int) -> None:
    model = build(eos_token_id=None, pad_token_id=0)
    haystack = np.random.default_rng(1).integers(0, 64, 400).astype(np.int32)
    texts, expected = [], 0
    for trial in range(12):
        prompt, _ = needle_prompt(FORM, haystack, 120, 0.5, 0, np.random.default_rng(trial))
        written = model.generate(
            torch.from_numpy(prompt.astype(np.int64))[None], max_new_tokens=2, do_sample=False,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        )[0].numpy()  # fmt: skip
        if trial % 3:
            written[-(trial % 3)] ^= 1
        if trial % 3 == 2:  # a wrong start that goes on as the model would
            with torch.no_grad():
                written[-1] = model(torch.from_numpy(written[:-1].astype(np.int64))[None]).logits[0, -1].argmax()
        expected += trial % 3 == 0
        texts.append(written)
    assert long_context._count_found(model, np.stack(texts), 2, FULL, chunk_tokens, False) == expected == 4


def test_the_same_seed_asks_the_same_of_every_pattern() -> None:
    haystack = np.random.default_rng(1).integers(60, 64, 400).astype(np.int32)
    drawn: list[bytes] = []

    class Recorder(Copier):
        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, **options: Any) -> Any:
            drawn.append(input_ids.numpy().tobytes())
            return super().forward(input_ids, attention_mask, position_ids, **options)

    for pattern in (FULL, WINDOW):
        needle_recall(Recorder(), FORM, haystack, pattern, lengths=(80,), depths=(0.0, 1.0), trials=2)
    assert drawn[:4] == drawn[4:] and len(set(drawn)) == 4


def test_wilson_intervals_equal_scipys() -> None:
    from scipy.stats import binomtest

    for found, trials in ((0, 20), (20, 20), (16, 20), (1, 3)):
        expected = binomtest(found, trials).proportion_ci(method="wilson")
        assert wilson_interval(found, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_bad_arguments_are_refused() -> None:
    model = build()
    with pytest.raises(UserError, match="edges"):
        perplexity_by_position(model, TEXT, FULL, edges=(0, 10, 5))
    with pytest.raises(UserError, match="edges"):
        perplexity_by_position(model, TEXT[:, :1], FULL)
    with pytest.raises(UserError, match="window_tokens"):
        perplexity_by_position(model, TEXT, AttentionPattern(0))
    with pytest.raises(UserError, match="depths"):
        needle_recall(model, FORM, TEXT[0], FULL, lengths=(50,), depths=(1.5,))
    with pytest.raises(UserError, match="haystack"):
        needle_recall(model, FORM, TEXT[0], FULL, lengths=(500,))
