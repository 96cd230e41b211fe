"""Checkpoints read and written block by block: the order of rows, and what stands in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.distillation import checkpoint_files


@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 20])
def test_rows_come_in_the_order_asked_for(block_bytes: int, tmp_path: Path) -> None:
    tensor = torch.arange(60.0).reshape(20, 3)
    save_file({"t": tensor}, tmp_path / "t.safetensors")
    for rows in ([3, 4, 9, 19, 0, 2, 1, 18], [5], list(range(20))):
        blocks = checkpoint_files.read_rows(tmp_path / "t.safetensors", "t", torch.tensor(rows), None, block_bytes)
        assert torch.equal(torch.cat(list(blocks)), tensor[rows])


def test_no_model_stands_in_memory(tmp_path: Path) -> None:
    """Of a 386 MB checkpoint whose largest tensor is 67 MB, a fresh process holds less than two such in fp32."""
    _write_hollow_checkpoint(tmp_path / "teacher")
    code = (
        "import resource, sys; from pathlib import Path\n"
        "import torch, transformers; from transformers import LlamaForCausalLM\n"
        "from pipeline.distillation.pruning import Importance, StudentShape, prune_checkpoint\n"
        "scores = Importance(torch.rand(1024), torch.rand(8, 4096), torch.rand(8, 4), torch.rand(8))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"prune_checkpoint(Path({str(tmp_path / 'teacher')!r}), Path({str(tmp_path / 'student')!r}), scores,"
        f" StudentShape(256, 1024, 4, 8), dtype='bf16')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) * 1024 < 2 * 134_217_728
    assert sum(file.stat().st_size for file in (tmp_path / "teacher").glob("*.safetensors")) > 380_000_000


def _write_hollow_checkpoint(folder: Path) -> None:
    """A Llama of zeros in bf16 whose file takes no room on disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32768, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in state.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
