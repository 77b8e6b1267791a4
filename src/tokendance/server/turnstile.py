"""Lets a crowd of requests in little by little, so that those inside go on.

The event loop begins all requests that have come since it last looked, and then does all else:
hundreds that come at once would hold up what streams to others. Each takes a fraction of a
millisecond, so this bounds how long they may take together each time round:

    loop    begin begin begin | all else | begin begin begin | all else | ...
            <--- STEP_S ----->
"""

import asyncio
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

# For all that begin in one turn of the loop, but for the last of them.
STEP_S = 0.01


class Turnstile:
    """ASGI middleware; see the module."""

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.perf_counter) -> None:
        """Let requests into an application; a test may have a clock of its own."""
        self._app = app
        self._clock = clock
        self._opened_s: float | None = None  # in this turn of the loop, if anybody came in it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, when it is its turn."""
        while not self._is_open():
            await asyncio.sleep(0)  # to the end of the queue
        await self._app(scope, receive, send)

    def _is_open(self) -> bool:
        now = self._clock()
        if self._opened_s is None:
            self._opened_s = now
            asyncio.get_running_loop().call_soon(self._close)  # in the loop's next turn
        return now - self._opened_s <= STEP_S

    def _close(self) -> None:
        self._opened_s = None
