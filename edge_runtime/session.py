"""From the words of the command line to a verified package with its backend open."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.backends import open_backend
from edge_runtime.config import choose_threads
from edge_runtime.formats.errors import BackendError, PackageError
from edge_runtime.probe import installed_runtimes, usable_cores

if TYPE_CHECKING:
    from edge_runtime.backends.base import Backend
    from edge_runtime.formats.package import Package

# Container to the runtimes (import names) that run it, in the order of preference of `auto`.
RUNTIMES_OF = {
    "onnx": ("onnxruntime",),
    "tflite": ("ai_edge_litert",),
    "tflite_legacy": ("ai_edge_litert", "tflite_runtime"),
}
CONTAINERS_OF = {"auto": tuple(RUNTIMES_OF), "onnx": ("onnx",), "tflite": ("tflite", "tflite_legacy")}
_INSTALL = {
    "onnx": "pip install onnxruntime",
    "tflite": "pip install ai-edge-litert",
    "tflite_legacy": "pip install ai-edge-litert",
}


@dataclass(frozen=True, slots=True)
class Opening:
    """What to open, as the user said it.

    Attributes:
        backend: A key of ``CONTAINERS_OF``.
        container: Exactly this container, or None to choose by ``backend``.
        threads: None takes every usable core.
        trust: Public keys to trust from now on.
    """

    package: Path
    backend: str = "auto"
    container: str | None = None
    adapter: Path | None = None
    allow_unbound: bool = False
    threads: int | None = None
    trust: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Session:
    """A verified package and its loaded backend.

    Attributes:
        note: Something the user should know about the choice of container, or None.
        verify_s: Seconds that signature and digests took.
        load_s: Seconds from the first import of the runtime to a backend that can run.
    """

    package: Package
    backend: Backend
    container: str
    threads: int
    note: str | None
    verify_s: float
    load_s: float


def open_verified(package: Path, trust: Collection[Path] = ()) -> Package:
    """Trust the given keys, then open a package with all the keys of this machine.

    Raises:
        SignatureError: The signature is missing, wrong, or not trusted here.
        PackageError: A file is not what the manifest says.
        UserError: A key file is no public key.
    """
    from edge_runtime.formats.package import open_package
    from edge_runtime.formats.signing import load_trust, trust_key

    for path in trust:
        trust_key(path)
    return open_package(package, load_trust())


@contextmanager
def open_session(opening: Opening) -> Iterator[Session]:
    """Verify the package, choose a container, load it, and release it at the end.

    Raises:
        SevenfoldError: Whatever of these cannot be done; one line each.
    """
    threads = choose_threads(opening.threads, usable_cores())
    started_s = time.perf_counter()
    package = open_verified(opening.package, opening.trust)
    verified_s = time.perf_counter()
    container, note = choose_container(opening.backend, opening.container, package.available, installed_runtimes())
    directory = package.container_directory(container)
    backend = open_backend(container, directory, package.manifest.decoder, threads=threads)
    try:
        if opening.adapter is not None:
            _attach_adapter(backend, package, opening.adapter, opening.allow_unbound)
        load_s = time.perf_counter() - verified_s
        yield Session(package, backend, container, threads, note, verified_s - started_s, load_s)
    finally:
        backend.close()


def choose_container(
    backend: str, container: str | None, available: Collection[str], runtimes: Mapping[str, str]
) -> tuple[str, str | None]:
    """The container to open, and a note when it is not the one the user would expect.

    Args:
        backend: A key of ``CONTAINERS_OF``.
        container: The user's explicit choice; never replaced by another.
        available: Containers of the package that are on this device.
        runtimes: Import names of the installed runtimes.

    Raises:
        PackageError: The package has none of the wanted containers here.
        BackendError: No installed runtime runs them.
    """
    wanted = CONTAINERS_OF[backend] if container is None else (container,)
    here = [name for name in wanted if name in available]
    if not here:
        held = " ".join(available) or "none"
        raise PackageError(
            f"the package holds no container {' or '.join(wanted)} here (it holds: {held}); choose one of those"
        )
    for name in here:
        runtime = next((runtime for runtime in RUNTIMES_OF[name] if runtime in runtimes), None)
        if runtime is not None:
            only_legacy = name == "tflite_legacy" and container is None
            return name, f"running container tflite_legacy with {runtime} {runtimes[runtime]}" if only_legacy else None
    installed = " ".join(runtimes) or "none"
    hint = (
        "--container tflite_legacy"
        if "tflite_runtime" in runtimes and "tflite_legacy" in available
        else _INSTALL[here[0]]
    )
    raise BackendError(f"no installed runtime runs container {' or '.join(here)} (installed: {installed}); try {hint}")


def _attach_adapter(backend: Backend, package: Package, directory: Path, allow_unbound: bool) -> None:
    from edge_runtime.formats.lora import load_adapter

    manifest = package.manifest
    adapter = load_adapter(directory, manifest.decoder, manifest.base_digest, allow_unbound=allow_unbound)
    backend.set_adapter(adapter)
