"""Adapters of the library in MLflow: one flat run for each training, composition or scoring.

They share an experiment with the champions. A run carries a key of base, adapter, event and figures, so that logging
twice changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.tracking import ensure_experiment, finished_run, log_numbers, open_client
from pipeline.tracking_adapters import EXPERIMENT


@dataclass(frozen=True, slots=True)
class AdapterEvent:
    """Something that was done with an adapter.

    Attributes:
        submodel: Whose adapter.
        name: In the library.
        action: ``train``, ``compose`` or ``score``.
        base_digest: Of its base.
        sha256: Of the adapter.
        params: Settings, for people.
        metrics: Single figures.
        history: Rows with ``step`` and any other figures.
    """

    submodel: str
    name: str
    action: str
    base_digest: str
    sha256: str
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    history: Sequence[Mapping[str, float]] = ()

    @property
    def key(self) -> str:
        """Same adapter, action and figures: same key."""
        figures = json.dumps([dict(self.metrics), [dict(row) for row in self.history]], sort_keys=True)
        digest = hashlib.sha256(figures.encode()).hexdigest()
        return f"{self.base_digest[:16]}-{self.sha256[:16]}-{self.action}-{digest[:16]}"


def track_adapter(store: Path, event: AdapterEvent) -> str:
    """Log an event, once, and return the run's id."""
    with open_client(store) as client:
        experiment_id = ensure_experiment(client, EXPERIMENT, store)
        run_id = finished_run(client, experiment_id, event.key)
        if run_id is not None:
            return run_id
        tags = {
            "submodel": event.submodel, "action": event.action, "base_digest": event.base_digest,
            "adapter": event.sha256, "key": event.key,
        }  # fmt: skip
        run_name = f"{event.submodel} {event.name} {event.action}"
        run_id = str(client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id)
        numbers = [(name, value, 0) for name, value in event.metrics.items()]
        numbers += [
            (name, value, int(row["step"])) for row in event.history for name, value in row.items() if name != "step"
        ]
        log_numbers(client, run_id, numbers, event.params)
        client.set_terminated(run_id)
    return run_id
