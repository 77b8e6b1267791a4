"""Allocation: slots for a plan. What it reads is held, what it computes gets pages of its own."""

from dataclasses import dataclass, field

import numpy as np

from tokendance.collector.plan import Positions, RequestPlan, Role
from tokendance.rounds.segments import EncodedPrompt
from tokendance.store.entries import Entry, RoundId, Slots, StoredPage, StoredSegment
from tokendance.store.kv_store import KVStore
from tokendance.store.pages import Holder, PageIds

NO_SLOT = -1


@dataclass(slots=True, eq=False)
class Allocation:
    """Where the KV of a request lies. The request holds the pages until it is released.

    Attributes:
        slots: int32, of each position of prompt and answer.
        compute: prompt positions that take part in its forward passes, ascending.
        pages: distinct pages of what it reads, runs as a whole, and of what it computes.
        copied_from: int32, for each position the slot whose KV is copied to its own; NO_SLOT for
            none. Empty where nothing is copied.
        entries: that it has published, and has yet to compute.
    """

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
        self._last_found: _Found | None = None

    def num_pages(self, plan: RequestPlan) -> int:
        """New pages that a plan needs."""
        return self._store.num_pages(map(len, plan.parts))

    def can_allocate(self, plan: RequestPlan) -> bool:
        """Say whether there is room, by eviction if need be; holds until the store changes."""
        return self._store.can_make_room(self.num_pages(plan), self._find(plan).pages)

    def allocate(self, plan: RequestPlan, prompt: EncodedPrompt, round_id: RoundId) -> Allocation:
        """Hold what a plan reads, take pages for what it computes, and publish that.

        Call only after `can_allocate(plan)`.

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
        allocation = Allocation(slots, plan.compute, held, found.copied_from)
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
                prompt.prefix_hashes, slots[: plan.num_prompt], plan.num_exact
            )
        return allocation

    def _find(self, plan: RequestPlan) -> "_Found":
        """Look up where the KV lies that a plan reads; once, if it is asked for the same again."""
        if self._last_found is None or self._last_found.plan is not plan:
            self._last_found = self._look_up(plan)
        return self._last_found

    def _look_up(self, plan: RequestPlan) -> "_Found":
        slots: Slots = np.full(len(plan.roles), NO_SLOT, np.int32)
        copied_from = np.full(len(slots) if Role.COPIED in plan.roles else 0, NO_SLOT, np.int32)
        pages = [page.slots for page in _stored_pages(plan)]
        if pages:
            num_prefix = np.count_nonzero(plan.roles == Role.PREFIX)
            slots[:num_prefix] = np.concatenate(pages)[:num_prefix]
        sources = [_stored(use.source) for use in plan.uses]
        if sources:
            positions = np.concatenate([np.arange(use.start, use.stop) for use in plan.uses])
            source_slots = np.concatenate([source.slots for source in sources])
            for role, target in ((Role.REUSED, slots), (Role.COPIED, copied_from)):
                has_role = plan.roles[positions] == role
                if has_role.any():
                    target[positions[has_role]] = source_slots[has_role]
        read = slots[slots != NO_SLOT] // self._store.page_size
        held = np.unique(np.concatenate([read, *(source.pages for source in sources)]))
        return _Found(plan, slots, copied_from, held.astype(np.int32))


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """Where the KV lies that a plan reads.

    Attributes:
        plan: that was looked up.
        slots: int32, of each position; NO_SLOT where the plan computes.
        copied_from: see `Allocation`.
        pages: that are read, runs as a whole: they must not be evicted to make room for the plan.
    """

    plan: RequestPlan
    slots: Slots
    copied_from: Slots
    pages: PageIds


def _stored(source: object) -> StoredSegment:
    """A source of this store's index, which made it."""
    assert isinstance(source, StoredSegment)
    return source


def _stored_pages(plan: RequestPlan) -> list[StoredPage]:
    pages = [page for page in plan.prefix if isinstance(page, StoredPage)]
    assert len(pages) == len(plan.prefix)
    return pages
