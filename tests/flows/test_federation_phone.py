"""A phone-class installation without torch learns in the same rounds as a mini-PC with it; both use what comes out."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge_runtime.federated.trainer import open_trainer
from edge_runtime.formats.layout import initial_factors
from edge_runtime.formats.package import open_package
from edge_runtime.formats.signing import load_trust
from pipeline.artifacts import PROJECT
from pipeline.export.parity import compare_logits
from server.config import load_federation
from server.federation import read_layout, read_manifest
from server.following import start_federation
from server.home import Home
from server.processes import end_processes
from tests.flows.conftest import FinishedRun, run_edge
from tests.flows.federation_link import open_superlink, read_ledger, wait_for

pytestmark = [pytest.mark.flow, pytest.mark.slow, pytest.mark.xdist_group("run")]

# Name to (whether it has torch, what --trainer says, what the server is told).
DEVICES = {
    "phone": (False, "auto", "onnx"),
    "tablet": (False, "tflite", "tflite"),
    "mini-pc": (True, "torch", "torch"),
}
# Each owns the text of another module, and all of them have learned one sentence by heart.
TEXTS = {"phone": "argparse", "tablet": "fractions", "mini-pc": "textwrap"}
TOKENS, BATCH, RANK, ROUNDS = 32, 2, 4, 4
LESSON, PROMPT, NEW_TOKENS = "yes and no, ", "yes and", 24
# Of the logits' standard deviation; measured 0.004 between the runtimes and 0.12 by what was learned.
AGREEMENT, LEARNED = 0.02, 0.08
GRADIENTS = """
import sys
import numpy as np
from pathlib import Path
from edge_runtime.federated.trainer import open_trainer
from edge_runtime.session import open_verified

package, given, kind, out = sys.argv[1:]
held = np.load(given)
factors = {name: held[name] for name in held.files if ".lora_" in name}
trainer = open_trainer(kind, open_verified(Path(package), []), threads=1)
loss, count, gradients = trainer.loss_and_gradients(held["tokens"], held["mask"], factors, float(held["scale"]))
np.savez(out, loss=loss, count=count, **gradients)
assert "torch" not in sys.modules
"""


@dataclass(frozen=True, slots=True)
class Learned:
    """A federation that ended."""

    home: Home
    package: Path
    folder: Path

    @property
    def candidate(self) -> Path:
        return self.home.run("classes") / "candidates" / f"{ROUNDS:06d}"


@pytest.fixture(scope="module")
def learned(finished: FinishedRun, edge_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Learned]:
    folder, package = tmp_path_factory.mktemp("classes"), finished.layout.package("ci_small")
    config = load_federation(
        "default",
        (
            "name=classes", f"package={package}", f"rounds={ROUNDS}", "gate=false",
            "adapter.targets=[q_proj,v_proj]", f"adapter.ranks=[{RANK}]", "adapter.alpha=8", "local.steps=30",
            f"local.batch_sequences={BATCH}", f"local.sequence_tokens={TOKENS}",
            "local.learning_rate=3e-2", "local.learning_rate_b=3e-2", "optimizer.name=fedavg", "optimizer.average=0",
            "cohort.size=3", "cohort.over_selection=1", "cohort.quorum=3", "cohort.patience_s=120",
            "cohort.shortest_deadline_s=100", "cohort.longest_deadline_s=100", "evaluation.most_sequences=16",
        ),
    )  # fmt: skip
    with open_superlink(folder, tuple(DEVICES)) as (home, link), _clients(edge_python, package, folder, link.address):
        start_federation(home, config)
        wait_for(lambda: _ended(home), "the end of the last round", 300)
    yield Learned(home, package, folder)


def _ended(home: Home) -> bool:
    assert not read_ledger(home, "classes", "turned_away")
    return bool(read_ledger(home, "classes", "end"))


@contextlib.contextmanager
def _clients(edge_python: Path, package: Path, folder: Path, address: str) -> Iterator[None]:
    running = []
    try:
        for name, (with_torch, trainer, _) in DEVICES.items():
            text = folder / name / "text"
            text.mkdir()
            module = (Path(os.__file__).parent / f"{TEXTS[name]}.py").read_text()
            lines = [f"{name} {number}: {LESSON * 8}\n" for number in range(150)]
            (text / "notes.txt").write_text(module[:2_000] + "".join(lines))
            words = ["client", "--name", name, "--state", folder / name / "state", "--package", package]
            words += ["--data", text, "--superlink", address, "--root-certificate", folder / "home" / "ca.crt"]
            words += ["--trainer", trainer, "--threads", "1", "--lease", folder / name / "lease"]
            words += ["--memory-bytes", "0", "--heat", "200", "--battery", "0"]
            python, cwd = (Path(sys.executable), PROJECT) if with_torch else (edge_python, Path("/"))
            with (folder / f"{name}.log").open("w") as log:
                command = [str(word) for word in (python, "-m", "edge_runtime", *words)]
                running.append(subprocess.Popen(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        yield
    finally:
        end_processes([process.pid for process in running if process.poll() is None], grace_s=20.0)
        for process in running:
            process.wait()


def test_devices_with_and_without_torch_learn_in_the_same_rounds(learned: Learned) -> None:
    rounds = read_ledger(learned.home, "classes", "round")
    assert [(record["folded"], record["lost"], record["refused"], record["declined"]) for record in rounds] == [
        (3, 0, {}, {})
    ] * ROUNDS
    devices = json.loads((learned.home.run("classes") / "devices.json").read_text())
    assert {device["name"]: device["trainer"] for device in devices} == {
        name: told for name, (_, _, told) in DEVICES.items()
    }
    assert all(device["folded"] == ROUNDS for device in devices)
    (baseline,) = read_ledger(learned.home, "classes", "baseline")
    losses = [baseline["held_out_loss"], *(record["held_out_loss"] for record in rounds)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.5, losses


@pytest.mark.parametrize("kind", ["onnx", "tflite"])
def test_the_phones_gradients_are_torchs(learned: Learned, edge_python: Path, tmp_path: Path, kind: str) -> None:
    package = open_package(learned.package, load_trust())
    config = load_federation("default", ("name=x", f"package={learned.package}", f"adapter.ranks=[{RANK}]"))
    layout = read_layout(config, read_manifest(config))
    rng = np.random.default_rng(5)
    factors = {
        name: (factor + rng.normal(0, 0.02, factor.shape)).astype(np.float32)
        for name, factor in initial_factors(layout, 3).items()
    }
    tokens = rng.integers(0, package.manifest.decoder.vocab_size, (BATCH, TOKENS)).astype(np.int32)
    mask = np.ones((BATCH, TOKENS), np.float32)
    np.savez(tmp_path / "given.npz", tokens=tokens, mask=mask, scale=layout.scale, **factors)
    done = subprocess.run(
        [str(edge_python), "-c", GRADIENTS, str(learned.package), str(tmp_path / "given.npz"), kind,
         str(tmp_path / "found.npz")], cwd="/", capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trainer = open_trainer("torch", package, threads=1)
    loss, count, wanted = trainer.loss_and_gradients(tokens, mask, factors, layout.scale)
    trainer.close()
    found = np.load(tmp_path / "found.npz")
    assert int(found["count"]) == count and float(found["loss"]) == pytest.approx(loss, rel=1e-5)
    assert set(wanted) == set(factors) == {name for name in found.files if ".lora_" in name}
    for name, gradient in wanted.items():
        assert np.linalg.norm(found[name] - gradient) <= 1e-4 * np.linalg.norm(gradient), name


def test_what_they_learned_writes_the_same_text_through_both_runtimes(
    learned: Learned, edge_python: Path, tmp_path: Path
) -> None:
    """Equal but for ties: int8 activations move a logit by a few hundredths of the spread, the adapter by far more."""
    adapter = ["--adapter", str(learned.candidate)]
    texts = {}
    for container in ("onnx", "tflite"):
        words = ["--prompt", PROMPT, "--max-tokens", str(NEW_TOKENS), "--temperature", "0", *adapter]
        texts[container] = json.loads(_run(edge_python, "generate", learned.package, container, *words))["tokens"]
    bos = open_package(learned.package, load_trust()).manifest.bos
    prompt = [bos, *Tokenizer.from_file(str(learned.package / "tokenizer.json")).encode(PROMPT).ids]
    np.save(tmp_path / "tokens.npy", np.array([prompt + texts["onnx"]]))

    def logits(container: str, words: list[str]) -> NDArray[np.float32]:
        files = ["--score", str(tmp_path / "tokens.npy"), "--logits-out", str(tmp_path / "logits.npy")]
        _run(edge_python, "bench", learned.package, container, "--repeat", "0", *files, *words)
        return np.load(tmp_path / "logits.npy")[0]

    plain, onnx, tflite = logits("onnx", []), logits("onnx", adapter), logits("tflite", adapter)
    assert compare_logits(onnx, tflite).rms_ratio < AGREEMENT
    assert compare_logits(onnx, plain).rms_ratio > LEARNED, "an adapter that is ignored would pass the line above"
    assert len(texts["onnx"]) == len(texts["tflite"]) == NEW_TOKENS
    for row, token in zip(tflite[len(prompt) - 1 : -1], texts["onnx"], strict=True):
        assert float(row.max() - row[token]) <= 0.1 * float(row.std())


def _run(python: Path, command: str, package: Path, container: str, *words: str) -> str:
    given = ["--package", str(package), "--container", container, "--threads", "1", "--json", *words]
    done = run_edge(python, command, *given, project=Path("/"))
    assert done.returncode == 0, done.stderr
    return done.stdout
