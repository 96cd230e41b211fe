"""The TFLite backend's contract: caches, windows, adapters, refusals. Its numbers are checked where files are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_runtime.backends import tflite as backend_module
from edge_runtime.backends.tflite import TfliteBackend
from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.errors import AdapterError, BackendError, UserError
from edge_runtime.formats.lora import Adapter
from pipeline.export.lora_slots import LoraSlots
from pipeline.export.tflite_graph import write_tflite

Floats = NDArray[np.float32]
SPEC = DecoderSpec(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    context_tokens=200,  # windows of 64, 128 and 200
    rms_norm_eps=1e-5,
    inv_freq=tuple(float(10_000.0 ** (-i / 8)) for i in range(8)),
    tied_embeddings=True,
)
SLOTS = LoraSlots(("q_proj", "down_proj"), rank=6)
IDS = np.random.default_rng(1).integers(0, SPEC.vocab_size, SPEC.context_tokens).tolist()
# Sums over windows of different lengths round differently; largest seen is 2e-6 at a deviation of 1.
ROUNDING = 5e-6


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("tflite"), _weights())


@pytest.fixture
def backend(path: Path) -> TfliteBackend:
    return TfliteBackend.open(path, SPEC, threads=1)


@pytest.fixture(scope="module")
def stepwise(path: Path) -> Floats:
    """(T, V) of every prefix of IDS, token by token up to the full context."""
    backend = TfliteBackend.open(path, SPEC, threads=1)
    cache = backend.allocate(SPEC.context_tokens)
    return np.stack([backend.decode(token, cache) for token in IDS])


@pytest.mark.parametrize("lengths", [[200], [1, 199], [15, 16, 17, 1, 64, 63], [64, 1, 1], [1, 16, 1, 9, 1], [129, 71]])
def test_prefill_in_any_pieces_answers_as_decode_does(
    backend: TfliteBackend, stepwise: Floats, lengths: list[int]
) -> None:
    cache, start = backend.allocate(SPEC.context_tokens), 0
    for length in lengths:
        logits = backend.prefill(IDS[start : start + length], cache, all_logits=True)
        np.testing.assert_allclose(logits, stepwise[start : start + length], rtol=0, atol=ROUNDING)
        start += length
        assert cache.length_tokens == start


def test_decode_continues_a_prefill_across_windows(backend: TfliteBackend, stepwise: Floats) -> None:
    cache = backend.allocate(SPEC.context_tokens)
    backend.prefill(IDS[:60], cache)
    for position in range(60, 140):
        logits = backend.decode(IDS[position], cache)
        np.testing.assert_allclose(logits, stepwise[position], rtol=0, atol=ROUNDING)


def test_prefill_returns_the_last_token_s_logits(backend: TfliteBackend) -> None:
    whole = backend.prefill(IDS[:30], backend.allocate(40), all_logits=True)
    last = backend.prefill(IDS[:30], backend.allocate(40))

    assert last.shape == (SPEC.vocab_size,)
    np.testing.assert_array_equal(last, whole[-1])


def test_sequences_taking_turns_do_not_see_each_other(backend: TfliteBackend) -> None:
    def alone(ids: list[int]) -> list[Floats]:
        cache = backend.allocate(50)
        return [backend.prefill(ids[:20], cache)] + [backend.decode(token, cache) for token in ids[20:30]]

    first, second = IDS[:30], IDS[100:130]
    expected = alone(first), alone(second)
    caches = backend.allocate(50), backend.allocate(50)
    found = [[backend.prefill(ids[:20], cache)] for ids, cache in zip((first, second), caches, strict=True)]
    for position in range(20, 30):
        for ids, cache, logits in zip((first, second), caches, found, strict=True):
            logits.append(backend.decode(ids[position], cache))

    np.testing.assert_array_equal(found, expected)


def test_truncate_forgets_what_came_after(backend: TfliteBackend) -> None:
    cache, fresh = backend.allocate(100), backend.allocate(100)
    backend.prefill(IDS[:20], cache)
    for token in IDS[150:180]:
        backend.decode(token, cache)
    cache.truncate(20)
    backend.prefill(IDS[:20], fresh)

    for token in IDS[20:40]:
        np.testing.assert_array_equal(backend.decode(token, cache), backend.decode(token, fresh))
    assert cache.length_tokens == 40


def test_truncate_while_resident_hides_the_forgotten_tokens(backend: TfliteBackend) -> None:
    cache = backend.allocate(40)
    logits = [backend.decode(token, cache) for token in IDS[:12]]
    cache.truncate(5)

    np.testing.assert_array_equal([backend.decode(token, cache) for token in IDS[5:12]], logits[5:])


@pytest.mark.parametrize("length_tokens", [-1, 4])
def test_truncate_beyond_the_contents_is_refused(backend: TfliteBackend, length_tokens: int) -> None:
    cache = backend.allocate(10)
    backend.prefill(IDS[:3], cache)
    with pytest.raises(UserError, match=r"length_tokens.*0 to 3"):
        cache.truncate(length_tokens)


def test_returned_logits_survive_the_next_step(backend: TfliteBackend) -> None:
    cache = backend.allocate(10)
    first = backend.decode(1, cache)
    kept = first.copy()
    backend.decode(2, cache)

    np.testing.assert_array_equal(first, kept)


def test_every_input_of_a_step_is_written(backend: TfliteBackend, stepwise: Floats) -> None:
    """The runtime hands out uninitialised memory, which is mostly zeros in a young process."""
    step = backend._step
    for array in (step.mask, step.cos, step.sin, *step.past_k, *step.past_v, *step.slots.values()):
        array.fill(np.nan)
    cache = backend.allocate(10)

    np.testing.assert_allclose([backend.decode(token, cache) for token in IDS[:3]], stepwise[:3], rtol=0, atol=0)


def test_adapter_changes_both_signatures_alike_and_none_restores_the_base(
    backend: TfliteBackend, stepwise: Floats
) -> None:
    backend.set_adapter(_adapter(rank=3))
    cache = backend.allocate(40)
    decoded = np.stack([backend.decode(token, cache) for token in IDS[:40]])
    prefilled = backend.prefill(IDS[:40], backend.allocate(40), all_logits=True)

    assert np.abs(decoded - stepwise[:40]).max() > 0.5
    np.testing.assert_allclose(prefilled, decoded, rtol=0, atol=ROUNDING)
    backend.set_adapter(None)
    cache.truncate(0)
    np.testing.assert_array_equal([backend.decode(token, cache) for token in IDS[:40]], stepwise[:40])


def test_adapter_takes_effect_in_the_middle_of_a_sequence(backend: TfliteBackend) -> None:
    cache = backend.allocate(10)
    logits = backend.decode(5, cache)
    cache.truncate(0)
    backend.set_adapter(_adapter(rank=3))

    assert np.abs(backend.decode(5, cache) - logits).max() > 0.5


def test_smaller_rank_after_a_larger_one_leaves_nothing_behind(backend: TfliteBackend, path: Path) -> None:
    backend.set_adapter(_adapter(rank=6))
    backend.set_adapter(_adapter(rank=2))
    untouched = TfliteBackend.open(path, SPEC, threads=1)
    untouched.set_adapter(_adapter(rank=2))

    np.testing.assert_array_equal(
        backend.prefill(IDS[:9], backend.allocate(9)), untouched.prefill(IDS[:9], untouched.allocate(9))
    )


def test_adapter_scale_multiplies_its_effect(backend: TfliteBackend) -> None:
    backend.set_adapter(_adapter(rank=4, scale=2.0))
    scaled = backend.decode(5, backend.allocate(1))
    doubled = _adapter(rank=4, scale=1.0)
    pairs = {module: (lora_a, lora_b * 2) for module, (lora_a, lora_b) in doubled.pairs.items()}
    backend.set_adapter(replace(doubled, pairs=pairs))

    np.testing.assert_array_equal(backend.decode(5, backend.allocate(1)), scaled)


@pytest.mark.parametrize(
    ("module", "shape_a", "shape_b", "message"),
    [
        ("model.layers.0.self_attn.k_proj", (2, 48), (32, 2), "has no adapter slot"),
        ("model.layers.9.self_attn.q_proj", (2, 48), (64, 2), "has no adapter slot"),
        ("model.layers.0.self_attn.q_proj", (7, 48), (64, 7), "rank 7, but this file accepts at most 6"),
        ("model.layers.0.self_attn.q_proj", (2, 64), (64, 2), "expected \\(2, 48\\) and \\(64, 2\\)"),
        ("model.layers.0.self_attn.q_proj", (2, 48), (64, 3), "expected \\(2, 48\\) and \\(64, 2\\)"),
    ],
)
def test_adapter_that_does_not_fit_is_refused_and_the_old_one_stays(
    backend: TfliteBackend, module: str, shape_a: tuple[int, int], shape_b: tuple[int, int], message: str
) -> None:
    backend.set_adapter(_adapter(rank=3))
    before = backend.decode(5, backend.allocate(1))
    pairs = {**_adapter(rank=2).pairs, module: (np.ones(shape_a, np.float32), np.ones(shape_b, np.float32))}

    with pytest.raises(AdapterError, match=message):
        backend.set_adapter(Adapter(shape_a[0], 1.0, pairs, None))
    np.testing.assert_array_equal(backend.decode(5, backend.allocate(1)), before)


@pytest.mark.parametrize("token", [-1, 97])
def test_token_outside_the_vocabulary_is_refused(backend: TfliteBackend, token: int) -> None:
    cache = backend.allocate(10)
    with pytest.raises(UserError, match=f"token: got {token}, allowed: 0 to 96"):
        backend.decode(token, cache)
    with pytest.raises(UserError, match=f"token: got {token}"):
        backend.prefill([1, token, 2], cache)
    assert cache.length_tokens == 0


def test_prompt_longer_than_the_cache_is_refused(backend: TfliteBackend) -> None:
    cache = backend.allocate(10)
    backend.prefill(IDS[:7], cache)
    with pytest.raises(UserError, match="tokens: got 4, allowed: 1 to 3 more"):
        backend.prefill(IDS[:4], cache)
    backend.prefill(IDS[:3], cache)
    with pytest.raises(UserError, match="tokens: got 1"):
        backend.decode(1, cache)


def test_empty_prompt_is_refused(backend: TfliteBackend) -> None:
    with pytest.raises(UserError, match="tokens: got 0"):
        backend.prefill([], backend.allocate(10))


@pytest.mark.parametrize("capacity_tokens", [0, 201])
def test_cache_larger_than_the_file_s_context_is_refused(backend: TfliteBackend, capacity_tokens: int) -> None:
    with pytest.raises(UserError, match=r"capacity_tokens.*1 to 200"):
        backend.allocate(capacity_tokens)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "not a readable TFLite file"),
        (lambda content: b"PK" + content[2:4] + b"\x00" + content[5:], "not a readable TFLite file"),
        (lambda content: content[:3000], "cannot load it"),
        (lambda content: content[:-16], "cannot load it"),
        (lambda content: content[:-400] + bytes(b ^ 0x55 for b in content[-400:]), "cannot load it"),
    ],
)
def test_damaged_file_is_refused_in_one_line(
    path: Path, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    damaged = tmp_path / "damaged.tflite"
    damaged.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BackendError, match=message) as error:
        TfliteBackend.open(damaged, SPEC, threads=1)
    assert "\n" not in str(error.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"absent\.tflite"):
        TfliteBackend.open(tmp_path / "absent.tflite", SPEC, threads=1)


@pytest.mark.parametrize(
    "wrong", [{"num_layers": 1}, {"num_layers": 3}, {"context_tokens": 128}, {"num_kv_heads": 4}, {"vocab_size": 98}]
)
def test_file_of_another_shape_than_its_manifest_is_refused(path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(BackendError, match="manifest"):
        TfliteBackend.open(path, replace(SPEC, **wrong), threads=1)


def test_logits_of_zeros_are_refused_not_returned(tmp_path: Path) -> None:
    weights = _weights() | {"model.norm.weight": np.zeros(48, np.float32)}
    backend = TfliteBackend.open(_write(tmp_path, weights), SPEC, threads=1)
    cache = backend.allocate(10)
    with pytest.raises(BackendError, match="only zeros"):
        backend.decode(1, cache)
    with pytest.raises(BackendError, match="only zeros"):
        backend.prefill([1, 2, 3], cache)
    assert cache.length_tokens == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    weights = _weights()
    weights["model.norm.weight"][7] = value
    backend = TfliteBackend.open(_write(tmp_path, weights), SPEC, threads=1)
    with pytest.raises(BackendError, match="not finite"):
        backend.decode(1, backend.allocate(10))


def test_missing_runtime_names_the_package_to_install(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "RUNTIMES", ("no_such_runtime.interpreter",))
    with pytest.raises(BackendError, match="pip install ai-edge-litert"):
        TfliteBackend.open(path, SPEC, threads=1)


def test_closed_backend_says_so(backend: TfliteBackend) -> None:
    cache = backend.allocate(10)
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.decode(1, cache)


def test_runtime_keeps_quiet(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    backend = TfliteBackend.open(path, SPEC, threads=2)
    backend.prefill(IDS[:20], backend.allocate(20))
    assert capfd.readouterr() == ("", "")


def _weights() -> dict[str, Floats]:
    random = np.random.default_rng(0)
    weights: dict[str, Floats] = {
        "model.embed_tokens.weight": random.normal(0, 0.15, (SPEC.vocab_size, SPEC.hidden_size)).astype(np.float32)
    }
    for module, projection in SPEC.module_names():
        weights[f"{module}.weight"] = random.normal(0, 0.2, SPEC.projection_shape(projection)).astype(np.float32)
    for layer in range(SPEC.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = random.uniform(0.7, 1.3, 48).astype(np.float32)
    return weights | {"model.norm.weight": random.uniform(0.7, 1.3, 48).astype(np.float32)}


def _write(folder: Path, weights: dict[str, Floats]) -> Path:
    path = folder / "model.tflite"
    write_tflite(path, SPEC, weights, profile="current", lora=SLOTS, prefill_tokens=16)
    return path


def _adapter(rank: int, scale: float = 1.5) -> Adapter:
    random = np.random.default_rng(rank)
    pairs = {}
    for module, projection in SPEC.module_names(SLOTS.targets):
        rows, columns = SPEC.projection_shape(projection)
        lora_a = random.normal(0, 0.2, (rank, columns)).astype(np.float32)
        pairs[module] = (lora_a, random.normal(0, 0.3, (rows, rank)).astype(np.float32))
    return Adapter(rank, scale, pairs, None)
