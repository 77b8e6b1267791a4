"""Members whose round has not begun: in a window of their session, or in a round with a name."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

from tokendance.rounds.arrival_window import (
    ArrivalPace,
    ArrivalPaces,
    ArrivalWindow,
    named_round_due_s,
)
from tokendance.rounds.segments import Salt


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
    """Collects what arrives into a round with a name, as `ArrivalWindow` does without one."""

    wait_s: float
    _items: list[Item] = field(default_factory=list)
    _first_s: float = 0.0
    _last_s: float = 0.0

    def add(self, item: Item, now: float, pace: ArrivalPace) -> None:
        del pace  # who waits for a round by its name learns nothing
        if not self._items:
            self._first_s = now
        self._last_s = now
        self._items.append(item)

    def remove(self, item: Item) -> None:
        self._items.remove(item)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def take(self, now: float) -> list[Item]:
        sizes = [item.round_size for item in self._items if item.round_size is not None]
        is_full = bool(sizes) and len(self._items) >= sizes[-1]
        due_s = named_round_due_s(self._first_s, self._last_s, self.wait_s, is_full=is_full)
        return self._items if now >= due_s else []


class Arrivals(Generic[Item]):
    """Members that wait for others of their round; times are the caller's."""

    def __init__(self, window_s: float, window_share: float, round_wait_s: float) -> None:
        """See `Rounds`."""
        self._window_s = window_s
        self._window_share = window_share
        self._round_wait_s = round_wait_s
        self._paces = ArrivalPaces()
        self._open: dict[RoundKey, ArrivalWindow[Item] | _NamedRound[Item]] = {}  # none is empty

    def __len__(self) -> int:
        return sum(map(len, self._open.values()))

    def add(self, item: Item, now: float) -> None:
        """Let a member wait for others of its round."""
        key = item.key
        if key not in self._open:
            self._open[key] = (
                ArrivalWindow(self._window_s, self._window_share)
                if key.name is None
                else _NamedRound(self._round_wait_s)
            )
        client = key.salt, key.session
        is_named = key.name is not None
        pace = self._paces.of(client) if is_named else self._paces.begin(item.request_id, client)
        self._open[key].add(item, now, pace)

    def note_done(self, request_id: str) -> None:
        """Note that a member has its answer, or is gone."""
        self._paces.end(request_id)

    def remove(self, request_id: str) -> Item | None:
        """Take out the member of that id; None if there is none."""
        for key, waiting in self._open.items():
            for item in waiting:
                if item.request_id == request_id:
                    waiting.remove(item)
                    if len(waiting) == 0:
                        del self._open[key]
                    return item
        return None

    def take(self, now: float) -> Iterator[list[Item]]:
        """Take out the rounds that begin now, those without a name first."""
        for key, waiting in sorted(self._open.items(), key=lambda one: one[0].name is not None):
            if items := waiting.take(now):
                del self._open[key]
                yield items
