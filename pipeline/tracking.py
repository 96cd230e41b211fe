"""Runs, datasets and registered models in MLflow. The only import of mlflow.

Runs are flat, one a (submodel, container), because MLflow's chart page hides nested ones. Everything
is rebuilt from ``family.json``, so that it does not matter which stages DVC took from its cache, and
everything carries a key, so that registering twice changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.formats.errors import GateError, PackageError
from pipeline.tracking_ui import EXPERIMENT, PORT, chart_url, store_uri

TRAINING_EXPERIMENT = "sevenfold-training"
Family = Mapping[str, Any]
History = Sequence[Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class RegisterResult:
    """What registering a family came to.

    ``versions`` maps a submodel to its version of the registered model ``sevenfold-<submodel>``;
    ``champions`` names the submodels whose version here carries the alias ``champion``.
    """

    chart_url: str
    experiment_id: str
    new_runs: int
    versions: Mapping[str, int]
    champions: tuple[str, ...]


def register_family(
    family: Family,
    packages_dir: Path,
    store: Path,
    *,
    config_hash: str,
    histories: Mapping[str, History] | None = None,
    port: int = PORT,
) -> RegisterResult:
    """Log every measured package as a run and register the submodels that passed their gate.

    Args:
        family: The content of ``reports/family.json``, a ``gate`` in every submodel.
        packages_dir: Holds ``<submodel>/`` for every submodel.
        store: Directory of ``mlflow.db`` and ``mlruns/``.
        config_hash: Of the configuration that made the family.
        histories: By submodel, what training logged: ``step`` and any other numbers a row.
        port: Of the page that the link points to.

    Raises:
        GateError: Submodels failed their gate. Their runs are logged and the others registered; of
            them nothing is stored or registered.
        PackageError: A submodel that passed has no package; nothing was logged.
    """
    entries = [_entry(family, name, packages_dir, config_hash) for name in family["submodels"]]
    new_runs, versions, champions = 0, {}, []
    with open_client(store) as client:
        experiment_id = ensure_experiment(client, EXPERIMENT, store)
        for entry in entries:
            runs = [_ensure_run(client, experiment_id, entry, container) for container in _measured(entry.figures)]
            new_runs += sum(created for _, created in runs)
            if entry.package_dir is not None:
                model = ensure_logged_model(
                    client, experiment_id, entry.name, entry.package_dir, key=entry.key("model"), tags=entry.tags,
                    run_ids=[run_id for run_id, _ in runs], kind="sevenfold package",
                )  # fmt: skip
                versions[entry.name] = _ensure_version(client, entry, model)
                champions += [entry.name] if _assign_aliases(client, entry, versions[entry.name]) else []
        _log_histories(client, store, entries, histories or {})
    _refuse_failed(entries)
    return RegisterResult(chart_url(experiment_id, port), experiment_id, new_runs, versions, tuple(champions))


@contextmanager
def open_client(store: Path) -> Iterator[Any]:
    """A client of the store; telemetry is off before the import that would start it, third-party noise too."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    store.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        for source in ("mlflow", "sqlalchemy", "alembic", "pandas", "pydantic"):
            warnings.filterwarnings("ignore", module=rf"{source}(\.|$)")
        from mlflow import MlflowClient

        for source in ("mlflow", "alembic"):
            logging.getLogger(source).setLevel(logging.WARNING)
        yield MlflowClient(tracking_uri=store_uri(store), registry_uri=store_uri(store))


def ensure_experiment(client: Any, name: str, store: Path) -> str:
    """Id of an experiment whose artifacts lie in the store's own mlruns/."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    return str(client.create_experiment(name, artifact_location=(store.resolve() / "mlruns" / name).as_uri()))


def finished_run(client: Any, experiment_id: str, key: str) -> str | None:
    """Return the run with this key; one that a kill left unfinished is deleted."""
    finished = None
    for run in client.search_runs([experiment_id], filter_string=f"tags.key = '{key}'"):
        if run.info.status == "FINISHED":
            finished = str(run.info.run_id)
        else:
            client.delete_run(run.info.run_id)
    return finished


def log_numbers(client: Any, run_id: str, numbers: Sequence[tuple[str, float, int]], params: Mapping[str, Any]) -> None:
    """Log (name, value, step) and parameters of a run."""
    from mlflow.entities import Metric, Param

    metrics = [Metric(key, value, 0, step) for key, value, step in numbers]
    client.log_batch(run_id, params=[Param(key, str(value)) for key, value in params.items()])
    # MLflow takes a thousand a call.
    for start in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[start : start + 1000])


def log_figures(client: Any, run_id: str, figures: Mapping[str, float], step: int) -> str | None:
    """Log what a step came to, now; what went wrong in a line, or None."""
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    now_ms = time.time_ns() // 1_000_000
    try:
        client.log_batch(run_id, metrics=[Metric(name, value, now_ms, step) for name, value in figures.items()])
    except MlflowException as error:
        return " ".join(str(error).split())[:200]
    return None


def ensure_logged_model(
    client: Any, experiment_id: str, name: str, directory: Path, *,
    key: str, tags: Mapping[str, str], run_ids: Sequence[str], kind: str,
) -> Any:  # fmt: skip
    """Store a directory once, as the model that all of the runs measured."""
    from mlflow.entities import LoggedModelOutput

    for model in client.search_logged_models([experiment_id], filter_string=f"tags.key = '{key}'"):
        if str(model.status) == "READY":
            return model
        client.delete_logged_model(model.model_id)
    model = client.create_logged_model(experiment_id, name, run_ids[0], {**tags, "key": key}, model_type=kind)
    client.log_model_artifacts(model.model_id, str(directory))
    for run_id in run_ids:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return client.finalize_logged_model(model.model_id, "READY")


def ensure_version(client: Any, registered_name: str, model: Any, *, key: str, tags: Mapping[str, str]) -> int:
    """The version of a registered model with this key, made when there is none."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(registered_name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(f"name = '{registered_name}'"):
        if version.tags.get("key") == key:
            return int(version.version)
    # By location, not as models:/<id>, which the registry would look up in the process-wide default store.
    version = client.create_model_version(
        registered_name, model.artifact_location, model.source_run_id, tags={**tags, "key": key},
        model_id=model.model_id,
    )  # fmt: skip
    return int(version.version)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One submodel on its way into the store. ``package_dir`` is None when its gate failed."""

    name: str
    figures: Mapping[str, Any]
    dataset: Mapping[str, Any]
    package_dir: Path | None
    tags: Mapping[str, str]

    @property
    def passed(self) -> bool:
        return self.package_dir is not None

    @property
    def registered_name(self) -> str:
        return f"sevenfold-{self.name}"

    def key(self, *what: str) -> str:
        """Same configuration, same package bytes, same thing: same key."""
        return _digest([self.tags["config_hash"], self.tags["package"], self.name, *what])


def _entry(family: Family, name: str, packages_dir: Path, config_hash: str) -> _Entry:
    figures = family["submodels"][name]
    passed = bool(figures["gate"]["passed"])
    dataset = family.get("dataset") or {}
    tags = {
        "pipeline_run": str(family.get("pipeline_run", "")),
        "submodel": name,
        "config_hash": config_hash,
        "gate": "passed" if passed else "failed",
        "package": _package_digest(packages_dir / name) if passed else "refused",
        # Divergences compare only when teacher, text and what counts of its draws are the same.
        "yardstick": _digest([dataset, family.get("teacher"), figures.get("kept_share")]),
    }
    return _Entry(name, figures, dataset, packages_dir / name if passed else None, tags)


def _package_digest(package_dir: Path) -> str:
    files = sorted(path for path in package_dir.rglob("*") if path.is_file())
    if not files:
        raise PackageError(f"no package in {package_dir}")
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(package_dir).as_posix()}\0{digest}\n".encode())
    return total.hexdigest()


def _measured(figures: Mapping[str, Any]) -> list[str]:
    """Containers that were run."""
    return [name for name, package in figures["packages"].items() if package.get("perplexity") is not None]


def _ensure_run(client: Any, experiment_id: str, entry: _Entry, container: str) -> tuple[str, bool]:
    """Return (run id, whether it is new)."""
    key = entry.key("run", container)
    run_id = finished_run(client, experiment_id, key)
    if run_id is not None:
        return run_id, False
    quant = "int8" if container == "tflite_legacy" else "int4"
    tags = {**entry.tags, "key": key, "container": container, "quant": quant}
    run_id = client.create_run(experiment_id, run_name=f"{entry.name} {container}", tags=tags).info.run_id
    package = entry.figures["packages"][container]
    params = {key: entry.figures[key] for key in ("params", "fp16_weight_bytes")}
    params |= {key: package.get(key) for key in ("file_bytes", "weight_bytes")}
    log_numbers(client, run_id, [(key, value, 0) for key, value in _metrics(entry.figures, container)], params)
    _log_dataset(client, run_id, entry.dataset)
    client.set_terminated(run_id)
    return str(run_id), True


def _metrics(figures: Mapping[str, Any], container: str) -> Iterator[tuple[str, float]]:
    """What the chart page draws: six figures that it shows at once, the machine's own in its section below."""
    package = {**figures["packages"][container], "kl_to_teacher": figures.get("kl_to_teacher")}
    for name, key, unit in (
        ("kl_to_fp", "kl_to_fp", 1),
        ("kl_to_teacher", "kl_to_teacher", 1),
        ("perplexity", "perplexity", 1),
        ("size_mb", "file_bytes", 1e6),
        ("tokens_per_s", "tokens_per_s", 1),
        ("top1_to_fp", "top1_to_fp", 1),
        ("system/load_s", "load_s", 1),
        ("system/peak_rss_mb", "peak_rss_bytes", 1e6),
    ):
        if package.get(key) is not None:
            yield name, package[key] / unit


def _log_dataset(client: Any, run_id: str, counts: Mapping[str, Any]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name="held-out text",
        digest=_digest(counts),
        source_type="local",
        source=json.dumps({"uri": "artifacts/data"}),
        profile=json.dumps(counts),
    )
    client.log_inputs(run_id, [DatasetInput(dataset, tags=[InputTag("mlflow.data.context", "evaluation")])])


def _ensure_version(client: Any, entry: _Entry, model: Any) -> int:
    tags = {**entry.tags, "kl_to_teacher": str(entry.figures["kl_to_teacher"])}
    return ensure_version(client, entry.registered_name, model, key=entry.key("version"), tags=tags)


def _assign_aliases(client: Any, entry: _Entry, version: int) -> bool:
    """Name the newest version challenger, and champion when it deserves it; return whether it is champion.

    A version becomes champion when nobody is, or when it is nearer to the same teacher on the same
    held-out text. Divergences from different teachers or texts are not compared: the version stays
    challenger until a person moves the alias.
    """
    name = entry.registered_name
    aliases = client.get_registered_model(name).aliases
    if version > int(aliases.get("challenger", 0)):
        client.set_registered_model_alias(name, "challenger", str(version))
    holder = aliases.get("champion")
    if holder is not None and int(holder) != version:
        tags = client.get_model_version(name, holder).tags
        if tags.get("yardstick") != entry.tags["yardstick"]:
            return False
        found, best = entry.figures["kl_to_teacher"], tags["kl_to_teacher"]
        if "None" in (str(found), best) or not found < float(best):  # a tokenizer of its own leaves no KL
            return False
    client.set_registered_model_alias(name, "champion", str(version))
    return True


def _log_histories(client: Any, store: Path, entries: Sequence[_Entry], histories: Mapping[str, History]) -> None:
    """One run a submodel in an experiment of its own: curves would bury the family's bar charts."""
    logged = [entry for entry in entries if histories.get(entry.name)]
    if not logged:
        return
    experiment_id = ensure_experiment(client, TRAINING_EXPERIMENT, store)
    for entry in logged:
        rows = [dict(row) for row in histories[entry.name]]
        key = entry.key("history", _digest(rows))
        if finished_run(client, experiment_id, key) is not None:
            continue
        run = client.create_run(experiment_id, run_name=entry.name, tags={**entry.tags, "key": key})
        numbers = [(name, float(v), int(row["step"])) for row in rows for name, v in row.items() if name != "step"]
        log_numbers(client, run.info.run_id, numbers, {})
        client.set_terminated(run.info.run_id)


def _refuse_failed(entries: Sequence[_Entry]) -> None:
    failed = [
        f"{e.name}: {', '.join(e.figures['gate']['reasons']) or 'no reason given'}" for e in entries if not e.passed
    ]
    if failed:
        raise GateError(f"not registered, the gate failed for {'; '.join(failed)}")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
