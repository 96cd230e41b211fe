"""Tokens a second and peak memory of distilling a 7B shape into a 0.5B shape, beside plain transformers code.

python benchmarks/distillation_throughput.py --limit-s 400     # one GPU of 80 GB
python benchmarks/distillation_throughput.py --tiny            # any CPU: does it run
"""

from __future__ import annotations

import argparse
import gc
import re
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.distillation_trial import kernels, loop, peer_trl
from benchmarks.distillation_trial.models import (
    QWEN,
    TINY,
    Setting,
    build_model,
    flops_per_token,
    freeze,
    layer_tensors,
    sharing_copy,
    storage_bytes,
)
from benchmarks.distillation_trial.steps import Case, Marks, make_step
from pipeline.distillation.fast_layers import hasten_teacher
from pipeline.distillation.float8_teacher import quantize_teacher

CASES = (
    Case("plain transformers, batch 4", "plain", 4),
    Case("online, bf16 teacher", "online", 16),
    Case("plain transformers, batch 8", "plain", 8),
    Case("online, bf16 teacher, begun early", "online", 16, ahead=True),
    Case("TRL GKDTrainer, batch 4", "trl", 4),
    Case("online, float8 teacher", "float8", 16),
    Case("plain transformers, batch 16", "plain", 16),
    Case("stored draws", "stored", 16, chunk_tokens=8192),
    Case("the stage's loop, online, bf16 teacher", "online", 16, whole_loop=True),
    Case("the stage's loop, online, float8 teacher", "float8", 16, whole_loop=True),
    Case("the stage's loop, stored draws", "stored", 16, chunk_tokens=8192, whole_loop=True),
)
_PEERS = ("plain", "trl")


@dataclass(slots=True)
class Result:
    """What a case gave, round by round."""

    case: Case
    tokens_per_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    loss: float = float("nan")
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Teachers:
    """The teacher in both precisions; embedding, norms and head are shared."""

    by_signal: dict[str, Any]
    foreign_bytes: dict[str, int]  # of the teachers that a case does not need


def main() -> int:
    """Build, check kernels, run the cases in turn, print the table."""
    options = _options()
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not options.tiny:
        print("not run: needs a GPU of 80 GB; --tiny runs small shapes anywhere")
        return 0  # `make bench` goes on with the other scripts
    setting = TINY if options.tiny else QWEN
    torch.backends.cuda.matmul.allow_tf32 = True
    torch._dynamo.config.cache_size_limit = 64
    print(_device_line(device), flush=True)
    if device.type == "cuda":
        with _at_most(120):
            kernels.report(setting, device, options.kernels)
    teachers = _teachers(setting, device, not options.eager)
    _say(began, "models built")
    known = {"stored", *teachers.by_signal} - (set() if peer_trl.available() else {"trl"})
    cases = [_fit(case, options) for case in CASES if re.search(options.only, case.name) and case.signal in known]
    results = [Result(case) for case in cases]
    if "float8" in teachers.by_signal:
        with _at_most(120):
            kernels.report_targets(setting, teachers.by_signal)
        _say(began, "effect of float8 on the targets")
    for number in range(options.rounds):
        for result in results:
            if result.failure or time.monotonic() - began > options.limit_s - 20:
                continue
            _run_round(result, number, setting, teachers, device, options)
            _say(began, f"round {number + 1}: {_line(result, setting)}")
    print(_table(results, setting, options))
    counters = torch._dynamo.utils.counters
    print(f"graph breaks: {dict(counters['graph_break'])}; compiled: {dict(counters['stats'])}")
    return 0


def _run_round(
    result: Result, number: int, setting: Setting, teachers: Teachers, device: torch.device, options: argparse.Namespace
) -> None:
    """Build the case afresh, warm up, time its steps; a failure is noted and the others go on."""
    case = result.case
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    foreign = teachers.foreign_bytes[case.signal]
    try:
        with _at_most(options.case_s):
            teacher = teachers.by_signal.get(case.signal)
            if case.signal == "trl":
                _run_trl(result, setting, teacher, device, options)
                return
            if case.whole_loop:
                steps = max(2, round(options.tokens / case.tokens_per_step(setting)))
                rate, result.loss = loop.tokens_per_second(case, setting, teacher, device, steps, not options.eager)
                result.tokens_per_s.append(rate)
                return
            step = make_step(case, setting, teacher, device, not options.eager)
            for _ in range(2 if number == 0 else 1):
                loss = step(lambda _: None)
            _wait(device)
            marks = Marks(on=device.type == "cuda" and number == 0)
            steps = max(2, round(options.tokens / case.tokens_per_step(setting)))
            start = time.perf_counter()
            for _ in range(steps):
                loss = step(marks)
            _wait(device)
            elapsed_s = time.perf_counter() - start
        result.tokens_per_s.append(steps * case.tokens_per_step(setting) / elapsed_s)
        result.loss = float(loss)
        phases = {name: f"{value / steps:.1f}" for name, value in marks.milliseconds().items() if name != "start"}
        if phases:
            print(f"    ms a step: {phases}", flush=True)
    except torch.OutOfMemoryError:
        result.failure = "out of memory"
    except Exception as error:  # the table must come whatever one case does
        traceback.print_exc()
        result.failure = f"{type(error).__name__}"
    finally:
        if device.type == "cuda":
            result.peak_bytes = max(result.peak_bytes, torch.cuda.max_memory_allocated() - foreign)


def _run_trl(result: Result, setting: Setting, teacher: Any, device: torch.device, options: argparse.Namespace) -> None:
    student = build_model(setting.student, setting, device, 1, torch.bfloat16)
    steps = max(2, round(options.tokens / result.case.tokens_per_step(setting)))
    rate, result.loss = peer_trl.tokens_per_second(setting, teacher, student, result.case.batch_sequences, steps)
    result.tokens_per_s.append(rate)


def _teachers(setting: Setting, device: torch.device, compiled: bool) -> Teachers:
    """One set of weights, and float8 layers beside it; peers get module trees of their own, left as they were."""
    teacher = freeze(build_model(setting.teacher, setting, device, 0, torch.bfloat16))
    by_signal = {"online": teacher, "plain": sharing_copy(teacher), "trl": sharing_copy(teacher)}
    own, float8 = storage_bytes(*layer_tensors(teacher)), 0
    if device.type == "cuda":
        by_signal["float8"] = freeze(sharing_copy(teacher))
        quantize_teacher(by_signal["float8"])
        float8 = storage_bytes(*layer_tensors(by_signal["float8"]))
    for model in (by_signal[name] for name in ("online", "float8") if name in by_signal):
        hasten_teacher(model, compiled)
    everything = storage_bytes(*teacher.parameters()) + float8
    return Teachers(by_signal, {"plain": float8, "trl": float8, "online": float8, "float8": own, "stored": everything})


def _fit(case: Case, options: argparse.Namespace) -> Case:
    return replace(case, batch_sequences=2, chunk_tokens=20, ahead=False) if options.tiny else case


def _table(results: list[Result], setting: Setting, options: argparse.Namespace) -> str:
    rows = ["", "| case | sequences a step | tokens/s, rounds | median | of the first peer | peak GB | model TFLOP/s |"]
    rows.append("|---|---|---|---|---|---|---|")
    base = statistics.median(results[0].tokens_per_s) if results and results[0].tokens_per_s else float("nan")
    for result in results:
        case, rates = result.case, result.tokens_per_s
        name = f"{case.name}{'' if case.micro_batches == 1 else f' ({case.micro_batches} passes)'}"
        if not rates:
            rows.append(f"| {name} | {case.batch_sequences} | {result.failure} | | | {result.peak_bytes / 1e9:.1f} | |")
            continue
        middle = statistics.median(rates)
        flops = flops_per_token(setting, case.signal != "stored", True) * middle / 1e12
        shown = ", ".join(f"{rate:,.0f}" for rate in rates)
        rows.append(
            f"| {name} | {case.batch_sequences * case.micro_batches} | {shown} | **{middle:,.0f}** | "
            f"{middle / base:.2f}x | {result.peak_bytes / 1e9:.1f} | {flops:.0f} |"
        )
    rows.append(f"\noptions: {vars(options)}")
    return "\n".join(rows)


def _line(result: Result, setting: Setting) -> str:
    rate = f"{result.tokens_per_s[-1]:,.0f} tokens/s" if result.tokens_per_s else ""
    peak = f"{result.peak_bytes / 1e9:.1f} GB"
    return f"{result.case.name}: {rate} {result.failure} peak {peak}, loss {result.loss:.4f}"


def _device_line(device: torch.device) -> str:
    import transformers

    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return f"{name}; torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"


@contextmanager
def _at_most(limit_s: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {limit_s} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit_s)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _say(began: float, text: str) -> None:
    print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--eager", action="store_true", help="do not compile the layers")
    parser.add_argument("--kernels", action="store_true", help="time products, attention and loss kernels first")
    parser.add_argument("--only", default="", help="cases whose name matches this expression")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=131_072, help="timed tokens a case and round, about")
    parser.add_argument("--limit-s", type=int, default=400)
    parser.add_argument("--case-s", type=int, default=120, help="longest time of one case in one round")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
