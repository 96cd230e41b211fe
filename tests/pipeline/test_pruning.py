"""A student cut out of its teacher: nothing is lost that the teacher did not already lack."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from edge_runtime.formats.errors import UserError
from pipeline.distillation.pruning import (
    Importance,
    StudentShape,
    measure_importance,
    prune,
    random_student,
    student_shape,
)
from pipeline.distillation.teachers import TeacherSource, load_checkpoint
from pipeline.settings_training import SubmodelConfig
from tests.pipeline.conftest import VOCABULARY, MakeModel

FULL = StudentShape(hidden_size=64, intermediate_size=96, num_kv_heads=2, num_layers=3)
TOKENS = torch.randint(VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(8))
TEACHER_7B = SimpleNamespace(hidden_size=3584, intermediate_size=18944, num_key_value_heads=4, num_hidden_layers=28)
# Norm of the difference over the norm; measured, with a fifth to spare.
BF16_ERROR = 0.0055
FEW_BITS_ERROR = {"int8": 0.014, "int4": 0.18}
VARIANTS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama-tied": {"tie_word_embeddings": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
}


@pytest.fixture(params=VARIANTS)
def teacher(request: pytest.FixtureRequest, make_model: MakeModel) -> Any:
    return make_model(request.param.partition("-")[0], **VARIANTS[request.param])


def test_the_teachers_own_shape_gives_the_teachers_own_logits(teacher: Any) -> None:
    student = prune(teacher, measure_importance(teacher, [TOKENS]), FULL)
    assert torch.equal(_logits(student), _logits(teacher))
    assert student is not teacher and not _shares_memory(student, teacher) and not student.training


def test_dead_neurons_are_what_goes_first(teacher: Any) -> None:
    dead = [torch.randperm(96, generator=torch.Generator().manual_seed(layer))[:32] for layer in range(3)]
    with torch.no_grad():
        for layer, neurons in zip(teacher.model.layers, dead, strict=True):
            layer.mlp.gate_proj.weight[neurons] = 0
            if layer.mlp.gate_proj.bias is not None:
                layer.mlp.gate_proj.bias[neurons] = 0
    importance = measure_importance(teacher, [TOKENS])
    for scores, neurons in zip(importance.ffn, dead, strict=True):
        assert set(scores.argsort()[:32].tolist()) == set(neurons.tolist())
    student = prune(teacher, importance, StudentShape(64, 64, 2, 3))
    _assert_close(student, teacher)
    alive = [n for n in range(96) if n not in dead[1].tolist()]
    assert torch.equal(student.model.layers[1].mlp.up_proj.weight, teacher.model.layers[1].mlp.up_proj.weight[alive])


def test_a_dead_group_goes_with_its_queries(teacher: Any) -> None:
    with torch.no_grad():
        for index, layer in enumerate(teacher.model.layers):
            rows = slice(0, 16) if index == 1 else slice(16, 32)
            layer.self_attn.v_proj.weight[rows] = 0
            if layer.self_attn.v_proj.bias is not None:
                layer.self_attn.v_proj.bias[rows] = 0
    student = prune(teacher, measure_importance(teacher, [TOKENS]), StudentShape(64, 96, 1, 3))
    config = student.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 16)
    _assert_close(student, teacher)
    kept = teacher.model.layers[1].self_attn
    assert torch.equal(student.model.layers[1].self_attn.q_proj.weight, kept.q_proj.weight[32:64])
    assert torch.equal(student.model.layers[1].self_attn.k_proj.weight, kept.k_proj.weight[16:32])
    assert torch.equal(student.model.layers[1].self_attn.o_proj.weight, kept.o_proj.weight[:, 32:64])


@pytest.mark.parametrize("identity", [0, 1, 2])
def test_a_layer_that_does_nothing_goes_first(make_model: MakeModel, identity: int) -> None:
    teacher = make_model("qwen2")
    with torch.no_grad():
        teacher.model.layers[identity].self_attn.o_proj.weight.zero_()
        teacher.model.layers[identity].mlp.down_proj.weight.zero_()
    student = prune(teacher, measure_importance(teacher, [TOKENS]), StudentShape(64, 96, 2, 2))
    assert len(student.model.layers) == 2 == student.config.num_hidden_layers == len(student.config.layer_types)
    _assert_close(student, teacher)


def test_width_keeps_the_dimensions_with_the_largest_activations(teacher: Any) -> None:
    loud = torch.randperm(64, generator=torch.Generator().manual_seed(4))[:32].sort().values
    quiet = torch.tensor([n for n in range(64) if n not in loud.tolist()])
    with torch.no_grad():
        for layer in teacher.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[quiet] *= 1e-3
    scores = replace(measure_importance(teacher, [TOKENS]), energy=None)
    student = prune(teacher, scores, StudentShape(32, 96, 2, 3))
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight[:, loud])
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight[:, loud])
    assert torch.equal(student.model.norm.weight, teacher.model.norm.weight[loud])
    layer, whole = student.model.layers[2], teacher.model.layers[2]
    assert torch.equal(layer.input_layernorm.weight, whole.input_layernorm.weight[loud])
    assert torch.equal(layer.self_attn.q_proj.weight, whole.self_attn.q_proj.weight[:, loud])
    assert torch.equal(layer.self_attn.o_proj.weight, whole.self_attn.o_proj.weight[loud])
    assert torch.equal(layer.mlp.gate_proj.weight, whole.mlp.gate_proj.weight[:, loud])
    assert torch.equal(layer.mlp.down_proj.weight, whole.mlp.down_proj.weight[loud])
    for kept, bias in (
        (layer.self_attn.o_proj.bias, whole.self_attn.o_proj.bias),
        (layer.mlp.down_proj.bias, whole.mlp.down_proj.bias),
    ):
        assert bias is None or torch.equal(kept, bias[loud])


@pytest.mark.parametrize("aggregation", ["l2", "mean"])
def test_how_sequences_are_split_into_batches_makes_no_difference(make_model: MakeModel, aggregation: Any) -> None:
    teacher = make_model("llama")
    splits = ([TOKENS], [TOKENS[:1], TOKENS[1:]], list(TOKENS.split(1)))
    whole, *others = (measure_importance(teacher, batches, aggregation) for batches in splits)
    for other in others:
        for name in Importance.__slots__:
            torch.testing.assert_close(getattr(whole, name), getattr(other, name), rtol=1e-6, atol=1e-9)
    assert not [module for module in teacher.modules() if module._forward_hooks or module._forward_pre_hooks]


@pytest.mark.parametrize("aggregation", ["l2", "mean"])
def test_importance_is_what_flows_into_the_next_projection(make_model: MakeModel, aggregation: Any) -> None:
    teacher = make_model("llama", num_hidden_layers=1)
    layer, seen = teacher.model.layers[0], {}
    handles = [module.register_forward_hook(lambda _m, a, out, k=key: seen.update({k: (a[0], out)})) for key, module in
               {"down": layer.mlp.down_proj, "o": layer.self_attn.o_proj, "in": layer.input_layernorm,
                "post": layer.post_attention_layernorm, "layer": layer, "end": teacher.model.norm}.items()]  # fmt: skip
    importance = measure_importance(teacher, [TOKENS], aggregation)
    for handle in handles:
        handle.remove()

    def over_sequences(magnitudes: torch.Tensor) -> torch.Tensor:
        means = magnitudes.numpy().mean(axis=1)
        return torch.from_numpy(np.sqrt((means**2).mean(axis=0)) if aggregation == "l2" else means.mean(axis=0))

    torch.testing.assert_close(importance.ffn[0], over_sequences(seen["down"][0].double().abs()))
    heads = seen["o"][0].double()
    groups = torch.stack([heads[..., span].norm(dim=-1) for span in (slice(32), slice(32, 64))], dim=-1)
    torch.testing.assert_close(importance.groups[0], over_sequences(groups))
    torch.testing.assert_close(
        importance.hidden, sum(over_sequences(seen[k][1].double().abs()) for k in ("in", "post"))
    )
    before, after = (x.double() for x in seen["layer"])
    angle = 1 - (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
    torch.testing.assert_close(importance.layers[0], angle.mean())
    energies = torch.stack([seen[k][0].double().square().mean((0, 1)) for k in ("in", "post", "end")])
    torch.testing.assert_close(importance.energy, energies)


def test_quieter_hidden_dimensions_leave_the_norms_in_balance(make_model: MakeModel) -> None:
    """A norm that divides by fewer dimensions is scaled by the root of their mean energy over that of all."""
    scores = Importance(torch.arange(64.0), torch.ones(3, 96), torch.ones(3, 2), torch.tensor([1.0, 0, 1]))
    energy = torch.ones(7, 64)
    energy[:, 32:] = torch.arange(3.0, 10)[:, None]
    shape = StudentShape(32, 96, 2, 2)
    student = prune(make_model("llama"), replace(scores, energy=energy), shape)
    plain = prune(make_model("llama"), scores, shape)
    kept = {"model.layers.0.input": 3, "model.layers.0.post": 4, "model.layers.1.input": 7, "model.layers.1.post": 8,
            "model.norm": 9}  # fmt: skip
    for name, parameter in student.named_parameters():
        loud = next((value for start, value in kept.items() if name.startswith(start)), 1)
        expected = plain.state_dict()[name] * (loud / ((1 + loud) / 2)) ** 0.5
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=0)


def test_layers_keep_their_kind_of_attention(make_model: MakeModel) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    scores = Importance(torch.ones(64), torch.ones(3, 96), torch.ones(3, 2), torch.tensor([0.0, 1, 1]))
    student = prune(make_model("qwen2", **windows), scores, StudentShape(64, 96, 2, 2))
    assert student.config.layer_types == ["sliding_attention"] * 2


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ((1, 1, 1, 1), (3584, 18944, 4, 28)),
        ((0.57, 0.58, 0.58, 1.0), (2048, 10976, 2, 28)),
        ((0.43, 0.47, 0.43, 1.0), (1536, 8896, 2, 28)),
        ((0.25, 0.26, 0.5, 0.86), (896, 4928, 2, 24)),
        ((0.001, 0.001, 0.01, 0.01), (32, 32, 1, 1)),
    ],
)
def test_ratios_become_multiples_of_32_and_whole_groups(ratios: tuple[float, ...], expected: tuple[int, ...]) -> None:
    shape = student_shape(TEACHER_7B, _submodel(*ratios))
    assert (shape.hidden_size, shape.intermediate_size, shape.num_kv_heads, shape.num_layers) == expected


def test_absolute_sizes_win() -> None:
    absolute = {"hidden_size": 96, "intermediate_size": 160, "num_kv_heads": 3, "num_layers": 5}
    assert student_shape(TEACHER_7B, _submodel(1, 1, 1, 1, **absolute)) == StudentShape(*absolute.values())


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "num_kv_heads", "num_layers"])
def test_a_student_larger_than_its_teacher_is_refused(field: str) -> None:
    teacher = SimpleNamespace(hidden_size=64, intermediate_size=96, num_key_value_heads=2, num_hidden_layers=3)
    size, limit = (160, {"hidden_size": 64, "intermediate_size": 96}[field]) if "size" in field else (4, None)
    with pytest.raises(
        UserError, match=rf"^submodel\.{field}: got {size}, allowed: at most the teacher's {limit or ''}"
    ):
        student_shape(teacher, _submodel(1, 1, 1, 1, **{field: size}))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_students_checkpoint_is_one_that_transformers_loads(
    make_model: MakeModel, architecture: str, tmp_path: Path
) -> None:
    teacher = make_model(architecture).bfloat16()
    shape = StudentShape(32, 64, 1, 2)
    student = prune(teacher, measure_importance(teacher, [TOKENS]), shape)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval()
    assert type(loaded) is type(teacher) and loaded.dtype == torch.float32
    assert torch.equal(_logits(loaded), _logits(student))
    generated = loaded.generate(TOKENS[:1, :4], max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert generated.shape == (1, 9)


def test_heads_keep_their_size_where_the_configuration_does_not_name_it() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    teacher = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes)).eval()
    assert getattr(teacher.config, "head_dim", None) is None
    student = prune(teacher, measure_importance(teacher, [TOKENS]), StudentShape(32, 96, 2, 1))
    assert student.model.layers[0].self_attn.q_proj.weight.shape == (64, 32) and student.config.head_dim == 16


def test_the_baseline_has_the_students_shape_and_none_of_its_weights(make_model: MakeModel) -> None:
    teacher, shape = make_model("qwen3"), StudentShape(32, 64, 1, 2)
    student = prune(teacher, measure_importance(teacher, [TOKENS]), shape)
    baseline, again, other = (random_student(teacher, shape, seed) for seed in (1, 1, 2))
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (student, baseline)]
    assert shapes[0] == shapes[1]
    assert torch.equal(_logits(baseline), _logits(again)) and not torch.equal(_logits(baseline), _logits(other))
    assert not torch.equal(baseline.lm_head.weight, student.lm_head.weight)


def test_the_teacher_stays_as_it_was(make_model: MakeModel) -> None:
    teacher = make_model("llama")
    before, config = _logits(teacher), teacher.config.to_dict()
    prune(teacher, measure_importance(teacher, [TOKENS]), StudentShape(32, 32, 1, 1))
    assert torch.equal(_logits(teacher), before) and teacher.config.to_dict() == config


def test_scores_of_another_model_are_refused(make_model: MakeModel) -> None:
    scores = measure_importance(make_model("llama", intermediate_size=64), [TOKENS])
    with pytest.raises(
        UserError, match=r"^importance\.ffn: got \(3, 64\), allowed: \(3, 96\); measure it on this model$"
    ):
        prune(make_model("llama"), scores, StudentShape(32, 32, 1, 1))


def test_activations_that_are_not_finite_are_refused_by_name(make_model: MakeModel) -> None:
    teacher = make_model("llama")
    with torch.no_grad():
        teacher.model.layers[1].mlp.up_proj.weight[3, 0] = float("nan")
    with pytest.raises(UserError, match=r"^importance: got '[a-z]+ \d is not finite'"):
        measure_importance(teacher, [TOKENS])


def test_weights_that_are_not_finite_are_refused_by_name(make_model: MakeModel) -> None:
    teacher = make_model("llama")
    scores = measure_importance(teacher, [TOKENS])
    with torch.no_grad():
        teacher.model.layers[1].mlp.up_proj.weight[:, 0] = float("inf")
    with pytest.raises(UserError, match=r"^weights model\.layers\.1\.mlp\.up_proj\.weight: got 'NaN or infinity'"):
        prune(teacher, scores, FULL)


def test_no_sequences_are_refused(make_model: MakeModel) -> None:
    with pytest.raises(UserError, match=r"^importance_sequences: got 0"):
        measure_importance(make_model("llama"), [])


def test_other_architectures_are_refused_with_those_that_are_taken() -> None:
    sizes = {"vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes))
    with pytest.raises(UserError, match=r"GPT2LMHeadModel.*LlamaForCausalLM, MistralForCausalLM, Qwen2.*, Qwen3"):
        measure_importance(model, [TOKENS])


@pytest.mark.parametrize("load", ["int8", "int4"])
def test_a_teacher_of_few_bits_gives_nearly_the_same_scores(make_model: MakeModel, load: str, tmp_path: Path) -> None:
    make_model("llama", intermediate_size=128).save_pretrained(tmp_path)
    models = [load_checkpoint(TeacherSource(str(tmp_path), kind, None, "x")) for kind in ("fp32", "bf16", load)]
    exact, bf16, few = (measure_importance(model, [TOKENS]) for model in models)
    for name in ("hidden", "ffn", "groups", "layers"):
        a, b, c = (getattr(scores, name).flatten() for scores in (exact, bf16, few))
        assert float((a - b).norm() / a.norm()) < BF16_ERROR, name
        assert float((a - c).norm() / a.norm()) < FEW_BITS_ERROR[load], name
    with pytest.raises(UserError, match=r"^teacher\.load: got 'model\.layers\.0\.self_attn\.q_proj\.weight as torch\."):
        prune(models[2], few, replace(FULL, intermediate_size=128))


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def _assert_close(student: Any, teacher: Any) -> None:
    expected = _logits(teacher)
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in teacher.parameters())
    torch.testing.assert_close(_logits(student), expected, rtol=0, atol=5e-6)


def _shares_memory(student: Any, teacher: Any) -> bool:
    owned = {parameter.data_ptr() for parameter in teacher.parameters()}
    return any(parameter.data_ptr() in owned for parameter in student.parameters())


def _submodel(width: float, ffn: float, heads: float, depth: float, **absolute: int) -> SubmodelConfig:
    return SubmodelConfig(name="some", width=width, ffn=ffn, heads=heads, depth=depth, **absolute)
