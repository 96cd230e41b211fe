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
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.distillation.batches import Batch, LossSum
from pipeline.distillation.checkpoints import History
from pipeline.distillation.divergences import LossKind
from pipeline.distillation.objectives import LossSettings, next_token_objective, signal_objective
from pipeline.distillation.on_policy import Sampling, on_policy_objective, samples_in
from pipeline.distillation.parallel import join_processes, leave_processes
from pipeline.distillation.signals import OnlineSource
from pipeline.distillation.trainer import TrainPlan, train
from tests.pipeline.exact_model import ANSWERS, PLAN, VOCABULARY, Exact

TWO = replace(PLAN, batch_sequences=4, micro_sequences=1)
SHORT = replace(TWO, steps=4)


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
        student, history = train_on_policy(replace(SHORT, sharding=sharding), folder / f"{sharding}-student-state")
        _write(folder / f"{sharding}-student", student, history)
    try:
        _train(replace(TWO, batch_sequences=3), folder / "odd")
    except Exception as error:
        (folder / f"odd-{processes.index}.txt").write_text(f"{type(error).__name__}: {error}")
    leave_processes()


def train_on_policy(plan: TrainPlan, checkpoint: Path) -> tuple[nn.Module, History]:
    """A Llama that learns from a larger one, in half of the steps from its own text."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
             "num_key_value_heads": 1, "eos_token_id": 1, "tie_word_embeddings": True}  # fmt: skip
    torch.manual_seed(6)
    student, teacher = (LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes)) for layers in (2, 3))
    source = OnlineSource.open(teacher.eval(), bf16=False)
    sampling = Sampling(ratio=0.5, prompt_tokens=6, new_tokens=5, temperature=1.0, eos_ids=(1,), seed=2)
    objective = on_policy_objective(signal_objective(source, LossSettings(LossKind.JSD)), sampling)
    assert {samples_in(step, sampling) for step in range(plan.steps)} == {True, False}
    return student, train(student, objective, ANSWERS, plan, checkpoint, "on policy")


def _train(plan: TrainPlan, checkpoint: Path, dies_at: int | None = None) -> tuple[nn.Module, History]:
    def objective(model: Any, batch: Batch) -> LossSum:
        if batch.step == dies_at:
            raise KeyboardInterrupt
        return next_token_objective(model, batch)

    model = Exact()
    return model, train(model, objective, ANSWERS, plan, checkpoint, "two processes")


def _store(name: Path, plan: TrainPlan, checkpoint: Path) -> None:
    _write(name, *_train(plan, checkpoint))


def _write(name: Path, model: nn.Module, history: History) -> None:
    index = join_processes().index
    if isinstance(model, LlamaForCausalLM):
        model.save_pretrained(name.with_suffix(f".{index}"))
    else:
        save_file(model.state_dict(), name.with_suffix(f".{index}.safetensors"))
    name.with_suffix(f".{index}.json").write_text(json.dumps(history))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
