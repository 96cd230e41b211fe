"""Logits layer by layer against transformers' own forward pass, with a checkpoint's weights and with codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_runtime.formats.int4 import load_weights
from pipeline.export.checkpoint import load_student
from pipeline.export.parity import load_dequantized
from pipeline.quantization import calibration, streamed_logits
from pipeline.quantization import source as source_module
from pipeline.quantization.grid import Grid
from pipeline.quantization.source import Checkpoint, open_checkpoint
from pipeline.quantization.streamed_logits import StreamedModel
from pipeline.quantization.streaming import quantize_checkpoint

from .conftest import VOCABULARY, MakeModel

ONE_SCALE = Grid(8, 0, True)
CASES = [(architecture, tied) for architecture in ("llama", "mistral", "qwen2", "qwen3") for tied in (True, False)]


@pytest.fixture(scope="module")
def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY, length).astype(np.int32) for length in (9, 40, 5, 17, 40, 1)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches, several groups of sequences, several blocks of the embedding and of the head."""
    monkeypatch.setattr(source_module, "BLOCK_WEIGHTS", 64 * 64)
    monkeypatch.setattr(streamed_logits, "BATCH_TOKENS", 60)
    monkeypatch.setattr(streamed_logits, "_LOGITS_BYTES", 4 * VOCABULARY * 50)
    monkeypatch.setattr(streamed_logits, "_HEAD_BLOCK_WEIGHTS", 64 * 100)


def _source(
    make_model: MakeModel, folder: Path, architecture: str, dtype: torch.dtype = torch.float32, **sizes: Any
) -> Checkpoint:
    make_model(architecture, **sizes).to(dtype).save_pretrained(folder)
    return open_checkpoint(folder, 40, 32)


def _require_same(model: Any, streamed: StreamedModel, sequences: list[np.ndarray]) -> None:
    found = {index: logits.copy() for index, logits in streamed.rows(sequences)}
    assert sorted(found) == list(range(len(sequences)))
    for index, sequence in enumerate(sequences):
        with torch.no_grad():
            alone = model(input_ids=torch.from_numpy(sequence[None].astype(np.int64))).logits[0].numpy()
        assert found[index].dtype == np.float32
        np.testing.assert_allclose(found[index], alone, rtol=1e-5, atol=1e-5 * np.abs(alone).max())


@pytest.mark.parametrize(("architecture", "tied"), CASES)
def test_streamed_logits_are_the_models_own(
    make_model: MakeModel, tmp_path: Path, sequences: list[np.ndarray], architecture: str, tied: bool
) -> None:
    source = _source(make_model, tmp_path, architecture, tie_word_embeddings=tied, intermediate_size=100)
    _require_same(load_student(tmp_path), StreamedModel.open(source), sequences)


@pytest.mark.parametrize(("architecture", "tied"), CASES)
@pytest.mark.parametrize("grid", [Grid(4, 32, False), ONE_SCALE], ids=["int4", "legacy"])
def test_codes_stand_in_the_place_of_weights(
    make_model: MakeModel, tmp_path: Path, sequences: list[np.ndarray], architecture: str, tied: bool, grid: Grid
) -> None:
    source = _source(make_model, tmp_path, architecture, tie_word_embeddings=tied, intermediate_size=100)
    quantize_checkpoint(source, source.grids(grid), "rtn", tmp_path / "codes", tmp_path / "work")
    _, weights = load_weights(tmp_path / "codes")
    expected = load_dequantized(load_student(tmp_path), weights)
    _require_same(expected, StreamedModel.open(source, weights), sequences)


def test_a_bf16_checkpoint_is_computed_in_fp32(
    make_model: MakeModel, tmp_path: Path, sequences: list[np.ndarray]
) -> None:
    source = _source(make_model, tmp_path, "qwen2", dtype=torch.bfloat16)
    _require_same(load_student(tmp_path), StreamedModel.open(source), sequences)


def test_states_are_kept_and_read_again(make_model: MakeModel, tmp_path: Path, sequences: list[np.ndarray]) -> None:
    streamed = StreamedModel.open(_source(make_model, tmp_path, "llama"))
    states = streamed.states(sequences)
    first, again = ([logits.copy() for logits in streamed.logits(states)] for _ in range(2))
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    assert [len(logits) for logits in first] == [len(sequence) for sequence in sequences]


def test_one_layer_is_in_memory_at_a_time(
    make_model: MakeModel, tmp_path: Path, sequences: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed, largest = StreamedModel.open(_source(make_model, tmp_path, "llama")), []
    original = calibration._advance

    def watched(decoder: Any, layer: Any, hidden: Any) -> None:
        largest.append(sum(p.numel() for p in decoder.model.parameters() if not p.is_meta))
        original(decoder, layer, hidden)

    monkeypatch.setattr(calibration, "_advance", watched)
    streamed.states(sequences)
    layer = sum(p.numel() for p in streamed.decoder.model.model.layers[0].parameters())
    assert largest == [layer] * 3 and all(p.is_meta for p in streamed.decoder.model.parameters())


def test_nothing_gives_nothing(make_model: MakeModel, tmp_path: Path) -> None:
    assert list(StreamedModel.open(_source(make_model, tmp_path, "llama")).logits([])) == []
