"""A server in a thread of this process, for tests, benchmarks and notebooks."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from tokendance.server.http_server import Server


@contextmanager
def served(app: FastAPI) -> Iterator[tuple[int, uvicorn.Server]]:
    """Serve an application of `create_app` on a free port of this machine while the context lasts.

    Yields:
        The port on 127.0.0.1, and what runs the application.

    Raises:
        RuntimeError: if it does not start, or does not end.
    """
    server = _Server(app)
    # Only where a socket says that it is TCP does asyncio send at once what is written to it.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run_on, args=[listening], name="http")
        thread.start()
        try:
            server.is_settled.wait()
            if not server.started:
                raise RuntimeError("The server did not start.")
            yield listening.getsockname()[1], server
        finally:
            server.should_exit = True
            thread.join(60)
    if thread.is_alive():
        raise RuntimeError("The server did not end.")


class _Server(Server):
    """Says when it has started, or has failed to."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(app, timeout_graceful_shutdown=5)
        self.is_settled = threading.Event()

    def run_on(self, listening: socket.socket) -> None:
        try:
            self.run([listening])
        finally:
            self.is_settled.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_settled.set()
