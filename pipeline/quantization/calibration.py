"""A checkpoint's decoder walked layer by layer over calibration text, with one layer in memory.

Hidden states of all sequences stay in host memory; a layer is loaded from its shards, its matrices are replaced one
after another by what was made of them, and what it then puts out is the next layer's input. So every matrix sees the
inputs that it will have in the quantized model. Matrices with the same input (q, k, v; gate, up) share a statistic.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edge_runtime.formats.decoder import EMBEDDING, FINAL_NORM, module_name
from edge_runtime.formats.int4 import QuantizedTensor
from pipeline.distillation.checkpoint_files import read_config, require_finite
from pipeline.quantization.gptq import accumulate_hessian, make_hessian
from pipeline.quantization.scales import unpack
from pipeline.quantization.source import Checkpoint, read_rows, row_blocks

STEPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Projections of a layer in the order of the forward pass; those of one step have the same input."""

_BATCH_TOKENS = 8192
Floats = Mapping[str, torch.Tensor]
LayerWeights = dict[str, "QuantizedTensor | NDArray[np.float32]"]
Quantize = Callable[[Floats, torch.Tensor], Mapping[str, QuantizedTensor]]
"""(weights by name as stored, statistic of their one input) -> codes by name; the statistic may be overwritten."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """A checkpoint on disk, and its modules without weights.

    Attributes:
        source: Where each tensor is.
        model: On the meta device; its FFN is zero-padded to whole groups.
        rotary: Gives rotary cosines and sines, on the device.
        device: Computes.
        dtype: That it computes in.
    """

    source: Checkpoint
    model: Any
    rotary: nn.Module
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def open(cls, source: Checkpoint, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Decoder:
        """Take an open checkpoint. Where no type is given it computes in bf16 on GPUs, else in fp32."""
        device = torch.device(device)
        with torch.device("meta"):
            model = _bare_model(source)
        rotary = type(model.model.rotary_emb)(config=model.config).to(device)
        usual = torch.bfloat16 if device.type == "cuda" else torch.float32
        return cls(source, model, rotary, device, dtype or usual)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self.model.config.num_hidden_layers)

    @property
    def tied(self) -> bool:
        """The head is the embedding."""
        return self.source.spec.tied_embeddings

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored, the FFN's zero-padded, on the CPU.

        Raises:
            UserError: It is not finite.
        """
        from safetensors import safe_open

        place = self.source.tensors[name]
        with safe_open(place.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        require_finite(name, tensor)
        missing = [width for have, want in zip(place.stored, place.shape, strict=True) for width in (want - have, 0)]
        return nn.functional.pad(tensor, missing[::-1]) if any(missing) else tensor


def load_model(source: Checkpoint, device: torch.device | str = "cpu") -> Any:
    """The whole model in fp32, its FFN zero-padded to whole groups."""
    decoder, model = Decoder.open(source), _bare_model(source)
    model.load_state_dict({name: decoder.read(name).float() for name in source.tensors}, strict=False)
    return model.to(device)


def embed(decoder: Decoder, tokens: NDArray[np.int32], embedding: QuantizedTensor | None) -> list[torch.Tensor]:
    """The first layer's input for sequences (S, T), in batches (B, T, H) in host memory; from codes, or as stored."""
    span = max(1, _BATCH_TOKENS // tokens.shape[1])
    return embed_batches(decoder, [tokens[at : at + span] for at in range(0, len(tokens), span)], embedding)


@torch.no_grad()
def embed_batches(
    decoder: Decoder, batches: Sequence[NDArray[np.int32]], embedding: QuantizedTensor | None
) -> list[torch.Tensor]:
    """As ``embed``, of batches (B, T) of any lengths; rows that no token has are not kept."""
    ids = np.unique(np.concatenate([batch.ravel() for batch in batches]))
    if embedding is None:
        rows = _embedding_rows(decoder, ids)
    else:
        scales = embedding.scales if len(embedding.scales) == 1 else embedding.scales[ids]
        rows = unpack(QuantizedTensor(embedding.packed[ids], scales, embedding.bits, embedding.columns))
    rows = rows.to(decoder.dtype)
    places = (torch.from_numpy(np.searchsorted(ids, batch)) for batch in batches)
    return [_pinned(rows[place], decoder.device) for place in places]


@torch.no_grad()
def quantize_layer(
    decoder: Decoder, index: int, hidden: list[torch.Tensor], quantize: Quantize, *, whole_hessian: bool
) -> LayerWeights:
    """Quantize the matrices of a layer, and put its output in the place of its input.

    Args:
        decoder: Where weights are read.
        index: Of the layer, all before it done.
        hidden: Its input; overwritten.
        quantize: Makes codes of the matrices of a step.
        whole_hessian: The statistic is (K, K), the sum of ``x x^T``; otherwise (K,), its diagonal.

    Returns:
        All weights of the layer by name, vectors as float32.
    """
    layer, prefix = _loaded(decoder, index)
    weights: LayerWeights = {
        f"{prefix}{name}": vector.float().cpu().numpy() for name, vector in layer.named_parameters() if vector.ndim < 2
    }
    for step in STEPS:
        names = [f"{module_name(index, projection)}.weight" for projection in step]
        asked = layer.get_submodule(module_name(index, step[0]).removeprefix(prefix))
        statistic = _statistic(decoder, layer, asked, hidden, whole_hessian)
        made = quantize({name: decoder.read(name).to(decoder.device) for name in names}, statistic)
        del statistic
        _replace(decoder, layer, prefix, made)
        weights.update(made)
    _advance(decoder, layer, hidden)
    return weights


@torch.no_grad()
def pass_layer(decoder: Decoder, index: int, hidden: list[torch.Tensor], weights: LayerWeights | None = None) -> None:
    """Put a layer's output in the place of its input: with weights that were quantized before, or with its own."""
    made = {name: value for name, value in (weights or {}).items() if isinstance(value, QuantizedTensor)}
    layer, _ = _loaded(decoder, index, made)
    _advance(decoder, layer, hidden)


@torch.no_grad()
def head_statistic(decoder: Decoder, hidden: list[torch.Tensor], *, whole_hessian: bool) -> torch.Tensor:
    """Of the head's input: the last norm of the last layer's output."""
    norm = decoder.model.model.norm
    weight = decoder.read(f"{FINAL_NORM}.weight").to(decoder.device, decoder.dtype)
    norm.load_state_dict({"weight": weight}, assign=True)
    found = _make_statistic(decoder, weight.shape[0], whole_hessian)
    for batch in hidden:
        _accumulate(found, norm(batch.to(decoder.device)))
    norm.to("meta")
    return found


def _bare_model(source: Checkpoint) -> Any:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(read_config(source.path))
    config.intermediate_size, config.tie_word_embeddings = source.spec.intermediate_size, source.spec.tied_embeddings
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()


def _embedding_rows(decoder: Decoder, ids: NDArray[np.int32]) -> torch.Tensor:
    """Rows of ids that grow, without the whole matrix in memory."""
    tensor = decoder.source.tensors[f"{EMBEDDING}.weight"]
    blocks = [(start, ids[slice(*np.searchsorted(ids, (start, stop)))]) for start, stop in row_blocks(tensor)]
    found = [read_rows(tensor, int(start), int(here[-1]) + 1)[here - start] for start, here in blocks if len(here)]
    return torch.from_numpy(np.concatenate(found))


class _Seen(Exception):  # ends a forward pass of which no more is needed
    pass


def _loaded(
    decoder: Decoder, index: int, made: Mapping[str, QuantizedTensor] = MappingProxyType({})
) -> tuple[Any, str]:
    """A layer and the beginning of its weights' names; what was made of a weight stands in its place."""
    layer, prefix = decoder.model.model.layers[index], f"model.layers.{index}."
    state = {}
    for name, _ in layer.named_parameters():
        given = made.get(f"{prefix}{name}")
        value = decoder.read(f"{prefix}{name}") if given is None else unpack(given, decoder.device)
        state[name] = value.to(decoder.device, decoder.dtype)
    layer.load_state_dict(state, assign=True)
    return layer, prefix


def _replace(decoder: Decoder, layer: Any, prefix: str, made: Mapping[str, QuantizedTensor]) -> None:
    for name, tensor in made.items():
        parameter = layer.get_parameter(name.removeprefix(prefix))
        parameter.copy_(unpack(tensor, decoder.device))


def _statistic(decoder: Decoder, layer: Any, asked: Any, hidden: list[torch.Tensor], whole: bool) -> torch.Tensor:
    """Of the input of one of a layer's modules; the layer runs no further than to it."""
    found = _make_statistic(decoder, asked.in_features, whole)

    def look(_module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        _accumulate(found, arguments[0])
        raise _Seen

    handle = asked.register_forward_pre_hook(look)
    try:
        for batch in hidden:
            with suppress(_Seen):
                _run(decoder, layer, batch)
    finally:
        handle.remove()
    return found


def _make_statistic(decoder: Decoder, columns: int, whole: bool) -> torch.Tensor:
    return make_hessian(columns, decoder.device) if whole else torch.zeros(columns, device=decoder.device)


def _accumulate(statistic: torch.Tensor, inputs: torch.Tensor) -> None:
    if statistic.ndim == 2:
        accumulate_hessian(statistic, inputs)
    else:
        statistic.add_(inputs.float().square().sum(dim=(0, 1)))


def _advance(decoder: Decoder, layer: Any, hidden: list[torch.Tensor]) -> None:
    for batch in hidden:
        batch.copy_(_run(decoder, layer, batch))
    layer.to("meta")


def _run(decoder: Decoder, layer: Any, batch: torch.Tensor) -> torch.Tensor:
    """Causal attention over the whole sequence, as without a mask."""
    states = batch.to(decoder.device, non_blocking=True)
    positions = torch.arange(states.shape[1], device=decoder.device)[None]
    rotations = decoder.rotary(states, positions)
    found: torch.Tensor = layer(
        states, attention_mask=None, position_ids=positions, position_embeddings=rotations, use_cache=False
    )
    return found


def _pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor
