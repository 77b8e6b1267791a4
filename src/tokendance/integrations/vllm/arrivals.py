"""Members whose round has not begun: in a window of their session, or in a round with a name."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

from tokendance.rounds.arrival_window import ArrivalWindow
from tokendance.rounds.segments import Salt

# While requests of a named round keep arriving, it waits for at most so many times its wait.
_MAX_WAITS = 10


class RoundKey(NamedTuple):
    """Requests with the same one may be in one round.

    Attributes:
        salt: of their tenant, model and adapter.
        session: their session's name, if they have one.
        name: their round's, if they have one.
    """

    salt: Salt
    session: str | None = None
    name: str | None = None


class Arriving(Protocol):
    """What is known of a member when it arrives."""

    request_id: str
    key: RoundKey
    round_size: int | None


Item = TypeVar("Item", bound=Arriving)


@dataclass(slots=True)
class _NamedRound(Generic[Item]):
    items: list[Item] = field(default_factory=list)
    first_s: float = 0.0
    last_s: float = 0.0

    def due_s(self, wait_s: float) -> float:
        sizes = [item.round_size for item in self.items if item.round_size is not None]
        if sizes and len(self.items) >= sizes[-1]:
            return self.last_s
        return min(self.last_s + wait_s, self.first_s + _MAX_WAITS * wait_s)


class Arrivals(Generic[Item]):
    """Members that wait for others of their round; times are the caller's."""

    def __init__(self, window_s: float, window_share: float, round_wait_s: float) -> None:
        """See `Rounds`."""
        self._window_s = window_s
        self._window_share = window_share
        self._round_wait_s = round_wait_s
        self._windows: dict[RoundKey, ArrivalWindow[Item]] = {}
        self._named: dict[RoundKey, _NamedRound[Item]] = {}

    def __len__(self) -> int:
        waiting = sum(len(named.items) for named in self._named.values())
        return waiting + sum(map(len, self._windows.values()))

    def add(self, item: Item, now: float) -> None:
        """Let a member wait for others of its round."""
        key = item.key
        if key.name is None:
            if key not in self._windows:
                self._windows[key] = ArrivalWindow(self._window_s, self._window_share)
            self._windows[key].add(item, now)
            return
        named = self._named.setdefault(key, _NamedRound(first_s=now))
        named.items.append(item)
        named.last_s = now

    def remove(self, request_id: str) -> Item | None:
        """Take out the member of that id; None if there is none."""
        for key, window in self._windows.items():
            for item in window:
                if item.request_id == request_id:
                    window.remove(item)
                    if window.due_s() is None:
                        del self._windows[key]
                    return item
        for key, named in self._named.items():
            for item in named.items:
                if item.request_id == request_id:
                    named.items.remove(item)
                    if not named.items:
                        del self._named[key]
                    return item
        return None

    def take(self, now: float) -> Iterator[list[Item]]:
        """Take out the rounds that begin now."""
        for key, window in list(self._windows.items()):
            if items := window.take(now):
                del self._windows[key]
                yield items
        for key, named in list(self._named.items()):
            if now >= named.due_s(self._round_wait_s):
                del self._named[key]
                yield named.items
