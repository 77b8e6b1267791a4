"""The arrival window: requests that come together make a round.

Clients rarely say which round a request belongs to, but they send the requests of a round within
milliseconds. So a request waits in a window until nothing has arrived for a short gap, but never
longer than a share of the time that a single request takes, which is measured. A request that
arrives later begins a round of its own, and still reuses what the earlier round has computed.
"""

from collections.abc import Iterator
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
class ArrivalWindow(Generic[Item]):
    """Collects what arrives into a round without a name. Times are the caller's.

    Attributes:
        gap_s: seconds without an arrival after which the round begins.
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

    def add(self, item: Item, now: float) -> None:
        """Add an arrival."""
        if not self._items:
            self._first_s = now
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
        longest_s = min(_LONGEST_S, self.share * self.lone_s)
        if self.num_expected > 0:
            return self._first_s + longest_s
        return min(self._last_s + min(self.gap_s, longest_s), self._first_s + longest_s)

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
