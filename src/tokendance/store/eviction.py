"""The order in which entries give way: by how long they were not used, and what they cost.

What is on disk, too, comes back for less than what has to be computed again. So there are two
queues, each with the least recently used first, and the one whose first entry has waited longer,
weighed by its cost, gives way:

    to be computed again   waited / 1
    on disk                waited / cost      0 < cost <= 1: reading it, as a share of computing it
"""

from collections import OrderedDict
from collections.abc import Iterator

from tokendance.store.entries import Entry

_LEAST_COST = 0.01


class EvictionOrder:
    """All entries of a store, in the order in which they give way.

    Attributes:
        disk_cost: what it costs to read an entry, as a share of computing it; whoever writes to
            disk measures it.
    """

    def __init__(self) -> None:
        """Begin without entries."""
        self._computed: OrderedDict[Entry, int] = OrderedDict()  # when it was used last
        self._on_disk: OrderedDict[Entry, int] = OrderedDict()
        self._now = 0
        self.disk_cost = 1.0

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._computed or entry in self._on_disk

    def __iter__(self) -> Iterator[Entry]:
        yield from self._on_disk
        yield from self._computed

    def begin_use(self) -> None:
        """Let time go on; what is added and used until the next call is used at once."""
        self._now += 1

    def add(self, entry: Entry) -> None:
        """Take a new entry, used now."""
        self._computed[entry] = self._now

    def use(self, entry: Entry) -> None:
        """Note that an entry is used now."""
        queue = self._on_disk if entry in self._on_disk else self._computed
        queue[entry] = self._now
        queue.move_to_end(entry)

    def mark_on_disk(self, entry: Entry) -> None:
        """Note that an entry could be read again."""
        used = self._computed.pop(entry, None)
        if used is not None:
            # A session is marked just after it was used, so the queue stays sorted.
            self._on_disk[entry] = used

    def discard(self, entry: Entry) -> None:
        """Forget an entry."""
        self._computed.pop(entry, None)
        self._on_disk.pop(entry, None)

    def in_turn(self) -> Iterator[Entry]:
        """All entries of now, the one that gives way first before all others."""
        cost = min(1.0, max(_LEAST_COST, self.disk_cost))
        on_disk, computed = list(self._on_disk.items()), list(self._computed.items())
        i = j = 0
        while i < len(on_disk) or j < len(computed):
            waited_disk = (self._now - on_disk[i][1]) / cost if i < len(on_disk) else -1.0
            waited = self._now - computed[j][1] if j < len(computed) else -1.0
            if waited_disk >= waited:
                yield on_disk[i][0]
                i += 1
            else:
                yield computed[j][0]
                j += 1
