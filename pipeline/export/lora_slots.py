"""Which projections of an exported decoder take an adapter, and how large it may be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoraSlots:
    """Adapter inputs of an exported file.

    Only the projections that are really adapted get slots: empty ones cost decode speed (16-40 % on all seven).

    Attributes:
        targets: Projections with a slot in every layer, of ``decoder.PROJECTIONS`` (``("q_proj", "v_proj")``).
        rank: Largest rank that the file accepts. Containers with static shapes pad smaller ones with zeros.
    """

    targets: tuple[str, ...]
    rank: int
