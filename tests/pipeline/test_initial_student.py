"""An existing small checkpoint as a student: what is taken, what needs the aligned loss, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from edge_runtime.formats.errors import UserError
from pipeline.data.packing import train_tokenizer
from pipeline.distillation.initial_student import (
    VocabularyMatch,
    compare_tokenizers,
    count_parameters,
    inspect_student,
    load_initial_student,
    require_loss,
)
from tests.pipeline.conftest import TEXTS, VOCABULARY, MakeModel

TOKENS = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(8))
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


@pytest.fixture
def student(make_model: MakeModel, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A smaller Qwen3 with the teacher's tokenizer, its embedding padded to more rows."""
    folder = tmp_path / "student"
    make_model("qwen3", **SMALL, vocab_size=VOCABULARY + 16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_another_architecture_and_shape_with_the_same_tokenizer_is_taken(
    student: Path, checkpoint: Path, make_model: MakeModel
) -> None:
    found = inspect_student(student, checkpoint)
    assert (found.vocabulary, found.shared_ids) == (VocabularyMatch.SAME, VOCABULARY)
    assert found.parameters == make_model("qwen3", **SMALL, vocab_size=VOCABULARY + 16).num_parameters()
    for aligned in (True, False):
        require_loss(found, aligned=aligned)
    model = load_initial_student(found)
    assert type(model).__name__ == "Qwen3ForCausalLM" and model.dtype == torch.float32 and not model.training


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [VOCABULARY, VOCABULARY + 40])
def test_rows_are_cut_or_added_without_a_change_of_the_others(
    student: Path, checkpoint: Path, make_model: MakeModel, rows: int, tied: bool
) -> None:
    model = make_model("qwen2", **SMALL, vocab_size=VOCABULARY + 16, tie_word_embeddings=tied)
    model.save_pretrained(student)
    loaded = load_initial_student(inspect_student(student, checkpoint), rows)
    assert loaded.config.vocab_size == rows == loaded.lm_head.weight.shape[0] == loaded.lm_head.out_features
    kept = min(rows, VOCABULARY + 16)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=TOKENS).logits[..., :kept], model(input_ids=TOKENS).logits[..., :kept], rtol=0, atol=1e-6
        )
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    mean = model.model.embed_tokens.weight.mean(dim=0)
    assert all(torch.equal(row, mean) for row in loaded.model.embed_tokens.weight[VOCABULARY + 16 :])
    loaded.save_pretrained(student)
    assert count_parameters(student) == loaded.num_parameters()


def test_a_tied_head_that_is_stored_too_counts_once(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    assert count_parameters(tmp_path) == model.num_parameters()


def test_shared_tokens_are_never_cut_off(student: Path, checkpoint: Path) -> None:
    found = inspect_student(student, checkpoint)
    with pytest.raises(
        UserError, match=r"^vocab_size: got 300, allowed: at least the 320 ids shared with the teacher$"
    ):
        load_initial_student(found, 300)


def test_a_tokenizer_of_its_own_is_routed_to_the_aligned_loss(student: Path, checkpoint: Path) -> None:
    train_tokenizer([text.upper() for text in TEXTS], VOCABULARY).save(str(student / "tokenizer.json"))
    found = inspect_student(student, checkpoint)
    assert (found.vocabulary, found.shared_ids) == (VocabularyMatch.DIFFERENT, 0)
    require_loss(found, aligned=True)
    with pytest.raises(
        UserError, match=r"^submodel\.checkpoint: got 'student with a tokenizer of its own'.*=aligned, which"
    ):
        require_loss(found, aligned=False)


def test_how_text_is_split_and_numbered_decides_what_is_the_same(tokenizer: Tokenizer) -> None:
    text = tokenizer.to_str()
    assert compare_tokenizers(text, text) == (VocabularyMatch.SAME, VOCABULARY)
    joined = _changed(text, lambda s: s["model"].update(merges=[" ".join(m) for m in s["model"]["merges"]]))
    assert compare_tokenizers(joined, text) == (VocabularyMatch.SAME, VOCABULARY)
    extended = Tokenizer.from_str(text)
    extended.add_special_tokens(["<think>"])
    for pair in ((extended.to_str(), text), (text, extended.to_str())):
        assert compare_tokenizers(*pair) == (VocabularyMatch.EXTENDED, VOCABULARY)
    for change in (
        lambda s: s["model"]["merges"].reverse(),
        lambda s: s.update(normalizer={"type": "NFC"}),
        lambda s: s.update(pre_tokenizer=None),
        lambda s: s["model"].update(ignore_merges=True),
        lambda s: s["model"]["vocab"].update({"<0x00>": 3, "<0x01>": 2}),
    ):
        assert compare_tokenizers(_changed(text, change), text) == (VocabularyMatch.DIFFERENT, 0)


def test_a_student_larger_than_its_teacher_is_refused(
    make_model: MakeModel, tokenizer: Tokenizer, checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "large"
    make_model("llama", num_hidden_layers=4).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(
        UserError, match=r"^submodel\.checkpoint: got '[\d,]+ parameters', allowed: at most the teacher's"
    ):
        inspect_student(folder, checkpoint)


def test_what_is_no_causal_model_or_incomplete_is_refused(student: Path, checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "gpt2"
    sizes = {"vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 8}
    GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)).save_pretrained(other)
    with pytest.raises(UserError, match=r"^submodel\.checkpoint: got 'GPT2LMHeadModel', allowed: .*Llama.*Qwen3"):
        inspect_student(other, checkpoint)
    (student / "tokenizer.json").unlink()
    with pytest.raises(
        UserError, match=r"^submodel\.checkpoint: got .*, allowed: a folder with tokenizer\.json; save its"
    ):
        inspect_student(student, checkpoint)
    (student / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^submodel\.checkpoint: got .*, allowed: a folder with \*\.safetensors"):
        inspect_student(student, checkpoint)
    with pytest.raises(UserError, match=r"^tokenizer\.json: got"):
        compare_tokenizers("[]", "[]")


def test_weights_that_are_not_finite_are_refused_by_name(
    student: Path, checkpoint: Path, make_model: MakeModel
) -> None:
    model = make_model("qwen3", **SMALL)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(student)
    with pytest.raises(UserError, match=r"^weights model\.norm\.weight: got 'NaN or infinity'"):
        load_initial_student(inspect_student(student, checkpoint))


def _changed(text: str, change: Any) -> str:
    state = json.loads(text)
    change(state)
    return json.dumps(state)
