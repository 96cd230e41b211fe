"""The line above every table: machine, versions and commit."""

from __future__ import annotations

import subprocess
from pathlib import Path

from edge_runtime.probe import probe_device

_VERSIONS = ("torch", "onnxruntime", "ai-edge-litert")


def heading(title: str) -> str:
    """Markdown lines that say what was measured where."""
    from importlib.metadata import version

    device = probe_device(Path())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    memory = f"{(device.memory_bytes or 0) / 2**30:.0f} GiB"
    versions = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in _VERSIONS)
    return (
        f"### {title}\n\n{device.cpu_model}, {device.cores} cores, {memory}, {device.system}; {versions}; "
        f"commit {commit.stdout.strip() or 'unknown'}\n"
    )
