"""Which runs a stage makes, most telling first: a stage that runs out of time has its later groups missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product

from benchmarks.federated_trial.methods import Method, Run, in_codec

FEDIT = Method("FedIT fp32", feedback=False)
BOTH = Method("both")
MOMENTUM = Method("both, momentum", server="momentum", server_rate=0.3)


def runs(
    methods: Iterable[Method], rates: Iterable[float], seeds: Iterable[int], federation: str, steps: int
) -> list[Run]:
    """Every method at every rate and seed."""
    return [Run(m, rate, seed, federation, steps) for m, rate, seed in product(methods, rates, seeds)]


def grouped(planned: list[Run], size: int) -> Iterator[list[Run]]:
    """Runs that one batch can hold, at most ``size``, in the order of the plan."""
    waiting: dict[tuple[object, ...], list[Run]] = {}
    for run in planned:
        m = run.method
        waiting.setdefault((run.federation, run.local_steps, m.core_rank, m.core_bases, m.rounds), []).append(run)
    for alike in waiting.values():
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def tiny() -> list[Run]:
    """A few runs of every kind, for a check in seconds."""
    core = Method("core", phases="core", core_rank=8, rounds=2)
    others = [
        FEDIT,
        in_codec(MOMENTUM, "int4", "int4"),
        in_codec(Method("alternating", phases="alternating"), "int8", "chain"),
        Method("stack fp16", phases="stack", up="fp16", down="fp16", feedback=False),
        Method("auto adam", phases="auto", threshold=0.0, server="adam", server_rate=1e-3),
    ]
    planned = runs([replace(m, rounds=2) for m in others], [4e-3], [0], "roles", 2)
    return planned + runs([core], [4e-3], [0], "roles", 2)


def explore() -> list[Run]:
    """Call one: where things stand, at one seed mostly."""
    hundred = _explore_hundred()
    return _explore_ten() + hundred[:24] + _explore_core() + _explore_docs() + hundred[24:]


def _explore_ten() -> list[Run]:
    four = [in_codec(m, "int4", "int4") for m in _candidates()]
    planned = runs([FEDIT], [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], [0, 1], "roles", 10)
    planned += runs([m for m in four if m.phases in ("both", "auto")], [2e-3, 4e-3], [0], "roles", 10)
    planned += runs([m for m in four if m.phases not in ("both", "auto")], [4e-3, 8e-3], [0], "roles", 10)
    wire = [
        in_codec(Method("both"), "int4", "int8"),
        in_codec(Method("both"), "int8", "int8"),
        in_codec(Method("both, no feedback", feedback=False), "int8", "int8"),
        in_codec(Method("both, no feedback", feedback=False), "int4", "int4"),
        in_codec(Method("both, not from seed", from_seed=False), "int4", "int4"),
        in_codec(Method("both, residual x 0.5", residual_decay=0.5), "int4", "int4"),
        in_codec(replace(MOMENTUM, name="momentum 0.3"), "fp32", "fp32"),
        in_codec(replace(MOMENTUM, name="momentum 0.3"), "int4", "int8"),
        in_codec(Method("both"), "int4", "chain"),
        Method("stack fp16", phases="stack", up="fp16", down="fp16", feedback=False),
    ]
    return planned + runs(wire, [2e-3, 4e-3], [0], "roles", 10)


def _candidates() -> list[Method]:
    both = [BOTH, Method("b x 4", b_ratio=4.0), Method("b x 1/4", b_ratio=0.25)]
    both += [Method(f"average x {rate}", server_rate=rate) for rate in (1.5, 2.0, 3.0)]
    both += [Method(f"momentum {rate}", server="momentum", server_rate=rate) for rate in (0.1, 0.2, 0.3, 0.5)]
    both += [Method(f"nesterov {rate}", server="nesterov", server_rate=rate) for rate in (0.2, 0.4)]
    both += [Method(f"adam {rate}", server="adam", server_rate=rate) for rate in (2e-3, 5e-3, 1e-2)]
    parts = [Method("alternating", phases="alternating"), Method("ffa", phases="ffa")]
    parts += [Method("alternating 5", phases="alternating", block_rounds=5)]
    parts += [replace(m, name=f"{m.name} momentum 0.3", server="momentum", server_rate=0.3) for m in parts]
    return both + parts


def _explore_hundred() -> list[Run]:
    low, middle = [3e-4, 1e-3, 3e-3], [5e-4, 1e-3, 2e-3]
    parts = [Method("alternating", phases="alternating"), Method("ffa", phases="ffa")]
    swift = Method("alternating momentum 0.3", phases="alternating", server="momentum", server_rate=0.3)
    momentum = [Method(f"momentum {rate}", server="momentum", server_rate=rate) for rate in (0.1, 0.3)]
    more = [Method("average x 2", server_rate=2.0), Method("adam 0.005", server="adam", server_rate=5e-3)]
    more += [Method("b x 4", b_ratio=4.0)]
    four = [in_codec(m, "int4", "int4") for m in [BOTH, *parts, swift, *momentum, *more]]
    planned = runs([FEDIT], [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3], [0], "roles", 100)
    planned += runs(four[:1], middle, [0], "roles", 100)
    planned += runs(four[4:5], low, [0], "roles", 100)
    planned += runs(four[1:3], [1e-3, 2e-3, 4e-3], [0], "roles", 100)
    planned += runs([four[3], four[5]], low, [0], "roles", 100)
    return planned + runs([in_codec(BOTH, "int4", "int8"), *four[6:]], middle, [0], "roles", 100)


def _explore_core() -> list[Run]:
    planned = []
    for rank, bases in ((32, "random"), (32, "base"), (64, "base")):
        core = Method(f"core {rank} {bases}", phases="core", core_rank=rank, core_bases=bases)
        faster = replace(core, name=f"{core.name} momentum 0.3", server="momentum", server_rate=0.3)
        methods = [in_codec(core, "int8", "int8"), in_codec(core, "int4", "int4"), in_codec(faster, "int4", "int4")]
        planned += runs(methods, [1e-3, 3e-3, 1e-2, 3e-2], [0], "roles", 10)
    return planned


def _explore_docs() -> list[Run]:
    candidates = {method.name: in_codec(method, "int4", "int4") for method in _candidates()}
    planned = runs([FEDIT], [1e-3, 2e-3, 4e-3, 8e-3], [0], "docs", 10)
    ours = [candidates[name] for name in ("both", "momentum 0.2", "momentum 0.3", "alternating")]
    return planned + runs(ours, [2e-3, 4e-3], [0], "docs", 10)


STAGES = {"tiny": tiny, "explore": explore}
