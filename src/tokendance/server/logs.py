"""Logs: a line for each request, as text or as JSON, with the id that its answer has, too.

No text of a prompt or an answer is logged, only the tenant (a few digits of the key's hash), the
path, how the request ended, how long it took, and how many tokens were computed and reused.
"""

import json
import logging
import re
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokendance.server.ids import new_id
from tokendance.server.settings import LogFormat

log = logging.getLogger("tokendance.server.requests")

_ID_HEADER = b"x-request-id"
_QUIET_PATHS = {"/health", "/ready", "/metrics"}
_TENANT_DIGITS = 8


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the figures of a request."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one record."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        document = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "figures", {}),
        }
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return json.dumps(document)


def configure(log_format: LogFormat) -> None:
    """Send logs of this package to standard error."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # Of warnings there is one for each event of a stream whose client has gone.
    logging.getLogger("asyncio").setLevel(logging.ERROR)


class RequestLog:
    """ASGI middleware: gives each request an id, and logs it when it has ended.

    A client may choose the id (header x-request-id); the answer has it in the same header.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = dict(scope["headers"]).get(_ID_HEADER, b"").decode("latin-1")
        if not re.fullmatch(r"[\w.-]{1,64}", request_id, re.ASCII):
            request_id = f"req-{new_id()}"
        state: dict[str, Any] = scope.setdefault("state", {})
        started_s = time.perf_counter()
        status = 499  # if no answer is sent: the client has disconnected

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                id_header = (_ID_HEADER, request_id.encode())
                message["headers"] = [*message.get("headers", ()), id_header]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            figures = {
                "id": request_id,
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "seconds": round(time.perf_counter() - started_s, 4),
                **_token_figures(state),
            }
            level = logging.DEBUG if scope["path"] in _QUIET_PATHS else logging.INFO
            text = " ".join(f"{name}={value!r}" for name, value in figures.items())
            log.log(level, text, extra={"figures": figures})


def _token_figures(state: dict[str, Any]) -> dict[str, Any]:
    """Figures of `tenant` and `jobs`, as far as middleware and routes have set them."""
    figures: dict[str, Any] = {}
    if state.get("tenant"):
        figures["tenant"] = state["tenant"][:_TENANT_DIGITS]
    if "jobs" in state:
        requests = [job.request for job in state["jobs"]]
        figures["answers"] = len(requests)
        figures["prompt_tokens"] = sum(len(request.prompt) for request in requests)
        figures["reused_tokens"] = sum(request.num_reused for request in requests)
        figures["answer_tokens"] = sum(len(request.generated) for request in requests)
        reasons = {request.finish_reason or "unfinished" for request in requests}
        figures["ended_by"] = "+".join(sorted(reasons))
    return figures
