"""One connection: uvicorn's, which knows its phase (`connections.py`) and may be held back."""

import asyncio
import ipaddress
import json
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tokendance.server.connections import Connections, Phase, Reason
from tokendance.server.errors import ApiError, without_origin
from tokendance.server.shares import Account

Application = Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]]

# Bytes read at a time: of bodies whose length is known, and of all else. Chunks may have one byte
# each, 6 with its frame, for which h11 takes 7 us: 20 ms for what is read.
_READ_BYTES_OF_BODY = 2**18
_READ_BYTES = 2**14
# Of the body of a request that is held back.
_READ_WHILE_HELD = 2**12
# A client reads its answer if it has taken so many bytes of it.
_PROGRESS_BYTES = 2**14
# `Limits` refuses a body that is late, and discards the rest for some seconds, before this cuts in.
_BODY_GRACE_S = 15.0
# Methods of its own that a transport of asyncio's selector loop keeps.
_OWN_METHODS = {"_read_ready_cb", "_write_ready"}


class Connection(H11Protocol):
    """A connection of uvicorn's that knows its phase, and since when it is in it.

    Attributes:
        address: of the client, without port; of IPv6 the network, which one client has whole.
        phase: see `connections.py`.
        since_s: when that began, by the loop's clock.
    """

    def __init__(self, connections: Connections, **others: Any) -> None:
        super().__init__(**others)
        self._connections = connections
        self.address = ""
        self.phase = Phase.HEAD
        self.since_s = self.loop.time()
        self._num_unsent = 0
        self._account: Account | None = None  # of the request that is under way
        self._unpaid_s = 0.0  # of reading, before it is known who pays
        self._release: Callable[[], None] | None = None  # a request that is held back

    # -- what asyncio and uvicorn call --------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take its place among all connections."""
        super().connection_made(transport)
        self._read_at_a_time(_READ_BYTES)
        self.address = network_of(self.client[0]) if self.client else ""
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Give up its place, and all that refers back to it."""
        self._connections.remove(self)
        super().connection_lost(exc)
        self._let_go()

    @property
    def app(self) -> Application:
        """What answers a request, as uvicorn asks for it.

        If it were kept, the connection would refer to itself.
        """
        return self._answer_unless_held

    @app.setter
    def app(self, application: Application) -> None:
        self._application = application

    def data_received(self, data: bytes) -> None:
        """Read what has come, and charge it to whose request it is."""
        shares = self._connections.shares
        begin_s = shares.cpu_clock()
        super().data_received(data)
        self._look()
        taken_s = shares.cpu_clock() - begin_s
        if self._account is None:
            self._unpaid_s += taken_s
        else:
            shares.charge(self._account, taken_s)
        if self._release is not None and len(self.cycle.body) > _READ_WHILE_HELD:
            self.flow.pause_reading()  # until the request goes on

    def on_response_complete(self) -> None:
        """Go on with another phase."""
        self._account = None
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        """Begin to wait for the client."""
        super().pause_writing()
        self._look()

    def resume_writing(self) -> None:
        """Wait for the client no more."""
        super().resume_writing()
        self._look()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP; called where h11 has raised an error."""
        error = sys.exception()
        if error is not None:
            without_origin(error)  # h11 keeps it where it is raised
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
        self._end_holding()
        for name in _OWN_METHODS & vars(self.transport).keys():
            setattr(self.transport, name, _nothing)
        self.cycle = self.scope = None  # type: ignore[assignment]

    # -- shares of the loop's time ------------------------------------------------------------

    async def _answer_unless_held(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request when it may begin; not at all if its client has gone by then."""
        cycle, account = self.cycle, self._connections.account_of(scope)
        unpaid_s, self._unpaid_s = self._unpaid_s, 0.0
        if account is None or cycle is None:
            await self._application(scope, receive, send)
            return
        shares, self._account = self._connections.shares, account
        shares.charge(account, unpaid_s)
        await self._wait_if_held(account)
        if self.transport.is_closing():
            cycle.disconnected = True  # so that uvicorn expects no answer
            return
        # What a body holds costs most: `Limits` waits once more when it is whole.
        scope["state"]["wait_if_held"] = partial(self._wait_if_held, account)
        work = self._application(scope, receive, send)
        await shares.metered(account, work, lambda: cycle.response_started)

    async def _wait_if_held(self, account: Account) -> None:
        """Wait until a request may go on."""
        shares = self._connections.shares
        held = None if self.transport.is_closing() else shares.hold(account)
        if held is None:
            return
        self._release = partial(shares.release, account, held)
        self._look()
        begin_s = self.loop.time()
        try:
            await held
        finally:
            self._end_holding()
            self._connections.note_held(self.loop.time() - begin_s)
        self._look()

    def _end_holding(self) -> None:
        """Let a request that is held back go on: its time has come, or its client has gone."""
        if self._release is not None:
            self._release()
            self._release = None

    def _read_at_a_time(self, num_bytes: int) -> None:
        # Transports of asyncio's selector loop go by it.
        self.transport.max_size = num_bytes  # type: ignore[attr-defined]

    # -- phases -------------------------------------------------------------------------------

    def _look(self) -> None:
        """Find the phase anew."""
        phase, num_unsent = self._find_phase(), self.transport.get_write_buffer_size()
        has_read = num_unsent <= self._num_unsent - _PROGRESS_BYTES
        if phase is not self.phase or (phase is Phase.UNREAD and has_read):
            self.phase, self._num_unsent, self.since_s = phase, num_unsent, self.loop.time()
            has_length = all(name != b"transfer-encoding" for name, _ in self.headers or ())
            is_cheap = phase is Phase.BODY and has_length
            self._read_at_a_time(_READ_BYTES_OF_BODY if is_cheap else _READ_BYTES)
            self._connections.move(self)

    def _find_phase(self) -> Phase:
        if self._is_answering and not self.transport.is_closing():
            if self._release is not None:
                return Phase.HELD
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
        waited_s = self.loop.time() - self.since_s
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
        if self.phase in (Phase.HEAD, Phase.HELD):
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
            self._end_holding()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body()).encode()
            own = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
            }
            headers = list((own | error.headers).items())
            head = h11.Response(status_code=error.status, headers=headers)
            events = (head, h11.Data(data=body), h11.EndOfMessage())
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()


def _nothing() -> None:
    """Nothing is read or written any more."""


def network_of(address: str) -> str:
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
