"""The teacher itself as a submodel: its checkpoint taken over file by file, of which no weight is read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pipeline.artifacts import link_or_copy
from pipeline.distillation.checkpoint_files import tensor_files
from pipeline.distillation.initial_student import count_parameters

_COPIED = ("config.json", "generation_config.json", "model.safetensors.index.json")


def take_whole(teacher: Path, output: Path) -> dict[str, Any]:
    """Make a teacher's checkpoint a student's: shards under second names where the disk allows, else copied.

    Args:
        teacher: Folder of a checkpoint of a supported architecture.
        output: An empty folder.

    Returns:
        What stage distill says of a student. Nothing was learned, and its distance from the teacher is none; its
        perplexity is left to stage evaluate, which reads held-out text with it anyway.

    Raises:
        UserError: The checkpoint is incomplete.
    """
    for shard in sorted(set(tensor_files(teacher).values())):
        link_or_copy(shard, output / shard.name)
    for name in _COPIED:
        if (teacher / name).is_file():
            shutil.copyfile(teacher / name, output / name)
    return {
        "params": count_parameters(teacher), "perplexity": None, "bits_per_byte": None, "kl_to_teacher": 0.0,
        "kept_share": None, "trained_tokens": 0, "history": [],
    }  # fmt: skip
