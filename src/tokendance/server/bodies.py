"""Bodies while they arrive: how large one may be, how long it may take, and what all may hold."""

import anyio
from starlette.types import Message, Receive

from tokendance.server.errors import ApiError
from tokendance.server.json_size import JSONSize
from tokendance.server.settings import ServerSettings


class Bodies:
    """All bodies that have not come whole."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self._num_bytes = 0
        self._arriving: dict[Body, None] = {}  # first the one that began first

    def begin(self) -> "Body":
        """Expect another body; its `end` has to be called, whatever comes of it."""
        body = Body(self)
        self._arriving[body] = None
        return body

    def hold(self, body: "Body", num_bytes: int) -> None:
        """Make room for more of a body; the one that has been arriving longest gives way."""
        self._num_bytes += num_bytes
        body.num_bytes += num_bytes
        while self._num_bytes > self.settings.max_arriving_bytes:
            longest = next(iter(self._arriving))
            self.end(longest)
            longest.give_way()

    def end(self, body: "Body") -> None:
        """A body is whole, or nobody wants it any more; more than once makes no difference."""
        if body in self._arriving:
            del self._arriving[body]
            self._num_bytes -= body.num_bytes


class Body:
    """One body.

    Attributes:
        num_bytes: that have come; `Bodies` counts them.
        is_whole: whether it has come to its end.
    """

    def __init__(self, bodies: Bodies) -> None:
        self.num_bytes = 0
        self.is_whole = False
        self._bodies = bodies
        self._settings = bodies.settings
        self._size = JSONSize()
        self._has_given_way = False
        self._deadline = anyio.current_time() + self._settings.body_timeout
        self._waiting = anyio.CancelScope()

    def give_way(self) -> None:
        """Have it refused, to have its memory."""
        self._has_given_way = True
        self._waiting.cancel()

    async def receive(self, receive: Receive) -> Message:
        """Receive more of it, or the end of the connection once it is whole.

        Raises:
            ApiError: for a body that is too large or too slow, or has to give way to others.
        """
        if self.is_whole:
            return await receive()
        message: Message = {}
        with anyio.CancelScope(deadline=self._deadline) as self._waiting:
            message = await receive()
        if message and not self._has_given_way:
            data = message.get("body", b"")
            if b"\0" in data:  # as other encodings have, whose quotes cannot be told by their bytes
                raise ApiError(400, "The body is not JSON in UTF-8. Send it as that.")
            self._size.add(data)
            self._bodies.hold(self, len(data))
            self.check_size(self.num_bytes)
        if self._has_given_way:
            raise ApiError(
                503,
                f"Bodies of {self._settings.max_arriving_bytes} bytes are arriving, and no more is "
                "kept at a time (--max-arriving). Ask again in a moment, and send each body at "
                "once.",
                headers={"Retry-After": "1"},
            )
        if not message:
            text = f"The body was not there after {self._settings.body_timeout:g} s. Ask again."
            raise ApiError(408, text)
        self.is_whole = not message.get("more_body", False)
        if self.is_whole:
            self._bodies.end(self)
        return message

    def check_size(self, num_bytes: int) -> None:
        """Raise ApiError if a body of so many bytes, or what has come of it, is too large."""
        settings = self._settings
        if num_bytes > settings.max_body_bytes:
            raise ApiError(
                413,
                f"The body is larger than {settings.max_body_bytes} bytes. Send less at a time, or "
                "raise --max-body.",
            )
        if self._size.num_objects > settings.max_body_objects:
            raise ApiError(
                413,
                f"The body has more than {settings.max_body_objects} objects (messages, parts, "
                "references, calls), or more fields, lists or values than count for as many (4, 8 "
                "and 50 to an object). Send fewer at a time, or raise --max-body-objects.",
            )
