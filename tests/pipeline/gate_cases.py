"""A small signed package, text to judge on, and adapters that PEFT trained a little, a lot and the wrong way."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from edge_runtime.formats.decoder import PROJECTIONS, DecoderSpec
from edge_runtime.formats.int4 import QuantizedTensor, dequantize
from edge_runtime.formats.lora import Adapter, save_adapter
from edge_runtime.formats.manifest import AdapterSlots
from edge_runtime.formats.package import seal_package
from edge_runtime.formats.signing import signing_key
from pipeline.data.packing import pack_rows
from pipeline.export.checkpoint import float_weights, spec_of
from pipeline.export.lora_slots import LoraSlots
from pipeline.export.onnx_graph import write_onnx
from pipeline.export.tflite_graph import write_tflite
from pipeline.quantization.rounding import quantize_tensor

BASE_DIGEST, OTHER_DIGEST = "ab" * 32, "cd" * 32
RANK, ALPHA = 4, 8
STEPS = {"better": 8, "best": 40}


@dataclass(frozen=True)
class Trial:
    """What the tests share; read only.

    Attributes:
        root: A finished run: ``artifacts/packages/toy`` and ``artifacts/corpus``.
        model: The dequantized base in transformers.
        adapters: ``better`` and ``best`` than the base, and ``worse``.
    """

    root: Path
    model: PreTrainedModel
    spec: DecoderSpec
    adapters: Mapping[str, Adapter]

    @property
    def package(self) -> Path:
        return self.root / "artifacts" / "packages" / "toy"

    @property
    def text(self) -> Path:
        return self.root / "artifacts" / "corpus" / "held_out.jsonl"


def make_trial(root: Path, model: PreTrainedModel, tokenizer: Tokenizer, texts: list[str]) -> Trial:
    spec, floats = spec_of(model, 64), float_weights(model)
    weights = {
        name: quantize_tensor(value, bits=4, group=32, rounding="rtn", positive_scales=True)
        if value.ndim == 2
        else value
        for name, value in floats.items()
    }
    state = {name: dequantize(w) if isinstance(w, QuantizedTensor) else w for name, w in weights.items()}
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()}, strict=False)
    trial = Trial(root, model, spec, {})
    for name in ("onnx", "tflite"):
        (trial.package / name).mkdir(parents=True)
    slots = LoraSlots(PROJECTIONS, 8)
    write_onnx(trial.package / "onnx", spec, weights, lora=slots, accuracy_level=4)
    write_tflite(
        trial.package / "tflite" / "model.tflite", spec, weights, profile="current", lora=slots, prefill_tokens=16
    )
    tokenizer.save(str(trial.package / "tokenizer.json"))
    seal(trial.package, spec)
    trial.text.parent.mkdir(parents=True)
    trial.text.write_text("".join(json.dumps({"document": "0", "text": text}) + "\n" for text in texts))
    lesson = [text.replace("function", "method").replace("many", "several") for text in texts]
    return replace(trial, adapters=train_adapters(trial, pack_texts(tokenizer, lesson, 32)))


def pack_texts(tokenizer: Tokenizer, texts: Iterable[str], sequence_tokens: int) -> NDArray[np.int32]:
    rows = ({"text": text} for text in texts)
    return pack_rows(
        tokenizer, rows, template=None, eos_id=1, sequence_tokens=sequence_tokens, max_sequences=None
    ).tokens  # fmt: skip


def seal(package: Path, spec: DecoderSpec, **fields: Any) -> None:
    values: dict[str, Any] = {
        "name": "toy", "version": "0.1.0", "counter": 1, "base_digest": BASE_DIGEST, "decoder": spec, "bos": 0,
        "eos": (1,), "licence": "Apache-2.0", "key": signing_key(),
        "containers": {"onnx": AdapterSlots(PROJECTIONS), "tflite": AdapterSlots(PROJECTIONS, 8)},
    }  # fmt: skip
    seal_package(package, **(values | fields))


def train_adapters(trial: Trial, sequences: NDArray[np.int32]) -> dict[str, Adapter]:
    torch.manual_seed(1)
    wrapped = get_peft_model(trial.model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(PROJECTIONS)))
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=0.01)
    batch = torch.from_numpy(sequences[:16].astype(np.int64))
    adapters = {}
    for step in range(1, max(STEPS.values()) + 1):
        optimizer.zero_grad()
        wrapped(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        adapters |= {name: from_peft(wrapped) for name, wanted in STEPS.items() if wanted == step}
    wrapped.unload()
    best = adapters["best"]
    backwards = {module: (lora_a, -lora_b) for module, (lora_a, lora_b) in best.pairs.items()}
    return adapters | {"worse": Adapter(RANK, best.scale, backwards, BASE_DIGEST)}


def from_peft(model: PeftModel) -> Adapter:
    pairs = {
        name.removeprefix("base_model.model."): (
            module.lora_A["default"].weight.numpy(force=True).copy(),
            module.lora_B["default"].weight.numpy(force=True).copy(),
        )
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }
    return Adapter(RANK, ALPHA / RANK, pairs, BASE_DIGEST)


def write_candidate(directory: Path, adapter: Adapter, package: Path, **facts: Any) -> Path:
    """As a federation writes it."""
    save_adapter(directory, adapter)
    values = {
        "federation": "demo", "round": 3, "base_digest": adapter.base_digest, "package": str(package),
        "held_out_loss": 4.25,
    }  # fmt: skip
    (directory / "candidate.json").write_text(json.dumps(values | facts))
    return directory


def ledger_line(number: int, **figures: Any) -> str:
    record = {
        "event": "round", "round": number, "phase": "a", "loss_before": 5.0 - number, "loss_after": 4.9 - number,
        "held_out_loss": None, "bytes_up": 100, "bytes_down": 10, "epsilon": None, "dispersion": 0.5, "folded": 3,
    }  # fmt: skip
    return json.dumps(record | figures) + "\n"


def peft_loss(trial: Trial, directory: Path, sequences: NDArray[np.int32]) -> float:
    """Mean loss of the sequences with an adapter's directory in PEFT, in nats a token."""
    wrapped = PeftModel.from_pretrained(trial.model, directory).eval()
    try:
        return model_loss(wrapped, sequences)
    finally:
        wrapped.unload()


def model_loss(model: Any, sequences: NDArray[np.int32]) -> float:
    batch = torch.from_numpy(sequences.astype(np.int64))
    with torch.no_grad():
        loss = float(model(input_ids=batch, labels=batch).loss)
    assert math.isfinite(loss)
    return loss
