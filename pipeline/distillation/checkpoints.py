"""Training states on disk: written beside the training, whole or not at all, and checked before they are read.

``state-00000150.safetensors`` holds every trained parameter and both moments of AdamW. Its metadata
names the run it belongs to and a digest of its content. The two newest are kept.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from edge_runtime.formats.errors import UserError
from pipeline.progress import CONSOLE

History = list[dict[str, float]]
_KEPT, _FORMAT = 2, "1"
_NAME = "state-*.safetensors"


@dataclass(frozen=True, slots=True)
class TrainState:
    """What a run needs to go on: tensors lie on the CPU and belong to the state alone."""

    step: int
    history: History
    tensors: Mapping[str, torch.Tensor]


@contextmanager
def state_writer(directory: Path, identity: str, active: bool = True) -> Iterator[Callable[[TrainState], None]]:
    """A function that writes a state in a thread, one at a time; leaving the block waits for the last one.

    Args:
        directory: Of this run alone; what an earlier, killed run left half is removed.
        identity: Of the run; ``newest_state`` asks for the same.
        active: False: nothing is written, another process does it.

    Raises:
        UserError: The disk is full. Raised at the next state or at the end; earlier states are untouched.
    """
    if not active:
        yield lambda state: None
        return
    for partial in directory.glob("*.partial"):
        partial.unlink()
    with ThreadPoolExecutor(1, thread_name_prefix="checkpoint") as pool:
        pending: list[Future[None]] = []

        def write(state: TrainState) -> None:
            while pending:
                pending.pop().result()
            pending.append(pool.submit(write_state, directory, identity, state))

        yield write
        while pending:  # not after an exception: that one is to be told, and the pool waits for the thread anyway
            pending.pop().result()


def write_state(directory: Path, identity: str, state: TrainState) -> None:
    """Write one state under a temporary name, rename it, and remove all but the two newest.

    Raises:
        UserError: The disk is full.
    """
    path = directory / f"state-{state.step:08d}.safetensors"
    partial = path.with_suffix(".partial")
    metadata = {
        "format": _FORMAT, "identity": identity, "step": str(state.step), "history": json.dumps(state.history),
    }  # fmt: skip
    metadata["digest"] = _digest(metadata, ((name, state.tensors[name]) for name in sorted(state.tensors)))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(dict(state.tensors), partial, metadata=metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        if not _is_full(error):
            raise
        needed_bytes = sum(tensor.nbytes for tensor in state.tensors.values())
        raise UserError(
            "free disk", f"no space for the checkpoint of step {state.step}",
            f"{needed_bytes / 1e9:.2f} GB more at {directory}",
            "free some space; the same command goes on from the checkpoint before it",
        ) from error  # fmt: skip
    kept = sorted(found for found in directory.glob(_NAME) if found <= path)[-_KEPT:]
    for other in set(directory.glob(_NAME)).difference(kept):  # later ones were damaged, or they would have been read
        other.unlink()


def newest_state(directory: Path, identity: str, label: str) -> Path | None:
    """The newest whole state of this run, or None. A damaged one is named on stderr and passed over.

    Raises:
        UserError: A state belongs to another run: other settings, data or weights.
    """
    for path in sorted(directory.glob(_NAME), reverse=True):
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                digest = metadata.pop("digest", None)
                found = ((name, file.get_tensor(name)) for name in sorted(file.keys()))
                whole = digest == _digest(metadata, found)
        except (OSError, SafetensorError) as error:
            whole, reason = False, " ".join(str(error).split())[:120]
        else:
            reason = "its content is not what its digest says"
        if not whole:
            CONSOLE.print(f"{label}: checkpoint {path.name} is damaged ({reason}); it is passed over", markup=False)
            continue
        if metadata["identity"] != identity:
            raise UserError(
                "checkpoint", str(path), "one of the same settings, data and start weights",
                f"delete {directory} to start again, or choose another",
            )  # fmt: skip
        return path
    return None


@contextmanager
def open_state(path: Path) -> Iterator[tuple[int, History, Callable[[str], torch.Tensor]]]:
    """(step, history, tensor by name) of a state that ``newest_state`` found; one tensor is in memory at a time."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        yield int(metadata["step"]), json.loads(metadata["history"]), file.get_tensor


def discard_checkpoint(checkpoint: Path) -> None:
    """Remove what an unfinished run left, once its result is stored."""
    shutil.rmtree(checkpoint, ignore_errors=True)


def _digest(metadata: Mapping[str, str], tensors: Iterator[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in tensors:
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _is_full(error: Exception) -> bool:
    """Safetensors reports the system's error as text only."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in codes or any(os.strerror(code) in str(error) for code in codes)
