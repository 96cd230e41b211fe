"""A generation ends for the right reason, with the right cache, and the same seed repeats it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from edge_runtime.engine import generate, reuse_prefix
from edge_runtime.formats.errors import UserError
from edge_runtime.request import FinishReason, SamplingParams, Token
from edge_runtime.text import decoder_of
from tests.edge_runtime.fakes import BOS, EOS, SPEC, ScriptBackend, TableBackend, TableCache, byte_tokenizer

PROMPT = [BOS, *b"hello"]
DECODE = decoder_of(byte_tokenizer())
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def run(
    backend: TableBackend, params: SamplingParams, cache: TableCache | None = None, prompt: Sequence[int] = PROMPT
) -> list[Token]:
    cache = backend.allocate(SPEC.context_tokens) if cache is None else cache
    return list(generate(backend, cache, prompt, params, eos={EOS}, decode=DECODE))


def text_of(tokens: Sequence[Token]) -> str:
    return "".join(token.text for token in tokens)


def test_greedy_is_the_argmax_of_the_whole_history() -> None:
    backend = TableBackend()
    ids = list(PROMPT)
    for token in run(backend, GREEDY):
        assert token.id == int(np.argmax(backend.logits(ids)))
        ids.append(token.id)
    assert len(ids) == len(PROMPT) + 12


def test_the_prompt_is_prefilled_once_and_only_the_last_token_has_a_reason() -> None:
    backend = TableBackend()
    tokens = run(backend, GREEDY)
    assert backend.prefilled_tokens == [len(PROMPT)]
    assert [token.finish_reason for token in tokens] == [None] * 11 + [FinishReason.LENGTH]


def test_nothing_runs_before_the_first_token_is_asked_for() -> None:
    backend = TableBackend()
    steps = generate(backend, backend.allocate(48), PROMPT, GREEDY, eos={EOS}, decode=DECODE)
    assert backend.prefilled_tokens == []
    next(steps)
    assert backend.prefilled_tokens == [len(PROMPT)]


def test_a_seed_repeats_and_another_differs() -> None:
    def ids(seed: int | None) -> list[int]:
        return [token.id for token in run(TableBackend(), SamplingParams(seed=seed, max_tokens=20))]

    assert ids(1) == ids(1) != ids(2)
    assert ids(None) != ids(None)


def test_one_generator_can_serve_several_generations() -> None:
    def ids(rng: np.random.Generator) -> list[int]:
        backend, params = TableBackend(), SamplingParams(seed=1, max_tokens=6)
        steps = generate(backend, backend.allocate(48), PROMPT, params, eos={EOS}, decode=DECODE, rng=rng)
        return [token.id for token in steps]

    rng = np.random.default_rng(1)
    first = ids(rng)
    assert first == ids(np.random.default_rng(1)) != ids(rng)


def test_eos_ends_the_text_and_is_the_last_token() -> None:
    backend = ScriptBackend([*b"hi", EOS, *b"never"])
    tokens = run(backend, GREEDY)
    assert [token.id for token in tokens] == [*b"hi", EOS]
    assert (text_of(tokens), tokens[-1].finish_reason) == ("hi", FinishReason.EOS)
    assert backend.said == 3


def test_a_stop_string_ends_before_itself() -> None:
    tokens = run(ScriptBackend(list(b"one. two. three")), SamplingParams(temperature=0, stop=(". t", "two")))
    assert (text_of(tokens), tokens[-1].finish_reason, len(tokens)) == ("one", FinishReason.STOP, 6)


def test_held_back_text_is_shown_when_the_generation_ends_otherwise() -> None:
    script = [*b"abcdE", EOS]
    tokens = run(ScriptBackend(script), SamplingParams(temperature=0, stop=("END",)))
    assert [token.text for token in tokens] == ["a", "b", "c", "d", "", "E"]
    tokens = run(ScriptBackend(script), SamplingParams(temperature=0, stop=("END",), max_tokens=5))
    assert (tokens[-1].text, tokens[-1].finish_reason) == ("E", FinishReason.LENGTH)


def test_a_full_cache_ends_the_text_after_one_more_token() -> None:
    backend = TableBackend()
    cache = backend.allocate(8)
    tokens = run(backend, SamplingParams(temperature=0, max_tokens=100), cache)
    assert len(tokens) == 8 - len(PROMPT) + 1
    assert tokens[-1].finish_reason == FinishReason.CONTEXT
    assert cache.length_tokens == 8


def test_the_cache_holds_all_but_the_last_token() -> None:
    backend = TableBackend()
    cache = backend.allocate(48)
    tokens = run(backend, GREEDY, cache)
    assert cache.ids == [*PROMPT, *[token.id for token in tokens[:-1]]]


def test_a_prompt_must_exist_and_fit() -> None:
    backend = TableBackend()
    with pytest.raises(UserError, match="at least one token"):
        run(backend, GREEDY, prompt=[])
    with pytest.raises(UserError, match=r"49 tokens.*at most 48"):
        run(backend, GREEDY, prompt=[1] * 49)
    cache = backend.allocate(48)
    backend.prefill([1] * 40, cache)
    with pytest.raises(UserError, match="at most 8"):
        run(backend, GREEDY, cache, prompt=[1] * 9)
    assert len(run(backend, GREEDY, cache, prompt=[1] * 8)) == 1


@pytest.mark.parametrize(
    ("cached", "prompt", "shared"),
    [
        ([], [1, 2], 0),
        ([1, 2, 3], [1, 2, 3, 4], 3),
        ([1, 2, 3], [1, 2, 9, 4], 2),
        ([1, 2, 3], [1, 2, 3], 2),
        ([1, 2, 3], [1], 0),
        ([5], [1, 2], 0),
    ],
)
def test_the_shared_start_stays_in_the_cache(cached: list[int], prompt: list[int], shared: int) -> None:
    cache = TableCache(48, list(cached))
    assert reuse_prefix(cache, cached, prompt) == shared
    assert cache.ids == cached[:shared]


def test_a_reused_cache_gives_the_same_text_as_a_fresh_one() -> None:
    backend = TableBackend()
    cache = backend.allocate(48)
    first = run(backend, GREEDY, cache)
    prompt = [*PROMPT, *[token.id for token in first[:5]], *b"more"]
    reused = reuse_prefix(cache, [*PROMPT, *[token.id for token in first]], prompt)
    assert reused == len(PROMPT) + 5
    assert run(backend, GREEDY, cache, prompt[reused:]) == run(backend, GREEDY, None, prompt)
