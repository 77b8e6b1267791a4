"""Sessions by name: which of them are open, of each tenant. All of it happens in the event loop.

There are two kinds. In /v1/rounds the server keeps what the agents of a session have said, from
call to call:

    {"model": "...", "session": "town", "agents": [
        {"agent": "ann", "system": "You are Ann.", "task": "What worries you?"},
        {"agent": "bob", "system": "You are Bob.", "task": "What worries you?"}]}

The next call with the same session gives new tasks, and everybody has heard what all said before.
Who is not named in a call has left; who is new says who it is (`system`) and joins. With a store, a
round is on disk when it is answered, if there is no `warning`, and a session goes on after a
restart.

Of a chat request whose round names a session the client keeps what was said, and the server its KV
(`kept_chats.py`).

What reads and writes the store (`Session.load`, `restoring` and `save`, and those of `KeptChat`)
happens on the engine's thread: see `loading.py`.
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
    """A session that is open: of rounds or of chats.

    Attributes:
        lock: held by the one round that a session of rounds can have at a time.
        session: once it is loaded.
        chat: once it is asked for.
    """

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    session: Session | None = None
    chat: KeptChat | None = None


class Sessions:
    """All open sessions of a server, by tenant and key."""

    def __init__(self, llm: LLM, worker: EngineThread) -> None:
        """Begin with those on disk."""
        self._llm = llm
        self._worker = worker
        # Asked for longest ago first.
        self._open: defaultdict[str, OrderedDict[SessionKey, _Open]] = defaultdict(OrderedDict)

    def chat(self, tenant: str, key: SessionKey, salt: Salt) -> KeptChat | None:
        """A session of chats; None without a store, where there is nothing to keep.

        Args:
            tenant: whose it is.
            key: of the session.
            salt: of its prompts.
        """
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
        """Hold a session for a round, with exactly the agents that the request names.

        Args:
            body: the request.
            tenant: whose it is.
            encoder: of the tenant's prompts.

        Raises:
            ApiError: 409 while another round of it is under way.
        """
        assert body.session is not None
        key = SessionKey(tenant, body.session)
        opened = self._opened(tenant, key)
        if opened.lock.locked():
            raise ApiError(
                409,
                f"A round of the session {body.session!r} is under way. Wait for its end.",
                code="round_under_way",
            )
        async with opened.lock:
            try:
                if opened.session is None:
                    opened.session = await self._load(key, encoder)
                # Who came and who left for a round that was refused, or that nobody waited for to
                # its end, has neither come nor left.
                with opened.session.provisional():
                    _admit(opened.session, body)
                    if body.ttl_s is not None:
                        opened.session.ttl_s = body.ttl_s
                    yield opened.session
            finally:
                # What has not begun need not be remembered.
                if opened.session is None or opened.session.round == 0:
                    del self._open[tenant][key]

    async def save(self, session: Session) -> TokenDanceError | ApiError | None:
        """Bring a session to disk; return what was wrong, if it goes on in memory only."""
        try:
            return await self._worker.call(lambda: try_to_save(session))
        except ApiError as error:
            log.warning("A session is not on disk: %s", error)
            return error

    async def _load(self, key: SessionKey, encoder: PromptEncoder) -> Session:
        """A session as it is on disk, or a new one."""
        conversation = Conversation(encoder, self._llm.model.shape.max_context)
        session = Session(conversation, self._llm.run_round, key=key, tier=self._llm.tier)
        await self._worker.call(session.load)
        return session

    def _opened(self, tenant: str, key: SessionKey) -> _Open:
        """The entry of a session, now the last to be forgotten; the first ones are, if need be."""
        entries = self._open[tenant]
        opened = entries.setdefault(key, _Open())
        entries.move_to_end(key)
        num_beyond = len(entries) - _MAX_SESSIONS
        if num_beyond > 0:
            idle = [other for other in list(entries)[:-1] if not entries[other].lock.locked()]
            for other in idle[:num_beyond]:
                del entries[other]
        return opened


def _admit(session: Session, body: RoundRequest) -> None:
    """Let who is new join, and who is not named leave.

    Raises:
        RoundError: for a new agent that does not say who it is; nothing has changed then.
    """
    here = {agent.name for agent in session.agents}
    named = {agent.agent for agent in body.agents}
    new = [agent for agent in body.agents if agent.agent not in here]
    for agent in new:
        if agent.system is None:
            raise RoundError(
                f"{agent.agent!r} is new in the session. Say who it is: give it a system text."
            )
    for name in here - named:
        session.leave(name)
    for agent in new:
        session.join(Agent(agent.agent, agent.system or ""))
