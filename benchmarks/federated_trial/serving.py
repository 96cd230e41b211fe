"""The server of one run and what its clients keep: residuals, versions held, bytes of every message.

Bytes are counted as they would be paid: a client sends what its phase trained, and receives every part whose
newest version it does not hold. What follows from the seed (version 0) is never sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.federated_trial.adapters import Adapter
from benchmarks.federated_trial.methods import Method
from benchmarks.federated_trial.wire import HEADER_BYTES, decoded, encoded_bytes

_SECOND_BETA = 0.99
_ADAPTIVITY = 1e-3


@dataclass(slots=True)
class Server:
    """State of one run.

    Attributes:
        method: What it does.
        state: The vector (n,) that clients hold after a broadcast: decoded values.
        initial: The vector of round 0, which every client derives from the seed.
        sent: The vector that clients held before the round that is being folded; used by ``chain``.
        linears: The run's base linears; only stacking changes them.
        parts: Where each part lies.
        residual: What the last broadcasts lost (n,).
        velocity: First moment of the server's optimiser (n,).
        second: Its second moment (n,).
        averages: Running means of the states, by their decay (see ``average_states``).
        client_seconds: Adam's second moments that each client keeps (C, n); empty unless it does.
        client_steps: How many steps they hold (C,).
        client_residuals: What each client's last message lost (C, n).
        held: Version of each part that each client holds, per part (C,).
        versions: Newest version of each part.
        taken: Updates of each part that were folded.
        message_bytes: Bytes of the update that led to each version, by part; used by ``chain``.
        seed: Of the initial values.
    """

    method: Method
    state: Tensor
    initial: Tensor
    sent: Tensor
    linears: list[Tensor]
    parts: dict[str, slice]
    residual: Tensor
    velocity: Tensor
    second: Tensor
    averages: dict[int, Tensor]
    client_seconds: Tensor
    client_steps: Tensor
    client_residuals: Tensor
    held: dict[str, list[int]]
    versions: dict[str, int]
    taken: dict[str, int]
    message_bytes: dict[str, dict[int, int]]
    seed: int


def start_server(
    method: Method,
    adapter: Adapter,
    linears: list[Tensor],
    clients: int,
    seed: int,
    device: torch.device,
    decays: tuple[int, ...] = (),
) -> Server:
    """A server before its first round."""
    initial = _seeded(adapter, seed, 0, device)
    zeros = torch.zeros_like(initial)
    stacks = method.phases == "stack"
    return Server(
        method=method,
        state=initial.clone(),
        initial=initial,
        sent=initial.clone(),
        linears=[linear.clone() for linear in linears] if stacks else linears,
        parts=adapter.parts,
        residual=zeros.clone(),
        velocity=zeros.clone(),
        second=torch.full_like(initial, _ADAPTIVITY**2),
        averages={decay: initial.clone() for decay in decays},
        client_seconds=torch.zeros(clients if method.keep_second else 0, len(initial), device=device),
        client_steps=torch.zeros(clients, device=device),
        client_residuals=torch.zeros(clients, len(initial), device=device),
        held={part: [0] * clients for part in adapter.parts},
        versions=dict.fromkeys(adapter.parts, 0),
        taken=dict.fromkeys(adapter.parts, 0),
        message_bytes={part: {} for part in adapter.parts},
        seed=seed,
    )


def starting_point(server: Server, adapter: Adapter, round_index: int) -> Tensor:
    """The vector (n,) that clients train from; stacking begins every round with a new adapter."""
    if server.method.phases == "stack":
        return _seeded(adapter, server.seed, round_index, server.state.device)
    return server.state


def received_bytes(server: Server, cohort: Tensor) -> int:
    """Bytes that a cohort (K,) downloads before a round; afterwards it holds the newest versions."""
    total = 0
    for client in cohort.tolist():
        total += HEADER_BYTES
        for part, newest in server.versions.items():
            total += _missed_bytes(server, part, server.held[part][client], len(cohort))
            server.held[part][client] = newest
    return total


def sent_updates(server: Server, updates: Tensor, cohort: Tensor, phase: tuple[str, ...]) -> tuple[Tensor, int]:
    """What the server decodes of the cohort's updates (K, n), and the bytes that they took."""
    cohort = cohort.to(updates.device)
    method, result, total = server.method, torch.zeros_like(updates), 0
    for part in phase:
        where = server.parts[part]
        values = updates[:, where]
        if method.feedback:
            values = values + method.residual_decay * server.client_residuals[cohort, where]
        result[:, where] = decoded(values, method.up)
        if method.feedback:
            server.client_residuals[cohort, where] = values - result[:, where]
        total += encoded_bytes(values.shape[1], method.up)
    return result, len(cohort) * (total + HEADER_BYTES)


def fold(server: Server, updates: Tensor, phase: tuple[str, ...], adapter: Adapter, begun_at: Tensor) -> None:
    """Take the mean of decoded updates (K, n) through the server's optimiser; ``begun_at`` is where they started."""
    if server.method.phases == "stack":
        _stack(server, begun_at + updates, adapter)
        return
    mean = updates.mean(0)
    for part in phase:
        where = server.parts[part]
        server.state[where] += _server_step(server, mean[where], where, server.taken[part])
        server.taken[part] += 1


def broadcast(server: Server, phase: tuple[str, ...], round_index: int) -> None:
    """Encode what the round changed, and adopt what clients will decode."""
    for part in phase:
        where = server.parts[part]
        server.versions[part] = round_index + 1
        if server.method.phases == "stack":
            continue
        if server.method.down == "chain":
            _extend_chain(server, part)
            continue
        origin = server.initial[where] if server.method.from_seed else 0.0
        wanted = server.state[where] - origin + server.residual[where]
        adopted = decoded(wanted, server.method.down)
        if server.method.feedback:
            server.residual[where] = wanted - adopted
        server.state[where] = adopted + origin


def average_states(server: Server, round_index: int) -> None:
    """Take the newest state into the running means, whose windows grow with the rounds.

    A mean of decay d weighs the state of round t (from 1) by (d + 1) / (t + d): no horizon needs to be known
    (Shamir and Zhang 2013, "Stochastic gradient descent for non-smooth optimization").
    """
    for decay, mean in server.averages.items():
        mean.lerp_(server.state, (decay + 1) / (round_index + 1 + decay))


def _seeded(adapter: Adapter, seed: int, round_index: int, device: torch.device) -> Tensor:
    return adapter.initial(torch.Generator().manual_seed(1000 + seed + 7919 * round_index)).to(device)


def _missed_bytes(server: Server, part: str, held: int, cohort_size: int) -> int:
    newest, where = server.versions[part], server.parts[part]
    if held == newest:
        return 0
    size = where.stop - where.start
    if server.method.phases == "stack":
        # Every cohort's factors since, or the dense update of the base, whichever is less; of both parts once.
        cohort_bytes = cohort_size * encoded_bytes(size, server.method.up) * (newest - held)
        dense = sum(linear.numel() for linear in server.linears) // len(server.parts)
        return min(cohort_bytes, encoded_bytes(dense, server.method.up))
    if server.method.down == "chain":
        chain = sum(count for version, count in server.message_bytes[part].items() if version > held)
        return min(chain, encoded_bytes(size, "fp16"))
    return encoded_bytes(size, server.method.down)


def _server_step(server: Server, mean: Tensor, where: slice, taken: int) -> Tensor:
    method = server.method
    if method.server == "average":
        return method.server_rate * mean
    if method.server in ("momentum", "nesterov"):
        beta = min(method.server_beta, taken / (taken + 3))
        rate = 1 + (method.server_rate - 1) * beta / method.server_beta  # both grow: first updates are the largest
        server.velocity[where] = beta * server.velocity[where] + (1 - beta) * mean
        ahead = beta * server.velocity[where] + (1 - beta) * mean
        return rate * (ahead if method.server == "nesterov" else server.velocity[where])
    if method.server != "adam":
        raise ValueError(f"server optimiser {method.server}: average, momentum, nesterov or adam")
    velocity = method.server_beta * server.velocity[where] + (1 - method.server_beta) * mean
    second = _SECOND_BETA * server.second[where] + (1 - _SECOND_BETA) * mean.square()
    server.velocity[where], server.second[where] = velocity, second
    return method.server_rate * velocity / (second.sqrt() + _ADAPTIVITY)


def _extend_chain(server: Server, part: str) -> None:
    """Send the last update in four bits; the state is kept on the grid of fp16, so that a snapshot is exact."""
    where = server.parts[part]
    previous = server.sent[where]
    wanted = server.state[where] - previous + server.residual[where]
    sent = decoded(wanted, "int4")
    server.residual[where] = wanted - sent
    server.state[where] = (previous + sent).half().float()
    server.sent[where] = server.state[where]
    server.message_bytes[part][server.versions[part]] = encoded_bytes(where.stop - where.start, "int4")


def _stack(server: Server, vectors: Tensor, adapter: Adapter) -> None:
    """Add the mean of the clients' products to the base: exact, and only for a base that is not quantised."""
    for linear, (left, right) in zip(server.linears, adapter.factors(vectors), strict=True):
        products = (left @ right).view(len(vectors), *linear.shape)
        linear += adapter.scale * products.mean(0)
