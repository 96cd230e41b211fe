"""What stored targets cost: bytes a position, decoding, and on a GPU the draws beside the teacher's forward pass.

Every format holds the same distributions; all are decoded in turn into ids and weights of the same shape, and the
CPU seconds of this process count, on one thread. Distributions are over 152,064 tokens: uniform, Zipf (p ~ 1 / rank),
"text" (Zipf with an exponent between 1 and 4 for each position) and sharp (exponent 4). With --device cuda a teacher of
the 7B shape with random weights is run beside the draws, timed by events.

    python benchmarks/stored_targets.py [--repeats 9] [--device cuda [--layers 28]]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.machine import heading
from pipeline.distillation.stored_targets import StoredTargets, record_targets
from pipeline.distillation.target_codec import decode_draws, decode_top_k, encode_draws, encode_top_k
from pipeline.distillation.teacher_signals import draw, head_logits, last_hidden

VOCABULARY, DRAWS, TOP, TOKENS = 152_064, 32, 50, 1024
EXPONENTS = {"uniform": (0.0, 0.0), "Zipf": (1.0, 1.0), "text": (1.0, 4.0), "sharp": (4.0, 4.0)}
QWEN_7B: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
    "num_key_value_heads": 4,
}  # fmt: skip
Coded = tuple[bytes, Callable[[], Any]]


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--layers", type=int, default=28, help="of the teacher on the GPU")
    options = parser.parse_args()
    print(heading(f"stored targets of {VOCABULARY:,} tokens, {DRAWS} draws: bytes a position and decoding on one core"))
    print(
        "| distribution | distinct ids | format | bytes a position | encoded, 1000 tokens/s | decoded, 1000 tokens/s |"
    )
    print("|---|---|---|---|---|---|")
    for name, exponents in EXPONENTS.items():
        for row in _format_rows(name, exponents, options.repeats):
            print(row, flush=True)
    if options.device == "cuda":
        print("\n" + heading(f"drawing {DRAWS} of {VOCABULARY:,} tokens beside a {options.layers}-layer 7B's forward"))
        print(f"{torch.cuda.get_device_name()}; bf16, 16 sequences of {TOKENS:,}\n")
        print("| part | us a token | of the forward pass |")
        print("|---|---|---|")
        print("\n".join(_gpu_rows(options.layers, options.repeats)))
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


def _gpu_rows(layers: int, repeats: int) -> list[str]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        teacher = Qwen2ForCausalLM(Qwen2Config(**QWEN_7B, num_hidden_layers=layers, tie_word_embeddings=False)).eval()
        torch.set_default_dtype(torch.float32)
    tokens = torch.randint(0, VOCABULARY, (16, TOKENS))
    positions, head = tokens.numel(), teacher.lm_head.weight.detach()
    hidden = last_hidden(teacher, tokens, bf16=False).flatten(0, 1)
    logits = head_logits(hidden[:1024], head) * 3
    generator = torch.Generator().manual_seed(0)
    device_generator = torch.Generator("cuda").manual_seed(0)

    def whole_draw(chunk: torch.Tensor) -> torch.Tensor:
        cumulative = torch.softmax(chunk.double(), dim=-1).cumsum(dim=-1)
        uniforms = torch.rand(len(chunk), DRAWS, device="cuda", generator=device_generator, dtype=torch.float64)
        return torch.searchsorted(cumulative, uniforms.sort(dim=-1).values * cumulative[:, -1:], right=True)

    parts: dict[str, tuple[Callable[[], Any], int]] = {
        "forward to the last hidden states": (lambda: last_hidden(teacher, tokens, bf16=False), positions),
        "logits, bf16": (lambda: hidden[:1024] @ head.T, 1024),
        "logits, float32 from bf16": (lambda: head_logits(hidden[:1024], head), 1024),
        "draws in two levels": (lambda: draw(logits, DRAWS, generator), 1024),
        "draws from one cumulative sum in float64": (lambda: whole_draw(logits), 1024),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats + 1):  # the first warms up
        for name, (action, count) in parts.items():
            times[name].append(_gpu_us(action) / count)
    medians = {name: float(np.median(values[1:])) for name, values in times.items()}
    forward = medians["forward to the last hidden states"] + medians["logits, bf16"]
    rows = [f"| {name} | {value:.3f} | {value / forward:.1%} |" for name, value in medians.items()]
    return [*rows, _recording_row(teacher, forward)]


def _recording_row(teacher: Any, forward_us: float) -> str:
    """The whole of it: forward, draws, codes, files; 64 sequences after a first shard that warms up."""
    import tempfile

    sequences = np.random.default_rng(0).integers(0, VOCABULARY, (96, TOKENS)).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        run = record_targets(
            teacher, sequences, Path(folder), draws=DRAWS, seed=0, bf16=False, shard_sequences=32, batch_sequences=16
        )
        next(run)
        start = time.perf_counter()
        list(run)
        spent_us = 1e6 * (time.perf_counter() - start) / (64 * TOKENS)
        StoredTargets.open(Path(folder))
    return f"| recording, files and codes included | {spent_us:.3f} | {spent_us / forward_us:.1%} |"


def _gpu_us(action: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    action()
    end.record()
    torch.cuda.synchronize()
    return 1000 * float(start.elapsed_time(end))


if __name__ == "__main__":
    raise SystemExit(main())
