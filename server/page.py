"""The fleet page: read-only, from the files of a home alone, without scripts and without anything from elsewhere."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from jinja2 import Environment, FileSystemLoader
from starlette.middleware.trustedhost import TrustedHostMiddleware

from edge_runtime.formats.errors import UserError
from server.home import Home
from server.metrics import CONTENT_TYPE, render_metrics
from server.registry import enrolled
from server.superlink import find_superlink
from server.view import FederationView, bytes_text, number, read_federations, reasons_text

HOST = "127.0.0.1"
SHOWN_ROUNDS, SHOWN_DEVICES, MOST_API_ROUNDS = 30, 200, 1000
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 220, 56, 26
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True, slots=True)
class Chart:
    """Loss curves as SVG coordinates.

    Attributes:
        lines: (label, class, points of a polyline).
        dots: (x, y, title) of every measured point.
        ticks_y: (y, text).
        ticks_x: (x, text).
    """

    lines: tuple[tuple[str, str, str], ...]
    dots: tuple[tuple[float, float, str], ...]
    ticks_y: tuple[tuple[float, str], ...]
    ticks_x: tuple[tuple[float, str], ...]


def make_app(home: Home) -> FastAPI:
    """The page, ``/metrics``, ``/healthz`` and ``/api/rounds.json``."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # A page elsewhere must not read this one through a name that resolves to 127.0.0.1.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    template = _environment().get_template("fleet.html.j2")

    @app.middleware("http")
    async def add_headers(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    @app.get("/", response_class=HTMLResponse)
    def fleet() -> str:
        return template.render(_context(home, datetime.now(UTC)))

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(render_metrics(home), media_type=CONTENT_TYPE)

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/api/rounds.json")
    def rounds(federation: str = Query("", max_length=64)) -> JSONResponse:
        views = [view for view in read_federations(home) if federation in ("", view.name)]
        return JSONResponse(
            {view.name: [_finite(record) for record in view.rounds[-MOST_API_ROUNDS:]] for view in views}
        )

    return app


@contextlib.contextmanager
def serve_in_background(home: Home, port: int) -> Iterator[str]:
    """Serve the page from a thread; yields its address.

    Raises:
        UserError: The port is taken.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise UserError("--page-port", port, "a free port", "name another, or end what listens there") from error
    config = uvicorn.Config(
        make_app(home), log_level="warning", access_log=False, lifespan="off", ws="none", loop="asyncio"
    )
    with serve_in_thread(config, listener, "fleet-page"):
        yield f"http://{HOST}:{listener.getsockname()[1]}/"


@contextlib.contextmanager
def serve_in_thread(config: uvicorn.Config, listener: socket.socket, name: str) -> Iterator[None]:
    """Serve until exit; the socket is closed then."""
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name=name, daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        if not server.started:
            raise RuntimeError(f"the {name} did not start")
        yield
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()


def make_chart(curves: Sequence[tuple[str, str, Sequence[tuple[int, float]]]]) -> Chart | None:
    """Lay curves of (label, class, (round, loss) points) into the picture; None when nothing can be drawn."""
    points = [point for _, _, curve in curves for point in curve]
    if not points:
        return None
    first, last = min(index for index, _ in points), max(index for index, _ in points)
    low, high = min(value for _, value in points), max(value for _, value in points)
    margin = (high - low) * 0.08 or 0.05
    low, high = low - margin, high + margin

    def place(index: float, value: float) -> tuple[float, float]:
        x = _LEFT + (index - first) / max(last - first, 1) * (_WIDTH - _LEFT - 12)
        return round(x, 1), round(8 + (high - value) / (high - low) * (_HEIGHT - _BOTTOM - 8), 1)

    lines = tuple(
        (label, style, " ".join(f"{x},{y}" for x, y in (place(*point) for point in curve)))
        for label, style, curve in curves
        if curve
    )
    dots = tuple(
        (*place(index, value), f"round {index}: {label} {value:.4f}")
        for label, _, curve in curves
        for index, value in curve[-200:]
    )
    values = [low + (high - low) * part / 4 for part in range(5)]
    indices = sorted({first + (last - first) * part // 4 for part in range(5)})
    return Chart(
        lines,
        dots,
        tuple((place(first, value)[1], f"{value:.3g}") for value in values),
        tuple((place(index, low)[0], str(index)) for index in indices),
    )


def _environment() -> Environment:
    folder = Path(__file__).resolve().parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=lambda value: bytes_text(number(value) or 0.0),
        reasons=lambda value: reasons_text(value) if isinstance(value, dict) else "",
        loss=_loss_text,
        seconds=_seconds_text,
    )
    return environment


def _context(home: Home, now: datetime) -> dict[str, Any]:
    try:
        link = find_superlink(home).address
    except UserError:
        link = None
    try:
        devices, fault = enrolled(home), ""
    except UserError as error:
        devices, fault = [], str(error)
    views = sorted(read_federations(home), key=lambda view: view.last_time or 0, reverse=True)
    return {
        "now": now.strftime("%Y-%m-%d %H:%M:%S UTC"),
        "link": link,
        "enrolled": [device.name for device in devices if not device.revoked],
        "revoked": [device.name for device in devices if device.revoked],
        "fault": fault,
        "federations": [_federation_context(view) for view in views],
        "size": {"width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "bottom": _BOTTOM},
    }


def _federation_context(view: FederationView) -> dict[str, Any]:
    curves = [
        ("held out", "held", view.curve("held_out_loss")),
        ("on the devices, after their steps", "after", view.curve("loss_after")),
    ]
    versions = view.rounds[-1].get("versions") if view.rounds else None
    privacy = view.settings.get("privacy")
    return {
        "view": view,
        "chart": make_chart(curves),
        "held_out": view.latest("held_out_loss"),
        "start": next((value for index, value in view.curve("held_out_loss") if index == 0), None),
        "epsilon": view.latest("epsilon"),
        "delta": privacy.get("delta") if isinstance(privacy, dict) else None,
        "noise": isinstance(privacy, dict) and privacy.get("noise") not in (None, "none"),
        "versions": versions if isinstance(versions, dict) else {},
        "declined": view.reasons("declined"),
        "refused": view.reasons("refused"),
        "abandoned": [event for event in view.events if event.get("event") == "abandoned"],
        "rounds": list(reversed(view.rounds))[:SHOWN_ROUNDS],
        "devices": sorted(view.devices, key=lambda device: str(device.get("name")))[:SHOWN_DEVICES],
        "hidden_devices": max(len(view.devices) - SHOWN_DEVICES, 0),
        "last": "" if view.last_time is None else _time_text(view.last_time),
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null stands for both."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and number(value) is None else value


def _loss_text(value: object) -> str:
    found = number(value)
    return "–" if found is None else f"{found:.4f}"


def _seconds_text(value: object) -> str:
    parts = [number(part) or 0.0 for part in value.values()] if isinstance(value, dict) else []
    return f"{sum(parts):.1f}" if parts else "–"


def _time_text(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return ""
