"""The fleet page: what the files say, escaped, bounded, and from this machine alone."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_runtime.formats.errors import UserError
from server.home import Home, open_home
from server.metrics import render_metrics
from server.page import make_app, make_chart, serve_in_background
from server.view import bytes_text, read_federation, read_federations

DASHBOARD = Path(__file__).resolve().parents[2] / "docs" / "grafana" / "federation.json"
NASTY = "<script>alert(1)</script>\"'&"


def round_record(number: int, **changes: Any) -> dict[str, Any]:
    record = {
        "event": "round", "round": number, "phase": "b", "phase_reason": "in turn", "planned": 3, "folded": 2,
        "declined": {"battery": 1}, "refused": {"norm": 2}, "lost": 1, "bytes_up": 1000, "bytes_down": 2000,
        "loss_before": 5.0, "loss_after": 5.0 - number / 10, "held_out_loss": 4.9 - number / 10, "dispersion": 0.25,
        "update_norm": 1.5, "epsilon": 0.5 * number,
        "seconds": {"push": 0.1, "wait": 2.0, "fold": 0.01, "commit": 0.02},
        "versions": {"a": 0, "b": number}, "adapter_sha256": "ab" * 32, "attempt": 0, "time": 1.9e9 + number,
    }  # fmt: skip
    return record | changes


def device(name: str = "pi") -> dict[str, Any]:
    return {
        "node": 1, "name": name, "rank": 4, "trainer": "onnx", "sequences": 70, "step_s": 0.02, "last_round": 2,
        "last_outcome": "folded", "folded": 2, "declined": 0, "refused": 0, "lost": 0,
    }  # fmt: skip


def write(home: Home, name: str, records: list[dict[str, Any]], devices: list[Any] | None = None) -> Path:
    folder = home.run(name)
    folder.mkdir(parents=True)
    (folder / "ledger.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {"name": name, "rounds": 9, "privacy": {"delta": 1e-5, "noise": "central"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "devices.json").write_text(json.dumps([device()] if devices is None else devices))
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home(tmp_path / "home", create=True)


class Client:
    """The application without a socket."""

    def __init__(self, home: Home, base_url: str = "http://127.0.0.1") -> None:
        self.home, self.base_url = home, base_url

    def request(self, method: str, path: str) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(make_app(self.home))
            async with httpx.AsyncClient(transport=transport, base_url=self.base_url) as client:
                return await client.request(method, path)

        return asyncio.run(ask())

    def get(self, path: str) -> httpx.Response:
        return self.request("GET", path)


@pytest.fixture
def client(home: Home) -> Client:
    return Client(home)


BASELINE = {"event": "baseline", "time": 1.9e9, "held_out_loss": 5.25}


def test_the_page_shows_what_the_ledger_says(home: Home, client: Client) -> None:
    folder = write(home, "demo", [BASELINE, round_record(1), round_record(2), {"event": "candidate", "round": 2}])
    (folder / "gates.jsonl").write_text('{"round": 2, "verdict": "champion"}\n')
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", client.get("/").text))
    for shown in (
        "round 2 / 9", "4.7000 from 5.2500", "bytes up 2.0 kB", "bytes down 4.0 kB", "battery 2", "norm 4",
        "1.00 at delta 1e-05", "a 0, b 2", "round 2: champion", "pi 4 onnx 70", "SuperLink down",
    ):  # fmt: skip
        assert shown in text, shown


def test_everything_is_escaped(home: Home, client: Client) -> None:
    nasty = round_record(1, phase=NASTY, phase_reason=NASTY, declined={NASTY: 1}, refused={NASTY: 1},
                         adapter_sha256=NASTY, versions={NASTY: 1}, folded=NASTY, lost=NASTY)  # fmt: skip
    events = [{"event": "abandoned", "round": NASTY, "reason": NASTY}, {"event": "failed", "reason": NASTY}]
    write(home, "demo", [nasty, *events], [device(NASTY) | {"last_outcome": NASTY, "trainer": NASTY, "rank": NASTY}])
    page = client.get("/")
    assert page.status_code == 200 and "&lt;script&gt;" in page.text
    assert "<script" not in page.text and "alert(1)</" not in page.text
    assert client.get("/metrics").status_code == 200


def test_no_script_and_nothing_from_elsewhere(home: Home, client: Client) -> None:
    write(home, "demo", [round_record(1)])
    page = client.get("/")
    assert "<script" not in page.text and not re.search(r"(?:https?:)?//[a-z]", page.text)
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert '<meta http-equiv="refresh" content="5">' in page.text
    assert "prefers-color-scheme: dark" in page.text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_the_page_is_read_only(client: Client, method: str) -> None:
    assert {client.request(method, path).status_code for path in ("/", "/metrics", "/api/rounds.json")} == {405}


def test_no_other_site_can_read_it_through_a_name_of_its_own(home: Home) -> None:
    assert Client(home, "http://evil.example").get("/").status_code == 400


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/redoc", "/../ca.key", "/templates/fleet.html.j2"])
def test_nothing_else_is_served(client: Client, path: str) -> None:
    assert client.get(path).status_code == 404


def test_half_written_and_damaged_files_are_left_out(home: Home, client: Client) -> None:
    folder = write(home, "demo", [round_record(1), round_record(2)])
    ledger = folder / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes() + b'{"event":"round","round":3,"bytes_')
    assert read_federation(folder).round == 2
    ledger.write_bytes(ledger.read_bytes() + b'\nnonsense\n[1]\n{"event":"round","round":"x"}\n\xff\xfe\n')
    for name, text in (("devices.json", '[{"name": "pi"'), ("config.json", "[]")):
        (folder / name).write_text(text)
    view = read_federation(folder)
    assert (view.round, view.devices, view.settings) == (2, [], {})
    assert client.get("/").status_code == 200


def test_odd_values_do_not_break_the_page(home: Home, client: Client) -> None:
    odd = dict.fromkeys(round_record(1), None) | {"event": "round", "round": 1}
    infinite = dict.fromkeys(round_record(1), float("inf")) | {"event": "round", "round": 2}
    text = dict.fromkeys(round_record(1), "x") | {"event": "round", "round": 3}
    write(home, "demo", [odd, infinite, text, {"event": "baseline", "held_out_loss": "x"}], [{}, 3, {"name": None}])
    for path in ("/", "/metrics", "/api/rounds.json"):
        assert client.get(path).status_code == 200, path


def test_a_round_recorded_twice_counts_once(home: Home) -> None:
    folder = write(home, "demo", [round_record(1), round_record(1), round_record(2)])
    assert read_federation(folder).total("bytes_up") == 2000


def test_states_follow_the_last_event(home: Home) -> None:
    end, resume = {"event": "end"}, {"event": "resume", "round": 9}
    cases = {
        "waiting": [{"event": "start"}],
        "running": [{"event": "start"}, round_record(1)],
        "ended": [round_record(9), end],
        "failed": [round_record(1), {"event": "failed", "reason": "x"}],
    }
    for state, records in cases.items():
        assert read_federation(write(home, state, records)).state == state
    assert read_federation(write(home, "again", [*cases["failed"], resume])).state == "running"


def test_rounds_as_json_are_those_of_the_ledger(home: Home, client: Client) -> None:
    write(home, "demo", [round_record(1), round_record(2)])
    write(home, "other", [])
    assert client.get("/api/rounds.json").json() == {"demo": [round_record(1), round_record(2)], "other": []}
    assert list(client.get("/api/rounds.json?federation=other").json()) == ["other"]
    assert client.get("/healthz").json() == {"status": "ok"}


def test_an_empty_home_says_what_to_type(client: Client) -> None:
    assert "python -m server run federation=demo" in client.get("/").text


def test_federations_that_were_put_aside_are_not_shown(home: Home) -> None:
    write(home, "demo", [])
    write(home, ".demo.1", [])
    assert [view.name for view in read_federations(home)] == ["demo"]


def test_metrics_are_the_ledgers_sums(home: Home) -> None:
    write(home, "demo", [round_record(1), round_record(2), {"event": "abandoned", "round": 3}])
    lines = render_metrics(home).decode().splitlines()
    for line in (
        'sevenfold_round{federation="demo"} 2.0', 'sevenfold_bytes_total{direction="up",federation="demo"} 2000.0',
        'sevenfold_updates_refused_total{federation="demo",reason="norm"} 4.0', "sevenfold_superlink_up 0.0",
        'sevenfold_loss{federation="demo",of="held_out"} 4.7', 'sevenfold_epsilon{federation="demo"} 1.0',
        'sevenfold_attempts_abandoned_total{federation="demo"} 1.0',
        'sevenfold_device_folded_total{device="pi",federation="demo"} 2.0',
    ):  # fmt: skip
        assert line in lines, line


def test_the_dashboard_asks_for_metrics_that_exist_and_for_all_of_them(home: Home) -> None:
    write(home, "demo", [round_record(1), {"event": "candidate", "round": 1}])
    exported = set(re.findall(r"^# TYPE (\S+)", render_metrics(home).decode(), re.MULTILINE))
    dashboard = json.loads(DASHBOARD.read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"sevenfold_[a-z_]+", target["expr"])
    }
    assert asked == exported
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_curves_stay_inside_the_picture_and_fall_when_the_loss_falls() -> None:
    chart = make_chart([("held out", "held", [(0, 5.0), (5, 4.0), (10, 4.5)]), ("none", "after", [])])
    assert chart is not None and [label for label, _, _ in chart.lines] == ["held out"]
    points = [tuple(map(float, point.split(","))) for point in chart.lines[0][2].split()]
    assert points[0][1] < points[2][1] < points[1][1], "SVG grows downwards"
    assert all(56 <= x <= 640 and 0 <= y <= 220 for x, y in points)
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)
    assert make_chart([("held out", "held", [])]) is None
    assert make_chart([("held out", "held", [(1, 5.0)])]) is not None


def test_it_listens_on_the_loopback_interface_and_refuses_a_taken_port(home: Home) -> None:
    with serve_in_background(home, 0) as address:
        assert address.startswith("http://127.0.0.1:")
        port = int(address.rstrip("/").rpartition(":")[2])
        with pytest.raises(UserError, match="--page-port"), serve_in_background(home, port):
            pass


def test_bytes_are_readable() -> None:
    assert [bytes_text(count) for count in (0, 999, 1500, 2.5e6, 3e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "3000.0 GB",
    ]
