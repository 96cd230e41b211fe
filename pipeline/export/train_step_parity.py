"""Proof that an exported training step computes torch's loss and gradients, in the runtime that it is meant for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.errors import ExportError
from pipeline.export.lora_slots import LoraSlots
from pipeline.export.train_step import GRADIENT_SUFFIX, LOSS_MASK, LOSS_SUM, TOKENS

RELATIVE_LIMIT = 1e-4  # of a gradient's norm; float32 gives about 1e-5, a wrong term gives 1e-1
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Probe:
    """One batch with LoRA tensors off zero, named and turned as the graphs take them."""

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.float32]
    factors: Mapping[str, NDArray[np.float32]]


def draw_probe(model: Any, spec: DecoderSpec, lora: LoraSlots, tokens: NDArray[np.int32]) -> Probe:
    """A probe over (B, T) ``tokens``: every third position is not counted.

    Where ``spec`` is wider than ``model`` (a padded intermediate size), the factors are zero.
    """
    generator = np.random.default_rng(0)
    factors = {}
    for module, projection in spec.module_names(lora.targets):
        (rows, columns), padded = model.get_submodule(module).weight.shape, spec.projection_shape(projection)
        for half, shape, slot in (
            ("A", (columns, lora.rank), (padded[1], lora.rank)),
            ("B", (lora.rank, rows), (lora.rank, padded[0])),
        ):
            drawn = generator.normal(size=shape) * shape[0] ** -0.5
            factors[f"{module}.lora_{half}.weight"] = _widened(drawn.astype(np.float32), slot)
    mask = (np.arange(tokens.size).reshape(tokens.shape) % 3 > 0).astype(np.float32)
    return Probe(tokens, mask, factors)


def torch_step(model: Any, probe: Probe) -> Arrays:
    """Loss and gradients by torch's own differentiation, the adapters attached as hooks."""
    import torch

    tensors = {name: torch.tensor(factor, requires_grad=True) for name, factor in probe.factors.items()}
    ids = torch.from_numpy(probe.tokens.astype(np.int64))
    with _adapted(model, tensors), torch.enable_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * torch.from_numpy(probe.loss_mask[:, :-1])).sum()
        gradients = torch.autograd.grad(loss, list(tensors.values()))
    found = {name + GRADIENT_SUFFIX: gradient.numpy() for name, gradient in zip(tensors, gradients, strict=True)}
    return {LOSS_SUM: loss.detach().numpy(), **found}


def onnx_step(path: Path, probe: Probe, *, threads: int) -> Arrays:
    """The same from ``train_<T>.onnx`` in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {value.name: value.shape for value in session.get_inputs()}
    # Slots are wider than the projection where the intermediate size was padded.
    factors = {name: _widened(factor, inputs[name]) for name, factor in probe.factors.items()}
    names = [value.name for value in session.get_outputs()]
    values = session.run(names, {TOKENS: probe.tokens, LOSS_MASK: probe.loss_mask, **factors})
    return dict(zip(names, values, strict=True))


def tflite_step(path: Path, probe: Probe, *, threads: int) -> Arrays:
    """The same from the signature ``train_<T>`` of ``train.tflite`` in LiteRT; its batch is filled up with zeros."""
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_path=str(path), num_threads=threads).get_signature_runner(
        f"train_{probe.tokens.shape[1]}"
    )
    batch = int(runner.get_input_details()[TOKENS]["shape"][0])
    missing = ((0, batch - len(probe.tokens)), (0, 0))
    ids, mask = np.pad(probe.tokens, missing), np.pad(probe.loss_mask, missing)
    found: Arrays = runner(**{TOKENS: ids, LOSS_MASK: mask}, **probe.factors)
    return found


def require_same_step(name: str, expected: Arrays, found: Arrays) -> float:
    """The largest relative difference of the loss and of any gradient, by its norm.

    Raises:
        ExportError: It is above ``RELATIVE_LIMIT``, or the step is not finite.
    """
    differences = {}
    for tensor, wanted in expected.items():
        given = np.asarray(found[tensor], np.float64)[tuple(slice(size) for size in wanted.shape)]
        difference = float(np.linalg.norm(given - wanted) / np.linalg.norm(wanted))
        differences[tensor] = difference if math.isfinite(difference) else math.inf
    where = max(differences, key=differences.__getitem__)
    if differences[where] > RELATIVE_LIMIT:
        raise ExportError(
            f"{name}: {where} of the training step differs from torch's by {differences[where]:.2e} of its norm"
            f" (limit {RELATIVE_LIMIT:g}); the file must not ship"
        )
    return differences[where]


def _widened(factor: NDArray[np.float32], shape: Sequence[int | str]) -> NDArray[np.float32]:
    pairs = zip(shape, factor.shape, strict=True)
    return np.pad(factor, [(0, wanted - size if isinstance(wanted, int) else 0) for wanted, size in pairs])


@contextmanager
def _adapted(model: Any, tensors: Mapping[str, Any]) -> Iterator[None]:
    """``y + x A B`` behind every adapted projection while the block runs."""

    def attach(name: str) -> Any:
        layer = model.get_submodule(name)
        rows, columns = layer.weight.shape
        a, b = tensors[f"{name}.lora_A.weight"][:columns], tensors[f"{name}.lora_B.weight"][:, :rows]
        return layer.register_forward_hook(lambda _, inputs, output: output + inputs[0] @ a @ b)

    with ExitStack() as stack:
        for name in dict.fromkeys(name.split(".lora_")[0] for name in tensors):
            stack.callback(attach(name).remove)
        yield
