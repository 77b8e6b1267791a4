"""Rounds of which somebody waits or runs, and the requests that were added for them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokendance.engine.request import Request
from tokendance.store.entries import RoundId


@dataclass(slots=True)
class OpenRound:
    """A round of which somebody waits or runs.

    Attributes:
        added_s: when the first of its requests was added.
        requests: all that were added, those that are done included.
        num_left: that are not done.
        silent: requests that were added for them.
        has_started: whether any of them was admitted.
    """

    added_s: float
    requests: list[Request] = field(default_factory=list)
    num_left: int = 0
    silent: list[Request] = field(default_factory=list)
    has_started: bool = False


class OpenRounds:
    """All of an engine."""

    def __init__(self) -> None:
        """Begin without any."""
        self._by_id: dict[RoundId, OpenRound] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, request: Request, now: float) -> None:
        """Add a request, which begins a round or joins one."""
        joined = self._by_id.setdefault(request.round_id, OpenRound(now))
        joined.requests.append(request)
        joined.num_left += 1

    def add_silent(self, request: Request) -> None:
        """Add a request without an answer to a round; it ends with the others, if not before."""
        self._by_id[request.round_id].silent.append(request)

    def start(self, round_id: RoundId) -> OpenRound | None:
        """Note that a request of a round was admitted; return the round if it is the first."""
        started = self._by_id[round_id]
        if started.has_started:
            return None
        started.has_started = True
        return started

    def finish(self, request: Request) -> Sequence[Request]:
        """Note that a request is done; return silent ones that nobody needs any more."""
        if request.silent:
            return ()
        ended = self._by_id[request.round_id]
        ended.num_left -= 1
        if ended.num_left > 0:
            return ()
        del self._by_id[request.round_id]
        return [silent for silent in ended.silent if silent.finish_reason is None]

    def requests(self) -> list[Request]:
        """All of their requests, those that are done included."""
        return [request for one in self._by_id.values() for request in one.requests]
