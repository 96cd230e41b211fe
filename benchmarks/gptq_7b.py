"""GPTQ of a 7B's shape on one GPU: seconds and memory by part.

Random bf16 weights are made on the device, in shards, unless the folder holds them; calibration tokens are random
too. Needs torch, transformers, safetensors, numpy and rich alone. At the time limit it says how far it came.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from safetensors.torch import save_file

from edge_runtime.formats.int4 import QuantizedTensor
from pipeline.quantization import calibrated, calibration, gptq
from pipeline.quantization.grid import Grid
from pipeline.quantization.source import open_checkpoint

PARTS: dict[str, list[tuple[Any, str]]] = {
    "read weights": [(calibration, "_loaded"), (calibration.Decoder, "read")],
    "Hessians (passes up to each input)": [(calibration, "_statistic"), (calibrated, "head_statistic")],
    "factorize": [(gptq, "_factorize")],
    "round": [(gptq, "_round_rows")],
    "outputs of quantized layers": [(calibration, "_advance")],
    "write codes": [(calibrated, "_store")],
}


class OutOfTime(Exception):
    pass


def main() -> int:
    """Print one table."""
    options = _options()
    device = torch.device(options.device)
    checkpoint = options.folder / f"shape-{options.hidden}-{options.layers}"
    _make_checkpoint(checkpoint, options, device)
    work = options.folder / "codes"
    if not options.resume:
        shutil.rmtree(work, ignore_errors=True)
    tokens = np.random.default_rng(1).integers(0, options.vocabulary, (options.sequences, options.sequence_tokens))
    spent_s: dict[str, float] = defaultdict(float)
    start_s = time.perf_counter()
    _time_parts(spent_s, device)
    _limit(options.limit_s, start_s)
    source = open_checkpoint(checkpoint, options.sequence_tokens, options.group)
    plan = calibrated.Calibration("gptq", source.grids(Grid(4, options.group, options.positive)))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        weights = calibrated.quantize_calibrated(source, tokens.astype(np.int32), plan, work, "gptq", device=device)
    except OutOfTime:
        weights = {}
    total_s = time.perf_counter() - start_s
    done = len(list(work.glob("layer-*.safetensors")))
    _print(options, device, spent_s, total_s, done, bool(weights))
    if weights:
        matrices = [tensor for tensor in weights.values() if isinstance(tensor, QuantizedTensor)]
        codes = sum(tensor.weight_bytes for tensor in matrices)
        fp16 = sum(2 * tensor.shape[0] * tensor.shape[1] for tensor in matrices)
        print(
            f"\n{len(matrices)} matrices, {codes / 1e9:.2f} GB of codes and scales, {100 * codes / fp16:.1f} % of fp16"
        )
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/gptq_7b"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit-s", type=float, default=570)
    parser.add_argument("--resume", action="store_true", help="go on after the layers that the folder holds")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--sequence-tokens", type=int, default=2048)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--positive", action="store_true", help="scales above zero, as TFLite wants them")
    parser.add_argument("--hidden", type=int, default=3584)
    parser.add_argument("--intermediate", type=int, default=18944)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--heads", type=int, default=28)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=152064)
    return parser.parse_args()


def _make_checkpoint(folder: Path, options: argparse.Namespace, device: torch.device) -> None:
    """A Qwen2 checkpoint, a shard a layer; inputs of uneven energy come from uneven norms."""
    if (folder / "model.safetensors.index.json").is_file():
        return
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=options.intermediate,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=options.kv_heads,
        max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
    )  # fmt: skip
    start_s = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator(device).manual_seed(0)
    shards: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, parameter in model.named_parameters():
        shards[".".join(name.split(".")[:3])][name] = parameter
    placed = {}
    for number, tensors in enumerate(shards.values()):
        file = f"model-{number:05d}.safetensors"
        made = {name: _random(name, tensor.shape, generator, device) for name, tensor in tensors.items()}
        save_file(made, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(made, file)
    config.save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    print(f"checkpoint made in {time.perf_counter() - start_s:.0f} s", flush=True)


def _random(name: str, shape: torch.Size, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    values = torch.randn(shape, generator=generator, device=device)
    if "norm" in name:
        values = (0.5 * values).exp()
    elif len(shape) == 2:
        values = values * shape[1] ** -0.5
    else:
        values = values * 0.1
    return values.bfloat16().cpu()


def _time_parts(spent_s: dict[str, float], device: torch.device) -> None:
    """Wrap the functions of each part; time inside another part counts for the inner one."""
    open_parts: list[float] = []

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            _wait(device)
            start_s = time.perf_counter()
            open_parts.append(0.0)
            try:
                return function(*arguments, **named)
            finally:
                _wait(device)
                took_s = time.perf_counter() - start_s
                spent_s[part] += took_s - open_parts.pop()
                if open_parts:
                    open_parts[-1] += took_s

        return call

    for part, places in PARTS.items():
        for owner, name in places:
            setattr(owner, name, timed(part, getattr(owner, name)))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _limit(limit_s: float, start_s: float) -> None:
    """Stop between layers, and say after each how it goes."""
    store = calibrated._store

    def stored(path: Path, decoder: Any, weights: Any) -> None:
        store(path, decoder, weights)
        elapsed_s = time.perf_counter() - start_s
        print(f"{path.stem}: {elapsed_s:.1f} s", flush=True)
        if elapsed_s > limit_s:
            raise OutOfTime

    calibrated._store = stored


def _print(
    options: argparse.Namespace, device: torch.device, spent_s: dict[str, float], total_s: float, done: int, whole: bool
) -> None:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    version = torch.__version__.partition("+")[0]
    shape = f"hidden {options.hidden}, {options.layers} layers, group {options.group}"
    print(f"\n### GPTQ: {shape}; {name}, torch {version}\n")
    print(f"{options.sequences} x {options.sequence_tokens} calibration tokens; {done} of {options.layers} layers\n")
    print("| part | seconds |\n|---|---|")
    for part in PARTS:
        print(f"| {part} | {spent_s[part]:.1f} |")
    print(f"| rest | {total_s - sum(spent_s.values()):.1f} |\n| **all** | **{total_s:.1f}** |")
    if not whole and done:
        print(f"| all {options.layers} layers at this rate | {total_s * options.layers / done:.0f} |")
    if device.type == "cuda":
        asked = ["nvidia-smi", "--query-compute-apps=used_memory", "--format=csv,noheader"]
        said = subprocess.run(asked, capture_output=True, text=True, check=False)
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        free, total = torch.cuda.mem_get_info()
        print(f"\nGPU memory: at most {peak / 1e9:.2f} GB allocated and {reserved / 1e9:.2f} GB reserved by torch")
        print(f"The driver at the end: {(total - free) / 1e9:.2f} GB used; by process: {said.stdout.strip() or '-'}")


if __name__ == "__main__":
    sys.exit(main())
