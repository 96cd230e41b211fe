"""The benchmarks of quantization run at a small size: one row a method, bits as they are stored."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import quantization_peers, size_and_speed
from edge_runtime.formats.decoder import DecoderSpec

TINY = DecoderSpec(96, 64, 96, 2, 4, 2, 16, 64, 1e-5, tuple(10.0**-n for n in range(8)), True)


def test_sizes_alone_count_the_groups_that_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No speed without shapes; FFN of 96 and heads of 64 in all, whatever group is asked for."""
    monkeypatch.setattr(size_and_speed, "SHAPES", {"toy": TINY})
    monkeypatch.setattr(sys, "argv", ["size_and_speed.py", "--shapes"])
    assert size_and_speed.main() == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| toy")]
    hidden, down = 96 * 64 + 2 * (2 * 64 * (64 + 32) + 2 * 64 * 96), 2 * 64 * 96
    shares = [
        (hidden * (0.5 + 2 / group) + down * (0.5 + 2 / 32) + 4 * 5 * 64) / (2 * (hidden + down + 5 * 64))
        for group in (32, 64, 64)
    ]
    assert [cell.strip() for cell in row.split("|")[3:-1]] == [f"{100 * share:.2f}" for share in shares]


def test_sizes_and_speeds_are_a_row_a_shape(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(size_and_speed, "SHAPES", {"toy": TINY})
    monkeypatch.setattr(size_and_speed, "_LARGE_BYTES", 1)
    options = ["--shapes", "toy", "--rounds", "2", "--threads", "1", "--prompt-tokens", "8", "--tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["size_and_speed.py", *options])
    assert size_and_speed.main() == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| toy")]
    (sizes, decode, prefill) = ([cell.strip() for cell in row] for row in rows)
    params = 96 * 64 + 2 * (2 * 64 * (64 + 32) + 3 * 64 * 96) + 5 * 64
    stored = (params - 5 * 64) * (0.5 + 2 / 32) + 4 * 5 * 64
    assert sizes[2] == decode[2] == prefill[2] == f"{100 * stored / (2 * params):.2f}"
    assert [decode[3], prefill[3]] == ["decode", "prefill"]
    assert all(float(cell) > 0 for cell in (*decode[4:], *prefill[4:]))


def test_half_precision_files_compute_nearly_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_runtime.backends.onnx import OnnxBackend

    monkeypatch.setattr(size_and_speed, "_LARGE_BYTES", 1)
    folders = size_and_speed._write_files(TINY, 32, tmp_path, with_float16=True)
    found = {}
    for kind, folder in folders.items():
        backend = OnnxBackend.open(folder, TINY)
        found[kind] = backend.prefill(range(20), backend.allocate(20), all_logits=True)
    scale = found["float32"].std()
    assert 0 < np.abs(found["float16"] - found["float32"]).max() < 0.02 * scale
    assert np.corrcoef(found["int4"].ravel(), found["float32"].ravel())[0, 1] > 0.9
    assert (folders["float16"] / "weights.bin").stat().st_size < 0.6 * (
        folders["float32"] / "weights.bin"
    ).stat().st_size


def test_scopes_count_what_is_quantized() -> None:
    weights = {"model.layers.0.mlp.up_proj.weight": 1, "model.embed_tokens.weight": 2}
    bits = dict.fromkeys(weights, 10.0)
    both = quantization_peers._scopes(weights, bits, 3.0)
    assert [(scope, set(chosen), total) for scope, chosen, total, _ in both] == [
        ("projections", {"model.layers.0.mlp.up_proj.weight"}, 10.0), ("all", set(weights), 20.0)
    ]  # fmt: skip
    assert len(quantization_peers._scopes(dict(list(weights.items())[:1]), bits, 3.0)) == 1


def test_every_peer_is_named_in_both_files_and_has_an_environment() -> None:
    from benchmarks import peer_quantizers

    assert set(quantization_peers.PEERS) == set(peer_quantizers.PEERS)
    for peer in quantization_peers.PEERS:
        assert len([name for name in quantization_peers.ENVIRONMENTS if peer.startswith(name)]) == 1
