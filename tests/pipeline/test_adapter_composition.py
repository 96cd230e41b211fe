"""Weighted sums of adapters, with PEFT's own as the oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel

from edge_runtime.formats.errors import UserError
from edge_runtime.formats.lora import Adapter, save_adapter
from pipeline.adapters.composition import compose_adapters
from tests.pipeline.conftest import MakeModel

BASE = "ab" * 32
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SHAPES = {Q: (64, 64), DOWN: (64, 96)}


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, -1.7), (2.5, 0.01)])
def test_an_exact_sum_is_the_sum_of_the_changes(weights: tuple[float, float]) -> None:
    parts = [_adapter(1, 3, 2.0), _adapter(2, 5, 0.25)]
    composed = compose_adapters(parts, weights)
    assert composed.error == 0.0 and composed.adapter.rank == 8 and composed.adapter.base_digest == BASE
    for module in SHAPES:
        expected = sum(w * _change(part, module) for w, part in zip(weights, parts, strict=True))
        np.testing.assert_allclose(
            _change(composed.adapter, module), expected, rtol=0, atol=4e-7 * np.abs(expected).max()
        )


def test_modules_that_one_part_lacks_keep_the_other_parts_change() -> None:
    one, other = _adapter(1, 3, 2.0, (Q,)), _adapter(2, 2, 1.0, (DOWN,))
    composed = compose_adapters([one, other], [0.5, 2.0]).adapter
    assert list(composed.pairs) == [Q, DOWN] and {pair[0].shape[0] for pair in composed.pairs.values()} == {5}
    np.testing.assert_allclose(_change(composed, Q), 0.5 * _change(one, Q), atol=1e-6)
    np.testing.assert_allclose(_change(composed, DOWN), 2.0 * _change(other, DOWN), atol=1e-6)


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_a_cut_sum_is_the_best_of_its_rank_and_its_error_is_told(rank: int) -> None:
    parts = [_adapter(1, 3, 2.0), _adapter(2, 5, 0.25)]
    composed = compose_adapters(parts, (1.0, -2.0), rank)
    assert composed.adapter.rank == rank
    dropped = total = 0.0
    for module in SHAPES:
        whole = _change(parts[0], module) - 2 * _change(parts[1], module)
        values = np.linalg.svd(whole, compute_uv=False)
        off = float(((whole - _change(composed.adapter, module)) ** 2).sum())
        assert off == pytest.approx(float((values[rank:] ** 2).sum()), rel=1e-4)
        dropped, total = dropped + off, total + float((values**2).sum())
    assert composed.error == pytest.approx((dropped / total) ** 0.5, rel=1e-4)


def test_a_rank_that_is_enough_cuts_nothing() -> None:
    part = _adapter(1, 4, 2.0)
    composed = compose_adapters([part, part], [0.25, 0.75], 4)  # the same change twice has its own rank
    assert composed.error < 1e-7
    np.testing.assert_allclose(_change(composed.adapter, Q), _change(part, Q), atol=1e-5)


@pytest.mark.parametrize(("kind", "rank"), [("cat", None), ("svd", 3)])
def test_peft_composes_the_same(make_model: MakeModel, tmp_path: Path, kind: str, rank: int | None) -> None:
    parts = {"one": _adapter(1, 4, 2.0), "other": _adapter(2, 4, 0.5)}
    for name, part in parts.items():
        save_adapter(tmp_path / name, part)
    weights = [0.7, 1.3]
    model = PeftModel.from_pretrained(make_model("llama"), tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "other", adapter_name="other")
    options = {} if rank is None else {"svd_rank": rank}
    model.add_weighted_adapter(["one", "other"], weights, "sum", combination_type=kind, **options)
    model.set_adapter("sum")
    composed = compose_adapters(list(parts.values()), weights, rank).adapter
    for name in SHAPES:
        module = model.get_submodule(f"base_model.model.{name}")
        with torch.no_grad():
            expected = module.get_delta_weight("sum").numpy()
        np.testing.assert_allclose(_change(composed, name), expected, rtol=0, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("ranks", "weights", "rank", "message"),
    [
        ((2, 2), (1.0,), None, "2 adapters, 1 weights"),
        ((), (), None, "0 adapters, 0 weights"),
        ((2,), (0.0,), None, "weights from -100 to 100, not 0"),
        ((2,), (float("nan"),), None, "weights from -100 to 100"),
        ((2,), (101.0,), None, "weights from -100 to 100"),
        ((2, 3), (1.0, 1.0), 6, "1 to 5, the ranks together"),
        ((2, 3), (1.0, 1.0), 0, "1 to 5, the ranks together"),
        ((600, 600), (1.0, 1.0), None, "at most 1024 ranks together"),
    ],
)
def test_what_cannot_be_composed_is_refused(
    ranks: tuple[int, ...], weights: tuple[float, ...], rank: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        compose_adapters([_adapter(n, size, 1.0) for n, size in enumerate(ranks)], weights, rank)


def test_adapters_of_different_bases_do_not_mix() -> None:
    one, other = _adapter(1, 2, 1.0), Adapter(2, 1.0, _adapter(2, 2, 1.0).pairs, "cd" * 32)
    with pytest.raises(UserError, match=r"adapters of bases abababababab, cdcdcdcdcdcd.*adapters of one base"):
        compose_adapters([one, other], [1.0, 1.0])


def _adapter(seed: int, rank: int, scale: float, modules: tuple[str, ...] = (Q, DOWN)) -> Adapter:
    generator = np.random.default_rng(seed)
    pairs = {
        module: (
            generator.standard_normal((rank, SHAPES[module][1])).astype(np.float32),
            generator.standard_normal((SHAPES[module][0], rank)).astype(np.float32),
        )
        for module in modules
    }
    return Adapter(rank, scale, pairs, BASE)


def _change(adapter: Adapter, module: str) -> NDArray[np.float64]:
    lora_a, lora_b = adapter.pairs[module]
    return adapter.scale * lora_b.astype(np.float64) @ lora_a.astype(np.float64)
