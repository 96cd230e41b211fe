"""The bound that decides, and the settings of stage=gate."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from edge_runtime.formats.errors import ConfigError
from pipeline.adapters.trial import lower_bound
from pipeline.config import config_digest, load_configs


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_the_bound_is_scipys(confidence: float) -> None:
    differences = np.random.default_rng(0).gamma(2.0, 0.01, 96) - 0.012
    found = lower_bound(differences, confidence=confidence, resamples=20_000, seed=7)
    expected = stats.bootstrap(
        (differences,), np.mean, confidence_level=confidence, alternative="greater", method="percentile",
        n_resamples=20_000, rng=np.random.default_rng(1),
    ).confidence_interval.low  # fmt: skip
    spread = differences.std() / np.sqrt(96)
    assert found == pytest.approx(expected, abs=0.05 * spread)
    assert found < differences.mean() - spread


def test_the_bound_is_a_function_of_its_arguments() -> None:
    differences = np.random.default_rng(0).normal(0.1, 1, 50)
    bounds = [lower_bound(differences, confidence=0.95, resamples=200, seed=seed) for seed in (1, 1, 2)]
    assert bounds[0] == bounds[1] != bounds[2]


def test_equal_losses_are_no_gain() -> None:
    assert lower_bound(np.zeros(20), confidence=0.95, resamples=100, seed=0) == 0.0


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["stage=gate"], "candidate: is missing; add candidate=DIR"),
        (["candidate=here"], "candidate: only stage=gate takes one, the stage is not given"),
        (["package=here", "stage=export"], "package: only stage=gate takes one, the stage is export"),
        (["stage=gate", "candidate=here", "dry_run=true"], "dry_run: stage=gate has no plan to print"),
        (["stage=gate", "candidat=here"], "candidat: no such key; did you mean candidate?"),
        (["stage=gate", "candidate=here", "pakage=there"], "pakage: no such key; did you mean package?"),
        (["gate.margin=-1"], "gate.margin: got -1"),
        (["gate.confidence=1"], "gate.confidence: got 1"),
        (["gate.sequences=7"], "gate.sequences: got 7"),
    ],
)
def test_a_wrong_setting_is_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_configs([*overrides, "submodel=tiny"])
    assert str(caught.value).splitlines()[0].startswith(line)


def test_which_candidate_is_judged_is_no_setting_of_a_run() -> None:
    with_candidate = load_configs(["stage=gate", "candidate=a", "package=b", "submodel=tiny"])
    without = {name: config.model_copy(update={"stage": None, "candidate": None, "package": None})
               for name, config in with_candidate.items()}  # fmt: skip
    assert config_digest(with_candidate) == config_digest(without)
