"""A phone-class installation: ``pip install .[edge]`` alone generates from a package, with an adapter too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from edge_runtime.formats.int4 import load_weights
from pipeline.artifacts import PROJECT, file_digest
from pipeline.export.parity import load_dequantized
from tests.flows.conftest import FinishedRun, run_edge

pytestmark = [pytest.mark.flow, pytest.mark.slow, pytest.mark.xdist_group("run")]
WORKSTATION_ONLY = ("torch", "transformers", "mlflow", "dvc", "hydra", "onnx", "peft")
NEW_TOKENS = 12
PROMPT = "The function returns a new"


@pytest.fixture(scope="module")
def edge_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edge")
    python = folder / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    subprocess.run(
        [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-c", "constraints.txt", ".[edge]"],
        cwd=PROJECT,
        check=True,
    )
    return python


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
def test_edge_install_generates_what_torch_does(finished, student, adapter, edge_python, container, with_adapter):
    arguments = ["--adapter", str(adapter)] if with_adapter else []
    done = run_edge(
        edge_python, "generate", "--package", str(finished.layout.package("ci_small")), "--container", container,
        "--prompt", PROMPT, "--max-tokens", str(NEW_TOKENS), "--temperature", "0", "--json", *arguments,
        project=Path("/"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["backend"] == container
    expected = greedy(student, finished, adapter if with_adapter else None)
    assert answer["tokens"][:NEW_TOKENS] == expected[: len(answer["tokens"])]


def test_adapter_changes_the_text(finished, student, adapter):
    assert greedy(student, finished, None) != greedy(student, finished, adapter)


def greedy(student, finished: FinishedRun, adapter: Path | None) -> list[int]:
    """Greedy continuation by transformers, with PEFT where an adapter is given."""
    from peft import PeftModel

    ids = tokenizer_of(finished).encode(PROMPT).ids
    model = PeftModel.from_pretrained(student, adapter) if adapter else student
    tokens = list(ids)
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    if adapter:
        model.unload()
    return tokens[len(ids) :]


def tokenizer_of(finished: FinishedRun) -> Tokenizer:
    return Tokenizer.from_file(str(finished.layout.teacher / "tokenizer.json"))
