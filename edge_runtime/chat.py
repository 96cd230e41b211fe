"""``chat``: a conversation on plain stdin and stdout, at a terminal or through a pipe."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edge_runtime.request import SamplingParams
from edge_runtime.session import Opening, Session, open_session
from edge_runtime.terminal import consume, encode_chat, note, report

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

    from edge_runtime.backends.base import KVCache
    from edge_runtime.text import Message


@dataclass(slots=True)
class _Conversation:
    """What was said, and the ids that the cache holds, the last one perhaps not yet."""

    cache: KVCache
    messages: list[Message] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)


def run_chat(opening: Opening, params: SamplingParams) -> None:
    """Answer line by line until end of input; the KV cache lives on between turns.

    ``/reset`` forgets the conversation, ``/exit`` ends.

    Raises:
        SevenfoldError: Anything that the user can correct, as one line.
    """
    import numpy as np

    from edge_runtime.text import load_tokenizer

    with open_session(opening) as session:
        report(session)
        tokenizer = load_tokenizer(session.package)
        # Before the first line is typed: a package without a template must not cost the user a message.
        encode_chat(session.package, tokenizer, [{"role": "user", "content": "hello"}])
        rng = np.random.default_rng(params.seed)
        conversation = _Conversation(session.backend.allocate(session.package.manifest.decoder.context_tokens))
        note("type a line; /reset forgets the conversation, /exit ends")
        while (line := _read_line()) is not None and line != "/exit":
            if line == "/reset":
                conversation = _Conversation(conversation.cache)
                note("forgotten")
            elif line.startswith("/"):
                note(f"{line}: unknown, allowed: /reset /exit")
            elif line:
                conversation.messages.append({"role": "user", "content": line})
                _answer(session, tokenizer, conversation, params, rng)


def _read_line() -> str | None:
    """One line without its end, or None at the end of input; the prompt appears at a terminal only."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def _answer(
    session: Session,
    tokenizer: Tokenizer,
    conversation: _Conversation,
    params: SamplingParams,
    rng: np.random.Generator,
) -> None:
    from edge_runtime.engine import generate, reuse_prefix
    from edge_runtime.text import decoder_of

    ids = _fit(session, tokenizer, conversation, params.max_tokens)
    if ids is None:
        return
    cache, eos = conversation.cache, session.package.manifest.eos
    reused = reuse_prefix(cache, conversation.cached, ids)
    steps = generate(session.backend, cache, ids[reused:], params, eos=eos, decode=decoder_of(tokenizer), rng=rng)
    done = consume(steps, show=True)
    conversation.cached = [*ids, *done.tokens]
    conversation.messages.append({"role": "assistant", "content": done.text})


def _fit(session: Session, tokenizer: Tokenizer, conversation: _Conversation, max_tokens: int) -> list[int] | None:
    """Ids of the conversation, its oldest turns dropped until an answer has room; None when one message is too long."""
    context_tokens = session.package.manifest.decoder.context_tokens
    room_tokens = context_tokens - min(max_tokens, context_tokens // 4)
    while True:
        ids = encode_chat(session.package, tokenizer, conversation.messages)
        if len(ids) <= room_tokens:
            return ids
        if len(conversation.messages) == 1:
            conversation.messages.clear()
            note(f"{len(ids)} tokens, at most {room_tokens} fit; shorten the message")
            return None
        del conversation.messages[:2]
        note(f"the conversation outgrew {context_tokens} tokens; its oldest turn was dropped")
