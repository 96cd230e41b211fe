"""Champion adapters in MLflow: one flat run a candidate that passed, one version of its submodel's adapter.

Kept by ``stage=gate`` alone. The registered model is ``sevenfold-<submodel>-adapter``; its alias ``champion`` only
moves to a higher version. Everything carries a key made of base and adapter, so that twice changes nothing and an
interrupted registration is completed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.tracking import (
    ensure_experiment,
    ensure_logged_model,
    ensure_version,
    finished_run,
    log_numbers,
    open_client,
)

EXPERIMENT = "sevenfold-adapters"


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """A version of a submodel's adapter.

    Attributes:
        adapter_digest: Of the adapter as we write it.
        counter: Of the package that it was judged on.
        directory: Where the store keeps its files.
    """

    version: int
    base_digest: str
    adapter_digest: str
    counter: int
    directory: Path


@dataclass(frozen=True, slots=True)
class NewAdapter:
    """An adapter's way into the store: ``tags`` hold at least ``base_digest``, ``adapter`` and ``counter``.

    Attributes:
        run_name: For people.
        metrics: Single figures.
        curve: Rows with ``step`` and any other figures.
    """

    submodel: str
    run_name: str
    tags: Mapping[str, str]
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    curve: Sequence[Mapping[str, float]]

    @property
    def key(self) -> str:
        """Same base, same adapter: same key."""
        return f"{self.tags['base_digest'][:16]}-{self.tags['adapter'][:16]}"


def registered_name(submodel: str) -> str:
    """Name of the registered model."""
    return f"sevenfold-{submodel}-adapter"


def list_adapters(store: Path, submodel: str) -> tuple[list[AdapterVersion], AdapterVersion | None]:
    """(every version in the order of their numbers, the champion or None)."""
    name = registered_name(submodel)
    with open_client(store) as client:
        models = client.search_registered_models(filter_string=f"name = '{name}'")
        if not models:
            return [], None
        found = sorted(
            (_adapter_version(client, entry) for entry in client.search_model_versions(f"name = '{name}'")),
            key=lambda entry: entry.version,
        )
        champion = client.get_registered_model(name).aliases.get("champion")
    return found, next((entry for entry in found if champion is not None and entry.version == int(champion)), None)


def register_champion(store: Path, adapter: NewAdapter, directory: Path) -> int:
    """Log a candidate that passed, store its directory, make it challenger and champion; return its version."""
    with open_client(store) as client:
        experiment_id = ensure_experiment(client, EXPERIMENT, store)
        run_id = _ensure_run(client, experiment_id, adapter)
        model = ensure_logged_model(
            client, experiment_id, registered_name(adapter.submodel), directory,
            key=adapter.key, tags=adapter.tags, run_ids=[run_id], kind="sevenfold adapter",
        )  # fmt: skip
        name = registered_name(adapter.submodel)
        version = ensure_version(client, name, model, key=adapter.key, tags=adapter.tags)
        aliases = client.get_registered_model(name).aliases
        for alias in ("challenger", "champion"):
            if version > int(aliases.get(alias, 0)):
                client.set_registered_model_alias(name, alias, str(version))
    return version


def _adapter_version(client: Any, entry: Any) -> AdapterVersion:
    location = client.get_model_version_download_uri(entry.name, entry.version)
    return AdapterVersion(
        int(entry.version),
        entry.tags.get("base_digest", ""),
        entry.tags.get("adapter", ""),
        int(entry.tags.get("counter", 0)),
        Path(unquote(urlsplit(location).path)),
    )


def _ensure_run(client: Any, experiment_id: str, adapter: NewAdapter) -> str:
    run_id = finished_run(client, experiment_id, adapter.key)
    if run_id is None:
        tags = {**adapter.tags, "key": adapter.key}
        run_id = str(client.create_run(experiment_id, run_name=adapter.run_name, tags=tags).info.run_id)
        log_numbers(client, run_id, list(_numbers(adapter)), adapter.params)
        client.set_terminated(run_id)
    return run_id


def _numbers(adapter: NewAdapter) -> Iterator[tuple[str, float, int]]:
    for name, value in adapter.metrics.items():
        yield name, value, 0
    for row in adapter.curve:
        for name, value in row.items():
            if name != "step":
                yield f"round/{name}", value, int(row["step"])
