"""Checkpoints of each family, from disk to a student that transformers loads and the exporters take."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from edge_runtime.formats.errors import UserError
from pipeline.distillation import checkpoint_files
from pipeline.distillation.pruning import (
    Importance,
    StudentShape,
    measure_importance,
    prune,
    prune_checkpoint,
    random_student,
)
from pipeline.distillation.vocabulary import TrimmedVocabulary, choose_ids, named_ids, trim_tokenizer
from pipeline.export.checkpoint import float_weights, spec_of
from tests.pipeline.conftest import VOCABULARY, MakeModel

FULL = StudentShape(hidden_size=64, intermediate_size=96, num_kv_heads=2, num_layers=3)
SMALL = StudentShape(hidden_size=32, intermediate_size=64, num_kv_heads=1, num_layers=2)
TOKENS = torch.randint(VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(8))
# Head size named apart from hidden_size / heads; a window shorter than the sequences, in some layers only for Qwen2.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
}


@pytest.fixture(params=[f"{name}-{head}" for name in FAMILIES for head in ("tied", "untied")])
def teacher(request: pytest.FixtureRequest, make_model: MakeModel) -> Any:
    name, head = request.param.split("-")
    return make_model(name, tie_word_embeddings=head == "tied", **FAMILIES[name])


@pytest.fixture
def folder(make_model: MakeModel, tmp_path: Path) -> Path:
    """A Llama in three shards."""
    make_model("llama").save_pretrained(tmp_path / "teacher", max_shard_size="200KB")
    return tmp_path / "teacher"


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", ["200KB", "1GB"])
def test_from_checkpoint_to_checkpoint_gives_what_the_whole_model_in_memory_gives(
    teacher: Any, stored: torch.dtype, shard: str, tmp_path: Path
) -> None:
    teacher = teacher.to(stored)
    scores = measure_importance(teacher, [TOKENS])
    teacher.save_pretrained(tmp_path / "teacher", max_shard_size=shard)
    assert (len(list((tmp_path / "teacher").glob("*.safetensors"))) > 1) is (shard == "200KB")
    expected = prune(teacher, scores, SMALL)
    prune_checkpoint(tmp_path / "teacher", tmp_path / "student", scores, SMALL)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student", local_files_only=True).eval()
    assert type(loaded) is type(teacher) and loaded.dtype == torch.float32
    assert loaded.config.to_diff_dict() == expected.config.to_diff_dict() | {"architectures": [type(teacher).__name__]}
    _assert_equal(loaded.state_dict(), expected.state_dict())
    assert torch.equal(_logits(loaded), _logits(expected))


def test_the_full_size_is_the_teacher_itself(teacher: Any, tmp_path: Path) -> None:
    teacher.save_pretrained(tmp_path / "teacher", max_shard_size="200KB")
    prune_checkpoint(tmp_path / "teacher", tmp_path / "student", measure_importance(teacher, [TOKENS]), FULL)
    written = load_file(tmp_path / "student" / "model.safetensors")
    assert ("lm_head.weight" in written) is not teacher.config.tie_word_embeddings
    _assert_equal(written, {name: teacher.state_dict()[name] for name in written})
    assert torch.equal(_logits(_load(tmp_path / "student")), _logits(teacher))


def test_parts_that_are_zero_leave_no_trace(teacher: Any, tmp_path: Path) -> None:
    """Half of the hidden dimensions, a KV group, a third of the neurons, a layer do nothing: cut, nothing changes."""
    teacher.config.rms_norm_eps = 1e-12
    for module in teacher.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-12
    _plant_dead_parts(teacher)
    scores = measure_importance(teacher, [TOKENS])
    teacher.save_pretrained(tmp_path / "teacher")
    shape = StudentShape(32, 64, 1, 2)
    prune_checkpoint(tmp_path / "teacher", tmp_path / "student", scores, shape)
    student = _load(tmp_path / "student")
    assert student.config.num_hidden_layers == 2 and student.config.hidden_size == 32
    # In float64, so that only the rounding of norms' factors to fp32 weights is left.
    expected = _logits(teacher.double())
    torch.testing.assert_close(_logits(student.double()), expected, rtol=0, atol=8e-7 * float(expected.abs().max()))


def test_a_student_is_trained_saved_loaded_and_exported(teacher: Any, tmp_path: Path) -> None:
    scores = measure_importance(teacher, [TOKENS])
    teacher.save_pretrained(tmp_path / "teacher", max_shard_size="200KB")
    prune_checkpoint(tmp_path / "teacher", tmp_path / "pruned", scores, SMALL)
    student = _load(tmp_path / "pruned")
    before = _logits(student)
    optimizer = torch.optim.AdamW(student.train().parameters(), 1e-2)
    losses = []
    for _ in range(4):
        loss = student(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and not torch.equal(_logits(student.eval()), before)
    student.save_pretrained(tmp_path / "trained")
    loaded = _load(tmp_path / "trained")
    assert torch.equal(_logits(loaded), _logits(student))
    window = 8 if getattr(loaded.config, "sliding_window", None) else 64
    spec, weights = spec_of(loaded, window), float_weights(loaded)
    assert (spec.hidden_size, spec.intermediate_size, spec.num_kv_heads, spec.num_heads) == (32, 64, 1, 2)
    assert spec.head_dim == teacher.config.head_dim and spec.tied_embeddings == teacher.config.tie_word_embeddings
    assert sum(weight.size for weight in weights.values()) == loaded.num_parameters()


def test_importance_is_measured_anew_on_each_student_of_a_chain(teacher: Any) -> None:
    """Teacher to middle to small: the second cut asks the middle student what matters to it."""
    middle = prune(teacher, measure_importance(teacher, [TOKENS]), StudentShape(64, 64, 2, 2))
    small = prune(middle, measure_importance(middle, [TOKENS]), StudentShape(32, 32, 1, 1))
    assert small.config.num_hidden_layers == 1 and _logits(small).shape == (4, 24, VOCABULARY)
    with pytest.raises(
        UserError, match=r"^importance\.ffn: got \(3, 96\), allowed: \(2, 64\); measure it on this model$"
    ):
        prune(middle, measure_importance(teacher, [TOKENS]), StudentShape(32, 32, 1, 1))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_blocks_and_shards_of_any_size_hold_the_same_weights(
    folder: Path, make_model: MakeModel, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = measure_importance(make_model("llama"), [TOKENS])
    prune_checkpoint(folder, tmp_path / "whole", scores, SMALL, dtype=dtype)
    monkeypatch.setattr(checkpoint_files.read_rows, "__defaults__", (700,))
    prune_checkpoint(folder, tmp_path / "cut", scores, SMALL, dtype=dtype, shard_bytes=40_000)
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    files = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) > 1 and index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert all(
        load_file(file).keys() == {k for k, v in index["weight_map"].items() if v == file.name} for file in files
    )
    _assert_equal({name: tensor for file in files for name, tensor in load_file(file).items()}, whole)
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32 if dtype == "fp32" else torch.bfloat16}
    with safe_open(files[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert all(int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0 for file in files)


def test_a_trimmed_vocabulary_travels_with_its_tokenizer(
    make_model: MakeModel, tokenizer: Tokenizer, checkpoint: Path, tmp_path: Path
) -> None:
    """Rows of embedding and head, ids in the settings, and the tokenizer agree; logits of kept tokens stay."""
    teacher = make_model("llama")
    scores = measure_importance(teacher, [TOKENS])
    text = "def function_7(x, y):\n    return x + 7 * y"
    vocabulary = _trim(checkpoint, tokenizer, text)
    prune_checkpoint(checkpoint, tmp_path / "student", scores, FULL, vocabulary)
    student = _load(tmp_path / "student")
    assert student.config.vocab_size == len(vocabulary.kept_ids) < VOCABULARY - 5
    ids = AutoTokenizer.from_pretrained(tmp_path / "student", local_files_only=True)(text)["input_ids"]
    old = tokenizer.encode(text).ids
    assert [int(vocabulary.kept_ids[i]) for i in ids] == old
    with torch.no_grad():
        found, expected = (m(input_ids=torch.tensor([i])).logits for m, i in ((student, ids), (teacher, old)))
    torch.testing.assert_close(found, expected[..., torch.from_numpy(vocabulary.kept_ids)], rtol=0, atol=1e-6)
    in_memory = prune(teacher, scores, FULL, vocabulary)
    _assert_equal(in_memory.state_dict(), student.state_dict())
    assert student.config.eos_token_id == in_memory.config.eos_token_id == vocabulary.new_ids[1]
    assert not {"vocab.json", "merges.txt", "tokenizer.model"} & {
        file.name for file in (tmp_path / "student").iterdir()
    }


def test_the_baseline_may_have_a_trimmed_vocabulary_too(make_model: MakeModel) -> None:
    assert random_student(make_model("qwen2"), SMALL, 1, vocab_size=128).lm_head.weight.shape == (128, 32)


def test_the_tokenizer_and_generation_settings_come_along(
    make_model: MakeModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    teacher = make_model("llama")
    teacher.generation_config.temperature, teacher.generation_config.do_sample = 0.3, True
    teacher.save_pretrained(tmp_path / "teacher")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(tmp_path / "teacher")
    prune_checkpoint(tmp_path / "teacher", tmp_path / "student", measure_importance(teacher, [TOKENS]), SMALL)
    assert _load(tmp_path / "student").generation_config.temperature == 0.3
    loaded = AutoTokenizer.from_pretrained(tmp_path / "student", local_files_only=True)
    assert loaded("def x")["input_ids"] == tokenizer.encode("def x").ids and loaded.eos_token == "</s>"


class TestRefusals:
    """One line each, and nothing half written."""

    @pytest.fixture(autouse=True)
    def _nothing_written(self, tmp_path: Path) -> Any:
        yield
        assert not (tmp_path / "student").exists()

    @pytest.mark.parametrize("field", StudentShape.__slots__)
    def test_a_student_larger_than_its_teacher(self, folder: Path, field: str) -> None:
        limit = getattr(FULL, field)
        with pytest.raises(
            UserError, match=rf"^student\.{field}: got {limit + 32}, allowed: at most the teacher's {limit}$"
        ):
            _prune(folder, shape=replace(FULL, **{field: limit + 32}))

    def test_a_model_that_is_not_causal(self, folder: Path, make_model: MakeModel) -> None:
        LlamaForSequenceClassification(make_model("llama").config).save_pretrained(folder)
        with pytest.raises(
            UserError, match=r"got 'LlamaForSequenceClassification', allowed: causal language models only"
        ):
            _prune(folder)

    def test_another_architecture(self, tmp_path: Path) -> None:
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        BertModel(BertConfig(vocab_size=16, **sizes)).save_pretrained(tmp_path / "teacher")
        with pytest.raises(UserError, match=r"got 'BertModel'.*Llama.*, Mistral.*, Qwen2.*, Qwen3ForCausalLM$"):
            _prune(tmp_path / "teacher")

    def test_a_missing_shard(self, folder: Path) -> None:
        (folder / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(UserError, match=r"^teacher\.path: got 'missing model-00002-of-00003\.safetensors'"):
            _prune(folder)

    def test_a_cut_shard(self, folder: Path) -> None:
        shard = folder / "model-00002-of-00003.safetensors"
        shard.write_bytes(shard.read_bytes()[:-100])
        with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors', allowed: a whole safetensors file"):
            _prune(folder)

    def test_an_index_that_leads_outside(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../model.safetensors"}}))
        with pytest.raises(UserError, match="an index with a weight_map of file names"):
            _prune(folder)

    @pytest.mark.parametrize("content", ["", "[]", '{"weight_map": []}'])
    def test_a_damaged_index(self, folder: Path, content: str) -> None:
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(UserError, match=r"^teacher\.path: got .*index\.json.*download it again$"):
            _prune(folder)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite(self, folder: Path, value: float) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        _change(folder, name, lambda tensor: tensor.fill_(value))
        with pytest.raises(UserError, match=rf"^weights {name}: got 'NaN or infinity', allowed: finite numbers"):
            _prune(folder)

    def test_weights_of_another_shape_than_the_configuration_says(self, folder: Path) -> None:
        _change(folder, "model.norm.weight", lambda tensor: tensor[:32].clone())
        with pytest.raises(
            UserError, match=r"model\.norm\.weight of shape \(32,\)', allowed: \(64,\), as config\.json says"
        ):
            _prune(folder)

    def test_quantized_weights(self, folder: Path) -> None:
        _change(folder, "model.norm.weight", lambda tensor: tensor.to(torch.int8))
        with pytest.raises(UserError, match=r"^model\.norm\.weight: got 'I8', allowed: float weights"):
            _prune(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
        with pytest.raises(UserError, match=r"^teacher\.path: got 'a quantized checkpoint'"):
            _prune(folder)

    def test_a_weight_that_is_not_there(self, folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        del index["weight_map"]["model.norm.weight"]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=r"^teacher\.path: got 'no tensor model\.norm\.weight'"):
            _prune(folder)

    def test_folders_without_a_checkpoint(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"allowed: a folder with config\.json$"):
            _prune(tmp_path)
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        with pytest.raises(UserError, match=r"allowed: a folder with \*\.safetensors; convert \.bin files first$"):
            _prune(folder)

    def test_a_disk_that_fills(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = shutil._ntuple_diskusage(10, 10, 1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
        with pytest.raises(UserError, match=r"^free disk: got '0\.00 GB'"):
            _prune(folder)
        monkeypatch.undo()

        def full(*_arguments: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint_files, "_write_shard", full)
        with pytest.raises(UserError, match=r"^free disk: got .*, allowed: room for the student; free some space$"):
            _prune(folder)

    def test_a_vocabulary_of_another_model(self, folder: Path) -> None:
        vocabulary = TrimmedVocabulary(np.arange(5), np.arange(7), "{}")
        with pytest.raises(UserError, match=r"^vocabulary: got 7, allowed: the 320 rows of the teacher$"):
            prune_checkpoint(folder, folder.parent / "student", _scores(), SMALL, vocabulary)


def _prune(folder: Path, shape: StudentShape = SMALL) -> None:
    prune_checkpoint(folder, folder.parent / "student", _scores(), shape)


def _scores() -> Importance:
    return Importance(torch.ones(64), torch.ones(3, 96), torch.ones(3, 2), torch.tensor([0.0, 1, 1]))


def _change(folder: Path, name: str, change: Any) -> None:
    shard = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name] = change(tensors[name])
    save_file(tensors, shard, metadata={"format": "pt"})


def _plant_dead_parts(model: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        dead = torch.randperm(64, generator=generator)[:32]
        model.model.embed_tokens.weight[:, dead] = 0
        for index, layer in enumerate(model.model.layers):
            size = layer.self_attn.head_dim
            group = slice(index % 2 * size, (index % 2 + 1) * size)
            neurons = torch.randperm(96, generator=generator)[:32]
            for module, rows in (
                (layer.self_attn.o_proj, dead), (layer.mlp.down_proj, dead),
                (layer.self_attn.v_proj, group), (layer.mlp.up_proj, neurons),
            ):  # fmt: skip
                module.weight[rows] = 0
                if module.bias is not None:
                    module.bias[rows] = 0
        for module in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            for parameter in module.parameters():
                parameter.zero_()


def _trim(folder: Path, tokenizer: Tokenizer, text: str) -> TrimmedVocabulary:
    counts = np.bincount(tokenizer.encode(text).ids, minlength=VOCABULARY)
    kept = choose_ids(tokenizer.to_str(), counts, always=named_ids(folder))
    return trim_tokenizer(tokenizer.to_str(), kept, VOCABULARY)


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def _assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
