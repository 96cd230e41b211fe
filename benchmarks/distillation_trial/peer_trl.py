"""TRL's GKD trainer as a peer, where TRL is installed: its own loop, off-policy, forward KL, the same tokens."""

from __future__ import annotations

import importlib.util
import tempfile
import time
import warnings
from typing import Any

import torch

from benchmarks.distillation_trial.models import Setting

WARM_UP_STEPS = 2


def available() -> bool:
    return importlib.util.find_spec("trl") is not None and importlib.util.find_spec("datasets") is not None


def tokens_per_second(
    setting: Setting, teacher: Any, student: Any, batch_sequences: int, steps: int
) -> tuple[float, float]:
    """Rate over ``steps`` after the warm-up, and the last logged loss."""
    warnings.simplefilter("ignore")
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    rows = torch.randint(setting.vocabulary, (batch_sequences * 2, setting.sequence_tokens)).tolist()
    clock = _clock()
    with tempfile.TemporaryDirectory() as directory:
        arguments = GKDConfig(
            output_dir=directory,
            per_device_train_batch_size=batch_sequences,
            max_steps=WARM_UP_STEPS + steps,
            learning_rate=1e-4,
            beta=0.0,
            lmbda=0.0,
            temperature=1.0,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            optim="adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=arguments,
            data_collator=_collate,
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=_tokenizer(setting.vocabulary),
            callbacks=[clock],
        )
        trainer.train()
    took_s = clock.times_s[-1] - clock.times_s[WARM_UP_STEPS - 1]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return steps * batch_sequences * setting.sequence_tokens / took_s, float(losses[-1])


def _collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    tokens = torch.tensor([row["input_ids"] for row in rows])
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": tokens.clone(),
        "prompts": tokens[:, :1],
    }


def _tokenizer(vocabulary: int) -> Any:
    """Never asked for tokens; the trainer wants its special ones."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def _clock() -> Any:
    import transformers

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        """Notes when each step is done on the GPU."""

        def __init__(self) -> None:
            self.times_s: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times_s.append(time.perf_counter())

    return Clock()
