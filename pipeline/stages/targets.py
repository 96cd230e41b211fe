"""targets: run the teacher once; store what every student needs of it.

train.npy, held_out.npy: token sequences (S, T). train_draws.npy, held_out_draws.npy: teacher draws
(S, T, D). held_out_log_p.npy: the teacher's log-probability of each held-out draw.
importance.safetensors: the pruning scores.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import StageRun, write_json
from pipeline.data.packing import pack_sequences, read_texts, shuffle_texts
from pipeline.progress import progress

HELD_OUT_DRAWS = 64


def run(run: StageRun) -> None:
    """Write the token sequences, the stored teacher signal and the importance scores."""
    from pipeline.distillation.recording import record_draws
    from pipeline.distillation.teachers import load_checkpoint, read_source
    from pipeline.distillation.trainer import discard_checkpoint, uses_bf16

    config = run.config
    teacher = load_checkpoint(read_source(run.layout.teacher))
    sequences = _pack(run, teacher)
    _save_importance(run, teacher, sequences["train"])
    with progress("targets", sum(map(len, sequences.values()))) as report:
        finished = 0
        for side, rows in sequences.items():
            held_out = side == "held_out"
            for done in record_draws(
                teacher, rows, run.checkpoint, side, draws=HELD_OUT_DRAWS if held_out else config.distill.draws,
                seed=config.seed + held_out, log_p=held_out, bf16=uses_bf16(config),
            ):  # fmt: skip
                report(finished + done, side)
            finished += len(rows)
    for path in run.checkpoint.glob("*.npy"):
        path.replace(run.output / path.name)
    discard_checkpoint(run.checkpoint)
    write_json(run.layout.metrics("targets"), _metrics(run, teacher, sequences))


def _pack(run: StageRun, teacher: Any) -> dict[str, NDArray[np.int32]]:
    from tokenizers import Tokenizer

    from pipeline.distillation.teachers import eos_ids

    config, length = run.config, run.config.distill.sequence_tokens
    tokenizer = Tokenizer.from_file(str(run.layout.teacher / "tokenizer.json"))
    wanted = {"train": -(-config.distill.target_tokens // length), "held_out": config.runtime.evaluation_sequences}
    sequences = {}
    for side, most in wanted.items():
        texts = shuffle_texts(list(read_texts(run.layout.corpus / f"{side}.jsonl")), config.seed)
        sequences[side] = pack_sequences(tokenizer, texts, eos_ids(teacher.config)[0], length, most)
        np.save(run.output / f"{side}.npy", sequences[side])
    return sequences


def _save_importance(run: StageRun, teacher: Any, train: NDArray[np.int32]) -> None:
    import torch
    from safetensors.torch import save_file

    from pipeline.distillation.pruning import measure_importance

    count = min(len(train), run.config.distill.importance_sequences)
    batches = [torch.from_numpy(train[i : min(i + 4, count)].astype(np.int64)) for i in range(0, count, 4)]
    scores = measure_importance(teacher, batches)
    tensors = {field.name: getattr(scores, field.name) for field in fields(scores)}
    save_file(tensors, run.output / "importance.safetensors")


def _metrics(run: StageRun, teacher: Any, sequences: dict[str, NDArray[np.int32]]) -> dict[str, Any]:
    from pipeline.distillation.recording import model_logits
    from pipeline.distillation.scoring import perplexity

    logits = model_logits(teacher, sequences["held_out"])
    return {
        "params": sum(parameter.numel() for parameter in teacher.parameters()),
        "perplexity": round(perplexity(logits, sequences["held_out"]), 4),
        "train_tokens": sequences["train"].size,
        "held_out_tokens": sequences["held_out"].size,
        "draws": run.config.distill.draws,
    }
