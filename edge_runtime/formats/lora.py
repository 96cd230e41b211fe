"""Adapters: PEFT's directory format on disk, plain arrays in memory, bound to their base.

A directory holds ``adapter_config.json`` and ``adapter_model.safetensors``. What it is bound to, the
``base_digest`` of a package's manifest, stands in the metadata of the safetensors file or in ``base.json``.
Never a pickle: ``adapter_model.bin`` is not read.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.errors import AdapterError
from edge_runtime.formats.files import write_atomically

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_FILE = "base.json"
BASE_KEY = "base_digest"

MAX_CONFIG_BYTES = 1 << 20
MAX_WEIGHTS_BYTES = 1 << 30
MAX_RANK = 1024
_MAX_ALPHA = 1e6

_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
# Read below, or without effect on the result: names, training hyperparameters, which modules were chosen.
_KNOWN_FIELDS = {
    "r", "lora_alpha", "use_rslora", "init_lora_weights", "peft_type",
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "bias",
    "megatron_core", "eva_config", "qalora_group_size",
}  # fmt: skip
# Starts that leave the base as it was. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it, so an adapter started
# that way is wrong on the package's base.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class Adapter:
    """One LoRA: ``y = W x + scale * lora_b (lora_a x)``.

    Attributes:
        rank: r, the same for every module.
        scale: alpha / r (alpha / r_max for a prefix of a nested adapter).
        pairs: Module name (``model.layers.0.self_attn.q_proj``) to (lora_a (r, in), lora_b (out, r)).
        base_digest: Digest of the base it was trained on, or None when the directory names none.
    """

    rank: int
    scale: float
    pairs: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
    base_digest: str | None


def load_adapter(directory: Path, spec: DecoderSpec, base_digest: str, *, allow_unbound: bool = False) -> Adapter:
    """Read an adapter in PEFT's format for a base of the given shape and digest.

    Args:
        directory: Holds the two files.
        spec: The base's shape.
        base_digest: ``base_digest`` of the package's manifest.
        allow_unbound: Accept an adapter that names no base. One that names another base is always refused.

    Raises:
        AdapterError: A file is missing, damaged or too large; the configuration asks for something other than
            plain LoRA on the decoder's projections; a tensor has the wrong shape or is not finite; the adapter
            belongs to another base, or to none.
    """
    rank, scale = _read_config(directory / CONFIG_FILE)
    tensors, metadata = _read_tensors(directory / WEIGHTS_FILE)
    bound_to = _read_binding(directory, metadata)
    if bound_to is None and not allow_unbound:
        raise AdapterError(
            f"{directory}: names no base; if it was trained on this package's base ({base_digest}), bind it with "
            f"`python -m edge_runtime bind`, or add --unbound-adapter to try it"
        )
    if bound_to is not None and bound_to != base_digest:
        raise AdapterError(
            f"{directory}: was trained on base {bound_to}, the package's base is {base_digest}; use its own package"
        )
    return Adapter(rank, scale, _pair(directory / WEIGHTS_FILE, tensors, spec, rank), bound_to)


def save_adapter(directory: Path, adapter: Adapter) -> None:
    """Write an adapter as a directory that PEFT and ``load_adapter`` read, whole or not at all.

    Equal adapters give equal bytes, and writing the same one again changes nothing. An adapter that is there
    already gives way in one rename: a reader finds the old one, the new one or none, never a mixture.

    Args:
        directory: The adapter's own; missing parents are made.
        adapter: Bound to its base. ``lora_alpha`` becomes ``scale * rank``, so that the first r ranks of a nested
            adapter, which keep the scale alpha / r_max, are written with alpha r / r_max.

    Raises:
        AdapterError: The adapter names no base, holds a value or shape that ``load_adapter`` would refuse, or the
            directory holds something else.
    """
    files = encode_adapter(adapter)
    if directory.exists() and not directory.is_dir():
        raise AdapterError(f"{directory}: is a file; name a new or empty directory")
    found = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    if set(files) <= set(found) and all((directory / name).read_bytes() == files[name] for name in files):
        return
    if strangers := sorted(set(found) - set(files)):
        raise AdapterError(f"{directory}: holds {strangers[0]}, which is no adapter's; name a new or empty directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        for name, content in files.items():
            write_atomically(beside / "new" / name, content)
        if found:
            directory.rename(beside / "old")
        (beside / "new").replace(directory)
        _flush_directory(directory.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def encode_adapter(adapter: Adapter) -> dict[str, bytes]:
    """The files of an adapter's directory, by name: one byte string for each adapter.

    Raises:
        AdapterError: As ``save_adapter``.
    """
    if adapter.base_digest is None or not _SHA256.fullmatch(adapter.base_digest):
        raise AdapterError(f"the adapter names base {adapter.base_digest!r}; bind it to a package's base before saving")
    tensors = {}
    for module, (lora_a, lora_b) in sorted(adapter.pairs.items()):
        if lora_a.ndim != 2 or lora_b.ndim != 2 or not len(lora_a) == lora_b.shape[1] == adapter.rank:
            raise AdapterError(f"{module}: factors {lora_a.shape} and {lora_b.shape} are not of rank {adapter.rank}")
        if not (np.isfinite(lora_a).all() and np.isfinite(lora_b).all()):
            raise AdapterError(f"{module}: not finite; the training diverged, use an earlier adapter")
        tensors[f"base_model.model.{module}.lora_A.weight"] = lora_a
        tensors[f"base_model.model.{module}.lora_B.weight"] = lora_b
    if not tensors:
        raise AdapterError("the adapter holds no weights; train one before saving")
    config = {
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": _alpha(adapter),
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": adapter.rank,
        # Full names: PEFT would look for a short one in every layer, trained or not.
        "target_modules": sorted(adapter.pairs),
        "task_type": "CAUSAL_LM",
    }
    return {
        CONFIG_FILE: _to_json(config, indent=2),
        WEIGHTS_FILE: _to_safetensors(tensors, {BASE_KEY: adapter.base_digest, "format": "pt"}),
        BASE_FILE: _to_json({BASE_KEY: adapter.base_digest}),
    }


def prefix_adapter(adapter: Adapter, rank: int) -> Adapter:
    """The first ``rank`` ranks of a nested adapter, under the same scale.

    Raises:
        AdapterError: The adapter has fewer.
    """
    if not 1 <= rank <= adapter.rank:
        raise AdapterError(f"rank is {rank}; 1 to {adapter.rank} of this adapter are allowed")
    pairs = {module: (lora_a[:rank], lora_b[:, :rank]) for module, (lora_a, lora_b) in adapter.pairs.items()}
    return Adapter(rank, adapter.scale, pairs, adapter.base_digest)


def bind_adapter(directory: Path, base_digest: str) -> None:
    """Write which base an adapter belongs to.

    Raises:
        AdapterError: There is no adapter, or it is bound to another base already.
    """
    _read_config(directory / CONFIG_FILE)
    _, metadata = _read_tensors(directory / WEIGHTS_FILE)
    bound_to = _read_binding(directory, metadata)
    if bound_to not in (None, base_digest):
        raise AdapterError(f"{directory}: is bound to base {bound_to} already; a new base needs a new adapter")
    write_atomically(directory / BASE_FILE, json.dumps({BASE_KEY: base_digest}).encode("ascii") + b"\n")


def _alpha(adapter: Adapter) -> int | float:
    """``lora_alpha`` of which readers, who divide by r, get the scale back up to the last place of a double."""
    alpha = adapter.scale * adapter.rank
    if not (math.isfinite(alpha) and 0 < alpha < _MAX_ALPHA):
        raise AdapterError(f"scale {adapter.scale} at rank {adapter.rank}: a lora_alpha between 0 and 1e6 is allowed")
    return int(alpha) if alpha.is_integer() else alpha


def _to_safetensors(tensors: Mapping[str, NDArray[np.float32]], metadata: Mapping[str, str]) -> bytes:
    """By hand, because safetensors writes metadata in an order that changes from run to run."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    parts = {name: np.ascontiguousarray(tensor, "<f4").tobytes() for name, tensor in tensors.items()}
    start = 0
    for name, part in parts.items():
        header[name] = {
            "dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [start, start + len(part)]
        }  # fmt: skip
        start += len(part)
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts.values()])


def _to_json(values: Mapping[str, object], indent: int | None = None) -> bytes:
    return json.dumps(values, indent=indent, sort_keys=True, allow_nan=False).encode("ascii") + b"\n"


def _flush_directory(directory: Path) -> None:
    """Make renames in it durable, where the system can."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _read_config(path: Path) -> tuple[int, float]:
    """(rank, scale)."""
    config = _read_json(path)
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {config.get('peft_type')!r}; LORA is allowed")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias is {config['bias']!r}; none is allowed, train without biases")
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        start = config["init_lora_weights"]
        raise AdapterError(
            f"{path}: init_lora_weights is {start!r}, which changes the base; convert it to plain LoRA in PEFT"
        )
    for name, value in config.items():
        if name not in _KNOWN_FIELDS and value not in (None, False, "") and value != [] and value != {}:
            raise AdapterError(f"{path}: {name} is {str(value)[:80]!r}; plain LoRA is allowed, train without {name}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise AdapterError(f"{path}: r is {rank!r}; an integer from 1 to {MAX_RANK} is allowed")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < _MAX_ALPHA:
        raise AdapterError(f"{path}: lora_alpha is {alpha!r}; a positive number is allowed")
    return rank, float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read_tensors(path: Path) -> tuple[dict[str, NDArray[np.float32]], dict[str, str]]:
    """(tensors as float32, metadata). Read by hand for bfloat16, which NumPy does not have."""
    from safetensors import SafetensorError, deserialize

    raw = _read(path, MAX_WEIGHTS_BYTES)
    try:
        entries = deserialize(raw)
        header_bytes = int.from_bytes(raw[:8], "little")
        metadata = json.loads(raw[8 : 8 + header_bytes]).get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        raise AdapterError(f"{path}: damaged safetensors ({error}); get the adapter again") from error
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, entry in entries:
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(entry["data"], "<u2").astype(np.uint32) << 16).view(np.float32)
        elif entry["dtype"] in _DTYPES:
            values = np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).astype(np.float32)
        else:
            raise AdapterError(f"{path}: {name} is {entry['dtype']}; allowed: BF16 {' '.join(_DTYPES)}")
        tensors[name] = values.reshape(entry["shape"])
    return tensors, metadata


def _read_binding(directory: Path, metadata: Mapping[str, str]) -> str | None:
    named: dict[str, Any] = {}
    if BASE_KEY in metadata:
        named[WEIGHTS_FILE] = metadata[BASE_KEY]
    if (directory / BASE_FILE).exists():
        named[BASE_FILE] = _read_json(directory / BASE_FILE).get(BASE_KEY)
    for file, digest in named.items():
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise AdapterError(f"{directory / file}: {BASE_KEY} is {str(digest)[:80]!r}; a sha256 in hex is allowed")
    if len(set(named.values())) > 1:
        raise AdapterError(f"{directory}: bound to two bases, {' and '.join(named.values())}; get the adapter again")
    return next(iter(named.values()), None)


def _pair(
    path: Path, tensors: Mapping[str, NDArray[np.float32]], spec: DecoderSpec, rank: int
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Module name to (lora_a, lora_b), in the decoder's order, every shape and value checked."""
    shapes = {module: spec.projection_shape(projection) for module, projection in spec.module_names()}
    halves: dict[str, dict[str, NDArray[np.float32]]] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None or match[1] not in shapes:
            raise AdapterError(
                f"{path}: {name} belongs to no projection of this decoder; train on q_proj ... down_proj only"
            )
        rows, columns = shapes[match[1]]
        expected = (rank, columns) if match[2] == "A" else (rows, rank)
        if tensor.shape != expected:
            raise AdapterError(f"{path}: {name} has shape {tensor.shape}, this base and rank need {expected}")
        if not np.isfinite(tensor).all():
            raise AdapterError(f"{path}: {name} is not finite; the training diverged, use an earlier adapter")
        halves.setdefault(match[1], {})[match[2]] = tensor
    if not halves:
        raise AdapterError(f"{path}: holds no adapter weights; get the adapter again")
    for module, half in halves.items():
        if len(half) == 1:
            raise AdapterError(f"{path}: {module} has only its half lora_{next(iter(half))}; get the adapter again")
    return {module: (halves[module]["A"], halves[module]["B"]) for module in shapes if module in halves}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(_read(path, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not JSON ({error}); get the adapter again") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{path}: not a JSON object; get the adapter again")
    return values


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise AdapterError(f"{path}: {error.strerror}; name a directory in PEFT's format (safetensors)") from error
    if len(content) > max_bytes:
        raise AdapterError(f"{path}: longer than {max_bytes} bytes; get the adapter again")
    return content
