"""Checkpoints from a folder or the hub: what is refused, and what loads in 32, 16, 8 and 4 bits."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from tokenizers import Tokenizer

from edge_runtime.formats.errors import UserError
from pipeline.distillation.teachers import (
    TeacherSource,
    build_teacher,
    eos_ids,
    load_checkpoint,
    resolve_checkpoint,
    save_tokenizer,
)
from pipeline.settings_training import CheckpointTeacher, FromScratchTeacher
from tests.pipeline.conftest import TEXTS, VOCABULARY, MakeModel

TOKENS = torch.randint(VOCABULARY, (3, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def test_a_whole_checkpoint_is_taken_as_it_lies(checkpoint: Path) -> None:
    assert len(list(checkpoint.glob("*.safetensors"))) > 1, "the fixture is meant to have shards"
    assert resolve_checkpoint(_local(checkpoint)) == checkpoint.resolve()


def test_a_home_directory_is_understood(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_checkpoint(_local(Path("~/model"))) == folder.resolve()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "a folder with config.json and *.safetensors"),
        (shutil.rmtree, "a folder with config.json and *.safetensors"),
        (
            lambda folder: [path.rename(path.with_suffix(".bin")) for path in folder.glob("*.safetensors")],
            "weights as *.safetensors; convert .bin files first",
        ),
        (
            lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(),
            "got 'missing model-00002-of-00003.safetensors', allowed: every shard that the index names",
        ),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "model.safetensors.index.json"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[1]"), "model.safetensors.index.json"),
    ],
    ids=["no config", "no folder", "only .bin", "no second shard", "cut index", "foreign index"],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(UserError) as error:
        resolve_checkpoint(_local(folder))
    assert str(error.value).startswith("teacher.path: got ") and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_fp32_is_the_checkpoint_itself(checkpoint: Path, make_model: MakeModel, device_map: str | None) -> None:
    model = load_checkpoint(_source(checkpoint, "fp32", device_map))
    assert torch.equal(_logits(model), _logits(make_model("llama"))) and not model.training


# Root mean square of the difference over the logits' standard deviation; measured, with a fifth to spare.
@pytest.mark.parametrize(
    ("load", "device_map", "weight", "rms_ratio"),
    [
        ("bf16", None, torch.bfloat16, 0.017),
        ("bf16", "auto", torch.bfloat16, 0.017),
        ("int8", None, torch.int8, 0.043),
        ("int8", "auto", torch.int8, 0.043),
        ("int4", None, torch.uint8, 0.376),
        ("int4", "cpu", torch.uint8, 0.376),
    ],
)
def test_fewer_bits_give_nearly_the_same_logits(
    make_model: MakeModel, load: str, device_map: str | None, weight: torch.dtype, rms_ratio: float, tmp_path: Path
) -> None:
    original = make_model("llama", intermediate_size=128)  # 4-bit blocks hold 64 inputs
    original.save_pretrained(tmp_path)
    model = load_checkpoint(_source(tmp_path, load, device_map))
    assert model.model.layers[0].mlp.up_proj.weight.dtype == weight
    expected, found = _logits(original), _logits(model)
    ratio = float((found - expected).square().mean().sqrt() / expected.std())
    assert rms_ratio / 20 < ratio < rms_ratio


def test_how_to_load_can_be_overridden(checkpoint: Path) -> None:
    """Pruning needs float weights of a teacher that was recorded in 8 bits."""
    model = load_checkpoint(_source(checkpoint, "int8", None), load="bf16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("load", ["int8", "int4"])
def test_without_bitsandbytes_fewer_bits_are_refused_in_one_line(
    checkpoint: Path, load: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=rf"^teacher\.load: got '{load}', .*; pip install bitsandbytes$"):
        load_checkpoint(_source(checkpoint, load, None))


@pytest.mark.parametrize("load", ["int8", "int4"])
def test_kernels_that_fail_only_when_they_run_are_refused_when_the_teacher_is_loaded(
    make_model: MakeModel, load: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", intermediate_size=128)
    model.save_pretrained(tmp_path)

    def fails(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("no kernel\nfor this size")

    monkeypatch.setattr(type(model), "forward", fails)
    load_checkpoint(_source(tmp_path, "fp32", None))
    with pytest.raises(UserError, match=rf"^teacher\.load: got '{load}', .*no kernel for this size.*; try bf16$"):
        load_checkpoint(_source(tmp_path, load, None))


@pytest.mark.parametrize("damage", ["weights", "architecture", "gone"])
def test_what_cannot_be_loaded_is_one_line(folder: Path, damage: str) -> None:
    if damage == "weights":
        shard = sorted(folder.glob("*.safetensors"))[0]
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    else:
        shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"^teacher\.load: got 'fp32'") as error:
        load_checkpoint(_source(folder, "fp32", None))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_the_tokenizer_arrives_whole(checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(checkpoint, tmp_path)
    saved = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*TEXTS, "日本 \U0001f680"]:
        assert saved.encode(text).ids == tokenizer.encode(text).ids
    assert not (tmp_path / "chat_template.jinja").exists()


def test_a_chat_template_comes_along(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    save_tokenizer(folder, tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"


def test_end_of_text_ids(make_model: MakeModel) -> None:
    config = make_model("llama").config
    assert eos_ids(config) == [1]
    config.eos_token_id = [5, 7]
    assert eos_ids(config) == [5, 7]
    config.eos_token_id = None
    with pytest.raises(UserError, match="no eos_token_id"):
        eos_ids(config)


def test_a_teacher_from_scratch_is_a_tied_llama_of_the_sizes_asked_for() -> None:
    config = FromScratchTeacher(
        kind="from_scratch", vocab_size=300, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4,
        num_kv_heads=2, steps=1, batch_sequences=1, learning_rate=0.1,
    )  # fmt: skip
    model, same, other = (build_teacher(config, seed) for seed in (3, 3, 4))
    expected = 300 * 64 + 2 * (2 * 64 * 16 * (4 + 2) + 3 * 64 * 96 + 2 * 64) + 64
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert type(model).__name__ == "LlamaForCausalLM" and (model.config.bos_token_id, model.config.eos_token_id) == (
        1,
        1,
    )
    assert torch.equal(_logits(model, 300), _logits(same, 300)) and not torch.equal(
        _logits(model, 300), _logits(other, 300)
    )


class TestHub:
    """The only path that uses the network, with the network's part replaced."""

    def test_safetensors_alone_are_fetched_from_the_revision_named(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def snapshot(*arguments: Any, **options: Any) -> str:
            calls.append((arguments, options))
            assert os.environ["HF_HUB_OFFLINE"] == "0"
            return str(checkpoint)

        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        assert resolve_checkpoint(_hub("abc123")) == checkpoint
        ((arguments, options),) = calls
        assert arguments == ("some/model",) and options["revision"] == "abc123"
        patterns = options["allow_patterns"]
        assert "*.safetensors" in patterns and "*.json" in patterns
        assert not [p for p in patterns if p.endswith((".bin", ".pt", ".pth", ".py", "*"))], "no pickle, no code"

    @pytest.mark.parametrize(
        "error",
        [
            LocalEntryNotFoundError(
                "Cannot find the requested files\nin the disk cache, and outgoing traffic is disabled."
            ),
            OSError("connection\nrefused"),
            ValueError("not a repository name"),
            "not found",
        ],
        ids=["offline", "no connection", "bad name", "not found"],
    )
    def test_a_hub_that_does_not_serve_is_one_line(self, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
        def snapshot(*_arguments: Any, **_options: Any) -> str:
            raise _not_found() if error == "not found" else error

        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        with pytest.raises(
            UserError, match=r"^teacher\.name: got 'some/model', .*teacher=local teacher\.path=DIR$"
        ) as raised:
            resolve_checkpoint(_hub("main"))
        assert "\n" not in str(raised.value)

    def test_without_a_network_the_library_itself_is_refused_in_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match=r"^teacher\.name: got 'some/model'"):
            resolve_checkpoint(_hub("main"))


def _not_found() -> RepositoryNotFoundError:
    import httpx

    return RepositoryNotFoundError(
        "404", response=httpx.Response(404, request=httpx.Request("GET", "https://hub.test"))
    )


_UNCORRECTED: dict[str, Any] = {
    "correction_steps": 0, "correction_batch_sequences": 4, "correction_learning_rate": 1e-5, "correction_rank": None,
}  # fmt: skip


def _local(path: Path) -> CheckpointTeacher:
    return CheckpointTeacher(kind="local", path=path, load="fp32", **_UNCORRECTED)


def _hub(revision: str) -> CheckpointTeacher:
    return CheckpointTeacher(kind="hub", name="some/model", revision=revision, load="bf16", **_UNCORRECTED)


def _source(path: Path, load: str, device_map: str | None) -> TeacherSource:
    return TeacherSource(str(path), load, device_map, "test")


def _logits(model: Any, vocabulary: int = VOCABULARY) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS % vocabulary, use_cache=False).logits.float()
