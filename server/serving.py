"""A web application in a thread of this process, on a socket that is bound already."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn


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
