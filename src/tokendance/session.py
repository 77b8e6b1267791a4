"""Sessions: agents that hear each other from round to round.

Each agent's conversation, in the model's own chat template:

    system     who the agent is                                        private
    user       [what everybody said last round, one block per speaker] shared
               the task                                                private
    assistant  what the agent said                                     private
    user       [what everybody said in this round] ...

The blocks come in one order for all agents, so one owner serves all. Answers are carried on as
token ids, so a conversation continues exactly where its KV ends.

A session with a name, of an LLM with a store, is durable: when a round is done, what was said and
the KV of it are on disk, and a session of the same name goes on from there in any later process.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tokendance.disk.records import SessionKey, StoredSession
from tokendance.engine.sampling import SamplingParams
from tokendance.errors import RoundError, StoreError
from tokendance.models.encoder import PromptEncoder
from tokendance.outputs import NotStoredError, Output, RoundResult
from tokendance.rounds.prompts import Message, Part, Prompt, private, shared
from tokendance.rounds.segments import EncodedPrompt, as_token_ids
from tokendance.tier.caches import SessionSnapshot, SpokenCache
from tokendance.tier.loader import Restored, Restoring

if TYPE_CHECKING:
    from tokendance.llm import LLM, Progress


@dataclass(frozen=True, slots=True)
class Agent:
    """One participant: a name, and the text that makes it who it is."""

    name: str
    system: str


@dataclass(frozen=True, slots=True)
class _Turn:
    """One round as an agent lived it: what it heard, what it was asked, what it said."""

    heard: tuple[Part, ...]
    task: str
    reply: tuple[int, ...]

    def messages(self) -> list[Message]:
        return [_user_message(self.heard, self.task), _reply_message(self.reply)]


@dataclass(slots=True)
class _Member:
    """An agent with what it has lived through.

    Attributes:
        agent: who it is.
        turns: its rounds.
        cache: its last prompt with its answer.
    """

    agent: Agent
    turns: list[_Turn] = field(default_factory=list)
    cache: SpokenCache = field(default_factory=lambda: SpokenCache(np.empty(0, np.int32), 0))


@dataclass(frozen=True, slots=True)
class Asked:
    """A round of a session that has begun: for each member, in their order, what it was asked.

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


class Session:
    """Carries agents from round to round. Made by `LLM.session()`.

    Attributes:
        round: number of the next round, from 0.
        name: under which it is stored; None if it ends with the process.
        key: likewise, with whose it is.
        ttl_s: see `LLM.session()`; that of the last process if it was not given.
    """

    def __init__(
        self,
        llm: "LLM",
        name: str | None = None,
        agents: Sequence[Agent] = (),
        *,
        params: SamplingParams | None = None,
        max_history: int | None = None,
        ttl_s: float | None = None,
        tenant: str = "",
        encoder: PromptEncoder | None = None,
    ) -> None:
        """See `LLM.session()`.

        Args:
            llm: that runs the rounds.
            name: see there, likewise `agents`, `params`, `max_history` and `ttl_s`.
            agents: likewise.
            params: likewise.
            max_history: likewise.
            ttl_s: likewise.
            tenant: whose it is; sessions of other tenants have other names.
            encoder: of the tenant's prompts; that of the LLM if left out.
        """
        self._llm = llm
        self._encoder = encoder or llm.encoder
        self._params = params or SamplingParams()
        self._max_history = max_history
        self.ttl_s = ttl_s
        self._members: dict[str, _Member] = {}
        self._heard: tuple[Part, ...] = ()
        self.name = name
        self.round = 0
        self._tiers = llm.tiers if name is not None else None
        self.key = SessionKey(tenant, name) if name is not None else None
        if (stored := self._stored()) is not None:
            self._load(stored)
        for agent in agents:
            if agent.name not in self._members or self.round == 0:
                self.join(agent)

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

    def undo_point(self) -> Callable[[], None]:
        """What brings back who is here now, and `ttl_s`, until a round has been heard."""
        members, ttl_s, number = dict(self._members), self.ttl_s, self.round

        def undo() -> None:
            if self.round == number:
                self._members, self.ttl_s = members, ttl_s

        return undo

    def run(
        self,
        task: str | Mapping[str, str],
        params: SamplingParams | Mapping[str, SamplingParams] | None = None,
        progress: "Progress | None" = None,
    ) -> RoundResult:
        """Run one round: every agent hears the last round, is given its task, and answers.

        An agent that fails has heard the others, says nothing, and stays in the session.

        Args:
            task: for all agents, or by name.
            params: for all agents, or by name; those of the session if left out.
            progress: see `LLM.run_round()`.

        Raises:
            RoundError: if nobody is here, or an agent has no task.
            NotStoredError: if the round is not on disk; it has what was answered.
        """
        asked = self.ask(task, params)
        self.restore()
        result = self._llm.run_round(asked.prompts, asked.params, progress, session=self.key)
        self.hear(asked, result.outputs)
        try:
            self.save()
        except StoreError as error:
            raise NotStoredError(str(error), result) from error
        return result

    def ask(
        self,
        task: str | Mapping[str, str],
        params: SamplingParams | Mapping[str, SamplingParams] | None,
    ) -> Asked:
        """Make the prompts of the next round. Changes nothing."""
        if not self._members:
            raise RoundError("The session has no agents. Let one join first.")
        prompts: list[Prompt] = []
        remembered: list[int] = []
        chosen: list[SamplingParams] = []
        tasks: list[str] = []
        for name, member in self._members.items():
            one_task = task if isinstance(task, str) else task.get(name)
            if one_task is None:
                raise RoundError(f"There is no task for {name!r}. Give one for every agent.")
            one_params = params.get(name) if isinstance(params, Mapping) else params
            tasks.append(one_task)
            chosen.append(one_params or self._params)
            prompt, num_turns = self._prompt(member, one_task, chosen[-1].max_tokens)
            prompts.append(prompt)
            remembered.append(num_turns)
        return Asked(tuple(tasks), prompts, chosen, tuple(remembered))

    def hear(self, asked: Asked, outputs: Sequence[Output]) -> None:
        """Take what was said in a round."""
        blocks: list[Part] = []
        for output, member, one_task, num_turns in zip(
            outputs, self._members.values(), asked.tasks, asked.remembered, strict=True
        ):
            words = self._words(output)
            del member.turns[: len(member.turns) - num_turns]
            member.turns.append(_Turn(self._heard, one_task, words))
            if output.error is None:
                blocks.append(self.block(output.agent, words))
                member.cache = SpokenCache.of(output.prompt_token_ids, output.token_ids)
        self._heard = tuple(blocks)
        self.round += 1

    # -- what lasts ---------------------------------------------------------------------------

    def restore(self, *, always: bool = False) -> Restored | None:
        """Read what memory lacks of its KV: after a restart all, later what was evicted.

        Args:
            always: read it even if computing it would be quicker.

        Returns:
            What was read; None where nothing is stored.
        """
        if self._tiers is None or (stored := self._stored()) is None:
            return None
        return self._tiers.restore(stored, self._encoder.salt, always=always)

    def restoring(self) -> Restoring | None:
        """The same in steps between which the engine may go on; see `DiskTier.restoring`."""
        if self._tiers is None or (stored := self._stored()) is None:
            return None
        return self._tiers.restoring(stored, self._encoder.salt)

    def _stored(self) -> StoredSession | None:
        if self._tiers is None or self.key is None:
            return None
        return self._tiers.disk.session(self.key)

    def save(self) -> None:
        """Make what was said, and the KV of it, durable."""
        if self._tiers is None or self.key is None:
            return
        self._tiers.save(
            SessionSnapshot(
                self.key,
                round=self.round,
                state=json.dumps(self._state()).encode(),
                caches={name: member.cache for name, member in self._members.items()},
                shared_segments=[as_token_ids(part.content) for part in self._blocks()],  # type: ignore[arg-type]
                salt=self._encoder.salt,
                ttl_s=self.ttl_s,
            )
        )

    def _blocks(self) -> list[Part]:
        """All blocks that somebody remembers, each once."""
        turns = [turn for member in self._members.values() for turn in member.turns]
        heard = [*(turn.heard for turn in turns), self._heard]
        return list(dict.fromkeys(part for parts in heard for part in parts))

    def _state(self) -> dict[str, Any]:
        """All that the next round needs, but for KV. What all have heard is written once."""
        heard: dict[int, tuple[Part, ...]] = {id(self._heard): self._heard}
        for member in self._members.values():
            heard |= {id(turn.heard): turn.heard for turn in member.turns}
        places = {key: place for place, key in enumerate(heard)}
        return {
            "heard": [[part.content for part in parts] for parts in heard.values()],
            "members": [
                {
                    "name": member.agent.name,
                    "system": member.agent.system,
                    "turns": [
                        [places[id(turn.heard)], turn.task, turn.reply] for turn in member.turns
                    ],
                    "cache": [member.cache.token_ids.tolist(), member.cache.num_prompt],
                }
                for member in self._members.values()
            ],
        }

    def _load(self, stored: StoredSession) -> None:
        try:
            state = json.loads(stored.state)
            heard = [tuple(shared(content) for content in parts) for parts in state["heard"]]
            for one in state["members"]:
                turns = [_Turn(heard[at], task, tuple(said)) for at, task, said in one["turns"]]
                token_ids, num_prompt = one["cache"]
                cache = SpokenCache(np.array(token_ids, np.int32), int(num_prompt))
                agent = Agent(one["name"], one["system"])
                self._members[agent.name] = _Member(agent, turns, cache)
            self._heard = heard[0]
            self.round = stored.round
            if self.ttl_s is None:
                self.ttl_s = stored.ttl_s
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise StoreError(
                f"What is stored of the session {stored.key.name!r} cannot be read "
                f"({type(error).__name__}). Remove it with `tokendance store rm`."
            ) from error

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Encode a prompt that `ask` has made."""
        return self._encoder.encode(prompt)

    def block(self, speaker: str, token_ids: Sequence[int]) -> Part:
        """Make a shared block from what an agent said."""
        encoder = self._encoder
        name, end = encoder.text_ids(f"{speaker}: "), encoder.text_ids("\n")
        return shared([*name.tolist(), *token_ids, *end.tolist()])

    def _words(self, output: Output) -> tuple[int, ...]:
        """What an agent said, as token ids that are safe in everybody's prompt."""
        encoder = self._encoder
        if output.stopped_by_text:  # the last tokens spell the stop text
            return tuple(encoder.text_ids(output.text).tolist())
        return tuple(encoder.without_special(output.token_ids))

    def _prompt(self, member: _Member, task: str, max_tokens: int) -> tuple[Prompt, int]:
        """Build an agent's prompt with as many of its rounds as are remembered and fit."""
        turns = member.turns
        if self._max_history is not None:
            turns = turns[max(0, len(turns) - self._max_history) :]
        while True:
            messages: list[Message] = [
                {"role": "system", "content": [private(member.agent.system)]}
            ]
            for turn in turns:
                messages += turn.messages()
            messages.append(_user_message(self._heard, task))
            prompt = Prompt(messages, agent=member.agent.name)
            if not turns:
                return prompt, 0
            length = len(self._encoder.encode(prompt)) + max_tokens
            if length <= self._llm.model.shape.max_context:
                return prompt, len(turns)
            turns = turns[1:]


def _user_message(heard: Sequence[Part], task: str) -> Message:
    return {"role": "user", "content": [*heard, private(task)]}


def _reply_message(reply: Sequence[int]) -> Message:
    return {"role": "assistant", "content": [private(reply)]}
