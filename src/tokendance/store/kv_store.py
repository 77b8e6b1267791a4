"""The store: finds KV that was computed before, and makes room when memory is short.

Two indexes over one page pool:

    prefix     hash of all tokens up to the end of a page  ->  where the page's KV lies
    segments   hash of a shared segment's content          ->  where its KV lies, once per context

Both hold references to pages, never tensors. An entry may be published before its KV is computed:
`slot_ready` says which slots can be read, and a request that found unready ones waits for the
request that computes them. So requests that start together share like any others.

Eviction goes by `store/eviction.py`, and leaves out entries whose pages running requests hold.
A mirror holds the runs that it reads whole, so they stay as long as it runs. Entries of one prompt
are touched from its end to its beginning, so the end of a prompt goes before its start.
"""

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from tokendance.rounds.discovery import EarlierPrompt
from tokendance.rounds.segments import ChainHash, PrefixHashes, Salt, SegmentHash
from tokendance.store.entries import (
    CachedSegment,
    Entry,
    RoundId,
    RunId,
    Slots,
    StoredPage,
    StoredSegment,
    pages_of,
)
from tokendance.store.eviction import EvictionOrder
from tokendance.store.pages import Holder, PageIds, PagePool

# A text that repeats itself may be cached thousands of times; a request chooses from so many.
_MAX_CHOICES = 64


class KVStore:
    """Pages, what is known of each slot, and the two indexes.

    Attributes:
        pool: the pages.
        slot_ready: bool, whether the slot's KV is computed, or will be in the step that is being
            scheduled; the scheduler writes it.
        order: in which entries are evicted.
        slot_stamp: int64, which `take_slots` the slot was taken with; another number tells that
            what a slot held is gone.
        num_evicted: entries that have given way so far.
        in_transit: pages that whoever moves KV from elsewhere, or to there, holds from one step to
            another.
    """

    def __init__(self, pool: PagePool, max_reuse_rounds: int) -> None:
        """Make an empty store over a pool of pages.

        A segment that was reused in `max_reuse_rounds` rounds is computed afresh.
        """
        self.pool = pool
        num_slots = pool.num_pages * pool.page_size
        self.slot_ready = np.zeros(num_slots, np.bool_)
        self.slot_stamp = np.zeros(num_slots, np.int64)
        self.in_transit: dict[object, list[PageIds]] = {}
        self.num_evicted = 0
        self._num_taken = 0
        self._max_reuse_rounds = max_reuse_rounds
        self.order = EvictionOrder()
        # By whether they are exact.
        self._prefix: dict[bool, dict[ChainHash, StoredPage]] = {True: {}, False: {}}
        self._segments: dict[SegmentHash, list[StoredSegment]] = {}
        self._num_runs = 0

    # -- looking up ---------------------------------------------------------------------------

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.pool.page_size

    @property
    def num_slots(self) -> int:
        """Slots of all pages."""
        return len(self.slot_ready)

    def match_prefix(self, text: PrefixHashes, *, exact: bool) -> list[StoredPage]:
        """Find the pages of the longest known beginning of a text, valid until the next eviction.

        Changes nothing. `exact` leaves out pages that hold reused KV of another context.
        """

        def look_up(chain: ChainHash) -> StoredPage | None:
            page = self._prefix[True].get(chain)
            return page if page or exact else self._prefix[False].get(chain)

        return text.match(self.page_size, look_up)

    def match_slots(self, text: PrefixHashes) -> Slots:
        """Slots of the longest known beginning of a text, exact or not. Changes nothing."""
        return slots_of(self.match_prefix(text, exact=False))

    def cached(self, segment: SegmentHash, round_id: RoundId) -> Sequence[StoredSegment]:
        """Where a round may reuse a segment from, the newest last. Changes nothing.

        A round that has begun to reuse one may go on, so that its agents all read the same.
        """
        usable = (
            cached
            for cached in reversed(self._segments.get(segment, ()))
            if round_id in cached.rounds or len(cached.rounds) < self._max_reuse_rounds
        )
        return list(itertools.islice(usable, _MAX_CHOICES))[::-1]

    def all_cached(self, segment: SegmentHash) -> Sequence[StoredSegment]:
        """Everywhere that a segment is cached, also where it has been reused enough."""
        return self._segments.get(segment, ())

    # -- putting in ---------------------------------------------------------------------------

    def publish_prefix(
        self, text: PrefixHashes, slots: Slots, num_exact: int, *, guarded: bool = False
    ) -> list[Entry]:
        """Publish the pages of a text, each with the tokens before it.

        Args:
            text: at least as long as `slots`.
            slots: int32, of the tokens whose KV is or will be computed.
            num_exact: length of the beginning that holds no reused KV of another context.
            guarded: keep `publish_parts` from offering parts of it to others.

        Returns:
            The entries that are new; the caller drops them if it fails to compute them.
        """
        size = self.page_size
        new: list[Entry] = []
        touched: list[Entry] = []
        for start in range(0, len(slots), size):
            stop = min(start + size, len(slots))
            chain = text.of(stop, size)
            exact = stop <= num_exact
            entry = self._prefix[exact].get(chain)
            if entry is None:
                page = slots[start:stop].copy()
                entry = StoredPage(
                    chain, stop - start, exact, slots=page, pages=pages_of(page, size)
                )
                self._prefix[exact][chain] = entry
                new.append(entry)
            entry.guarded |= guarded
            touched.append(entry)
        self._add(new)
        self.touch(touched)
        return new

    def publish_run(
        self,
        segments: Sequence[tuple[SegmentHash, int, Slots]],
        round_id: RoundId | None = None,
        context: tuple[SegmentHash, ...] = (),
    ) -> list[StoredSegment]:
        """Publish the segments of a run.

        Args:
            segments: hash, position in the owner's prompt, and slots of each.
            round_id: in which the owner computes them, if it does.
            context: see `OwnedRun`.
        """
        run = RunId(self._num_runs)
        self._num_runs += 1
        new: list[StoredSegment] = []
        for index, (segment, start, slots) in enumerate(segments):
            own, pages = slots.copy(), pages_of(slots, self.page_size)
            cached = StoredSegment(
                segment, len(slots), run, index, start, round_id, slots=own, pages=pages
            )
            if context:
                cached.context = context
                cached.num_behind = len(context) - len(segments) + index
            self._segments.setdefault(segment, []).append(cached)
            new.append(cached)
        self._add(new)
        return new

    def publish_parts(
        self, text: PrefixHashes, parts: Iterable[tuple[int, int, SegmentHash]]
    ) -> None:
        """Publish parts of an earlier prompt as segments, where these are not cached yet.

        Of each part: first position, position after the last, and hash. What was computed behind
        text that its agent guards is left out.
        """
        missing = [part for part in parts if part[2] not in self._segments]
        if not missing:
            return
        pages = self.match_prefix(text, exact=False)
        slots = slots_of(pages)
        guarded = np.repeat([page.guarded for page in pages], [page.num_tokens for page in pages])
        # What is still being computed may fail, and then nobody would take it out of the index.
        ready = [
            (segment, first, slots[first:last])
            for first, last, segment in missing
            if last <= len(slots)
            and not guarded[first:last].any()
            and self.slot_ready[slots[first:last]].all()
        ]
        if ready:
            self.publish_run(ready)

    def recall(self, prompts: Iterable[EarlierPrompt], salt: Salt) -> None:
        """Publish parts of earlier prompts of a tenant, as far as their KV is still there."""
        for prompt in prompts:
            self.publish_parts(PrefixHashes(prompt.token_ids, salt), prompt.segments)

    def touch(self, entries: Sequence[Entry]) -> None:
        """Mark entries of one prompt, given from its beginning to its end, as just used."""
        self.order.begin_use()
        for entry in reversed(entries):
            if entry in self.order:
                self.order.use(entry)

    def count_reuse(self, cached: Iterable[CachedSegment], round_id: RoundId) -> None:
        """Note that mirrors of a round reuse these segments."""
        for segment in cached:
            segment.rounds.add(round_id)

    # -- making room ---------------------------------------------------------------------------

    @contextmanager
    def holding(self) -> Iterator[list[PageIds]]:
        """Hold pages that are in transit: those that are put into the list, each with a reference.

        They are let go at the end.
        """
        holder, held = object(), list[PageIds]()
        self.in_transit[holder] = held
        try:
            yield held
        finally:
            del self.in_transit[holder]
            for pages in held:
                self.pool.release(pages, Holder.REQUEST)

    def can_make_room(self, count: int, keep: PageIds) -> bool:
        """Say whether `count` pages could be free, with `keep` left alone. Changes nothing."""
        pool = self.pool
        taken = pool.num_refs(pool.all_pages(), Holder.REQUEST) > 0
        taken[keep] = True
        return count <= pool.num_pages - int(np.count_nonzero(taken))

    def make_room(self, count: int) -> bool:
        """Evict entries in their order until `count` pages are free; say if they are."""
        if self.pool.can_allocate(count):
            return True
        is_held = self.pool.num_refs(self.pool.all_pages(), Holder.REQUEST) > 0
        if count > self.pool.num_pages - np.count_nonzero(is_held):
            return False  # and nothing is evicted for it
        evicted, is_enough = self._to_evict(count - self.pool.num_free, is_held)
        self._drop(evicted)
        self.num_evicted += len(evicted)
        return is_enough

    def _to_evict(self, count: int, is_held: npt.NDArray[np.bool_]) -> tuple[list[Entry], bool]:
        """Entries in their order without which `count` pages more are free, and whether they are.

        There may be thousands of both kinds, those that go and those that are held, and another
        request waits meanwhile: numpy's calls for a page each would take most of the time.
        """
        # How many entries each page is of; -1 where a request holds it.
        num_refs = self.pool.num_refs(self.pool.all_pages(), Holder.INDEX)
        num_refs[is_held] = -1
        left = num_refs.data
        evicted: list[Entry] = []
        for entry in self.order.in_turn():
            pages: list[int] = entry.pages.tolist()
            free = [page for page in pages if left[page] >= 0]
            if not free:
                continue  # running requests hold all of it: taking it out would free nothing
            evicted.append(entry)
            for page in free:
                left[page] -= 1
                count -= left[page] == 0
            if count <= 0:
                return evicted, True
        return evicted, False

    def take_slots(self, sizes: Sequence[int]) -> tuple[list[Slots], PageIds]:
        """Allocate slots for parts of so many tokens, each in pages of its own.

        Call it after `make_room`.

        Returns:
            The slots of each part, not ready; and the pages, held for a request.
        """
        size = self.page_size
        pages = self.pool.allocate(self.num_pages(sizes))
        fresh = (pages[:, None] * size + np.arange(size, dtype=np.int32)).reshape(-1)
        self._num_taken += 1
        taken: list[Slots] = []
        offset = 0
        for count in sizes:
            slots: Slots = fresh[offset : offset + count].astype(np.int32)
            self.slot_ready[slots] = False
            self.slot_stamp[slots] = self._num_taken
            taken.append(slots)
            offset += self.num_pages([count]) * size
        return taken, pages

    def num_pages(self, sizes: Iterable[int]) -> int:
        """Pages that parts of so many tokens need."""
        return sum(-(-count // self.page_size) for count in sizes)

    def drop(self, entry: Entry) -> None:
        """Take one entry out of its index. Does nothing if it is gone already."""
        if entry in self.order:
            self._drop([entry])

    def clear(self, keep: Collection[Entry] = ()) -> None:
        """Drop every entry but some; pages that running requests hold live on until they end."""
        self._drop([entry for entry in self.order if entry not in keep])

    def _drop(self, entries: Sequence[Entry]) -> None:
        """Take entries out of their index, all of which are there."""
        for entry in entries:
            self.order.discard(entry)
            if isinstance(entry, StoredPage):
                del self._prefix[entry.exact][entry.chain]
            else:
                cached = self._segments[entry.hash]
                cached.remove(entry)
                if not cached:
                    del self._segments[entry.hash]
        if entries:
            # Who gives way first comes last, as the end of a prompt does.
            pages = np.concatenate([entry.pages for entry in reversed(entries)])
            self.pool.release(pages, Holder.INDEX)

    # -- bookkeeping --------------------------------------------------------------------------

    def _add(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self.order.add(entry)
        if entries:
            pages = np.concatenate([entry.pages for entry in entries])
            self.pool.retain(pages, Holder.INDEX)

    def check_integrity(self, request_pages: Iterable[PageIds]) -> None:
        """Assert that counts, indexes and the pages of each request that runs agree."""
        expected = np.zeros((len(Holder), self.pool.num_pages), np.int32)
        for pages in itertools.chain(request_pages, *self.in_transit.values()):
            expected[Holder.REQUEST][pages] += 1
        for entry in self.order:
            expected[Holder.INDEX][entry.pages] += 1
            assert np.array_equal(entry.pages, pages_of(entry.slots, self.page_size))
        self.pool.check_integrity(expected)
        published = set(
            itertools.chain(
                self._prefix[True].values(), self._prefix[False].values(), *self._segments.values()
            )
        )
        assert published == set(self.order), "the indexes and the eviction order disagree"


def slots_of(pages: Sequence[StoredPage]) -> Slots:
    """Slots of consecutive pages of a text, in the order of the tokens."""
    return np.concatenate([np.empty(0, np.int32), *(page.slots for page in pages)])
