"""ONNX Runtime: shared key/value buffers through IOBinding, adapters as plain inputs.

A decode step writes three numbers into arrays that are bound once and runs: nothing is allocated
or bound per token. ``model.onnx`` has no adapter slots and is what runs without an adapter;
``model_lora.onnx`` is loaded when an adapter is set. One of the two is in memory at a time; their
caches have the same layout, so a cache survives the change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from edge_runtime.backends.base import KVCache
from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.errors import AdapterError, BackendError, UserError
from edge_runtime.formats.lora import Adapter

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding, OrtValue

MODEL_FILE, LORA_MODEL_FILE = "model.onnx", "model_lora.onnx"
PREFILL_CHUNK_TOKENS = 512  # attention scores take heads x chunk x length floats
_QUIET = 4  # every failure arrives as an exception; the log would only repeat it on stderr


class OnnxCache:
    """Keys and values of one sequence: (1, kv_heads, capacity, head_dim) a layer each."""

    def __init__(self, spec: DecoderSpec, capacity_tokens: int) -> None:
        shape = (1, spec.num_kv_heads, capacity_tokens, spec.head_dim)
        parts = (f"{layer}.{part}" for layer in range(spec.num_layers) for part in ("key", "value"))
        # np.zeros maps pages when they are written: capacity that is never used costs no memory.
        self.arrays: dict[str, NDArray[np.float32]] = {part: np.zeros(shape, np.float32) for part in parts}
        self.capacity_tokens = capacity_tokens
        self.length_tokens = 0
        self.bindings: _Bindings | None = None

    def truncate(self, length_tokens: int) -> None:
        """Forget everything from position ``length_tokens`` on.

        Raises:
            UserError: A negative number, or more tokens than the cache holds.
        """
        if not 0 <= length_tokens <= self.length_tokens:
            raise UserError("length_tokens", length_tokens, f"0 to {self.length_tokens}, what the cache holds")
        self.length_tokens = length_tokens


class OnnxBackend:
    """The ONNX files of one package in ONNX Runtime on the CPU, driven by one thread at a time."""

    name = "onnx"

    def __init__(self, directory: Path, spec: DecoderSpec, threads: int) -> None:
        self.spec = spec
        self._directory, self._threads = directory, threads
        self._session: InferenceSession | None = _open_session(directory / MODEL_FILE, spec, threads)
        self._slots = _read_slots(self._session, spec)
        self._adapter: dict[str, OrtValue] = {}
        self._step = _StepArrays(spec.vocab_size)
        self._bound_caches: WeakSet[OnnxCache] = WeakSet()

    @classmethod
    def open(cls, directory: Path, spec: DecoderSpec, *, threads: int = 1) -> OnnxBackend:
        """Load ``model.onnx``; its ``weights.bin`` must lie beside it.

        Args:
            directory: Where the files are.
            spec: The decoder as the manifest describes it.
            threads: Of ONNX Runtime's operators. Submodels of a few million parameters decode fastest with one.

        Raises:
            BackendError: onnxruntime is not installed, or the files are missing, damaged or of another decoder.
        """
        return cls(directory, spec, threads)

    def allocate(self, capacity_tokens: int) -> OnnxCache:
        """See ``Backend.allocate``."""
        if not 1 <= capacity_tokens <= self.spec.context_tokens:
            raise UserError("capacity_tokens", capacity_tokens, f"1 to {self.spec.context_tokens} with this package")
        return OnnxCache(self.spec, capacity_tokens)

    def prefill(self, tokens: Sequence[int], cache: KVCache, *, all_logits: bool = False) -> NDArray[np.float32]:
        """See ``Backend.prefill``. Long prompts run in chunks; only the last one's logits are computed."""
        ids = np.asarray(tokens, np.int64).reshape(1, -1)
        cache = _own(cache)
        self._refuse_tokens(ids, cache)
        count = ids.shape[1]
        scored: NDArray[np.float32] = self._step.logits
        if all_logits:
            scored = np.empty((1, count, self.spec.vocab_size), np.float32)
        binding = self._bind(cache).prefill
        for start in range(0, count, PREFILL_CHUNK_TOKENS):
            chunk = np.ascontiguousarray(ids[:, start : start + PREFILL_CHUNK_TOKENS])
            size = chunk.shape[1]
            logits = scored[:, start : start + size] if all_logits else scored
            self._step.logits_from[0] = 0 if all_logits else size - 1
            # Named, so that the arrays live until the run is over: a binding does not own them.
            chunk_value, logits_value = _value(chunk), _value(logits)
            binding.bind_ortvalue_input("input_ids", chunk_value)
            binding.bind_ortvalue_output("logits", logits_value)
            self._run(binding, cache, size)
            _refuse_unusable(logits)
        last: NDArray[np.float32] = scored[0] if all_logits else scored[0, 0].copy()
        return last

    def decode(self, token: int, cache: KVCache) -> NDArray[np.float32]:
        """See ``Backend.decode``."""
        cache = _own(cache)
        if not 0 <= token < self.spec.vocab_size or cache.length_tokens >= cache.capacity_tokens:
            self._refuse_tokens(np.array([[token]]), cache)
        bindings = self._bind(cache)
        self._step.token[0, 0] = token
        self._run(bindings.decode, cache, 1)
        logits: NDArray[np.float32] = self._step.logits[0, 0].copy()
        _refuse_unusable(logits)
        return logits

    def set_adapter(self, adapter: Adapter | None) -> None:
        """See ``Backend.set_adapter``. Changes between adapters rebind tensors; to and from the base, a file loads.

        Raises:
            BackendError: ``model_lora.onnx`` is damaged; the base stays in use.
        """
        if adapter is None:
            if self._adapter:
                self._switch(MODEL_FILE)
                self._adapter = {}
            return
        self._slots.refuse(adapter)
        if not self._adapter:
            self._switch(LORA_MODEL_FILE)
        self._adapter = _adapter_inputs(self._live_session(), adapter)

    def close(self) -> None:
        """See ``Backend.close``. Any later call raises BackendError."""
        self._release()
        self._adapter = {}

    def _refuse_tokens(self, ids: NDArray[np.int64], cache: OnnxCache) -> None:
        if ids.size == 0:
            raise UserError("tokens", [], "at least one token")
        outside = ids[(ids < 0) | (ids >= self.spec.vocab_size)]
        if outside.size:
            raise UserError("token id", int(outside[0]), f"0 to {self.spec.vocab_size - 1}, this package's vocabulary")
        free = cache.capacity_tokens - cache.length_tokens
        if ids.size > free:
            raise UserError(
                "tokens",
                int(ids.size),
                f"at most {free} more in this cache of {cache.capacity_tokens}",
                "shorten the text",
            )

    def _bind(self, cache: OnnxCache) -> _Bindings:
        """The cache's bindings for the session and adapter in use; built again after either changed."""
        bindings = cache.bindings
        if bindings is None or bindings.session is not self._session or bindings.adapter is not self._adapter:
            bindings = cache.bindings = _Bindings(self._live_session(), self._adapter, self._step, cache)
            self._bound_caches.add(cache)
        return bindings

    def _run(self, binding: IOBinding, cache: OnnxCache, count: int) -> None:
        """One run over ``count`` tokens; the cache grows only when it succeeds."""
        length = cache.length_tokens + count
        self._step.seqlens_k[0] = length - 1
        self._step.total_sequence_length[()] = length
        try:
            self._live_session().run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
            raise BackendError(f"onnxruntime failed after {cache.length_tokens} tokens: {_one_line(error)}") from error
        cache.length_tokens = length

    def _live_session(self) -> InferenceSession:
        if self._session is None:
            raise BackendError("this backend is closed; open the package again")
        return self._session

    def _switch(self, file: str) -> None:
        """Exchange the loaded file, without ever holding two copies of the weights."""
        self._live_session()
        self._release()
        try:
            self._session = _open_session(self._directory / file, self.spec, self._threads)
        except BackendError:
            self._session = _open_session(self._directory / MODEL_FILE, self.spec, self._threads)
            raise

    def _release(self) -> None:
        """Let go of the session; bindings hold it too."""
        for cache in self._bound_caches:
            cache.bindings = None
        self._bound_caches.clear()
        self._session = None


class _StepArrays:
    """The small tensors of a step, bound by every cache and changed in place."""

    def __init__(self, vocab_size: int) -> None:
        self.token = np.zeros((1, 1), np.int64)
        self.seqlens_k = np.zeros(1, np.int32)
        self.total_sequence_length = np.zeros((), np.int32)
        self.logits_from = np.zeros(1, np.int64)
        self.first_row = np.zeros(1, np.int64)
        self.logits = np.zeros((1, 1, vocab_size), np.float32)


class _Bindings:
    """One cache bound to one session and adapter, once for single tokens and once for chunks."""

    def __init__(
        self, session: InferenceSession, adapter: dict[str, OrtValue], step: _StepArrays, cache: OnnxCache
    ) -> None:
        self.session, self.adapter = session, adapter
        self.prefill, self.decode = session.io_binding(), session.io_binding()
        for binding, logits_from in ((self.prefill, step.logits_from), (self.decode, step.first_row)):
            binding.bind_ortvalue_input("seqlens_k", _value(step.seqlens_k))
            binding.bind_ortvalue_input("total_sequence_length", _value(step.total_sequence_length))
            binding.bind_ortvalue_input("logits_from", _value(logits_from))
            for name, value in adapter.items():
                binding.bind_ortvalue_input(name, value)
            for part, array in cache.arrays.items():
                shared = _value(array)
                binding.bind_ortvalue_input(f"past_key_values.{part}", shared)
                binding.bind_ortvalue_output(f"present.{part}", shared)
        self.decode.bind_ortvalue_input("input_ids", _value(step.token))
        self.decode.bind_ortvalue_output("logits", _value(step.logits))


class _Slots:
    """What adapters the package takes."""

    def __init__(self, spec: DecoderSpec, targets: tuple[str, ...], rank: int) -> None:
        self.rank = rank
        self.shapes = {name: spec.projection_shape(target) for name, target in spec.module_names(targets)}

    def refuse(self, adapter: Adapter) -> None:
        """Raises AdapterError when the adapter does not fit."""
        if not self.shapes:
            raise AdapterError("this package has no adapter slots; export it with lora targets")
        if not 1 <= adapter.rank <= self.rank:
            raise AdapterError(f"adapter rank {adapter.rank}: this package takes 1 to {self.rank}")
        if not adapter.pairs:
            raise AdapterError("the adapter holds no module")
        for module, (lora_a, lora_b) in adapter.pairs.items():
            if module not in self.shapes:
                targets = sorted({name.rpartition(".")[2] for name in self.shapes})
                raise AdapterError(f"{module}: no adapter slot in this package, which has {', '.join(targets)}")
            out_features, in_features = self.shapes[module]
            wanted = (adapter.rank, in_features), (out_features, adapter.rank)
            if (lora_a.shape, lora_b.shape) != wanted:
                raise AdapterError(
                    f"{module}: lora_a {lora_a.shape} and lora_b {lora_b.shape}, needed {wanted[0]} and {wanted[1]}"
                )
            if not (np.isfinite(lora_a).all() and np.isfinite(lora_b).all()):
                raise AdapterError(f"{module}: the adapter holds numbers that are not finite")


def _own(cache: KVCache) -> OnnxCache:
    if not isinstance(cache, OnnxCache):
        raise BackendError(f"a cache of {type(cache).__name__} was given to the onnx backend; allocate it there")
    return cache


def _open_session(path: Path, spec: DecoderSpec, threads: int) -> InferenceSession:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError("onnxruntime is not installed; type: pip install onnxruntime") from error
    if not path.is_file():
        raise BackendError(f"{path}: no such file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = _QUIET
    options.enable_cpu_mem_arena = False  # as fast here, and a long prefill's memory goes back to the system
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning halves decode on a busy machine
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
        raise BackendError(f"{path}: onnxruntime cannot load it: {_one_line(error)}") from error
    _refuse_other_decoder(path, session, spec)
    return session


def _refuse_other_decoder(path: Path, session: InferenceSession, spec: DecoderSpec) -> None:
    shapes = {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
    layers = sum(name.startswith("past_key_values.") for name in shapes) // 2
    cache = shapes.get("past_key_values.0.key") or [None] * 4
    found = (layers, cache[1], cache[-1], (shapes.get("logits") or [None])[-1])
    expected = (spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.vocab_size)
    if found != expected:
        raise BackendError(
            f"{path}: (layers, key/value heads, head_dim, vocabulary) are {found}, the manifest says {expected}"
        )


def _read_slots(session: InferenceSession, spec: DecoderSpec) -> _Slots:
    """The slots that ``model.onnx`` says its sister file has."""
    properties: Mapping[str, str] = session.get_modelmeta().custom_metadata_map
    targets: Iterable[str] = filter(None, properties.get("lora_targets", "").split(","))
    return _Slots(spec, tuple(targets), int(properties.get("lora_rank", 0)))


def _adapter_inputs(session: InferenceSession, adapter: Adapter) -> dict[str, OrtValue]:
    """A as (in, r) and B as (r, out) with the scale folded in, zero-padded where the file's module is padded."""
    shapes = {value.name: value.shape for value in session.get_overridable_initializers()}
    inputs = {}
    for module, (lora_a, lora_b) in adapter.pairs.items():
        a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        more_in, more_out = shapes[a][0] - lora_a.shape[1], shapes[b][1] - lora_b.shape[0]
        inputs[a] = _value(np.pad(lora_a.T.astype(np.float32), ((0, more_in), (0, 0))))
        inputs[b] = _value(np.pad((lora_b.T * np.float32(adapter.scale)).astype(np.float32), ((0, 0), (0, more_out))))
    return inputs


def _value(array: NDArray[np.generic]) -> OrtValue:
    """An OrtValue over the array's own memory: later changes of the array are seen by the next run."""
    from onnxruntime import OrtValue

    return OrtValue.ortvalue_from_numpy(array, "cpu", 0)


def _refuse_unusable(logits: NDArray[np.float32]) -> None:
    """Old or foreign runtimes return zeros in silence; NaN and infinity must not reach sampling."""
    low, high = logits.min(), logits.max()  # both are NaN when any logit is
    if not (math.isfinite(low) and math.isfinite(high)):
        raise BackendError("onnxruntime returned logits that are not finite")
    if low == high == 0.0:
        raise BackendError("onnxruntime returned logits that are all zero")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
