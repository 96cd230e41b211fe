"""Proof that an exported file computes what its codes say, in the runtime that it is meant for."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.decoder import EMBEDDING, HEAD
from edge_runtime.formats.errors import BackendError, ExportError
from edge_runtime.formats.int4 import QuantizedTensor, Weights, dequantize

FloatArray = NDArray[np.float32]
RMS_RATIO_LIMIT = 0.10  # a wrong scale, a swapped nibble or a missing rotation gives 0.3 and more
_RUN_TIMEOUT_S = 1800
_HEAD, _EMBEDDING = f"{HEAD}.weight", f"{EMBEDDING}.weight"
_BLOCK_CODES = 1 << 24


@dataclass(frozen=True, slots=True)
class Parity:
    """An exported file's logits against the dequantized model's: (positions, V) each.

    Attributes:
        max_abs: Largest difference of a logit.
        rms_ratio: Root mean square of the difference over the logits' standard deviation.
        top1: Share of positions with the same most likely token.
    """

    positions: int
    max_abs: float
    rms_ratio: float
    top1: float

    def to_dict(self) -> dict[str, float]:
        """Plain numbers for a metrics file."""
        return {name: round(float(value), 7) for name, value in asdict(self).items()}


def compare_logits(expected: FloatArray, found: FloatArray) -> Parity:
    """Compare (N, V) logits."""
    difference = found.astype(np.float64) - expected
    return Parity(
        len(expected),
        float(np.abs(difference).max()),
        float(np.sqrt((difference**2).mean()) / expected.std()),
        float((expected.argmax(axis=1) == found.argmax(axis=1)).mean()),
    )


def require_parity(name: str, expected: FloatArray, found: FloatArray) -> Parity:
    """The comparison of a golden-vector run.

    Raises:
        ExportError: The logits are all zero, not finite, or not those of the dequantized model.
    """
    if not np.isfinite(found).all() or not np.abs(found).max() > 0:
        raise ExportError(f"{name}: the runtime returned all-zero or non-finite logits; the file must not ship")
    if found.shape != expected.shape:
        raise ExportError(f"{name}: logits of shape {found.shape}, expected {expected.shape}; the file must not ship")
    parity = compare_logits(expected, found)
    if parity.rms_ratio > RMS_RATIO_LIMIT:
        raise ExportError(
            f"{name}: logits differ from the dequantized model by {parity.rms_ratio:.3f} of their standard deviation"
            f" (limit {RMS_RATIO_LIMIT}); the file must not ship"
        )
    return parity


def require_same_weights(name: str, expected: Weights, found: Weights) -> None:
    """Compare what a container's reader returned with what was to be stored, bit for bit.

    Raises:
        ExportError: A tensor is missing, or a code or a scale differs.
    """
    if missing := sorted(set(expected) ^ set(found)):
        raise ExportError(f"{name}: tensors differ: {', '.join(missing[:5])}")
    for tensor, value in expected.items():
        other = found[tensor]
        if isinstance(value, QuantizedTensor) and isinstance(other, QuantizedTensor):
            same = _same_codes(value, other)
        else:
            same = not isinstance(value, QuantizedTensor) and np.array_equal(value, other)  # type: ignore[arg-type]
        if not same:
            raise ExportError(f"{name}: {tensor} differs from the stored codes")


def load_dequantized(model: Any, weights: Weights) -> Any:
    """Put what the codes mean into a transformers model of the same sizes, in place (padding cut off)."""
    import torch

    state = model.state_dict()
    with torch.no_grad():
        for name, value in weights.items():
            array = dequantize(value) if isinstance(value, QuantizedTensor) else value
            target = state[name]
            target.copy_(torch.from_numpy(array[tuple(slice(size) for size in target.shape)].copy()))
        if _HEAD not in weights:  # a copy of the embedding in the checkpoint, stored once in the codes
            state[_HEAD].copy_(state[_EMBEDDING])
    return model


def run_bench(python: Path, package: Path, container: str, *, threads: int, arguments: Sequence[str]) -> Any:
    """Run ``python -m edge_runtime bench --json`` in a fresh process and return its JSON.

    Raises:
        BackendError: The process failed; its last line is in the message.
    """
    return run_edge(python, "bench", package, container, threads=threads, arguments=arguments)


def run_edge(
    python: Path, command: str, package: Path, container: str, *, threads: int, arguments: Sequence[str]
) -> Any:
    """Run one command of edge_runtime with ``--json`` in a fresh process of any interpreter.

    Raises:
        BackendError: The process failed or printed no JSON.
    """
    line = _command_line(python, command, package, container, threads, arguments)
    done = subprocess.run(line, capture_output=True, text=True, timeout=_RUN_TIMEOUT_S, env=_environment(), check=False)
    _require_success(container, python, done.returncode, done.stderr)
    try:
        return json.loads(done.stdout)
    except ValueError as error:
        raise BackendError(f"{container} in {python}: printed no JSON") from error


def piped_logits(
    python: Path, package: Path, container: str, tokens: NDArray[np.int32], *, threads: int
) -> Generator[FloatArray]:
    """Run ``bench --score`` in a fresh process and take (T, V) logits of each row of (S, T) tokens as they come.

    Raises:
        BackendError: The process failed, or ended early.
    """
    with TemporaryDirectory() as folder, ExitStack() as stack:
        np.save(Path(folder) / "tokens.npy", tokens)
        reading, writing = os.pipe()
        source = stack.enter_context(os.fdopen(reading, "rb"))
        sink, complaints = stack.enter_context(os.fdopen(writing, "wb")), stack.enter_context(TemporaryFile("w+"))
        line = _command_line(
            python, "bench", package, container, threads,
            ["--repeat", "0", "--score", f"{folder}/tokens.npy", "--logits-out", f"/dev/fd/{writing}"],
        )  # fmt: skip
        process = subprocess.Popen(
            line, stdout=subprocess.DEVNULL, stderr=complaints, env=_environment(), pass_fds=(writing,)
        )
        stack.callback(_end, process)
        sink.close()  # the process holds the other end now: when it ends, so does the stream
        whole = False
        try:
            shape, _, dtype = np.lib.format.read_array_header_1_0(source) if _is_npy(source) else ((), False, None)
            if shape[:2] == tokens.shape and len(shape) == 3 and dtype == np.float32:
                size = 4 * shape[1] * shape[2]
                for _ in range(shape[0]):
                    if len(row := source.read(size)) < size:
                        break
                    yield np.frombuffer(row, np.float32).reshape(shape[1:])
                else:
                    whole = True
        except ValueError:
            whole = False
        code = process.wait(_RUN_TIMEOUT_S)
        complaints.seek(0)
        _require_success(container, python, code, complaints.read())
        if not whole:
            raise BackendError(f"{container} in {python}: its logits end early")


def _is_npy(source: BinaryIO) -> bool:
    return source.read(8) == np.lib.format.magic(1, 0)


def _end(process: subprocess.Popen[bytes]) -> None:
    """A process that nobody listens to any more."""
    if process.poll() is None:
        process.kill()
    process.wait()


def _command_line(
    python: Path, command: str, package: Path, container: str, threads: int, arguments: Sequence[str]
) -> list[str]:
    return [
        str(python), "-m", "edge_runtime", command, "--package", str(package), "--container", container,
        "--threads", str(threads), "--json", *arguments,
    ]  # fmt: skip


def _require_success(container: str, python: Path, code: int, complaints: str) -> None:
    if code:
        last = (complaints.strip().splitlines() or ["no message"])[-1]
        raise BackendError(f"{container} in {python}: exit {code}: {last}")


def _environment() -> Mapping[str, str]:
    root = Path(__file__).resolve().parent.parent.parent
    return {**os.environ, "PYTHONPATH": str(root), "PYTHONNOUSERSITE": "1"}


def _same_codes(value: QuantizedTensor, other: QuantizedTensor) -> bool:
    """Every code and scale, a block of rows after the other; codes of the padding may differ."""
    if (value.shape, value.scales.shape) != (other.shape, other.scales.shape):
        return False
    if not np.array_equal(value.scales.view(np.uint16), other.scales.view(np.uint16)):
        return False
    blocks = range(0, value.shape[0], max(1, _BLOCK_CODES // value.padded_columns))
    return all(
        _same_block(value.rows(start, start + blocks.step), other.rows(start, start + blocks.step)) for start in blocks
    )


def _same_block(value: QuantizedTensor, other: QuantizedTensor) -> bool:
    if value.bits == other.bits and np.array_equal(value.packed, other.packed):
        return True
    return np.array_equal(value.codes[:, : value.columns], other.codes[:, : other.columns])
