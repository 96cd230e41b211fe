"""How far back a small model finds things, and what text costs it by position, up to 32,768 tokens.

The reference teacher, which was trained on 512 tokens, learns to find needles in Python's documentation: first in
short sequences, then, its context stretched by YaRN, in sequences of 32,768. Before and after that last phase:
perplexity against position and recall by depth, with full attention and with a window and sinks.

python -m pipeline stage=clean                      # the text: artifacts/corpus
python benchmarks/long_context.py --limit-s 480     # one GPU
python benchmarks/long_context.py --tiny            # any CPU: does it run
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.data.packing import pack_rows, shuffled_rows
from pipeline.distillation.context import LongMixture, Yarn, extend_context, train_long
from pipeline.distillation.needles import NeedleFormat, needle_format
from pipeline.distillation.trainer import TrainPlan
from pipeline.evaluation.long_context import (
    DEFAULT_DEPTHS,
    AttentionPattern,
    NeedleScore,
    PositionLoss,
    needle_recall,
    perplexity_by_position,
)

ROOT = Path(__file__).resolve().parent.parent
START = ROOT / "assets" / "reference_teacher"
ENOUGH = 0.97  # recall at which a phase ends early
PROBE_SEED = 1  # of needles and places; the tables have 0


@dataclass(frozen=True, slots=True)
class Phase:
    """One length of training: rounds of the same plan until needles are found or its time is over."""

    name: str
    mixture: LongMixture
    steps: int
    batch_sequences: int
    micro_sequences: int
    learning_rate: float
    rounds: int
    time_share: float
    epochs: int = 1  # of a round: to make needles takes the CPU longer than a GPU takes to read them


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of everything."""

    base_tokens: int
    factor: float
    window_tokens: int
    short: tuple[Phase, ...]
    long: Phase
    lengths: tuple[int, ...]
    edges: tuple[int, ...]
    trials: int
    perplexity_sequences: int


FULL = Scale(
    base_tokens=2_048, factor=16.0, window_tokens=2_044,
    short=(
        Phase("128 tokens", LongMixture(128, 0.9, 5, 5, False), 300, 256, 256, 1e-3, 8, 0.25, epochs=2),
        Phase("512 tokens", LongMixture(512, 0.75, 20, 20), 150, 64, 64, 1e-3, 4, 0.12),
        Phase("2,048 tokens", LongMixture(2_048, 0.75, 80, 80), 150, 16, 16, 1e-3, 3, 0.1),
    ),
    long=Phase("32,768 tokens", LongMixture(32_768, 0.75, 1_024, 1_024, False), 100, 2, 1, 5e-4, 8, 0.47),
    lengths=(2_048, 8_192, 16_384, 32_768),
    edges=(0, 256, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768),
    trials=20, perplexity_sequences=3,
)  # fmt: skip
TINY = Scale(
    base_tokens=128, factor=4.0, window_tokens=60,
    short=(Phase("128 tokens", LongMixture(128, 1.0, 5, 5), 4, 8, 8, 1e-3, 2, 1.0),),
    long=Phase("512 tokens", LongMixture(512, 0.75, 20, 20), 4, 2, 2, 1e-3, 1, 1.0),
    lengths=(128, 256, 512), edges=(0, 32, 128, 256, 512), trials=2, perplexity_sequences=2,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens of the text that is trained on and of the text that is not."""

    form: NeedleFormat
    train: NDArray[np.int32]
    held_out: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds spent of a limit."""

    started_s: float
    limit_s: float

    def spent_s(self) -> float:
        return time.monotonic() - self.started_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--limit-s", type=float, default=280.0, help="for everything; training ends earlier for it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, default=ROOT / "artifacts" / "corpus", help="what stage=clean wrote")
    given = parser.parse_args()
    scale, clock = TINY if given.tiny else FULL, Clock(time.monotonic(), given.limit_s)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print_heading(scale, device, given.seed)
    text = read_text(given.corpus)
    print(f"text: {len(text.train):,} tokens to train, {len(text.held_out):,} held out; {clock.spent_s():.0f} s\n")
    model = load_start(scale, device)
    for phase in scale.short:
        recall = train_phase(model, text, phase, clock, given.seed)
        if recall < 0.5 and not given.tiny:
            print(f"stopped: needles are not found in {phase.name}")
            return 1
    evaluate(model, text, scale, f"trained on {scale.base_tokens:,}", lengths=scale.lengths[:2], clock=clock)
    extend_context(model, Yarn(scale.factor, scale.base_tokens))
    evaluate(model, text, scale, "stretched by YaRN, not trained on", lengths=scale.lengths, clock=clock, trials=5)
    train_phase(model, text, scale.long, clock, given.seed)
    evaluate(model, text, scale, f"trained on {scale.long.name}", lengths=scale.lengths, clock=clock)
    peak = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at the peak" if device.type == "cuda" else ""
    print(f"\neverything took {clock.spent_s():.0f} s{peak}")
    return 0


def read_text(corpus: Path) -> Text:
    """Cleaned text; the teacher has seen none of what is held out."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(START / "tokenizer.json"))
    sides = [
        pack_rows(
            tokenizer, shuffled_rows(corpus / f"{side}.jsonl", 0), template=None, eos_id=1, sequence_tokens=64,
            max_sequences=None,
        ).tokens.ravel()
        for side in ("train", "held_out")
    ]  # fmt: skip
    return Text(needle_format(tokenizer), *sides)


def load_start(scale: Scale, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(START, dtype=torch.float32, local_files_only=True)
    model.config.max_position_embeddings = scale.base_tokens
    print(f"model: {model.num_parameters():,} parameters, of {START.name}")
    return model.to(device)


def train_phase(model: Any, text: Text, phase: Phase, clock: Clock, seed: int) -> float:
    """Rounds with needles of their own each, until needles are found or its time is over; the last recall."""
    recall, (started_s, allowed_s) = 0.0, (clock.spent_s(), phase.time_share * clock.limit_s)
    length = phase.mixture.sequence_tokens
    tokens = phase.steps * phase.batch_sequences // phase.epochs * length
    for number in range(phase.rounds):
        round_seed = seed * 1_000 + number
        stream = repeated(text.train, tokens, round_seed)
        plan = TrainPlan(
            phase.steps, phase.batch_sequences, phase.learning_rate * 0.85**number, 0.1, 0.1,
            bf16=model.device.type == "cuda", seed=round_seed, checkpoint_every_steps=10**9,
            micro_sequences=phase.micro_sequences,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            history = train_long(model, stream, text.form, phase.mixture, plan, Path(folder), phase.name)
        recall = probe(model, text, length)
        spent_s = clock.spent_s() - started_s
        print(f"{phase.name}, {plan.steps} steps: loss {history[-1]['loss']:.3f}, recall {recall:.2f}, {spent_s:.0f} s")
        if recall >= ENOUGH or spent_s * (number + 2) / (number + 1) > allowed_s:
            break
    return recall


def repeated(text: NDArray[np.int32], tokens: int, seed: int) -> NDArray[np.int32]:
    """The text from a random place on, as often as it takes, so that rows of two rounds differ."""
    start = int(np.random.default_rng(seed).integers(0, len(text)))
    return np.resize(np.roll(text, -start), tokens)


def probe(model: Any, text: Text, tokens: int) -> float:
    """Recall over few depths at one length, on texts that no table shows: it decides when training ends."""
    scores = recall_table(
        model, text, AttentionPattern(), (tokens,), trials=12, depths=(0.0, 0.1, 0.2, 0.6), seed=PROBE_SEED
    )
    return sum(score.found for score in scores) / sum(score.trials for score in scores)


def recall_table(
    model: Any, text: Text, pattern: AttentionPattern, lengths: tuple[int, ...], trials: int,
    depths: tuple[float, ...] = DEFAULT_DEPTHS, seed: int = 0,
) -> list[NeedleScore]:  # fmt: skip
    gpu = model.device.type == "cuda"
    scores: list[NeedleScore] = []
    for tokens in lengths:
        # Without a window the whole text at once keeps the fast kernels; with one the mask is what costs.
        chunk = tokens if pattern.window_tokens is None else min(tokens, 2_048)
        batch = max(1, 65_536 // tokens) if gpu else 4
        scores += needle_recall(
            model, text.form, text.held_out, pattern,
            lengths=(tokens,), depths=depths, trials=trials, seed=seed,
            batch_sequences=batch, chunk_tokens=chunk, bf16=gpu,
        )  # fmt: skip
    return scores


def evaluate(
    model: Any, text: Text, scale: Scale, title: str, lengths: tuple[int, ...], clock: Clock, trials: int | None = None
) -> None:
    """Both tables for both patterns."""
    started_s = clock.spent_s()
    patterns = (AttentionPattern(), AttentionPattern(scale.window_tokens, 4))
    length = max(lengths)
    count = min(scale.perplexity_sequences * scale.lengths[-1] // length, len(text.held_out) // length)
    rows = text.held_out[: count * length].reshape(count, length)
    gpu = model.device.type == "cuda"
    losses = {
        pattern.name: perplexity_by_position(
            model, rows, pattern, edges=scale.edges, bf16=gpu,
            chunk_tokens=length if pattern.window_tokens is None else min(length, 2_048),
        )
        for pattern in patterns
    }  # fmt: skip
    scores = {pattern.name: recall_table(model, text, pattern, lengths, trials or scale.trials) for pattern in patterns}
    print(f"\n#### {title}\n")
    print_losses(losses)
    print_scores(scores)
    print(f"\n({clock.spent_s() - started_s:.0f} s)\n", flush=True)


def print_heading(scale: Scale, device: torch.device, seed: int) -> None:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"### Long context: {scale.base_tokens:,} x {scale.factor:.0f} tokens\n")
    print(f"{name}; torch {torch.__version__.partition('+')[0]}; seed {seed}; greedy, exact match, 3 distractors")


def print_losses(losses: dict[str, list[PositionLoss]]) -> None:
    buckets = next(iter(losses.values()))
    print("| perplexity at positions | " + " | ".join(f"{b.first:,}-{b.end:,}" for b in buckets) + " |")
    print("| --- |" + " --- |" * len(buckets))
    for name, row in losses.items():
        print(f"| {name} | " + " | ".join(f"{bucket.perplexity:.2f}" for bucket in row) + " |")


def print_scores(scores: dict[str, list[NeedleScore]]) -> None:
    depths = sorted({score.depth for row in scores.values() for score in row})
    print("\n| recall | tokens | " + " | ".join(f"{depth:.1f}" for depth in depths) + " | lowest (95 %) |")
    print("| --- | --- |" + " --- |" * (len(depths) + 1))
    for name, row in scores.items():
        for tokens in sorted({score.tokens for score in row}):
            at = [score for score in row if score.tokens == tokens]
            worst = min(at, key=lambda score: score.found)
            cells = " | ".join(f"{score.recall:.2f}" for score in at)
            low, high = worst.interval
            print(f"| {name} | {tokens:,} | {cells} | {worst.recall:.2f} ({low:.2f}-{high:.2f}), n {worst.trials} |")


if __name__ == "__main__":
    sys.exit(main())
