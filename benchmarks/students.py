"""What a student's start is worth: cut or random, taught by teacher or text, online or stored, direct or chained.

The same tokens, the same shape, several seeds (order of the batches, random weights); KL to the teacher and perplexity
on held-out text, the mean over seeds with its standard deviation. A chain's first student spends as many tokens as
its second, so it stands beside one that is cut at once and trained twice as long.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.machine import heading
from pipeline.data.packing import pack_rows, shuffled_rows
from pipeline.distillation.batches import Sequences
from pipeline.distillation.divergences import LossKind
from pipeline.distillation.objectives import LossSettings, signal_objective, text_objective
from pipeline.distillation.pruning import StudentShape, measure_importance, prune, random_student, student_shape
from pipeline.distillation.recording import model_logits
from pipeline.distillation.scoring import agreement, perplexity
from pipeline.distillation.signals import OnlineSource, SignalSource, StoredSource
from pipeline.distillation.stored_targets import StoredTargets, record_targets
from pipeline.distillation.target_codec import TargetKind
from pipeline.distillation.trainer import TrainPlan, train

IMPORTANCE_SEQUENCES, BATCH_OF_IMPORTANCE = 64, 8
DRAWS = 32
STORED = {"stored draws": TargetKind.DRAWS, "stored top-k": TargetKind.TOP_K}
ONLINE = "cut + teacher (KD)"
MIDDLE = (0.75, 0.73, 0.75, 0.8)


@dataclass(frozen=True, slots=True)
class Trial:
    """What all students of one run share."""

    teacher: Any
    train: NDArray[np.int32]
    held_out: NDArray[np.int32]
    small: StudentShape
    middle: StudentShape
    options: argparse.Namespace
    scratch: Path


def main() -> int:
    """Print the tables."""
    options = _options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        trial = _prepare(options, Path(scratch))
        tokens = options.steps * options.batch_sequences * options.sequence_tokens
        print(heading(f"students of {options.teacher.name}, {tokens:,} tokens, {options.seeds} seeds"))
        score = perplexity(model_logits(trial.teacher, trial.held_out), trial.held_out)
        print(
            f"Teacher: {_millions(trial.teacher)} M parameters; perplexity {score:.2f} on {trial.held_out.size} tokens"
        )
        print(f"Student: {trial.small}; between, in a chain: {trial.middle}. Learning rate {options.learning_rate}.\n")
        found = _print_table(trial, {
            "random, no training": lambda seed: _random(trial, seed),
            "cut from the teacher, no training": lambda seed: _cut(trial, trial.teacher, trial.small),
            "random + text (CE)": lambda seed: _learn(trial, _random(trial, seed), seed, None),
            "random + teacher (KD)": lambda seed: _learn(trial, _random(trial, seed), seed, trial.teacher),
            "cut + text (CE)": lambda seed: _learn(trial, _cut(trial, trial.teacher, trial.small), seed, None),
            ONLINE: lambda seed: _direct(trial, seed, 1),
        })  # fmt: skip
        print(f"\n#### Stored ({DRAWS} a position, recorded once) against online (above)\n")
        found |= _print_table(trial, {
            f"cut + {name}": partial(_stored, trial, kind) for name, kind in STORED.items()
        })  # fmt: skip
        for name in STORED:
            ratios = found[f"cut + {name}"][:, 0] / found[ONLINE][:, 0]
            print(f"KL from {name}: {ratios.mean():.4f} ± {_deviation(ratios):.4f} of that online, seed by seed")
        print("\n#### Direct (above, with one share of the tokens) against chained\n")
        _print_table(trial, {
            "direct, twice the tokens": lambda seed: _direct(trial, seed, 2),
            "chained, the teacher teaches both": lambda seed: _chained(trial, seed, by_middle=False),
            "chained, each teaches the next": lambda seed: _chained(trial, seed, by_middle=True),
        })  # fmt: skip
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, default=Path("assets/reference_teacher"))
    parser.add_argument("--corpus", type=Path, default=Path("artifacts/corpus"), help="train.jsonl and held_out.jsonl")
    parser.add_argument("--steps", type=int, default=80, help="of one share of the tokens")
    parser.add_argument("--batch-sequences", type=int, default=8)
    parser.add_argument("--sequence-tokens", type=int, default=128)
    parser.add_argument("--held-out-sequences", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--ratios", type=float, nargs=4, default=(0.5, 0.5, 0.5, 0.6), metavar=("WIDTH", "FFN", "HEADS", "DEPTH")
    )
    return parser.parse_args()


def _prepare(options: argparse.Namespace, scratch: Path) -> Trial:
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    from pipeline.distillation.teachers import eos_ids

    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = Tokenizer.from_file(str(options.teacher / "tokenizer.json"))
    packed = {}
    wanted = {"train": 2 * options.steps * options.batch_sequences, "held_out": options.held_out_sequences}
    for side, most in wanted.items():
        packed[side] = pack_rows(
            tokenizer, shuffled_rows(options.corpus / f"{side}.jsonl", 0), template=None,
            eos_id=eos_ids(teacher.config)[0], sequence_tokens=options.sequence_tokens, max_sequences=most,
        ).tokens  # fmt: skip
    small, middle = (_shape(teacher, ratios) for ratios in (options.ratios, MIDDLE))
    return Trial(teacher, packed["train"], packed["held_out"], small, middle, options, scratch)


def _shape(teacher: Any, ratios: tuple[float, ...]) -> StudentShape:
    absolute = dict.fromkeys(StudentShape.__slots__)
    named = dict(zip(("width", "ffn", "heads", "depth"), ratios, strict=True))
    return student_shape(teacher.config, SimpleNamespace(**absolute, **named))


def _random(trial: Trial, seed: int) -> Any:
    return random_student(trial.teacher, trial.small, seed)


def _cut(trial: Trial, model: Any, shape: StudentShape) -> Any:
    tokens = torch.from_numpy(trial.train[:IMPORTANCE_SEQUENCES].astype(np.int64))
    return prune(model, measure_importance(model, tokens.split(BATCH_OF_IMPORTANCE)), shape)


def _direct(trial: Trial, seed: int, times: int) -> Any:
    return _learn(trial, _cut(trial, trial.teacher, trial.small), seed, trial.teacher, times)


def _stored(trial: Trial, kind: TargetKind, seed: int) -> Any:
    """Targets of the first share, recorded for the first seed and read by all."""
    folder, options = trial.scratch / kind.name, trial.options
    tokens = trial.train[: options.steps * options.batch_sequences]
    if not folder.exists():
        for _ in record_targets(trial.teacher, tokens, folder, draws=DRAWS, seed=0, bf16=False, kind=kind):
            pass
    student = _cut(trial, trial.teacher, trial.small)
    return _train(trial, student, seed, tokens, StoredSource(StoredTargets.open(folder)), LossKind.SAMPLED_KL)


def _chained(trial: Trial, seed: int, *, by_middle: bool) -> Any:
    middle = _learn(trial, _cut(trial, trial.teacher, trial.middle), seed, trial.teacher)
    student = _cut(trial, middle, trial.small)
    return _learn(trial, student, seed, middle if by_middle else trial.teacher, first=1)


def _learn(trial: Trial, student: Any, seed: int, teacher: Any | None, times: int = 1, first: int = 0) -> Any:
    """Train on ``times`` shares of the tokens, from share ``first`` on; ``teacher`` None learns from text."""
    options, source = trial.options, None if teacher is None else OnlineSource.open(teacher.eval(), bf16=False)
    share = min(options.steps * options.batch_sequences, len(trial.train))
    start = first * share if len(trial.train) >= (first + times) * share else 0
    return _train(trial, student, seed, trial.train[start : start + times * share], source, LossKind.FORWARD_KL)


def _train(
    trial: Trial, student: Any, seed: int, tokens: NDArray[np.int32], source: SignalSource | None, kind: LossKind
) -> Any:
    """Each of the tokens once."""
    options = trial.options
    plan = TrainPlan(
        steps=len(tokens) // options.batch_sequences, batch_sequences=options.batch_sequences,
        learning_rate=options.learning_rate, weight_decay=0.01, warmup_ratio=0.05, bf16=False, seed=seed,
        checkpoint_every_steps=10**9,
    )  # fmt: skip
    objective = text_objective() if source is None else signal_objective(source, LossSettings(kind))
    train(student, objective, Sequences(tokens), plan, trial.scratch / "checkpoint", "student")
    return student.eval()


def _print_table(trial: Trial, methods: dict[str, Callable[[int], Any]]) -> dict[str, NDArray[np.float64]]:
    """Print a row for each method; returns its figures (seeds, 3): KL, perplexity, same first choice."""
    found_by_name = {}
    print("| start and teacher | M parameters | KL to the teacher | perplexity | same first choice, % |")
    print("|---|---|---|---|---|")
    reference = [logits.copy() for logits in model_logits(trial.teacher, trial.held_out)]
    for name, make in methods.items():
        figures = []
        for seed in range(trial.options.seeds):
            student = make(seed)
            logits = list(model_logits(student, trial.held_out))
            found = agreement(reference, logits)
            figures.append((found.kl, perplexity(logits, trial.held_out), 100 * found.top1))
        found_by_name[name] = np.array(figures)
        cells = " | ".join(_cells(found_by_name[name]))
        print(f"| {name} | {_millions(student)} | {cells} |", flush=True)
    return found_by_name


def _cells(figures: NDArray[np.float64]) -> Iterator[str]:
    """Mean and standard deviation over seeds of each column (seeds, columns)."""
    spread = [_deviation(column) for column in figures.T]
    for mean, deviation, digits in zip(figures.mean(axis=0), spread, (4, 3, 1), strict=True):
        yield f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def _deviation(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _millions(model: Any) -> str:
    return f"{model.num_parameters() / 1e6:.2f}"


if __name__ == "__main__":
    sys.exit(main())
