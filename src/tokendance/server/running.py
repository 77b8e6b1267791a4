"""From a request that was read to its answer, at once or as a stream.

request -> admitted -> read (a thread) -> jobs -> worker -> events -> answer
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
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
from tokendance.server.jobs import Event, Job, RoundKey
from tokendance.server.protocol import CompletionRequest, Sampling, refuse_unsupported
from tokendance.store.entries import RoundId

Result = TypeVar("Result")

_NO_ROUND = RoundId(-1)  # until the worker has found the round


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that was read: prompts, and how each of its answers is chosen."""

    prompts: list[EncodedPrompt]
    params: list[SamplingParams]
    constraints: list[GrammarConstraint | None]
    key: RoundKey | None
    round_size: int | None
    agent: str
    marked: bool
    session: SessionKey | None
    field: str


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
    given = body.round
    return Ask(
        prompts,
        params,
        [None if constraint is None else constraint.copy() for _ in params],
        None if given is None else RoundKey(prompts[0].salt, given.id),
        None if given is None else given.size,
        (given.agent if given is not None else None) or "the client",
        marked,
        None
        if given is None or given.session is None
        else SessionKey(f"chat/{prompts[0].salt.hex()}", given.session),
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


def make_jobs(
    context: ServerContext, ask: Ask, ear: Callable[[int], Callable[[Event], None]]
) -> list[Job]:
    """Make a job for each choice of each prompt.

    Args:
        context: of the server.
        ask: what was asked.
        ear: gives job number i what it tells its events to.

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
            ear_of = ear(len(jobs))
            jobs.append(Job(request, ear_of, ask.key, ask.round_size, ask.marked))
    return jobs


async def begin(
    context: ServerContext, tenant: str, read: Callable[[], Ask]
) -> tuple[list[Job], Listener]:
    """Read a request on another thread, while others of its round wait for it, and hand it in."""
    context.worker.arrive()
    listener = Listener()
    try:
        ask = await context.in_thread(tenant, read)
        jobs = make_jobs(context, ask, listener.of)
        if ask.session is not None:
            chat = context.sessions.chat(tenant, ask.session, ask.prompts[0].salt)
            for job in jobs:
                job.session = chat
    except BaseException:
        context.worker.withdraw()
        raise
    context.worker.submit(jobs, announced=True)
    return jobs, listener


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
        for one in (task, gone):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await one


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def collect(
    context: ServerContext, jobs: Sequence[Job], listener: Listener
) -> tuple[list[Output], list[list[TokenLogprobs]]]:
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
    return [outputs[index] for index in range(len(jobs))], logprobs


def usage_of(outputs: Sequence[Output], choices: int) -> dict[str, Any]:
    """Tokens as OpenAI counts them: a prompt once, however many answers it has."""
    firsts = outputs[::choices]
    prompt = sum(output.prompt_tokens for output in firsts)
    answer = sum(len(output.token_ids) for output in outputs)
    cached = sum(output.reused_tokens for output in firsts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


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


async def events_of(
    context: ServerContext,
    jobs: Sequence[Job],
    listener: Listener,
    chunks: Callable[[Delta], list[dict[str, Any]]],
    last_chunk: Callable[[list[Output]], dict[str, Any]] | None,
) -> AsyncIterator[str]:
    """Events as the answers grow; an error ends the stream with an event of its own."""
    outputs: dict[int, Output] = {}
    async for delta in deltas(listener, dict(enumerate(jobs)), context.llm.model.tokenizer):
        if delta.output is not None:
            if delta.output.error is not None:
                yield event(as_api_error(delta.output.error).body())
                return
            outputs[delta.index] = delta.output
        for chunk in chunks(delta):
            yield event(chunk)
    if last_chunk is not None:
        yield event(last_chunk([outputs[index] for index in range(len(jobs))]))
    yield "data: [DONE]\n\n"


async def answer(
    context: ServerContext,
    tenant: str,
    request: Request,
    body: Sampling,
    read: Callable[[], Ask],
    whole: Callable[[list[Job], list[Output], list[list[TokenLogprobs]]], dict[str, Any]],
    chunks: Callable[[list[Job]], Callable[[Delta], list[dict[str, Any]]]],
    chunk_head: dict[str, Any],
) -> Response:
    """Answer a request at once or as a stream, with its usage.

    Args:
        context: of the server.
        tenant: who asks.
        request: of HTTP.
        body: says whether it is a stream, and whether that has its usage.
        read: reads the request; called on another thread.
        whole: makes the document of an answer, but for its usage.
        chunks: makes what turns deltas into the documents of a stream.
        chunk_head: what those have in common.
    """

    def usage(outputs: list[Output]) -> dict[str, Any]:
        return {"usage": usage_of(outputs, body.n or 1)}

    def last_chunk(outputs: list[Output]) -> dict[str, Any]:
        return {**chunk_head, "choices": [], **usage(outputs)}

    async with AsyncExitStack() as stack:
        stack.enter_context(context.admission.admitted(tenant))
        jobs, listener = await begin(context, tenant, read)
        request.state.jobs = jobs
        if body.stream:
            wanted = body.stream_options is not None and body.stream_options.include_usage
            last = last_chunk if wanted else None
            found = events_of(context, jobs, listener, chunks(jobs), last)
            return ReleasingStream(found, context.worker, jobs, stack.pop_all())
        with taken_back(context.worker, jobs):
            outputs, logprobs = await unless_gone(request, collect(context, jobs, listener))
        return JSONResponse({**whole(jobs, outputs, logprobs), **usage(outputs)})
