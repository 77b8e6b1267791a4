"""Sessions of chat requests, whose KV is kept on disk.

The client keeps the messages. The server saves their KV when a round of the session has ended, and
loads it when a later round begins and it is not in memory any more.
"""

from tokendance.disk.records import SessionKey
from tokendance.engine.request import Request
from tokendance.rounds.segments import EncodedPrompt, Salt
from tokendance.tier.caches import SessionSnapshot, SpokenCache
from tokendance.tier.loader import Restored
from tokendance.tier.steps import Steps
from tokendance.tier.tier import DiskTier

_MAX_AGENTS = 512


class KeptChat:
    """A session of chat requests. Its methods are called on the engine's thread.

    Attributes:
        key: under which it is stored.
    """

    def __init__(self, key: SessionKey, salt: Salt, tier: DiskTier) -> None:
        self.key = key
        self._salt = salt
        self._tier = tier
        # By agent, least recent first: its last prompt, and that with the answer to it.
        self._spoken: dict[str, tuple[EncodedPrompt, SpokenCache]] = {}

    def restoring(self) -> Steps[Restored | None]:
        """Load KV that is not in memory; None if nothing is stored."""
        stored = yield from self._tier.job(lambda: self._tier.disk.session(self.key))
        if stored is None:
            return None
        return (yield from self._tier.restoring(stored, self._salt))

    def note(self, request: Request) -> None:
        """Remember prompt and answer of a request that has no error."""
        self._spoken.pop(request.agent, None)
        cache = SpokenCache.of(request.prompt.token_ids, request.generated)
        self._spoken[request.agent] = (request.prompt, cache)
        if len(self._spoken) > _MAX_AGENTS:
            del self._spoken[next(iter(self._spoken))]

    def go_on_writing(self) -> bool:
        """See `DiskTier.go_on_writing`."""
        return self._tier.go_on_writing(self.key)

    def saving(self) -> Steps[None]:
        """Save it to disk, with agents stored earlier that have not spoken since the server began.

        Raises:
            StoreError: if the disk cannot be written; what was stored before still is.
        """
        stored = yield from self._tier.job(lambda: self._tier.disk.session(self.key))
        shared = {
            segment.hash: segment.token_ids
            for prompt, _ in self._spoken.values()
            for _, segment in prompt.shared_segments()
        }
        caches = {
            agent: SpokenCache(record.token_ids, record.num_prompt)
            for agent, record in (stored.caches.items() if stored is not None else ())
            if agent not in self._spoken
        }
        caches |= {agent: cache for agent, (_, cache) in self._spoken.items()}
        snapshot = SessionSnapshot(
            self.key,
            round=1 + (stored.round if stored is not None else 0),
            state=b"",
            caches=dict(list(caches.items())[-_MAX_AGENTS:]),
            shared_segments=list(shared.values()),
            salt=self._salt,
        )
        yield from self._tier.saving(snapshot, stored)
