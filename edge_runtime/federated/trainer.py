"""The seam between a federated client and what computes its gradients.

A trainer is handed tokens, a loss mask and LoRA factors, and returns a loss and gradients: it keeps no factors and no
optimizer. Factors are named and shaped as PEFT has them: ``model.layers.0.self_attn.q_proj.lora_A`` (r, in) and
``...lora_B`` (out, r), both or neither for a module, one rank for all.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.errors import AdapterError, BackendError, PackageError, UserError
from edge_runtime.formats.package import Package

Tokens = NDArray[np.int32]
Floats = NDArray[np.float32]
Factors = Mapping[str, Floats]
LORA_A, LORA_B = ".lora_A", ".lora_B"

# Kind to (module, class, container that it reads, libraries that must be installed), in the order of `auto`: on a CPU
# the graphs take about half of torch's time and a quarter of its memory; name torch for a GPU, or for other targets.
TRAINERS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "onnx": ("edge_runtime.federated.step_trainer", "OnnxStepTrainer", "onnx", ("onnxruntime",)),
    "tflite": ("edge_runtime.federated.step_trainer", "TfliteStepTrainer", "tflite_train", ("ai_edge_litert",)),
    "torch": ("edge_runtime.federated.local_trainer", "LocalTrainer", "torch", ("torch", "transformers", "peft")),
}
_TRAINING_FILE = re.compile(r"train_[1-9][0-9]{0,5}\.onnx|train\.tflite|weights\.safetensors")


class Trainer(Protocol):
    """Loss and gradients of LoRA factors over one frozen base.

    Attributes:
        name: ``onnx``, ``tflite`` or ``torch``.
        buckets: Sequence lengths in tokens that are computed without padding, ascending.
        batch_sequences: Most sequences a call takes.
        targets: Projections whose adapters it trains.
        max_rank: Of an adapter; None for any.
    """

    name: str
    buckets: tuple[int, ...]
    batch_sequences: int
    targets: tuple[str, ...]
    max_rank: int | None

    def loss_and_gradients(
        self,
        tokens: Tokens,
        loss_mask: Floats,
        factors: Factors,
        scale: float,
        *,
        wanted: Collection[str] | None = None,
    ) -> tuple[float, int, dict[str, Floats]]:
        """The summed loss of next-token prediction and its gradients.

        Args:
            tokens: (B, T) ids, padded on the right; B up to ``batch_sequences``, T up to the longest bucket. Shorter
                ones are padded to a bucket, which changes nothing but time.
            loss_mask: (B, T); 1 where the prediction of the NEXT token counts, else 0. The last column is ignored.
            factors: By name. A module without factors is the base alone.
            scale: Of the adapter: ``y = W x + scale * B (A x)``.
            wanted: Names of factors whose gradients are returned; None for all. Fewer may be faster.

        Returns:
            (sum of the masked tokens' losses in nats, number of masked tokens, gradients of that SUM by factor).
            Sums, so that adding up micro-batches and dividing once is exact.

        Raises:
            UserError: The batch does not fit.
            AdapterError: A factor has no place in the base, a wrong shape, or too high a rank.
            BackendError: The runtime failed, or the loss or a gradient is not finite.
        """

    def loss(self, tokens: Tokens, loss_mask: Floats, factors: Factors, scale: float) -> tuple[float, int]:
        """The first two of ``loss_and_gradients``, without the time for gradients. Raises as that does."""

    def close(self) -> None:
        """Release the runtime's memory."""


def open_trainer(kind: str, package: Package, *, threads: int) -> Trainer:
    """Open a trainer over the base of a verified package.

    Args:
        kind: A key of ``TRAINERS``, or ``auto``: the first of them that the package and this device can run.
        package: Signature and digests checked.
        threads: Of the runtime.

    Raises:
        UserError: An unknown kind.
        PackageError: The package holds nothing for this kind on this device.
        BackendError: A library is not installed, or the files do not load.
    """
    module, class_name = _choose(kind, package)
    trainer: Trainer = getattr(importlib.import_module(module), class_name).open(package, threads=threads)
    return trainer


def training_files(package: Package, container: str) -> tuple[str, ...]:
    """Verified paths of what a trainer reads in ``container``; empty when it holds nothing to train with."""
    if container not in package.available:
        return ()
    files = package.manifest.containers[container].files
    return tuple(path for path in files if _TRAINING_FILE.fullmatch(PurePosixPath(path).name))


def fit_batch(
    tokens: Tokens, loss_mask: Floats, spec: DecoderSpec, buckets: tuple[int, ...], batch_sequences: int
) -> tuple[NDArray[np.int32], Floats]:
    """Check a batch and pad it on the right to the shortest bucket that holds it.

    Returns:
        (B, bucket) ids and mask, the mask's last column zero.

    Raises:
        UserError: A size, an id or a mask that no trainer takes.
    """
    ids, mask = np.asarray(tokens), np.asarray(loss_mask, np.float32)
    if ids.ndim != 2 or not 1 <= ids.shape[0] <= batch_sequences or ids.shape[1] < 2:
        raise UserError("tokens", ids.shape, f"(1 to {batch_sequences}, 2 to {buckets[-1]}) with this trainer")
    bucket = next((length for length in buckets if length >= ids.shape[1]), None)
    if bucket is None:
        raise UserError(
            "tokens", ids.shape, f"sequences of 2 to {buckets[-1]} tokens", "cut the text into shorter ones"
        )
    if not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() >= spec.vocab_size:
        raise UserError("tokens", f"{ids.dtype} from {ids.min()} to {ids.max()}", f"ids 0 to {spec.vocab_size - 1}")
    if mask.shape != ids.shape or not np.isin(mask, (0, 1)).all():
        raise UserError("loss_mask", mask.shape, f"zeros and ones of shape {ids.shape}")
    missing = ((0, 0), (0, bucket - ids.shape[1]))
    # The last token of a row predicts nothing, and padding must not become its target.
    kept = np.concatenate([mask[:, :-1], np.zeros_like(mask[:, :1])], axis=1)
    return np.pad(ids.astype(np.int32), missing), np.pad(kept, missing)


def factor_rank(
    factors: Factors, spec: DecoderSpec, targets: Collection[str], max_rank: int | None, wanted: Collection[str] | None
) -> int:
    """Check factors and the names wanted, and return their rank.

    Raises:
        AdapterError: A name, shape or rank that this base does not take.
    """
    shapes = {module: spec.projection_shape(target) for module, target in spec.module_names(tuple(targets))}
    ranks = set()
    for name, factor in factors.items():
        module, half = name[: -len(LORA_A)], name[-len(LORA_A) :]
        if half not in (LORA_A, LORA_B) or module not in shapes:
            raise AdapterError(f"{name}: this trainer takes lora_A and lora_B of {', '.join(targets) or 'no module'}")
        if f"{module}{LORA_B if half == LORA_A else LORA_A}" not in factors:
            raise AdapterError(f"{name}: the other half of the pair is missing")
        rank = factor.shape[0 if half == LORA_A else -1] if factor.ndim == 2 else 0
        rows, columns = shapes[module]
        if rank < 1 or factor.shape != ((rank, columns) if half == LORA_A else (rows, rank)):
            raise AdapterError(f"{name}: shape {factor.shape} does not fit a projection of {columns} to {rows}")
        if not np.isfinite(factor).all():
            raise AdapterError(f"{name}: holds numbers that are not finite")
        ranks.add(rank)
    if len(ranks) != 1:
        raise AdapterError(f"factors of ranks {sorted(ranks)}: one rank for all is needed")
    if max_rank is not None and max(ranks) > max_rank:
        raise AdapterError(f"rank {max(ranks)}: this package trains 1 to {max_rank}")
    if unknown := sorted(set(wanted or ()) - set(factors)):
        raise AdapterError(f"{unknown[0]}: a gradient is wanted of a factor that was not given")
    return ranks.pop()


def refuse_unusable(loss_sum: float, gradients: Factors) -> None:
    """Raises BackendError when a loss or a gradient is not finite."""
    if not np.isfinite(loss_sum):
        raise BackendError("the training step returned a loss that is not finite; lower the learning rate")
    for name, gradient in gradients.items():
        if not np.isfinite(gradient).all():
            raise BackendError(f"the training step returned a gradient of {name} that is not finite")


def _choose(kind: str, package: Package) -> tuple[str, str]:
    """(module, class) of the trainer to open."""
    if kind != "auto" and kind not in TRAINERS:
        raise UserError("trainer", kind, f"auto {' '.join(TRAINERS)}")
    missing: list[str] = []
    for name in TRAINERS if kind == "auto" else (kind,):
        module, class_name, container, libraries = TRAINERS[name]
        absent = [library for library in libraries if importlib.util.find_spec(library) is None]
        if not training_files(package, container):
            missing.append(f"{name}: no training files in container {container}")
        elif absent:
            missing.append(f"{name}: {' '.join(absent)} not installed")
        else:
            return module, class_name
    held = any(training_files(package, container) for _, _, container, _ in TRAINERS.values())
    step = "install one of these" if held else "export the package with export.train_buckets=[64,128]"
    error = BackendError if kind != "auto" and "not installed" in missing[0] else PackageError
    raise error(f"{package.directory}: cannot train here ({'; '.join(missing)}); {step}")
