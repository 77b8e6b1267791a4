"""Sessions by name: the server keeps what the agents of a round have said, from call to call.

    {"model": "...", "session": "town", "agents": [
        {"agent": "ann", "system": "You are Ann.", "task": "What worries you?"},
        {"agent": "bob", "system": "You are Bob.", "task": "What worries you?"}]}

The next call with the same session gives new tasks, and everybody has heard what all said before.
Who is not named in a call has left; who is new says who it is (`system`) and joins. With a store, a
round is on disk when it is answered, if there is no `warning`, and a session goes on after a
restart.
"""

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tokendance.conversation import Agent, Conversation
from tokendance.errors import RoundError
from tokendance.server.errors import ApiError
from tokendance.server.protocol import RoundRequest
from tokendance.server.state import Server
from tokendance.session import Session
from tokendance.store.records import SessionKey

# Sessions of a tenant that are kept in memory; of the others only those are known that are on disk.
_MAX_SESSIONS = 1024


@dataclass(slots=True)
class _Place:
    """Where a session is, with a lock for the one round that it can have at a time."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    session: Session | None = None


class Sessions:
    """All sessions of a server, by tenant and name. Used in the event loop."""

    def __init__(self, server: Server) -> None:
        """Begin with those on disk."""
        self._server = server
        # By tenant and name; asked for longest ago first.
        self._places: defaultdict[str, OrderedDict[str, _Place]] = defaultdict(OrderedDict)

    @asynccontextmanager
    async def round_of(self, body: RoundRequest, tenant: str) -> AsyncIterator[Session]:
        """Hold a session for a round, with exactly the agents that the request names.

        Raises:
            ApiError: 409 while another round of it is under way.
        """
        assert body.session is not None
        places = self._places[tenant]
        place = places.setdefault(body.session, _Place())
        places.move_to_end(body.session)
        if place.lock.locked():
            raise ApiError(
                409,
                f"A round of the session {body.session!r} is under way. Wait for its end.",
                code="round_under_way",
            )
        async with place.lock:
            self._forget_oldest(places)
            try:
                if place.session is None:
                    place.session = await self._load(body.session, tenant)
                # Who came and who left for a round that was refused, or that nobody waited for to
                # its end, has neither come nor left.
                with place.session.provisional():
                    _admit(place.session, body)
                    if body.ttl_s is not None:
                        place.session.ttl_s = body.ttl_s
                    yield place.session
            finally:
                # What has not begun need not be remembered.
                if place.session is None or place.session.round == 0:
                    del places[body.session]

    async def _load(self, name: str, tenant: str) -> Session:
        """A session as it is on disk, or a new one."""
        llm, encoder = self._server.llm, self._server.encoder(tenant)
        session = Session(
            Conversation(encoder, llm.model.shape.max_context),
            llm.run_round,
            key=SessionKey(tenant, name),
            tier=llm.tiers,
        )
        await self._server.worker.call(session.load)
        return session

    @staticmethod
    def _forget_oldest(places: OrderedDict[str, _Place]) -> None:
        for name in list(places):
            if len(places) <= _MAX_SESSIONS:
                return
            if not places[name].lock.locked():
                del places[name]


def _admit(session: Session, body: RoundRequest) -> None:
    """Let who is new join, and who is not named leave.

    Raises:
        RoundError: for a new agent that does not say who it is; nothing has changed then.
    """
    here = {agent.name for agent in session.agents}
    named = {one.agent for one in body.agents}
    new = [one for one in body.agents if one.agent not in here]
    for one in new:
        if one.system is None:
            raise RoundError(
                f"{one.agent!r} is new in the session. Say who it is: give it a system text."
            )
    for name in here - named:
        session.leave(name)
    for one in new:
        session.join(Agent(one.agent, one.system or ""))
