"""Tasks of lm-evaluation-harness: what a model says is torch's; the harness itself where it is installed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from edge_runtime.formats.errors import UserError
from pipeline.config import load_configs
from pipeline.data.encoding import text_encoder
from pipeline.evaluation.harness import HarnessTasks, _judged, _log_likelihoods, _write, ask_harness
from pipeline.evaluation.readers import TorchReader
from pipeline.plan import require_sources
from tests.pipeline.conftest import MakeModel

TASKS = HarnessTasks(("choose", "finish"), None, start_id=1, ends=(1,), most_tokens=40)


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> Any:
    return make_model("llama", num_hidden_layers=1)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return [1, *tokenizer.encode(text, add_special_tokens=False).ids]


@pytest.mark.parametrize("context", ["of many", "", "return x " * 40 + "of many"])
def test_a_continuation_scores_as_torch_scores_it(model: Any, tokenizer: Tokenizer, context: str) -> None:
    """The space before a word belongs to the continuation; long contexts lose their beginning."""
    pairs = [(context, " words"), (context, " return x")]
    found = _log_likelihoods(pairs, TASKS, TorchReader(model), text_encoder(tokenizer))
    for (before, behind), (score, greedy) in zip(pairs, found, strict=True):
        ids, count = ids_of(tokenizer, before + behind)[-40:], len(ids_of(tokenizer, behind)) - 1
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        log_p, places = logits.log_softmax(-1), range(len(ids) - count, len(ids))
        assert score == pytest.approx(sum(float(log_p[at - 1, ids[at]]) for at in places), abs=1e-4)
        assert greedy == all(int(logits[at - 1].argmax()) == ids[at] for at in places)


def test_text_is_written_greedily_up_to_a_stop(model: Any, tokenizer: Tokenizer) -> None:
    reader, encoder = TorchReader(model), text_encoder(tokenizer)
    prompt = torch.tensor([ids_of(tokenizer, "return x")])
    wanted = tokenizer.decode(
        model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=1)[0, prompt.shape[1] :].tolist(),
        skip_special_tokens=False,
    ).removesuffix("</s>")
    assert _write("return x", {"max_gen_toks": 12}, TASKS, reader, encoder, tokenizer) == wanted
    stop = wanted[len(wanted) // 2 :][:2]
    written = _write("return x", {"max_gen_toks": 12, "until": ["~", stop]}, TASKS, reader, encoder, tokenizer)
    assert written == wanted.partition(stop)[0] != wanted
    with pytest.raises(NotImplementedError, match="greedily"):
        _write("return x", {"do_sample": True}, TASKS, reader, encoder, tokenizer)


def test_verdicts_are_paired_by_item_and_chance_is_that_of_the_task() -> None:
    def sample(item: int, right: float, choices: int = 3, kind: str = "none", target: str = "t") -> dict[str, Any]:
        return {"doc_id": item, "acc": right, "arguments": [()] * choices, "filter": kind, "target": target}

    found = _judged("t", [sample(2, 0), sample(0, 1), sample(1, 1, 2), sample(0, 0, kind="other")])
    assert found.correct.tolist() == [True, True, False]
    assert found.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 3) / 3)
    written = [sample(item, 1, 1, target=target) for item, target in enumerate(("a", "b", "a", "c"))]
    assert _judged("t", written).chance == 0.5
    with pytest.raises(UserError, match="a task with acc or exact_match"):
        _judged("t", [{"doc_id": 0, "arguments": [()], "filter": "none", "target": "t", "bleu": 1.0}])


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_without_the_harness_one_line_says_what_to_install() -> None:
    configs = load_configs(["experiment=ci", "runtime.harness_tasks=[mine]"])
    with pytest.raises(UserError, match=r"runtime\.harness_tasks: .*pip install '\.\[harness\]'"):
        require_sources(configs["ci_small"])


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is an optional extra")
def test_yaml_tasks_over_local_files_are_answered(
    model: Any, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    rows = [{"q": "of many", "choices": ["words", "x", "return"], "label": n % 3} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "choose.yaml").write_text(
        f"task: choose\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path}/rows.jsonl}}\ntest_split: train\n"
        'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: label\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    tasks = HarnessTasks(("choose",), tmp_path, start_id=1, ends=(1,), most_tokens=40)
    found = ask_harness(tasks, TorchReader(model), tokenizer)["choose"]
    assert found.chance == pytest.approx(1 / 3) and found.correct.sum() == 2
    assert len(np.unique(found.correct.reshape(2, 3), axis=0)) == 1
