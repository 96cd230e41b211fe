"""The same cleaning function over Ray Data: a cluster that runs already, or processes of this machine."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from typing import Any

from edge_runtime.formats.errors import UserError
from pipeline.data.judging import Chunk, Judged, Outcome
from pipeline.data.sources import Document

_CHUNKS_A_WORKER = 32  # of one Ray Data execution, which takes about a second to set up
_ADDRESS = "RAY_ADDRESS"  # of a cluster; Ray's own variable
_LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: on any system Ray's servers listen on 127.0.0.1 alone
_BYTES_FIELDS = ("digest", "signature", "lines")


def map_on_ray(
    judge: Callable[[Chunk], Judged], chunks: Iterable[Chunk], workers: int
) -> Generator[Judged, None, None]:
    """Yield ``judge(chunk)`` for every chunk, in order.

    Chunks travel as JSON in Arrow tables, a bounded number in one Ray Data execution after the other, so that neither
    this process nor the object store grows with the corpus. With ``RAY_ADDRESS`` set the work goes to that cluster,
    whose machines must share the checkpoint's folder if there are evaluation files; otherwise Ray is started here, on
    the loopback device, without dashboard and without usage reports, and ended afterwards.

    Args:
        judge: Importable on every machine.
        chunks: Read as results are taken.
        workers: Processors that Ray may use.

    Raises:
        UserError: Ray is not installed or cannot start, or a worker failed.
    """
    chunks = iter(chunks)
    with _ray_running(workers) as ray:
        while group := list(islice(chunks, workers * _CHUNKS_A_WORKER)):
            yield from _map_group(ray, judge, group, workers)


def encode_chunk(chunk: Chunk) -> bytes:
    """A chunk as JSON."""
    return json.dumps([chunk.input_digest, [asdict(document) for document in chunk.documents]]).encode()


def decode_chunk(encoded: bytes) -> Chunk:
    """The chunk of ``encode_chunk``."""
    input_digest, documents = json.loads(encoded)
    for document in documents:
        document["messages"] = tuple((role, content) for role, content in document["messages"])
    return Chunk(tuple(Document(**document) for document in documents), input_digest)


def encode_judged(judged: Judged) -> bytes:
    """Outcomes as JSON; bytes as the Latin-1 text of the same numbers."""
    outcomes = [asdict(outcome) for outcome in judged.outcomes]
    for outcome in outcomes:
        outcome.update({name: outcome[name].decode("latin-1") for name in _BYTES_FIELDS})
    return json.dumps([judged.input_digest, outcomes], ensure_ascii=False).encode()


def decode_judged(encoded: bytes) -> Judged:
    """The outcomes of ``encode_judged``."""
    input_digest, outcomes = json.loads(encoded)
    for outcome in outcomes:
        outcome.update({name: outcome[name].encode("latin-1") for name in _BYTES_FIELDS})
        outcome["kinds"] = tuple(outcome["kinds"])
    return Judged(tuple(Outcome(**outcome) for outcome in outcomes), input_digest)


def _map_group(ray: Any, judge: Callable[[Chunk], Judged], group: list[Chunk], workers: int) -> Iterator[Judged]:
    def judge_row(row: dict[str, Any]) -> dict[str, Any]:
        return {"number": row["number"], "judged": encode_judged(judge(decode_chunk(row["chunk"])))}

    rows = [{"number": number, "chunk": encode_chunk(chunk)} for number, chunk in enumerate(group)]
    blocks = min(len(rows), workers * 4)
    try:
        judged = ray.data.from_items(rows, override_num_blocks=blocks).map(judge_row).take_all()
    except ray.exceptions.RayError as error:
        cause = str(error).strip().splitlines()[-1]
        raise UserError(
            "data.engine", "ray", f"workers that live to the end ({cause})", "run the same command to go on, or "
            "data.engine=local",
        ) from None  # fmt: skip
    for row in sorted(judged, key=lambda row: int(row["number"])):
        yield decode_judged(row["judged"])


@contextmanager
def _ray_running(workers: int) -> Iterator[Any]:
    """Ray as it runs already, or started for as long as the block takes."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if _ADDRESS not in os.environ:
        os.environ[_LOOPBACK_ONLY] = "0"
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError("data.engine", "ray", "an installed Ray", "pip install '.[cluster]'") from None
    owned = not ray.is_initialized()
    if owned:
        _start(ray, workers)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it speaks of every execution
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield ray
    finally:
        if owned:
            ray.shutdown()


def _start(ray: Any, workers: int) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if _ADDRESS not in os.environ:
        options |= {"address": "local", "num_cpus": workers, "include_dashboard": False}
    try:
        ray.init(**options)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        address = os.environ.get(_ADDRESS, "this machine")
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            "data.engine", f"ray at {address}", f"a Ray that answers ({reason})", "or engine=local"
        ) from None
