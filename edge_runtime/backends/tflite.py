"""A decoder in a TFLite file, run by LiteRT or by the older tflite-runtime.

The file keeps no state: it takes the past keys and values and hands out the new slices. ``decode`` is the primary
subgraph, whose input memory this module writes in place, so that a step copies one position and not the cache;
``prefill`` runs through its signature, which copies the cache once a chunk. Both see a window of the past, resized
to powers of two: attending to an empty context of 2048 would cost five times as much as the rest of a small model.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.errors import AdapterError, BackendError, UserError
from edge_runtime.formats.lora import Adapter

Floats = NDArray[np.float32]
RUNTIMES = ("ai_edge_litert.interpreter", "tflite_runtime.interpreter")
HIDDEN = np.float32(-1e9)  # added to a score, leaves an exact zero after softmax
_SMALLEST_WINDOW_TOKENS = 64


@dataclass(slots=True, weakref_slot=True)
class TfliteCache:
    """Keys and values of one sequence: one (1, KV, window, D) array a layer, valid up to ``length_tokens``."""

    keys: list[Floats]
    values: list[Floats]
    capacity_tokens: int
    length_tokens: int = 0

    def truncate(self, length_tokens: int) -> None:
        """Forget everything from position ``length_tokens`` on.

        Raises:
            UserError: The cache holds fewer tokens than that.
        """
        if not 0 <= length_tokens <= self.length_tokens:
            raise UserError("length_tokens", length_tokens, f"0 to {self.length_tokens}")
        self.length_tokens = length_tokens


class TfliteBackend:
    """One loaded TFLite file; not thread-safe."""

    name = "tflite"

    def __init__(self, interpreter: Any, spec: DecoderSpec) -> None:
        """Use ``open``."""
        self.spec = spec
        self._interpreter: Any = interpreter
        self._prefill_tokens = _check_shapes(interpreter, "prefill", spec)
        if _check_shapes(interpreter, "decode", spec) != 1:
            raise BackendError("the file's decode signature takes more than one token")
        self._cos, self._sin = _rotary_tables(spec)
        self._causal = np.triu(np.full((self._prefill_tokens,) * 2, HIDDEN), k=1)
        self._window_tokens, self._step = _map_memory(interpreter, spec, 0)
        self._slots = {name: np.zeros_like(slot) for name, slot in self._step.slots.items()}
        self._resident: weakref.ref[TfliteCache] | None = None
        self._visible_tokens = -1

    @classmethod
    def open(cls, path: Path, spec: DecoderSpec, *, threads: int) -> TfliteBackend:
        """Load a file; the runtime maps it into memory.

        Raises:
            BackendError: No runtime is installed, or the file is damaged or not a decoder of this shape.
        """
        interpreter_class = _import_interpreter()
        if not _is_tflite(path):
            raise BackendError(f"{path}: not a readable TFLite file; fetch or export the package again")
        try:
            with silenced_stderr():
                return cls(interpreter_class(model_path=str(path), num_threads=threads), spec)
        except (ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise BackendError(f"{path}: the TFLite runtime cannot load it ({reason})") from error

    def allocate(self, capacity_tokens: int) -> TfliteCache:
        """Reserve a cache. Raises as ``Backend.allocate`` does."""
        spec = self.spec
        if not 1 <= capacity_tokens <= spec.context_tokens:
            raise UserError("capacity_tokens", capacity_tokens, f"1 to {spec.context_tokens}")
        shape = (1, spec.num_kv_heads, _window(capacity_tokens, spec), spec.head_dim)
        keys = [np.zeros(shape, np.float32) for _ in range(spec.num_layers)]
        values = [np.zeros(shape, np.float32) for _ in range(spec.num_layers)]
        return TfliteCache(keys, values, capacity_tokens)

    def prefill(self, tokens: Sequence[int], cache: TfliteCache, *, all_logits: bool = False) -> Floats:
        """Append tokens in chunks of the file's prefill length. See ``Backend.prefill``."""
        self._check_tokens(tokens, cache)
        rows = []
        for start in range(0, len(tokens), self._prefill_tokens):
            chunk = tokens[start : start + self._prefill_tokens]
            if len(chunk) == 1:
                rows.append(self._decode_one(chunk[0], cache)[None])
            else:
                rows.append(self._prefill_chunk(chunk, cache))
        return np.concatenate(rows) if all_logits else rows[-1][-1].copy()

    def decode(self, token: int, cache: TfliteCache) -> Floats:
        """Append one token. See ``Backend.decode``."""
        self._check_tokens((token,), cache)
        return self._decode_one(token, cache)

    def set_adapter(self, adapter: Adapter | None) -> None:
        """Fill the adapter inputs, zeros for None. See ``Backend.set_adapter``."""
        filled = {name: np.zeros_like(slot) for name, slot in self._slots.items()}
        if adapter is not None:
            for module, (lora_a, lora_b) in adapter.pairs.items():
                self._fill_slot(filled, module, lora_a, lora_b * np.float32(adapter.scale))
        self._slots, self._resident = filled, None

    def close(self) -> None:
        """Release the runtime's memory."""
        if self._interpreter is not None:
            del self._step  # points into memory that goes away with the interpreter
            self._interpreter = None

    def _check_tokens(self, tokens: Sequence[int], cache: TfliteCache) -> None:
        if self._interpreter is None:
            raise BackendError("the TFLite backend is closed")
        room = cache.capacity_tokens - cache.length_tokens
        if not 1 <= len(tokens) <= room:
            raise UserError("tokens", len(tokens), f"1 to {room} more in this cache", "shorten the prompt")
        if min(tokens) < 0 or max(tokens) >= self.spec.vocab_size:
            wrong = next(token for token in tokens if not 0 <= token < self.spec.vocab_size)
            raise UserError("token", wrong, f"0 to {self.spec.vocab_size - 1}")

    def _decode_one(self, token: int, cache: TfliteCache) -> Floats:
        step, past = self._step, cache.length_tokens
        if self._resident is None or self._resident() is not cache or past >= self._window_tokens:
            self._load_cache(cache)
            step = self._step
        if self._visible_tokens != past:
            step.mask[: 1 + past] = 0  # column 0 is the new token itself
            step.mask[1 + past :] = HIDDEN
        step.tokens[0] = token
        step.cos[:] = self._cos[past]
        step.sin[:] = self._sin[past]
        with _reported_errors():
            self._interpreter.invoke()
        logits = step.logits.copy()
        _refuse_unusable(logits)
        for new, here, kept in step.slices(cache):
            here[:, past] = new
            kept[0, :, past] = new
        # The row just written becomes visible to the next step.
        step.mask[1 + past : 2 + past] = 0
        self._visible_tokens = cache.length_tokens = past + 1
        return logits

    def _prefill_chunk(self, tokens: Sequence[int], cache: TfliteCache) -> Floats:
        past, count, width = cache.length_tokens, len(tokens), self._prefill_tokens
        ids = np.zeros(width, np.int32)
        ids[:count] = tokens
        window = _window(past, self.spec)
        mask = np.full((1, 1, width, width + window), HIDDEN)
        mask[0, 0, :, :width] = self._causal
        mask[0, 0, :, width : width + past] = 0
        # Positions of the padding repeat the last one: its rows are dropped, no real row sees it.
        positions = np.minimum(np.arange(past, past + width), self.spec.context_tokens - 1)
        inputs = {"tokens": ids, "cos": self._cos[None, None, positions], "sin": self._sin[None, None, positions]}
        inputs |= {"mask": mask} | self._slots
        inputs |= {f"past_k_{layer}": keys[:, :, :window] for layer, keys in enumerate(cache.keys)}
        inputs |= {f"past_v_{layer}": values[:, :, :window] for layer, values in enumerate(cache.values)}
        with _reported_errors():
            # Made anew for each chunk: the runtime refuses ``invoke`` while a runner exists.
            outputs = self._interpreter.get_signature_runner("prefill")(**inputs)
        logits: Floats = outputs["logits"][:count]
        _refuse_unusable(logits)
        for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
            keys[:, :, past : past + count] = outputs[f"new_k_{layer}"][:, :, :count]
            values[:, :, past : past + count] = outputs[f"new_v_{layer}"][:, :, :count]
        cache.length_tokens = past + count
        self._resident = None
        return logits

    def _load_cache(self, cache: TfliteCache) -> None:
        """Bring another sequence into the decode signature's memory."""
        past = cache.length_tokens
        self._window_tokens, self._step = _map_memory(self._interpreter, self.spec, past + 1)
        for kept, here in zip(cache.keys + cache.values, self._step.past_k + self._step.past_v, strict=True):
            here[:, :past] = kept[0, :, :past]
            here[:, past:] = 0  # hidden by the mask, but garbage times a zero share can still be NaN
        for name, values in self._slots.items():
            self._step.slots[name][:] = values
        self._resident, self._visible_tokens = weakref.ref(cache), -1

    def _fill_slot(self, filled: Mapping[str, Floats], module: str, lora_a: Floats, lora_b: Floats) -> None:
        if f"{module}.lora_a" not in filled:
            raise AdapterError(f"{module}: this file has no adapter slot there")
        slot_a, slot_b = filled[f"{module}.lora_a"], filled[f"{module}.lora_b"]
        rank, largest_rank = lora_a.shape[0], slot_a.shape[0]
        rows, columns = self.spec.projection_shape(module.rsplit(".", 1)[1])
        if rank > largest_rank:
            raise AdapterError(f"{module}: rank {rank}, but this file accepts at most {largest_rank}")
        if lora_a.shape != (rank, columns) or lora_b.shape != (rows, rank):
            raise AdapterError(
                f"{module}: shapes {lora_a.shape} and {lora_b.shape}, expected {(rank, columns)} and {(rows, rank)}"
            )
        slot_a[:rank, :columns] = lora_a
        slot_b[:rows, :rank] = lora_b


@dataclass(slots=True)
class _StepMemory:
    """The decode signature's inputs and outputs, in the runtime's own memory.

    Rotary (D,), mask (1 + M,), past (KV, M, D), new (KV, D), logits (V,).
    """

    tokens: NDArray[np.int32]
    cos: Floats
    sin: Floats
    mask: Floats
    past_k: list[Floats]
    past_v: list[Floats]
    new_k: list[Floats]
    new_v: list[Floats]
    logits: Floats
    slots: dict[str, Floats]

    def slices(self, cache: TfliteCache) -> Iterator[tuple[Floats, Floats, Floats]]:
        """(new slice, past in the runtime, past in the cache) of every layer's keys, then values."""
        yield from zip(self.new_k, self.past_k, cache.keys, strict=True)
        yield from zip(self.new_v, self.past_v, cache.values, strict=True)


def _window(past_tokens: int, spec: DecoderSpec) -> int:
    """Columns of the past that a step over ``past_tokens`` tokens attends to."""
    window = _SMALLEST_WINDOW_TOKENS
    while window < past_tokens:
        window *= 2
    return min(window, spec.context_tokens)


def _map_memory(interpreter: Any, spec: DecoderSpec, past_tokens: int) -> tuple[int, _StepMemory]:
    """Resize the decode signature's past to a window, which may move its memory, and map that."""
    window, layers = _window(past_tokens, spec), spec.num_layers
    decode = interpreter.get_signature_runner("decode")
    indices = {name: detail["index"] for name, detail in decode.get_input_details().items()}
    del decode  # while it exists, the runtime takes its own memory to be in use
    past = (1, spec.num_kv_heads, window, spec.head_dim)
    for layer in range(layers):
        interpreter.resize_tensor_input(indices[f"past_k_{layer}"], past)
        interpreter.resize_tensor_input(indices[f"past_v_{layer}"], past)
    interpreter.resize_tensor_input(indices["mask"], (1, 1, 1, 1 + window))
    interpreter.allocate_tensors()
    return window, _mapped_step(interpreter, layers)


def _mapped_step(interpreter: Any, layers: int) -> _StepMemory:
    decode = interpreter.get_signature_runner("decode")
    inputs = {name: _mapped(interpreter, detail) for name, detail in decode.get_input_details().items()}
    outputs = {name: _mapped(interpreter, detail) for name, detail in decode.get_output_details().items()}
    return _StepMemory(
        tokens=inputs["tokens"],
        cos=inputs["cos"].reshape(-1),
        sin=inputs["sin"].reshape(-1),
        mask=inputs["mask"].reshape(-1),
        past_k=[inputs[f"past_k_{layer}"][0] for layer in range(layers)],
        past_v=[inputs[f"past_v_{layer}"][0] for layer in range(layers)],
        new_k=[outputs[f"new_k_{layer}"][0, :, 0] for layer in range(layers)],
        new_v=[outputs[f"new_v_{layer}"][0, :, 0] for layer in range(layers)],
        logits=outputs["logits"][0],
        slots={name: array for name, array in inputs.items() if name.endswith((".lora_a", ".lora_b"))},
    )


def _mapped(interpreter: Any, detail: Mapping[str, Any]) -> NDArray[Any]:
    """An array over a tensor's memory that, unlike the runtime's own views, does not forbid ``invoke``."""
    view = interpreter.tensor(detail["index"])()
    element = ctypes.c_int32 if view.dtype == np.int32 else ctypes.c_float
    memory = (element * view.size).from_address(view.ctypes.data)
    return np.ctypeslib.as_array(memory).reshape(view.shape)


def _check_shapes(interpreter: Any, signature: str, spec: DecoderSpec) -> int:
    """T of a signature, once its shapes are those of ``spec``."""
    runner = interpreter.get_signature_runner(signature)
    details = runner.get_input_details() | runner.get_output_details()
    tokens = int(details["tokens"]["shape"][0])
    past = (1, spec.num_kv_heads, spec.context_tokens, spec.head_dim)
    expected: dict[str, tuple[int, ...]] = {
        f"past_{kind}_{layer}": past for layer in range(spec.num_layers) for kind in "kv"
    }
    expected |= {"mask": (1, 1, tokens, tokens + spec.context_tokens), "logits": (tokens, spec.vocab_size)}
    for name, shape in expected.items():
        found = tuple(int(size) for size in details[name]["shape"]) if name in details else None
        if found != shape:
            raise BackendError(f"{name} of the file has shape {found}, the package's manifest says {shape}")
    if f"past_k_{spec.num_layers}" in details:
        raise BackendError(f"the file has more layers than the {spec.num_layers} of the package's manifest")
    return tokens


def _rotary_tables(spec: DecoderSpec) -> tuple[Floats, Floats]:
    """cos (M, D) and sin (M, D); the first half of sin is negated, as the graph only swaps halves."""
    positions = np.arange(spec.context_tokens, dtype=np.float32)
    angles = positions[:, None] * np.asarray(spec.inv_freq, np.float32)
    factor = np.float32(spec.rope_attention_factor)
    cos, sin = np.cos(angles) * factor, np.sin(angles) * factor
    return np.concatenate([cos, cos], axis=1), np.concatenate([-sin, sin], axis=1)


def _refuse_unusable(logits: Floats) -> None:
    """Old runtimes answer zeros to files that they half understand; NaN survives both reductions."""
    low, high = float(logits.min()), float(logits.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise BackendError("the TFLite runtime returned logits that are not finite")
    if low == high == 0:
        raise BackendError(
            "the TFLite runtime returned only zeros: this runtime is too old for the file; use its legacy profile"
        )


@contextlib.contextmanager
def _reported_errors() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise BackendError(f"the TFLite runtime failed: {' '.join(str(error).split())}") from error


def _is_tflite(path: Path) -> bool:
    """Whether the file starts as one. LiteRT verifies the rest; the old runtime relies on the package's digests."""
    try:
        with path.open("rb") as file:
            return file.read(8)[4:] == b"TFL3"
    except OSError:
        return False


def _import_interpreter() -> Any:
    for module in RUNTIMES:
        with contextlib.suppress(ImportError):
            return importlib.import_module(module).Interpreter
    raise BackendError("no TFLite runtime is installed; run: pip install ai-edge-litert")


@contextlib.contextmanager
def silenced_stderr() -> Iterator[None]:
    """Keep the runtime's greeting off the terminal: it has no log level, and its errors are raised anyway.

    The whole process is silent meanwhile, since the greeting is written to the file descriptor.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as sink:
            os.dup2(sink.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
