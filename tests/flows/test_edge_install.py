"""A phone-class installation: ``pip install .[edge]`` alone generates from a package, with an adapter too."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from edge_runtime.formats.int4 import load_weights
from pipeline.artifacts import file_digest
from pipeline.export.parity import compare_logits, load_dequantized
from tests.flows.conftest import FinishedRun, run_edge

pytestmark = [pytest.mark.flow, pytest.mark.slow, pytest.mark.xdist_group("run")]
WORKSTATION_ONLY = ("torch", "transformers", "mlflow", "dvc", "hydra", "onnx", "peft")
NEW_TOKENS = 12
AGREEMENT = 0.03  # of the logits' standard deviation: int8 activations
PROMPT = "The function returns a new"
BOS_ID = 1  # in training every text follows the end of another


@pytest.fixture(scope="module")
def student(finished: FinishedRun):
    """The shipped codes as a transformers model: the oracle."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(finished.layout.student("ci_small"), dtype=torch.float32)
    _, weights = load_weights(finished.layout.weights("ci_small") / "weights.safetensors")
    return load_dequantized(model, weights).eval()


@pytest.fixture(scope="module")
def adapter(finished: FinishedRun, student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT adapter that learnt one sentence, bound to the package's base."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    wrapped = get_peft_model(student, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    lesson = torch.tensor([tokenizer_of(finished).encode(PROMPT + " dictionary of sorted keys and values").ids])
    for _ in range(60):
        optimizer.zero_grad()
        wrapped(input_ids=lesson, labels=lesson).loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    wrapped.save_pretrained(folder)
    wrapped.unload()
    base = file_digest(finished.layout.weights("ci_small") / "weights.safetensors")
    (folder / "base.json").write_text(json.dumps({"base_digest": base}))
    return folder


def test_environment_holds_nothing_of_the_workstation(edge_python):
    found = subprocess.run(
        [
            str(edge_python),
            "-c",
            f"import importlib.util as u; print([n for n in {WORKSTATION_ONLY} if u.find_spec(n)])",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("container", ["onnx", "tflite"])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_edge_install_generates_greedily_what_torch_finds_likeliest(
    finished, student, adapter, edge_python, container, with_adapter
):
    arguments = ["--adapter", str(adapter)] if with_adapter else []
    done = run_edge(
        edge_python, "generate", "--package", str(finished.layout.package("ci_small")), "--container", container,
        "--prompt", PROMPT, "--max-tokens", str(NEW_TOKENS), "--temperature", "0", "--json", *arguments,
        project=Path("/"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["backend"] == container and 4 <= len(answer["tokens"]) <= NEW_TOKENS, "an end of text may come first"
    prompt = [BOS_ID, *tokenizer_of(finished).encode(PROMPT).ids]
    logits = torch_logits(student, prompt + answer["tokens"], adapter if with_adapter else None)[len(prompt) - 1 : -1]
    for step, token in zip(logits, answer["tokens"], strict=True):
        # int8 activations move a logit by a few hundredths of the spread; a wrong graph by whole spreads
        assert float(step.max() - step[token]) <= 0.1 * float(step.std())


@pytest.mark.parametrize("container", ["onnx", "tflite"])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_edge_install_scores_as_torch_does(finished, student, adapter, edge_python, container, with_adapter, tmp_path):
    tokens = np.load(finished.layout.targets / "held_out.npy")[:1]
    np.save(tmp_path / "tokens.npy", tokens)
    arguments = ["--adapter", str(adapter)] if with_adapter else []
    done = run_edge(
        edge_python, "bench", "--package", str(finished.layout.package("ci_small")), "--container", container,
        "--repeat", "0", "--score", str(tmp_path / "tokens.npy"), "--logits-out", str(tmp_path / "logits.npy"),
        "--json", *arguments, project=Path("/"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = torch_logits(student, tokens[0].tolist(), adapter if with_adapter else None).numpy()
    parity = compare_logits(expected, np.load(tmp_path / "logits.npy")[0])
    assert parity.rms_ratio <= AGREEMENT and parity.top1 >= 0.95


def test_adapter_changes_what_is_likeliest(finished, student, adapter):
    tokens = tokenizer_of(finished).encode(PROMPT).ids
    base, adapted = (torch_logits(student, tokens, a) for a in (None, adapter))
    change = compare_logits(base.numpy(), adapted.numpy())
    assert change.rms_ratio > 3 * AGREEMENT, "an adapter that is ignored would pass the comparisons above"
    assert change.top1 < 0.5


def torch_logits(student, tokens: list[int], adapter: Path | None) -> torch.Tensor:
    """(T, V) by transformers, with PEFT where an adapter is given."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(student, adapter) if adapter else student
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens])).logits[0].float()
    if adapter:
        model.unload()
    return logits


def tokenizer_of(finished: FinishedRun) -> Tokenizer:
    return Tokenizer.from_file(str(finished.layout.teacher / "tokenizer.json"))
