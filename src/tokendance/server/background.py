"""A server in a thread of this process, for tests, benchmarks and notebooks."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve an application on a free port of this machine while the context lasts.

    Yields:
        The address: "http://127.0.0.1:PORT".

    Raises:
        RuntimeError: if it does not start, or does not end.
    """
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError("The server did not start.")
                time.sleep(0.01)
            yield address
        finally:
            server.should_exit = True
            thread.join(60)
    if thread.is_alive():
        raise RuntimeError("The server did not end.")
