"""uvicorn's server, with connections and an event loop of our own."""

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI

from tokendance.server.connection import Connection
from tokendance.server.connections import Connections

# In one turn of the loop: each may take the place of another, and both together 2 ms.
_ACCEPTED_AT_ONCE = 4
# Those not accepted yet wait in the system, which may allow fewer.
_QUEUE_LENGTH = 2048


class Server(uvicorn.Server):
    """uvicorn's server, with the connections of an application's context."""

    def __init__(self, app: FastAPI, **config: Any) -> None:
        """Serve an application that `create_app` has made; see `uvicorn.Config` for the others."""
        connections: Connections = app.state.context.connections
        protocol: Callable[..., asyncio.Protocol] = partial(Connection, connections)
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,  # type: ignore[arg-type]
                ws="none",
                # uvloop's transports show nothing of what `Connection` bounds.
                loop="tokendance.server.event_loop:new_event_loop",
                backlog=_ACCEPTED_AT_ONCE,
                timeout_keep_alive=connections.settings.idle_timeout,  # type: ignore[arg-type]
                # Of warnings there is one, "Invalid HTTP request", as often as a client likes.
                log_level="error",
                access_log=False,
                server_header=False,
                **config,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        # uvicorn and asyncio have one number for connections that are accepted in a turn of the
        # loop and for those that may wait in the system.
        for server in self.servers if self.started else ():
            for listening in server.sockets:
                with listening.dup() as same:
                    same.listen(_QUEUE_LENGTH)
