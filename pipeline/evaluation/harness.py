"""Tasks of lm-evaluation-harness, asked of the same readers: ``pip install .[harness]``.

Tasks come by name, from the harness or from a folder of YAML files whose data lie in local files
(``dataset_path: json``, ``dataset_kwargs: {data_files: ...}``); nothing is downloaded. The harness writes prompts and
judges; here is only what a model says: log-probabilities and greedy text.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from edge_runtime.formats.errors import UserError
from pipeline.data.encoding import TextEncoder, encode_texts, text_encoder
from pipeline.evaluation.questions import Answers, Ids, Item, Probe, Questions, make_task, token_marks
from pipeline.evaluation.readers import Reader, Writer

_JUDGED = ("acc", "exact_match")  # figures that say of each item whether it is right
_ANSWER_TOKENS = 256


@dataclass(frozen=True, slots=True)
class HarnessTasks:
    """What is asked.

    Attributes:
        names: As the harness knows them.
        folder: Where else it looks for YAML files.
        start_id: The token before every text.
        ends: Tokens that end an answer.
        most_tokens: Longer texts lose their beginning.
    """

    names: tuple[str, ...]
    folder: Path | None
    start_id: int
    ends: tuple[int, ...]
    most_tokens: int


def require_harness() -> None:
    """Refuse before any work what could not be asked.

    Raises:
        UserError: The harness is not installed.
    """
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise UserError("runtime.harness_tasks", "lm_eval is not installed", "[]", "pip install '.[harness]'")


def ask_harness(tasks: HarnessTasks, reader: Reader, tokenizer: Tokenizer) -> dict[str, Answers]:
    """What a model has right, by task, in the order of the harness's items.

    Raises:
        UserError: A task cannot be loaded without a network, or has no figure that judges each item.
    """
    os.environ.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if tasks.folder is None else str(tasks.folder))
    try:
        found = simple_evaluate(
            model=_adapter(tasks, reader, tokenizer), tasks=list(tasks.names), task_manager=manager,
            log_samples=True, bootstrap_iters=0,
        )  # fmt: skip
    except (KeyError, OSError, ValueError, NotImplementedError) as error:
        message = " ".join(str(error).split())[:200]
        raise UserError(
            "runtime.harness_tasks", ", ".join(tasks.names), f"tasks that load from local files ({message})"
        ) from error
    return {name: _judged(name, samples) for name, samples in found["samples"].items()}


def _judged(name: str, samples: Sequence[Mapping[str, Any]]) -> Answers:
    """The first filter's verdicts; chance as for our own tasks."""
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    figure = next((figure for figure in _JUDGED if figure in first[0]), None)
    if figure is None:
        raise UserError("runtime.harness_tasks", name, f"a task with {' or '.join(_JUDGED)}", "leave it out")
    first.sort(key=lambda sample: int(sample["doc_id"]))
    choices = [len(sample["arguments"]) for sample in first]
    if min(choices) > 1:
        chance = float(np.mean([1 / count for count in choices]))
    else:
        chance = Counter(str(sample["target"]) for sample in first).most_common(1)[0][1] / len(first)
    correct = np.array([float(sample[figure]) > 0.5 for sample in first])
    return Answers(correct, np.full(len(first), -1), chance=chance)


def _adapter(tasks: HarnessTasks, reader: Reader, tokenizer: Tokenizer) -> Any:
    from lm_eval.api.model import LM

    encoder = text_encoder(tokenizer)

    class ReaderModel(LM):  # type: ignore[misc]  # the harness's base class carries no types
        """A reader, as the harness asks."""

        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            return _log_likelihoods([request.args for request in requests], tasks, reader, encoder)

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            raise NotImplementedError("perplexity of whole texts is measured by stage=evaluate itself")

        def generate_until(self, requests: Any) -> list[str]:
            if not isinstance(reader, Writer):
                raise NotImplementedError("this container only reads")
            asked = (request.args for request in requests)
            return [_write(context, options, tasks, reader, encoder, tokenizer) for context, options in asked]

    return ReaderModel()


def _log_likelihoods(
    pairs: Sequence[tuple[str, str]], tasks: HarnessTasks, reader: Reader, encoder: TextEncoder
) -> list[tuple[float, bool]]:
    """(log p, whether greedy decoding writes it) of each continuation; spaces before it belong to it."""
    sequences, items = list[Ids](), list[Item]()
    for number, (context, continuation) in enumerate(pairs):
        kept = context.rstrip(" ") if context.strip() else context
        before, whole = (_encode(text, tasks, encoder) for text in (kept, context + continuation))
        begin = max(1, min(len(before), len(whole) - 1))
        lost = max(0, len(whole) - tasks.most_tokens)
        sequences.append(whole[lost:])
        at = max(1, begin - lost)
        items.append(Item(str(number), (Probe(number, at - 1, tuple(sequences[-1][at:].tolist())),)))
    task = make_task("harness", items, exact=True)
    log_p, most_likely = token_marks(Questions(tuple(sequences), (task,)), reader.rows(sequences))
    sums = np.bincount(task.choice, weights=log_p, minlength=len(items))
    missed = np.bincount(task.choice, weights=most_likely != task.token, minlength=len(items))
    return [(float(total), not wrong) for total, wrong in zip(sums, missed, strict=True)]


def _write(
    context: str, options: Mapping[str, Any], tasks: HarnessTasks, writer: Writer, encoder: TextEncoder,
    tokenizer: Tokenizer,
) -> str:  # fmt: skip
    if options.get("do_sample") or float(options.get("temperature") or 0):
        raise NotImplementedError("answers are written greedily")
    most = min(int(options.get("max_gen_toks", _ANSWER_TOKENS)), tasks.most_tokens - 1)
    prompt = _encode(context, tasks, encoder)[-(tasks.most_tokens - most) :]
    text = tokenizer.decode(writer.write(prompt, most, tasks.ends), skip_special_tokens=False)
    until = options.get("until") or []
    for stop in [until] if isinstance(until, str) else until:
        text = text.partition(stop)[0] if stop else text
    return str(text)


def _encode(text: str, tasks: HarnessTasks, encoder: TextEncoder) -> Ids:
    return np.append(np.int32(tasks.start_id), encode_texts(encoder, [text])[0]).astype(np.int32)
