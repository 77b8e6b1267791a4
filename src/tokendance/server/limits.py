"""Limits that hold before a body is read: an ASGI middleware."""

import json

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokendance.server.errors import ApiError

# A client that is cut off while it sends sees a broken connection and not the answer. So of a body
# that is too large as much is read and thrown away, as a multiple of what is taken.
_DISCARDED = 4


class Limits:
    """Refuses bodies that are too large with 413, whether or not they say how large they are."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        """Stand before an application."""
        self._app = app
        self._max = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        num_read = 0

        async def counted() -> Message:
            nonlocal num_read
            message = await receive()
            num_read += len(message.get("body", b""))
            if num_read > self._max:
                await self._discard(message, receive)
                raise HTTPException(413, self._message)
            return message

        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max:
            await self._discard({"more_body": True}, receive)
            await self._refuse(send)
        else:
            await self._app(scope, counted, send)

    async def _discard(self, message: Message, receive: Receive) -> None:
        num_read = 0
        while message.get("more_body") and num_read < _DISCARDED * self._max:
            message = await receive()
            num_read += len(message.get("body", b""))

    @property
    def _message(self) -> str:
        return f"The body is larger than {self._max} bytes. Send less at a time."

    async def _refuse(self, send: Send) -> None:
        body = json.dumps(ApiError(413, self._message).body()).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})
