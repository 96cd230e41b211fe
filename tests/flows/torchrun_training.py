"""What each process of test_torchrun runs: one training, whole or spread, and on request an end in the middle."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.distillation.batches import Batch, LossSum
from pipeline.distillation.checkpoints import History
from pipeline.distillation.objectives import next_token_objective
from pipeline.distillation.parallel import join_processes, leave_processes, whole_state
from pipeline.distillation.trainer import TrainPlan, train
from tests.pipeline.exact_model import ANSWERS, PLAN, Exact

TWO = replace(PLAN, batch_sequences=4, micro_sequences=1)


def main(folder: Path) -> None:
    """Trainings in one pair of processes, because starting them costs more than they do."""
    warnings.simplefilter("error")
    processes = join_processes()
    assert processes.count == 2
    for sharding in ("none", "fsdp"):
        plan = replace(TWO, sharding=sharding)
        _store(folder / sharding, plan, folder / f"{sharding}-state")
        stopped = folder / f"{sharding}-stopped"
        try:
            _train(plan, stopped, dies_at=7)
        except KeyboardInterrupt:
            torch.distributed.barrier()
        _store(folder / f"{sharding}-resumed", plan, stopped)
    try:
        _train(replace(TWO, batch_sequences=3), folder / "odd")
    except Exception as error:
        (folder / f"odd-{processes.index}.txt").write_text(f"{type(error).__name__}: {error}")
    leave_processes()


def _train(plan: TrainPlan, checkpoint: Path, dies_at: int | None = None) -> tuple[nn.Module, History]:
    def objective(model: Any, batch: Batch) -> LossSum:
        if batch.step == dies_at:
            raise KeyboardInterrupt
        return next_token_objective(model, batch)

    model = Exact()
    return model, train(model, objective, ANSWERS, plan, checkpoint, "two processes")


def _store(name: Path, plan: TrainPlan, checkpoint: Path) -> None:
    model, history = _train(plan, checkpoint)
    index = join_processes().index
    save_file(whole_state(model), name.with_suffix(f".{index}.safetensors"))
    name.with_suffix(f".{index}.json").write_text(json.dumps(history))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
