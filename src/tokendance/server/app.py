"""The application: routes, errors, and what operators need."""

import asyncio
import difflib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import FastAPI, Query, Request, Response
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
from tokendance.server.embeddings import EmbeddingAnswer, EmbeddingRequest, embed
from tokendance.server.errors import ApiError, as_api_error, without_origin
from tokendance.server.home_page import home_page
from tokendance.server.limits import Limits
from tokendance.server.logs import RequestLog
from tokendance.server.malloc import collect_when_idle, give_back_memory
from tokendance.server.openapi import DocumentedAPI, whole_or_stream
from tokendance.server.pauses import watch_event_loop
from tokendance.server.protocol import ChatRequest, CompletionRequest, RoundRequest
from tokendance.server.respond import respond, unless_gone
from tokendance.server.responses import (
    ChatAnswer,
    JSONAnswer,
    ModelCard,
    ModelList,
    RoundAnswer,
    Status,
    TextAnswer,
    Version,
    dump,
)
from tokendance.server.responses_api.bodies import ResponsesRequest
from tokendance.server.responses_api.endpoint import ResponsesEndpoint
from tokendance.server.responses_api.items import ItemList, page
from tokendance.server.responses_api.output import Deleted, ResponsesAnswer
from tokendance.server.rounds import LoneRound, SessionRound
from tokendance.server.settings import ServerSettings
from tokendance.server.tokens import (
    Detokenized,
    DetokenizeRequest,
    TokenizeRequest,
    Tokens,
    detokenize,
    tokenize,
)
from tokendance.server.turnstile import Turnstile


def create_app(llm: LLM, settings: ServerSettings) -> FastAPI:
    """Make the ASGI application; it owns the engine from its start to its end."""
    context = ServerContext(llm, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        context.engine_thread.start()
        context.embeddings.start()
        background = [
            asyncio.create_task(give_back_memory()),
            asyncio.create_task(collect_when_idle(context.admission.activity)),
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
            await anyio.to_thread.run_sync(context.embeddings.stop)
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
            allow_methods=["GET", "POST", "DELETE"],
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


async def _answer_error(request: Request, error: Exception) -> JSONAnswer:
    answer = as_api_error(error)
    if answer.status < 500:
        without_origin(error)  # FastAPI keeps it, or what it comes from, where it is raised
    if isinstance(error, HTTPException) and error.status_code == 404:
        answer.message = _not_found(request.url.path, request.app)
    elif answer.status == 405:
        allowed = answer.headers.get("Allow", "another method")
        answer.message = f"{request.method} is not answered here. Send {allowed}."
    return JSONAnswer(answer.body(), answer.status, answer.headers)


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

    @app.post("/v1/responses", responses=whole_or_stream(ResponsesAnswer))
    async def responses(body: ResponsesRequest, request: Request, tenant: Tenant) -> Response:
        """Answer a conversation, as OpenAI's newer API has it."""
        return await respond(ResponsesEndpoint(context, tenant, body), request)

    @app.get("/v1/responses/{response_id}", response_model=ResponsesAnswer)
    async def kept_response(response_id: str, tenant: Tenant) -> JSONAnswer:
        """An answer that is remembered."""
        return JSONAnswer(context.kept_answers.get(tenant, response_id).document)

    @app.get("/v1/responses/{response_id}/input_items", response_model=ItemList)
    async def input_items(
        response_id: str,
        tenant: Tenant,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> JSONAnswer:
        """What was new in the request of an answer that is remembered."""
        items = context.kept_answers.get(tenant, response_id).input_items
        return JSONAnswer(dump(page(items, limit, order, after)))

    @app.delete("/v1/responses/{response_id}", response_model=Deleted)
    async def forget_response(response_id: str, tenant: Tenant) -> Deleted:
        """Forget an answer."""
        context.kept_answers.forget(tenant, response_id)
        return Deleted(id=response_id, object="response", deleted=True)

    @app.post("/v1/completions", responses=whole_or_stream(TextAnswer))
    async def completions(body: CompletionRequest, request: Request, tenant: Tenant) -> Response:
        """Go on with texts, or with token ids."""
        return await respond(CompletionEndpoint(context, tenant, body), request)

    @app.post("/v1/rounds", responses=whole_or_stream(RoundAnswer))
    async def rounds(body: RoundRequest, request: Request, tenant: Tenant) -> Response:
        """Answer all agents of a round."""
        endpoint = LoneRound if body.session is None else SessionRound
        return await respond(endpoint(context, tenant, body), request)

    @app.post("/v1/embeddings", response_model=EmbeddingAnswer)
    async def embeddings(body: EmbeddingRequest, request: Request, tenant: Tenant) -> Response:
        """Make vectors of texts, or of token ids."""
        return await unless_gone(request.receive, embed(context, tenant, body))

    @app.post("/tokenize", response_model=Tokens)
    async def tokens(body: TokenizeRequest, tenant: Tenant) -> Tokens:
        """Make tokens of a text, or of a conversation."""
        return await tokenize(context, tenant, body)

    @app.post("/detokenize", response_model=Detokenized)
    async def text(body: DetokenizeRequest, tenant: Tenant) -> Detokenized:
        """Make a text of tokens."""
        return await detokenize(context, tenant, body)


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

    @app.get("/version", response_model=Version)
    async def version() -> Version:
        """Which version of TokenDance it is."""
        return Version(version=__version__)

    @app.get("/", include_in_schema=False)
    async def home() -> Response:
        """A page for people."""
        return home_page(None if context.settings.api_keys else context.model_name)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(context.metrics.text(), media_type="text/plain; version=0.0.4")

    def card_of(name: str, max_tokens: int) -> ModelCard:
        return ModelCard(
            id=name,
            object="model",
            created=context.started_s,
            owned_by="tokendance",
            max_model_len=max_tokens,
        )

    cards = [
        card_of(context.model_name, context.llm.model.shape.max_context),
        card_of(context.embedding_model_name, context.max_embedding_tokens),
    ]

    @app.get("/v1/models", response_model=ModelList)
    async def models() -> ModelList:
        """The model that answers, and the one that makes vectors."""
        return ModelList(object="list", data=cards)

    @app.get("/v1/models/{name:path}", response_model=ModelCard)
    async def model(name: str) -> ModelCard:
        """One of them, by its name."""
        if name == context.embedding_model_name:
            return cards[1]
        context.check_model(name)
        return cards[0]
