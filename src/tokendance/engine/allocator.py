"""Allocation: slots for a plan. What it reads is held, what it computes gets pages of its own."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tokendance.collector.plan import Positions, RequestPlan, Role
from tokendance.rounds.segments import EncodedPrompt
from tokendance.store.entries import Entry, RoundId, Slots, StoredPage, StoredSegment, pages_of
from tokendance.store.kv_store import KVStore
from tokendance.store.pages import Holder, PageIds

NO_SLOT = -1


@dataclass(slots=True, eq=False)
class Allocation:
    """Where the KV of a request lies. The request holds the pages until it is released.

    Attributes:
        plan: that was carried out.
        slots: int32, of each position of prompt and answer.
        compute: prompt positions that take part in its forward passes, ascending.
        pages: distinct pages of what it reads, runs as a whole, and of what it computes.
        copied_from: int32, for each position the slot whose KV is copied to its own; NO_SLOT for
            none. Empty where nothing is copied.
        entries: that it has published, and has yet to compute.
    """

    plan: RequestPlan
    slots: Slots
    compute: Positions
    pages: PageIds
    copied_from: Slots
    entries: list[Entry] = field(default_factory=list)

    def reads(self) -> Slots:
        """Slots whose KV the request reads or copies."""
        return np.concatenate([self.slots, self.copied_from[self.copied_from != NO_SLOT]])


class Allocator:
    """Makes slots of plans, in a store."""

    def __init__(self, store: KVStore) -> None:
        """Take pages of `store`, and publish in its indexes."""
        self._store = store

    def num_pages(self, plan: RequestPlan) -> int:
        """New pages that a plan needs."""
        return self._store.num_pages(map(len, plan.parts))

    def can_allocate(self, plan: RequestPlan) -> bool:
        """Say whether there is room, by eviction if need be; holds until the store changes."""
        return self._store.can_make_room(self.num_pages(plan), self._kept(plan))

    def allocate(self, plan: RequestPlan, prompt: EncodedPrompt, round_id: RoundId) -> Allocation:
        """Hold what a plan reads, take pages for what it computes, and publish that.

        Call only after `can_allocate(plan)`.

        Args:
            plan: of a request.
            prompt: of the request.
            round_id: likewise.
        """
        store, parts = self._store, plan.parts
        num_prompt = plan.num_prompt
        slots = np.full(len(plan.roles), NO_SLOT, np.int32)
        copied_from = np.full(len(slots) if Role.COPIED in plan.roles else 0, NO_SLOT, np.int32)
        self._find(plan, slots, copied_from)
        kept = self._kept(plan)
        store.pool.retain(kept, Holder.REQUEST)
        has_room = store.make_room(store.num_pages(map(len, parts)))
        assert has_room, "allocate() without can_allocate()"
        taken, pages = store.take_slots([len(part) for part in parts])
        for positions, fresh in zip(parts, taken, strict=True):
            slots[positions] = fresh
        held = np.union1d(kept, pages).astype(np.int32)
        allocation = Allocation(plan, slots, plan.compute, held, copied_from)
        store.touch(_stored_pages(plan))
        sources = [_stored(use.source) for use in plan.uses]
        store.count_reuse(sources, round_id)
        store.touch(sources)
        if plan.publish:
            for run in plan.runs:
                segments = [
                    (segment, start, slots[start : start + length])
                    for start, segment, length in run.segments
                ]
                allocation.entries += store.publish_run(segments, round_id)
            allocation.entries += store.publish_prefix(
                prompt.prefix_hashes, slots[:num_prompt], plan.num_exact
            )
        return allocation

    def _find(self, plan: RequestPlan, slots: Slots, copied_from: Slots) -> None:
        """Write down where the KV lies that a plan reads and copies."""
        is_prefix = np.flatnonzero(plan.roles == Role.PREFIX)
        found = [page.slots for page in _stored_pages(plan)]
        if found:
            slots[is_prefix] = np.concatenate(found)[: len(is_prefix)]
        for use in plan.uses:
            roles = plan.roles[use.positions]
            source = _stored(use.source).slots
            slots[use.positions][roles == Role.REUSED] = source[roles == Role.REUSED]
            if len(copied_from):
                copied_from[use.positions][roles == Role.COPIED] = source[roles == Role.COPIED]

    def _kept(self, plan: RequestPlan) -> PageIds:
        """Pages that a plan reads, runs as a whole; they must not be evicted for its own sake."""
        slots: npt.NDArray[np.int32] = np.full(len(plan.roles), NO_SLOT, np.int32)
        self._find(plan, slots, np.empty(0, np.int32))
        read = pages_of(slots[slots != NO_SLOT], self._store.page_size)
        pages = np.concatenate([read, *(_stored(use.source).pages for use in plan.uses)])
        return np.unique(pages).astype(np.int32)


def _stored(source: object) -> StoredSegment:
    """A source of this store's index, which made it."""
    assert isinstance(source, StoredSegment)
    return source


def _stored_pages(plan: RequestPlan) -> list[StoredPage]:
    pages = [page for page in plan.prefix if isinstance(page, StoredPage)]
    assert len(pages) == len(plan.prefix)
    return pages
