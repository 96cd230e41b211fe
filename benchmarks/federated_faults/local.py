"""The same federation without a network and undisturbed: residents in this process, on the LocalGrid."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.federated_faults.device import HONEST, Responder, misbehaving, open_resident
from benchmarks.federated_faults.digits import DigitsTrainer, Tokens, digits_layout, write_text
from edge_runtime.federated.stopping import Stop
from edge_runtime.formats.envelope import Envelope
from edge_runtime.formats.layout import Factors
from edge_runtime.formats.manifest import Manifest
from server.config import FederationConfig
from server.federation import Federation, open_federation
from server.local_grid import LocalGrid
from server.rounds import run_federation
from server.server_app import FlowerTransport, from_record, to_record

Conduct = Callable[[str, int], str]


def run_undisturbed(
    config: FederationConfig,
    manifest: Manifest,
    trainer: DigitsTrainer,
    text: Mapping[str, Tokens],
    directory: Path,
    conduct: Conduct = lambda name, number: HONEST,
    contributors: Mapping[int, Sequence[str]] | None = None,
) -> Federation:
    """Every round of a federation, in one go.

    Args:
        config: Of the federation; its package is not read.
        manifest: Of the base.
        trainer: Over it.
        text: Each device's images, by name.
        directory: Of devices and server; fresh.
        conduct: (device, round) to what it does to its answer.
        contributors: Round to the devices that take part; others are away in that round. None: everyone.
    """
    layout = digits_layout(manifest.base_digest, config.adapter.ranks, config.adapter.alpha)
    with contextlib.ExitStack() as stack:
        handlers = {}
        for node, (name, rows) in enumerate(sorted(text.items()), 1):
            (directory / name / "text").mkdir(parents=True)
            write_text(rows, directory / name / "text" / "images.jsonl")
            opened = open_resident(directory / name, manifest, trainer, Stop(), lambda line: None)
            resident, _ = stack.enter_context(opened)
            respond = misbehaving(resident.handle, lambda number, name=name: conduct(name, number))
            handlers[node] = _on_records(_present(respond, name, contributors))
        transport = FlowerTransport(LocalGrid(handlers))
        federation = open_federation(
            config, layout, directory / "server", transport, clock=time.time, sleep=time.sleep
        )  # fmt: skip
        run_federation(federation)
        return federation


def adapter_of(federation: Federation) -> Factors:
    """What the federation offers as its candidate."""
    return federation.state.factors(averaged=True)


def _present(respond: Responder, name: str, contributors: Mapping[int, Sequence[str]] | None) -> Responder:
    def answer(envelope: Envelope) -> Envelope:
        number = envelope.header.get("round")
        if contributors is not None and envelope.kind == "plan" and name not in contributors[int(str(number))]:
            raise ConnectionError(f"{name} is away in round {number}")
        return respond(envelope)

    return answer


def _on_records(respond: Responder):
    return lambda record: to_record(respond(from_record(record)))
