"""Which runs a stage makes, most telling first: a stage that runs out of time has its later groups missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product

from benchmarks.federated_trial.methods import Method, Run, in_codec

FEDIT = Method("FedIT fp32", feedback=False)
BOTH = Method("both")
MOMENTUM = Method("both, momentum", server="momentum")


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
    """One seed, many candidates: what is worth a row of the table."""
    return [*_explore_ten(), *_explore_long(), *_explore_hundred(), *_explore_docs(), *_explore_core()]


def _four(name: str, rates: Iterable[float], federation: str, steps: int, **options: object) -> list[Run]:
    method = Method(name, up="int4", down="int4", **options)  # type: ignore[arg-type]
    return runs([method], rates, [0], federation, steps)


def _explore_ten() -> Iterator[Run]:
    yield from runs([FEDIT], [4e-3, 8e-3, 1.6e-2], [0], "roles", 10)
    yield from _four("both", [4e-3, 8e-3, 1.6e-2], "roles", 10)
    yield from _four("both, local decay", [8e-3, 1.6e-2, 3.2e-2], "roles", 10, local_decay=True)
    yield from _four("both, kept second", [4e-3, 8e-3, 1.6e-2], "roles", 10, keep_second=True)
    yield from _four("both, nesterov 2", [2e-3, 4e-3, 8e-3], "roles", 10, server="nesterov", server_rate=2.0)
    mild = {"server": "nesterov", "server_rate": 1.5, "server_beta": 0.6}
    yield from _four("both, nesterov 1.5 mild", [4e-3, 8e-3], "roles", 10, **mild)
    yield from _four("both, momentum 1", [4e-3, 8e-3, 1.6e-2], "roles", 10, server="momentum")
    yield from _four("both, b x 2", [4e-3, 8e-3], "roles", 10, b_ratio=2.0)
    yield from _four("both, average x 0.7", [8e-3, 1.6e-2], "roles", 10, server_rate=0.7)


def _explore_long() -> Iterator[Run]:
    def by_turns(name: str, rates: Iterable[float], block_rounds: int, **options: object) -> list[Run]:
        shape = {"phases": "alternating", "block_rounds": block_rounds, "rounds": 100}
        return _four(name, rates, "roles", 10, **shape, **options)

    yield from by_turns("alternating", [8e-3, 1.6e-2], 1)
    yield from by_turns("alternating 5", [4e-3, 8e-3, 1.6e-2], 5)
    yield from by_turns("alternating 10", [8e-3, 1.6e-2], 10)
    yield from by_turns("alternating 5, local decay", [1.6e-2, 3.2e-2], 5, local_decay=True)
    yield from by_turns("alternating 5, kept second", [8e-3, 1.6e-2], 5, keep_second=True)
    yield from by_turns("alternating 5, momentum 1", [8e-3, 1.6e-2], 5, server="momentum")
    yield from by_turns("alternating 5, nesterov 2", [4e-3, 8e-3], 5, server="nesterov", server_rate=2.0)
    yield from by_turns("alternating 5, b x 2", [4e-3, 8e-3], 5, b_ratio=2.0)
    yield from _four("ffa", [8e-3, 1.6e-2, 3.2e-2], "roles", 10, phases="ffa", rounds=100)
    yield from _four("ffa, kept second", [8e-3, 1.6e-2], "roles", 10, phases="ffa", rounds=100, keep_second=True)
    swift = {"phases": "ffa", "rounds": 100, "server": "nesterov", "server_rate": 2.0}
    yield from _four("ffa, nesterov 2", [8e-3, 1.6e-2], "roles", 10, **swift)


def _explore_hundred() -> Iterator[Run]:
    yield from runs([FEDIT], [6e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3], [0], "roles", 100)
    yield from _four("both", [2.5e-4, 5e-4, 1e-3], "roles", 100)
    yield from _four("both, local decay", [5e-4, 1e-3], "roles", 100, local_decay=True)
    yield from _four("alternating", [5e-4, 1e-3], "roles", 100, phases="alternating")
    yield from _four("alternating 5", [2.5e-4, 5e-4, 1e-3], "roles", 100, phases="alternating", block_rounds=5)
    yield from _four("ffa", [1e-3], "roles", 100, phases="ffa")
    yield from _four("both, average x 0.5", [5e-4, 1e-3], "roles", 100, server_rate=0.5)
    yield from _four("both, local average", [5e-4, 1e-3], "roles", 100, local_average=True)
    mild = {"server": "nesterov", "server_rate": 1.5, "server_beta": 0.6}
    yield from _four("both, nesterov 1.5 mild", [2.5e-4], "roles", 100, **mild)
    yield from _four("both, momentum 1", [5e-4, 1e-3], "roles", 100, server="momentum")
    yield from _four("both, kept second", [5e-4], "roles", 100, keep_second=True)


def _explore_docs() -> Iterator[Run]:
    yield from runs([FEDIT], [1e-3, 2e-3, 4e-3, 8e-3], [0], "docs", 10)
    yield from _four("both", [2e-3, 4e-3, 8e-3], "docs", 10)
    yield from _four("both, local decay", [4e-3, 8e-3, 1.6e-2], "docs", 10, local_decay=True)
    yield from _four("both, nesterov 2", [2e-3, 4e-3], "docs", 10, server="nesterov", server_rate=2.0)
    yield from _four("alternating 5", [4e-3, 8e-3, 1.6e-2], "docs", 10, phases="alternating", block_rounds=5)
    yield from _four("ffa", [8e-3, 1.6e-2], "docs", 10, phases="ffa")
    yield from _four("both, kept second", [4e-3, 8e-3], "docs", 10, keep_second=True)
    yield from _four("both, momentum 1", [4e-3, 8e-3], "docs", 10, server="momentum")
    yield from runs([in_codec(BOTH, "int8", "int8"), in_codec(BOTH, "int4", "int8")], [4e-3], [0], "docs", 10)
    yield from _four("alternating", [8e-3], "docs", 10, phases="alternating")


def _explore_core() -> Iterator[Run]:
    for rank, bases in ((32, "base"), (64, "random")):
        shape = {"phases": "core", "core_rank": rank, "core_bases": bases}
        name = f"core {rank} {bases}"
        yield from _four(name, [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2], "roles", 10, **shape)
        yield from _four(f"{name}, nesterov 2", [4e-3, 8e-3], "roles", 10, server="nesterov", server_rate=2.0, **shape)
        yield from _four(f"{name}, local decay", [8e-3, 1.6e-2], "roles", 10, local_decay=True, **shape)
        yield from runs([Method(f"{name} fp32", **shape)], [4e-3, 8e-3], [0], "roles", 10)  # type: ignore[arg-type]


def table() -> list[Run]:
    """The rows of the benchmark, on seeds that the exploration did not see."""
    return [*_table_ten("roles"), *_table_hundred("roles"), *_table_docs_ten(), *_table_docs_hundred()]


_SEEDS = (1, 2, 3)
_SWIFT = Method("nesterov 2", server="nesterov", server_rate=2.0)
_MILD = Method("nesterov 1.5", server="nesterov", server_rate=1.5, server_beta=0.6)
_STACK = Method("stacking fp16", phases="stack", up="fp16", down="fp16", feedback=False)
_FP16 = Method("FedIT fp16", up="fp16", down="fp16", feedback=False)
_NO_FEEDBACK = Method("FedIT int8, no feedback", up="int8", down="int8", feedback=False)
_FEDIT_SWIFT = replace(_SWIFT, name="FedIT fp32, nesterov 2", feedback=False)
_OURS_4 = in_codec(_SWIFT, "int4", "int4")
_OURS_8 = in_codec(_SWIFT, "int8", "int8")
_MILD_4 = in_codec(_MILD, "int4", "int4")
_PLAIN_4 = in_codec(BOTH, "int4", "int4")
_TURNS_4 = Method("alternating 5 int4/int4", phases="alternating", up="int4", down="int4", block_rounds=5)
_AUTO_4 = replace(_OURS_4, name="auto 0.87, nesterov 2 int4/int4", phases="auto", threshold=0.87, block_rounds=5)
_FFA = Method("FFA fp32", phases="ffa", feedback=False)
_FFA_4 = Method("FFA int4/int4", phases="ffa", up="int4", down="int4")


def _longer(*methods: Method) -> list[Method]:
    """Methods of cheap rounds may take more of them."""
    return [replace(method, rounds=100) for method in methods]


def _table_ten(federation: str) -> Iterator[Run]:
    def at(methods: list[Method], rates: list[float]) -> list[Run]:
        return runs(methods, rates, _SEEDS, federation, 10)

    yield from at([FEDIT], [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2])
    yield from at([_OURS_4], [2e-3, 4e-3, 8e-3])
    yield from at([_OURS_8, _MILD_4, _PLAIN_4, _FP16, _NO_FEEDBACK, _FEDIT_SWIFT], [4e-3])
    yield from at([_STACK], [4e-3, 8e-3])
    yield from at(_longer(_FFA, _FFA_4), [1.6e-2])
    yield from at(_longer(_TURNS_4), [8e-3])
    yield from at(_longer(_AUTO_4), [4e-3])


def _table_hundred(federation: str) -> Iterator[Run]:
    def at(methods: list[Method], rates: list[float], seeds: tuple[int, ...] = _SEEDS) -> list[Run]:
        return runs(methods, rates, seeds, federation, 100)

    yield from at([FEDIT], [1.25e-4, 2.5e-4, 5e-4])
    yield from at([_OURS_4], [2.5e-4])
    yield from at([_OURS_4], [1.25e-4])
    yield from at([_OURS_8, _MILD_4], [2.5e-4])
    yield from at([_TURNS_4], [5e-4])
    yield from at([FEDIT], [6.25e-5, 1e-3], (1,))
    yield from at([_FP16, _NO_FEEDBACK, _FEDIT_SWIFT, _PLAIN_4], [2.5e-4], (1,))
    yield from at([_STACK], [2.5e-4, 5e-4], (1,))
    yield from at([_FFA], [5e-4, 1e-3], (1,))
    yield from at([replace(_OURS_4, name=f"{_OURS_4.name}, local decay", local_decay=True)], [2.5e-4, 5e-4], (1,))


def _table_docs_ten() -> Iterator[Run]:
    yield from runs([FEDIT], [2e-3, 4e-3, 8e-3], _SEEDS, "docs", 10)
    yield from runs([FEDIT], [1e-3, 1.6e-2], (1,), "docs", 10)
    yield from runs([_OURS_4], [4e-3], _SEEDS, "docs", 10)
    yield from runs([_OURS_4], [2e-3, 8e-3], (1,), "docs", 10)
    yield from runs([_OURS_8, _MILD_4, _FP16, _NO_FEEDBACK, _FEDIT_SWIFT, _PLAIN_4], [4e-3], (1,), "docs", 10)
    yield from runs([_STACK], [4e-3, 8e-3], (1,), "docs", 10)
    yield from runs(_longer(_TURNS_4), [8e-3], _SEEDS, "docs", 10)
    yield from runs(_longer(_FFA, _FFA_4), [1.6e-2], _SEEDS, "docs", 10)
    yield from runs(_longer(_AUTO_4), [4e-3], _SEEDS, "docs", 10)


def _table_docs_hundred() -> Iterator[Run]:
    yield from runs([FEDIT], [1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3], (1,), "docs", 100)
    yield from runs([_OURS_4], [1.25e-4, 2.5e-4, 5e-4], (1,), "docs", 100)
    turns_swift = replace(_OURS_4, name=f"alternating 5, {_OURS_4.name}", phases="alternating", block_rounds=5)
    yield from runs([_TURNS_4], [5e-4, 1e-3], (1,), "docs", 100)
    yield from runs([turns_swift], [5e-4], (1,), "docs", 100)
    yield from runs([_OURS_8], [2.5e-4], (1,), "docs", 100)


STAGES = {"tiny": tiny, "explore": explore, "table": table}
