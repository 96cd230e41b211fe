"""evaluate: the exported files, in fresh processes of edge_runtime, against the fp student and the teacher.

Each container is scored on the held-out sequences and timed; the gate's verdict is part of the result.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import StageRun, read_json, write_json
from pipeline.distillation.scoring import HeldOut, agreement
from pipeline.export.assembly import WEIGHTS_FILE, legacy_python, trial_package
from pipeline.export.checkpoint import load_student
from pipeline.export.parity import run_bench, run_edge
from pipeline.progress import progress
from pipeline.settings import GateConfig

_BENCH_PROMPT_TOKENS = 32


def run(run: StageRun) -> None:
    """Write evaluation.json (also as this stage's metrics): figures by container, samples, verdict."""
    config = run.config
    quantized = read_json(run.layout.metrics("quantize", run.submodel))
    exported = read_json(run.layout.metrics("export", run.submodel))
    distilled = read_json(run.layout.metrics("distill", run.submodel))
    exports, weights = run.layout.exports(run.submodel), run.layout.weights(run.submodel) / WEIGHTS_FILE
    packages: dict[str, Any] = {}
    samples: dict[str, str] = {}
    with (
        trial_package(config, exports=exports, weights=weights) as package,
        progress(f"evaluate {run.submodel}", len(config.export.run_containers)) as report,
    ):
        for done, container in enumerate(config.export.run_containers, 1):
            figures, samples[container] = _measure(run, package, container)
            packages[container] = {**exported[container], **figures}
            report(done, container)
    # Files for other runtimes stand beside them, null for what only a run could tell.
    unknown = dict.fromkeys(next(iter(packages.values())))
    packages = {name: packages.get(name) or {**unknown, **exported[name]} for name in config.export.containers}
    scratch = distilled.get("from_scratch", {})
    result = {
        "params": quantized["params"],
        "fp16_weight_bytes": quantized["fp16_weight_bytes"],
        "perplexity_fp": distilled["perplexity"],
        "perplexity_from_scratch": scratch.get("perplexity"),
        "bits_per_byte_fp": distilled["bits_per_byte"],
        "kl_to_teacher": distilled["kl_to_teacher"],
        "kl_to_teacher_from_scratch": scratch.get("kl_to_teacher"),
        "kept_share": distilled["kept_share"],
        "packages": packages,
        "samples": samples,
    }
    reasons = gate_reasons(result, config.gate)
    result["gate"] = {"passed": not reasons, "reasons": reasons}
    write_json(run.output / "evaluation.json", result)
    write_json(run.layout.metrics("evaluate", run.submodel), result)


def gate_reasons(result: dict[str, Any], gate: GateConfig) -> list[str]:
    """Why a submodel must not be registered; empty when it may be."""
    reasons = []
    limits = {"onnx": gate.onnx_weight_ratio_max, "tflite": gate.tflite_weight_ratio_max}
    for container in gate.containers:
        if (figures := result["packages"].get(container)) is None:
            continue
        ratio = figures["perplexity"] / result["perplexity_fp"]
        if ratio > gate.perplexity_ratio_max:
            reasons.append(f"{container}: perplexity {ratio:.3f} of fp, allowed {gate.perplexity_ratio_max}")
        if figures["top1_to_fp"] < gate.top1_to_fp_min:
            reasons.append(f"{container}: top-1 {figures['top1_to_fp']:.3f}, at least {gate.top1_to_fp_min}")
        share = figures["weight_bytes"] / result["fp16_weight_bytes"]
        if share > limits.get(container, 1.0):
            reasons.append(f"{container}: weights {share:.4f} of fp16, allowed {limits[container]}")
    if not set(gate.containers) & set(result["packages"]):
        reasons.append(f"none of the gated containers was made: {', '.join(gate.containers)}")
    if gate.beats_from_scratch:
        # A tokenizer of its own leaves no KL to the teacher; text is the same for both.
        name, key = ("KL to the teacher", "kl_to_teacher")
        if result["kl_to_teacher"] is None:
            name, key = ("perplexity", "perplexity_fp")
        found, scratch = result[key], result[f"{key.removesuffix('_fp')}_from_scratch"]
        if scratch is None or found >= scratch:
            reasons.append(f"{name} {found}, from scratch {scratch}: not better")
    return reasons


def _measure(run: StageRun, package: Path, container: str) -> tuple[dict[str, float | None], str]:
    """Score, time and sample one container."""
    config, folder_of_text = run.config, run.layout.sequences(run.submodel)
    python = legacy_python(config) if container == "tflite_legacy" else Path(sys.executable)
    threads = config.runtime.threads
    held_out = HeldOut.open(folder_of_text, config.export.context_tokens)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "tokens.npy", held_out.tokens)
        logits = Path(folder) / "logits.npy"
        prompt = min(_BENCH_PROMPT_TOKENS, config.export.context_tokens // 4)
        tokens = min(config.runtime.bench_tokens, config.export.context_tokens - prompt)
        measured = run_bench(
            python, package, container, threads=threads,
            arguments=["--prompt-tokens", str(prompt), "--tokens", str(tokens), "--repeat", "3",
                       "--score", f"{folder}/tokens.npy", "--logits-out", str(logits)],
        )  # fmt: skip
        found = np.load(logits, mmap_mode="r", allow_pickle=False)
        quality = _quality(run, held_out, found)
    sample = run_edge(
        python, "generate", package, container, threads=threads,
        arguments=["--prompt", config.runtime.prompt, "--max-tokens", str(config.runtime.max_tokens), "--temperature",
                   "0"],
    )  # fmt: skip
    speed = {
        "tokens_per_s": round(measured["decode_tokens_per_s_median"], 1),
        "prefill_tokens_per_s": round(measured["prefill_tokens_per_s_median"], 1),
        "load_s": round(measured["load_s"], 4),
        "peak_rss_bytes": measured["peak_rss_bytes"],
    }
    quality["perplexity"] = round(measured["perplexity"], 4)
    quality["bits_per_byte"] = round(held_out.bits_per_byte(measured["perplexity"]), 4)
    return {**quality, **speed}, sample["text"]


def _quality(run: StageRun, held_out: HeldOut, found: NDArray[np.float32]) -> dict[str, float | None]:
    from pipeline.distillation.recording import model_logits

    student = load_student(run.layout.student(run.submodel))
    to_fp = agreement(model_logits(student, held_out.tokens), _rows(found))
    kl, top1 = held_out.kl(_rows(found)), held_out.top1_share(found.argmax(axis=-1))
    return {
        "kl_to_fp": round(to_fp.kl, 6),
        "top1_to_fp": round(to_fp.top1, 6),
        "kl_to_teacher": None if kl is None else round(kl, 6),
        "top1_to_teacher": None if top1 is None else round(top1, 6),
    }


def _rows(logits: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    for row in logits:
        yield np.asarray(row)
