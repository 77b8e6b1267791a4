"""Which replica a round goes to: all of its requests to one, and rounds evenly over all.

A session's requests go to the replica that *rendezvous hashing* gives its name: of all replicas the
one whose hash together with the name is largest. Whoever decides decides alike, nobody has to tell
anybody, and a replica that comes or goes moves no other sessions than its own. Where that replica
has far more to do than others, the next one in this order takes the session; and there it stays
while it is in use, so that no round is split by the load that it makes itself.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tokendance.errors import ConfigError


def rank_replicas(name: str, replicas: Iterable[str]) -> list[str]:
    """Replicas in the order in which a session of this name prefers them."""

    def weight(replica: str) -> tuple[bytes, str]:
        # Lengths keep "a" + "bc" apart from "ab" + "c".
        text = f"{len(name)}:{name}{replica}".encode(errors="surrogatepass")
        return hashlib.blake2b(text, digest_size=16).digest(), replica

    return sorted(set(replicas), key=weight, reverse=True)


@dataclass(slots=True)
class Placement:
    """Places sessions on replicas; times are the caller's, in seconds.

    Attributes:
        overload: a replica is passed over by new sessions if it has more than so many times the
            mean load, and at least `min_load` requests.
        min_load: see `overload`.
        keep_s: a session stays where it is until nothing of it has come for so long.
        max_sessions: that are remembered; beyond, those used longest ago are placed anew.

    Raises:
        ConfigError: for a value that cannot be.
    """

    overload: float = 1.5
    min_load: int = 16
    keep_s: float = 600.0
    max_sessions: int = 100_000
    _places: OrderedDict[str, tuple[str, float]] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        if not self.overload >= 1:
            raise ConfigError("overload has to be 1 or more: it is a multiple of the mean load.")
        for name in ("min_load", "keep_s", "max_sessions"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} has to be 0 or more.")

    def choose(self, name: str, loads: Mapping[str, int], now: float) -> str:
        """Choose the replica of a session's next request, and remember it.

        Args:
            name: of the session, or of the round.
            loads: requests that each replica has; at least one replica.
            now: no earlier than in calls before.
        """
        self._forget(now)
        place = self._places.pop(name, None)
        replica = place[0] if place is not None and place[0] in loads else self._place(name, loads)
        self._places[name] = (replica, now)
        return replica

    def _place(self, name: str, loads: Mapping[str, int]) -> str:
        bound = max(self.min_load - 1, self.overload * sum(loads.values()) / len(loads))
        # Not all can be above the mean, so there is one.
        return next(one for one in rank_replicas(name, loads) if loads[one] <= bound)

    def _forget(self, now: float) -> None:
        """Drop sessions that nothing has come of for long, and the oldest of too many."""
        while self._places:
            name, (_, used) = next(iter(self._places.items()))
            if now - used < self.keep_s and len(self._places) <= self.max_sessions:
                return
            del self._places[name]
