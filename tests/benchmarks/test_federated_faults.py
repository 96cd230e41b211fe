"""The parts of the chaos benchmark that decide what its tables say."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from benchmarks.federated_faults.device import BOTH, FLIP, HONEST, NAN, SCALE, open_base, tamper, write_package
from benchmarks.federated_faults.digits import (
    MODULES,
    TOKENS,
    DigitsTrainer,
    deal,
    digits_layout,
    read_letters,
    write_text,
)
from benchmarks.federated_faults.events import SUPERLINK, conduct_in, draw_conduct, draw_kills
from benchmarks.federated_faults.local import run_undisturbed
from edge_runtime.federated.data import LocalData, Retention
from edge_runtime.formats.codec import Codec, decode, encode
from edge_runtime.formats.envelope import Envelope, seal, sha256, unseal
from edge_runtime.formats.layout import Phase
from edge_runtime.formats.messages import Update
from server.config import load_federation
from server.gates import Admitted, Expected, Refusal, admit

LAYOUT = digits_layout("ab" * 32, (4,), 8.0)
SIZES = LAYOUT.segment_sizes(("a", "b"), 4)
DELTA = np.random.default_rng(0).standard_normal(sum(SIZES)).astype(np.float32) * np.float32(0.01)
DEVICES = ("one", "two", "three")
SHAPES = {"0": 64, "1": 64, "head": 10}
CONFIG = load_federation(
    "default",
    (
        "name=x", "package=none", "rounds=3", "adapter.targets=[q_proj]", "adapter.ranks=[4]", "cohort.size=3",
        "cohort.quorum=2", "cohort.over_selection=1", "local.steps=2", f"local.sequence_tokens={TOKENS}",
        "evaluation.every=0",
    ),
)  # fmt: skip


def update() -> Envelope:
    payload = encode(DELTA, SIZES, Codec.INT8)
    head = ("cd" * 32, LAYOUT.digest, LAYOUT.base_digest, 3, Phase.BOTH, 4, Codec.INT8)
    return seal(Update(*head, 1, 1, 1, 1.0, 1.0, 1.0, 0.1, sha256(payload)), payload)


def images(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.concatenate([rng.integers(0, 17, (count, 64)), rng.integers(17, 27, (count, 1))], axis=1).astype(np.int32)


def judged(envelope: Envelope) -> Admitted | Refusal:
    return admit(envelope, Expected(LAYOUT, 3, "cd" * 32, Phase.BOTH, 4, Codec.INT8, 1))


@pytest.mark.parametrize(("kind", "factor"), [(FLIP, -1.0), (SCALE, 10.0), (BOTH, -10.0)])
def test_a_lie_passes_the_gates_as_a_multiple_of_the_truth(kind, factor):
    admitted = judged(tamper(update(), LAYOUT, kind))
    assert isinstance(admitted, Admitted)
    honest = decode(update().payload, SIZES, Codec.INT8)
    np.testing.assert_allclose(admitted.vector, factor * honest, rtol=0, atol=abs(factor) * 2e-4)


def test_a_nan_is_refused_for_its_values_not_for_its_form():
    assert judged(tamper(update(), LAYOUT, NAN)) is Refusal.SCALE


def test_a_liar_that_is_refused_leaves_the_adapter_of_a_round_without_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SEVENFOLD_CONFIG_DIR", str(tmp_path / "keys"))
    rng = np.random.default_rng(0)
    write_package(tmp_path / "package", {name: rng.standard_normal((n, 64)) for name, n in SHAPES.items()})
    manifest, trainer = open_base(tmp_path / "package")
    text = {name: images(rng, 12) for name in DEVICES}
    conducts = {
        "lied": (lambda name, number: NAN if (name, number) == ("two", 2) else HONEST, None),
        "away": (lambda name, number: HONEST, {1: DEVICES, 2: ("one", "three"), 3: DEVICES}),
        "full": (lambda name, number: HONEST, None),
    }
    ended = {
        label: run_undisturbed(CONFIG, manifest, trainer, text, tmp_path / label, conduct, present)
        for label, (conduct, present) in conducts.items()
    }
    rounds = [record for record in ended["lied"].ledger.records() if record["event"] == "round"]
    assert [record["refused"] for record in rounds] == [{}, {"scale": 1}, {}]
    digests = {label: federation.record["adapter_sha256"] for label, federation in ended.items()}
    assert digests["lied"] == digests["away"] != digests["full"]


def test_kills_are_of_every_kind_and_few_enough_for_up_to_go_on():
    kills = draw_kills(50, DEVICES, 1)
    assert kills == draw_kills(50, DEVICES, 1) != draw_kills(50, DEVICES, 2)
    victims = [victim for kill in kills for victim in kill.victims]
    assert set(victims) >= {"ServerApp", "SuperLink"} and set(victims) & set(DEVICES)
    assert 1 <= victims.count(SUPERLINK) <= 5
    assert all(later.after - kill.after >= 2 for kill, later in pairwise(kills))


def test_conduct_has_one_device_at_most_a_round():
    schedule = draw_conduct(50, DEVICES, 1)
    numbers = [number for mine in schedule.values() for number in mine]
    assert len(numbers) == len(set(numbers)) == 10
    assert {kind for mine in schedule.values() for kind in mine.values()} == {NAN, FLIP, "late"}
    assert conduct_in(schedule, "one", 1) == "honest"


def test_gradients_are_those_of_finite_differences():
    rng = np.random.default_rng(3)
    base = {
        name: (rng.standard_normal((rows, 64)) * 0.2).astype(np.float32)
        for name, rows in (("0", 64), ("1", 64), ("head", 10))
    }
    trainer = DigitsTrainer(base)
    tokens = images(rng, 5)
    factors = {f"{m}.lora_{half}": (rng.standard_normal(shape) * 0.1).astype(np.float32)
               for m in MODULES for half, shape in (("A", (4, 64)), ("B", (64, 4)))}  # fmt: skip
    mask = np.ones(tokens.shape, np.float32)
    _, count, gradients = trainer.loss_and_gradients(tokens, mask, factors, 2.0)
    assert count == 5
    for name, gradient in gradients.items():
        direction = rng.standard_normal(gradient.shape).astype(np.float32)
        moved = [
            trainer.loss(tokens, mask, factors | {name: factors[name] + s * direction}, 2.0)[0] for s in (1e-3, -1e-3)
        ]
        assert (moved[0] - moved[1]) / 2e-3 == pytest.approx(float((gradient * direction).sum()), rel=0.02, abs=0.02)


def test_images_come_back_from_a_devices_text_one_a_sequence(tmp_path):
    rng = np.random.default_rng(0)
    rows = images(rng, 60)
    mine = deal(rows, 2, 1)
    assert sorted(map(bytes, np.concatenate(mine))) == sorted(map(bytes, rows))
    write_text(mine[0], tmp_path / "images.jsonl")
    data = LocalData(tmp_path, read_letters, None, None, 1 << 20, Retention(), lambda: 0.0, lambda line: None)
    data.refresh()
    ids, mask = next(data.batches(TOKENS, 100, 0))
    held = [ids for batch in data.held_out(TOKENS, 100, 100) for ids in batch[0]]
    assert sorted(map(bytes, [*ids, *held])) == sorted(map(bytes, mine[0]))
    assert mask[:, 63].all()


def test_a_lie_in_another_codec_says_so():
    reply = update()
    with pytest.raises(ValueError, match="fp32"):
        tamper(seal(replace(unseal(reply, Update), codec=Codec.FP32), reply.payload), LAYOUT, NAN)
