"""Sessions by name: those that each tenant has open. All of it happens in the event loop.

There are two kinds. In /v1/rounds the server keeps what the agents of a session have said, from
call to call:

    {"model": "...", "session": "town", "agents": [
        {"agent": "ann", "system": "You are Ann.", "task": "What worries you?"},
        {"agent": "bob", "system": "You are Bob.", "task": "What worries you?"}]}

The next call with the same session gives new tasks, and all agents read what all said before. An
agent that a call does not name has left; a new one says who it is (`system`) and joins. With a
store, a round is on disk when it is answered, if there is no `warning`, and a session goes on after
a restart.

If the round of a chat request names a session, the client keeps what was said, and the server the
KV of it (`kept_chats.py`). The store is read and written on the engine's thread (`loading.py`).
"""

import asyncio
import logging
from collections import OrderedDict, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tokendance.conversation import Agent, Conversation
from tokendance.disk.records import SessionKey
from tokendance.errors import RoundError, TokenDanceError
from tokendance.llm import LLM
from tokendance.models.encoder import PromptEncoder
from tokendance.rounds.segments import Salt
from tokendance.server.engine_thread import EngineThread
from tokendance.server.errors import ApiError
from tokendance.server.kept_chats import KeptChat
from tokendance.server.loading import try_to_save
from tokendance.server.protocol import RoundRequest
from tokendance.session import Session

log = logging.getLogger("tokendance.server")

# Of a tenant, of both kinds together; of the others only what is on disk is known.
_MAX_SESSIONS = 1024


@dataclass(slots=True)
class _Open:
    """A session that is open: of rounds, once `session` is loaded, or of chats."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # held by the round under way
    session: Session | None = None
    chat: KeptChat | None = None


class Sessions:
    """All open sessions of a server."""

    def __init__(self, llm: LLM, engine_thread: EngineThread) -> None:
        self._llm = llm
        self._engine_thread = engine_thread
        # The one that was asked for longest ago comes first.
        self._open: defaultdict[str, OrderedDict[SessionKey, _Open]] = defaultdict(OrderedDict)

    def chat(self, tenant: str, key: SessionKey, salt: Salt) -> KeptChat | None:
        """A session of chats, whose prompts have a salt; None without a store to keep it in."""
        if self._llm.tier is None:
            return None
        opened = self._opened(tenant, key)
        if opened.chat is None:
            opened.chat = KeptChat(key, salt, self._llm.tier)
        return opened.chat

    @asynccontextmanager
    async def round_of(
        self, body: RoundRequest, tenant: str, encoder: PromptEncoder
    ) -> AsyncIterator[Session]:
        """Hold a tenant's session for a round, with exactly the agents that the request names.

        Raises:
            RoundError: for a new agent that does not say who it is.
            StoreError: if what is stored of the session cannot be read.
            ApiError: 409 while another round of it is under way.
        """
        assert body.session is not None
        key = SessionKey(tenant, body.session)
        opened = self._opened(tenant, key)
        if opened.lock.locked():
            message = f"A round of the session {body.session!r} is under way. Wait for its end."
            raise ApiError(409, message, code="round_under_way")
        async with opened.lock:
            try:
                if opened.session is None:
                    opened.session = await self._load(key, encoder)
                # A round that is refused, or that nobody waits for to its end, changes nothing.
                with opened.session.provisional():
                    _admit(opened.session, body)
                    if body.ttl_s is not None:
                        opened.session.ttl_s = body.ttl_s
                    yield opened.session
            finally:
                # A session that has not begun need not be remembered.
                if opened.session is None or opened.session.round == 0:
                    del self._open[tenant][key]

    async def save(self, session: Session) -> TokenDanceError | ApiError | None:
        """Bring a session to disk; return what was wrong, if it goes on in memory only."""
        try:
            return await self._engine_thread.call(lambda: try_to_save(session))
        except ApiError as error:
            log.warning("A session is not on disk: %s", error)
            return error

    async def _load(self, key: SessionKey, encoder: PromptEncoder) -> Session:
        """A session as it is on disk, or a new one."""
        llm = self._llm
        conversation = Conversation(encoder, llm.model.shape.max_context)
        session = Session(conversation, llm.run_round, key=key, tier=llm.tier)
        await self._engine_thread.call(session.load)
        return session

    def _opened(self, tenant: str, key: SessionKey) -> _Open:
        """A session's entry, new or old; where there are too many, the oldest idle ones go."""
        entries = self._open[tenant]
        opened = entries.setdefault(key, _Open())
        entries.move_to_end(key)
        if (num_beyond := len(entries) - _MAX_SESSIONS) > 0:
            idle = [other for other in list(entries)[:-1] if not entries[other].lock.locked()]
            for other in idle[:num_beyond]:
                del entries[other]
        return opened


def _admit(session: Session, body: RoundRequest) -> None:
    """Let new agents join, and those that are not named leave; on a RoundError nothing changes."""
    present = {agent.name for agent in session.agents}
    named = {agent.agent for agent in body.agents}
    new = [agent for agent in body.agents if agent.agent not in present]
    for agent in new:
        if agent.system is None:
            raise RoundError(
                f"{agent.agent!r} is new in the session. Say who it is: give it a system text."
            )
    for name in present - named:
        session.leave(name)
    for agent in new:
        session.join(Agent(agent.agent, agent.system or ""))
