"""Writing the teacher's signal to disk: draws, and on request their log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.distillation.signals import checked_head, draw, head_logits, last_hidden

SHARD_SEQUENCES = 64
_BATCH_SEQUENCES = 8
_CHUNK_POSITIONS = 1024  # whose logits exist at once


def record_draws(
    teacher: Any,
    sequences: NDArray[np.int32],
    directory: Path,
    side: str,
    *,
    draws: int,
    seed: int,
    log_p: bool,
    bf16: bool,
) -> Iterator[int]:
    """Run the teacher over sequences (S, T) and store ``<side>_draws.npy`` (S, T, D) in ``directory``.

    Yields:
        Sequences done, after each shard. Each shard has its own random stream, so a run that is
        killed and started again goes on after the last whole shard and ends with the same bytes.
        With ``log_p`` the log-probability of each draw goes to ``<side>_log_p.npy``, float32, and
        the most likely token of each position to ``<side>_top1.npy``, int32 (S, T).
    """
    shape = (*sequences.shape, draws)
    id_type = np.uint16 if teacher.config.vocab_size <= 65536 else np.uint32
    marker = directory / f"{side}.done"
    files = {"draws": _open(directory / f"{side}_draws.npy", shape, id_type, marker)}
    if log_p:
        files["log_p"] = _open(directory / f"{side}_log_p.npy", shape, np.float32, marker)
        files["top1"] = _open(directory / f"{side}_top1.npy", sequences.shape, np.int32, marker)
    done = int(marker.read_text()) if marker.exists() else 0
    if done < len(sequences):
        head = checked_head(teacher)
        head = head.to(torch.bfloat16) if bf16 else head
    while done < len(sequences):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + done)
        end = min(done + SHARD_SEQUENCES, len(sequences))
        for start in range(done, end, _BATCH_SEQUENCES):
            stop = min(start + _BATCH_SEQUENCES, end)
            tokens = torch.from_numpy(sequences[start:stop].astype(np.int64))
            said = _say(last_hidden(teacher, tokens, bf16), head, draws, generator)
            for name, file in files.items():
                file[start:stop] = said[name].cpu().numpy()
        for file in files.values():
            file.flush()
        done = end
        partial = marker.with_suffix(".partial")
        partial.write_text(str(done))
        partial.replace(marker)
        yield done


@torch.no_grad()
def teacher_logits(teacher: Any, sequences: NDArray[np.int32], bf16: bool) -> torch.Tensor:
    """(B, T, V) float32 on this process's CPU."""
    tokens = torch.from_numpy(sequences.astype(np.int64)).to(teacher.device)
    eager = torch.compiler.set_stance("force_eager")  # few passes, of shapes that training does not have
    with torch.autocast(teacher.device.type, torch.bfloat16, enabled=bf16), eager:
        logits: torch.Tensor = teacher(input_ids=tokens, use_cache=False).logits
    return logits.float().cpu()


def model_logits(model: Any, sequences: NDArray[np.int32]) -> Iterator[NDArray[np.float32]]:
    """(T, V) float32 logits, one sequence after another."""
    for row in sequences:
        yield teacher_logits(model, row[None], bf16=False)[0].numpy()


def _say(hidden: torch.Tensor, head: torch.Tensor, draws: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Draws (B, T, D), their log-probabilities, and the most likely tokens (B, T), for hidden states (B, T, H)."""
    parts: dict[str, list[torch.Tensor]] = {"draws": [], "log_p": [], "top1": []}
    for chunk in hidden.flatten(0, 1).split(_CHUNK_POSITIONS):
        logits = head_logits(chunk, head)
        ids = draw(logits, draws, generator)
        parts["draws"].append(ids)
        parts["log_p"].append(logits.gather(-1, ids) - logits.logsumexp(dim=-1, keepdim=True))
        parts["top1"].append(logits.argmax(dim=-1))
    return {name: torch.cat(values).unflatten(0, hidden.shape[:2]) for name, values in parts.items()}


def _open(path: Path, shape: tuple[int, ...], dtype: Any, marker: Path) -> Any:
    """Map a file for writing; an earlier run's file of the same shape is continued, a new one makes ``marker`` void."""
    if path.exists():
        existing = np.lib.format.open_memmap(path, mode="r+")
        if existing.shape == shape and existing.dtype == dtype:
            return existing
    marker.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")  # a file under its own name has a header
    created = np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=shape)
    partial.replace(path)
    return created
