"""Logits of a checkpoint of any size, layer by layer: with its own weights, or with what its codes mean.

Hidden states of all tokens stay in host memory, one layer's weights beside them; the head is multiplied in blocks of
rows for a few sequences at a time. So a 7B is read in a fifth of the memory that its weights take in fp32, and its
logits are those of the model's own forward pass within the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edge_runtime.formats.decoder import EMBEDDING, FINAL_NORM, HEAD
from edge_runtime.formats.int4 import QuantizedTensor, Weights
from pipeline.quantization.calibration import Decoder, LayerWeights, embed_batches, pass_layer
from pipeline.quantization.scales import unpack
from pipeline.quantization.source import Checkpoint, read_rows

BATCH_TOKENS = 2048  # that go through a layer at once
_LOGITS_BYTES = 256 << 20  # that exist at once, if they are not those of one sequence
_HEAD_BLOCK_WEIGHTS = 1 << 25
Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StreamedModel:
    """A checkpoint on disk, read as a ``Reader`` of pipeline/evaluation.

    Attributes:
        decoder: Computes in fp32.
        weights: Codes that stand in the place of its matrices, or None.
    """

    decoder: Decoder
    weights: Weights | None = None

    @classmethod
    def open(cls, source: Checkpoint, weights: Weights | None = None) -> StreamedModel:
        """Take an open checkpoint; nothing is read yet. It computes on the GPU if there is one."""
        return cls(Decoder.open(source, "cuda" if torch.cuda.is_available() else "cpu", torch.float32), weights)

    def rows(self, sequences: Sequence[Ids]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(index, (T, V) logits) of each sequence, in order; valid until the next is asked for."""
        yield from enumerate(self.logits(self.states(sequences)))

    @torch.no_grad()
    def states(self, sequences: Sequence[Ids]) -> list[torch.Tensor]:
        """What the head is multiplied with: (T, H) of each sequence, behind the last norm, in host memory."""
        decoder, batches = self.decoder, _batches(sequences)
        hidden = embed_batches(decoder, [tokens for _, tokens in batches], self._codes(f"{EMBEDDING}.weight"))
        for index in range(decoder.num_layers):
            pass_layer(decoder, index, hidden, self._layer(index))
        norm = decoder.model.model.norm
        weight = decoder.read(f"{FINAL_NORM}.weight").to(decoder.device, decoder.dtype)
        norm.load_state_dict({"weight": weight}, assign=True)
        found = [torch.empty(0)] * len(sequences)
        for (members, _), states in zip(batches, hidden, strict=True):
            states.copy_(norm(states.to(decoder.device)))
            for row, index in enumerate(members):
                found[index] = states[row, : len(sequences[index])]
        norm.to("meta")
        return found

    def logits(self, states: Sequence[torch.Tensor]) -> Iterator[NDArray[np.float32]]:
        """(T, V) float32, one sequence after another; valid until the next is asked for."""
        vocab_size = self.decoder.source.spec.vocab_size
        most, pending = max(1, _LOGITS_BYTES // (4 * vocab_size)), list[torch.Tensor]()
        for each in states:
            if pending and sum(map(len, pending)) + len(each) > most:
                yield from self._multiplied(pending)
                pending = []
            pending.append(each)
        yield from self._multiplied(pending)

    @torch.no_grad()
    def _multiplied(self, parts: list[torch.Tensor]) -> Iterator[NDArray[np.float32]]:
        if not parts:
            return
        decoder, states = self.decoder, torch.cat(parts).to(self.decoder.device)
        rows, columns = decoder.source.spec.vocab_size, states.shape[1]
        logits = torch.empty(len(states), rows)
        for start in range(0, rows, span := max(1, _HEAD_BLOCK_WEIGHTS // columns)):
            stop = min(start + span, rows)
            logits[:, start:stop] = states @ self._head(start, stop).T
        yield from (part.numpy() for part in logits.split([len(part) for part in parts]))

    def _head(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the output matrix, read anew each time: it may be a seventh of all weights."""
        decoder = self.decoder
        name = f"{EMBEDDING if decoder.tied else HEAD}.weight"
        if (codes := self._codes(name)) is not None:
            return unpack(codes.rows(start, stop), decoder.device)
        return torch.from_numpy(read_rows(decoder.source.tensors[name], start, stop)).to(decoder.device)

    def _layer(self, index: int) -> LayerWeights | None:
        if self.weights is None:
            return None
        prefix = f"model.layers.{index}."
        return {name: self.weights[name] for name in self.weights if name.startswith(prefix)}

    def _codes(self, name: str) -> QuantizedTensor | None:
        value = None if self.weights is None else self.weights[name]
        return value if isinstance(value, QuantizedTensor) else None


def _batches(sequences: Sequence[Ids]) -> list[tuple[list[int], Ids]]:
    """Sequences of about one length together, the longest first: (indices, (B, T) ids filled up with 0, unseen)."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    batches: list[tuple[list[int], Ids]] = []
    while order:
        longest = len(sequences[order[-1]])
        members = [order.pop() for _ in range(min(len(order), max(1, BATCH_TOKENS // longest)))]
        tokens: Ids = np.zeros((len(members), longest), np.int32)
        for row, index in enumerate(members):
            tokens[row, : len(sequences[index])] = sequences[index]
        batches.append((members, tokens))
    return batches
