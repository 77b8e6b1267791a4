"""POST /v1/rounds: all agents of a round in one call.

    {"model": "...", "blocks": {"ann": "Ann: ...", "bob": "Bob: ..."}, "agents": [
        {"agent": "ann", "max_tokens": 60, "messages": [
            {"role": "system", "content": "You are Ann."},
            {"role": "user", "content": [{"type": "block", "id": "ann"},
                                         {"type": "block", "id": "bob"},
                                         {"type": "text", "text": "What do you say?"}]}]}, ...]}

The answer has an entry for each agent, in their order; as a stream, an event for each as it ends.
An agent that cannot be served has an `error`, and the others are unharmed.
"""

from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Annotated, Any

import anyio.to_thread
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from tokendance.errors import InputError
from tokendance.models.encoder import PromptEncoder
from tokendance.outputs import Output
from tokendance.rounds.prompts import Part, Prompt, private, shared
from tokendance.rounds.segments import EncodedPrompt
from tokendance.server.answers import Listener, deltas, taken_back
from tokendance.server.chat import as_message, check_length
from tokendance.server.errors import ApiError, as_api_error, bad_request
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
from tokendance.server.state import Server
from tokendance.server.worker import Job


def add_rounds(app: FastAPI, server: Server) -> None:
    """Add the route."""

    @app.post("/v1/rounds", responses=whole_or_stream(RoundAnswer))
    async def rounds(
        body: RoundRequest,
        request: Request,
        tenant: Annotated[str, Depends(server.tenant_of)],
    ) -> Response:
        """Answer all agents of a round."""
        server.check_model(body.model)
        _check_names(body)
        encoder = server.encoder(tenant)
        server.admit(tenant)
        handed_over = False
        try:
            listener = Listener()
            asked = await anyio.to_thread.run_sync(_read, server, body, encoder, listener)
            jobs = {index: job for index, job in enumerate(asked) if isinstance(job, Job)}
            refused = {index: job for index, job in enumerate(asked) if isinstance(job, ApiError)}
            server.worker.submit_round(list(jobs.values()))
            entries = _entries(server, body, jobs, refused, listener)
            head = server.head("round")
            if body.stream:
                handed_over = True
                events = _events(head, entries)
                return ReleasingStream(events, server, tenant, list(jobs.values()))
            with taken_back(server.worker, list(jobs.values())):
                found = await unless_gone(request, _all(entries))
            agents = [found[index] for index in range(len(body.agents))]
            return JSONResponse({**head, "object": "round", "agents": agents})
        finally:
            if not handed_over:
                server.release(tenant)


def _check_names(body: RoundRequest) -> None:
    for name, count in Counter(agent.agent for agent in body.agents).items():
        if count > 1:
            raise bad_request(f"Two agents are called {name!r}. Give each its own name.", "agents")


def _read(
    server: Server, body: RoundRequest, encoder: PromptEncoder, listener: Listener
) -> list[Job | ApiError]:
    """Make a job for each agent, or say why there is none."""
    encoder = encoder.remembering()
    found: list[Job | ApiError] = []
    for index, agent in enumerate(body.agents):
        try:
            prompt = _encode(agent, body.blocks, encoder, server.max_characters)
            for name in ("round", "stream", "stream_options"):
                if getattr(agent, name) is not None:
                    raise bad_request(f"{name} goes with the round, not with an agent.", name)
            if (agent.n or 1) > 1:
                raise bad_request("An agent of a round has one answer.", "n")
            ask = read_ask(server, agent, [prompt], marked=True)
            found += make_jobs(server, ask, lambda _, index=index: listener.of(index))  # type: ignore[misc]
        except ApiError as error:
            found.append(error)
    return found


def _encode(
    agent: RoundAgent, blocks: dict[str, str], encoder: PromptEncoder, limit: int
) -> EncodedPrompt:
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
    server: Server,
    body: RoundRequest,
    jobs: dict[int, Job],
    refused: dict[int, ApiError],
    listener: Listener,
) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    """Index and entry of each agent as it ends; first of those that were refused."""
    for index, error in refused.items():
        yield index, {"agent": body.agents[index].agent, **error.body()}
    async for delta in deltas(listener, jobs, server.llm.model.tokenizer, spelt=False):
        if delta.output is not None:
            yield delta.index, _entry(body.agents[delta.index].agent, delta.output)


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
    async for index, entry in entries:
        yield event({**head, "object": "round.agent", "index": index, **entry})
    yield "data: [DONE]\n\n"
