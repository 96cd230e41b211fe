"""A submodel whose context is stretched and trained at the end of its distillation, as far as the shipped file."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

from edge_runtime.formats.errors import UserError
from pipeline.artifacts import Layout, read_json
from pipeline.config import load_configs
from pipeline.flow import SHIP, STAGES, execute
from tests.flows.conftest import FinishedRun
from tests.flows.stages_here import in_this_process, layout_beside

pytestmark = [pytest.mark.flow, pytest.mark.xdist_group("run")]
SETTINGS = [
    "experiment=ci", "submodel=ci_tiny", "family=[ci_tiny]", "distill.steps=4", "distill.context.factor=2",
    "distill.context.steps=3", "distill.context.sequence_tokens=160", "export.containers=[onnx,tflite]",
    "export.accuracy_level=0",
]  # fmt: skip
OWN_TOKENS = 2048


@pytest.fixture(scope="module")
def shipped(finished: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    layout = layout_beside(finished, tmp_path_factory.mktemp("long") / "run")
    config = load_configs(SETTINGS)["ci_tiny"]
    with in_this_process():
        for stage in ("distill", *SHIP):
            execute(STAGES[stage], config, layout)
    return layout


def test_the_checkpoint_says_how_it_was_stretched(shipped: Layout) -> None:
    config = json.loads((shipped.student("ci_tiny") / "config.json").read_text(encoding="utf-8"))
    rope = config["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 2, OWN_TOKENS)
    assert config["max_position_embeddings"] == 2 * OWN_TOKENS
    assert AutoModelForCausalLM.from_pretrained(shipped.student("ci_tiny")).config.rope_parameters == rope


def test_both_patterns_are_measured_after_it(shipped: Layout) -> None:
    found = read_json(shipped.metrics("distill", "ci_tiny"))["long_context"]
    assert [row["step"] for row in found["history"]] == [1, 2, 3] and found["tokens"] == 160
    assert found["recall"].keys() == found["perplexity"].keys() == {"full", f"window {OWN_TOKENS - 4} + 4 sinks"}
    for rows in found["recall"].values():
        assert [(row["depth"], row["trials"]) for row in rows] == [(depth, 8) for depth in (0, 0.25, 0.5, 0.75, 1)]
    full, windowed = (rows[0]["perplexity"] for rows in found["perplexity"].values())
    assert full == pytest.approx(windowed, rel=1e-4), "the window holds all of so short a text"


def test_the_shipped_files_compute_the_stretched_model(shipped: Layout) -> None:
    """The export stage compares every container with transformers itself, and would not have finished."""
    found = read_json(shipped.metrics("evaluate", "ci_tiny"))
    assert found["gate"]["passed"], found["gate"]
    assert found["packages"]["onnx"]["exact_max_abs"] <= 1e-4
    assert found["packages"]["tflite"]["perplexity"] == pytest.approx(found["perplexity_fp"], rel=0.05)


def test_sequences_beyond_the_context_are_refused_before_training(finished: FinishedRun, shipped: Layout) -> None:
    config = load_configs([*SETTINGS, "distill.context.sequence_tokens=5000"])["ci_tiny"]
    with in_this_process(), pytest.raises(UserError, match=r"distill\.context\.sequence_tokens: got 5000.* 4096"):
        execute(STAGES["distill"], config, shipped)
