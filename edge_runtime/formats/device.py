"""What a device is: the numbers that choose a submodel and a container for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """One device, as found at one moment. A value that the device does not tell is None.

    Attributes:
        cores: Processors that this process may use.
        cpu_features: Instruction sets that matter for int8 and int4 arithmetic.
        memory_bytes: Main memory, or the control group's limit where that is lower.
        memory_available_bytes: What could be used without swapping.
        disk_free_bytes: On the file system that was asked about.
        runtimes: Distribution (``onnxruntime``) to its installed version.
    """

    system: str
    machine: str
    python: str
    cpu_model: str | None
    cores: int
    cpu_features: tuple[str, ...]
    memory_bytes: int | None
    memory_available_bytes: int | None
    disk_bytes: int
    disk_free_bytes: int
    runtimes: Mapping[str, str]

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self) | {"cpu_features": list(self.cpu_features)}
