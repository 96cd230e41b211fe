"""A round with secure aggregation, as the round loop sees it: asked, summed behind masks, opened as one mean."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from edge_runtime.formats.envelope import Envelope
from edge_runtime.formats.messages import MaskPlan
from server.aggregation import Mean, assign_groups, median_of_means
from server.collecting import Collected, Work, noise_share
from server.federation import Federation
from server.gates import Refusal
from server.plan import make_plan
from server.secure_sum import Abandoned, SecureSum, choose_scales, run_secure_round
from server.secure_talk import Member, SecureSettings, Tally
from server.selection import Device
from server.transport import Arrival, Transport

STAGE_TIMEOUT_S = 60.0  # an exchange of keys or shares; a device that is training does not answer it

log = logging.getLogger(__name__)


def collect_masked(
    federation: Federation, cohort: Sequence[Device], work: Work, random_bytes: Callable[[int], bytes]
) -> Collected:
    """Run the cohort through a round in which the server learns sums alone.

    With the robust median every group has a masked sum of its own, all at the same time.

    Args:
        federation: Between two rounds.
        cohort: At least the quorum.
        work: ``attempt`` must be new: masks are never used twice.
        random_bytes: Names the sessions.
    """
    config, collected, phase = federation.config, Collected(), work.phase
    sizes = federation.layout.segment_sizes(phase.groups, federation.layout.max_rank)
    scales = federation.mask_scales.get(phase.value) or choose_scales((), None, sizes, *_limits(federation))
    groups = _groups(federation, cohort, work)
    transport = _OneAtATime(federation.transport)
    started_s = federation.clock()
    seeds = [random_bytes(32) for _ in groups]
    with ThreadPoolExecutor(len(groups)) as pool:
        jobs = [
            pool.submit(
                _sum_group, federation, transport, group, work, scales, seed, -(-config.cohort.size // len(groups))
            )
            for group, seed in zip(groups, seeds, strict=True)
        ]
        results = [job.result() for job in jobs]
    collected.seconds["wait"] = federation.clock() - started_s
    means = [
        found
        for group, result in zip(groups, results, strict=True)
        if (found := _note(collected, group, work, result, sizes, federation.clock())) is not None
    ]
    if not means or 2 * len(means) <= len(groups):
        return collected
    mean = means[0] if len(groups) == 1 else median_of_means(means, sizes)
    if _beyond(federation, mean, work):
        collected.refused[Refusal.NORM.value] += len(collected.folded)
        collected.folded.clear()
        return collected
    collected.mean, collected.scales = mean, tuple(scales)
    return collected


def move_scales(federation: Federation, collected: Collected, released: Mean, work: Work) -> None:
    """The next round's public scales, from the mean as it is released: with its noise."""
    sizes = federation.layout.segment_sizes(work.phase.groups, federation.layout.max_rank)
    federation.mask_scales[work.phase.value] = choose_scales(
        collected.scales, released.vector, sizes, *_limits(federation)
    )


def _limits(federation: Federation) -> tuple[int, float, float]:
    """(largest code, what no update should exceed, each device's noise)."""
    local = federation.config.local
    bound = max(local.learning_rate, local.learning_rate_b) * local.steps
    return federation.config.secure.largest_code, bound, noise_share(federation)


def _groups(federation: Federation, cohort: Sequence[Device], work: Work) -> list[list[Device]]:
    robust = federation.config.robust
    count = robust.groups if robust.method == "group_median" else 1
    place = assign_groups([device.node for device in cohort], count, federation.config.seed + work.number)
    return [[device for device in cohort if place[device.node] == group] for group in range(count)]


def _sum_group(
    federation: Federation,
    transport: Transport,
    group: Sequence[Device],
    work: Work,
    scales: Sequence[float],
    seed: bytes,
    enough: int,
) -> SecureSum | Abandoned:
    config = federation.config
    by_node = {device.node: device for device in group}
    noise_std, planned = noise_share(federation), set[int]()

    def plan(member: Member, mask: MaskPlan) -> Envelope:
        device = by_node[member.node]
        if member.node in planned:  # it lacks factors that it was believed to hold
            device.held = {}
        planned.add(member.node)
        return make_plan(
            config,
            federation.state,
            device,
            work.number,
            work.phase,
            work.deadline_s,
            attempt=work.attempt,
            mask=mask,
            noise_std=noise_std,
        )

    settings = SecureSettings(
        min_cohort=config.secure.min_cohort,
        largest_code=config.secure.largest_code,
        stage_timeout_s=STAGE_TIMEOUT_S,
        deadline_s=work.deadline_s,
        weight_cap=config.local.weight_cap if config.local.weight == "sequences" else 1,
        noise_std=noise_std,
        enough=enough,
    )
    members = [Member(device.node, device.name, device.public_key, device.rank) for device in group]
    return run_secure_round(
        transport,
        members,
        plan,
        federation.layout,
        work.phase.groups,
        settings,
        scales,
        seed,
        federation.clock,
        federation.sleep,
        federation=config.name,
        number=work.number,
    )


def _note(
    collected: Collected,
    group: Sequence[Device],
    work: Work,
    result: SecureSum | Abandoned,
    sizes: Sequence[int],
    now_s: float,
) -> Mean | None:
    """Write down what became of every device; the group's mean, when there is one."""
    _note_tally(collected, group, work, result.tally, now_s)
    if isinstance(result, Abandoned):
        log.warning("round %d: masked sum abandoned (%s): %s", work.number, result.stage, result.reason)
        return None
    for device in group:
        if (update := result.updates.get(device.node)) is not None:
            device.held, device.step_s = dict(work.versions), update.step_s or device.step_s
            device.outcome(work.number, "folded")
            collected.folded.append((device, update))
    padding = (0,) * (len(sizes) - len(result.weights))
    return Mean(result.mean(sizes), result.weights + padding, result.contributors + padding)


def _note_tally(collected: Collected, group: Sequence[Device], work: Work, tally: Tally, now_s: float) -> None:
    collected.bytes_up += tally.bytes_up
    collected.bytes_down += tally.bytes_down
    for device in group:
        if (decline := tally.declined.get(device.node)) is not None:
            collected.declined[decline.reason.value] += 1
            device.not_before_s = now_s + decline.retry_after_s
            device.outcome(work.number, f"declined:{decline.reason.value}")
        elif (reason := tally.refused.get(device.node)) is not None:
            collected.refused[reason] += 1
            device.outcome(work.number, f"refused:{reason}")
        elif (stage := tally.lost.get(device.node)) is not None:
            collected.lost.append(device)
            device.outcome(work.number, f"lost:{stage}"[:60])


def _beyond(federation: Federation, mean: Mean, work: Work) -> bool:
    """The norm gate on the sum: single updates cannot be looked at."""
    key, norm = f"sum:{work.phase.value}", float(np.linalg.norm(mean.vector))
    bound = federation.norm_gate.bound(key)
    if bound and norm > bound:
        log.warning("round %d: the mean's norm %.3g is above %.3g; the round is spoiled", work.number, norm, bound)
        return True
    federation.norm_gate.accept(key, [norm])
    return False


class _OneAtATime:
    """A transport for several groups at once: calls wait for each other."""

    def __init__(self, transport: Transport) -> None:
        self._transport, self._lock = transport, threading.Lock()

    def nodes(self) -> list[int]:
        with self._lock:
            return self._transport.nodes()

    def push(self, messages: Sequence[tuple[int, Envelope]], ttl_s: float, group: str) -> list[str]:
        with self._lock:
            return self._transport.push(messages, ttl_s, group)

    def pull(self, message_ids: Collection[str]) -> list[Arrival]:
        with self._lock:
            return self._transport.pull(message_ids)
