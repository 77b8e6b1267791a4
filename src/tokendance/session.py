"""Sessions: conversations that run, and that last.

`Conversation` knows who has said what and makes the prompts; a session has them answered, and
brings what was said, and the KV of it, to disk. A session with a name, of an LLM with a store, is
durable: when a round is done all of it is on disk, and a session of the same name goes on from
there in any later process.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from tokendance.conversation import Agent, Asked, Conversation
from tokendance.disk.records import SessionKey, StoredSession
from tokendance.errors import CorruptFileError, StoreError
from tokendance.outputs import NotStoredError, Output, Progress, RoundResult
from tokendance.params import SamplingParams
from tokendance.rounds.prompts import Prompt
from tokendance.tier.caches import SessionSnapshot
from tokendance.tier.loader import Restored
from tokendance.tier.steps import Steps, finish
from tokendance.tier.tier import DiskTier
from tokendance.turns import Turns, in_event_loop


class RoundRunner(Protocol):
    """Runs the prompts of one round, as `LLM.run_round` does."""

    def __call__(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        progress: Progress | None = None,
        *,
        session: SessionKey | None = None,
    ) -> RoundResult:
        """Return an answer for each prompt."""


class Session:
    """Carries agents from round to round. Made by `LLM.session()`.

    Attributes:
        key: under which it is stored, and whose it is; None if it ends with the process.
        ttl_s: see `LLM.session()`; that of the last process if it was not given.
    """

    def __init__(
        self,
        conversation: Conversation,
        run_round: RoundRunner,
        *,
        key: SessionKey | None = None,
        tier: DiskTier | None = None,
        ttl_s: float | None = None,
        turns: Turns | None = None,
    ) -> None:
        """Have a conversation answered and stored; `load` goes on with what is stored already.

        Args:
            conversation: that nobody else goes on with.
            run_round: answers the prompts in `run`.
            key: under which it is stored.
            tier: where it is stored; without it, or without a key, nowhere.
            ttl_s: see `LLM.session()`.
            turns: of whoever runs the rounds; its own if left out.
        """
        self._conversation = conversation
        self._run_round = run_round
        self._tier = tier if key is not None else None
        self._turns = turns or Turns()
        self._num_stored: int | None = None  # rounds that are on disk; None if that is not certain
        self.key = key
        self.ttl_s = ttl_s

    def configure(
        self,
        *,
        params: SamplingParams | None = None,
        max_history: int | None = None,
        ttl_s: float | None = None,
        share_reasoning: bool | None = None,
    ) -> None:
        """Change what is given, from the next round on; see `LLM.session()`."""
        with self._turns.take():
            self._conversation.configure(params, max_history, share_reasoning)
            self.ttl_s = self.ttl_s if ttl_s is None else ttl_s

    # -- who takes part -----------------------------------------------------------------------

    @property
    def name(self) -> str | None:
        """Under which it is stored; None if it ends with the process."""
        return self.key.name if self.key is not None else None

    @property
    def round(self) -> int:
        """Number of the next round, from 0."""
        return self._conversation.round

    @property
    def agents(self) -> tuple[Agent, ...]:
        """Who takes part in the next round, in the order in which their blocks will stand."""
        return self._conversation.agents

    def join(self, agent: Agent) -> None:
        """Let an agent take part from the next round on; it hears what was said in the last.

        Raises:
            RoundError: if an agent of that name is here.
        """
        with self._turns.take():
            self._conversation.join(agent)

    def leave(self, name: str) -> None:
        """Let an agent go; its last words are still heard.

        Raises:
            RoundError: if there is none of that name.
        """
        with self._turns.take():
            self._conversation.leave(name)

    @contextmanager
    def provisional(self) -> Iterator[None]:
        """What `join`, `leave` and `ttl_s` change meanwhile lasts only if a round is heard."""
        ttl_s, number = self.ttl_s, self.round
        try:
            with self._conversation.provisional():
                yield
        finally:
            if self.round == number:
                self.ttl_s = ttl_s

    # -- a round ------------------------------------------------------------------------------

    def run(
        self,
        task: str | Mapping[str, str],
        params: SamplingParams | Mapping[str, SamplingParams] | None = None,
        progress: Progress | None = None,
    ) -> RoundResult:
        """Run one round: every agent hears the last round, is given its task, and answers.

        An agent that fails has heard the others, says nothing, and stays in the session.

        Args:
            task: for all agents, or by name.
            params: for all agents, or by name; those of the session if left out.
            progress: see `LLM.run_round()`.

        Raises:
            RoundError: if nobody is here, or an agent has no task.
            ContextError: if an agent's own text leaves no room for its answer.
            NotStoredError: if the round is not on disk; it has what was answered.
        """
        with self._turns.take():
            asked = self.ask(task, params)
            self.restore()
            result = self._run_round(asked.prompts, asked.params, progress, session=self.key)
            self.hear(asked, result.outputs)
            try:
                self.save()
            except StoreError as error:
                raise NotStoredError(str(error), result) from error
            return result

    async def arun(
        self,
        task: str | Mapping[str, str],
        params: SamplingParams | Mapping[str, SamplingParams] | None = None,
        progress: Progress | None = None,
    ) -> RoundResult:
        """Do what `run` does while the event loop goes on; see `LLM.arun_round()`.

        If the awaiting task is cancelled, the session has not heard the round, unless all of it had
        been answered.
        """
        told = in_event_loop(progress)
        return await self._turns.in_background(lambda: self.run(task, params, told))

    def ask(
        self,
        task: str | Mapping[str, str],
        params: SamplingParams | Mapping[str, SamplingParams] | None = None,
    ) -> Asked:
        """Make the prompts of the next round. Changes nothing."""
        return self._conversation.ask(task, params)

    def hear(self, asked: Asked, outputs: Sequence[Output]) -> None:
        """Take what was said in a round."""
        self._conversation.hear(asked, outputs)

    # -- what lasts ---------------------------------------------------------------------------

    def load(self) -> None:
        """Go on with what is stored under its key; where nothing is, nothing changes.

        It waits for the disk, and may be called on any thread while nobody else has the session.

        Raises:
            StoreError: if it cannot be read.
        """
        stored = finish(self._stored())
        self._num_stored = stored.round if stored is not None else 0
        if stored is None:
            return
        try:
            self._conversation.load_state(json.loads(stored.state), stored.round)
        except (LookupError, TypeError, ValueError) as error:
            raise StoreError(
                f"What is stored of the session {stored.key.name!r} cannot be read "
                f"({type(error).__name__}). Remove it with `tokendance store rm`."
            ) from error
        if self.ttl_s is None:
            self.ttl_s = stored.ttl_s

    def restore(self, *, always: bool = False) -> Restored | None:
        """Read what memory lacks of its KV: after a restart all, later what was evicted.

        Like all that follows it is to be called where the tier may be used.

        Args:
            always: read it even if computing it would be quicker.

        Returns:
            What was read; None where nothing is stored.
        """
        return finish(self.restoring(always=always))

    def restoring(self, *, always: bool = False) -> Steps[Restored | None]:
        """The same in steps between which the engine may go on."""
        stored = yield from self._stored()
        if self._tier is None or stored is None:
            return None
        salt = self._conversation.encoder.salt
        return (yield from self._tier.restoring(stored, salt, always=always))

    def _stored(self) -> Steps[StoredSession | None]:
        """What is on disk of it.

        Raises:
            StoreError: if that cannot be read, or is what another has said under this name.
            UsageError: in a process that was forked.
        """
        if self._tier is None or self.key is None:
            return None
        self._turns.check_process()
        tier, key = self._tier, self.key
        if tier.is_closed:
            raise StoreError(
                f"The store of the session {key.name!r} is closed. Open it again, and then "
                "the session."
            )
        stored = yield from tier.job(lambda: tier.disk.session(key))
        known = self._num_stored
        if stored is not None and known is not None and stored.round != known:
            raise StoreError(
                f"Somebody else has gone on with the session {key.name!r}: {stored.round} of "
                f"its rounds are stored, and only {known} are known here. Open it again."
            )
        return stored

    def go_on_writing(self) -> bool:
        """Whether files of its last round are still being written; see `DiskTier.go_on_writing`."""
        if self._tier is None or self.key is None:
            return False
        return self._tier.go_on_writing(self.key)

    def save(self) -> None:
        """Make what was said, and the KV of it, durable.

        Raises:
            StoreError: if the disk cannot be written; what was durable before still is.
        """
        finish(self.saving())

    def saving(self) -> Steps[None]:
        """The same in steps between which the engine may go on."""
        if self._tier is None or self.key is None:
            return
        snapshot = SessionSnapshot(
            self.key,
            round=self.round,
            state=json.dumps(self._conversation.state()).encode(),
            caches=self._conversation.caches,
            shared_segments=self._conversation.remembered_blocks(),
            salt=self._conversation.encoder.salt,
            ttl_s=self.ttl_s,
        )
        try:
            stored = yield from self._stored()
        except CorruptFileError:
            stored = None  # what is stored now is whole
        self._num_stored = None
        yield from self._tier.saving(snapshot, stored)
        self._num_stored = snapshot.round
