"""Endpoints, and how a request to one is answered, whole or as a stream.

Its way: admission -> read (on a thread) -> jobs -> engine thread -> events -> answer.
"""

import asyncio
import contextlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from tokendance.disk.records import SessionKey
from tokendance.engine.request import ANONYMOUS
from tokendance.errors import TokenDanceError
from tokendance.executor.step import TokenLogprobs
from tokendance.outputs import Output
from tokendance.rounds.segments import EncodedPrompt
from tokendance.server.answer_grammar import Wanted
from tokendance.server.context import ServerContext
from tokendance.server.errors import ApiError, as_api_error, bad_request
from tokendance.server.grammar_constraint import AnswerConstraint, GrammarConstraint
from tokendance.server.jobs import Delta, Job, Listener, RoundKey
from tokendance.server.protocol import (
    ChatRequest,
    CompletionRequest,
    RoundRequest,
    Sampling,
)
from tokendance.server.responses import (
    AnswerTokens,
    CachedTokens,
    FinishReason,
    JSONAnswer,
    PromptLogprobs,
    Usage,
    dump,
)
from tokendance.server.sampling import sampling_params
from tokendance.store.entries import RoundId

Result = TypeVar("Result")
Body = TypeVar("Body", ChatRequest, CompletionRequest, RoundRequest)
PromptBody = TypeVar("PromptBody", ChatRequest, CompletionRequest)

_MAX_HEADER = 1000
LEAST_LOGPROB = -9999.0  # JSON has no infinity
_NO_ROUND = RoundId(-1)  # until the dispatcher has found the round


class Endpoint(ABC, Generic[Body]):
    """One request to an endpoint: how it is read and run, and the documents of its answer.

    Attributes:
        kind: begins the id of the answer.
        prompt_field: the field of the body that errors of prompts name.
        num_agents: see `Admission.admitted`.
        head: first fields of each document.
        headers: of the answer; `read` adds them.
        jobs: by the index of the answer that each gives; `read` adds them.
        listener: receives the jobs' events; set by `read_on_thread`.
    """

    kind: ClassVar[str]
    prompt_field = "messages"
    num_agents = 1
    listener: Listener

    def __init__(self, context: ServerContext, tenant: str, body: Body) -> None:
        """Take a tenant's request; raises ApiError for another model."""
        context.check_model(body.model)
        self.context = context
        self.tenant = tenant
        self.body: Body = body
        self.encoder = context.encoder(tenant, body.cache_salt)
        self.head = context.head(self.kind)
        self.headers: dict[str, str] = {}
        self.jobs: dict[int, Job] = {}

    @property
    def in_parts(self) -> bool:
        """See `Job`."""
        return False

    @abstractmethod
    def read(self) -> None:
        """Make jobs of the body; called on a thread. Raises ApiError for bodies that are wrong."""

    @abstractmethod
    async def begin(self, stack: AsyncExitStack) -> None:
        """Read the body and submit the jobs; `stack` is closed when the answer has been sent."""

    @abstractmethod
    async def whole(self) -> BaseModel:
        """Wait for all answers, and make the document of them."""

    @abstractmethod
    def documents(self) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream, as they come."""

    async def events(self) -> AsyncIterator[str]:
        """`documents` as server-sent events; an error is the last of them."""
        try:
            async for document in self.documents():
                yield _event(document)
        except (ApiError, TokenDanceError) as error:
            yield _event(as_api_error(error).body())
        else:
            yield "data: [DONE]\n\n"

    async def read_on_thread(self) -> list[Job]:
        """Call `read` on a thread, and return the jobs that it has made."""
        self.listener = Listener(self.context.mailbox)
        await self.context.in_thread(self.tenant, self.read)
        return list(self.jobs.values())

    def add_jobs(
        self,
        body: Sampling,
        prompts: Sequence[EncodedPrompt],
        *,
        agent: str = ANONYMOUS,
        first: int = 0,
        constraint: AnswerConstraint | None = None,
        marked: bool = False,
        guarded: bool = False,
    ) -> None:
        """Add a job for each answer to each prompt.

        Args:
            body: of the request, or of an agent of a round.
            prompts: its prompts.
            agent: whose they are, unless `body.round` says it.
            first: index of the first answer; the others follow.
            constraint: on each answer.
            marked: see `Job`.
            guarded: see `Request`; the body may ask for it, too.

        Raises:
            ApiError: for unsupported fields, and for a prompt that is too long.
        """
        llm, settings = self.context.llm, self.context.settings
        vocab_size = llm.model.shape.vocab_size
        choices = [
            sampling_params(body, settings, vocab_size, choice) for choice in range(body.n or 1)
        ]
        key, size, session = None, None, None
        if body.round is not None:
            salt = prompts[0].salt
            agent = body.round.agent or agent
            key, size = RoundKey(salt, body.round.id), body.round.size
            if body.round.session is not None:
                session = SessionKey(f"chat/{salt.hex()}", body.round.session)
        guarded |= body.private == "isolated"
        for index, (prompt, params) in enumerate(itertools.product(prompts, choices), first):
            request = llm.requests.of(
                prompt,
                params,
                agent,
                _NO_ROUND,
                guarded=guarded,
                isolated=body.reuse == "exact",
            )
            if request.error is not None:
                message = str(request.error)
                raise bad_request(message, self.prompt_field, "context_length_exceeded")
            if body.max_tokens_asked is not None and request.max_new_tokens < params.max_tokens:
                self.headers["X-TokenDance-Max-Tokens"] = str(request.max_new_tokens)
            if constraint is not None:
                request.constraint = constraint.copy(request.max_new_tokens)
            request.session = session
            request.tenant = self.context.encoder(self.tenant).salt
            put = self.listener.of(index)
            self.jobs[index] = Job(request, put, self.in_parts, key, size, marked)


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the answers to a request, with log-probabilities of its tokens if asked for."""

    output: Output
    logprobs: Sequence[TokenLogprobs]


class PromptEndpoint(Endpoint[PromptBody]):
    """A request with prompts of one agent, which runs in a round with other requests."""

    @property
    def in_parts(self) -> bool:
        """See `Job`."""
        return bool(self.body.stream)

    @abstractmethod
    def document(self, answers: Sequence[Answer], usage: Usage) -> BaseModel:
        """The document of all answers."""

    @abstractmethod
    def chunks(self, delta: Delta) -> Sequence[BaseModel]:
        """Events of a stream, for new text or the end of an answer."""

    @abstractmethod
    def usage_chunk(self, usage: Usage) -> BaseModel:
        """The last event of a stream, if the client asks for the usage."""

    def constrain(self, wanted: Wanted) -> GrammarConstraint:
        """Hold answers to what is wanted; a header names what cannot be held."""
        context = self.context
        fitted = context.grammars.answer(wanted, context.tools, self.tenant)
        if fitted.unheld:
            self.headers["X-TokenDance-Not-Held"] = header_value("; ".join(fitted.unheld))
        return fitted.constraint

    def prompt_ids(self, index: int = 0) -> list[int]:
        """Tokens of the prompt of an answer."""
        ids: list[int] = self.jobs[index].request.prompt.token_ids.tolist()
        return ids

    def prompt_logprobs(self, index: int = 0) -> PromptLogprobs:
        """What the prompt of an answer was scored with; it is done."""
        spell = self.context.token_text

        def entry(token: int, logprob: float, rank: int) -> dict[str, Any]:
            return {
                "logprob": max(logprob, LEAST_LOGPROB),
                "rank": rank,
                "decoded_token": spell(token),
            }

        found: PromptLogprobs = [None]
        scores = self.jobs[index].request.prompt_logprobs
        for token, score in zip(self.prompt_ids(index)[1:], scores, strict=True):
            top = {
                str(one): entry(one, logprob, rank)
                for rank, (one, logprob) in enumerate(score.top, 1)
            }
            found.append({str(token): entry(token, score.logprob, score.rank)} | top)
        return found

    def check_choices(self, num_prompts: int) -> None:
        """Raise ApiError for more answers than one request may have."""
        choices, most = self.body.n or 1, self.context.settings.max_choices
        if choices * num_prompts > most:
            raise bad_request(
                f"{num_prompts} prompts with n = {choices} are more than the {most} answers that "
                "one request may have.",
                "n",
            )

    async def begin(self, stack: AsyncExitStack) -> None:
        """Read the body, while other requests of the round wait for it, and submit the jobs."""
        del stack
        engine_thread = self.context.engine_thread
        engine_thread.announce()
        try:
            jobs = await self.read_on_thread()
            request = jobs[0].request
            if request.session is not None:
                salt = request.prompt.salt
                chat = self.context.sessions.chat(self.tenant, request.session, salt)
                for job in jobs:
                    job.chat = chat
        except BaseException:
            engine_thread.withdraw()
            raise
        engine_thread.submit(jobs)

    async def whole(self) -> BaseModel:
        """Wait for all answers, and make the document of them; raises the first error."""
        outputs: dict[int, Output] = {}
        async for index, output in self.listener.outputs(len(self.jobs)):
            if output.error is not None:
                raise output.error
            outputs[index] = output
        answers = [
            Answer(outputs[index], job.request.logprobs[: len(outputs[index].token_ids)])
            for index, job in self.jobs.items()
        ]
        return self.document(answers, self._usage(outputs))

    async def documents(self) -> AsyncIterator[dict[str, Any]]:
        """Chunks of the answers as they grow, and at last the usage if the client asks for it."""
        outputs: dict[int, Output] = {}
        async for delta in self.listener.deltas(self.jobs, self.context.llm.model.tokenizer):
            if delta.output is not None:
                if delta.output.error is not None:
                    raise delta.output.error
                outputs[delta.index] = delta.output
            for chunk in self.chunks(delta):
                yield dump(chunk)
        options = self.body.stream_options
        if options is not None and options.include_usage:
            yield dump(self.usage_chunk(self._usage(outputs)))

    def _usage(self, outputs: dict[int, Output]) -> Usage:
        answers = [outputs[index] for index in self.jobs]
        return usage_of(answers, self.body.n or 1, self.count_thoughts(answers))

    def count_thoughts(self, outputs: Sequence[Output]) -> int | None:
        """Tokens of the answers that are thoughts; None where there are none to tell apart."""
        del outputs
        return None


async def respond(endpoint: Endpoint[Body], request: Request) -> Response:
    """Answer an HTTP request, whole or as a stream."""
    context = endpoint.context
    async with AsyncExitStack() as stack:
        stack.enter_context(context.admission.admitted(endpoint.tenant, endpoint.num_agents))
        await endpoint.begin(stack)
        jobs = request.state.jobs = list(endpoint.jobs.values())
        # If the client disconnects, or one job fails, nobody waits for the others.
        stack.callback(context.engine_thread.cancel, jobs)
        if endpoint.body.stream:
            return ReleasingStream(endpoint.events(), endpoint.headers, stack.pop_all())
        answer = dump(await unless_gone(request.receive, endpoint.whole()))
        return JSONAnswer(answer, headers=endpoint.headers)


class ClientGoneError(ApiError):
    """The client has disconnected; nobody sees it."""

    def __init__(self) -> None:
        super().__init__(499, "The client has gone.")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Wait for `work`; cancel it, and raise ClientGoneError, if the client disconnects."""

    async def wait_for_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_disconnect())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for waiting in (task, gone):
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await waiting


def usage_of(outputs: Sequence[Output], choices: int, num_thoughts: int | None = None) -> Usage:
    """Tokens as OpenAI counts them: a prompt with several answers (`choices`) counts once.

    Args:
        outputs: the answers.
        choices: to each prompt.
        num_thoughts: tokens of the answers that are thoughts, where the model thinks.
    """
    prompt = sum(output.prompt_tokens for output in outputs[::choices])
    answer = sum(len(output.token_ids) for output in outputs)
    cached = sum(output.reused_tokens for output in outputs[::choices])
    approximate = sum(output.approximate_tokens for output in outputs[::choices])
    usage = Usage(
        prompt_tokens=prompt,
        completion_tokens=answer,
        total_tokens=prompt + answer,
        prompt_tokens_details=CachedTokens(cached_tokens=cached, approximate_tokens=approximate),
    )
    if num_thoughts is not None:
        usage.completion_tokens_details = AnswerTokens(reasoning_tokens=num_thoughts)
    return usage


def finish_reason(output: Output) -> FinishReason:
    """The finish reason of an answer without an error."""
    return "length" if output.finish_reason == "length" else "stop"


def header_value(text: str) -> str:
    """A text that clients have sent as the value of a header: printable, and not too long."""
    printable = "".join(character if " " <= character <= "~" else "?" for character in text)
    return printable if len(printable) <= _MAX_HEADER else f"{printable[:_MAX_HEADER]}..."


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document)}\n\n"


class ReleasingStream(StreamingResponse):
    """A stream of events that closes a stack at its end, also if the client disconnects."""

    def __init__(
        self, events: AsyncIterator[str], headers: Mapping[str, str], stack: AsyncExitStack
    ) -> None:
        headers = {"Cache-Control": "no-cache", **headers}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Starlette's way leaves a circle of references to all of it if the client disconnects: a
        task group of anyio (4.16) keeps the error of the task that it cancels.
        """
        del scope
        async with self._stack:
            with contextlib.suppress(ClientGoneError):
                await unless_gone(receive, self.stream_response(send))
