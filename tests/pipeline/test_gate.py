"""stage=gate: what it takes to become champion, and what is left behind when it fails."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from edge_runtime.formats.errors import AdapterError, GateError, UserError
from edge_runtime.formats.lora import Adapter, encode_adapter, load_adapter
from edge_runtime.formats.package import open_package
from edge_runtime.formats.signing import load_trust
from pipeline import __main__, tracking
from pipeline.artifacts import Layout
from pipeline.config import load_configs
from pipeline.data.packing import pack_rows, shuffled_rows
from pipeline.settings import Config
from pipeline.stages import gate
from tests.pipeline.conftest import TEXTS, MakeModel
from tests.pipeline.gate_cases import (
    BASE_DIGEST,
    OTHER_DIGEST,
    Trial,
    ledger_line,
    make_trial,
    model_loss,
    peft_loss,
    seal,
    write_candidate,
)
from tests.pipeline.test_tracking import contents

Judge = Callable[..., Path]
MODEL = "sevenfold-toy-adapter"
# int8 activations of both containers against float32 in transformers, in nats a token; measured: 0.004.
LOSS_BOUND = 0.01


@pytest.fixture(scope="session")
def trial(tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel, tokenizer: Tokenizer) -> Trial:
    model = make_model("llama", num_hidden_layers=1, tie_word_embeddings=True)
    return make_trial(tmp_path_factory.mktemp("trial"), model, tokenizer, TEXTS)


@pytest.fixture(scope="session")
def settings() -> Config:
    overrides = [
        "experiment=ci",
        "stage=gate",
        "candidate=set_later",
        "gate.sequences=16",
        "gate.agreement_rms_max=0.2",
    ]
    return next(iter(load_configs(overrides).values()))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "project")


@pytest.fixture
def candidate(trial: Trial, tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, adapter: Adapter | None = None, **facts: Any) -> Path:
        directory = tmp_path / "runs" / "demo" / "candidates" / name
        return write_candidate(directory, adapter or trial.adapters[name], trial.package, **facts)

    return write


@pytest.fixture
def judge(settings: Config, store: Path, layout: Layout) -> Judge:
    """Run the stage and return the champion's link."""

    def run(directory: Path, package: Path | None = None, **bounds: Any) -> Path:
        updates = {
            "candidate": directory,
            "package": package,
            "gate": settings.gate.model_copy(update=bounds),
            "track": settings.track.model_copy(update={"store": store}),
        }
        gate.run(settings.model_copy(update=updates), layout)
        return layout.adapters("toy") / "champion"

    return run


@pytest.fixture
def client(store: Path) -> Iterator[Any]:
    with tracking.open_client(store) as client:
        yield client


@pytest.fixture
def sequences(trial: Trial, tokenizer: Tokenizer) -> np.ndarray:
    """As the targets stage packs them."""
    rows = shuffled_rows(trial.text, 7)
    return pack_rows(tokenizer, rows, template=None, eos_id=1, sequence_tokens=64, max_sequences=16).tokens


def aliases(client: Any) -> dict[str, int]:
    return {alias: int(version) for alias, version in client.get_registered_model(MODEL).aliases.items()}


def report(layout: Layout) -> dict[str, Any]:
    return dict(json.loads((layout.reports / "metrics" / "gate-demo.json").read_text()))


def test_a_better_adapter_becomes_champion_and_loads_on_the_device(
    trial: Trial, judge: Judge, candidate: Any, client: Any, layout: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    link = judge(candidate("better"))
    loaded = load_adapter(link, trial.spec, BASE_DIGEST)
    assert all(
        np.array_equal(found, wanted)
        for module in loaded.pairs
        for found, wanted in zip(loaded.pairs[module], trial.adapters["better"].pairs[module], strict=True)
    )
    assert aliases(client) == {"champion": 1, "challenger": 1}
    version = client.get_model_version(MODEL, "1")
    stored = Path(client.get_model_version_download_uri(MODEL, "1").removeprefix("file://"))
    assert {path.name: path.read_bytes() for path in stored.iterdir()} == encode_adapter(trial.adapters["better"])
    assert version.tags["base_digest"] == BASE_DIGEST
    verdict = report(layout)
    assert verdict["passed"] and verdict["reasons"] == [] and verdict["sequences"] == 16
    printed = capsys.readouterr().out
    assert "champion is version 1, demo after round 3" in printed and f"--adapter {link}" in printed


def test_the_losses_are_those_of_transformers_and_peft(
    trial: Trial, judge: Judge, candidate: Any, layout: Layout, sequences: np.ndarray
) -> None:
    judge(candidate("better"))
    judge(candidate("best"))
    base, better, best = (
        model_loss(trial.model, sequences),
        peft_loss(trial, candidate("better"), sequences),
        peft_loss(trial, candidate("best"), sequences),
    )
    assert base - better > 10 * LOSS_BOUND and better - best > 10 * LOSS_BOUND
    assert set(report(layout)["containers"]) == {"onnx", "tflite"}
    for gain in report(layout)["containers"].values():
        assert gain["loss_base"] == pytest.approx(base, abs=LOSS_BOUND)
        assert gain["loss_reference"] == pytest.approx(better, abs=LOSS_BOUND)
        assert gain["loss_candidate"] == pytest.approx(best, abs=LOSS_BOUND)
        assert gain["mean"] == pytest.approx(gain["loss_reference"] - gain["loss_candidate"], abs=2e-6)
        assert 0 < gain["low"] < gain["mean"]


def test_the_run_in_mlflow_names_the_federation_and_holds_its_curve(
    judge: Judge, candidate: Any, client: Any, layout: Layout
) -> None:
    directory = candidate("better")
    lines = [ledger_line(1), '{"event": "resume"}\n', ledger_line(2, epsilon=1.5), ledger_line(3), ledger_line(4)]
    (directory.parent.parent / "ledger.jsonl").write_text("".join(lines) + '{"event": "rou')
    judge(directory)
    experiment = client.get_experiment_by_name("sevenfold-adapters").experiment_id
    (run,) = client.search_runs([experiment])
    tags = {"federation": "demo", "round": "3", "submodel": "toy", "base_digest": BASE_DIGEST}
    assert tags.items() <= run.data.tags.items() and "mlflow.parentRunId" not in run.data.tags
    onnx = report(layout)["containers"]["onnx"]
    assert run.data.metrics["loss"] == pytest.approx(onnx["loss_candidate"], abs=1e-6)
    assert run.data.metrics["perplexity"] == pytest.approx(np.exp(onnx["loss_candidate"]), rel=1e-5)
    assert run.data.metrics["federation/held_out_loss"] == 4.25
    curve = client.get_metric_history(run.info.run_id, "round/loss_after")
    assert [(point.step, point.value) for point in curve] == [(1, 4.9 - 1), (2, 4.9 - 2), (3, 4.9 - 3)]
    (epsilon,) = client.get_metric_history(run.info.run_id, "round/epsilon")
    assert (epsilon.step, epsilon.value) == (2, 1.5)
    assert client.get_metric_history(run.info.run_id, "round/bytes_total")[-1].value == 330
    assert client.search_logged_models([experiment])[0].source_run_id == run.info.run_id


def test_a_worse_adapter_is_refused_and_leaves_nothing(
    judge: Judge, candidate: Any, client: Any, layout: Layout
) -> None:
    with pytest.raises(
        GateError, match=r"toy: not champion: onnx: \d\.\d{4} nats a token worse than no adapter"
    ) as caught:
        judge(candidate("worse"))
    assert "\n" not in str(caught.value) and "gate-demo.json" in str(caught.value)
    assert not client.search_registered_models() and not layout.adapters("toy").exists()
    assert not report(layout)["passed"] and report(layout)["containers"]["onnx"]["mean"] < 0


def test_the_champion_moves_only_to_what_beats_it(judge: Judge, candidate: Any, client: Any) -> None:
    first = judge(candidate("better")).resolve()
    link = judge(candidate("best"))
    assert aliases(client) == {"champion": 2, "challenger": 2} and link.resolve() != first
    before = contents(client)
    with pytest.raises(GateError, match="this adapter was version 1, the champion is version 2"):
        judge(candidate("better"))
    with pytest.raises(GateError, match="worse than the champion"):
        judge(candidate("worse"))
    assert contents(client) == before and link.resolve() != first
    assert first.is_dir(), "a device may be reading it"


def test_an_adapter_better_than_none_but_not_than_the_champion_is_refused(
    trial: Trial, judge: Judge, candidate: Any, client: Any, layout: Layout
) -> None:
    judge(candidate("best"))
    with pytest.raises(GateError, match="worse than the champion"):
        judge(candidate("better"))
    gain = report(layout)["containers"]["onnx"]
    assert gain["loss_candidate"] < gain["loss_base"] and aliases(client)["champion"] == 1
    assert report(layout)["champion_before"] == 1


def test_a_gain_within_the_margin_is_refused(judge: Judge, candidate: Any, layout: Layout) -> None:
    with pytest.raises(GateError, match=r"better than no adapter, bound .* above 9 is needed"):
        judge(candidate("best"), margin=9.0)
    gains = report(layout)["containers"].values()
    with pytest.raises(GateError, match="better than no adapter"):  # the bound decides, not the mean
        judge(candidate("best"), margin=max(gain["low"] for gain in gains) + 1e-4)
    assert all(gain["mean"] > gain["low"] + 1e-3 for gain in gains)
    judge(candidate("best"), margin=min(gain["low"] for gain in gains) - 1e-4)


def test_containers_that_disagree_are_refused(judge: Judge, candidate: Any, client: Any) -> None:
    with pytest.raises(GateError, match=r"tflite: logits off onnx's by 0\.\d+ of their spread, at most 1e-06"):
        judge(candidate("best"), agreement_rms_max=1e-6)
    with pytest.raises(GateError, match=r"tflite: top-1 0\.\d+ of onnx's, at least 1\.0"):
        judge(candidate("best"), agreement_top1_min=1.0)
    assert not client.search_registered_models()


def test_the_same_candidate_twice_changes_nothing(
    judge: Judge, candidate: Any, client: Any, layout: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    link = judge(candidate("best"))

    def state() -> list[tuple[str, int]]:
        files = [path for path in layout.root.rglob("*") if path.is_file() and ".cache" not in path.parts]
        return sorted((str(path), path.stat().st_mtime_ns) for path in files)

    before, on_disk, target = contents(client), state(), os.readlink(link)
    capsys.readouterr()
    judge(candidate("best", round=9))
    assert (contents(client), state(), os.readlink(link)) == (before, on_disk, target)
    assert "champion already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "step",
    [
        "pipeline.tracking_adapters.ensure_logged_model",
        "pipeline.tracking_adapters.ensure_version",
        "pipeline.stages.gate.crown",
    ],
)
def test_a_gate_that_was_killed_is_completed(
    judge: Judge, candidate: Any, client: Any, layout: Layout, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(step, killed)
        with pytest.raises(KeyboardInterrupt):
            judge(candidate("best"))
    assert judge(candidate("best")).is_dir()
    experiment = client.get_experiment_by_name("sevenfold-adapters").experiment_id
    assert [run.info.status for run in client.search_runs([experiment])] == ["FINISHED"]
    assert len(client.search_logged_models([experiment])) == 1
    assert aliases(client) == {"champion": 1, "challenger": 1}


def test_a_lost_folder_is_written_again(judge: Judge, candidate: Any, layout: Layout, trial: Trial) -> None:
    judge(candidate("best"))
    shutil.rmtree(layout.adapters("toy"))
    assert load_adapter(judge(candidate("best")), trial.spec, BASE_DIGEST).rank == 4


def test_an_adapter_of_another_base_is_refused(trial: Trial, judge: Judge, candidate: Any) -> None:
    stranger = replace(trial.adapters["best"], base_digest=OTHER_DIGEST)
    with pytest.raises(UserError, match=f"base {OTHER_DIGEST[:12]}.*one of base {BASE_DIGEST[:12]}"):
        judge(candidate("best", stranger))
    with pytest.raises(AdapterError, match=OTHER_DIGEST):
        judge(candidate("lying", stranger, base_digest=BASE_DIGEST))


def test_a_newer_base_starts_anew_and_an_older_one_does_not_come_back(
    trial: Trial, judge: Judge, candidate: Any, client: Any, tmp_path: Path
) -> None:
    judge(candidate("best"))
    newer = tmp_path / "newer" / "toy"
    shutil.copytree(trial.package, newer)
    seal(newer, trial.spec, base_digest=OTHER_DIGEST, counter=2)
    small_step = replace(trial.adapters["better"], base_digest=OTHER_DIGEST)
    judge(candidate("next", small_step), newer, text=trial.text)
    assert aliases(client) == {"champion": 2, "challenger": 2}
    with pytest.raises(GateError, match="counter 1, the champion's had 2"):
        judge(candidate("better"))


def test_a_package_without_tflite_is_judged_in_onnx(trial: Trial, judge: Judge, candidate: Any, tmp_path: Path) -> None:
    package = tmp_path / "onnx_only"
    shutil.copytree(trial.package, package)
    shutil.rmtree(package / "tflite")
    judge(candidate("best"), package, text=trial.text)
    shutil.rmtree(package / "onnx")
    with pytest.raises(UserError, match="onnx/ here"):
        judge(candidate("better"), package, text=trial.text)


def test_weights_that_overflow_are_refused(trial: Trial, judge: Judge, candidate: Any, layout: Layout) -> None:
    huge = {
        module: (np.full_like(lora_a, 1e38), np.full_like(lora_b, 1e38))
        for module, (lora_a, lora_b) in trial.adapters["best"].pairs.items()
    }
    with pytest.raises(GateError, match="with the candidate, onnxruntime returned logits that are not finite"):
        judge(candidate("huge", replace(trial.adapters["best"], pairs=huge)))
    assert not report(layout)["passed"] and report(layout)["containers"] == {}


def test_text_that_is_missing_or_too_short_is_one_line(
    trial: Trial, judge: Judge, candidate: Any, tmp_path: Path
) -> None:
    directory = candidate("best")
    for text, says in [
        (tmp_path / "absent.jsonl", "gate.text"),
        (directory, "an existing file ending in .txt"),
    ]:
        with pytest.raises(UserError, match=says):
            judge(directory, text=text)
    (tmp_path / "short.txt").write_text(TEXTS[0] * 10)
    with pytest.raises(UserError, match="at least 8 sequences of 64 tokens"):
        judge(directory, text=tmp_path / "short.txt")
    package = tmp_path / "elsewhere" / "toy"
    shutil.copytree(trial.package, package)
    with pytest.raises(UserError, match=r"add gate\.text=FILE"):
        judge(directory, package)


def test_conversations_are_judged_as_the_packages_template_writes_them(
    trial: Trial, settings: Config, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    package = tmp_path / "artifacts" / "packages" / "toy"
    shutil.copytree(trial.package, package)
    (package / "manifest.sig").unlink()
    template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{{ eos_token }}{% endfor %}"
    (package / "chat_template.jinja").write_text(template)
    seal(package, trial.spec)
    text = tmp_path / "chats.jsonl"
    said = [{"role": "user", "content": "the one"}, {"role": "assistant", "content": "</s> the other"}]
    text.write_text(json.dumps({"messages": said}) + "\n")
    (row,) = gate._pack(settings, open_package(package, load_trust()), text).tolist()
    first = tokenizer.encode("the one", add_special_tokens=False).ids
    assert row[: len(first) + 3] == [0, *first, 1, 0] and row[-1] == 1
    assert tokenizer.decode(row) == "the one</s> the other", "a typed end of text is text"


def test_something_else_at_the_champions_place_is_kept(judge: Judge, candidate: Any, layout: Layout) -> None:
    (layout.adapters("toy") / "champion").mkdir(parents=True)
    (layout.adapters("toy") / "champion" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="move it away"):
        judge(candidate("best"))
    assert (layout.adapters("toy") / "champion" / "mine.txt").exists()


def test_the_command_exits_0_3_and_2(
    candidate: Any, store: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(__main__, "PROJECT", layout.root)

    def command(*arguments: str) -> tuple[int, int]:
        code = __main__.main(["experiment=ci", "stage=gate", f"track.store={store}", *arguments])
        return code, capsys.readouterr().err.count("\n")

    loose = ("gate.agreement_rms_max=0.2", "gate.sequences=16")
    assert command(f"candidate={candidate('better')}", *loose) == (0, 0)
    assert command(f"candidate={candidate('worse')}", *loose) == (3, 1)
    assert command(f"candidate={candidate('best').parent / 'absent'}") == (2, 1)
    assert command(f"candidate={candidate('best')}", "submodel=ci_tiny") == (2, 1)
    assert (layout.adapters("toy") / "champion").is_dir()


def killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
