"""targets: run the teacher once; store what every student needs of it. Where nobody learns, the text alone.

train.npy, held_out.npy: token sequences (S, T); train_counts.npy: which of their positions are learned. train/: the
teacher's draws, in shards. held_out_draws.npy, held_out_log_p.npy, held_out_top1.npy: what quality is measured against;
held_out_bytes.npy: bytes of text that each token stands for.
importance.safetensors: the pruning scores.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import StageRun, tree_digest, write_json
from pipeline.data.packing import Packed, pack_rows, shuffled_rows
from pipeline.progress import progress

if TYPE_CHECKING:
    from pipeline.distillation.teachers import TeacherSource

HELD_OUT_DRAWS = 64
_IMPORTANCE_BATCH = 4


def run(run: StageRun) -> None:
    """Write the token sequences; where somebody learns, the stored teacher signal and the importance scores too."""
    from tokenizers import Tokenizer

    from pipeline.distillation.checkpoint_files import read_config
    from pipeline.distillation.initial_student import count_parameters
    from pipeline.distillation.teachers import read_source
    from pipeline.distillation.token_bytes import text_bytes

    source = read_source(run.layout.teacher)
    path = Path(source.path)
    config = read_config(path)
    train, held_out = (_pack(run, config, side).tokens for side in ("train", "held_out"))
    sizes = text_bytes(Tokenizer.from_file(str(run.layout.teacher / "tokenizer.json")), config.vocab_size)
    np.save(run.output / "held_out_bytes.npy", sizes[held_out])
    metrics: dict[str, Any] = {"train_tokens": train.size, "held_out_tokens": held_out.size}
    if run.config.distill.signal == "none":
        metrics |= {"params": count_parameters(path), "perplexity": None, "bits_per_byte": None}
    else:
        metrics |= _record(run, source, train, held_out)
    write_json(run.layout.metrics("targets"), metrics)


def _record(
    run: StageRun, source: TeacherSource, train: NDArray[np.int32], held_out: NDArray[np.int32]
) -> dict[str, Any]:
    """Run the teacher over both sides."""
    from pipeline.distillation.checkpoints import discard_checkpoint
    from pipeline.distillation.fast_layers import hasten_teacher
    from pipeline.distillation.from_config import uses_bf16
    from pipeline.distillation.recording import record_draws
    from pipeline.distillation.stored_targets import record_targets
    from pipeline.distillation.teachers import load_checkpoint

    config, teacher = run.config, load_checkpoint(source)
    _save_importance(run, teacher, train)
    hasten_teacher(teacher, config.distill.compile)
    run.checkpoint.mkdir(parents=True, exist_ok=True)
    with progress("targets", len(train) + len(held_out)) as report:
        for done in record_targets(
            teacher, train, run.checkpoint / "train", draws=config.distill.draws, seed=config.seed,
            bf16=uses_bf16(config), teacher_digest=tree_digest(run.layout.teacher),
        ):  # fmt: skip
            report(done, "train")
        for done in record_draws(
            teacher, held_out, run.checkpoint, "held_out", draws=HELD_OUT_DRAWS, seed=config.seed + 1, log_p=True,
            bf16=uses_bf16(config),
        ):  # fmt: skip
            report(len(train) + done, "held_out")
    (run.checkpoint / "train").replace(run.output / "train")
    for path in run.checkpoint.glob("*.npy"):
        path.replace(run.output / path.name)
    discard_checkpoint(run.checkpoint)
    return _metrics(run, teacher, train, held_out)


def _pack(run: StageRun, model_config: Any, side: str) -> Packed:
    from tokenizers import Tokenizer

    from pipeline.distillation.teachers import eos_ids

    config, length, template = (
        run.config,
        run.config.distill.sequence_tokens,
        run.layout.teacher / "chat_template.jinja",
    )
    wanted = {"train": -(-config.distill.target_tokens // length), "held_out": config.runtime.evaluation_sequences}
    return pack_rows(
        Tokenizer.from_file(str(run.layout.teacher / "tokenizer.json")),
        shuffled_rows(run.layout.corpus / f"{side}.jsonl", config.seed),
        template=template.read_text(encoding="utf-8") if template.exists() else None,
        eos_id=eos_ids(model_config)[0],
        bos_id=model_config.bos_token_id,
        sequence_tokens=length,
        max_sequences=wanted[side],
        output=run.output / f"{side}.npy",
    )


def _save_importance(run: StageRun, teacher: Any, train: NDArray[np.int32]) -> None:
    import torch
    from safetensors.torch import save_file

    from pipeline.distillation.importance import measure_importance

    count = min(len(train), run.config.distill.importance_sequences)
    batches = (
        torch.from_numpy(train[start : min(start + _IMPORTANCE_BATCH, count)].astype(np.int64))
        for start in range(0, count, _IMPORTANCE_BATCH)
    )
    scores = measure_importance(teacher, batches)
    tensors = {field.name: getattr(scores, field.name) for field in fields(scores)}
    present = {name: value for name, value in tensors.items() if value is not None}
    save_file(present, run.output / "importance.safetensors")


def _metrics(run: StageRun, teacher: Any, train: NDArray[np.int32], held_out: NDArray[np.int32]) -> dict[str, Any]:
    from pipeline.distillation.recording import model_logits
    from pipeline.distillation.scoring import HeldOut, perplexity

    found = perplexity(model_logits(teacher, held_out), held_out)
    stored = sum(path.stat().st_size for path in (run.output / "train").glob("*.targets"))
    return {
        "params": sum(parameter.numel() for parameter in teacher.parameters()),
        "perplexity": round(found, 4),
        "bits_per_byte": round(HeldOut.open(run.output).bits_per_byte(found), 4),
        "draws": run.config.distill.draws,
        "bytes_a_position": round(stored / train.size, 2),
    }
