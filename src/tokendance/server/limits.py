"""Refuses requests before their bodies are parsed.

Those for another host, without a key or without a certain end, and those whose bodies are too large
or too slow.
"""

import json
from collections.abc import Awaitable, Callable

import anyio
import anyio.lowlevel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokendance.server.bodies import Bodies, Body
from tokendance.server.context import ServerContext
from tokendance.server.errors import ApiError, bad_request

# A client whose connection is closed while it sends sees a broken connection and not the answer. So
# the rest of its body is read and thrown away, up to so many bytes and seconds.
_MAX_DISCARDED = 64 * 2**20
_DISCARD_S = 10.0


class Limits:
    """ASGI middleware; see the module."""

    def __init__(self, app: ASGIApp, context: ServerContext) -> None:
        """Protect an application."""
        self._app = app
        self._context = context
        self._bodies = Bodies(context.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = self._bodies.begin()
        try:
            await self._answer(scope, body, receive, send)
        finally:
            self._bodies.end(body)

    async def _answer(self, scope: Scope, body: Body, receive: Receive, send: Send) -> None:
        try:
            self._context.hosts.check(scope)
            _check_framing(scope)
            scope.setdefault("state", {})["tenant"] = self._context.keys.authenticate(scope)
            length = dict(scope["headers"]).get(b"content-length", b"0")
            body.check_size(int(length) if length.isdigit() else 0)
        except ApiError as error:
            await self._refuse(error, receive, send, more_body=True)
            return
        is_refused = False
        # Our connections say so (`connection.py`); another server's do not.
        wait_if_held: Callable[[], Awaitable[None]]
        wait_if_held = scope["state"].get("wait_if_held", anyio.lowlevel.checkpoint)

        async def receive_unless_refused() -> Message:
            nonlocal is_refused
            try:
                was_whole = body.is_whole
                message = await body.receive(receive)
                if body.is_whole and not was_whole:
                    await wait_if_held()
                return message
            except ApiError as error:
                is_refused = True
                await self._refuse(error, receive, send, more_body=not body.is_whole)
                raise HTTPException(error.status) from error  # ends the application's reading

        async def send_unless_refused(message: Message) -> None:
            if not is_refused:
                await send(message)

        await self._app(scope, receive_unless_refused, send_unless_refused)

    async def _refuse(
        self, error: ApiError, receive: Receive, send: Send, *, more_body: bool
    ) -> None:
        """Answer, then read and discard the rest of the body."""
        self._context.metrics.note_refused(error.status)
        body = json.dumps(error.body()).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **error.headers,
        }
        pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": error.status, "headers": pairs})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        num_bytes = 0
        with anyio.move_on_after(_DISCARD_S):
            while more_body and num_bytes < _MAX_DISCARDED:
                message = await receive()
                more_body = message.get("more_body", False)
                num_bytes += len(message.get("body", b""))
        await send({"type": "http.response.body", "body": b""})


def _check_framing(scope: Scope) -> None:
    """Raise ApiError for a request whose end is told in two ways.

    A proxy that goes by the other one would take part of its body for another request. Lengths that
    differ are refused by h11.
    """
    names = {name for name, _ in scope["headers"]}
    if b"transfer-encoding" not in names:
        return
    if b"content-length" in names or scope["http_version"] == "1.0":
        raise bad_request(
            "Transfer-Encoding goes neither with Content-Length nor with HTTP/1.0. Send "
            "Content-Length alone."
        )
