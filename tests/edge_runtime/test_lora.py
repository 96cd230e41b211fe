"""Adapters as PEFT writes them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from edge_runtime.formats.decoder import PROJECTIONS
from edge_runtime.formats.errors import AdapterError
from edge_runtime.formats.lora import BASE_KEY, bind_adapter, load_adapter
from tests.edge_runtime.fakes import SPEC

# PEFT asks transformers for a name that transformers gave up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

DIGEST, OTHER_DIGEST = "ab" * 32, "cd" * 32
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def train(directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> peft.PeftModel:
    """Save an adapter with random halves, as after training, and return the model that holds it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=SPEC.vocab_size,
        hidden_size=SPEC.hidden_size,
        intermediate_size=SPEC.intermediate_size,
        num_hidden_layers=SPEC.num_layers,
        num_attention_heads=SPEC.num_heads,
        num_key_value_heads=SPEC.num_kv_heads,
        head_dim=SPEC.head_dim,
        tie_word_embeddings=True,
    )
    options = {"r": 4, "lora_alpha": 12, "target_modules": list(PROJECTIONS), "init_lora_weights": False} | options
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config), peft.LoraConfig(task_type="CAUSAL_LM", **options)
    ).to(dtype)
    model.save_pretrained(directory)
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    train(directory)
    return directory


@pytest.fixture
def adapter_dir(trained: Path, tmp_path: Path) -> Path:
    """A bound adapter that a test may damage."""
    directory = tmp_path / "adapter"
    directory.mkdir()
    for name in (WEIGHTS, CONFIG):
        (directory / name).write_bytes((trained / name).read_bytes())
    (directory / "base.json").write_text(json.dumps({BASE_KEY: DIGEST}))
    return directory


def edit_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | changes))


def edit_weights(directory: Path, change: Callable[[dict[str, Any]], object], **metadata: str) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"} | metadata)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float16, {"target_modules": ["q_proj", "v_proj"]}),
        (torch.bfloat16, {"target_modules": ["down_proj"], "r": 3}),
        (torch.float32, {"use_rslora": True, "r": 16}),
        (torch.float32, {"init_lora_weights": True, "lora_dropout": 0.1, "layers_to_transform": [1]}),
    ],
)
def test_every_delta_is_pefts(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = train(tmp_path, dtype, **options)
    adapter = load_adapter(tmp_path, SPEC, DIGEST, allow_unbound=True)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    assert layers.keys() == adapter.pairs.keys()
    for name, layer in layers.items():
        lora_a, lora_b = adapter.pairs[name]
        assert (lora_a.dtype, lora_b.dtype) == (np.float32, np.float32)
        assert lora_a.shape == (adapter.rank, layer.in_features)
        # In float32: the oracle must not round where this program does not.
        expected = layer.float().get_delta_weight("default").detach().numpy()
        assert np.abs(adapter.scale * (lora_b @ lora_a) - expected).max() <= 1e-6 * max(1.0, np.abs(expected).max())


def test_modules_come_in_the_decoders_order(adapter_dir: Path) -> None:
    adapter = load_adapter(adapter_dir, SPEC, DIGEST)
    assert list(adapter.pairs) == [name for name, _ in SPEC.module_names()]
    assert (adapter.rank, adapter.scale, adapter.base_digest) == (4, 3.0, DIGEST)


def test_another_base_is_refused_naming_both(adapter_dir: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        load_adapter(adapter_dir, SPEC, OTHER_DIGEST, allow_unbound=True)
    assert DIGEST in str(caught.value) and OTHER_DIGEST in str(caught.value)


def test_no_base_is_refused_unless_allowed(adapter_dir: Path) -> None:
    (adapter_dir / "base.json").unlink()
    with pytest.raises(AdapterError, match="--unbound-adapter"):
        load_adapter(adapter_dir, SPEC, DIGEST)
    assert load_adapter(adapter_dir, SPEC, DIGEST, allow_unbound=True).base_digest is None


def test_the_binding_may_stand_in_the_weights(adapter_dir: Path) -> None:
    (adapter_dir / "base.json").unlink()
    edit_weights(adapter_dir, lambda tensors: None, **{BASE_KEY: DIGEST})
    assert load_adapter(adapter_dir, SPEC, DIGEST).base_digest == DIGEST
    with pytest.raises(AdapterError, match=OTHER_DIGEST):
        load_adapter(adapter_dir, SPEC, OTHER_DIGEST)
    (adapter_dir / "base.json").write_text(json.dumps({BASE_KEY: OTHER_DIGEST}))
    with pytest.raises(AdapterError, match="bound to two bases"):
        load_adapter(adapter_dir, SPEC, DIGEST)


def test_binding_writes_the_base_and_never_changes_it(adapter_dir: Path) -> None:
    (adapter_dir / "base.json").unlink()
    bind_adapter(adapter_dir, DIGEST)
    bind_adapter(adapter_dir, DIGEST)
    assert load_adapter(adapter_dir, SPEC, DIGEST).base_digest == DIGEST
    with pytest.raises(AdapterError, match="bound to base"):
        bind_adapter(adapter_dir, OTHER_DIGEST)
    assert sorted(path.name for path in adapter_dir.iterdir()) == [CONFIG, WEIGHTS, "base.json"]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"base_digest": 5}', '{"base_digest": "abc"}', '{"digest": "x"}'])
def test_a_damaged_binding_is_refused(adapter_dir: Path, content: str) -> None:
    (adapter_dir / "base.json").write_text(content)
    with pytest.raises(AdapterError, match=r"base\.json"):
        load_adapter(adapter_dir, SPEC, DIGEST, allow_unbound=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"fan_in_fan_out": True},
        {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 2]]},
        {"trainable_token_indices": [1]},
        {"something_new": 1},
        {"r": 0},
        {"r": 2.0},
        {"r": 5000},
        {"lora_alpha": -1},
        {"lora_alpha": None},
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(adapter_dir: Path, changes: dict[str, object]) -> None:
    edit_config(adapter_dir, **changes)
    with pytest.raises(AdapterError, match=next(iter(changes))) as caught:
        load_adapter(adapter_dir, SPEC, DIGEST)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update({f"{Q_PROJ}.lora_A.weight": np.zeros((4, 31), np.float32)}), r"\(4, 31\).*\(4, 32\)"),
        (lambda t: t.update({f"{Q_PROJ}.lora_B.weight": np.zeros((32, 3), np.float32)}), r"\(32, 3\).*\(32, 4\)"),
        (lambda t: t[f"{Q_PROJ}.lora_A.weight"].__setitem__((0, 0), np.nan), "not finite"),
        (lambda t: t[f"{Q_PROJ}.lora_B.weight"].__setitem__((0, 0), np.inf), "not finite"),
        (lambda t: t.pop(f"{Q_PROJ}.lora_B.weight"), "only its half lora_A"),
        (lambda t: t.clear(), "no adapter weights"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": np.zeros((4, 32), np.float32)}), "lm_head"),
        (lambda t: t.update({Q_PROJ.replace("s.0", "s.2") + ".lora_A.weight": np.zeros((4, 32), np.float32)}), "s.2"),
        (lambda t: t.update({f"{Q_PROJ}.lora_magnitude_vector": np.zeros(4, np.float32)}), "magnitude"),
        (lambda t: t.update({f"{Q_PROJ}.lora_A.weight": np.zeros((4, 32), np.int32)}), "is I32"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    adapter_dir: Path, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    edit_weights(adapter_dir, change)
    with pytest.raises(AdapterError, match=says):
        load_adapter(adapter_dir, SPEC, DIGEST)


def test_damaged_and_missing_files_are_refused(adapter_dir: Path) -> None:
    original = (adapter_dir / WEIGHTS).read_bytes()
    for content in (b"", original[:-1], original[:40], b"\xff" * 100, original + b"x"):
        (adapter_dir / WEIGHTS).write_bytes(content)
        with pytest.raises(AdapterError, match="damaged safetensors"):
            load_adapter(adapter_dir, SPEC, DIGEST)
    (adapter_dir / WEIGHTS).rename(adapter_dir / "adapter_model.bin")
    with pytest.raises(AdapterError, match="safetensors"):
        load_adapter(adapter_dir, SPEC, DIGEST)
    with pytest.raises(AdapterError, match="PEFT's format"):
        load_adapter(adapter_dir / "absent", SPEC, DIGEST)


def test_oversized_files_are_not_read(adapter_dir: Path) -> None:
    with (adapter_dir / CONFIG).open("r+b") as file:
        file.truncate(1 << 34)  # sparse
    with pytest.raises(AdapterError, match="longer than"):
        load_adapter(adapter_dir, SPEC, DIGEST)
