"""Quantizing block by block: the bytes of the in-memory path, whatever the blocks, workers and interruptions."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from edge_runtime.formats.errors import ExportError, UserError
from edge_runtime.formats.int4 import QuantizedTensor, dequantize, load_weights
from pipeline.quantization import source, streaming
from pipeline.quantization.grid import Grid
from pipeline.quantization.rounding import quantize_tensor
from pipeline.quantization.source import open_checkpoint
from pipeline.quantization.streaming import quantize_checkpoint, stored_codes, write_weights
from tests.pipeline.conftest import MakeModel
from tests.pipeline.quantization_cases import (
    CONTEXT_TOKENS,
    change_tensor,
    expected_bytes,
    in_memory,
    save_checkpoint,
)

GRID = Grid(bits=4, group=32, positive_scales=True)
UNEVEN = {"intermediate_size": 172, "hidden_size": 80}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama, biased": ("llama", {"attention_bias": True, "mlp_bias": True, "intermediate_size": 172}, "bfloat16"),
    "mistral, uneven": ("mistral", {**UNEVEN, "sliding_window": None}, "float16"),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}, "float32"),
    "qwen3, tied, uneven": ("qwen3", {**UNEVEN, "tie_word_embeddings": True}, "bfloat16"),
}


@pytest.fixture(scope="module")
def small(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer in several shards; read only."""
    folder = tmp_path_factory.mktemp("small")
    model = make_model("llama", num_hidden_layers=1, vocab_size=96, intermediate_size=72)
    return save_checkpoint(model, folder, shards="20KB")


@pytest.fixture
def quantize(small: Path, tmp_path: Path) -> Callable[..., bytes]:
    def run(**options: Any) -> bytes:
        checkpoint = open_checkpoint(small, CONTEXT_TOKENS, 32)
        output = tmp_path / "weights.safetensors"
        quantize_checkpoint(checkpoint, checkpoint.grids(GRID), "rtn", output, tmp_path / "work", **options)
        return output.read_bytes()

    return run


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("rounding", "bits", "group", "positive"),
    [("rtn", 4, 32, True), ("mse", 4, 32, False), ("mse", 8, 64, True), ("rtn", 8, 0, True), ("rtn", 4, 128, True)],
)
def test_the_file_is_that_of_the_model_in_memory(
    make_model: MakeModel, tmp_path: Path, case: str, rounding: str, bits: int, group: int, positive: bool
) -> None:
    architecture, sizes, dtype = CASES[case]
    model = make_model(architecture, **sizes)
    checkpoint = open_checkpoint(save_checkpoint(model, tmp_path / "model", dtype), CONTEXT_TOKENS, group or 32)
    grids = checkpoint.grids(Grid(bits, group, positive))
    quantize_checkpoint(checkpoint, grids, rounding, tmp_path / "found", tmp_path / "work", workers=2)
    assert (tmp_path / "found").read_bytes() == expected_bytes(
        model, tmp_path / "expected", rounding, bits, group, positive
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "found", "model"]
    assert checkpoint.params == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("rounding", ["rtn", "mse"])
@pytest.mark.parametrize(("workers", "block_weights"), [(1, 1), (3, 1500), (8, 1 << 30)])
def test_blocks_and_workers_change_no_byte(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounding: str, workers: int, block_weights: int
) -> None:
    found = []
    for count, size in ((1, source.BLOCK_WEIGHTS), (workers, block_weights)):
        monkeypatch.setattr(source, "BLOCK_WEIGHTS", size)
        checkpoint = open_checkpoint(small, CONTEXT_TOKENS, 32)
        figures = quantize_checkpoint(
            checkpoint, checkpoint.grids(GRID), rounding, tmp_path / "weights", tmp_path / "work", workers=count
        )
        found.append(((tmp_path / "weights").read_bytes(), figures))
    assert found[0] == found[1]


def test_every_matrix_may_have_a_grid_of_its_own(make_model: MakeModel, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_checkpoint(make_model("qwen2"), tmp_path / "model"), CONTEXT_TOKENS, 64)
    kinds = [Grid(4, 32, False), Grid(8, 32, True), Grid(4, 64, True)]
    grids = {name: kinds[place % 3] for place, name in enumerate(checkpoint.matrices)}
    quantize_checkpoint(checkpoint, grids, "mse", tmp_path / "weights", tmp_path / "work")
    _, weights = load_weights(tmp_path / "weights")
    for name, grid in grids.items():
        value = weights[name]
        assert isinstance(value, QuantizedTensor) and (value.bits, value.group) == (grid.bits, grid.group)
    with pytest.raises(UserError, match=r"grids: got 'lm_head\.weight'"):
        quantize_checkpoint(
            checkpoint, {n: g for n, g in grids.items() if n != "lm_head.weight"}, "rtn", tmp_path / "w", tmp_path / "x"
        )


def test_figures_are_those_of_the_codes(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", intermediate_size=172)
    checkpoint = open_checkpoint(save_checkpoint(model, tmp_path / "model"), CONTEXT_TOKENS, 32)
    for bits in (4, 8):
        grids = checkpoint.grids(replace(GRID, bits=bits))
        figures = quantize_checkpoint(checkpoint, grids, "mse", tmp_path / "weights", tmp_path / "work")
        _, weights = load_weights(tmp_path / "weights")
        assert set(figures) == set(grids)
        for name, value in figures.items():
            tensor = weights[name]
            assert isinstance(tensor, QuantizedTensor)
            exact = source.read_rows(checkpoint.tensors[name]).astype(np.float64)
            error = ((exact - dequantize(tensor)) ** 2).sum() / (exact**2).sum()
            low, high = grids[name].code_range
            ends = ((tensor.codes == low) | (tensor.codes == high)).sum() / exact.size
            assert value.relative_error == pytest.approx(error, rel=1e-5)
            assert (value.scale_min, value.scale_max) == (np.abs(tensor.scales).min(), np.abs(tensor.scales).max())
            assert value.ends_share == pytest.approx(ends, abs=1e-12) and ends > 0


def test_importance_goes_to_the_matrix_that_it_belongs_to(small: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small, CONTEXT_TOKENS, 32)
    random = np.random.default_rng(0)
    importance = {"model.layers.0.mlp.down_proj.weight": random.uniform(0.1, 9, 96).astype(np.float32)}
    for factors in (None, importance):
        quantize_checkpoint(
            checkpoint, checkpoint.grids(GRID), "mse", tmp_path / "weights", tmp_path / "work", importance=factors
        )
        _, weights = load_weights(tmp_path / "weights")
        for name in checkpoint.matrices:
            rows = source.read_rows(checkpoint.tensors[name])
            alone = quantize_tensor(rows, bits=4, group=32, rounding="mse", importance=(factors or {}).get(name))
            np.testing.assert_array_equal(weights[name].packed, alone.packed)  # type: ignore[union-attr]


def test_codes_that_are_already_chosen_are_stored_as_they_are(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", intermediate_size=172)
    checkpoint = open_checkpoint(save_checkpoint(model, tmp_path / "model"), CONTEXT_TOKENS, 32)
    _, weights = in_memory(model, 32, lambda _, w: quantize_tensor(w * 1.1, bits=4, group=32, rounding="rtn"))
    codes = {name: value for name, value in weights.items() if isinstance(value, QuantizedTensor)}
    norm = np.linspace(0, 1, 64, dtype=np.float32)
    figures = write_weights(
        checkpoint, checkpoint.grids(GRID), stored_codes(codes), tmp_path / "weights", tmp_path / "work",
        identity="here", vectors={"model.norm.weight": norm},
    )  # fmt: skip
    _, found = load_weights(tmp_path / "weights")
    for name, value in codes.items():
        stored = found[name]
        assert isinstance(stored, QuantizedTensor)
        np.testing.assert_array_equal(stored.packed, value.packed)
        np.testing.assert_array_equal(stored.scales.view(np.uint16), value.scales.view(np.uint16))
        assert 0.01 < figures[name].relative_error < 0.04  # a tenth too large, squared, and its rounding
    np.testing.assert_array_equal(found["model.norm.weight"], norm)
    with pytest.raises(ExportError, match="do not fit the grid"):
        write_weights(
            checkpoint, checkpoint.grids(replace(GRID, bits=8)), stored_codes(codes), tmp_path / "w", tmp_path / "x",
            identity="here",
        )  # fmt: skip


class TestInterruptions:
    def test_a_disk_that_fills_at_any_write_leaves_nothing_half_written_and_is_gone_on_from(
        self, quantize: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected, output, work = quantize(), tmp_path / "weights.safetensors", tmp_path / "work"
        written = os.pwrite
        calls = 0

        def full_at(limit: int) -> Callable[[int, Any, int], int]:
            def pwrite(descriptor: int, content: Any, offset: int) -> int:
                nonlocal calls
                calls += 1
                if calls >= limit:
                    # Half of it still fits, as on a real disk.
                    written(descriptor, content[: len(content) // 2], offset)
                    raise OSError(errno.ENOSPC, "No space left on device")
                return written(descriptor, content, offset)

            return pwrite

        for limit in range(1, 1000):
            shutil.rmtree(work, ignore_errors=True)
            output.unlink(missing_ok=True)
            calls = 0
            with monkeypatch.context() as patch:
                patch.setattr(os, "pwrite", full_at(limit))
                try:
                    quantize()
                    break
                except UserError as error:
                    assert "free disk" in str(error) and "\n" not in str(error)
                    assert not output.exists()
            assert quantize() == expected
            assert not work.exists()
        assert 30 < limit < 1000

    def test_writes_that_take_a_part_at_a_time_lose_nothing(
        self, quantize: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected, whole = quantize(), os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda file, content, offset: whole(file, content[:100], offset))
        assert quantize() == expected

    def test_no_room_is_said_before_any_work(
        self, quantize: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        monkeypatch.setattr(streaming, "quantize_rows", None)  # whoever calls it fails
        with pytest.raises(UserError, match=r"free disk: got 'none left at .*work', allowed: at least 0\.00 GB"):
            quantize()

    def test_finished_tensors_are_not_quantized_again(
        self, quantize: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected, whole = quantize(), streaming.quantize_rows
        stopped, again = self._stop_after(monkeypatch, 5), []
        with pytest.raises(KeyboardInterrupt):
            quantize()
        assert not (tmp_path / "weights.safetensors.partial").exists()
        monkeypatch.setattr(streaming, "quantize_rows", lambda *args: again.append(1) or whole(*args))
        assert quantize() == expected
        assert len(stopped) + len(again) == 9 + 1  # nine matrices, one of them begun twice

    def test_a_byte_that_changed_or_a_torn_line_is_noticed(
        self, quantize: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected, work = quantize(), tmp_path / "work"
        for damage in ("byte", "line", "journal", "cut"):
            with monkeypatch.context() as patch:
                self._stop_after(patch, 7)
                with pytest.raises(KeyboardInterrupt):
                    quantize()
            partial, journal = work / "weights.partial", work / "journal.jsonl"
            lines = journal.read_bytes().splitlines(keepends=True)
            assert len(lines) == 7
            if damage == "byte":
                content = bytearray(partial.read_bytes())
                content[-100] ^= 1
                partial.write_bytes(content)
            elif damage == "line":
                journal.write_bytes(b"".join(lines)[:-20])
            elif damage == "journal":
                journal.write_bytes(b"{}\n" + b"".join(lines[1:]))
            else:
                partial.write_bytes(partial.read_bytes()[:5000])
            assert quantize() == expected

    @pytest.mark.parametrize("change", ["settings", "weights", "identity", "importance"])
    def test_unfinished_work_of_something_else_is_dropped(
        self, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
    ) -> None:
        model = shutil.copytree(small, tmp_path / "model")

        def run(rounding: str = "mse", **options: Any) -> bytes:
            checkpoint = open_checkpoint(model, CONTEXT_TOKENS, 32)
            grids = checkpoint.grids(options.pop("grid", GRID))
            quantize_checkpoint(checkpoint, grids, rounding, tmp_path / "w", tmp_path / "work", **options)
            return (tmp_path / "w").read_bytes()

        with monkeypatch.context() as patch:
            self._stop_after(patch, 6)
            with pytest.raises(KeyboardInterrupt):
                run()
        if change == "weights":
            for name in ("lm_head.weight", "model.embed_tokens.weight"):
                change_tensor(model, name, lambda tensor: tensor * 2)
        tensors = open_checkpoint(model, CONTEXT_TOKENS, 32).tensors
        ramps = {name: np.linspace(0, 9, t.shape[1], dtype=np.float32) for name, t in tensors.items() if t.shape[1:]}
        changes: dict[str, dict[str, Any]] = {
            "settings": {"grid": replace(GRID, positive_scales=False)}, "importance": {"importance": ramps},
        }  # fmt: skip
        options = changes.get(change, {})
        rounding = "rtn" if change == "identity" else "mse"
        found = run(rounding, **options)
        assert found == run(rounding, **options)  # from the beginning

    @staticmethod
    def _stop_after(patch: pytest.MonkeyPatch, count: int) -> list[int]:
        """Ctrl-C at the call with this number."""
        whole, calls = streaming.quantize_rows, []

        def quantize_rows(*args: Any) -> QuantizedTensor:
            calls.append(1)
            if len(calls) == count:
                raise KeyboardInterrupt
            return whole(*args)

        patch.setattr(streaming, "quantize_rows", quantize_rows)
        return calls


def test_a_scale_that_fp16_cannot_hold_names_its_tensor(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = 1e7  # type: ignore[union-attr, operator, index]
    checkpoint = open_checkpoint(save_checkpoint(model, tmp_path / "model"), CONTEXT_TOKENS, 32)
    for grid in (GRID, Grid(8, 0, True)):
        with pytest.raises(ExportError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: a scale exceeds fp16"):
            quantize_checkpoint(checkpoint, checkpoint.grids(grid), "rtn", tmp_path / "w", tmp_path / "work")
        assert not (tmp_path / "w").exists()


def test_no_model_stands_in_memory(make_model: MakeModel, tmp_path: Path) -> None:
    """Of a 400 MB checkpoint with an embedding of 268 MB, a fresh process holds a few blocks."""
    model = make_model(
        "llama", num_hidden_layers=1, vocab_size=32, hidden_size=1024, num_attention_heads=8, head_dim=64
    )
    model.config.vocab_size, model.config.architectures = 65536, ["LlamaForCausalLM"]
    folder = tmp_path / "model"
    model.config.save_pretrained(folder)
    state = {name: (tensor.shape, tensor) for name, tensor in model.state_dict().items()}
    header, end = {}, 0
    for name, (shape, _) in state.items():
        rows = 65536 if shape[0] == 32 else shape[0]
        start, end = end, end + 4 * rows * int(np.prod(shape[1:]))
        header[name] = {"dtype": "F32", "shape": [rows, *shape[1:]], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # zeros that take no room on disk
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from pipeline.quantization.grid import Grid\n"
        "from pipeline.quantization.source import open_checkpoint\n"
        "from pipeline.quantization.streaming import quantize_checkpoint\n"
        "import pipeline.quantization.kernels\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "checkpoint = open_checkpoint(folder / 'model', 64, 32)\n"
        "before = peak()\n"
        "grids = checkpoint.grids(Grid(4, 32, False))\n"
        "quantize_checkpoint(checkpoint, grids, 'rtn', folder / 'w', folder / 'x', workers=2)\n"
        "print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) * 1024 < 150_000_000
    with safe_open(tmp_path / "w", framework="numpy") as file:
        assert (file.get_tensor("model.embed_tokens.weight.scales") == 2**-14).all()
