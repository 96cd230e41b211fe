"""What each stage needs of disk, memory and arithmetic, from sizes alone.

Bytes of models are counted in ``model_bytes``. How large the user's text becomes cannot be known before and rests on a
measurement; the seconds of stages that are no matrix products were fitted to a demo run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.artifacts import located
from pipeline.export.assembly import training_containers
from pipeline.flow import Stage
from pipeline.model_bytes import (
    RATIOS,
    TOKENIZER_BYTES_A_TOKEN,
    copied_bytes,
    forward_bytes,
    head_block_bytes,
    package_bytes,
    runtime_bytes,
    state_bytes,
    stored_bytes_a_position,
    streamed_bytes,
    taken_bytes,
    teacher_bytes,
    training_bytes,
    weights_bytes,
)
from pipeline.settings import Config
from pipeline.settings_training import CheckpointTeacher
from pipeline.sizes import FamilySizes, ModelSizes, is_downloaded

_PROCESS_BYTES = 0.45e9  # torch, transformers and a model's code loaded
_PROCESS_S = 1.5
_DOCUMENTATION_BYTES = 7e6  # what CPython's documentation is when cleaned
_DOCUMENTED_SHARE = 0.34  # of the sources of the packages in conf/data/python_library.yaml
_CLEANED_BYTES_A_S = 1.2e6  # of one worker
_HELD_OUT_DRAWS, _RECORDED_SEQUENCES, _RECORDED_POSITIONS = 64, 8, 1024  # as stages/targets.py has them
WITHOUT_QAD = "quantize.qad_steps=0 quantize.qad_scale_steps=0"
_LARGEST_EXACT_CHECK_BYTES = 500e6
_QUANTIZE_S_A_WEIGHT = {"rtn": 0.013e-6, "mse": 0.035e-6, "weighted_mse": 0.05e-6, "gptq": 0.5e-6}  # of one core
_SENSITIVITY_BYTES_A_WEIGHT = 7.5  # the model in fp32, and every matrix in 4 bits and in 8
_QUANTIZE_BYTES_A_WORKER = 0.1e9  # blocks of rows on their way, and the scales of a 7B's embedding
_CALIBRATION_PASSES = {"weighted_mse": 4, "gptq": 6}  # over a layer up to each input, whole, and for a tied head
_READ_BYTES = 64e6  # logits of a batch that answers tasks
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
    tokenizer = float(TOKENIZER_BYTES_A_TOKEN * sizes.vocab_size)
    if isinstance(teacher, CheckpointTeacher):
        fetched = 0.0 if teacher.kind == "local" or is_downloaded(teacher) else 2.0 * sizes.params
        if teacher.trains:
            return _corrected(config, teacher, sizes, bf16, tokenizer + fetched)
        return Needs(tokenizer + fetched, _PROCESS_BYTES)
    tokens = teacher.steps * teacher.batch_sequences * config.distill.sequence_tokens
    return Needs(
        4.0 * sizes.params + tokenizer, _PROCESS_BYTES + copied_bytes(sizes, config, teacher.steps),
        scratch_bytes=state_bytes(sizes, config, teacher.steps),
        device_bytes=training_bytes(sizes, config, bf16, teacher.batch_sequences),
        training_flops=tokens * sizes.training_flops(config.distill.sequence_tokens), steps=teacher.steps,
    )  # fmt: skip


def _corrected(config: Config, teacher: CheckpointTeacher, sizes: ModelSizes, bf16: bool, disk_bytes: float) -> Needs:
    """A checkpoint that is fine-tuned becomes another one; beside an adapter its weights have no gradients."""
    steps, batch, length = teacher.correction_steps, teacher.correction_batch_sequences, config.distill.sequence_tokens
    tokens, weights = steps * batch * length, sizes.loaded_bytes(teacher.load)
    device = training_bytes(sizes, config, bf16, batch)
    flops = tokens * sizes.training_flops(length)
    measured = 2 * config.runtime.evaluation_sequences * length * sizes.forward_flops(length)
    if teacher.correction_rank is not None:
        device = {**device, RATIOS: 0.0, "teacher.load": weights}
        return Needs(disk_bytes + weights, _PROCESS_BYTES, device_bytes=device, training_flops=flops * 2 / 3,
                     forward_flops=measured, steps=steps)  # fmt: skip
    return Needs(
        disk_bytes + weights, _PROCESS_BYTES + copied_bytes(sizes, config, steps),
        scratch_bytes=state_bytes(sizes, config, steps), device_bytes=device, training_flops=flops,
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
            "teacher.load": teacher_bytes(config, sizes),
            "distill.sequence_tokens": forward_bytes(sizes, _RECORDED_SEQUENCES * length, config)
            + 8.0 * _RECORDED_POSITIONS * sizes.vocab_size,
        },
        forward_flops=(train + 2 * held_out + ranked) * sizes.forward_flops(length),
    )  # fmt: skip


def _distill(config: Config, family: FamilySizes, bf16: bool) -> Needs:
    distill, sizes, length = config.distill, family.submodels[config.submodel.name], config.distill.sequence_tokens
    trained, spoken = (steps * distill.batch_sequences * length for steps in (distill.steps, distill.on_policy_steps))
    if config.submodel.whole:
        return Needs(taken_bytes(config, sizes), _PROCESS_BYTES)
    runs, taught = (2 if distill.from_scratch_baseline else 1), 0.0
    online = distill.signal == "online" or config.submodel.learns_from != "teacher"
    master = family.submodels.get(config.submodel.learns_from, family.teacher)
    if online or distill.on_policy_steps:
        taught = ((trained if online else 0) + spoken) * master.forward_flops(length)
    measured = (1 + runs) * 2 * config.runtime.evaluation_sequences * length * sizes.forward_flops(length)
    if (larger := family.submodels.get(config.submodel.cut_from)) is not None:
        measured += distill.importance_sequences * length * larger.forward_flops(length)
    longest = distill.context.sequence_tokens if distill.context.steps else 0
    device = training_bytes(sizes, config, bf16, distill.batch_sequences, runs - 1, longest)
    if taught:
        learns_from_teacher = config.submodel.learns_from == "teacher"
        name = "teacher.load" if learns_from_teacher else "submodel.learns_from"
        device[name] = teacher_bytes(config, master) if learns_from_teacher else 4.0 * master.params
    context = distill.context
    long_tokens = context.steps * context.batch_sequences * context.sequence_tokens
    pruned = 4.0 * sizes.params if config.submodel.checkpoint is None else 0.0
    phases = [distill.steps] * runs + [distill.on_policy_steps, context.steps]
    return Needs(
        4.0 * sizes.params,
        _PROCESS_BYTES + copied_bytes(sizes, config, distill.steps) + 3.0 * length * sizes.vocab_size * 4,
        scratch_bytes=pruned + sum(state_bytes(sizes, config, steps) for steps in phases),
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
        device |= training_bytes(sizes, config, bf16, quantize.qad_batch_sequences)
        device[WITHOUT_QAD] = 4.0 * sizes.params
        longest = max(quantize.qad_steps, quantize.qad_scale_steps)
        scratch = state_bytes(sizes, config, longest) + 2 * weights_bytes(sizes, config)  # of two rounds, for a moment
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
    loaded = max(runtime_bytes(codes), streamed_bytes(sizes, positions), whole)
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
    opened = runtime_bytes(weights_bytes(sizes, config)) + head_block_bytes(sizes) + 4.0 * sizes.hidden_size * tokens
    held = max(streamed_bytes(sizes, max(tokens, asked)), opened)
    if runtime.task_files or runtime.harness_tasks:
        held = max(held, 4.0 * sizes.params)
    logits = max(_READ_BYTES, (6.0 * 4 * length + 6.0 * 8 * _COMPARED_POSITIONS) * sizes.vocab_size)
    taught = 0.0 if config.submodel.whole else asked * family.teacher.forward_flops(length)
    return Needs(
        1e5, _PROCESS_BYTES + held + logits,
        device_bytes={} if config.submodel.whole else {"teacher.load": teacher_bytes(config, family.teacher)},
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
