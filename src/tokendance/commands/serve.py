"""`tokendance serve`: an OpenAI-compatible server."""

import asyncio
import logging
import math
import os
import socket
import threading
from types import FrameType

import torch
from fastapi import FastAPI
from rich.console import Console
from rich.markup import escape

from tokendance.llm import LLM
from tokendance.options import EngineOptions
from tokendance.params import SamplingParams
from tokendance.server.app import create_app
from tokendance.server.handles import raise_handle_limit
from tokendance.server.http_server import Server
from tokendance.server.logs import configure
from tokendance.server.malloc import limit_arenas, objects_frozen
from tokendance.server.settings import ServerSettings
from tokendance.units import format_bytes

log = logging.getLogger("tokendance.server")

# Those whose requests are ended are told in this time.
_TELL_S = 5


def serve(model: str, options: EngineOptions, settings: ServerSettings, console: Console) -> None:
    """Load the model and serve until interrupted; what is under way is finished first."""
    limit_arenas()
    raise_handle_limit()
    with console.status(f"Loading {escape(model)} ..."):
        llm = LLM(model, options)
        llm.generate("warm up", SamplingParams(max_tokens=1))
        llm.engine.forget()
    configure(settings.log_format)
    app = create_app(llm, settings)
    threading.Thread(target=app.state.context.grammars.start, name="grammars", daemon=True).start()
    console.print(
        f"[bold]{escape(app.state.context.model_name)}[/bold], {llm.model.precision}, "
        f"{torch.get_num_threads()} threads, KV budget {format_bytes(llm.kv_bytes)}"
    )
    try:
        with objects_frozen():
            _DrainingServer(app, settings, console).run()
    finally:
        if app.state.context.engine_thread.is_running:
            # In the middle of a step, which would crash without its model. What is stored is whole.
            log.error("the engine did not end in time, and is broken off")
            logging.shutdown()
            os._exit(1)
        llm.close()


class _DrainingServer(Server):
    """Stops in three stages, with each signal the next.

    First no more requests are taken, and what is under way is finished. When the time for that is
    over, it is ended: who waits is told. Who cannot be told in a moment, since the engine is in the
    middle of a long step or the request has never come whole, is cut off.
    """

    def __init__(self, app: FastAPI, settings: ServerSettings, console: Console) -> None:
        super().__init__(
            app,
            host=settings.host,
            port=settings.port,
            timeout_graceful_shutdown=math.ceil(settings.drain) + 2 * _TELL_S,
        )
        self._context = app.state.context
        self._console = console
        self._num_signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started:
            return
        settings = self._context.settings
        port = self.servers[0].sockets[0].getsockname()[1]  # that of the settings may be 0
        self._console.print(
            f"Set base_url to http://{settings.host}:{port}/v1"
            + (" and your API key." if settings.api_keys else "; any API key will do.")
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # A signal comes between any two lines, some of which hold locks: the loop does the rest.
        self._num_signals += 1
        stage = (self._drain, self._end, self._cut_off)[min(self._num_signals, 3) - 1]
        asyncio.get_running_loop().call_soon_threadsafe(stage)
        if self._num_signals == 1:
            self._context.admission.is_draining = True
            super().handle_exit(sig, frame)

    def _drain(self) -> None:
        drain_s = self._context.settings.drain
        asyncio.get_running_loop().call_later(drain_s, self._end)
        if self._context.admission.num_open:
            log.info(
                "finishing what is under way, for %g s at most; the same signal again ends it now",
                drain_s,
            )

    def _end(self) -> None:
        self._context.engine_thread.hurry()
        asyncio.get_running_loop().call_later(_TELL_S, self._cut_off)

    def _cut_off(self) -> None:
        for connection in self.server_state.connections:
            connection.transport.abort()
