"""stage=adapter: from training to removal, on a small signed package with both containers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer

from edge_runtime.formats.decoder import PROJECTIONS, DecoderSpec
from edge_runtime.formats.errors import AdapterError, ExportError, SevenfoldError, UserError
from edge_runtime.formats.int4 import save_weights
from edge_runtime.formats.lora import Adapter, load_adapter
from edge_runtime.formats.manifest import AdapterSlots
from edge_runtime.formats.package import open_package
from edge_runtime.formats.signing import load_trust
from pipeline.adapters import library
from pipeline.adapters.bases import adapted, load_dequantized
from pipeline.adapters.candidate import adapter_digest
from pipeline.adapters.champion import crown, keep_adapter
from pipeline.adapters.composition import compose_adapters
from pipeline.adapters.library import Origin, add_adapter, find_record, list_records, open_adapter, remove_adapter
from pipeline.artifacts import Layout, file_digest
from pipeline.export.checkpoint import float_weights, load_student, spec_of
from pipeline.export.lora_slots import LoraSlots
from pipeline.export.onnx_graph import write_onnx
from pipeline.export.tflite_graph import write_tflite
from pipeline.quantization.rounding import pad_intermediate, quantize_tensor
from pipeline.stages.adapter import AdapterContext, AdapterSettings, run_action
from tests.pipeline.conftest import TEXTS, MakeModel
from tests.pipeline.gate_cases import model_loss, pack_texts, seal

SETTINGS = AdapterSettings(name="one", rank=4, alpha=8, steps=30, batch_sequences=4, learning_rate=5e-3,
                           held_out_sequences=4, licence="PSF-2.0")  # fmt: skip
ORIGIN = Origin("imported", "int4", "MIT", "a test", {})
MAX_RANK = 6


@dataclass(frozen=True)
class Shop:
    """A finished run of submodel ``toy``; read only, but for what a test adds below ``adapters``."""

    root: Path
    spec: DecoderSpec
    base_digest: str


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel, tokenizer: Tokenizer) -> Shop:
    """The intermediate size, 80, is padded to 96 by the containers' group."""
    layout = Layout(tmp_path_factory.mktemp("shop"))
    model = make_model("llama", num_hidden_layers=2, tie_word_embeddings=True, intermediate_size=80)
    model.save_pretrained(layout.student("toy"))
    spec, floats = pad_intermediate(spec_of(model, 64), float_weights(model), 32)
    weights = {
        name: quantize_tensor(value, bits=4, group=32, rounding="rtn", positive_scales=True)
        if value.ndim == 2
        else value
        for name, value in floats.items()
    }
    package = layout.package("toy")
    for folder in (layout.weights("toy"), package / "onnx", package / "tflite", layout.targets):
        folder.mkdir(parents=True)
    save_weights(layout.weights("toy") / "weights.safetensors", spec, weights)
    slots = LoraSlots(PROJECTIONS, MAX_RANK)
    write_onnx(package / "onnx", spec, weights, lora=slots, accuracy_level=4)
    write_tflite(package / "tflite" / "model.tflite", spec, weights, profile="current", lora=slots, prefill_tokens=16)
    tokenizer.save(str(package / "tokenizer.json"))
    digest = file_digest(layout.weights("toy") / "weights.safetensors")
    containers = {"onnx": AdapterSlots(PROJECTIONS), "tflite": AdapterSlots(PROJECTIONS, MAX_RANK)}
    seal(package, spec, base_digest=digest, containers=containers)
    sequences = pack_texts(tokenizer, TEXTS, 32)
    np.save(layout.targets / "train.npy", sequences[:-6])
    np.save(layout.targets / "held_out.npy", sequences[-6:])
    return Shop(layout.root, spec, digest)


@pytest.fixture
def context(shop: Shop, tmp_path: Path, store: Path) -> AdapterContext:
    artifacts = tmp_path / "run" / "artifacts"
    artifacts.mkdir(parents=True)
    for name in ("students", "weights", "packages", "targets"):
        (artifacts / name).symlink_to(shop.root / "artifacts" / name)
    return AdapterContext(Layout(tmp_path / "run"), "toy", store, threads=1)


@pytest.fixture
def adapters(context: AdapterContext) -> Path:
    return context.layout.adapters("toy")


@pytest.fixture(scope="session")
def make_adapter(shop: Shop) -> Callable[..., Adapter]:
    def make(seed: int, rank: int = 3, modules: tuple[str, ...] = ("q_proj", "down_proj")) -> Adapter:
        generator = np.random.default_rng(seed)
        pairs = {}
        for name, projection in shop.spec.module_names():
            if projection in modules:
                rows, columns = shop.spec.projection_shape(projection)
                lora_a = generator.standard_normal((rank, columns)).astype(np.float32) / 8
                lora_b = generator.standard_normal((rows, rank)).astype(np.float32) / 8
                if projection == "down_proj":
                    lora_a[:, 80:] = 0  # as a training that never saw padding leaves it
                pairs[name] = (lora_a, lora_b)
        return Adapter(rank, 0.5, pairs, shop.base_digest)

    return make


def test_the_dequantized_model_computes_with_the_codes(shop: Shop, context: AdapterContext) -> None:
    student = context.layout.student("toy")
    model, spec = load_dequantized(student, context.layout.weights("toy") / "weights.safetensors")
    assert spec == shop.spec and spec.intermediate_size == 96
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weight = load_student(student).model.layers[1].mlp.down_proj.weight.detach()
    codes = model.model.layers[1].mlp.down_proj.weight.detach()
    assert codes[:, 80:].abs().max() == 0
    groups = torch.nn.functional.pad(weight, (0, 16)).unflatten(1, (3, 32))
    bound = groups.abs().amax(dim=2).repeat_interleave(32, dim=1)[:, :80] / 7 * 0.51
    assert (codes[:, :80] - weight).abs().le(bound).all() and not torch.equal(codes[:, :80], weight)


def test_codes_of_another_student_are_refused(context: AdapterContext, tmp_path: Path, make_model: MakeModel) -> None:
    make_model("llama", num_hidden_layers=1, tie_word_embeddings=True).save_pretrained(tmp_path / "other")
    with pytest.raises(ExportError, match=r"not the codes of .*other \(model\.layers\.1\S*, .*quantize it again"):
        load_dequantized(tmp_path / "other", context.layout.weights("toy") / "weights.safetensors")


def test_an_adapter_beside_a_model_is_what_peft_computes(
    shop: Shop, context: AdapterContext, adapters: Path, make_adapter: Callable[..., Adapter]
) -> None:
    adapter = make_adapter(1)
    add_adapter(adapters, "one", adapter, ORIGIN)
    quantized, _ = load_dequantized(
        context.layout.student("toy"), context.layout.weights("toy") / "weights.safetensors"
    )
    tokens = torch.arange(3, 35)[None]
    with torch.no_grad():
        bare = quantized(input_ids=tokens).logits
        with adapted(quantized, adapter) as model:
            ours = model(input_ids=tokens).logits
        assert torch.equal(quantized(input_ids=tokens).logits, bare)
        expected = PeftModel.from_pretrained(quantized, adapters / "library" / "one").eval()(input_ids=tokens).logits
    assert (ours - bare).abs().max() > 0.1
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)


def test_a_recovery_adapter_wins_back_what_four_bits_cost(
    context: AdapterContext, adapters: Path, capsys: pytest.CaptureFixture[str], client: Any
) -> None:
    run_action("train", SETTINGS, context)
    record = find_record(adapters, "one")
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("{") :])["sha256"] == record.sha256
    assert (record.kind, record.base_variant, record.rank, record.scale) == ("recovery", "int4", 4, 2.0)
    assert record.licence == "PSF-2.0" and set(record.targets) == set(PROJECTIONS)
    assert record.figures["kl_after"] < 0.7 * record.figures["kl_before"]
    run_action("score", SETTINGS, context)
    scores = find_record(adapters, "one").scores
    assert list(scores) == ["fp", "onnx", "tflite"]
    for container in ("onnx", "tflite"):
        assert scores[container]["base_kl"] == pytest.approx(record.figures["kl_before"], rel=0.15)
        assert scores[container]["kl"] < 0.8 * scores[container]["base_kl"]
    assert scores["fp"]["base_kl"] == 0 and scores["fp"]["base_top1"] == 1 and scores["fp"]["kl"] > 0
    student = load_student(context.layout.student("toy"))
    held_out = np.load(context.layout.targets / "held_out.npy")[:4]
    assert scores["fp"]["base_loss"] == pytest.approx(model_loss(student, held_out), abs=2e-6)
    with adapted(student, _load(context, "one")) as model:
        assert scores["fp"]["loss"] == pytest.approx(model_loss(model, held_out), abs=2e-6)
    experiment = client.get_experiment_by_name("sevenfold-adapters")
    runs = {run.data.tags["action"]: run.data for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"train", "score"}
    assert runs["train"].metrics["kl_after"] == record.figures["kl_after"] and "loss" in runs["train"].metrics
    assert runs["train"].tags["adapter"] == record.sha256 and runs["train"].params["rank"] == "4"
    assert runs["score"].metrics["onnx/kl"] == scores["onnx"]["kl"]
    run_action("score", SETTINGS, context)
    assert len(client.search_runs([experiment.experiment_id])) == 2, "the same figures are logged once"


def test_an_adapter_of_the_answers_learns_them_and_training_is_reproducible(
    context: AdapterContext, adapters: Path, tmp_path: Path
) -> None:
    text = tmp_path / "lesson.jsonl"
    row = {"text": TEXTS[0].replace("function", "method").replace("many", "several") * 4}
    text.write_text("".join(json.dumps(row) + "\n" for _ in range(20)), encoding="utf-8")
    settings = replace(SETTINGS, goal="text", targets=("q_proj", "v_proj"), text=text, steps=10)
    run_action("train", settings, context)
    run_action("train", replace(settings, name="two"), context)
    run_action("train", replace(settings, name="three", base="fp"), context)
    one, two, three = (find_record(adapters, name) for name in ("one", "two", "three"))
    assert one.sha256 == two.sha256 != three.sha256
    assert (one.kind, one.base_variant, three.base_variant) == ("trained", "int4", "fp")
    assert set(one.targets) == {"q_proj", "v_proj"} and one.source == "lesson.jsonl"
    assert one.figures["loss_after"] != one.figures["loss_before"]
    assert not list((context.layout.root / ".cache" / "checkpoints").glob("*")), "nothing unfinished is left"


def test_a_composition_is_kept_with_its_error_and_parts(
    context: AdapterContext, adapters: Path, make_adapter: Callable[..., Adapter]
) -> None:
    parts = {"a": make_adapter(1), "b": make_adapter(2, 4)}
    for name, part in parts.items():
        add_adapter(adapters, name, part, replace(ORIGIN, licence=f"licence {name}"))
    run_action("compose", AdapterSettings(name="exact", parts={"a": 1.0, "b": -0.5}), context)
    run_action("compose", AdapterSettings(name="cut", parts={"a": 1.0, "b": -0.5}, rank=2), context)
    exact, cut = find_record(adapters, "exact"), find_record(adapters, "cut")
    assert (exact.rank, cut.rank, exact.kind) == (7, 2, "composed")
    assert exact.figures == {"cut_off_ratio": 0.0} and 0 < cut.figures["cut_off_ratio"] < 1
    assert exact.source == "+1*a -0.5*b" and exact.licence == "licence a and licence b"
    assert exact.sha256 == adapter_digest(compose_adapters(list(parts.values()), [1.0, -0.5]).adapter)
    run_action("score", replace(SETTINGS, name="exact"), context)
    scored = find_record(adapters, "exact")
    assert list(scored.scores) == ["fp"]
    assert scored.refused["onnx"] == f"adapter rank 7: this package takes 1 to {MAX_RANK}"
    assert f"accepts at most {MAX_RANK}" in scored.refused["tflite"]
    run_action("score", replace(SETTINGS, name="cut"), context)
    assert list(find_record(adapters, "cut").scores) == ["fp", "onnx", "tflite"]


def test_list_and_show_tell_what_is_there(
    context: AdapterContext, adapters: Path, make_adapter: Callable[..., Adapter], capsys: pytest.CaptureFixture[str]
) -> None:
    run_action("list", AdapterSettings(), context)
    assert capsys.readouterr().out == "toy: no adapter yet; action=train adapter.name=NAME makes one\n"
    add_adapter(adapters, "b", make_adapter(1), ORIGIN)
    add_adapter(adapters, "a", make_adapter(2), ORIGIN)
    crown(keep_adapter(adapters, make_adapter(1), adapter_digest(make_adapter(1))))
    run_action("list", AdapterSettings(), context)
    assert capsys.readouterr().out == (
        "a: imported, rank 3, q_proj down_proj; no scores\n"
        "b (champion): imported, rank 3, q_proj down_proj; no scores\n"
    )
    run_action("show", AdapterSettings(name="b"), context)
    shown = json.loads(capsys.readouterr().out)
    assert shown["champion"] is True and shown["name"] == "b"


def test_the_champion_is_removed_only_on_purpose(
    context: AdapterContext, adapters: Path, make_adapter: Callable[..., Adapter]
) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        add_adapter(adapters, name, make_adapter(seed), ORIGIN)
    link = crown(keep_adapter(adapters, make_adapter(1), adapter_digest(make_adapter(1))))
    with pytest.raises(UserError, match=r"got 'a', allowed: an adapter that is not champion; add adapter\.force=true"):
        run_action("remove", AdapterSettings(name="a"), context)
    run_action("remove", AdapterSettings(name="b"), context)
    assert [record.name for record in list_records(adapters)] == ["a"]
    assert {path.name for path in (adapters / "library").iterdir()} == {"a", "index.json"}
    run_action("remove", AdapterSettings(name="a", force=True), context)
    assert not list_records(adapters) and (link / "adapter_model.safetensors").is_file()


def test_a_new_champion_leaves_the_library_alone(adapters: Path, make_adapter: Callable[..., Adapter]) -> None:
    add_adapter(adapters, "a", make_adapter(1), ORIGIN)
    for seed in range(2, 5):
        crown(keep_adapter(adapters, make_adapter(seed), adapter_digest(make_adapter(seed))))
    assert (adapters / "library" / "a" / "adapter_model.safetensors").is_file()
    assert len([path for path in adapters.iterdir() if len(path.name) == 16]) == 2, "the champion and the former one"


def test_an_adapter_is_what_its_record_says(shop: Shop, adapters: Path, make_adapter: Callable[..., Adapter]) -> None:
    add_adapter(adapters, "a", make_adapter(1), ORIGIN)
    assert add_adapter(adapters, "a", make_adapter(1), ORIGIN) == find_record(adapters, "a")
    loaded = open_adapter(adapters, "a", shop.spec, shop.base_digest)
    assert adapter_digest(loaded) == adapter_digest(make_adapter(1))
    with pytest.raises(AdapterError, match="was trained on base"):
        open_adapter(adapters, "a", shop.spec, "cd" * 32)
    with pytest.raises(UserError, match="a name that the library does not hold"):
        add_adapter(adapters, "a", make_adapter(2), ORIGIN)
    add_adapter(adapters, "b", make_adapter(2), ORIGIN)
    shutil.rmtree(adapters / "library" / "a")
    shutil.copytree(adapters / "library" / "b", adapters / "library" / "a")
    with pytest.raises(AdapterError, match=r"is not the adapter that index\.json describes"):
        open_adapter(adapters, "a", shop.spec, shop.base_digest)


@pytest.mark.parametrize("name", ["", "..", "A", "a/b", "champion", ".hidden", "x" * 65, "-a"])
def test_names_that_are_no_names_are_refused(adapters: Path, make_adapter: Callable[..., Adapter], name: str) -> None:
    with pytest.raises(UserError, match=r"adapter\.name: got .* allowed: 1 to 64 of a-z"):
        add_adapter(adapters, name, make_adapter(1), ORIGIN)
    assert not (adapters / "library").exists()


@pytest.mark.parametrize("damage", ["cut", "name", "extra", "list", "huge"])
def test_a_damaged_index_is_named(adapters: Path, make_adapter: Callable[..., Adapter], damage: str) -> None:
    add_adapter(adapters, "a", make_adapter(1), ORIGIN)
    index = adapters / "library" / "index.json"
    content = json.loads(index.read_text())
    content["adapters"][0] |= {"name": {"name": "../../x"}, "extra": {"shell": 1}}.get(damage, {})
    text = {"cut": json.dumps(content)[:-9], "list": "[]", "huge": " " * (16 << 20)}.get(damage, json.dumps(content))
    index.write_text(text)
    with pytest.raises(UserError, match=r"index\.json: got .* allowed: an index that stage=adapter wrote") as error:
        remove_adapter(adapters, "a")
    assert "\n" not in str(error.value) and index.read_text() == text


def test_a_kill_between_files_and_index_is_mended_by_the_next_try(
    shop: Shop, adapters: Path, make_adapter: Callable[..., Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(library, "write_atomically", _killed)
        with pytest.raises(KeyboardInterrupt):
            add_adapter(adapters, "a", make_adapter(1), ORIGIN)
    assert not list_records(adapters)
    add_adapter(adapters, "a", make_adapter(2), ORIGIN)
    assert adapter_digest(open_adapter(adapters, "a", shop.spec, shop.base_digest)) == adapter_digest(make_adapter(2))


@pytest.mark.parametrize(
    ("action", "changes", "message"),
    [
        ("steal", {}, "action: got 'steal', allowed: train, list, show, score, compose, remove"),
        ("show", {"name": None}, "adapter.name: got None, allowed: a name, for action=show"),
        ("show", {}, "adapter.name: got 'one', allowed: a name in the library: none yet"),
        ("score", {}, "adapter.name: got 'one', allowed: a name in the library: none yet"),
        ("remove", {}, "adapter.name: got 'one', allowed: a name in the library: none yet"),
        ("compose", {}, "adapter.parts: got None, allowed: names and weights"),
        ("compose", {"parts": {"x": 1.0}}, "adapter.name: got 'x', allowed: a name in the library"),
        ("train", {"targets": ("lm_tail",)}, "lora: got 'lm_tail', allowed: what PEFT takes"),
        ("train", {"text": Path("/nowhere")}, "data.path: got '/nowhere', allowed: an existing file"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    context: AdapterContext, adapters: Path, action: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SevenfoldError) as error:
        run_action(action, replace(SETTINGS, **changes), context)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert not list_records(adapters)


def _killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def _load(context: AdapterContext, name: str) -> Adapter:
    manifest = open_package(context.layout.package("toy"), load_trust()).manifest
    return load_adapter(context.layout.adapters("toy") / "library" / name, manifest.decoder, manifest.base_digest)
