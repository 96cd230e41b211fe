"""Decode speed of one submodel: torch fp32, ONNX int4 and TFLite int4, in turn, in one process.

Each round decodes the same tokens in each runtime one after another, so that a slow moment of the
machine meets all of them; the ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.machine import heading
from edge_runtime.backends import open_backend
from edge_runtime.formats.package import open_package
from edge_runtime.formats.signing import load_trust
from pipeline.artifacts import PROJECT, Layout

PROMPT_TOKENS, TOKENS, ROUNDS, THREADS = 32, 96, 15, 2


def main() -> int:
    """Print one table for each package of the demo."""
    layout = Layout(PROJECT)
    folders = sorted((PROJECT / "artifacts" / "packages").glob("*/manifest.json"))
    if not folders:
        print("no packages here; type make demo first", file=sys.stderr)
        return 2
    print(heading(f"decode tokens/s, batch 1, {THREADS} threads, {TOKENS} tokens after {PROMPT_TOKENS}"))
    print("| submodel | torch fp32 | ONNX int4 | TFLite int4 | ONNX / torch | TFLite / torch | TFLite / ONNX |")
    print("|---|---|---|---|---|---|---|")
    for manifest in folders:
        print(_row(layout, manifest.parent))
    return 0


def _row(layout: Layout, directory: Path) -> str:
    package = open_package(directory, load_trust())
    spec = package.manifest.decoder
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, PROMPT_TOKENS + TOKENS).tolist()
    decoders: dict[str, Callable[[], float]] = {"torch": _torch_decoder(layout.student(package.manifest.name), ids)}
    for container in ("onnx", "tflite"):
        backend = open_backend(container, package.container_directory(container), spec, threads=THREADS)
        decoders[container] = _backend_decoder(backend, ids)
    rounds = [{name: decode() for name, decode in decoders.items()} for _ in range(ROUNDS + 1)][1:]  # one warm-up
    speed = {name: statistics.median(r[name] for r in rounds) for name in decoders}

    def ratio(one: str, other: str) -> float:
        return statistics.median(r[one] / r[other] for r in rounds)

    return (
        f"| {package.manifest.name} | {speed['torch']:.0f} | {speed['onnx']:.0f} | {speed['tflite']:.0f} "
        f"| {ratio('onnx', 'torch'):.1f} | {ratio('tflite', 'torch'):.1f} | {ratio('tflite', 'onnx'):.2f} |"
    )


def _backend_decoder(backend, ids: list[int]) -> Callable[[], float]:
    cache = backend.allocate(len(ids))

    def decode() -> float:
        cache.truncate(0)
        backend.prefill(ids[:PROMPT_TOKENS], cache)
        start_s = time.perf_counter()
        for token in ids[PROMPT_TOKENS:]:
            backend.decode(token, cache)
        return TOKENS / (time.perf_counter() - start_s)

    return decode


def _torch_decoder(student: Path, ids: list[int]) -> Callable[[], float]:
    """The fp32 student under transformers with its own cache: what a user runs before exporting."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32, local_files_only=True).eval()

    @torch.inference_mode()
    def decode() -> float:
        past = model(input_ids=torch.tensor([ids[:PROMPT_TOKENS]]), use_cache=True).past_key_values
        start_s = time.perf_counter()
        for token in ids[PROMPT_TOKENS:]:
            past = model(input_ids=torch.tensor([[token]]), past_key_values=past, use_cache=True).past_key_values
        return TOKENS / (time.perf_counter() - start_s)

    return decode


if __name__ == "__main__":
    sys.exit(main())
