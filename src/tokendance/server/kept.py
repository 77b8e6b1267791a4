"""KV that clients ask to keep: chat requests whose round names a session.

The client keeps what was said; the server keeps the KV of it on disk, when a round of the session
has ended, and reads it again when a later round comes and memory has lost it.
"""

import logging
from collections import OrderedDict, defaultdict

from tokendance.disk.records import SessionKey
from tokendance.engine.request import Request
from tokendance.errors import TokenDanceError
from tokendance.rounds.segments import EncodedPrompt, Salt
from tokendance.tier.caches import SessionSnapshot, SpokenCache
from tokendance.tier.loader import Restoring
from tokendance.tier.tier import DiskTier

log = logging.getLogger("tokendance.server")

# Of each tenant.
_MAX_SESSIONS = 1024
_MAX_AGENTS = 512


# By agent: the last prompt with its answer.
_Said = dict[str, tuple[EncodedPrompt, SpokenCache]]


class KeptSessions:
    """Sessions of chat requests. All methods are called on the engine's thread."""

    def __init__(self, tiers: DiskTier | None) -> None:
        """Keep them in a store; without one nothing is kept."""
        self._tiers = tiers
        self._said: defaultdict[str, OrderedDict[SessionKey, _Said]] = defaultdict(OrderedDict)

    def restoring(self, key: SessionKey, salt: Salt) -> Restoring | None:
        """Read what memory lacks of a session, in steps; None where nothing is stored."""
        if self._tiers is None:
            return None
        stored = self._tiers.disk.session(key)
        return self._tiers.restoring(stored, salt) if stored is not None else None

    def note(self, key: SessionKey, request: Request) -> None:
        """Take what an agent has read and said, in a request without an error."""
        if self._tiers is None:
            return
        cache = SpokenCache.of(request.prompt.token_ids, request.generated)
        sessions = self._said[key.tenant]
        said = sessions.setdefault(key, {})
        said.pop(request.agent, None)  # whoever spoke last stands last
        said[request.agent] = request.prompt, cache
        if len(said) > _MAX_AGENTS:
            del said[next(iter(said))]
        sessions.move_to_end(key)
        if len(sessions) > _MAX_SESSIONS:
            sessions.popitem(last=False)

    def save(self, key: SessionKey) -> None:
        """Write a session, after a round of it."""
        said = self._said[key.tenant].get(key)
        if self._tiers is None or said is None:
            return
        shared_segments = {
            segment.hash: segment.token_ids
            for prompt, _ in said.values()
            for _, segment in prompt.shared_segments()
        }
        try:
            stored = self._tiers.disk.session(key)
            # Who has not spoken since the server began is kept, too; who spoke last stands last.
            before = [
                (agent, SpokenCache(one.token_ids, one.num_prompt))
                for agent, one in (stored.caches.items() if stored is not None else ())
                if agent not in said
            ]
            caches = dict(before[max(0, len(said) + len(before) - _MAX_AGENTS) :])
            snapshot = SessionSnapshot(
                key,
                round=1 + (stored.round if stored is not None else 0),
                state=b"",
                caches=caches | {agent: cache for agent, (_, cache) in said.items()},
                shared_segments=shared_segments.values(),
                salt=next(iter(said.values()))[0].salt,
            )
            self._tiers.save(snapshot, stored)
        except TokenDanceError as error:
            log.warning("A session is not on disk; it goes on in memory: %s", error)
        except Exception:  # whoever has asked is answered all the same
            log.exception("a session could not be stored")
