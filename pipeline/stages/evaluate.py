"""evaluate: the exported files through edge_runtime, against the student in fp and against the teacher.

Each container is timed in a fresh process and scored on the held-out sequences; the gated ones answer every task. The
gate's verdict is part of the result.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.formats.decoder import DecoderSpec
from pipeline.artifacts import StageRun, read_json, write_json
from pipeline.distillation.scoring import HeldOut
from pipeline.evaluation.exam import Exam, flips, recovery_reasons, recovery_table, sit
from pipeline.evaluation.figures import perplexity_alone, quality
from pipeline.evaluation.preparation import make_exam, teacher_answers
from pipeline.evaluation.questions import Answers, FloatArray
from pipeline.evaluation.readers import PipedReader, Reader, TorchReader, open_reader
from pipeline.evaluation.recovery import Bounds
from pipeline.export.assembly import EXPORT_FILE, WEIGHTS_FILE, legacy_python, trial_package
from pipeline.export.checkpoint import load_student
from pipeline.export.parity import run_bench, run_edge
from pipeline.progress import progress
from pipeline.settings import GateConfig

if TYPE_CHECKING:
    from pipeline.quantization.streamed_logits import StreamedModel

_BENCH_PROMPT_TOKENS = 32


def run(run: StageRun) -> None:
    """Write evaluation.json (also as this stage's metrics): figures by container, recovery, samples, verdict."""
    config = run.config
    quantized, exported, distilled = (
        read_json(run.layout.metrics(stage, run.submodel)) for stage in ("quantize", "export", "distill")
    )
    packages, samples = dict[str, Any](), dict[str, str]()
    exam, found = make_exam(run), dict[str, dict[str, Answers]]()
    fp = _read_student(run, exam)
    if config.submodel.whole:
        distilled |= perplexity_alone(fp.held_out, fp.logits())
    with _trial(run) as package, progress(f"evaluate {run.submodel}", len(config.export.run_containers)) as report:
        for done, container in enumerate(config.export.run_containers, 1):
            with _reader(run, package, container) as reader:
                figures = _quality(run, fp, reader)
                if container in config.gate.containers:
                    found[container] = sit(exam, reader)
            packages[container] = {**exported[container], **figures, **_speed(run, package, container)}
            samples[container] = _sample(run, package, container)
            report(done, container)
    # Files for other runtimes stand beside them, null for what only a run could tell.
    unknown = dict.fromkeys(next(iter(packages.values())))
    packages = {name: packages.get(name) or {**unknown, **exported[name]} for name in config.export.containers}
    scratch = distilled.get("from_scratch", {})
    result = {
        "params": quantized["params"],
        "whole": config.submodel.whole,
        "fp16_weight_bytes": quantized["fp16_weight_bytes"],
        **{name: quantized[name] for name in ("sensitivity",) if name in quantized},
        "perplexity_fp": distilled["perplexity"],
        "perplexity_from_scratch": scratch.get("perplexity"),
        "bits_per_byte_fp": distilled["bits_per_byte"],
        "kl_to_teacher": distilled["kl_to_teacher"],
        "kl_to_teacher_from_scratch": scratch.get("kl_to_teacher"),
        "kept_share": distilled["kept_share"],
        "packages": packages,
        "recovery": _recovery(run, exam, fp.answers, found),
        "samples": samples,
    }
    beats = config.gate.beats_from_scratch and not config.submodel.whole  # of which nothing was trained
    reasons = gate_reasons(result, config.gate.model_copy(update={"beats_from_scratch": beats}))
    result["gate"] = {"passed": not reasons, "reasons": reasons}
    write_json(run.output / "evaluation.json", result)
    write_json(run.layout.metrics("evaluate", run.submodel), result)


def gate_reasons(result: dict[str, Any], gate: GateConfig) -> list[str]:
    """Why a submodel must not be registered; empty when it may be."""
    reasons = []
    limits = {"onnx": gate.onnx_weight_ratio_max, "tflite": gate.tflite_weight_ratio_max}
    gated = [name for name in gate.containers if name in result["packages"]]
    for container in gated:
        figures = result["packages"][container]
        ratio = figures["perplexity"] / result["perplexity_fp"]
        if ratio > gate.perplexity_ratio_max:
            reasons.append(f"{container}: perplexity {ratio:.3f} of fp, allowed {gate.perplexity_ratio_max}")
        if figures["top1_to_fp"] < gate.top1_to_fp_min:
            reasons.append(f"{container}: top-1 {figures['top1_to_fp']:.3f}, at least {gate.top1_to_fp_min}")
        share = figures["weight_bytes"] / result["fp16_weight_bytes"]
        if share > limits.get(container, 1.0):
            reasons.append(f"{container}: weights {share:.4f} of fp16, allowed {limits[container]}")
    if not gated:
        reasons.append(f"none of the gated containers was made: {', '.join(gate.containers)}")
    reasons += recovery_reasons(result["recovery"]["tasks"], gated, gate.recovery_min)
    if gate.beats_from_scratch:
        # A tokenizer of its own leaves no KL to the teacher; text is the same for both.
        name, key = ("KL to the teacher", "kl_to_teacher")
        if result["kl_to_teacher"] is None:
            name, key = ("perplexity", "perplexity_fp")
        found, scratch = result[key], result[f"{key.removesuffix('_fp')}_from_scratch"]
        if scratch is None or found >= scratch:
            reasons.append(f"{name} {found}, from scratch {scratch}: not better")
    return reasons


@dataclass(frozen=True, slots=True)
class _Student:
    """The student before 4 bits: what it answered, and what its head multiplies on held-out text."""

    model: StreamedModel
    answers: Mapping[str, Answers]
    held_out: HeldOut
    states: Sequence[Any]

    def logits(self) -> Iterator[FloatArray]:
        """(T, V) of each held-out sequence."""
        return self.model.logits(self.states)


def _read_student(run: StageRun, exam: Exam) -> _Student:
    """With one layer in memory, except where answers are written: token by token only the whole model does that."""
    from pipeline.quantization.source import open_checkpoint
    from pipeline.quantization.streamed_logits import StreamedModel

    folder, context_tokens = run.layout.student(run.submodel), run.config.export.context_tokens
    source = open_checkpoint(folder, context_tokens, 1, f"student {run.submodel}")
    model = StreamedModel.open(source)
    writes = exam.worked or exam.harness is not None
    answers = sit(exam, TorchReader(load_student(folder)) if writes else model)
    held_out = HeldOut.open(run.layout.sequences(run.submodel), context_tokens)
    return _Student(model, answers, held_out, model.states(list(held_out.tokens)))


@contextmanager
def _trial(run: StageRun) -> Iterator[Path]:
    weights = run.layout.weights(run.submodel) / WEIGHTS_FILE
    with trial_package(run.config, exports=run.layout.exports(run.submodel), weights=weights) as package:
        yield package


@contextmanager
def _reader(run: StageRun, package: Path, container: str) -> Iterator[Reader]:
    """The file in this process; the old runtime cannot live in it."""
    threads = run.config.runtime.threads
    if container == "tflite_legacy":
        yield PipedReader(legacy_python(run.config), package, container, threads=threads)
        return
    spec = DecoderSpec.from_dict(read_json(run.layout.exports(run.submodel) / EXPORT_FILE)["decoder"])
    with open_reader(container, package / container, spec, threads=threads) as reader:
        yield reader


def _quality(run: StageRun, fp: _Student, reader: Reader) -> dict[str, float | None]:
    found = (logits for _, logits in reader.rows(list(fp.held_out.tokens)))
    figures = quality(fp.held_out, fp.logits(), found)
    if run.config.submodel.whole:  # the student is the teacher
        figures |= {"kl_to_teacher": figures["kl_to_fp"], "top1_to_teacher": figures["top1_to_fp"]}
    return figures


def _speed(run: StageRun, package: Path, container: str) -> dict[str, float]:
    config = run.config
    prompt = min(_BENCH_PROMPT_TOKENS, config.export.context_tokens // 4)
    tokens = min(config.runtime.bench_tokens, config.export.context_tokens - prompt)
    measured = run_bench(
        _python(run, container), package, container, threads=config.runtime.threads,
        arguments=["--prompt-tokens", str(prompt), "--tokens", str(tokens), "--repeat", "3"],
    )  # fmt: skip
    return {
        "tokens_per_s": round(measured["decode_tokens_per_s_median"], 1),
        "prefill_tokens_per_s": round(measured["prefill_tokens_per_s_median"], 1),
        "load_s": round(measured["load_s"], 4),
        "peak_rss_bytes": measured["peak_rss_bytes"],
    }


def _sample(run: StageRun, package: Path, container: str) -> str:
    runtime = run.config.runtime
    arguments = ["--prompt", runtime.prompt, "--max-tokens", str(runtime.max_tokens), "--temperature", "0"]
    said = run_edge(
        _python(run, container), "generate", package, container, threads=runtime.threads, arguments=arguments
    )
    return str(said["text"])


def _python(run: StageRun, container: str) -> Path:
    return legacy_python(run.config) if container == "tflite_legacy" else Path(sys.executable)


def _recovery(
    run: StageRun, exam: Exam, fp: Mapping[str, Answers], found: Mapping[str, Mapping[str, Answers]]
) -> dict[str, Any]:
    gate = run.config.gate
    if run.config.submodel.whole:
        teacher: Mapping[str, Any] = {task: answers.correct for task, answers in fp.items()}
    else:
        teacher = teacher_answers(run, exam)
    bounds = Bounds(gate.items_min, gate.above_chance_min, gate.confidence, gate.resamples, run.config.seed)
    return {
        "confidence": gate.confidence,
        "needed": gate.recovery_min,
        "tokens": exam.questions.tokens,
        "tasks": recovery_table(exam, fp, teacher, found, bounds, gate.recovery_min),
        "flips": {container: flips(exam, fp, answers) for container, answers in found.items()},
    }
