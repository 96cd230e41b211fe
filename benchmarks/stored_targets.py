"""What stored targets cost: bytes a position, decoding, and what recording adds to the teacher's forward pass.

Every format holds the same distributions; all are decoded in turn into ids and weights, and the CPU seconds of this
process count, on one thread. Distributions are over 152,064 tokens: uniform, Zipf (p ~ 1 / rank), "text" (Zipf with an
exponent between 1 and 4 for each position) and sharp (exponent 4).

python benchmarks/stored_targets.py                    # any CPU
python benchmarks/stored_targets.py --teacher 7b       # one GPU of 80 GB; --teacher tiny: any CPU, does it run
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.distillation_trial.models import QWEN, TINY, Setting, build_model, freeze
from benchmarks.machine import heading
from pipeline.distillation.signals import draw, head_logits, last_hidden
from pipeline.distillation.stored_targets import StoredTargets, record_targets
from pipeline.distillation.target_codec import decode_draws, decode_top_k, encode_draws, encode_top_k

VOCABULARY, DRAWS, TOP, TOKENS = 152_064, 32, 50, 1024
SEQUENCES, CHUNK = 16, 1024  # of one pass of the teacher; positions whose logits exist at once
EXPONENTS = {"uniform": (0.0, 0.0), "Zipf": (1.0, 1.0), "text": (1.0, 4.0), "sharp": (4.0, 4.0)}
TEACHERS = {"7b": QWEN, "tiny": TINY}


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--teacher", choices=list(TEACHERS), help="record with a teacher of this shape instead")
    options = parser.parse_args()
    if options.teacher:
        _print_recording(TEACHERS[options.teacher], options.repeats)
        return 0
    print(heading(f"stored targets of {VOCABULARY:,} tokens, {DRAWS} draws: bytes a position and decoding on one core"))
    print(
        "| distribution | distinct ids | format | bytes a position | encoded, 1000 tokens/s | decoded, 1000 tokens/s |"
    )
    print("|---|---|---|---|---|---|")
    for name, exponents in EXPONENTS.items():
        for row in _format_rows(name, exponents, options.repeats):
            print(row, flush=True)
    return 0


def _format_rows(name: str, exponents: tuple[float, float], repeats: int) -> list[str]:
    """Every format of one sequence, decoded in turn."""
    ids, top_ids, top_p = _sequence(exponents)

    def unpack_draws(record: bytes) -> None:
        decode_draws(record, VOCABULARY, np.zeros((TOKENS, DRAWS), np.int64), np.zeros((TOKENS, DRAWS), np.float32))

    def unpack_top(record: bytes) -> None:
        decode_top_k(record, VOCABULARY, np.zeros((TOKENS, TOP), np.int64), np.zeros((TOKENS, TOP), np.float32))

    def read_draws(record: bytes) -> None:
        np.frombuffer(record, "<u4").reshape(TOKENS, DRAWS).astype(np.int64)
        np.full((TOKENS, DRAWS), 1 / DRAWS, np.float32)

    def read_top(record: bytes) -> None:
        np.frombuffer(record, "<u4", TOKENS * TOP).reshape(TOKENS, TOP).astype(np.int64)
        np.frombuffer(record, "<f2", TOKENS * TOP, 4 * TOKENS * TOP).reshape(TOKENS, TOP).astype(np.float32)

    formats: dict[str, tuple[Callable[[], bytes], Callable[[bytes], None]]] = {
        "distinct ids in bits": (lambda: encode_draws(ids, VOCABULARY), unpack_draws),
        "draws as uint32": (lambda: ids.astype("<u4").tobytes(), read_draws),
        f"top {TOP}: uint32, fp16": (
            lambda: top_ids.astype("<u4").tobytes() + top_p.astype("<f2").tobytes(),
            read_top,
        ),
        f"top {TOP}: bits, fp16": (lambda: encode_top_k(top_ids, top_p, VOCABULARY), unpack_top),
    }
    records = {label: encode() for label, (encode, _) in formats.items()}
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(repeats):
        for label, (encode, decode) in formats.items():
            seconds.setdefault((label, "encode"), []).append(_cpu_s(encode))
            seconds.setdefault((label, "decode"), []).append(_cpu_s(lambda: decode(records[label])))  # noqa: B023
    distinct = np.mean([len(np.unique(row)) for row in ids])
    speed = {key: TOKENS / float(np.median(values)) / 1000 for key, values in seconds.items()}
    return [
        f"| {name} | {distinct:.1f} | {label} | {len(records[label]) / TOKENS:.1f} | {speed[label, 'encode']:,.0f} "
        f"| {speed[label, 'decode']:,.0f} |"
        for label in formats
    ]


def _sequence(exponents: tuple[float, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws (T, D) and the top (T, K) of distributions over shuffled ids."""
    rng = np.random.default_rng(0)
    ranks = np.log(np.arange(1, VOCABULARY + 1))
    draws, tops, values = [], [], []
    for exponent in rng.uniform(*exponents, TOKENS // 16):
        order = rng.permutation(VOCABULARY)
        p = np.exp(-exponent * ranks)
        p /= p.sum()
        cumulative = np.cumsum(p)
        drawn = np.searchsorted(cumulative, rng.random((16, DRAWS)) * cumulative[-1], side="right")
        draws.append(order[drawn])
        tops.append(np.tile(order[:TOP], (16, 1)))
        values.append(np.tile(p[:TOP], (16, 1)))
    return np.concatenate(draws), np.concatenate(tops), np.concatenate(values)


def _cpu_s(action: Callable[[], Any]) -> float:
    """CPU seconds a call, of enough calls to be seen by the clock."""
    calls, start = 0, time.process_time()
    while (spent := time.process_time() - start) < 0.02:
        action()
        calls += 1
    return spent / calls


def _print_recording(setting: Setting, repeats: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"### recording {DRAWS} draws of {setting.vocabulary:,} tokens beside the teacher's forward pass\n")
    print(
        f"{where}; torch {torch.__version__.partition('+')[0]}; bf16, {SEQUENCES} x {setting.sequence_tokens} tokens\n"
    )
    print("| part | us a token | of the forward pass |\n|---|---|---|")
    with torch.inference_mode():
        teacher = freeze(build_model(setting.teacher, setting, device, 0, torch.bfloat16))
        medians = _part_us(teacher, setting, repeats)
    forward = medians["forward to the last hidden states"] + medians["logits, bf16"]
    medians |= {"recording, codes and files included": _recording_us(teacher, setting)}
    for name, value in medians.items():
        print(f"| {name} | {value:.3f} | {value / forward:.1%} |")


def _part_us(teacher: Any, setting: Setting, repeats: int) -> dict[str, float]:
    """Microseconds a token of each part, run in turn."""
    tokens = torch.randint(0, setting.vocabulary, (SEQUENCES, setting.sequence_tokens))
    head = teacher.get_output_embeddings().weight
    chunk = last_hidden(teacher, tokens, bf16=False).flatten(0, 1)[:CHUNK]
    logits = head_logits(chunk, head) * 3
    generator = torch.Generator().manual_seed(0)

    def draw_from_one_sum() -> torch.Tensor:
        cumulative = torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)
        uniforms = torch.rand(len(logits), DRAWS, generator=generator, dtype=torch.float64).to(logits.device)
        return torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)

    parts: dict[str, tuple[Callable[[], Any], int]] = {
        "forward to the last hidden states": (lambda: last_hidden(teacher, tokens, bf16=False), tokens.numel()),
        "logits, bf16": (lambda: chunk @ head.T, len(chunk)),
        "logits, float32 sums": (lambda: head_logits(chunk, head), len(chunk)),
        "draws in two levels": (lambda: draw(logits, DRAWS, generator), len(chunk)),
        "draws from one cumulative sum in float64": (draw_from_one_sum, len(chunk)),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats + 1):  # the first warms up
        for name, (action, count) in parts.items():
            times[name].append(1e6 * _wall_s(action) / count)
    return {name: float(np.median(values[1:])) for name, values in times.items()}


def _recording_us(teacher: Any, setting: Setting) -> float:
    """Microseconds a token of everything: the second shard of two."""
    shard = 4 * SEQUENCES
    tokens = np.random.default_rng(0).integers(0, setting.vocabulary, (2 * shard, setting.sequence_tokens))
    with tempfile.TemporaryDirectory() as folder:
        run = record_targets(
            teacher, tokens.astype(np.int32), Path(folder), draws=DRAWS, seed=0, bf16=False, shard_sequences=shard,
            batch_sequences=SEQUENCES, chunk_positions=CHUNK,
        )  # fmt: skip
        next(run)
        spent_s = _wall_s(lambda: next(run))
        StoredTargets.open(Path(folder))
    return 1e6 * spent_s / (shard * setting.sequence_tokens)


def _wall_s(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
