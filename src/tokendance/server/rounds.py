"""POST /v1/rounds: all agents of a round in one call.

    {"model": "...", "blocks": {"ann": "Ann: ...", "bob": "Bob: ..."}, "agents": [
        {"agent": "ann", "max_tokens": 60, "messages": [
            {"role": "system", "content": "You are Ann."},
            {"role": "user", "content": [{"type": "block", "id": "ann"},
                                         {"type": "block", "id": "bob"},
                                         {"type": "text", "text": "What do you say?"}]}]}, ...]}

The answer has an entry for each agent, in the order of the request; a stream has an event for each
agent when it is done. An agent that fails has an `error`, and the others are not affected. With a
session the server keeps the conversation, and agents have tasks only: see `server/sessions.py`. The
`dropped_tokens` of an agent are then those that it could not hear, since they did not fit the
context. If such a round cannot be stored, the entry of the agent that ends last has a `warning`.
"""

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

from tokendance.conversation import Asked
from tokendance.errors import AbortedError, ContextError, InputError
from tokendance.models.encoder import PromptEncoder
from tokendance.outputs import Output
from tokendance.rounds.prompts import Prompt, private, shared
from tokendance.rounds.segments import EncodedPrompt
from tokendance.server.chat_prompt import as_message, check_length
from tokendance.server.context import ServerContext
from tokendance.server.errors import ApiError, as_api_error, bad_request, without_origin
from tokendance.server.messages import TextPart
from tokendance.server.protocol import BlockRef, RoundAgent, RoundPart, RoundRequest
from tokendance.server.respond import Endpoint, finish_reason, usage_of
from tokendance.server.responses import AgentAnswer, AgentError, AnswerMessage, RoundAnswer, dump
from tokendance.server.sampling import sampling_params
from tokendance.session import Session


class RoundEndpoint(Endpoint[RoundRequest]):
    """A request with all agents of a round. Indices are those of the agents in the request.

    Attributes:
        refused: errors of agents whose prompts cannot be run.
    """

    kind = "round"

    def __init__(self, context: ServerContext, tenant: str, body: RoundRequest) -> None:
        """Take a tenant's request; see `Endpoint`."""
        super().__init__(context, tenant, body)
        for name, count in Counter(agent.agent for agent in body.agents).items():
            if count > 1:
                message = f"Two agents are called {name!r}. Give each its own name."
                raise bad_request(message, "agents")
        self.num_agents = len(body.agents)
        self.refused: dict[int, ApiError] = {}

    async def begin(self, stack: AsyncExitStack) -> None:
        """Read the body and begin the round."""
        del stack
        self.context.engine_thread.submit_round(await self.read_on_thread())

    async def end(self, outputs: dict[int, Output]) -> str | None:
        """Called before the last answer is sent; may return a warning to send with it."""
        del outputs
        return None

    async def whole(self) -> RoundAnswer:
        """Wait for the answers of all agents."""
        entries = {index: entry async for index, entry in self._entries()}
        agents = [entries[index] for index in range(len(self.body.agents))]
        return RoundAnswer(**self.head, object="round", agents=agents)

    async def documents(self) -> AsyncIterator[dict[str, Any]]:
        """An event for each agent when it is done."""
        async for index, entry in self._entries():
            yield {**self.head, "object": "round.agent", "index": index, **dump(entry)}

    async def _entries(self) -> AsyncIterator[tuple[int, AgentAnswer | AgentError]]:
        """Index and entry of each agent when it is done; refused ones first."""
        for index, error in self.refused.items():
            yield index, AgentError(agent=self.body.agents[index].agent, **error.body())
        outputs: dict[int, Output] = {}
        async for index, output in self.listener.outputs(len(self.jobs)):
            outputs[index] = output
            shares = bool(self.body.share_reasoning)
            entry = _entry(self.body.agents[index].agent, output, self.encoder, shares=shares)
            if self.body.session is not None and isinstance(entry, AgentAnswer):
                entry.dropped_tokens = output.dropped_tokens
            if len(outputs) == len(self.jobs) and (warning := await self.end(outputs)):
                entry.warning = warning
            yield index, entry

    def add_job(self, index: int, prompt: EncodedPrompt) -> None:
        """Add the job of an agent; see `add_jobs`."""
        agent = self.body.agents[index]
        for name in ("round", "stream", "stream_options"):
            if getattr(agent, name) is not None:
                raise bad_request(f"{name} goes with the round, not with an agent.", name)
        if (agent.n or 1) > 1:
            raise bad_request("An agent of a round has one answer.", "n")
        # Errors name the agent, and the session looks for it in the output.
        guarded = self.body.private == "isolated"
        self.add_jobs(agent, [prompt], agent=agent.agent, first=index, marked=True, guarded=guarded)


class LoneRound(RoundEndpoint):
    """A round without a session: agents have messages or segments, some of them blocks."""

    def read(self) -> None:
        """Encode each agent's prompt; an error of one does not affect the others."""
        encoder = self.encoder.remembering()  # tokenizes each block once
        for index, agent in enumerate(self.body.agents):
            try:
                self.add_job(index, self._encode(agent, encoder))
            except ApiError as error:
                self.refused[index] = without_origin(error)

    def _encode(self, agent: RoundAgent, encoder: PromptEncoder) -> EncodedPrompt:
        blocks = self.body.blocks
        for name in ("system", "task"):
            if getattr(agent, name) is not None:
                raise bad_request(f"{name} goes with a session. Put it into the messages.", name)
        if (agent.messages is None) == (agent.segments is None):
            raise bad_request(f"Give {agent.agent!r} either messages or segments.", "agents")
        whose = f" of {agent.agent!r}"
        check_length(_texts(agent, blocks), self.context.max_characters, whose=whose)
        try:
            if agent.segments is not None:
                return encoder.encode(Prompt(_parts(agent.segments, blocks)))
            messages = [
                as_message(
                    message.role, _parts(message.content, blocks), message.name, message.thought
                )
                for message in agent.messages or ()
            ]
            return encoder.encode(Prompt(messages))
        except InputError as error:
            raise bad_request(str(error), "agents") from error


class SessionRound(RoundEndpoint):
    """The next round of a session, which has the conversation: agents have tasks only."""

    _session: Session
    _asked: Asked

    async def begin(self, stack: AsyncExitStack) -> None:
        """Lock the session, read the body, load KV that is not in memory, and begin the round."""
        sessions, body = self.context.sessions, self.body
        holding = sessions.round_of(body, self.tenant, self.encoder)
        self._session = await stack.enter_async_context(holding)
        self.head |= {"session": body.session, "round": self._session.round + 1}
        if body.blocks:
            raise bad_request("A session knows what was said; leave blocks out.", "blocks")
        try:
            jobs = await self.read_on_thread()
        except ContextError as error:
            raise bad_request(str(error), "agents", "context_length_exceeded") from error
        except InputError as error:
            raise bad_request(str(error), "agents") from error
        await self.context.engine_thread.restore(self._session)
        self.context.engine_thread.submit_round(jobs)

    def read(self) -> None:
        """Make each agent's prompt; an error of one is an error of the round."""
        context, agents = self.context, self.body.agents
        for agent in agents:
            if agent.task is None or agent.messages is not None or agent.segments is not None:
                raise bad_request(
                    f"In a session {agent.agent!r} has a task, and neither messages nor segments.",
                    "agents",
                )
            whose = f" of {agent.agent!r}"
            texts = [agent.task, agent.system or ""]
            check_length(texts, context.max_characters, whose=whose)
        size = context.llm.model.shape.vocab_size
        self._asked = self._session.ask(
            {agent.agent: agent.task or "" for agent in agents},
            {agent.agent: sampling_params(agent, context.settings, size) for agent in agents},
        )
        # The session has its agents in another order.
        indices = {agent.agent: index for index, agent in enumerate(agents)}
        for prompt in self._asked.prompts:
            index = indices[prompt.agent or ""]
            self.add_job(index, self.encoder.encode(prompt))
            request = self.jobs[index].request
            request.session, request.num_dropped = self._session.key, prompt.dropped_tokens
            request.guarded |= prompt.private == "isolated"

    async def end(self, outputs: dict[int, Output]) -> str | None:
        """Add the answers to the session, and save it to disk."""
        if any(isinstance(output.error, AbortedError) for output in outputs.values()):
            return "The round was broken off, and the session has not heard it. Ask it again."
        self._session.hear(self._asked, [outputs[index] for index in self.jobs])
        error = await self.context.sessions.save(self._session)
        return f"The round is not on disk: {error}" if error is not None else None


def _entry(
    agent: str, output: Output, encoder: PromptEncoder, *, shares: bool
) -> AgentAnswer | AgentError:
    """What an agent has said, with its thoughts in the text (`shares`) or beside it."""
    if output.error is not None:
        return AgentError(agent=agent, **as_api_error(output.error).body())
    message, num_thoughts = AnswerMessage(role="assistant", content=output.text), None
    if encoder.thought_marks is not None:
        prompt, is_cut = output.prompt_token_ids, output.finish_reason == "length"
        num_thoughts = encoder.count_thoughts(encoder.standing_behind(prompt), output.token_ids)
        told = encoder.told(prompt, output.text, is_cut=is_cut, with_thoughts=shares)
        message.content = output.text if told is None else told
        said = encoder.split_answer(prompt, output.text, is_cut=is_cut)
        if said is not None and said.thought and not shares:
            message.reasoning_content = message.reasoning = said.thought
    return AgentAnswer(
        agent=agent,
        message=message,
        finish_reason=finish_reason(output),
        usage=usage_of([output], 1, num_thoughts),
    )


# ---- prompts of a round without a session --------------------------------------------------------


def _texts(agent: RoundAgent, blocks: dict[str, str]) -> Iterator[str]:
    """All texts of an agent's prompt, not copied: a block may be large, and used many times."""
    for content in (agent.segments, *(message.content for message in agent.messages or ())):
        if isinstance(content, str):
            yield content
        else:
            yield from (_text(part, blocks) for part in content or ())


def _parts(content: str | list[RoundPart] | None, blocks: dict[str, str]) -> Any:
    """A content for `Prompt`, with parts for blocks and texts."""
    if not isinstance(content, list):
        return content
    return [
        (private if isinstance(part, TextPart) else shared)(_text(part, blocks)) for part in content
    ]


def _text(part: RoundPart, blocks: dict[str, str]) -> str:
    if not isinstance(part, BlockRef):
        return part.text
    if part.id not in blocks:
        raise bad_request(f"There is no block {part.id!r}.", "blocks")
    return blocks[part.id]
