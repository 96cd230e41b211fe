"""What a student reads: its tokenizer, and the run's text in its ids.

Most students have the teacher's vocabulary and read what the targets stage wrote. One with a vocabulary of its own gets
its own copy, beside its weights, where ``Layout.tokenizer`` and ``Layout.sequences`` find it for every later stage:

    tokenizer.json ...              the tokenizer, as a checkpoint holds it
    targets/train.npy, train_counts.npy, held_out.npy, held_out_bytes.npy
    targets/held_out_draws.npy, held_out_log_p.npy, held_out_top1.npy, kept_ids.npy     a trimmed vocabulary's only
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.errors import UserError
from pipeline.artifacts import Layout, located
from pipeline.distillation.batches import Sequences
from pipeline.distillation.checkpoint_files import copy_tokenizer, read_config
from pipeline.distillation.initial_student import InitialStudent, VocabularyMatch, inspect_student, require_loss
from pipeline.distillation.remapped_signals import first_pieces, remap_held_out, remap_tokens
from pipeline.distillation.scoring import HeldOut
from pipeline.distillation.teachers import eos_ids, read_source
from pipeline.distillation.token_bytes import text_bytes
from pipeline.distillation.vocabulary import (
    TrimmedVocabulary,
    choose_ids,
    count_ids,
    named_ids,
    token_pieces,
    trim_tokenizer,
    write_tokenizer,
)

if TYPE_CHECKING:
    from pipeline.settings import Config
    from pipeline.settings_training import SubmodelConfig

_FIELD = "submodel.checkpoint"
_TEMPLATE, _KEPT_IDS = "chat_template.jinja", "kept_ids.npy"


@dataclass(frozen=True, slots=True)
class Trimming:
    """How a trimmed vocabulary stands to the teacher's.

    Attributes:
        vocabulary: The tokens that are kept, and their tokenizer.
        first_pieces: (V,) the first new id of each old token's string.
        source: (S, T) the teacher's position whose prediction holds at one of ``train.npy``; -1 where none does.
        coverage: Share (0..1) of the training text's tokens that are kept.
    """

    vocabulary: TrimmedVocabulary
    first_pieces: NDArray[np.int64]
    source: NDArray[np.int64]
    coverage: float


@dataclass(frozen=True, slots=True)
class StudentText:
    """A student's tokenizer and sequences.

    Attributes:
        tokenizer: Folder with tokenizer.json.
        folder: With the arrays.
        trimming: How its vocabulary stands to the teacher's, where it is a part of it.
    """

    tokenizer: Path
    folder: Path
    trimming: Trimming | None = None

    def sequences(self) -> Sequences:
        """The training text, mapped from its files."""
        return read_sequences(self.folder)


def read_sequences(folder: Path) -> Sequences:
    """The training text of a ``Layout.sequences``."""
    return Sequences(
        np.load(folder / "train.npy", mmap_mode="r"), np.load(folder / "train_counts.npy", mmap_mode="r")
    )  # fmt: skip


def prepare_text(config: Config, layout: Layout, output: Path) -> StudentText:
    """Find out which vocabulary a student has, and write its text into ``output`` when that is not the teacher's.

    Raises:
        UserError: Ids could not be compared by the loss, or the tokenizer cannot be trimmed.
    """
    submodel, teacher = config.submodel, Path(read_source(layout.teacher).path)
    aligned, parent = config.distill.loss == "aligned", layout.student(submodel.cut_from)
    kept_ids = None
    if submodel.checkpoint is not None:
        found = require_checkpoint(located(submodel.checkpoint), teacher, submodel, aligned=aligned)
        if found.vocabulary == VocabularyMatch.DIFFERENT:
            return _pack(found.path, config.seed, layout, output)
    elif submodel.cut_from != "teacher" and layout.sequences(submodel.cut_from) != layout.targets:
        if not (parent / "targets" / _KEPT_IDS).is_file():
            return _inherit(parent, submodel, output, aligned=aligned)
        kept_ids = np.load(parent / "targets" / _KEPT_IDS)
    if kept_ids is None and submodel.trims:
        kept_ids = _choose(submodel, teacher, layout)
    return StudentText(layout.teacher, layout.targets) if kept_ids is None else _trim(kept_ids, teacher, layout, output)


def require_checkpoint(path: Path, teacher: Path, submodel: SubmodelConfig, *, aligned: bool) -> InitialStudent:
    """What a checkpoint is that a student shall start from, found out before any work.

    Raises:
        UserError: It cannot be read, is larger than its teacher, or its tokenizer needs another loss or cannot be
            trimmed.
    """
    found = inspect_student(path, teacher)
    if found.vocabulary == VocabularyMatch.DIFFERENT and submodel.trims:
        raise UserError(
            "submodel.vocab_coverage, vocab_size", f"given, and {path.name} has a tokenizer of its own",
            "a checkpoint with the teacher's tokenizer", "leave them out: another tokenizer stays whole",
        )  # fmt: skip
    require_loss(found, aligned=aligned)
    return found


def _choose(submodel: SubmodelConfig, teacher: Path, layout: Layout) -> NDArray[np.int64]:
    """By how often the training text uses a token; what config.json and generation_config.json name stays."""
    rows = read_config(teacher).vocab_size
    return choose_ids(
        (layout.teacher / "tokenizer.json").read_text(encoding="utf-8"), _counts(layout, rows),
        vocab_size=submodel.vocab_size, coverage=submodel.vocab_coverage, always=named_ids(teacher),
    )  # fmt: skip


def _trim(kept_ids: NDArray[np.int64], teacher: Path, layout: Layout, output: Path) -> StudentText:
    from tokenizers import Tokenizer

    text, rows = (layout.teacher / "tokenizer.json").read_text(encoding="utf-8"), read_config(teacher).vocab_size
    vocabulary = trim_tokenizer(text, kept_ids, rows)
    pieces, folder, counts = token_pieces(text, vocabulary), output / "targets", _counts(layout, rows)
    folder.mkdir(parents=True)
    write_tokenizer(teacher, output, vocabulary)
    _copy_template(layout.teacher, output)
    old = read_sequences(layout.targets)
    new = remap_tokens(old.tokens, old.counts, pieces)
    np.save(folder / "train.npy", new.tokens)
    np.save(folder / "train_counts.npy", new.counts)
    np.save(folder / _KEPT_IDS, vocabulary.kept_ids)
    sizes = text_bytes(Tokenizer.from_str(vocabulary.tokenizer), len(vocabulary.kept_ids))
    remap_held_out(HeldOut.open(layout.targets), pieces, vocabulary.new_ids, sizes).save(folder)
    coverage = float(counts[vocabulary.kept_ids].sum() / counts.sum())
    return StudentText(output, folder, Trimming(vocabulary, first_pieces(pieces), new.source, coverage))


def _counts(layout: Layout, rows: int) -> NDArray[np.int64]:
    return count_ids(np.load(layout.targets / "train.npy", mmap_mode="r"), rows)


def _pack(path: Path, seed: int, layout: Layout, output: Path) -> StudentText:
    """The corpus in the tokens of a checkpoint, as many sequences of the same length as the teacher's at most."""
    from tokenizers import Tokenizer

    from pipeline.data.packing import pack_rows, shuffled_rows

    config, folder = read_config(path, _FIELD), output / "targets"
    copy_tokenizer(path, output)
    _require_settings(output)
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    sizes = text_bytes(tokenizer, config.vocab_size)
    template = _template(output)
    for side in ("train", "held_out"):
        like = np.load(layout.targets / f"{side}.npy", mmap_mode="r")
        packed = pack_rows(
            tokenizer, shuffled_rows(layout.corpus / f"{side}.jsonl", seed), template=template,
            eos_id=eos_ids(config)[0], bos_id=config.bos_token_id, sequence_tokens=like.shape[1],
            max_sequences=len(like), output=folder / f"{side}.npy",
        )  # fmt: skip
    np.save(folder / "held_out_bytes.npy", sizes[packed.tokens])
    return StudentText(output, folder)


def _inherit(parent: Path, submodel: SubmodelConfig, output: Path, *, aligned: bool) -> StudentText:
    """The text of the student that this one is cut from, which has a tokenizer that is not the teacher's."""
    if not aligned or submodel.trims:
        raise UserError(
            "submodel.cut_from", submodel.cut_from, "one with the teacher's tokenizer, or distill.loss=aligned and no"
            " trimming", "it has a tokenizer of its own",
        )  # fmt: skip
    shutil.copytree(parent / "targets", output / "targets")
    copy_tokenizer(parent, output)
    return StudentText(output, output / "targets")


def _copy_template(source: Path, output: Path) -> None:
    if (source / _TEMPLATE).is_file():
        shutil.copyfile(source / _TEMPLATE, output / _TEMPLATE)


def _template(folder: Path) -> str | None:
    path = folder / _TEMPLATE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _require_settings(folder: Path) -> None:
    """tokenizer_config.json for AutoTokenizer, and a template that stands in it as a file, which packages carry."""
    path = folder / "tokenizer_config.json"
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not values:
        path.write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n', encoding="utf-8")
    template = values.get("chat_template")
    if isinstance(template, str) and not (folder / _TEMPLATE).is_file():
        (folder / _TEMPLATE).write_text(template, encoding="utf-8")
