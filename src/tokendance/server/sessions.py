"""Named sessions that are open, of each tenant. All of it happens in the event loop.

There are two kinds. In /v1/rounds the server keeps the conversation of a session's agents from call
to call:

    {"model": "...", "session": "town", "agents": [
        {"agent": "ann", "system": "You are Ann.", "task": "What worries you?"},
        {"agent": "bob", "system": "You are Bob.", "task": "What worries you?"}]}

The next call with the same session gives new tasks, and each agent reads what all said in the last
round. An agent that a call does not name leaves; a new one needs a `system` text, and joins. With a
store, a round is on disk when its answer has been sent without a `warning`, and the session can be
continued after a restart.

If a chat request names a session, the client keeps the messages, and the server their KV
(`kept_chats.py`). The store is read and written between the engine's passes (`loading.py`).
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
from tokendance.server.protocol import RoundRequest
from tokendance.session import Session

log = logging.getLogger("tokendance.server")

# Open sessions of a tenant, of both kinds; the least recently used are dropped from memory.
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
        # By tenant and key; the least recently used first.
        self._open: defaultdict[str, OrderedDict[SessionKey, _Open]] = defaultdict(OrderedDict)

    def chat(self, tenant: str, key: SessionKey, salt: Salt) -> KeptChat | None:
        """Open a session of chat requests; None if there is no store to keep it in."""
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
        """Lock a tenant's session for a round, with exactly the agents that the request names.

        Raises:
            RoundError: for a new agent without a system text.
            StoreError: if the session is stored and cannot be read.
            ApiError: 409 while another round of it is under way.
        """
        assert body.session is not None
        # What was read with one salt is another session than what is read with another.
        owner = f"{tenant}/{encoder.salt.hex()}" if body.cache_salt else tenant
        key = SessionKey(owner, body.session)
        opened = self._opened(tenant, key)
        if opened.lock.locked():
            message = f"A round of the session {body.session!r} is under way. Wait for its end."
            raise ApiError(409, message, code="round_under_way")
        async with opened.lock:
            try:
                if opened.session is None:
                    opened.session = await self._load(key, encoder)
                # A round that fails, or whose client disconnects, changes nothing.
                with opened.session.provisional():
                    _admit(opened.session, body)
                    opened.session.configure(share_reasoning=bool(body.share_reasoning))
                    if body.ttl_s is not None:
                        opened.session.ttl_s = body.ttl_s
                    yield opened.session
            finally:
                # A session without a round need not be remembered.
                if opened.session is None or opened.session.round == 0:
                    del self._open[tenant][key]

    async def save(self, session: Session) -> TokenDanceError | ApiError | None:
        """Save a session to disk; return the error if that fails, and it stays in memory only."""
        try:
            return await self._engine_thread.save(session)
        except ApiError as error:
            log.warning("A session is not on disk: %s", error)
            return error

    async def _load(self, key: SessionKey, encoder: PromptEncoder) -> Session:
        """Load a session from disk, or make a new one."""
        llm = self._llm
        conversation = Conversation(encoder, llm.model.shape.max_context)
        session = Session(conversation, llm.run_round, key=key, tier=llm.tier)
        await asyncio.to_thread(session.load)  # it waits for the disk
        return session

    def _opened(self, tenant: str, key: SessionKey) -> _Open:
        """The entry of a session, new or old; drop the least recently used beyond the limit."""
        entries = self._open[tenant]
        opened = entries.setdefault(key, _Open())
        entries.move_to_end(key)
        if (num_beyond := len(entries) - _MAX_SESSIONS) > 0:
            idle = [other for other in list(entries)[:-1] if not entries[other].lock.locked()]
            for other in idle[:num_beyond]:
                del entries[other]
        return opened


def _admit(session: Session, body: RoundRequest) -> None:
    """Let agents join and leave as the request names them; a RoundError changes nothing."""
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
        private = agent.private or body.private
        session.join(Agent(agent.agent, agent.system or "", private))
