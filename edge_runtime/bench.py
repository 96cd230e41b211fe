"""``bench``: speed and memory of a package in a fresh process, and its score on given tokens.

Everything here runs where only numpy, cryptography and one runtime are installed.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edge_runtime.formats.errors import BackendError, UserError
from edge_runtime.probe import peak_rss_bytes
from edge_runtime.scheduler.lease import inference_lease
from edge_runtime.session import Opening, Session, open_session
from edge_runtime.terminal import note, report

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edge_runtime.backends.base import Backend


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What to measure.

    Attributes:
        repeat: Rounds of prefill and decode; 0 skips the speed.
        score: File of token ids (S, T) to score teacher-forced, or None.
        logits_out: Where the (S, T, V) float32 logits of the scored tokens go, or None.
    """

    prompt_tokens: int
    tokens: int
    repeat: int
    score: Path | None = None
    logits_out: Path | None = None


def run_bench(opening: Opening, plan: BenchPlan, *, as_json: bool) -> None:
    """Measure, then print one JSON object or a table on stdout.

    Peak memory is read before scoring, whose (T, V) logits no ordinary run holds.

    Raises:
        SevenfoldError: Anything that the user can correct, as one line.
    """
    with open_session(opening) as session:
        report(session)
        manifest = session.package.manifest
        result: dict[str, Any] = {
            "name": manifest.name,
            "version": manifest.version,
            "backend": session.backend.name,
            "container": session.container,
            "threads": session.threads,
            "verify_s": session.verify_s,
            "load_s": session.load_s,
        }
        with inference_lease(warn=note):
            if plan.repeat > 0:
                result |= _measure_speed(session, plan)
            result["peak_rss_bytes"] = peak_rss_bytes()
            if plan.score is not None:
                result |= score_tokens(session.backend, load_tokens(plan.score), plan.logits_out)
    if as_json:
        print(json.dumps(result), flush=True)
    else:
        print("\n".join(f"{name:<28} {_shown(value)}" for name, value in result.items()), flush=True)


def load_tokens(path: Path) -> NDArray[np.integer[Any]]:
    """(S, T) token ids from a .npy file.

    Raises:
        UserError: Missing, not a plain .npy file, or not a whole-number matrix with at least two columns.
    """
    import numpy as np

    try:
        # Never a pickle: this file may come from anywhere.
        tokens: NDArray[np.integer[Any]] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError("--score", str(path), "a .npy file of int32 or int64 (S, T)", str(error)) from error
    if not isinstance(tokens, np.ndarray) or tokens.dtype not in (np.int32, np.int64):
        raise UserError("--score", f"{getattr(tokens, 'dtype', 'an archive')}", "one array of int32 or int64")
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise UserError("--score", f"shape {tokens.shape}", "(S, T) with T of 2 or more")
    return tokens


def score_tokens(
    backend: Backend, tokens: NDArray[np.integer[Any]], logits_out: Path | None = None
) -> dict[str, float | int]:
    """Teacher-forced loss of (S, T) ids: each row alone, each id but the first predicted from those before it.

    Args:
        backend: What is scored.
        tokens: (S, T) ids.
        logits_out: Written as .npy, float32 (S, T, V): a file that is there when it is complete, or a pipe.

    Returns:
        ``loss`` (mean, nats a token), ``perplexity`` and ``scored_tokens``.

    Raises:
        UserError: Rows longer than the context, or ids outside the vocabulary.
    """
    import numpy as np

    rows, columns = tokens.shape
    vocab_size, context_tokens = backend.spec.vocab_size, backend.spec.context_tokens
    if columns > context_tokens:
        raise UserError("--score", f"rows of {columns} tokens", f"at most {context_tokens}", "cut the rows")
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
        raise UserError(
            "--score", f"ids {tokens.min()} to {tokens.max()}", f"0 to {vocab_size - 1}", "use this package's tokenizer"
        )
    cache = backend.allocate(columns)
    loss_sum = 0.0
    with _npy_writer(logits_out, (rows, columns, vocab_size)) as written:
        for row in tokens.tolist():
            cache.truncate(0)
            logits = backend.prefill(row, cache, all_logits=True)
            wide = logits[:-1].astype(np.float64)
            wide -= wide.max(axis=1, keepdims=True)
            losses = np.log(np.exp(wide).sum(axis=1)) - wide[np.arange(columns - 1), row[1:]]
            loss_sum += float(losses.sum())
            if written is not None:
                written.write(np.ascontiguousarray(logits, np.float32).data)
    scored_tokens = rows * (columns - 1)
    loss = loss_sum / scored_tokens
    if not math.isfinite(loss):
        raise BackendError(f"the loss is {loss}; the file or its runtime is broken, try another --backend")
    # Beyond that a float overflows; such a file is noise, and the loss says so.
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"loss": loss, "perplexity": perplexity, "scored_tokens": scored_tokens}


def _measure_speed(session: Session, plan: BenchPlan) -> dict[str, float | int]:
    import numpy as np

    spec, backend = session.backend.spec, session.backend
    needed_tokens = plan.prompt_tokens + plan.tokens
    if min(plan.prompt_tokens, plan.tokens) < 1 or needed_tokens > spec.context_tokens:
        asked = f"{plan.prompt_tokens} + {plan.tokens}"
        raise UserError("--prompt-tokens + --tokens", asked, f"at least 1 each, {spec.context_tokens} together")
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, needed_tokens).tolist()
    cache = backend.allocate(needed_tokens)
    prefill: list[float] = []
    decode: list[float] = []
    for _ in range(plan.repeat):
        cache.truncate(0)
        started_s = time.perf_counter()
        backend.prefill(ids[: plan.prompt_tokens], cache)
        middle_s = time.perf_counter()
        for token in ids[plan.prompt_tokens :]:
            backend.decode(token, cache)
        prefill.append(plan.prompt_tokens / (middle_s - started_s))
        decode.append(plan.tokens / (time.perf_counter() - middle_s))
    return {
        "prompt_tokens": plan.prompt_tokens,
        "tokens": plan.tokens,
        "repeat": plan.repeat,
        "prefill_tokens_per_s": max(prefill),
        "prefill_tokens_per_s_median": statistics.median(prefill),
        "decode_tokens_per_s": max(decode),
        "decode_tokens_per_s_median": statistics.median(decode),
    }


@contextmanager
def _npy_writer(path: Path | None, shape: tuple[int, int, int]) -> Iterator[BinaryIO | None]:
    """A .npy file of float32, its header written and its rows to follow; None without a path.

    A file appears under its name when complete. A pipe is written to as it is: whoever reads it needs no disk.
    """
    if path is None:
        yield None
        return
    import numpy as np

    piped = path.exists() and not path.is_file()
    temporary = path if piped else path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            header = {
                "descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)),
                "fortran_order": False,
                "shape": shape,
            }
            np.lib.format.write_array_header_1_0(file, header)
            yield file
        if not piped:
            temporary.replace(path)
    finally:
        if not piped:
            temporary.unlink(missing_ok=True)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
