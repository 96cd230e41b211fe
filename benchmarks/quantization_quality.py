"""What ways of filling one grid cost: KL to the fp model, first choices, perplexity; several seeds, the same bytes.

Checkpoints are the reference teacher and students; text is documentation that none of them was trained on, calibration
and distillation see training documents only. A seed chooses the calibration text and the order of the batches. RTN is
the rule of GGUF's Q4_0 with the same scale signs and the same matrices as the method beside it; ``shipped`` has
positive scales.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.quantization_evaluation import Figures, evaluate_weights, held_out_tokens, training_tokens
from edge_runtime.formats.decoder import EMBEDDING
from edge_runtime.formats.int4 import QuantizedTensor
from pipeline.distillation.batches import Sequences
from pipeline.distillation.trainer import TrainPlan
from pipeline.quantization.calibrated import Calibration, quantize_calibrated
from pipeline.quantization.distilled import Distillation, distil_codes
from pipeline.quantization.grid import Grid
from pipeline.quantization.scales import candidates, nearest, pack, quantize_weighted
from pipeline.quantization.source import Checkpoint, open_checkpoint

METHODS = ("rtn", "mse", "weighted_mse", "gptq", "qad")
SIGNS = {"signed": False, "shipped": True}
_FIXED = ("rtn", "mse")  # no seed changes them


@dataclass(frozen=True, slots=True)
class Trial:
    """One checkpoint with its text."""

    directory: Path
    source: Checkpoint
    train: NDArray[np.int32]
    held_out: NDArray[np.int32]
    options: argparse.Namespace


Codes = Mapping[str, QuantizedTensor]


def main() -> int:
    """Print a table for each checkpoint."""
    options = _options()
    torch.set_num_threads(options.threads)
    start_s = time.perf_counter()
    for directory in options.checkpoints:
        trial = _prepare(directory, options)
        print(f"\n#### {directory.name}, {trial.source.params / 1e6:.2f} M parameters, group {options.group}\n")
        print("| scales | method | KL to fp | of RTN | first choices, % | perplexity (fp) | bits a weight | s |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for sign in options.signs:
            reference = None
            for method in options.methods:
                if time.perf_counter() - start_s > options.limit_s:
                    print("| time is up | | | | | | | |")
                    return 0
                reference = _print_row(trial, sign, method, reference)
    return 0


def codes_of(trial: Trial, grid: Grid, method: str, seed: int) -> Codes:
    """Codes of every matrix by one of ``METHODS``; the seed chooses calibration text and order."""
    grids, device = trial.source.grids(grid), trial.options.device
    if method in _FIXED:
        quantize: Callable[[torch.Tensor], QuantizedTensor] = _rtn(grid) if method == "rtn" else _mse(grid)
        return {name: quantize(weight.to(device)) for name, weight in _matrices(trial.source)}
    rows = np.random.default_rng(seed).permutation(len(trial.train))[: trial.options.calibration_sequences]
    with tempfile.TemporaryDirectory() as work:
        plan = Calibration("weighted_mse" if method == "weighted_mse" else "gptq", grids)
        found = quantize_calibrated(trial.source, trial.train[rows], plan, Path(work), "quantize", device=device)
        codes = {name: _copied(found[name]) for name in grids}
        return _distilled(trial, codes, grids, seed, Path(work)) if method == "qad" else codes


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """How ``codes_of`` calibrates and distils."""
    parser.add_argument("--calibration-sequences", type=int, default=128)
    parser.add_argument("--qad-rounds", type=int, default=3)
    parser.add_argument("--qad-steps", type=int, default=100, help="a round")
    parser.add_argument("--qad-scale-steps", type=int, default=100, help="afterwards, of the scales alone")
    parser.add_argument("--qad-batch-sequences", type=int, default=64)
    parser.add_argument("--qad-learning-rate", type=float, default=0.01)
    parser.add_argument("--qad-hidden-weight", type=float, default=30.0, help="of every layer's hidden states")
    parser.add_argument("--bf16", action="store_true", help="QAD multiplies in bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="*", default=[Path("assets/reference_teacher")])
    parser.add_argument("--tokenizer", type=Path, default=Path("assets/reference_teacher"))
    parser.add_argument("--corpus", type=Path, default=Path("artifacts/corpus"), help="train.jsonl and held_out.jsonl")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--signs", nargs="+", choices=list(SIGNS), default=list(SIGNS))
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--float-embedding", action="store_true", help="the embedding (and tied head) stays in fp16")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out-sequences", type=int, default=128)
    parser.add_argument("--sequence-tokens", type=int, default=256)
    add_method_options(parser)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=1e9, help="no row is begun after it")
    return parser.parse_args()


def _prepare(directory: Path, options: argparse.Namespace) -> Trial:
    length = options.sequence_tokens
    source = open_checkpoint(directory, length, options.group)
    steps = options.qad_rounds * options.qad_steps + options.qad_scale_steps
    wanted = max(options.calibration_sequences, steps * options.qad_batch_sequences) * 2
    return Trial(
        directory, source, training_tokens(options.tokenizer, options.corpus, min(wanted, 8192), length),
        held_out_tokens(options.tokenizer, options.corpus, options.held_out_sequences, length), options,
    )  # fmt: skip


def _print_row(trial: Trial, sign: str, method: str, reference: float | None) -> float:
    """Returns the KL of RTN, which rows are compared with."""
    seeds = 1 if method in _FIXED else trial.options.seeds
    start_s = time.perf_counter()
    found = [_figures(trial, sign, method, seed) for seed in range(seeds)]
    took_s = (time.perf_counter() - start_s) / seeds
    kls = np.array([each.kl for each in found])
    reference = float(kls.mean()) if method == "rtn" or reference is None else reference
    error = kls.std(ddof=1) if seeds > 1 else found[0].kl_error
    top1, perplexity = (np.mean([getattr(each, name) for each in found]) for name in ("top1", "perplexity"))
    first = found[0]
    print(
        f"| {sign} | {method} | {kls.mean():.5f} ± {error:.5f} | {kls.mean() / reference:.3f} | {100 * top1:.2f} "
        f"| {perplexity:.3f} ± {first.perplexity_error:.3f} ({first.perplexity_fp:.3f}) | {first.bits_a_weight:.3f} "
        f"| {took_s:.0f} |",
        flush=True,
    )
    return reference


def _figures(trial: Trial, sign: str, method: str, seed: int) -> Figures:
    codes = codes_of(trial, Grid(4, trial.options.group, SIGNS[sign]), method, seed)
    if trial.options.float_embedding:
        codes = {name: tensor for name, tensor in codes.items() if not name.startswith(EMBEDDING)}
    return evaluate_weights(trial.directory, codes, trial.held_out, device=trial.options.device)


def _distilled(trial: Trial, codes: Codes, grids: Mapping[str, Grid], seed: int, work: Path) -> Codes:
    options = trial.options
    if options.float_embedding:
        codes = {name: tensor for name, tensor in codes.items() if not name.startswith(EMBEDDING)}
    training = TrainPlan(
        options.qad_steps, options.qad_batch_sequences, options.qad_learning_rate, weight_decay=0.0, warmup_ratio=0.05,
        bf16=options.bf16, seed=seed, checkpoint_every_steps=10**9,
    )  # fmt: skip
    plan = Distillation(training, options.qad_rounds, options.qad_scale_steps, options.qad_hidden_weight)
    sequences = Sequences(trial.train)
    found, _ = distil_codes(trial.source, codes, grids, sequences, plan, work / "qad", "QAD", device=options.device)
    return {name: _copied(tensor) for name, tensor in found.items()}


def _matrices(source: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    from pipeline.quantization.source import read_rows

    for name in source.matrices:
        yield name, torch.from_numpy(read_rows(source.tensors[name]))


def _rtn(grid: Grid) -> Callable[[torch.Tensor], QuantizedTensor]:
    """The scale that covers each group; signed, the largest weight takes the lowest code, as in Q4_0."""

    def quantize(weight: torch.Tensor) -> QuantizedTensor:
        groups = weight.view(len(weight), -1, grid.group)
        scale = candidates(groups, grid, 2)[0].unsqueeze(-1)
        if not grid.positive_scales:
            extreme = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))
            scale = (extreme / grid.code_range[0]).half().float()
        return pack(nearest(groups, scale, grid).flatten(1), scale.squeeze(-1), grid, weight.shape[1])

    return quantize


def _mse(grid: Grid) -> Callable[[torch.Tensor], QuantizedTensor]:
    return lambda weight: quantize_weighted(weight, None, grid)


def _copied(tensor: Any) -> QuantizedTensor:
    """Out of a file that goes away."""
    return QuantizedTensor(np.array(tensor.packed), np.array(tensor.scales), tensor.bits, tensor.columns)


if __name__ == "__main__":
    sys.exit(main())
