"""The three trainers against PEFT's gradients on the dequantized base, and against each other."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.federated.optimizer import AdamW, adamw_step
from edge_runtime.federated.trainer import TRAINERS, Trainer, open_trainer
from edge_runtime.formats.decoder import PROJECTIONS
from edge_runtime.formats.errors import AdapterError, BackendError, PackageError, UserError
from edge_runtime.formats.int4 import save_weights
from edge_runtime.formats.manifest import AdapterSlots
from edge_runtime.formats.package import Package, open_package, seal_package
from edge_runtime.formats.signing import TrustStore, fingerprint, signing_key
from pipeline.artifacts import file_digest
from pipeline.export.lora_slots import LoraSlots
from pipeline.export.onnx_graph import write_onnx
from pipeline.export.train_step_onnx import write_onnx_train_steps
from pipeline.export.train_step_tflite import write_tflite_train_steps
from tests.edge_runtime.fakes import byte_tokenizer
from tests.train_cases import CASES, SCALE, base_of, draw_batch, draw_factors, peft_step, worst_difference

KINDS = ("onnx", "tflite", "torch")
SLOTS = LoraSlots(PROJECTIONS, rank=4)
BUCKETS, BATCH = (16, 24), 3
# Against float64; measured at most 2.8e-5 (YaRN's queries, typically 1e-5) and 2e-7. A missing term gives 1e-2.
GRADIENT_BOUND, LOSS_BOUND = 4e-5, 4e-7

MakePackage = Callable[..., Package]


@pytest.fixture(scope="module")
def make_package(tmp_path_factory: pytest.TempPathFactory) -> MakePackage:
    """``make_package("qwen3")``: a signed package with every container that a trainer reads, made once a case."""
    key = signing_key(tmp_path_factory.mktemp("keys"))
    trusted = TrustStore({fingerprint(key.public_key()): key.public_key()})
    made: dict[tuple[str, tuple[str, ...]], Package] = {}

    def make(case: str, containers: tuple[str, ...] = ("onnx", "tflite_train", "torch")) -> Package:
        if (case, containers) not in made:
            made[case, containers] = _seal(tmp_path_factory.mktemp(case), case, containers, key, trusted)
        return made[case, containers]

    return make


@pytest.fixture(params=KINDS)
def trainer(request: pytest.FixtureRequest, make_package: MakePackage) -> Iterator[Trainer]:
    opened = open_trainer(request.param, make_package("untied"), threads=1)
    yield opened
    opened.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_pefts_on_the_dequantized_base(make_package: MakePackage, kind: str, case: str) -> None:
    base, package = base_of(case, padded=True), make_package(case)
    spec = package.manifest.decoder
    ids, mask = draw_batch(spec, BATCH, BUCKETS[0])
    trained = _unpadded_factors(case)
    loss, gradients = peft_step(base.model, trained, SCALE, ids, mask)
    opened = open_trainer(kind, package, threads=1)

    found_loss, count, found = opened.loss_and_gradients(ids, mask, _padded_factors(case), SCALE)
    only_loss, only_count = opened.loss(ids, mask, _padded_factors(case), SCALE)
    opened.close()

    cut = {name: found[name][tuple(slice(size) for size in trained[name].shape)] for name in trained}
    assert worst_difference(gradients, cut) < GRADIENT_BOUND
    assert found_loss == pytest.approx(loss, rel=LOSS_BOUND) == pytest.approx(only_loss, rel=LOSS_BOUND)
    assert count == only_count == int(mask[:, :-1].sum())
    assert all(found[name].shape == factor.shape for name, factor in _padded_factors(case).items())


def test_a_few_steps_end_at_the_same_factors(make_package: MakePackage) -> None:
    ends = {}
    for kind in KINDS:
        opened = open_trainer(kind, make_package("tied"), threads=1)
        factors, state = draw_factors(base_of("tied", padded=True).spec), {}
        losses = []
        for step in range(6):
            ids, mask = draw_batch(opened_spec(make_package), BATCH, BUCKETS[0], seed=step % 2)
            loss, count, gradients = opened.loss_and_gradients(ids, mask, factors, SCALE)
            losses.append(loss / count)
            mean = {name: gradient / np.float32(count) for name, gradient in gradients.items()}
            factors, state = adamw_step(AdamW(1e-2), factors, mean, state)
        opened.close()
        ends[kind] = factors
        assert losses[-1] < losses[1] and losses[-2] < losses[0]
    start = draw_factors(base_of("tied", padded=True).spec)
    for name, factor in ends["torch"].items():
        moved = np.abs(factor - start[name]).max()
        for kind in ("onnx", "tflite"):
            # Adam divides by the gradient's own size, so a tiny gradient's rounding error becomes a step.
            assert np.abs(ends[kind][name] - factor).max() < 2e-2 * moved
            assert np.linalg.norm(ends[kind][name] - factor) < 1e-3 * np.linalg.norm(factor - start[name])


def opened_spec(make_package: MakePackage):
    return make_package("tied").manifest.decoder


def test_what_is_masked_out_has_no_influence(trainer: Trainer) -> None:
    spec = base_of("untied", padded=True).spec
    ids, mask = draw_batch(spec, BATCH, BUCKETS[0])
    mask[:, 8:] = 0
    factors = draw_factors(spec)
    loss, count, gradients = trainer.loss_and_gradients(ids, mask, factors, SCALE)
    other = ids.copy()
    other[:, 9:] = (other[:, 9:] + 7) % spec.vocab_size
    same_loss, same_count, same = trainer.loss_and_gradients(other, mask, factors, SCALE)
    assert (same_loss, same_count) == (pytest.approx(loss, rel=LOSS_BOUND), count)
    assert worst_difference({name: g.astype(np.float64) for name, g in gradients.items()}, same) < 1e-5
    mask[:, 8] = 1
    assert trainer.loss_and_gradients(ids, mask, factors, SCALE)[1] == count + BATCH


def test_the_last_column_of_the_mask_is_ignored(trainer: Trainer) -> None:
    spec = base_of("untied", padded=True).spec
    ids, mask = draw_batch(spec, 2, BUCKETS[0])
    mask[:, -1] = 0
    loss, count = trainer.loss(ids, mask, draw_factors(spec), SCALE)
    mask[:, -1] = 1
    assert trainer.loss(ids, mask, draw_factors(spec), SCALE) == (loss, count)


def test_padding_to_a_bucket_and_to_the_batch_changes_nothing(trainer: Trainer) -> None:
    spec = base_of("untied", padded=True).spec
    ids, mask = draw_batch(spec, 2, 18)
    factors = _padded_factors("untied")
    loss, gradients = peft_step(base_of("untied").model, _unpadded_factors("untied"), SCALE, ids, mask)
    found_loss, count, found = trainer.loss_and_gradients(ids, mask, factors, SCALE)
    cut = {name: found[name][tuple(slice(size) for size in wanted.shape)] for name, wanted in gradients.items()}
    assert found_loss == pytest.approx(loss, rel=LOSS_BOUND) and count == int(mask[:, :-1].sum())
    assert worst_difference(gradients, cut) < GRADIENT_BOUND


def test_micro_batches_add_up(trainer: Trainer) -> None:
    spec = base_of("untied", padded=True).spec
    ids, mask = draw_batch(spec, BATCH, BUCKETS[0])
    factors = draw_factors(spec)
    loss, count, whole = trainer.loss_and_gradients(ids, mask, factors, SCALE)
    parts = [trainer.loss_and_gradients(ids[i : i + 1], mask[i : i + 1], factors, SCALE) for i in range(BATCH)]
    assert sum(part[0] for part in parts) == pytest.approx(loss, rel=LOSS_BOUND)
    assert sum(part[1] for part in parts) == count
    total = {name: sum(part[2][name].astype(np.float64) for part in parts) for name in whole}
    assert worst_difference(total, whole) < GRADIENT_BOUND


def test_only_wanted_gradients_return_and_a_module_without_factors_is_the_base(trainer: Trainer) -> None:
    spec = base_of("untied", padded=True).spec
    ids, mask = draw_batch(spec, BATCH, BUCKETS[0])
    factors = draw_factors(spec, ("q_proj", "v_proj"), rank=2)
    wanted = [name for name in factors if name.endswith("lora_B")]
    loss, gradients = peft_step(base_of("untied").model, factors, SCALE, ids, mask)
    found_loss, _, found = trainer.loss_and_gradients(ids, mask, factors, SCALE, wanted=wanted)
    assert found_loss == pytest.approx(loss, rel=LOSS_BOUND) and set(found) == set(wanted)
    assert worst_difference({name: gradients[name] for name in wanted}, found) < GRADIENT_BOUND
    rank_three = trainer.loss_and_gradients(ids, mask, draw_factors(spec), SCALE)[2]
    assert set(rank_three) == set(draw_factors(spec)), "another rank and more modules, on the same trainer"


def test_equal_calls_return_equal_bits(trainer: Trainer) -> None:
    spec = base_of("untied", padded=True).spec
    ids, mask = draw_batch(spec, BATCH, BUCKETS[0])
    first = trainer.loss_and_gradients(ids, mask, draw_factors(spec), SCALE)
    trainer.loss(ids[:, :10], mask[:, :10], draw_factors(spec), SCALE)
    second = trainer.loss_and_gradients(ids, mask, draw_factors(spec), SCALE)
    assert first[:2] == second[:2] and all(np.array_equal(first[2][name], second[2][name]) for name in first[2])


def test_a_batch_that_does_not_fit_is_refused_in_one_line(trainer: Trainer) -> None:
    spec, factors = base_of("untied", padded=True).spec, draw_factors(base_of("untied", padded=True).spec)
    ids, mask = draw_batch(spec, 2, BUCKETS[0])
    long = np.zeros((1, 65), np.int32)
    faults = [
        (ids[:0], mask[:0]), (ids[0], mask[0]), (ids[:, :1], mask[:, :1]), (long, np.ones((1, 65), np.float32)),
        (np.zeros((65, 4), np.int32), np.ones((65, 4), np.float32)), (ids - 600, mask), (ids + 511, mask),
        (ids.astype(np.float32), mask), (ids, mask[:1]), (ids, mask * np.float32(0.5)), (ids, mask * np.nan),
    ]  # fmt: skip
    for tokens, loss_mask in faults:
        with pytest.raises(UserError) as caught:
            trainer.loss_and_gradients(tokens, loss_mask, factors, SCALE)
        assert "\n" not in str(caught.value)


def test_factors_that_do_not_fit_are_refused_in_one_line(trainer: Trainer) -> None:
    spec = base_of("untied", padded=True).spec
    ids, mask = draw_batch(spec, 2, BUCKETS[0])
    factors, name = draw_factors(spec), "model.layers.0.self_attn.q_proj.lora_A"
    faults = [
        {}, factors | {"model.layers.9.self_attn.q_proj.lora_A": factors[name]}, factors | {"other": factors[name]},
        {key: value for key, value in factors.items() if key != name}, factors | {name: factors[name][:, :-1]},
        factors | {name: factors[name][:2]}, factors | {name: factors[name][0]},
        factors | {name: factors[name] * np.nan},
    ]  # fmt: skip
    if trainer.max_rank is not None:
        faults.append(draw_factors(spec, rank=trainer.max_rank + 1))
    for given in faults:
        with pytest.raises(AdapterError) as caught:
            trainer.loss_and_gradients(ids, mask, given, SCALE)
        assert "\n" not in str(caught.value)
    with pytest.raises(AdapterError, match="wanted"):
        trainer.loss_and_gradients(ids, mask, factors, SCALE, wanted=["model.layers.9.x.lora_A"])


def test_a_loss_that_is_not_finite_is_refused(trainer: Trainer) -> None:
    spec = base_of("untied", padded=True).spec
    ids, mask = draw_batch(spec, 2, BUCKETS[0])
    huge = {name: factor * np.float32(1e30) for name, factor in draw_factors(spec).items()}
    with pytest.raises(BackendError, match="not finite"):
        trainer.loss_and_gradients(ids, mask, huge, SCALE)


def test_a_closed_trainer_says_so(make_package: MakePackage) -> None:
    spec = base_of("untied", padded=True).spec
    ids, mask = draw_batch(spec, 2, BUCKETS[0])
    for kind in KINDS:
        opened = open_trainer(kind, make_package("untied"), threads=1)
        opened.close()
        with pytest.raises(BackendError, match="closed"):
            opened.loss(ids, mask, draw_factors(spec), SCALE)


def test_what_a_trainer_says_of_itself(trainer: Trainer) -> None:
    assert trainer.name in KINDS and set(trainer.targets) == set(PROJECTIONS)
    if trainer.name == "torch":
        assert (trainer.buckets, trainer.max_rank) == ((32, 64), None)
    else:
        assert (trainer.buckets, trainer.batch_sequences, trainer.max_rank) == (BUCKETS, BATCH, SLOTS.rank)


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_without_the_container_is_refused_in_one_line(make_package: MakePackage, kind: str) -> None:
    wanted = TRAINERS[kind][2]
    others = tuple(name for name in ("onnx", "tflite_train", "torch") if name != wanted)
    with pytest.raises(PackageError, match=wanted) as caught:
        open_trainer(kind, make_package("untied", others), threads=1)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="auto"):
        open_trainer("jax", make_package("untied"), threads=1)


def test_a_container_that_is_not_on_this_device_is_refused(make_package: MakePackage) -> None:
    package = replace(make_package("untied"), available=("onnx",))
    assert open_trainer("auto", package, threads=1).name == "onnx"
    with pytest.raises(PackageError, match="tflite_train"):
        open_trainer("tflite", package, threads=1)
    with pytest.raises(PackageError, match="train_buckets"):
        open_trainer("auto", replace(package, available=()), threads=1)


def test_auto_takes_what_is_installed(make_package: MakePackage, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_trainer("auto", make_package("untied"), threads=1).name == "onnx"
    assert open_trainer("auto", make_package("untied", ("torch",)), threads=1).name == "torch"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else object())
    assert open_trainer("auto", make_package("untied"), threads=1).name == "tflite"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match="peft"):
        open_trainer("torch", make_package("untied"), threads=1)


def test_weights_for_torch_that_are_not_the_packages_base_are_refused(make_package: MakePackage) -> None:
    package = make_package("untied")
    other = replace(package, manifest=replace(package.manifest, base_digest="0" * 64))
    with pytest.raises(PackageError, match="base"):
        open_trainer("torch", other, threads=1)


def _seal(folder: Path, case: str, containers: tuple[str, ...], key: object, trusted: TrustStore) -> Package:
    base, directory = base_of(case, padded=True), folder / "package"
    for name in containers:
        (directory / name).mkdir(parents=True)
    weights = folder / "weights.safetensors"
    save_weights(weights, base.spec, base.weights)
    steps = {"buckets": BUCKETS, "batch_sequences": BATCH}
    if "onnx" in containers:
        stored = write_onnx(directory / "onnx", base.spec, base.weights, lora=SLOTS, accuracy_level=4)
        write_onnx_train_steps(directory / "onnx", base.spec, stored, SLOTS, **steps)
    if "tflite_train" in containers:
        write_tflite_train_steps(directory / "tflite_train" / "train.tflite", base.spec, base.weights, SLOTS, **steps)
    if "torch" in containers:
        shutil.copyfile(weights, directory / "torch" / "weights.safetensors")
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    seal_package(
        directory, name="tiny", version="0.1.0", counter=1, base_digest=file_digest(weights), decoder=base.spec,
        bos=None, eos=(), containers={name: AdapterSlots(PROJECTIONS) for name in containers}, licence="Apache-2.0",
        key=key,
    )  # fmt: skip
    return open_package(directory, trusted)


def _padded_factors(case: str) -> dict[str, np.ndarray]:
    """Zero where the FFN is padded, so that the model without the padding computes the same."""
    factors = draw_factors(base_of(case, padded=True).spec)
    width = base_of(case).spec.intermediate_size
    for name, factor in factors.items():
        if "gate_proj.lora_B" in name or "up_proj.lora_B" in name:
            factor[width:] = 0
        if "down_proj.lora_A" in name:
            factor[:, width:] = 0
    return factors


def _unpadded_factors(case: str) -> dict[str, np.ndarray]:
    spec = base_of(case).spec
    shapes = {name: factor.shape for name, factor in draw_factors(spec).items()}
    padded = _padded_factors(case)
    return {name: padded[name][tuple(slice(size) for size in shape)] for name, shape in shapes.items()}
