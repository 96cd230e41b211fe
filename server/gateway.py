"""The door for devices elsewhere: TLS in front of the SuperLink, and through it nothing but Flower's Fleet API.

The SuperLink answers its Control API on the same port as devices, without passwords: whoever reaches it can start
any app on this machine. Therefore it listens on the loopback interface alone, and this passes on the requests that
devices make, each of which the SuperLink authenticates by the device's registered key.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from typing import Any

import httpx
import uvicorn

from edge_runtime.formats.envelope import MAX_PAYLOAD_BYTES
from edge_runtime.formats.errors import UserError
from server.home import Home
from server.page import serve_in_thread
from server.superlink import SuperLink

MAX_BODY_BYTES = MAX_PAYLOAD_BYTES + (16 << 20)
TIMEOUT_S = 120.0
_PATH = re.compile(r"/v1/fleet/[a-z-]{1,64}", re.ASCII)
_HOP_BY_HOP = {b"connection", b"host", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"}

_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class _TooLong(Exception):
    """A request's body exceeds MAX_BODY_BYTES."""


@contextlib.contextmanager
def serve_gateway(home: Home, link: SuperLink, host: str, port: int) -> Iterator[str]:
    """Let devices in at an address of this machine; yields ``host:port``.

    Raises:
        UserError: The address is not this machine's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError("--listen", f"{host}:{port}", "a free port at an address of this machine") from error
    config = uvicorn.Config(
        make_gateway(home, link.address),
        log_level="warning",
        access_log=False,
        lifespan="on",
        loop="asyncio",
        ws="none",
        ssl_certfile=str(home.root / "server.crt"),
        ssl_keyfile=str(home.root / "server.key"),
        limit_concurrency=512,
    )
    with serve_in_thread(config, listener, "gateway"):
        yield f"{host}:{listener.getsockname()[1]}"


def make_gateway(home: Home, upstream: str) -> Callable[[MutableMapping[str, Any], _Receive, _Send], Awaitable[None]]:
    """The ASGI application: POST to a Fleet path goes on to ``upstream`` (host:port), anything else is 404."""
    context = ssl.create_default_context(cafile=str(home.ca_certificate))
    client = httpx.AsyncClient(
        base_url=f"https://{upstream}", verify=context, timeout=TIMEOUT_S, trust_env=False, follow_redirects=False
    )

    async def gateway(scope: MutableMapping[str, Any], receive: _Receive, send: _Send) -> None:
        if scope["type"] == "lifespan":
            await _live(client, receive, send)
            return
        if scope["type"] != "http" or scope["method"] != "POST" or _PATH.fullmatch(scope["path"]) is None:
            await _answer(send, 404)
            return
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _HOP_BY_HOP]
        request = client.build_request("POST", scope["path"], headers=headers, content=_body(receive))
        try:
            reply = await client.send(request, stream=True)
        except _TooLong:
            await _answer(send, 413)
            return
        except httpx.TransportError:
            await _answer(send, 502)
            return
        try:
            kept = [(name, value) for name, value in reply.headers.raw if name.lower() not in _HOP_BY_HOP]
            await send({"type": "http.response.start", "status": reply.status_code, "headers": kept})
            async for chunk in reply.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await reply.aclose()

    return gateway


async def _live(client: httpx.AsyncClient, receive: _Receive, send: _Send) -> None:
    """Close the connections to the SuperLink when the server ends."""
    while (await receive())["type"] != "lifespan.shutdown":
        await send({"type": "lifespan.startup.complete"})
    await client.aclose()
    await send({"type": "lifespan.shutdown.complete"})


async def _body(receive: _Receive) -> AsyncIterator[bytes]:
    """Chunk by chunk: an update never stands in this process's memory whole."""
    length, more = 0, True
    while more:
        message = await receive()
        chunk = message.get("body", b"")
        length += len(chunk)
        if length > MAX_BODY_BYTES or message["type"] == "http.disconnect":
            raise _TooLong
        more = message.get("more_body", False)
        yield chunk


async def _answer(send: _Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})
