"""export: every container from one set of codes, each read back and run before it may ship."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.int4 import Weights, load_weights
from edge_runtime.formats.package import CHAT_TEMPLATE_FILE, GOLDEN_FILE
from pipeline.artifacts import StageRun, read_json, write_json
from pipeline.export.assembly import (
    EXPORT_FILE,
    LEGACY_FILE,
    WEIGHTS_FILE,
    legacy_python,
    require_legacy_python,
    seal,
    training_containers,
)
from pipeline.export.checkpoint import load_student
from pipeline.export.lora_slots import LoraSlots
from pipeline.export.parity import (
    compare_logits,
    load_dequantized,
    require_parity,
    require_same_weights,
    run_bench,
)
from pipeline.progress import progress
from pipeline.settings import RUN_CONTAINERS

_EXACT_CHECK_BYTES = 500_000_000
_TRAINING_FILES = ("onnx/train_*", "onnx/loss_*", "tflite_train/*", "torch/*")
_GOLDEN_TOKENS, _GOLDEN_TOP = 16, 8


def run(run: StageRun) -> None:
    """Write the containers, the tokenizer and golden vectors; refuse files that do not compute the codes."""
    config, weights_dir = run.config, run.layout.weights(run.submodel)
    require_legacy_python(config)
    _write_common(run)
    sources = {name: LEGACY_FILE if name == "tflite_legacy" else WEIGHTS_FILE for name in config.export.containers}
    metrics: dict[str, Any] = {}
    with progress(f"export {run.submodel}", len(config.export.containers)) as report:
        for done, container in enumerate(config.export.containers, 1):
            write = _write_container if container in RUN_CONTAINERS else _write_files
            metrics[container] = write(run, container, weights_dir / sources[container])
            report(done, container)
    tokens = _parity_tokens(run)
    metrics["training"] = _write_training(run, weights_dir / WEIGHTS_FILE, tokens)
    dequantized = cache(partial(_dequantized_logits, run, tokens))  # once for all files of the same codes
    for container in config.export.containers:
        if container == "gguf" or (
            container not in RUN_CONTAINERS and metrics[container]["weight_bytes"] >= _EXACT_CHECK_BYTES
        ):
            continue  # its own reader has compared every code; no runtime for it here
        expected = dequantized(weights_dir / sources[container])
        found = _shipped_logits(run, container, tokens)
        metrics[container] |= require_parity(container, _rows(expected), _rows(found)).to_dict()
        if container == config.export.run_containers[0]:
            _write_golden(run, tokens, expected)
        if container == "onnx" and metrics["onnx"]["weight_bytes"] < _EXACT_CHECK_BYTES:
            exact = _exact_onnx_logits(run, weights_dir / WEIGHTS_FILE, tokens)
            metrics["onnx"]["exact_max_abs"] = compare_logits(_rows(expected), _rows(exact)).max_abs
    write_json(run.layout.metrics("export", run.submodel), metrics)


def _write_common(run: StageRun) -> None:
    from transformers import AutoConfig

    from pipeline.distillation.teachers import eos_ids

    spec, _ = load_weights(run.layout.weights(run.submodel) / WEIGHTS_FILE)
    model_config = AutoConfig.from_pretrained(run.layout.student(run.submodel), local_files_only=True)
    tokenizer = run.layout.tokenizer(run.submodel)
    shutil.copy2(tokenizer / "tokenizer.json", run.output / "tokenizer.json")
    if (template := tokenizer / CHAT_TEMPLATE_FILE).exists():
        shutil.copy2(template, run.output / CHAT_TEMPLATE_FILE)
    bos = model_config.bos_token_id if isinstance(model_config.bos_token_id, int) else None
    exported = {"decoder": spec.to_dict(), "bos": bos, "eos": eos_ids(model_config)}
    write_json(run.output / EXPORT_FILE, exported)


def _write_container(run: StageRun, container: str, source: Path) -> dict[str, int]:
    """Write, read back bit for bit, and count bytes from the file."""
    export = run.config.export
    spec, weights = load_weights(source)
    lora = LoraSlots(tuple(export.lora_targets), export.lora_rank) if export.lora_targets else None
    folder = run.output / container
    folder.mkdir()
    if container == "onnx":
        from pipeline.export.onnx_graph import MODEL_FILE, write_onnx
        from pipeline.export.onnx_reader import read_onnx_weights
        from pipeline.export.onnx_reader import weight_bytes as onnx_weight_bytes

        places = write_onnx(folder, spec, weights, lora=lora, accuracy_level=export.accuracy_level)
        require_same_weights(container, weights, read_onnx_weights(folder / MODEL_FILE))
        stored = onnx_weight_bytes(folder / MODEL_FILE)
    else:
        from pipeline.export.tflite_graph import write_tflite
        from pipeline.export.tflite_reader import read_tflite_weights, weight_bytes

        profile = "legacy" if container == "tflite_legacy" else "current"
        path = folder / "model.tflite"
        write_tflite(path, spec, weights, profile=profile, lora=lora, prefill_tokens=export.prefill_tokens)  # type: ignore[arg-type]
        require_same_weights(container, weights, read_tflite_weights(path))
        stored = weight_bytes(path)
    files = sum(path.stat().st_size for path in folder.iterdir())
    if container == "onnx" and lora is not None:
        from pipeline.export.train_step_onnx import write_onnx_train_steps

        # Counted apart: only a device that trains reads them.
        write_onnx_train_steps(
            folder, spec, places, lora, buckets=export.train_buckets, batch_sequences=export.train_batch
        )
    return {"file_bytes": files, "weight_bytes": stored}


def _write_files(run: StageRun, container: str, source: Path) -> dict[str, int]:
    """What other runtimes load: written, read back with the format's own reader, its bytes counted."""
    from transformers import AutoConfig

    spec, weights = load_weights(source)
    folder, student = run.output / container, run.layout.student(run.submodel)
    exported = read_json(run.output / EXPORT_FILE)
    bos, eos = exported["bos"], exported["eos"]
    folder.mkdir()
    if container == "gguf":
        from pipeline.export import gguf
        from pipeline.export.gguf_reader import require_same_gguf
        from pipeline.export.gguf_vocabulary import read_vocabulary

        gguf.write_gguf(
            folder / gguf.MODEL_FILE, spec, weights,
            config=AutoConfig.from_pretrained(student, local_files_only=True),
            vocabulary=read_vocabulary(run.output, spec.vocab_size, bos=bos, eos=eos),
            name=f"{run.submodel} {run.config.export.version}", licence=run.config.export.licence,
        )  # fmt: skip
        stored = require_same_gguf(folder / gguf.MODEL_FILE, spec, weights)
    else:
        from pipeline.export.compressed_tensors import copy_texts, write_compressed_tensors
        from pipeline.export.compressed_tensors_reader import require_same_compressed_tensors

        linear_only = container == "safetensors_linear"
        write_compressed_tensors(folder, spec, weights, config=student / "config.json", linear_only=linear_only)
        copy_texts(folder, student=student, tokenizer=run.layout.tokenizer(run.submodel), bos=bos, eos=eos)
        stored = require_same_compressed_tensors(folder, weights, linear_only=linear_only)
    return {"file_bytes": sum(path.stat().st_size for path in folder.iterdir()), "weight_bytes": stored}


def _write_training(run: StageRun, source: Path, tokens: NDArray[np.int32]) -> dict[str, float]:
    """What trains adapters on a device beside ONNX's graphs: LiteRT's, and codes for torch. Then compare gradients."""
    export = run.config.export
    spec, weights = load_weights(source)
    lora = LoraSlots(tuple(export.lora_targets), export.lora_rank)
    for container in training_containers(run.config):
        (run.output / container).mkdir()
        if container == "torch":
            shutil.copyfile(source, run.output / container / WEIGHTS_FILE)
        else:
            from pipeline.export.tflite_reader import read_tflite_weights
            from pipeline.export.train_step_tflite import STEP_FILE, write_tflite_train_steps

            path = run.output / container / STEP_FILE
            write_tflite_train_steps(
                path, spec, weights, lora, buckets=export.train_buckets, batch_sequences=export.train_batch
            )
            require_same_weights(container, weights, read_tflite_weights(path))
    files = [path for pattern in _TRAINING_FILES for path in run.output.glob(pattern)]
    metrics: dict[str, float] = {"file_bytes": sum(path.stat().st_size for path in files)}
    return metrics | _train_step_errors(run, spec, weights, lora, tokens)


def _train_step_errors(
    run: StageRun, spec: DecoderSpec, weights: Weights, lora: LoraSlots, tokens: NDArray[np.int32]
) -> dict[str, float]:
    """How far gradients of the shortest graph are from torch's, by container; refuse those that are too far."""
    from pipeline.export.train_step_parity import draw_probe, onnx_step, require_same_step, tflite_step, torch_step

    shortest, threads = min(run.config.export.train_buckets, default=0), run.config.runtime.threads
    steps = {
        "onnx": (onnx_step, run.output / "onnx" / f"train_{shortest}.onnx"),
        "tflite_train": (tflite_step, run.output / "tflite_train" / "train.tflite"),
    }
    here = {name: step for name, step in steps.items() if step[1].exists()}
    if not here:
        return {}
    model = load_dequantized(load_student(run.layout.student(run.submodel)), weights)
    probe = draw_probe(model, spec, lora, np.resize(tokens, (1, shortest)))
    expected = torch_step(model, probe)
    return {
        f"{name}_relative_error": round(require_same_step(name, expected, step(path, probe, threads=threads)), 9)
        for name, (step, path) in here.items()
    }


def _parity_tokens(run: StageRun) -> NDArray[np.int32]:
    """(S, T) held-out tokens with at least ``parity_positions`` positions."""
    held_out = np.load(run.layout.sequences(run.submodel) / "held_out.npy")
    length = min(held_out.shape[1], run.config.export.parity_positions)
    tokens: NDArray[np.int32] = held_out[: -(-run.config.export.parity_positions // length), :length]
    return tokens


def _dequantized_logits(run: StageRun, tokens: NDArray[np.int32], codes: Path) -> NDArray[np.float32]:
    """(S, T, V): what the codes mean, computed in fp32 by torch with one layer in memory."""
    from pipeline.quantization.source import open_checkpoint
    from pipeline.quantization.streamed_logits import StreamedModel

    spec, weights = load_weights(codes)
    # Padded as the codes are: to one multiple of their own inner size.
    source = open_checkpoint(
        run.layout.student(run.submodel), spec.context_tokens, spec.intermediate_size, f"student {run.submodel}"
    )
    return np.stack([logits.copy() for _, logits in StreamedModel.open(source, weights).rows(list(tokens))])


def _shipped_logits(run: StageRun, container: str, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits of the file in its runtime: ours in this process, the legacy one in its own environment."""
    if container not in RUN_CONTAINERS:
        from pipeline.export.compressed_tensors_reader import load_logits

        return load_logits(run.output / container, tokens)
    if container != "tflite_legacy":
        return _backend_logits(run, container, run.output / container, tokens)
    weights = run.layout.weights(run.submodel) / WEIGHTS_FILE
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package"
        shutil.copytree(run.output, package, ignore=shutil.ignore_patterns(EXPORT_FILE))
        seal(package, run.config, exports=run.output, weights=weights)
        np.save(Path(folder) / "tokens.npy", tokens)
        logits = Path(folder) / "logits.npy"
        run_bench(
            legacy_python(run.config), package, container, threads=run.config.runtime.threads,
            arguments=["--repeat", "0", "--score", f"{folder}/tokens.npy", "--logits-out", str(logits)],
        )  # fmt: skip
        return np.asarray(np.load(logits, allow_pickle=False))


def _backend_logits(run: StageRun, container: str, folder: Path, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    from edge_runtime.backends import open_backend

    spec, _ = load_weights(run.layout.weights(run.submodel) / WEIGHTS_FILE)
    backend = open_backend(container, folder, spec, threads=run.config.runtime.threads)
    try:
        cache = backend.allocate(tokens.shape[1])
        rows = []
        for row in tokens.tolist():
            cache.truncate(0)
            rows.append(backend.prefill(row, cache, all_logits=True).copy())
        return np.stack(rows)
    finally:
        backend.close()


def _exact_onnx_logits(run: StageRun, source: Path, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """The same codes with activations kept in fp32 (accuracy level 0): what the graph itself computes."""
    from pipeline.export.onnx_graph import write_onnx

    spec, weights = load_weights(source)
    with tempfile.TemporaryDirectory() as folder:
        write_onnx(Path(folder), spec, weights, lora=None, accuracy_level=0)
        return _backend_logits(run, "onnx", Path(folder), tokens)


def _write_golden(run: StageRun, tokens: NDArray[np.int32], expected: NDArray[np.float32]) -> None:
    """A prompt and the most likely next tokens, so that a device can check what it installed."""
    prompt = tokens[0, :_GOLDEN_TOKENS]
    last = expected[0, len(prompt) - 1]
    top = np.argsort(-last, kind="stable")[:_GOLDEN_TOP]
    golden = {
        "tokens": prompt.tolist(),
        "top_ids": top.tolist(),
        "top_logits": [round(float(last[index]), 4) for index in top],
        "logits_std": round(float(last.std()), 4),
    }
    (run.output / GOLDEN_FILE).write_text(json.dumps(golden, sort_keys=True) + "\n", encoding="utf-8")


def _rows(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return logits.reshape(-1, logits.shape[-1])
