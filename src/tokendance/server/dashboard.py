"""The dashboard: who shares what in this server, while it happens.

A tenant sees its own rounds. What the engine tells is put into a queue on its thread; everything
else is done on other threads, and only while somebody looks, but for emptying the queue.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator

import anyio.to_thread
from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse

from tokendance.server.auth import Tenant
from tokendance.server.context import ServerContext
from tokendance.server.errors import ApiError
from tokendance.view.page import HEADERS, asset, page
from tokendance.view.recorder import RecordLimits
from tokendance.view.recording import Changes, Recording

LIMITS = RecordLimits(max_rounds=100, max_tokens=2_000_000, max_pieces=1_000_000)
_LOOK_S = 0.25  # between two looks at what has changed
_MORE_S = 0.01  # between parts of what has
_SILENCE_S = 10.0  # after which a comment keeps the connection alive
_MAX_VIEWERS = 8  # of each tenant


class Dashboard:
    """Records the engine of a server, and shows it."""

    def __init__(self, context: ServerContext) -> None:
        """Begin to record."""
        self._context = context
        self._recording = Recording(context.llm, LIMITS)
        self._num_viewers: Counter[str] = Counter()

    async def digest(self) -> None:
        """Empty the queue of events for ever, whether anybody looks or not."""
        while True:
            await asyncio.sleep(1.0)
            await anyio.to_thread.run_sync(self._recording.recorder.digest)

    def changes(self, tenant: str) -> Changes:
        """What a tenant may see."""
        settings = self._context.settings
        # Who alone may ask owns the server, and sees the memory that it takes, too.
        salt = self._context.encoder(tenant).salt if len(settings.api_keys) > 1 else None
        return Changes(self._recording, with_text=settings.dashboard_text, tenant=salt)

    def open_stream(self, tenant: str) -> AsyncIterator[str]:
        """Server-sent events for one who looks on.

        Raises:
            ApiError: 429 if too many of this tenant do.
        """
        if self._num_viewers[tenant] >= _MAX_VIEWERS:
            raise ApiError(
                429,
                f"{_MAX_VIEWERS} dashboards are open already. Close one of them.",
                code="too_many_dashboards",
            )
        return self._stream(tenant)

    async def _stream(self, tenant: str) -> AsyncIterator[str]:
        changes, silent_s = self.changes(tenant), 0.0
        self._num_viewers[tenant] += 1
        try:
            while not self._context.admission.is_draining:
                text = await self._context.in_thread(tenant, lambda: _next_event(changes))
                silent_s = 0.0 if text else silent_s + _LOOK_S
                if silent_s >= _SILENCE_S:
                    text, silent_s = ": nothing new\n\n", 0.0
                if text:
                    yield text
                await asyncio.sleep(_MORE_S if changes.has_more else _LOOK_S)
        finally:
            self._num_viewers[tenant] -= 1


def _next_event(changes: Changes) -> str:
    document = changes.next()
    if document is None:
        return ""
    return f"data: {json.dumps(document, separators=(',', ':'))}\n\n"


def add_dashboard(app: FastAPI, context: ServerContext) -> Dashboard:
    """Add its routes to an application; the caller runs `digest`."""
    dashboard = Dashboard(context)

    @app.get("/dashboard", include_in_schema=False)
    async def show() -> Response:
        text = page("dashboard/events", "dashboard/")
        return Response(text, media_type="text/html", headers=HEADERS)

    @app.get("/dashboard/events", include_in_schema=False)
    async def events(tenant: Tenant) -> Response:
        stream = dashboard.open_stream(tenant)
        return StreamingResponse(stream, media_type="text/event-stream", headers=HEADERS)

    @app.get("/dashboard/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        found = asset(name)
        if found is None:
            raise ApiError(404, f"The dashboard has no part {name[:100]!r}.")
        return Response(found.content, media_type=found.media_type, headers=HEADERS)

    return dashboard
