from __future__ import annotations

import os
import shutil

import pytest

from edge_runtime.formats.errors import UserError
from server import committing, federation, ledger
from server.federation import adapter_digest
from server.rounds import run_federation
from tests.server.simulated import Wire, events_of, federate, phones, rounds_of, settings


class Crash(Exception):
    pass


class Bomb:
    """Counts the calls that reach the outside and ends the server before one of them, or after a checkpoint."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls, self.at = 0, set[int]()
        patch.setattr(os, "fsync", lambda _: None)  # the machine stays up
        for owner, name in (
            (Wire, "push"),
            (Wire, "pull"),
            (ledger.Ledger, "append"),
            (federation, "save_checkpoint"),
            (federation, "save_adapter"),
            (committing, "write_candidate"),
        ):
            patch.setattr(owner, name, self._around(getattr(owner, name)))

    def _around(self, call):
        def wrapped(*args, **kwargs):
            self._tick()
            result = call(*args, **kwargs)
            if call.__name__ == "save_checkpoint":
                self._tick()
            return result

        return wrapped

    def _tick(self):
        self.calls += 1
        if self.calls in self.at:
            raise Crash(self.calls)


def run_through(config, directory, devices):
    """Run to the end, opening the federation again after every crash, with devices that keep what they know."""
    for _ in range(1000):
        try:
            run = federate(config, directory, devices)
            run_federation(run)
            return run
        except Crash:
            continue
    raise AssertionError("never ends")


def outcome_of(run, *without):
    directory = run.directory / "candidates"
    candidates = {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    optimizer = {name: value.tobytes() for name, value in run.optimizer.state().items()}
    residuals = {group: value.tobytes() for group, value in run.state.residuals.items()}
    known = [(d.name, d.folded_plan, d.folded, d.rank) for d in run.devices.values()]
    numbers = (run.number, run.drift, run.norm_gate.state(), run.state.versions, run.loss)
    return adapter_digest(run), optimizer, residuals, sorted(known), numbers, candidates, rounds_of(run, *without)


GENTLE = ("optimizer.name=fedadam", "optimizer.learning_rate=0.01")
CRASHES = {
    "nesterov turns": ("optimizer.name=nesterov", "optimizer.average=6", "phases.turn_rounds=2"),
    "fedavg alternating": ("optimizer.name=fedavg", "phases.warmup_rounds=1", "candidate_every=2"),
    "fedavgm both": ("optimizer.name=fedavgm", "phases.schedule=both", "cohort.over_selection=2", "cohort.size=2"),
    "fedadam auto": (*GENTLE, "phases.schedule=auto", "phases.dispersion=0.1"),
    "fedadam core": (*GENTLE, "phases.schedule=core", "phases.warmup_rounds=1"),
}


@pytest.mark.parametrize("evaluated", [False, True], ids=["", "evaluated"])
@pytest.mark.parametrize("overrides", CRASHES.values(), ids=CRASHES)
def test_a_server_that_dies_at_any_call_ends_with_the_same_bits(tmp_path, monkeypatch, overrides, evaluated) -> None:
    more = ("evaluation.every=1", "rounds=2", "gates.loss_rise=9") if evaluated else ("rounds=3", "gates.norm_factor=4")
    config, bomb = settings("adapter.ranks=[2,4]", *overrides, *more), Bomb(monkeypatch)
    # Whoever evaluated holds the factors already; a server that died after it does not know that and sends them.
    without = ("bytes_up", "bytes_down") if evaluated else ()
    quiet = outcome_of(run_through(config, tmp_path / "quiet", phones(config, [2, 4, 4])), *without)
    calls = bomb.calls
    assert len(quiet[-1]) == config.rounds and quiet[5] and calls > 20
    for call in range(1, calls + 1):
        bomb.calls, bomb.at = 0, {call}
        directory = tmp_path / "crashed"
        run = run_through(config, directory, phones(config, [2, 4, 4]))
        assert outcome_of(run, *without) == quiet, f"after a crash at call {call} of {calls}"
        shutil.rmtree(directory)


def test_a_server_that_dies_again_and_again_ends_with_the_same_bits(tmp_path, monkeypatch) -> None:
    config, bomb = settings("rounds=4", "candidate_every=1", "optimizer.name=fedavgm"), Bomb(monkeypatch)
    quiet = outcome_of(run_through(config, tmp_path / "quiet", phones(config)))
    bomb.at = set(range(bomb.calls, 20000, 13))  # a round is 7 calls and more
    assert outcome_of(run_through(config, tmp_path / "crashed", phones(config))) == quiet
    assert bomb.calls > 13 * 5


def test_a_round_whose_evaluation_crashed_is_evaluated_and_told_once(tmp_path) -> None:
    config = settings("rounds=2", "evaluation.every=1")
    devices = phones(config)

    def torn(*args):
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(committing, "evaluate", torn)
        patch.setattr("server.rounds.evaluate", lambda *_: None)
        with pytest.raises(Crash):
            run_federation(federate(config, tmp_path, devices))
    run, reported = federate(config, tmp_path, devices), []
    assert run.number == 1 and not rounds_of(run)
    run_federation(run, lambda record: reported.append(record["round"]))
    assert [r["round"] for r in rounds_of(run)] == reported == [1, 2]
    assert all(r["held_out_loss"] > 0 for r in rounds_of(run))
    assert all(set(r["seconds"]) == {"push", "wait", "fold", "commit"} for r in events_of(run, "round"))


def test_another_adapter_in_the_same_directory_is_refused(tmp_path) -> None:
    config = settings("rounds=1")
    run_federation(federate(config, tmp_path, phones(config)))
    with pytest.raises(UserError, match="another base or adapter"):
        federate(settings("rounds=1", "adapter.alpha=4"), tmp_path, phones(config))
