"""Connections: how many there may be, and how long a client may keep the server waiting.

A connection is in one of six phases:

    HEAD    the head of a request is awaited: the first one, or a later one that has begun
    HELD    the request is held back, since its key has taken more than its part (`shares.py`)
    BODY    the rest of a request, whether or not it has been answered already
    ANSWER  the server's turn
    UNREAD  the client does not read its answer as fast as it is made
    IDLE    all is answered, and nothing of another request has come

HELD and ANSWER may last as long as the server needs. Each of the others ends in time, by the client
or by the server. When there are as many connections as there may be, each new one takes the place
of an old one: of the address that has most which are not in ANSWER, the one that keeps the server
waiting longest; but if few of them do, one that is held back, where there is one. So addresses
share the connections evenly when there are too few; and where all have the same address, as behind
a proxy, those who ask at once still find the server open.
"""

import asyncio
import logging
import math
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import TYPE_CHECKING

from starlette.types import Scope

from tokendance.server.auth import ApiKeys
from tokendance.server.errors import ApiError
from tokendance.server.handles import handles_for_connections
from tokendance.server.metrics import Metrics
from tokendance.server.settings import ServerSettings
from tokendance.server.shares import Account, Shares

if TYPE_CHECKING:
    from tokendance.server.connection import Connection

log = logging.getLogger("tokendance.server.connections")

# Between two looks at all connections, and between two lines in the log.
_LOOK_S = 1.0
_LOG_S = 10.0
# Of those that keep the server waiting so many may have just come, and have asked already: some
# turns of the loop accept as many.
_MAY_HAVE_ASKED = 64
# Whether the server is well is to be told at once, also behind a flood.
_PROBES = {"/health", "/ready"}
_BODY_HEADERS = {b"content-length", b"transfer-encoding"}
_NO_KEY = ""  # as a tenant's name where no key is needed
# Looked at in one turn of the loop: each may be late, and closing one takes some 0.1 ms.
_LOOKS_IN_A_TURN = 32


class Phase(Enum):
    """What a connection is about; see the module."""

    HEAD = "head"
    HELD = "held"
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


@dataclass(slots=True)
class _OfAddress:
    """Connections of one address that may have to make room, each kind in the order it began.

    Attributes:
        waiting: which keep the server waiting.
        held: which are held back.
    """

    waiting: dict["Connection", None] = field(default_factory=dict)
    held: dict["Connection", None] = field(default_factory=dict)

    def count(self) -> int:
        return len(self.waiting) + len(self.held)

    def add(self, connection: "Connection") -> None:
        kind = self.held if connection.phase is Phase.HELD else self.waiting
        kind[connection] = None

    def discard(self, connection: "Connection") -> None:
        self.waiting.pop(connection, None)
        self.held.pop(connection, None)

    def first(self) -> "Connection":
        """The first to make room."""
        kind = self.held if self.held and len(self.waiting) <= _MAY_HAVE_ASKED else self.waiting
        return next(iter(kind))


class Connections:
    """All connections of a server; its methods are called in the event loop.

    Attributes:
        most: that there may be: what the settings say, or less where there are few handles.
        settings: of the server.
        shares: of the loop's time, which say when the next request of a key may begin.
    """

    def __init__(
        self, settings: ServerSettings, metrics: Metrics, keys: ApiKeys, shares: Shares
    ) -> None:
        self.settings = settings
        self.shares = shares
        self.most = min(settings.max_connections, handles_for_connections())
        if self.most < settings.max_connections:
            log.warning(
                "the limit of open files (ulimit -n) leaves room for %d connections, not for %d",
                self.most,
                settings.max_connections,
            )
        self._metrics = metrics
        self._keys = keys
        self._open: set[Connection] = set()
        self._replaceable: dict[str, _OfAddress] = {}
        self._num_closed: Counter[Reason] = Counter()  # since the last line in the log
        self._logged_s = -math.inf

    def add(self, connection: "Connection") -> None:
        """Take a new connection, if need be in place of another, which may be itself."""
        self._open.add(connection)
        self._enlist(connection)
        if len(self._open) > self.most:
            most = max(self._replaceable.values(), key=_OfAddress.count)
            most.first().make_room()
        self._metrics.note_connections(len(self._open))

    def remove(self, connection: "Connection") -> None:
        """Forget a connection; more than once makes no difference."""
        self._open.discard(connection)
        self._delist(connection)
        self._metrics.note_connections(len(self._open))

    def move(self, connection: "Connection") -> None:
        """A connection has begun a phase, or has done something in it."""
        if connection in self._open:
            self._delist(connection)
            if connection.phase is not Phase.ANSWER:
                self._enlist(connection)

    def account_of(self, scope: Scope) -> Account | None:
        """The account of whoever asks something; None if that is never held back."""
        has_body = any(name in _BODY_HEADERS for name, _ in scope["headers"])
        if scope["path"] in _PROBES and scope["method"] == "GET" and not has_body:
            return None
        try:
            return self.shares.account(self._keys.authenticate(scope))
        except ApiError:  # `Limits` refuses it in a moment
            return self.shares.account(_NO_KEY)

    def _enlist(self, connection: "Connection") -> None:
        self._replaceable.setdefault(connection.address, _OfAddress()).add(connection)

    def _delist(self, connection: "Connection") -> None:
        of_address = self._replaceable.get(connection.address)
        if of_address is None:
            return
        of_address.discard(connection)
        if not of_address.count():
            del self._replaceable[connection.address]

    def note_held(self, seconds: float) -> None:
        """Record a request that was held back."""
        self._metrics.note_held(seconds)

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
