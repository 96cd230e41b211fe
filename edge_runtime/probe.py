"""Find out what this device has, without importing a single runtime."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path

from edge_runtime.formats.device import DeviceProfile

# Import name to the distributions that provide it; the first one found names the version.
RUNTIMES: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-qnn"),
    "ai_edge_litert": ("ai-edge-litert", "ai-edge-litert-nightly"),
    "tflite_runtime": ("tflite-runtime",),
}

# x86: dot products and matrix units; Arm: the same under its names.
_FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
    "sve2",
    "bf16",
)
_CPU_NAMES = ("model name", "hardware", "model", "cpu model")


def probe_device(disk: Path, root: Path = Path("/")) -> DeviceProfile:
    """Describe this device.

    Args:
        disk: A path on the file system whose free space matters.
        root: Where ``proc`` and ``sys`` are found.
    """
    cpu = _read_pairs(root / "proc/cpuinfo")
    memory = _read_pairs(root / "proc/meminfo")
    flags = set((cpu.get("flags") or cpu.get("features") or "").split())
    usage = shutil.disk_usage(disk)
    return DeviceProfile(
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        python=platform.python_version(),
        cpu_model=next((cpu[name] for name in _CPU_NAMES if cpu.get(name)), None),
        cores=usable_cores(),
        cpu_features=tuple(feature for feature in _FEATURES if feature in flags),
        memory_bytes=_least(_kibibytes(memory.get("memtotal")), _control_group_limit(root)),
        memory_available_bytes=_kibibytes(memory.get("memavailable")),
        disk_bytes=usage.total,
        disk_free_bytes=usage.free,
        runtimes=installed_runtimes(),
    )


def installed_runtimes() -> dict[str, str]:
    """Import name to version of every inference runtime that is installed here."""
    found: dict[str, str] = {}
    for module, distributions in RUNTIMES.items():
        for distribution in distributions:
            try:
                found.setdefault(module, importlib.metadata.version(distribution))
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def usable_cores() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_rss_bytes(root: Path = Path("/")) -> int | None:
    """Most memory this process ever had resident, in bytes; None where the system does not tell.

    Linux: VmHWM, because ``ru_maxrss`` there starts from the size of the process that forked us.
    """
    if high_water := _kibibytes(_read_pairs(root / "proc/self/status").get("vmhwm")):
        return high_water
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def describe(profile: DeviceProfile) -> str:
    """A table for people."""
    runtimes = ", ".join(f"{name} {version}" for name, version in profile.runtimes.items())
    rows = {
        "system": f"{profile.system}, {profile.machine}, Python {profile.python}",
        "processor": f"{profile.cpu_model or 'unknown'}, {profile.cores} usable cores",
        "features": " ".join(profile.cpu_features) or "none that matter here",
        "memory": f"{_gigabytes(profile.memory_bytes)}, {_gigabytes(profile.memory_available_bytes)} available",
        "disk": f"{_gigabytes(profile.disk_bytes)}, {_gigabytes(profile.disk_free_bytes)} free",
        "runtimes": runtimes or "none; install one: pip install onnxruntime, or ai-edge-litert",
    }
    return "\n".join(f"{name:<10} {value}" for name, value in rows.items())


def _read_pairs(path: Path) -> Mapping[str, str]:
    """The first value of every ``key : value`` line, keys in lower case; empty when the file does not exist."""
    pairs: dict[str, str] = {}
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return pairs
    for line in text.splitlines():
        key, _, value = line.partition(":")
        pairs.setdefault(key.strip().lower(), value.strip())
    return pairs


def _kibibytes(value: str | None) -> int | None:
    """``"8123456 kB"`` in bytes."""
    digits = (value or "").removesuffix("kB").strip()
    return int(digits) * 1024 if digits.isdecimal() else None


def _control_group_limit(root: Path) -> int | None:
    try:
        text = (root / "sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _least(*values: int | None) -> int | None:
    return min((value for value in values if value is not None), default=None)


def _gigabytes(size_bytes: int | None) -> str:
    return "unknown" if size_bytes is None else f"{size_bytes / 1e9:.1f} GB"
