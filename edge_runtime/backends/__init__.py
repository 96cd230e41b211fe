"""Implementations of the Backend protocol, imported only when one is opened."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.formats.errors import BackendError

if TYPE_CHECKING:
    from edge_runtime.backends.base import Backend
    from edge_runtime.formats.decoder import DecoderSpec

# Container to (module, class, file to hand to its `open`; None: the container's directory).
OPENERS: dict[str, tuple[str, str, str | None]] = {
    "onnx": ("edge_runtime.backends.onnx", "OnnxBackend", None),
    "tflite": ("edge_runtime.backends.tflite", "TfliteBackend", "model.tflite"),
    "tflite_legacy": ("edge_runtime.backends.tflite", "TfliteBackend", "model.tflite"),
}


def open_backend(container: str, directory: Path, spec: DecoderSpec, *, threads: int) -> Backend:
    """Load a container's file into its runtime.

    Args:
        container: A key of ``OPENERS``.
        directory: The container's directory, verified.
        spec: The manifest's decoder.
        threads: Threads of the runtime.

    Raises:
        BackendError: No backend reads this container, its runtime is not installed, or the file does not load.
    """
    if container not in OPENERS:
        raise BackendError(f"container {container}: no backend reads it; allowed: {' '.join(OPENERS)}")
    module, name, file = OPENERS[container]
    opener = getattr(importlib.import_module(module), name)
    backend: Backend = opener.open(directory if file is None else directory / file, spec, threads=threads)
    return backend
