"""The TFLite files against transformers and PEFT holding the same (dequantized) weights, and against LiteRT itself."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from edge_runtime.backends.tflite import TfliteBackend
from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.int4 import QuantizedTensor, dequantize, save_weights
from edge_runtime.formats.lora import Adapter
from pipeline.export.checkpoint import float_weights, spec_of
from pipeline.export.lora_slots import LoraSlots
from pipeline.export.tflite_graph import write_tflite

Weights = dict[str, QuantizedTensor | NDArray[np.float32]]
Quantizer = Callable[[NDArray[np.float32]], "QuantizedTensor | NDArray[np.float32]"]

GROUP = 32
CONTEXT_TOKENS = 160
PREFILL_TOKENS = 24
IDS = np.random.default_rng(5).integers(0, 511, 100).tolist()
# Largest difference seen over all cases and both signatures: 3.1e-6, at logits of standard deviation 0.65.
FLOAT_BOUND = 6e-6
# Activations are rounded to 8 bits while running: answers scatter around the dequantized model's, 2.1 % at most here.
RMS_BOUND = 0.025
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN_PROJ = "model.layers.0.mlp.down_proj.weight"
# PEFT still reads a property that transformers 5 has renamed.
PEFT_WARNINGS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SIZES: dict[str, Any] = {
    "vocab_size": 511,
    "hidden_size": 160,
    "intermediate_size": 172,  # padded to 192 by the quantizer
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
GROUPED = SIZES | {"num_attention_heads": 8, "num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama tied, 5 heads over 1": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama untied, all biases": lambda: LlamaForCausalLM(
        LlamaConfig(**GROUPED, tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
    ),
    "llama, one query head a group, yarn": lambda: LlamaForCausalLM(
        LlamaConfig(**(SIZES | {"num_key_value_heads": 5}), tie_word_embeddings=True, rope_parameters=YARN)
    ),
    "qwen2, q k v biases": lambda: Qwen2ForCausalLM(
        Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}, tie_word_embeddings=True)
    ),
    "qwen3, query and key norms": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, tie_word_embeddings=False)),
}


@dataclass(frozen=True)
class Case:
    """A model of transformers, and the spec made of it."""

    model: PreTrainedModel
    spec: DecoderSpec

    def weights(self, quantizer: Quantizer) -> Weights:
        floats = float_weights(self.model)
        return {name: quantizer(value) if value.ndim == 2 else value for name, value in floats.items()}

    def logits(self, weights: Weights) -> NDArray[np.float32]:
        """(T, V) of the model holding ``weights`` instead of its own."""
        kept = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        try:
            self.model.load_state_dict(
                {name: torch.from_numpy(_as_floats(value)) for name, value in weights.items()}, strict=False
            )
            with torch.no_grad():
                return self.model(torch.tensor([IDS])).logits[0].numpy()
        finally:
            self.model.load_state_dict(kept)


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> Case:
    return _case(request.param)


@pytest.fixture(scope="module")
def tied() -> Case:
    return _case("llama tied, 5 heads over 1")


def test_float_file_answers_as_transformers_does(case: Case, tmp_path: Path) -> None:
    weights = case.weights(_unchanged)
    backend = _export(tmp_path, case, weights)
    expected = case.logits(weights)

    assert np.abs(_prefilled(backend) - expected).max() <= FLOAT_BOUND
    assert np.abs(_decoded(backend) - expected).max() <= FLOAT_BOUND


def test_int4_file_answers_as_the_dequantized_model_does(case: Case, tmp_path: Path) -> None:
    weights = case.weights(_int4)
    backend = _export(tmp_path, case, weights)
    expected = case.logits(weights)

    assert _relative_rms(_prefilled(backend), expected) <= RMS_BOUND
    assert _relative_rms(_decoded(backend), expected) <= RMS_BOUND


def test_int8_file_answers_as_the_dequantized_model_does(case: Case, tmp_path: Path) -> None:
    weights = case.weights(_int8)
    backend = _export(tmp_path, case, weights, profile="legacy")
    expected = case.logits(weights)

    assert _relative_rms(_prefilled(backend), expected) <= RMS_BOUND
    assert _relative_rms(_decoded(backend), expected) <= RMS_BOUND


def test_file_runs_in_plain_litert_at_its_full_context(tied: Case, tmp_path: Path) -> None:
    """Without our backend: shapes as declared in the file, nothing resized."""
    _export(tmp_path, tied, tied.weights(_unchanged))
    interpreter = Interpreter(model_path=str(tmp_path / "model.tflite"))
    prefill = interpreter.get_signature_runner("prefill")
    inputs = {name: np.zeros(detail["shape"], detail["dtype"]) for name, detail in prefill.get_input_details().items()}
    inputs["tokens"][:] = IDS[:PREFILL_TOKENS]
    angles = np.arange(PREFILL_TOKENS)[:, None] * np.array(tied.spec.inv_freq)
    inputs["cos"][:] = np.cos(np.concatenate([angles, angles], axis=1))
    inputs["sin"][:] = np.sin(np.concatenate([-angles, angles], axis=1))
    inputs["mask"][:] = -1e9
    inputs["mask"][..., :PREFILL_TOKENS] = np.triu(np.full((PREFILL_TOKENS,) * 2, -1e9), k=1)

    assert inputs["past_k_0"].shape == (1, 1, CONTEXT_TOKENS, 32)
    expected = tied.logits(tied.weights(_unchanged))[:PREFILL_TOKENS]
    assert np.abs(prefill(**inputs)["logits"] - expected).max() <= FLOAT_BOUND


@PEFT_WARNINGS
def test_adapter_inputs_add_what_peft_adds(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    case = _case("llama tied, 5 heads over 1")
    targets = ("q_proj", "v_proj", "down_proj")
    backend = _export(tmp_path, case, case.weights(_unchanged), lora=LoraSlots(targets, rank=16))
    base = case.logits(case.weights(_unchanged))
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=list(targets), init_lora_weights=False)
    adapted = get_peft_model(case.model, config).eval()
    with torch.no_grad():
        expected = adapted(torch.tensor([IDS])).logits[0].numpy()

    backend.set_adapter(_adapter_of(adapted, scale=3.0))

    assert _relative_rms(expected, base) > 0.2, "an adapter too weak to prove anything"
    assert np.abs(_prefilled(backend) - expected).max() <= FLOAT_BOUND
    assert np.abs(_decoded(backend) - expected).max() <= FLOAT_BOUND


def test_legacy_file_answers_correctly_in_the_old_runtime(tied: Case, tmp_path: Path) -> None:
    weights = tied.weights(_int8)
    lora = LoraSlots(("q_proj", "down_proj"), 8)
    _export(tmp_path, tied, weights, profile="legacy", lora=lora)

    prefilled, decoded = _answers_of_the_old_runtime(tmp_path, tied.spec)

    expected = tied.logits(weights)
    assert _relative_rms(prefilled, expected) <= RMS_BOUND
    assert _relative_rms(decoded, expected) <= RMS_BOUND


def test_float_file_answers_exactly_in_the_old_runtime(tmp_path: Path) -> None:
    case = _case("qwen3, query and key norms")
    weights = case.weights(_unchanged)
    _export(tmp_path, case, weights, profile="legacy")

    prefilled, decoded = _answers_of_the_old_runtime(tmp_path, case.spec)

    expected = case.logits(weights)
    assert np.abs(prefilled - expected).max() <= FLOAT_BOUND
    assert np.abs(decoded - expected).max() <= FLOAT_BOUND


def _case(name: str) -> Case:
    torch.manual_seed(11)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.05)
            elif "norm" in parameter_name:
                parameter.uniform_(0.7, 1.3)
            else:
                parameter.normal_(std=0.3)
    return Case(model, spec_of(model, CONTEXT_TOKENS))


def _export(
    folder: Path, case: Case, weights: Weights, *, profile: str = "current", lora: LoraSlots | None = None
) -> TfliteBackend:
    path = folder / "model.tflite"
    write_tflite(path, case.spec, weights, profile=profile, lora=lora, prefill_tokens=PREFILL_TOKENS)  # type: ignore[arg-type]
    return TfliteBackend.open(path, case.spec, threads=1)


def _prefilled(backend: TfliteBackend) -> NDArray[np.float32]:
    return backend.prefill(IDS, backend.allocate(CONTEXT_TOKENS), all_logits=True)


def _decoded(backend: TfliteBackend) -> NDArray[np.float32]:
    cache = backend.allocate(CONTEXT_TOKENS)
    return np.stack([backend.decode(token, cache) for token in IDS])


def _answers_of_the_old_runtime(folder: Path, spec: DecoderSpec) -> Iterator[NDArray[np.float32]]:
    """(T, V) from prefill and from decode of ``folder``'s file, by a process that has numpy 1 and no LiteRT."""
    root = Path(__file__).parents[2]
    python = os.environ.get("SEVENFOLD_LEGACY_PYTHON", str(root / ".venv-legacy/bin/python"))
    if "SEVENFOLD_LEGACY_PYTHON" not in os.environ and not Path(python).exists():
        pytest.skip("no old runtime: python -m venv .venv-legacy && .venv-legacy/bin/pip install '.[legacy]'")
    save_weights(folder / "spec.safetensors", spec, {"nothing": np.zeros(1, np.float32)})
    script = (
        "import sys; import numpy as np; from pathlib import Path\n"
        "import tflite_runtime; assert np.__version__.startswith('1.')\n"
        "from edge_runtime.backends.tflite import TfliteBackend; from edge_runtime.formats.int4 import load_weights\n"
        "folder, ids = Path(sys.argv[1]), [int(id) for id in sys.argv[2].split(',')]\n"
        "spec, _ = load_weights(folder / 'spec.safetensors')\n"
        "backend = TfliteBackend.open(folder / 'model.tflite', spec, threads=1)\n"
        "np.save(folder / 'prefilled.npy', backend.prefill(ids, backend.allocate(len(ids)), all_logits=True))\n"
        "cache = backend.allocate(len(ids))\n"
        "np.save(folder / 'decoded.npy', np.stack([backend.decode(id, cache) for id in ids]))\n"
    )
    arguments = [python, "-c", script, str(folder), ",".join(str(token) for token in IDS)]
    subprocess.run(arguments, check=True, timeout=60, cwd=root, env={"PYTHONPATH": str(root)})
    return (np.load(folder / f"{name}.npy") for name in ("prefilled", "decoded"))


def _adapter_of(adapted: torch.nn.Module, scale: float) -> Adapter:
    modules = dict(adapted.named_modules())
    pairs = {
        name.removeprefix("base_model.model."): (
            module.lora_A["default"].weight.detach().numpy(),
            module.lora_B["default"].weight.detach().numpy(),
        )
        for name, module in modules.items()
        if hasattr(module, "lora_A")
    }
    return Adapter(rank=4, scale=scale, pairs=pairs, base_digest=None)


def _relative_rms(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2)) / expected.std())


def _as_floats(value: QuantizedTensor | NDArray[np.float32]) -> NDArray[np.float32]:
    return dequantize(value) if isinstance(value, QuantizedTensor) else value


def _unchanged(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    return weight


def _int4(weight: NDArray[np.float32], group: int = GROUP) -> QuantizedTensor:
    """Round to nearest with positive scales; columns padded to whole groups."""
    rows, columns = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -columns % group))).reshape(rows, -1, group)
    scales = np.maximum(np.abs(padded).max(axis=2) / 7, 1e-4).astype(np.float16)
    codes = np.clip(np.rint(padded / scales.astype(np.float32)[..., None]), -8, 7).astype(np.int8)
    return QuantizedTensor.of_codes(codes.reshape(rows, -1), scales, bits=4, columns=columns)


def _int8(weight: NDArray[np.float32]) -> QuantizedTensor:
    """Round to nearest with one scale for the whole tensor."""
    scale = np.float16(np.abs(weight).max() / 127)
    codes = np.clip(np.rint(weight / np.float32(scale)), -127, 127).astype(np.int8)
    return QuantizedTensor.of_codes(codes, np.full((1, 1), scale, np.float16), bits=8, columns=weight.shape[1])
