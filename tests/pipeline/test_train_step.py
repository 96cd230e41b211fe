"""The training step as a tape and as files: derivatives against torch, files against PEFT, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter

from edge_runtime.formats.decoder import PROJECTIONS
from edge_runtime.formats.errors import ConfigError, ExportError
from edge_runtime.formats.int4 import QuantizedTensor, dequantize
from pipeline.config import load_configs
from pipeline.export.assembly import adapter_slots, training_containers
from pipeline.export.checkpoint import float_weights, spec_of
from pipeline.export.lora_slots import LoraSlots
from pipeline.export.onnx_graph import write_onnx
from pipeline.export.tflite_reader import read_tflite_weights
from pipeline.export.train_step import GRADIENT_SUFFIX, LOSS_SUM, TOKEN_COUNT, train_step
from pipeline.export.train_step_onnx import write_onnx_train_steps
from pipeline.export.train_step_parity import (
    Probe,
    draw_probe,
    onnx_step,
    require_same_step,
    tflite_step,
    torch_step,
)
from pipeline.export.train_step_tape import Tape, differentiate
from pipeline.export.train_step_tflite import write_tflite_train_steps
from pipeline.settings import Config
from tests.pipeline import onnx_cases
from tests.train_cases import CONTEXT_TOKENS, Base, base_of, draw_batch, peft_step, worst_difference

LORA = LoraSlots(PROJECTIONS, rank=3)
TOKENS = 12
BOUND = 4e-5  # measured at most 2.6e-5, 8-bit codes


@pytest.mark.parametrize("case", ["llama_tied_hidden_172", "llama_biased_8_bit", "qwen2_group_16", "mistral"])
def test_onnx_takes_what_its_decoder_takes(case: str, tmp_path: Path) -> None:
    """A hidden size and an FFN that are no whole groups, 8-bit codes, groups of 16, as many key heads as heads."""
    base = _onnx_base(case)
    probe = _probe(base, batch=2)
    _write_onnx(tmp_path, base)
    found = onnx_step(tmp_path / f"train_{TOKENS}.onnx", probe, threads=1)
    _require_pefts(base, probe, found)


@pytest.mark.parametrize("container", ["onnx", "tflite"])
def test_weights_that_were_not_quantized_train_too(container: str, tmp_path: Path) -> None:
    base = base_of("tied")
    floats = {
        name: dequantize(value) if isinstance(value, QuantizedTensor) else value for name, value in base.weights.items()
    }
    probe = _probe(base, batch=2)
    plain = Base(base.model, base.spec, floats)
    _require_pefts(base, probe, _written_and_run(container, plain, probe, tmp_path))


@pytest.mark.parametrize("container", ["onnx", "tflite"])
def test_an_ffn_that_was_padded_agrees_with_the_model_that_was_not(container: str, tmp_path: Path) -> None:
    base = base_of("untied", padded=True)
    assert base.spec.intermediate_size > base.model.config.intermediate_size
    probe = _probe(base, batch=1)
    expected = torch_step(base.model, probe)
    found = _written_and_run(container, base, probe, tmp_path)
    assert require_same_step(container, expected, found) < BOUND
    _require_pefts(base_of("untied"), _probe(base_of("untied"), batch=1), expected)


@pytest.mark.parametrize("container", ["onnx", "tflite"])
def test_the_loss_alone_is_the_same_number(container: str, tmp_path: Path) -> None:
    base = base_of("qwen3")
    probe = _probe(base, batch=2)
    whole = _written_and_run(container, base, probe, tmp_path)
    feeds = {"tokens": probe.tokens, "loss_mask": probe.loss_mask, **probe.factors}
    if container == "onnx":
        session = onnxruntime.InferenceSession(tmp_path / f"loss_{TOKENS}.onnx", providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        alone = dict(zip(names, session.run(names, feeds), strict=True))
    else:
        alone = Interpreter(str(tmp_path / "train.tflite")).get_signature_runner(f"loss_{TOKENS}")(**feeds)
    assert set(alone) == {LOSS_SUM, TOKEN_COUNT}
    assert all(alone[name] == whole[name] for name in alone)


def test_onnx_graphs_add_no_weight_to_the_container(tmp_path: Path) -> None:
    base = base_of("untied")
    _write_onnx(tmp_path, base)
    for name in ("train", "loss"):
        model = onnx.load(tmp_path / f"{name}_{TOKENS}.onnx", load_external_data=False)
        inside = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        assert sum(len(tensor.raw_data) for tensor in inside) < 2 * TOKENS * base.spec.head_dim * 4 + 2000
        locations = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
        assert locations == {"weights.bin"}


def test_onnx_makes_no_float_weight_before_its_turn(tmp_path: Path) -> None:
    """Every dequantized weight depends on the gradient that it is multiplied with, and has that one reader."""
    base = base_of("untied")
    _write_onnx(tmp_path, base)
    graph = onnx.load(tmp_path / f"train_{TOKENS}.onnx", load_external_data=False).graph
    made = {output: node for node in graph.node for output in node.output}
    sources = {tensor.name for tensor in graph.initializer}
    assert not [node for node in graph.node if node.op_type == "DequantizeLinear"]
    weights = [node for node in graph.node if node.op_type == "GatherBlockQuantized" and ".back." in node.name]
    # The first layer's query, key and value are below the lowest gradient but for their adapters.
    assert len(weights) == 7 * base.spec.num_layers - 3 + 1
    for node in weights:
        reader = [other for other in graph.node if set(node.output) & set(other.input)]
        rows = made[node.input[1]]
        length = made[made[rows.input[1]].input[0]]
        assert len(reader) == 1 and length.op_type == "Shape" and length.input[0] == _product(graph, reader[0])
        assert length.input[0] not in sources


def test_tflite_holds_the_weights_once_for_all_signatures(tmp_path: Path) -> None:
    base = base_of("untied", padded=True)
    sizes = {}
    for buckets in ((8,), (8, 12, 16)):
        path = tmp_path / "train.tflite"
        write_tflite_train_steps(path, base.spec, base.weights, LORA, buckets=buckets, batch_sequences=1)
        sizes[len(buckets)] = path.stat().st_size
    packed = sum(v.weight_bytes for v in base.weights.values() if isinstance(v, QuantizedTensor))
    assert sizes[1] > packed and sizes[3] - sizes[1] < 2 * (sizes[1] - packed) * 1.1
    read = read_tflite_weights(tmp_path / "train.tflite")
    assert set(read) == set(base.weights)
    assert all(
        np.array_equal(value.codes, read[name].codes) and np.array_equal(value.scales, read[name].scales)
        for name, value in base.weights.items()
        if isinstance(value, QuantizedTensor)
    )


def test_nothing_flows_into_the_base_nor_below_the_lowest_adapter() -> None:
    base = base_of("untied")
    shapes = {name: tuple(value.shape) for name, value in base.weights.items()}
    last = LoraSlots(("down_proj",), rank=2)
    step = train_step(base.spec, shapes, last, tokens=8, batch=1, rank=2)
    back = [node.attributes["weight"] for node in step.tape.nodes if node.operator == "linear_back"]
    assert set(step.outputs) == {LOSS_SUM, TOKEN_COUNT} | {
        f"model.layers.{layer}.mlp.down_proj.lora_{half}.weight{GRADIENT_SUFFIX}" for layer in (0, 1) for half in "AB"
    }
    assert "lm_head.weight" in back and not [name for name in back if name.startswith("model.layers.0.")]


@pytest.mark.parametrize(
    "build",
    [
        lambda tape, x: tape.softmax(tape.scale(x, 1.7)),
        lambda tape, x: tape.multiply(tape.inverse_rms(x, 1e-3), x),
        lambda tape, x: tape.multiply(x, tape.sigmoid(tape.add(x, x))),
        lambda tape, x: tape.subtract(tape.log(tape.total(tape.exp(x), (1,))), tape.total(x, (0,))),
        lambda tape, x: tape.matmul(x, tape.transpose(tape.swap_halves(x), (1, 0))),
        lambda tape, x: tape.matmul(tape.reshape(x, (2, 3, 4)), tape.reshape(x, (2, 3, 4)), transpose_b=True),
    ],
)
def test_derivatives_are_those_of_torch(build: object) -> None:
    x = np.random.default_rng(1).normal(size=(6, 4))
    tape = Tape()
    source = tape.source("x", (6, 4))
    weighted = tape.multiply(build(tape, source), tape.constant("seven", np.array(7.0)))  # type: ignore[operator]
    loss = tape.total(tape.multiply(weighted, weighted))
    gradient = differentiate(tape, loss, [source])["x"]
    tensor = torch.tensor(x, requires_grad=True)
    _evaluate(tape, {"x": tensor})[loss.name].backward()
    found = _evaluate(tape, {"x": tensor.detach()})[gradient.name]
    np.testing.assert_allclose(found.numpy(), tensor.grad.numpy(), rtol=1e-12, atol=1e-12)  # type: ignore[union-attr]


def test_a_step_that_is_wrong_must_not_ship() -> None:
    base = base_of("tied")
    expected = torch_step(base.model, _probe(base, batch=1))
    name = next(name for name in expected if name.endswith(GRADIENT_SUFFIX))
    assert require_same_step("onnx", expected, expected) == 0
    for wrong in (expected[name] * 1.01, expected[name] * np.nan, np.zeros_like(expected[name])):
        with pytest.raises(ExportError, match="must not ship"):
            require_same_step("onnx", expected, expected | {name: wrong})


def test_containers_of_a_package_follow_the_settings(ci_configs: dict[str, Config]) -> None:
    config = next(iter(ci_configs.values()))
    assert training_containers(config) == ["tflite_train", "torch"]
    assert adapter_slots(config, "tflite_train").max_rank == config.export.lora_rank
    assert adapter_slots(config, "torch").targets == PROJECTIONS
    none = load_configs(["experiment=ci", "export.train_buckets=[]", "export.torch_base=false"])
    assert all(training_containers(config) == [] for config in none.values())
    onnx_only = load_configs(["experiment=ci", "export.containers=[onnx]"])
    assert all(training_containers(config) == ["torch"] for config in onnx_only.values())


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("export.train_buckets=[64,32]", "must grow"),
        ("export.train_buckets=[32,32]", "must grow"),
        ("export.train_buckets=[97]", "context_tokens"),
        ("export.train_buckets=[4]", "greater than or equal to 8"),
        ("export.train_batch=0", "greater than or equal to 1"),
        ("export.lora_targets=[]", "lora_targets"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(setting: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault) as caught:
        load_configs(["experiment=ci", setting])
    assert "\n" not in str(caught.value)


def _onnx_base(name: str) -> Base:
    case = onnx_cases.CASES[name]
    model = onnx_cases.build_model(case)
    spec, floats = spec_of(model, CONTEXT_TOKENS), float_weights(model)
    weights = {
        key: onnx_cases.round_to_nearest(value, case.bits, case.group) if value.ndim == 2 else value
        for key, value in floats.items()
    }
    state = {key: dequantize(v) if isinstance(v, QuantizedTensor) else v for key, v in weights.items()}
    model.load_state_dict({key: torch.tensor(value) for key, value in state.items()}, strict=False)
    return Base(model, spec, weights)


def _probe(base: Base, batch: int) -> Probe:
    return draw_probe(base.model, base.spec, LORA, draw_batch(base.spec, batch, TOKENS)[0])


def _write_onnx(folder: Path, base: Base) -> None:
    stored = write_onnx(folder, base.spec, base.weights, lora=None, accuracy_level=4)
    write_onnx_train_steps(folder, base.spec, stored, LORA, buckets=(TOKENS,), batch_sequences=2)


def _written_and_run(container: str, base: Base, probe: Probe, folder: Path) -> dict[str, np.ndarray]:
    if container == "onnx":
        _write_onnx(folder, base)
        return onnx_step(folder / f"train_{TOKENS}.onnx", probe, threads=1)
    path = folder / "train.tflite"
    write_tflite_train_steps(path, base.spec, base.weights, LORA, buckets=(TOKENS,), batch_sequences=2)
    return tflite_step(path, probe, threads=1)


def _require_pefts(base: Base, probe: Probe, found: dict[str, np.ndarray]) -> None:
    """PEFT at scale 1 on the model, in float64; padding behind the model's sizes is cut off."""
    shapes = {name: base.spec.projection_shape(projection) for name, projection in base.spec.module_names()}
    factors, turned = {}, {}
    for name, factor in probe.factors.items():
        key = name.removesuffix(".weight")
        rows, columns = shapes[key.rpartition(".")[0]]
        size = (LORA.rank, columns) if key.endswith("A") else (rows, LORA.rank)
        factors[key] = factor.T[: size[0], : size[1]]
        turned[key] = found[name + GRADIENT_SUFFIX].T[: size[0], : size[1]]
    loss, gradients = peft_step(base.model, factors, 1.0, probe.tokens, probe.loss_mask)
    assert float(found[LOSS_SUM]) == pytest.approx(loss, rel=4e-7)
    assert worst_difference(gradients, turned) < BOUND


def _product(graph: onnx.GraphProto, reader: onnx.NodeProto) -> str:
    assert reader.op_type in ("MatMul", "Slice")
    if reader.op_type == "Slice":  # the padding of a weight's columns
        reader = next(node for node in graph.node if reader.output[0] in node.input)
    return str(reader.input[0])


def _evaluate(tape: Tape, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tape by torch's operators, in float64."""
    values: dict[str, torch.Tensor] = {}
    for node in tape.nodes:
        given = [values[tensor.name] for tensor in node.inputs]
        attributes = node.attributes
        match node.operator:
            case "source":
                result = feeds[node.output.name]
            case "constant":
                result = torch.tensor(tape.constants[node.output.name], dtype=torch.float64)
            case "matmul":
                a, b = (
                    value.transpose(-1, -2) if attributes[flag] else value
                    for value, flag in zip(given, ("transpose_a", "transpose_b"), strict=True)
                )
                result = a @ b
            case "scale":
                result = given[0] * attributes["factor"]
            case "softmax":
                result = given[0].softmax(-1)
            case "inverse_rms":
                result = (given[0].square().mean(-1, keepdim=True) + attributes["epsilon"]).rsqrt()
            case "total":
                result = (
                    given[0].sum() if attributes["axes"] is None else given[0].sum(attributes["axes"], keepdim=True)
                )
            case "reshape":
                result = given[0].reshape(node.output.shape)
            case "transpose":
                result = given[0].permute(attributes["order"])
            case "swap_halves":
                result = torch.cat(given[0].chunk(2, -1)[::-1], -1)
            case name:
                result = getattr(torch, name)(*given)
        values[node.output.name] = result
        assert tuple(result.shape) == node.output.shape
    return values
