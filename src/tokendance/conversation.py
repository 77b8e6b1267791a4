"""Conversations: agents that hear each other from round to round.

Each agent's prompt, in the model's own chat template:

    system     who the agent is                                        private
    user       [what everybody said last round, one block per speaker] shared
               the task                                                private
    assistant  what the agent said                                     private
    user       [what everybody said in this round] ...

The blocks come in one order for all agents, so one owner serves all. Answers are carried on as
token ids, so a conversation continues exactly where its KV ends.

Nothing here runs a model, reads a disk or starts a thread: `session.py` does that with what `ask`
returns and `hear` takes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tokendance.errors import RoundError
from tokendance.outputs import Output
from tokendance.params import SamplingParams
from tokendance.rounds.prompts import Message, Part, Prompt, private, shared
from tokendance.rounds.segments import EncodedPrompt, Salt, TokenIds, as_token_ids
from tokendance.tier.caches import SpokenCache


class TextEncoder(Protocol):
    """What a conversation needs of `models.encoder.PromptEncoder`."""

    @property
    def salt(self) -> Salt:
        """What its prompts are hashed with."""

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Encode a prompt, chat template included."""

    def text_ids(self, text: str) -> TokenIds:
        """Token ids of a text, none of them special."""

    def without_special(self, token_ids: Sequence[int]) -> list[int]:
        """Leave special tokens out."""


@dataclass(frozen=True, slots=True)
class Agent:
    """One participant.

    Attributes:
        name: in the session.
        system: the text that makes it who it is.
        private: see `Prompt`.
    """

    name: str
    system: str
    private: str | None = None


@dataclass(frozen=True, slots=True)
class _PastRound:
    """A round as one agent lived it: the blocks that it read, what it was asked, what it said."""

    previous_blocks: tuple[Part, ...]
    task: str
    reply: tuple[int, ...]

    def messages(self) -> list[Message]:
        return [
            _user_message(self.previous_blocks, self.task),
            {"role": "assistant", "content": [private(self.reply)]},
        ]


@dataclass(slots=True)
class _Member:
    """An agent with its rounds, oldest first, and its last prompt with the answer to it."""

    agent: Agent
    rounds: list[_PastRound] = field(default_factory=list)
    cache: SpokenCache = field(default_factory=lambda: SpokenCache(np.empty(0, np.int32), 0))


@dataclass(frozen=True, slots=True)
class Asked:
    """A round that has begun: for each agent, in their order, what it was asked.

    Attributes:
        tasks: as given.
        prompts: with history.
        params: of the answers.
        remembered: rounds that the prompt holds; those before are forgotten.
    """

    tasks: tuple[str, ...]
    prompts: list[Prompt]
    params: list[SamplingParams]
    remembered: tuple[int, ...]


class Conversation:
    """Who takes part, and what everybody has said.

    Attributes:
        encoder: of the prompts.
        round: number of the next round, from 0.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        max_context: int,
        *,
        params: SamplingParams | None = None,
        max_history: int | None = None,
    ) -> None:
        """Begin with nobody.

        Args:
            encoder: of the prompts.
            max_context: most tokens of a prompt and its answer; the oldest rounds are forgotten
                where they would be more.
            params: of every answer, if `ask` does not say otherwise.
            max_history: past rounds that agents remember; as many as fit if left out.
        """
        self.encoder = encoder
        self.round = 0
        self._max_context = max_context
        self._params = params or SamplingParams()
        self._max_history = max_history
        self._members: dict[str, _Member] = {}
        self._previous_blocks: tuple[Part, ...] = ()

    # -- who takes part -----------------------------------------------------------------------

    @property
    def agents(self) -> tuple[Agent, ...]:
        """Who takes part in the next round, in the order in which their blocks will stand."""
        return tuple(member.agent for member in self._members.values())

    def join(self, agent: Agent) -> None:
        """Let an agent take part from the next round on; it hears what was said in the last.

        Raises:
            RoundError: if an agent of that name is here.
        """
        if agent.name in self._members:
            raise RoundError(f"An agent called {agent.name!r} is in the session already.")
        self._members[agent.name] = _Member(agent)

    def leave(self, name: str) -> None:
        """Let an agent go; its last words are still heard.

        Raises:
            RoundError: if there is none of that name.
        """
        if name not in self._members:
            raise RoundError(f"There is no agent called {name!r} in the session.")
        del self._members[name]

    @contextmanager
    def provisional(self) -> Iterator[None]:
        """Who joins or leaves meanwhile has done so only if a round is heard before the end."""
        members, number = dict(self._members), self.round
        try:
            yield
        finally:
            if self.round == number:
                self._members = members

    # -- a round ------------------------------------------------------------------------------

    def ask(
        self,
        task: str | Mapping[str, str],
        params: SamplingParams | Mapping[str, SamplingParams] | None = None,
    ) -> Asked:
        """Make the prompts of the next round. Changes nothing.

        Args:
            task: for all agents, or by name.
            params: for all agents, or by name; those of the conversation where left out.

        Raises:
            RoundError: if nobody is here, or an agent has no task.
        """
        if not self._members:
            raise RoundError("The session has no agents. Let one join first.")
        tasks: list[str] = []
        prompts: list[Prompt] = []
        chosen: list[SamplingParams] = []
        remembered: list[int] = []
        for name, member in self._members.items():
            own_task = task if isinstance(task, str) else task.get(name)
            if own_task is None:
                raise RoundError(f"There is no task for {name!r}. Give one for every agent.")
            own_params = params.get(name) if isinstance(params, Mapping) else params
            own_params = own_params or self._params
            prompt, num_rounds = self._prompt(member, own_task, own_params.max_tokens)
            tasks.append(own_task)
            prompts.append(prompt)
            chosen.append(own_params)
            remembered.append(num_rounds)
        return Asked(tuple(tasks), prompts, chosen, tuple(remembered))

    def hear(self, asked: Asked, outputs: Sequence[Output]) -> None:
        """Take what was said in a round.

        An agent that failed has heard the others, and says nothing.

        Args:
            asked: what `ask` has returned; nobody has joined or left since.
            outputs: an answer for each of its prompts, in their order.
        """
        blocks: list[Part] = []
        for member, output, task, num_rounds in zip(
            self._members.values(), outputs, asked.tasks, asked.remembered, strict=True
        ):
            words = self._words(output)
            del member.rounds[: len(member.rounds) - num_rounds]
            member.rounds.append(_PastRound(self._previous_blocks, task, words))
            if output.error is None:
                blocks.append(self._block(output.agent, words))
                member.cache = SpokenCache.of(output.prompt_token_ids, output.token_ids)
        self._previous_blocks = tuple(blocks)
        self.round += 1

    def _prompt(self, member: _Member, task: str, max_tokens: int) -> tuple[Prompt, int]:
        """Build an agent's prompt with as many of its rounds as are remembered and fit."""
        rounds = member.rounds
        if self._max_history is not None:
            rounds = rounds[max(0, len(rounds) - self._max_history) :]
        while True:
            messages: list[Message] = [
                {"role": "system", "content": [private(member.agent.system)]}
            ]
            for past in rounds:
                messages += past.messages()
            messages.append(_user_message(self._previous_blocks, task))
            prompt = Prompt(messages, agent=member.agent.name, private=member.agent.private)
            if not rounds or len(self.encoder.encode(prompt)) + max_tokens <= self._max_context:
                return prompt, len(rounds)
            rounds = rounds[1:]

    def _words(self, output: Output) -> tuple[int, ...]:
        """What an agent said, as token ids that are safe in everybody's prompt."""
        if output.stopped_by_text:  # the last tokens spell the stop text
            return tuple(self.encoder.text_ids(output.text).tolist())
        return tuple(self.encoder.without_special(output.token_ids))

    def _block(self, speaker: str, words: Sequence[int]) -> Part:
        """What an agent said, as all others read it."""
        name, end = self.encoder.text_ids(f"{speaker}: "), self.encoder.text_ids("\n")
        return shared([*name.tolist(), *words, *end.tolist()])

    # -- what lasts ---------------------------------------------------------------------------

    @property
    def caches(self) -> dict[str, SpokenCache]:
        """By agent: its last prompt with the answer to it; empty of who has not spoken yet."""
        return {name: member.cache for name, member in self._members.items()}

    def remembered_blocks(self) -> list[TokenIds]:
        """All blocks that somebody remembers, each once: int32."""
        blocks = [
            part
            for member in self._members.values()
            for past in member.rounds
            for part in past.previous_blocks
        ]
        unique = dict.fromkeys([*blocks, *self._previous_blocks])
        return [as_token_ids(part.content) for part in unique]  # type: ignore[arg-type]

    def state(self) -> dict[str, Any]:
        """All that the next round needs but for KV and `round`, for JSON.

        Blocks that several agents remember are written once, and referred to by their index.
        """
        by_id = {id(self._previous_blocks): self._previous_blocks}
        for member in self._members.values():
            by_id |= {id(past.previous_blocks): past.previous_blocks for past in member.rounds}
        indices = {key: index for index, key in enumerate(by_id)}
        return {
            "heard": [[part.content for part in blocks] for blocks in by_id.values()],
            "members": [
                {
                    "name": member.agent.name,
                    "system": member.agent.system,
                    "turns": [
                        [indices[id(past.previous_blocks)], past.task, past.reply]
                        for past in member.rounds
                    ],
                    "cache": [member.cache.token_ids.tolist(), member.cache.num_prompt],
                }
                | ({"private": private} if (private := member.agent.private) else {})
                for member in self._members.values()
            ],
        }

    def load_state(self, state: Mapping[str, Any], round_number: int) -> None:
        """Go on from what `state` has returned, which may have been JSON meanwhile.

        Args:
            state: of a conversation with the same encoder.
            round_number: of its next round.

        Raises:
            LookupError, TypeError, ValueError: for what `state` does not return; nothing has
                changed then.
        """
        rounds_blocks = [tuple(map(shared, blocks)) for blocks in state["heard"]]
        members: dict[str, _Member] = {}
        for member in state["members"]:
            agent = Agent(member["name"], member["system"], member.get("private"))
            rounds = [
                _PastRound(rounds_blocks[index], task, tuple(reply))
                for index, task, reply in member["turns"]
            ]
            token_ids, num_prompt = member["cache"]
            cache = SpokenCache(np.array(token_ids, np.int32), int(num_prompt))
            members[agent.name] = _Member(agent, rounds, cache)
        self._previous_blocks, self._members, self.round = rounds_blocks[0], members, round_number


def _user_message(blocks: Sequence[Part], task: str) -> Message:
    return {"role": "user", "content": [*blocks, private(task)]}
