"""The order in which entries give way: by how long they were not used, and what they cost.

What is on disk, too, comes back for less than what has to be computed again. So there are two
queues, each with the least recently used first, and of the two first entries the one that has
waited longer, weighed by its cost, gives way:

    to be computed again   waited / 1
    on disk                waited / cost      0 < cost <= 1: reading it, as a share of computing it
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterator

from tokendance.store.entries import Entry

_LEAST_COST = 0.01

# Entries with the time of their last use, the longest unused first. There is no object for each:
# garbage collection looks at all objects, and stops whoever computes meanwhile.
_Queue = OrderedDict[Entry, int]


class EvictionOrder:
    """All entries of a store, in the order in which they give way. Each change takes O(1).

    Attributes:
        disk_cost: what it costs to read an entry, as a share of computing it; whoever writes to
            disk measures it.
    """

    def __init__(self) -> None:
        self._computed: _Queue = OrderedDict()
        self._on_disk: _Queue = OrderedDict()
        self._now = 0
        self.disk_cost = 1.0

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._computed or entry in self._on_disk

    def __iter__(self) -> Iterator[Entry]:
        return itertools.chain(self._computed, self._on_disk)

    def begin_use(self) -> None:
        """Let time go on; what is added and used until the next call is used at once."""
        self._now += 1

    def add(self, entry: Entry) -> None:
        """Take a new entry, used now."""
        self._computed[entry] = self._now

    def use(self, entry: Entry) -> None:
        """Note that an entry is used now."""
        queue = self._computed if entry in self._computed else self._on_disk
        assert entry in queue, "an entry is used that is not there"
        queue[entry] = self._now
        queue.move_to_end(entry)

    def mark_on_disk(self, entry: Entry) -> None:
        """Note that an entry could be read again."""
        used = self._computed.pop(entry, None)
        if used is not None:
            # A session is marked just after it was used, so the queue stays sorted.
            self._on_disk[entry] = used

    def discard(self, entry: Entry) -> None:
        """Forget an entry; nothing happens if it is not there."""
        self._computed.pop(entry, None)
        self._on_disk.pop(entry, None)

    def in_turn(self) -> Iterator[Entry]:
        """All entries, the one that gives way first before all others. Any change ends the walk."""
        cost = min(1.0, max(_LEAST_COST, self.disk_cost))
        queues = iter(self._on_disk.items()), iter(self._computed.items())
        on_disk, computed = (next(queue, None) for queue in queues)
        while on_disk is not None or computed is not None:
            if computed is None or (
                on_disk is not None and (self._now - on_disk[1]) / cost >= self._now - computed[1]
            ):
                assert on_disk is not None
                yield on_disk[0]
                on_disk = next(queues[0], None)
            else:
                yield computed[0]
                computed = next(queues[1], None)
