"""The order in which entries give way: by how long they were not used, and what they cost.

What is on disk, too, comes back for less than what has to be computed again. So there are two
queues, each with the least recently used first, and of the two first entries the one that has
waited longer, weighed by its cost, gives way:

    to be computed again   waited / 1
    on disk                waited / cost      0 < cost <= 1: reading it, as a share of computing it
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tokendance.store.entries import Entry

_LEAST_COST = 0.01


@dataclass(slots=True, eq=False, repr=False)
class _Node:
    """An entry in a queue, and its neighbours there, which were used before and after it."""

    entry: Entry
    queue: "_Queue"
    used: int
    before: "_Node | None" = None
    after: "_Node | None" = None


@dataclass(slots=True, eq=False)
class _Queue:
    """Nodes that know their neighbours, so that any of them can be taken out in O(1)."""

    first: _Node | None = None
    last: _Node | None = None

    def append(self, node: _Node) -> None:
        """Put a node at the end."""
        node.queue, node.before, node.after = self, self.last, None
        if self.last is None:
            self.first = node
        else:
            self.last.after = node
        self.last = node

    def remove(self, node: _Node) -> None:
        """Take a node out. It still knows its neighbours, for whoever is walking over it."""
        if node.before is None:
            self.first = node.after
        else:
            node.before.after = node.after
        if node.after is None:
            self.last = node.before
        else:
            node.after.before = node.before


class EvictionOrder:
    """All entries of a store, in the order in which they give way. Each change takes O(1).

    Attributes:
        disk_cost: what it costs to read an entry, as a share of computing it; whoever writes to
            disk measures it.
    """

    def __init__(self) -> None:
        self._nodes: dict[Entry, _Node] = {}
        self._computed = _Queue()
        self._on_disk = _Queue()
        self._now = 0
        self.disk_cost = 1.0

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._nodes

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._nodes)

    def begin_use(self) -> None:
        """Let time go on; what is added and used until the next call is used at once."""
        self._now += 1

    def add(self, entry: Entry) -> None:
        """Take a new entry, used now."""
        node = self._nodes[entry] = _Node(entry, self._computed, self._now)
        self._computed.append(node)

    def use(self, entry: Entry) -> None:
        """Note that an entry is used now."""
        node = self._nodes[entry]
        node.used = self._now
        node.queue.remove(node)
        node.queue.append(node)

    def mark_on_disk(self, entry: Entry) -> None:
        """Note that an entry could be read again."""
        node = self._nodes.get(entry)
        if node is not None and node.queue is self._computed:
            # A session is marked just after it was used, so the queue stays sorted.
            self._computed.remove(node)
            self._on_disk.append(node)

    def discard(self, entry: Entry) -> None:
        """Forget an entry; nothing happens if it is not there."""
        node = self._nodes.pop(entry, None)
        if node is not None:
            node.queue.remove(node)

    def in_turn(self) -> Iterator[Entry]:
        """All entries, the one that gives way first before all others.

        The entry that was yielded last may be discarded; after any other change begin anew.
        """
        cost = min(1.0, max(_LEAST_COST, self.disk_cost))
        on_disk, computed = self._on_disk.first, self._computed.first
        while on_disk is not None or computed is not None:
            if computed is None or (
                on_disk is not None
                and (self._now - on_disk.used) / cost >= self._now - computed.used
            ):
                assert on_disk is not None
                entry, on_disk = on_disk.entry, on_disk.after
            else:
                entry, computed = computed.entry, computed.after
            yield entry
