"""What is refused before a body is read: an ASGI middleware.

Who has no key, and whose body is too large or takes too long, is told so at once.
"""

import json
from collections.abc import Callable

import anyio
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokendance.server.errors import ApiError

# A client that is cut off while it sends sees a broken connection and not the answer. So of what it
# still sends so many bytes are read and thrown away, for so many seconds.
_DISCARDED = 64 * 2**20
_DISCARD_S = 10.0


class Limits:
    """Stands before an application; see the module."""

    def __init__(
        self,
        app: ASGIApp,
        tenant_of: Callable[[Scope], str],
        max_body_bytes: int,
        max_body_objects: int,
        body_timeout_s: float,
    ) -> None:
        """Stand before an application.

        Args:
            app: to protect.
            tenant_of: says who asks, by the head of a request; raises ApiError if nobody may.
            max_body_bytes: see `max_body` of `ServerSettings`.
            max_body_objects: likewise.
            body_timeout_s: likewise.
        """
        self._app = app
        self._tenant_of = tenant_of
        self._max = max_body_bytes
        self._max_objects = max_body_objects
        self._timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope.setdefault("state", {})["tenant"] = self._tenant_of(scope)
            length = dict(scope["headers"]).get(b"content-length", b"0")
            if length.isdigit() and int(length) > self._max:
                raise self._too_large()
        except ApiError as error:
            await self._refuse(error, receive, send, more_body=True)
            return
        deadline = anyio.current_time() + self._timeout_s
        num_read = num_objects = 0
        is_whole = False
        is_refused = False

        async def refuse(error: ApiError, *, more_body: bool) -> None:
            nonlocal is_refused
            is_refused = True
            await self._refuse(error, receive, send, more_body=more_body)
            raise HTTPException(error.status)  # ends the reading

        async def limited() -> Message:
            nonlocal num_read, num_objects, is_whole
            if is_whole:
                return await receive()  # waits for the client to leave, as long as it takes
            message: Message = {}
            with anyio.CancelScope(deadline=deadline):
                message = await receive()
            if not message:
                await refuse(self._too_slow(), more_body=True)
            is_whole = not message.get("more_body", False)
            body = message.get("body", b"")
            num_read += len(body)
            if num_read > self._max:
                await refuse(self._too_large(), more_body=not is_whole)
            # Each message, part and call in a body is an object, which takes a hundred times as
            # long to check as the text in it. Those that are text are few.
            num_objects += body.count(b"{")
            if num_objects > self._max_objects:
                await refuse(self._too_many(), more_body=not is_whole)
            return message

        async def unless_refused(message: Message) -> None:
            if not is_refused:
                await send(message)

        await self._app(scope, limited, unless_refused)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The body is larger than {self._max} bytes. Send less at a time, or raise --max-body.",
        )

    def _too_many(self) -> ApiError:
        return ApiError(
            413,
            f"The body has more than {self._max_objects} objects (messages, parts, references, "
            "calls: each is a brace). Send fewer at a time, or raise --max-body-objects.",
        )

    def _too_slow(self) -> ApiError:
        return ApiError(408, f"The body was not there after {self._timeout_s} s. Ask again.")

    async def _refuse(
        self, error: ApiError, receive: Receive, send: Send, *, more_body: bool
    ) -> None:
        """Answer, then read away what the client still sends."""
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
        num_read = 0
        with anyio.move_on_after(_DISCARD_S):
            while more_body and num_read < _DISCARDED:
                message = await receive()
                more_body = message.get("more_body", False)
                num_read += len(message.get("body", b""))
        await send({"type": "http.response.body", "body": b""})
