"""The door for devices of other machines: their requests pass whole, the operator's do not pass at all."""

from __future__ import annotations

import datetime
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from edge_runtime.formats.errors import UserError
from server import gateway
from server.certificates import ensure_certificates
from server.home import Home, open_home
from server.page import serve_in_thread
from server.superlink import SuperLink


class Upstream:
    """Stands for the SuperLink and remembers what reached it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, str], bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.seen.append((scope["path"], headers, body))
        await send({"type": "http.response.start", "status": 418, "headers": [(b"x-answer", b"yes")]})
        await send({"type": "http.response.body", "body": body[::-1], "more_body": True})
        await send({"type": "http.response.body", "body": b"."})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = open_home(tmp_path_factory.mktemp("gateway") / "home", create=True)
    ensure_certificates(home, [], datetime.datetime.now(datetime.UTC))
    return home


@pytest.fixture(scope="module")
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture(scope="module")
def door(home: Home, upstream: Upstream) -> Iterator[str]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    certificate, key = str(home.root / "server.crt"), str(home.root / "server.key")
    config = uvicorn.Config(
        upstream,
        log_level="warning",
        lifespan="off",
        ws="none",
        loop="asyncio",
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    link = SuperLink(f"127.0.0.1:{listener.getsockname()[1]}", 0)
    with (
        serve_in_thread(config, listener, "upstream"),
        gateway.serve_gateway(home, link, "127.0.0.1", 0) as address,
    ):
        yield address


@pytest.fixture
def client(home: Home, door: str) -> Iterator[httpx.Client]:
    context = ssl.create_default_context(cafile=str(home.ca_certificate))
    with httpx.Client(base_url=f"https://{door}", verify=context, trust_env=False) as client:
        yield client


def test_a_devices_request_and_its_answer_pass_whole(client: httpx.Client, upstream: Upstream) -> None:
    body = bytes(range(256)) * 20_000
    reply = client.post("/v1/fleet/push-object", content=body, headers={"x-signature": "abc"})
    assert (reply.status_code, reply.headers["x-answer"], reply.content) == (418, "yes", body[::-1] + b".")
    path, headers, seen = upstream.seen[-1]
    assert (path, headers["x-signature"], seen) == ("/v1/fleet/push-object", "abc", body)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run", "/v1/runtime/push-messages", "/health", "/", "/v1/fleet/", "//v1/fleet/x",
        "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run", "/v1/fleet/a/b",
        "/v1/fleet/pull%0aobject", "/V1/fleet/x",
    ],
)  # fmt: skip
def test_nothing_else_passes(client: httpx.Client, upstream: Upstream, path: str) -> None:
    before = len(upstream.seen)
    request = client.build_request("POST", "/x")
    request.url = request.url.copy_with(raw_path=path.encode())
    assert client.send(request).status_code == 404
    assert len(upstream.seen) == before


def test_only_posts_pass(client: httpx.Client, upstream: Upstream) -> None:
    before = len(upstream.seen)
    assert {client.request(method, "/v1/fleet/pull-messages").status_code for method in ("GET", "PUT", "DELETE")} == {
        404
    }
    assert len(upstream.seen) == before


def test_a_body_beyond_the_bound_is_refused(
    client: httpx.Client, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "MAX_BODY_BYTES", 1000)
    before = len(upstream.seen)
    assert client.post("/v1/fleet/push-object", content=b"x" * 1001).status_code == 413
    assert client.post("/v1/fleet/push-object", content=b"x" * 1000).status_code == 418
    assert [len(body) for _, _, body in upstream.seen[before:] if len(body) > 1000] == []


def test_a_superlink_that_is_away_is_a_bad_gateway(home: Home) -> None:
    context = ssl.create_default_context(cafile=str(home.ca_certificate))
    with (
        gateway.serve_gateway(home, SuperLink("127.0.0.1:9", 0), "127.0.0.1", 0) as address,
        httpx.Client(base_url=f"https://{address}", verify=context, trust_env=False) as client,
    ):
        assert client.post("/v1/fleet/pull-messages").status_code == 502


def test_an_address_that_is_not_ours_is_refused(home: Home, tmp_path: Path) -> None:
    for host in ("192.0.2.1", "nowhere.invalid"):
        with pytest.raises(UserError, match="--listen"), gateway.serve_gateway(home, SuperLink("x:1", 0), host, 9444):
            pass
