"""Accuracy when some devices lie: the mean, the gate on norms, and the median of groups' means."""

from __future__ import annotations

import logging
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.federated_faults.device import BOTH, FLIP, HONEST, SCALE, open_base, write_package
from benchmarks.federated_faults.digits import TARGET, TOKENS, Base, Tokens, deal, load_images, train_base, turn
from benchmarks.federated_faults.local import adapter_of, run_undisturbed

CLIENTS = 20
PLAIN, HONEST_ONLY = "mean, any norm", "nobody lies"
_MEDIAN = ("robust.method=group_median",)
METHODS: Mapping[str, Sequence[str]] = {
    "mean, any norm": ("gates.norm_factor=0",),
    "mean, norms up to 3 x their median": ("gates.norm_factor=3",),
    "median of 10 groups, norms up to 3 x": ("gates.norm_factor=3", *_MEDIAN, "robust.groups=10"),
    "median of 20 groups of one device, any norm": (
        "gates.norm_factor=0", *_MEDIAN, "robust.groups=20", "cohort.quorum=20",
    ),
}  # fmt: skip
ATTACKS: Mapping[str, tuple[str, int]] = {
    "nobody lies": (HONEST, 0),
    "20 % flip signs": (FLIP, 4),
    "20 % x 10": (SCALE, 4),
    "30 % flip signs": (FLIP, 6),
    "30 % x -10": (BOTH, 6),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One federation."""

    method: str
    attack: str
    seed: int
    rounds: int


def attack_table(seeds: int, rounds: int, workers: int) -> str:
    """Accuracy on held-out images, mean over seeds, and what was lost against the mean without liars, in points."""
    cases = [Case(method, attack, seed, rounds) for method in METHODS for attack in ATTACKS for seed in range(seeds)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        found = dict(zip(cases, pool.map(accuracy, cases), strict=True))
    lines = ["| server | " + " | ".join(ATTACKS) + " |", "|---" * (len(ATTACKS) + 1) + "|"]
    for method in METHODS:
        cells = [_cell(found, method, attack, seeds, rounds) for attack in ATTACKS]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def accuracy(case: Case) -> float:
    """Share of held-out images that the federation's candidate reads right; NaN when its rounds did not end."""
    from server.config import load_federation
    from server.rounds import FederationError

    logging.disable(logging.WARNING)
    trained, tested, base = _problem(case.seed)
    overrides = (
        "name=attacked", "package=none", f"rounds={case.rounds}", f"seed={case.seed}", f"adapter.targets=[{TARGET}]",
        f"cohort.size={CLIENTS}", "cohort.over_selection=1", f"cohort.quorum={CLIENTS // 2}",
        f"local.sequence_tokens={TOKENS}", "evaluation.every=0", "cohort.shortest_deadline_s=600",
        *METHODS[case.method],
    )  # fmt: skip
    config = load_federation("default", overrides)
    text = {f"device-{index:02d}": rows for index, rows in enumerate(deal(trained, CLIENTS, case.seed))}
    kind, count = ATTACKS[case.attack]
    liars = set(np.random.default_rng(case.seed).permutation(sorted(text))[:count].tolist())
    with tempfile.TemporaryDirectory(dir=_fast_directory()) as name:
        write_package(Path(name) / "package", base)
        manifest, trainer = open_base(Path(name) / "package")
        try:
            federation = run_undisturbed(
                config, manifest, trainer, text, Path(name) / "run",
                lambda device, number: kind if device in liars else HONEST,
            )  # fmt: skip
        except FederationError:
            return float("nan")
    return trainer.accuracy(tested, adapter_of(federation), federation.layout.scale)


def _cell(found: Mapping[Case, float], method: str, attack: str, seeds: int, rounds: int) -> str:
    reached = [found[Case(method, attack, seed, rounds)] for seed in range(seeds)]
    undisturbed = [found[Case(PLAIN, HONEST_ONLY, seed, rounds)] for seed in range(seeds)]
    if any(map(math.isnan, reached)):
        return "destroyed: no round any more"
    lost = 100 * (statistics.fmean(undisturbed) - statistics.fmean(reached))
    return f"{100 * statistics.fmean(reached):.1f} % ({-lost:+.1f})"


@lru_cache(maxsize=4)
def _problem(seed: int) -> tuple[Tokens, Tokens, Base]:
    """(images to deal, images to test on, both lying; a base that knows upright ones)."""
    trained, tested = load_images(seed)
    return turn(trained), turn(tested), train_base(trained, seed)


def _fast_directory() -> str | None:
    """Memory, where there is such a directory: thousands of synced files are no part of the question."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
