"""Sessions: agents that hear each other from round to round.

Each agent's conversation, in the model's own chat template:

    system     who the agent is                                        private
    user       [what everybody said last round, one block per speaker] shared
               the task                                                private
    assistant  what the agent said                                     private
    user       [what everybody said in this round] ...

The blocks come in one order for all agents, so one owner serves all. Answers are carried on as
token ids, so a conversation continues exactly where its KV ends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tokendance.engine.sampling import SamplingParams
from tokendance.errors import RoundError
from tokendance.outputs import Output, RoundResult
from tokendance.rounds.prompts import Message, Part, Prompt, private, shared

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
    agent: Agent
    turns: list[_Turn] = field(default_factory=list)


class Session:
    """Carries agents from round to round. Made by `LLM.session()`.

    Attributes:
        round: number of the next round, from 0.
    """

    def __init__(
        self,
        llm: "LLM",
        agents: Sequence[Agent] = (),
        *,
        params: SamplingParams | None = None,
        max_history: int | None = None,
    ) -> None:
        """See `LLM.session()`."""
        self._llm = llm
        self._params = params or SamplingParams()
        self._max_history = max_history
        self._members: dict[str, _Member] = {}
        self._heard: tuple[Part, ...] = ()
        self.round = 0
        for agent in agents:
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
        """
        if not self._members:
            raise RoundError("The session has no agents. Let one join first.")
        prompts: list[Prompt] = []
        chosen: list[SamplingParams] = []
        tasks: list[str] = []
        for name, member in self._members.items():
            one_task = task if isinstance(task, str) else task.get(name)
            if one_task is None:
                raise RoundError(f"There is no task for {name!r}. Give one for every agent.")
            one_params = params.get(name) if isinstance(params, Mapping) else params
            tasks.append(one_task)
            chosen.append(one_params or self._params)
            prompts.append(self._prompt(member, one_task, chosen[-1].max_tokens))
        result = self._llm.run_round(prompts, chosen, progress)
        blocks: list[Part] = []
        for output, member, one_task in zip(
            result.outputs, self._members.values(), tasks, strict=True
        ):
            words = self._words(output)
            member.turns.append(_Turn(self._heard, one_task, words))
            if output.error is None:
                blocks.append(self.block(output.agent, words))
        self._heard = tuple(blocks)
        self.round += 1
        return result

    def block(self, speaker: str, token_ids: Sequence[int]) -> Part:
        """Make a shared block from what an agent said."""
        encoder = self._llm.encoder
        name, end = encoder.text_ids(f"{speaker}: "), encoder.text_ids("\n")
        return shared([*name.tolist(), *token_ids, *end.tolist()])

    def _words(self, output: Output) -> tuple[int, ...]:
        """What an agent said, as token ids that are safe in everybody's prompt."""
        encoder = self._llm.encoder
        if output.stopped_by_text:  # the last tokens spell the stop text
            return tuple(encoder.text_ids(output.text).tolist())
        return tuple(encoder.without_special(output.token_ids))

    def _prompt(self, member: _Member, task: str, max_tokens: int) -> Prompt:
        """Build an agent's prompt with as much of its history as is remembered and fits."""
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
                return prompt
            length = len(self._llm.encoder.encode(prompt)) + max_tokens
            if length <= self._llm.model.shape.max_context:
                return prompt
            turns = turns[1:]


def _user_message(heard: Sequence[Part], task: str) -> Message:
    return {"role": "user", "content": [*heard, private(task)]}


def _reply_message(reply: Sequence[int]) -> Message:
    return {"role": "assistant", "content": [private(reply)]}
