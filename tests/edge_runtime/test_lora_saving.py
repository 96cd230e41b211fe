"""Adapters as we write them: PEFT and our own reader get back every bit, and equal adapters are equal bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import safetensors
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora import Linear
from safetensors.numpy import load_file

from edge_runtime.formats import lora
from edge_runtime.formats.errors import AdapterError
from edge_runtime.formats.lora import Adapter, encode_adapter, load_adapter, prefix_adapter, save_adapter
from tests.edge_runtime.fakes import SPEC

DIGEST = "ab" * 32
FILES = ["adapter_config.json", "adapter_model.safetensors", "base.json"]
MODULES = ["model.layers.1.self_attn.v_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
SHAPES = {module: SPEC.projection_shape(module.rpartition(".")[2]) for module in MODULES}


def make(rank: int = 6, scale: float = 1.5, digest: str | None = DIGEST, seed: int = 0) -> Adapter:
    random = np.random.default_rng(seed)
    pairs = {
        module: (
            random.normal(size=(rank, columns)).astype(np.float32),
            random.normal(size=(rows, rank)).astype(np.float32).T.copy().T,  # not contiguous, as a prefix is
        )
        for module, (rows, columns) in SHAPES.items()
    }
    return Adapter(rank, scale, pairs, digest)


def in_peft(directory: Path) -> dict[str, Linear]:
    """The layers of a base that PEFT adapted."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=SPEC.vocab_size, hidden_size=SPEC.hidden_size, intermediate_size=SPEC.intermediate_size,
        num_hidden_layers=SPEC.num_layers, num_attention_heads=SPEC.num_heads, head_dim=SPEC.head_dim,
        num_key_value_heads=SPEC.num_kv_heads, tie_word_embeddings=True,
    )  # fmt: skip
    model = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM(config), directory)
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, Linear)
    }


@pytest.mark.parametrize(("rank", "scale"), [(6, 1.5), (3, 16 / 7), (1, 0.1)])
def test_peft_and_the_device_read_back_every_bit(tmp_path: Path, rank: int, scale: float) -> None:
    saved = make(rank, scale)
    save_adapter(tmp_path / "adapter", saved)
    layers, loaded = in_peft(tmp_path / "adapter"), load_adapter(tmp_path / "adapter", SPEC, DIGEST)
    assert sorted(layers) == sorted(loaded.pairs) == sorted(MODULES)
    assert (loaded.rank, loaded.scale, loaded.base_digest) == (rank, scale, DIGEST)
    for module, (lora_a, lora_b) in saved.pairs.items():
        assert layers[module].scaling["default"] == scale
        assert np.array_equal(layers[module].lora_A["default"].weight.numpy(force=True), lora_a)
        assert np.array_equal(layers[module].lora_B["default"].weight.numpy(force=True), lora_b)
        assert all(map(np.array_equal, loaded.pairs[module], (lora_a, lora_b)))


def test_a_prefix_of_a_nested_adapter_computes_its_share_in_peft(tmp_path: Path) -> None:
    """Alpha 16 at r_max 6: the first two ranks are written with alpha 16 * 2 / 6."""
    whole = make(6, 16 / 6)
    save_adapter(tmp_path, prefix_adapter(whole, 2))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["lora_alpha"] == pytest.approx(16 * 2 / 6, rel=1e-15)
    for module, layer in in_peft(tmp_path).items():
        lora_a, lora_b = whole.pairs[module]
        expected = 16 / 6 * (lora_b[:, :2].astype(np.float64) @ lora_a[:2].astype(np.float64))
        found = layer.get_delta_weight("default").numpy(force=True)
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("rank", [0, 7])
def test_a_prefix_longer_than_the_adapter_is_refused(rank: int) -> None:
    with pytest.raises(AdapterError, match="1 to 6"):
        prefix_adapter(make(6), rank)


def test_equal_adapters_are_equal_bytes_that_safetensors_reads() -> None:
    adapter = make()
    turned = Adapter(adapter.rank, adapter.scale, dict(reversed(adapter.pairs.items())), DIGEST)
    assert encode_adapter(adapter) == encode_adapter(turned) != encode_adapter(make(seed=1))
    assert sorted(encode_adapter(adapter)) == FILES


def test_the_weights_file_names_the_base(tmp_path: Path) -> None:
    save_adapter(tmp_path, make())
    with safetensors.safe_open(tmp_path / FILES[1], framework="numpy") as file:
        assert file.metadata() == {"base_digest": DIGEST, "format": "pt"}
    tensors = load_file(tmp_path / FILES[1])
    assert len(tensors) == 6 and {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    assert json.loads((tmp_path / "base.json").read_text()) == {"base_digest": DIGEST}


def test_values_begin_at_a_multiple_of_eight_bytes_as_safetensors_writes_them() -> None:
    raws = [encode_adapter(make(rank, seed=rank))[FILES[1]] for rank in (1, 9, 10, 100)]
    headers = [int.from_bytes(raw[:8], "little") for raw in raws]
    assert len(set(headers)) > 1 and not any(length % 8 for length in headers)


@given(alpha=st.floats(1e-3, 1e3), max_rank=st.integers(1, 256), share=st.floats(0, 1))
def test_a_scale_comes_back_to_the_last_place_and_exactly_for_powers_of_two(
    alpha: float, max_rank: int, share: float
) -> None:
    scale, rank = alpha / max_rank, max(1, round(share * max_rank))
    written = lora._alpha(Adapter(rank, scale, {}, DIGEST))
    assert abs(written / rank - scale) <= math.ulp(scale)
    assert rank & (rank - 1) or written / rank == scale


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: Adapter(a.rank, a.scale, a.pairs, None), "names base None"),
        (lambda a: Adapter(a.rank, a.scale, a.pairs, "../" * 20), "names base"),
        (lambda a: Adapter(a.rank, a.scale, {}, DIGEST), "no weights"),
        (lambda a: Adapter(5, a.scale, a.pairs, DIGEST), "not of rank 5"),
        (lambda a: Adapter(a.rank, 0.0, a.pairs, DIGEST), "scale 0.0"),
        (lambda a: Adapter(a.rank, math.nan, a.pairs, DIGEST), "scale nan"),
        (lambda a: Adapter(a.rank, 1e6, a.pairs, DIGEST), "scale 1000000.0"),
        (lambda a: a.pairs[MODULES[0]][0].__setitem__((0, 0), np.nan) or a, "v_proj: not finite"),
        (lambda a: a.pairs[MODULES[1]][1].__setitem__((0, 0), np.inf) or a, "q_proj: not finite"),
    ],
)
def test_what_could_not_be_loaded_is_not_written(
    tmp_path: Path, change: Callable[[Adapter], Adapter], says: str
) -> None:
    with pytest.raises(AdapterError, match=says) as caught:
        save_adapter(tmp_path / "adapter", change(make()))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_saving_twice_touches_nothing_even_beside_other_files(tmp_path: Path) -> None:
    save_adapter(tmp_path, make())
    (tmp_path / "candidate.json").write_text("{}")
    before = [(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(tmp_path.iterdir())]
    save_adapter(tmp_path, make())
    assert [(p.name, p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(tmp_path.iterdir())] == before


def test_another_adapter_takes_the_place_of_the_first_and_nothing_stays_behind(tmp_path: Path) -> None:
    for seed in (0, 1):
        save_adapter(tmp_path / "new" / "adapter", make(seed=seed))
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"adapter"}
    found = {path.name: path.read_bytes() for path in (tmp_path / "new" / "adapter").iterdir()}
    assert found == encode_adapter(make(seed=1))


def test_a_directory_or_file_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(AdapterError, match=r"thesis\.txt"):
        save_adapter(tmp_path, make())
    with pytest.raises(AdapterError, match="is a file"):
        save_adapter(tmp_path / "thesis.txt", make())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_full_disk_leaves_the_adapter_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(tmp_path / "adapter", make())
    write, written = lora.write_atomically, []

    def fail_at_the_second(path: Path, content: bytes) -> None:
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(lora, "write_atomically", fail_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(tmp_path / "adapter", make(seed=1))
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == encode_adapter(make())
