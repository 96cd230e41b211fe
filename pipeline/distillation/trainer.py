"""The one training loop: distillation, on-policy phase, teacher correction, LoRA, pretraining.

They differ in the objective that they inject. A run killed anywhere and started again ends with the
same weights: batches and random streams are functions of the step, and a checkpoint holds weights
and both AdamW moments exactly. Losses are sums with weights, so that micro-batches and processes
add up to the one big batch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_runtime.formats.errors import UserError
from pipeline.distillation.batches import (
    Batch,
    Sequences,
    batch_rows,
    batch_to_device,
    prefetched,
    read_batch,
    split_rows,
)
from pipeline.distillation.checkpoints import (
    History,
    TrainState,
    newest_state,
    open_state,
    state_writer,
)
from pipeline.distillation.fast_layers import compiled_layers
from pipeline.distillation.master_weights import MasterWeights, attach_masters
from pipeline.distillation.objectives import Objective
from pipeline.distillation.parallel import (
    Learner,
    Processes,
    Sharding,
    drop_weights,
    gather_weights,
    join_processes,
    placed_like,
    spread,
    sum_across,
    twin,
    whole,
    without_sync,
)
from pipeline.distillation.speed import Speedometer, describe, peak_flops, training_flops_per_token
from pipeline.progress import progress

Observer = Callable[[int, Mapping[str, float]], None]
"""(step, figures): loss, learning_rate, gradient_norm, and timings: tokens_per_s, mfu, memory_bytes, left_s."""

_BETAS, _EPS, _MOMENTS = (0.9, 0.95), 1e-8, ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """How long and how fast.

    Attributes:
        steps: Updates, 1 or more.
        batch_sequences: Sequences an update, of all processes together; a multiple of their number.
        learning_rate: At its highest, in (0, 1).
        weight_decay: Of matrices, in [0, 1).
        warmup_ratio: Share of the steps with a growing rate, in [0, 1).
        bf16: Multiply in bfloat16; weights and moments stay float32.
        seed: Of the order of sequences and of everything random.
        checkpoint_every_steps: 1 or more.
        micro_sequences: Sequences a forward pass of one process, 1 or more; None: all that it has.
            Gradients accumulate over them; the result is that of the whole batch.
        gradient_norm_max: Longer gradients are cut to this length, above 0.
        bf16_weights: Compute with bf16 copies of the weights instead of casting at every use: faster and smaller on
            GPUs. What learns stays float32. For one process, or FSDP, which does so itself, and whole models.
        compile: Compile each decoder layer (torch.compile); a minute at the start, faster on GPUs.
        recompute: Activations are computed twice instead of kept: less memory, a third more time.
        sharding: With several processes: ``none`` (each holds the whole model), or ``fsdp``.
    """

    steps: int
    batch_sequences: int
    learning_rate: float
    weight_decay: float
    warmup_ratio: float
    bf16: bool
    seed: int
    checkpoint_every_steps: int
    micro_sequences: int | None = None
    gradient_norm_max: float = 1.0
    bf16_weights: bool = False
    compile: bool = False
    recompute: bool = False
    sharding: Sharding = "none"


_RESULT = ("steps", "batch_sequences", "learning_rate", "weight_decay", "warmup_ratio", "bf16", "seed",
           "gradient_norm_max", "bf16_weights")  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Training:
    """A model while it is trained; ``parameters`` are what the optimizer changes."""

    module: torch.nn.Module
    parameters: Mapping[str, torch.nn.Parameter]
    masters: MasterWeights | None
    optimizer: torch.optim.Optimizer
    processes: Processes
    device: torch.device
    plan: TrainPlan
    label: str


def train(
    model: torch.nn.Module,
    objective: Objective,
    sequences: Sequences,
    plan: TrainPlan,
    checkpoint: Path,
    label: str,
    *,
    identity: str = "",
    prepare: Callable[[Batch], Batch] | None = None,
    observe: Observer | None = None,
    other_flops_per_token: float = 0.0,
) -> History:
    """Train the parameters of ``model`` that require gradients, in place, with AdamW and a cosine schedule.

    Args:
        model: On its device; under torchrun each process has the same one. Trained
            parameters of 16 bits become float32.
        objective: What is minimised, a mean over everything that counts in a batch.
        sequences: What is learned from.
        plan: How long and how fast.
        checkpoint: A folder of this run alone.
        label: For people.
        identity: What else the result depends on (settings of the objective, digest of stored targets):
            a checkpoint with another one is refused.
        prepare: Applied to every batch in the thread that reads ahead, for example to decode targets.
        observe: Told about a hundred times how it goes.
        other_flops_per_token: What MFU counts besides the model (a teacher's forward pass).

    Returns:
        The history: step, loss and learning rate, about a hundred entries, the same every time.

    Raises:
        UserError: The loss or its gradient is not finite, memory or disk are full, a checkpoint is another run's.
    """
    processes = join_processes()
    run = _run_identity(model, sequences, plan, identity)
    flops_per_token = training_flops_per_token(model, sequences.tokens.shape[1]) + other_flops_per_token
    with _prepared(model, objective, plan, processes, label) as training:
        state = newest_state(checkpoint, run, label)
        step, history = (0, []) if state is None else _restore(state, training)
        speed = _speedometer(training, sequences, flops_per_token)
        make = partial(_micro_batches, sequences, plan, processes, training.device, prepare)
        with (
            state_writer(checkpoint, run, processes.index == 0) as write,
            progress(label if processes.index == 0 else None, plan.steps) as report,
            prefetched(make, range(step, plan.steps)) as batches,
        ):
            for micro_batches in batches:
                figures = _take_step(training, step, micro_batches)
                step += 1
                timings = speed.count()
                if step % max(1, plan.steps // 100) == 0 or step == plan.steps:
                    history.append(
                        {"step": step, "loss": round(figures["loss"], 5), "learning_rate": figures["learning_rate"]}
                    )
                    if observe is not None and processes.index == 0:
                        observe(step, {**figures, **timings, **speed.left(plan.steps - step)})
                report(step, f"loss {figures['loss']:.3f}, {describe(timings)}")
                if step % plan.checkpoint_every_steps == 0 and step < plan.steps:
                    write(TrainState(step, list(history), _tensors(training)))
    return history


def learning_rate(step: int, plan: TrainPlan) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    warmup = max(1, round(plan.steps * plan.warmup_ratio))
    if step < warmup:
        return plan.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, plan.steps - warmup)
    return plan.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def _run_identity(model: torch.nn.Module, sequences: Sequences, plan: TrainPlan, identity: str) -> str:
    """Digest of plan, data and start weights (their names, shapes and first values)."""
    values = asdict(plan)
    digest = hashlib.sha256(json.dumps([identity, *(values[name] for name in _RESULT)]).encode())
    for array in (sequences.tokens, sequences.counts):
        for start in range(0, 0 if array is None else len(array), 4096):
            digest.update(np.ascontiguousarray(array[start : start + 4096]).data)  # type: ignore[index]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            first = parameter.detach().reshape(-1)[:1024].float().cpu().numpy()
            digest.update(f"\n{name} {tuple(parameter.shape)}\n".encode() + first.tobytes())
    return digest.hexdigest()


@contextmanager
def _prepared(
    model: torch.nn.Module, objective: Objective, plan: TrainPlan, processes: Processes, label: str
) -> Iterator[_Training]:
    """The model ready for training; afterwards it is as before, but for its weights."""
    _check(model, plan, processes)
    if processes.device is not None:
        model.to(processes.device)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    if plan.recompute:
        _recompute(model, True)
    ours = model
    if processes.count > 1 and plan.sharding == "fsdp":  # which leaves its hooks and pieces in the one that it spreads
        model = twin(ours)
    module = spread(Learner(model, objective), processes, plan.sharding, bf16=plan.bf16)
    if model is not ours:
        drop_weights(ours)
    learned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with (
        _master_weights(model, plan, processes) as masters,
        compiled_layers(model, plan.compile),  # after spreading, which gives the layers another class
        torch.random.fork_rng(devices=[device] if (device := _device(learned)).type == "cuda" else []),
    ):
        parameters = learned if masters is None else dict(zip(learned, masters.masters, strict=True))
        groups = _parameter_groups(parameters, plan.weight_decay)
        optimizer = torch.optim.AdamW(groups, plan.learning_rate, _BETAS, _EPS, fused=True)
        model.train()
        try:
            yield _Training(module, parameters, masters, optimizer, processes, device, plan, label)
        finally:
            ours.eval()
            if plan.recompute:
                _recompute(ours, False)
    if model is not ours:
        gather_weights(ours, model)


@contextmanager
def _master_weights(model: torch.nn.Module, plan: TrainPlan, processes: Processes) -> Iterator[MasterWeights | None]:
    """bf16 weights that compute for the time of the block, and float32 ones that learn and are the model's after."""
    parameters = list(model.parameters())
    if not (plan.bf16_weights and processes.count == 1 and all(each.requires_grad for each in parameters)):
        yield None
        return
    masters = attach_masters(parameters)
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16()
    try:
        yield masters
    finally:
        masters.detach()
        for parameter, master in zip(parameters, masters.masters, strict=True):
            parameter.data = master.data


def _device(parameters: Mapping[str, torch.nn.Parameter]) -> torch.device:
    return next(iter(parameters.values())).device


def _check(model: torch.nn.Module, plan: TrainPlan, processes: Processes) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("model", "every parameter frozen", "one that can be trained", "add an adapter, or unfreeze it")
    if plan.batch_sequences % processes.count:
        raise UserError(
            "batch_sequences", plan.batch_sequences, f"a multiple of the {processes.count} processes",
            "choose another, or start other processes",
        )  # fmt: skip
    if plan.recompute and not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError("recompute", True, "false for this kind of model")


def _recompute(model: Any, wanted: bool) -> None:
    """Switch recomputing of activations; transformers renamed the methods in its fifth version."""
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if wanted:
        getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{prefix}_checkpointing_disable")()
        model.disable_input_require_grads()


def _parameter_groups(parameters: Mapping[str, torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only."""
    matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _speedometer(training: _Training, sequences: Sequences, flops_per_token: float) -> Speedometer:
    plan, peak = training.plan, peak_flops(training.device)
    tokens_per_step = plan.batch_sequences * sequences.tokens.shape[1]
    total_peak = None if peak is None or not plan.bf16 else peak * training.processes.count
    return Speedometer(tokens_per_step, flops_per_token, total_peak, training.device)


def _micro_batches(
    sequences: Sequences,
    plan: TrainPlan,
    processes: Processes,
    device: torch.device,
    prepare: Callable[[Batch], Batch] | None,
    step: int,
) -> list[Batch]:
    """This process's share of a step, cut for memory; runs in the thread that reads ahead."""
    rows = batch_rows(step, len(sequences), plan.batch_sequences, plan.seed)
    share = np.split(rows, processes.count)[processes.index]
    batches = [read_batch(sequences, part, step) for part in split_rows(share, plan.micro_sequences)]
    return [batch_to_device(batch if prepare is None else prepare(batch), device) for batch in batches]


def _take_step(training: _Training, step: int, micro_batches: list[Batch]) -> dict[str, float]:
    """One update; returns loss, learning rate and the gradient's norm before it was cut."""
    plan, optimizer = training.plan, training.optimizer
    rate = learning_rate(step, plan)
    for group in optimizer.param_groups:
        group["lr"] = rate
    torch.manual_seed((plan.seed * 1_000_003 + step) * 4099 + training.processes.index)  # of dropout
    try:
        sums = sum_across(_accumulate(training, micro_batches), training.processes)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "micro_sequences", len(micro_batches[0].tokens), f"what fits into memory of {training.device}",
            "fewer sequences at once, or recompute",
        ) from error  # fmt: skip
    total, weight = sums.unbind()
    scale = training.processes.count / weight.clamp(min=1e-12)  # processes exchange means, and what counts is a sum
    gradients = [parameter.grad for parameter in training.parameters.values() if parameter.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients)) * scale
    loss_value, norm_value = torch.stack([total / weight.clamp(min=1e-12), norm]).tolist()
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        raise _diverged(training, step, loss_value, norm_value, rate)
    factor = scale * (plan.gradient_norm_max / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
    optimizer.step()
    optimizer.zero_grad()
    if training.masters is not None:
        training.masters.publish()
    return {"loss": loss_value, "learning_rate": rate, "gradient_norm": norm_value}


def _accumulate(training: _Training, micro_batches: list[Batch]) -> torch.Tensor:
    """Gradients of the summed loss; returns (total, weight), float64."""
    sums = torch.zeros(2, dtype=torch.float64, device=training.device)
    casts = training.plan.bf16 and training.masters is None
    for number, batch in enumerate(micro_batches, 1):
        with without_sync(training.module, number < len(micro_batches)):
            with torch.autocast(training.device.type, torch.bfloat16, enabled=casts):
                total, weight = training.module(batch)
            total.backward()
        sums += torch.stack([value.detach().to(training.device).double() for value in (total, weight)])
    return sums


def _diverged(training: _Training, step: int, loss: float, norm: float, rate: float) -> UserError:
    kept = step // training.plan.checkpoint_every_steps * training.plan.checkpoint_every_steps
    kept_text = f"the checkpoint of step {kept} is kept" if kept else "nothing was kept"
    return UserError(
        training.label, f"loss {loss:.4g}, gradient norm {norm:.4g} at step {step}", "finite numbers",
        f"lower the learning rate (it was {rate:.2g}) or look at the data; {kept_text}",
    )  # fmt: skip


def _tensors(training: _Training) -> dict[str, torch.Tensor]:
    """Copies on the CPU; gathered by all processes together, held by the first."""
    tensors: dict[str, torch.Tensor] = {}
    first = training.processes.index == 0
    for name, parameter in training.parameters.items():
        state = training.optimizer.state[parameter]
        for key, value in {"parameter": parameter.detach(), **{key: state[key] for key in _MOMENTS}}.items():
            gathered = whole(value)
            if first:
                tensors[f"{key}.{name}"] = torch.empty_like(gathered, device="cpu").copy_(gathered).contiguous()
    return tensors


def _restore(path: Path, training: _Training) -> tuple[int, History]:
    with open_state(path) as (step, history, read), torch.no_grad():
        for name, parameter in training.parameters.items():
            parameter.copy_(placed_like(read(f"parameter.{name}"), parameter))
            moments = {key: placed_like(read(f"{key}.{name}"), parameter) for key in _MOMENTS[1:]}
            training.optimizer.state[parameter] = {
                "step": read(f"step.{name}").to(training.device),
                **moments,
            }
        if training.masters is not None:
            training.masters.publish()
    return step, history
