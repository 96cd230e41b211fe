"""A candidate against the champion, through the exported files, on held-out text.

Both see the same sequences, so their losses are paired: the bound of the mean difference comes from resampling
sequences (Koehn, "Statistical significance tests for machine translation evaluation", EMNLP 2004).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.backends import open_backend
from edge_runtime.backends.base import Backend
from edge_runtime.formats.errors import BackendError, UserError
from edge_runtime.formats.lora import Adapter
from edge_runtime.formats.package import Package
from pipeline.export.parity import compare_logits
from pipeline.settings import GateConfig

FloatArray = NDArray[np.float32]
Losses = NDArray[np.float64]  # (S,) mean loss of each sequence, in nats a token
REFERENCE_CONTAINER, COMPARED_CONTAINER = "onnx", "tflite"
MIN_SEQUENCES = 8  # resampling fewer says nothing


@dataclass(frozen=True, slots=True)
class Gain:
    """Mean losses in one container, in nats a token.

    Attributes:
        loss_reference: With the champion's adapter, or without any when there is no champion.
        mean: ``loss_reference - loss_candidate``.
        low: What ``mean`` is above with the gate's confidence.
    """

    loss_base: float
    loss_reference: float
    loss_candidate: float
    mean: float
    low: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a trial came to.

    Attributes:
        gains: By container.
        agreement: TFLite's logits against ONNX's with the candidate: ``rms_ratio`` of the worst sequence, ``top1``
            over all positions; empty when the package has no such container here.
        reasons: Why the candidate must not become champion; empty when it may. A candidate with which a runtime
            gives no usable logits has no figures, only this.
    """

    sequences: int
    gains: dict[str, Gain]
    agreement: dict[str, float]
    reasons: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for a report."""
        return {
            "passed": not self.reasons,
            "reasons": list(self.reasons),
            "sequences": self.sequences,
            "containers": {name: _rounded(asdict(gain)) for name, gain in self.gains.items()},
            "agreement": _rounded(self.agreement),
        }


def judge(
    package: Package, candidate: Adapter, champion: Adapter | None, sequences: NDArray[np.int32],
    gate: GateConfig, *, threads: int, seed: int,
) -> Verdict:  # fmt: skip
    """Score (S, T) sequences with and without the adapters in ONNX and, where the package has it, TFLite.

    Raises:
        UserError: Too few sequences, or the package has no ONNX container here.
        AdapterError: A container has no slot for the adapter.
    """
    if len(sequences) < MIN_SEQUENCES:
        need = f"at least {MIN_SEQUENCES} sequences of {sequences.shape[1]} tokens"
        raise UserError("gate.text", f"{len(sequences)} sequences", need, "add held-out text")
    if REFERENCE_CONTAINER not in package.available:
        raise UserError("package", str(package.directory), f"a package with {REFERENCE_CONTAINER}/ here")
    containers = [name for name in (REFERENCE_CONTAINER, COMPARED_CONTAINER) if name in package.available]
    with ExitStack() as stack:
        backends = {name: stack.enter_context(closing(_open(package, name, threads))) for name in containers}
        base = {name: _losses(backend, None, sequences) for name, backend in backends.items()}
        reference = base
        if champion is not None:
            reference = {name: _losses(backend, champion, sequences) for name, backend in backends.items()}
        try:
            found, agreement = _try(backends, candidate, sequences)
        except BackendError as error:  # the same files answered without it
            return Verdict(len(sequences), {}, {}, (f"with the candidate, {error}",))
    gains = {name: _gain(base[name], reference[name], found[name], gate, seed) for name in containers}
    return Verdict(len(sequences), gains, agreement, tuple(_reasons(gains, agreement, gate, champion is not None)))


def lower_bound(differences: Losses, *, confidence: float, resamples: int, seed: int) -> float:
    """One-sided bootstrap bound: the mean of ``differences`` (S,) is above it with ``confidence``."""
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = generator.integers(0, len(differences), (resamples, len(differences)))
    return float(np.quantile(differences[rows].mean(axis=1), 1 - confidence))


def _open(package: Package, container: str, threads: int) -> Backend:
    return open_backend(container, package.container_directory(container), package.manifest.decoder, threads=threads)


def _losses(backend: Backend, adapter: Adapter | None, sequences: NDArray[np.int32]) -> Losses:
    rows = zip(_logits(backend, adapter, sequences), sequences, strict=True)
    return np.array([_mean_loss(logits, tokens) for logits, tokens in rows])


def _mean_loss(logits: FloatArray, tokens: NDArray[np.int32]) -> float:
    """Mean of ``-log p`` over every token but the first; logits (T, V)."""
    largest = logits[:-1].max(axis=1, keepdims=True)
    log_total = np.log(np.exp(logits[:-1] - largest).sum(axis=1, dtype=np.float64)) + largest[:, 0]
    return float((log_total - logits[np.arange(len(tokens) - 1), tokens[1:]]).mean())


def _try(
    backends: Mapping[str, Backend], candidate: Adapter, sequences: NDArray[np.int32]
) -> tuple[dict[str, Losses], dict[str, float]]:
    """(losses by container, agreement): sequence by sequence, so that memory holds one row of logits a container."""
    losses: dict[str, list[float]] = {name: [] for name in backends}
    parities = []
    streams = (_logits(backend, candidate, sequences) for backend in backends.values())
    for tokens, *rows in zip(sequences, *streams, strict=True):
        for name, logits in zip(backends, rows, strict=True):
            losses[name].append(_mean_loss(logits, tokens))
        if len(rows) == 2:
            parities.append(compare_logits(*rows))
    agreement = {}
    if parities:
        agreement["rms_ratio"] = max(parity.rms_ratio for parity in parities)
        agreement["top1"] = float(np.mean([parity.top1 for parity in parities]))
    return {name: np.array(values) for name, values in losses.items()}, agreement


def _logits(backend: Backend, adapter: Adapter | None, sequences: NDArray[np.int32]) -> Iterator[FloatArray]:
    """(T, V) a sequence."""
    backend.set_adapter(adapter)
    cache = backend.allocate(sequences.shape[1])
    for tokens in sequences.tolist():
        cache.truncate(0)
        yield backend.prefill(tokens, cache, all_logits=True).copy()


def _gain(base: Losses, reference: Losses, found: Losses, gate: GateConfig, seed: int) -> Gain:
    differences = reference - found
    low = lower_bound(differences, confidence=gate.confidence, resamples=gate.resamples, seed=seed)
    return Gain(float(base.mean()), float(reference.mean()), float(found.mean()), float(differences.mean()), low)


def _reasons(
    gains: dict[str, Gain], agreement: dict[str, float], gate: GateConfig, has_champion: bool
) -> Iterator[str]:
    other = "the champion" if has_champion else "no adapter"
    for container, gain in gains.items():
        if not gain.low > gate.margin:
            yield (
                f"{container}: {abs(gain.mean):.4f} nats a token {'better' if gain.mean > 0 else 'worse'} than {other},"
                f" bound {gain.low:+.4f} at {gate.confidence:.0%} confidence; above {gate.margin:g} is needed"
            )
    if agreement and agreement["rms_ratio"] > gate.agreement_rms_max:
        off, most = agreement["rms_ratio"], gate.agreement_rms_max
        yield f"tflite: logits off onnx's by {off:.4f} of their spread, at most {most}"
    if agreement and agreement["top1"] < gate.agreement_top1_min:
        yield f"tflite: top-1 {agreement['top1']:.4f} of onnx's, at least {gate.agreement_top1_min}"


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in figures.items()}
