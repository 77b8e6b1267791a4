"""The window: requests that arrive within moments of each other make a round.

No client says which round a request belongs to; those of a round come within milliseconds when
they are gathered. So a request waits until nothing has come for a gap, and never longer than a
share of what a lone request takes here, which is measured as they end. Whoever comes later begins
a round of its own, joins the decoding batch, and still finds what the earlier one has computed.
"""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")

# A lone request's seconds before any was measured, and how fast the estimate follows.
_FIRST_GUESS_S = 0.5
_SMOOTHING = 0.2
_LONGEST_S = 0.1


@dataclass(slots=True)
class ArrivalWindow(Generic[Item]):
    """Holds what has arrived until it is time to begin. The clock is the caller's.

    Attributes:
        gap_s: seconds without an arrival after which a round begins.
        share: of a lone request's seconds; the longest that anything waits.
        lone_s: estimate of a lone request's seconds.
        num_expected: requests that have arrived and are still being read.
    """

    gap_s: float
    share: float
    lone_s: float = _FIRST_GUESS_S
    num_expected: int = 0
    _items: list[Item] = field(default_factory=list)
    _first_s: float = 0.0
    _last_s: float = 0.0

    @property
    def longest_s(self) -> float:
        """The longest that anything waits."""
        return min(_LONGEST_S, self.share * self.lone_s)

    def add(self, item: Item, now: float) -> None:
        """Take an arrival."""
        if not self._items:
            self._first_s = now
        self._last_s = now
        self._items.append(item)

    def remove(self, item: Item) -> bool:
        """Take one back; say whether it was still here."""
        if item not in self._items:
            return False
        self._items.remove(item)
        return True

    def due_s(self) -> float | None:
        """When the round begins if nothing else arrives; None while nothing waits."""
        if not self._items:
            return None
        latest = self._first_s + self.longest_s
        if self.num_expected > 0:
            return latest
        return min(self._last_s + min(self.gap_s, self.longest_s), latest)

    def take(self, now: float) -> list[Item]:
        """Hand over what begins now; nothing if it is too early."""
        due = self.due_s()
        if due is None or now < due:
            return []
        items, self._items = self._items, []
        return items

    def take_all(self) -> list[Item]:
        """Hand over everything, due or not."""
        items, self._items = self._items, []
        return items

    def note_lone(self, seconds: float) -> None:
        """Learn from a request that ran alone."""
        self.lone_s += _SMOOTHING * (seconds - self.lone_s)
