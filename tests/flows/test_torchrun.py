"""Two processes under torchrun learn what one learns: whole copies (DDP) and spread parameters (FSDP2), on CPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from pipeline.distillation.objectives import next_token_objective
from pipeline.distillation.trainer import train
from tests.flows.torchrun_training import SHORT, TWO, train_on_policy
from tests.pipeline.exact_model import ANSWERS, Exact

pytestmark = pytest.mark.flow
PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What two processes left; they have ended."""
    folder = tmp_path_factory.mktemp("torchrun")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "tests.flows.torchrun_training", str(folder),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    yield folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Exact, list[dict[str, float]]]:
    """The same training in this process, each batch whole."""
    model, plan = Exact(), replace(TWO, micro_sequences=None)
    return model, train(model, next_token_objective, ANSWERS, plan, tmp_path_factory.mktemp("alone"), "alone")


@pytest.mark.parametrize("name", ["none", "fsdp", "none-resumed", "fsdp-resumed"])
def test_two_processes_end_with_the_weights_of_one(
    trained: Path, alone: tuple[Exact, list[dict[str, float]]], name: str
) -> None:
    """Although each sees answers of other lengths, cut into micro-batches, and was perhaps ended in the middle."""
    model, history = alone
    for index in (0, 1):
        found = load_file(trained / f"{name}.{index}.safetensors")
        assert list(found) == sorted(model.state_dict())
        for key, expected in model.state_dict().items():
            torch.testing.assert_close(found[key], expected, rtol=0, atol=1e-12, msg=lambda text, k=key: f"{k}: {text}")
        assert json.loads((trained / f"{name}.{index}.json").read_text()) == history


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_a_student_of_its_own_text_too(trained: Path, tmp_path: Path, sharding: str) -> None:
    """transformers' Llama in float32: hidden states, tied head, sampling through the cache."""
    student, history = train_on_policy(replace(SHORT, micro_sequences=None), tmp_path)
    stored = LlamaForCausalLM.from_pretrained(trained / f"{sharding}-student.0")
    assert stored.lm_head.weight is stored.model.embed_tokens.weight
    found = stored.state_dict()
    for key, expected in student.state_dict().items():
        torch.testing.assert_close(found[key], expected, rtol=0, atol=2e-6, msg=lambda text, k=key: f"{k}: {text}")
    losses = [entry["loss"] for entry in json.loads((trained / f"{sharding}-student.0.json").read_text())]
    assert losses == pytest.approx([entry["loss"] for entry in history], abs=2e-5)


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_a_resumed_run_has_the_same_bits(trained: Path, sharding: str) -> None:
    once, twice = (load_file(trained / f"{name}.0.safetensors") for name in (sharding, f"{sharding}-resumed"))
    assert all(torch.equal(once[key], twice[key]) for key in once)


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_what_two_began_one_can_end(trained: Path, alone: tuple[Exact, list[dict[str, float]]], sharding: str) -> None:
    model, history = alone
    found, steps = Exact(), []
    observed = train(
        found, lambda module, batch: (steps.append(batch.step), next_token_objective(module, batch))[1], ANSWERS,
        replace(TWO, micro_sequences=None), trained / f"{sharding}-state", "ended by one",
    )  # fmt: skip
    assert steps == [9, 10], "two processes kept the state of step 9"
    assert observed == history
    for parameter, expected in zip(found.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-12)


def test_a_batch_that_processes_cannot_share_is_refused_by_each(trained: Path) -> None:
    for index in (0, 1):
        text = (trained / f"odd-{index}.txt").read_text()
        assert text.startswith("UserError: batch_sequences: got 3, allowed: a multiple of the 2 processes")
