"""What stages need: against what torch holds, what was measured, and how it grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import load_configs
from pipeline.devices import FORWARD_SHARE, H100_PEAK_FLOPS, MEASURED_STUDENT, TRAINING_SHARE
from pipeline.distillation.stored_targets import bound_bytes
from pipeline.export.checkpoint import float_weights, spec_of
from pipeline.export.compressed_tensors import write_compressed_tensors
from pipeline.export.compressed_tensors_reader import require_same_compressed_tensors
from pipeline.flow import STAGES, planned
from pipeline.model_bytes import package_bytes, stored_bytes_a_position
from pipeline.needs import Needs, estimate
from pipeline.plan import require_chain
from pipeline.quantization.grid import fitting_group
from pipeline.quantization.rounding import quantize_tensor
from pipeline.settings import Config
from pipeline.sizes import QWEN_7B, ModelSizes


@pytest.fixture(scope="module")
def demo() -> dict[str, Config]:
    return load_configs(["teacher=from_scratch"])


@pytest.fixture(scope="module")
def small_alone() -> dict[str, Config]:
    return load_configs(["submodel=small", "teacher=from_scratch"])


def needs_of(configs: dict[str, Config], stage: str, name: str) -> Needs:
    return estimate(STAGES[stage], configs[name], require_chain(configs), bf16=False)


def test_needs_of_the_demo_are_positive_and_what_a_machine_can_have(demo: dict[str, Config]) -> None:
    family = require_chain(demo)
    for stage, config in planned(demo):
        needs = estimate(stage, config, family, bf16=True)
        memory = needs.host_bytes + sum(needs.device_bytes.values())
        assert 0 < needs.disk_bytes < 1e8 and 0 <= needs.scratch_bytes < 2e8 and 0 < memory < 2e9
        assert needs.fixed_s >= 0 and min(needs.training_flops, needs.forward_flops, needs.host_flops) >= 0


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("teacher.num_layers=12", ["teacher", "targets", "distill", "quantize", "export", "evaluate", "package"]),
        ("teacher.hidden_size=512", ["teacher", "targets", "distill", "quantize", "export", "evaluate", "package"]),
        ("teacher.steps=9000", ["teacher"]),
        ("distill.target_tokens=4096000", ["targets"]),
        ("distill.draws=64", ["targets"]),
        ("distill.steps=4000", ["distill"]),
        ("distill.micro_sequences=1", []),
        ("distill.recompute=true", []),
        ("distill.signal=online", ["distill"]),
        ("distill.on_policy_steps=10", ["distill"]),
        ("submodel.width=0.75", ["distill", "quantize", "export", "evaluate", "package", "register"]),
        ("runtime.evaluation_sequences=480", ["targets", "distill", "evaluate"]),
        ("runtime.task_tokens=327680", ["evaluate"]),
        ("quantize.rounding=rtn", []),
        ("quantize.sensitivity_tokens=8192", ["quantize"]),
        ("export.train_buckets=[64,128,256]", ["export", "package", "register"]),
    ],
)
def test_needs_grow_with_the_settings(small_alone: dict[str, Config], override: str, stages: list[str]) -> None:
    larger = load_configs(["submodel=small", "teacher=from_scratch", override])
    for name in STAGES:
        changed = [_values(needs_of(configs, name, "small")) for configs in (small_alone, larger)]
        pairs = list(zip(*changed, strict=True))
        if name in stages:
            assert all(small <= large for small, large in pairs) and any(small < large for small, large in pairs), name
        elif not stages:
            assert all(small >= large for small, large in pairs), name


@pytest.mark.parametrize(
    ("section", "key", "stage"),
    [("teacher", "steps", "teacher"), ("distill", "target_tokens", "targets"), ("distill", "steps", "distill")],
)
def test_twice_the_tokens_are_twice_the_arithmetic(demo: dict[str, Config], section: str, key: str, stage: str) -> None:
    values = getattr(demo["small"], section)
    doubled = {
        name: config.model_copy(update={section: values.model_copy(update={key: 2 * getattr(values, key)})})
        for name, config in demo.items()
    }
    before, after = needs_of(demo, stage, "small"), needs_of(doubled, stage, "small")
    assert after.training_flops == 2 * before.training_flops
    if stage == "targets":
        assert after.forward_flops - before.forward_flops == 143_360 * require_chain(demo).teacher.forward_flops(256)


def test_a_correction_is_counted_by_its_tokens_and_what_learns() -> None:
    """4 N operations a token beside an adapter, 6 N with all weights; those leave three states of 12 bytes a weight."""

    def needs(*overrides: str) -> Needs:
        given = ["experiment=qwen2_5_7b", "teacher.correction_batch_sequences=4", *overrides]
        return needs_of(load_configs(given), "teacher", "3b")

    rank = "teacher.correction_rank=16"
    none, some, twice, whole = (
        needs(*given) for given in (
            ["teacher.correction_steps=0"], [rank, "teacher.correction_steps=1000"],
            [rank, "teacher.correction_steps=2000"], ["teacher.correction_steps=1000"],
        )
    )  # fmt: skip
    weights, tokens = 7_615_616_512, 1000 * 4 * 1024
    assert none.training_flops == 0 and twice.training_flops == 2 * some.training_flops
    assert 4 * tokens * 0.9 * weights < some.training_flops < 4 * tokens * 1.1 * weights
    assert whole.training_flops == pytest.approx(1.5 * some.training_flops)
    assert some.disk_bytes - none.disk_bytes == whole.disk_bytes - none.disk_bytes == 2 * weights
    assert some.scratch_bytes == 0 and whole.scratch_bytes == 36 * weights
    assert sum(whole.device_bytes.values()) - sum(some.device_bytes.values()) > 13 * weights


def test_weights_gradients_and_moments_are_what_torch_holds(make_model: Any) -> None:
    model, held = make_model("llama"), 0
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.zeros(1, 4, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        held += sum(tensor.nbytes for tensor in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]))
    assert held == 16 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_activations_are_what_autograd_keeps(make_model: Any, tmp_path: Path, architecture: str, bf16: bool) -> None:
    """One forward pass up to the hidden states."""
    model: Any = make_model(architecture, num_hidden_layers=8, hidden_size=128, intermediate_size=352).train()
    model.config.save_pretrained(tmp_path)
    configs = load_configs(["teacher=local", f"teacher.path={tmp_path}", "distill.sequence_tokens=256"])
    whole = {"width": 1.0, "ffn": 1.0, "heads": 1.0, "depth": 1.0, "name": "base"}
    config = configs["base"].model_copy(update={"submodel": configs["base"].submodel.model_copy(update=whole)})
    kept: dict[int, int] = {}
    own = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.zeros(config.distill.micro_sequences, 256, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    needs = estimate(STAGES["distill"], config, require_chain({"base": config}), bf16=bf16)
    activations = needs.device_bytes["distill.micro_sequences, or distill.recompute=true"]
    cast = 2.0 * sum(parameter.numel() for parameter in model.model.layers.parameters()) if bf16 else 0.0
    assert hidden.requires_grad and sum(kept.values()) - cast == pytest.approx(activations, rel=0.02)


@pytest.mark.parametrize(("vocab_size", "draws", "measured"), [(152_064, 32, 22.5), (4096, 32, 13.35)])
def test_stored_bytes_a_position_are_near_those_measured(vocab_size: int, draws: int, measured: float) -> None:
    """benchmarks/README.md's text-like distribution; the demo's teacher on Python's documentation."""
    planned_bytes = stored_bytes_a_position(vocab_size, draws)
    assert planned_bytes == pytest.approx(measured, rel=0.25)
    assert planned_bytes < bound_bytes(1, vocab_size, draws)


def test_the_rates_give_back_the_third_measurement() -> None:
    """Training and forward rates were measured apart; together they must say what the online case did."""
    training_s = MEASURED_STUDENT.training_flops(1024) / (TRAINING_SHARE * H100_PEAK_FLOPS)
    forward_s = QWEN_7B.forward_flops(1024) / (FORWARD_SHARE * H100_PEAK_FLOPS)
    assert 1 / (training_s + forward_s) == pytest.approx(32_473, rel=0.03)
    assert pytest.approx(408e12, rel=0.002) == TRAINING_SHARE * H100_PEAK_FLOPS, "as the table's last column"


def _values(needs: Needs) -> list[float]:
    return [
        needs.disk_bytes, needs.scratch_bytes, needs.host_bytes, sum(needs.device_bytes.values()), needs.training_flops,
        needs.forward_flops, needs.host_flops, needs.fixed_s,
    ]  # fmt: skip


@pytest.mark.parametrize("container", ["safetensors", "safetensors_linear"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("group", "hidden", "ffn"), [(32, 64, 96), (128, 192, 160)])
def test_the_plan_knows_what_floats_take_beside_packed_codes(
    group: int, hidden: int, ffn: int, tied: bool, container: str, make_model: Any, tmp_path: Path
) -> None:
    """A vocabulary so large that embedding and head decide; also with several groups."""
    model = make_model("llama", vocab_size=4096, tie_word_embeddings=tied, hidden_size=hidden, intermediate_size=ffn)
    spec, weights = spec_of(model, 64), float_weights(model)
    codes = {name: quantize_tensor(w, bits=4, group=fitting_group(w.shape[1], group), rounding="rtn")
             if w.ndim == 2 else w for name, w in weights.items()}  # fmt: skip
    model.config.to_json_file(tmp_path / "config.json", use_diff=False)
    (tmp_path / "folder").mkdir()
    linear_only = container == "safetensors_linear"
    write_compressed_tensors(tmp_path / "folder", spec, codes, config=tmp_path / "config.json", linear_only=linear_only)
    written = require_same_compressed_tensors(tmp_path / "folder", codes, linear_only=linear_only)
    sizes = ModelSizes(4096, hidden, ffn, spec.num_layers, 4, 2, spec.head_dim, tied)
    options = ["submodel=small", f"quantize.group={group}"]
    [alone] = load_configs([*options, "export.containers=[onnx]"]).values()
    [beside] = load_configs([*options, f"export.containers=[onnx,{container}]"]).values()
    # A tokenizer and graphs that hold no weights are planned besides.
    besides = 60 * 4096 + 3_000 * spec.num_layers + 2_400 * spec.num_layers
    planned_bytes = package_bytes(sizes, beside) - package_bytes(sizes, alone) - besides
    assert planned_bytes == pytest.approx(written, rel=0.002)
