"""The application: routes, errors, and what operators need."""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from tokendance import __version__
from tokendance.errors import TokenDanceError
from tokendance.llm import LLM
from tokendance.server.chat_routes import add_chat
from tokendance.server.completion_routes import add_completions
from tokendance.server.context import ServerContext
from tokendance.server.errors import ApiError, as_api_error, bad_request
from tokendance.server.limits import Limits
from tokendance.server.logs import RequestLog
from tokendance.server.malloc import give_back_memory
from tokendance.server.openapi import DocumentedAPI
from tokendance.server.responses import ModelCard, ModelList, Status, dump
from tokendance.server.round_routes import add_rounds
from tokendance.server.settings import ServerSettings

_SHAPES = {"str", "int", "float", "bool", "list", "dict"}


def create_app(llm: LLM, settings: ServerSettings) -> FastAPI:
    """Make the ASGI application; it owns the engine from its start to its end."""
    context = ServerContext(llm, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        context.engine_thread.start()
        giving_back = asyncio.create_task(give_back_memory())
        drain_s = 0.0  # where the server is told to end at once
        try:
            yield
            drain_s = settings.drain
        finally:
            giving_back.cancel()
            context.admission.is_draining = True
            await anyio.to_thread.run_sync(context.engine_thread.stop, drain_s)

    app = DocumentedAPI(title="TokenDance", version=__version__, lifespan=lifespan)
    app.state.context = context
    _add_errors(app)
    _add_operations(app, context)
    add_chat(app, context)
    add_completions(app, context)
    add_rounds(app, context)
    app.add_middleware(
        Limits,
        tenant_of=context.keys.authenticate,
        max_body_bytes=settings.max_body_bytes,
        max_body_objects=settings.max_body_objects,
        body_timeout_s=settings.body_timeout,
    )
    app.add_middleware(RequestLog)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        del request
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(TokenDanceError)
    async def engine_error(request: Request, error: TokenDanceError) -> JSONResponse:
        return await api_error(request, as_api_error(error))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        # It is in the log with its traceback; the client learns no more than that.
        del error
        return await api_error(request, ApiError(500, "The server failed on this request."))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = _field(first["loc"]) if first["type"] != "json_invalid" else None
        text = f"{param or 'The body'}: {first['msg']}."
        return await api_error(request, bad_request(text, param))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {})
        return await api_error(
            request, ApiError(error.status_code, str(error.detail), headers=headers)
        )


def _field(place: Sequence[str | int]) -> str | None:
    """The name of a field, from where pydantic found it.

    Which of several shapes it might have had is a part of the place, and not of the name.
    """
    parts = [str(part) for part in place if part != "body"]
    named = [part for part in parts if re.fullmatch("[a-z_]+|[0-9]+", part) and part not in _SHAPES]
    return ".".join(named) or None


def _add_operations(app: FastAPI, context: ServerContext) -> None:
    unwell: dict[int | str, dict[str, Any]] = {503: {"model": Status}}

    def status(text: str, *, is_well: bool) -> JSONResponse:
        return JSONResponse(dump(Status(status=text)), 200 if is_well else 503)

    @app.get("/health", response_model=Status, responses=unwell)
    async def health() -> JSONResponse:
        """Whether the engine runs."""
        alive = context.engine_thread.is_alive
        return status("ok" if alive else "failed", is_well=alive)

    @app.get("/ready", response_model=Status, responses=unwell)
    async def ready() -> JSONResponse:
        """Whether requests are taken."""
        is_ready = context.admission.is_ready
        return status("ready" if is_ready else "not ready", is_well=is_ready)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(context.metrics.text(), media_type="text/plain; version=0.0.4")

    card = ModelCard(
        id=context.model_name,
        object="model",
        created=context.started_s,
        owned_by="tokendance",
        max_model_len=context.llm.model.shape.max_context,
    )

    @app.get("/v1/models", response_model=ModelList)
    async def models() -> ModelList:
        """The one model."""
        return ModelList(object="list", data=[card])

    @app.get("/v1/models/{name:path}", response_model=ModelCard)
    async def model(name: str) -> ModelCard:
        """The one model, by its name."""
        context.check_model(name)
        return card
