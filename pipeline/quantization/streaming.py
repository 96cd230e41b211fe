"""From a checkpoint to codes, block by block: a 7B in a small part of its own size of memory.

Sizes are known before the first weight is read, so the file's header comes first and every tensor is written at its
place, several at once. The file grows in a folder of its own, with a journal of what is finished: a run that was
killed, or stopped by a full disk, goes on. The file takes its name when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.errors import ExportError, UserError
from edge_runtime.formats.int4 import CODE_RANGE, QuantizedTensor
from pipeline.artifacts import room_on_disk
from pipeline.quantization.grid import Grid
from pipeline.quantization.journal import Journal, checksum, open_journal
from pipeline.quantization.rounding import FloatArray, codes_of_scale, quantize_rows, tensor_scale
from pipeline.quantization.source import Checkpoint, SourceTensor, read_rows, row_blocks
from pipeline.quantization.weight_file import Place, WeightLayout, allocate, lay_out, write_at

RowQuantizer = Callable[[int, FloatArray], QuantizedTensor]  # from (first row, rows) to their codes
Report = Callable[[int, str], None]
_PARTIAL, _JOURNAL = "weights.partial", "journal.jsonl"


@dataclass(frozen=True, slots=True)
class TensorFigures:
    """How near the codes of a matrix are to its weights.

    Attributes:
        squared_error: Summed over the matrix.
        squared_norm: Of the weights.
        scale_min: Smallest magnitude of a scale.
        scale_max: Largest magnitude of a scale.
        ends_share: Share of the weights whose code is the lowest or the highest one.
    """

    squared_error: float
    squared_norm: float
    scale_min: float
    scale_max: float
    ends_share: float

    @property
    def relative_error(self) -> float:
        """Squared error over squared norm."""
        return self.squared_error / max(self.squared_norm, 1e-30)


def quantize_checkpoint(
    checkpoint: Checkpoint,
    grids: Mapping[str, Grid],
    rounding: str,
    output: Path,
    work: Path,
    *,
    importance: Mapping[str, FloatArray] | None = None,
    workers: int = 1,
    report: Report | None = None,
) -> dict[str, TensorFigures]:
    """Write ``output``, a file of ``formats/int4``, with codes chosen weight by weight.

    Args:
        checkpoint: What is quantized.
        grids: Of every matrix; group 0 is one scale for the whole matrix, with the largest weight on the range's end.
        rounding: As ``quantize_rows`` takes it.
        output: Replaced at the end, all at once.
        work: Folder of the unfinished file; what a run that ended early finished there is used. Gone at the end.
        importance: (K,) by matrix, for ``mse``; matrices that it lacks weigh all columns alike.
        workers: Matrices that are worked on at once. The bytes do not depend on it.
        report: Told how many tensors are finished, and the name of the last one.

    Returns:
        Figures of every matrix.

    Raises:
        UserError: As ``write_weights``.
        ExportError: fp16 cannot hold a scale.
    """
    factors = importance or {}

    def open_tensor(tensor: SourceTensor) -> RowQuantizer:
        grid = grids[tensor.name]
        if grid.group:
            return lambda _start, rows: quantize_rows(rows, grid, rounding, factors.get(tensor.name))
        scale = tensor_scale(max(float(np.abs(rows).max(initial=0)) for _, rows in _blocks(tensor)))
        return lambda _start, rows: codes_of_scale(rows, scale)

    weighing = {name: zlib.crc32(value.tobytes()) for name, value in sorted(factors.items())}
    identity = json.dumps([rounding, weighing])
    return write_weights(
        checkpoint, grids, open_tensor, output, work, identity=identity, workers=workers, report=report
    )


def stored_codes(weights: Mapping[str, QuantizedTensor]) -> Callable[[SourceTensor], RowQuantizer]:
    """For ``write_weights``: codes that are already chosen; each tensor is looked up once."""

    def open_tensor(tensor: SourceTensor) -> RowQuantizer:
        codes = weights[tensor.name]
        return lambda start, rows: codes.rows(start, start + len(rows))

    return open_tensor


def write_weights(
    checkpoint: Checkpoint,
    grids: Mapping[str, Grid],
    open_tensor: Callable[[SourceTensor], RowQuantizer],
    output: Path,
    work: Path,
    *,
    identity: str,
    vectors: Mapping[str, FloatArray] | None = None,
    workers: int = 1,
    report: Report | None = None,
) -> dict[str, TensorFigures]:
    """Write ``output`` with codes from anywhere, and compare them with the checkpoint's weights.

    Args:
        checkpoint: Where floats come from: vectors, and what codes are compared with.
        grids: Of every matrix, in the order in which they are begun.
        open_tensor: Called once for a matrix; what it returns is called for its blocks of rows in order.
        output: As in ``quantize_checkpoint``.
        work: As in ``quantize_checkpoint``.
        identity: What the codes depend on beside checkpoint and grids; unfinished work of another one is dropped.
        vectors: Norms and biases that take the place of the checkpoint's.
        workers: As in ``quantize_checkpoint``.
        report: As in ``quantize_checkpoint``.

    Raises:
        UserError: A weight is not finite, a shard became shorter, a grid is missing, or the disk is full.
    """
    if set(grids) != set(checkpoint.matrices):
        different = sorted(set(grids) ^ set(checkpoint.matrices))[0]
        raise UserError("grids", different, "one grid for every matrix of the checkpoint, and no other")
    layout = lay_out(checkpoint.spec, {name: tensor.shape for name, tensor in checkpoint.tensors.items()}, grids)
    with room_on_disk(work, layout.total_bytes):
        work.mkdir(parents=True, exist_ok=True)
        with _unfinished(work, layout, _made_from(checkpoint, layout, grids, identity)) as (descriptor, journal):
            job = _Job(descriptor, layout, journal, grids, open_tensor, vectors or {}, threading.Event())
            names = [*grids, *(name for name in checkpoint.tensors if name not in grids)]
            _work_off(job, [checkpoint.tensors[name] for name in names], workers, report)
            os.fsync(descriptor)
        beside = output.with_name(output.name + ".partial")
        shutil.move(work / _PARTIAL, beside)  # a rename, unless work lies on another disk
        beside.replace(output)
        shutil.rmtree(work)
    return {name: TensorFigures(**journal.finished[name]["figures"]) for name in checkpoint.tensors if name in grids}


@dataclass(frozen=True, slots=True)
class _Job:
    descriptor: int
    layout: WeightLayout
    journal: Journal
    grids: Mapping[str, Grid]
    open_tensor: Callable[[SourceTensor], RowQuantizer]
    vectors: Mapping[str, FloatArray]
    stopped: threading.Event

    def places(self, name: str) -> list[Place]:
        parts = [f"{name}.codes", f"{name}.scales"] if name in self.grids else [name]
        return [self.layout.places[part] for part in parts]


def _made_from(checkpoint: Checkpoint, layout: WeightLayout, grids: Mapping[str, Grid], identity: str) -> str:
    files = {tensor.path for tensor in checkpoint.tensors.values()}
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    described = {name: asdict(grid) for name, grid in grids.items()}
    values = json.dumps([states, described, identity], sort_keys=True).encode()
    return hashlib.sha256(layout.header + values).hexdigest()


@contextmanager
def _unfinished(work: Path, layout: WeightLayout, identity: str) -> Iterator[tuple[int, Journal]]:
    with open_journal(work / _JOURNAL, identity) as journal:
        descriptor = os.open(work / _PARTIAL, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            allocate(descriptor, layout.total_bytes)
            write_at(descriptor, layout.header, 0)
            yield descriptor, journal
        finally:
            os.close(descriptor)


def _work_off(job: _Job, tensors: list[SourceTensor], workers: int, report: Report | None) -> None:
    """Write all tensors; the first failure stops the others at their next block."""
    with ThreadPoolExecutor(workers) as pool:
        futures: dict[Future[None], str] = {pool.submit(_finish, job, tensor): tensor.name for tensor in tensors}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                if report is not None:
                    report(done, futures[future])
        finally:  # also when this thread is interrupted
            job.stopped.set()
            pool.shutdown(cancel_futures=True)


def _finish(job: _Job, tensor: SourceTensor) -> None:
    """Write one tensor unless the journal says that it is there."""
    known = job.journal.finished.get(tensor.name)
    if job.stopped.is_set() or (known and checksum(job.descriptor, job.places(tensor.name)) == known["crc32"]):
        return
    try:
        values = _write_matrix(job, tensor) if tensor.name in job.grids else _write_vector(job, tensor)
    except BaseException as error:
        job.stopped.set()
        if isinstance(error, ValueError):
            raise ExportError(f"{tensor.name}: {error}; it cannot be quantized") from error
        raise
    if values:
        job.journal.note(tensor.name, values)


def _write_vector(job: _Job, tensor: SourceTensor) -> dict[str, Any]:
    values = np.asarray(job.vectors.get(tensor.name, read_rows(tensor)), np.float32)
    if values.shape != tensor.shape:
        raise ValueError(f"a vector of shape {values.shape}, the decoder has {tensor.shape}")
    content = values.tobytes()
    write_at(job.descriptor, content, job.places(tensor.name)[0].offset_bytes)
    return {"crc32": [zlib.crc32(content)]}


def _write_matrix(job: _Job, tensor: SourceTensor) -> dict[str, Any]:
    codes_place, scales_place = job.places(tensor.name)
    quantize, bits = job.open_tensor(tensor), job.grids[tensor.name].bits
    scales, sums, at_ends, crc = [], np.zeros((tensor.shape[0], 2)), 0, 0
    for start, rows in _blocks(tensor):
        if job.stopped.is_set():
            return {}
        block = quantize(start, rows)
        codes = block.codes
        if (block.bits, block.packed.shape[1]) != (bits, codes_place.shape[1]) or len(codes) != len(rows):
            raise ValueError(f"codes of {block.bits} bits and shape {codes.shape} do not fit the grid asked for")
        content = block.packed.tobytes()
        write_at(job.descriptor, content, codes_place.offset_bytes + start * codes_place.row_bytes)
        crc = zlib.crc32(content, crc)
        sums[start : start + len(rows)] = _squared_sums(rows, codes, block.scales)
        low, high = CODE_RANGE[bits]
        at_ends += int(np.count_nonzero((codes == low) | (codes == high)))  # padding is 0
        scales.append(block.scales)
    joined = np.concatenate(scales) if scales_place.shape[0] > 1 else scales[0]
    if joined.shape != scales_place.shape:
        raise ValueError(f"scales of shape {joined.shape}, the grid asked for has {scales_place.shape}")
    content = joined.tobytes()
    write_at(job.descriptor, content, scales_place.offset_bytes)
    error, norm = sums.sum(axis=0).tolist()
    magnitudes = np.abs(joined)
    figures = TensorFigures(
        error, norm, float(magnitudes.min()), float(magnitudes.max()), at_ends / math.prod(tensor.shape)
    )
    return {"crc32": [crc, zlib.crc32(content)], "figures": asdict(figures)}


def _blocks(tensor: SourceTensor) -> Iterator[tuple[int, FloatArray]]:
    for start, stop in row_blocks(tensor):
        yield start, read_rows(tensor, start, stop)


def _squared_sums(rows: FloatArray, codes: NDArray[np.int8], scales: NDArray[np.float16]) -> NDArray[np.float64]:
    """Squared error and squared norm of each row (N, K), as (N, 2)."""
    grouped = codes.astype(np.float32).reshape(len(codes), scales.shape[1], -1)
    grouped *= scales.astype(np.float32)[:, :, None]
    error = grouped.reshape(len(codes), -1)[:, : rows.shape[1]]
    error -= rows
    return np.stack([np.square(values).sum(axis=1, dtype=np.float64) for values in (error, rows)], axis=1)
