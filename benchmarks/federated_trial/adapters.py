"""What a client trains: the factors of LoRA, or a small core between fixed bases, as one flat vector a client.

Both come down to two factors a linear, ``left`` (out, r) and ``right`` (r, in): the linear is base + scale left right.
Gradients of the merged linears are turned into gradients of the vector here, so that the model never sees an adapter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.federated_trial.model import Shape


class Adapter(Protocol):
    """A parametrisation of the update of every linear."""

    @property
    def parts(self) -> dict[str, slice]:
        """Where each part that is trained and sent by itself lies in the vector."""

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""

    def initial(self, generator: torch.Generator) -> Tensor:
        """The vector (n,) that a round 0 starts from: no update."""

    def factors(self, vectors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of every slot: left (N k, out, r) and right (N k, r, in), k linears side by side; vectors (N, n)."""

    def gradient(self, vectors: Tensor, weight_gradients: list[Tensor]) -> Tensor:
        """(N, n) in float32 from the gradients (N k, out, in) of every slot's linears."""


@dataclass(frozen=True, slots=True)
class Lora:
    """A and B of one rank on all linears: all A first, then all B."""

    shape: Shape
    rank: int = 8
    alpha: float = 16.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def parts(self) -> dict[str, slice]:
        a = sum(n * self.rank * inputs for n, _, inputs in self.shape.linears())
        b = sum(n * self.rank * outputs for n, outputs, _ in self.shape.linears())
        return {"a": slice(0, a), "b": slice(a, a + b)}

    def initial(self, generator: torch.Generator) -> Tensor:
        pieces = [
            (2 * torch.rand(n * self.rank * inputs, generator=generator) - 1) / math.sqrt(inputs)
            for n, _, inputs in self.shape.linears()
        ]
        b = self.parts["b"]
        return torch.cat([*pieces, torch.zeros(b.stop - b.start)])

    def factors(self, vectors: Tensor) -> list[tuple[Tensor, Tensor]]:
        found = []
        for (_, outputs, inputs), a, b in self._slots():
            right = vectors[:, a].reshape(-1, self.rank, inputs)
            found.append((vectors[:, b].reshape(-1, outputs, self.rank), right))
        return found

    def gradient(self, vectors: Tensor, weight_gradients: list[Tensor]) -> Tensor:
        result = vectors.new_empty(vectors.shape, dtype=torch.float32)
        pairs = zip(self.factors(vectors), weight_gradients, self._slots(), strict=True)
        for (left, right), gradient, (_, a, b) in pairs:
            result[:, a] = (left.transpose(1, 2) @ gradient).view(len(vectors), -1)
            result[:, b] = (gradient @ right.transpose(1, 2)).view(len(vectors), -1)
        return result.mul_(self.scale)

    def _slots(self) -> list[tuple[tuple[int, int, int], slice, slice]]:
        found, a, b = [], 0, self.parts["b"].start
        for n, outputs, inputs in self.shape.linears():
            a_size, b_size = n * self.rank * inputs, n * self.rank * outputs
            found.append(((n, outputs, inputs), slice(a, a + a_size), slice(b, b + b_size)))
            a, b = a + a_size, b + b_size
        return found


@dataclass(frozen=True, slots=True)
class Core:
    """A square core of ``rank`` between fixed bases of every linear; only the core is trained and sent.

    Attributes:
        shape: The model's sizes.
        rank: Side of the core.
        lefts: Of every slot the left basis (k, out, rank).
        rights: Of every slot the right basis (k, rank, in).
        scale: What the product is multiplied by.
    """

    shape: Shape
    rank: int
    lefts: list[Tensor]
    rights: list[Tensor]
    scale: float = 1.0

    @property
    def parts(self) -> dict[str, slice]:
        return {"core": slice(0, sum(n for n, _, _ in self.shape.linears()) * self.rank**2)}

    def initial(self, generator: torch.Generator) -> Tensor:
        return torch.zeros(self.parts["core"].stop)

    def factors(self, vectors: Tensor) -> list[tuple[Tensor, Tensor]]:
        found = []
        for part, left, right in self._slots():
            cores = vectors[:, part].reshape(len(vectors), len(left), self.rank, self.rank)
            mixed = (cores @ right.to(vectors.dtype)).reshape(-1, self.rank, right.shape[-1])
            lefts = left.to(vectors.dtype).expand(len(vectors), -1, -1, -1).reshape(-1, *left.shape[1:])
            found.append((lefts, mixed))
        return found

    def gradient(self, vectors: Tensor, weight_gradients: list[Tensor]) -> Tensor:
        result = vectors.new_empty(vectors.shape, dtype=torch.float32)
        for (part, left, right), gradient in zip(self._slots(), weight_gradients, strict=True):
            sides = gradient.view(len(vectors), len(left), *gradient.shape[1:])
            inner = left.to(gradient.dtype).transpose(1, 2) @ sides @ right.to(gradient.dtype).transpose(1, 2)
            result[:, part] = inner.reshape(len(vectors), -1)
        return result.mul_(self.scale)

    def _slots(self) -> list[tuple[slice, Tensor, Tensor]]:
        found, start = [], 0
        for left, right in zip(self.lefts, self.rights, strict=True):
            size = len(left) * self.rank**2
            found.append((slice(start, start + size), left, right))
            start += size
        return found


def core_between(shape: Shape, rank: int, linears: list[Tensor] | None, generator: torch.Generator) -> Core:
    """A core between the leading singular vectors of the base's ``linears`` (k, out, in), or random bases without."""
    lefts, rights = [], []
    for slot, (n, outputs, inputs) in enumerate(shape.linears()):
        source = linears[slot].cpu() if linears is not None else torch.randn(n, outputs, inputs, generator=generator)
        left, _, right = torch.linalg.svd(source.float(), full_matrices=False)
        lefts.append(left[:, :, :rank].contiguous())
        rights.append(right[:, :rank].contiguous())
    return Core(shape, rank, lefts, rights)
