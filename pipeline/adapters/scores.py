"""What an adapter is worth on each variant of its base: the fp checkpoint, and every container of the package.

An adapter that was trained on one variant is not assumed to be good on another: it is measured there, through the
files that ship (``edge_runtime.backends``), on held-out sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.backends import open_backend
from edge_runtime.backends.base import Backend
from edge_runtime.formats.errors import AdapterError, UserError
from edge_runtime.formats.lora import Adapter
from edge_runtime.formats.package import Package
from pipeline.adapters.bases import adapted

FloatArray = NDArray[np.float32]
FP = "fp"
CONTAINERS = ("onnx", "tflite")


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of an adapter.

    Attributes:
        by_variant: ``loss`` in nats a token, ``kl`` to the fp checkpoint without adapter and ``top1`` agreement with
            it, each with the adapter, and as ``base_...`` without.
        refused: Variants that cannot carry it, and why.
    """

    by_variant: Mapping[str, Mapping[str, float]]
    refused: Mapping[str, str]


def score_adapter(
    adapter: Adapter, student: Any, package: Package | None, sequences: NDArray[np.int32], *, threads: int
) -> Scores:
    """Score (S, T) sequences with and without the adapter.

    Args:
        adapter: Bound to the package's base.
        student: The fp checkpoint in torch.
        package: Its containers are tried; None: only the checkpoint.
        sequences: Held out.
        threads: Of the runtimes.

    Raises:
        UserError: There is no sequence of two tokens.
        BackendError: A container gives no usable logits.
    """
    if not len(sequences) or sequences.shape[1] < 2:
        raise UserError("held-out text", sequences.shape, "at least one sequence of two tokens", "add text")
    found, refused = {FP: _score_checkpoint(adapter, student, sequences)}, {}
    for container in () if package is None else CONTAINERS:
        if package is None or container not in package.available:
            continue
        directory = package.container_directory(container)
        with closing(open_backend(container, directory, package.manifest.decoder, threads=threads)) as backend:
            try:
                backend.set_adapter(adapter)
            except AdapterError as error:
                refused[container] = str(error)
                continue
            found[container] = _compare(student, partial(_logits, backend, sequences), adapter, sequences)
    return Scores(found, refused)


def _score_checkpoint(adapter: Adapter, student: Any, sequences: NDArray[np.int32]) -> dict[str, float]:
    from pipeline.distillation.recording import model_logits

    def logits(chosen: Adapter | None) -> Iterator[FloatArray]:
        for row in sequences:
            with adapted(student, chosen):
                found = next(model_logits(student, row[None]))
            yield found  # outside: whoever takes it asks the bare student next

    return _compare(student, logits, adapter, sequences)


def _compare(
    student: Any, logits: Callable[[Adapter | None], Iterator[FloatArray]], adapter: Adapter,
    sequences: NDArray[np.int32],
) -> dict[str, float]:  # fmt: skip
    """Sequence by sequence: memory holds a row of logits of each."""
    from pipeline.distillation.recording import model_logits
    from pipeline.distillation.scoring import agreement, perplexity

    figures = {}
    for prefix, chosen in (("base_", None), ("", adapter)):
        rows = [
            (perplexity([row], tokens[None]), agreement([expected], [row]))
            for row, expected, tokens in zip(logits(chosen), model_logits(student, sequences), sequences, strict=True)
        ]
        figures[f"{prefix}loss"] = float(np.mean([np.log(each) for each, _ in rows]))
        figures[f"{prefix}kl"] = float(np.mean([each.kl for _, each in rows]))
        figures[f"{prefix}top1"] = float(np.mean([each.top1 for _, each in rows]))
    return {name: round(value, 6) for name, value in figures.items()}


def _logits(backend: Backend, sequences: NDArray[np.int32], adapter: Adapter | None) -> Iterator[FloatArray]:
    """(T, V) a sequence."""
    backend.set_adapter(adapter)
    cache = backend.allocate(sequences.shape[1])
    for tokens in sequences.tolist():
        cache.truncate(0)
        yield backend.prefill(tokens, cache, all_logits=True).copy()
