"""Rounds of a group of runs in one batch: sample, train, compress, fold, broadcast, evaluate, count bytes.

A group holds runs that share a federation, the number of local steps and the adapter's shape; methods, learning
rates and seeds differ inside it. Runs of equal seed see the same cohorts and the same text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.federated_trial.adapters import Adapter
from benchmarks.federated_trial.methods import Run, phase_of
from benchmarks.federated_trial.model import Base, Block, Shape, decoder_block, head_losses, window_losses
from benchmarks.federated_trial.serving import (
    Server,
    broadcast,
    evaluated,
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
    values: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rates: Tensor, step: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of AdamW for rows (N, n) with learning rates (N, n); a rate of zero leaves a value as it is."""
    first = first * _BETAS[0] + gradient * (1 - _BETAS[0])
    second = second * _BETAS[1] + gradient.square() * (1 - _BETAS[1])
    unbiased = second / (1 - _BETAS[1] ** step)
    moved = first / (1 - _BETAS[0] ** step) / (unbiased.sqrt() + _EPSILON)
    return values - rates * (moved + _WEIGHT_DECAY * values), first, second


@dataclass(frozen=True, slots=True)
class Setting:
    """What all runs of a trial share."""

    shape: Shape
    cohort: int = 10
    batch: int = 8
    dtype: torch.dtype = torch.float32
    block: Block = decoder_block
    head: Block = head_losses
    update: Callable[..., tuple[Tensor, Tensor, Tensor]] = adam_step


@dataclass(slots=True)
class Record:
    """What one run left behind: a value a round."""

    run: Run
    losses: list[float] = field(default_factory=list)
    up_bytes: list[int] = field(default_factory=list)
    down_bytes: list[int] = field(default_factory=list)
    dispersions: list[float] = field(default_factory=list)
    switched_at: int | None = None


def train_group(
    runs: list[Run], setting: Setting, adapter: Adapter, base: Base, federation: Federation
) -> Iterator[list[Record]]:
    """Run all rounds; yields the records, which grow, after every round.

    Args:
        runs: Equal in federation and local steps, of at least the same length in rounds as the longest.
        setting: Sizes, precision and the compiled pieces.
        adapter: What is trained.
        base: The frozen model.
        federation: The clients' text, on the base's device.
    """
    device = base.embedding.device
    servers = [start_server(run.method, adapter, base.linears, federation.clients, run.seed, device) for run in runs]
    records = [Record(run) for run in runs]
    for record, loss in zip(records, _evaluate(servers, setting, adapter, base, federation), strict=True):
        record.losses.append(loss)
    for round_index in range(max(run.method.rounds for run in runs)):
        cohorts = [_cohort(run, round_index, federation.clients, setting.cohort) for run in runs]
        phases = [
            phase_of(run.method, round_index, record.switched_at) for run, record in zip(runs, records, strict=True)
        ]
        for record, server, cohort in zip(records, servers, cohorts, strict=True):
            record.down_bytes.append(received_bytes(server, cohort))
        starts = torch.stack([starting_point(server, adapter, round_index) for server in servers])
        trained = _train_clients(
            runs, phases, cohorts, starts, servers, round_index, setting, adapter, base, federation
        )
        for i, (record, server) in enumerate(zip(records, servers, strict=True)):
            updates, up_bytes = sent_updates(server, trained[i] - starts[i], cohorts[i], phases[i])
            record.up_bytes.append(up_bytes)
            record.dispersions.append(_dispersion(updates))
            fold(server, updates, phases[i], adapter, starts[i])
            broadcast(server, phases[i], round_index)
            _maybe_switch(record, round_index)
        losses = _evaluate(servers, setting, adapter, base, federation)
        for record, loss in zip(records, losses, strict=True):
            record.losses.append(loss)
        yield records


def _cohort(run: Run, round_index: int, clients: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(100_003 * run.seed + round_index)
    return torch.randperm(clients, generator=generator)[:size]


def _train_clients(
    runs: list[Run],
    phases: list[tuple[str, ...]],
    cohorts: list[Tensor],
    starts: Tensor,
    servers: list[Server],
    round_index: int,
    setting: Setting,
    adapter: Adapter,
    base: Base,
    federation: Federation,
) -> Tensor:
    """What the cohorts' vectors (R, K, n) have become after their local steps."""
    device, width = starts.device, starts.shape[-1]
    rates = _rates(runs, phases, adapter, width).to(device).repeat_interleave(setting.cohort, 0)
    values = starts.repeat_interleave(setting.cohort, 0)
    first, second = torch.zeros_like(values), torch.zeros_like(values)
    bases = _stacked_bases(servers, setting.dtype)
    windows = torch.stack([_offsets(run, round_index, setting) for run in runs]).flatten(0, 1).to(device)
    clients = torch.cat(cohorts).to(device)
    span = federation.lengths[clients] - setting.shape.context - 1
    first_token = federation.starts[clients, None, None] + (windows * span[:, None, None]).long()
    positions = torch.arange(setting.shape.context + 1, device=device)
    counts = torch.arange(1.0, runs[0].local_steps + 1, device=device)
    for step in range(runs[0].local_steps):
        tokens = federation.train[first_token[:, step, :, None] + positions]
        gradient = client_gradients(values, bases, tokens, setting, adapter, base)

        values, first, second = setting.update(values, gradient, first, second, rates, counts[step])
    return values.view(len(runs), setting.cohort, width)


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


def _evaluate(
    servers: list[Server], setting: Setting, adapter: Adapter, base: Base, federation: Federation
) -> list[float]:
    """Held-out loss of every run's global adapter, the mean over clients."""
    with torch.no_grad():
        vectors = torch.stack([evaluated(server, adapter) for server in servers]).to(setting.dtype)
        weights = _merged(vectors, _stacked_bases(servers, setting.dtype), adapter)
        tokens = federation.held_out.flatten(0, 1).expand(len(servers), -1, -1)
        losses = window_losses(weights, base, setting.shape, tokens, setting.block, setting.head)
    return [loss if math.isfinite(loss) else math.inf for loss in losses.tolist()]


def _dispersion(updates: Tensor) -> float:
    """1 - |mean|^2 / mean |update|^2 of updates (K, n): 0 when all agree, 1 when they cancel."""
    spread = updates.square().sum(-1).mean()
    return float(1 - updates.mean(0).square().sum() / spread.clamp_min(1e-30))


def _maybe_switch(record: Record, round_index: int) -> None:
    """``auto`` begins to alternate when the mean dispersion of five rounds passes its threshold."""
    recent = record.dispersions[-5:]
    watching = record.run.method.phases == "auto" and record.switched_at is None and len(recent) == 5
    if watching and sum(recent) / 5 > record.run.method.threshold:
        record.switched_at = round_index + 1
