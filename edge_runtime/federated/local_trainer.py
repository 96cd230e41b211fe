"""A trainer on torch and PEFT, for a mini-PC: the same codes, dequantized once into a transformers model.

The only module of the runtime that imports transformers and peft. It computes what the training graphs compute, keeps
the base in float32 (4 bytes a parameter) and uses a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from edge_runtime.federated.trainer import (
    LORA_A,
    Factors,
    Floats,
    Tokens,
    factor_rank,
    fit_batch,
    refuse_unusable,
    training_files,
)
from edge_runtime.formats.decoder import HEAD, PROJECTIONS, DecoderSpec
from edge_runtime.formats.errors import BackendError, PackageError
from edge_runtime.formats.int4 import QuantizedTensor, Weights, dequantize, load_weights
from edge_runtime.formats.package import Package

CONTAINER = "torch"
SHORTEST_BUCKET_TOKENS, BATCH_SEQUENCES = 32, 64
_SLOT = "device"  # PEFT's name for the one adapter


class LocalTrainer:
    """``torch/weights.safetensors`` in torch. See ``Trainer``."""

    name = "torch"
    targets = PROJECTIONS
    max_rank = None
    batch_sequences = BATCH_SEQUENCES

    def __init__(self, weights: Path, spec: DecoderSpec, threads: int, device: str) -> None:
        """Use ``open``."""
        torch.set_num_threads(threads)
        self._spec, self._device = spec, torch.device(device)
        stored_spec, stored = load_weights(weights)
        if stored_spec != spec:
            raise PackageError(f"{weights}: holds another decoder than the manifest describes; get the package again")
        self._base: Any = build_model(spec, stored).to(self._device)
        self._adapted: Any = None
        self._modules: frozenset[str] = frozenset()
        self._rank = 0
        self.buckets = _buckets(spec.context_tokens)

    @classmethod
    def open(cls, package: Package, *, threads: int, device: str | None = None) -> LocalTrainer:
        """Dequantize the base and load it.

        Args:
            package: Verified; the weights' digest was checked when it was opened.
            threads: Of torch, for the whole process.
            device: ``cpu`` or ``cuda``; None takes a GPU where there is one.

        Raises:
            PackageError: The package holds no weights for torch, or those of another decoder.
            BackendError: The decoder has no counterpart in transformers, or the device is not there.
        """
        files = training_files(package, CONTAINER)
        if not files:
            raise PackageError(
                f"{package.directory}: container {CONTAINER} holds no weights here; "
                "export the package with export.torch_base=true"
            )
        if package.manifest.files[files[0]].sha256 != package.manifest.base_digest:
            raise PackageError(
                f"{package.directory}: {files[0]} is not the base that adapters of this package belong to"
            )
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return cls(package.path(files[0]), package.manifest.decoder, threads, chosen)
        except RuntimeError as error:  # torch's own, for a device that is missing or too small
            raise BackendError(f"torch on {chosen}: {' '.join(str(error).split())[:300]}") from error

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
        parameters = self._set_factors(factors, scale, names)
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in names)
            parameter.grad = None
        loss, count = self._loss(tokens, loss_mask)
        if names:
            loss.backward()
        gradients = {name: parameters[name].grad.detach().cpu().numpy().copy() for name in names}
        refuse_unusable(float(loss.detach()), gradients)
        return float(loss.detach()), count, gradients

    def loss(self, tokens: Tokens, loss_mask: Floats, factors: Factors, scale: float) -> tuple[float, int]:
        """See ``Trainer.loss``."""
        self._set_factors(factors, scale, [])
        with torch.no_grad():
            loss, count = self._loss(tokens, loss_mask)
        refuse_unusable(float(loss), {})
        return float(loss), count

    def close(self) -> None:
        """See ``Trainer.close``. Any later call raises BackendError."""
        self._base = self._adapted = None

    def _loss(self, tokens: Tokens, loss_mask: Floats) -> tuple[torch.Tensor, int]:
        ids, mask = fit_batch(tokens, loss_mask, self._spec, self.buckets, self.batch_sequences)
        inputs = torch.from_numpy(ids.astype(np.int64)).to(self._device)
        counted = torch.from_numpy(mask).to(self._device)
        # Padding stands on the right, where causal attention hides it: no attention mask is needed.
        logits = self._adapted(input_ids=inputs, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), inputs[:, 1:], reduction="none")
        return (losses * counted[:, :-1]).sum(), int(mask.sum())

    def _set_factors(self, factors: Factors, scale: float, names: list[str]) -> dict[str, Any]:
        """Put factors into PEFT's layers, made anew when rank or modules change; the parameters by factor's name."""
        if self._base is None:
            raise BackendError("this trainer is closed; open it again")
        rank = factor_rank(factors, self._spec, self.targets, self.max_rank, names)
        modules = frozenset(name[: -len(LORA_A)] for name in factors)
        if (modules, rank) != (self._modules, self._rank):
            if self._adapted is not None:
                self._base = self._adapted.unload()
            config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(modules), lora_dropout=0.0)
            self._adapted = peft.get_peft_model(self._base, config, adapter_name=_SLOT).eval()
            self._modules, self._rank = modules, rank
        parameters = {}
        for module in sorted(modules):
            layer = self._adapted.get_submodule(f"base_model.model.{module}")
            layer.scaling[_SLOT] = float(scale)
            for half in ("lora_A", "lora_B"):
                parameter = getattr(layer, half)[_SLOT].weight
                with torch.no_grad():
                    parameter.copy_(torch.from_numpy(np.ascontiguousarray(factors[f"{module}.{half}"], np.float32)))
                parameters[f"{module}.{half}"] = parameter
        return parameters


def build_model(spec: DecoderSpec, weights: Weights) -> Any:
    """A transformers model with the dequantized weights, in float32 and frozen.

    Raises:
        BackendError: No architecture of transformers holds these tensors.
    """
    model = _empty_model(spec, weights)
    state = model.state_dict()
    for name, value in weights.items():
        array = dequantize(value) if isinstance(value, QuantizedTensor) else value
        target = state.pop(name, None)
        if target is None or any(given < size for given, size in zip(array.shape, target.shape, strict=False)):
            raise BackendError(f"{name}: transformers' {type(model).__name__} has no place for it")
        with torch.no_grad():  # beyond the target's shape stands only padding
            target.copy_(torch.from_numpy(array[tuple(slice(size) for size in target.shape)].copy()))
    if missing := sorted(set(state) - {f"{HEAD}.weight" if spec.tied_embeddings else ""}):
        raise BackendError(f"{missing[0]}: missing from the weights")
    return model.eval().requires_grad_(False)


def _empty_model(spec: DecoderSpec, weights: Weights) -> Any:
    """Biases and norms say which architecture the tensors belong to; its rotary tables are replaced by the spec's."""
    sizes: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.context_tokens,
        "rms_norm_eps": spec.rms_norm_eps,
        "tie_word_embeddings": spec.tied_embeddings,
        "pad_token_id": None,
    }
    config: Any
    architecture: Any
    prefix = "model.layers.0."
    biased = {name for name in ("q_proj", "o_proj") if f"{prefix}self_attn.{name}.bias" in weights}
    if f"{prefix}self_attn.q_norm.weight" in weights:
        config, architecture = transformers.Qwen3Config, transformers.Qwen3ForCausalLM
        sizes["attention_bias"] = bool(biased)
    elif biased == {"q_proj"}:
        config, architecture = transformers.Qwen2Config, transformers.Qwen2ForCausalLM
    else:
        config, architecture = transformers.LlamaConfig, transformers.LlamaForCausalLM
        sizes |= {"attention_bias": bool(biased), "mlp_bias": f"{prefix}mlp.gate_proj.bias" in weights}
    with torch.random.fork_rng(devices=[]):  # the first values are drawn, and overwritten
        model = architecture(config(**sizes))
    rotary = model.model.rotary_emb
    rotary.inv_freq = torch.tensor(spec.inv_freq, dtype=torch.float32)
    rotary.attention_scaling = spec.rope_attention_factor
    return model.float()


def _buckets(context_tokens: int) -> tuple[int, ...]:
    """Powers of two up to the context, and the context."""
    lengths = [SHORTEST_BUCKET_TOKENS]
    while lengths[-1] < context_tokens:
        lengths.append(lengths[-1] * 2)
    return (*(length for length in lengths if length < context_tokens), context_tokens)
