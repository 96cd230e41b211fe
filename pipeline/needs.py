"""What each stage needs of disk, memory and arithmetic, from sizes alone.

Bytes follow from what the stages write and hold; two things cannot be known before and rest on measurements: how many
distinct tokens 32 draws hit (benchmarks/README.md, "Stored targets"), and how large the user's text becomes. The bytes
of graphs and the seconds of stages that are no matrix products were fitted to a demo run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from pathlib import Path

from pipeline.artifacts import PROJECT, located
from pipeline.export.assembly import training_containers
from pipeline.flow import Stage
from pipeline.quantization.grid import Grid, fitting_group, padded_columns, stored_bytes
from pipeline.settings import CheckpointTeacher, Config
from pipeline.sizes import FamilySizes, ModelSizes, is_downloaded

_PROCESS_BYTES = 0.45e9  # torch, transformers and a model's code loaded
_PROCESS_S = 1.5
_DOCUMENTATION_BYTES = 7e6  # what CPython's documentation is when cleaned
_DOCUMENTED_SHARE = 0.34  # of the sources of the packages in conf/data/python_library.yaml
_CLEANED_BYTES_A_S = 1.2e6  # of one worker
_TOKENIZER_BYTES_A_TOKEN = 60
_HELD_OUT_DRAWS, _RECORDED_SEQUENCES, _RECORDED_POSITIONS = 64, 8, 1024  # as stages/targets.py has them
RATIOS = "submodel.width and the other ratios"
WITHOUT_QAD = "quantize.qad_steps=0 quantize.qad_scale_steps=0"
_STATES_KEPT = 2  # while a third is written
_ADAM_BYTES = 12  # a parameter of a training state: the weight and two moments
_LARGEST_EXACT_CHECK_BYTES = 500e6
_GRAPH_BYTES_A_LAYER = {
    "onnx": 13_000, "tflite": 17_000, "tflite_legacy": 17_000,  # two graphs each
    "gguf": 700, "safetensors": 3_000, "safetensors_linear": 3_000,  # names and shapes
}  # fmt: skip
_TRAIN_GRAPH_BYTES_A_LAYER, _HEADER_BYTES_A_LAYER = 13_600, 2_400
_QUANTIZE_S_A_WEIGHT = {"rtn": 0.013e-6, "mse": 0.035e-6, "weighted_mse": 0.05e-6, "gptq": 0.5e-6}  # of one core
_SENSITIVITY_BYTES_A_WEIGHT = 7.5  # the model in fp32, and every matrix in 4 bits and in 8
_QUANTIZE_BYTES_A_WORKER = 0.1e9  # blocks of rows on their way, and the scales of a 7B's embedding
_CALIBRATION_PASSES = {"weighted_mse": 4, "gptq": 6}  # over a layer up to each input, whole, and for a tied head
_READ_BYTES = 64e6  # logits of a batch that answers tasks
_STREAMED_TOKENS, _STREAMED_HEAD_WEIGHTS = 2048, 1 << 25  # at once, as quantization/streamed_logits.py has them
_COMPARED_POSITIONS = 128  # in double precision at once, as evaluation/figures.py has them
_CURVE_POINTS = 8  # at most, as quantization/allocation.py has them
_WRITE_S_A_WEIGHT = 0.04e-6  # to write codes into a container and to read them back


@dataclass(frozen=True, slots=True)
class Needs:
    """What one execution needs.

    Attributes:
        disk_bytes: What it leaves.
        scratch_bytes: What it takes of the disk besides, until it ends.
        host_bytes: Memory of the process wherever the models are.
        device_bytes: Memory on the GPU, or, without one, of the process too; by the setting that governs each part.
        training_flops: Operations of forward and backward passes, on the GPU where there is one.
        forward_flops: Operations of forward passes there.
        steps: Updates of weights; each costs something whatever the sizes.
        host_flops: Operations that the CPU does in any case.
        fixed_s: Seconds that no arithmetic explains, on the CPU.
    """

    disk_bytes: float
    host_bytes: float
    scratch_bytes: float = 0.0
    device_bytes: Mapping[str, float] = field(default_factory=dict)
    training_flops: float = 0.0
    forward_flops: float = 0.0
    host_flops: float = 0.0
    steps: int = 0
    fixed_s: float = _PROCESS_S


def estimate(stage: Stage, config: Config, family: FamilySizes | None, *, bf16: bool) -> Needs:
    """Needs of one execution.

    Args:
        stage: Any of a run.
        config: Of the submodel, where the stage is for one.
        family: Sizes of the models; None will do for ``clean`` alone.
        bf16: Matrices are multiplied in bfloat16 on the machine.
    """
    if family is None:
        return _clean(config)
    return _STAGES[stage.name](config, family, bf16)


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
    return total + _graph_bytes(sizes, config) + tokenizers * _TOKENIZER_BYTES_A_TOKEN * sizes.vocab_size


def _matrices(sizes: ModelSizes, config: Config) -> list[tuple[tuple[int, int], Grid]]:
    """Shapes of the stored matrices with their grids; embedding and head come first."""
    bits, group = config.quantize.bits, config.quantize.group
    stored = replace(sizes, intermediate_size=padded_columns(sizes.intermediate_size, group))
    return [(shape, Grid(bits, fitting_group(shape[1], group), True)) for shape in stored.matrices]


def _clean(config: Config) -> Needs:
    path = config.data.path
    if path is None:
        text = _DOCUMENTATION_BYTES + sum(map(_documented_bytes, getattr(config.data, "packages", ())))
    else:
        root = located(path)
        text = sum(file.stat().st_size for file in ([root] if root.is_file() else root.rglob("*")) if file.is_file())
    return Needs(text, 0.3e9, scratch_bytes=text, fixed_s=text / _CLEANED_BYTES_A_S / config.data.workers)


def _documented_bytes(package: str) -> float:
    """The documentation in an installed package's sources; 0 for one that is not there, which stage clean refuses."""
    from importlib import metadata

    try:
        files = metadata.distribution(package).files or ()
    except metadata.PackageNotFoundError:
        return 0.0
    paths = (Path(str(file.locate())) for file in files if file.suffix == ".py")
    return _DOCUMENTED_SHARE * sum(path.stat().st_size for path in paths if path.is_file())


def _teacher(config: Config, family: FamilySizes, bf16: bool) -> Needs:
    teacher, sizes = config.teacher, family.teacher
    tokenizer = float(_TOKENIZER_BYTES_A_TOKEN * sizes.vocab_size)
    if isinstance(teacher, CheckpointTeacher):
        fetched = 0.0 if teacher.kind == "local" or is_downloaded(teacher) else 2.0 * sizes.params
        if teacher.trains:
            return _corrected(config, teacher, sizes, bf16, tokenizer + fetched)
        return Needs(tokenizer + fetched, _PROCESS_BYTES)
    tokens = teacher.steps * teacher.batch_sequences * config.distill.sequence_tokens
    return Needs(
        4.0 * sizes.params + tokenizer, _PROCESS_BYTES + _copied_bytes(sizes, config, teacher.steps),
        scratch_bytes=_state_bytes(sizes, config, teacher.steps),
        device_bytes=_training_bytes(sizes, config, bf16, teacher.batch_sequences),
        training_flops=tokens * sizes.training_flops(config.distill.sequence_tokens), steps=teacher.steps,
    )  # fmt: skip


def _corrected(config: Config, teacher: CheckpointTeacher, sizes: ModelSizes, bf16: bool, disk_bytes: float) -> Needs:
    """A checkpoint that is fine-tuned becomes another one; beside an adapter its weights have no gradients."""
    steps, batch, length = teacher.correction_steps, teacher.correction_batch_sequences, config.distill.sequence_tokens
    tokens, weights = steps * batch * length, sizes.loaded_bytes(teacher.load)
    device = _training_bytes(sizes, config, bf16, batch)
    flops = tokens * sizes.training_flops(length)
    measured = 2 * config.runtime.evaluation_sequences * length * sizes.forward_flops(length)
    if teacher.correction_rank is not None:
        device = {**device, RATIOS: 0.0, "teacher.load": weights}
        return Needs(disk_bytes + weights, _PROCESS_BYTES, device_bytes=device, training_flops=flops * 2 / 3,
                     forward_flops=measured, steps=steps)  # fmt: skip
    return Needs(
        disk_bytes + weights, _PROCESS_BYTES + _copied_bytes(sizes, config, steps),
        scratch_bytes=_state_bytes(sizes, config, steps), device_bytes=device, training_flops=flops,
        forward_flops=measured, steps=steps,
    )  # fmt: skip


def _targets(config: Config, family: FamilySizes, bf16: bool) -> Needs:
    distill, sizes, length = config.distill, family.teacher, config.distill.sequence_tokens
    train = -(-distill.target_tokens // length) * length
    held_out, ranked = config.runtime.evaluation_sequences * length, distill.importance_sequences * length
    id_bytes = 2 if sizes.vocab_size <= 65_536 else 4
    if distill.signal == "none":
        return Needs(train * (4 + 1) + held_out * (4 + 4), _PROCESS_BYTES)
    stored = train * (stored_bytes_a_position(sizes.vocab_size, distill.draws) + 4 + 1)
    stored += held_out * (4 + 1 + _HELD_OUT_DRAWS * (id_bytes + 4) + 4)
    layers, hidden = sizes.num_hidden_layers, sizes.hidden_size
    stored += 8 * (layers * (sizes.intermediate_size + sizes.num_key_value_heads + 2 * hidden + 1) + 2 * hidden)
    return Needs(
        stored, _PROCESS_BYTES + 3.0 * length * sizes.vocab_size * 4,
        device_bytes={
            "teacher.load": _teacher_bytes(config, sizes),
            "distill.sequence_tokens": _forward_bytes(sizes, _RECORDED_SEQUENCES * length, config)
            + 8.0 * _RECORDED_POSITIONS * sizes.vocab_size,
        },
        forward_flops=(train + 2 * held_out + ranked) * sizes.forward_flops(length),
    )  # fmt: skip


def _distill(config: Config, family: FamilySizes, bf16: bool) -> Needs:
    distill, sizes, length = config.distill, family.submodels[config.submodel.name], config.distill.sequence_tokens
    trained, spoken = (steps * distill.batch_sequences * length for steps in (distill.steps, distill.on_policy_steps))
    if config.submodel.whole:
        return Needs(_taken_bytes(config, sizes), _PROCESS_BYTES)
    runs, taught = (2 if distill.from_scratch_baseline else 1), 0.0
    online = distill.signal == "online" or config.submodel.learns_from != "teacher"
    master = family.submodels.get(config.submodel.learns_from, family.teacher)
    if online or distill.on_policy_steps:
        taught = ((trained if online else 0) + spoken) * master.forward_flops(length)
    measured = (1 + runs) * 2 * config.runtime.evaluation_sequences * length * sizes.forward_flops(length)
    if (larger := family.submodels.get(config.submodel.cut_from)) is not None:
        measured += distill.importance_sequences * length * larger.forward_flops(length)
    longest = distill.context.sequence_tokens if distill.context.steps else 0
    device = _training_bytes(sizes, config, bf16, distill.batch_sequences, runs - 1, longest)
    if taught:
        learns_from_teacher = config.submodel.learns_from == "teacher"
        name = "teacher.load" if learns_from_teacher else "submodel.learns_from"
        device[name] = _teacher_bytes(config, master) if learns_from_teacher else 4.0 * master.params
    context = distill.context
    long_tokens = context.steps * context.batch_sequences * context.sequence_tokens
    pruned = 4.0 * sizes.params if config.submodel.checkpoint is None else 0.0
    phases = [distill.steps] * runs + [distill.on_policy_steps, context.steps]
    return Needs(
        4.0 * sizes.params,
        _PROCESS_BYTES + _copied_bytes(sizes, config, distill.steps) + 3.0 * length * sizes.vocab_size * 4,
        scratch_bytes=pruned + sum(_state_bytes(sizes, config, steps) for steps in phases),
        device_bytes=device,
        training_flops=(runs * trained + spoken) * sizes.training_flops(length)
        + long_tokens * sizes.training_flops(context.sequence_tokens),
        forward_flops=taught + measured,
        steps=sum(phases),
    )


def _quantize(config: Config, family: FamilySizes, bf16: bool) -> Needs:
    sizes = family.submodels[config.submodel.name]
    legacy = sizes.params if "tflite_legacy" in config.export.containers else 0
    quantize, length = config.quantize, config.distill.sequence_tokens
    seconds = _QUANTIZE_S_A_WEIGHT[quantize.rounding] * sizes.params
    # Half of the text ranks, by half a pass a matrix; the other half measures points of the curve by whole ones.
    passes = (7 * sizes.num_hidden_layers + 2) / 4 + (_CURVE_POINTS + 2) / 2
    calibrated = min(length, config.export.context_tokens) * quantize.calibration_sequences
    calibration_passes = _CALIBRATION_PASSES.get(quantize.rounding, 0)
    steps = quantize.qad_rounds * quantize.qad_steps + quantize.qad_scale_steps
    trained, scratch = steps * quantize.qad_batch_sequences * length, 0.0
    device: dict[str, float] = {}
    if quantize.sensitivity_tokens:
        device["quantize.sensitivity_tokens=0"] = _SENSITIVITY_BYTES_A_WEIGHT * sizes.params
    if trained:
        device |= _training_bytes(sizes, config, bf16, quantize.qad_batch_sequences)
        device[WITHOUT_QAD] = 4.0 * sizes.params
        longest = max(quantize.qad_steps, quantize.qad_scale_steps)
        scratch = _state_bytes(sizes, config, longest) + 2 * weights_bytes(sizes, config)  # of two rounds, for a moment
    return Needs(
        weights_bytes(sizes, config) + legacy,
        _PROCESS_BYTES + (4.0 * sizes.hidden_size * calibrated if calibration_passes else 0.0)
        + quantize.workers * _QUANTIZE_BYTES_A_WORKER,
        scratch_bytes=(weights_bytes(sizes, config) if calibration_passes else 0.0) + scratch,
        device_bytes=device,
        training_flops=trained * sizes.training_flops(length),
        forward_flops=passes * quantize.sensitivity_tokens * sizes.forward_flops(length)
        + (calibration_passes * calibrated + trained) * sizes.forward_flops(length),
        fixed_s=_PROCESS_S + seconds, steps=steps,
    )  # fmt: skip


def _export(config: Config, family: FamilySizes, bf16: bool) -> Needs:
    sizes = family.submodels[config.submodel.name]
    codes, files = weights_bytes(sizes, config), package_bytes(sizes, config)
    scratch = files if "tflite_legacy" in config.export.containers else 0.0
    if "onnx" in config.export.containers and codes < _LARGEST_EXACT_CHECK_BYTES:
        scratch = max(scratch, codes)
    copies, positions = len(config.export.containers) + len(training_containers(config)), config.export.parity_positions
    whole = 8.0 * sizes.params if config.export.train_buckets and config.export.lora_targets else 0.0  # gradients
    loaded = max(_runtime_bytes(codes), _streamed_bytes(sizes, positions), whole)
    return Needs(
        files, _PROCESS_BYTES + loaded + positions * sizes.vocab_size * 8,
        scratch_bytes=scratch, fixed_s=_PROCESS_S / 2 + copies * _WRITE_S_A_WEIGHT * sizes.params,
        host_flops=2 * copies * positions * sizes.forward_flops(1),
    )  # fmt: skip


def _evaluate(config: Config, family: FamilySizes, bf16: bool) -> Needs:
    sizes, runtime, containers = (
        family.submodels[config.submodel.name],
        config.runtime,
        len(config.export.run_containers),
    )
    length = min(config.distill.sequence_tokens, config.export.context_tokens)
    tokens, asked = runtime.evaluation_sequences * length, runtime.task_tokens
    # The student reads all once, with one layer in memory, unless it has to write; the head once more for every file.
    head = 10.0 * min(_STREAMED_HEAD_WEIGHTS, sizes.vocab_size * sizes.hidden_size)
    opened = _runtime_bytes(weights_bytes(sizes, config)) + head + 4.0 * sizes.hidden_size * tokens
    held = max(_streamed_bytes(sizes, max(tokens, asked)), opened)
    if runtime.task_files or runtime.harness_tasks:
        held = max(held, 4.0 * sizes.params)
    logits = max(_READ_BYTES, (6.0 * 4 * length + 6.0 * 8 * _COMPARED_POSITIONS) * sizes.vocab_size)
    taught = 0.0 if config.submodel.whole else asked * family.teacher.forward_flops(length)
    return Needs(
        1e5, _PROCESS_BYTES + held + logits,
        device_bytes={} if config.submodel.whole else {"teacher.load": _teacher_bytes(config, family.teacher)},
        forward_flops=taught + (tokens + asked) * sizes.forward_flops(length),
        host_flops=containers * ((tokens + asked) * sizes.forward_flops(length) + tokens * sizes.head_flops),
        fixed_s=_PROCESS_S * containers,
    )  # fmt: skip


def _package(config: Config, family: FamilySizes, bf16: bool) -> Needs:
    return Needs(package_bytes(family.submodels[config.submodel.name], config), _PROCESS_BYTES, fixed_s=0.0)


def _report(config: Config, family: FamilySizes, bf16: bool) -> Needs:
    return Needs(100e3, 0.2e9, fixed_s=_PROCESS_S / 2)


def _register(config: Config, family: FamilySizes, bf16: bool) -> Needs:
    stored = sum(package_bytes(sizes, config) for sizes in family.submodels.values())
    return Needs(stored, 0.4e9, fixed_s=2 * _PROCESS_S)


_STAGES: dict[str, Callable[[Config, FamilySizes, bool], Needs]] = {
    "clean": lambda config, family, bf16: _clean(config), "teacher": _teacher, "targets": _targets,
    "distill": _distill, "quantize": _quantize, "export": _export, "evaluate": _evaluate, "package": _package,
    "report": _report, "register": _register,
}  # fmt: skip


@lru_cache
def _distinct(vocab_size: int, draws: int) -> float:
    """Expected distinct ids of so many draws."""
    import numpy as np

    ranks, found = np.log(np.arange(1, vocab_size + 1)), []
    for exponent in np.linspace(1, 4, 13):
        p = np.exp(-exponent * ranks)
        found.append(float((1 - (1 - p / p.sum()) ** draws).sum()))
    return sum(found) / len(found)


def _teacher_bytes(config: Config, sizes: ModelSizes) -> float:
    """Weights of the teacher as it is loaded for inference; one that was trained here is loaded in fp32."""
    return sizes.loaded_bytes(config.teacher.load if isinstance(config.teacher, CheckpointTeacher) else "fp32")


def _training_bytes(
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


def _forward_bytes(sizes: ModelSizes, tokens: int, config: Config) -> float:
    """Activations of one layer, and the residual stream."""
    width = 4.0 if getattr(config.teacher, "load", "fp32") == "fp32" else 2.0
    return width * tokens * (4 * sizes.hidden_size + 3 * sizes.intermediate_size)


def _streamed_bytes(sizes: ModelSizes, tokens: int) -> float:
    """What computes logits with one layer, or a part of the head, in memory: weights as stored and in fp32, states."""
    activations = 4.0 * min(tokens, _STREAMED_TOKENS) * (4 * sizes.hidden_size + 3 * sizes.intermediate_size)
    head = 10.0 * min(_STREAMED_HEAD_WEIGHTS, sizes.vocab_size * sizes.hidden_size)
    return max(6.0 * sizes.layer_params + activations, head) + 4.0 * sizes.hidden_size * tokens


def _runtime_bytes(codes_bytes: float) -> float:
    """An open package: its codes, and what the runtime packs of them."""
    return 1.15 * codes_bytes


def _taken_bytes(config: Config, sizes: ModelSizes) -> float:
    """Of a checkpoint taken over: nothing where it lies on the run's disk, which shares the files."""
    path = getattr(config.teacher, "path", None)
    shares = path is None or located(path).stat().st_dev == PROJECT.stat().st_dev
    return 1e5 if shares else 2.0 * sizes.params


def _states(config: Config, steps: int) -> int:
    """Training states that lie on disk at once."""
    return min((steps - 1) // config.distill.checkpoint_every_steps, _STATES_KEPT + 1) if steps else 0


def _state_bytes(sizes: ModelSizes, config: Config, steps: int) -> float:
    return float(_states(config, steps) * _ADAM_BYTES * sizes.params)


def _copied_bytes(sizes: ModelSizes, config: Config, steps: int) -> float:
    """A training state on its way to the disk."""
    return float(min(_states(config, steps), 1) * _ADAM_BYTES * sizes.params)


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
