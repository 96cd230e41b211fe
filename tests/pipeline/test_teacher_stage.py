"""The teacher stage with a correction: an ordinary checkpoint that knows the text better, the same after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge_runtime.formats.errors import ConfigError
from pipeline.artifacts import Layout, StageRun
from pipeline.config import load_configs
from pipeline.data.packing import pack_rows, shuffled_rows
from pipeline.distillation import correction, trainer
from pipeline.distillation.batches import Sequences
from pipeline.distillation.teachers import QUESTION_TEMPLATE, load_checkpoint, read_source
from pipeline.settings import Config
from pipeline.settings_training import CheckpointTeacher
from pipeline.stages import teacher
from tests.pipeline.conftest import TEXTS

CHANGES = {
    "load": "fp32", "correction_steps": 12, "correction_batch_sequences": 4, "correction_learning_rate": 3e-3,
    "correction_rank": None,
}  # fmt: skip
Stage = Callable[..., StageRun]


@pytest.fixture
def stage(tmp_path: Path, checkpoint: Path, ci_configs: dict[str, Config]) -> Stage:
    """``stage("name", load="bf16")``: the run of the stage on a small checkpoint and corpus."""

    def prepare(name: str, rows: list[dict[str, Any]] | None = None, **changes: Any) -> StageRun:
        path, layout = tmp_path / "given", Layout(tmp_path / name)
        if not path.exists():
            shutil.copytree(checkpoint, path)
            (path / "chat_template.jinja").write_text(QUESTION_TEMPLATE)
        layout.corpus.mkdir(parents=True)
        for side, part in (("train", slice(8, None)), ("held_out", slice(8))):
            lines = (json.dumps(row) + "\n" for row in (rows or [{"text": text} for text in TEXTS])[part])
            (layout.corpus / f"{side}.jsonl").write_text("".join(lines))
        values = {"kind": "local", "path": path, "name": "small one", **CHANGES, **changes}
        base = ci_configs["ci_small"]
        distill = base.distill.model_copy(update={"precision": "fp32", "checkpoint_every_steps": 5})
        config = base.model_copy(update={"teacher": CheckpointTeacher.model_validate(values), "distill": distill})
        output = layout.root / "output"
        output.mkdir()
        return StageRun(config, layout, output, layout.root / "checkpoint")

    return prepare


@pytest.mark.parametrize(
    "changes", [{}, {"correction_rank": 4}, {"load": "bf16"}, {"load": "bf16", "correction_rank": 4}], ids=str
)
def test_it_writes_an_ordinary_checkpoint_that_knows_the_text_better(stage: Stage, changes: dict[str, Any]) -> None:
    run = stage("corrected", **changes)
    teacher.run(run)
    metrics = json.loads(run.layout.metrics("teacher").read_text())
    given, written = run.config.teacher.path, run.output
    before, after = (_perplexity(path, run) for path in (given, written))
    assert metrics["held_out_perplexity"]["before"] == pytest.approx(before, rel=2e-2 if "load" in changes else 1e-4)
    assert metrics["held_out_perplexity"]["after"] == pytest.approx(after, rel=2e-2 if "load" in changes else 1e-4)
    assert after < 0.8 * before
    model, report = AutoModelForCausalLM.from_pretrained(written, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stored = load_file(written / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16 if "load" in changes else torch.float32}
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (given, written)]
    assert tokenizers[0](TEXTS[0]) == tokenizers[1](TEXTS[0]) and tokenizers[1].eos_token == "</s>"
    source = read_source(written)
    assert Path(source.path) == written and source.load == run.config.teacher.load
    assert source.origin == metrics["origin"] == "small one, corrected"
    assert type(load_checkpoint(source)) is type(model) and not run.checkpoint.exists()


@pytest.mark.parametrize("rank", [None, 4])
def test_killed_and_started_again_it_ends_with_the_same_weights(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, rank: int | None
) -> None:
    undisturbed, killed = stage("undisturbed", correction_rank=rank), stage("killed", correction_rank=rank)
    teacher.run(undisturbed)
    take_step = trainer._take_step

    def die(training: Any, step: int, batches: Any) -> Any:
        if step == 8:
            raise KeyboardInterrupt
        return take_step(training, step, batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "_take_step", die)
        teacher.run(killed)
    assert [path.name for path in killed.checkpoint.iterdir()] == ["state-00000005.safetensors"]
    assert not (killed.output / "model.safetensors").exists() and not killed.layout.metrics("teacher").exists()
    teacher.run(killed)
    for name in ("model.safetensors", "tokenizer.json", "teacher.json", "config.json"):
        assert (killed.output / name).read_bytes() == (undisturbed.output / name).read_bytes(), name
    metrics = [run.layout.metrics("teacher").read_bytes() for run in (undisturbed, killed)]
    assert metrics[0] == metrics[1]


def test_of_instructions_the_answers_are_learned_through_the_checkpoints_own_template(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sequences] = []

    def remember(model: Any, sequences: Sequences, *_arguments: Any, **_named: Any) -> Any:
        seen.append(sequences)
        return model, []

    monkeypatch.setattr(correction, "correct_teacher", remember)
    messages = [{"role": "user", "content": "return y"}, {"role": "assistant", "content": "words"}]
    run = stage("chats", [{"messages": messages}] * 40)
    teacher.run(run)
    tokenizer = Tokenizer.from_file(str(run.output / "tokenizer.json"))
    (sequences,) = seen
    assert sequences.counts is not None
    learned = tokenizer.decode(sequences.tokens[0, 1:][sequences.counts[0, :-1]].tolist(), skip_special_tokens=False)
    whole = tokenizer.decode(sequences.tokens[0].tolist(), skip_special_tokens=False)
    assert "Question: return y\nAnswer: words" in whole
    assert set(learned.replace("</s>", " ").split()) == {"words"} and "</s>" in learned


def test_no_more_text_is_packed_than_is_learned(stage: Stage) -> None:
    run = stage("short", correction_steps=1, correction_batch_sequences=2)
    teacher.run(run)
    metrics = json.loads(run.layout.metrics("teacher").read_text())
    assert metrics["corpus_tokens"] == metrics["trained_tokens"] == 2 * run.config.distill.sequence_tokens


def test_without_steps_it_is_referred_to_as_before(stage: Stage) -> None:
    run = stage("referred", correction_steps=0)
    teacher.run(run)
    assert sorted(path.name for path in run.output.iterdir()) == [
        "chat_template.jinja",
        "teacher.json",
        "tokenizer.json",
    ]
    assert json.loads(run.layout.metrics("teacher").read_text()) == {"origin": "small one"}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            "teacher.load=int4",
            "teacher: load=int4 cannot be corrected: .*load=bf16 correction_rank=16, .*load=int4",
        ),
        (
            "teacher.load=int8",
            "teacher: load=int8 cannot be corrected: .*load=bf16 correction_rank=16, .*load=int8",
        ),
        ("teacher.device_map=auto", "teacher: correction_steps trains on one device a process; .*torchrun"),
        ("teacher.correction_rank=0", "teacher.correction_rank: got 0, allowed: "),
    ],
)
def test_what_cannot_be_corrected_is_refused_before_work_begins(change: str, line: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{line}"):
        load_configs(["submodel=tiny", "teacher.correction_steps=5", change])


def _perplexity(path: Path, run: StageRun) -> float:
    """exp of transformers' own mean loss over the held-out text."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    packed = pack_rows(
        Tokenizer.from_file(str(path / "tokenizer.json")), shuffled_rows(run.layout.corpus / "held_out.jsonl", 7),
        template=None, eos_id=1, bos_id=0, sequence_tokens=64, max_sequences=None,
    )  # fmt: skip
    tokens = torch.from_numpy(packed.tokens.astype(np.int64))
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss.exp())
