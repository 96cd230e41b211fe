"""The teacher's signal on disk: recorded once, shard by shard, and read by every student.

Each shard has a random stream of its own and is renamed into place whole, so a recording that is killed
anywhere and started again ends with the same bytes; a shard that is missing, cut or changed is recorded
again, the others are left alone.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from edge_runtime.formats.errors import UserError
from pipeline.distillation.signals import SparseSignal, checked_head, draw, head_logits, last_hidden
from pipeline.distillation.target_codec import (
    DamagedShardError,
    ShardHeader,
    TargetKind,
    decode_draws,
    decode_top_k,
    encode_draws,
    encode_top_k,
    id_bits,
    seal_shard,
    unseal_shard,
)

if TYPE_CHECKING:
    from pipeline.distillation.batches import Batch

_VERIFIERS = 4  # threads; hashing and reading leave the interpreter
_RECORD_AGAIN = "run the targets stage again: only these are recorded"


@dataclass(frozen=True, slots=True)
class Recording:
    """How targets are recorded; everything but batch and chunk is part of what they are.

    Attributes:
        draws: Samples a position (12..64), or the K of a top-k.
        seed: Of the random streams.
        bf16: Multiply in bfloat16.
        kind: Draws; a top-k is biased and there to be compared.
        shard_sequences: Sequences a shard (1..65536): what a kill costs at most.
        batch_sequences: Sequences in one pass of the teacher (1..1024).
        chunk_positions: Positions whose logits exist at once (1..65536): 8 bytes times the vocabulary each.
        teacher_digest: Identity of the teacher's weights; shards of another teacher are recorded again.
    """

    draws: int
    seed: int
    bf16: bool
    kind: TargetKind = TargetKind.DRAWS
    shard_sequences: int = 256
    batch_sequences: int = 8
    chunk_positions: int = 1024
    teacher_digest: str = ""


@dataclass(frozen=True, slots=True)
class StoredTargets:
    """Verified shards.

    Attributes:
        header: What all shards have in common, as the first one says it.
        paths: The shards in order.
        offsets: Where the sequences of each shard begin and end.
    """

    header: ShardHeader
    paths: tuple[Path, ...]
    offsets: tuple[NDArray[np.uint64], ...]

    @classmethod
    def open(cls, directory: Path) -> StoredTargets:
        """Verify every shard of a directory: length, digest, place among the others.

        Raises:
            UserError: There are none, or some are missing or damaged; the message names them.
        """
        total, size = _extent(directory)
        paths = tuple(shard_path(directory, number) for number in range(-(-total // size)))
        with ThreadPoolExecutor(_VERIFIERS) as threads:
            found = list(threads.map(_verify, paths))
        header = next(entry[0] for entry in found if not isinstance(entry, str))
        faults = [
            f"{path.name} {fault}"
            for number, (path, entry) in enumerate(zip(paths, found, strict=True))
            if (fault := entry if isinstance(entry, str) else _misplaced(entry[0], header, number * size, size))
        ]
        if faults:
            raise UserError("targets", "; ".join(faults[:8]), f"{len(paths)} whole shards", _RECORD_AGAIN)
        return cls(header, paths, tuple(entry[1] for entry in found if not isinstance(entry, str)))

    def read(self, rows: NDArray[np.int64]) -> SparseSignal:
        """Decode sequences ``rows`` (B,), in the CPU's memory.

        Raises:
            UserError: A row does not exist, or its shard was damaged after it was opened.
        """
        header = self.header
        decode = decode_draws if header.kind is TargetKind.DRAWS else decode_top_k
        shape = (len(rows), header.sequence_tokens, header.draws)
        ids, weights = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        for index, row in enumerate(rows.tolist()):
            if not 0 <= row < header.total_sequences:
                raise UserError("targets", f"sequence {row}", f"0..{header.total_sequences - 1}", _RECORD_AGAIN)
            shard, place = divmod(row, len(self.offsets[0]) - 1)
            try:
                decode(self._record(shard, place), header.vocabulary, ids[index], weights[index])
            except (DamagedShardError, OSError) as error:
                raise UserError(
                    "targets", f"{self.paths[shard].name}: {error}", "whole shards", _RECORD_AGAIN
                ) from None
        return SparseSignal(torch.from_numpy(ids), torch.from_numpy(weights))

    def signal(self, batch: Batch) -> SparseSignal:
        """The signal of a batch's rows, in the CPU's memory.

        Raises:
            UserError: As ``read``, or the sequences are not as long as those that were stored.
        """
        tokens = batch.tokens.shape[1]
        if tokens != self.header.sequence_tokens:
            raise UserError("sequence_tokens", tokens, f"{self.header.sequence_tokens}, as the targets", _RECORD_AGAIN)
        return self.read(batch.rows)

    def _record(self, shard: int, place: int) -> bytes:
        start, end = (int(offset) for offset in self.offsets[shard][place : place + 2])
        with self.paths[shard].open("rb", buffering=0) as file:
            file.seek(start)
            return file.read(end - start)


def record_targets(
    teacher: Any,
    sequences: NDArray[np.int32],
    directory: Path,
    *,
    draws: int,
    seed: int,
    bf16: bool,
    **settings: Any,
) -> Iterator[int]:
    """Run a causal teacher over sequences (S, T), which may be mapped from disk, and store what it says.

    Args:
        teacher: On any device, in fp32, bf16, 8 or 4 bits.
        sequences: Tokens of the teacher's vocabulary.
        directory: One of its own; made when it is missing.
        draws: As in ``Recording``, as are the following.
        seed: Of the random streams.
        bf16: Multiply in bfloat16.
        settings: The other fields of ``Recording``.

    Yields:
        Sequences done, after each shard, those found whole from an earlier run included.

    Raises:
        UserError: The teacher is not causal or gives logits that are not finite, a token is outside its
            vocabulary, or the disk is full.
    """
    recording = Recording(draws, seed, bf16, **settings)
    head = checked_head(teacher)
    head = head.to(torch.bfloat16) if recording.bf16 else head
    directory.mkdir(parents=True, exist_ok=True)
    _discard_others(directory, -(-len(sequences) // recording.shard_sequences))
    for number, first in enumerate(range(0, len(sequences), recording.shard_sequences)):
        tokens = np.ascontiguousarray(sequences[first : first + recording.shard_sequences])
        header = ShardHeader(
            recording.kind, len(head), recording.draws, sequences.shape[1], len(tokens), first, len(sequences), 0,
            _origin(recording, tokens),
        )  # fmt: skip
        path = shard_path(directory, number)
        if not _is_recorded(path, header):
            _require_tokens(tokens, len(head))
            _write(path, seal_shard(header, _records(teacher, head, tokens, recording, number)))
        yield first + len(tokens)


def shard_path(directory: Path, number: int) -> Path:
    """Where a shard lies."""
    return directory / f"{number:06d}.targets"


def bound_bytes(positions: int, vocabulary: int, draws: int) -> int:
    """What draws of so many positions take on disk at most, for a plan."""
    return positions * -(-draws // 8) + -(-positions * draws * id_bits(vocabulary) // 8)


def _records(
    teacher: Any, head: torch.Tensor, tokens: NDArray[np.int32], recording: Recording, number: int
) -> list[bytes]:
    """Each sequence of a shard, encoded by a thread while the teacher reads on."""
    generator = torch.Generator().manual_seed(_stream(recording.seed, number))
    encode: Callable[..., bytes] = encode_draws if recording.kind is TargetKind.DRAWS else encode_top_k
    waiting: list[Future[bytes]] = []
    with ThreadPoolExecutor(1, thread_name_prefix="targets") as coder:
        for start in range(0, len(tokens), recording.batch_sequences):
            batch = torch.from_numpy(tokens[start : start + recording.batch_sequences].astype(np.int64))
            hidden = last_hidden(teacher, batch, recording.bf16)
            try:
                columns = _say(hidden, head, recording, generator)
            except FloatingPointError as error:
                raise UserError("teacher", str(error), "finite logits", "load it in bf16 or fp32") from None
            waiting += [coder.submit(encode, *arrays, len(head)) for arrays in zip(*columns, strict=True)]
        return [future.result() for future in waiting]


def _say(
    hidden: torch.Tensor, head: torch.Tensor, recording: Recording, generator: torch.Generator
) -> list[NDArray[Any]]:
    """What is encoded of hidden states (B, T, H), each (B, T, K); where a chunk of logits ends changes no draw."""
    parts: list[tuple[torch.Tensor, ...]] = []
    for chunk in hidden.flatten(0, 1).split(recording.chunk_positions):
        logits = head_logits(chunk, head)
        if recording.kind is TargetKind.DRAWS:
            parts.append((draw(logits, recording.draws, generator).int(),))
        else:
            probabilities, ids = torch.softmax(logits, dim=-1).topk(recording.draws, dim=-1)
            parts.append((ids.int(), probabilities))
    return [torch.cat(column).cpu().numpy().reshape(*hidden.shape[:2], -1) for column in zip(*parts, strict=True)]


def _stream(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"targets {seed} {number}".encode()).digest()[:7], "little")


def _origin(recording: Recording, tokens: NDArray[np.int32]) -> bytes:
    """Digest of what a shard's draws depend on besides its header."""
    settings = [recording.seed, recording.bf16, recording.shard_sequences, recording.teacher_digest]
    digest = hashlib.sha256(json.dumps(settings).encode())
    digest.update(tokens.astype("<i4", copy=False).data)
    return digest.digest()


def _require_tokens(tokens: NDArray[np.int32], vocabulary: int) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        value = f"token {low if low < 0 else high}"
        raise UserError("sequences", value, f"0..{vocabulary - 1}, the teacher's vocabulary", "use its tokenizer")


def _is_recorded(path: Path, expected: ShardHeader) -> bool:
    found = _verify(path)
    return not isinstance(found, str) and _identity(found[0]) == _identity(expected)


def _identity(header: ShardHeader) -> tuple[object, ...]:
    return (
        header.kind, header.vocabulary, header.draws, header.sequence_tokens, header.num_sequences, header.first,
        header.total_sequences, header.origin,
    )  # fmt: skip


def _verify(path: Path) -> tuple[ShardHeader, NDArray[np.uint64]] | str:
    """A shard's header and index, or in words what is wrong with it."""
    try:
        return unseal_shard(path.read_bytes())
    except FileNotFoundError:
        return "is missing"
    except (DamagedShardError, OSError) as error:
        return str(error)


def _extent(directory: Path) -> tuple[int, int]:
    """Sequences in all, and in each shard but the last, as the first shard that can be read says."""
    for path in sorted(directory.glob("*.targets")):
        found = _verify(path)
        if not isinstance(found, str):
            header = found[0]
            number = int(path.stem) if path.stem.isdecimal() else 0
            return header.total_sequences, max(1, header.first // number) if number else header.num_sequences
    raise UserError("targets", str(directory), "a folder with stored targets", "run the targets stage")


def _misplaced(header: ShardHeader, first: ShardHeader, start: int, size: int) -> str | None:
    same = ("kind", "vocabulary", "draws", "sequence_tokens", "total_sequences")
    if any(getattr(header, name) != getattr(first, name) for name in same):
        return "is of another recording"
    if (header.first, header.num_sequences) != (start, min(size, header.total_sequences - start)):
        return "is not in its place"
    return None


def _discard_others(directory: Path, num_shards: int) -> None:
    """Shards of a longer recording, and what a kill left."""
    kept = {shard_path(directory, number).name for number in range(num_shards)}
    for path in [*directory.glob("*.targets"), *directory.glob("*.targets.partial")]:
        if path.name not in kept:
            path.unlink()


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError("free disk", "none", f"{len(content)} bytes at {path.parent}", "free some space") from None
        raise
