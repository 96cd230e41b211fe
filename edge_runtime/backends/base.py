"""The seam between a sequence of tokens and a runtime: prefill and decode.

Logits cross it as NumPy float32. A backend owns the layout of its KV cache; callers hold the
handle and see only how many tokens it contains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.lora import Adapter


class KVCache(Protocol):
    """Keys and values of one sequence."""

    @property
    def length_tokens(self) -> int:
        """Tokens whose keys and values are stored."""

    @property
    def capacity_tokens(self) -> int:
        """Tokens that fit."""

    def truncate(self, length_tokens: int) -> None:
        """Forget everything from position ``length_tokens`` on."""


class Backend(Protocol):
    """One loaded model file in one runtime."""

    name: str
    spec: DecoderSpec

    def allocate(self, capacity_tokens: int) -> KVCache:
        """Reserve a cache.

        Raises:
            UserError: More tokens than ``spec.context_tokens``.
        """

    def prefill(self, tokens: Sequence[int], cache: KVCache, *, all_logits: bool = False) -> NDArray[np.float32]:
        """Append ``tokens`` (T >= 1) to the cache.

        Returns:
            (V,) logits after the last token, or (T, V) with ``all_logits``.

        Raises:
            UserError: The tokens do not fit the cache, or an id is outside the vocabulary.
        """

    def decode(self, token: int, cache: KVCache) -> NDArray[np.float32]:
        """Append one token and return its (V,) logits. Raises as ``prefill`` does."""

    def set_adapter(self, adapter: Adapter | None) -> None:
        """Use an adapter from the next call on; None returns to the base, bit for bit.

        Raises:
            AdapterError: A module has no slot in this file, a shape differs, or the rank is too large.
        """

    def close(self) -> None:
        """Release the runtime's memory."""
