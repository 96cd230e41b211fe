"""Rounds of a group of runs in one batch: sample, train, compress, fold, broadcast, evaluate, count bytes.

A group holds runs that share a federation, the number of local steps and the adapter's shape; methods, learning
rates and seeds differ inside it. Runs of equal seed see the same cohorts and the same text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from benchmarks.federated_trial.adapters import Adapter
from benchmarks.federated_trial.methods import COHORT, Run, phase_of
from benchmarks.federated_trial.model import Base, Block, Shape, decoder_block, head_losses, window_losses
from benchmarks.federated_trial.serving import (
    Server,
    average_states,
    broadcast,
    fold,
    received_bytes,
    sent_updates,
    start_server,
    starting_point,
)
from benchmarks.federated_trial.text import Federation

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
_WEIGHT_DECAY = 0.01
_LOSS_SCALE = 2.0**13


def adam_step(
    values: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rates: Tensor, steps: Tensor, second_steps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of AdamW for rows (N, n) with learning rates (N, n); a rate of zero leaves a value as it is.

    ``steps`` () and ``second_steps`` (N, 1) count the steps, this one too, in the first and the second moments.
    """
    first = first * _BETAS[0] + gradient * (1 - _BETAS[0])
    second = second * _BETAS[1] + gradient.square() * (1 - _BETAS[1])
    unbiased = second / (1 - _BETAS[1] ** second_steps)
    moved = first / (1 - _BETAS[0] ** steps) / (unbiased.sqrt() + _EPSILON)
    return values - rates * (moved + _WEIGHT_DECAY * values), first, second


@dataclass(frozen=True, slots=True)
class Setting:
    """What all runs of a trial share."""

    shape: Shape
    cohort: int = COHORT
    batch: int = 8
    dtype: torch.dtype = torch.float32
    block: Block = decoder_block
    head: Block = head_losses
    update: Callable[..., tuple[Tensor, Tensor, Tensor]] = adam_step
    averages: tuple[int, ...] = ()


@dataclass(slots=True)
class Record:
    """What one run left behind: a value a round."""

    run: Run
    losses: list[float] = field(default_factory=list)
    up_bytes: list[int] = field(default_factory=list)
    down_bytes: list[int] = field(default_factory=list)
    dispersions: list[float] = field(default_factory=list)
    drifts: list[float] = field(default_factory=list)
    averaged: dict[int, list[float]] = field(default_factory=dict)
    switched_at: int | None = None


def train_group(
    runs: list[Run], setting: Setting, adapter: Adapter, base: Base, federation: Federation
) -> Iterator[list[Record]]:
    """Run all rounds; yields the records, which grow, after every round.

    Args:
        runs: Equal in federation and local steps.
        setting: Sizes, precision and the compiled pieces.
        adapter: What is trained.
        base: The frozen model.
        federation: The clients' text, on the base's device.
    """
    device, decays = base.embedding.device, setting.averages
    servers = [
        start_server(run.method, adapter, base.linears, federation.clients, run.seed, device, decays) for run in runs
    ]
    records = [Record(run, averaged={decay: [] for decay in decays}) for run in runs]
    group = _Group(runs, servers, setting, adapter, base, federation, _stacked_bases(servers, setting.dtype))
    _evaluate(group, records)
    for round_index in range(max(run.method.rounds for run in runs)):
        cohorts = [_cohort(run, round_index, federation.clients, setting.cohort) for run in runs]
        phases = [phase_of(run.method, round_index, r.switched_at) for run, r in zip(runs, records, strict=True)]
        for record, server, cohort in zip(records, servers, cohorts, strict=True):
            record.down_bytes.append(received_bytes(server, cohort))
        starts = torch.stack([starting_point(server, adapter, round_index) for server in servers])
        trained = _train_clients(group, phases, cohorts, starts, round_index)
        for i, (record, server) in enumerate(zip(records, servers, strict=True)):
            updates, up_bytes = sent_updates(server, trained[i] - starts[i], cohorts[i], phases[i])
            record.up_bytes.append(up_bytes)
            record.dispersions.append(_dispersion(updates))
            record.drifts.append(_drift(updates, server.state - server.initial))
            fold(server, updates, phases[i], adapter, starts[i])
            broadcast(server, phases[i], round_index)
            average_states(server, round_index)
            _maybe_switch(record, round_index)
        if any(run.method.phases == "stack" for run in runs):
            group = replace(group, bases=_stacked_bases(servers, setting.dtype))
        _evaluate(group, records)
        yield records


@dataclass(frozen=True, slots=True)
class _Group:
    """What one batch works on; ``bases`` are the runs' linears (R, n, out, in) of every slot."""

    runs: list[Run]
    servers: list[Server]
    setting: Setting
    adapter: Adapter
    base: Base
    federation: Federation
    bases: list[Tensor]


def _cohort(run: Run, round_index: int, clients: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(100_003 * run.seed + round_index)
    return torch.randperm(clients, generator=generator)[:size]


def _train_clients(
    group: _Group, phases: list[tuple[str, ...]], cohorts: list[Tensor], starts: Tensor, round_index: int
) -> Tensor:
    """What the cohorts' vectors (R, K, n) have become after their local steps."""
    runs, setting, device, steps = group.runs, group.setting, starts.device, group.runs[0].local_steps
    rates = _by_client(_rates(runs, phases, group.adapter, starts.shape[-1]).to(device), setting)
    decays = _by_client(torch.tensor([[float(run.method.local_decay)] for run in runs], device=device), setting)
    averaging = _by_client(torch.tensor([[run.method.local_average] for run in runs], device=device), setting)
    values = _by_client(starts, setting)
    first, summed = torch.zeros_like(values), torch.zeros_like(values)
    second, held_steps = _kept_seconds(group.servers, cohorts, values)
    windows = _windows(group, cohorts, round_index, device)
    counts = torch.arange(1.0, steps + 1, device=device)
    averages = any(run.method.local_average for run in runs)
    for step in range(steps):
        gradient = client_gradients(values, group.bases, windows(step), setting, group.adapter, group.base)
        now = rates * (1 - decays * (step / steps))
        values, first, second = setting.update(
            values, gradient, first, second, now, counts[step], held_steps + counts[step]
        )
        if averages and step >= steps // 2:
            summed += values
    if averages:
        values = torch.where(averaging, summed / (steps - steps // 2), values)
    _keep_seconds(group.servers, cohorts, second, steps)
    return values.view(len(runs), setting.cohort, -1)


def client_gradients(
    values: Tensor, bases: list[Tensor], tokens: Tensor, setting: Setting, adapter: Adapter, base: Base
) -> Tensor:
    """Gradients (N, n) of every row's mean loss on its own windows (N, B, T + 1)."""
    half = values.to(setting.dtype)
    weights = [weight.requires_grad_() for weight in _merged(half, bases, adapter)]
    with torch.enable_grad():
        losses = window_losses(weights, base, setting.shape, tokens, setting.block, setting.head)
        gradients = torch.autograd.grad(losses.sum() * _LOSS_SCALE, weights)
    shapes = setting.shape.linears()
    split = [g.reshape(-1, outputs, inputs) for g, (_, outputs, inputs) in zip(gradients, shapes, strict=True)]
    return adapter.gradient(half, split).div_(_LOSS_SCALE)


def _merged(vectors: Tensor, bases: list[Tensor], adapter: Adapter) -> list[Tensor]:
    """Of every slot the linears (N, n out, in) of rows (N, n), which belong to runs (R) in equal numbers."""
    merged = []
    for base, (left, right) in zip(bases, adapter.factors(vectors), strict=True):
        runs, count, outputs, inputs = base.shape
        rows = base.unsqueeze(1).expand(-1, len(vectors) // runs, -1, -1, -1).reshape(-1, outputs, inputs)
        rows = torch.baddbmm(rows, left, right, alpha=adapter.scale)
        merged.append(rows.view(len(vectors), count * outputs, inputs))
    return merged


def _by_client(rows: Tensor, setting: Setting) -> Tensor:
    return rows.repeat_interleave(setting.cohort, 0)


def _kept_seconds(servers: list[Server], cohorts: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Second moments that clients bring (N, n), and the steps in them (N, 1)."""
    seconds = torch.zeros_like(like).view(len(servers), -1, like.shape[-1])
    steps = like.new_zeros(*seconds.shape[:2], 1)
    for i, (server, cohort) in enumerate(zip(servers, cohorts, strict=True)):
        if server.method.keep_second:
            seconds[i] = server.client_seconds[cohort.to(like.device)]
            steps[i, :, 0] = server.client_steps[cohort.to(like.device)]
    return seconds.flatten(0, 1), steps.flatten(0, 1)


def _keep_seconds(servers: list[Server], cohorts: list[Tensor], seconds: Tensor, steps: int) -> None:
    seconds = seconds.view(len(servers), -1, seconds.shape[-1])
    for i, (server, cohort) in enumerate(zip(servers, cohorts, strict=True)):
        if server.method.keep_second:
            server.client_seconds[cohort.to(seconds.device)] = seconds[i]
            server.client_steps[cohort.to(seconds.device)] += steps


def _windows(group: _Group, cohorts: list[Tensor], round_index: int, device: torch.device) -> Callable[[int], Tensor]:
    """The windows (N, B, T + 1) of every local step of a round."""
    setting, federation = group.setting, group.federation
    shares = torch.stack([_offsets(run, round_index, setting) for run in group.runs]).flatten(0, 1).to(device)
    clients = torch.cat(cohorts).to(device)
    span = federation.lengths[clients] - setting.shape.context - 1
    first = federation.starts[clients, None, None] + (shares * span[:, None, None]).long()
    positions = torch.arange(setting.shape.context + 1, device=device)
    return lambda step: federation.train[first[:, step, :, None] + positions]


def _stacked_bases(servers: list[Server], dtype: torch.dtype) -> list[Tensor]:
    slots = zip(*(server.linears for server in servers), strict=True)
    return [torch.stack([linear.to(dtype) for linear in linears]) for linears in slots]


def _rates(runs: list[Run], phases: list[tuple[str, ...]], adapter: Adapter, width: int) -> Tensor:
    rates = torch.zeros(len(runs), width)
    for row, run, trained in zip(rates, runs, phases, strict=True):
        for part in trained:
            row[adapter.parts[part]] = run.learning_rate * (run.method.b_ratio if part == "b" else 1.0)
    return rates


def _offsets(run: Run, round_index: int, setting: Setting) -> Tensor:
    """Where each window starts, as a share of the client's text: (K, steps, B)."""
    generator = torch.Generator().manual_seed(7_000_003 * (run.seed + 1) + round_index)
    return torch.rand(setting.cohort, run.local_steps, setting.batch, generator=generator)


def _evaluate(group: _Group, records: list[Record]) -> None:
    """Held-out loss of every run's newest state, and of its running means: the mean over clients."""
    stacked = [starting_point(server, group.adapter, 0) for server in group.servers]
    for record, loss in zip(records, _held_out_losses(group, stacked), strict=True):
        record.losses.append(loss)
    for decay in group.setting.averages:
        means = [server.averages[decay] for server in group.servers]
        for record, loss in zip(records, _held_out_losses(group, means), strict=True):
            record.averaged[decay].append(loss)


def _held_out_losses(group: _Group, vectors: list[Tensor]) -> list[float]:
    setting = group.setting
    with torch.no_grad():
        weights = _merged(torch.stack(vectors).to(setting.dtype), group.bases, group.adapter)
        tokens = group.federation.held_out.flatten(0, 1).expand(len(vectors), -1, -1)
        losses = window_losses(weights, group.base, setting.shape, tokens, setting.block, setting.head)
    return [loss if math.isfinite(loss) else math.inf for loss in losses.tolist()]


def _dispersion(updates: Tensor) -> float:
    """1 - |mean|^2 / mean |update|^2 of updates (K, n): 0 when all agree, 1 when they cancel."""
    spread = updates.square().sum(-1).mean()
    return float(1 - updates.mean(0).square().sum() / spread.clamp_min(1e-30))


def _drift(updates: Tensor, moved: Tensor) -> float:
    """How far updates (K, n) lie from their mean (root mean square), over the distance ``moved`` (n,) so far."""
    spread = (updates - updates.mean(0)).square().sum(-1).mean()
    return float((spread / moved.square().sum().clamp_min(1e-12)).sqrt())


def _maybe_switch(record: Record, round_index: int) -> None:
    """``auto`` begins to alternate when the mean dispersion of five rounds passes its threshold."""
    recent = record.dispersions[-5:]
    watching = record.run.method.phases == "auto" and record.switched_at is None and len(recent) == 5
    if watching and sum(recent) / 5 > record.run.method.threshold:
        record.switched_at = round_index + 1
