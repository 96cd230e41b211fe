"""What a plan brings to a device: the factors that it does not hold yet.

A part is one group of factors, stored as the difference to the start that everyone derives from the seed: the
difference is small, so a few bits describe it well. The server keeps the encoded bytes and adopts what they
decode to, so that it and every device compute with the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.codec import Codec, chunks, decode, encode, encoded_bytes
from edge_runtime.formats.errors import MessageError
from edge_runtime.formats.layout import AdapterLayout, Factors, initial_factors
from edge_runtime.formats.messages import Part


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One group of factors at rank r_max, as it is sent.

    Attributes:
        version: Grows with every change; 0 is the start.
        raw: Encoded difference to the start; a smaller rank takes a prefix. Empty at version 0.
    """

    group: str
    version: int
    codec: Codec
    raw: bytes


@lru_cache(maxsize=4)
def initial_vector(layout: AdapterLayout, group: str, rank: int, seed: int) -> NDArray[np.float32]:
    """Version 0 of a group as a vector (n,), not to be written to: lora_A from the seed, everything else zero."""
    if group == "a":
        vector = layout.flatten(initial_factors(layout, seed), ("a",), rank)
    else:
        vector = np.zeros(layout.size((group,), rank), np.float32)
    vector.flags.writeable = False
    return vector


def take_snapshot(
    layout: AdapterLayout, group: str, version: int, wanted: Sequence[NDArray[Any]], codec: Codec, seed: int
) -> tuple[Snapshot, NDArray[np.float32], NDArray[np.float32]]:
    """Encode a group.

    Args:
        layout: The federation's adapter.
        group: From its layout.
        version: What it is sent as.
        wanted: Arrays (n,) at rank r_max whose sum, in float64 and from the left, the group should become.
        codec: How it is sent.
        seed: Of the start.

    Returns:
        The snapshot, what it decodes to, and what is missing from that to the sum: float32 (n,) both.
    """
    sizes = layout.segment_sizes((group,), layout.max_rank)
    start = initial_vector(layout, group, layout.max_rank, seed)
    difference = np.empty(start.size, np.float32)
    for chunk in chunks(0, start.size):
        difference[chunk] = _summed(wanted, chunk) - start[chunk]
    raw = encode(difference, sizes, codec)
    values, missing = decode(raw, sizes, codec), difference
    values += start
    for chunk in chunks(0, start.size):
        missing[chunk] = _summed(wanted, chunk) - values[chunk]
    return Snapshot(group, version, codec, raw), values, missing


def pack_parts(
    layout: AdapterLayout, snapshots: Sequence[Snapshot], rank: int, held: Mapping[str, int]
) -> tuple[tuple[Part, ...], bytes]:
    """Headers and payload for a device of the given rank that holds some versions already."""
    parts, payload = [], b""
    for snapshot in snapshots:
        known = snapshot.version == 0 or held.get(snapshot.group) == snapshot.version
        size = 0 if known else encoded_bytes(layout.segment_sizes((snapshot.group,), rank), snapshot.codec)
        parts.append(Part(snapshot.group, snapshot.version, snapshot.codec, size))
        payload += snapshot.raw[:size]
    return tuple(parts), payload


def unpack_parts(
    layout: AdapterLayout,
    parts: Sequence[Part],
    payload: bytes,
    rank: int,
    seed: int,
    held: Mapping[tuple[str, int], NDArray[np.float32]],
) -> dict[tuple[str, int], NDArray[np.float32]] | None:
    """Group vectors (n,) by (group, version); None when a part was left out that is not in ``held``.

    Args:
        layout: The federation's adapter.
        parts: From a plan.
        payload: From its envelope.
        rank: The plan's rank.
        seed: The plan's seed.
        held: Vectors of earlier plans at this rank.

    Raises:
        MessageError: A group twice, lora_A or lora_B missing, or bytes that are not what the parts say.
    """
    groups = [part.group for part in parts]
    if len(set(groups)) != len(groups) or not {"a", "b"} <= set(groups):
        raise MessageError(f"plan: parts {groups}; a, b and at most one core are allowed")
    if sum(part.size_bytes for part in parts) != len(payload):
        raise MessageError(f"plan: parts of {sum(p.size_bytes for p in parts)} bytes, a payload of {len(payload)}")
    if any(part.size_bytes for part in parts if part.version == 0):
        raise MessageError("plan: bytes for version 0, which everyone derives")
    vectors: dict[tuple[str, int], NDArray[np.float32]] = {}
    offset = 0
    for part in parts:
        key = (part.group, part.version)
        if part.version == 0:
            vectors[key] = initial_vector(layout, part.group, rank, seed)
        elif part.size_bytes:
            raw = payload[offset : offset + part.size_bytes]
            vectors[key] = decode(raw, layout.segment_sizes((part.group,), rank), part.codec)
            vectors[key] += initial_vector(layout, part.group, rank, seed)
        elif key in held and held[key].size == layout.size((part.group,), rank):
            vectors[key] = held[key]
        else:
            return None
        offset += part.size_bytes
    return vectors


def to_factors(layout: AdapterLayout, vectors: Mapping[tuple[str, int], NDArray[np.float32]], rank: int) -> Factors:
    """The factors of exactly ``rank`` ranks from vectors by (group, version)."""
    factors: Factors = {}
    for (group, _), vector in vectors.items():
        factors |= layout.unflatten(vector, (group,), rank)
    return factors


def _summed(arrays: Sequence[NDArray[Any]], chunk: slice) -> NDArray[np.float64]:
    total = arrays[0][chunk].astype(np.float64)
    for array in arrays[1:]:
        total += array[chunk]
    return total
