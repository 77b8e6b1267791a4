"""The application: routes, errors, and what operators need."""

import asyncio
import difflib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from tokendance import __version__
from tokendance.errors import TokenDanceError
from tokendance.llm import LLM
from tokendance.server.auth import Tenant
from tokendance.server.chat import ChatEndpoint
from tokendance.server.completions import CompletionEndpoint
from tokendance.server.context import ServerContext
from tokendance.server.dashboard import add_dashboard
from tokendance.server.errors import ApiError, as_api_error
from tokendance.server.limits import Limits
from tokendance.server.logs import RequestLog
from tokendance.server.malloc import give_back_memory
from tokendance.server.openapi import DocumentedAPI, whole_or_stream
from tokendance.server.pauses import watch_event_loop
from tokendance.server.protocol import ChatRequest, CompletionRequest, RoundRequest
from tokendance.server.respond import respond
from tokendance.server.responses import (
    ChatAnswer,
    ModelCard,
    ModelList,
    RoundAnswer,
    Status,
    TextAnswer,
    dump,
)
from tokendance.server.rounds import LoneRound, SessionRound
from tokendance.server.settings import ServerSettings
from tokendance.server.turnstile import Turnstile


def create_app(llm: LLM, settings: ServerSettings) -> FastAPI:
    """Make the ASGI application; it owns the engine from its start to its end."""
    context = ServerContext(llm, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        context.engine_thread.start()
        background = [
            asyncio.create_task(give_back_memory()),
            asyncio.create_task(context.connections.watch()),
            asyncio.create_task(watch_event_loop(context.metrics.event_loop_pauses)),
        ]
        if dashboard is not None:
            background.append(asyncio.create_task(dashboard.digest()))
        drain_s = 0.0  # if the server is cancelled
        try:
            yield
            drain_s = settings.drain
        finally:
            for task in background:
                task.cancel()
            context.admission.is_draining = True
            await anyio.to_thread.run_sync(context.engine_thread.stop, drain_s)
            context.grammars.close()

    app = DocumentedAPI(title="TokenDance", version=__version__, lifespan=lifespan)
    app.state.context = context
    for kind in (ApiError, TokenDanceError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer_error)
    _add_operations(app, context)
    _add_endpoints(app, context)
    dashboard = add_dashboard(app, context) if settings.dashboard else None
    app.add_middleware(Limits, context=context)
    if settings.cors_origins:
        # Around the limits: a page may ask without a key whether it may ask, and learns of errors.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[
                "x-request-id",
                "retry-after",
                "x-tokendance-max-tokens",
                "x-tokendance-not-held",
            ],
        )
    app.add_middleware(RequestLog)
    app.add_middleware(Turnstile)
    return app


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    answer = as_api_error(error)
    if isinstance(error, HTTPException) and error.status_code == 404:
        answer.message = _not_found(request.url.path, request.app)
    return JSONResponse(answer.body(), answer.status, answer.headers)


def _not_found(path: str, app: FastAPI) -> str:
    """That a path is not served, and the nearest that is."""
    served = [route.path for route in app.routes if isinstance(route, APIRoute)]
    near = difflib.get_close_matches(path, [one for one in served if "{" not in one], 1, 0.6)
    hint = f"Did you mean {near[0]}?" if near else "/docs lists what is."
    return f"{path[:100]} is not served here. {hint}"


def _add_endpoints(app: FastAPI, context: ServerContext) -> None:
    @app.post("/v1/chat/completions", responses=whole_or_stream(ChatAnswer))
    async def chat(body: ChatRequest, request: Request, tenant: Tenant) -> Response:
        """Answer a conversation."""
        return await respond(ChatEndpoint(context, tenant, body), request)

    @app.post("/v1/completions", responses=whole_or_stream(TextAnswer))
    async def completions(body: CompletionRequest, request: Request, tenant: Tenant) -> Response:
        """Go on with texts, or with token ids."""
        return await respond(CompletionEndpoint(context, tenant, body), request)

    @app.post("/v1/rounds", responses=whole_or_stream(RoundAnswer))
    async def rounds(body: RoundRequest, request: Request, tenant: Tenant) -> Response:
        """Answer all agents of a round."""
        endpoint = LoneRound if body.session is None else SessionRound
        return await respond(endpoint(context, tenant, body), request)


def _add_operations(app: FastAPI, context: ServerContext) -> None:
    unwell: dict[int | str, dict[str, Any]] = {503: {"model": Status}}

    def status(is_well: bool, *, well: str, ill: str) -> JSONResponse:
        document = Status(status=well if is_well else ill)
        return JSONResponse(dump(document), 200 if is_well else 503)

    @app.get("/health", response_model=Status, responses=unwell)
    async def health() -> JSONResponse:
        """Whether the engine runs."""
        return status(context.engine_thread.is_alive, well="ok", ill="failed")

    @app.get("/ready", response_model=Status, responses=unwell)
    async def ready() -> JSONResponse:
        """Whether new requests are accepted."""
        return status(context.admission.is_ready, well="ready", ill="not ready")

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
