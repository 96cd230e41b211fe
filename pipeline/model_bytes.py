"""Bytes of models on disk and in memory, from sizes alone.

They follow from what the stages write and hold; how many distinct tokens 32 draws hit rests on a measurement
(benchmarks/README.md, "Stored targets"), and the bytes of graphs were fitted to a demo run.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import prod

from pipeline.artifacts import PROJECT, located
from pipeline.export.assembly import training_containers
from pipeline.quantization.grid import Grid, fitting_group, padded_columns, stored_bytes
from pipeline.settings import Config
from pipeline.settings_training import CheckpointTeacher
from pipeline.sizes import ModelSizes

RATIOS = "submodel.width and the other ratios"
TOKENIZER_BYTES_A_TOKEN = 60
_STATES_KEPT = 2  # while a third is written
_ADAM_BYTES = 12  # a parameter of a training state: the weight and two moments
_GRAPH_BYTES_A_LAYER = {
    "onnx": 13_000, "tflite": 17_000, "tflite_legacy": 17_000,  # two graphs each
    "gguf": 700, "safetensors": 3_000, "safetensors_linear": 3_000,  # names and shapes
}  # fmt: skip
_TRAIN_GRAPH_BYTES_A_LAYER, _HEADER_BYTES_A_LAYER = 13_600, 2_400
_STREAMED_TOKENS, _STREAMED_HEAD_WEIGHTS = 2048, 1 << 25  # at once, as quantization/streamed_logits.py has them


def stored_bytes_a_position(vocab_size: int, draws: int) -> float:
    """Stored targets, in the mean over text: a bit a draw, and the distinct ids bit-packed.

    Text is taken for Zipf distributions with exponents evenly from 1 to 4, as benchmarks/stored_targets.py does.
    """
    return draws / 8 + _distinct(vocab_size, draws) * (vocab_size - 1).bit_length() / 8


def weights_bytes(sizes: ModelSizes, config: Config) -> float:
    """Codes, fp16 scales and fp32 vectors, as they are stored once for every container."""
    mixed = (config.quantize.weight_ratio_max or 0.0) * 2 * sizes.params
    return max(least_weights_bytes(sizes, config), mixed) + _HEADER_BYTES_A_LAYER * sizes.num_hidden_layers


def least_weights_bytes(sizes: ModelSizes, config: Config) -> float:
    """Codes of ``quantize.bits`` everywhere, scales and vectors, without a file around them."""
    return sum(stored_bytes(shape, grid) for shape, grid in _matrices(sizes, config)) + 4 * sizes.vector_params


def package_bytes(sizes: ModelSizes, config: Config) -> float:
    """The files of a submodel: containers, graphs for trainers, tokenizer."""
    export, codes = config.export, weights_bytes(sizes, config)
    containers = [*export.containers, *training_containers(config)]
    total = sum(sizes.params if name == "tflite_legacy" else codes for name in containers)
    matrices = _matrices(sizes, config)
    if "safetensors" in containers:  # scales in fp32, of the smallest group
        smallest = min(grid.group for _, grid in matrices)
        total += sum(prod(shape) * (4 / smallest - 2 / grid.group) for shape, grid in matrices)
    if "safetensors_linear" in containers:  # embedding and head in fp32
        total += 4 * sizes.embedding_params - stored_bytes(*matrices[0])
    tokenizers = 1 + len(export.containers) - len(export.run_containers)
    return total + _graph_bytes(sizes, config) + tokenizers * TOKENIZER_BYTES_A_TOKEN * sizes.vocab_size


def teacher_bytes(config: Config, sizes: ModelSizes) -> float:
    """Weights of the teacher as it is loaded for inference; one that was trained here is loaded in fp32."""
    return sizes.loaded_bytes(config.teacher.load if isinstance(config.teacher, CheckpointTeacher) else "fp32")


def training_bytes(
    sizes: ModelSizes, config: Config, bf16: bool, batch_sequences: int, others: int = 0, longest_tokens: int = 0
) -> dict[str, float]:
    """Weights, gradients and moments in fp32, what autograd keeps of one forward pass, and logits of a chunk.

    Autograd keeps of each layer what both norms read and scale, in fp32, and in the type of the products the inputs of
    the projections (a copy each where they had to be cast), q, k, v, the attention's output, and four times the FFN's
    inner size. Compiled layers keep less.
    """
    distill = config.distill
    tokens = min(distill.micro_sequences, batch_sequences) * distill.sequence_tokens
    tokens = max(tokens, longest_tokens)
    product = 2.0 if bf16 else 4.0
    queries, values = sizes.head_dim * sizes.num_attention_heads, sizes.head_dim * sizes.num_key_value_heads
    inputs = (5 if bf16 else 2) * sizes.hidden_size
    layer = 4 * 4.0 * sizes.hidden_size + (2 * 4.0 * (queries + values) if sizes.normed_heads else 0)
    layer += product * (inputs + 2 * queries + 2 * values + 4 * sizes.intermediate_size)
    if distill.recompute:  # the inputs of all layers, and one layer's own
        kept = 4.0 * sizes.num_hidden_layers * sizes.hidden_size + layer
    else:
        kept = sizes.num_hidden_layers * layer
    kept += 2 * 4.0 * sizes.hidden_size  # of the last norm
    chunk = 3 * 4.0 * min(distill.chunk_tokens, tokens) * sizes.vocab_size
    copies = 2.0 * sizes.params if bf16 else 0.0
    return {
        RATIOS: 16.0 * sizes.params + copies + 4.0 * others * sizes.params,
        "distill.micro_sequences, or distill.recompute=true": tokens * kept,
        "distill.chunk_tokens": chunk,
    }


def forward_bytes(sizes: ModelSizes, tokens: int, config: Config) -> float:
    """Activations of one layer, and the residual stream."""
    width = 4.0 if getattr(config.teacher, "load", "fp32") == "fp32" else 2.0
    return width * tokens * (4 * sizes.hidden_size + 3 * sizes.intermediate_size)


def streamed_bytes(sizes: ModelSizes, tokens: int) -> float:
    """What computes logits with one layer, or a part of the head, in memory: weights as stored and in fp32, states."""
    activations = 4.0 * min(tokens, _STREAMED_TOKENS) * (4 * sizes.hidden_size + 3 * sizes.intermediate_size)
    return max(6.0 * sizes.layer_params + activations, head_block_bytes(sizes)) + 4.0 * sizes.hidden_size * tokens


def head_block_bytes(sizes: ModelSizes) -> float:
    """A block of the head as stored and in fp32, with what it is multiplied into."""
    return 10.0 * min(_STREAMED_HEAD_WEIGHTS, sizes.vocab_size * sizes.hidden_size)


def runtime_bytes(codes_bytes: float) -> float:
    """An open package: its codes, and what the runtime packs of them."""
    return 1.15 * codes_bytes


def taken_bytes(config: Config, sizes: ModelSizes) -> float:
    """Of a checkpoint taken over: nothing where it lies on the run's disk, which shares the files."""
    path = getattr(config.teacher, "path", None)
    shares = path is None or located(path).stat().st_dev == PROJECT.stat().st_dev
    return 1e5 if shares else 2.0 * sizes.params


def state_bytes(sizes: ModelSizes, config: Config, steps: int) -> float:
    """Training states of so many steps that lie on disk at once."""
    return float(_states(config, steps) * _ADAM_BYTES * sizes.params)


def copied_bytes(sizes: ModelSizes, config: Config, steps: int) -> float:
    """A training state on its way to the disk."""
    return float(min(_states(config, steps), 1) * _ADAM_BYTES * sizes.params)


def _states(config: Config, steps: int) -> int:
    """How many of them."""
    return min((steps - 1) // config.distill.checkpoint_every_steps, _STATES_KEPT + 1) if steps else 0


def _matrices(sizes: ModelSizes, config: Config) -> list[tuple[tuple[int, int], Grid]]:
    """Shapes of the stored matrices with their grids; embedding and head come first."""
    bits, group = config.quantize.bits, config.quantize.group
    stored = replace(sizes, intermediate_size=padded_columns(sizes.intermediate_size, group))
    return [(shape, Grid(bits, fitting_group(shape[1], group), True)) for shape in stored.matrices]


def _graph_bytes(sizes: ModelSizes, config: Config) -> float:
    """Graphs without their codes; those for training hold rotary tables, in TFLite also what is masked."""
    export = config.export
    total = float(sizes.num_hidden_layers * sum(_GRAPH_BYTES_A_LAYER[name] for name in export.containers))
    for tokens in export.train_buckets if export.lora_targets else ():
        graph = _TRAIN_GRAPH_BYTES_A_LAYER * sizes.num_hidden_layers
        if "onnx" in export.containers:
            total += 2 * (graph + 8 * tokens * sizes.head_dim)
        if "tflite" in export.containers:
            total += 2 * (graph + 4 * tokens * tokens)
    return total


@lru_cache
def _distinct(vocab_size: int, draws: int) -> float:
    """Expected distinct ids of so many draws."""
    import numpy as np

    ranks, found = np.log(np.arange(1, vocab_size + 1)), []
    for exponent in np.linspace(1, 4, 13):
        p = np.exp(-exponent * ranks)
        found.append(float((1 - (1 - p / p.sum()) ** draws).sum()))
    return sum(found) / len(found)
