"""Allocation: slots for a plan. What it reads is held, what it computes gets pages of its own."""

from dataclasses import dataclass, field

import numpy as np

from tokendance.collector.known import (
    NO_SLOT,
    KnownKV,
    LentSlots,
    lent_slots,
    look_up,
    note_reuse,
    publish,
)
from tokendance.collector.plan import Positions, RequestPlan
from tokendance.rounds.segments import EncodedPrompt
from tokendance.store.entries import Entry, RoundId, RunId, Slots, StoredSegment
from tokendance.store.kv_store import KVStore
from tokendance.store.pages import Holder, PageIds


@dataclass(slots=True, eq=False)
class Allocation:
    """Where the KV of a request lies. The request holds the pages until it is released.

    Attributes:
        slots: int32, of each position of prompt and answer.
        compute: prompt positions that take part in its forward passes, ascending.
        pages: distinct pages of what it reads, runs as a whole, and of what it computes.
        copied_from: int32, for each position the slot whose KV is copied to its own; NO_SLOT for
            none. Empty where nothing is copied.
        lent: what co-owners' tokens of its run read.
        entries: that it has published, and has yet to compute.
    """

    slots: Slots
    compute: Positions
    pages: PageIds
    copied_from: Slots
    lent: tuple[LentSlots, ...] = ()
    entries: list[Entry] = field(default_factory=list)

    @property
    def owned_runs(self) -> tuple[RunId, ...]:
        """Runs that the request owns and has yet to compute, each once."""
        published = (entry for entry in self.entries if isinstance(entry, StoredSegment))
        return tuple(dict.fromkeys(entry.run for entry in published))

    def reads(self) -> Slots:
        """Slots whose KV the request reads or copies, or its co-owners' tokens read."""
        lent = [one.text for one in self.lent]
        return np.concatenate([self.slots, self.copied_from[self.copied_from != NO_SLOT], *lent])


class Allocator:
    """Makes slots of plans, in a store."""

    def __init__(self, store: KVStore) -> None:
        """Take pages of `store`, and publish in its indexes."""
        self._store = store
        self._last_found: KnownKV | None = None

    def num_pages(self, plan: RequestPlan) -> int:
        """New pages that a plan needs."""
        return self._store.num_pages(map(len, plan.parts))

    def can_allocate(self, plan: RequestPlan, num_kept: int = 0) -> bool:
        """Say whether there is room, by eviction if need be; holds until the store changes.

        Args:
            plan: of a request.
            num_kept: pages that no request may hold afterwards: others may want them.
        """
        return self._store.can_make_room(self.num_pages(plan) + num_kept, self._find(plan).pages)

    def allocate(self, plan: RequestPlan, prompt: EncodedPrompt, round_id: RoundId) -> Allocation:
        """Hold what a plan reads, take pages for what it computes, and publish that.

        Call only after `can_allocate(plan)`, whatever was kept.

        Args:
            plan: of a request.
            prompt: of the request.
            round_id: likewise.
        """
        store, parts, found = self._store, plan.parts, self._find(plan)
        self._last_found = None
        slots = found.slots
        store.pool.retain(found.pages, Holder.REQUEST)
        sizes = [len(part) for part in parts]
        has_room = store.make_room(store.num_pages(sizes))
        assert has_room, "allocate() without can_allocate()"
        taken, pages = store.take_slots(sizes)
        for positions, fresh in zip(parts, taken, strict=True):
            slots[positions] = fresh
        held = np.union1d(found.pages, pages).astype(np.int32)
        lent = lent_slots(plan, slots)
        allocation = Allocation(slots, plan.compute, held, found.copied_from, lent)
        note_reuse(plan, store, round_id)
        if plan.publish:
            allocation.entries += publish(plan, store, prompt.prefix_hashes, slots, round_id)
        return allocation

    def _find(self, plan: RequestPlan) -> KnownKV:
        """Look up where the KV lies that a plan reads; once, if it is asked for the same again."""
        if self._last_found is None or self._last_found.plan is not plan:
            self._last_found = look_up(plan, self._store.page_size)
        return self._last_found
