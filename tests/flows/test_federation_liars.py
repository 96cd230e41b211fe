"""A fifth of the devices send the opposite of what they learned, or ten times as much, through whole federations."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.formats.layout import AdapterLayout
from edge_runtime.formats.messages import Plan
from server.config import load_federation
from server.fleet import DriftingDevice, simulate

pytestmark = pytest.mark.flow

DEVICES, LIARS, ROUNDS = 20, 4, 8
SETTINGS = (
    "name=liars", "package=none", f"rounds={ROUNDS}", "adapter.ranks=[4]", "adapter.alpha=8", "local.steps=5",
    f"cohort.size={DEVICES}", f"cohort.quorum={DEVICES}", "cohort.over_selection=1", "candidate_every=0", "gate=false",
    "evaluation.every=0", "gates.norm_factor=0", "optimizer.name=fedavg",
)  # fmt: skip


class Liar(DriftingDevice):
    """Learns as the others do and sends ``factor`` times that."""

    def __init__(self, index: int, layout: AdapterLayout, seed: int, factor: float) -> None:
        super().__init__(index, layout, seed)
        self.factor = np.float32(factor)

    def _encode(self, plan: Plan, delta):
        return super()._encode(plan, self.factor * delta)


@pytest.fixture(scope="module")
def final_loss(tmp_path_factory: pytest.TempPathFactory):
    """``final_loss(factor, groups)``: the honest devices' mean loss at the end; groups 0: the plain mean."""

    @cache
    def run(factor: float, groups: int) -> float:
        robust = (f"robust.groups={groups}", "robust.method=group_median") if groups else ()
        config = load_federation("default", (*SETTINGS, *robust))

        def make(index: int, layout: AdapterLayout, seed: int) -> DriftingDevice:
            return Liar(index, layout, seed, factor) if index < LIARS else DriftingDevice(index, layout, seed)

        folder: Path = tmp_path_factory.mktemp("liars")
        federation = simulate(config, DEVICES, folder, make)
        assert federation.record["folded"] == DEVICES, "a gate that refused the liars would prove nothing here"
        factors, honest = federation.state.factors(), range(LIARS, DEVICES)
        return float(np.mean([DriftingDevice(i, federation.layout, config.seed).loss(factors) for i in honest]))

    return run


# Measured: plain 2.97 and 5.92 times the loss without liars; 20 groups 1.029 and 1.015; 10 groups 1.21 and 1.019,
# because a group of two with a liar in it is a liar's.
@pytest.mark.parametrize(
    ("factor", "groups", "plain_ratio", "robust_ratio"),
    [(-1.0, 20, 2.8, 1.04), (-1.0, 10, 2.8, 1.25), (10.0, 20, 5.5, 1.03), (10.0, 10, 5.5, 1.03)],
)
def test_the_median_of_groups_keeps_what_the_mean_loses(final_loss, factor, groups, plain_ratio, robust_ratio) -> None:
    clean = final_loss(1.0, 0)
    assert final_loss(factor, 0) > plain_ratio * clean
    assert final_loss(factor, groups) < robust_ratio * clean


@pytest.mark.parametrize("groups", [10, 20])
def test_the_median_costs_honest_devices_little(final_loss, groups) -> None:
    assert final_loss(1.0, groups) < 1.01 * final_loss(1.0, 0)
