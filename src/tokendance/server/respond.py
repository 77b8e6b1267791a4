"""From a request to its answer, at once or as a stream.

request -> admitted -> read (a thread) -> jobs -> worker -> events -> answer
"""

import asyncio
import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from tokendance.disk.records import SessionKey
from tokendance.executor.step import TokenLogprobs
from tokendance.outputs import Output
from tokendance.params import SamplingParams
from tokendance.rounds.segments import EncodedPrompt
from tokendance.server.answers import Delta, Listener, deltas, taken_back
from tokendance.server.chat import sampling_params
from tokendance.server.context import ServerContext
from tokendance.server.engine_thread import EngineThread
from tokendance.server.errors import ApiError, as_api_error, bad_request
from tokendance.server.grammar import GrammarConstraint
from tokendance.server.jobs import Job, RoundKey
from tokendance.server.protocol import CompletionRequest, Sampling, refuse_unsupported
from tokendance.server.responses import CachedTokens, FinishReason, Usage, dump
from tokendance.store.entries import RoundId

Result = TypeVar("Result")
Body = TypeVar("Body", bound=Sampling)

_NO_ROUND = RoundId(-1)  # until the worker has found the round


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that was read: prompts, and how each of its answers is chosen.

    Attributes:
        prompts: each has as many answers as there are `params`.
        params: of an answer.
        constraints: likewise.
        key: of the round that the client names.
        round_size: requests of that round, if the client says.
        agent: who asks.
        marked: see `Job`.
        session: whose KV is kept, if the client names one.
        field: of the body that has the prompts.
    """

    prompts: list[EncodedPrompt]
    params: list[SamplingParams]
    constraints: list[GrammarConstraint | None]
    key: RoundKey | None
    round_size: int | None
    agent: str
    marked: bool
    session: SessionKey | None
    field: str


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the answers to a request, with log-probabilities of its tokens if asked for."""

    output: Output
    logprobs: list[TokenLogprobs]


class Endpoint(ABC, Generic[Body]):
    """One request to an endpoint: how it is read, and what its answers look like.

    Attributes:
        kind: begins the ids of its answers.
        context: of the server.
        tenant: who asks.
        body: of the request.
        encoder: of the tenant's prompts.
        head: what all its documents begin with.
    """

    kind: ClassVar[str]

    def __init__(self, context: ServerContext, tenant: str, body: Body) -> None:
        """Take a request.

        Args:
            context: of the server.
            tenant: who asks.
            body: of the request.

        Raises:
            ApiError: if it asks for another model.
        """
        context.check_model(body.model)
        self.context = context
        self.tenant = tenant
        self.body = body
        self.encoder = context.encoder(tenant)
        self.head = context.head(self.kind)

    @abstractmethod
    def read(self) -> Ask:
        """Read the body; called on a thread of the tenant's.

        Raises:
            ApiError: for what cannot be answered.
        """

    @abstractmethod
    def whole(self, answers: Sequence[Answer], usage: Usage) -> BaseModel:
        """The document that has all answers."""

    @abstractmethod
    def chunks(self, delta: Delta) -> Sequence[BaseModel]:
        """The events of a stream that tell what is new of an answer."""

    @abstractmethod
    def usage_chunk(self, usage: Usage) -> BaseModel:
        """The last event of a stream, for clients who ask for the usage."""


# ---- from a body to jobs -------------------------------------------------------------------------


def read_ask(
    context: ServerContext,
    body: Sampling,
    prompts: list[EncodedPrompt],
    constraint: GrammarConstraint | None = None,
    *,
    marked: bool = False,
) -> Ask:
    """Read what requests of all kinds have.

    Args:
        context: of the server.
        body: of the request.
        prompts: that were read of it.
        constraint: of each answer.
        marked: see `Job`.

    Raises:
        ApiError: for what is not supported.
    """
    refuse_unsupported(body)
    choices = check_choices(context, body, len(prompts))
    size = context.llm.model.shape.vocab_size
    params = [sampling_params(body, context.settings, size, choice) for choice in range(choices)]
    key, round_size, agent, session = None, None, None, None
    if body.round is not None:
        salt = prompts[0].salt
        key = RoundKey(salt, body.round.id)
        round_size, agent = body.round.size, body.round.agent
        if body.round.session is not None:
            session = SessionKey(f"chat/{salt.hex()}", body.round.session)
    return Ask(
        prompts,
        params,
        [None if constraint is None else constraint.copy() for _ in params],
        key,
        round_size,
        agent or "the client",
        marked,
        session,
        "prompt" if isinstance(body, CompletionRequest) else "messages",
    )


def check_choices(context: ServerContext, body: Sampling, num_prompts: int) -> int:
    """How many answers each prompt of a request shall have.

    Raises:
        ApiError: if those are too many for one request.
    """
    choices = body.n or 1
    if choices * num_prompts > context.settings.max_choices:
        raise bad_request(
            f"{num_prompts} prompts with n = {choices} are more than the "
            f"{context.settings.max_choices} answers that one request may have.",
            "n",
        )
    return choices


def make_jobs(context: ServerContext, ask: Ask, listener: Listener, first: int = 0) -> list[Job]:
    """Make a job for each choice of each prompt.

    Args:
        context: of the server.
        ask: what was asked.
        listener: that is told of their events.
        first: number of the first of them; the others follow.

    Raises:
        ApiError: for a prompt that cannot be run.
    """
    jobs: list[Job] = []
    for prompt in ask.prompts:
        for params, constraint in zip(ask.params, ask.constraints, strict=True):
            request = context.llm.request_of(prompt, params, ask.agent, _NO_ROUND)
            if request.error is not None:
                raise bad_request(str(request.error), ask.field, "context_length_exceeded")
            request.constraint = constraint
            request.session = ask.session
            on_event = listener.of(first + len(jobs))
            jobs.append(Job(request, on_event, ask.key, ask.round_size, ask.marked))
    return jobs


async def begin(
    context: ServerContext, tenant: str, read: Callable[[], Ask]
) -> tuple[list[Job], Listener]:
    """Read a request on another thread, while others of its round wait for it, and hand it in."""
    context.engine_thread.arrive()
    listener = Listener()
    try:
        ask = await context.in_thread(tenant, read)
        jobs = make_jobs(context, ask, listener)
        if ask.session is not None:
            chat = context.sessions.chat(tenant, ask.session, ask.prompts[0].salt)
            for job in jobs:
                job.session = chat
    except BaseException:
        context.engine_thread.withdraw()
        raise
    context.engine_thread.submit(jobs, announced=True)
    return jobs, listener


# ---- from jobs to an answer ----------------------------------------------------------------------


async def respond(endpoint: Endpoint[Body], request: Request) -> Response:
    """Answer a request, of HTTP, at once or as a stream."""
    context, body = endpoint.context, endpoint.body
    async with AsyncExitStack() as stack:
        stack.enter_context(context.admission.admitted(endpoint.tenant))
        jobs, listener = await begin(context, endpoint.tenant, endpoint.read)
        request.state.jobs = jobs
        if body.stream:
            events = _events(endpoint, jobs, listener)
            return ReleasingStream(events, context.engine_thread, jobs, stack.pop_all())
        with taken_back(context.engine_thread, jobs):
            answers = await unless_gone(request, _collect(context, jobs, listener))
        usage = usage_of([answer.output for answer in answers], body.n or 1)
        return JSONResponse(dump(endpoint.whole(answers, usage)))


async def _collect(context: ServerContext, jobs: Sequence[Job], listener: Listener) -> list[Answer]:
    """Wait for all answers.

    Raises:
        ApiError: if one could not be given.
    """
    outputs: dict[int, Output] = {}
    logprobs: list[list[TokenLogprobs]] = [[] for _ in jobs]
    numbered = dict(enumerate(jobs))
    async for delta in deltas(listener, numbered, context.llm.model.tokenizer, spelt=False):
        logprobs[delta.index] += delta.logprobs
        if delta.output is not None:
            if delta.output.error is not None:
                raise as_api_error(delta.output.error)
            outputs[delta.index] = delta.output
    return [Answer(outputs[index], logprobs[index]) for index in range(len(jobs))]


async def _events(
    endpoint: Endpoint[Body], jobs: Sequence[Job], listener: Listener
) -> AsyncIterator[str]:
    """Events as the answers grow; an error ends the stream with an event of its own."""
    body = endpoint.body
    outputs: dict[int, Output] = {}
    tokenizer = endpoint.context.llm.model.tokenizer
    async for delta in deltas(listener, dict(enumerate(jobs)), tokenizer):
        if delta.output is not None:
            if delta.output.error is not None:
                yield event(as_api_error(delta.output.error).body())
                return
            outputs[delta.index] = delta.output
        for chunk in endpoint.chunks(delta):
            yield event(dump(chunk))
    if body.stream_options is not None and body.stream_options.include_usage:
        usage = usage_of([outputs[index] for index in range(len(jobs))], body.n or 1)
        yield event(dump(endpoint.usage_chunk(usage)))
    yield LAST_EVENT


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Do something unless the client goes away before it is done."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "The client has gone.")
        return task.result()
    finally:
        for waiting in (task, gone):
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await waiting


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def usage_of(outputs: Sequence[Output], choices: int) -> Usage:
    """Tokens as OpenAI counts them: a prompt once, however many answers it has."""
    firsts = outputs[::choices]
    prompt = sum(output.prompt_tokens for output in firsts)
    answer = sum(len(output.token_ids) for output in outputs)
    cached = sum(output.reused_tokens for output in firsts)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=answer,
        total_tokens=prompt + answer,
        prompt_tokens_details=CachedTokens(cached_tokens=cached),
    )


def finish_reason(output: Output) -> FinishReason:
    """Why an answer without an error has ended."""
    return "length" if output.finish_reason == "length" else "stop"


LAST_EVENT = "data: [DONE]\n\n"


def event(document: dict[str, Any]) -> str:
    """A document as a server-sent event."""
    return f"data: {json.dumps(document)}\n\n"


class ReleasingStream(StreamingResponse):
    """A stream of events that lets go of its jobs and its admission however it ends."""

    def __init__(
        self,
        events: AsyncIterator[str],
        worker: EngineThread,
        jobs: Sequence[Job],
        stack: AsyncExitStack,
    ) -> None:
        """Send `events`; then take `jobs` back, and let go of what `stack` holds.

        Args:
            events: to send.
            worker: that has the jobs.
            jobs: whose events they are.
            stack: its admission, and what else ends with it.
        """
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._worker = worker
        self._jobs = jobs
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._worker.cancel(self._jobs)
            await self._stack.aclose()
