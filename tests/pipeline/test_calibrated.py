"""Checkpoints quantized layer by layer: the walk against whole models, order of quality, interruption."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_runtime.formats.errors import ExportError
from edge_runtime.formats.int4 import QuantizedTensor, dequantize
from pipeline.quantization import calibrated, calibration
from pipeline.quantization.calibrated import Calibration, quantize_calibrated
from pipeline.quantization.calibration import Decoder, embed, head_statistic, load_model, pass_layer
from pipeline.quantization.grid import Grid
from pipeline.quantization.scales import quantize_weighted
from pipeline.quantization.source import Checkpoint, open_checkpoint

from .conftest import VOCABULARY, MakeModel
from .quantization_cases import divergence

GRID = Grid(4, 32, True)
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (6, 40)).astype(np.int32)
CASES = [
    ("llama", {"tie_word_embeddings": True}), ("mistral", {}), ("qwen2", {"intermediate_size": 100}),
    ("qwen3", {"tie_word_embeddings": True, "intermediate_size": 172}),
]  # fmt: skip


def _source(make_model: MakeModel, folder: Path, architecture: str = "llama", **sizes: Any) -> Checkpoint:
    make_model(architecture, num_hidden_layers=2, **sizes).save_pretrained(folder)
    return open_checkpoint(folder, 40, 32)


def _quantize(source: Checkpoint, work: Path, rounding: Any = "gptq") -> Mapping[str, Any]:
    return quantize_calibrated(source, TOKENS, Calibration(rounding, source.grids(GRID)), work, "test")


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.from_numpy(TOKENS.astype(np.int64))).logits
    return logits


@pytest.mark.parametrize(("architecture", "sizes"), CASES, ids=[case[0] for case in CASES])
def test_the_walk_sees_what_the_model_computes(
    make_model: MakeModel, tmp_path: Path, architecture: str, sizes: dict[str, Any]
) -> None:
    source = _source(make_model, tmp_path / "model", architecture, **sizes)
    model = make_model(architecture, num_hidden_layers=2, **sizes)
    decoder = Decoder.open(source)
    hidden = embed(decoder, TOKENS, None)
    for index in range(decoder.num_layers):
        pass_layer(decoder, index, hidden)
    with torch.no_grad():
        last = model.model(torch.from_numpy(TOKENS.astype(np.int64))).last_hidden_state.flatten(0, 1).double()
    torch.testing.assert_close(head_statistic(decoder, hidden, whole_hessian=True).double(), last.T @ last,
                               rtol=1e-4, atol=1e-3)  # fmt: skip
    torch.testing.assert_close(head_statistic(decoder, hidden, whole_hessian=False).double(), last.square().sum(0),
                               rtol=1e-4, atol=1e-3)  # fmt: skip
    torch.testing.assert_close(_logits(load_model(source)), _logits(model), rtol=1e-4, atol=1e-4)


def test_every_matrix_is_judged_by_its_input_in_the_quantized_model(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _source(make_model, tmp_path / "model", tie_word_embeddings=True)
    seen: dict[str, torch.Tensor] = {}
    original = calibrated.quantize_with_hessian

    def watched(weight: Any, hessian: torch.Tensor, grid: Grid, *, name: str, **named: Any) -> QuantizedTensor:
        seen[name] = hessian.clone()
        return original(weight, hessian, grid, name=name, **named)

    monkeypatch.setattr(calibrated, "quantize_with_hessian", watched)
    codes = _quantize(source, tmp_path / "work")
    model = load_model(source)
    with torch.no_grad():
        for name in source.matrices:
            model.get_parameter(name).copy_(torch.from_numpy(dequantize(codes[name])))
    for name, hessian in seen.items():
        if name.startswith("model.layers"):
            found: list[torch.Tensor] = []
            module = model.get_submodule(name.removesuffix(".weight"))
            handle = module.register_forward_pre_hook(lambda _m, given, kept=found: kept.append(given[0].flatten(0, 1)))
            _logits(model)
            handle.remove()
            torch.testing.assert_close(hessian, found[0].T @ found[0], rtol=1e-3, atol=1e-3)
    assert len(seen) == 1 + 2 * 4


@pytest.mark.parametrize("tied", [True, False])
def test_calibrated_codes_diverge_less_and_gptq_least(make_model: MakeModel, tmp_path: Path, tied: bool) -> None:
    source = _source(make_model, tmp_path / "model", "qwen2", tie_word_embeddings=tied)
    decoder = Decoder.open(source)
    plain = {name: quantize_weighted(decoder.read(name), None, GRID) for name in source.matrices}
    weighted, gptq = (_quantize(source, tmp_path / rounding, rounding) for rounding in ("weighted_mse", "gptq"))
    divergences = [divergence(load_model(source), codes, TOKENS) for codes in (plain, weighted, gptq)]
    assert divergences[2] < 0.75 * divergences[1] < 0.75 * 1.05 * divergences[0]
    vectors = [name for name in source.tensors if name not in source.matrices]
    for name in vectors:
        assert (gptq[name] == decoder.read(name).numpy()).all()
    assert set(gptq) == set(source.tensors)


def test_a_run_that_ended_early_goes_on_and_ends_with_the_same_bytes(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _source(make_model, tmp_path / "model")
    _quantize(source, tmp_path / "whole")
    store, written = calibrated._store, []

    def stop(path: Path, *rest: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        store(path, *rest)
        written.append(path.name)

    monkeypatch.setattr(calibrated, "_store", stop)
    with pytest.raises(KeyboardInterrupt):
        _quantize(source, tmp_path / "cut")
    monkeypatch.setattr(calibrated, "_store", lambda path, *rest: (written.append(path.name), store(path, *rest)))
    _quantize(source, tmp_path / "cut")
    assert written == [
        "embedding.safetensors",
        "layer-00000.safetensors",
        "layer-00001.safetensors",
        "head.safetensors",
    ]
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()
    assert len(list((tmp_path / "cut").iterdir())) == 4


def test_two_grids_of_one_input_are_two_matrices(make_model: MakeModel, tmp_path: Path) -> None:
    source = _source(make_model, tmp_path / "model")
    fine = Grid(8, 32, True)
    grids = source.grids(GRID) | {"model.layers.0.self_attn.k_proj.weight": fine}
    codes = quantize_calibrated(source, TOKENS, Calibration("gptq", grids), tmp_path / "mixed", "test")
    alone = _quantize(source, tmp_path / "work")
    key, query = (f"model.layers.0.self_attn.{name}_proj.weight" for name in ("k", "q"))
    assert codes[key].bits == 8 and alone[key].bits == 4
    assert (codes[query].codes == alone[query].codes).all()


def test_text_is_cut_to_what_exported_files_hold(make_model: MakeModel, tmp_path: Path) -> None:
    source = _source(make_model, tmp_path / "model")
    longer = np.concatenate([TOKENS, TOKENS[:, ::-1]], axis=1)
    plan = Calibration("weighted_mse", source.grids(GRID))
    found = quantize_calibrated(source, longer, plan, tmp_path / "long", "test")
    expected = quantize_calibrated(source, TOKENS, plan, tmp_path / "cut", "test")
    assert all((found[name].codes == expected[name].codes).all() for name in source.matrices)


def test_a_weight_that_fp16_cannot_scale_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e7
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ExportError, match=r"^model\.layers\.0\.mlp\.gate_proj\.weight: .*fp16"):
        _quantize(open_checkpoint(tmp_path / "model", 40, 32), tmp_path / "work")


def test_batches_do_not_change_the_statistic(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder.open(_source(make_model, tmp_path / "model"))
    whole = head_statistic(decoder, embed(decoder, TOKENS, None), whole_hessian=True)
    monkeypatch.setattr(calibration, "_BATCH_TOKENS", 40)
    batches = embed(decoder, TOKENS, None)
    assert len(batches) == len(TOKENS)
    torch.testing.assert_close(head_statistic(decoder, batches, whole_hessian=True), whole, rtol=1e-4, atol=1e-4)
