"""Who answers: an fp model in torch, an exported file in this process, or one in another interpreter.

Each gives the logits of whole sequences, one at a time, so that a vocabulary of 152,000 never lies on disk nor in
memory for more than a few sequences; the first two also write on greedily.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edge_runtime.backends import open_backend
from edge_runtime.backends.base import Backend
from edge_runtime.formats.decoder import DecoderSpec
from pipeline.evaluation.questions import FloatArray, Ids
from pipeline.export.parity import piped_logits

_BATCH_LOGITS_BYTES = 64 * 2**20
Rows = Iterator[tuple[int, FloatArray]]


class Reader(Protocol):
    """Reads sequences and gives their logits."""

    def rows(self, sequences: Sequence[Ids]) -> Rows:
        """(index, (T, V) logits) of each sequence, once, in any order; valid until the next is asked for."""


@runtime_checkable
class Writer(Reader, Protocol):
    """A reader that writes on."""

    def write(self, prompt: Ids, most_tokens: int, ends: Collection[int]) -> list[int]:
        """The most likely token after each other, until one of ``ends`` or ``most_tokens`` are written."""


class TorchReader:
    """A transformers model: sequences of about one length are read together."""

    def __init__(self, model: Any, *, bf16: bool = False) -> None:
        """Take a model in evaluation mode, wherever it lies."""
        self._model, self._bf16 = model, bf16

    def rows(self, sequences: Sequence[Ids]) -> Rows:
        """See ``Reader.rows``; what is put behind shorter ones is not seen by them."""
        from pipeline.distillation.recording import teacher_logits

        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        most = max(1, _BATCH_LOGITS_BYTES // (4 * int(self._model.config.vocab_size)))
        while order:
            longest = len(sequences[order[-1]])
            batch = [order.pop() for _ in range(min(len(order), max(1, most // longest)))]
            tokens = np.zeros((len(batch), longest), np.int32)
            for row, index in enumerate(batch):
                tokens[row, : len(sequences[index])] = sequences[index]
            logits = teacher_logits(self._model, tokens, self._bf16).numpy()
            yield from ((index, logits[row, : len(sequences[index])]) for row, index in enumerate(batch))

    def write(self, prompt: Ids, most_tokens: int, ends: Collection[int]) -> list[int]:
        """See ``Writer.write``."""
        import torch

        ids, past, written = torch.from_numpy(prompt[None].astype(np.int64)).to(self._model.device), None, list[int]()
        with torch.no_grad():
            while len(written) < most_tokens:
                said = self._model(input_ids=ids, past_key_values=past, use_cache=True)
                token, past = int(said.logits[0, -1].argmax()), said.past_key_values
                if token in ends:
                    break
                written.append(token)
                ids = ids.new_tensor([[token]])
        return written


class BackendReader:
    """An exported file in its runtime."""

    def __init__(self, backend: Backend) -> None:
        """Take an open backend."""
        self._backend = backend
        self._cache = backend.allocate(backend.spec.context_tokens)

    def rows(self, sequences: Sequence[Ids]) -> Rows:
        """See ``Reader.rows``."""
        for index, sequence in enumerate(sequences):
            self._cache.truncate(0)
            yield index, self._backend.prefill(sequence.tolist(), self._cache, all_logits=True)

    def write(self, prompt: Ids, most_tokens: int, ends: Collection[int]) -> list[int]:
        """See ``Writer.write``; it ends with the context at the latest."""
        self._cache.truncate(0)
        logits, written = self._backend.prefill(prompt.tolist(), self._cache), list[int]()
        room = self._cache.capacity_tokens - len(prompt)
        while len(written) < most_tokens and (token := int(logits.argmax())) not in ends:
            written.append(token)
            if len(written) > room:
                break
            logits = self._backend.decode(token, self._cache)
        return written


class PipedReader:
    """An exported file in another interpreter, whose logits come through a pipe."""

    def __init__(self, python: Path, package: Path, container: str, *, threads: int) -> None:
        """Name what is read; a process runs for each ``rows``."""
        self._python, self._package, self._container, self._threads = python, package, container, threads

    def rows(self, sequences: Sequence[Ids]) -> Rows:
        """See ``Reader.rows``. The process takes a matrix; what fills it up is cut off again."""
        tokens: NDArray[np.int32] = np.zeros((len(sequences), max(map(len, sequences))), np.int32)
        for row, sequence in zip(tokens, sequences, strict=True):
            row[: len(sequence)] = sequence
        found = piped_logits(self._python, self._package, self._container, tokens, threads=self._threads)
        with closing(found):
            for index, logits in enumerate(found):
                yield index, logits[: len(sequences[index])]


@contextmanager
def open_reader(container: str, directory: Path, spec: DecoderSpec, *, threads: int) -> Iterator[BackendReader]:
    """A container's file in this process, closed afterwards.

    Raises:
        BackendError: It cannot be loaded.
    """
    with closing(open_backend(container, directory, spec, threads=threads)) as backend:
        yield BackendReader(backend)
