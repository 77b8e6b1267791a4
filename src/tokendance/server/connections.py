"""Connections: how many there may be, and how long a client may keep the server waiting.

A connection is in one of five phases:

    HEAD    the head of a request is awaited: the first one, or a later one that has begun
    BODY    the rest of a request, whether or not it has been answered already
    ANSWER  the server's turn
    UNREAD  the client does not read its answer as fast as it is made
    IDLE    all is answered, and nothing of another request has come

ANSWER may last as long as the engine needs. Each of the others ends in time, by the client or by
the server. When there are as many connections as there may be, each new one takes the place of an
old one: of the address that keeps the server waiting most often, the connection that has done so
longest. So addresses share the connections evenly when there are too few; and where all have the
same address, as behind a proxy, those who ask at once still find the server open.
"""

import asyncio
import ipaddress
import json
import logging
import math
import socket
import sys
from collections import Counter
from collections.abc import Callable
from enum import Enum, StrEnum
from functools import partial
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from tokendance.server.errors import ApiError
from tokendance.server.metrics import Metrics
from tokendance.server.settings import ServerSettings

log = logging.getLogger("tokendance.server.connections")

# Handles that connections leave to files, and to those that are accepted before others are closed:
# asyncio accepts some in each turn of its loop, and closing one takes three turns.
_RESERVED_HANDLES = 256
_ACCEPTED_AT_ONCE = 32
# Those not accepted yet wait in the system, which may allow fewer.
_QUEUE_LENGTH = 2048
# Bytes read at a time: of bodies whose length is known, and of all else. Chunks may have one byte
# each, 6 with its frame, for which h11 takes 7 us: 20 ms for what is read.
_READ_BYTES_OF_BODY = 2**18
_READ_BYTES = 2**14
# A client reads its answer if it has taken so many bytes of it.
_PROGRESS_BYTES = 2**14
# `Limits` refuses a body that is late, and discards the rest for some seconds, before this cuts in.
_BODY_GRACE_S = 15.0
# Methods of its own that a transport of asyncio's selector loop keeps.
_OWN_METHODS = {"_read_ready_cb", "_write_ready"}
# Between two looks at all connections, and between two lines in the log.
_LOOK_S = 1.0
_LOG_S = 10.0
# Looked at in one turn of the loop: each may be late, and closing one takes some 0.1 ms.
_LOOKS_IN_A_TURN = 32


class Phase(Enum):
    """What a connection is about; see the module."""

    HEAD = "head"
    BODY = "body"
    ANSWER = "answer"
    UNREAD = "unread"
    IDLE = "idle"


class Reason(StrEnum):
    """Why the server has closed a connection."""

    HEAD = "head_timeout"
    BODY = "body_timeout"
    UNREAD = "send_timeout"
    DISPLACED = "displaced"
    INVALID = "invalid"


_EXPLANATIONS = {
    Reason.HEAD: "sent no whole request head in time (--head-timeout)",
    Reason.BODY: "sent no whole body in time (--body-timeout)",
    Reason.UNREAD: "did not read their answers (--send-timeout)",
    Reason.DISPLACED: "had to make room for new ones (--max-connections)",
    Reason.INVALID: "sent what is not HTTP",
}


class Connections:
    """All connections of a server; its methods are called in the event loop.

    Attributes:
        most: that there may be: what the settings say, or less where there are few handles.
        settings: of the server.
    """

    def __init__(self, settings: ServerSettings, metrics: Metrics) -> None:
        self.settings = settings
        self.most = min(settings.max_connections, _handles_for_connections())
        if self.most < settings.max_connections:
            log.warning(
                "the limit of open files (ulimit -n) leaves room for %d connections, not for %d",
                self.most,
                settings.max_connections,
            )
        self._metrics = metrics
        self._open: set[_Connection] = set()
        # Those that keep the server waiting, by address; first who has done so longest.
        self._waiting: dict[str, dict[_Connection, None]] = {}
        self._num_closed: Counter[Reason] = Counter()  # since the last line in the log
        self._logged_s = -math.inf

    def add(self, connection: "_Connection") -> None:
        """Take a new connection, if need be in place of another, which may be itself."""
        self._open.add(connection)
        self._enlist(connection)
        if len(self._open) > self.most:
            most_often = max(self._waiting.values(), key=len)
            next(iter(most_often)).make_room()
        self._metrics.note_connections(len(self._open))

    def remove(self, connection: "_Connection") -> None:
        """Forget a connection; more than once makes no difference."""
        self._open.discard(connection)
        self._delist(connection)
        self._metrics.note_connections(len(self._open))

    def move(self, connection: "_Connection") -> None:
        """A connection has begun a phase, or has done something in it."""
        if connection in self._open:
            self._delist(connection)
            if connection.phase is not Phase.ANSWER:
                self._enlist(connection)

    def _enlist(self, connection: "_Connection") -> None:
        self._waiting.setdefault(connection.address, {})[connection] = None

    def _delist(self, connection: "_Connection") -> None:
        waiting = self._waiting.get(connection.address, {})
        waiting.pop(connection, None)
        if not waiting:
            self._waiting.pop(connection.address, None)

    def note_closed(self, reason: Reason) -> None:
        """Count a connection that the server has closed."""
        self._metrics.note_closed(reason)
        self._num_closed[reason] += 1

    async def watch(self) -> None:
        """Close those whose time is over, until cancelled."""
        settings = self.settings
        look_s = min(_LOOK_S, settings.head_timeout / 4, settings.send_timeout / 4)
        while True:
            await asyncio.sleep(look_s)
            for number, connection in enumerate(tuple(self._open), 1):
                if connection in self._open:  # it may have ended in an earlier turn
                    connection.close_if_late()
                if number % _LOOKS_IN_A_TURN == 0:
                    await asyncio.sleep(0)
            self._log()

    def _log(self) -> None:
        """Say how many were closed and why: one line for many, so that nobody fills the log."""
        now = asyncio.get_running_loop().time()
        if not self._num_closed or now - self._logged_s < _LOG_S:
            return
        counts = (f"{count} {_EXPLANATIONS[reason]}" for reason, count in self._num_closed.items())
        total = self._num_closed.total()
        connections = "connection" if total == 1 else "connections"
        log.warning("closed %d %s: %s", total, connections, ", ".join(counts))
        self._num_closed.clear()
        self._logged_s = now


class _Connection(H11Protocol):
    """A connection of uvicorn's that knows its phase, and since when it is in it.

    Attributes:
        address: of the client, without port; of IPv6 the network, which one client has whole.
        phase: see the module.
    """

    def __init__(self, connections: Connections, **others: Any) -> None:
        super().__init__(**others)
        self._connections = connections
        self.address = ""
        self.phase = Phase.HEAD
        self._since = self.loop.time()
        self._num_unsent = 0

    # -- what asyncio and uvicorn call --------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._read_at_a_time(_READ_BYTES)
        self.address = _network(self.client[0]) if self.client else ""
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.remove(self)
        super().connection_lost(exc)
        self._let_go()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._look()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP; called where h11 has raised an error."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self._refuse(ApiError(status, f"This is no valid HTTP request: {error or msg}."))
        self._connections.note_closed(Reason.INVALID)

    def _let_go(self) -> None:
        """Drop what refers back to itself when the connection is lost.

        So it is freed at once. Else it would wait for a collection of garbage, which stops the
        event loop for as long as there are connections that have come and gone. An answer that is
        under way ends by itself.
        """
        self._unset_keepalive_if_required()
        for name in _OWN_METHODS & vars(self.transport).keys():
            setattr(self.transport, name, _nothing)
        self.cycle = None  # type: ignore[assignment]

    def _read_at_a_time(self, num_bytes: int) -> None:
        # Transports of asyncio's selector loop go by it.
        self.transport.max_size = num_bytes  # type: ignore[attr-defined]

    # -- phases -------------------------------------------------------------------------------

    def _look(self) -> None:
        """Find the phase anew."""
        phase, num_unsent = self._find_phase(), self.transport.get_write_buffer_size()
        has_read = num_unsent <= self._num_unsent - _PROGRESS_BYTES
        if phase is not self.phase or (phase is Phase.UNREAD and has_read):
            self.phase, self._num_unsent, self._since = phase, num_unsent, self.loop.time()
            has_length = all(name != b"transfer-encoding" for name, _ in self.headers or ())
            is_cheap = phase is Phase.BODY and has_length
            self._read_at_a_time(_READ_BYTES_OF_BODY if is_cheap else _READ_BYTES)
            self._connections.move(self)

    def _find_phase(self) -> Phase:
        if self._is_answering:
            if self.flow.write_paused:
                return Phase.UNREAD
            return Phase.BODY if self.cycle.more_body else Phase.ANSWER
        if self.transport.is_closing() or self.transport.get_write_buffer_size():
            return Phase.UNREAD
        if self.conn.their_state is h11.SEND_BODY:
            return Phase.BODY
        return Phase.HEAD if self.cycle is None or self._has_begun else Phase.IDLE

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _body_grace_s(self) -> float:
        return _BODY_GRACE_S if self._is_answering else 0.0

    @property
    def _has_begun(self) -> bool:
        """Whether something has come of a head that is awaited."""
        return bool(self.conn.trailing_data[0])

    # -- how it ends --------------------------------------------------------------------------

    def close_if_late(self) -> None:
        """Close the connection if its phase has lasted too long; uvicorn ends IDLE by itself."""
        self._look()
        settings = self._connections.settings
        waited_s = self.loop.time() - self._since
        match self.phase:
            case Phase.HEAD if waited_s > settings.head_timeout:
                if self._has_begun:
                    text = (
                        f"The head of the request was not there after {settings.head_timeout:g} s. "
                        "Send it at once."
                    )
                    self._refuse(ApiError(408, text))
                self.transport.close()
                self._connections.note_closed(Reason.HEAD)
            case Phase.BODY if waited_s > settings.body_timeout + self._body_grace_s:
                self.transport.abort()
                self._connections.note_closed(Reason.BODY)
            case Phase.UNREAD if waited_s > settings.send_timeout:
                self.transport.abort()
                self._connections.note_closed(Reason.UNREAD)

    def make_room(self) -> None:
        """Close the connection at once, to have its place."""
        if self.phase is Phase.HEAD:
            text = (
                f"There are {self._connections.most} connections, and no room for more "
                "(--max-connections). Ask again in a moment, and send each request at once."
            )
            self._refuse(ApiError(503, text, headers={"Retry-After": "1"}))
        self.transport.abort()
        self._connections.remove(self)
        self._connections.note_closed(Reason.DISPLACED)

    def _refuse(self, error: ApiError) -> None:
        """Say why, if no answer has begun, and close the connection."""
        if self._is_answering:
            # The application may still want to answer: its client is gone.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body()).encode()
            own = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
            }
            headers = list((own | error.headers).items())
            head = h11.Response(status_code=error.status, headers=headers)
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server, with the connections of an application's context."""

    def __init__(self, app: FastAPI, **config: Any) -> None:
        """Serve an application that `create_app` has made; see `uvicorn.Config` for the others."""
        connections: Connections = app.state.context.connections
        protocol: Callable[..., asyncio.Protocol] = partial(_Connection, connections)
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,  # type: ignore[arg-type]
                ws="none",
                # uvloop's transports show nothing of what `_Connection` bounds.
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


def _nothing() -> None:
    """Nothing is read or written any more."""


def raise_handle_limit() -> None:
    """Let this process open as many files as the system lets it."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (OSError, ValueError):  # macOS has no limit by name, and one in the kernel
        log.debug("the limit of open files cannot be raised", exc_info=True)


def _handles_for_connections() -> int:
    """Connections for which there are handles."""
    try:
        import resource
    except ImportError:
        return sys.maxsize
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(limit - _RESERVED_HANDLES, limit // 2)


def _network(address: str) -> str:
    """The address, or the network of 64 bits that an IPv6 client has for itself."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv4Address):
        return address
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ipaddress.ip_network((int(ip) >> 64 << 64, 64)))
