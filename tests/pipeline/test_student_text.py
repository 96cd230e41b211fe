"""A student with a vocabulary of its own: where later stages find its text, and what the teacher says of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge_runtime.formats.errors import ConfigError, UserError
from pipeline import config as config_module
from pipeline.artifacts import Layout, StageRun, read_json
from pipeline.config import CONF_DIR, load_configs
from pipeline.data.packing import train_tokenizer
from pipeline.distillation.batches import Batch, read_batch
from pipeline.distillation.chain import Link, require_vocabularies
from pipeline.distillation.initial_student import keep_rows
from pipeline.distillation.recording import model_logits
from pipeline.distillation.remapped_signals import TrimmedOnlineSource, TrimmedStoredSource, remap_held_out
from pipeline.distillation.scoring import HeldOut, kl_from_draws, perplexity
from pipeline.distillation.signals import draw
from pipeline.distillation.stored_targets import StoredTargets
from pipeline.distillation.student_text import StudentText, prepare_text, read_sequences, require_checkpoint
from pipeline.distillation.teachers import load_checkpoint, read_source
from pipeline.distillation.token_bytes import text_bytes
from pipeline.distillation.vocabulary import token_pieces
from pipeline.plan import require_checkpoints
from pipeline.settings import Config
from pipeline.stages import distill, targets
from pipeline.stages.evaluate import gate_reasons
from tests.pipeline.conftest import TEXTS, VOCABULARY, MakeModel

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "tie_word_embeddings": True}
QUICK = ("experiment=ci", "distill.sequence_tokens=16", "distill.target_tokens=640", "distill.steps=2",
         "distill.draws=16", "runtime.evaluation_sequences=6")  # fmt: skip
TEACHER = "checkpoint_of_the_teacher"
ALIGNED = {"loss": "aligned", "signal": "online"}
CUT, RARE = 280, VOCABULARY - 2  # tokens: bytes, and a few words; one that is kept for its name alone


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel, tokenizer: Tokenizer) -> Layout:
    """What distill needs: a corpus, a teacher with sharp opinions, its targets."""
    layout = Layout(tmp_path_factory.mktemp("run"))
    layout.corpus.mkdir(parents=True)
    for side, texts in (("train", TEXTS), ("held_out", [text.replace("+", "-") for text in TEXTS[:20]])):
        rows = "".join(json.dumps({"text": text, "document": str(n)}) + "\n" for n, text in enumerate(texts))
        (layout.corpus / f"{side}.jsonl").write_text(rows, encoding="utf-8")
    model = make_model("llama", tie_word_embeddings=True)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.generation_config.suppress_tokens = [RARE]
    checkpoint = layout.root / TEACHER
    model.save_pretrained(checkpoint)
    layout.teacher.mkdir()
    for folder in (layout.teacher, checkpoint):
        tokenizer.save(str(folder / "tokenizer.json"))
    (layout.teacher / "chat_template.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    source = {"path": str(checkpoint), "load": "fp32", "device_map": None, "origin": "test"}
    (layout.teacher / "teacher.json").write_text(json.dumps(source), encoding="utf-8")
    layout.targets.mkdir()
    targets.run(StageRun(configured(), layout, layout.targets, layout.root / "checkpoint"))
    shape = np.load(layout.targets / "train.npy").shape
    np.save(layout.targets / "train_counts.npy", np.random.default_rng(9).random(shape) < 0.8)  # as of conversations
    return layout


@pytest.fixture(scope="module")
def trimmed(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> StudentText:
    return prepare_text(configured(submodel={"vocab_size": CUT}), layout, tmp_path_factory.mktemp("trimmed"))


@pytest.fixture(scope="module")
def own(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("own")
    make_model("qwen3", **SMALL, vocab_size=300).save_pretrained(folder)
    train_tokenizer([text.upper() for text in TEXTS], 300).save(str(folder / "tokenizer.json"))
    return folder


@cache
def base() -> dict[str, Any]:
    return load_configs([*QUICK, "submodel=ci_tiny"])["ci_tiny"].model_dump()


def configured(**sections: dict[str, Any]) -> Config:
    """The base with other values, checked as a command line's are; composing each would take most of the time."""
    return Config.model_validate(base() | {name: base()[name] | values for name, values in sections.items()})


def distilled(layout: Layout, config: Config, name: str) -> dict[str, Any]:
    """Run the stage for a submodel of that name; its metrics."""
    config = config.model_copy(update={"submodel": config.submodel.model_copy(update={"name": name})})
    layout.student(name).mkdir(parents=True)
    distill.run(StageRun(config, layout, layout.student(name), layout.root / f"checkpoint-{name}"))
    found: dict[str, Any] = read_json(layout.metrics("distill", name))
    return found


def test_without_a_vocabulary_of_its_own_a_submodel_reads_the_teachers(layout: Layout, tmp_path: Path) -> None:
    text = prepare_text(configured(), layout, tmp_path)
    assert (text.tokenizer, text.folder, text.trimming) == (layout.teacher, layout.targets, None)
    assert not list(tmp_path.iterdir())
    assert (layout.tokenizer("nobody"), layout.sequences("nobody")) == (layout.teacher, layout.targets)


def test_a_trimmed_vocabulary_is_a_tokenizer_and_text_that_reads_the_same(layout: Layout, trimmed: StudentText) -> None:
    old = Tokenizer.from_file(str(layout.teacher / "tokenizer.json"))
    new = AutoTokenizer.from_pretrained(trimmed.tokenizer, local_files_only=True)
    assert len(new) == CUT and new.chat_template == "{{ messages[0]['content'] }}"
    held_out, before = HeldOut.open(trimmed.folder), HeldOut.open(layout.targets)
    for now, was in zip(held_out.tokens, before.tokens, strict=True):
        text = old.decode(was.tolist(), skip_special_tokens=False)
        found = new.decode(now.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert text.startswith(found) and len(found) > len(text) // 2
    assert not text_bytes(old, VOCABULARY)[:2].any() and (text_bytes(old, VOCABULARY)[2:258] == 1).all()
    spelt = [len(new.decode([i]).encode()) for i in range(2, CUT) if not 2 <= i < 258]
    assert held_out.text_bytes.shape == held_out.tokens.shape
    assert text_bytes(Tokenizer.from_file(str(trimmed.tokenizer / "tokenizer.json")), CUT)[258:].tolist() == spelt
    assert trimmed.trimming is not None
    counts = np.bincount(np.load(layout.targets / "train.npy").ravel(), minlength=VOCABULARY)
    kept = counts[trimmed.trimming.vocabulary.kept_ids].sum() / counts.sum()
    old_counts, new_counts = (np.load(folder / "train_counts.npy") for folder in (layout.targets, trimmed.folder))
    source = trimmed.trimming.source
    expected = (source >= 0) & np.take_along_axis(old_counts, np.maximum(source, 0), axis=1)
    np.testing.assert_array_equal(new_counts, expected)
    assert 0.5 < kept < 1 and trimmed.trimming.coverage == pytest.approx(kept, abs=1e-12)


def test_divergence_of_a_trimmed_vocabulary_is_that_given_a_kept_token() -> None:
    """Against the exact sum over the vocabulary, where every token stays whole."""
    generator = torch.Generator().manual_seed(5)
    p, q = torch.randn(4, 30, 12, generator=generator), torch.randn(4, 30, 8, generator=generator)
    ids = draw(p, 4000, generator)
    log_p = p.double().log_softmax(-1)
    tokens = np.random.default_rng(1).integers(0, 8, (4, 30)).astype(np.int32)
    taken = log_p.gather(-1, ids).float().numpy()
    before = HeldOut(tokens, np.ones_like(tokens), ids.numpy(), taken, p.argmax(-1).numpy().astype(np.int32))
    new_ids = np.array([*range(8), -1, -1, -1, -1])
    found = remap_held_out(
        before, [(i,) if i < 8 else (0, 1) for i in range(12)], new_ids, np.arange(8, dtype=np.int32)
    )
    given_kept = p[..., :8].double().log_softmax(-1)
    exact = float((given_kept.exp() * (given_kept - q.double().log_softmax(-1))).sum(-1).mean())
    assert found.kl(iter(q.numpy())) == pytest.approx(exact, rel=0.02)
    assert found.kept_share == pytest.approx(float(log_p.exp()[..., :8].sum(-1).mean()), abs=0.005)
    np.testing.assert_array_equal(found.text_bytes, tokens)
    agreeing = p.argmax(-1) < 8
    assert found.top1_share(p[..., :8].argmax(-1).numpy()) == 1.0 and 0 < int(agreeing.sum()) < agreeing.numel()
    np.testing.assert_array_equal(found.top1 >= 0, agreeing.numpy())


def test_positions_inside_a_token_that_fell_to_pieces_do_not_count() -> None:
    draws = np.array([[[0, 1], [2, 2], [3, 0]]])
    before = HeldOut(
        np.array([[3, 0, 3]], np.int32), np.ones((1, 3), np.int32), draws, np.log(np.full((1, 3, 2), 0.5, np.float32)),
        np.array([[1, 2, 3]], np.int32),
    )  # fmt: skip
    found = remap_held_out(before, [(0,), (1,), (0,), (1, 1)], np.array([0, 1, -1, -1]), np.array([1, 2], np.int32))
    np.testing.assert_array_equal(found.tokens, [[1, 1, 0]])
    np.testing.assert_array_equal(found.draws, [[[-1, -1], [0, 1], [-1, -1]]])  # of position 0 at the second piece
    np.testing.assert_array_equal(found.top1, [[-1, 1, -1]])
    assert found.kept_share == pytest.approx(1 / 3)
    logits = np.log(np.array([[[9, 1], [0.25, 0.75], [1, 9]]], np.float32))
    assert found.kl(logits) == pytest.approx(np.log(0.5) - (np.log(0.25) + np.log(0.75)) / 2, rel=1e-6)
    assert kl_from_draws(logits, np.array([[[0, -1]] * 3]), np.zeros((1, 3, 2), np.float32)) == pytest.approx(
        -np.log([0.9, 0.25, 0.1]).mean(), rel=1e-6
    )
    with pytest.raises(UserError, match=r"^submodel\.vocab_size: got 2, allowed: tokens that the teacher writes"):
        remap_held_out(
            replace(before, draws=np.full_like(draws, 2)), [(0,), (1,), (0,), (1, 1)], np.array([0, 1, -1, -1]),
            np.array([1, 2], np.int32),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("kl", "scratch_kl", "perplexity_scratch", "reason"),
    [
        (0.4, 0.5, 10.0, None),
        (0.5, 0.5, 30.0, "KL to the teacher 0.5, from scratch 0.5: not better"),
        (None, None, 30.0, None),
        (None, None, 20.0, "perplexity 20.0, from scratch 20.0: not better"),
        (None, None, None, "perplexity 20.0, from scratch None: not better"),
    ],
)
def test_without_a_divergence_the_gate_compares_perplexities(
    kl: float | None, scratch_kl: float | None, perplexity_scratch: float | None, reason: str | None
) -> None:
    figures = {"perplexity": 20.0, "top1_to_fp": 1.0, "weight_bytes": 1}
    result = {
        "packages": {"onnx": figures}, "fp16_weight_bytes": 100, "perplexity_fp": 20.0, "kl_to_teacher": kl,
        "kl_to_teacher_from_scratch": scratch_kl, "perplexity_from_scratch": perplexity_scratch,
        "recovery": {"tasks": {"cloze": {"containers": {"onnx": {"verdict": "passed"}}}}},
    }  # fmt: skip
    gate = configured(gate={"beats_from_scratch": True}).gate
    assert gate_reasons(result, gate) == ([] if reason is None else [reason])


def test_bits_a_byte_do_not_depend_on_how_text_is_cut() -> None:
    """The same text at the same cost, in 3 tokens or in 6: other perplexities, the same bits."""
    whole = HeldOut(np.zeros((2, 4), np.int32), np.full((2, 4), 4, np.int32), None, None, None)
    pieces = HeldOut(np.zeros((2, 7), np.int32), np.full((2, 7), 2, np.int32), None, None, None)
    assert whole.bits_per_byte(64.0) == pieces.bits_per_byte(8.0) == 1.5
    assert (whole.kl([]), whole.kept_share, whole.top1_share(np.zeros((2, 4), np.int32))) == (None, None, None)


def test_stored_draws_of_dropped_tokens_become_the_first_piece_where_the_token_ends(
    layout: Layout, trimmed: StudentText
) -> None:
    trimming = trimmed.trimming
    assert trimming is not None
    stored = StoredTargets.open(layout.targets / "train")
    source = TrimmedStoredSource(stored, trimming.first_pieces, trimming.source)
    rows = np.array([7, 2], np.int64)
    batch = source.prepare(read_batch(trimmed.sequences(), rows))
    found, expected = source.signal(batch), stored.read(rows)
    pieces = token_pieces((layout.teacher / "tokenizer.json").read_text(encoding="utf-8"), trimming.vocabulary)
    seen = 0
    for row, place in np.argwhere(batch.counts.numpy()):
        old = int(trimming.source[rows[row], place])
        weights: dict[int, float] = {}
        for id, weight in zip(expected.ids[row, old].tolist(), expected.weights[row, old].tolist(), strict=True):
            if weight:
                weights[pieces[id][0]] = weights.get(pieces[id][0], 0.0) + weight
                seen += len(pieces[id]) > 1
        ids, mass = found.ids[row, place].tolist(), found.weights[row, place].tolist()
        assert {i: m for i, m in zip(ids, mass, strict=True) if m} == pytest.approx(weights, abs=1e-6)
    assert seen and not batch.counts.all()


def test_a_teacher_beside_a_trimmed_student_gives_its_p_given_a_kept_token(
    layout: Layout, trimmed: StudentText
) -> None:
    trimming = trimmed.trimming
    assert trimming is not None
    teacher, kept = load_checkpoint(read_source(layout.teacher)), trimming.vocabulary.kept_ids
    old = read_sequences(layout.targets).tokens
    source = TrimmedOnlineSource.open(teacher, kept, old, trimming.source, bf16=False)
    batch = read_batch(trimmed.sequences(), np.array([3, 5], np.int64))
    signal = source.signal(batch)
    found = (signal.hidden @ signal.head.T).softmax(-1)
    for row, place in np.argwhere(batch.counts.numpy()):
        logits = next(model_logits(teacher, old[batch.rows[row]][None]))[trimming.source[batch.rows[row], place]]
        expected = torch.from_numpy(logits).softmax(-1)[kept]
        torch.testing.assert_close(found[row, place], expected / expected.sum(), atol=1e-5, rtol=1e-4)
    written = torch.randint(CUT, (2, 9), generator=torch.Generator().manual_seed(2))  # by the student: no rows
    signal = source.signal(Batch(np.empty(0, np.int64), written, torch.ones_like(written, dtype=torch.bool)))
    logits = teacher(input_ids=torch.from_numpy(kept)[written]).logits[..., torch.from_numpy(kept)]
    torch.testing.assert_close(signal.hidden @ signal.head.T, logits.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("signal", ["stored", "online"])
def test_a_trimmed_student_is_an_ordinary_checkpoint_and_the_next_is_cut_from_it(
    layout: Layout, tokenizer: Tokenizer, signal: str
) -> None:
    first, second = f"first_{signal}", f"second_{signal}"
    metrics = distilled(layout, configured(submodel={"vocab_coverage": 0.7}, distill={"signal": signal}), first)
    assert 0.7 <= metrics["vocab_coverage"] < 0.9 and 0 < metrics["kept_share"] < 1
    assert (layout.tokenizer(first), layout.sequences(first)) == (
        layout.student(first),
        layout.student(first) / "targets",
    )
    model = AutoModelForCausalLM.from_pretrained(layout.student(first), local_files_only=True)
    named = tokenizer.id_to_token(RARE)
    tokenizer = AutoTokenizer.from_pretrained(layout.student(first), local_files_only=True)
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == len(tokenizer) < VOCABULARY
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("</s>")
    tokens = HeldOut.open(layout.sequences(first)).tokens
    assert metrics["perplexity"] == pytest.approx(perplexity(model_logits(model, tokens), tokens), rel=1e-4)
    assert tokenizer.convert_ids_to_tokens(model.generation_config.suppress_tokens) == [named]
    assert distilled(layout, configured(distill={"signal": signal}), f"whole_{signal}")["kept_share"] == 1
    links = {"cut_from": first, "learns_from": first}
    again = distilled(layout, configured(submodel=links, distill={"signal": signal}), second)
    assert again["kept_share"] == metrics["kept_share"]
    for name in ("tokenizer.json", "targets/train.npy", "targets/held_out_draws.npy"):
        assert (layout.student(second) / name).read_bytes() == (layout.student(first) / name).read_bytes()


def test_a_checkpoint_with_another_tokenizer_reads_the_corpus_in_its_own_tokens(layout: Layout, own: Path) -> None:
    metrics = distilled(layout, configured(submodel={"checkpoint": own}, distill=ALIGNED), "own")
    assert metrics["kl_to_teacher"] is None is metrics["kept_share"] and metrics["bits_per_byte"] > 0
    tokenizer = AutoTokenizer.from_pretrained(layout.student("own"), local_files_only=True)
    for side in ("train", "held_out"):
        found, like = (np.load(folder / f"{side}.npy") for folder in (layout.sequences("own"), layout.targets))
        assert found.shape[1] == like.shape[1] and len(found) <= len(like) and found.max() < 300
        texts = [json.loads(line)["text"] for line in (layout.corpus / f"{side}.jsonl").read_text().splitlines()]
        first = tokenizer.decode(found.ravel().tolist(), clean_up_tokenization_spaces=False).split("</s>")[0]
        assert first in texts
    child = {"cut_from": "own", "hidden_size": 32, "intermediate_size": 64, "num_kv_heads": 2, "num_layers": 1}
    assert distilled(layout, configured(submodel=child, distill=ALIGNED), "own_child")["kl_to_teacher"] is None
    both = (layout.sequences(name) / "train.npy" for name in ("own", "own_child"))
    assert len({path.read_bytes() for path in both}) == 1
    with pytest.raises(UserError, match=r"^submodel\.cut_from: got 'own', allowed: one with the teacher's tokenizer"):
        prepare_text(configured(submodel=child), layout, layout.root / "unused")


def test_checkpoints_with_the_teachers_tokenizer_can_be_trimmed(
    layout: Layout, trimmed: StudentText, make_model: MakeModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert trimmed.trimming is not None
    kept = torch.from_numpy(trimmed.trimming.vocabulary.kept_ids)
    for tied in (True, False):
        model = make_model("qwen3", **SMALL | {"tie_word_embeddings": tied})
        before = model.get_output_embeddings().weight.clone()
        model.config.pad_token_id, model.generation_config.suppress_tokens = int(kept[-2]), [int(kept[-1])]
        keep_rows(model, trimmed.trimming.vocabulary)
        torch.testing.assert_close(model.get_output_embeddings().weight, before[kept], rtol=0, atol=0)
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
        assert (model.config.vocab_size, model.config.pad_token_id) == (CUT, CUT - 2)
        assert model.generation_config.suppress_tokens == [CUT - 1]
    with pytest.raises(UserError, match=r"^vocabulary: got 320, allowed: the 280 rows of the model$"):
        keep_rows(model, trimmed.trimming.vocabulary)
    make_model("qwen3", **SMALL, vocab_size=VOCABULARY + 16).save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    metrics = distilled(layout, configured(submodel={"checkpoint": tmp_path, "vocab_size": CUT}), "taken")
    assert json.loads((layout.student("taken") / "config.json").read_text())["vocab_size"] == CUT
    assert metrics["kl_to_teacher"] > 0


def test_what_does_not_go_together_is_one_line_before_any_work(layout: Layout, own: Path, tmp_path: Path) -> None:
    config = configured(submodel={"checkpoint": own, "vocab_size": 290})
    with pytest.raises(UserError, match=r"^submodel\.vocab_coverage, vocab_size: got 'given, and .*its own', allowed"):
        require_checkpoint(own, layout.root / TEACHER, config.submodel, aligned=True)
    local = ["experiment=ci", "submodel=ci_tiny", "teacher=local", f"teacher.path={layout.root / TEACHER}"]
    teacher = load_configs(local)["ci_tiny"].teacher
    by_ids, by_words = (configured(submodel={"checkpoint": own}, distill=loss) for loss in ({}, ALIGNED))
    by_ids, by_words = (each.model_copy(update={"teacher": teacher}) for each in (by_ids, by_words))
    require_checkpoints([configured(), by_words])
    with pytest.raises(UserError, match=r"tokenizer of its own', .*; choose distill\.loss=aligned"):
        require_checkpoints([configured(), by_ids])
    with pytest.raises(UserError, match=r"^submodel\.checkpoint: got "):
        require_checkpoints([configured(submodel={"checkpoint": tmp_path})])
    with pytest.raises(UserError, match=r"^held-out text: got .*held_out\.npy', allowed: a file that stage=targets"):
        HeldOut.open(tmp_path)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("submodel", {"vocab_coverage": 1.5}, "less than or equal to 1"),
        ("submodel", {"vocab_coverage": 0}, "greater than 0"),
        ("submodel", {"vocab_size": 100}, "greater than or equal to 256"),
        ("distill", {"loss": "aligned"}, "with another loss choose signal=online"),
        ("distill", {"loss": "aligned", "signal": "online", "temperature": 2}, "aligned compares at temperature 1"),
    ],
)
def test_settings_that_contradict_are_refused(section: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        configured(**{section: values})


def test_a_family_whose_vocabularies_do_not_fit_is_refused_with_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(CONF_DIR, tmp_path / "conf")
    monkeypatch.setattr(config_module, "CONF_DIR", tmp_path / "conf")
    for name, settings in (("ci_small", {"vocab_coverage": 0.9}), ("ci_tiny", {"learns_from": "ci_small"})):
        path = tmp_path / "conf" / "submodel" / f"{name}.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text(encoding="utf-8")) | settings), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^submodel ci_tiny: learns_from: got 'ci_small', allowed: .*loss=aligned"):
        load_configs(["experiment=ci"])
    aligned = load_configs(["experiment=ci", "distill.loss=aligned", "distill.signal=online"])
    assert list(aligned) == ["ci_small", "ci_tiny"]


TRIMMED, CHILD = Link("a", trims=True), Link("b", "a")


@pytest.mark.parametrize(
    "links",
    [[TRIMMED, CHILD], [TRIMMED, Link("b", "a", learns_from="a")], [Link("a"), Link("b", trims=True, learns_from="a")]],
)
def test_what_is_cut_from_a_trimmed_one_has_its_vocabulary(links: list[Link]) -> None:
    require_vocabularies(links, aligned=False)


@pytest.mark.parametrize(
    ("links", "line"),
    [
        ([TRIMMED, Link("b", "a", trims=True)], "submodel b: vocab_coverage, vocab_size: got 'given, and cut from a'"),
        ([TRIMMED, Link("b", learns_from="a")], "submodel b: learns_from: got 'a', allowed: one with all"),
        ([TRIMMED, CHILD, Link("c", trims=True, learns_from="b")], "submodel c: learns_from: got 'b', allowed: one"),
    ],
)
def test_vocabularies_that_do_not_fit_each_other_are_refused(links: list[Link], line: str) -> None:
    with pytest.raises(UserError) as error:
        require_vocabularies(links, aligned=False)
    assert str(error.value).startswith(line)
    if "learns_from" in line:
        require_vocabularies(links, aligned=True)
