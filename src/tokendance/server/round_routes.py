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

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack
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
from tokendance.server.jobs import Job
from tokendance.server.openapi import whole_or_stream
from tokendance.server.protocol import (
    BlockRef,
    RoundAgent,
    RoundRequest,
    SharedText,
    TextPart,
)
from tokendance.server.respond import (
    LAST_EVENT,
    ReleasingStream,
    event,
    finish_reason,
    make_jobs,
    read_ask,
    unless_gone,
    usage_of,
)
from tokendance.server.responses import AgentAnswer, AgentError, AnswerMessage, RoundAnswer, dump
from tokendance.session import Session


def add_rounds(app: FastAPI, context: ServerContext) -> None:
    """Add the route."""

    @app.post("/v1/rounds", responses=whole_or_stream(RoundAnswer))
    async def rounds(
        body: RoundRequest, request: Request, tenant: Annotated[str, Depends(tenant_of)]
    ) -> Response:
        """Answer all agents of a round."""
        context.check_model(body.model)
        _check_names(body)
        async with AsyncExitStack() as stack:
            stack.enter_context(context.admission.admitted(tenant, len(body.agents)))
            endpoint: RoundEndpoint
            if body.session is None:
                endpoint = LoneRound(context, tenant, body)
            else:
                holding = context.sessions.round_of(body, tenant, context.encoder(tenant))
                session = await stack.enter_async_context(holding)
                endpoint = SessionRound(context, tenant, body, session)
            jobs = await endpoint.begin()
            request.state.jobs = jobs
            context.engine_thread.submit_round(jobs)
            if body.stream:
                return ReleasingStream(
                    endpoint.events(), context.engine_thread, jobs, stack.pop_all()
                )
            with taken_back(context.engine_thread, jobs):
                return JSONResponse(dump(await unless_gone(request, endpoint.whole())))


def _check_names(body: RoundRequest) -> None:
    for name, count in Counter(agent.agent for agent in body.agents).items():
        if count > 1:
            raise bad_request(f"Two agents are called {name!r}. Give each its own name.", "agents")


class RoundEndpoint(ABC):
    """A round that is answered, in one call."""

    def __init__(self, context: ServerContext, tenant: str, body: RoundRequest) -> None:
        """Take a request.

        Args:
            context: of the server.
            tenant: who asks.
            body: of the request.
        """
        self.context = context
        self.tenant = tenant
        self.body = body
        self.encoder = context.encoder(tenant)
        self.head = context.head("round")
        self.listener = Listener()
        # By the agents' numbers in the request: what is asked, or why it is not.
        self.jobs: dict[int, Job] = {}
        self.refused: dict[int, ApiError] = {}

    async def begin(self) -> list[Job]:
        """Read the request on another thread, and return what is to be answered.

        Raises:
            ApiError: for a round that cannot be answered.
        """
        await self.context.in_thread(self.tenant, self.read)
        return list(self.jobs.values())

    @abstractmethod
    def read(self) -> None:
        """Fill `jobs` and `refused`."""

    async def end(self, outputs: dict[int, Output]) -> str | None:
        """Do what is to be done before the last answer is told; return a warning that goes with it.

        Args:
            outputs: of all jobs, by their numbers.
        """
        del outputs
        return None

    async def whole(self) -> RoundAnswer:
        """Wait for all agents; the document that has their answers."""
        entries = {index: entry async for index, entry in self._entries()}
        agents = [entries[index] for index in range(len(self.body.agents))]
        return RoundAnswer(**self.head, object="round", agents=agents)

    async def events(self) -> AsyncIterator[str]:
        """An event for each agent as it ends."""
        try:
            async for index, entry in self._entries():
                yield event({**self.head, "object": "round.agent", "index": index, **dump(entry)})
        except TokenDanceError as error:
            yield event(as_api_error(error).body())
            return
        yield LAST_EVENT

    async def _entries(self) -> AsyncIterator[tuple[int, AgentAnswer | AgentError]]:
        """Number and entry of each agent as it ends; first of those that were refused."""
        for index, error in self.refused.items():
            yield index, AgentError(agent=self.body.agents[index].agent, **error.body())
        outputs: dict[int, Output] = {}
        tokenizer = self.context.llm.model.tokenizer
        async for delta in deltas(self.listener, self.jobs, tokenizer, spelt=False):
            if delta.output is not None:
                outputs[delta.index] = delta.output
                entry = _entry(self.body.agents[delta.index].agent, delta.output)
                if len(outputs) == len(self.jobs) and (warning := await self.end(outputs)):
                    entry.warning = warning
                yield delta.index, entry

    def _make_job(self, index: int, prompt: EncodedPrompt) -> Job:
        """What one agent is asked.

        Raises:
            ApiError: for what goes with the round only, and for a prompt that cannot be run.
        """
        agent = self.body.agents[index]
        for name in ("round", "stream", "stream_options"):
            if getattr(agent, name) is not None:
                raise bad_request(f"{name} goes with the round, not with an agent.", name)
        if (agent.n or 1) > 1:
            raise bad_request("An agent of a round has one answer.", "n")
        ask = read_ask(self.context, agent, [prompt], marked=True)
        (job,) = make_jobs(self.context, ask, self.listener, first=index)
        # An error of the engine names the agent, and so does the session that hears its answer.
        job.request.agent = agent.agent
        return job


class LoneRound(RoundEndpoint):
    """A round that stands for itself: agents have messages or segments, some of them blocks."""

    def read(self) -> None:
        """Encode each agent's prompt; what is wrong with one does not concern the others."""
        encoder, limit = self.encoder.remembering(), self.context.max_characters
        for index, agent in enumerate(self.body.agents):
            try:
                prompt = _encode(agent, self.body.blocks, encoder, limit)
                self.jobs[index] = self._make_job(index, prompt)
            except ApiError as error:
                self.refused[index] = error


class SessionRound(RoundEndpoint):
    """The next round of a session, which knows what was said: agents have tasks."""

    def __init__(
        self, context: ServerContext, tenant: str, body: RoundRequest, session: Session
    ) -> None:
        """Take a request whose session is held; see `RoundEndpoint`."""
        super().__init__(context, tenant, body)
        self._session = session
        self._asked: Asked  # once it is read
        self.head |= {"session": body.session, "round": session.round + 1}

    async def begin(self) -> list[Job]:
        """Read the request, and what memory lacks of the session."""
        if self.body.blocks:
            raise bad_request("A session knows what was said; leave blocks out.", "blocks")
        try:
            jobs = await super().begin()
        except InputError as error:
            raise bad_request(str(error), "agents") from error
        await self.context.engine_thread.restore(self._session)
        return jobs

    def read(self) -> None:
        """Make each agent's prompt; what is wrong with one is wrong with all of the round."""
        context, agents = self.context, self.body.agents
        for agent in agents:
            if agent.task is None or agent.messages is not None or agent.segments is not None:
                raise bad_request(
                    f"In a session {agent.agent!r} has a task, and neither messages nor segments.",
                    "agents",
                )
            check_length([agent.task, agent.system or ""], context.max_characters)
        size = context.llm.model.shape.vocab_size
        self._asked = self._session.ask(
            {agent.agent: agent.task or "" for agent in agents},
            {agent.agent: sampling_params(agent, context.settings, size) for agent in agents},
        )
        # The session has its agents in an order of its own.
        numbers = {agent.agent: index for index, agent in enumerate(agents)}
        for prompt in self._asked.prompts:
            index = numbers[prompt.agent or ""]
            self.jobs[index] = self._make_job(index, self.encoder.encode(prompt))
            self.jobs[index].request.session = self._session.key

    async def end(self, outputs: dict[int, Output]) -> str | None:
        """Let the session hear the round, and bring it to disk."""
        if any(isinstance(output.error, AbortedError) for output in outputs.values()):
            return "The round was broken off, and the session has not heard it. Ask it again."
        self._session.hear(self._asked, [outputs[index] for index in self.jobs])
        error = await self.context.sessions.save(self._session)
        return f"The round is not on disk: {error}" if error is not None else None


def _entry(agent: str, output: Output) -> AgentAnswer | AgentError:
    if output.error is not None:
        return AgentError(agent=agent, **as_api_error(output.error).body())
    return AgentAnswer(
        agent=agent,
        message=AnswerMessage(role="assistant", content=output.text),
        finish_reason=finish_reason(output),
        usage=usage_of([output], 1),
    )


# ---- prompts of a round that stands for itself ---------------------------------------------------


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
            for part in content or ():
                yield _block(part, blocks) if isinstance(part, BlockRef) else part.text


def _block(ref: BlockRef, blocks: dict[str, str]) -> str:
    if ref.id not in blocks:
        raise bad_request(f"There is no block {ref.id!r}.", "blocks")
    return blocks[ref.id]


def _parts(
    content: Sequence[BlockRef | SharedText | TextPart], blocks: dict[str, str]
) -> list[Part]:
    parts: list[Part] = []
    for part in content:
        if isinstance(part, BlockRef):
            parts.append(shared(_block(part, blocks)))
        elif isinstance(part, SharedText):
            parts.append(shared(part.text))
        else:
            parts.append(private(part.text))
    return parts
