"""Who answers: torch in batches, a file in this process, a file in another one whose logits come through a pipe."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from edge_runtime.formats.errors import BackendError
from edge_runtime.formats.package import open_package
from edge_runtime.formats.signing import load_trust
from pipeline.evaluation.questions import Item, Probe, Questions, answer, make_task
from pipeline.evaluation.readers import PipedReader, TorchReader, Writer, open_reader
from pipeline.export.parity import piped_logits
from tests.pipeline.conftest import TEXTS, VOCABULARY, MakeModel
from tests.pipeline.gate_cases import Trial, make_trial


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel, tokenizer: Tokenizer) -> Trial:
    model = make_model("llama", num_hidden_layers=1, tie_word_embeddings=True)
    return make_trial(tmp_path_factory.mktemp("readers"), model, tokenizer, TEXTS)


@pytest.fixture(scope="module")
def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCABULARY, length).astype(np.int32) for length in (9, 30, 5, 17, 30)]


def test_torch_in_batches_says_what_each_sequence_alone_does(
    make_model: MakeModel, sequences: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = make_model("qwen3", num_hidden_layers=2)
    sizes = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: sizes.append(k["input_ids"].numel()) or forward(*a, **k))
    monkeypatch.setattr("pipeline.evaluation.readers._BATCH_LOGITS_BYTES", 4 * VOCABULARY * 60)
    found = {index: logits.copy() for index, logits in TorchReader(model).rows(sequences)}
    assert sizes == [60, 51] and sorted(found) == [0, 1, 2, 3, 4]
    for index, sequence in enumerate(sequences):
        with torch.no_grad():
            alone = forward(input_ids=torch.from_numpy(sequence[None].astype(np.int64))).logits[0].numpy()
        assert found[index].shape == alone.shape
        assert np.abs(found[index] - alone).max() < 1e-4


def test_torch_writes_what_generate_does(make_model: MakeModel, sequences: list[np.ndarray]) -> None:
    model: Any = make_model("llama")
    for sequence in sequences:
        ids = torch.from_numpy(sequence[None].astype(np.int64))
        wanted = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, len(sequence) :].tolist()
        reader = TorchReader(model)
        assert reader.write(sequence, 8, ()) == wanted
        assert reader.write(sequence, 8, (wanted[4],)) == wanted[: wanted.index(wanted[4])]


@pytest.mark.parametrize("container", ["onnx", "tflite"])
def test_a_file_answers_and_writes_from_its_own_logits(
    trial: Trial, sequences: list[np.ndarray], container: str
) -> None:
    package = open_package(trial.package, load_trust())
    with open_reader(container, package.container_directory(container), trial.spec, threads=1) as reader:
        first = {index: logits.copy() for index, logits in reader.rows(sequences)}
        again = {index: logits.copy() for index, logits in reader.rows(sequences[::-1])}
        assert isinstance(reader, Writer)
        written = reader.write(sequences[0], 6, ())
        longer = np.concatenate([sequences[0], written]).astype(np.int32)
        ((_, logits),) = reader.rows([longer])
        assert written == logits[len(sequences[0]) - 1 : -1].argmax(axis=1).tolist()
        full = reader.write(np.resize(sequences[1], trial.spec.context_tokens), 6, ())
    assert len(full) == 1, "the context is full after the prompt"
    for index in range(len(sequences)):  # no sequence sees another
        assert np.array_equal(first[index], again[len(sequences) - 1 - index])


def test_a_pipe_brings_what_the_file_says_in_this_process(trial: Trial, sequences: list[np.ndarray]) -> None:
    piped = PipedReader(Path(sys.executable), trial.package, "onnx", threads=1)
    assert not isinstance(piped, Writer)
    items = [Item(str(number), tuple(Probe(number, 3, (token,)) for token in (5, 6, 7, 8))) for number in range(5)]
    questions = Questions(tuple(sequences), (make_task("t", items, exact=False),))
    package = open_package(trial.package, load_trust())
    with open_reader("onnx", package.container_directory("onnx"), trial.spec, threads=1) as reader:
        here = {index: logits.copy() for index, logits in reader.rows(sequences)}
    there = {index: logits.copy() for index, logits in piped.rows(sequences)}
    assert sorted(there) == [0, 1, 2, 3, 4]
    assert all(np.array_equal(here[index], there[index]) for index in here)
    assert np.array_equal(answer(questions, here.items())["t"].said, answer(questions, there.items())["t"].said)


def test_what_the_other_process_complains_of_is_said_here(trial: Trial, tmp_path: Path) -> None:
    too_long = np.zeros((1, trial.spec.context_tokens + 1), np.int32)
    with pytest.raises(BackendError, match=f"exit 2.*at most {trial.spec.context_tokens}"):
        list(piped_logits(Path(sys.executable), trial.package, "onnx", too_long, threads=1))
    mute = tmp_path / "python"
    mute.write_text("#!/bin/sh\nexit 0\n")
    mute.chmod(0o755)
    with pytest.raises(BackendError, match="its logits end early"):
        list(piped_logits(mute, trial.package, "onnx", np.zeros((1, 4), np.int32), threads=1))


def test_a_reader_that_stops_listening_leaves_no_process_and_no_open_file(trial: Trial) -> None:
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    before, others = set(os.listdir("/proc/self/fd")), set(children.read_text().split())
    stream = piped_logits(Path(sys.executable), trial.package, "onnx", np.zeros((64, 48), np.int32), threads=1)
    assert next(stream).shape == (48, VOCABULARY)
    assert set(children.read_text().split()) > others
    stream.close()
    assert set(children.read_text().split()) <= others and set(os.listdir("/proc/self/fd")) == before
