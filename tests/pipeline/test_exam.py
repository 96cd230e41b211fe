"""What answers say of a container: the table, the verdicts, the gate's reasons, the examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from pipeline.evaluation.exam import Exam, flips, recovery_reasons, recovery_table, sit
from pipeline.evaluation.questions import Answers, Item, Probe, Questions, make_task
from pipeline.evaluation.recovery import Bounds, compare
from pipeline.evaluation.task_files import WorkedTask
from pipeline.settings import Config
from pipeline.stages.evaluate import gate_reasons

ITEMS = 400
BOUNDS = Bounds(items_min=300, above_chance_min=0.2, confidence=0.95, resamples=500, seed=1)


@pytest.fixture(scope="module")
def exam(tokenizer: Tokenizer) -> Exam:
    """Two tasks over one text: choices of four, and words to be written; one whose answers are worked."""
    text = np.array([1, *tokenizer.encode("return x + 1 * y", add_special_tokens=False).ids], np.int32)
    word = int(text[3])
    choose = [
        Item(f"d{number // 4}", tuple(Probe(0, 2, (token,)) for token in (word, 5, 6, 7))) for number in range(ITEMS)
    ]
    write = [Item(f"d{number // 4}", (Probe(0, 2, (word if number else 9,)),)) for number in range(ITEMS)]
    worked = WorkedTask("sums", (text,) * 4, ("3", "3", "4", "5"), ("(.)",) * 4, np.arange(4))
    questions = Questions((text,), (make_task("choose", choose, exact=False), make_task("write", write, exact=True)))
    return Exam(questions, (worked,), tokenizer, (1,), 8)


def said(right: int, total: int = ITEMS) -> Answers:
    """The first ones right."""
    correct = np.arange(total) < right
    return Answers(correct, np.where(correct, 0, 2))


@pytest.fixture
def answered() -> Callable[[int], dict[str, Answers]]:
    def answer(right: int) -> dict[str, Answers]:
        correct = np.arange(ITEMS) < right
        return {
            "choose": Answers(correct, np.where(correct, 0, 2)),
            "write": Answers(correct, np.where(correct, -1, 9)),
        }

    return answer


def test_the_table_compares_each_container_with_fp_and_apart_with_the_teacher(exam: Exam, answered: Any) -> None:
    teacher = {"choose": said(390).correct}
    table = recovery_table(exam, answered(320), teacher, {"onnx": answered(312)}, BOUNDS, 0.95)
    assert list(table) == ["choose", "write"], "worked answers were not asked of the file"
    entry, clusters = table["choose"]["containers"]["onnx"], exam.questions.tasks[0].clusters
    expected = compare(said(320).correct, said(312).correct, clusters, 0.25, BOUNDS)
    assert entry["low"] == round(expected.low or 0, 6) and entry["lost"] == 8 and entry["gained"] == 0
    to_teacher = compare(teacher["choose"], said(312).correct, clusters, 0.25, BOUNDS)
    assert entry["to_teacher"] == to_teacher.to_dict()
    assert table["choose"]["items"] == ITEMS and table["choose"]["documents"] == 100
    assert (table["choose"]["accuracy_fp"], table["choose"]["accuracy_teacher"]) == (0.8, 0.975)
    assert table["write"]["accuracy_teacher"] is None and table["write"]["containers"]["onnx"]["to_teacher"] is None


def test_the_lower_end_decides_and_not_the_mean(exam: Exam, answered: Any) -> None:
    def reasons(right: int, needed: float, bounds: Bounds = BOUNDS) -> list[str]:
        table = recovery_table(exam, answered(320), {}, {"onnx": answered(right)}, bounds, needed)
        return recovery_reasons({"choose": table["choose"]}, ["onnx"], needed)

    found = recovery_table(exam, answered(320), {}, {"onnx": answered(312)}, BOUNDS, 0.9)["choose"]["containers"][
        "onnx"
    ]
    assert found["low"] < found["recovery"] - 0.005
    assert reasons(312, found["low"]) == []
    (reason,) = reasons(312, (found["low"] + found["recovery"]) / 2)
    assert reason.startswith("onnx: choose keeps 96.4 %, at least 9") and reason.endswith("is needed")


def test_a_task_that_decides_nothing_is_never_passed_and_none_at_all_fails(exam: Exam, answered: Any) -> None:
    few = Bounds(items_min=ITEMS + 1, above_chance_min=0.2, confidence=0.95, resamples=500, seed=1)
    guessing = answered(120)  # 0.3 at a chance of 0.25
    for fp, bounds in ((answered(320), few), (guessing, BOUNDS)):
        table = recovery_table(exam, fp, {}, {"onnx": fp, "tflite": fp}, bounds, 0.95)
        entry = table["choose"]["containers"]["onnx"]
        assert entry["recovery"] == 1.0 and entry["verdict"] == "not decidable"
        reasons = recovery_reasons({"choose": table["choose"]}, ["onnx", "tflite"], 0.95)
        assert [reason.partition(":")[0] for reason in reasons] == ["onnx", "tflite"]
        assert "no task decides" in reasons[0]
    assert "no task decides" in recovery_reasons({}, ["onnx"], 0.95)[0]


def test_one_failing_task_of_one_container_is_enough(exam: Exam, answered: Any) -> None:
    found = {"onnx": answered(320), "tflite": answered(320) | {"write": answered(200)["write"]}}
    table = recovery_table(exam, answered(320), {}, found, BOUNDS, 0.95)
    choose, write = (table[name]["containers"] for name in ("choose", "write"))
    assert choose["tflite"]["verdict"] == choose["onnx"]["verdict"] == "passed"
    # Of written answers the commonest one is the chance: nobody beats it here, and the task decides nothing.
    assert write["tflite"]["verdict"] == "not decidable"
    worse = {"onnx": answered(320), "tflite": answered(290)}
    table = recovery_table(exam, answered(320), {}, worse, BOUNDS, 0.95)
    reasons = recovery_reasons(table, ["onnx", "tflite"], 0.95)
    assert len(reasons) == 1 and reasons[0].startswith("tflite: choose keeps 86.4 %")
    assert recovery_reasons(table, ["onnx"], 0.95) == [], "what is not gated does not count"


def test_a_gate_names_recovery_beside_the_other_bounds(
    ci_configs: dict[str, Config], exam: Exam, answered: Any
) -> None:
    gate = ci_configs["ci_small"].gate.model_copy(update={"recovery_min": 0.95})
    figures = {"perplexity": 10.0, "top1_to_fp": 0.99, "weight_bytes": 25}
    result = {
        "packages": {"onnx": figures, "tflite": figures, "gguf": dict.fromkeys(figures)}, "perplexity_fp": 10.0,
        "fp16_weight_bytes": 100, "kl_to_teacher": 1.0, "kl_to_teacher_from_scratch": 2.0,
    }  # fmt: skip
    for right, expected in ((320, 0), (290, 2)):
        found = {name: answered(right) for name in ("onnx", "tflite")}
        table = recovery_table(exam, answered(320), {}, found, BOUNDS, 0.95)
        assert len(gate_reasons(result | {"recovery": {"tasks": table}}, gate)) == expected
    assert gate_reasons(result | {"packages": {}, "recovery": {"tasks": {}}}, gate) == [
        "none of the gated containers was made: onnx, tflite"
    ]


def test_examples_show_the_prompt_and_what_both_said(exam: Exam, answered: Any, tokenizer: Tokenizer) -> None:
    text = exam.questions.sequences[0].tolist()
    right, wrong = tokenizer.decode([text[3]]), tokenizer.decode([6])
    examples = flips(exam, answered(320), answered(312))
    assert [example["task"] for example in examples] == ["choose"] * 3 + ["write"] * 3
    wanted = {"prompt": tokenizer.decode(text[1:3]), "answer": right, "fp": right}
    assert examples[0] == {**wanted, "task": "choose", "found": wrong}
    assert examples[3] == {**wanted, "task": "write", "found": tokenizer.decode([9])}
    assert flips(exam, answered(320), answered(320)) == []
    worked = {"sums": Answers(np.array([True, True, False, False]), np.full(4, -1), ("3", "3", "?", "?"))}
    other = {"sums": Answers(np.array([True, False, False, True]), np.full(4, -1), ("3", "7", "?", "5"))}
    found = [(each["answer"], each["fp"], each["found"]) for each in flips(exam, worked, other)]
    assert found == [("3", "3", "7"), ("5", "?", "5")]


def test_only_who_can_write_is_asked_to(exam: Exam) -> None:
    class Silent:
        def rows(self, sequences: Any) -> Any:
            return ((index, np.zeros((len(each), 320), np.float32)) for index, each in enumerate(sequences))

    class Talking(Silent):
        def write(self, prompt: np.ndarray, most_tokens: int, ends: Any) -> list[int]:
            return []

    assert set(sit(exam, Silent())) == {"choose", "write"}
    assert set(sit(exam, Talking())) == {"choose", "write", "sums"}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["runtime.tasks=[]"], "runtime: tasks and task_files must name at least one task"),
        (["runtime.tasks=[cloze,cloze]"], "each once"),
        (["runtime.task_files=[a/cloze.jsonl]"], "each once"),
        (["runtime.tasks=[clozes]"], "runtime.tasks.0: got 'clozes', allowed: 'cloze', 'pairing'"),
        (["gate.recovery_min=0"], "gate.recovery_min: got 0"),
        (["gate.items_min=0"], "gate.items_min: got 0"),
        (["gate.above_chance_min=1"], "gate.above_chance_min: got 1"),
        (["runtime.task_files=[a.jsonl]", "runtime.answer_tokens=256"], "runtime.answer_tokens must be below"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], says: str) -> None:
    from edge_runtime.formats.errors import ConfigError
    from pipeline.config import load_configs

    with pytest.raises(ConfigError) as caught:
        load_configs(overrides)
    assert says in str(caught.value)


def test_a_wrong_task_file_is_refused_before_any_work(tmp_path: Path) -> None:
    from edge_runtime.formats.errors import UserError
    from pipeline.config import load_configs
    from pipeline.plan import require_sources

    (tmp_path / "mine.jsonl").write_text("{}\n")
    config = load_configs(["experiment=ci", f"runtime.task_files=[{tmp_path}/mine.jsonl]", "runtime.answer_tokens=8"])
    with pytest.raises(UserError, match=r"mine\.jsonl line 1: prompt"):
        require_sources(config["ci_small"])
