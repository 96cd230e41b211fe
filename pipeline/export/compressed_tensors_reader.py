"""A compressed-tensors folder read back with safetensors and the package's own unpacking, against the stored codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.errors import ExportError
from edge_runtime.formats.int4 import QuantizedTensor, Weights, dequantize
from pipeline.export.compressed_tensors import INDEX_FILE, UNPACKED_IN_LINEAR, WEIGHTS_FILE
from pipeline.export.gguf import row_blocks


def require_same_compressed_tensors(folder: Path, weights: Weights, *, linear_only: bool) -> int:
    """Compare every code and every scale of the folder with what was to be stored, bit for bit.

    Returns:
        Bytes of codes, scales, norms and biases in the files.

    Raises:
        ExportError: The files cannot be read, a tensor is missing, or a number differs.
    """
    from safetensors import SafetensorError

    try:
        places = _places(folder)
        expected = {part for name in weights for part in _parts(name, weights[name], linear_only)}
        if missing := sorted(expected ^ set(places)):
            raise ExportError(f"{folder.name}: tensors differ: {', '.join(missing[:5])}")
        return sum(_compared_bytes(places, name, weights[name], linear_only) for name in weights)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ExportError(f"{folder}: cannot be read back ({error})") from error


def load_logits(folder: Path, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """(S, T, V): what transformers computes in float32 from the folder, row by row of ``tokens`` (S, T)."""
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.distillation.recording import model_logits

    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        return np.stack(list(model_logits(model, tokens)))


def _places(folder: Path) -> dict[str, Path]:
    """The file of each tensor, as the files themselves say; the index must say the same."""
    from safetensors import safe_open

    index = folder / INDEX_FILE
    listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else None
    places: dict[str, Path] = {}
    for path in sorted({folder / name for name in listed.values()}) if listed else [folder / WEIGHTS_FILE]:
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    if listed not in (None, {name: path.name for name, path in places.items()}):
        raise ExportError(f"{index}: does not list what the files hold")
    return places


def _parts(name: str, value: QuantizedTensor | NDArray[np.float32], linear_only: bool) -> list[str]:
    if not isinstance(value, QuantizedTensor) or (linear_only and name in UNPACKED_IN_LINEAR):
        return [name]
    return [f"{name}_{part}" for part in ("packed", "scale", "shape")]


def _compared_bytes(
    places: dict[str, Path], name: str, value: QuantizedTensor | NDArray[np.float32], linear_only: bool
) -> int:
    """Bytes of a weight that is the same in the file, which is mapped for it alone: pages that were read count."""
    from safetensors import safe_open

    parts = _parts(name, value, linear_only)
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(places[part], framework="pt")) for part in parts]
        slices = [file.get_slice(part) for file, part in zip(files, parts, strict=True)]
        same = [part[:].tolist() for part in slices[2:]] in ([], [list(value.shape)])
        for start, stop in row_blocks(value.shape):
            same = same and _same_rows([part[start:stop] for part in slices[:2]], value, start, stop)
        if not same:
            raise ExportError(f"{places[parts[0]].name}: {name} differs from the stored codes")
        return sum(map(_length_bytes, slices))


def _same_rows(found: list[Any], value: QuantizedTensor | NDArray[np.float32], start: int, stop: int) -> bool:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    if not isinstance(value, QuantizedTensor):
        return np.array_equal(found[0].numpy().view(np.uint32), np.asarray(value[start:stop]).view(np.uint32))
    rows = value.rows(start, stop)
    if len(found) == 1:
        return np.array_equal(found[0].numpy().view(np.uint32), dequantize(rows).view(np.uint32))
    codes = unpack_from_int32(found[0], value.bits, rows.shape).numpy()
    scales = found[1].numpy().astype(np.float16)
    repeats = scales.shape[1] // rows.scales.shape[1]  # for the shortest group of the file
    return (
        np.array_equal(codes, rows.codes[:, : rows.columns])
        and np.array_equal(scales.view(np.uint16), np.repeat(rows.scales, repeats, axis=1).view(np.uint16))
        and np.array_equal(scales.astype(found[1].numpy().dtype), found[1].numpy())
    )


def _length_bytes(tensor: Any) -> int:
    bits = {"I32": 32, "I64": 64, "F16": 16, "F32": 32}[tensor.get_dtype()]
    return int(np.prod(tensor.get_shape())) * bits // 8


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' progress bars: the stage has its own."""
    import io
    from contextlib import redirect_stderr

    with redirect_stderr(io.StringIO()):
        yield
