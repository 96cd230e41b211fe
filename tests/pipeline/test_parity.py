"""The proof that a file computes its codes: what it must let pass, and what it must not."""

from __future__ import annotations

import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_runtime.formats.errors import BackendError, ExportError
from edge_runtime.formats.int4 import QuantizedTensor, dequantize, pack_nibbles
from pipeline.export.checkpoint import float_weights
from pipeline.export.parity import (
    RMS_RATIO_LIMIT,
    compare_logits,
    load_dequantized,
    require_parity,
    require_same_weights,
    run_bench,
    run_edge,
)
from pipeline.quantization.rounding import quantize_per_tensor, quantize_tensor
from tests.pipeline.conftest import MakeModel

LOGITS = np.random.default_rng(0).normal(2, 3, (50, 40)).astype(np.float32)
NOISE = np.random.default_rng(1).normal(0, 1, LOGITS.shape).astype(np.float32)


def test_figures_of_a_comparison() -> None:
    found = LOGITS + 0.1 * NOISE
    parity = compare_logits(LOGITS, found)
    delta = (found.astype(np.float64) - LOGITS).ravel()
    assert parity.positions == 50 and parity.max_abs == np.abs(delta).max()
    assert abs(parity.rms_ratio - np.linalg.norm(delta) / np.sqrt(delta.size) / LOGITS.std()) < 1e-7
    assert parity.top1 == np.mean([a.argmax() == b.argmax() for a, b in zip(LOGITS, found, strict=True)])
    same = compare_logits(LOGITS, LOGITS)
    assert (same.max_abs, same.rms_ratio, same.top1) == (0, 0, 1)
    assert set(parity.to_dict()) == {"positions", "max_abs", "rms_ratio", "top1"}


@pytest.mark.parametrize(
    "found",
    [
        np.zeros_like(LOGITS),
        np.full_like(LOGITS, np.nan),
        np.where(np.arange(40) == 7, np.inf, LOGITS).astype(np.float32),
        np.random.default_rng(2).permuted(LOGITS, axis=1),
        LOGITS[::-1],
        LOGITS * 1.2,
        LOGITS[:1],
        LOGITS[:, :1],
        LOGITS[:40],
    ],
    ids=["zero", "nan", "inf", "shuffled", "other positions", "scaled", "one position", "one token", "cut"],
)
def test_logits_of_something_else_are_refused(found: Any) -> None:
    with pytest.raises(ExportError, match=r"^container: .*must not ship"):
        require_parity("container", LOGITS, found)


def test_the_limit_is_where_it_says() -> None:
    unit = LOGITS.std() * NOISE / np.sqrt((NOISE.astype(np.float64) ** 2).mean())
    assert require_parity("container", LOGITS, (LOGITS + 0.99 * RMS_RATIO_LIMIT * unit).astype(np.float32)).top1 > 0.8
    with pytest.raises(ExportError):
        require_parity("container", LOGITS, (LOGITS + 1.01 * RMS_RATIO_LIMIT * unit).astype(np.float32))


class TestSameWeights:
    def test_equal_ones_pass_whatever_their_padding(self) -> None:
        weights = _weights()
        other = dict(weights)
        codes = weights["linear"].codes.copy()
        codes[:, 40:] = 3
        other["linear"] = replace(weights["linear"], packed=pack_nibbles(codes))
        require_same_weights("file", weights, other)

    def test_one_flipped_bit_of_a_code_is_found(self) -> None:
        for position in ((0, 0), (5, 39), (3, 17)):
            codes = _weights()["linear"].codes.copy()
            codes[position] ^= 1
            self._refused(replace(_weights()["linear"], packed=pack_nibbles(codes)))

    def test_one_flipped_bit_of_a_scale_is_found(self) -> None:
        for bit in range(16):
            scales = _weights()["linear"].scales.copy()
            scales.view(np.uint16)[2, 1] ^= 1 << bit
            self._refused(replace(_weights()["linear"], scales=scales))

    def test_another_number_of_columns_or_groups_is_found(self) -> None:
        tensor = _weights()["linear"]
        self._refused(replace(tensor, columns=39))
        self._refused(QuantizedTensor.of_codes(tensor.codes, np.repeat(tensor.scales, 2, axis=1), 4, tensor.columns))

    def test_floats_are_compared_too(self) -> None:
        weights = _weights()
        norm = weights["norm"].copy()
        norm.view(np.uint32)[3] ^= 1
        for value in (norm, weights["norm"][:-1], weights["linear"]):
            with pytest.raises(ExportError, match="file: norm differs"):
                require_same_weights("file", weights, weights | {"norm": value})

    def test_missing_and_additional_tensors_are_named(self) -> None:
        weights = _weights()
        with pytest.raises(ExportError, match="file: tensors differ: extra"):
            require_same_weights("file", weights, weights | {"extra": weights["norm"]})
        with pytest.raises(ExportError, match="file: tensors differ: head, linear, norm"):
            require_same_weights("file", weights, {})

    @staticmethod
    def _refused(tensor: QuantizedTensor | Any) -> None:
        with pytest.raises(ExportError, match="file: linear differs from the stored codes"):
            require_same_weights("file", _weights(), _weights() | {"linear": tensor})


@pytest.mark.parametrize("tied", [True, False])
def test_the_dequantized_model_holds_what_the_codes_mean(make_model: MakeModel, tied: bool) -> None:
    model = make_model("qwen2", tie_word_embeddings=tied)
    codes = {
        name: quantize_tensor(weight, bits=4, group=32, rounding="rtn") if weight.ndim == 2 else weight
        for name, weight in float_weights(model).items()
    }
    loaded = load_dequantized(model, codes)
    for name, parameter in loaded.named_parameters():
        expected = dequantize(codes[name]) if isinstance(codes[name], QuantizedTensor) else codes[name]
        assert torch.equal(parameter.detach(), torch.from_numpy(expected)), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied


class TestFreshProcess:
    """A stand-in interpreter shows what is called; the real one is covered where containers are run."""

    def test_the_command_line_and_its_json(self, tmp_path: Path) -> None:
        python = _program(tmp_path, "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['PYTHONPATH']]))")
        arguments, path = run_bench(python, Path("pkg"), "onnx", threads=3, arguments=["--repeat", "0"])
        assert arguments == [
            "-m", "edge_runtime", "bench", "--package", "pkg", "--container", "onnx", "--threads", "3", "--json",
            "--repeat", "0",
        ]  # fmt: skip
        assert (Path(path) / "edge_runtime").is_dir()
        (called, _) = run_edge(python, "generate", Path("pkg"), "tflite", threads=1, arguments=[])
        assert called[2] == "generate"

    def test_a_process_that_fails_gives_its_last_line(self, tmp_path: Path) -> None:
        python = _program(tmp_path, "import sys; sys.stderr.write('first\\nsignature is wrong\\n'); sys.exit(2)")
        with pytest.raises(BackendError, match=r"^onnx in .*: exit 2: signature is wrong$"):
            run_bench(python, Path("pkg"), "onnx", threads=1, arguments=[])

    def test_a_process_that_prints_no_json_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BackendError, match="printed no JSON"):
            run_bench(_program(tmp_path, "print('hello')"), Path("pkg"), "onnx", threads=1, arguments=[])


def _weights() -> dict[str, Any]:
    random = np.random.default_rng(3)
    linear = quantize_tensor(random.normal(size=(6, 40)).astype(np.float32), bits=4, group=32, rounding="rtn")
    head = quantize_per_tensor(random.normal(size=(6, 40)).astype(np.float32))
    return {"linear": linear, "head": head, "norm": random.normal(size=8).astype(np.float32)}


def _program(folder: Path, code: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{code}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
