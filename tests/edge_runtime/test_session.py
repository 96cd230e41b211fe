"""Which container runs, and what a device is found to be."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from edge_runtime import backends
from edge_runtime.formats.errors import BackendError, PackageError, SevenfoldError
from edge_runtime.probe import describe, installed_runtimes, peak_rss_bytes, probe_device
from edge_runtime.session import Opening, choose_container, open_session
from tests.edge_runtime import fakes

ALL = ("onnx", "tflite", "tflite_legacy")
ORT, LITERT, OLD = {"onnxruntime": "1.32"}, {"ai_edge_litert": "2.3"}, {"tflite_runtime": "2.14.0"}

CPUINFO = (
    "processor\t: 0\nmodel name\t: Toy CPU\nflags\t\t: fpu avx2 avx512_vnni\n\nprocessor\t: 1\nmodel name\t: Other\n"
)
MEMINFO = "MemTotal:        8000000 kB\nMemFree:  1 kB\nMemAvailable:    6000000 kB\n"


@pytest.mark.parametrize(
    ("backend", "container", "available", "runtimes", "chosen"),
    [
        ("auto", None, ALL, ORT | LITERT | OLD, "onnx"),
        ("auto", None, ALL, LITERT, "tflite"),
        ("auto", None, ("tflite", "tflite_legacy"), ORT | LITERT, "tflite"),
        ("auto", None, ALL, OLD, "tflite_legacy"),
        ("auto", None, ("onnx", "tflite_legacy"), LITERT, "tflite_legacy"),
        ("onnx", None, ALL, ORT | LITERT, "onnx"),
        ("tflite", None, ALL, ORT | LITERT, "tflite"),
        ("tflite", None, ALL, ORT | OLD, "tflite_legacy"),
        ("auto", "tflite_legacy", ALL, ORT | LITERT, "tflite_legacy"),
        ("onnx", "tflite", ALL, ORT | LITERT, "tflite"),
    ],
)
def test_the_first_container_that_is_here_and_runs_is_chosen(
    backend: str, container: str | None, available: tuple[str, ...], runtimes: dict[str, str], chosen: str
) -> None:
    found, note = choose_container(backend, container, available, runtimes)
    assert found == chosen
    assert (note is not None) == (chosen == "tflite_legacy" and container is None)


def test_a_replacement_is_said_aloud_with_its_runtime() -> None:
    _, note = choose_container("tflite", None, ALL, OLD)
    assert note == "running container tflite_legacy with tflite_runtime 2.14.0"


@pytest.mark.parametrize(
    ("backend", "container", "available", "runtimes", "error", "says"),
    [
        ("onnx", None, ("tflite",), ORT | LITERT, PackageError, "no container onnx here .it holds: tflite"),
        ("auto", "gguf", ALL, ORT, PackageError, "no container gguf"),
        ("auto", None, (), ORT, PackageError, "it holds: none"),
        ("auto", None, ALL, {}, BackendError, "installed: none.*pip install onnxruntime"),
        ("auto", "tflite", ALL, OLD, BackendError, "try --container tflite_legacy"),
        ("onnx", None, ALL, LITERT, BackendError, "pip install onnxruntime"),
        ("tflite", None, ("tflite",), ORT, BackendError, "pip install ai-edge-litert"),
    ],
)
def test_an_explicit_choice_is_never_replaced(
    backend: str,
    container: str | None,
    available: tuple[str, ...],
    runtimes: dict[str, str],
    error: type[SevenfoldError],
    says: str,
) -> None:
    with pytest.raises(error, match=says):
        choose_container(backend, container, available, runtimes)


def test_a_session_closes_its_backend_even_when_the_adapter_fails(
    package_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[fakes.TableBackend] = []

    class Remembering(fakes.TableBackend):
        @classmethod
        def open(cls, *arguments: object, **options: object) -> fakes.TableBackend:
            opened.append(fakes.TableBackend())
            return opened[-1]

    monkeypatch.setattr(fakes, "Remembering", Remembering, raising=False)
    monkeypatch.setitem(backends.OPENERS, "onnx", (fakes.__name__, "Remembering", None))
    with open_session(Opening(package_dir, threads=1)) as session:
        assert (session.backend, session.container, session.threads) == (opened[0], "onnx", 1)
        assert not opened[0].closed
    assert opened[0].closed
    failing = Opening(package_dir, adapter=tmp_path / "absent")
    with pytest.raises(SevenfoldError, match="absent"), open_session(failing):
        pass
    assert opened[1].closed


def test_an_unknown_container_has_no_backend(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no backend reads it"):
        backends.open_backend("gguf", tmp_path, fakes.SPEC, threads=1)


def test_a_device_is_read_from_its_own_files(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(CPUINFO)
    (tmp_path / "proc/meminfo").write_text(MEMINFO)
    profile = probe_device(tmp_path, root=tmp_path)
    assert (profile.cpu_model, profile.cpu_features) == ("Toy CPU", ("avx2", "avx512_vnni"))
    assert (profile.memory_bytes, profile.memory_available_bytes) == (8_192_000_000, 6_144_000_000)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("1000000000\n")
    assert probe_device(tmp_path, root=tmp_path).memory_bytes == 1_000_000_000
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert probe_device(tmp_path, root=tmp_path).memory_bytes == 8_192_000_000


def test_what_a_device_does_not_tell_is_unknown(tmp_path: Path) -> None:
    profile = probe_device(tmp_path, root=tmp_path)
    assert (profile.cpu_model, profile.memory_bytes, profile.cpu_features) == (None, None, ())
    assert "unknown" in describe(profile)
    assert json.loads(json.dumps(profile.to_dict()))["memory_bytes"] is None


def test_installed_runtimes_are_those_of_the_package_metadata() -> None:
    assert installed_runtimes()["onnxruntime"] == importlib.metadata.version("onnxruntime")


def test_peak_memory_is_the_high_water_mark(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("Name:\tx\nVmPeak:\t 9 kB\nVmHWM:\t    2048 kB\n")
    assert peak_rss_bytes(tmp_path) == 2048 * 1024
