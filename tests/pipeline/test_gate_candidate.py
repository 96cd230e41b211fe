"""What a federation wrote is read with care: sizes, values, damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edge_runtime.formats.errors import AdapterError, PackageError, SevenfoldError, SignatureError, UserError
from edge_runtime.formats.lora import Adapter
from edge_runtime.formats.manifest import AdapterSlots
from pipeline.adapters.candidate import adapter_digest, open_candidate
from pipeline.adapters.champion import crown, keep_adapter
from tests.edge_runtime.fakes import SPEC, byte_tokenizer
from tests.pipeline.gate_cases import BASE_DIGEST, ledger_line, seal, write_candidate

WEIGHTS = "adapter_model.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj"


def make(seed: int = 0, digest: str = BASE_DIGEST) -> Adapter:
    random = np.random.default_rng(seed)
    pairs = {Q_PROJ: (random.random((2, 32), np.float32), random.random((32, 2), np.float32))}
    return Adapter(2, 0.5, pairs, digest)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Signed; nothing here runs it."""
    directory = tmp_path_factory.mktemp("package")
    (directory / "onnx").mkdir()
    (directory / "onnx" / "model.onnx").write_bytes(b"graph")
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    seal(directory, SPEC, bos=256, eos=(257,), containers={"onnx": AdapterSlots()})
    return directory


@pytest.fixture
def directory(tmp_path: Path, package: Path) -> Path:
    return write_candidate(tmp_path / "runs" / "demo" / "candidates" / "000003", make(), package)


def edit(directory: Path, **facts: Any) -> None:
    values = json.loads((directory / "candidate.json").read_text())
    (directory / "candidate.json").write_text(json.dumps(values | facts))


def test_what_was_written_is_read(directory: Path, package: Path) -> None:
    found = open_candidate(directory, None)
    assert (found.submodel, found.facts.federation, found.facts.round) == ("toy", "demo", 3)
    assert found.package.directory == package and found.curve == ()
    assert found.digest == adapter_digest(make()) != adapter_digest(make(1))
    assert np.array_equal(found.adapter.pairs[Q_PROJ][0], make().pairs[Q_PROJ][0])


def test_the_package_given_wins_over_the_one_named(directory: Path, package: Path) -> None:
    edit(directory, package="/nowhere")
    assert open_candidate(directory, package).package.directory == package
    with pytest.raises((PackageError, SignatureError)):
        open_candidate(directory, None)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"federation": "../../etc"}, "federation: ../../etc"),
        ({"federation": ""}, "federation"),
        ({"round": -1}, "round: -1"),
        ({"round": 2.5}, "round: 2.5"),
        ({"round": "3"}, "round: 3"),
        ({"round": 2**40}, "round"),
        ({"base_digest": "AB" * 32}, "base_digest"),
        ({"package": ""}, "package"),
        ({"held_out_loss": float("nan")}, "held_out_loss: nan"),
        ({"held_out_loss": "low"}, "held_out_loss: low"),
        ({"command": "rm"}, "command: rm"),
    ],
)
def test_a_fact_out_of_bounds_is_one_line(directory: Path, facts: dict[str, Any], says: str) -> None:
    edit(directory, **facts)
    with pytest.raises(UserError) as caught:
        open_candidate(directory, None)
    assert says in str(caught.value) and "candidate.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"federation": "demo"}', b"[" * 60_000])
def test_a_damaged_candidate_file_is_one_line(directory: Path, content: bytes) -> None:
    (directory / "candidate.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_candidate(directory, None)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_files_that_are_missing_or_endless_are_one_line(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a directory with candidate\.json"):
        open_candidate(tmp_path / "absent", None)
    with pytest.raises(UserError, match=r"a directory with candidate\.json"):
        open_candidate(directory / WEIGHTS, None)
    with (directory / "candidate.json").open("r+b") as file:
        file.truncate(1 << 34)  # sparse
    with pytest.raises(UserError, match="at most 65536 bytes"):
        open_candidate(directory, None)


def test_a_damaged_adapter_is_refused(directory: Path) -> None:
    whole = (directory / WEIGHTS).read_bytes()
    for content in (b"", whole[:-1], whole[:30]):
        (directory / WEIGHTS).write_bytes(content)
        with pytest.raises(AdapterError, match="damaged"):
            open_candidate(directory, None)
    (directory / WEIGHTS).write_bytes(whole)
    tensors = load_file(directory / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, directory / WEIGHTS, metadata={"base_digest": BASE_DIGEST})
    with pytest.raises(AdapterError, match="not finite"):
        open_candidate(directory, None)


def test_a_package_nobody_here_signed_is_refused(directory: Path, package: Path, tmp_path: Path) -> None:
    (tmp_path / "forged").mkdir()
    for name in ("manifest.json", "tokenizer.json"):
        (tmp_path / "forged" / name).write_bytes((package / name).read_bytes())
    with pytest.raises(SignatureError):
        open_candidate(directory, tmp_path / "forged")


def test_the_curve_is_that_of_the_rounds_before_the_candidate(directory: Path) -> None:
    lines = [ledger_line(1, bytes_up=float("inf")), ledger_line(2, loss_after=None, held_out_loss=4.5), ledger_line(4)]
    other = '{"event": "attempt", "round": 2}\n{"event": "round", "round": "2"}\n{"event": "round", "round": true}\n'
    (directory.parent.parent / "ledger.jsonl").write_text(other + "".join(lines) + "torn")
    first, second = open_candidate(directory, None).curve
    assert first == {
        "step": 1, "loss_before": 4.0, "loss_after": 4.9 - 1, "bytes_down": 10, "dispersion": 0.5, "folded": 3,
        "bytes_total": 10,
    }  # fmt: skip
    assert (second["step"], second["held_out_loss"], second["bytes_total"]) == (2, 4.5, 120)
    assert "loss_after" not in second and "epsilon" not in second


@pytest.mark.parametrize("line", ["{", "[1]", '"round"', "[" * 100_000])
def test_a_damaged_ledger_is_one_line_that_names_it(directory: Path, line: str) -> None:
    (directory.parent.parent / "ledger.jsonl").write_text(ledger_line(1) + line + "\n" + ledger_line(2))
    with pytest.raises(SevenfoldError, match=r"ledger\.jsonl line 2") as caught:
        open_candidate(directory, None)
    assert "\n" not in str(caught.value)


class TestChampionLink:
    def crown(self, adapters: Path, seed: int) -> Path:
        return crown(keep_adapter(adapters, make(seed), adapter_digest(make(seed))))

    def test_points_to_the_last_and_keeps_the_one_before(self, tmp_path: Path) -> None:
        folders = [self.crown(tmp_path, seed).resolve() for seed in range(3)]
        assert {path.name for path in tmp_path.iterdir()} == {"champion", folders[1].name, folders[2].name}
        assert (tmp_path / "champion").resolve() == folders[2]

    def test_twice_is_once(self, tmp_path: Path) -> None:
        before = self.crown(tmp_path, 0).lstat()
        assert self.crown(tmp_path, 0).lstat() == before

    def test_is_there_at_every_moment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The change is one rename: whatever fails before it leaves the former champion."""
        former = self.crown(tmp_path, 0).resolve()
        monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
        with pytest.raises(OSError, match="power cut"):
            self.crown(tmp_path, 1)
        assert (tmp_path / "champion").resolve() == former and former.is_dir()
        monkeypatch.undo()
        assert self.crown(tmp_path, 1).resolve() != former
