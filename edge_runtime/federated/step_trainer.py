"""Trainers without torch: the package's training graphs in ONNX Runtime or LiteRT.

Both graphs take A as (in, r) and B as (r, out) with the adapter's scale folded into B, as the inference graphs do, and
return the gradients by those; names, orientation and scale are translated here. One graph, that of the bucket used
last, is in memory at a time: a second one would hold the base twice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.backends.tflite import silenced_stderr
from edge_runtime.federated.trainer import (
    LORA_A,
    LORA_B,
    Factors,
    Floats,
    Tokens,
    factor_rank,
    fit_batch,
    refuse_unusable,
    training_files,
)
from edge_runtime.formats.errors import BackendError, PackageError
from edge_runtime.formats.package import Package

TOKENS, LOSS_MASK, LOSS_SUM, TOKEN_COUNT = "tokens", "loss_mask", "loss_sum", "token_count"
GRADIENT_SUFFIX, SLOT_SUFFIX = ".gradient", ".weight"
_STEP_FILE, _LOSS_FILE = "train_{}.onnx", "loss_{}.onnx"
_QUIET = 4  # every failure arrives as an exception


class OnnxStepTrainer:
    """``onnx/train_<T>.onnx`` in ONNX Runtime on the CPU. See ``Trainer``."""

    name = "onnx"

    def __init__(self, package: Package, threads: int) -> None:
        """Use ``open``."""
        self._spec, self._threads = package.manifest.decoder, threads
        self.buckets = tuple(sorted(int(_digits(path)) for path in _require_files(package, "onnx")))
        self._files = {
            name: package.path(f"onnx/{name}")
            for name in (form.format(tokens) for tokens in self.buckets for form in (_STEP_FILE, _LOSS_FILE))
        }
        self._file = _STEP_FILE.format(self.buckets[0])
        self._session = self._load(self._file)
        properties: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.targets = tuple(properties["lora_targets"].split(","))
        # The graph takes any rank; beyond this one the decoder beside it would refuse what was trained.
        self.max_rank, self.batch_sequences = int(properties["lora_rank"]), int(properties["batch_sequences"])
        self._slots = {value.name: tuple(value.shape) for value in self._session.get_inputs()}

    @classmethod
    def open(cls, package: Package, *, threads: int) -> OnnxStepTrainer:
        """Load the graph of the shortest bucket.

        Raises:
            PackageError: The package holds no training graphs.
            BackendError: onnxruntime is not installed, or a file does not load.
        """
        return cls(package, threads)

    def loss_and_gradients(
        self,
        tokens: Tokens,
        loss_mask: Floats,
        factors: Factors,
        scale: float,
        *,
        wanted: Collection[str] | None = None,
    ) -> tuple[float, int, dict[str, Floats]]:
        """See ``Trainer.loss_and_gradients``."""
        names = sorted(factors if wanted is None else wanted)
        found = self._run(_STEP_FILE, tokens, loss_mask, factors, scale, names)
        gradients = {name: _from_slot(name, found[_gradient(name)], factors[name], scale) for name in names}
        refuse_unusable(float(found[LOSS_SUM]), gradients)
        return float(found[LOSS_SUM]), round(float(found[TOKEN_COUNT])), gradients

    def loss(self, tokens: Tokens, loss_mask: Floats, factors: Factors, scale: float) -> tuple[float, int]:
        """See ``Trainer.loss``."""
        found = self._run(_LOSS_FILE, tokens, loss_mask, factors, scale, [])
        refuse_unusable(float(found[LOSS_SUM]), {})
        return float(found[LOSS_SUM]), round(float(found[TOKEN_COUNT]))

    def close(self) -> None:
        """See ``Trainer.close``. Any later call raises BackendError."""
        self._session, self._files = None, {}

    def _run(
        self, file: str, tokens: Tokens, loss_mask: Floats, factors: Factors, scale: float, names: list[str]
    ) -> dict[str, NDArray[Any]]:
        factor_rank(factors, self._spec, self.targets, self.max_rank, names)
        ids, mask = fit_batch(tokens, loss_mask, self._spec, self.buckets, self.batch_sequences)
        session = self._session_for(file.format(ids.shape[1]))
        fetched = [LOSS_SUM, TOKEN_COUNT, *(_gradient(name) for name in names)]
        try:
            values = session.run(fetched, {TOKENS: ids, LOSS_MASK: mask} | self._fill(factors, scale))
        except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
            raise BackendError(f"onnxruntime failed in a training step: {_one_line(error)}") from error
        return dict(zip(fetched, values, strict=True))

    def _fill(self, factors: Factors, scale: float) -> dict[str, Floats]:
        rank = next(iter(factors.values())).shape[0 if next(iter(factors)).endswith(LORA_A) else 1]
        slots = ((name, shape) for name, shape in self._slots.items() if name not in (TOKENS, LOSS_MASK))
        sized = {name: tuple(size if isinstance(size, int) else rank for size in shape) for name, shape in slots}
        return {name: _to_slot(name, shape, factors, scale) for name, shape in sized.items()}

    def _session_for(self, file: str) -> Any:
        if not self._files:
            raise BackendError("this trainer is closed; open it again")
        if self._file != file:
            self._session = None  # before the next one is loaded: never two copies of the base
            self._file, self._session = file, self._load(file)
        return self._session

    def _load(self, file: str) -> Any:
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendError("onnxruntime is not installed; type: pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        options.log_severity_level = _QUIET
        options.enable_cpu_mem_arena = False  # a tenth slower, but between steps a phone gets its memory back
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = self._files[file]
        try:
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
            raise BackendError(f"{path}: onnxruntime cannot load it: {_one_line(error)}") from error
        return session


class TfliteStepTrainer:
    """``tflite_train/train.tflite`` in LiteRT. See ``Trainer``."""

    name = "tflite"

    def __init__(self, package: Package, threads: int) -> None:
        """Use ``open``."""
        self._spec, self._threads = package.manifest.decoder, threads
        self._path: Path | None = package.path(_require_files(package, "tflite_train")[0])
        self._signature, self._runner = "", None
        signatures = self._load(None).get_signature_list()
        self.buckets = tuple(sorted(int(_digits(name)) for name in signatures if name.startswith("train_")))
        details = self._runner_for(f"train_{self.buckets[0]}").get_input_details()
        self._slots = {name: tuple(int(size) for size in detail["shape"]) for name, detail in details.items()}
        self.batch_sequences = self._slots.pop(TOKENS)[0]
        del self._slots[LOSS_MASK]
        self.max_rank = min(min(shape) for shape in self._slots.values())
        self.targets = tuple(dict.fromkeys(name.split(".lora_")[0].rpartition(".")[2] for name in self._slots))

    @classmethod
    def open(cls, package: Package, *, threads: int) -> TfliteStepTrainer:
        """Map the file.

        Raises:
            PackageError: The package holds no training graphs.
            BackendError: LiteRT is not installed, or the file does not load.
        """
        return cls(package, threads)

    def loss_and_gradients(
        self,
        tokens: Tokens,
        loss_mask: Floats,
        factors: Factors,
        scale: float,
        *,
        wanted: Collection[str] | None = None,
    ) -> tuple[float, int, dict[str, Floats]]:
        """See ``Trainer.loss_and_gradients``."""
        names = sorted(factors if wanted is None else wanted)
        found = self._run("train_{}", tokens, loss_mask, factors, scale, names)
        gradients = {name: _from_slot(name, found[_gradient(name)], factors[name], scale) for name in names}
        refuse_unusable(float(found[LOSS_SUM]), gradients)
        return float(found[LOSS_SUM]), round(float(found[TOKEN_COUNT])), gradients

    def loss(self, tokens: Tokens, loss_mask: Floats, factors: Factors, scale: float) -> tuple[float, int]:
        """See ``Trainer.loss``."""
        found = self._run("loss_{}", tokens, loss_mask, factors, scale, [])
        refuse_unusable(float(found[LOSS_SUM]), {})
        return float(found[LOSS_SUM]), round(float(found[TOKEN_COUNT]))

    def close(self) -> None:
        """See ``Trainer.close``. Any later call raises BackendError."""
        self._path = self._runner = None

    def _run(
        self, signature: str, tokens: Tokens, loss_mask: Floats, factors: Factors, scale: float, names: list[str]
    ) -> dict[str, NDArray[Any]]:
        factor_rank(factors, self._spec, self.targets, self.max_rank, names)
        ids, mask = fit_batch(tokens, loss_mask, self._spec, self.buckets, self.batch_sequences)
        # The batch is fixed: rows that count nothing fill it up.
        missing = ((0, self.batch_sequences - len(ids)), (0, 0))
        slots = {name: _to_slot(name, shape, factors, scale) for name, shape in self._slots.items()}
        runner = self._runner_for(signature.format(ids.shape[1]))
        try:
            found: dict[str, NDArray[Any]] = runner(
                **{TOKENS: np.pad(ids, missing), LOSS_MASK: np.pad(mask, missing)}, **slots
            )
        except (RuntimeError, ValueError) as error:
            raise BackendError(f"LiteRT failed in a training step: {_one_line(error)}") from error
        return found

    def _runner_for(self, signature: str) -> Any:
        if self._path is None:
            raise BackendError("this trainer is closed; open it again")
        if self._signature != signature:
            # A new interpreter, because an old one keeps the memory of every signature that ever ran.
            self._signature, self._runner = "", None
            self._runner = self._load(signature)
            self._signature = signature
        return self._runner

    def _load(self, signature: str | None) -> Any:
        """A new interpreter's runner of one signature, or the interpreter itself."""
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise BackendError("ai-edge-litert is not installed; type: pip install ai-edge-litert") from error
        try:
            with silenced_stderr():
                interpreter = Interpreter(model_path=str(self._path), num_threads=self._threads)
                return interpreter if signature is None else interpreter.get_signature_runner(signature)
        except (RuntimeError, ValueError) as error:
            raise BackendError(f"{self._path}: LiteRT cannot load it: {_one_line(error)}") from error


def _require_files(package: Package, container: str) -> tuple[str, ...]:
    files = training_files(package, container)
    if not files:
        raise PackageError(
            f"{package.directory}: container {container} holds no training graphs here; "
            "export the package with export.train_buckets=[64,128]"
        )
    return files


def _digits(name: str) -> str:
    """``onnx/train_128.onnx`` or ``train_128`` -> ``128``."""
    return name.rpartition("train_")[2].removesuffix(".onnx")


def _gradient(name: str) -> str:
    return f"{name}{SLOT_SUFFIX}{GRADIENT_SUFFIX}"


def _to_slot(name: str, shape: tuple[int, ...], factors: Factors, scale: float) -> Floats:
    """A factor as the graph takes it, zeros around it up to the slot's shape; all zeros for a module without one."""
    slot = np.zeros(shape, np.float32)
    factor = factors.get(name.removesuffix(SLOT_SUFFIX))
    if factor is not None:
        rows, columns = factor.T.shape
        slot[:rows, :columns] = factor.T * np.float32(scale) if _is_b(name) else factor.T
    return slot


def _from_slot(name: str, gradient: Floats, factor: Floats, scale: float) -> Floats:
    rows, columns = factor.shape
    turned = gradient[:columns, :rows].T
    return np.ascontiguousarray(turned * np.float32(scale) if _is_b(name) else turned, np.float32)


def _is_b(name: str) -> bool:
    return name.removesuffix(SLOT_SUFFIX).endswith(LORA_B)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
