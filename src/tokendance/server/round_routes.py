"""POST /v1/rounds: all agents of a round in one call.

    {"model": "...", "blocks": {"ann": "Ann: ...", "bob": "Bob: ..."}, "agents": [
        {"agent": "ann", "max_tokens": 60, "messages": [
            {"role": "system", "content": "You are Ann."},
            {"role": "user", "content": [{"type": "block", "id": "ann"},
                                         {"type": "block", "id": "bob"},
                                         {"type": "text", "text": "What do you say?"}]}]}, ...]}

The answer has an entry for each agent, in their order; as a stream, an event for each as it ends.
An agent that cannot be served has an `error`, and the others are unharmed. With a session, the
server keeps what was said, and agents give their tasks only: see `server/sessions.py`. If such a
round cannot be stored, who ends last has a `warning` that says why.
"""

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from tokendance.conversation import Asked
from tokendance.errors import AbortedError, InputError, TokenDanceError
from tokendance.models.encoder import PromptEncoder
from tokendance.outputs import Output
from tokendance.rounds.prompts import Part, Prompt, private, shared
from tokendance.rounds.segments import EncodedPrompt
from tokendance.server.answers import Listener, deltas, taken_back
from tokendance.server.auth import tenant_of
from tokendance.server.chat import as_message, check_length, sampling_params
from tokendance.server.context import ServerContext
from tokendance.server.errors import ApiError, as_api_error, bad_request
from tokendance.server.jobs import Event, Job
from tokendance.server.openapi import RoundAnswer, whole_or_stream
from tokendance.server.protocol import (
    BlockRef,
    RoundAgent,
    RoundRequest,
    SharedText,
    TextPart,
)
from tokendance.server.running import (
    ReleasingStream,
    event,
    make_jobs,
    read_ask,
    unless_gone,
    usage_of,
)
from tokendance.session import Session


def add_rounds(app: FastAPI, context: ServerContext) -> None:
    """Add the route."""

    @app.post("/v1/rounds", responses=whole_or_stream(RoundAnswer))
    async def rounds(
        body: RoundRequest,
        request: Request,
        tenant: Annotated[str, Depends(tenant_of)],
    ) -> Response:
        """Answer all agents of a round."""
        context.check_model(body.model)
        _check_names(body)
        async with AsyncExitStack() as stack:
            stack.enter_context(context.admission.admitted(tenant, len(body.agents)))
            if body.session is None:
                begun = await _begin(context, body, tenant)
            else:
                session = await stack.enter_async_context(
                    context.sessions.round_of(body, tenant, context.encoder(tenant))
                )
                begun = await _begin_in_session(context, body, tenant, session)
            jobs = list(begun.jobs.values())
            request.state.jobs = jobs
            context.worker.submit_round(jobs)
            entries = _entries(context, body, begun)
            head = {**context.head("round"), "object": "round"}
            if begun.number is not None:
                head |= {"session": body.session, "round": begun.number}
            if body.stream:
                events = _events(head, entries)
                return ReleasingStream(events, context.worker, jobs, stack.pop_all())
            with taken_back(context.worker, jobs):
                found = await unless_gone(request, _all(entries))
            agents = [found[index] for index in range(len(body.agents))]
            return JSONResponse({**head, "agents": agents})


def _check_names(body: RoundRequest) -> None:
    for name, count in Counter(agent.agent for agent in body.agents).items():
        if count > 1:
            raise bad_request(f"Two agents are called {name!r}. Give each its own name.", "agents")


@dataclass(slots=True)
class _Begun:
    """A round that is ready to run.

    Attributes:
        listener: hears its jobs.
        jobs: by the agents' places.
        refused: agents that cannot be served, likewise.
        done: called with all outputs, by the agents' places, before the last is told; says what
            was wrong, if the round could not be stored.
        number: of the session's round, if it is one.
    """

    listener: Listener
    jobs: dict[int, Job]
    refused: dict[int, ApiError]
    done: Callable[[dict[int, Output]], Awaitable[str | None]]
    number: int | None = None


async def _begin(context: ServerContext, body: RoundRequest, tenant: str) -> _Begun:
    """Read a round that stands for itself."""
    listener = Listener()

    def read() -> list[Job | ApiError]:
        remembering = context.encoder(tenant).remembering()
        found: list[Job | ApiError] = []
        for index, agent in enumerate(body.agents):
            try:
                prompt = _encode(agent, body.blocks, remembering, context.max_characters)
                found.append(_make_job(context, agent, prompt, listener.of(index)))
            except ApiError as error:
                found.append(error)
        return found

    async def done(_: dict[int, Output]) -> str | None:
        return None

    asked = await context.in_thread(tenant, read)
    jobs = {index: job for index, job in enumerate(asked) if isinstance(job, Job)}
    refused = {index: job for index, job in enumerate(asked) if isinstance(job, ApiError)}
    return _Begun(listener, jobs, refused, done)


async def _begin_in_session(
    context: ServerContext, body: RoundRequest, tenant: str, session: Session
) -> _Begun:
    """Read the next round of a session; what is wrong with one agent is wrong with all of it."""
    if body.blocks:
        raise bad_request("A session knows what was said; leave blocks out.", "blocks")
    listener = Listener()
    # Blocks stand in the session's order.
    places = {agent.agent: place for place, agent in enumerate(body.agents)}
    order = [places[agent.name] for agent in session.agents]
    settings, vocab_size = context.settings, context.llm.model.shape.vocab_size
    encoder = context.encoder(tenant)

    def read() -> tuple[Asked, list[Job]]:
        tasks = {}
        for agent in body.agents:
            if agent.task is None or agent.messages is not None or agent.segments is not None:
                raise bad_request(
                    f"In a session {agent.agent!r} has a task, and neither messages nor segments.",
                    "agents",
                )
            check_length([agent.task, agent.system or ""], context.max_characters)
            tasks[agent.agent] = agent.task
        params = {
            agent.agent: sampling_params(agent, settings, vocab_size) for agent in body.agents
        }
        asked = session.ask(tasks, params)
        jobs = [
            _make_job(context, body.agents[place], encoder.encode(prompt), listener.of(place))
            for place, prompt in zip(order, asked.prompts, strict=True)
        ]
        for job in jobs:
            job.request.session = session.key
        return asked, jobs

    async def done(outputs: dict[int, Output]) -> str | None:
        if any(isinstance(output.error, AbortedError) for output in outputs.values()):
            return "The round was broken off, and the session has not heard it. Ask it again."
        session.hear(asked, [outputs[place] for place in order])
        error = await context.sessions.save(session)
        return f"The round is not on disk: {error}" if error is not None else None

    try:
        asked, made = await context.in_thread(tenant, read)
    except InputError as error:
        raise bad_request(str(error), "agents") from error
    await context.worker.restore(session)
    jobs = dict(zip(order, made, strict=True))
    return _Begun(listener, jobs, {}, done, session.round + 1)


def _make_job(
    context: ServerContext, agent: RoundAgent, prompt: EncodedPrompt, ear: Callable[[Event], None]
) -> Job:
    for name in ("round", "stream", "stream_options"):
        if getattr(agent, name) is not None:
            raise bad_request(f"{name} goes with the round, not with an agent.", name)
    if (agent.n or 1) > 1:
        raise bad_request("An agent of a round has one answer.", "n")
    ask = read_ask(context, agent, [prompt], marked=True)
    (job,) = make_jobs(context, ask, lambda _: ear)
    # An error of the engine names the agent, and so does the session that hears its answer.
    job.request.agent = agent.agent
    return job


def _encode(
    agent: RoundAgent, blocks: dict[str, str], encoder: PromptEncoder, limit: int
) -> EncodedPrompt:
    for name in ("system", "task"):
        if getattr(agent, name) is not None:
            raise bad_request(f"{name} goes with a session. Put it into the messages.", name)
    if (agent.messages is None) == (agent.segments is None):
        raise bad_request(f"Give {agent.agent!r} either messages or segments.", "agents")
    check_length(_texts(agent, blocks), limit)
    try:
        if agent.segments is not None:
            return encoder.encode(Prompt(_parts(agent.segments, blocks)))
        messages: list[dict[str, Any]] = []
        for message in agent.messages or ():
            content = message.content
            if isinstance(content, list):
                content = _parts(content, blocks)  # type: ignore[assignment]
            messages.append(as_message(message.role, content, message.name))
        return encoder.encode(Prompt(messages))
    except InputError as error:
        raise bad_request(str(error), "agents") from error


def _texts(agent: RoundAgent, blocks: dict[str, str]) -> Iterator[str]:
    """All that an agent reads, unchanged: a block may be large, and there many times."""
    contents = [agent.segments, *(message.content for message in agent.messages or ())]
    for content in contents:
        if isinstance(content, str):
            yield content
        else:
            for one in content or ():
                yield _block(one, blocks) if isinstance(one, BlockRef) else one.text


def _block(ref: BlockRef, blocks: dict[str, str]) -> str:
    if ref.id not in blocks:
        raise bad_request(f"There is no block {ref.id!r}.", "blocks")
    return blocks[ref.id]


def _parts(given: Sequence[BlockRef | SharedText | TextPart], blocks: dict[str, str]) -> list[Part]:
    parts: list[Part] = []
    for one in given:
        if isinstance(one, BlockRef):
            parts.append(shared(_block(one, blocks)))
        elif isinstance(one, SharedText):
            parts.append(shared(one.text))
        else:
            parts.append(private(one.text))
    return parts


async def _entries(
    context: ServerContext, body: RoundRequest, begun: _Begun
) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    """Index and entry of each agent as it ends; first of those that were refused."""
    for index, error in begun.refused.items():
        yield index, {"agent": body.agents[index].agent, **error.body()}
    outputs: dict[int, Output] = {}
    tokenizer = context.llm.model.tokenizer
    async for delta in deltas(begun.listener, begun.jobs, tokenizer, spelt=False):
        if delta.output is not None:
            outputs[delta.index] = delta.output
            entry = _entry(body.agents[delta.index].agent, delta.output)
            if len(outputs) == len(begun.jobs) and (warning := await begun.done(outputs)):
                entry["warning"] = warning
            yield delta.index, entry


def _entry(agent: str, output: Output) -> dict[str, Any]:
    if output.error is not None:
        return {"agent": agent, **as_api_error(output.error).body()}
    return {
        "agent": agent,
        "message": {"role": "assistant", "content": output.text},
        "finish_reason": output.finish_reason,
        "usage": usage_of([output], 1),
    }


async def _all(entries: AsyncIterator[tuple[int, dict[str, Any]]]) -> dict[int, dict[str, Any]]:
    return {index: entry async for index, entry in entries}


async def _events(
    head: dict[str, Any], entries: AsyncIterator[tuple[int, dict[str, Any]]]
) -> AsyncIterator[str]:
    head = {**head, "object": "round.agent"}
    try:
        async for index, entry in entries:
            yield event({**head, "index": index, **entry})
    except TokenDanceError as error:
        yield event(as_api_error(error).body())
        return
    yield "data: [DONE]\n\n"
