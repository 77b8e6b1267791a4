"""Conversations: agents that hear each other from round to round.

Each agent's prompt, in the model's own chat template:

    system     who the agent is                                        private
    user       [what everybody said last round, one block per speaker] shared
               the task                                                private
    assistant  what the agent said                                     private
    user       [what everybody said in this round] ...

The blocks come in one order for all agents, so one owner serves all. Answers are carried on as
token ids, so a conversation continues exactly where its KV ends.

A prompt and its answer have to fit the model's context. Where they do not, an agent's oldest rounds
go first. If that is not enough, the longest blocks of the last round are cut, for all agents alike
and so that the one with the least room can read them: all still read the same.

Nothing here runs a model, reads a disk or starts a thread: `session.py` does that with what `ask`
returns and `hear` takes.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from tokendance.errors import ContextError, RoundError
from tokendance.kinds import check_kinds
from tokendance.outputs import Output
from tokendance.params import SamplingParams, check_params
from tokendance.rounds.fitting import CUT_MARK, block_ids, cut_blocks
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

    def told(self, prompt: TokenIds, text: str, *, is_cut: bool, with_thoughts: bool) -> str | None:
        """An answer as others are told it; None for all of it, as it is."""


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

    def __post_init__(self) -> None:
        check_kinds(self)


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
        blocks: what was said last, as all of them read it.
        tasks: as given.
        prompts: with history.
        params: of the answers.
        remembered: rounds that the prompt holds; those before are forgotten.
    """

    blocks: tuple[Part, ...]
    tasks: tuple[str, ...]
    prompts: list[Prompt]
    params: list[SamplingParams]
    remembered: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Question:
    """What an agent is asked in a round that is being made.

    Attributes:
        member: who.
        task: what.
        params: of the answer.
        answer_tokens: room that the answer is sure to have.
    """

    member: _Member
    task: str
    params: SamplingParams
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class _Draft:
    """An agent's prompt with as many of its rounds as fit.

    Attributes:
        prompt: without what it says of dropped tokens.
        num_tokens: of it.
        num_rounds: that it holds.
        num_forgotten: tokens of rounds that it has no room for.
        excess: tokens that it and its answer have too many though no round is left; none if not
            above 0.
    """

    prompt: Prompt
    num_tokens: int
    num_rounds: int
    num_forgotten: int
    excess: int


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
            max_context: most tokens of a prompt and its answer. Where they would be more, so that
                an answer could not have its `max_tokens`, past rounds are forgotten; if it still
                could not, or not half of the context if it wants more, the last one is cut.
            params: of every answer, if `ask` does not say otherwise.
            max_history: past rounds that agents remember; as many as fit if left out.
        """
        self.encoder = encoder
        self.round = 0
        self._max_context = max_context
        self._params = SamplingParams() if params is None else params
        check_params(self._params)
        self._max_history = max_history
        self._shares_thoughts = False
        self._members: dict[str, _Member] = {}
        self._previous_blocks: tuple[Part, ...] = ()

    def configure(
        self,
        params: SamplingParams | None = None,
        max_history: int | None = None,
        share_reasoning: bool | None = None,
    ) -> None:
        """Change what is given, from the next round on; see `LLM.session()`."""
        if params is not None:
            check_params(params)
            self._params = params
        self._max_history = self._max_history if max_history is None else max_history
        if share_reasoning is not None:
            self._shares_thoughts = share_reasoning

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
            ConfigError: if they are something else.
            RoundError: if nobody is here, or an agent has no task.
            ContextError: if an agent's own text leaves its answer no room.
            PromptError: for text that cannot be encoded.
        """
        all_params = params.values() if isinstance(params, Mapping) else [params]
        for given in all_params:
            if given is not None:
                check_params(given)
        if not isinstance(task, str | Mapping):
            raise RoundError(
                f"A task is a {type(task).__name__}. Give a text, or one for each agent by name."
            )
        if not self._members:
            raise RoundError("The session has no agents. Let one join first.")
        questions: list[_Question] = []
        for name, member in self._members.items():
            own_task = task if isinstance(task, str) else task.get(name)
            if own_task is None:
                raise RoundError(f"There is no task for {name!r}. Give one for every agent.")
            own_params = params.get(name) if isinstance(params, Mapping) else params
            own_params = own_params or self._params
            answer_tokens = min(own_params.max_tokens, self._max_context // 2)
            questions.append(_Question(member, own_task, own_params, answer_tokens))
        blocks, num_cut = self._previous_blocks, 0
        drafts = [self._draft(question, blocks) for question in questions]
        excess = max(draft.excess for draft in drafts)
        if excess > 0:
            mark = self.encoder.text_ids(CUT_MARK).tolist()
            blocks, num_cut = cut_blocks(blocks, excess, mark)
            drafts = [self._draft(question, blocks) for question in questions]
        for question, draft in zip(questions, drafts, strict=True):
            if draft.excess > 0:
                raise ContextError(
                    f"The prompt of {question.member.agent.name!r} has {draft.num_tokens} tokens "
                    "even without what was said before, and its answer is to have room for "
                    f"{question.answer_tokens}; the model's context holds {self._max_context}. "
                    "Shorten its system text or its task, or lower its max_tokens."
                )
        return Asked(
            blocks,
            tuple(question.task for question in questions),
            [
                replace(draft.prompt, dropped_tokens=draft.num_forgotten + num_cut)
                for draft in drafts
            ],
            [question.params for question in questions],
            tuple(draft.num_rounds for draft in drafts),
        )

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
            member.rounds.append(_PastRound(asked.blocks, task, words))
            if output.error is None:
                blocks.append(self._block(output.agent, words))
                member.cache = SpokenCache.of(output.prompt_token_ids, output.token_ids)
        self._previous_blocks = tuple(blocks)
        self.round += 1

    def _draft(self, question: _Question, blocks: tuple[Part, ...]) -> _Draft:
        """Build an agent's prompt with as many of its rounds as are remembered and fit."""
        rounds, room = question.member.rounds, self._max_context - question.params.max_tokens
        if self._max_history is not None:
            rounds = rounds[max(0, len(rounds) - self._max_history) :]
        prompt, num_whole = self._prompt(question, rounds, blocks)
        num_tokens = num_whole
        if num_whole > room and rounds:
            num_forgotten = 1 + bisect_left(
                range(1, len(rounds)),
                True,
                key=lambda num: self._prompt(question, rounds[num:], blocks)[1] <= room,
            )
            rounds = rounds[num_forgotten:]
            prompt, num_tokens = self._prompt(question, rounds, blocks)
        excess = num_tokens + question.answer_tokens - self._max_context
        return _Draft(prompt, num_tokens, len(rounds), num_whole - num_tokens, excess)

    def _prompt(
        self, question: _Question, rounds: Sequence[_PastRound], blocks: Sequence[Part]
    ) -> tuple[Prompt, int]:
        """An agent's prompt with these of its rounds, and its length."""
        agent = question.member.agent
        messages: list[Message] = [{"role": "system", "content": [private(agent.system)]}]
        for past in rounds:
            messages += past.messages()
        messages.append(_user_message(blocks, question.task))
        prompt = Prompt(messages, agent=agent.name, private=agent.private)
        return prompt, len(self.encoder.encode(prompt))

    def _words(self, output: Output) -> tuple[int, ...]:
        """What an agent said, as token ids that are safe in everybody's prompt."""
        prompt, is_cut = output.prompt_token_ids, output.finish_reason == "length"
        shared = self._shares_thoughts
        told = self.encoder.told(prompt, output.text, is_cut=is_cut, with_thoughts=shared)
        if told is not None:
            return tuple(self.encoder.text_ids(told).tolist())
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
        return [as_token_ids(block_ids(part)) for part in unique]

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
