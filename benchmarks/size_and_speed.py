"""Bytes of 4-bit weights over those of fp16, and how fast the ONNX files of one model run beside each other.

Shapes are those of public models; weights are random, which changes neither bytes nor speed. One exporter writes the
files in int4, float32 and float16 (matrices and their products; attention and norms stay in float32). They take turns
within each round, so that a slow moment of the machine meets all of them; ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.machine import heading
from edge_runtime.backends.onnx import OnnxBackend
from edge_runtime.formats.decoder import EMBEDDING, FINAL_NORM, HEAD, DecoderSpec
from edge_runtime.formats.int4 import QuantizedTensor
from pipeline.export.onnx_graph import MODEL_FILE, write_onnx
from pipeline.export.onnx_reader import weight_bytes
from pipeline.quantization.grid import Grid, fitting_group, stored_bytes
from pipeline.quantization.rounding import quantize_tensor

_ROPE = tuple(float(1e4 ** (-n / 32)) for n in range(32))
SHAPES = {
    "SmolLM2-135M": DecoderSpec(49152, 576, 1536, 30, 9, 3, 64, 512, 1e-5, _ROPE, True),
    "Qwen2.5-0.5B": DecoderSpec(151936, 896, 4864, 24, 14, 2, 64, 512, 1e-6, _ROPE, True),
    "Qwen2.5-1.5B": DecoderSpec(151936, 1536, 8960, 28, 12, 2, 128, 512, 1e-6, _ROPE * 2, True),
    "Qwen2.5-7B": DecoderSpec(152064, 3584, 18944, 28, 28, 4, 128, 512, 1e-6, _ROPE * 2, False),
}
GROUPS = (32, 64, 128)
_LARGE_BYTES = 1 << 16  # of a float matrix; smaller ones are tables of the graph


def main() -> int:
    """Print the sizes of all shapes, then the speed of those asked for; ``--shapes`` alone asks for none."""
    options = _options()
    print(heading("bytes of codes, scales and float32 norms over those of fp16, %"))
    print("| shape | parameters, M | " + " | ".join(f"group {group}" for group in GROUPS) + " |")
    print("|---|---|" + "---|" * len(GROUPS))
    for name, spec in SHAPES.items():
        shares = " | ".join(f"{100 * _least_bytes(spec, group) / (2 * _params(spec)):.2f}" for group in GROUPS)
        print(f"| {name} | {_params(spec) / 1e6:.0f} | {shares} |", flush=True)
    if not options.shapes:
        return 0
    words = (
        f"decode of {options.tokens} tokens and prefill of {options.prompt_tokens}, tokens/s, {options.threads} threads"
    )
    print(f"\n{words}; medians of {options.rounds} rounds\n")
    print("| shape | group | weights of fp16, % | | fp32 | fp16 | int4 | int4 / faster of both |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in options.shapes:
        for group in options.groups:
            _print_speed(name, SHAPES[name], group, options)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=["SmolLM2-135M", "Qwen2.5-0.5B"])
    parser.add_argument("--groups", nargs="+", type=int, choices=GROUPS, default=[32])
    parser.add_argument("--layers", type=int, help="fewer than the shape has, for a quick look")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--float16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--limit-s", type=float, default=1e9, help="no round is begun after it")
    return parser.parse_args()


def _print_speed(name: str, spec: DecoderSpec, group: int, options: argparse.Namespace) -> None:
    spec = spec if options.layers is None else replace(spec, num_layers=options.layers)
    with tempfile.TemporaryDirectory() as scratch:
        folders = _write_files(spec, group, Path(scratch), with_float16=options.float16)
        share = weight_bytes(folders["int4"] / MODEL_FILE) / (2 * _params(spec))
        runs = {kind: _runner(OnnxBackend.open(folder, spec, threads=options.threads), spec, options)
                for kind, folder in folders.items()}  # fmt: skip
        rounds = _rounds(runs, options)
    for part in ("decode", "prefill"):
        speed = {kind: statistics.median(each[kind][part] for each in rounds) for kind in runs}
        ratio = statistics.median(
            each["int4"][part] / max(each[kind][part] for kind in runs if kind != "int4") for each in rounds
        )
        cells = " | ".join(f"{speed[kind]:.1f}" if kind in speed else "–" for kind in ("float32", "float16", "int4"))
        print(f"| {name} | {group} | {100 * share:.2f} | {part} | {cells} | {ratio:.2f} |", flush=True)


def _write_files(spec: DecoderSpec, group: int, scratch: Path, *, with_float16: bool) -> dict[str, Path]:
    floats = _random_weights(spec)
    codes: dict[str, QuantizedTensor | NDArray[np.float32]] = {
        name: quantize_tensor(weight, bits=4, group=fitting_group(weight.shape[1], group), rounding="rtn")
        if weight.ndim == 2
        else weight
        for name, weight in floats.items()
    }
    folders = {kind: scratch / kind for kind in ("float32", "float16", "int4") if with_float16 or kind != "float16"}
    for folder in folders.values():
        folder.mkdir()
    write_onnx(folders["int4"], spec, codes, lora=None, accuracy_level=4)
    write_onnx(folders["float32"], spec, floats, lora=None, accuracy_level=0)
    if with_float16:
        _halve(folders["float32"] / MODEL_FILE, folders["float16"] / MODEL_FILE)
    return folders


def _halve(source: Path, target: Path) -> None:
    """The float32 file with its matrices in float16 and products in float16 between casts, as far as the CPU has them.

    ONNX Runtime's converter cannot infer the types behind attention, so the casts are put here.
    """
    model = onnx.load(source)
    matrices = [
        tensor for tensor in model.graph.initializer if len(tensor.dims) == 2 and len(tensor.raw_data) > 1 << 12
    ]
    for tensor in matrices:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    nodes = []
    for node in model.graph.node:
        if node.op_type == "MatMul":
            halved, output = f"{node.output[0]}.input_half", node.output[0]
            nodes.append(helper.make_node("Cast", [node.input[0]], [halved], to=TensorProto.FLOAT16))
            nodes.append(helper.make_node("MatMul", [halved, node.input[1]], [f"{output}.half"], name=node.name))
            nodes.append(helper.make_node("Cast", [f"{output}.half"], [output], to=TensorProto.FLOAT))
        elif node.op_type == "Gather" and node.input[0] in {tensor.name for tensor in matrices}:
            output = node.output[0]
            nodes.append(helper.make_node("Gather", list(node.input), [f"{output}.half"], name=node.name))
            nodes.append(helper.make_node("Cast", [f"{output}.half"], [output], to=TensorProto.FLOAT))
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, target, save_as_external_data=True, location="weights.bin")


def _runner(backend: OnnxBackend, spec: DecoderSpec, options: argparse.Namespace) -> Callable[[], dict[str, float]]:
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, options.prompt_tokens + options.tokens).tolist()
    cache = backend.allocate(len(ids))

    def run() -> dict[str, float]:
        cache.truncate(0)
        start_s = time.perf_counter()
        backend.prefill(ids[: options.prompt_tokens], cache)
        middle_s = time.perf_counter()
        for token in ids[options.prompt_tokens :]:
            backend.decode(token, cache)
        end_s = time.perf_counter()
        return {"prefill": options.prompt_tokens / (middle_s - start_s), "decode": options.tokens / (end_s - middle_s)}

    return run


def _rounds(runs: dict[str, Callable[[], dict[str, float]]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One to warm up, then as many as were asked for and time allows, but one."""
    start_s, rounds = time.perf_counter(), list[dict[str, Any]]()
    for done in range(options.rounds + 1):
        if done > 1 and time.perf_counter() - start_s > options.limit_s:
            break
        rounds.append({kind: run() for kind, run in runs.items()})
    return rounds[1:]


def _random_weights(spec: DecoderSpec) -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(0)
    weights = {
        name: random.standard_normal(shape, dtype=np.float32) * np.float32(shape[1] ** -0.5)
        for name, shape in _matrices(spec).items()
    }
    norms = [FINAL_NORM] + [f"model.layers.{n}.{kind}_layernorm" for n in range(spec.num_layers)
                            for kind in ("input", "post_attention")]  # fmt: skip
    return weights | {f"{name}.weight": np.ones(spec.hidden_size, np.float32) for name in norms}


def _matrices(spec: DecoderSpec) -> dict[str, tuple[int, int]]:
    outer = (EMBEDDING,) if spec.tied_embeddings else (EMBEDDING, HEAD)
    shapes = {f"{name}.weight": (spec.vocab_size, spec.hidden_size) for name in outer}
    return shapes | {f"{name}.weight": spec.projection_shape(kind) for name, kind in spec.module_names()}


def _vectors(spec: DecoderSpec) -> int:
    return (2 * spec.num_layers + 1) * spec.hidden_size


def _params(spec: DecoderSpec) -> int:
    return sum(rows * columns for rows, columns in _matrices(spec).values()) + _vectors(spec)


def _least_bytes(spec: DecoderSpec, group: int) -> int:
    codes = (stored_bytes(shape, Grid(4, fitting_group(shape[1], group), True)) for shape in _matrices(spec).values())
    return sum(codes) + 4 * _vectors(spec)


if __name__ == "__main__":
    sys.exit(main())
