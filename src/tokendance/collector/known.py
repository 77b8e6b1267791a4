"""Between a plan and the store that it was made over: where lies what it reads, and what it leaves.

Whoever computes plans over a `KVStore` looks them up here, whatever allocates their own pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokendance.collector.plan import RequestPlan, Role
from tokendance.rounds.segments import PrefixHashes
from tokendance.store.entries import (
    Entry,
    PrefixPage,
    RoundId,
    Slots,
    StoredPage,
    StoredSegment,
)
from tokendance.store.kv_store import KVStore
from tokendance.store.pages import PageIds

NO_SLOT = -1


@dataclass(frozen=True, slots=True, eq=False)
class KnownKV:
    """Where the KV lies that a plan reads.

    Attributes:
        plan: that was looked up.
        slots: int32, of each position; NO_SLOT where the plan computes.
        copied_from: int32, for each position the slot whose KV is copied to its own; NO_SLOT for
            none. Empty where nothing is copied.
        pages: that are read, runs as a whole: they must not be evicted to make room for the plan.
    """

    plan: RequestPlan
    slots: Slots
    copied_from: Slots
    pages: PageIds


def look_up(plan: RequestPlan, page_size: int) -> KnownKV:
    """Look up where the KV lies that a plan reads; it was made over a `KVStore`. Changes nothing.

    Args:
        plan: of a request.
        page_size: tokens per page of the store.
    """
    slots: Slots = np.full(len(plan.roles), NO_SLOT, np.int32)
    copied_from = np.full(len(slots) if Role.COPIED in plan.roles else 0, NO_SLOT, np.int32)
    pages = [page.slots for page in _stored_pages(plan)]
    if pages:
        num_prefix = np.count_nonzero(plan.roles == Role.PREFIX)
        slots[:num_prefix] = np.concatenate(pages)[:num_prefix]
    sources = _stored_sources(plan)
    if sources:
        positions = np.concatenate([np.arange(use.start, use.stop) for use in plan.uses])
        source_slots = np.concatenate([source.slots for source in sources])
        for role, target in ((Role.REUSED, slots), (Role.COPIED, copied_from)):
            has_role = plan.roles[positions] == role
            if has_role.any():
                target[positions[has_role]] = source_slots[has_role]
    read = slots[slots != NO_SLOT] // page_size
    lent = [page.pages for page in _lent_pages(plan)]
    held = np.unique(np.concatenate([read, *lent, *(source.pages for source in sources)]))
    return KnownKV(plan, slots, copied_from, held.astype(np.int32))


@dataclass(frozen=True, slots=True, eq=False)
class LentSlots:
    """What a co-owner's tokens of a run read.

    Attributes:
        begin: position of the first token of its text: 0, or more if the owner's is longer.
        end: position at which its text ends and the run begins.
        slots: int32, of each position up to the end of the run; 0 before `begin`.
    """

    begin: int
    end: int
    slots: Slots

    @property
    def text(self) -> Slots:
        """Slots of its text."""
        return self.slots[self.begin : self.end]


def lent_slots(plan: RequestPlan, slots: Slots) -> tuple[LentSlots, ...]:
    """Look up what the tokens of each co-owner read, in the order of `plan.lent.texts`.

    Args:
        plan: of a request.
        slots: int32, of each of its positions.
    """
    if plan.lent is None:
        return ()
    ((*_, (last, _, length)),) = (run.segments for run in plan.runs)
    found = []
    for text in plan.lent.texts:
        end = plan.lent.begin
        begin = end - text.num_tokens
        of_text = np.concatenate([page.slots for page in _as_stored(text.pages)])
        read = slots[: last + length].copy()
        read[:begin] = 0
        read[begin:end] = of_text[: text.num_tokens]
        found.append(LentSlots(begin, end, read))
    return tuple(found)


def note_reuse(plan: RequestPlan, store: KVStore, round_id: RoundId) -> None:
    """Note in the store that a request of a round reads what its plan says."""
    store.touch(_stored_pages(plan))
    store.touch(_lent_pages(plan))
    sources = _stored_sources(plan)
    store.count_reuse(sources, round_id)
    store.touch(sources)


def publish(
    plan: RequestPlan, store: KVStore, text: PrefixHashes, slots: Slots, round_id: RoundId
) -> list[Entry]:
    """Publish what a plan computes for others: its runs, and the pages of its prompt.

    Args:
        plan: of a request of the round.
        store: that it was made over.
        text: of its prompt.
        slots: int32, of its positions as far as they are known: at least of its runs.
        round_id: of the round.

    Returns:
        The entries that are new; the caller drops them if it fails to compute them.
    """
    new: list[Entry] = []
    for run in plan.runs:
        segments = [
            (segment, start, slots[start : start + length])
            for start, segment, length in run.segments
        ]
        new += store.publish_run(segments, round_id, run.context)
    prompt = slots[: plan.num_prompt]
    return new + store.publish_prefix(text, prompt, plan.num_exact, guarded=plan.guarded)


def _stored_sources(plan: RequestPlan) -> list[StoredSegment]:
    """The cached segments that a plan uses, as the store's index has them."""
    sources = [use.source for use in plan.uses]
    stored = [source for source in sources if isinstance(source, StoredSegment)]
    assert len(stored) == len(sources)
    return stored


def _stored_pages(plan: RequestPlan) -> list[StoredPage]:
    """The pages of the beginning that a plan reads, as the store's index has them."""
    return _as_stored(plan.prefix)


def _lent_pages(plan: RequestPlan) -> list[StoredPage]:
    """The pages of texts that co-owners lend it, likewise."""
    if plan.lent is None:
        return []
    return _as_stored([page for text in plan.lent.texts for page in text.pages])


def _as_stored(pages: Sequence[PrefixPage]) -> list[StoredPage]:
    stored = [page for page in pages if isinstance(page, StoredPage)]
    assert len(stored) == len(pages)
    return stored
