"""The same facts as the fleet page, for Prometheus: read from the files at every scrape, nothing is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edge_runtime.formats.errors import UserError
from server.home import Home
from server.registry import enrolled
from server.superlink import find_superlink
from server.view import FederationView, number, read_federations

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MOST_DEVICES = 1000  # a label value each; a larger fleet is on the page
_PER_FEDERATION = ("federation",)
_GAUGES = {
    "dispersion": ("dispersion", "1 - |mean update|^2 / mean |update|^2 of the last round, in [0, 1]"),
    "update_norm": ("update_norm", "Norm of what the last round changed"),
    "epsilon": ("epsilon", "Privacy spent so far, at the configured delta"),
    "last_round_folded": ("folded", "Updates in the last round's mean"),
    "last_round_planned": ("planned", "Devices asked in the last round"),
    "last_commit_timestamp_seconds": ("time", "When the last round was committed"),
}


def render_metrics(home: Home) -> bytes:
    """Everything in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_HomeCollector(home))
    return generate_latest(registry)


class _HomeCollector(Collector):
    """prometheus_client's interface around the functions below."""

    def __init__(self, home: Home) -> None:
        self.home = home

    def collect(self) -> Iterable[Metric]:
        yield from _home_metrics(self.home)
        views = read_federations(self.home)
        yield from _progress_metrics(views)
        yield from _traffic_metrics(views)
        yield from _device_metrics(views)


def _home_metrics(home: Home) -> Iterator[Metric]:
    try:
        find_superlink(home)
        is_up = 1.0
    except UserError:
        is_up = 0.0
    yield GaugeMetricFamily("sevenfold_superlink_up", "Whether the SuperLink answers", value=is_up)
    states = GaugeMetricFamily("sevenfold_devices", "Devices in the registry", labels=("state",))
    try:
        devices = enrolled(home)
    except UserError:  # a damaged file: the page says which
        devices = []
    revoked = sum(device.revoked for device in devices)
    states.add_metric(("enrolled",), len(devices) - revoked)
    states.add_metric(("revoked",), revoked)
    yield states


def _progress_metrics(views: Iterable[FederationView]) -> Iterator[Metric]:
    rounds = GaugeMetricFamily("sevenfold_round", "Last committed round", labels=_PER_FEDERATION)
    wanted = GaugeMetricFamily("sevenfold_rounds_wanted", "Rounds that there shall be", labels=_PER_FEDERATION)
    loss = GaugeMetricFamily(
        "sevenfold_loss", "Mean token loss (nats): before and after local steps, held out", labels=("federation", "of")
    )
    versions = GaugeMetricFamily(
        "sevenfold_adapter_version", "Round that made a group of factors", labels=("federation", "group")
    )
    seconds = GaugeMetricFamily(
        "sevenfold_round_seconds", "Where the last round's time went", labels=("federation", "part")
    )
    gauges = {
        name: GaugeMetricFamily(f"sevenfold_{name}", meaning, labels=_PER_FEDERATION)
        for name, (_, meaning) in _GAUGES.items()
    }
    for view in views:
        last = view.rounds[-1] if view.rounds else {}
        rounds.add_metric((view.name,), view.round)
        wanted.add_metric((view.name,), view.wanted_rounds or 0)
        for of, key in (("before", "loss_before"), ("after", "loss_after"), ("held_out", "held_out_loss")):
            _add(loss, (view.name, of), view.latest(key))
        _add_all(versions, view.name, last.get("versions"))
        _add_all(seconds, view.name, last.get("seconds"))
        for name, (key, _) in _GAUGES.items():
            _add(gauges[name], (view.name,), number(last.get(key)))
    yield from (rounds, wanted, loss, versions, seconds, *gauges.values())


def _traffic_metrics(views: Iterable[FederationView]) -> Iterator[Metric]:
    traffic = CounterMetricFamily("sevenfold_bytes", "Bytes on the wire", labels=("federation", "direction"))
    folded = CounterMetricFamily("sevenfold_updates_folded", "Updates in a mean", labels=_PER_FEDERATION)
    lost = CounterMetricFamily("sevenfold_updates_lost", "Plans without an answer", labels=_PER_FEDERATION)
    declined = CounterMetricFamily("sevenfold_updates_declined", "Declines", labels=("federation", "reason"))
    refused = CounterMetricFamily("sevenfold_updates_refused", "Refusals", labels=("federation", "reason"))
    repeated = CounterMetricFamily("sevenfold_attempts_abandoned", "Rounds tried again", labels=_PER_FEDERATION)
    candidates = CounterMetricFamily("sevenfold_candidates", "Candidate adapters", labels=("federation", "verdict"))
    for view in views:
        traffic.add_metric((view.name, "up"), view.total("bytes_up"))
        traffic.add_metric((view.name, "down"), view.total("bytes_down"))
        folded.add_metric((view.name,), view.total("folded"))
        lost.add_metric((view.name,), view.total("lost"))
        _add_all(declined, view.name, view.reasons("declined"))
        _add_all(refused, view.name, view.reasons("refused"))
        repeated.add_metric((view.name,), sum(event.get("event") == "abandoned" for event in view.events))
        verdicts = [verdict for _, verdict in view.candidates]
        _add_all(candidates, view.name, {verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))})
    yield from (traffic, folded, lost, declined, refused, repeated, candidates)


def _device_metrics(views: Iterable[FederationView]) -> Iterator[Metric]:
    labels = ("federation", "device")
    last = GaugeMetricFamily("sevenfold_device_last_round", "Round of a device's last outcome", labels=labels)
    step = GaugeMetricFamily("sevenfold_device_step_seconds", "Seconds of a local step", labels=labels)
    folded = CounterMetricFamily("sevenfold_device_folded", "Updates of a device in a mean", labels=labels)
    for view in views:
        for device in view.devices[:MOST_DEVICES]:
            where = (view.name, str(device.get("name"))[:64])
            _add(last, where, number(device.get("last_round")))
            _add(step, where, number(device.get("step_s")))
            _add(folded, where, number(device.get("folded")))
    yield from (last, step, folded)


def _add(family: GaugeMetricFamily | CounterMetricFamily, labels: tuple[str, ...], value: float | None) -> None:
    if value is not None:
        family.add_metric(labels, value)


def _add_all(family: GaugeMetricFamily | CounterMetricFamily, federation: str, values: object) -> None:
    for key, value in values.items() if isinstance(values, Mapping) else ():
        _add(family, (federation, str(key)[:64]), number(value))
