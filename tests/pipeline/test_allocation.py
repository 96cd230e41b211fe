"""Eight bits where they win back most: against exhaustive search, against uniform choices, to the byte."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

from edge_runtime.backends.onnx import OnnxBackend
from edge_runtime.formats.decoder import PROJECTIONS
from edge_runtime.formats.errors import ExportError, UserError
from edge_runtime.formats.int4 import QuantizedTensor
from pipeline.artifacts import Layout, StageRun
from pipeline.config import ConfigError, load_configs
from pipeline.export.checkpoint import float_weights, spec_of
from pipeline.export.lora_slots import LoraSlots
from pipeline.export.onnx_graph import write_onnx
from pipeline.export.onnx_reader import read_onnx_weights
from pipeline.export.parity import load_dequantized, require_same_weights
from pipeline.plan import require_chain
from pipeline.quantization.allocation import (
    Sizes,
    choose_grids,
    curve_points,
    fill,
    grids_of,
    sizes_of,
    spread,
    upgrade_order,
)
from pipeline.quantization.grid import Grid
from pipeline.quantization.rounding import pad_intermediate, quantize_tensor
from pipeline.quantization.source import open_checkpoint
from tests.pipeline.conftest import VOCABULARY, MakeModel

GRID = Grid(bits=4, group=32, positive_scales=True)
TEXT = np.random.default_rng(1).integers(0, VOCABULARY, (6, 16)).astype(np.int32)


def _sizes(model: Any) -> Sizes:
    return _opened(model)[0]


def _opened(model: Any) -> tuple[Sizes, dict[str, Grid]]:
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        source = open_checkpoint(Path(folder), 64, GRID.group)
        return sizes_of(source, source.grids(GRID)), source.grids(GRID)


def _choose(model: Any, ratio: float | None = None, text: Any = TEXT) -> tuple[dict[str, Grid], Any]:
    sizes, grids = _opened(model)
    return choose_grids(model, sizes, text, grids, rounding="mse", weight_ratio_max=ratio, together=False)


@pytest.mark.parametrize("seed", range(30))
def test_no_other_choice_of_as_few_bytes_is_expected_to_win_back_more(seed: int) -> None:
    """Every first part of the order against all subsets of nine weights."""
    random = np.random.default_rng(seed)
    names = [f"model.layers.{n}.mlp.down_proj.weight" for n in range(9)]
    costs = dict(zip(names, random.lognormal(0, 1.5, 9).tolist(), strict=True))
    extra = dict(zip(names, random.integers(1, 40, 9).tolist(), strict=True))
    order = upgrade_order(costs, extra, together=False)
    subsets = [set(s) for s in chain.from_iterable(combinations(names, k) for k in range(10))]
    for count in range(10):
        taken = {name for unit in order[:count] for name in unit}
        rivals = [s for s in subsets if _sum(extra, s) <= _sum(extra, taken)]
        assert _sum(costs, taken) >= max(_sum(costs, s) for s in rivals) - 1e-9
    for budget in range(0, sum(extra.values()) + 1, 7):
        chosen = fill(order, extra, budget)
        best = max(_sum(costs, s) for s in subsets if _sum(extra, s) <= budget)
        assert _sum(extra, chosen) <= budget and len(set(chosen)) == len(chosen)
        assert _sum(costs, chosen) >= best - max(costs.values()), "the gap of a greedy choice is one weight at most"
        left = set(names) - set(chosen)
        assert not [name for name in left if extra[name] <= budget - _sum(extra, chosen)], "nothing that fits is left"


def test_a_curve_goes_from_nothing_to_everything_and_never_beyond_a_share() -> None:
    extra = {f"model.layers.{n}.self_attn.o_proj.weight": 10 + n for n in range(20)}
    order = [(name,) for name in extra]
    points = curve_points(order, extra)
    total = sum(extra.values())
    assert points[0] == [] and points[-1] == list(extra)
    assert [list(extra)[: len(point)] for point in points] == points and len({len(p) for p in points}) == len(points)
    shares = [_sum(extra, point) / total for point in points]
    for share, following in zip((0.05, 0.1, 0.2, 0.35, 0.5, 0.75), points[1:], strict=False):
        assert _sum(extra, following) / total <= share < (_sum(extra, following) + 10 + len(following)) / total
    assert shares == sorted(shares)


def test_projections_that_read_the_same_states_can_be_kept_together() -> None:
    names = [f"model.layers.{n}.{'mlp' if 'gate' in p or 'up' in p or 'down' in p else 'self_attn'}.{p}.weight"
             for n in range(2) for p in PROJECTIONS] + ["model.embed_tokens.weight", "lm_head.weight"]  # fmt: skip
    order = upgrade_order(dict.fromkeys(names, 1.0), dict.fromkeys(names, 1), together=True)
    assert sorted(chain.from_iterable(order)) == sorted(names) and len(order) == 2 * 4 + 2
    assert {len(unit) for unit in order} == {1, 2, 3}
    assert tuple(f"model.layers.1.self_attn.{p}.weight" for p in ("q_proj", "k_proj", "v_proj")) in order
    assert all(
        len(unit) == 1 for unit in upgrade_order(dict.fromkeys(names, 1.0), dict.fromkeys(names, 1), together=False)
    )


@pytest.mark.parametrize(("architecture", "sizes"), [
    ("llama", {"tie_word_embeddings": True}), ("qwen2", {}), ("qwen3", {"intermediate_size": 172}),
])  # fmt: skip
@pytest.mark.parametrize("ratio", [None, 0.4, 0.5])
def test_bytes_are_those_of_the_codes_that_are_stored(
    make_model: MakeModel, architecture: str, sizes: dict[str, Any], ratio: float | None
) -> None:
    model = make_model(architecture, **sizes)
    grids, figures = _choose(model, ratio)
    _, floats = pad_intermediate(spec_of(model, 64), float_weights(model), 32)
    assert set(grids) == {name for name, weight in floats.items() if weight.ndim == 2}
    stored = sum(
        w.weight_bytes if isinstance(w, QuantizedTensor) else w.nbytes for w in _stored(floats, grids).values()
    )
    # Biases of a padded FFN are the one thing that is not counted; these models have none there.
    expected = stored / (2 * sum(p.numel() for p in model.parameters()))
    point = figures["curve"][0] if ratio is None else figures["chosen"]
    assert point["weight_ratio"] == round(expected, 5) and expected <= (ratio or 1)
    refined = [name for name, grid in grids.items() if grid.bits == 8]
    assert point["int8"] == len(refined) and all(grid == replace(GRID, bits=grid.bits) for grid in grids.values())
    if ratio is not None:
        left = [name for name, grid in grids.items() if grid.bits == 4]
        assert refined and left and figures["chosen"]["weights"] == sorted(refined)
        room = ratio * 2 * sum(p.numel() for p in model.parameters()) - stored
        extra = _sizes(model).extra
        assert all(extra[name] > room for name in left)


def test_more_bytes_diverge_less_and_sums_foretell_it(make_model: MakeModel) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    _, figures = _choose(model, 0.42)
    curve = figures["curve"]
    assert [p["weight_ratio"] for p in curve] == sorted({p["weight_ratio"] for p in curve})
    assert [p["kl"] for p in curve] == sorted({p["kl"] for p in curve}, reverse=True)
    assert curve[0]["expected_kl"] == pytest.approx(sum(figures["by_weight"].values()), rel=1e-3)
    assert curve[-1]["expected_kl"] == 0 and curve[-1]["kl"] < curve[0]["kl"] / 100
    for point in (*curve[:-1], figures["chosen"]):
        assert point["kl"] == pytest.approx(point["expected_kl"], rel=0.5)
    better = [p["kl"] for p in curve if p["weight_ratio"] <= figures["chosen"]["weight_ratio"]]
    assert figures["chosen"]["kl"] <= min(better)


@pytest.mark.parametrize("kind", ["down_proj", "v_proj", "embed_tokens", "layers.0", "layers.2"])
def test_a_choice_diverges_no_more_than_eight_bits_for_one_kind_or_layer(make_model: MakeModel, kind: str) -> None:
    """At the same bytes, measured on the text that ranked."""
    model = make_model("llama", tie_word_embeddings=True)
    sizes, text = _sizes(model), np.repeat(TEXT[:3], 2, axis=0)
    uniform = [name for name in sizes.extra if kind in name]
    _, figures = _choose(model, sizes.ratio(uniform) + 1e-9, text)
    from pipeline.quantization.sensitivity import divergences

    mixture = {name: quantize_tensor(model.get_parameter(name).detach().numpy(), bits=8 if name in uniform else 4,
                                     group=32, rounding="mse") for name in sizes.extra}  # fmt: skip
    (rival,) = divergences(model, text[1::2], [mixture])
    assert figures["chosen"]["weight_ratio"] <= sizes.ratio(uniform) + 1e-5
    assert figures["chosen"]["kl"] <= rival * 1.02


def test_text_that_ranks_is_not_the_text_that_measures(make_model: MakeModel) -> None:
    model = make_model("llama")
    other = TEXT.copy()
    other[1::2] = TEXT[1::2, ::-1]
    first, second = (_choose(model, 0.4, text) for text in (TEXT, other))
    assert first[0] == second[0] and first[1]["by_weight"] == second[1]["by_weight"]
    assert first[1]["curve"] != second[1]["curve"]
    assert [p["int8"] for p in first[1]["curve"]] == [p["int8"] for p in second[1]["curve"]]
    assert first[1]["tokens"] == TEXT.size


def test_text_is_spread_over_all_sequences() -> None:
    sequences = np.arange(90 * 8, dtype=np.int32).reshape(90, 8)
    assert spread(sequences, 40)[:, 0].tolist() == [0, 176, 352, 528, 712]
    assert spread(sequences, 1).shape == (2, 8) and spread(sequences[:3], 10_000).shape == (3, 8)
    with pytest.raises(UserError, match=r"quantize\.sensitivity_tokens: got 40, allowed: 0 with a single"):
        spread(sequences[:1], 40)


def test_a_ratio_below_four_bits_names_what_they_take(make_model: MakeModel) -> None:
    model = make_model("llama")
    least = _sizes(model).ratio(())
    with pytest.raises(UserError, match=rf"quantize.weight_ratio_max: got 0.26, allowed: at least {least:.4f}"):
        _choose(model, 0.26)
    assert {grid.bits for grid in _choose(model, least + 1e-6)[0].values()} == {4}


def test_a_weight_that_is_not_finite_is_named(make_model: MakeModel) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = float("nan")
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: weights must be finite"):
        _choose(model)


@pytest.mark.parametrize("group", [32, 128])
def test_onnx_runs_a_mixture(make_model: MakeModel, tmp_path: Path, group: int) -> None:
    """Codes read back, and logits, with q, k and v of different bits, and an embedding of either."""
    model = make_model("qwen2", tie_word_embeddings=True)
    grid = replace(GRID, group=group)
    spec, floats = pad_intermediate(spec_of(model, 64), float_weights(model), group)
    for refined in (("v_proj", "down_proj", "layers.0.mlp.gate"), ("embed_tokens", "q_proj", "layers.1")):
        grids = {name: replace(grid, bits=8 if any(part in name for part in refined) else 4)
                 for name, w in floats.items() if w.ndim == 2}  # fmt: skip
        weights = _stored(floats, grids)
        folder = tmp_path / refined[0]
        folder.mkdir()
        write_onnx(folder, spec, weights, lora=LoraSlots(("q_proj", "v_proj"), 4), accuracy_level=0)
        for file in ("model.onnx", "model_lora.onnx"):
            require_same_weights(file, weights, read_onnx_weights(folder / file))
        padded = make_model("qwen2", tie_word_embeddings=True, intermediate_size=spec.intermediate_size)
        with torch.no_grad():
            expected = load_dequantized(padded, weights)(input_ids=torch.arange(20)[None]).logits[0].numpy()
        backend = OnnxBackend.open(folder, spec)
        found = backend.prefill(range(20), backend.allocate(20), all_logits=True)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
        backend.close()


@pytest.mark.parametrize(("overrides", "line"), [
    ("quantize.weight_ratio_max=0.28", "quantize.weight_ratio_max: tflite holds 4-bit codes only"),
    ("quantize.weight_ratio_max=0.28 export.containers=[onnx,safetensors]",
     "quantize.weight_ratio_max: safetensors holds one grid"),
    ("quantize.weight_ratio_max=0.4 export.containers=[onnx]", "quantize.weight_ratio_max: 0.4 is more than the gate"),
    ("quantize.weight_ratio_max=0.28 quantize.sensitivity_tokens=0", "quantize: weight_ratio_max needs weights ranked"),
    ("quantize.bits=8 export.containers=[onnx]", "quantize: sensitivity_tokens measure what 4 bits cost"),
    ("quantize.weight_ratio_max=0.2", "quantize.weight_ratio_max: got 0.2, allowed"),
    ("quantize.sensitivity_tokens=-1", "quantize.sensitivity_tokens: got -1, allowed"),
])  # fmt: skip
def test_settings_that_contradict_each_other_are_one_line(overrides: str, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_configs(["submodel=tiny", *overrides.split()])
    (only,) = str(error.value).splitlines()
    assert only.startswith(line)


def test_a_ratio_that_no_codes_reach_is_refused_before_the_run() -> None:
    options = ["submodel=tiny", "export.containers=[onnx]", "quantize.weight_ratio_max=0.282"]
    with pytest.raises(UserError, match=r"quantize.weight_ratio_max: got 0.282, allowed: at least 0.2830"):
        require_chain(load_configs(options))
    require_chain(load_configs([*options[:2], "quantize.weight_ratio_max=0.2831"]))


def _run(folder: Path, model: Any, *overrides: str) -> StageRun:
    """A quantize stage whose student is ``model``."""
    layout = Layout(folder)
    model.save_pretrained(layout.student("ci_tiny"))
    layout.targets.mkdir(parents=True)
    np.save(layout.targets / "train.npy", np.tile(TEXT, (3, 1)))
    config = load_configs(["experiment=ci", "submodel=ci_tiny", "export.containers=[onnx]", *overrides])["ci_tiny"]
    return StageRun(config, layout, folder / "output", folder / "checkpoint")


MIXED = ("quantize.weight_ratio_max=0.42", "gate.onnx_weight_ratio_max=0.5")


def test_a_stage_gets_grids_in_its_own_order_and_figures_where_it_asks(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama")
    run = _run(tmp_path, model, *MIXED)
    source = open_checkpoint(run.layout.student("ci_tiny"), 64, 32)
    grids, figures = grids_of(run, source)
    assert list(grids) == source.matrices and {grid.bits for grid in grids.values()} == {4, 8}
    assert not any(grid.positive_scales for grid in grids.values()), "there is no TFLite file"
    assert figures["sensitivity"]["chosen"]["weight_ratio"] <= 0.42 and figures["sensitivity"]["tokens"] == 18 * 16
    untold = _run(tmp_path / "untold", model, "quantize.sensitivity_tokens=0")
    assert grids_of(untold, source) == (source.grids(Grid(4, 32, False)), {})


def test_equal_copies_of_embedding_and_head_are_measured_as_one(make_model: MakeModel, tmp_path: Path) -> None:
    tied, copied = (make_model("llama", tie_word_embeddings=tied) for tied in (True, False))
    copied.load_state_dict(tied.state_dict())
    found = []
    for name, model in (("tied", tied), ("copied", copied)):
        run = _run(tmp_path / name, model)
        found.append(grids_of(run, open_checkpoint(run.layout.student("ci_tiny"), 64, 32)))
    assert found[0] == found[1] and "lm_head.weight" not in found[0][0]


def test_engines_that_fuse_projections_get_equal_bits(make_model: MakeModel, tmp_path: Path) -> None:
    run = _run(tmp_path, make_model("llama"), *MIXED, "export.containers=[onnx,safetensors_linear]")
    grids, _ = grids_of(run, open_checkpoint(run.layout.student("ci_tiny"), 64, 32))
    for layer in range(3):
        for fused in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
            assert len({grids[f"model.layers.{layer}.{name}_proj.weight"].bits for name in fused}) == 1
    assert {grid.bits for grid in grids.values()} == {4, 8}


def _stored(floats: dict[str, Any], grids: dict[str, Grid]) -> dict[str, Any]:
    return {
        name: quantize_tensor(w, bits=grids[name].bits, group=grids[name].group, rounding="rtn") if name in grids else w
        for name, w in floats.items()
    }


def _sum(values: dict[str, Any], names: Any) -> float:
    return sum(values[name] for name in names)
