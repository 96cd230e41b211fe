"""What others' 4-bit quantizers make of the same checkpoints, at their bytes, judged as ours are.

Each peer runs in an environment of its own, is given the checkpoint and training text, and hands back what its weights
mean. Two scopes: ``projections`` leaves the embedding in fp16, as most peers do; ``all`` counts every matrix as the
peer stores it. Bits are those of codes, scales and zero points, of the weights that are quantized; the last but one
column counts everything. Ours are those of quantization_quality.py, which has several seeds of them.

    python -m venv PEERS/hqq; PEERS/hqq/bin/pip install hqq==0.2.8.post1 torch==2.13.0 transformers==5.23.0
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from benchmarks.machine import heading
from benchmarks.quantization_evaluation import evaluate_weights, held_out_tokens, training_tokens
from benchmarks.quantization_quality import SIGNS, Trial, add_method_options, codes_of
from pipeline.artifacts import PROJECT
from pipeline.quantization.grid import Grid
from pipeline.quantization.source import Checkpoint, open_checkpoint

# The environment of each peer and what is installed there; None: llama.cpp's programs, and gguf from here.
ENVIRONMENTS = {
    "torchao": "torchao==0.18.0",
    "auto-round": "auto-round==0.16.1",
    "hqq": "hqq==0.2.8.post1",
    "onnxruntime": "onnxruntime==1.32.0, onnx-ir",
    "llama.cpp": None,
}
PEERS = (
    "torchao-rtn", "auto-round-rtn", "auto-round-tuned", "hqq-g32", "hqq-g64", "onnxruntime-default",
    "onnxruntime-asymmetric", "onnxruntime-rtn", "onnxruntime-hqq", "onnxruntime-k_quant", "onnxruntime-gptq",
    "llama.cpp-q4_0-pure", "llama.cpp-q4_0-pure-imatrix", "llama.cpp-q4_0", "llama.cpp-q4_0-imatrix",
    "llama.cpp-q4_k_s", "llama.cpp-q4_k_s-imatrix",
)  # fmt: skip
OURS = ("rtn", "mse", "gptq", "qad")
_TRAINING_SEQUENCES = 8192  # what there is, for QAD; the others calibrate on some of it
_EMBEDDING = "model.embed_tokens.weight"

Found = tuple[Mapping[str, Any], float]  # weights by name, and the bits that all of them take


def main() -> int:
    """Print one table a checkpoint, row by row as they are measured."""
    options = _options()
    torch.set_num_threads(options.threads)
    corpus = options.corpus
    if not (corpus / "held_out.jsonl").is_file():
        print(f"no corpus in {corpus}; type make demo first", file=sys.stderr)
        return 2
    held_out = held_out_tokens(options.tokenizer, corpus, options.held_out_sequences)
    training = training_tokens(options.tokenizer, corpus, _TRAINING_SEQUENCES)
    print(heading("quantizers at 4 bits, KL to the fp model on held-out text"))
    start_s = time.perf_counter()
    for model in options.checkpoints:
        source = open_checkpoint(model, held_out.shape[1], 32)
        trial = Trial(model, source, training, held_out, options)
        print(f"\n{model.name}: {source.params / 1e6:.1f} M parameters; {held_out.size:,} held-out tokens\n")
        print("| method | scope | KL | first choices, % | perplexity | bits a quantized weight | bits a weight | s |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for method, found in _methods(options, trial, training[: options.calibration_sequences], start_s):
            for scope, weights, bits, took_s in found:
                _print_row(model, source, held_out, (method, scope), weights, bits, took_s)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reference = PROJECT / "assets" / "reference_teacher"
    parser.add_argument("checkpoints", type=Path, nargs="*", default=[reference])
    parser.add_argument("--environments", type=Path, default=PROJECT / ".cache" / "peers", help="a folder a peer")
    parser.add_argument("--llama-quantize", type=Path, help="the program, built from llama.cpp's source")
    parser.add_argument("--tokenizer", type=Path, default=reference)
    parser.add_argument("--corpus", type=Path, default=PROJECT / "artifacts" / "corpus")
    parser.add_argument("--methods", nargs="+", choices=(*OURS, *PEERS), default=[*OURS, *PEERS])
    parser.add_argument("--held-out-sequences", type=int, default=128)
    add_method_options(parser)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=1e9, help="no method is begun after it")
    return parser.parse_args()


Rows = list[tuple[str, Mapping[str, Any], float, float]]


def _methods(
    options: argparse.Namespace, trial: Trial, training: NDArray[np.int32], start_s: float
) -> Iterator[tuple[str, Rows]]:
    for method in options.methods:
        if time.perf_counter() - start_s > options.limit_s:
            print(f"| {method} and what follows: time is up | | | | | | | |")
            return
        begun_s = time.perf_counter()
        if method in OURS:
            yield from _ours(options, trial, method)
            continue
        command = _command(options, method)
        if command is None:
            print(f"| {method} | not installed | | | | | | |", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            np.save(f"{folder}/tokens.npy", training)
            line = [
                *command[:2],
                method,
                str(trial.directory),
                f"{folder}/tokens.npy",
                f"{folder}/out.safetensors",
                *command[2:],
            ]
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            took_s = time.perf_counter() - begun_s
            if done.returncode:
                print(
                    f"| {method} | failed: {(done.stderr.strip().splitlines() or ['?'])[-1][:80]} | | | | | | |",
                    flush=True,
                )
                continue
            yield method, _scopes(*_read(Path(folder) / "out.safetensors"), took_s)


def _ours(options: argparse.Namespace, trial: Trial, method: str) -> Iterator[tuple[str, Rows]]:
    """Signed scales, as the peers' are, and positive ones, which ship where a TFLite file is made.

    What is trained is trained for its scope: with the embedding in floats, and with everything in codes.
    """
    for sign, positive in SIGNS.items():
        for float_embedding in (True, False) if method == "qad" else (False,):
            begun_s, settings = time.perf_counter(), {**vars(options), "float_embedding": float_embedding}
            asked = replace(trial, options=argparse.Namespace(**settings))
            codes = codes_of(asked, Grid(4, 32, positive), method, seed=0)
            bits = {name: 8.0 * tensor.weight_bytes for name, tensor in codes.items()}
            rows = _scopes(codes, bits, time.perf_counter() - begun_s)
            yield f"ours {method}, {sign}", rows[-1:] if method == "qad" else rows


def _scopes(weights: Mapping[str, Any], bits: Mapping[str, float], took_s: float) -> Rows:
    """Everything that was quantized, and the projections alone where that is less."""
    projections = {name: value for name, value in weights.items() if name.endswith("_proj.weight")}
    rows = [("projections", projections, sum(bits[name] for name in projections), took_s)]
    return rows + ([("all", weights, sum(bits.values()), took_s)] if len(projections) < len(weights) else [])


def _print_row(
    model: Path, source: Checkpoint, held_out: NDArray[np.int32], label: tuple[str, str], weights: Mapping[str, Any],
    bits: float, took_s: float,
) -> None:  # fmt: skip
    quantized = sum(int(np.prod(source.tensors[name].stored)) for name in weights)
    figures = evaluate_weights(model, weights, held_out, stored_bits=bits + 16.0 * (source.params - quantized))
    print(
        f"| {label[0]} | {label[1]} | {figures.kl:.5f} ± {figures.kl_error:.5f} | {100 * figures.top1:.2f} "
        f"| {figures.perplexity:.3f} ({figures.perplexity_fp:.3f}) | {bits / quantized:.3f} "
        f"| {figures.bits_a_weight:.3f} | {took_s:.0f} |",
        flush=True,
    )


def _command(options: argparse.Namespace, method: str) -> list[str] | None:
    """Interpreter, script and what it needs besides; None where the peer is not installed."""
    script = str(Path(__file__).with_name("peer_quantizers.py"))
    environment = next(name for name in ENVIRONMENTS if method.startswith(name))
    if environment == "llama.cpp":
        program = options.llama_quantize
        return [sys.executable, script, str(program)] if program is not None and program.is_file() else None
    python = options.environments / environment / "bin" / "python"
    return [str(python), script] if python.is_file() else None


def _read(path: Path) -> tuple[dict[str, NDArray[np.float32]], dict[str, float]]:
    with safe_open(path, framework="numpy") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        return weights, json.loads(file.metadata()["bits"])


if __name__ == "__main__":
    sys.exit(main())
