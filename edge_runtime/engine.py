"""One sequence at a time: prefill the prompt, then sample and decode until something ends it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from edge_runtime.backends.base import Backend, KVCache
from edge_runtime.formats.errors import UserError
from edge_runtime.request import FinishReason, SamplingParams, Token
from edge_runtime.sampling import sample_token
from edge_runtime.text import TextStream


def generate(
    backend: Backend,
    cache: KVCache,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    eos: Collection[int],
    decode: Callable[[Sequence[int]], str],
    rng: np.random.Generator | None = None,
) -> Iterator[Token]:
    """Continue a sequence; the texts of the tokens add up to the generated text.

    The prompt is appended to what the cache holds. Afterwards the cache holds the prompt and every generated
    token but the last, whose keys nobody needed yet. The first ``next`` runs the prefill.

    Args:
        backend: Runs the model.
        cache: Allocated by the backend; may hold earlier text.
        prompt: Ids to append, one at least.
        params: How to draw, and when to end.
        eos: Ids that end the text. The id is returned as the last token.
        decode: Ids to text, without special tokens.
        rng: Where draws come from; None makes a generator from ``params.seed``.

    Yields:
        At least one token; the last has a finish reason. CONTEXT: the cache is full.

    Raises:
        UserError: The prompt is empty or does not fit the cache.
        BackendError: The logits are unusable.
    """
    _check_room(prompt, cache)
    rng = np.random.default_rng(params.seed) if rng is None else rng
    text = TextStream(decode, params.stop)
    logits = backend.prefill(prompt, cache)
    for count in range(1, params.max_tokens + 1):
        token = sample_token(logits, params, rng)
        piece = "" if token in eos else text.push(token)
        reason = _finish_reason(token in eos, text.stopped, count == params.max_tokens, cache)
        if reason is not None:
            piece += text.finish()
            # The very last text can complete a stop string too.
            yield Token(token, piece, FinishReason.STOP if text.stopped else reason)
            return
        yield Token(token, piece, None)
        logits = backend.decode(token, cache)


def reuse_prefix(cache: KVCache, cached: Sequence[int], prompt: Sequence[int]) -> int:
    """Cut the cache to the longest start that it shares with ``prompt`` and return that length in tokens.

    At least one token of the prompt is left over, since a prefill needs one.

    Args:
        cache: Holds the earlier text.
        prompt: All ids of the next prefill, those in the cache included.
        cached: Ids of which the cache holds the first ``cache.length_tokens``.
    """
    shared = 0
    for old, new in zip(cached[: cache.length_tokens], prompt[: len(prompt) - 1], strict=False):
        if old != new:
            break
        shared += 1
    cache.truncate(shared)
    return shared


def _check_room(prompt: Sequence[int], cache: KVCache) -> None:
    if not prompt:
        raise UserError("--prompt", "no tokens", "at least one token", "give some text")
    room = cache.capacity_tokens - cache.length_tokens
    if len(prompt) > room:
        raise UserError("--prompt", f"{len(prompt)} tokens", f"at most {room} tokens", "shorten it")


def _finish_reason(is_eos: bool, stopped: bool, is_last: bool, cache: KVCache) -> FinishReason | None:
    if is_eos:
        return FinishReason.EOS
    if stopped:
        return FinishReason.STOP
    if is_last:
        return FinishReason.LENGTH
    return FinishReason.CONTEXT if cache.length_tokens >= cache.capacity_tokens else None
