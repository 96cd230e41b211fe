"""Who may import whom, who needs what: the contracts of pyproject.toml hold, and they can break."""

from __future__ import annotations

import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_import_contracts_hold() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("path", "line", "contract"),
    [
        ("edge_runtime/formats/errors.py", "import rich", "formats depends on numpy"),
        ("edge_runtime/backends/base.py", "import torch", "torch stays in pipeline"),
        ("edge_runtime/backends/base.py", "import pipeline.report", "know nothing of the pipeline"),
        ("edge_runtime/formats/int4.py", "import edge_runtime.backends.base", "downward only"),
        ("server/__init__.py", "import edge_runtime.backends.base", "edge_runtime.formats only"),
        ("server/__init__.py", "def lazy():\n    import torch", "torch stays in pipeline"),
        ("pipeline/__init__.py", "import mlflow", "mlflow is imported"),
        ("pipeline/__init__.py", "import edge_runtime.scheduler", "pipeline imports formats"),
        ("server/__init__.py", "import flwr", "flwr is imported"),
        ("edge_runtime/backends/base.py", "import transformers", "workstation's libraries"),
    ],
)
def test_a_forbidden_import_breaks_its_contract(tmp_path: Path, path: str, line: str, contract: str) -> None:
    write_skeleton(tmp_path)
    assert lint_imports(tmp_path).returncode == 0
    (tmp_path / path).write_text(line + "\n")
    result = lint_imports(tmp_path)
    broken = [text for text in " ".join(result.stdout.split()).split("KEPT") if "BROKEN" in text]
    assert result.returncode == 1
    assert any(contract in text for text in broken), result.stdout


def test_an_edge_installation_asks_for_no_workstation_library() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["edge"]]
    names = {text.split(";")[0].split("=")[0].split(">")[0].split("<")[0].strip() for text in wanted}
    assert names == {
        *("ai-edge-litert", "cryptography", "flwr", "jinja2", "numpy", "onnxruntime", "rich", "safetensors"),
        "tokenizers",
    }


def test_constraints_are_exact_and_installable_from_any_index() -> None:
    for name in ("constraints.txt", "constraints-legacy.txt"):
        pins = [text for text in (ROOT / name).read_text().splitlines() if not text.startswith("#")]
        assert all(text.count("==") == 1 and "+" not in text for text in pins), name
        names = [text.split("==")[0].lower().replace("_", "-") for text in pins]
        assert len(names) == len(set(names)), name


def test_a_test_that_reaches_for_the_network_fails() -> None:
    with socket.socket() as outbound, pytest.raises(RuntimeError, match="without a network"):
        outbound.connect(("192.0.2.1", 80))


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env={"COLUMNS": "400"})


def write_skeleton(folder: Path) -> None:
    """The smallest tree that satisfies every contract."""
    (folder / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    packages = ("edge_runtime", "edge_runtime/formats", "edge_runtime/backends", "edge_runtime/scheduler")
    for package in (*packages, "pipeline", "pipeline/report", "server"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").touch()
    for module in ("edge_runtime/formats/errors.py", "edge_runtime/formats/int4.py", "edge_runtime/backends/base.py"):
        (folder / module).touch()
