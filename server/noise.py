"""Noise on a round's mean, and what it is worth."""

from __future__ import annotations

import json
import os
from math import sqrt
from pathlib import Path

import numpy as np

from edge_runtime.formats.errors import UserError
from edge_runtime.formats.files import temporary_beside
from server.aggregation import Mean
from server.collecting import Collected, Work, noise_share
from server.federation import Federation
from server.privacy import central_noise, masked_multiplier

KEY_FILE, KEY_BYTES = "noise.key", 32


def add_noise(federation: Federation, collected: Collected, work: Work) -> Mean:
    """The mean as it may be released; counts what that costs each device.

    Central noise is drawn from the federation's key, the round and exactly whose updates are in the sum: a round
    that is computed again after a crash gets the same noise, and no other sum ever does.
    """
    privacy, mean = federation.config.privacy, collected.mean
    if mean is None:
        raise ValueError("a round without an update")
    if privacy.noise == "none" or federation.accountant is None:
        return mean
    layout = federation.layout
    sizes = layout.segment_sizes(work.phase.groups, layout.max_rank)
    rounding = 0.5 * sqrt(sum(size * scale**2 for size, scale in zip(sizes, collected.scales, strict=False)))
    if privacy.noise == "distributed":
        std = noise_share(federation)
        multiplier = masked_multiplier(std, privacy.clip_norm, mean.contributors, collected.scales, sizes)
    else:
        multiplier = privacy.noise_multiplier * privacy.clip_norm / (privacy.clip_norm + rounding)
        mean = _with_central(federation, collected, mean, work, sizes)
    federation.accountant.compose(multiplier, [device.name for device, _ in collected.folded])
    return mean


def _with_central(federation: Federation, collected: Collected, mean: Mean, work: Work, sizes: tuple[int, ...]) -> Mean:
    privacy = federation.config.privacy
    plans = sorted(update.plan_id for _, update in collected.folded)
    context = json.dumps([work.number, work.phase.value, work.attempt, plans]).encode("ascii")
    key = _key(federation.directory)
    noise = central_noise(sum(sizes), privacy.noise_multiplier * privacy.clip_norm, key, context)
    ends = np.cumsum(sizes)
    for start, end, weight in zip((0, *ends), ends, mean.weights, strict=False):
        # On the sum; uniform weights, so that the mean is the sum over the number of devices.
        noise[start:end] *= 1.0 / weight if weight else 0.0
    return Mean(mean.vector + noise, mean.weights, mean.contributors)


def _key(directory: Path) -> bytes:
    """This federation's secret, made at first use."""
    path = directory / KEY_FILE
    if not path.exists():
        with temporary_beside(path, os.urandom(KEY_BYTES), 0o600) as temporary:
            os.replace(temporary, path)
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise UserError(str(path), f"{len(key)} bytes", f"{KEY_BYTES} bytes", "start another federation")
    return key
