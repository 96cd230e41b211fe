"""Speed as people see it: operations counted against torch's own counter, the window, the words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.distillation.correction import LoraSettings, add_lora
from pipeline.distillation.speed import (
    Speedometer,
    describe,
    memory_bytes,
    peak_flops,
    training_flops_per_token,
)
from tests.pipeline.conftest import VOCABULARY, MakeModel

CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", [True, False])
def test_operations_are_those_that_torch_counts(make_model: MakeModel, tied: bool) -> None:
    model = make_model("llama", tie_word_embeddings=tied).train()
    expected = _counted(model)
    attention = 6 * 3 * 64 * 24  # torch counts all of it, we the half that is not masked
    assert training_flops_per_token(model, 24) == pytest.approx(expected - attention, rel=0.01)


def test_a_frozen_weight_costs_no_gradient_of_its_own(make_model: MakeModel) -> None:
    model = add_lora(make_model("llama"), LoraSettings(rank=4, alpha=8, targets=("q_proj", "v_proj"))).train()
    expected = _counted(model)
    assert training_flops_per_token(model, 24) == pytest.approx(expected - 6 * 3 * 64 * 24, rel=0.05)


def test_a_model_without_a_configuration_has_weights_only() -> None:
    assert training_flops_per_token(torch.nn.Linear(10, 20), 100) == 6 * 220


def test_the_window_moves_with_the_run() -> None:
    clock = iter([0.0, 1.0, 2.0, *[2.0 + 0.25 * number for number in range(1, 41)]])
    meter = Speedometer(1000, 5e6, 2e10, CPU, clock=lambda: next(clock))
    assert set(meter.count()) == {"memory_bytes"}, "one moment is no speed"
    assert meter.count()["tokens_per_s"] == 1000
    for _ in range(41):
        figures = meter.count()
    assert figures["tokens_per_s"] == 4000 and figures["mfu"] == 1.0


def test_memory_is_looked_at_twice_a_second_and_not_more(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    monkeypatch.setattr("pipeline.distillation.speed.memory_bytes", lambda _device: looked.append(1) or 1)
    clock = iter(number / 10 for number in range(100))
    meter = Speedometer(10, 1.0, None, CPU, clock=lambda: next(clock))
    for _ in range(51):
        assert "mfu" not in meter.count()
    assert len(looked) == 11


@pytest.mark.parametrize(
    ("figures", "text"),
    [
        ({}, ""),
        ({"tokens_per_s": 412.4}, "412 tokens/s"),
        ({"tokens_per_s": 41_234.0, "mfu": 0.384, "memory_bytes": 12.34e9}, "41.2k tokens/s, MFU 38 %, 12.3 GB"),
    ],
)
def test_what_is_not_known_is_left_out(figures: dict[str, float], text: str) -> None:
    assert describe(figures) == text


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A10G", 70e12),
        ("Quadro K620", None),
    ],
)  # fmt: skip
def test_peaks_are_those_of_the_data_sheets(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(CPU) is None


def test_memory_grows_with_what_is_held() -> None:
    before = memory_bytes(CPU)
    held = torch.ones(40_000_000)
    assert memory_bytes(CPU) - before > 0.9 * held.nbytes


def test_the_time_left_is_the_rest_at_the_present_rate() -> None:
    meter = Speedometer(1_000, 0.0, None, CPU, clock=iter([10.0, 12.0]).__next__)
    assert meter.left(5) == {}
    for _ in range(2):
        meter.count()
    assert meter.left(5) == {"left_s": 10.0}


def _counted(model: Any) -> float:
    """Operations a token of forward and backward, by torch's counter; attention in plain matrix products."""
    model.config._attn_implementation = "eager"
    tokens = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    return counter.get_total_flops() / tokens.numel()
