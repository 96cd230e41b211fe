"""An existing small checkpoint as a student's first weights, and what its vocabulary allows.

With the teacher's tokenizer, ids mean the same to both and any loss over ids holds, even where the embeddings are
padded to different sizes (Qwen2.5: 152,064 rows in the 7B, 151,936 in the 0.5B). With another one only the aligned
loss compares them, over words instead of ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from edge_runtime.formats.errors import UserError
from pipeline.distillation.checkpoint_files import read_config, require_finite, tensor_files, tensor_shape
from pipeline.distillation.vocabulary import TrimmedVocabulary, remap_token_ids

_FIELD = "submodel.checkpoint"


class VocabularyMatch(StrEnum):
    """How a student's tokenizer stands to its teacher's."""

    SAME = "same"
    EXTENDED = "extended"
    DIFFERENT = "different"


@dataclass(frozen=True, slots=True)
class InitialStudent:
    """A checkpoint that may become a student.

    Attributes:
        path: Its folder.
        config: Its transformers config.
        parameters: Its size, tied weights once.
        vocabulary: ``same``: cut or split text alike. ``extended``: one of the two adds tokens that the other lacks.
            ``different``: needs the aligned loss.
        shared_ids: Ids 0 .. shared_ids - 1 mean the same to both; 0 where the vocabularies differ.
    """

    path: Path
    config: Any
    parameters: int
    vocabulary: VocabularyMatch
    shared_ids: int


def inspect_student(path: Path, teacher: Path) -> InitialStudent:
    """Read what a checkpoint is, without its weights.

    Args:
        path: The small checkpoint, with tokenizer.json.
        teacher: Folder of the teacher's checkpoint, with tokenizer.json.

    Raises:
        UserError: Not a causal language model of a supported architecture, larger than its teacher, or incomplete.
    """
    config, parameters = read_config(path, _FIELD), count_parameters(path, _FIELD)
    limit = count_parameters(teacher)
    if parameters > limit:
        raise UserError(_FIELD, f"{parameters:,} parameters", f"at most the teacher's {limit:,}", "swap the two")
    match, shared = compare_tokenizers(_tokenizer(path, _FIELD), _tokenizer(teacher, "teacher.path"))
    rows = min(config.vocab_size, read_config(teacher).vocab_size)
    return InitialStudent(path, config, parameters, match, min(shared, rows) if match != VocabularyMatch.SAME else rows)


def require_loss(student: InitialStudent, *, aligned: bool) -> None:
    """Refuse a loss over ids where ids do not mean the same.

    Raises:
        UserError: Naming the loss to choose.
    """
    if student.vocabulary == VocabularyMatch.DIFFERENT and not aligned:
        raise UserError(
            _FIELD, f"{student.path.name} with a tokenizer of its own", "the teacher's tokenizer for a loss over ids",
            "choose distill.loss=aligned, which compares words",
        )  # fmt: skip


def load_initial_student(student: InitialStudent, vocab_size: int | None = None) -> Any:
    """The checkpoint's model in fp32 on the CPU, for training.

    Args:
        student: What ``inspect_student`` found.
        vocab_size: Rows that embedding and head shall have; rows added are the mean of the others, those cut off must
            lie beyond the ids that student and teacher share. None leaves them.

    Raises:
        UserError: Weights that are not finite, or rows with tokens would be cut off.
    """
    import transformers

    model_class = getattr(transformers, student.config.architectures[0])
    model = model_class.from_pretrained(
        student.path, dtype=torch.float32, local_files_only=True, use_safetensors=True
    ).eval()
    for name, parameter in model.named_parameters():
        require_finite(name, parameter)
    if vocab_size is not None and vocab_size != model.config.vocab_size:
        if vocab_size < student.shared_ids:
            raise UserError("vocab_size", vocab_size, f"at least the {student.shared_ids} ids shared with the teacher")
        _resize(model, vocab_size)
    return model


@torch.no_grad()
def keep_rows(model: Any, vocabulary: TrimmedVocabulary) -> None:
    """Cut embedding and head of a model down to a trimmed vocabulary, and renumber the ids that its settings name.

    Raises:
        UserError: The model has other rows than the vocabulary was cut from, or names a token that was dropped.
    """
    if model.config.vocab_size != len(vocabulary.new_ids):
        raise UserError("vocabulary", len(vocabulary.new_ids), f"the {model.config.vocab_size} rows of the model")
    rows = torch.from_numpy(vocabulary.kept_ids)
    for named in (model.config, model.generation_config):
        for key, value in remap_token_ids(named.to_dict(), vocabulary).items():
            setattr(named, key, value)
    _replace_rows(model, lambda weight: weight[rows])


def compare_tokenizers(student: str, teacher: str) -> tuple[VocabularyMatch, int]:
    """How two tokenizers (texts of tokenizer.json) stand to each other, and how many first ids they share.

    Raises:
        UserError: One of them cannot be read.
    """
    ours, theirs = _meaning(student), _meaning(teacher)
    if ours["splitting"] != theirs["splitting"]:
        return VocabularyMatch.DIFFERENT, 0
    small, large = sorted((ours["tokens"], theirs["tokens"]), key=len)
    if small == large:
        return VocabularyMatch.SAME, len(small)
    if any(large.get(index) != token for index, token in small.items()):
        return VocabularyMatch.DIFFERENT, 0
    return VocabularyMatch.EXTENDED, next(index for index in range(len(large) + 1) if index not in small)


def count_parameters(path: Path, field: str = "teacher.path") -> int:
    """Weights of a checkpoint, from the headers of its files; a tied head once.

    Raises:
        UserError: The checkpoint is incomplete.
    """
    files = tensor_files(path, field)
    tied = bool(read_config(path, field).tie_word_embeddings)
    names = [n for n in files if n.startswith(("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head."))]
    counted = [n for n in names if not (n.endswith("rotary_emb.inv_freq") or (tied and n == "lm_head.weight"))]
    return sum(int(torch.Size(tensor_shape(files[name], name)).numel()) for name in counted)


def _tokenizer(path: Path, field: str) -> str:
    try:
        return (path / "tokenizer.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(field, str(path), "a folder with tokenizer.json", "save its fast tokenizer there") from None


def _meaning(text: str) -> dict[str, Any]:
    """What decides which ids a text becomes: all tokens by id, and how text is split."""
    try:
        state = json.loads(text)
        model, added = state["model"], state.get("added_tokens") or []
        vocab = model["vocab"]
        pairs = list(vocab.items()) if isinstance(vocab, dict) else [(item[0], i) for i, item in enumerate(vocab)]
        tokens = {index: token for token, index in pairs} | {token["id"]: token["content"] for token in added}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError("tokenizer.json", text[:40], "a tokenizer of the tokenizers library") from None
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    splitting = {
        "merges": merges,
        "normalizer": state.get("normalizer"),
        "pre_tokenizer": state.get("pre_tokenizer"),
        "model": {key: model.get(key) or None for key in ("type", "byte_fallback", "ignore_merges")},
    }
    return {"tokens": tokens, "splitting": splitting}


def _resize(model: Any, vocab_size: int) -> None:
    def resized(weight: torch.Tensor) -> torch.Tensor:
        rows = weight[:vocab_size]
        return torch.cat([rows, weight.mean(dim=0, keepdim=True).expand(vocab_size - len(rows), -1)])

    _replace_rows(model, resized)


@torch.no_grad()
def _replace_rows(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tied = model.config.tie_word_embeddings
    for layer in (model.model.embed_tokens,) if tied else (model.model.embed_tokens, model.lm_head):
        layer.weight = torch.nn.Parameter(change(layer.weight).clone())
    size = len(model.model.embed_tokens.weight)
    model.model.embed_tokens.num_embeddings = model.lm_head.out_features = model.config.vocab_size = size
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
