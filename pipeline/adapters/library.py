"""The adapter library of a submodel: PEFT directories under names, and an index of what is known of them.

``<adapters>/library/<name>/`` holds an adapter, ``<adapters>/library/index.json`` a record of each: its base, shape,
licence, digest, where it comes from and how it scores on each variant of its base. An adapter is only ever read
together with its digest, so one that was changed behind the index' back is refused.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.errors import AdapterError, UserError
from edge_runtime.formats.files import write_atomically
from edge_runtime.formats.lora import Adapter, load_adapter, save_adapter
from pipeline.adapters.candidate import adapter_digest
from pipeline.adapters.champion import CHAMPION_LINK

LIBRARY_FOLDER, INDEX_FILE = "library", "index.json"
MAX_INDEX_BYTES = 16 << 20
Kind = Literal["trained", "recovery", "composed", "imported"]
_NAME = re.compile(r"^[a-z0-9][a-z0-9_.-]{0,63}$")
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Figure = Annotated[float, Field(allow_inf_nan=False)]


class Record(BaseModel):
    """What the index knows of an adapter.

    Attributes:
        name: Its folder's.
        kind: ``trained`` on text, ``recovery`` of what 4 bits cost, ``composed`` of others, or ``imported``.
        base_digest: ``base_digest`` of the package it runs on.
        base_variant: What it was trained on, ``int4`` or ``fp``.
        rank: r.
        scale: alpha / r.
        targets: Projections that carry it.
        licence: Of what it was trained on.
        sha256: Over the files that we would write of it.
        source: Where it comes from, for people: text, or names and weights.
        figures: Of its making: held-out loss or KL before and after, error of a composition.
        scores: Variant of the base (``fp``, ``onnx``, ``tflite``) to figures.
        refused: Variant to the reason why it cannot carry the adapter.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=_NAME.pattern)]
    kind: Kind
    base_digest: _Digest
    base_variant: Literal["int4", "fp"]
    rank: Annotated[int, Field(ge=1)]
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    targets: tuple[str, ...]
    licence: str
    sha256: _Digest
    source: str
    figures: Mapping[str, _Figure] = {}
    scores: Mapping[str, Mapping[str, _Figure]] = {}
    refused: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class Origin:
    """What ``add_adapter`` cannot read from the adapter; fields as in ``Record``."""

    kind: Kind
    base_variant: Literal["int4", "fp"]
    licence: str
    source: str
    figures: Mapping[str, float]


def list_records(adapters: Path) -> list[Record]:
    """The library of a submodel by name; empty when there is none.

    Args:
        adapters: ``artifacts/adapters/<submodel>``.

    Raises:
        UserError: The index is damaged.
    """
    path = adapters / LIBRARY_FOLDER / INDEX_FILE
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_INDEX_BYTES + 1)
    except FileNotFoundError:
        return []
    try:
        if len(raw) > MAX_INDEX_BYTES:
            raise ValueError(f"longer than {MAX_INDEX_BYTES} bytes")
        return [Record.model_validate(entry) for entry in json.loads(raw)["adapters"]]
    except ValidationError as error:
        fault = error.errors()[0]
        reason = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
    raise UserError(str(path), reason[:200], "an index that stage=adapter wrote", "move it away")


def find_record(adapters: Path, name: str) -> Record:
    """The record of an adapter.

    Raises:
        UserError: There is none of this name.
    """
    records = {record.name: record for record in list_records(adapters)}
    if name not in records:
        known = ", ".join(records) or "none yet"
        raise UserError("adapter.name", name, f"a name in the library: {known}", "list them with action=list")
    return records[name]


def open_adapter(adapters: Path, name: str, spec: DecoderSpec, base_digest: str) -> Adapter:
    """An adapter of the library, checked against its base and its digest.

    Raises:
        UserError: There is none of this name.
        AdapterError: It belongs to another base, or is not the one that the index describes.
    """
    record = find_record(adapters, name)
    adapter = load_adapter(adapters / LIBRARY_FOLDER / name, spec, base_digest)
    if adapter_digest(adapter) != record.sha256:
        raise AdapterError(
            f"{adapters / LIBRARY_FOLDER / name}: is not the adapter that {INDEX_FILE} describes; remove it"
            " (action=remove) and add it again"
        )
    return adapter


def add_adapter(adapters: Path, name: str, adapter: Adapter, origin: Origin) -> Record:
    """Write an adapter under a new name, then its record. The same adapter again under its name changes nothing.

    Raises:
        UserError: The name is not one, or another adapter has it.
        AdapterError: The adapter names no base, or holds what no reader takes.
    """
    if not _NAME.fullmatch(name) or name == CHAMPION_LINK:
        raise UserError("adapter.name", name, "1 to 64 of a-z 0-9 _ . - and not champion", "choose another name")
    record = Record(
        name=name, base_digest=str(adapter.base_digest), rank=adapter.rank, scale=adapter.scale,
        targets=tuple(dict.fromkeys(module.rpartition(".")[2] for module in adapter.pairs)),
        sha256=adapter_digest(adapter), **asdict(origin),
    )  # fmt: skip
    records = list_records(adapters)
    former = next((known for known in records if known.name == name), None)
    if former is not None and former.sha256 != record.sha256:
        raise UserError(
            "adapter.name", name, "a name that the library does not hold",
            f"choose another, or take it away: action=remove adapter.name={name}",
        )  # fmt: skip
    save_adapter(adapters / LIBRARY_FOLDER / name, adapter)
    if former is None:
        _write_index(adapters, [*records, record])
    return former or record


def record_scores(
    adapters: Path, name: str, scores: Mapping[str, Mapping[str, float]], refused: Mapping[str, str]
) -> Record:
    """Put scores by variant into an adapter's record; variants that were not tried keep theirs.

    Raises:
        UserError: There is none of this name.
    """
    former = find_record(adapters, name)
    tried = {*scores, *refused}
    kept = {variant: figures for variant, figures in former.scores.items() if variant not in tried}
    still = {variant: reason for variant, reason in former.refused.items() if variant not in tried}
    record = former.model_copy(update={"scores": {**kept, **scores}, "refused": {**still, **refused}})
    _write_index(adapters, [record if known.name == name else known for known in list_records(adapters)])
    return record


def remove_adapter(adapters: Path, name: str, *, even_champion: bool = False) -> Record:
    """Take an adapter out of the library: its record first, then its folder.

    Args:
        adapters: ``artifacts/adapters/<submodel>``.
        name: Its name.
        even_champion: Also when it is the champion; the champion's own folder stays.

    Raises:
        UserError: There is none of this name, or it is the champion.
    """
    record = find_record(adapters, name)
    if not even_champion and is_champion(adapters, record):
        raise UserError(
            "adapter.name", name, "an adapter that is not champion", "add adapter.force=true to remove it all the same"
        )
    _write_index(adapters, [known for known in list_records(adapters) if known.name != name])
    shutil.rmtree(adapters / LIBRARY_FOLDER / name, ignore_errors=True)
    return record


def is_champion(adapters: Path, record: Record) -> bool:
    """Whether the champion of this submodel is this adapter; its folder is named after its digest."""
    link = adapters / CHAMPION_LINK
    return link.is_symlink() and record.sha256.startswith(link.readlink().name)


def _write_index(adapters: Path, records: list[Record]) -> None:
    ordered = [record.model_dump(mode="json") for record in sorted(records, key=lambda record: record.name)]
    content: dict[str, Any] = {"format": 1, "adapters": ordered}
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_atomically(adapters / LIBRARY_FOLDER / INDEX_FILE, text.encode())
