"""A candidate on disk: what a federation says of it, its adapter, and the curve of its rounds.

``runs/<federation>/candidates/<round>/`` holds PEFT's files and ``candidate.json``; ``runs/<federation>/ledger.jsonl``
holds a line for every event. All of it was written by another program, so sizes and values are bounded here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_runtime.formats.errors import UserError
from edge_runtime.formats.lora import Adapter, encode_adapter, load_adapter
from edge_runtime.formats.package import Package, open_package
from edge_runtime.formats.signing import load_trust

CANDIDATE_FILE, LEDGER_FILE = "candidate.json", "ledger.jsonl"
MAX_CANDIDATE_BYTES, MAX_LEDGER_BYTES = 1 << 16, 64 << 20
# Figures of a round that make a curve; a round leaves out what it did not measure.
CURVES = ("loss_before", "loss_after", "held_out_loss", "bytes_up", "bytes_down", "epsilon", "dispersion", "folded")


class CandidateFacts(BaseModel):
    """What candidate.json says.

    Attributes:
        round: The round that the adapter was taken after.
        package: The package that the federation trained for, as it was configured.
        held_out_loss: As the devices measured it, or None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    federation: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    round: Annotated[int, Field(ge=0, lt=2**31)]
    base_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    package: Annotated[str, Field(min_length=1, max_length=4096)]
    held_out_loss: Annotated[float, Field(allow_inf_nan=False)] | None


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter on trial for one package.

    Attributes:
        digest: sha256 (hex) of the adapter as we write it; equal adapters have equal digests.
        curve: Finite figures by round, up to the candidate's own; empty without a ledger.
    """

    directory: Path
    facts: CandidateFacts
    package: Package
    adapter: Adapter
    digest: str
    curve: tuple[Mapping[str, float], ...]

    @property
    def submodel(self) -> str:
        """Name of the package, which names the adapter's folder and registered model."""
        return self.package.manifest.name


def open_candidate(directory: Path, package: Path | None) -> Candidate:
    """Read a candidate and the package that it is meant for.

    Args:
        directory: The candidate's.
        package: Instead of the one that candidate.json names.

    Raises:
        UserError: candidate.json or the ledger is missing, too long or says something not allowed.
        PackageError: The package is not signed by a key trusted here, or damaged.
        AdapterError: The adapter is damaged, not finite, or belongs to another base.
    """
    facts = _read_facts(directory / CANDIDATE_FILE)
    opened = open_package(package or Path(facts.package), load_trust())
    manifest = opened.manifest
    if facts.base_digest != manifest.base_digest:
        raise UserError(
            "candidate", f"an adapter of base {facts.base_digest[:12]}", f"one of base {manifest.base_digest[:12]}",
            f"give the package that federation {facts.federation} trained for: package=DIR",
        )  # fmt: skip
    adapter = load_adapter(directory, manifest.decoder, manifest.base_digest)
    curve = tuple(_curve(directory.absolute().parent.parent / LEDGER_FILE, facts.round))
    return Candidate(directory, facts, opened, adapter, adapter_digest(adapter), curve)


def adapter_digest(adapter: Adapter) -> str:
    """sha256 (hex) over the files that we would write of it."""
    digest = hashlib.sha256()
    for name, content in sorted(encode_adapter(adapter).items()):
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _read_facts(path: Path) -> CandidateFacts:
    raw = _read_bounded(path, MAX_CANDIDATE_BYTES)
    if raw is None:
        raise UserError("candidate", str(path.parent), f"a directory with {CANDIDATE_FILE}, as a federation writes it")
    try:
        return CandidateFacts.model_validate_json(raw)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or CANDIDATE_FILE
        raise UserError(str(path), f"{where}: {str(fault['input'])[:60]}", fault["msg"]) from None


def _curve(path: Path, last_round: int) -> Iterator[dict[str, float]]:
    """The committed rounds of a ledger up to ``last_round``: ``step`` and the finite figures of CURVES."""
    lines = (_read_bounded(path, MAX_LEDGER_BYTES) or b"").split(b"\n")
    total_bytes = 0.0
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line end was cut by a crash
        record = _record(path, number, line)
        if record.get("event") != "round" or not _is_number(record.get("round")) or record["round"] > last_round:
            continue
        figures = {name: float(record[name]) for name in CURVES if _is_number(record.get(name))}
        total_bytes += figures.get("bytes_up", 0.0) + figures.get("bytes_down", 0.0)
        yield {"step": float(record["round"]), **figures, "bytes_total": total_bytes}


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{path} line {number}", repr(line[:60]), "one JSON object a line", "move the ledger away")
    return record


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15 and math.isfinite(value)


def _read_bounded(path: Path, max_bytes: int) -> bytes | None:
    """The file's bytes, or None when there is none."""
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(path.name, str(path), f"a readable file ({error.strerror})") from None
    if len(raw) > max_bytes:
        raise UserError(path.name, str(path), f"at most {max_bytes} bytes")
    return raw
