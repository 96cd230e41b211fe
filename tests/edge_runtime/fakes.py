"""Stand-ins that the command line and the engine cannot tell from the real thing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edge_runtime import backends
from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.errors import UserError
from edge_runtime.formats.lora import Adapter

BOS, EOS = 256, 257
VOCAB_SIZE = 258
SPEC = DecoderSpec(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context_tokens=48,
    rms_norm_eps=1e-6,
    inv_freq=(1.0, 0.1, 0.01, 0.001),
    tied_embeddings=True,
)


@dataclass
class TableCache:
    """Remembers the ids themselves."""

    capacity_tokens: int
    ids: list[int] = field(default_factory=list)

    @property
    def length_tokens(self) -> int:
        return len(self.ids)

    def truncate(self, length_tokens: int) -> None:
        if not 0 <= length_tokens <= len(self.ids):
            raise UserError("length_tokens", length_tokens, f"0 to {len(self.ids)}")
        del self.ids[length_tokens:]


class TableBackend:
    """Logits looked up by everything that the cache holds, so a wrong cache gives other text."""

    name = "table"

    def __init__(self, spec: DecoderSpec = SPEC) -> None:
        self.spec = spec
        self.table = np.random.default_rng(7).normal(0, 3, (97, spec.vocab_size)).astype(np.float32)
        # Letters and digits only: text that survives terminals and line splitting.
        self.table[:, [token for token in range(spec.vocab_size) if token > 127 or not chr(token).isalnum()]] -= 200
        self.prefilled_tokens: list[int] = []
        self.adapter: Adapter | None = None
        self.closed = False

    @classmethod
    def open(cls, path: Path, spec: DecoderSpec, *, threads: int) -> TableBackend:
        assert path.exists() and threads >= 1
        return cls(spec)

    def allocate(self, capacity_tokens: int) -> TableCache:
        if capacity_tokens > self.spec.context_tokens:
            raise UserError("capacity_tokens", capacity_tokens, f"1 to {self.spec.context_tokens}")
        return TableCache(capacity_tokens)

    def prefill(self, tokens: Sequence[int], cache: TableCache, *, all_logits: bool = False) -> NDArray[np.float32]:
        self.prefilled_tokens.append(len(tokens))
        rows = [self.decode(token, cache) for token in tokens]
        return np.stack(rows) if all_logits else rows[-1]

    def decode(self, token: int, cache: TableCache) -> NDArray[np.float32]:
        if len(cache.ids) >= cache.capacity_tokens:
            raise UserError("tokens", len(cache.ids) + 1, f"at most {cache.capacity_tokens}")
        cache.ids.append(token)
        return self.logits(cache.ids)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """(V,) for a whole history."""
        row = sum((position + 1) * token for position, token in enumerate(ids)) % len(self.table)
        return np.roll(self.table[row], 0 if self.adapter is None else 1)

    def set_adapter(self, adapter: Adapter | None) -> None:
        self.adapter = adapter

    def close(self) -> None:
        self.closed = True


class ScriptBackend(TableBackend):
    """Says the ids of a script, whatever it is asked."""

    def __init__(self, script: Sequence[int], spec: DecoderSpec = SPEC) -> None:
        super().__init__(spec)
        self.script, self.said = list(script), 0

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return np.zeros(self.spec.vocab_size, np.float32)

    def prefill(self, tokens: Sequence[int], cache: TableCache, *, all_logits: bool = False) -> NDArray[np.float32]:
        super().prefill(tokens, cache)
        return self._say()

    def decode(self, token: int, cache: TableCache) -> NDArray[np.float32]:
        super().decode(token, cache)
        return self._say() if self.said else np.zeros(self.spec.vocab_size, np.float32)

    def _say(self) -> NDArray[np.float32]:
        logits = np.zeros(self.spec.vocab_size, np.float32)
        logits[self.script[self.said]] = 1
        self.said += 1
        return logits


def byte_tokenizer() -> Tokenizer:
    """Id = byte for 0..255, then <s> and </s>; the decoder of GPT-2 and Qwen."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + index) for index, byte in enumerate(b for b in range(256) if b not in printable)}
    tokenizer = Tokenizer(models.BPE(vocab={characters[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def install() -> None:
    """Let every container open as a TableBackend."""
    for container, (_, _, file) in dict(backends.OPENERS).items():
        backends.OPENERS[container] = (__name__, "TableBackend", file)


if __name__ == "__main__":
    # The command line in a process of its own, with the backend replaced.
    from edge_runtime.__main__ import main

    install()
    sys.modules["tests.edge_runtime.fakes"] = sys.modules["__main__"]
    sys.exit(main())
