"""A family whose submodels have vocabularies of their own, from distillation to packages that write text.

One keeps a part of the teacher's tokens, one starts from a checkpoint with another tokenizer.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from edge_runtime.formats.package import open_package
from edge_runtime.formats.signing import load_trust
from pipeline.adapters.bases import load_dequantized
from pipeline.artifacts import Layout, StageRun, read_json
from pipeline.config import load_configs
from pipeline.data.packing import row_text, shuffled_rows, train_tokenizer
from pipeline.export.assembly import WEIGHTS_FILE
from pipeline.flow import SHIP, STAGES, execute
from pipeline.report.table import family_table
from pipeline.settings import Config
from pipeline.stages import report
from pipeline.stages.adapter import AdapterContext, AdapterSettings, run_action
from tests.flows.conftest import FinishedRun, run_edge
from tests.flows.stages_here import in_this_process, layout_beside

pytestmark = [pytest.mark.flow, pytest.mark.xdist_group("run")]
NAMES = ("trimmed", "own")
TOKENS = 12


@dataclass(frozen=True, slots=True)
class Family:
    """A layout with both submodels shipped, and the configuration of each."""

    layout: Layout
    configs: dict[str, Config]


@pytest.fixture(scope="module")
def family(finished: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Beside the corpus, teacher and targets of the finished run; stages run in this process, which saves imports."""
    layout = layout_beside(finished, tmp_path_factory.mktemp("vocabularies") / "run")
    checkpoint = write_checkpoint(layout, tmp_path_factory.mktemp("checkpoint"))
    values = load_configs([
        "experiment=ci", "submodel=ci_tiny", "distill.loss=aligned", "distill.signal=online", "distill.steps=10",
        "export.containers=[onnx,tflite]", "export.accuracy_level=0",
    ])["ci_tiny"].model_dump()  # fmt: skip
    starts = {"trimmed": {"vocab_coverage": 0.9}, "own": {"checkpoint": checkpoint}}
    configs = {}
    for name, start in starts.items():
        submodel = values["submodel"] | {"name": name} | start
        configs[name] = Config.model_validate(values | {"family": list(NAMES), "submodel": submodel})
    with in_this_process():
        for config in configs.values():
            for stage in ("distill", *SHIP):
                execute(STAGES[stage], config, layout)
        report.run(StageRun(configs["own"], layout, _made(layout.root / "artifacts" / "report"), layout.root / "a-b"))
    return Family(layout, configs)


def write_checkpoint(layout: Layout, folder: Path) -> Path:
    texts = [row_text(row) for row in islice(shuffled_rows(layout.corpus / "train.jsonl", 0), 300)]
    train_tokenizer(texts, 384).save(str(folder / "tokenizer.json"))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 384}  # fmt: skip
    torch.manual_seed(3)
    config = Qwen3Config(**sizes, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_measures_compare_what_the_vocabularies_allow(family: Family, capsys: pytest.CaptureFixture[str]) -> None:
    found = read_json(family.layout.reports / "family.json")
    trimmed, own = (found["submodels"][name] for name in NAMES)
    assert trimmed["kl_to_teacher"] > 0 and 0.5 < trimmed["kept_share"] < 1
    assert own["kl_to_teacher"] is None and own["kl_to_teacher_from_scratch"] is None and own["kept_share"] is None
    assert own["perplexity_from_scratch"] > 1 and found["teacher"]["bits_per_byte"] < 8
    for submodel in (trimmed, own):
        assert found["teacher"]["bits_per_byte"] < submodel["bits_per_byte_fp"] < 8
        assert submodel["packages"]["onnx"]["bits_per_byte"] == pytest.approx(submodel["bits_per_byte_fp"], rel=0.05)
        assert submodel["packages"]["onnx"]["exact_max_abs"] <= 1e-4
    Console(width=100).print(family_table(found))
    assert "own" in capsys.readouterr().out
    card = (family.layout.package("trimmed") / "README.md").read_text(encoding="utf-8")
    assert f"| of the teacher's draws counted, % | {100 * trimmed['kept_share']:.1f} |" in card


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_file_writes_transformers_greedy_text(family: Family, name: str) -> None:
    layout, student = family.layout, family.layout.student(name)
    tokenizer = AutoTokenizer.from_pretrained(student, local_files_only=True)
    manifest = open_package(layout.package(name), load_trust()).manifest
    assert manifest.decoder.vocab_size == len(tokenizer) < 512
    assert (layout.package(name) / "tokenizer.json").read_bytes() == (student / "tokenizer.json").read_bytes()
    model, _ = load_dequantized(student, layout.weights(name) / WEIGHTS_FILE)
    prompt = "Return the unquantized string; 函数"
    begun = [] if manifest.bos is None else [manifest.bos]
    ids = torch.tensor([[*begun, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0
        )[0, ids.shape[1] :]
    expected = tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    done = run_edge(
        Path(sys.executable), "generate", "--package", str(layout.package(name)), "--container", "onnx", "--prompt",
        prompt, "--max-tokens", str(TOKENS), "--temperature", "0", "--threads", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == expected.rstrip("\n") and expected.strip()


def test_adapters_learn_from_text_in_the_submodels_tokens(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the teacher's ids the submodel has fewer rows."""
    settings = AdapterSettings(name="back", steps=8, batch_sequences=4, held_out_sequences=4, rank=4)
    run_action("train", settings, AdapterContext(family.layout, "own", tmp_path, threads=1))
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert 0 < figures["kl_after"] < figures["kl_before"]
