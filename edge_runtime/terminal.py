"""``generate``, and what it shares with ``chat``: text on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_runtime.formats.errors import PackageError
from edge_runtime.probe import peak_rss_bytes
from edge_runtime.request import FinishReason, SamplingParams, Token
from edge_runtime.scheduler.lease import inference_lease
from edge_runtime.session import Opening, Session, open_session

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from edge_runtime.formats.package import Package
    from edge_runtime.text import Message


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished generation.

    Attributes:
        tokens: Every sampled id, an end-of-sequence id included.
        prefill_s: Seconds until the first token, its choice included.
        decode_tokens_per_s: Speed of the tokens after the first; None when there was one only.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    prefill_s: float
    decode_tokens_per_s: float | None


def run_generate(opening: Opening, prompt: str, params: SamplingParams, *, chat: bool, as_json: bool) -> None:
    """Continue one prompt; with ``chat`` it is a user's message in the package's chat template.

    Raises:
        SevenfoldError: Anything that the user can correct, as one line.
    """
    from edge_runtime.engine import generate
    from edge_runtime.text import decoder_of, encode_prompt, load_tokenizer

    with open_session(opening) as session:
        report(session)
        manifest, backend = session.package.manifest, session.backend
        tokenizer = load_tokenizer(session.package)
        if chat:
            ids = encode_chat(session.package, tokenizer, [{"role": "user", "content": prompt}])
        else:
            ids = encode_prompt(tokenizer, prompt, manifest.bos)
        cache = backend.allocate(min(manifest.decoder.context_tokens, len(ids) + params.max_tokens))
        steps = generate(backend, cache, ids, params, eos=manifest.eos, decode=decoder_of(tokenizer))
        done = consume(steps, show=not as_json)
        if as_json:
            print(json.dumps(_as_dict(done, session, len(ids)), ensure_ascii=False), flush=True)
        else:
            speed = f", {done.decode_tokens_per_s:.1f} tokens/s" if done.decode_tokens_per_s else ""
            note(f"{len(ids)} + {len(done.tokens)} tokens, ended by {done.finish_reason.value}{speed}")


def encode_chat(package: Package, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation in the package's chat template, which writes its own special tokens.

    Raises:
        PackageError: The package has no template, or it does not render.
    """
    from edge_runtime.text import encode_prompt, load_chat_template, render_chat

    template = load_chat_template(package)
    if template is None:
        raise PackageError(f"{package.directory}: has no chat template; use generate without --chat")
    bos, eos = package.manifest.bos, package.manifest.eos
    bos_token = (tokenizer.id_to_token(bos) if bos is not None else None) or ""
    eos_token = (tokenizer.id_to_token(eos[0]) if eos else None) or ""
    return encode_prompt(tokenizer, render_chat(template, messages, bos_token, eos_token), bos=None)


def consume(steps: Iterator[Token], *, show: bool) -> Generation:
    """Run a generation to its end; with ``show``, print its text as it becomes certain, and a final newline.

    Training on this device waits as long; ``steps`` has not begun yet, so the lease covers the prefill too.
    """
    with inference_lease(warn=note):
        return _consume(steps, show=show)


def report(session: Session) -> None:
    """Say on stderr what was opened."""
    manifest = session.package.manifest
    if session.note is not None:
        note(session.note)
    note(
        f"{manifest.name} {manifest.version} through {session.container} ({session.threads} threads), "
        f"verified in {session.verify_s:.2f} s, loaded in {session.load_s:.2f} s"
    )


def note(line: str) -> None:
    """One line for the person, not for the pipe."""
    print(line, file=sys.stderr, flush=True)


def _consume(steps: Iterator[Token], *, show: bool) -> Generation:
    pieces: list[str] = []
    tokens: list[int] = []
    reason: FinishReason | None = None
    started_s = first_s = time.perf_counter()
    for step in steps:
        if not tokens:
            first_s = time.perf_counter()
        tokens.append(step.id)
        pieces.append(step.text)
        reason = step.finish_reason
        if show and step.text:
            print(step.text, end="", flush=True)
    ended_s = time.perf_counter()
    if show:
        print(flush=True)
    if reason is None:
        raise RuntimeError("a generation ended without a reason")
    speed = (len(tokens) - 1) / (ended_s - first_s) if len(tokens) > 1 else None
    return Generation("".join(pieces), tuple(tokens), reason, first_s - started_s, speed)


def _as_dict(done: Generation, session: Session, prompt_tokens: int) -> dict[str, object]:
    return {
        "text": done.text,
        "tokens": list(done.tokens),
        "finish_reason": done.finish_reason.value,
        "prompt_tokens": prompt_tokens,
        "generated_tokens": len(done.tokens),
        "prefill_s": done.prefill_s,
        "decode_tokens_per_s": done.decode_tokens_per_s,
        "verify_s": session.verify_s,
        "load_s": session.load_s,
        "peak_rss_bytes": peak_rss_bytes(),
        "backend": session.backend.name,
        "container": session.container,
        "threads": session.threads,
    }
