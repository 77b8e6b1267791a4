"""The arrival window: requests that come together make a round.

Clients rarely say which round a request belongs to, but they send the requests of a round within
milliseconds. So a request waits in a window until nothing has arrived for a short gap, but never
longer than a share of the time that a single request takes, which is measured. A request that
arrives later begins a round of its own, and still reuses what the earlier round has computed.

Some clients take tens of milliseconds between the requests of a round. So the gap is learned for
each client, from those of its requests that come within the longest wait of each other, and while
another is open: whoever waits for an answer before asking again has no others to wait for.

    arrivals    |  |      |    |                              |    |  |
    gaps         ..  .....  ...   (longer than the longest     ....  ..
                                   wait: not of one round)
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")

# The first estimate of a single request's seconds, and the weight of each measurement.
_FIRST_GUESS_S = 0.5
_SMOOTHING = 0.2
# The longest wait in the window.
_LONGEST_S = 0.1
# While requests of a named round keep arriving, it waits for at most so many times its wait.
_MAX_WAITS = 10
# A client's gap grows at once and shrinks by this share of what a smaller one differs by; the wait
# is longer than the gap by the second factor.
_SHRINKING = 0.1
_ROOM = 1.5
# Clients whose gaps are remembered; the least recently seen are forgotten.
_MAX_CLIENTS = 1024


def named_round_due_s(first_s: float, last_s: float, wait_s: float, *, is_full: bool) -> float:
    """When a round with a name begins, if no other request of it arrives: at once if it is full.

    Args:
        first_s: when the first of its requests arrived.
        last_s: when the last of them arrived.
        wait_s: that it waits after each.
        is_full: whether all are there.
    """
    return last_s if is_full else min(last_s + wait_s, first_s + _MAX_WAITS * wait_s)


@dataclass(slots=True)
class ArrivalPace:
    """How far apart one client's requests of a round come; times are the caller's.

    Attributes:
        gap_s: seconds; 0 until it is known.
    """

    gap_s: float = 0.0
    _last_s: float = 0.0
    _num_open: int = 0  # requests that have come and are not done

    def note(self, now: float, longest_s: float) -> None:
        """Learn from an arrival; one later than `longest_s` after the last begins a round."""
        last_s, self._last_s = self._last_s, now
        num_open, self._num_open = self._num_open, self._num_open + 1
        if num_open > 0 and 0 < now - last_s <= longest_s:
            new_s = now - last_s
            self.gap_s = max(new_s, self.gap_s + _SHRINKING * (new_s - self.gap_s))

    def note_done(self) -> None:
        """Note that a request that came is answered, or gone."""
        self._num_open = max(0, self._num_open - 1)

    @property
    def wait_s(self) -> float:
        """Seconds after which no other request is to be expected."""
        return _ROOM * self.gap_s


class ArrivalPaces:
    """Paces of those clients that were seen last."""

    def __init__(self) -> None:
        self._paces: OrderedDict[Hashable, ArrivalPace] = OrderedDict()
        self._open: dict[Hashable, ArrivalPace] = {}  # of requests that are not done

    def begin(self, request: Hashable, client: Hashable) -> ArrivalPace:
        """The pace of a client, for a request that has come; `end` follows."""
        pace = self._open[request] = self.of(client)
        return pace

    def end(self, request: Hashable) -> None:
        """Note that a request is answered, or gone; nothing happens if it is not open."""
        if (pace := self._open.pop(request, None)) is not None:
            pace.note_done()

    def of(self, client: Hashable) -> ArrivalPace:
        """The pace of a client, new or old."""
        pace = self._paces.setdefault(client, ArrivalPace())
        self._paces.move_to_end(client)
        if len(self._paces) > _MAX_CLIENTS:
            self._paces.popitem(last=False)
        return pace


@dataclass(slots=True)
class ArrivalWindow(Generic[Item]):
    """Collects what arrives into a round without a name. Times are the caller's.

    Attributes:
        gap_s: seconds without an arrival after which the round begins, or more where clients were
            seen to take longer; with 0 it never waits.
        share: the longest wait, as a share of `lone_s`.
        lone_s: estimate of the seconds that a single request takes.
        num_expected: requests that are still being read.
    """

    gap_s: float
    share: float
    lone_s: float = _FIRST_GUESS_S
    num_expected: int = 0
    _items: list[Item] = field(default_factory=list)
    _first_s: float = 0.0
    _last_s: float = 0.0
    _pace_s: float = 0.0  # the longest wait of the clients of what is here

    @property
    def longest_s(self) -> float:
        """The longest wait in the window."""
        return min(_LONGEST_S, self.share * self.lone_s)

    def add(self, item: Item, now: float, pace: ArrivalPace | None = None) -> None:
        """Add an arrival of a client whose pace is learned, if it is given."""
        if not self._items:
            self._first_s, self._pace_s = now, 0.0
        if pace is not None:
            pace.note(now, self.longest_s)
            self._pace_s = max(self._pace_s, pace.wait_s)
        self._last_s = now
        self._items.append(item)

    def remove(self, item: Item) -> bool:
        """Remove an arrival; return whether it was still here."""
        if item not in self._items:
            return False
        self._items.remove(item)
        return True

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def due_s(self) -> float | None:
        """When the round begins if nothing else arrives; None if nothing waits."""
        if not self._items:
            return None
        end_s = self._first_s + self.longest_s
        if self.num_expected > 0:
            return end_s
        wait_s = max(self.gap_s, self._pace_s) if self.gap_s > 0 else 0.0
        return min(self._last_s + wait_s, end_s)

    def take(self, now: float) -> list[Item]:
        """Return the round that begins now; nothing if it is too early."""
        due_s = self.due_s()
        if due_s is None or now < due_s:
            return []
        items, self._items = self._items, []
        return items

    def note_lone(self, seconds: float) -> None:
        """Update `lone_s` with a request that ran alone."""
        self.lone_s += _SMOOTHING * (seconds - self.lone_s)
